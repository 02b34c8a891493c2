//! A STUN server (RFC 8489): tells who asks from where the question came, and nothing else.
//!
//! Binding requests only, without credentials. A server that has a second address says so, and answers from it if asked to
//! (RFC 5780), so that devices find out how their NAT behaves. An answer is at most [`MAX_GROWTH`] bytes longer than its
//! request, so that nobody gains by sending requests with a forged source; answers per second are bounded as well.

use std::net::SocketAddr;

use bytecodec::{DecodeExt as _, EncodeExt as _};
use stun_codec::rfc5389::attributes::{ErrorCode, UnknownAttributes, XorMappedAddress};
use stun_codec::rfc5389::errors::UnknownAttribute;
use stun_codec::rfc5389::{Attribute, methods::BINDING};
use stun_codec::{Attribute as _, Message, MessageClass, MessageDecoder, MessageEncoder};

/// Longest request that is looked at, in bytes (RFC 8489 section 6.1: what any path carries).
pub const MAX_REQUEST: usize = 548;
/// How much longer than its request an answer may be, in bytes: two addresses of IPv6.
pub const MAX_GROWTH: usize = 48;
const HEADER: usize = 20;
const COOKIE: [u8; 4] = [0x21, 0x12, 0xa4, 0x42];
/// RFC 5780 section 7.2. Read by hand: the codec has other bits for it.
const CHANGE_REQUEST: u16 = 0x0003;
const CHANGE_ADDRESS_BIT: u8 = 4;
const CHANGE_PORT_BIT: u8 = 2;
/// RFC 5780 section 7.5: the asker learns how long its NAT remembers another of its sockets.
const RESPONSE_PORT: u16 = 0x0027;
/// RFC 5780 section 7.4.
const OTHER_ADDRESS: u16 = 0x802c;

/// An answer, and from where it is to be sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The message.
    pub bytes: Vec<u8>,
    /// Not from the address that was asked, but from the server's other one.
    pub other_address: bool,
    /// The same for the port.
    pub other_port: bool,
    /// To this port of the asker, instead of the one it asked from.
    pub to_port: Option<u16>,
}

/// The answer to `request`, which came from `from`; `None` if there is nothing to say. `other` differs in address and port
/// from where the request came in, if the server has such a place.
pub fn answer(request: &[u8], from: SocketAddr, other: Option<SocketAddr>) -> Option<Answer> {
    let is_request = request.first_chunk() == Some(&[0, 1])
        && request.len() <= MAX_REQUEST
        && request.get(4..8) == Some(&COOKIE);
    if !is_request {
        return None;
    }
    let message = MessageDecoder::<Attribute>::new().decode_from_bytes(request).ok()?.ok()?;
    let attributes = || message.unknown_attributes().map(|a| (a.get_type(), a.value()));
    let change = attributes().find(|(kind, _)| kind.as_u16() == CHANGE_REQUEST && other.is_some());
    let to_port = attributes().find(|(kind, _)| kind.as_u16() == RESPONSE_PORT).and_then(|(_, value)| {
        let port = u16::from_be_bytes(*value.first_chunk()?);
        (port != 0).then_some(port)
    });
    let flags = change.and_then(|(_, value)| value.last()).copied().unwrap_or_default();
    // Attributes below 0x8000 must be understood by who answers (RFC 8489 section 14).
    let unknown: Vec<_> = attributes()
        .map(|(kind, _)| kind)
        .filter(|kind| {
            let is_understood =
                kind.as_u16() == RESPONSE_PORT || kind.as_u16() == CHANGE_REQUEST && other.is_some();
            kind.as_u16() < 0x8000 && !is_understood
        })
        .collect();
    let transaction = message.transaction_id();
    let bytes = if unknown.is_empty() {
        let mut response = Message::<Attribute>::new(MessageClass::SuccessResponse, BINDING, transaction);
        let seen = SocketAddr::new(from.ip().to_canonical(), from.port());
        response.add_attribute(Attribute::from(XorMappedAddress::new(seen)));
        let mut bytes = MessageEncoder::new().encode_into_bytes(response).ok()?;
        if let Some(other) = other {
            add_address(&mut bytes, OTHER_ADDRESS, other);
        }
        bytes
    } else {
        let mut response = Message::<Attribute>::new(MessageClass::ErrorResponse, BINDING, transaction);
        response.add_attribute(Attribute::from(ErrorCode::from(UnknownAttribute)));
        response.add_attribute(Attribute::from(UnknownAttributes::new(unknown)));
        let bytes = MessageEncoder::new().encode_into_bytes(response).ok()?;
        if bytes.len() <= request.len() + MAX_GROWTH {
            bytes
        } else {
            // Only a long reason or list can be too much: the code alone must do.
            let mut response = Message::<Attribute>::new(MessageClass::ErrorResponse, BINDING, transaction);
            response.add_attribute(Attribute::from(ErrorCode::new(420, String::new()).ok()?));
            MessageEncoder::new().encode_into_bytes(response).ok()?
        }
    };
    let fits = (HEADER..=request.len() + MAX_GROWTH).contains(&bytes.len());
    fits.then_some(Answer {
        bytes,
        other_address: flags & CHANGE_ADDRESS_BIT != 0,
        other_port: flags & CHANGE_PORT_BIT != 0,
        to_port,
    })
}

