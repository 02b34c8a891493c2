//! Flows: what an allowed packet leaves behind, so that its answers pass.
//!
//! A flow is told apart by local and remote address, protocol, and ports or ICMP identifier; it remembers who opened
//! it, by which rule, through which peer. TCP moves through [`FlowState`] by the flags both sides send; everything
//! else only knows whether an answer came. Packets of either side keep a flow alive; [`FlowState::timeout`] has the
//! idle times. Sequence numbers are tracked just as far as is needed to end a connection with a reset that the
//! local TCP accepts (RFC 5961: exactly the number it expects next). Whether segments lie in the window is left to
//! the two TCPs.
//!
//! The table itself, with its bounds and evictions, is in [`table`].

use std::hash::{Hash, Hasher};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use serde::Serialize;
use warren_common::filter::{PROTO_ICMP, PROTO_ICMPV6, RuleId, has_ports};
use warren_common::time::Instant;

use crate::packet::{Addrs, Selector, TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN, TcpHeader};

pub mod table;

/// Idle time of a TCP connection that is being opened, re-learnt or closed: the least RFC 5382 (REQ-5) permits.
pub const TCP_TRANSITORY: Duration = Duration::from_secs(4 * 60);
/// Idle time of an established TCP connection: the least RFC 5382 (REQ-5) permits, just above the two hours after
/// which keep-alives are due (RFC 9293).
pub const TCP_ESTABLISHED: Duration = Duration::from_secs((2 * 60 + 4) * 60);
/// How long a reset TCP connection lets stray packets through.
pub const TCP_CLOSED: Duration = Duration::from_secs(10);
/// Idle time of UDP and other protocols before an answer: the least RFC 4787 (REQ-5) permits.
pub const DATAGRAM_UNANSWERED: Duration = Duration::from_secs(2 * 60);
/// Idle time of UDP and other protocols after an answer: what RFC 4787 (REQ-5) recommends.
pub const DATAGRAM_ANSWERED: Duration = Duration::from_secs(5 * 60);
/// Idle time of ICMP queries: the least RFC 5508 (REQ-2) permits.
pub const ICMP_QUERY: Duration = Duration::from_secs(60);
/// How long an ended flow is remembered, so that the local application is told again if it goes on.
pub const ENDED: Duration = Duration::from_secs(2 * 60);

/// Which way a packet goes, seen from this device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Direction {
    /// From the local host to a peer.
    Egress,
    /// From a peer to the local host.
    Ingress,
}

impl Direction {
    /// The other way.
    pub const fn reversed(self) -> Self {
        match self {
            Self::Egress => Self::Ingress,
            Self::Ingress => Self::Egress,
        }
    }
}

/// Where a flow stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum FlowState {
    /// TCP: the opener's SYN was seen.
    SynSent,
    /// TCP: it was answered by SYN and ACK.
    SynReceived,
    /// TCP: met in the middle (after a restart) by a packet in the permitted direction, no answer yet.
    Relearnt,
    /// TCP: the handshake is complete, or a re-learnt connection was answered.
    Established,
    /// TCP: one side is done sending.
    HalfClosed,
    /// TCP: both sides are done sending.
    TimeWait,
    /// TCP: reset by one side.
    Closed,
    /// Not TCP: no answer yet.
    Unanswered,
    /// Not TCP: answered.
    Answered,
    /// ICMP query, answered or not.
    IcmpQuery,
    /// Ended by policy; nothing passes any more.
    Ended,
}

impl FlowState {
    /// How long a flow in this state lives without packets.
    pub const fn timeout(self) -> Duration {
        match self {
            Self::SynSent | Self::SynReceived | Self::Relearnt | Self::TimeWait => TCP_TRANSITORY,
            Self::Established | Self::HalfClosed => TCP_ESTABLISHED,
            Self::Closed => TCP_CLOSED,
            Self::Unanswered => DATAGRAM_UNANSWERED,
            Self::Answered => DATAGRAM_ANSWERED,
            Self::IcmpQuery => ICMP_QUERY,
            Self::Ended => ENDED,
        }
    }

    /// True if packets of the flow pass.
    pub const fn is_live(self) -> bool {
        !matches!(self, Self::Ended)
    }

