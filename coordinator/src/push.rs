//! The coordinator without I/O: domain, sessions and what each connected device must hear, in one thread.
//!
//! A shell (or the simulator) feeds it: [`Coordinator::connect`], [`Coordinator::handle`], [`Coordinator::submit`],
//! [`Coordinator::handle_timeout`]. Commands gather in a batch: [`Coordinator::unsaved`] are the changes to persist in
//! one transaction; then [`Coordinator::saved`] publishes them, or [`Coordinator::not_saved`] takes them back. Nothing
//! that depends on a change leaves before it is saved. After each step, drain [`Coordinator::poll_output`].
//!
//! On a change, the netmaps of affected connected devices are recomputed. What takes away goes out to all of them
//! first, as a revision of its own; what adds is computed on top and waits until the agent has acknowledged what it was
//! sent before, so that a slow agent gets one newer delta rather than a queue.

mod bucket;
mod live;
mod peer_relay;
mod publish;
mod session;
mod verdicts;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use rand_core::{CryptoRng, RngCore};
use warren_common::ids::{DeviceId, RelayId};
use warren_common::keys::{ControlPublicKey, NetmapSecretKey};
use warren_common::time::{Instant, Now};
use warren_common::wire::control::{Refused, ServerBody};

use crate::domain::reach::Reach;
use crate::domain::records::PeerRecords;
use crate::domain::{
    Change, Command, DeviceState, EPHEMERAL_OFFLINE, PeerRelays, REVISION_BLOCK, Refusal, Reply, State,
};
use session::{Phase, Session};

pub use live::MAX_UNACKED;
pub use session::{
    ACK_PATIENCE, GREETING_PATIENCE, MAX_MESSAGES_PER_S, MAX_SIGNAL, MAX_SIGNALS_PER_S, MAX_SNAPSHOTS_PER_MIN,
};
pub use verdicts::{Differing, MAX_DIFFERING_KEPT, StagedCount};

/// Most sessions at a time: what one process is built for, with room for reconnects.
pub const MAX_SESSIONS: usize = 20_000;
/// How often what is over is forgotten.
pub const SWEEP_INTERVAL: Duration = Duration::from_secs(3_600);
/// How often the policy is compiled again though nothing changed, so that the time windows in filters reach further
/// ahead than any lease.
pub const RECOMPILE_INTERVAL: Duration = Duration::from_secs(6 * 3_600);

/// Names one connection for as long as it lasts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub u64);

/// Who a command comes from, and so where its answer goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A device's session.
    Session(SessionId),
    /// A caller who waits for [`Output::Reply`] with this number.
    Ticket(u64),
    /// The coordinator itself.
    Internal,
}

/// Why a session ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloseReason {
    /// The command that would have opened it was refused.
    Refused,
    /// The device has a newer session.
    Superseded,
    /// The device left or was removed, expired or suspended.
    DeviceGone,
    /// It did not enrol or resume in time.
    Silent,
    /// It said something a session in its state can't say.
    Protocol,
    /// It sends more than it may.
    Flood,
    /// It does not acknowledge updates.
    Stuck,
}

/// What the shell must do, in order.
#[derive(Clone, Debug, PartialEq)]
pub enum Output {
    /// Send this to a session.
    Send {
        /// To whom.
        session: SessionId,
        /// What.
        message: Box<ServerBody>,
    },
    /// Close this session once what was sent before is out.
    Close {
        /// Which.
        session: SessionId,
        /// Why.
        reason: CloseReason,
    },
    /// Answer to a command of [`Origin::Ticket`].
    Reply {
        /// The ticket.
        ticket: u64,
        /// How it went.
        result: Result<Reply, Refusal>,
    },
    /// End the session of this relay: it is removed.
    RelayRemoved(RelayId),
    /// Tell every relay: tokens of these devices count only from this revision on. Goes before the updates.
    RelayMinimum {
        /// The revision.
        revision: u64,
        /// Devices that lost a peer.
        devices: Vec<DeviceId>,
        /// Devices that are out of the network.
        revoked: Vec<DeviceId>,
    },
}

/// What the coordinator needs beside its state.
#[derive(Debug)]
pub struct Config {
    /// Signs netmaps and relay tokens.
    pub netmap_key: NetmapSecretKey,
    /// How long what a netmap grants lasts: 5 min to 7 d.
    pub lease: Duration,
}

