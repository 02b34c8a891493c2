//! Packets the filter makes: refusals for the local application, and requests for proof of a connection.

use std::collections::VecDeque;
use std::hash::BuildHasher;
use std::net::IpAddr;
use std::time::Duration;

use warren_common::time::Instant;

use crate::flow::Direction;
use crate::flow::table::FlowHash;
use crate::packet::{Addrs, Packet, Selector, TCP_ACK, TCP_RST, TcpHeader, Transport, build};

/// Packets waiting to be polled, a count: a few batches' worth. More are not made.
pub const MAX_OUTPUTS: usize = 256;

/// Refusals in a row per peer: a browser opens some dozens of connections at once.
const REFUSAL_BURST: u32 = 64;
/// Time in which one more refusal may be made: 100 a second.
const REFUSAL_EVERY: Duration = Duration::from_millis(10);
/// Requests for proof in a row per peer: as many connections may wait after a restart.
const PROOF_BURST: u32 = 64;
/// Time in which one more request for proof may be made: 20 a second.
const PROOF_EVERY: Duration = Duration::from_millis(50);
/// Budgets kept; peers share one if they fall on the same.
const BUDGETS: usize = 64;

/// A packet the filter made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// To the local host: write it to the TUN. A reset, an ICMP error, or a keep-alive.
    Local(Vec<u8>),
    /// To a peer: seal and send it; it needs no further verdict. Only ever a keep-alive: a TCP segment without data
    /// to a connection that the peer may have opened to this host before a restart.
    Peer {
        /// The peer, by the engine's handle.
        peer: u32,
        /// The IP packet.
        packet: Vec<u8>,
    },
}

#[derive(Debug)]
pub(super) struct Notices {
    hash: FlowHash,
    queue: VecDeque<Output>,
    refusals: [Budget; BUDGETS],
    proofs: [Budget; BUDGETS],
}

/// A token bucket as one time: when it would be full again.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Budget {
    full: Instant,
}

impl Budget {
    /// True if something may happen now that may happen `burst` times at once, and once `every` in the long run.
    pub(super) fn take(&mut self, now: Instant, every: Duration, burst: u32) -> bool {
        let full = self.full.max(now);
        if full.since(now) > every.saturating_mul(burst - 1) {
            return false;
        }
        self.full = full + every;
        true
    }
}

impl Notices {
    pub(super) fn new(hash: FlowHash) -> Self {
        Self {
            hash,
            queue: VecDeque::new(),
            refusals: [Budget::default(); BUDGETS],
            proofs: [Budget::default(); BUDGETS],
        }
    }

    pub(super) fn poll(&mut self) -> Option<Output> {
        self.queue.pop_front()
    }

    /// Answers a refused packet of the local host in the name of its destination; packets to no peer have one budget.
    pub(super) fn refuse(&mut self, now: Instant, packet: &Packet<'_>, peer: Option<u32>) {
        // RFC 1122, section 3.2.2: no errors about resets, errors, replies or packets to many.
        let answerable = match &packet.transport {
            Transport::Tcp(tcp) => !tcp.has(TCP_RST),
            Transport::Other(Selector::Echo { request, .. }) => *request,
            Transport::Other(Selector::Icmp { .. }) => false,
            Transport::Other(Selector::Ports { .. } | Selector::None) => true,
            Transport::IcmpError { .. } | Transport::LaterFragment => false,
        };
        if !answerable || !is_unicast(packet.src()) || !is_unicast(packet.dst()) {
            return;
        }
        let slot = self.slot(peer.unwrap_or(u32::MAX));
        if self.queue.len() >= MAX_OUTPUTS || !self.refusals[slot].take(now, REFUSAL_EVERY, REFUSAL_BURST) {
            return;
        }
        let addrs = packet.addrs.reversed();
        let bytes = match &packet.transport {
            Transport::Tcp(tcp) => {
                // RFC 9293, section 3.10.7.1: the reset of a connection that doesn't exist.
                let (seq, ack) = if tcp.has(TCP_ACK) { (tcp.ack, None) } else { (0, Some(tcp.end())) };
                build::Segment {
                    addrs,
                    src_port: tcp.dst_port,
                    dst_port: tcp.src_port,
                    seq,
                    ack,
                    flags: TCP_RST,
                }
                .to_bytes()
            }
            _ => build::prohibited(addrs, packet.bytes),
        };
        self.queue.push_back(Output::Local(bytes));
    }

    /// Makes the receiver of a segment acknowledge: a keep-alive with the segment's addresses, one number before it.
    pub(super) fn ask(
        &mut self,
        direction: Direction,
        now: Instant,
        addrs: Addrs,
        tcp: &TcpHeader,
        peer: u32,
    ) {
        let slot = self.slot(peer);
        if !tcp.has(TCP_ACK)
            || self.queue.len() >= MAX_OUTPUTS
            || !self.proofs[slot].take(now, PROOF_EVERY, PROOF_BURST)
        {
            return;
        }
        let packet = build::Segment {
            addrs,
            src_port: tcp.src_port,
            dst_port: tcp.dst_port,
            seq: tcp.seq.wrapping_sub(1),
            ack: Some(tcp.ack),
            flags: 0,
        }
        .to_bytes();
        self.queue.push_back(match direction {
            Direction::Ingress => Output::Local(packet),
            Direction::Egress => Output::Peer { peer, packet },
        });
    }

    fn slot(&self, peer: u32) -> usize {
        self.hash.hash_one(peer) as usize % BUDGETS
    }
}

fn is_unicast(addr: IpAddr) -> bool {
    let broadcast = matches!(addr, IpAddr::V4(v4) if v4.is_broadcast());
    !addr.is_multicast() && !addr.is_unspecified() && !broadcast
}
