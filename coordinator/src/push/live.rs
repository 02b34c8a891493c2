//! The updates of one live session: what was sent, what is acknowledged, what comes next.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use warren_common::filter::RuleId;
use warren_common::ids::{DeviceId, NetworkId, RelayId};
use warren_common::keys::NetmapSecretKey;
use warren_common::netmap::Netmap;
use warren_common::time::{Instant, Now};
use warren_common::wire::control::{Ack, NetmapUpdate, Presence, ServerBody, Signed, UpdateKind};

use super::bucket::Bucket;
use super::session::{ACK_PATIENCE, Known, MAX_SNAPSHOTS_PER_MIN, Session};
use super::{CloseReason, Coordinator, SessionId};
use crate::domain::PeerRelays;

/// Most updates on their way to one agent. Additions wait until all are acknowledged; only removals may run ahead,
/// and beyond this they wait too: the agent on the other end enforces them already.
pub const MAX_UNACKED: usize = 8;

/// Longest reason of an agent that is logged, in characters: ours are shorter.
const MAX_REASON: usize = 200;

#[derive(Debug)]
pub(super) struct Live {
    pub(super) device: DeviceId,
    /// What the agent holds once it has applied everything that was sent.
    sent: Netmap,
    sent_revision: u64,
    pub(super) acked: u64,
    unacked: VecDeque<Unacked>,
    /// The netmap has changed since `sent`; an update follows the next acknowledgement.
    pub(super) behind: bool,
    lease_due: Instant,
    snapshots: Bucket,
    /// Relays it holds a token for, and until when.
    pub(super) tokens: BTreeMap<RelayId, Instant>,
    /// What it was told in this session of its offer to relay: as which relay to serve, if as any.
    pub(super) duty: Option<Option<RelayId>>,
}

#[derive(Debug)]
struct Unacked {
    to: u64,
    snapshot: bool,
    since: Instant,
}

impl Live {
    pub(super) fn sees(&self, other: DeviceId) -> bool {
        self.sent.peers.contains_key(&other)
    }

    pub(super) fn peers(&self) -> Vec<DeviceId> {
        self.sent.peers.keys().copied().collect()
    }

    pub(super) fn has_rule(&self, rule: RuleId) -> bool {
        self.sent.ingress.iter().chain(&self.sent.egress).any(|r| r.id == rule)
    }

    /// The agent holds what it should hold.
    pub(super) fn is_current(&self) -> bool {
        !self.behind && self.unacked.is_empty()
    }

    /// Whom a token for that relay names: the peers that know of it. `None` if the device does not know of it itself.
    pub(super) fn token_peers(&self, relay: RelayId, peer_relays: &PeerRelays) -> Option<Vec<DeviceId>> {
        let peers = self.peers();
        if !self.sent.relays.get(&relay)?.peer {
            return Some(peers);
        }
        let knows = |device: DeviceId| peer_relays.lists(device, relay);
        knows(self.device).then(|| peers.into_iter().filter(|peer| knows(*peer)).collect())
    }

    pub(super) fn timer(&self) -> Instant {
        let ack = self.unacked.front().map_or(Instant::FAR_FUTURE, |u| u.since + ACK_PATIENCE);
        self.lease_due.min(ack)
    }

    pub(super) fn stuck(&self, now: Instant) -> bool {
        self.unacked.front().is_some_and(|u| now >= u.since + ACK_PATIENCE)
    }
}

/// Makes updates: what that takes beside a session, so that many sessions can be served side by side.
pub(super) struct Mint {
    key: NetmapSecretKey,
    network: NetworkId,
    epoch: u64,
    lease: Duration,
    now: Now,
}

impl Mint {
    /// The step of a refresh that only takes away, as `number`. `None` if there is nothing to take away, or too much on
    /// its way.
    pub(super) fn removals(&self, session: &mut Session, target: &Netmap, number: u64) -> Option<Removals> {
        let live = session.live_mut()?;
        live.behind = live.sent != *target;
        if !live.behind || live.unacked.len() >= MAX_UNACKED {
            return None;
        }
        let step = Netmap::without_removed(&live.sent, target);
        if step == live.sent {
            return None;
        }
        live.tokens.retain(|_, until| self.now.boot < *until);
        let tokens = live.tokens.keys().copied().collect();
        Some(Removals { signed: self.delta(session, step, number)?, tokens })
    }

