//! From saved changes to updates: whom they touch, what is cut first, who is answered.

use std::collections::{BTreeMap, BTreeSet};

use warren_common::ids::{DeviceId, RelayId};
use warren_common::netmap::Netmap;
use warren_common::time::Now;
use warren_common::wire::control::{ServerBody, Signed, Welcome};

use super::session::{Phase, Session};
use super::{CloseReason, Coordinator, Origin, Output, SessionId};
use crate::domain::{Change, Command, Device, Refusal, RelayDifference, Reply, Settings};
use crate::parallel::{MANY, side_by_side};

/// What a batch of changes can have touched.
#[derive(Debug, Default)]
struct Impact {
    /// The policy or its users: compile again.
    policy: bool,
    /// Devices of which the policy sees something new: follow them.
    followed: BTreeSet<DeviceId>,
    /// Everything: relays or the network's own facts.
    all: bool,
    /// Devices whose peers see something new.
    devices: BTreeSet<DeviceId>,
    /// Relays that are removed.
    relays_gone: Vec<RelayId>,
    /// Devices whose relay tokens are void: their probe key is another one.
    rekeyed: BTreeSet<DeviceId>,
    /// Devices whose offer to relay is another one.
    offers: BTreeSet<DeviceId>,
}

impl Impact {
    fn of(changes: &[Change], inverses: &[Change]) -> Self {
        let mut impact = Self::default();
        for (change, inverse) in changes.iter().zip(inverses) {
            match (change, inverse) {
                (Change::PutDevice(new), Change::PutDevice(old)) => impact.device(old, new),
                (Change::PutDevice(device), _) => {
                    impact.followed.insert(device.id);
                    impact.devices.insert(device.id);
                    impact.offers.insert(device.id);
                }
                (Change::RemoveDevice(id), _) => {
                    impact.followed.insert(*id);
                }
                // The same text from elsewhere, such as another commit.
                (Change::PutPolicy(new), Change::PutPolicy(old)) if new.sha256 == old.sha256 => {}
                (
                    Change::PutUser(_) | Change::RemoveUser(_) | Change::PutPolicy(_) | Change::RemovePolicy,
                    _,
                ) => impact.policy = true,
                (Change::PutRelay(_), _) => impact.all = true,
                (Change::RemoveRelay(id), _) => {
                    impact.all = true;
                    impact.relays_gone.push(*id);
                }
                (Change::PutSettings(new), Change::PutSettings(old)) => {
                    let numbered = Settings { revisions_reserved: old.revisions_reserved, ..(**new).clone() };
                    impact.all |= numbered != **old;
                }
                (
                    Change::PutSettings(_)
                    | Change::PutAuthKey(_)
                    | Change::RemoveAuthKey(_)
                    | Change::PutApiToken(_)
                    | Change::RemoveApiToken(_)
                    | Change::Rest(..)
                    | Change::EndRest(_),
                    _,
                ) => {}
            }
        }
        impact
    }

    fn device(&mut self, old: &Device, new: &Device) {
        let policy = |d: &Device| {
            (d.ipv4, d.ipv6, d.user, d.tags.clone(), d.routes.clone(), d.approved, d.expired, d.copied)
        };
        let peer = |d: &Device| (d.wg, d.probe, d.name.clone(), d.home_relay);
        if policy(old) != policy(new) {
            self.followed.insert(new.id);
        }
        if policy(old) != policy(new) || peer(old) != peer(new) {
            self.devices.insert(new.id);
        }
        if old.probe != new.probe {
            self.rekeyed.insert(new.id);
        }
        if old.relay != new.relay {
            self.offers.insert(new.id);
        }
    }
}

impl Coordinator {
    /// The batch is on disk: publishes it and answers its callers.
    pub fn saved(&mut self, now: Now) {
        let pending = std::mem::take(&mut self.pending);
        self.publish(now);
        for item in pending {
            self.respond(item.origin, &item.command, item.result, now);
        }
    }

    pub(super) fn publish(&mut self, now: Now) {
        let changes = std::mem::take(&mut self.unsaved);
        let inverses = std::mem::take(&mut self.undo);
        self.revision_limit = self.state.settings().revisions_reserved;
        let impact = Impact::of(&changes, &inverses);
        self.track_ephemeral(&changes, now);
        self.push(impact, now);
    }

    /// Compiles again though nothing changed, since time has passed.
    pub(super) fn recompile(&mut self, now: Now) {
        self.push(Impact { policy: true, ..Impact::default() }, now);
    }

