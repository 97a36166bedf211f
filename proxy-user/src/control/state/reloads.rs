//! Who waits for a reload. What becomes of one is the answer to those who had asked when its files were read, and to no later one.

use std::collections::VecDeque;

use tokio::sync::oneshot;

use crate::config::Diagnostic;

/// The new generation, or what is wrong with it.
type Outcome = Result<u64, Vec<Diagnostic>>;

#[derive(Debug, Default)]
pub struct Reloads {
    /// How many were asked for so far.
    asked: u64,
    /// By the number that it was asked for as, the earliest first.
    waiting: VecDeque<(u64, oneshot::Sender<Outcome>)>,
}

impl Reloads {
    /// One more is asked for: its number.
    pub fn add(&mut self, way_back: oneshot::Sender<Outcome>) -> u64 {
        self.waiting.retain(|(_, way_back)| !way_back.is_closed());
        self.asked += 1;
        self.waiting.push_back((self.asked, way_back));
        self.asked
    }

    /// What became of the one that all up to this number had asked for before.
    pub fn answer(&mut self, asked: u64, outcome: &Outcome) {
        while let Some((_, way_back)) = self.waiting.pop_front_if(|(number, _)| *number <= asked) {
            let _ = way_back.send(outcome.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_who_had_asked_before_is_answered_and_who_is_gone_is_forgotten() {
        let mut reloads = Reloads::default();
        let mut ask = || {
            let (way_back, answer) = oneshot::channel();
            (reloads.add(way_back), answer)
        };
        let ((first, mut one), (second, mut two)) = (ask(), ask());
        drop(ask());
        let (last, mut four) = ask();
        assert_eq!((first, second, last), (1, 2, 4));
        assert_eq!(reloads.waiting.len(), 3);
        reloads.answer(0, &Ok(1));
        assert!(one.try_recv().is_err(), "nobody had asked for it");
        reloads.answer(second, &Ok(2));
        assert_eq!(one.try_recv(), Ok(Ok(2)));
        assert_eq!(two.try_recv(), Ok(Ok(2)));
        assert!(four.try_recv().is_err(), "it asked later");
        reloads.answer(last, &Err(Vec::new()));
        assert_eq!(four.try_recv(), Ok(Err(Vec::new())));
    }
}
