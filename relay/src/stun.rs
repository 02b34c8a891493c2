//! A STUN server (RFC 8489): tells who asks from where the question came, and nothing else.
//!
//! Binding requests only, without credentials. An answer is at most [`MAX_GROWTH`] bytes longer than its request, so that
//! nobody gains by sending requests with a forged source; answers per second are bounded as well.

use std::net::SocketAddr;

use bytecodec::{DecodeExt as _, EncodeExt as _};
use stun_codec::rfc5389::attributes::{ErrorCode, UnknownAttributes, XorMappedAddress};
use stun_codec::rfc5389::errors::UnknownAttribute;
use stun_codec::rfc5389::{Attribute, methods::BINDING};
use stun_codec::{Attribute as _, Message, MessageClass, MessageDecoder, MessageEncoder};

/// Longest request that is looked at, in bytes (RFC 8489 section 6.1: what any path carries).
pub const MAX_REQUEST: usize = 548;
/// How much longer than its request an answer may be, in bytes: one address of IPv6.
pub const MAX_GROWTH: usize = 24;
const HEADER: usize = 20;
const COOKIE: [u8; 4] = [0x21, 0x12, 0xa4, 0x42];

/// The answer to `request`, which came from `from`; `None` if there is nothing to say.
pub fn answer(request: &[u8], from: SocketAddr) -> Option<Vec<u8>> {
    let is_request = request.first_chunk() == Some(&[0, 1])
        && request.len() <= MAX_REQUEST
        && request.get(4..8) == Some(&COOKIE);
    if !is_request {
        return None;
    }
    let message = MessageDecoder::<Attribute>::new().decode_from_bytes(request).ok()?.ok()?;
    // Attributes below 0x8000 must be understood by who answers (RFC 8489 section 14).
    let unknown: Vec<_> =
        message.unknown_attributes().map(|a| a.get_type()).filter(|kind| kind.as_u16() < 0x8000).collect();
    let mut response = if unknown.is_empty() {
        let mut response =
            Message::<Attribute>::new(MessageClass::SuccessResponse, BINDING, message.transaction_id());
        let seen = SocketAddr::new(from.ip().to_canonical(), from.port());
        response.add_attribute(Attribute::from(XorMappedAddress::new(seen)));
        response
    } else {
        let mut response =
            Message::<Attribute>::new(MessageClass::ErrorResponse, BINDING, message.transaction_id());
        response.add_attribute(Attribute::from(ErrorCode::from(UnknownAttribute)));
        response.add_attribute(Attribute::from(UnknownAttributes::new(unknown)));
        response
    };
    let mut bytes = MessageEncoder::new().encode_into_bytes(response).ok()?;
    if bytes.len() > request.len() + MAX_GROWTH {
        // Only an error with a long reason or list can be: the code alone must do.
        response = Message::<Attribute>::new(MessageClass::ErrorResponse, BINDING, message.transaction_id());
        response.add_attribute(Attribute::from(ErrorCode::new(420, String::new()).ok()?));
        bytes = MessageEncoder::new().encode_into_bytes(response).ok()?;
    }
    (HEADER..=request.len() + MAX_GROWTH).contains(&bytes.len()).then_some(bytes)
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
        let bytes = answer(&request(), addr("192.0.2.1:32853")).unwrap();
        // Port and address XOR 2112a442, as in RFC 5769 section 2.2.
        let expected = "0101000c2112a442070707070707070707070707002000080001a147e112a643";
        assert_eq!(data_encoding::HEXLOWER.encode(&bytes), expected);
    }

    #[test]
    fn a_mapped_address_is_told_as_the_ipv4_address_it_is() {
        let mapped = answer(&request(), addr("[::ffff:192.0.2.1]:32853"));
        assert_eq!(mapped, answer(&request(), addr("192.0.2.1:32853")));
        assert_eq!(answer(&request(), addr("[2001:db8::1]:1")).unwrap().len(), 44);
    }

    #[test]
    fn what_must_be_understood_and_is_not_is_refused() {
        let mut bytes = request();
        bytes.extend_from_slice(&[0x7f, 0xff, 0, 4, 1, 2, 3, 4]);
        bytes[3] = 8;
        let refused = answer(&bytes, addr("192.0.2.1:1")).unwrap();
        assert_eq!(refused[..2], [1, 0x11]);
        // Attributes that may be ignored are.
        bytes[20] = 0xff;
        assert_eq!(answer(&bytes, addr("192.0.2.1:1")).unwrap()[..2], [1, 1]);
    }

    #[test]
    fn other_classes_and_lengths_get_no_answer() {
        let from = addr("192.0.2.1:1");
        for (at, byte) in [(0, 1), (1, 0x11), (1, 3), (4, 0)] {
            let mut bytes = request();
            bytes[at] = byte;
            assert_eq!(answer(&bytes, from), None);
        }
        assert_eq!(answer(&request()[..19], from), None);
        let mut long = request();
        long.resize(MAX_REQUEST + 1, 0);
        assert_eq!(answer(&long, from), None);
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
                if let Some(answer) = answer(request, from) {
                    prop_assert!(answer.len() <= request.len() + MAX_GROWTH);
                }
            }
        }
    }
}
