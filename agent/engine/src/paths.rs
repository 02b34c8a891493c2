//! Paths: how packets reach each peer.
//!
//! **Bootstrap.** The first packet for a peer leaves through the peer's relay at once. Beside it the peer becomes
//! *active* here: both sides tell each other their candidate addresses (sealed, through the relay, or through the
//! coordinator while no relay carries it), and both ping all of the other's candidates at the same time, which opens
//! port-restricted NATs on both sides.
//!
//! **Selection.** Probes only promote: a way is used for data once a pong came back over it, and among several the
//! score decides. An authentic packet from an unknown address makes that address a candidate, no more.
//!
//! **Failure.** Only distress demotes. When data goes out on a direct way and nothing came in on it for
//! [`TRUST`], the way is checked by pings. While the check is unanswered for [`HEDGE_AFTER`], packets take the relay; if no
//! ping is answered in [`DISTRESS_AFTER`], the way is given up and probing starts over. While a peer is relayed and in use,
//! probing goes on with growing pauses.
//!
//! **Hard NATs.** Where a NAT gives each destination another port, ports that can be predicted are announced as candidates;
//! else the end behind it opens many and the other end guesses, within a budget and only if its own NAT is an easy one.
//!
//! **Rest.** [`IDLE_AFTER`] after its last data a peer stops being active: its keys, candidates and timers are dropped.
//! An idle peer costs its entry in a table and nothing else.
//!
//! What a remote party can grow is bounded: addresses and pings per peer, probes per minute, answers, queued probes,
//! and key agreements on behalf of peers that aren't active.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::net::SocketAddr;
use std::time::Duration;

use ipnet::{Ipv4Net, Ipv6Net};
use warren_common::ids::{DeviceId, RelayId};
use warren_common::keys::{ProbePublicKey, ProbeSecretKey};
use warren_common::time::Instant;
use warren_common::wire::probe::{self, Candidate, MAX_CANDIDATES, Message, ProbeKeys, TAG_LEN};

use crate::event::{Event, Path, PingToken};
use crate::io::{Destination, LocalSocket, Outbox, Source};

mod active;
mod budget;
mod guess;
mod hints;
mod mtu;
mod relays;
mod score;
mod shared;
mod why;

use crate::stun::PortUse;
use active::{Active, Use};
pub(crate) use budget::{Budget, Rate};
pub use guess::{
    MAX_GUESSES, MAX_GUESSES_PER_MINUTE, MAX_OPENED_PORTS, MAX_PREDICTED, OPEN_SOCKETS, SEARCH_PAUSE,
    SEARCH_TIME,
};
pub use hints::{MAX_HINT_ENDPOINTS, MAX_HINTS, PathHint};
pub use mtu::{MAX_LENGTHS, MAX_LONG_PROBES_PER_MINUTE, MAX_PATH_MTU, MIN_PATH_MTU, MTU_FRESH};
use shared::Shared;
pub use why::WhyNotDirect;

