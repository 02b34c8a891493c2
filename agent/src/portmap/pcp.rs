//! PCP's MAP and ANNOUNCE for IPv4 (RFC 6887), as bytes.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddrV4};
use std::time::Duration;

/// Length of a PCP nonce, in bytes.
pub const NONCE_LEN: usize = 12;
const VERSION: u8 = 2;
const ANNOUNCE: u8 = 0;
const MAP: u8 = 1;
const RESPONSE: u8 = 0x80;
const HEADER: usize = 24;
const MAP_LEN: usize = HEADER + 36;
const UDP: u8 = 17;

/// What a server says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// Seconds since the server began to remember.
    Alive { epoch: u32 },
    /// A mapping.
    Mapped { external: SocketAddrV4, lifetime: Duration, epoch: u32 },
    /// A result code other than success (section 7.4), or an answer in version 0, which is NAT-PMP.
    Refused { code: u8 },
}

fn request(opcode: u8, lifetime: Duration, own: Ipv4Addr) -> Vec<u8> {
    let mut bytes = vec![VERSION, opcode, 0, 0];
    bytes.extend(u32::try_from(lifetime.as_secs()).unwrap_or(u32::MAX).to_be_bytes());
    bytes.extend(own.to_ipv6_mapped().octets());
    bytes
}

/// Asks whether there is a server.
pub(super) fn announce(own: Ipv4Addr) -> Vec<u8> {
    request(ANNOUNCE, Duration::ZERO, own)
}

/// Asks for a mapping of UDP `port`, if possible from `suggested`; lifetime 0 ends it.
pub(super) fn map(
    own: Ipv4Addr,
    nonce: [u8; NONCE_LEN],
    port: u16,
    suggested: SocketAddrV4,
    lifetime: Duration,
) -> Vec<u8> {
    let mut bytes = request(MAP, lifetime, own);
    bytes.extend(nonce);
    bytes.extend([UDP, 0, 0, 0]);
    bytes.extend(port.to_be_bytes());
    bytes.extend(suggested.port().to_be_bytes());
    bytes.extend(suggested.ip().to_ipv6_mapped().octets());
    bytes
}

/// The answer to [`announce`].
pub(super) fn announced(bytes: &[u8]) -> Option<Answer> {
    let (code, epoch, _) = head(ANNOUNCE, bytes)?;
    Some(if code == 0 { Answer::Alive { epoch } } else { Answer::Refused { code } })
}

/// The answer to [`map`] with this nonce and port.
pub(super) fn mapped(bytes: &[u8], nonce: [u8; NONCE_LEN], port: u16) -> Option<Answer> {
    let (code, epoch, lifetime) = head(MAP, bytes)?;
    if code != 0 {
        // What a server of another version or without this opcode answers need not hold the rest.
        let ours = bytes.get(HEADER..HEADER + NONCE_LEN).is_none_or(|n| n == nonce);
        return ours.then_some(Answer::Refused { code });
    }
    let body = bytes.get(HEADER..MAP_LEN)?;
    let ours = body[..NONCE_LEN] == nonce && body[12] == UDP && body[16..18] == port.to_be_bytes();
    let ip = Ipv6Addr::from(<[u8; 16]>::try_from(&body[20..36]).ok()?).to_ipv4_mapped()?;
    let external = SocketAddrV4::new(ip, u16::from_be_bytes([body[18], body[19]]));
    ours.then_some(Answer::Mapped { external, lifetime, epoch })
}

/// Result code, epoch and lifetime.
fn head(opcode: u8, bytes: &[u8]) -> Option<(u8, u32, Duration)> {
    if bytes.first() == Some(&0) && bytes.get(1).is_some_and(|op| op & RESPONSE != 0) {
        return Some((1, 0, Duration::ZERO)); // section 9: a NAT-PMP server answers in its own version
    }
    let head = bytes.get(..HEADER).filter(|h| h[0] == VERSION && h[1] == RESPONSE | opcode)?;
    let word = |at: usize| u32::from_be_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    Some((head[3], word(8), Duration::from_secs(word(4).into())))
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 2);
    const NONCE: [u8; NONCE_LEN] = [7; NONCE_LEN];
    const EXTERNAL: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(203, 0, 113, 5), 41_641);

    fn answer() -> Vec<u8> {
        let mut bytes = map(OWN, NONCE, 41_641, EXTERNAL, Duration::from_secs(3_600));
        bytes[1] |= RESPONSE;
        bytes[8..12].copy_from_slice(&99_u32.to_be_bytes());
        bytes[12..24].fill(0);
        bytes
    }

    #[test]
    fn golden_request() {
        let bytes = map(OWN, NONCE, 41_641, EXTERNAL, Duration::from_secs(7_200));
        let expected = concat!(
            "0201000000001c2000000000000000000000ffffc0a80102",
            "07070707070707070707070711000000a2a9a2a900000000000000000000ffffcb007105"
        );
        assert_eq!(data_encoding::HEXLOWER.encode(&bytes), expected);
        assert_eq!(announce(OWN).len(), HEADER);
    }

    #[test]
    fn only_the_answer_to_the_own_question_counts() {
        let good = answer();
        let lifetime = Duration::from_secs(3_600);
        let want = Some(Answer::Mapped { external: EXTERNAL, lifetime, epoch: 99 });
        assert_eq!(mapped(&good, NONCE, 41_641), want);
        assert_eq!(mapped(&good, [8; NONCE_LEN], 41_641), None);
        assert_eq!(mapped(&good, NONCE, 41_642), None);
        assert_eq!(mapped(&good[..59], NONCE, 41_641), None);
        assert_eq!(announced(&good), None);
        let mut refused = good.clone();
        refused[3] = 2;
        assert_eq!(mapped(&refused, NONCE, 41_641), Some(Answer::Refused { code: 2 }));
        assert_eq!(mapped(&refused, [8; NONCE_LEN], 41_641), None);
        let mut v6 = good;
        v6[54] = 0; // no IPv4-mapped address any more
        assert_eq!(mapped(&v6, NONCE, 41_641), None);
        assert_eq!(announced(&[0, 128, 0, 1, 0, 0, 0, 9]), Some(Answer::Refused { code: 1 }));
    }
}