    /// The step of a refresh that completes it, as `number`. Waits (`None`) while the agent has not acknowledged what it
    /// was sent before, the `removals` of this refresh excepted.
    pub(super) fn additions(
        &self,
        session: &mut Session,
        target: Netmap,
        removals: Option<u64>,
        number: u64,
    ) -> Option<Additions> {
        let live = session.live_mut()?;
        live.behind = live.sent != target;
        let waiting = live.unacked.iter().any(|u| Some(u.to) != removals);
        if !live.behind || waiting {
            return None;
        }
        let new = target.peers.keys().filter(|p| !live.sent.peers.contains_key(*p)).copied().collect();
        Some(Additions { signed: self.delta(session, target, number)?, new })
    }

    fn delta(&self, session: &mut Session, target: Netmap, number: u64) -> Option<Signed> {
        let live = session.live_mut()?;
        let delta = Netmap::diff(&live.sent, &target);
        let from = std::mem::replace(&mut live.sent_revision, number);
        live.sent = target;
        live.behind = false;
        live.unacked.push_back(Unacked { to: number, snapshot: false, since: self.now.boot });
        self.update(session, from, UpdateKind::Delta(Box::new(delta)))
    }

    fn update(&self, session: &mut Session, from: u64, kind: UpdateKind) -> Option<Signed> {
        let device_key = session.control;
        let live = session.live_mut()?;
        live.lease_due = self.now.boot + self.lease / 3;
        let update = NetmapUpdate {
            network: self.network,
            device: live.device,
            device_key,
            epoch: self.epoch,
            from,
            to: live.sent_revision,
            hash: live.sent.hash(),
            lease_ms: u64::try_from(self.lease.as_millis()).unwrap_or(u64::MAX),
            issued: self.now.unix,
            kind,
        };
        Some(update.sign(&self.key))
    }
}

/// What [`Mint::removals`] made.
pub(super) struct Removals {
    pub(super) signed: Signed,
    /// Relays whose tokens of before are void by it.
    pub(super) tokens: Vec<RelayId>,
}

/// What [`Mint::additions`] made.
pub(super) struct Additions {
    pub(super) signed: Signed,
    /// Peers that the device did not know before.
    pub(super) new: Vec<DeviceId>,
}

impl Coordinator {
    /// Makes a welcomed session live and brings its agent up to date.
    pub(super) fn go_live(&mut self, id: SessionId, device: DeviceId, known: Option<Known>, now: Now) {
        let peers = self.reach.peers(device).into_iter().flat_map(|peers| peers.keys().copied());
        self.records.prepare(&self.state, peers);
        let Some(netmap) = self.reach.netmap(&self.state, device, &self.records) else { return };
        let epoch = self.state.settings().epoch;
        let newest = (epoch, self.revision);
        if known.as_ref().is_some_and(|k| (k.epoch, k.revision) > newest) {
            self.stats.ahead += 1;
            tracing::error!(
                %device,
                "an agent holds a newer netmap than this coordinator ever made: the database was restored from a backup; \
                 stop the coordinator and run `warren-coordinator restored` once"
            );
        }
        let held = known.filter(|k| k.epoch == epoch);
        let current = held.as_ref().is_some_and(|k| k.revision <= self.revision && k.hash == netmap.hash());
        let revision = match &held {
            Some(known) if current => known.revision,
            // Never two netmaps under one number: what is sent must be newer than what the agent holds.
            Some(known) if known.revision >= self.revision => self.next_revision().unwrap_or(self.revision),
            _ => self.revision,
        };
        let live = Live {
            device,
            sent: netmap,
            sent_revision: revision,
            acked: if current { revision } else { 0 },
            unacked: VecDeque::new(),
            behind: false,
            lease_due: now.boot,
            snapshots: Bucket::new(Duration::from_secs(60) / MAX_SNAPSHOTS_PER_MIN, MAX_SNAPSHOTS_PER_MIN),
            tokens: BTreeMap::new(),
            duty: None,
        };
        let peers = live.peers();
        let Some(session) = self.sessions.get_mut(&id) else { return };
        session.phase = super::session::Phase::Live(Box::new(live));
        self.by_device.insert(device, id);
        self.offline_ephemeral.remove(&device);
        if current {
            self.renew_lease(id, now);
        } else {
            self.send_snapshot(id, now);
        }
        self.rearm(id);
        self.send_presence(id, &peers);
        self.announce(device, peers, true);
    }

    /// The step that takes everything away from a device that is out.
    pub(super) fn send_farewell(&mut self, id: SessionId, revision: &mut Option<u64>, now: Now) {
        let Some(live) = self.sessions.get(&id).and_then(Session::live) else { return };
        let empty = Netmap {
            peers: BTreeMap::new(),
            ingress: BTreeSet::new(),
            egress: BTreeSet::new(),
            relays: BTreeMap::new(),
            apps: BTreeSet::new(),
            ..live.sent.clone()
        };
        let Some(number) = self.number(revision) else { return };
        let mint = self.mint(now);
        if let Some(signed) = self.sessions.get_mut(&id).and_then(|s| mint.delta(s, empty, number)) {
            self.stats.deltas += 1;
            self.send(id, ServerBody::Update(signed));
            self.rearm(id);
        }
    }

