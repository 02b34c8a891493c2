//! The packets that simulated applications send: UDP with a number inside.

use std::net::{IpAddr, SocketAddr};

use warren_common::filter::{PROTO_ICMP, PROTO_ICMPV6, PROTO_UDP};

const UDP_HEADER: usize = 8;

/// A numbered datagram between overlay addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Datagram {
    /// Source.
    pub src: SocketAddr,
    /// Destination.
    pub dst: SocketAddr,
    /// Its number, unique in a run; an answer carries the number of what it answers.
    pub number: u64,
    /// Bytes behind the number.
    pub extra: u16,
}

impl Datagram {
    /// The answer to it.
    pub fn answer(self) -> Self {
        Self { src: self.dst, dst: self.src, number: self.number, extra: self.extra }
    }

    /// As an IP packet with right lengths and checksums. `None` if the families differ.
    pub fn to_packet(self) -> Option<Vec<u8>> {
        let mut payload = self.number.to_be_bytes().to_vec();
        payload.resize(payload.len() + usize::from(self.extra), 0);
        let length = (UDP_HEADER + payload.len()) as u16;
        let mut udp = Vec::with_capacity(usize::from(length));
        udp.extend_from_slice(&self.src.port().to_be_bytes());
        udp.extend_from_slice(&self.dst.port().to_be_bytes());
        udp.extend_from_slice(&length.to_be_bytes());
        udp.extend_from_slice(&[0, 0]);
        udp.extend_from_slice(&payload);
        let mut packet = Vec::with_capacity(40 + udp.len());
        let mut pseudo = Vec::with_capacity(40);
        match (self.src.ip(), self.dst.ip()) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                let total = (20 + udp.len()) as u16;
                packet.extend_from_slice(&[0x45, 0]);
                packet.extend_from_slice(&total.to_be_bytes());
                packet.extend_from_slice(&[0, 0, 0x40, 0, 64, PROTO_UDP, 0, 0]);
                packet.extend_from_slice(&src.octets());
                packet.extend_from_slice(&dst.octets());
                let sum = checksum(&packet);
                packet[10..12].copy_from_slice(&sum.to_be_bytes());
                pseudo.extend_from_slice(&packet[12..20]);
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                packet.extend_from_slice(&[0x60, 0, 0, 0]);
                packet.extend_from_slice(&length.to_be_bytes());
                packet.extend_from_slice(&[PROTO_UDP, 64]);
                packet.extend_from_slice(&src.octets());
                packet.extend_from_slice(&dst.octets());
                pseudo.extend_from_slice(&packet[8..40]);
            }
            _ => return None,
        }
        pseudo.extend_from_slice(&[0, PROTO_UDP]);
        pseudo.extend_from_slice(&length.to_be_bytes());
        pseudo.extend_from_slice(&udp);
        let sum = match checksum(&pseudo) {
            0 => 0xffff, // RFC 768: zero means none
            sum => sum,
        };
        udp[6..8].copy_from_slice(&sum.to_be_bytes());
        packet.extend_from_slice(&udp);
        Some(packet)
    }

    /// Reads what [`Datagram::to_packet`] wrote; `None` for anything else.
    pub fn parse(packet: &[u8]) -> Option<Self> {
        let (src, dst, udp): (IpAddr, IpAddr, &[u8]) = match packet.first()? >> 4 {
            4 if packet.get(9) == Some(&PROTO_UDP) => {
                let addr = |at: usize| <[u8; 4]>::try_from(packet.get(at..at + 4)?).ok();
                (addr(12)?.into(), addr(16)?.into(), packet.get(20..)?)
            }
            6 if packet.get(6) == Some(&PROTO_UDP) => {
                let addr = |at: usize| <[u8; 16]>::try_from(packet.get(at..at + 16)?).ok();
                (addr(8)?.into(), addr(24)?.into(), packet.get(40..)?)
            }
            _ => return None,
        };
        let port = |at: usize| Some(u16::from_be_bytes(udp.get(at..at + 2)?.try_into().ok()?));
        let number = u64::from_be_bytes(udp.get(UDP_HEADER..UDP_HEADER + 8)?.try_into().ok()?);
        let extra = (udp.len() - UDP_HEADER - 8) as u16; // an IP packet is not longer
        Some(Self { src: SocketAddr::new(src, port(0)?), dst: SocketAddr::new(dst, port(2)?), number, extra })
    }
}

/// The MTU in an ICMP "fragmentation needed" (RFC 1191) or ICMPv6 "packet too big" (RFC 4443) error.
pub fn too_big(packet: &[u8]) -> Option<u16> {
    let at = match packet.first()? >> 4 {
        4 if packet.get(9) == Some(&PROTO_ICMP) && packet.get(20..22)? == [3, 4] => 26,
        6 if packet.get(6) == Some(&PROTO_ICMPV6) && packet.get(40..42)? == [2, 0] => 46,
        _ => return None,
    };
    Some(u16::from_be_bytes(packet.get(at..at + 2)?.try_into().ok()?))
}

/// The internet checksum (RFC 1071).
fn checksum(bytes: &[u8]) -> u16 {
    let words =
        bytes.chunks(2).map(|c| u32::from(u16::from_be_bytes([c[0], c.get(1).copied().unwrap_or(0)])));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_round_trip_in_both_families_with_good_checksums() {
        for (src, dst) in [("100.64.0.1:7", "100.64.0.2:9"), ("[fd00::1]:7", "[fd00::2]:9")] {
            let datagram =
                Datagram { src: src.parse().unwrap(), dst: dst.parse().unwrap(), number: 0xfeed, extra: 3 };
            let packet = datagram.to_packet().unwrap();
            assert_eq!(Datagram::parse(&packet), Some(datagram));
            if packet[0] >> 4 == 4 {
                assert_eq!(checksum(&packet[..20]), 0);
            }
            for cut in 0..packet.len() {
                let _ = Datagram::parse(&packet[..cut]);
            }
        }
    }
}