/// Appends an attribute like MAPPED-ADDRESS.
fn add_address(message: &mut Vec<u8>, kind: u16, addr: SocketAddr) {
    let (family, ip) = match addr {
        SocketAddr::V4(addr) => (1, addr.ip().octets().to_vec()),
        SocketAddr::V6(addr) => (2, addr.ip().octets().to_vec()),
    };
    message.extend(kind.to_be_bytes());
    message.extend([0, 4 + ip.len() as u8, 0, family]);
    message.extend(addr.port().to_be_bytes());
    message.extend(ip);
    let length = (message.len() - HEADER) as u16;
    message[2..4].copy_from_slice(&length.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use stun_codec::TransactionId;

    fn request() -> Vec<u8> {
        let message = Message::<Attribute>::new(MessageClass::Request, BINDING, TransactionId::new([7; 12]));
        MessageEncoder::new().encode_into_bytes(message).unwrap()
    }

    fn addr(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn golden_answer() {
        let bytes = answer(&request(), addr("192.0.2.1:32853"), None).unwrap().bytes;
        // Port and address XOR 2112a442, as in RFC 5769 section 2.2.
        let expected = "0101000c2112a442070707070707070707070707002000080001a147e112a643";
        assert_eq!(data_encoding::HEXLOWER.encode(&bytes), expected);
    }

    #[test]
    fn a_mapped_address_is_told_as_the_ipv4_address_it_is() {
        let mapped = answer(&request(), addr("[::ffff:192.0.2.1]:32853"), None);
        assert_eq!(mapped, answer(&request(), addr("192.0.2.1:32853"), None));
        assert_eq!(answer(&request(), addr("[2001:db8::1]:1"), None).unwrap().bytes.len(), 44);
    }

    #[test]
    fn a_server_with_a_second_address_says_so_and_answers_from_it() {
        let (from, other) = (addr("192.0.2.1:32853"), addr("198.51.100.2:3479"));
        let plain = answer(&request(), from, Some(other)).unwrap();
        assert_eq!((plain.other_address, plain.other_port), (false, false));
        assert_eq!(plain.bytes[2..4], [0, 24]);
        assert_eq!(plain.bytes[32..], [0x80, 0x2c, 0, 8, 0, 1, 0x0d, 0x97, 198, 51, 100, 2]);
        for (flags, want) in [(0, (false, false)), (2, (false, true)), (4, (true, false)), (6, (true, true))]
        {
            let mut bytes = request();
            bytes.extend([0, 3, 0, 4, 0, 0, 0, flags]);
            bytes[3] = 8;
            let changed = answer(&bytes, from, Some(other)).unwrap();
            assert_eq!((changed.other_address, changed.other_port), want);
            assert_eq!(changed.bytes, plain.bytes);
            // One that can't do it says so.
            let refused = answer(&bytes, from, None).unwrap();
            assert_eq!((&refused.bytes[..2], refused.other_address), (&[1, 0x11][..], false));
        }
    }

    #[test]
    fn the_answer_goes_to_another_port_of_the_asker_if_it_wishes() {
        for (port, wanted) in [(4_000u16, Some(4_000)), (0, None)] {
            let mut bytes = request();
            bytes.extend([0, 0x27, 0, 4]);
            bytes.extend(port.to_be_bytes());
            bytes.extend([0, 0]);
            bytes[3] = 8;
            let from = addr("192.0.2.1:32853");
            let answer = answer(&bytes, from, None).unwrap();
            assert_eq!(answer.to_port, wanted);
            assert_eq!(answer.bytes, super::answer(&request(), from, None).unwrap().bytes);
        }
    }

    #[test]
    fn what_must_be_understood_and_is_not_is_refused() {
        let mut bytes = request();
        bytes.extend_from_slice(&[0x7f, 0xff, 0, 4, 1, 2, 3, 4]);
        bytes[3] = 8;
        let refused = answer(&bytes, addr("192.0.2.1:1"), None).unwrap().bytes;
        assert_eq!(refused[..2], [1, 0x11]);
        // Attributes that may be ignored are.
        bytes[20] = 0xff;
        assert_eq!(answer(&bytes, addr("192.0.2.1:1"), None).unwrap().bytes[..2], [1, 1]);
    }

    #[test]
    fn other_classes_and_lengths_get_no_answer() {
        let from = addr("192.0.2.1:1");
        for (at, byte) in [(0, 1), (1, 0x11), (1, 3), (4, 0)] {
            let mut bytes = request();
            bytes[at] = byte;
            assert_eq!(answer(&bytes, from, None), None);
        }
        assert_eq!(answer(&request()[..19], from, None), None);
        let mut long = request();
        long.resize(MAX_REQUEST + 1, 0);
        assert_eq!(answer(&long, from, None), None);
    }

    proptest! {
        #[test]
        fn never_panics_and_never_amplifies(tail in prop::collection::vec(any::<u8>(), 0..600), v6 in any::<bool>()) {
            let mut bytes = request();
            bytes.extend_from_slice(&tail);
            let length = tail.len() as u16;
            bytes[2..4].copy_from_slice(&length.to_be_bytes());
            let from = if v6 { addr("[2001:db8::1]:9") } else { addr("192.0.2.1:9") };
            for request in [&bytes[..], &tail[..]] {
                for other in [None, Some(addr("192.0.2.2:3479")), Some(addr("[2001:db8::2]:3479"))] {
                    if let Some(answer) = answer(request, from, other) {
                        prop_assert!(answer.bytes.len() <= request.len() + MAX_GROWTH);
                    }
                }
            }
        }
    }
}
