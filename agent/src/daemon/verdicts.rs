//! What the filter has seen, for the coordinator: counts of staged rules, and connections that two ends judge
//! differently.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use warren_common::filter::RuleId;
use warren_common::ids::DeviceId;
use warren_common::time::Instant;
use warren_common::wire::control::{
    ClientBody, DifferingVerdict, FilterReport, MAX_DIFFERING, MAX_STAGED_HITS, StagedHits,
};
use warren_engine::engine::Engine;
use warren_engine::filter::Disagreement;

use crate::control::ControlClient;

/// How often counts are reported, if they have changed.
const REPORT_INTERVAL: Duration = Duration::from_secs(60);
/// How long a differing verdict waits for others.
const SOON: Duration = Duration::from_secs(1);

/// What waits to be reported.
#[derive(Debug, Default)]
pub(super) struct Verdicts {
    /// Counts that the coordinator knows.
    reported: BTreeMap<RuleId, (u64, u64)>,
    differing: Vec<DifferingVerdict>,
    due: Option<Instant>,
}

impl Verdicts {
    /// A connection that `device` let out and this one refused.
    pub(super) fn differ(&mut self, now: Instant, device: DeviceId, about: &Disagreement) {
        tracing::warn!(
            %device, proto = about.proto, port = about.port, reason = about.reason.label(),
            revision = about.revision, count = about.count,
            "a peer let out a connection that is refused here"
        );
        if self.differing.len() < MAX_DIFFERING {
            self.differing.push(DifferingVerdict {
                peer: device.to_bytes().to_vec(),
                src: octets(about.src),
                dst: octets(about.dst),
                proto: about.proto.into(),
                port: about.port.into(),
                reason: about.reason.label().to_owned(),
                revision: about.revision,
                count: about.count,
            });
        }
        let soon = now + SOON;
        self.due = Some(self.due.map_or(soon, |due| due.min(soon)));
    }

    /// When to report next.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.due
    }

    /// Reports what is new, if it is time. What can't be sent waits.
    pub(super) fn report_if_due(&mut self, now: Instant, engine: &Engine, control: &ControlClient) {
        if self.due.is_some_and(|due| due > now) {
            return;
        }
        let counts = engine.staged_rules();
        self.reported.retain(|rule, _| counts.iter().any(|c| c.rule == *rule));
        let news: Vec<StagedHits> = counts
            .iter()
            .filter_map(|count| {
                let (sent, received) = self.reported.get(&count.rule).copied().unwrap_or_default();
                // A rule that went and came again counts from zero.
                let (sent, received) =
                    (count.sent.saturating_sub(sent), count.received.saturating_sub(received));
                (sent + received > 0).then_some(StagedHits { rule: count.rule.0, sent, received })
            })
            .take(MAX_STAGED_HITS)
            .collect();
        // Without staged rules there is nothing to look at until a verdict differs.
        self.due = (!counts.is_empty()).then(|| now + REPORT_INTERVAL);
        if news.is_empty() && self.differing.is_empty() {
            return;
        }
        let report = FilterReport { staged: news.clone(), differing: self.differing.clone() };
        if !control.send(ClientBody::FilterReport(report)) {
            self.due = Some(now + REPORT_INTERVAL);
            return;
        }
        self.differing.clear();
        for hits in news {
            let known = self.reported.entry(RuleId(hits.rule)).or_default();
            *known = (known.0 + hits.sent, known.1 + hits.received);
        }
    }

    /// New rules are in force: there may be something to count now.
    pub(super) fn rules_changed(&mut self, now: Instant) {
        let at = now + REPORT_INTERVAL;
        self.due = Some(self.due.map_or(at, |due| due.min(at)));
    }
}

fn octets(addr: IpAddr) -> Vec<u8> {
    match addr {
        IpAddr::V4(addr) => addr.octets().to_vec(),
        IpAddr::V6(addr) => addr.octets().to_vec(),
    }
}