    /// True if a SYN begins a new connection rather than belonging to this one.
    pub const fn is_over(self) -> bool {
        matches!(self, Self::TimeWait | Self::Closed | Self::Ended)
    }
}

/// What tells a flow apart, the same for both directions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowKey {
    /// Local address, then remote address, as 128 bits each.
    addrs: [u64; 4],
    /// Local port, remote port, protocol, family: 16, 16, 8 and 8 bits.
    rest: u64,
}

impl Hash for FlowKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        if self.rest & 0xff == FAMILY_V4 {
            state.write_u64(self.addrs[1] << 32 | self.addrs[3]);
        } else {
            for word in self.addrs {
                state.write_u64(word);
            }
        }
        state.write_u64(self.rest);
    }
}

const FAMILY_V4: u64 = 4;
const FAMILY_V6: u64 = 6;

impl FlowKey {
    /// The key of a packet that goes in `direction`.
    ///
    /// An ICMP query's key says which side asks, in the place of the remote port, so that an identifier both sides
    /// use makes two flows and a request never passes as the answer to another.
    pub fn new(direction: Direction, addrs: Addrs, proto: u8, selector: Selector) -> Self {
        let asks_out = |request: bool| u16::from((direction == Direction::Egress) == request);
        let (near, far) = match selector {
            Selector::Ports { src, dst } => match direction {
                Direction::Egress => (src, dst),
                Direction::Ingress => (dst, src),
            },
            Selector::Echo { request, id } => (id, asks_out(request)),
            Selector::Icmp { kind } => (u16::from(kind), 2 | asks_out(true)),
            Selector::None => (0, 0),
        };
        let oriented = match direction {
            Direction::Egress => addrs,
            Direction::Ingress => addrs.reversed(),
        };
        let (addrs, family) = match oriented {
            Addrs::V4 { src, dst } => ([0, u64::from(src.to_bits()), 0, u64::from(dst.to_bits())], FAMILY_V4),
            Addrs::V6 { src, dst } => {
                let (src, dst) = (src.to_bits(), dst.to_bits());
                ([(src >> 64) as u64, src as u64, (dst >> 64) as u64, dst as u64], FAMILY_V6)
            }
        };
        Self { addrs, rest: u64::from(near) << 48 | u64::from(far) << 32 | u64::from(proto) << 8 | family }
    }

    /// The addresses of a packet that goes in `direction`.
    pub fn addrs(&self, direction: Direction) -> Addrs {
        let [local_high, local_low, remote_high, remote_low] = self.addrs;
        let out = if self.rest & 0xff == FAMILY_V6 {
            let wide = |high: u64, low: u64| u128::from(high) << 64 | u128::from(low);
            Addrs::V6 {
                src: Ipv6Addr::from_bits(wide(local_high, local_low)),
                dst: Ipv6Addr::from_bits(wide(remote_high, remote_low)),
            }
        } else {
            Addrs::V4 {
                src: Ipv4Addr::from_bits(local_low as u32), // made from 32 bits above
                dst: Ipv4Addr::from_bits(remote_low as u32),
            }
        };
        match direction {
            Direction::Egress => out,
            Direction::Ingress => out.reversed(),
        }
    }

    /// The local address.
    pub fn local(&self) -> IpAddr {
        self.addrs(Direction::Egress).src()
    }

    /// The remote address.
    pub fn remote(&self) -> IpAddr {
        self.addrs(Direction::Egress).dst()
    }

    /// The IP protocol.
    pub const fn proto(&self) -> u8 {
        (self.rest >> 8) as u8
    }

    /// The local port, an ICMP query's identifier, or zero.
    pub const fn local_port(&self) -> u16 {
        (self.rest >> 48) as u16
    }

    /// The remote port, zero for protocols without ports.
    pub const fn remote_port(&self) -> u16 {
        if has_ports(self.proto()) { self.far() } else { 0 }
    }

