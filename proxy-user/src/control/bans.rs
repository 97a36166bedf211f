//! Who is refused and until when: in the kernel where there is a datapath, and at accept everywhere.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

use super::offences::ban_key;
use crate::datapath::Writer;
use crate::offload::{Denied, now_ns};

/// The name that bans made by hand go by.
pub const OPERATOR: &str = "operator";

/// Most bans where no kernel half says how many it has room for: the next daemon must be told of all of them.
const BANS_MAX: usize = proxy_ebpf::abi::size::BANS as usize;

/// Longest ban.
const DURATION_MAX: Duration = Duration::from_secs(366 * 24 * 3600);

/// A ban, as it is shown.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BanStatus {
    /// An IPv4 address, or the first address of an IPv6 /64.
    pub source: IpAddr,
    /// The policy that asked for it, or `operator`.
    pub rule: String,
    pub ends_in_ms: u64,
    /// Packets that the kernel half dropped; absent without a datapath.
    pub packets_dropped: Option<u64>,
}

/// The bans in force.
pub struct Bans {
    denied: Arc<Denied>,
    /// Until when (coarse clock), and by which rule.
    table: BTreeMap<IpAddr, (u64, String)>,
}

impl Bans {
    /// Takes over what stands in the kernel, where a daemon before us may have left bans; without a datapath what is
    /// remembered of them.
    ///
    /// # Errors
    /// The maps cannot be read.
    pub fn adopt(
        denied: Arc<Denied>,
        datapath: Option<&Writer>,
        remembered: &[(IpAddr, u64, String)],
    ) -> Result<Self> {
        let table = match datapath {
            Some(datapath) => datapath
                .bans()?
                .into_iter()
                .map(|ban| (ban.source, (ban.until_ns, ban.rule)))
                .collect(),
            None => remembered
                .iter()
                .map(|(source, until_ns, rule)| (*source, (*until_ns, rule.clone())))
                .collect(),
        };
        let bans = Self { denied, table };
        bans.publish();
        Ok(bans)
    }

    /// Refuses a source from now on for `duration`. One that is banned already stays so for the longer of the two.
    ///
    /// # Errors
    /// The table is full, in the kernel or here; an address that means no single source.
    pub fn add(
        &mut self,
        datapath: Option<&mut Writer>,
        source: IpAddr,
        rule: &str,
        duration: Duration,
    ) -> Result<()> {
        let source = ban_key(source);
        if source.is_unspecified() || source.is_multicast() {
            bail!("{source} is no address of a source");
        }
        let duration_ns = duration.min(DURATION_MAX).as_nanos() as u64;
        let until_ns = now_ns().saturating_add(duration_ns);
        if self
            .table
            .get(&source)
            .is_some_and(|(earlier, _)| *earlier > until_ns)
        {
            return Ok(());
        }
        match datapath {
            Some(datapath) => datapath.ban(source, until_ns, (rule != OPERATOR).then_some(rule))?,
            None if self.table.len() >= BANS_MAX && !self.table.contains_key(&source) => {
                bail!("there are {BANS_MAX} bans, and no room for more")
            }
            None => {}
        }
        self.table.insert(source, (until_ns, rule.to_owned()));
        self.denied.insert(source, until_ns);
        Ok(())
    }

    /// Ends a ban; answers whether there was one.
    ///
    /// # Errors
    /// The system refuses to write the map.
    pub fn remove(&mut self, datapath: Option<&mut Writer>, source: IpAddr) -> Result<bool> {
        let source = ban_key(source);
        let in_kernel = datapath
            .map(|datapath| datapath.unban(source))
            .transpose()?
            .unwrap_or(false);
        let here = self.table.remove(&source).is_some();
        self.publish();
        Ok(in_kernel || here)
    }

