//! One peer in use: its addresses, the pings under way, the way chosen.

use std::net::SocketAddr;
use std::time::Duration;

use arrayvec::ArrayVec;
use warren_common::ids::{DeviceId, RelayId};
use warren_common::time::Instant;
use warren_common::wire::probe::{CandidateKind, Ports, ProbeKeys, TxId};

use super::guess::{Search, is_private};
use super::mtu::PathMtu;
use super::relays::PairRelays;
use super::score::Losses;
use super::shared::Shared;
use super::why::Facts;
use super::{
    Budget, CHECK_INTERVAL, DISTRESS_AFTER, HEDGE_AFTER, IDLE_AFTER, MAX_HINT_ENDPOINTS, MAX_INFLIGHT,
    MAX_REMOTES, MAX_USER_PINGS, MIN_KEEPALIVE, PeerIdx, REPLY_FRESH, Rate, TRUST, Way,
};
use crate::event::{Event, Path, PingToken};
use crate::io::Destination;

mod changes;
mod probes;
mod remotes;
mod send;
mod time;

/// Rounds that follow each other within seconds.
const EAGER_ROUNDS: usize = 5;
const MINUTE: Duration = Duration::from_secs(60);
const SECOND: Duration = Duration::from_secs(1);
/// How long a check waits for an ordinary answer before it spends a ping.
const CHECK_PATIENCE: Duration = Duration::from_millis(300);
/// Least time between two pings that packets from an unproved address bring about.
const TRIGGERED_INTERVAL: Duration = Duration::from_millis(200);
/// How recent a pong must be for its way to be a choice.
const CONFIRMED_FRESH: Duration = Duration::from_secs(10);
/// Beyond two round trips, what a ping's answer may be late by before packets take another way.
const SLACK: Duration = Duration::from_millis(300);
/// Packets that come in within so short a time count as one sign of life.
const BURST: Duration = Duration::from_millis(10);
/// Least silence that is suspicious, however lively the way was; what three round trips and three of its usual pauses take is
/// added.
const MIN_ALARM: Duration = Duration::from_millis(150);
/// How long a way that was given up is still better than none, and how soon it must answer again for its death to have
/// been a NAT's forgetting.
const FORMER_FRESH: Duration = Duration::from_secs(10);
/// The share of a fatal silence that counts as safe, in percent.
const SAFE_PERCENT: u32 = 60;

/// Why a peer is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Use {
    /// There is data for it, or from it.
    Data,
    /// It asks for our addresses.
    Asked,
}

/// See the parent module.
pub(super) struct Active {
    pub(super) idx: PeerIdx,
    device: DeviceId,
    keys: Option<ProbeKeys>,
    /// When there last was data, or the peer asked for addresses.
    used: Instant,
    /// When there last was data. A peer that only asked is answered, and neither asked in turn nor told anything: else two
    /// that can't meet would keep each other in use for ever.
    data: Option<Instant>,
    pub(super) current: Option<Current>,
    /// The way in use before, how silent we had been when it was found dead, and when that was.
    former: Option<(Way, Duration, Instant)>,
    /// A silence shorter than one in which a way to this peer died: its NAT may forget sooner than ours.
    early_death: Option<Duration>,
    /// A way that answered, while a better one may at any moment, and when to take it if that has not.
    held: Option<(Way, Instant)>,
    pub(super) remotes: ArrayVec<Remote, MAX_REMOTES>,
    inflight: ArrayVec<Inflight, MAX_INFLIGHT>,
    /// Pings of the user that wait for a way or for their turn, with the time to give up.
    waiting: ArrayVec<(PingToken, Instant), MAX_USER_PINGS>,
    pub(super) round: usize,
    next_round: Instant,
    /// What the peer's NAT does with ports, as it says.
    pub(super) peer_ports: Option<Ports>,
    pub(super) search: Search,
    /// Our addresses are to be sent at this time, with a request for the peer's if true.
    owed: Option<(Instant, bool)>,
    announced: Option<Instant>,
    listed: bool,
    relays: PairRelays,
    /// The source of the last packet of WireGuard's on a direct way other than the current one.
    reply_to: Option<(Way, Instant)>,
    reachable: bool,
    told: Path,
    probes: Budget,
    checks: Budget,
    relay_pings: Budget,
    announcements: Budget,
    long_probes: Rate,
    pongs: Rate,
    /// Pings for people.
    asked: Rate,
}

