//! Wires over real sockets: nothing that arrives is lost, doubled or taken for something else, whenever a future is dropped.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use super::super::*;
use crate::message::{Framing, Limits, Parse, Reject};
use crate::net::{self, Either, Instant, Settings};

const PATIENCE: Duration = Duration::from_secs(10);

/// A wire, and a plain socket at its other end.
fn pair() -> (Wire, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let plain = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (accepted, _) = listener.accept().unwrap();
    plain.set_nodelay(true).unwrap();
    plain.set_read_timeout(Some(PATIENCE)).unwrap();
    let stream = net::Stream::from_fd(accepted.into()).unwrap();
    (Wire::new(stream), plain)
}

fn on_worker(test: impl Future<Output = ()>) {
    let settings = Settings {
        buffers: 64,
        buffer_bytes: 4096,
        ..Settings::default()
    };
    net::run(&settings, test).unwrap();
}

fn soon() -> Instant {
    net::now() + PATIENCE
}

/// Here a head is a line.
fn line(heads: &mut Vec<String>) -> impl FnMut(&[u8]) -> Result<Parse, Reject> {
    |bytes| match bytes.iter().position(|byte| *byte == b'\n') {
        None if bytes.len() > 8 => Err(Reject::bad("too_long")),
        None => Ok(Parse::Partial),
        Some(end) => {
            heads.push(String::from_utf8_lossy(&bytes[..end]).into_owned());
            Ok(Parse::Complete(end + 1))
        }
    }
}

fn body<'w>(wire: &'w mut Wire, framing: Framing) -> (Body<'w>, &'w crate::tls::Transport) {
    let (reader, transport) = wire.split();
    let decoder = BodyDecoder::new(framing, &Limits::default());
    (reader.body(decoder), transport)
}

#[test]
fn heads_and_bodies_come_out_in_the_order_in_which_they_came_in() {
    on_worker(async {
        let (mut wire, mut plain) = pair();
        assert!(wire.is_quiet());
        plain.write_all(b"one\nbodytwo\nthree\nfo").unwrap();
        let mut heads = Vec::new();
        let (mut reader, _) = wire.split();
        assert!(reader.wait().await);
        reader.head(soon(), line(&mut heads)).await.unwrap();
        let (mut body, _) = body(&mut wire, Framing::Length(4));
        let data = body.next().await.unwrap();
        assert_eq!(data.as_deref(), Some(&b"body"[..]));
        assert!(body.is_ended() && body.next().await.unwrap().is_none());
        let (mut reader, _) = wire.split();
        reader.head(soon(), line(&mut heads)).await.unwrap();
        reader.head(soon(), line(&mut heads)).await.unwrap();
        // A future that is dropped has lost nothing: neither what lay here nor what comes later.
        let early = reader.head(net::now(), line(&mut heads)).await;
        assert!(matches!(early, Err(HeadError::Late)));
        plain.write_all(b"ur\nx").unwrap();
        reader.head(soon(), line(&mut heads)).await.unwrap();
        assert_eq!(heads, ["one", "two", "three", "four"]);
        assert!(!wire.is_quiet());
    });
}

#[test]
fn why_there_is_no_head_is_told_apart() {
    on_worker(async {
        let mut heads = Vec::new();
        for (said, ends) in [
            ("", true),
            ("cut", true),
            ("far too long", false),
            ("late", false),
        ] {
            let (mut wire, mut plain) = pair();
            plain.write_all(said.as_bytes()).unwrap();
            if ends {
                plain.shutdown(std::net::Shutdown::Write).unwrap();
            }
            let (mut reader, _) = wire.split();
            assert_eq!(reader.wait().await, !said.is_empty());
            let deadline = net::now() + Duration::from_millis(100);
            let error = reader.head(deadline, line(&mut heads)).await.unwrap_err();
            let as_told = match said {
                "" => matches!(error, HeadError::Gone),
                "cut" => matches!(error, HeadError::CutShort),
                "late" => matches!(error, HeadError::Late),
                _ => matches!(error, HeadError::Refused(_)),
            };
            assert!(as_told, "{said:?}: {error:?}");
        }
        assert!(heads.is_empty());
    });
}

#[test]
fn chunks_that_share_a_buffer_come_out_as_one_piece() {
    on_worker(async {
        let (mut wire, mut plain) = pair();
        // Extensions and trailers between them, and the next message behind.
        plain
            .write_all(b"1\r\na\r\n2;x=y\r\nbc\r\n03\r\ndef\r\n0\r\nt: v\r\n\r\nnext\n")
            .unwrap();
        let (mut reader, _) = wire.split();
        assert!(reader.wait().await);
        let (mut body, _) = body(&mut wire, Framing::Chunked);
        let data = body.ready().unwrap();
        assert_eq!(data.as_deref(), Some(&b"abcdef"[..]));
        assert!(body.is_ended() && body.ready().unwrap().is_none());
        let mut heads = Vec::new();
        let (mut reader, _) = wire.split();
        reader.head(soon(), line(&mut heads)).await.unwrap();
        assert_eq!(heads, ["next"]);
    });
}

