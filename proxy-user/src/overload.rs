//! Overload: what a worker is short of, and what it leaves off because of it, stage by stage.
//!
//! Three signals are looked at a few times a second: descriptors and memory, which run out, and the time that the loop takes to
//! come round. Each has a stage of its own. What runs out is saved by smaller buffers and by connections that end with their
//! exchange; where the loop is late neither would help, for a client that comes back costs more than one that stays. At the
//! last two stages requests are refused, and connections are left to the kernel, whatever the signal.

mod reading;

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use crate::drain::{Drain, Stop};
use crate::metric;
use crate::tunable;

pub use reading::{Sensors, trim};

/// How often a worker looks, with less than so many percent used of what runs out, and with more than the last: an attack takes
/// much in little time.
const TICKS: [(u32, Duration); 2] = [
    (40, Duration::from_millis(200)),
    (75, Duration::from_millis(50)),
];
const TICK_LAST: Duration = Duration::from_millis(20);

/// Turns of the loop that it looks at, for the longest: who keeps the worker busy is not ready in each of them.
pub const TURNS: usize = 8;

/// A stage is left only when the signal is so far below it, so that none is entered and left in turns.
const HYSTERESIS_PERCENT: u32 = 5;

/// What is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    Descriptors,
    Memory,
    Lag,
}

/// What is left off; each stage includes those before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Nothing.
    #[default]
    None,
    /// Large buffers.
    Lean,
    /// Connections that wait for another exchange.
    Close,
    /// New requests.
    Refuse,
    /// New connections.
    Rest,
}

/// How much of what there is each signal says is used, in percent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Readings(pub [u32; Signal::ALL.len()]);

impl Readings {
    /// When to look again.
    pub fn next_tick(self) -> Duration {
        let [descriptors, memory, _] = self.0;
        let used_percent = descriptors.max(memory);
        let tick = TICKS.into_iter().find(|(below, _)| used_percent < *below);
        tick.map_or(TICK_LAST, |(_, tick)| tick)
    }
}

/// The stages of one worker, and what its exchanges make of them.
pub struct Overload {
    stages: [Cell<Stage>; Signal::ALL.len()],
    /// The worst of all signals, and of those that run out.
    worst: Cell<Stage>,
    scarce: Cell<Stage>,
    /// Asked for while no connection is accepted; another one afterwards.
    rest: RefCell<Rc<Drain>>,
    metrics: Arc<metric::Worker>,
}

impl Signal {
    pub const ALL: [Self; 3] = [Self::Descriptors, Self::Memory, Self::Lag];

    /// The word for it in metrics and status.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Descriptors => "descriptors",
            Self::Memory => "memory",
            Self::Lag => "lag",
        }
    }

    /// The reason of requests that are refused because of it.
    const fn reason(self) -> &'static str {
        match self {
            Self::Descriptors => "overload_descriptors",
            Self::Memory => "overload_memory",
            Self::Lag => "overload_lag",
        }
    }
}

impl Stage {
    pub const ALL: [Self; 5] = [
        Self::None,
        Self::Lean,
        Self::Close,
        Self::Refuse,
        Self::Rest,
    ];

    /// The word for it in metrics and status.
    pub const fn word(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Lean => "lean",
            Self::Close => "close",
            Self::Refuse => "refuse",
            Self::Rest => "rest",
        }
    }

    /// Where it begins.
    fn percent(self, limits: &tunable::Values) -> u32 {
        let limits = &limits.worker;
        match self {
            Self::None => 0,
            Self::Lean => limits.overload_lean_percent,
            Self::Close => limits.overload_close_percent,
            Self::Refuse => limits.overload_refuse_percent,
            Self::Rest => limits.overload_rest_percent,
        }
    }

    /// The stage that a signal is at, coming from this one.
    fn after(self, used_percent: u32, limits: &tunable::Values) -> Self {
        let reached = |percent: u32| {
            let stages = Self::ALL.into_iter();
            stages
                .filter(|stage| stage.percent(limits) <= percent)
                .max()
                .unwrap_or_default()
        };
        let rising = reached(used_percent);
        if rising >= self {
            return rising;
        }
        reached(used_percent.saturating_add(HYSTERESIS_PERCENT)).min(self)
    }
}

impl Overload {
    pub fn new(metrics: Arc<metric::Worker>) -> Self {
        Self {
            stages: Default::default(),
            worst: Cell::default(),
            scarce: Cell::default(),
            rest: RefCell::default(),
            metrics,
        }
    }