pub(super) struct Current {
    way: Way,
    /// When it came into use.
    chosen: Instant,
    /// When something came in on it that nobody can have sent again: a packet of WireGuard's, or an answer to a ping of ours.
    last_rx: Instant,
    /// When a ping of the peer's came in, or something like it. It may be one that somebody sends again, so it says nothing of
    /// the way; but who hears the peer keep the way open need not do so as well.
    kept: Instant,
    last_tx: Instant,
    /// The round trip, smoothed.
    rtt: Duration,
    /// When the last burst of packets began to come in.
    burst: Instant,
    /// The usual time from one burst to the next, at most [`TRUST`].
    rhythm: Duration,
    check: Option<Check>,
    /// When it was last asked for a check, this one or a former one.
    asked: Option<Instant>,
    mtu: PathMtu,
}

struct Check {
    started: Instant,
    next_ping: Instant,
    /// When the first ping went out.
    asked: Option<Instant>,
    /// Without an answer until then the way is given up, if it was asked.
    dead_at: Instant,
    /// How long we had said nothing on the way before.
    silent: Duration,
    /// Without an answer until then, packets take another way.
    hedge_at: Instant,
    /// Data brought it about.
    by_data: bool,
}

impl Check {
    /// When it is more than a pause: a ping of the check should have been answered. Packets may take another way long before,
    /// by way of precaution.
    fn overdue_at(&self, patience: Duration) -> Option<Instant> {
        self.asked.map(|at| (at + patience).max(self.hedge_at))
    }

    /// When there is something to do.
    fn due(&self, now: Instant, patience: Duration) -> Instant {
        let later =
            [Some(self.hedge_at), self.overdue_at(patience)].into_iter().flatten().filter(|at| *at > now);
        later.chain(self.asked.map(|_| self.dead_at)).fold(self.next_ping, Instant::min)
    }

    /// A ping goes out.
    fn on_asked(&mut self, now: Instant) {
        if self.asked.is_none() {
            self.asked = Some(now);
            // It gets its time, also if we were late to ask.
            self.dead_at = self.dead_at.max(now + DISTRESS_AFTER - CHECK_PATIENCE);
        }
    }
}

impl Current {
    fn new(now: Instant, way: Way, rtt: Duration, mtu: usize) -> Self {
        Self {
            way,
            chosen: now,
            rtt,
            last_rx: now,
            kept: now,
            last_tx: now,
            burst: now,
            rhythm: TRUST,
            check: None,
            asked: None,
            mtu: PathMtu::new(now, mtu),
        }
    }

    /// Asks whether the way still works, from `next_ping` on, but not at once again: much can bring a check about.
    fn check(&mut self, now: Instant, next_ping: Instant, doubt: Doubt) {
        let next_ping = self.asked.map_or(next_ping, |at| next_ping.max(at + CHECK_INTERVAL));
        let hedge_at = match doubt {
            Doubt::None => now + HEDGE_AFTER.max(self.patience()),
            Doubt::Lively => now + self.patience(),
            Doubt::Dead => now,
        };
        if !self.is_checked() {
            let silent = now.since(self.last_tx);
            self.check = Some(Check {
                started: now,
                next_ping,
                asked: None,
                dead_at: now + DISTRESS_AFTER,
                silent,
                hedge_at,
                by_data: false,
            });
        } else if let Some(check) = &mut self.check {
            check.next_ping = check.next_ping.min(next_ping);
            check.hedge_at = check.hedge_at.min(hedge_at);
        }
    }