/// Silence on a direct way after which sending on it starts a check: short, so that a dead path costs seconds; a
/// one-way stream then pays one ping per two seconds.
pub const TRUST: Duration = Duration::from_secs(1);
/// How long a check may be unanswered before packets take the relay meanwhile: more than two round trips on most ways. For
/// a slower way it is as much longer.
pub const HEDGE_AFTER: Duration = Duration::from_millis(800);
/// Silence on a direct way that is suspicious if the peer was just heard on another.
const ELSEWHERE: Duration = Duration::from_millis(300);
/// How long a check waits for any sign of life before the way counts as dead: several pings, and a round trip around
/// the world.
pub const DISTRESS_AFTER: Duration = Duration::from_millis(2_500);
/// Least time between two pings that check the way in use.
pub const CHECK_INTERVAL: Duration = Duration::from_millis(350);
/// Silence after which a direct way is in doubt while nobody knows how long the NAT in front of us remembers: then the next
/// packet takes the relay, and a round trip later the direct way again. Shorter than any NAT forgets.
pub const UNKNOWN_SILENCE: Duration = Duration::from_millis(2_500);
/// Keep-alives when nothing was measured: shorter than the 30 s after which common NATs forget (RFC 4787 asks for 2
/// minutes, few give them).
pub const KEEPALIVE: Duration = Duration::from_secs(22);
/// Shortest silence after which a direct way is kept open by a ping, however early it died before.
pub const MIN_KEEPALIVE: Duration = Duration::from_secs(6);
/// Time without data after which a peer is idle: as long as a WireGuard session lasts.
pub const IDLE_AFTER: Duration = Duration::from_secs(180);
/// Pauses between probe rounds while no direct way is known; the last one repeats.
pub const ROUND_PAUSES: [Duration; 9] = [
    Duration::from_millis(150),
    Duration::from_millis(350),
    Duration::from_millis(500),
    Duration::from_secs(1),
    Duration::from_secs(2),
    Duration::from_secs(5),
    Duration::from_secs(10),
    Duration::from_secs(20),
    Duration::from_secs(30),
];
/// Rounds that are run even after a direct way was found, so that a better one is found too.
const ROUNDS_AFTER_PROMOTION: usize = 3;
/// Pause between rounds that look for a better way while a direct one works.
pub const UPGRADE_INTERVAL: Duration = Duration::from_secs(60);
/// How long a ping may take; later answers don't count.
pub const PING_TIMEOUT: Duration = Duration::from_secs(5);
/// Addresses kept per peer: what it lists, times two sockets of ours.
pub const MAX_REMOTES: usize = 2 * MAX_CANDIDATES;
/// Pings under way per peer: one round over all addresses, twice.
pub const MAX_INFLIGHT: usize = 2 * MAX_REMOTES;
/// Probes per peer that look for a path: so many at once, for the first rounds over a dozen addresses, and so many a minute.
pub const MAX_PROBES_PER_MINUTE: u32 = 120;
/// The same for probes that check the path in use: more than pings that are [`CHECK_INTERVAL`] apart
/// need, so that no way is given up unasked.
pub const MAX_CHECKS_PER_MINUTE: u32 = 180;
/// The same for probes that compare relays: the rounds of a minute over a dozen.
pub const MAX_RELAY_PINGS_PER_MINUTE: u32 = 120;
/// The same for announcements of our addresses: one with each round, as many answers, and news.
pub const MAX_ANNOUNCEMENTS_PER_MINUTE: u32 = 60;
/// Pongs per peer and second: more than a peer that keeps to its own budgets asks for, even if it spends those of a
/// minute at once. A pong is as long as its ping, so it costs others no more than who asked for it.
pub const MAX_PONGS_PER_SECOND: u32 = 400;
/// Probes waiting for `poll_transmit`, over all peers; more are dropped and counted. 400 KiB.
pub const MAX_QUEUED: usize = 1_024;
/// Padded pings waiting for `poll_transmit`, over all peers; more are dropped and counted. 190 KiB.
pub const MAX_QUEUED_LONG: usize = 128;
/// Pings for `warren ping` that wait for a way or for their turn, per peer.
pub const MAX_USER_PINGS: usize = 16;
/// Pings for `warren ping` per peer and second: those beyond wait, so that the peer's budget answers all.
pub const MAX_USER_PINGS_PER_SECOND: u32 = 20;
/// Key agreements per second on behalf of peers that aren't active: 2 % of a core, should a relay lie about senders.
pub const MAX_DERIVATIONS_PER_SECOND: u32 = 200;
/// Our own addresses as seen by peers: kept only until STUN knows better.
pub const MAX_OBSERVED: usize = 2;
/// Age at which an address that was never confirmed, or not for so long, is forgotten.
pub const CANDIDATE_AGE: Duration = Duration::from_secs(15 * 60);
/// Least time between two announcements of our addresses to one peer.
const ANNOUNCE_INTERVAL: Duration = Duration::from_millis(200);
/// How long an authentic packet's source may be answered though no pong confirmed it: a handshake's round trip.
const REPLY_FRESH: Duration = Duration::from_secs(10);

