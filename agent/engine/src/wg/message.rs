//! The four messages of the wire, as byte layouts (WireGuard whitepaper, section 5.4), and the inner packet's length.

use super::DropReason;

pub(super) const INITIATION_LEN: usize = 148;
pub(super) const RESPONSE_LEN: usize = 92;
pub(super) const COOKIE_LEN: usize = 64;
pub(super) const DATA_HEADER_LEN: usize = 16;
pub(super) const TAG_LEN: usize = 16;
pub(super) const MAC_LEN: usize = 16;

/// Bytes that a data message adds to its (padded) packet: header and authentication tag.
pub const DATA_OVERHEAD: usize = DATA_HEADER_LEN + TAG_LEN;

const TYPE_INITIATION: u8 = 1;
const TYPE_RESPONSE: u8 = 2;
const TYPE_COOKIE: u8 = 3;
const TYPE_DATA: u8 = 4;

/// Packets are padded to a multiple of this, so that their exact length doesn't show.
const PADDING: usize = 16;

pub(super) const INITIATION_NOISE: std::ops::Range<usize> = 8..116;
pub(super) const RESPONSE_NOISE: std::ops::Range<usize> = 12..60;

/// A message, told apart by type byte, reserved zeros and length; nothing in it is authentic yet.
pub(super) enum Message<'a> {
    Initiation(&'a [u8; INITIATION_LEN]),
    Response(&'a [u8; RESPONSE_LEN]),
    Cookie(&'a [u8; COOKIE_LEN]),
    Data { receiver: u32, counter: u64 },
}

pub(super) fn parse(datagram: &[u8]) -> Result<Message<'_>, DropReason> {
    let (kind, zeros) = match datagram {
        [kind, zeros @ .., _] if datagram.len() > 4 => (*kind, &zeros[..3]),
        _ => return Err(DropReason::Malformed),
    };
    if zeros != [0; 3] {
        return Err(DropReason::Malformed);
    }
    let message = match kind {
        TYPE_INITIATION => datagram.try_into().ok().map(Message::Initiation),
        TYPE_RESPONSE => datagram.try_into().ok().map(Message::Response),
        TYPE_COOKIE => datagram.try_into().ok().map(Message::Cookie),
        TYPE_DATA if datagram.len() >= DATA_OVERHEAD => {
            Some(Message::Data { receiver: u32_at(datagram, 4), counter: u64_at(datagram, 8) })
        }
        _ => None,
    };
    message.ok_or(DropReason::Malformed)
}

/// The receiver index a datagram carries: every message but an initiation has one.
pub(super) fn receiver(datagram: &[u8]) -> Option<u32> {
    match parse(datagram).ok()? {
        Message::Initiation(_) => None,
        Message::Response(message) => Some(response_receiver(message)),
        Message::Cookie(message) => Some(cookie_receiver(message)),
        Message::Data { receiver, .. } => Some(receiver),
    }
}

/// Little-endian integers inside a message; an offset outside it reads as zero, which [`parse`] rules out.
pub(super) fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    bytes.get(offset..).and_then(<[u8]>::first_chunk).map_or(0, |chunk| u32::from_le_bytes(*chunk))
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    bytes.get(offset..).and_then(<[u8]>::first_chunk).map_or(0, |chunk| u64::from_le_bytes(*chunk))
}

pub(super) fn initiation_sender(message: &[u8; INITIATION_LEN]) -> u32 {
    u32_at(message, 4)
}

pub(super) fn response_sender(message: &[u8; RESPONSE_LEN]) -> u32 {
    u32_at(message, 4)
}

pub(super) fn response_receiver(message: &[u8; RESPONSE_LEN]) -> u32 {
    u32_at(message, 8)
}

pub(super) fn cookie_receiver(message: &[u8; COOKIE_LEN]) -> u32 {
    u32_at(message, 4)
}

pub(super) fn initiation(sender: u32) -> [u8; INITIATION_LEN] {
    let mut message = [0; INITIATION_LEN];
    message[0] = TYPE_INITIATION;
    message[4..8].copy_from_slice(&sender.to_le_bytes());
    message
}

