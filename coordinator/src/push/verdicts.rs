//! What agents report of their filters: counts of staged rules, and connections that two ends judge differently. For
//! people and metrics; nothing is decided by it, and a restart forgets it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;

use warren_common::filter::RuleId;
use warren_common::ids::DeviceId;
use warren_common::time::{Now, UnixTime};
use warren_common::wire::control::{DifferingVerdict, FilterReport, MAX_DIFFERING, MAX_STAGED_HITS};

use super::Coordinator;

/// Differing verdicts kept for people, the latest ones, a count.
pub const MAX_DIFFERING_KEPT: usize = 256;
/// Longest word for a reason that is kept, in bytes: ours are shorter.
const MAX_REASON: usize = 32;

/// What a staged rule would have decided, over all devices that reported.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StagedCount {
    /// Connections, as their sources saw them.
    pub sent: u64,
    /// Connections, as their destinations saw them.
    pub received: u64,
    /// Devices that reported.
    pub devices: BTreeSet<DeviceId>,
}

/// A connection that one end let out and the other refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Differing {
    /// Who let it out.
    pub from: DeviceId,
    /// Who refused it and says so.
    pub at: DeviceId,
    /// Source address.
    pub src: IpAddr,
    /// Destination address.
    pub dst: IpAddr,
    /// The IP protocol.
    pub proto: u8,
    /// Destination port, or zero.
    pub port: u16,
    /// Why it was refused.
    pub reason: String,
    /// Packets refused so far.
    pub count: u64,
    /// When it was reported.
    pub reported: UnixTime,
    /// Both ends had acknowledged the newest revision made for them: it isn't for want of an update.
    pub both_current: bool,
}

#[derive(Debug, Default)]
pub(super) struct Verdicts {
    staged: BTreeMap<RuleId, StagedCount>,
    differing: VecDeque<Differing>,
}

impl Coordinator {
    /// What staged rules of the policy in force would have decided, by rule.
    pub fn staged_counts(&self) -> impl Iterator<Item = (RuleId, &str, &StagedCount)> {
        let counts = self.verdicts.staged.iter();
        counts.filter_map(|(rule, count)| Some((*rule, self.reach.staged_origin_of(*rule)?, count)))
    }

    /// Connections that two ends judged differently, the latest last, at most [`MAX_DIFFERING_KEPT`].
    pub fn differing_verdicts(&self) -> impl Iterator<Item = &Differing> {
        self.verdicts.differing.iter()
    }

    pub(super) fn filter_report(&mut self, device: DeviceId, report: FilterReport, now: Now) {
        for hits in report.staged.into_iter().take(MAX_STAGED_HITS) {
            let rule = RuleId(hits.rule);
            // Only rules of the file are counted: an agent can make up no others.
            if self.reach.staged_origin_of(rule).is_none() {
                continue;
            }
            let count = self.verdicts.staged.entry(rule).or_default();
            count.sent = count.sent.saturating_add(hits.sent);
            count.received = count.received.saturating_add(hits.received);
            count.devices.insert(device);
        }
        for verdict in report.differing.into_iter().take(MAX_DIFFERING) {
            let Some(about) = self.differing(device, &verdict, now) else { continue };
            self.stats.differing += 1;
            tracing::warn!(
                from = %about.from, at = %about.at, proto = about.proto, port = about.port,
                reason = %about.reason, count = about.count, both_current = about.both_current,
                "the two ends of a connection judge it differently"
            );
            tracing::debug!(src = %about.src, dst = %about.dst, "the connection that was judged differently");
            if self.verdicts.differing.len() >= MAX_DIFFERING_KEPT {
                self.verdicts.differing.pop_front();
            }
            self.verdicts.differing.push_back(about);
        }
    }

    /// Forgets counts of rules that are no longer in force.
    pub(super) fn forget_old_verdicts(&mut self) {
        let reach = &self.reach;
        self.verdicts.staged.retain(|rule, _| reach.staged_origin_of(*rule).is_some());
    }

    fn differing(&self, at: DeviceId, verdict: &DifferingVerdict, now: Now) -> Option<Differing> {
        let from = DeviceId::from_slice(&verdict.peer)?;
        let is_current = |device| {
            let session = self.by_device.get(&device).and_then(|s| self.sessions.get(s)?.live());
            session.is_some_and(super::live::Live::is_current)
        };
        let mut reason = verdict.reason.clone();
        reason.retain(|c| c.is_ascii_lowercase() || c == '-');
        reason.truncate(MAX_REASON);
        Some(Differing {
            from,
            at,
            src: address(&verdict.src)?,
            dst: address(&verdict.dst)?,
            proto: u8::try_from(verdict.proto).ok()?,
            port: u16::try_from(verdict.port).ok()?,
            reason,
            count: verdict.count,
            reported: now.unix,
            both_current: is_current(from) && is_current(at),
        })
    }
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    v4.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from)).ok()
}