/// Probes that look for paths, to all peers, at once and per minute: 25 peers that become active at once may spend theirs. 270 KB.
pub const MAX_DEVICE_PROBES_PER_MINUTE: u32 = 3_000;
/// Least time between two hints that the network may be another one.
const SUSPECT_INTERVAL: Duration = Duration::from_secs(5);

/// Our own socket addresses: more interfaces than a host of containers shows the world.
pub const MAX_LOCAL: usize = 64;
/// Most addresses of ours that somebody sets: half of what peers are told.
pub const MAX_STATIC: usize = MAX_CANDIDATES / 2;
/// Events waiting to be taken; the oldest goes first.
pub const MAX_PATH_EVENTS: usize = 4_096;

/// Which peer: its slot, small and reused.
pub(crate) type PeerIdx = u32;

/// One of our sockets and a peer's address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Way {
    pub(crate) socket: u8,
    pub(crate) remote: SocketAddr,
}

impl Way {
    /// True if it is through a socket that was opened for this peer.
    fn is_extra(self) -> bool {
        OPEN_SOCKETS.contains(&self.socket)
    }
}

impl From<Way> for Destination {
    fn from(way: Way) -> Self {
        Self::Direct { socket: way.socket, remote: way.remote }
    }
}

/// What an authentic packet carried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Carried {
    /// Somebody's data: the peer is in use.
    Data,
    /// A handshake: data is about to follow.
    Handshake,
    /// A keep-alive.
    Nothing,
}

/// Counters of what was dropped, for metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct PathCounters {
    pub(crate) probe_unknown: u64,
    pub(crate) probe_forged: u64,
    pub(crate) probe_limited: u64,
    pub(crate) probe_queue_full: u64,
    pub(crate) candidate_refused: u64,
    /// A known address made room for a new one.
    pub(crate) candidate_replaced: u64,
    /// A ping under way made room for a new one; its answer will be unexpected.
    pub(crate) ping_replaced: u64,
    pub(crate) pong_unexpected: u64,
    /// Requests to guess ports that were refused.
    pub(crate) guess_refused: u64,
    pub(crate) events: u64,
}

/// All peers' paths.
pub(crate) struct Paths {
    secret: ProbeSecretKey,
    public: ProbePublicKey,
    peers: Vec<Option<Entry>>,
    by_device: BTreeMap<DeviceId, PeerIdx>,
    active: BTreeSet<PeerIdx>,
    tags: BTreeMap<[u8; TAG_LEN], PeerIdx>,
    timers: BinaryHeap<Reverse<(Instant, PeerIdx)>>,
    derivations: Rate,
    shared: Shared,
}

/// A peer: what the netmap says, and its state machine while it is in use.
struct Entry {
    device: DeviceId,
    probe: ProbePublicKey,
    home_relay: Option<RelayId>,
    /// When it wants to be woken; heap entries with another time are stale.
    due: Option<Instant>,
    active: Option<Box<Active>>,
}

impl Paths {
    /// `mtu` is the TUN's.
    pub(crate) fn new(secret: ProbeSecretKey, seed: [u8; 32], mtu: usize) -> Self {
        Self {
            public: secret.public(),
            secret,
            peers: Vec::new(),
            by_device: BTreeMap::new(),
            active: BTreeSet::new(),
            tags: BTreeMap::new(),
            timers: BinaryHeap::new(),
            derivations: Rate::default(),
            shared: Shared::new(seed, mtu),
        }
    }

    // Peers.

    pub(crate) fn insert(
        &mut self,
        idx: PeerIdx,
        device: DeviceId,
        probe: ProbePublicKey,
        home_relay: Option<RelayId>,
    ) {
        let at = idx as usize;
        if self.peers.len() <= at {
            self.peers.resize_with(at + 1, || None);
        }
        self.by_device.insert(device, idx);
        self.peers[at] = Some(Entry { device, probe, home_relay, due: None, active: None });
    }