    /// Takes new readings in; true where connections are to end with their exchange from now on.
    pub fn update(&self, worker: usize, readings: Readings, limits: &tunable::Values) -> bool {
        let closed_before = self.closes();
        for (index, signal) in Signal::ALL.into_iter().enumerate() {
            let used_percent = readings.0[index];
            let before = self.stages[index].get();
            let stage = before.after(used_percent, limits);
            self.metrics.overload[index].set(used_percent, stage as usize);
            if stage == before {
                continue;
            }
            self.stages[index].set(stage);
            self.metrics.overload[index].entered[stage as usize].add(1);
            let (signal, stage, before) = (signal.word(), stage.word(), before.word());
            log::warn!(
                "worker {worker}: overload by {signal}, {used_percent} % used: stage {stage} (it was {before})"
            );
        }
        let [descriptors, memory, lag] = &self.stages;
        self.scarce.set(descriptors.get().max(memory.get()));
        self.worst.set(self.scarce.get().max(lag.get()));
        if self.worst.get() >= Stage::Rest {
            self.rest.borrow().ask(Stop::Soon);
        } else if self.rest.borrow().is(Stop::Soon) {
            self.rest.take();
        }
        self.closes() && !closed_before
    }

    /// Memory is to be given back.
    pub fn is_short_of_memory(&self) -> bool {
        let [_, memory, _] = &self.stages;
        memory.get() >= Stage::Lean
    }

    /// Buffers are to be small.
    pub fn is_lean(&self) -> bool {
        self.scarce.get() >= Stage::Lean
    }

    /// Connections end with their exchange, and those to endpoints that are idle end at once.
    pub fn closes(&self) -> bool {
        self.scarce.get() >= Stage::Close
    }

    /// Why connections that have not brought a whole request yet end at once, if they do: it would be refused, and what has come
    /// of it takes what is scarce.
    pub fn ends_unbegun(&self) -> Option<&'static str> {
        self.refusal()
            .filter(|_| self.scarce.get() >= Stage::Refuse)
    }

    /// Why a new request is refused, if it is.
    #[inline]
    pub fn refusal(&self) -> Option<&'static str> {
        if self.worst.get() < Stage::Refuse {
            return None;
        }
        let stages = Signal::ALL.into_iter().zip(&self.stages);
        let (signal, _) = stages.max_by_key(|(_, stage)| stage.get())?;
        Some(signal.reason())
    }

    /// Asks to stop accepting, for as long as it is this one.
    pub fn rest(&self) -> Rc<Drain> {
        Rc::clone(&self.rest.borrow())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metric::Registry;
    use crate::tunable::Tunables;

    /// The stages that a signal goes through with these readings.
    fn stages(readings: &[u32]) -> Vec<&'static str> {
        let tunables = Tunables::default();
        let mut stage = Stage::None;
        let each = readings.iter().map(|used| {
            stage = stage.after(*used, &tunables);
            stage.word()
        });
        each.collect()
    }

    #[test]
    fn a_stage_is_entered_at_once_and_left_with_a_margin() {
        assert_eq!(
            stages(&[79, 80, 88, 94, 97, 200]),
            ["none", "lean", "close", "refuse", "rest", "rest"]
        );
        assert_eq!(
            stages(&[97, 93, 92, 91, 89, 88, 84, 76, 75, 74]),
            [
                "rest", "rest", "rest", "refuse", "refuse", "close", "close", "lean", "lean",
                "none"
            ]
        );
        assert_eq!(stages(&[99, 0, 99]), ["rest", "none", "rest"]);
    }

    #[test]
    fn what_runs_out_ends_connections_and_what_is_late_only_refuses() {
        let registry = Arc::new(Registry::new(1));
        let tunables = Tunables::default();
        let overload = Overload::new(registry.worker(0));
        let update = |readings| overload.update(0, Readings(readings), &tunables);
        assert!(!update([0, 0, 96]));
        assert!(!overload.is_lean() && !overload.closes() && !overload.rest().is(Stop::Soon));
        assert_eq!(overload.refusal(), Some("overload_lag"));
        assert!(update([0, 90, 0]), "it has begun");
        assert!(!update([0, 90, 0]), "and has begun before");
        assert!(overload.closes() && overload.refusal().is_none());
        assert!(!update([99, 90, 0]));
        assert_eq!(overload.refusal(), Some("overload_descriptors"));
        assert!(overload.rest().is(Stop::Soon));
        update([0, 0, 0]);
        assert!(!overload.is_lean() && overload.refusal().is_none());
        let text = registry.text(Default::default());
        for (signal, stage) in Signal::ALL
            .iter()
            .flat_map(|s| Stage::ALL.map(|stage| (s, stage)))
        {
            let (signal, stage) = (signal.word(), stage.word());
            let series = format!("_total{{signal=\"{signal}\",stage=\"{stage}\"}} ");
            assert!(text.contains(&series), "the same words: {series}");
        }
        for line in [
            "sluice_overload_entered_total{signal=\"descriptors\",stage=\"rest\"} 1",
            "sluice_overload_entered_total{signal=\"memory\",stage=\"none\"} 1",
            "sluice_overload_stage{signal=\"memory\"} 0",
        ] {
            assert!(text.contains(line), "{text}");
        }
    }
}
