//! NAT-PMP (RFC 6886), as bytes.

use std::net::Ipv4Addr;
use std::time::Duration;

const ADDRESS: u8 = 0;
const MAP_UDP: u8 = 1;
const RESPONSE: u8 = 0x80;

/// The gateway's outside address, and its seconds since it began to remember.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Outside {
    pub(super) ip: Ipv4Addr,
    pub(super) epoch: u32,
}

/// A mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mapped {
    pub(super) port: u16,
    pub(super) lifetime: Duration,
    pub(super) epoch: u32,
}

/// Asks for the outside address.
pub(super) const fn address() -> [u8; 2] {
    [0, ADDRESS]
}

/// Asks for a mapping of UDP `port`, if possible from `suggested`; lifetime 0 ends it.
pub(super) fn map(port: u16, suggested: u16, lifetime: Duration) -> Vec<u8> {
    let mut bytes = vec![0, MAP_UDP, 0, 0];
    bytes.extend(port.to_be_bytes());
    bytes.extend(suggested.to_be_bytes());
    bytes.extend(u32::try_from(lifetime.as_secs()).unwrap_or(u32::MAX).to_be_bytes());
    bytes
}

/// The answer to [`address`]; the result code if it is not success.
pub(super) fn addressed(bytes: &[u8]) -> Option<Result<Outside, u16>> {
    let (code, epoch) = head(ADDRESS, bytes)?;
    if code != 0 {
        return Some(Err(code));
    }
    let ip: [u8; 4] = bytes.get(8..12)?.try_into().ok()?;
    Some(Ok(Outside { ip: ip.into(), epoch }))
}

/// The answer to [`map`] of this port; the result code if it is not success.
pub(super) fn mapped(bytes: &[u8], port: u16) -> Option<Result<Mapped, u16>> {
    let (code, epoch) = head(MAP_UDP, bytes)?;
    if code != 0 {
        return Some(Err(code));
    }
    let body = bytes.get(8..16).filter(|b| b[..2] == port.to_be_bytes())?;
    let lifetime = u32::from_be_bytes([body[4], body[5], body[6], body[7]]);
    Some(Ok(Mapped {
        port: u16::from_be_bytes([body[2], body[3]]),
        lifetime: Duration::from_secs(lifetime.into()),
        epoch,
    }))
}

/// Result code and epoch.
fn head(opcode: u8, bytes: &[u8]) -> Option<(u16, u32)> {
    let head = bytes.get(..8).filter(|h| h[0] == 0 && h[1] == RESPONSE | opcode)?;
    let epoch = u32::from_be_bytes([head[4], head[5], head[6], head[7]]);
    Some((u16::from_be_bytes([head[2], head[3]]), epoch))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_request() {
        let bytes = map(41_641, 41_641, Duration::from_secs(7_200));
        assert_eq!(data_encoding::HEXLOWER.encode(&bytes), "00010000a2a9a2a900001c20");
    }

    #[test]
    fn only_the_answer_to_the_own_question_counts() {
        let outside = [0, 128, 0, 0, 0, 0, 0, 9, 203, 0, 113, 5];
        let ip = Ipv4Addr::new(203, 0, 113, 5);
        assert_eq!(addressed(&outside), Some(Ok(Outside { ip, epoch: 9 })));
        assert_eq!((addressed(&outside[..11]), mapped(&outside, 1)), (None, None));
        let good = [0, 129, 0, 0, 0, 0, 0, 9, 0, 1, 0, 2, 0, 0, 0, 60];
        let want = Mapped { port: 2, lifetime: Duration::from_secs(60), epoch: 9 };
        assert_eq!((mapped(&good, 1), mapped(&good, 3)), (Some(Ok(want)), None));
        assert_eq!(mapped(&[0, 129, 0, 2, 0, 0, 0, 9], 1), Some(Err(2)));
        assert_eq!(mapped(&good[..15], 1), None);
    }
}