/// Counts since the start, for metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Updates sent that were whole netmaps.
    pub snapshots: u64,
    /// Updates sent that were deltas.
    pub deltas: u64,
    /// Updates sent that only renewed the lease.
    pub leases: u64,
    /// Updates that an agent did not apply.
    pub rejected: u64,
    /// Probe messages passed on.
    pub signals: u64,
    /// Probe messages dropped: no such peer, peer away, too many or too long.
    pub signals_dropped: u64,
    /// Relay tokens made.
    pub relay_tokens: u64,
    /// Commands refused.
    pub refused: u64,
    /// Sessions that were closed by the coordinator.
    pub closed: u64,
    /// Devices caught running from a copied state directory.
    pub copied: u64,
    /// Agents that held a newer netmap than was ever made here: the database was restored from a backup.
    pub ahead: u64,
    /// Connections that two ends judged differently, as reported.
    pub differing: u64,
}

struct Pending {
    origin: Origin,
    command: Command,
    result: Result<Reply, Refusal>,
}

/// See the module.
pub struct Coordinator {
    config: Config,
    state: State,
    reach: Reach,
    records: PeerRecords,
    revision: u64,
    revision_limit: u64,
    sessions: BTreeMap<SessionId, Session>,
    by_device: BTreeMap<DeviceId, SessionId>,
    timers: BTreeSet<(Instant, SessionId)>,
    offline_ephemeral: BTreeMap<DeviceId, Instant>,
    sweep_due: Instant,
    recompile_due: Instant,
    pending: Vec<Pending>,
    unsaved: Vec<Change>,
    undo: Vec<Change>,
    wanted: VecDeque<Command>,
    outputs: VecDeque<Output>,
    stats: Stats,
    verdicts: verdicts::Verdicts,
    /// The revision of the newest command to any relay: tokens that are too old for it are older.
    newest_cut: u64,
}

impl std::fmt::Debug for Coordinator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Coordinator")
            .field("revision", &self.revision)
            .field("sessions", &self.sessions.len())
            .finish_non_exhaustive()
    }
}

impl Coordinator {
    /// A coordinator over `state` as it was loaded. The first batch it saves reserves revision numbers.
    pub fn new(config: Config, state: State, now: Now) -> Self {
        let reserved = state.settings().revisions_reserved;
        let ephemeral = state.devices().values().filter(|d| d.ephemeral).map(|d| (d.id, now.boot)).collect();
        let mut this = Self {
            reach: Reach::compute(&state, now.unix),
            records: PeerRecords::default(),
            config,
            state,
            // Everything up to `reserved` may have been sent before the last stop.
            revision: reserved + 1,
            revision_limit: reserved,
            sessions: BTreeMap::new(),
            by_device: BTreeMap::new(),
            timers: BTreeSet::new(),
            offline_ephemeral: ephemeral,
            sweep_due: now.boot,
            recompile_due: now.boot,
            pending: Vec::new(),
            unsaved: Vec::new(),
            undo: Vec::new(),
            wanted: VecDeque::from([Command::ReserveRevisions]),
            outputs: VecDeque::new(),
            stats: Stats::default(),
            verdicts: verdicts::Verdicts::default(),
            newest_cut: reserved + 1,
        };
        this.schedule_recompile(now);
        this
    }

    /// The state; between [`Coordinator::submit`] and [`Coordinator::saved`] it holds changes that may be taken back.
    pub const fn state(&self) -> &State {
        &self.state
    }

    /// The newest revision number in use.
    pub const fn revision(&self) -> u64 {
        self.revision
    }

    /// Counts since the start.
    pub const fn stats(&self) -> Stats {
        self.stats
    }

    /// How many sessions there are.
    pub fn session_count(&self) -> usize {
        self.sessions.len()
    }

    /// How many devices are connected.
    pub fn online_count(&self) -> usize {
        self.by_device.len()
    }

    /// True if the device is connected.
    pub fn is_online(&self, device: DeviceId) -> bool {
        self.by_device.contains_key(&device)
    }

    /// The newest revision the device acknowledged in its present session.
    pub fn acked_revision(&self, device: DeviceId) -> Option<u64> {
        let session = self.sessions.get(self.by_device.get(&device)?)?;
        session.live().map(|live| live.acked)
    }

    /// The netmap the device should have by the saved state; `None` unless it is an active device.
    pub fn netmap(&self, device: DeviceId) -> Option<warren_common::netmap::Netmap> {
        self.reach.netmap(&self.state, device, &self.records)
    }

