//! Which packets may be joined, and how a super-frame's headers are made of the first one's.
//!
//! The rules are those of Linux' GRO, and stricter where that would change a byte: same addresses, ports, hop limit,
//! DSCP, congestion mark and flow label; for TCP the next sequence number, same acknowledgement, window and options, no
//! flag but ACK, and PSH only at the end; for UDP one size. Anything else goes on alone, and nothing overtakes a packet
//! of its own flow.

use warren_common::filter::{PROTO_TCP, PROTO_UDP};

use super::checksum::Sum;
use super::vnet::{Gso, GsoKind, Header, PartialChecksum};
use crate::packet::{TCP_ACK, TCP_PSH};

const IPV4_HEADER: usize = 20;
const IPV6_HEADER: usize = 40;
const TCP_HEADER: usize = 20;
const UDP_HEADER: usize = 8;
const DONT_FRAGMENT: u8 = 0x40;

/// Most packets of one joined frame, a count: `UDP_MAX_SEGMENTS` of Linux before 6.9, and no less than a batch of
/// received datagrams has.
pub(crate) const MAX_JOINED: u16 = 64;
/// Longest joined frame, in bytes with its IP header: what a 16-bit length says.
pub(crate) const MAX_JOINED_BYTES: usize = 65_535;

/// What a packet is to the joining.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    /// It may be joined with others like it.
    Segment(Segment),
    /// It might, if its checksum were right.
    BadChecksum,
    /// It goes alone.
    Other,
}

/// A packet that may be joined with others of its flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) tcp: bool,
    ipv4: bool,
    pub(crate) header_len: usize,
    pub(crate) payload_len: usize,
    seq: u32,
    id: u16,
    pushed: bool,
}

impl Segment {
    const fn transport_at(&self) -> usize {
        if self.ipv4 { IPV4_HEADER } else { IPV6_HEADER }
    }
}

/// Looks at one whole packet without anything behind it, checksums included.
pub(crate) fn classify(packet: &[u8]) -> Class {
    let (ipv4, proto, addresses) = match packet.first() {
        Some(0x45) if packet.len() > IPV4_HEADER => {
            let whole = usize::from(u16::from_be_bytes([packet[2], packet[3]])) == packet.len();
            if !whole || packet[6] & !DONT_FRAGMENT != 0 || packet[7] != 0 {
                return Class::Other;
            }
            (true, packet[9], 12..20)
        }
        Some(first) if first >> 4 == 6 && packet.len() > IPV6_HEADER => {
            let len = usize::from(u16::from_be_bytes([packet[4], packet[5]]));
            if len + IPV6_HEADER != packet.len() {
                return Class::Other;
            }
            (false, packet[6], 8..40)
        }
        _ => return Class::Other,
    };
    let transport_at = if ipv4 { IPV4_HEADER } else { IPV6_HEADER };
    let transport = &packet[transport_at..];
    let transport_len = match proto {
        PROTO_TCP if transport.len() > TCP_HEADER => {
            let len = usize::from(transport[12] >> 4) * 4;
            let flags = transport[13];
            let plain =
                transport[12] & 0x0f == 0 && flags & !TCP_PSH == TCP_ACK && transport[18..20] == [0; 2];
            if !plain || len < TCP_HEADER {
                return Class::Other;
            }
            len
        }
        PROTO_UDP if transport.len() > UDP_HEADER => {
            let whole = usize::from(u16::from_be_bytes([transport[4], transport[5]])) == transport.len();
            if !whole || transport[6..8] == [0; 2] {
                return Class::Other; // without a checksum it couldn't be cut into the same bytes
            }
            UDP_HEADER
        }
        _ => return Class::Other,
    };
    let header_len = transport_at + transport_len;
    if header_len >= packet.len() {
        return Class::Other;
    }
    let sum = Sum::default().add_pseudo(&packet[addresses], proto, transport.len()).add(transport);
    if !sum.is_right() || (ipv4 && !Sum::default().add(&packet[..IPV4_HEADER]).is_right()) {
        return Class::BadChecksum;
    }
    let tcp = proto == PROTO_TCP;
    Class::Segment(Segment {
        tcp,
        ipv4,
        header_len,
        payload_len: packet.len() - header_len,
        seq: if tcp {
            u32::from_be_bytes([transport[4], transport[5], transport[6], transport[7]])
        } else {
            0
        },
        id: if ipv4 { u16::from_be_bytes([packet[4], packet[5]]) } else { 0 },
        pushed: tcp && transport[13] & TCP_PSH != 0,
    })
}

/// True if one of the packets must not overtake the other: same addresses, and same ports where both show any.
pub(crate) fn may_be_one_flow(a: &[u8], b: &[u8]) -> bool {
    let (Some((a_pair, a_ports)), Some((b_pair, b_ports))) = (ends(a), ends(b)) else { return false };
    a_pair == b_pair && (a_ports == b_ports || a_ports.is_none() || b_ports.is_none())
}

/// Addresses, one behind the other, and ports with the protocol.
type Ends<'a> = (&'a [u8], Option<(u8, &'a [u8])>);

fn ends(packet: &[u8]) -> Option<Ends<'_>> {
    let with_ports = |proto: u8, at: usize| {
        let ports = packet.get(at..at + 4)?;
        matches!(proto, PROTO_TCP | PROTO_UDP).then_some((proto, ports))
    };
    match packet.first()? >> 4 {
        4 => {
            let pair = packet.get(12..20)?;
            let whole = packet[6] & !DONT_FRAGMENT == 0 && packet[7] == 0;
            let at = usize::from(packet[0] & 0x0f) * 4;
            Some((pair, whole.then(|| with_ports(packet[9], at)).flatten()))
        }
        6 => Some((packet.get(8..40)?, with_ports(packet[6], IPV6_HEADER))),
        _ => None,
    }
}