    /// We are somewhere else, perhaps: what was asked before says nothing, and the way is more likely dead than not.
    fn check_anew(&mut self, now: Instant) {
        self.asked = None;
        self.check(now, now, Doubt::Dead);
    }

    /// How long the answer to a ping may take.
    fn patience(&self) -> Duration {
        2 * self.rtt + SLACK
    }

    /// After how much silence, while we send, the way is suspicious: soon if it was lively.
    fn alarm_after(&self) -> Duration {
        TRUST.min(MIN_ALARM + 3 * self.rhythm + 3 * self.rtt)
    }

    /// Since when at least one end has said nothing on the way, as far as can be told.
    fn quiet_since(&self) -> Instant {
        self.last_rx.max(self.kept).min(self.last_tx)
    }

    /// Something came in on the way that proves that it works.
    fn heard(&mut self, now: Instant) {
        let since = now.since(self.burst);
        if since >= BURST {
            // Longer pauses count at once, shorter ones when they are usual.
            let since = since.min(TRUST);
            self.rhythm = since.max((7 * self.rhythm + since) / 8);
            self.burst = now;
        }
        self.last_rx = now;
    }

    /// True if a check has been unanswered for so long that packets should not be risked on the way.
    fn is_in_doubt(&self, now: Instant) -> bool {
        self.is_checked() && self.check.as_ref().is_some_and(|check| now >= check.hedge_at)
    }

    /// When the answer to a check that has had none yet is late: before that, what else answers says nothing of the way.
    fn late_at(&self) -> Option<Instant> {
        let check = self.check.as_ref().filter(|_| self.is_checked())?;
        // Not asked for want of a budget, it is late all the same.
        let asked = check.asked.unwrap_or(check.next_ping.min(check.started + CHECK_INTERVAL));
        Some(asked + 2 * self.rtt + BURST)
    }

    /// There is a reason not to wait with the ping of a check.
    fn ask_at_once(&mut self, now: Instant) {
        let soonest = self.asked.map_or(now, |at| now.max(at + CHECK_INTERVAL));
        if let Some(check) = self.check.as_mut().filter(|check| check.asked.is_none()) {
            check.next_ping = check.next_ping.min(soonest);
        }
    }

    /// True while a check has had no answer.
    fn is_checked(&self) -> bool {
        self.check.as_ref().is_some_and(|check| self.last_rx <= check.started)
    }
}

/// What the silence of a way in use is taken for, and so how soon packets take another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Doubt {
    /// A pause, perhaps: after [`HEDGE_AFTER`].
    None,
    /// It was lively a moment ago: as soon as an answer is late.
    Lively,
    /// It is more likely dead than not: no packet is risked on it.
    Dead,
}

pub(super) struct Remote {
    pub(super) way: Way,
    pub(super) kind: CandidateKind,
    learned: Instant,
    /// An authentic packet came from there.
    heard: bool,
    pinged: Option<Instant>,
    confirmed: Option<Instant>,
    rtt: Duration,
    /// Round-trip time, smoothed.
    smoothed: Duration,
    losses: Losses,
}

struct Inflight {
    txid: TxId,
    to: Destination,
    sent: Instant,
    token: Option<PingToken>,
    /// It was as long as a sealed packet of so many bytes.
    length: Option<usize>,
}

impl Active {
    pub(super) fn new(now: Instant, idx: PeerIdx, device: DeviceId, keys: Option<ProbeKeys>) -> Self {
        Self {
            idx,
            device,
            keys,
            used: now,
            data: None,
            current: None,
            former: None,
            early_death: None,
            held: None,
            remotes: ArrayVec::new(),
            inflight: ArrayVec::new(),
            waiting: ArrayVec::new(),
            round: 0,
            next_round: now,
            peer_ports: None,
            search: Search::default(),
            owed: None,
            announced: None,
            listed: false,
            relays: PairRelays::default(),
            reply_to: None,
            reachable: false,
            told: Path::None,
            probes: Budget::default(),
            checks: Budget::default(),
            relay_pings: Budget::default(),
            announcements: Budget::default(),
            long_probes: Rate::default(),
            pongs: Rate::default(),
            asked: Rate::default(),
        }
    }