    /// The devices that serve as relays, and for whom.
    pub const fn peer_relays(&self) -> &PeerRelays {
        self.reach.relays()
    }

    /// Why the policy in force could not be compiled; nothing is allowed then.
    pub fn policy_error(&self) -> Option<&str> {
        self.reach.error()
    }

    /// A session whose handshake proved `control`. It must enrol or resume within [`GREETING_PATIENCE`].
    ///
    /// # Errors
    /// [`Refusal::Busy`] if there are [`MAX_SESSIONS`].
    pub fn connect(&mut self, id: SessionId, control: ControlPublicKey, now: Now) -> Result<(), Refusal> {
        if self.sessions.len() >= MAX_SESSIONS {
            return Err(Refusal::Busy("it has as many sessions as it takes"));
        }
        self.disconnect(id, now); // an id in use again is a fault of the shell; the old session ends
        let session = Session::new(control, now);
        self.timers.insert((session.timer(), id));
        self.sessions.insert(id, session);
        Ok(())
    }

    /// The session's connection is gone.
    pub fn disconnect(&mut self, id: SessionId, now: Now) {
        let Some(session) = self.sessions.remove(&id) else { return };
        self.timers.remove(&(session.armed, id));
        let Phase::Live(live) = session.phase else { return };
        if self.by_device.get(&live.device) == Some(&id) {
            self.by_device.remove(&live.device);
            if self.state.device(live.device).is_some_and(|d| d.ephemeral) {
                self.offline_ephemeral.insert(live.device, now.boot);
            }
            self.announce(live.device, live.peers(), false);
        }
    }

    /// Decides a command and adds it to the batch. Its answer goes out with [`Coordinator::saved`].
    pub fn submit(
        &mut self,
        origin: Origin,
        command: Command,
        now: Now,
        rng: &mut (impl RngCore + CryptoRng),
    ) {
        if self.reserve_due() && command != Command::ReserveRevisions {
            self.decide(Origin::Internal, Command::ReserveRevisions, now, rng);
        }
        self.decide(origin, command, now, rng);
    }

    fn decide(&mut self, origin: Origin, command: Command, now: Now, rng: &mut (impl RngCore + CryptoRng)) {
        let (changes, result) = match self.state.apply(&command, now.unix, rng) {
            Ok((changes, reply)) => (changes, Ok(reply)),
            Err(refusal) => match refusal {
                Refusal::CopiedState { device } => (self.state.flag_copied(device), Err(refusal)),
                _ => (vec![], Err(refusal)),
            },
        };
        for change in changes {
            self.unsaved.push(change.clone());
            self.undo.push(self.state.absorb(change));
        }
        self.pending.push(Pending { origin, command, result });
    }

    /// True if there is a batch: persist [`Coordinator::unsaved`] (if there are any), then call
    /// [`Coordinator::saved`] or [`Coordinator::not_saved`].
    pub fn has_batch(&self) -> bool {
        !self.pending.is_empty()
    }

    /// The batch's changes, in order.
    pub fn unsaved(&self) -> &[Change] {
        &self.unsaved
    }

    /// The batch can't be saved: everything is as before and every caller hears `why`.
    pub fn not_saved(&mut self, why: &Refusal, now: Now) {
        for (origin, command) in self.retract() {
            self.respond(origin, &command, Err(why.clone()), now);
        }
    }

    /// Takes the batch back without answering, for a retry: returns its commands.
    pub fn retract(&mut self) -> Vec<(Origin, Command)> {
        self.unsaved.clear();
        for inverse in self.undo.drain(..).rev() {
            self.state.absorb(inverse);
        }
        self.pending.drain(..).map(|p| (p.origin, p.command)).collect()
    }

    /// Takes over changes that another writer of the store has made, and publishes them. Only without a batch.
    pub fn absorb_foreign(&mut self, changes: Vec<Change>, now: Now) {
        for change in changes {
            self.undo.push(self.state.absorb(change.clone()));
            self.unsaved.push(change);
        }
        self.publish(now);
    }

    /// Runs one command in a batch of its own, as if the store never failed: for the simulator and for tests.
    pub fn run(&mut self, origin: Origin, command: Command, now: Now, rng: &mut (impl RngCore + CryptoRng)) {
        self.submit(origin, command, now, rng);
        self.saved(now);
    }

    /// The next thing to do, in order.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// A command that the coordinator itself wants carried out: submit it with [`Origin::Internal`].
    pub fn poll_command(&mut self) -> Option<Command> {
        self.wanted.pop_front()
    }

