//! Making the few packets the filter sends itself: TCP resets and keep-alives, ICMP errors.

use super::{Addrs, Selector, TCP_ACK};
use warren_common::filter::{PROTO_ICMP, PROTO_ICMPV6, PROTO_TCP};

/// Longest ICMP error made, in bytes with its IP header: RFC 1812 for IPv4. IPv6 would allow 1 280 (RFC 4443), but
/// a socket is found by the headers alone.
pub const MAX_ICMP_ERROR: usize = 576;

const HOP_LIMIT: u8 = 64;

/// A TCP segment without data or options.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Source and destination address.
    pub addrs: Addrs,
    /// Source port.
    pub src_port: u16,
    /// Destination port.
    pub dst_port: u16,
    /// Sequence number.
    pub seq: u32,
    /// Acknowledgement number; `None` leaves the ACK flag out.
    pub ack: Option<u32>,
    /// Flags beside ACK.
    pub flags: u8,
}

impl Segment {
    /// The whole IP packet, checksums filled in.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut tcp = [0; 20];
        tcp[0..2].copy_from_slice(&self.src_port.to_be_bytes());
        tcp[2..4].copy_from_slice(&self.dst_port.to_be_bytes());
        tcp[4..8].copy_from_slice(&self.seq.to_be_bytes());
        tcp[8..12].copy_from_slice(&self.ack.unwrap_or(0).to_be_bytes());
        tcp[12] = 5 << 4;
        tcp[13] = self.flags | if self.ack.is_some() { TCP_ACK } else { 0 };
        let sum = transport_checksum(self.addrs, PROTO_TCP, &tcp);
        tcp[16..18].copy_from_slice(&sum.to_be_bytes());
        let mut packet = ip_header(self.addrs, PROTO_TCP, tcp.len());
        packet.extend_from_slice(&tcp);
        packet
    }
}

/// An ICMP (RFC 1812) or ICMPv6 (RFC 4443) error "administratively prohibited" that goes along `addrs` and is about
/// the packet `quoted`, of which the beginning is quoted.
pub fn prohibited(addrs: Addrs, quoted: &[u8]) -> Vec<u8> {
    let header = match addrs {
        Addrs::V4 { .. } => [3, 13, 0, 0, 0, 0, 0, 0],
        Addrs::V6 { .. } => [1, 1, 0, 0, 0, 0, 0, 0],
    };
    icmp_error(addrs, header, quoted)
}

/// The same for "fragmentation needed" (RFC 1191) or "packet too big" (RFC 8201): at most `mtu` bytes pass.
pub fn too_big(addrs: Addrs, mtu: u16, quoted: &[u8]) -> Vec<u8> {
    let [high, low] = mtu.to_be_bytes();
    let kind = match addrs {
        Addrs::V4 { .. } => [3, 4],
        Addrs::V6 { .. } => [2, 0],
    };
    icmp_error(addrs, [kind[0], kind[1], 0, 0, 0, 0, high, low], quoted)
}

fn icmp_error(addrs: Addrs, header: [u8; 8], quoted: &[u8]) -> Vec<u8> {
    let (proto, ip_len) = match addrs {
        Addrs::V4 { .. } => (PROTO_ICMP, 20),
        Addrs::V6 { .. } => (PROTO_ICMPV6, 40),
    };
    let quoted = &quoted[..quoted.len().min(MAX_ICMP_ERROR - ip_len - header.len())];
    let mut icmp = Vec::with_capacity(header.len() + quoted.len());
    icmp.extend_from_slice(&header);
    icmp.extend_from_slice(quoted);
    let sum = match addrs {
        Addrs::V4 { .. } => checksum(&[&icmp]),
        Addrs::V6 { .. } => transport_checksum(addrs, proto, &icmp),
    };
    icmp[2..4].copy_from_slice(&sum.to_be_bytes());
    let mut packet = ip_header(addrs, proto, icmp.len());
    packet.extend_from_slice(&icmp);
    packet
}

/// The beginning of a packet as a flow would have sent it: its IP header and the eight bytes an ICMP error must
/// quote (RFC 792). Used when a flow ends and no packet of it is at hand.
pub fn stub(addrs: Addrs, proto: u8, selector: Selector) -> Vec<u8> {
    let mut transport = [0u8; 8];
    match selector {
        Selector::Ports { src, dst } => {
            transport[0..2].copy_from_slice(&src.to_be_bytes());
            transport[2..4].copy_from_slice(&dst.to_be_bytes());
            transport[5] = 8; // UDP's length; TCP and SCTP have a number here that nobody can know
        }
        Selector::Echo { request, id } => {
            transport[0] = match (addrs, request) {
                (Addrs::V4 { .. }, true) => 8,
                (Addrs::V4 { .. }, false) => 0,
                (Addrs::V6 { .. }, true) => 128,
                (Addrs::V6 { .. }, false) => 129,
            };
            transport[4..6].copy_from_slice(&id.to_be_bytes());
        }
        Selector::Icmp { kind } => transport[0] = kind,
        Selector::None => {}
    }
    let mut packet = ip_header(addrs, proto, transport.len());
    packet.extend_from_slice(&transport);
    packet
}

/// The Internet checksum (RFC 1071) over the parts in turn; each but the last must have an even length.
pub fn checksum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0u64;
    for part in parts {
        let mut words = part.chunks_exact(2);
        for word in &mut words {
            sum += u64::from(u16::from_be_bytes([word[0], word[1]]));
        }
        if let [last] = words.remainder() {
            sum += u64::from(*last) << 8;
        }
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16) // folded to 16 bits above
}

/// The checksum of a transport header and its data under the pseudo-header of `addrs` (RFC 9293, RFC 8200).
pub fn transport_checksum(addrs: Addrs, proto: u8, transport: &[u8]) -> u16 {
    let len = (transport.len() as u32).to_be_bytes(); // callers are bounded by an IP packet
    let tail = [len[0], len[1], len[2], len[3], 0, 0, 0, proto];
    match addrs {
        Addrs::V4 { src, dst } => checksum(&[&src.octets(), &dst.octets(), &tail, transport]),
        Addrs::V6 { src, dst } => checksum(&[&src.octets(), &dst.octets(), &tail, transport]),
    }
}

fn ip_header(addrs: Addrs, proto: u8, payload_len: usize) -> Vec<u8> {
    match addrs {
        Addrs::V4 { src, dst } => {
            let mut header = [0; 20];
            header[0] = 0x45;
            header[2..4].copy_from_slice(&((20 + payload_len) as u16).to_be_bytes());
            header[6] = 0x40; // don't fragment
            header[8] = HOP_LIMIT;
            header[9] = proto;
            header[12..16].copy_from_slice(&src.octets());
            header[16..20].copy_from_slice(&dst.octets());
            let sum = checksum(&[&header]);
            header[10..12].copy_from_slice(&sum.to_be_bytes());
            header.to_vec()
        }
        Addrs::V6 { src, dst } => {
            let mut header = [0; 40];
            header[0] = 0x60;
            header[4..6].copy_from_slice(&(payload_len as u16).to_be_bytes());
            header[6] = proto;
            header[7] = HOP_LIMIT;
            header[8..24].copy_from_slice(&src.octets());
            header[24..40].copy_from_slice(&dst.octets());
            header.to_vec()
        }
    }
}