    /// The selector of a packet of this flow that goes in `direction`.
    pub const fn selector(&self, direction: Direction) -> Selector {
        let (near, far) = (self.local_port(), self.far());
        match self.proto() {
            proto if has_ports(proto) => match direction {
                Direction::Egress => Selector::Ports { src: near, dst: far },
                Direction::Ingress => Selector::Ports { src: far, dst: near },
            },
            PROTO_ICMP | PROTO_ICMPV6 if far & 2 == 0 => {
                Selector::Echo { request: (far == 1) == matches!(direction, Direction::Egress), id: near }
            }
            PROTO_ICMP | PROTO_ICMPV6 => Selector::Icmp { kind: near as u8 },
            _ => Selector::None,
        }
    }

    /// The port at which the opener knocked, zero for protocols without ports.
    pub const fn service_port(&self, opened: Direction) -> u16 {
        match opened {
            Direction::Egress => self.remote_port(),
            Direction::Ingress if has_ports(self.proto()) => self.local_port(),
            Direction::Ingress => 0,
        }
    }

    const fn far(&self) -> u16 {
        (self.rest >> 32) as u16
    }
}

/// Packets and bytes that went one way, counted as IP packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Traffic {
    /// Packets.
    pub packets: u64,
    /// Bytes, IP headers included.
    pub bytes: u64,
}

impl Traffic {
    const fn add(&mut self, packets: u32, bytes: usize) {
        self.packets += packets as u64;
        self.bytes += bytes as u64;
    }
}

/// One flow.
#[derive(Clone, Copy, Debug)]
pub struct Flow {
    /// What tells it apart.
    pub key: FlowKey,
    /// The peer at the other end, by the engine's handle.
    pub peer: u32,
    /// The way the packet went that opened it.
    pub opened: Direction,
    /// Where it stands.
    pub state: FlowState,
    /// The rule that allows it.
    pub rule: RuleId,
    /// The revision of the rules it was last checked against.
    pub revision: u64,
    /// When it was opened.
    pub since: Instant,
    /// When its last packet passed.
    pub seen: Instant,
    /// What went from the local host to the peer.
    pub sent: Traffic,
    /// What came from the peer.
    pub received: Traffic,
    tcp: TcpTrack,
}

/// What is known of the local TCP's numbers.
#[derive(Clone, Copy, Debug, Default)]
struct TcpTrack {
    /// The number behind everything the local TCP sent.
    sent_end: Option<u32>,
    /// The number the local TCP expects next.
    expected: Option<u32>,
    fin: [bool; 2],
}

/// The numbers of a reset that the local TCP takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResetNumbers {
    /// Its sequence number: what the local TCP expects next.
    pub seq: u32,
    /// Its acknowledgement: everything the local TCP sent. A TCP that is still opening wants it.
    pub ack: Option<u32>,
}

impl Flow {
    /// A flow opened by a packet that went in `opened` and was allowed by `rule`.
    pub fn new(
        key: FlowKey,
        peer: u32,
        opened: Direction,
        rule: RuleId,
        revision: u64,
        now: Instant,
    ) -> Self {
        Self {
            key,
            peer,
            opened,
            state: match key.proto() {
                warren_common::filter::PROTO_TCP => FlowState::Relearnt,
                PROTO_ICMP | PROTO_ICMPV6 => FlowState::IcmpQuery,
                _ => FlowState::Unanswered,
            },
            rule,
            revision,
            since: now,
            seen: now,
            sent: Traffic::default(),
            received: Traffic::default(),
            tcp: TcpTrack::default(),
        }
    }

    /// The time at which the flow is forgotten if nothing more passes.
    pub fn expires(&self) -> Instant {
        // Per packet, so without the arithmetic of `Duration`: timeouts are whole seconds.
        let timeout = self.state.timeout().as_secs() * 1_000_000_000;
        Instant::from_nanos(self.seen.as_nanos().saturating_add(timeout))
    }

    /// Packets that went in `direction`.
    pub const fn traffic(&self, direction: Direction) -> Traffic {
        match direction {
            Direction::Egress => self.sent,
            Direction::Ingress => self.received,
        }
    }