    fn push(&mut self, impact: Impact, now: Now) {
        self.outputs.extend(impact.relays_gone.into_iter().map(Output::RelayRemoved));
        let mut touched = BTreeSet::new();
        let mut removals = None;
        let mut relays = RelayDifference::default();
        if impact.policy || !impact.followed.is_empty() || !impact.offers.is_empty() {
            let difference = if impact.policy {
                self.reach.recompute(&self.state, now.unix)
            } else {
                self.reach.follow(&self.state, &impact.followed, &impact.offers, now.unix)
            };
            self.schedule_recompile(now);
            self.forget_old_verdicts();
            let lost: BTreeSet<DeviceId> = difference.lost.union(&impact.rekeyed).copied().collect();
            self.cut_at_peer_relays(&lost, &difference.out, &difference.relays, &mut removals);
            self.cut_at_relays(
                lost.into_iter().collect(),
                difference.out.iter().copied().collect(),
                &mut removals,
            );
            difference.out.into_iter().for_each(|id| self.put_out(id, &mut removals, now));
            touched = difference.touched;
            relays = difference.relays;
            touched.append(&mut relays.touched);
        }
        let sessions: BTreeSet<SessionId> = if impact.all {
            self.by_device.values().copied().collect()
        } else {
            let peers = impact.devices.iter().filter_map(|id| self.reach.peers(*id)).flat_map(BTreeMap::keys);
            touched
                .iter()
                .chain(&impact.devices)
                .chain(peers)
                .filter_map(|id| self.by_device.get(id))
                .copied()
                .collect()
        };
        self.refresh_as(&sessions, removals, now);
        self.renew_tokens(&relays.gained, now);
    }

    /// Tells the relays first who lost a peer or is out, connected to us or not.
    fn cut_at_relays(&mut self, devices: Vec<DeviceId>, revoked: Vec<DeviceId>, removals: &mut Option<u64>) {
        if devices.is_empty() && revoked.is_empty() {
            return;
        }
        // Tokens made until now carry a lower number.
        if let Some(revision) = self.number(removals) {
            self.newest_cut = revision;
            self.outputs.push_back(Output::RelayMinimum { revision, devices, revoked });
        }
    }

    /// Ends the session of a device that is removed, expired, suspended or copied: takes everything away, says why.
    fn put_out(&mut self, device: DeviceId, removals: &mut Option<u64>, now: Now) {
        let Some(session) = self.by_device.get(&device).copied() else { return };
        self.send_farewell(session, removals, now);
        let refusal = match self.state.device(device) {
            None => Refusal::UnknownDevice,
            Some(record) => Self::state_refusal(self.state.device_state(record), device),
        };
        self.refuse(session, &refusal, now);
    }

    /// Brings sessions up to date: what takes away to all of them, then what adds.
    pub(super) fn refresh(&mut self, sessions: &BTreeSet<SessionId>, now: Now) {
        self.refresh_as(sessions, None, now);
    }

    fn refresh_as(&mut self, sessions: &BTreeSet<SessionId>, mut removals: Option<u64>, now: Now) {
        let devices: Vec<(SessionId, DeviceId)> = sessions
            .iter()
            .filter_map(|id| Some((*id, self.sessions.get(id).and_then(Session::live)?.device)))
            .collect();
        let (state, reach) = (&self.state, &self.reach);
        if devices.len() < MANY {
            let peers = devices.iter().filter_map(|(_, device)| reach.peers(*device));
            self.records.prepare(state, peers.flat_map(BTreeMap::keys).copied());
        } else {
            // Their peers are most of the network, many times over.
            self.records.prepare(state, state.devices().keys().copied());
        }
        let records = &self.records;
        let targets = side_by_side(devices, |(id, device)| Some((id, reach.netmap(state, device, records)?)));
        let targets: Vec<(SessionId, Netmap)> = targets.into_iter().flatten().collect();
        let mint = self.mint(now);
        if let Some(number) = removals.or_else(|| self.upcoming_revision()) {
            let by_reference = targets.iter().map(|(id, target)| (*id, target)).collect();
            let made = self.on_each(by_reference, |session, target| mint.removals(session, target, number));
            if !made.is_empty() {
                self.number(&mut removals);
            }
            for (id, step) in made {
                self.send_delta(id, step.signed);
                // Relays refuse its older tokens from this revision on: don't let it find out by losing packets.
                step.tokens.into_iter().for_each(|relay| self.grant_token(id, relay, now));
            }
        }
        if let Some(number) = self.upcoming_revision() {
            let made =
                self.on_each(targets, |session, target| mint.additions(session, target, removals, number));
            if !made.is_empty() {
                self.number(&mut None);
            }
            for (id, step) in made {
                self.send_delta(id, step.signed);
                self.send_presence(id, &step.new);
            }
        }
    }