    /// Forgets what is over.
    ///
    /// # Errors
    /// The system refuses to write the map.
    pub fn sweep(&mut self, datapath: Option<&mut Writer>) -> Result<()> {
        let now_ns = now_ns();
        // Only then is the kernel's table read, a system call or two for each ban.
        if self.table.values().all(|(until_ns, _)| *until_ns > now_ns) {
            return Ok(());
        }
        datapath.map_or(Ok(()), Writer::sweep_bans)?;
        self.table.retain(|_, (until_ns, _)| *until_ns > now_ns);
        self.publish();
        Ok(())
    }

    /// Every ban, as the next daemon wants to know it.
    pub fn memory(&self) -> Vec<(IpAddr, u64, String)> {
        self.table
            .iter()
            .map(|(source, (until_ns, rule))| (*source, *until_ns, rule.clone()))
            .collect()
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        self.table.len() as u64
    }

    /// Every ban, by address.
    pub fn list(&self, datapath: Option<&Writer>) -> Vec<BanStatus> {
        let now_ns = now_ns();
        let kernel = datapath.map(|datapath| {
            let bans = datapath.bans().unwrap_or_default().into_iter();
            bans.map(|ban| (ban.source, ban.dropped))
                .collect::<BTreeMap<_, _>>()
        });
        let status = |(source, (until_ns, rule)): (&IpAddr, &(u64, String))| BanStatus {
            source: *source,
            rule: rule.clone(),
            ends_in_ms: until_ns.saturating_sub(now_ns) / 1_000_000,
            packets_dropped: kernel
                .as_ref()
                .map(|dropped| dropped.get(source).copied().unwrap_or(0)),
        };
        self.table
            .iter()
            .filter(|(_, (until_ns, _))| *until_ns > now_ns)
            .map(status)
            .collect()
    }

    fn publish(&self) {
        self.denied.replace(
            self.table
                .iter()
                .map(|(source, (until_ns, _))| (*source, *until_ns)),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_datapath_a_ban_is_kept_here_and_lifted_here() -> Result<()> {
        let denied = Arc::new(Denied::default());
        let mut bans = Bans::adopt(Arc::clone(&denied), None, &[])?;
        let source = IpAddr::from([192, 0, 2, 1]);
        bans.add(None, source, "fair-use", Duration::from_secs(60))?;
        bans.add(None, source, OPERATOR, Duration::from_secs(1))?;
        assert!(denied.denies(source, now_ns()));
        let listed = bans.list(None);
        assert_eq!(
            (
                listed.len(),
                listed[0].rule.as_str(),
                listed[0].packets_dropped
            ),
            (1, "fair-use", None)
        );
        assert!(listed[0].ends_in_ms > 50_000);
        assert!(bans.remove(None, source)? && !bans.remove(None, source)?);
        assert!(!denied.denies(source, now_ns()));
        assert!(
            bans.add(
                None,
                IpAddr::from([0, 0, 0, 0]),
                OPERATOR,
                Duration::from_secs(1)
            )
            .is_err()
        );
        Ok(())
    }

    #[test]
    fn without_a_datapath_too_there_is_an_end_to_bans() -> Result<()> {
        let mut bans = Bans::adopt(Arc::default(), None, &[])?;
        let source = |n: usize| IpAddr::from((n as u32 + 1).to_be_bytes());
        for n in 0..BANS_MAX {
            bans.add(None, source(n), "fair-use", Duration::from_secs(60))?;
        }
        assert!(
            bans.add(None, source(BANS_MAX), OPERATOR, Duration::from_secs(60))
                .is_err()
        );
        // One that is there can still be made longer.
        bans.add(None, source(0), OPERATOR, Duration::from_secs(600))?;
        assert_eq!(bans.count(), BANS_MAX as u64);
        Ok(())
    }

    #[test]
    fn a_ban_that_is_over_is_forgotten() -> Result<()> {
        let mut bans = Bans::adopt(Arc::default(), None, &[])?;
        bans.add(None, IpAddr::from([192, 0, 2, 1]), OPERATOR, Duration::ZERO)?;
        bans.sweep(None)?;
        assert_eq!(bans.count(), 0);
        Ok(())
    }
}
