//! The rooms of the user half: the order in which they may use each other is in `xtask/src/tidy`.

pub mod codec;
pub mod config;
pub mod control;
pub mod datapath;
pub mod message;
pub mod metric;
pub mod net;
pub mod offload;
pub mod policy;
pub mod report;
pub mod route;
pub mod tls;
pub mod tunable;
pub mod upstream;

// FROM THE INTEGRATOR to the author of `datapath` (delete this note): an hour was lost to an outage. From 05:54 on another person writes
// keeper, control, admin, cli and main on branch `daemon`. You write ONLY datapath (+ offload, report, metric). Commit what compiles at once,
// by 06:10 at the latest; do not start on keeper/control/admin/cli/main. Then report.