    /// The number of a step that several sessions share: made for the first that needs it.
    pub(super) fn number(&mut self, revision: &mut Option<u64>) -> Option<u64> {
        if revision.is_none() {
            *revision = self.next_revision();
        }
        *revision
    }

    fn send_snapshot(&mut self, id: SessionId, now: Now) {
        let Some(live) = self.sessions.get_mut(&id).and_then(Session::live_mut) else { return };
        if !live.snapshots.take(now.boot) {
            return self.close(id, CloseReason::Flood, now);
        }
        live.unacked.push_back(Unacked { to: live.sent_revision, snapshot: true, since: now.boot });
        let kind = UpdateKind::Snapshot(Box::new(live.sent.clone()));
        self.stats.snapshots += 1;
        self.send_update(id, 0, kind, now);
    }

    /// Sends nothing but a lease, if one is due.
    pub(super) fn renew_lease(&mut self, id: SessionId, now: Now) {
        let Some(live) = self.sessions.get_mut(&id).and_then(Session::live_mut) else { return };
        if now.boot >= live.lease_due {
            let from = live.sent_revision;
            self.stats.leases += 1;
            self.send_update(id, from, UpdateKind::Lease, now);
        }
    }

    /// Signs and sends what leads to the session's `sent`.
    fn send_update(&mut self, id: SessionId, from: u64, kind: UpdateKind, now: Now) {
        let mint = self.mint(now);
        let Some(signed) = self.sessions.get_mut(&id).and_then(|s| mint.update(s, from, kind)) else {
            return;
        };
        self.send(id, ServerBody::Update(signed));
        self.rearm(id);
    }

    pub(super) fn mint(&self, now: Now) -> Mint {
        let settings = self.state.settings();
        Mint {
            key: self.config.netmap_key.clone(),
            network: settings.network,
            epoch: settings.epoch,
            lease: self.config.lease,
            now,
        }
    }

    pub(super) fn acknowledged(&mut self, id: SessionId, ack: &Ack, now: Now) {
        let epoch = self.state.settings().epoch;
        let Some(live) = self.sessions.get_mut(&id).and_then(Session::live_mut) else { return };
        if ack.want_snapshot {
            self.stats.rejected += 1;
            // The agent's words: escaped and cut, so that it writes no lines of its own into our log.
            let reason: String = ack.reason.chars().take(MAX_REASON).collect();
            tracing::warn!(device = %live.device, reason = reason.as_str(), "an agent did not apply an update");
            // One answer per update, in order: this one is for the oldest. If a snapshot is on its way behind it,
            // that is the answer already.
            live.unacked.pop_front();
            if !live.unacked.iter().any(|u| u.snapshot) {
                self.send_snapshot(id, now);
            }
        } else if ack.epoch == epoch && ack.revision <= live.sent_revision {
            live.acked = live.acked.max(ack.revision);
            while live.unacked.front().is_some_and(|u| u.to <= ack.revision) {
                live.unacked.pop_front();
            }
        }
        let catch_up = self
            .sessions
            .get(&id)
            .and_then(Session::live)
            .is_some_and(|live| live.behind && live.unacked.len() < MAX_UNACKED);
        if catch_up {
            self.refresh(&BTreeSet::from([id]), now);
        }
        self.rearm(id);
    }

    /// Tells a session which of `peers` are connected.
    pub(super) fn send_presence(&mut self, id: SessionId, peers: &[DeviceId]) {
        let online: Vec<Vec<u8>> =
            peers.iter().filter(|p| self.by_device.contains_key(*p)).map(|p| p.to_bytes().to_vec()).collect();
        if !online.is_empty() {
            self.send(id, ServerBody::Presence(Presence { online, offline: Vec::new() }));
        }
    }

    /// Tells the connected peers of a device that it came or went.
    pub(super) fn announce(&mut self, device: DeviceId, peers: Vec<DeviceId>, online: bool) {
        let id = vec![device.to_bytes().to_vec()];
        let presence = match online {
            true => Presence { online: id, offline: Vec::new() },
            false => Presence { online: Vec::new(), offline: id },
        };
        for peer in peers {
            let session = self.by_device.get(&peer).copied();
            let sees =
                |s: &SessionId| self.sessions.get(s).and_then(Session::live).is_some_and(|l| l.sees(device));
            if let Some(session) = session.filter(sees) {
                self.send(session, ServerBody::Presence(presence.clone()));
            }
        }
    }
}