    pub(crate) fn set_home_relay(&mut self, now: Instant, idx: PeerIdx, home: Option<RelayId>) {
        let Some(entry) = self.entry(idx) else { return };
        if std::mem::replace(&mut entry.home_relay, home) != home {
            self.with_active(now, idx, |active, _, _| active.on_relays_changed(now));
        }
    }

    pub(crate) fn remove(&mut self, idx: PeerIdx) {
        self.deactivate(idx);
        if let Some(entry) = self.peers.get_mut(idx as usize).and_then(Option::take) {
            self.by_device.remove(&entry.device);
        }
    }

    // What is around us.

    /// The overlay's own prefixes are never endpoints.
    pub(crate) fn set_overlay(&mut self, now: Instant, ipv4: Ipv4Net, ipv6: Ipv6Net) {
        if self.shared.overlay != Some((ipv4, ipv6)) {
            self.shared.overlay = Some((ipv4, ipv6));
            self.own_changed(now, true);
        }
    }

    pub(crate) fn local(&self) -> &[LocalSocket] {
        &self.shared.local
    }

    /// Takes our sockets and addresses. True if they changed: then everything known about the network is forgotten,
    /// and what is in use goes through relays and is probed anew.
    pub(crate) fn set_local(&mut self, now: Instant, local: &[LocalSocket]) -> bool {
        let mut local = local.to_vec();
        local.sort_unstable();
        local.dedup();
        local.truncate(MAX_LOCAL);
        if local == self.shared.local {
            return false;
        }
        self.shared.local = local;
        self.shared.reflexive.clear();
        self.shared.mapped = None;
        self.shared.observed.clear();
        (self.shared.ports, self.shared.stun_settled) = (None, false);
        self.shared.rebuild_own();
        for idx in self.active_peers() {
            self.with_active(now, idx, |active, home, shared| active.on_network_change(now, home, shared));
        }
        true
    }

    /// Takes our addresses as STUN servers see them, and what the NAT does with ports.
    pub(crate) fn set_reflexive(
        &mut self,
        now: Instant,
        mapped: impl Iterator<Item = SocketAddr>,
        ports: Option<PortUse>,
    ) {
        let mapped: Vec<_> = mapped.take(MAX_CANDIDATES).collect();
        let news = std::mem::replace(&mut self.shared.ports, ports) != ports;
        self.shared.stun_settled = true;
        if news || mapped != self.shared.reflexive {
            let former = std::mem::replace(&mut self.shared.reflexive, mapped);
            let moved = self.shared.reflexive.iter().any(|a| !former.iter().any(|f| f.ip() == a.ip()));
            self.own_changed(now, moved);
        }
    }

    /// Takes the address that our NAT forwards to us.
    pub(crate) fn set_mapped(&mut self, now: Instant, mapped: Option<SocketAddr>) {
        if std::mem::replace(&mut self.shared.mapped, mapped) != mapped {
            self.own_changed(now, mapped.is_some());
        }
    }

    /// Takes the addresses that somebody says we are reached at; no network change takes them back.
    pub(crate) fn set_static(&mut self, now: Instant, endpoints: &[SocketAddr]) {
        let fixed = endpoints.iter().copied().take(MAX_STATIC).collect();
        if std::mem::replace(&mut self.shared.fixed, fixed).as_slice() != endpoints {
            self.own_changed(now, !endpoints.is_empty());
        }
    }

    /// What peers are told of where we are.
    pub(crate) fn own(&self) -> &[Candidate] {
        &self.shared.own
    }

    /// After how much silence the IPv4 NAT needs a word, and in how much it is known not to forget, if that is known. A way
    /// that would need one more often than [`MIN_KEEPALIVE`] is not kept open, but asked before it is used.
    pub(crate) fn set_keepalive(&mut self, keepalive: Option<Duration>, survived: Option<Duration>) {
        self.shared.keepalive = keepalive.map_or(KEEPALIVE, |keepalive| keepalive.max(MIN_KEEPALIVE));
        self.shared.trusted = survived.unwrap_or(UNKNOWN_SILENCE);
    }

