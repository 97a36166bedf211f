//! Bodies on the wire: read to the letter, wherever they are cut; written as announced.

mod wire;

use super::*;

/// Decodes a body whose bytes arrive in pieces of this size: its data and what follows it, or why it is refused. A body
/// that does not end is what closing makes of it.
fn decode_in(
    framing: Framing,
    wire: &[u8],
    size: usize,
    limits: &Limits,
) -> Result<(Vec<u8>, Vec<u8>), &'static str> {
    let mut decoder = BodyDecoder::new(framing, limits);
    let mut data = Vec::new();
    let mut at = 0;
    for piece in wire.chunks(size) {
        let mut rest = piece;
        while !rest.is_empty() && !decoder.is_ended() {
            let found = decoder.decode(rest).map_err(|reject| reject.reason)?;
            assert!(
                found.consumed > 0 && found.data.end <= found.consumed,
                "{found:?}"
            );
            data.extend_from_slice(&rest[found.data]);
            rest = &rest[found.consumed..];
            at += found.consumed;
            assert_eq!(found.end, decoder.is_ended());
        }
    }
    decoder.close().map_err(|reject| reject.reason)?;
    Ok((data, wire[at..].to_vec()))
}

/// The same in pieces of every size; all must come to the same.
fn decode(framing: Framing, wire: impl AsRef<[u8]>) -> Result<(String, String), &'static str> {
    let (wire, limits) = (wire.as_ref(), Limits::default());
    let whole = decode_in(framing, wire, wire.len().max(1), &limits);
    for size in 1..wire.len().min(64) {
        assert_eq!(
            decode_in(framing, wire, size, &limits),
            whole,
            "in pieces of {size}: {:?}",
            String::from_utf8_lossy(wire)
        );
    }
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    whole.map(|(data, rest)| (text(data), text(rest)))
}

fn body(data: &str, rest: &str) -> Result<(String, String), &'static str> {
    Ok((data.to_owned(), rest.to_owned()))
}

#[test]
fn a_body_ends_where_its_framing_says_and_the_rest_is_the_next_message() {
    assert_eq!(decode(Framing::None, "GET /"), body("", "GET /"));
    assert_eq!(decode(Framing::Length(0), "GET /"), body("", "GET /"));
    assert_eq!(
        decode(Framing::Length(5), "helloGET /"),
        body("hello", "GET /")
    );
    assert_eq!(decode(Framing::UntilClose, "hello"), body("hello", ""));
    assert_eq!(
        decode(Framing::Chunked, "5\r\nhello\r\n0\r\n\r\nGET /"),
        body("hello", "GET /")
    );
    assert_eq!(decode(Framing::Chunked, "0\r\n\r\n"), body("", ""));
    assert_eq!(
        decode(
            Framing::Chunked,
            "A\r\n0123456789\r\n1\r\n\r\r\n00\r\n\r\n\r\n"
        ),
        body("0123456789\r", "\r\n")
    );
}

#[test]
fn a_body_cut_short_is_not_taken_for_whole() {
    for (framing, wire) in [
        (Framing::Length(5), "hell"),
        (Framing::Length(5), ""),
        (Framing::Chunked, ""),
        (Framing::Chunked, "5\r\nhell"),
        (Framing::Chunked, "5\r\nhello"),
        (Framing::Chunked, "5\r\nhello\r\n"),
        (Framing::Chunked, "5\r\nhello\r\n0\r\n"),
        (Framing::Chunked, "5\r\nhello\r\n0\r\n\r"),
    ] {
        assert_eq!(decode(framing, wire), Err("body_cut_short"), "{wire:?}");
    }
}