pub(super) fn response(sender: u32, receiver: u32) -> [u8; RESPONSE_LEN] {
    let mut message = [0; RESPONSE_LEN];
    message[0] = TYPE_RESPONSE;
    message[4..8].copy_from_slice(&sender.to_le_bytes());
    message[8..12].copy_from_slice(&receiver.to_le_bytes());
    message
}

pub(super) fn cookie(receiver: u32) -> [u8; COOKIE_LEN] {
    let mut message = [0; COOKIE_LEN];
    message[0] = TYPE_COOKIE;
    message[4..8].copy_from_slice(&receiver.to_le_bytes());
    message
}

pub(super) fn data_header(receiver: u32, counter: u64) -> [u8; DATA_HEADER_LEN] {
    let mut header = [0; DATA_HEADER_LEN];
    header[0] = TYPE_DATA;
    header[4..8].copy_from_slice(&receiver.to_le_bytes());
    header[8..].copy_from_slice(&counter.to_le_bytes());
    header
}

/// The length a packet is padded to: a multiple of 16, but not more than `mtu` unless it is longer already.
pub(super) const fn padded_len(len: usize, mtu: usize) -> usize {
    if len >= mtu {
        return len;
    }
    let padded = len.next_multiple_of(PADDING);
    if padded < mtu { padded } else { mtu }
}

/// The length that an IP packet's own header states, if it is one and no longer than `packet`.
pub(super) fn ip_len(packet: &[u8]) -> Option<usize> {
    const V4_HEADER: usize = 20;
    const V6_HEADER: usize = 40;
    let stated = |at: usize| {
        let bytes = packet.get(at..at + 2)?;
        Some(usize::from(u16::from_be_bytes([bytes[0], bytes[1]])))
    };
    let (len, header) = match packet.first()? >> 4 {
        4 => (stated(2)?, V4_HEADER),
        6 => (stated(4)? + V6_HEADER, V6_HEADER),
        _ => return None,
    };
    (header..=packet.len()).contains(&len).then_some(len)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn padding_rounds_up_and_never_exceeds_the_mtu() {
        for (len, wanted) in [(0, 0), (1, 16), (16, 16), (17, 32), (1270, 1280), (1280, 1280), (1300, 1300)] {
            assert_eq!(padded_len(len, 1280), wanted, "{len}");
        }
        assert_eq!(padded_len(1415, 1418), 1418, "clamped to an odd MTU");
    }

    #[test]
    fn lengths_of_inner_packets() {
        let mut v4 = [0; 32];
        v4[0] = 0x45;
        v4[3] = 28;
        assert_eq!(ip_len(&v4), Some(28));
        v4[3] = 33;
        assert_eq!(ip_len(&v4), None, "longer than the message");
        v4[3] = 19;
        assert_eq!(ip_len(&v4), None, "shorter than its header");
        let mut v6 = [0; 48];
        v6[0] = 0x60;
        v6[5] = 8;
        assert_eq!(ip_len(&v6), Some(48));
        assert_eq!(ip_len(&v6[..47]), None);
        assert_eq!(ip_len(&[0x75; 40]), None);
        assert_eq!(ip_len(&[0x45]), None);
    }

    #[test]
    fn only_exact_shapes_parse() {
        assert!(matches!(
            parse(&initiation(7)),
            Ok(Message::Initiation(m)) if initiation_sender(m) == 7
        ));
        assert!(matches!(parse(&response(1, 2)), Ok(Message::Response(_))));
        assert!(matches!(parse(&cookie(1)), Ok(Message::Cookie(_))));
        assert!(parse(&initiation(7)[..147]).is_err());
        assert!(parse(&[&response(1, 2)[..], &[0]].concat()).is_err());
        let mut reserved = cookie(1);
        reserved[2] = 1;
        assert!(parse(&reserved).is_err());
        let mut data = [0; DATA_OVERHEAD];
        data[..DATA_HEADER_LEN].copy_from_slice(&data_header(0x0102_0304, 5));
        assert!(matches!(parse(&data), Ok(Message::Data { receiver: 0x0102_0304, counter: 5 })));
        assert!(parse(&data[..31]).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_parse_or_not_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&bytes).map(|_| ());
            let _ = receiver(&bytes);
            let _ = ip_len(&bytes);
        }
    }
}