    pub(super) const fn keys(&self) -> Option<&ProbeKeys> {
        self.keys.as_ref()
    }

    #[cfg(test)]
    pub(super) fn remotes(&self) -> usize {
        self.remotes.len()
    }

    #[cfg(test)]
    pub(super) fn inflight(&self) -> usize {
        self.inflight.len()
    }

    /// It is in use. True if data begins.
    pub(super) fn used(&mut self, now: Instant, by: Use) -> bool {
        self.used = now;
        let begins = by == Use::Data && !self.has_data(now);
        if by == Use::Data {
            self.data = Some(now);
        }
        begins
    }

    /// Somebody's data went to the peer or came from it lately.
    pub(super) fn has_data(&self, now: Instant) -> bool {
        self.data.is_some_and(|at| now.since(at) < IDLE_AFTER)
    }

    pub(super) const fn last_used(&self) -> Instant {
        self.used
    }

    /// Addresses worth trying after a restart: the one in use, then those that answered, the latest first, then the others.
    pub(super) fn endpoints(&self) -> Vec<SocketAddr> {
        let current = self.current.as_ref().map(|c| c.way);
        let mut remotes: Vec<&Remote> = self.remotes.iter().collect();
        remotes.sort_by_key(|r| (Some(r.way) != current, std::cmp::Reverse((r.confirmed, r.learned))));
        let mut out = Vec::with_capacity(MAX_HINT_ENDPOINTS);
        for remote in remotes {
            if out.len() < MAX_HINT_ENDPOINTS && !out.contains(&remote.way.remote) {
                out.push(remote.way.remote);
            }
        }
        out
    }

