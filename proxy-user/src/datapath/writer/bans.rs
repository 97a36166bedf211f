//! Bans in the maps: their table, and the filter before it.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::atomic::Ordering::Relaxed;

use anyhow::{Context, Result};
use proxy_ebpf::abi;

use super::entry::{change, is_full};
use super::{GUARD_FILTER_AT, OPERATOR, Writer};
use crate::datapath::map::Value;
use crate::datapath::{Full, address, ip};
use crate::offload::now_ns;

/// A source that is refused.
#[derive(Clone, Debug, PartialEq)]
pub struct Ban {
    pub source: IpAddr,
    pub until_ns: u64,
    /// Name of the policy; `operator` where an operator asked.
    pub rule: String,
    /// Packets dropped so far.
    pub dropped: u64,
}

impl Writer {
    /// Refuses a source until `until_ns` of the coarse clock. `rule` is a policy's name; `None` = the operator.
    ///
    /// # Errors
    /// The table is full, or the system refuses the write.
    pub fn ban(&mut self, source: IpAddr, until_ns: u64, rule: Option<&str>) -> Result<()> {
        let key = address(source).ban_key();
        let rule = rule
            .and_then(|name| self.state.names.rules.get(name))
            .copied()
            .unwrap_or(0);
        let before = self.bans.get(&Value(key), 0).map(|Value(ban)| ban).ok();
        let dropped = before.map_or(0, |ban| ban.dropped);
        let ban = abi::Ban {
            until_ns,
            rule,
            zero: 0,
            dropped,
        };
        let written = self.bans.insert(Value(key), Value(ban), 0);
        if let Err(error) = written {
            if is_full(&error) {
                return Err(Full::new("bans", self.bans_max).into());
            }
            return Err(error).context("write a ban");
        }
        // The entry first, then the bit that leads to it.
        let bit = abi::guard_bit(&key) as usize;
        let word = &self.guard.words()[GUARD_FILTER_AT + bit / 64];
        word.fetch_or(1 << (bit % 64), Relaxed);
        if before.is_none() {
            self.guard.words()[0].fetch_add(1, Relaxed);
        }
        Ok(())
    }

    /// Ends a ban; answers whether there was one.
    ///
    /// # Errors
    /// The system refuses the write.
    pub fn unban(&mut self, source: IpAddr) -> Result<bool> {
        let key = address(source).ban_key();
        let was = self.bans.get(&Value(key), 0).is_ok();
        change(&mut self.bans, key, None)?;
        self.rebuild_guard()?;
        Ok(was)
    }

    /// Removes the bans that are over, and makes the filter anew.
    ///
    /// # Errors
    /// The system refuses to read or write.
    pub fn sweep_bans(&mut self) -> Result<()> {
        let now_ns = now_ns();
        let over: Vec<abi::Address> = self
            .bans
            .iter()
            .filter_map(Result::ok)
            .filter(|(_, Value(ban))| ban.until_ns <= now_ns)
            .map(|(Value(key), _)| key)
            .collect();
        if over.is_empty() {
            return Ok(());
        }
        for key in over {
            change(&mut self.bans, key, None)?;
        }
        self.rebuild_guard()
    }

    /// The filter and the count of exactly the bans there are. Bits of living bans are never absent meanwhile.
    fn rebuild_guard(&mut self) -> Result<()> {
        let mut filter = vec![0; 1024];
        let mut count = 0;
        for key in self.bans.keys() {
            let Value(key) = key?;
            let bit = abi::guard_bit(&key) as usize;
            filter[bit / 64] |= 1 << (bit % 64);
            count += 1;
        }
        self.guard.write(GUARD_FILTER_AT, &filter);
        self.guard.write(0, &[count]);
        Ok(())
    }

    /// Every ban.
    ///
    /// # Errors
    /// The system refuses to read.
    pub fn bans(&self) -> Result<Vec<Ban>> {
        let rules: BTreeMap<u32, &str> = self
            .state
            .names
            .rules
            .iter()
            .map(|(name, id)| (*id, name.as_str()))
            .collect();
        let mut bans = Vec::new();
        for entry in self.bans.iter() {
            let (Value(key), Value(ban)) = entry?;
            let rule = rules.get(&ban.rule).copied().unwrap_or(OPERATOR).to_owned();
            bans.push(Ban {
                source: ip(key),
                until_ns: ban.until_ns,
                rule,
                dropped: ban.dropped,
            });
        }
        bans.sort_by_key(|ban| ban.source);
        Ok(bans)
    }
}