    fn send_delta(&mut self, id: SessionId, signed: Signed) {
        self.stats.deltas += 1;
        self.send(id, ServerBody::Update(signed));
        self.rearm(id);
    }

    /// What `work` makes of these sessions, in their order. Comparing, encoding and signing netmaps is what an edit that
    /// touches everybody costs, so many sessions are worked on by all processors.
    fn on_each<T: Send, R: Send>(
        &mut self,
        targets: Vec<(SessionId, T)>,
        work: impl Fn(&mut Session, T) -> Option<R> + Sync,
    ) -> Vec<(SessionId, R)> {
        let taken: Vec<(SessionId, Session, T)> = targets
            .into_iter()
            .filter_map(|(id, target)| Some((id, self.sessions.remove(&id)?, target)))
            .collect();
        let worked_on = side_by_side(taken, |(id, mut session, target)| {
            let made = work(&mut session, target);
            (id, session, made)
        });
        let mut out = Vec::new();
        for (id, session, made) in worked_on {
            self.sessions.insert(id, session);
            out.extend(made.map(|made| (id, made)));
        }
        out
    }

    fn track_ephemeral(&mut self, changes: &[Change], now: Now) {
        for change in changes {
            match change {
                Change::PutDevice(d) if d.ephemeral && !self.by_device.contains_key(&d.id) => {
                    self.offline_ephemeral.entry(d.id).or_insert(now.boot);
                }
                Change::PutDevice(d) if !d.ephemeral => {
                    self.offline_ephemeral.remove(&d.id);
                }
                Change::RemoveDevice(id) => {
                    self.offline_ephemeral.remove(id);
                }
                _ => {}
            }
        }
    }

    pub(super) fn respond(
        &mut self,
        origin: Origin,
        command: &Command,
        result: Result<Reply, Refusal>,
        now: Now,
    ) {
        if let Err(refusal) = &result {
            self.stats.refused += 1;
            self.stats.copied += u64::from(matches!(refusal, Refusal::CopiedState { .. }));
        }
        let id = match origin {
            Origin::Ticket(ticket) => return self.outputs.push_back(Output::Reply { ticket, result }),
            Origin::Internal => {
                if let Err(refusal) = result {
                    tracing::warn!(%refusal, "the coordinator's own upkeep has to wait");
                }
                return;
            }
            Origin::Session(id) => id,
        };
        match (command, result) {
            (Command::Enroll(_) | Command::Resume { .. }, Ok(Reply::Admitted { device, generation })) => {
                self.welcome(id, device, generation, now);
            }
            (Command::Enroll(_) | Command::Resume { .. } | Command::RemoveDevice(_), Err(refusal)) => {
                self.refuse_session(id, &refusal, now);
            }
            (_, Err(refusal @ (Refusal::CopiedState { .. } | Refusal::UnknownDevice))) => {
                self.refuse_session(id, &refusal, now);
            }
            (_, Err(refusal)) => tracing::warn!(%refusal, "a device's report has to wait"),
            (Command::Report { relay, .. }, Ok(_)) => self.answer_offer(id, relay.is_some()),
            (_, Ok(_)) => {}
        }
    }

    fn refuse_session(&mut self, id: SessionId, refusal: &Refusal, now: Now) {
        if self.sessions.contains_key(&id) {
            self.refuse(id, refusal, now);
        }
    }

    fn welcome(&mut self, id: SessionId, device: DeviceId, generation: u64, now: Now) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        let known = match &mut session.phase {
            Phase::Deciding { known } => known.take(),
            Phase::Greeting { .. } | Phase::Live(_) => return,
        };
        if self.reach.peers(device).is_none() {
            // Something later in the same batch has put it out.
            let state = self.state.device(device).map(|d| self.state.device_state(d));
            let refusal = state.map_or(Refusal::UnknownDevice, |s| Self::state_refusal(s, device));
            return self.refuse(id, &refusal, now);
        }
        if let Some(older) = self.by_device.get(&device).copied() {
            self.close(older, CloseReason::Superseded, now);
        }
        let welcome =
            Welcome { device: device.to_bytes().to_vec(), generation, unix_us: now.unix.as_micros() };
        self.send(id, ServerBody::Welcome(welcome));
        self.go_live(id, device, known, now);
    }
}