    /// True if a way over IPv4 is in use, so that it matters how long the NAT remembers.
    pub(crate) const fn take_keepalive_wish(&mut self) -> bool {
        std::mem::replace(&mut self.shared.wants_keepalive, false)
    }

    /// The clock jumped: the device slept, and may be anywhere. Ways are in doubt until they answer.
    pub(crate) fn on_jump(&mut self, now: Instant) {
        self.shared.suspect(now);
        for idx in self.active_peers() {
            self.with_active(now, idx, |active, _, _| active.on_jump(now));
        }
    }

    /// The extra sockets that should be open, if that changed.
    pub(crate) fn take_sockets_wish(&mut self) -> Option<Vec<u8>> {
        if !std::mem::replace(&mut self.shared.sockets_changed, false) {
            return None;
        }
        let mut wanted: BTreeSet<u8> = self
            .active
            .iter()
            .filter_map(|idx| self.peers.get(*idx as usize)?.as_ref()?.active.as_ref())
            .flat_map(|active| active.extra_sockets())
            .collect();
        if self.shared.search.is_some() {
            wanted.extend(OPEN_SOCKETS);
        }
        Some(wanted.into_iter().collect())
    }

    /// The extra sockets that are open now.
    pub(crate) fn set_extra(&mut self, now: Instant, open: &[u8]) {
        self.shared.extra = open.iter().copied().collect();
        for idx in self.active_peers() {
            self.with_active(now, idx, |active, home, shared| active.on_extra(now, home, shared));
        }
    }

    /// True if a probe round found no direct way since the last call: a router may have another address by now, which no
    /// interface of ours tells.
    pub(crate) const fn take_stun_wish(&mut self) -> bool {
        std::mem::replace(&mut self.shared.wants_fresh_stun, false)
    }

    /// True if something says that the network is another one, so that what STUN said is stale, however new.
    pub(crate) const fn take_urgent_stun_wish(&mut self) -> bool {
        std::mem::replace(&mut self.shared.wants_stun_now, false)
    }

    /// `moved`: we are at another address, and not only at another port of it.
    fn own_changed(&mut self, now: Instant, moved: bool) {
        if self.shared.rebuild_own() {
            for idx in self.active_peers() {
                self.with_active(now, idx, |active, _, shared| active.owe_candidates(now, moved, shared));
            }
        }
    }

    /// True if STUN has told an address of ours.
    pub(crate) const fn knows_reflexive(&self) -> bool {
        !self.shared.reflexive.is_empty()
    }

    /// The relays of the netmap, and the one that is home.
    pub(crate) fn set_known_relays(&mut self, known: &[RelayId], home: Option<RelayId>) {
        self.shared.relays.set_known(known, home);
    }

    /// The relays of the netmap that are devices.
    pub(crate) fn set_peer_relays(&mut self, now: Instant, relays: impl Iterator<Item = RelayId>) {
        if self.shared.relays.set_peer_relays(relays) {
            for idx in self.active_peers() {
                self.with_active(now, idx, |active, _, _| active.on_relays_changed(now));
            }
        }
    }

    /// A relay says that a peer is not connected to it, or that our token does not let us send there.
    pub(crate) fn on_gone_from_relay(&mut self, now: Instant, idx: PeerIdx, relay: RelayId) {
        self.with_active(now, idx, |active, _, _| active.on_gone_from_relay(relay));
    }

    /// A relay connection came up or went down. True if that is news.
    pub(crate) fn set_relay(&mut self, now: Instant, relay: RelayId, connected: bool) -> bool {
        let changed = self.shared.relays.set(relay, connected);
        if changed {
            for idx in self.active_peers() {
                self.with_active(now, idx, |active, _, _| active.on_relays_changed(now));
            }
        }
        changed
    }

    /// A relay was left by our own choice.
    pub(crate) fn leave_relay(&mut self, now: Instant, relay: RelayId) {
        if self.shared.relays.leave(relay) {
            self.look_at_relays(now);
        }
    }

