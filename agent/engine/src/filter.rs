//! Verdicts: the flow table in front, the rules behind, default deny.
//!
//! A packet passes if it belongs to a live flow, or if it may open one: an active rule allows its direction and no
//! active rule denies it. Nothing else passes, in either direction and either family:
//! - an ICMP error only if the packet it quotes belongs to a live flow of the same peer;
//! - a later fragment only after its first fragment passed, while that fragment's flow lives, and only if it
//!   doesn't overlap the first;
//! - an ICMP echo reply, a TCP reset or a TCP segment in the direction that isn't permitted only with a flow.
//!
//! **Revocation.** [`Filter::set_rules`] checks every flow against the new rules before it returns, so no packet
//! passes on a permission that is gone. Rules that lapse by time are noticed by the next packet or
//! [`Filter::handle_timeout`], whichever comes first. An ended flow yields an [`EndedFlow`] whose
//! [`notice`](EndedFlow::notice) tells the local application; the remote side is never told.
//!
//! **Local application.** A new connection that is refused on its way out is answered at once, and so is what still
//! comes from an ended flow: by a TCP reset or an ICMP error in [`Filter::poll_output`], at a bounded rate.
//!
//! **After a restart** the table is empty. A TCP segment in the permitted direction makes a flow again. A segment in
//! the other direction is dropped without a reset; but where it shows that a permitted connection may exist, its
//! receiver is asked for an acknowledgement by an empty keep-alive segment (RFC 9293, section 3.8.4), and that
//! acknowledgement goes in the permitted direction. Without this a download would hang for good, since its
//! permitted side has nothing to send. See [`Output`].

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use warren_common::filter::{FilterRule, PROTO_ICMPV6, RuleId, UnixInterval};
use warren_common::time::{Instant, Now, UnixTime};

use crate::flow::table::{FlowHash, FlowId, FlowTable, MAX_FLOWS};
use crate::flow::{Direction, Flow, FlowKey};
use crate::io::Burst;
use crate::matcher::{Decision, Matcher, Query, Scratch};
use crate::packet::{Packet, Quoted, Selector, TCP_RST, TcpHeader, Transport};

mod disagreements;
mod drops;
mod ended;
mod fragments;
mod notices;
mod why;

pub use disagreements::{DISAGREEMENT_INTERVAL, Disagreement, MAX_DISAGREEMENTS, MAX_NEWS_BURST, NEWS_EVERY};
pub use drops::{Counters, DropReason};
pub use ended::{EndReason, EndedFlow};
pub use fragments::{FRAGMENT_TIMEOUT, MAX_FRAGMENTED, MAX_FRAGMENTING_PEERS};
pub use notices::{MAX_OUTPUTS, Output};
pub use why::{
    DropRecord, FlowView, MAX_NEAR_MISSES, MAX_RECENT_DROPS, MAX_WHY_FLOWS, Miss, NearMiss, Outcome, RuleRef,
    Why, WhyDecision,
};

use disagreements::Disagreements;
use fragments::Fragments;
use notices::Notices;
use why::RecentDrops;
pub(crate) use why::as_text;

/// Ended flows kept until somebody takes them, a count: all of a full table.
pub const MAX_ENDED: usize = MAX_FLOWS;

/// The end of a span without an end.
const FOREVER: UnixTime = UnixTime::from_secs(i64::MAX);

/// What to do with a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Let it pass.
    Pass,
    /// Drop it. It has been counted and remembered already.
    Drop(DropReason),
}

/// The rules of one revision, compiled once and shared by every shard.
#[derive(Debug, Default)]
pub struct Snapshot {
    /// What peers may open towards this device.
    pub ingress: Matcher,
    /// What this device may open towards peers.
    pub egress: Matcher,
    /// The netmap revision the rules are from.
    pub revision: u64,
}

impl Snapshot {
    /// Compiles both directions.
    pub fn compile(ingress: Vec<FilterRule>, egress: Vec<FilterRule>, revision: u64) -> Self {
        Self { ingress: Matcher::compile(ingress), egress: Matcher::compile(egress), revision }
    }

