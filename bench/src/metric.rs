//! What can be measured: each figure's name and unit, as reports have them, and which way is better.

use crate::load::Pace;
use crate::scenario::{Case, Work};

/// One kind of figure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Metric {
    CpuUsPerRequest,
    /// Of both cores: where the work is the kernel's, no process has it on its account. Clients and origin are part of it.
    MachineUsPerRequest,
    CpuSPerGib,
    MachineSPerGib,
    RequestsPerS,
    P50Us,
    P99Us,
    RssBytesPerConnection,
    NsPerPacket,
    PacketsPerS,
    StartMs,
    ReloadMs,
    ChangeMs,
    VerifiedInstructions,
    JitBytes,
    InstructionsPerCall,
    FutureBytes,
}

impl Metric {
    const ALL: &[Self] = &[
        Self::CpuUsPerRequest,
        Self::MachineUsPerRequest,
        Self::CpuSPerGib,
        Self::MachineSPerGib,
        Self::RequestsPerS,
        Self::P50Us,
        Self::P99Us,
        Self::RssBytesPerConnection,
        Self::NsPerPacket,
        Self::PacketsPerS,
        Self::StartMs,
        Self::ReloadMs,
        Self::ChangeMs,
        Self::VerifiedInstructions,
        Self::JitBytes,
        Self::InstructionsPerCall,
        Self::FutureBytes,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::CpuUsPerRequest => "cpu_us_per_request",
            Self::MachineUsPerRequest => "machine_us_per_request",
            Self::CpuSPerGib => "cpu_s_per_gib",
            Self::MachineSPerGib => "machine_s_per_gib",
            Self::RequestsPerS => "requests_per_s",
            Self::P50Us => "p50_us",
            Self::P99Us => "p99_us",
            Self::RssBytesPerConnection => "rss_bytes_per_connection",
            Self::NsPerPacket => "ns_per_packet",
            Self::PacketsPerS => "packets_per_s",
            Self::StartMs => "start_ms",
            Self::ReloadMs => "reload_ms",
            Self::ChangeMs => "change_ms",
            Self::VerifiedInstructions => "verified_instructions",
            Self::JitBytes => "jit_bytes",
            Self::InstructionsPerCall => "instructions_per_call",
            Self::FutureBytes => "future_bytes",
        }
    }

    pub fn unit(self) -> &'static str {
        match self {
            Self::CpuUsPerRequest | Self::MachineUsPerRequest | Self::P50Us | Self::P99Us => "us",
            Self::CpuSPerGib | Self::MachineSPerGib => "s",
            Self::RequestsPerS | Self::PacketsPerS => "1/s",
            Self::RssBytesPerConnection | Self::JitBytes | Self::FutureBytes => "B",
            Self::NsPerPacket => "ns",
            Self::StartMs | Self::ReloadMs | Self::ChangeMs => "ms",
            Self::VerifiedInstructions | Self::InstructionsPerCall => "1",
        }
    }

    /// The one with this name.
    pub fn find(name: &str) -> Option<Self> {
        Self::ALL
            .iter()
            .copied()
            .find(|metric| metric.name() == name)
    }

    /// More of it is worse.
    pub fn is_cost(self) -> bool {
        !matches!(self, Self::RequestsPerS | Self::PacketsPerS)
    }

    /// Does not depend on what else the machine does: any difference is a change.
    pub fn is_exact(self) -> bool {
        matches!(
            self,
            Self::VerifiedInstructions
                | Self::JitBytes
                | Self::InstructionsPerCall
                | Self::FutureBytes
        )
    }

    /// Those that a case has; the first one is its main figure.
    pub fn of(case: &Case) -> Vec<Self> {
        let (per_request, per_gib) = match case.site.layer {
            crate::peer::Layer::Requests => (Self::CpuUsPerRequest, Self::CpuSPerGib),
            crate::peer::Layer::Packets => (Self::MachineUsPerRequest, Self::MachineSPerGib),
        };
        match case.work {
            Work::Exchanges(Pace::Saturated) => vec![per_request, Self::RequestsPerS],
            Work::Exchanges(Pace::PerSecond(_)) => {
                let mut metrics = vec![per_request, Self::RequestsPerS, Self::P50Us, Self::P99Us];
                if case.is_bulk() {
                    metrics.insert(0, per_gib);
                }
                metrics
            }
            Work::Transfer(_) => vec![per_gib],
            Work::Datagrams => vec![per_request, Self::RequestsPerS],
            Work::Idle => vec![Self::RssBytesPerConnection],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_metric_is_found_by_its_name() {
        for metric in Metric::ALL {
            assert_eq!(Metric::find(metric.name()), Some(*metric));
        }
        assert_eq!(Metric::find("furlongs"), None);
    }
}