    /// When [`Coordinator::handle_timeout`] wants to be called next.
    pub fn poll_timeout(&self) -> Instant {
        let session = self.timers.first().map_or(Instant::FAR_FUTURE, |(at, _)| *at);
        let ephemeral =
            self.offline_ephemeral.values().min().map_or(Instant::FAR_FUTURE, |at| *at + EPHEMERAL_OFFLINE);
        session.min(ephemeral).min(self.sweep_due).min(self.recompile_due)
    }

    /// Does what is due at `now`.
    pub fn handle_timeout(&mut self, now: Now) {
        if now.boot >= self.sweep_due {
            self.sweep_due = now.boot + SWEEP_INTERVAL;
            self.wanted.push_back(Command::Sweep);
            self.records.sweep(&self.state);
        }
        if now.boot >= self.recompile_due {
            self.recompile(now);
        }
        let over: Vec<DeviceId> = self
            .offline_ephemeral
            .iter()
            .filter(|(_, at)| now.boot >= **at + EPHEMERAL_OFFLINE)
            .map(|(id, _)| *id)
            .collect();
        for id in over {
            // If the store refuses, it is tried again after as long.
            self.offline_ephemeral.insert(id, now.boot);
            self.wanted.push_back(Command::RemoveDevice(id));
        }
        while let Some((at, id)) = self.timers.first().copied() {
            if at > now.boot {
                break;
            }
            self.timers.remove(&(at, id));
            self.session_timeout(id, now);
        }
    }

    /// When time alone changes what the policy means: a rule expires, a fact gets stale, windows run out.
    fn schedule_recompile(&mut self, now: Now) {
        let seconds = self.reach.reevaluate_at().map(|at| at.saturating_sub(now.unix.as_secs()).max(1));
        let wait = seconds.map_or(RECOMPILE_INTERVAL, |s| Duration::from_secs(s.unsigned_abs()));
        self.recompile_due = now.boot + wait.min(RECOMPILE_INTERVAL);
    }

    fn reserve_due(&self) -> bool {
        self.revision + REVISION_BLOCK / 2 > self.state.settings().revisions_reserved
    }

    /// The next revision number; `None` if the store has not let us reserve more.
    fn next_revision(&mut self) -> Option<u64> {
        let next = self.upcoming_revision()?;
        self.revision = next;
        Some(next)
    }

    /// The number that [`Self::next_revision`] gives next.
    fn upcoming_revision(&mut self) -> Option<u64> {
        if self.reserve_due() && self.wanted.is_empty() {
            self.wanted.push_back(Command::ReserveRevisions);
        }
        (self.revision < self.revision_limit).then_some(self.revision + 1)
    }

    fn send(&mut self, session: SessionId, message: ServerBody) {
        self.outputs.push_back(Output::Send { session, message: Box::new(message) });
    }

    /// Ends a session from our side; the shell closes the connection, and a later `disconnect` finds nothing.
    fn close(&mut self, id: SessionId, reason: CloseReason, now: Now) {
        if self.sessions.contains_key(&id) {
            self.stats.closed += 1;
            self.outputs.push_back(Output::Close { session: id, reason });
            self.disconnect(id, now);
        }
    }

    fn refuse(&mut self, id: SessionId, refusal: &Refusal, now: Now) {
        let refused = Refused {
            code: refusal.code().as_str().to_owned(),
            text: refusal.to_string(),
            fix: refusal.fix().to_owned(),
        };
        self.send(id, ServerBody::Refused(refused));
        self.close(id, CloseReason::Refused, now);
    }

    fn rearm(&mut self, id: SessionId) {
        if let Some(session) = self.sessions.get_mut(&id) {
            let at = session.timer();
            if at != session.armed || !self.timers.contains(&(at, id)) {
                self.timers.remove(&(session.armed, id));
                session.armed = at;
                self.timers.insert((at, id));
            }
        }
    }

    /// What a device in this state hears instead of a welcome.
    fn state_refusal(state: DeviceState, device: DeviceId) -> Refusal {
        match state {
            DeviceState::NeedsLogin => Refusal::CopiedState { device },
            DeviceState::Expired => Refusal::NeedsLogin("expired"),
            DeviceState::AwaitsApproval => Refusal::NotAdmitted("it waits for an administrator's approval"),
            DeviceState::Suspended => Refusal::NotAdmitted("its user is suspended"),
            DeviceState::Active => Refusal::UnknownDevice,
        }
    }
}

#[cfg(test)]
mod tests;