    /// A connected relay is silent, or answers again: packets pass it over meanwhile.
    pub(crate) fn set_relay_silent(&mut self, now: Instant, relay: RelayId, silent: bool) {
        if self.shared.relays.set_silent(relay, silent) {
            self.look_at_relays(now);
        }
    }

    /// A connected relay is about to close: packets pass it over from now on.
    pub(crate) fn set_relay_draining(&mut self, now: Instant, relay: RelayId) {
        if self.shared.relays.set_draining(relay) {
            self.look_at_relays(now);
        }
    }

    /// Peers in use may take another relay now.
    fn look_at_relays(&mut self, now: Instant) {
        for idx in self.active_peers() {
            self.with_active(now, idx, |_, _, _| {});
        }
    }

    pub(crate) fn relay_connected(&self, relay: RelayId) -> bool {
        self.shared.relays.is_up(relay)
    }

    /// The coordinator carries signals, or doesn't.
    pub(crate) fn set_signal(&mut self, now: Instant, connected: bool) {
        if std::mem::replace(&mut self.shared.signal, connected) != connected && connected {
            for idx in self.active_peers() {
                self.with_active(now, idx, |active, _, _| active.on_relays_changed(now));
            }
        }
    }

    // Packets.

    /// Where a packet with somebody's data goes; makes the peer active. `None` if there is no way yet.
    pub(crate) fn route(&mut self, now: Instant, idx: PeerIdx) -> Option<Destination> {
        self.touch(now, idx, Use::Data);
        let entry = self.peers.get_mut(idx as usize)?.as_mut()?;
        let active = entry.active.as_mut()?;
        if let Some(at) = active.on_send(now, &self.shared) {
            self.wake(idx, at);
        }
        let entry = self.peers.get(idx as usize)?.as_ref()?;
        entry.active.as_ref()?.destination(now, entry.device, entry.home_relay, &self.shared)
    }

    /// Where a packet of WireGuard's own (handshake, keep-alive) goes: it keeps no peer in use.
    pub(crate) fn peek_route(&self, now: Instant, idx: PeerIdx) -> Option<Destination> {
        let entry = self.peers.get(idx as usize)?.as_ref()?;
        let shared = &self.shared;
        match &entry.active {
            Some(active) => active.destination(now, entry.device, entry.home_relay, shared),
            None => entry
                .home_relay
                .filter(|relay| shared.relays.is_up(*relay))
                .map(|relay| Destination::Relay { relay, device: entry.device }),
        }
    }

    /// An authentic packet came in: the only thing, besides probes, that teaches anything.
    pub(crate) fn on_authentic(&mut self, now: Instant, idx: PeerIdx, from: Source, carried: Carried) {
        match carried {
            Carried::Data | Carried::Handshake => self.touch(now, idx, Use::Data),
            Carried::Nothing => {}
        }
        let Some(active) = self.entry(idx).and_then(|e| e.active.as_mut()) else { return };
        if active.on_packet(now, from) {
            self.with_active(now, idx, |active, _, shared| active.on_heard_news(now, from, shared));
        }
    }

    /// A probe came in.
    pub(crate) fn handle_probe(&mut self, now: Instant, from: Source, datagram: &[u8]) {
        let idx = match from {
            Source::Direct { .. } => probe::peek_tag(datagram).and_then(|tag| self.tags.get(&tag)).copied(),
            Source::Relay { device, .. } | Source::Signal { device } => self.find(device),
        };
        let Some(idx) = idx else {
            self.shared.counters.probe_unknown += 1;
            return;
        };
        let Some(message) = self.open(now, idx, from, datagram) else { return };
        // Who only tells where it is asks for nothing. Two idle ends whose ports change would else keep each other in use.
        if matches!(message, Message::Candidates { request: true, .. }) {
            self.touch(now, idx, Use::Asked);
        }
        self.with_active(now, idx, |active, home, shared| active.on_probe(now, from, message, home, shared));
    }