#[test]
fn a_chunk_size_is_hexadecimal_digits_and_nothing_else() {
    for wire in [
        "+5\r\nhello",
        "-5\r\nhello",
        "0x5\r\nhello",
        "5\nhello",
        "5\r hello",
        "5 \r\nhello",
        " 5\r\nhello",
        "\r\nhello",
        "5\r\r\nhello",
        "5g\r\nhello",
        ";x\r\n",
        "5,5\r\n",
        "00000000000000005\r\nhello",
        "10000000000000000\r\n",
        "\u{665}\r\n",
        "\0",
        "5\0\r\n",
        "_5\r\n",
        "5\t;x\r\n",
    ] {
        assert_eq!(
            decode(Framing::Chunked, wire),
            Err("chunk_size"),
            "{wire:?}"
        );
    }
    assert_eq!(
        decode(Framing::Chunked, "0000000000000005\r\nhello\r\n0\r\n\r\n"),
        body("hello", "")
    );
    assert_eq!(
        decode(Framing::Chunked, "ffffffffffffffff\r\nhello"),
        Err("body_cut_short"),
        "the largest size is no panic"
    );
}

#[test]
fn the_data_of_a_chunk_ends_with_crlf() {
    for wire in [
        "5\r\nhello0\r\n\r\n",
        "5\r\nhello\n0\r\n\r\n",
        "5\r\nhello\r0\r\n\r\n",
        "5\r\nhello \r\n0\r\n\r\n",
        "4\r\nhello\r\n0\r\n\r\n",
    ] {
        assert_eq!(
            decode(Framing::Chunked, wire),
            Err("chunk_data_end"),
            "{wire:?}"
        );
    }
}

#[test]
fn extensions_are_read_over_within_a_bound_for_the_whole_body() {
    assert_eq!(
        decode(
            Framing::Chunked,
            "5;a=b;c=\"d e\"\r\nhello\r\n0;last\r\n\r\n"
        ),
        body("hello", "")
    );
    for wire in ["5;a\nhello", "5;a\0\r\n", "5;a\u{7f}\r\n"] {
        assert_eq!(
            decode(Framing::Chunked, wire),
            Err("chunk_extension"),
            "{wire:?}"
        );
    }
    assert_eq!(decode(Framing::Chunked, "5;a\rb\r\n"), Err("chunk_size"));
    let extended =
        |bytes: usize| format!("1;{}\r\nx\r\n", "e".repeat(bytes - 1)).repeat(4) + "0\r\n\r\n";
    assert_eq!(decode(Framing::Chunked, extended(1024)), body("xxxx", ""));
    assert_eq!(
        decode(Framing::Chunked, extended(1025)),
        Err("chunk_extension_too_long")
    );
}

#[test]
fn trailers_are_checked_and_dropped() {
    let trailers = "0\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\nHost: b\r\nX-Sum: \u{e9} 1\r\nX:\r\n\r\nGET /";
    assert_eq!(decode(Framing::Chunked, trailers), body("", "GET /"));
    for wire in [
        "0\r\nX: 1\n\r\n",
        "0\r\nX: a\rb\r\n\r\n",
        "0\r\nX : 1\r\n\r\n",
        "0\r\n X: 1\r\n\r\n",
        "0\r\nX: 1\r\n folded\r\n\r\n",
        "0\r\n: 1\r\n\r\n",
        "0\r\nX\r\n\r\n",
        "0\r\nX: \0\r\n\r\n",
        "0\r\n\n",
        "0\r\n\r\r\n",
        "0\r\n\rx",
    ] {
        assert_eq!(decode(Framing::Chunked, wire), Err("trailer"), "{wire:?}");
    }
    let long = |lines: usize| {
        format!(
            "0\r\n{}\r\n",
            format!("X: {}\r\n", "v".repeat(1021)).repeat(lines)
        )
    };
    assert_eq!(decode(Framing::Chunked, long(8)), body("", ""));
    assert_eq!(decode(Framing::Chunked, long(9)), Err("trailer_too_long"));
}