    /// The rules for flows opened in `direction`.
    pub const fn matcher(&self, direction: Direction) -> &Matcher {
        match direction {
            Direction::Egress => &self.egress,
            Direction::Ingress => &self.ingress,
        }
    }

    fn stable_span(&self, unix: i64) -> UnixInterval {
        let (a, b) = (self.ingress.stable_span(unix), self.egress.stable_span(unix));
        UnixInterval { from: a.from.max(b.from), until: a.until.min(b.until) }
    }
}

/// See the module's description. One owner calls it; it takes time as an argument and does no I/O.
#[derive(Debug)]
pub struct Filter {
    rules: Arc<Snapshot>,
    /// Set while nothing is allowed.
    closed: Option<EndReason>,
    /// The time in which the flows' last check keeps.
    checked: Range<UnixTime>,
    flows: FlowTable,
    fragments: Fragments,
    notices: Notices,
    recent: RecentDrops,
    disagreements: Disagreements,
    scratch: Scratch,
    ended: VecDeque<EndedFlow>,
    counters: [Counters; 2],
    staged: BTreeMap<RuleId, [u64; 2]>,
}

impl Filter {
    /// A filter without rules: it denies everything. `seed` must come from a secret generator.
    pub fn new(seed: [u64; 2]) -> Self {
        Self::with_table(seed, FlowTable::new(seed))
    }

    /// A filter on a flow table with limits of its own.
    pub fn with_table(seed: [u64; 2], flows: FlowTable) -> Self {
        let hash = FlowHash::new(seed);
        Self {
            rules: Arc::default(),
            closed: None,
            checked: UnixTime::from_secs(i64::MIN)..FOREVER,
            flows,
            fragments: Fragments::default(),
            notices: Notices::new(hash),
            recent: RecentDrops::new(hash),
            disagreements: Disagreements::default(),
            scratch: Scratch::default(),
            ended: VecDeque::new(),
            counters: [Counters::default(); 2],
            staged: BTreeMap::new(),
        }
    }

    /// Puts rules in force in place of the former ones and checks every flow against them. Returns the flows that
    /// are no longer allowed; they have ended (with those that ended before, if nobody took them yet). Also reopens a filter that [`Filter::close_all`] closed.
    pub fn set_rules(
        &mut self,
        ingress: Vec<FilterRule>,
        egress: Vec<FilterRule>,
        revision: u64,
        now: Now,
    ) -> Vec<EndedFlow> {
        self.install(Arc::new(Snapshot::compile(ingress, egress, revision)), now)
    }

    /// [`Filter::set_rules`] with rules compiled before, for several shards.
    pub fn install(&mut self, rules: Arc<Snapshot>, now: Now) -> Vec<EndedFlow> {
        self.rules = rules;
        self.closed = None;
        self.staged = [Direction::Ingress, Direction::Egress]
            .into_iter()
            .flat_map(|direction| self.rules.matcher(direction).rules())
            .filter(|rule| rule.staged)
            .map(|rule| (rule.id, self.staged.get(&rule.id).copied().unwrap_or_default()))
            .collect();
        self.recheck(now, EndReason::PolicyChanged);
        self.take_ended()
    }

    /// Withdraws every permission: all flows end, and nothing is allowed until rules are set again.
    pub fn close_all(&mut self, reason: EndReason, now: Now) -> Vec<EndedFlow> {
        self.rules = Arc::new(Snapshot { revision: self.rules.revision, ..Snapshot::default() });
        self.closed = Some(reason);
        self.recheck(now, reason);
        self.take_ended()
    }

    /// Ends the flows of a peer that is gone, so that its handle may be used again.
    pub fn remove_peer(&mut self, peer: u32, now: Now) -> Vec<EndedFlow> {
        self.end_where(now, EndReason::PeerRemoved, |flow| flow.peer == peer);
        self.fragments.forget(peer);
        self.disagreements.forget(peer);
        self.take_ended()
    }