    /// Opens a probe with the peer's keys. Those of a peer that isn't active are derived, and it becomes active only if the
    /// probe is authentic and says something; one that only asks whether we are there is answered and changes nothing, or two
    /// idle ends would wake each other in turns.
    fn open(&mut self, now: Instant, idx: PeerIdx, from: Source, datagram: &[u8]) -> Option<Message> {
        let entry = self.peers.get(idx as usize)?.as_ref()?;
        let opened = match &entry.active {
            Some(active) => active.keys()?.open(datagram),
            None => {
                if !self.derivations.take(now, Duration::from_secs(1), MAX_DERIVATIONS_PER_SECOND) {
                    self.shared.counters.probe_limited += 1;
                    return None;
                }
                let keys = ProbeKeys::derive(&self.secret, &self.public, &entry.probe)?;
                let opened = keys.open(datagram);
                match opened {
                    Ok(Message::Candidates { .. } | Message::Guess { .. }) => {
                        self.activate(now, idx, Some(keys));
                    }
                    Ok(Message::Ping { txid }) => {
                        self.shared.answer_from_idle(&keys, txid, from);
                        return None;
                    }
                    Ok(Message::Pong { .. } | Message::Unknown) => return None,
                    Err(_) => {}
                }
                opened
            }
        };
        if opened.is_err() {
            self.shared.counters.probe_forged += 1;
        }
        opened.ok()
    }

    /// Measures the round-trip time over the path in use, or the first one there is.
    pub(crate) fn ping(&mut self, now: Instant, idx: PeerIdx, token: PingToken) {
        self.touch(now, idx, Use::Data);
        self.with_active(now, idx, |active, _, shared| active.user_ping(now, token, shared));
    }

    // Time and output.

    pub(crate) fn poll_timeout(&mut self) -> Option<Instant> {
        loop {
            let Reverse((at, idx)) = *self.timers.peek()?;
            if self.entry(idx).is_some_and(|entry| entry.due == Some(at)) {
                return Some(at);
            }
            self.timers.pop();
        }
    }

    /// Does what is due. True if something was.
    pub(crate) fn handle_timeout(&mut self, now: Instant) -> bool {
        let mut any = false;
        while let Some(at) = self.poll_timeout()
            && at <= now
        {
            let Some(Reverse((_, idx))) = self.timers.pop() else { break };
            any = true;
            if let Some(entry) = self.entry(idx) {
                entry.due = None;
            }
            self.with_active(now, idx, |_, _, _| {});
        }
        any
    }

    /// Moves probes to `out` while they fit. True if all did.
    pub(crate) fn poll_transmit(&mut self, out: &mut Outbox) -> bool {
        while let Some((to, probe)) = self.shared.queue.front() {
            if !out.push(*to, probe) {
                return false;
            }
            self.shared.queue.pop_front();
        }
        while let Some((to, probe)) = self.shared.long_queue.front() {
            if !out.push_whole(*to, probe) {
                return false;
            }
            self.shared.long_queue.pop_front();
        }
        true
    }

    pub(crate) fn poll_event(&mut self) -> Option<Event> {
        self.shared.events.pop_front()
    }

    /// A peer that can be reached now and couldn't be before: a handshake under way should be sent again.
    pub(crate) fn poll_ready(&mut self) -> Option<PeerIdx> {
        self.shared.ready.pop_front()
    }

    // Questions.

    pub(crate) fn find(&self, device: DeviceId) -> Option<PeerIdx> {
        self.by_device.get(&device).copied()
    }

    pub(crate) fn path(&self, idx: PeerIdx) -> (Path, Option<Duration>) {
        let entry = self.peers.get(idx as usize).and_then(Option::as_ref);
        entry
            .and_then(|e| Some(e.active.as_ref()?.path(e.home_relay, &self.shared)))
            .unwrap_or((Path::None, None))
    }