    /// Takes addresses from before a restart.
    pub(super) fn relearn<'a>(
        &mut self,
        now: Instant,
        endpoints: impl Iterator<Item = &'a SocketAddr>,
        shared: &mut Shared,
    ) {
        for addr in endpoints {
            if shared.accepts(*addr) {
                self.learn_on_all(now, *addr, CandidateKind::Observed, shared);
            } else {
                shared.counters.candidate_refused += 1;
            }
        }
        self.restart_rounds(now);
    }

    /// The peer is idle or gone: what waits for it is told so.
    pub(super) fn end(mut self, shared: &mut Shared) {
        self.end_searches(shared);
        let path = self.told;
        let under_way = self.inflight.iter().filter_map(|i| i.token);
        for token in under_way.chain(self.waiting.iter().map(|(token, _)| *token)) {
            shared.push_event(Event::PingResult { token, path, rtt: None });
        }
        if path != Path::None {
            shared.push_event(Event::PathChanged { device: self.device, path: Path::None });
        }
    }

    // Data path.

    /// Data goes out: on a direct way that has been silent for too long, watch whether an answer comes. After a silence in
    /// which a NAT may have forgotten us, ask first and take the relay meanwhile. Returns when to look.
    pub(super) fn on_send(&mut self, now: Instant, shared: &Shared) -> Option<Instant> {
        let early_death = self.early_death;
        let current = self.current.as_mut()?;
        let silence = now.since(current.last_rx);
        let alarm = current.alarm_after();
        let silent = silence >= alarm && !current.is_checked();
        let trusted = shared.trusted_silence(current.way.remote);
        // A NAT has not forgotten us while the peer asks. Should it only seem to, packets are at risk until the check says so.
        let unheard = now.since(current.last_rx.max(current.kept));
        let forgotten = unheard >= early_death.map_or(trusted, |fatal| trusted.min(fatal));
        let doubt = match (forgotten, alarm < TRUST) {
            (true, _) => Doubt::Dead,
            (false, true) => Doubt::Lively,
            (false, false) => Doubt::None,
        };
        let next_ping = if doubt == Doubt::None { now + CHECK_PATIENCE } else { now };
        if silent {
            current.check(now, next_ping, doubt);
            if let Some(check) = &mut current.check {
                check.by_data = true;
            }
        } else if forgotten && let Some(check) = &mut current.check {
            // A keep-alive asks already.
            check.hedge_at = now;
        }
        current.last_tx = now;
        silent.then_some(next_ping)
    }

    /// After how much silence the way in use needs a word.
    pub(super) fn keepalive(&self, shared: &Shared) -> Duration {
        let Some(current) = &self.current else { return Duration::MAX };
        let measured = shared.keepalive_of(current.way.remote);
        self.early_death.map_or(measured, |fatal| measured.min(fatal.max(MIN_KEEPALIVE)))
    }

    pub(super) const fn is_direct(&self) -> bool {
        self.current.is_some()
    }

    /// The extra sockets in use: the peer may have hit several, and choose another than we do.
    pub(super) fn extra_sockets(&self) -> impl Iterator<Item = u8> {
        let current = self.current.as_ref().map(|c| c.way);
        let heard = self.remotes.iter().filter(|r| r.heard).map(|r| r.way);
        current.into_iter().chain(heard).filter(|way| way.is_extra()).map(|way| way.socket)
    }

    pub(super) fn facts(&self) -> Facts {
        let outside = |r: &Remote| r.kind != CandidateKind::Local || !is_private(r.way.remote);
        Facts {
            has_keys: self.keys.is_some(),
            looks_eagerly: self.round <= EAGER_ROUNDS,
            listed: self.listed,
            common_family: !self.remotes.is_empty(),
            seen_from_outside: self.remotes.iter().any(outside),
            they_vary: matches!(self.peer_ports, Some(Ports::Predictable | Ports::Random)),
        }
    }

    pub(super) fn destination(
        &self,
        now: Instant,
        device: DeviceId,
        home: Option<RelayId>,
        shared: &Shared,
    ) -> Option<Destination> {
        let direct = self.current.as_ref();
        if let Some(current) = direct
            && !current.is_in_doubt(now)
        {
            return Some(current.way.into());
        }
        if let Some(relay) = self.relay(home, shared) {
            return Some(Destination::Relay { relay, device });
        }
        // Nothing better is known; and if it arrives, the peer learns where we are.
        let reply_to = self.reply_to.filter(|(_, at)| now.since(*at) < REPLY_FRESH).map(|(way, _)| way);
        let former = self.former.filter(|(_, _, at)| now.since(*at) < FORMER_FRESH).map(|(way, ..)| way);
        direct.map(|c| c.way).or(reply_to).or(former).map(Destination::from)
    }

    /// The longest packet for the direct way in use.
    pub(super) fn mtu(&self) -> Option<usize> {
        self.current.as_ref().map(|c| c.mtu.usable())
    }

    /// The relay to use, as a destination.
    pub(super) fn relay_to(&self, home: Option<RelayId>, shared: &Shared) -> Option<Destination> {
        let relay = self.relay(home, shared)?;
        Some(Destination::Relay { relay, device: self.device })
    }

    /// The relay to use.
    fn relay(&self, home: Option<RelayId>, shared: &Shared) -> Option<RelayId> {
        self.relays.choose(home, &shared.relays)
    }

    pub(super) fn path(&self, home: Option<RelayId>, shared: &Shared) -> (Path, Option<Duration>) {
        if let Some(current) = &self.current {
            let rtt = self.remotes.iter().find(|r| r.way == current.way).map(|r| r.rtt);
            return (Path::Direct { endpoint: current.way.remote }, rtt);
        }
        match self.relay(home, shared) {
            Some(relay) => (Path::Relay { relay }, self.relays.rtt(relay)),
            None => (Path::None, None),
        }
    }
}