#[test]
fn a_body_that_is_cut_short_or_broken_says_so() {
    on_worker(async {
        for (framing, said, is_cut) in [
            (Framing::Length(9), "four", true),
            (Framing::Chunked, "4\r\nfour\r\n", true),
            (Framing::Chunked, "4\r\nfour\r\n0\r\n", true),
            (Framing::Chunked, "nothing", false),
        ] {
            let (mut wire, mut plain) = pair();
            plain.write_all(said.as_bytes()).unwrap();
            drop(plain);
            let (mut body, _) = body(&mut wire, framing);
            let error = loop {
                match body.next().await {
                    Ok(Some(_)) => {}
                    Ok(None) => panic!("a fake end of {said:?}"),
                    Err(error) => break error,
                }
            };
            assert_eq!(matches!(error, BodyError::CutShort), is_cut, "{said:?}");
        }
    });
}

/// The transfer is dropped in the middle of whatever it waits for, again and again.
#[test]
fn a_transfer_that_is_dropped_and_run_again_loses_nothing() {
    const BYTES: usize = 6_000_000;
    let pattern: Vec<u8> = (0..BYTES as u32).map(|n| ((n * 7) >> 3) as u8).collect();
    for (framing, chunk, splice_bytes_min) in [
        (Framing::Length(BYTES as u64), 0, 0),
        (Framing::Length(BYTES as u64), 0, 1),
        (Framing::Chunked, 10, 1),
        (Framing::Chunked, 9000, 1),
    ] {
        let mut sent = Vec::new();
        for data in pattern.chunks(if chunk == 0 { BYTES } else { chunk }) {
            if chunk > 0 {
                sent.extend_from_slice(format!("{:x}\r\n", data.len()).as_bytes());
            }
            sent.extend_from_slice(data);
            if chunk > 0 {
                sent.extend_from_slice(b"\r\n");
            }
        }
        if chunk > 0 {
            sent.extend_from_slice(b"0\r\n\r\n");
        }
        let mut received = Vec::new();
        on_worker(async {
            let ((mut from, mut source), (to, mut sink)) = (pair(), pair());
            let sending = std::thread::spawn(move || source.write_all(&sent));
            let receiving = std::thread::spawn(move || {
                let mut received = Vec::new();
                sink.read_to_end(&mut received).map(|_| received)
            });
            let (mut body, _) = body(&mut from, framing);
            let pace = Pace {
                batch_bytes_max: 128 << 10,
                wait: PATIENCE,
                rate_min: 0,
                send: PATIENCE,
                bytes_max: BYTES as u64,
                splice_bytes_min,
            };
            let encoder = BodyEncoder::new(Framing::Length(BYTES as u64));
            let head = b"head\n".to_vec();
            let mut transfer = Transfer::new(head, &mut body, encoder, to.transport(), pace);
            let (mut drops, end) = (0, soon());
            while !transfer.is_done() {
                assert!(net::now() < end);
                match net::select(transfer.run(), net::yield_now()).await {
                    Either::Left(done) => done.unwrap(),
                    Either::Right(()) => drops += 1,
                }
            }
            assert!(drops > 5, "dropped {drops} times");
            to.transport().shutdown().await.unwrap();
            sending.join().unwrap().unwrap();
            received = receiving.join().unwrap().unwrap();
        });
        assert!(received.starts_with(b"head\n") && received[5..] == pattern[..]);
    }
}

#[test]
fn a_transfer_ends_at_the_first_byte_too_many() {
    on_worker(async {
        let ((mut from, mut source), (to, _sink)) = (pair(), pair());
        source.write_all(b"6\r\nsixsix\r\n0\r\n\r\n").unwrap();
        let (mut body, _) = body(&mut from, Framing::Chunked);
        let pace = Pace {
            wait: PATIENCE,
            rate_min: 0,
            send: PATIENCE,
            bytes_max: 5,
            batch_bytes_max: 128 << 10,
            splice_bytes_min: 0,
        };
        let encoder = BodyEncoder::new(Framing::Chunked);
        let mut transfer = Transfer::new(Vec::new(), &mut body, encoder, to.transport(), pace);
        let done = transfer.run().await;
        assert!(matches!(done, Err(TransferError::TooLarge)));
    });
}