    /// The longest packet that the way to the peer carries without fragments, in bytes.
    pub(crate) fn mtu(&self, idx: PeerIdx) -> usize {
        let entry = self.peers.get(idx as usize).and_then(Option::as_ref);
        entry.and_then(|e| e.active.as_ref()?.mtu()).unwrap_or(self.shared.mtu)
    }

    /// Why no direct way to the peer is in use; `None` if one is.
    pub(crate) fn why_not_direct(&self, idx: PeerIdx) -> Option<WhyNotDirect> {
        match &self.peers.get(idx as usize)?.as_ref()?.active {
            Some(active) => active.why_not_direct(&self.shared),
            None => Some(WhyNotDirect::Idle),
        }
    }

    pub(crate) fn probe_key(&self, idx: PeerIdx) -> Option<ProbePublicKey> {
        Some(self.peers.get(idx as usize)?.as_ref()?.probe)
    }

    pub(crate) fn is_active(&self, idx: PeerIdx) -> bool {
        self.active.contains(&idx)
    }

    pub(crate) const fn counters(&self) -> &PathCounters {
        &self.shared.counters
    }

    // Inside.

    fn entry(&mut self, idx: PeerIdx) -> Option<&mut Entry> {
        self.peers.get_mut(idx as usize)?.as_mut()
    }

    fn active_peers(&self) -> Vec<PeerIdx> {
        self.active.iter().copied().collect()
    }

    /// The peer is in use.
    fn touch(&mut self, now: Instant, idx: PeerIdx, by: Use) {
        if self.entry(idx).is_some_and(|entry| entry.active.is_none()) {
            self.activate(now, idx, None);
        }
        let active = self.entry(idx).and_then(|entry| entry.active.as_mut());
        if active.is_some_and(|active| active.used(now, by)) {
            self.with_active(now, idx, |active, _, _| active.on_first_data(now));
        }
    }

    fn activate(&mut self, now: Instant, idx: PeerIdx, keys: Option<ProbeKeys>) {
        let Some(entry) = self.peers.get_mut(idx as usize).and_then(Option::as_mut) else { return };
        // Without keys (a low-order one in the netmap) the peer is reached through relays only.
        let keys = keys.or_else(|| ProbeKeys::derive(&self.secret, &self.public, &entry.probe));
        if let Some(keys) = &keys {
            self.tags.insert(keys.open_tag(), idx);
        }
        entry.active = Some(Box::new(Active::new(now, idx, entry.device, keys)));
        self.active.insert(idx);
        self.with_active(now, idx, |_, _, _| {});
    }

    fn deactivate(&mut self, idx: PeerIdx) {
        let Some(entry) = self.peers.get_mut(idx as usize).and_then(Option::as_mut) else { return };
        entry.due = None;
        if let Some(active) = entry.active.take() {
            if let Some(keys) = active.keys() {
                self.tags.remove(&keys.open_tag());
            }
            active.end(&mut self.shared);
        }
        self.active.remove(&idx);
    }

    /// Runs `change` on an active peer, then whatever is due, and sets its timer.
    fn with_active(
        &mut self,
        now: Instant,
        idx: PeerIdx,
        change: impl FnOnce(&mut Active, Option<RelayId>, &mut Shared),
    ) {
        let Some(entry) = self.peers.get_mut(idx as usize).and_then(Option::as_mut) else { return };
        let Some(active) = entry.active.as_mut() else { return };
        change(active, entry.home_relay, &mut self.shared);
        match active.tick(now, entry.home_relay, &mut self.shared) {
            Some(at) => self.wake(idx, at),
            None => self.deactivate(idx),
        }
    }

    fn wake(&mut self, idx: PeerIdx, at: Instant) {
        let Some(entry) = self.peers.get_mut(idx as usize).and_then(Option::as_mut) else { return };
        // A timer that fires early finds nothing due and is set anew: cheaper than moving it for each packet.
        if entry.due.is_none_or(|due| at < due) {
            entry.due = Some(at);
            self.timers.push(Reverse((at, idx)));
        }
    }
}

#[cfg(test)]
mod tests;