    /// Judges an IP packet from the local host to `peer`.
    pub fn egress(&mut self, now: Now, bytes: &[u8], peer: u32) -> Verdict {
        self.judge(Direction::Egress, now, bytes, peer, Burst::one(bytes.len()))
    }

    /// Judges an IP packet from `peer` to the local host. That its source belongs to the peer must be known.
    pub fn ingress(&mut self, now: Now, bytes: &[u8], peer: u32) -> Verdict {
        self.judge(Direction::Ingress, now, bytes, peer, Burst::one(bytes.len()))
    }

    /// Judges packets that differ in nothing that a verdict looks at (one flow, no flag that changes its state, one after
    /// the other) by the first of them, and counts all. A super-frame from the TUN is its own first packet.
    pub fn judge_burst(
        &mut self,
        direction: Direction,
        now: Now,
        first: &[u8],
        peer: u32,
        burst: Burst,
    ) -> Verdict {
        self.judge(direction, now, first, peer, burst)
    }

    /// Counts and remembers a packet that the engine dropped for a reason of its own. The local application is told
    /// as of any refused packet.
    pub fn record_drop(&mut self, direction: Direction, now: Now, bytes: &[u8], reason: DropReason) {
        self.record_drops(direction, now, bytes, 1, reason);
    }

    /// [`Filter::record_drop`] for `packets` of which `bytes` are the first.
    pub fn record_drops(
        &mut self,
        direction: Direction,
        now: Now,
        bytes: &[u8],
        packets: u32,
        reason: DropReason,
    ) {
        self.counters[direction as usize].count(&reason, packets);
        let Ok(packet) = Packet::parse(bytes) else { return };
        self.recent.note(direction, now, &packet, reason);
        if direction == Direction::Egress {
            self.tell_local(now, &packet, None, reason);
        }
    }

