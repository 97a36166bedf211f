//! Fixture packets through the loaded XDP program: input and state in; verdict, action and every byte out.

#[path = "packet/guard.rs"]
mod guard;
#[path = "packet/loaded.rs"]
mod loaded;
#[path = "packet/nat.rs"]
mod nat;
#[path = "packet/pass.rs"]
mod pass;
