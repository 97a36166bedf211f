//! What fuzzing found worth keeping, again in each run of the tests.
#![expect(clippy::unwrap_used, reason = "a test's unwrap is its assertion")]

fn replay(target: &str, run: fn(&[u8])) {
    let inputs = rig::fuzz::corpus(target).unwrap();
    assert!(!inputs.is_empty());
    for (path, input) in inputs {
        println!("{}", path.display());
        run(&input);
    }
}

#[test]
fn the_parser_reads_the_corpus_as_the_model_does() {
    replay("parse", rig::fuzz::parse);
}

#[test]
fn packets_of_the_corpus_are_written_as_the_model_writes_them() {
    replay("write", rig::fuzz::write);
}

#[test]
fn the_model_judges_the_corpus_without_a_contradiction() {
    replay("judge", rig::fuzz::judge);
}

#[test]
fn frames_to_begin_with_pass_every_target() {
    for frame in rig::fuzz::seeds() {
        rig::fuzz::parse(&frame);
        rig::fuzz::write(&[&[7; 8], &frame[..]].concat());
        let length = frame.len().div_ceil(4) as u8;
        rig::fuzz::judge(&[&[7; 8][..], &[length], &frame].concat());
    }
}