    /// A packet the filter made itself, the oldest first. Drain it after each batch.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.notices.poll()
    }

    /// Forgets idle flows, and checks all flows if a rule came into force or lapsed. Returns every flow that ended
    /// since the last call, those that packets found included.
    pub fn handle_timeout(&mut self, now: Now) -> Vec<EndedFlow> {
        self.check_windows(now);
        self.flows.expire(now.boot);
        self.take_ended()
    }

    /// When to call [`Filter::handle_timeout`] next; at once if flows ended that nobody has taken yet.
    pub fn poll_timeout(&self, now: Now) -> Option<Instant> {
        if !self.ended.is_empty() {
            return Some(now.boot);
        }
        let until = self.checked.end;
        let window = (until < FOREVER).then(|| now.boot + until.since(now.unix));
        window.into_iter().chain(self.flows.next_expiry()).min()
    }

    /// The next second (Unix time) after `now` at which a rule comes into force or lapses.
    pub fn next_change(&self, now: Now) -> Option<i64> {
        let unix = now.unix.as_secs();
        let changes = [&self.rules.ingress, &self.rules.egress].map(|m| m.next_change(unix));
        changes.into_iter().flatten().min()
    }

    /// The rules in force.
    pub const fn rules(&self) -> &Arc<Snapshot> {
        &self.rules
    }

    /// The flows, for reading.
    pub const fn flows(&self) -> &FlowTable {
        &self.flows
    }

    /// What was counted in one direction.
    pub const fn counters(&self, direction: Direction) -> &Counters {
        &self.counters[direction as usize]
    }

    /// How often each staged rule would have matched, on the way out and on the way in: per new flow, or per packet
    /// where none was made.
    pub fn staged_hits(&self) -> impl Iterator<Item = (RuleId, u64, u64)> + '_ {
        self.staged
            .iter()
            .map(|(id, hits)| (*id, hits[Direction::Egress as usize], hits[Direction::Ingress as usize]))
    }

    /// A connection that a peer let out and this end refuses, if there is news of one.
    pub fn poll_disagreement(&mut self) -> Option<Disagreement> {
        self.disagreements.poll()
    }

    /// Connections that peers let out lately and this end refused, at most [`MAX_DISAGREEMENTS`].
    pub fn disagreements(&self) -> impl Iterator<Item = &Disagreement> {
        self.disagreements.iter()
    }

    fn judge(&mut self, direction: Direction, now: Now, bytes: &[u8], peer: u32, burst: Burst) -> Verdict {
        self.check_windows(now);
        let packet = match Packet::parse(bytes) {
            Ok(packet) => packet,
            Err(error) => {
                let reason = DropReason::Malformed(error);
                self.counters[direction as usize].count(&reason, burst.packets);
                return Verdict::Drop(reason);
            }
        };
        let verdict = match packet.transport {
            Transport::LaterFragment => self.judge_fragment(direction, now, &packet, peer),
            Transport::IcmpError { .. } => self.judge_icmp_error(direction, now, &packet, peer),
            Transport::Tcp(_) | Transport::Other(_) => self.judge_whole(direction, now, &packet, peer, burst),
        };
        match verdict {
            Ok(()) => {
                self.counters[direction as usize].passed += u64::from(burst.packets);
                Verdict::Pass
            }
            Err(reason) => {
                self.counters[direction as usize].count(&reason, burst.packets);
                self.recent.note(direction, now, &packet, reason);
                let refused = matches!(reason, DropReason::NoRule | DropReason::DeniedByRule(_));
                if direction == Direction::Ingress && refused {
                    self.disagreements.note(now, &packet, peer, reason, self.rules.revision);
                }
                Verdict::Drop(reason)
            }
        }
    }

    /// A packet whose transport header is there.
    fn judge_whole(
        &mut self,
        direction: Direction,
        now: Now,
        packet: &Packet<'_>,
        peer: u32,
        burst: Burst,
    ) -> Result<(), DropReason> {
        let key = FlowKey::new(direction, packet.addrs, packet.proto, packet.selector());
        let tcp = match packet.transport {
            // A burst's numbers are those of one long segment.
            Transport::Tcp(tcp) => {
                Some(TcpHeader { payload_len: tcp.payload_len + burst.more_payload, ..tcp })
            }
            _ => None,
        };
        let tcp = tcp.as_ref();
        let found = self.flows.find(&key, now.boot);
        let id = match found.and_then(|id| Some((id, self.flows.get(id)?))) {
            Some((id, flow)) if flow.peer == peer && carries(flow, direction, tcp) => id,
            known => {
                let known = known.map(|(_, flow)| *flow);
                match self.admit(direction, now, packet, tcp, key, peer, known) {
                    Ok(id) => id,
                    Err(reason) => {
                        if direction == Direction::Egress {
                            self.tell_local(now, packet, Some(peer), reason);
                        }
                        return Err(reason);
                    }
                }
            }
        };
        self.flows.update(id, now.boot, |flow| flow.record(direction, burst.packets, burst.bytes, tcp));
        if let Some(fragment) = packet.fragment {
            self.fragments.remember(direction, peer, packet, fragment, key, now.boot);
        }
        Ok(())
    }

    /// A packet that no live flow carries: may it open one?
    #[expect(clippy::too_many_arguments, reason = "one step of judge_whole")]
    fn admit(
        &mut self,
        direction: Direction,
        now: Now,
        packet: &Packet<'_>,
        tcp: Option<&TcpHeader>,
        key: FlowKey,
        peer: u32,
        known: Option<Flow>,
    ) -> Result<FlowId, DropReason> {
        if self.closed.is_some() {
            return Err(DropReason::LeaseEnded);
        }
        if is_forbidden_icmp(packet) {
            return Err(DropReason::ForbiddenIcmp);
        }
        let ended = known.is_some_and(|flow| !flow.state.is_live());
        let nothing_to_open = tcp.is_some_and(|tcp| tcp.has(TCP_RST))
            || matches!(packet.transport, Transport::Other(Selector::Echo { request: false, .. }));
        if nothing_to_open {
            return Err(if ended { DropReason::FlowEnded } else { DropReason::NoFlow });
        }
        let query =
            Query { src: packet.src(), dst: packet.dst(), proto: packet.proto, dst_port: packet.dst_port() };
        let staged = &mut self.staged;
        let decision =
            self.rules.matcher(direction).decide(&mut self.scratch, &query, now.unix.as_secs(), |rule| {
                if let Some(hits) = staged.get_mut(&rule.id) {
                    hits[direction as usize] += 1;
                }
            });
        let refused = match decision {
            Decision::Allow(rule) => {
                let live = known.filter(|flow| flow.peer == peer && !flow.state.is_over());
                if let (Some(_), Some(id)) = (live, self.flows.find(&key, now.boot)) {
                    return Ok(id); // a SYN against the opener's direction: allowed, but the flow is the same
                }
                let flow = Flow::new(key, peer, direction, rule.id, self.rules.revision, now.boot);
                return self.flows.insert(flow, now.boot).map_err(|_| DropReason::FlowTableFull);
            }
            Decision::Deny(rule) => DropReason::DeniedByRule(rule.id),
            Decision::NoRule => DropReason::NoRule,
        };
        if ended {
            return Err(DropReason::FlowEnded);
        }
        if known.is_some_and(|flow| flow.peer != peer) {
            return Err(DropReason::SpoofedSource);
        }
        match tcp {
            Some(tcp) if !tcp.opens() => {
                if matches!(refused, DropReason::NoRule) {
                    self.ask_for_proof(direction, now, packet, tcp, peer);
                }
                Err(DropReason::NoFlow)
            }
            _ => Err(refused),
        }
    }

    /// After a restart: where the reverse direction is permitted, have the receiver acknowledge.
    fn ask_for_proof(
        &mut self,
        direction: Direction,
        now: Now,
        packet: &Packet<'_>,
        tcp: &TcpHeader,
        peer: u32,
    ) {
        let reverse =
            Query { src: packet.dst(), dst: packet.src(), proto: packet.proto, dst_port: tcp.src_port };
        let permitted = self
            .rules
            .matcher(direction.reversed())
            .decide(&mut self.scratch, &reverse, now.unix.as_secs(), |_| {})
            .is_allowed();
        if permitted {
            self.notices.ask(direction, now.boot, packet.addrs, tcp, peer);
        }
    }

    /// Lets the local application know that its packet was refused, unless it was a stray one.
    fn tell_local(&mut self, now: Now, packet: &Packet<'_>, peer: Option<u32>, reason: DropReason) {
        match reason {
            DropReason::NoRule
            | DropReason::DeniedByRule(_)
            | DropReason::LeaseEnded
            | DropReason::FlowEnded
            | DropReason::NoPeer => {}
            _ => return,
        }
        if let Transport::Tcp(tcp) = &packet.transport
            && !tcp.opens()
        {
            // Without a flow there was no connection to reset, see the module's description.
            let key = FlowKey::new(Direction::Egress, packet.addrs, packet.proto, packet.selector());
            if self.flows.find(&key, now.boot).is_none() {
                return;
            }
        }
        self.notices.refuse(now.boot, packet, peer);
    }

    fn judge_fragment(
        &mut self,
        direction: Direction,
        now: Now,
        packet: &Packet<'_>,
        peer: u32,
    ) -> Result<(), DropReason> {
        let key = packet
            .fragment
            .and_then(|fragment| self.fragments.find(direction, peer, packet, fragment, now.boot))
            .ok_or(DropReason::NotFirstFragment)?;
        let id = self.live_flow(&key, peer, now)?;
        self.flows.update(id, now.boot, |flow| flow.record(direction, 1, packet.bytes.len(), None));
        Ok(())
    }

    fn judge_icmp_error(
        &mut self,
        direction: Direction,
        now: Now,
        packet: &Packet<'_>,
        peer: u32,
    ) -> Result<(), DropReason> {
        let related = |filter: &Self, quoted: Quoted| {
            let sent = direction.reversed();
            let key = FlowKey::new(sent, quoted.addrs, quoted.proto, quoted.selector);
            let id = filter.live_flow(&key, peer, now).ok()?;
            let flow = filter.flows.get(id)?;
            (packet.dst() == quoted.addrs.src() && flow.traffic(sent).packets > 0).then_some(key)
        };
        let key =
            packet.quoted().and_then(|quoted| related(self, quoted)).ok_or(DropReason::UnrelatedIcmpError)?;
        if let Some(fragment) = packet.fragment {
            self.fragments.remember(direction, peer, packet, fragment, key, now.boot);
        }
        Ok(())
    }

    fn live_flow(&self, key: &FlowKey, peer: u32, now: Now) -> Result<FlowId, DropReason> {
        let id = self.flows.find(key, now.boot).ok_or(DropReason::NotFirstFragment)?;
        match self.flows.get(id) {
            Some(flow) if flow.peer != peer => Err(DropReason::SpoofedSource),
            Some(flow) if flow.state.is_live() => Ok(id),
            _ => Err(DropReason::FlowEnded),
        }
    }

    fn check_windows(&mut self, now: Now) {
        if !self.checked.contains(&now.unix) {
            self.recheck(now, EndReason::WindowClosed);
        }
    }

    /// Checks every flow against the rules as they are now.
    fn recheck(&mut self, now: Now, reason: EndReason) {
        let unix = now.unix.as_secs();
        let span = self.rules.stable_span(unix);
        self.checked = UnixTime::from_secs(span.from)..UnixTime::from_secs(span.until);
        let rules = Arc::clone(&self.rules);
        for place in 0..self.flows.capacity() {
            let Some((id, flow)) = self.flows.id_at(place).and_then(|id| Some((id, *self.flows.get(id)?)))
            else {
                continue;
            };
            if !flow.state.is_live() {
                continue;
            }
            let addrs = flow.key.addrs(flow.opened);
            let query = Query {
                src: addrs.src(),
                dst: addrs.dst(),
                proto: flow.key.proto(),
                dst_port: flow.key.service_port(flow.opened),
            };
            let matcher = rules.matcher(flow.opened);
            match matcher.decide(&mut self.scratch, &query, unix, |_| {}) {
                Decision::Allow(rule) => self.flows.confirm(id, rule.id, rules.revision),
                Decision::Deny(_) | Decision::NoRule => self.end(id, now, reason),
            }
        }
    }

    fn end_where(&mut self, now: Now, reason: EndReason, which: impl Fn(&Flow) -> bool) {
        for place in 0..self.flows.capacity() {
            if let Some(id) = self.flows.id_at(place)
                && self.flows.get(id).is_some_and(|flow| flow.state.is_live() && which(flow))
            {
                self.end(id, now, reason);
            }
        }
    }

    fn end(&mut self, id: FlowId, now: Now, reason: EndReason) {
        let Some(flow) = self.flows.get(id).copied() else {
            return;
        };
        if flow.expires() <= now.boot {
            self.flows.remove(id);
            return;
        }
        if self.ended.len() >= MAX_ENDED {
            self.ended.pop_front();
        }
        self.ended.push_back(EndedFlow { flow, reason });
        self.flows.update(id, now.boot, |_| crate::flow::FlowState::Ended);
    }

    fn take_ended(&mut self) -> Vec<EndedFlow> {
        self.ended.drain(..).collect()
    }
}

/// True if the packet belongs to the flow, false if the flow is over, or the packet opens another connection.
fn carries(flow: &Flow, direction: Direction, tcp: Option<&TcpHeader>) -> bool {
    let opens = tcp.is_some_and(TcpHeader::opens);
    flow.state.is_live() && !(opens && (direction != flow.opened || flow.state.is_over()))
}

/// Redirects and source quench would let a peer change how the host routes or sends (RFC 6633, RFC 6980); neighbour
/// and router discovery are valid on a link only (RFC 4861).
const fn is_forbidden_icmp(packet: &Packet<'_>) -> bool {
    match packet.transport {
        Transport::Other(Selector::Icmp { kind }) => {
            if packet.proto == PROTO_ICMPV6 {
                kind >= 133 && kind <= 137
            } else {
                kind == 4 || kind == 5
            }
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests;
