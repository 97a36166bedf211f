//! Fixture packets through the loaded XDP program: input and state in; verdict, action and every byte out.
#![expect(clippy::unwrap_used, reason = "a test's unwrap is its assertion")]

#[path = "packet/cases.rs"]
mod cases;
#[path = "packet/flow.rs"]
mod flow;
#[path = "packet/generated.rs"]
mod generated;
#[path = "packet/guard.rs"]
mod guard;
#[path = "packet/katran.rs"]
mod katran;
#[path = "packet/loaded.rs"]
mod loaded;
#[path = "packet/mirror.rs"]
mod mirror;
#[path = "packet/mss.rs"]
mod mss;
#[path = "packet/nat.rs"]
mod nat;
#[path = "packet/pass.rs"]
mod pass;
#[path = "packet/pool.rs"]
mod pool;
#[path = "packet/prefix.rs"]
mod prefix;
#[path = "packet/rare.rs"]
mod rare;
#[path = "packet/sent.rs"]
mod sent;
#[path = "packet/sign.rs"]
mod sign;
#[path = "packet/steer.rs"]
mod steer;
#[path = "packet/verifier.rs"]
mod verifier;