/// How IPv4 identifications go on from packet to packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ids {
    /// Only one was seen.
    Unknown,
    /// By one each.
    Counting,
    /// Not at all (only where they mean nothing).
    Constant,
}

/// A frame that is being joined: what must be known beside its first packet's headers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Joint {
    first: Segment,
    /// IP length so far.
    ip_len: usize,
    packets: u16,
    next_seq: u32,
    last_id: u16,
    ids: Ids,
    pushed: bool,
    /// A short or pushed segment was the last one.
    complete: bool,
}

impl Joint {
    /// Of the first packet.
    pub(crate) const fn new(first: Segment) -> Self {
        Self {
            first,
            ip_len: first.header_len + first.payload_len,
            packets: 1,
            next_seq: first.seq.wrapping_add(first.payload_len as u32), // of a packet
            last_id: first.id,
            ids: Ids::Unknown,
            pushed: first.pushed,
            complete: first.pushed,
        }
    }

    /// How many packets are in it.
    pub(crate) const fn packets(&self) -> u16 {
        self.packets
    }

    /// Bytes of all packets, each with its headers.
    pub(crate) const fn bytes(&self) -> usize {
        self.ip_len + (self.packets as usize - 1) * self.first.header_len
    }

    /// Bytes of payload beyond the first packet's.
    pub(crate) const fn more_payload(&self) -> usize {
        self.ip_len - self.first.header_len - self.first.payload_len
    }

    /// Takes one more packet of the same flow, if it may go on the end: `head` are the headers of the first.
    pub(crate) fn join(&mut self, head: &[u8], packet: &[u8], next: Segment) -> bool {
        let first = &self.first;
        let alike = !self.complete
            && self.packets < MAX_JOINED
            && first.tcp == next.tcp
            && first.ipv4 == next.ipv4
            && first.header_len == next.header_len
            && next.payload_len <= first.payload_len
            && self.ip_len + next.payload_len <= MAX_JOINED_BYTES
            && (!first.tcp || next.seq == self.next_seq);
        if !alike || !same_headers(first, head, packet) {
            return false;
        }
        let ids = match (first.ipv4, self.ids) {
            (false, ids) => ids,
            (true, Ids::Unknown | Ids::Counting) if next.id == self.last_id.wrapping_add(1) => Ids::Counting,
            (true, Ids::Unknown | Ids::Constant)
                if next.id == self.last_id && head[6] & DONT_FRAGMENT != 0 =>
            {
                Ids::Constant
            }
            (true, _) => return false,
        };
        self.ids = ids;
        self.packets += 1;
        self.ip_len += next.payload_len;
        self.next_seq = self.next_seq.wrapping_add(next.payload_len as u32);
        self.last_id = next.id;
        self.pushed = next.pushed;
        self.complete = next.pushed || next.payload_len < first.payload_len;
        true
    }

    /// Makes the first packet's headers those of the frame, and says what goes in front.
    pub(crate) fn finish(&self, head: &mut [u8]) -> Header {
        if self.packets == 1 {
            return Header::default();
        }
        let at = self.first.transport_at();
        let (ip, transport) = head.split_at_mut(at);
        let transport_len = self.ip_len - at;
        let addresses = if self.first.ipv4 {
            ip[2..4].copy_from_slice(&(self.ip_len as u16).to_be_bytes()); // bounded in `join`
            ip[10..12].fill(0);
            let sum = Sum::default().add(ip).finish();
            ip[10..12].copy_from_slice(&sum);
            &ip[12..20]
        } else {
            ip[4..6].copy_from_slice(&(transport_len as u16).to_be_bytes());
            &ip[8..40]
        };
        let (kind, proto, offset) = if self.first.tcp {
            transport[13] |= if self.pushed { TCP_PSH } else { 0 };
            let kind = if self.first.ipv4 { GsoKind::Tcp4 } else { GsoKind::Tcp6 };
            (kind, PROTO_TCP, 16)
        } else {
            transport[4..6].copy_from_slice(&(transport_len as u16).to_be_bytes());
            (GsoKind::Udp, PROTO_UDP, 6)
        };
        let pseudo = Sum::default().add_pseudo(addresses, proto, transport_len).folded();
        transport[offset..offset + 2].copy_from_slice(&pseudo);
        Header {
            checksum: Some(PartialChecksum { start: at as u16, offset: offset as u16 }), // both below 100
            gso: Some(Gso { kind, size: self.first.payload_len as u16 }),
            header_len: self.first.header_len as u16,
        }
    }
}

/// Everything in the headers is equal that must be; lengths, identifications, checksums and sequence numbers aside.
fn same_headers(first: &Segment, a: &[u8], b: &[u8]) -> bool {
    let same = |range: std::ops::Range<usize>| a.get(range.clone()) == b.get(range);
    let at = first.transport_at();
    let ip = if first.ipv4 { same(0..2) && same(6..10) && same(12..20) } else { same(0..4) && same(6..40) };
    let ports = same(at..at + 4);
    // Flags are plain in both; acknowledgement, data offset, window and options.
    let tcp = || same(at + 8..at + 13) && same(at + 14..at + 16) && same(at + TCP_HEADER..first.header_len);
    ip && ports && (!first.tcp || tcp())
}
