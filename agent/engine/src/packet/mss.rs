//! Making TCP's segments fit a path: the maximum segment size option of a SYN (RFC 9293 section 3.7.1).

use warren_common::filter::PROTO_TCP;

use super::TCP_SYN;

const END: u8 = 0;
const PADDING: u8 = 1;
const MSS: u8 = 2;
const TCP_HEADER: usize = 20;

/// If `packet` is a SYN that invites segments which make packets longer than `mtu` bytes, it invites shorter ones. Its
/// checksum, which must be complete, stays right (RFC 1624).
pub fn clamp(packet: &mut [u8], mtu: usize) {
    let Some((tcp_at, most)) = tcp(packet, mtu) else { return };
    let Some(tcp) = packet.get_mut(tcp_at..) else { return };
    let Some(at) = mss_option(tcp) else { return };
    let value = [tcp[at], tcp[at + 1]];
    if u16::from_be_bytes(value) <= most {
        return;
    }
    let new = most.to_be_bytes();
    tcp[at..at + 2].copy_from_slice(&new);
    // An option may begin at an odd place: then its bytes are halves of two words, and the sum is taken of swapped ones.
    let word = |bytes: [u8; 2]| {
        u32::from(if at.is_multiple_of(2) { u16::from_be_bytes(bytes) } else { u16::from_le_bytes(bytes) })
    };
    let sum = !u16::from_be_bytes([tcp[16], tcp[17]]);
    let mut sum = u32::from(sum) + (0xffff - word(value)) + word(new);
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    tcp[16..18].copy_from_slice(&(!(sum as u16)).to_be_bytes()); // folded to 16 bits above
}

/// Where TCP begins in a first or only fragment, and the longest segment that fits.
fn tcp(packet: &[u8], mtu: usize) -> Option<(usize, u16)> {
    let at = match packet.first()? >> 4 {
        4 if packet.get(9) == Some(&PROTO_TCP) && packet.get(6)? & 0x1f == 0 && *packet.get(7)? == 0 => {
            usize::from(packet[0] & 0xf) * 4
        }
        6 if packet.get(6) == Some(&PROTO_TCP) => 40,
        _ => return None,
    };
    let most = u16::try_from(mtu.checked_sub(at.max(TCP_HEADER) + TCP_HEADER)?).ok()?;
    Some((at, most))
}

/// Where the option's value is in a SYN.
fn mss_option(tcp: &[u8]) -> Option<usize> {
    let end = usize::from(tcp.get(12)? >> 4) * 4;
    if tcp[13..].first()? & TCP_SYN == 0 || tcp.len() < end {
        return None;
    }
    let mut at = TCP_HEADER;
    while at < end {
        match tcp[at] {
            END => return None,
            PADDING => at += 1,
            kind => {
                let len = usize::from(*tcp.get(at + 1).filter(|_| at + 1 < end)?);
                if kind == MSS {
                    return (len == 4 && at + 4 <= end).then_some(at + 2);
                }
                at += len.max(2);
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::Addrs;
    use crate::packet::build::{Segment, transport_checksum};
    use crate::packet::{TCP_ACK, TCP_FIN};

    fn syn(v6: bool, options: &[u8], flags: u8) -> (Vec<u8>, Addrs, usize) {
        let (src, dst) = if v6 { ("fd00::1", "fd00::2") } else { ("100.64.0.1", "100.64.0.2") };
        let addrs = Addrs::new(src.parse().unwrap(), dst.parse().unwrap()).unwrap();
        let mut packet = Segment { addrs, src_port: 5, dst_port: 6, seq: 7, ack: None, flags }.to_bytes();
        let at = packet.len() - TCP_HEADER;
        packet.extend(options);
        packet[at + 12] = ((TCP_HEADER + options.len()) as u8 / 4) << 4;
        packet[at + 16..at + 18].fill(0);
        let sum = transport_checksum(addrs, PROTO_TCP, &packet[at..]);
        packet[at + 16..at + 18].copy_from_slice(&sum.to_be_bytes());
        (packet, addrs, at)
    }

    #[test]
    fn a_syn_invites_what_fits_and_its_checksum_stays_right() {
        for v6 in [false, true] {
            for options in [&[2, 4, 5, 100][..], &[1, 2, 4, 5, 100, 1, 1, 0], &[3, 3, 7, 2, 4, 255, 255, 0]] {
                for flags in [TCP_SYN, TCP_SYN | TCP_ACK] {
                    let (mut packet, addrs, at) = syn(v6, options, flags);
                    clamp(&mut packet, 1_216);
                    let mss = mss_option(&packet[at..]).unwrap();
                    let value = u16::from_be_bytes([packet[at + mss], packet[at + mss + 1]]);
                    assert_eq!(usize::from(value), 1_216 - at - TCP_HEADER);
                    assert_eq!(transport_checksum(addrs, PROTO_TCP, &packet[at..]), 0, "{options:?}");
                }
            }
        }
    }

    #[test]
    fn everything_else_stays_as_it_is() {
        for (options, flags) in [
            (&[2, 4, 2, 0][..], TCP_SYN),
            (&[2, 4, 5, 100], TCP_FIN),
            (&[0, 2, 4, 5, 100, 0, 0, 0], TCP_SYN),
            (&[2, 3, 5, 100], TCP_SYN),
            (&[1, 1, 2, 4], TCP_SYN),
            (&[9, 0, 9, 0], TCP_SYN),
            (&[], TCP_SYN),
        ] {
            let (packet, ..) = syn(false, options, flags);
            let mut clamped = packet.clone();
            clamp(&mut clamped, 1_216);
            assert_eq!(clamped, packet, "{options:?}");
            for cut in 0..packet.len() {
                clamp(&mut packet[..cut].to_vec(), 1_216);
            }
        }
        clamp(&mut syn(true, &[2, 4, 5, 100], TCP_SYN).0, 30);
    }
}