/// SplitMix64.
fn below(state: &mut u64, bound: usize) -> usize {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mixed = (*state ^ *state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    ((mixed ^ mixed >> 27) % bound as u64) as usize
}

/// Data in runs of these sizes as it stands on the wire.
fn encode(framing: Framing, data: &[u8], mut run: impl FnMut() -> usize) -> Vec<u8> {
    let mut encoder = BodyEncoder::new(framing);
    let mut wire = Vec::new();
    let mut rest = data;
    while !rest.is_empty() {
        let (now, later) = rest.split_at(run().min(rest.len()));
        let frame = encoder.frame(now.len()).expect("within what was announced");
        wire.extend_from_slice(frame.prefix());
        wire.extend_from_slice(now);
        wire.extend_from_slice(frame.suffix());
        rest = later;
    }
    wire.extend_from_slice(encoder.end().expect("all that was announced"));
    wire
}

#[test]
fn what_is_encoded_decodes_to_the_same_data() {
    let mut state = 1;
    for len in (0..300).chain([4095, 4096, 70_000]) {
        let data: Vec<u8> = (0..len).map(|_| below(&mut state, 256) as u8).collect();
        for framing in [
            Framing::Length(len as u64),
            Framing::Chunked,
            Framing::UntilClose,
        ] {
            let mut wire = encode(framing, &data, || below(&mut state, 5000));
            if framing != Framing::UntilClose {
                wire.extend_from_slice(b"GET /");
            }
            let size = 1 + below(&mut state, 3000);
            let (decoded, rest) =
                decode_in(framing, &wire, size, &Limits::default()).expect("a good body");
            assert!(
                decoded == data && (rest == b"GET /" || framing == Framing::UntilClose),
                "{framing:?} {len}"
            );
        }
    }
}

#[test]
fn a_sender_is_held_to_the_length_it_announced() {
    let mut encoder = BodyEncoder::new(Framing::Length(5));
    assert!(encoder.frame(3).is_ok());
    assert_eq!(encoder.end(), Err(LengthMismatch), "too little");
    assert_eq!(encoder.frame(3), Err(LengthMismatch), "too much");
    let mut encoder = BodyEncoder::new(Framing::Length(5));
    assert!(encoder.frame(5).is_ok() && encoder.frame(0).is_ok());
    assert_eq!(encoder.end(), Ok(&b""[..]));
    assert_eq!(
        BodyEncoder::new(Framing::None).frame(1),
        Err(LengthMismatch)
    );
}

#[test]
fn a_chunk_of_nothing_is_not_sent_before_the_end() {
    let mut encoder = BodyEncoder::new(Framing::Chunked);
    let nothing = encoder.frame(0).expect("nothing is fine");
    assert!(nothing.prefix().is_empty() && nothing.suffix().is_empty());
    for (len, prefix) in [
        (1, &b"1\r\n"[..]),
        (15, b"f\r\n"),
        (16, b"10\r\n"),
        (0xabcdef, b"abcdef\r\n"),
        (usize::MAX, b"ffffffffffffffff\r\n"),
    ] {
        let frame = encoder.frame(len).expect("any length is fine");
        assert_eq!((frame.prefix(), frame.suffix()), (prefix, &b"\r\n"[..]));
    }
    assert_eq!(encoder.end(), Ok(&b"0\r\n\r\n"[..]));
}

#[test]
fn mutilated_chunks_do_no_harm_and_are_judged_alike_wherever_they_are_cut() {
    let mut state = 3;
    let good = b"5;x=y\r\nhello\r\n1f\r\n0123456789012345678901234567890\r\n0\r\nX-Sum: 1\r\n\r\n";
    let mut taken = 0;
    for _ in 0..20_000 {
        let mut wire = good.to_vec();
        for _ in 0..=below(&mut state, 3) {
            let at = below(&mut state, wire.len());
            match below(&mut state, 3) {
                0 => wire[at] = b"\r\n 0;:x\0f\xff"[below(&mut state, 10)],
                1 => drop(wire.remove(at)),
                _ => wire.insert(at, b"\r\n 0;:x\0f\xff"[below(&mut state, 10)]),
            }
        }
        taken += usize::from(fuzz::check(&wire, 1 + below(&mut state, 9)));
    }
    assert!(
        taken > 1000,
        "the wounds are too deep to tell anything: {taken}"
    );
}