    /// Counts packets that passed, which `tcp` describes as one segment, and says which state follows.
    pub(crate) fn record(
        &mut self,
        direction: Direction,
        packets: u32,
        bytes: usize,
        tcp: Option<&TcpHeader>,
    ) -> FlowState {
        match direction {
            Direction::Egress => self.sent.add(packets, bytes),
            Direction::Ingress => self.received.add(packets, bytes),
        }
        match tcp {
            Some(tcp) => self.record_tcp(direction, tcp),
            None if self.state == FlowState::Unanswered && direction != self.opened => FlowState::Answered,
            None => self.state,
        }
    }

    fn record_tcp(&mut self, direction: Direction, segment: &TcpHeader) -> FlowState {
        let valid_reset = segment.has(TCP_RST) && self.is_expected_reset(direction, segment);
        // A stray SYN on a connection that lives is answered by a challenge; it mustn't move the numbers.
        let stray_syn =
            segment.opens() && matches!(self.state, FlowState::Established | FlowState::HalfClosed);
        if !segment.has(TCP_RST) && !stray_syn {
            self.tcp.track(direction, segment);
        }
        let answer = direction != self.opened;
        match self.state {
            FlowState::Ended | FlowState::Closed => self.state,
            _ if valid_reset => FlowState::Closed,
            _ if segment.has(TCP_RST) => self.state,
            _ if segment.has(TCP_FIN) => {
                self.tcp.fin[direction as usize] = true;
                if self.tcp.fin == [true, true] { FlowState::TimeWait } else { FlowState::HalfClosed }
            }
            FlowState::Relearnt if !answer && segment.opens() => FlowState::SynSent,
            FlowState::Relearnt if answer => FlowState::Established,
            // Without ACK it is a simultaneous open, which the other direction's rules allowed.
            FlowState::SynSent if answer && segment.has(TCP_SYN) => FlowState::SynReceived,
            FlowState::SynReceived if !answer && !segment.has(TCP_SYN) => FlowState::Established,
            state => state,
        }
    }

    /// A reset closes the flow only with the number its receiver expects (RFC 5961), so that a made-up one can't
    /// take the answers' way; while a connection opens, with the right acknowledgement (RFC 9293).
    fn is_expected_reset(&self, direction: Direction, segment: &TcpHeader) -> bool {
        let (seq, ack) = match direction {
            Direction::Ingress => (self.tcp.expected, self.tcp.sent_end),
            Direction::Egress => (self.tcp.sent_end, self.tcp.expected),
        };
        match self.state {
            FlowState::SynSent => segment.has(TCP_ACK) && ack == Some(segment.ack),
            _ => seq == Some(segment.seq),
        }
    }

    /// The numbers a reset to the local TCP must carry now, as far as the packets seen tell.
    pub(crate) fn reset_numbers(&self) -> Option<ResetNumbers> {
        match (self.tcp.expected, self.tcp.sent_end) {
            (Some(seq), ack) => Some(ResetNumbers { seq, ack }),
            // Only a SYN went out: the local TCP goes by the acknowledgement.
            (None, Some(ack)) if self.state == FlowState::SynSent => {
                Some(ResetNumbers { seq: 0, ack: Some(ack) })
            }
            (None, _) => None,
        }
    }
}

impl TcpTrack {
    fn track(&mut self, direction: Direction, segment: &TcpHeader) {
        match direction {
            Direction::Egress => {
                if segment.has(TCP_SYN) || self.sent_end.is_none_or(|end| is_after(segment.end(), end)) {
                    self.sent_end = Some(segment.end());
                }
                // The local TCP's own word on what it expects.
                if segment.has(TCP_ACK) && self.expected.is_none_or(|seq| is_after(segment.ack, seq)) {
                    self.expected = Some(segment.ack);
                }
            }
            Direction::Ingress => {
                let in_order = self.expected.is_none_or(|expected| {
                    !is_after(segment.seq, expected) && is_after(segment.end(), expected)
                });
                if segment.has(TCP_SYN) || in_order {
                    self.expected = Some(segment.end());
                }
                if segment.has(TCP_ACK) && self.sent_end.is_none() {
                    self.sent_end = Some(segment.ack);
                }
            }
        }
    }
}

/// True if sequence number `a` is behind `b`, modulo 2^32 (RFC 9293, section 3.4).
const fn is_after(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) > 0
}
