//! Binding requests and responses (RFC 8489), with what RFC 5780 adds to find out about NATs.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use bytecodec::{DecodeExt as _, EncodeExt as _};
use stun_codec::rfc5389::attributes::{MappedAddress, XorMappedAddress};
use stun_codec::rfc5389::{Attribute, methods::BINDING};
use stun_codec::{Attribute as _, Message, MessageClass, MessageDecoder, MessageEncoder, TransactionId};

/// Longest answer that is looked at, in bytes: a binding response is far shorter.
pub const MAX_RESPONSE_LEN: usize = 548;
/// Bytes of a transaction id.
pub const TXID_LEN: usize = 12;
/// Bytes of a message's header: a binding request without attributes is no more.
pub(crate) const HEADER_LEN: usize = 20;
const COOKIE: [u8; 4] = [0x21, 0x12, 0xa4, 0x42];
/// RFC 5780 section 7.2. Written by hand: the codec has other bits for it.
const CHANGE_REQUEST: u16 = 0x0003;
const CHANGE_ADDRESS_BIT: u8 = 4;
const CHANGE_PORT_BIT: u8 = 2;
/// RFC 5780 section 7.5.
const RESPONSE_PORT: u16 = 0x0027;
/// RFC 5780 section 7.4.
const OTHER_ADDRESS: u16 = 0x802c;

/// From where else the server should answer (RFC 5780).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// From its other address and its other port.
    AddressAndPort,
    /// From the address it was asked at, but its other port.
    Port,
}

/// What a server said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Response {
    /// Where it saw the request come from.
    pub mapped: SocketAddr,
    /// Where else it answers, if it does (RFC 5780).
    pub other: Option<SocketAddr>,
}

/// True if `datagram` is a STUN message by its leading bits and cookie.
pub fn is_stun(datagram: &[u8]) -> bool {
    datagram.len() >= HEADER_LEN && datagram[0] <= 1 && datagram[4..8] == COOKIE
}

/// True if it is a binding request.
pub fn is_request(datagram: &[u8]) -> bool {
    is_stun(datagram) && datagram[..2] == [0, 1]
}

/// The transaction that a STUN message belongs to.
pub fn transaction(datagram: &[u8]) -> Option<[u8; TXID_LEN]> {
    datagram.get(8..)?.first_chunk().copied().filter(|_| is_stun(datagram))
}

/// A binding request.
pub fn request(txid: [u8; TXID_LEN], change: Option<Change>) -> Vec<u8> {
    let message = Message::<Attribute>::new(MessageClass::Request, BINDING, TransactionId::new(txid));
    // A message without attributes always encodes; an empty datagram would just go unanswered.
    let mut bytes = MessageEncoder::new().encode_into_bytes(message).unwrap_or_default();
    let flags = match change {
        None => return bytes,
        Some(Change::AddressAndPort) => CHANGE_ADDRESS_BIT | CHANGE_PORT_BIT,
        Some(Change::Port) => CHANGE_PORT_BIT,
    };
    let [high, low] = CHANGE_REQUEST.to_be_bytes();
    bytes.extend([high, low, 0, 4, 0, 0, 0, flags]);
    bytes[3] = 8; // the length of what follows the header
    bytes
}

/// A binding request whose answer is to go to another port of ours (RFC 5780 section 7.5).
pub(crate) fn request_to_port(txid: [u8; TXID_LEN], port: u16) -> Vec<u8> {
    let mut bytes = request(txid, None);
    bytes.extend(RESPONSE_PORT.to_be_bytes());
    bytes.extend([0, 4]);
    bytes.extend(port.to_be_bytes());
    bytes.extend([0, 0]);
    bytes[3] = 8; // the length of what follows the header
    bytes
}

/// Reads a success response to a binding request.
pub fn response(datagram: &[u8]) -> Option<Response> {
    if datagram.len() > MAX_RESPONSE_LEN || !is_stun(datagram) {
        return None;
    }
    let message = MessageDecoder::<Attribute>::new().decode_from_bytes(datagram).ok()?.ok()?;
    if message.class() != MessageClass::SuccessResponse || message.method() != BINDING {
        return None;
    }
    let xor = message.get_attribute::<XorMappedAddress>().map(XorMappedAddress::address);
    let mapped = xor.or_else(|| message.get_attribute::<MappedAddress>().map(MappedAddress::address))?;
    let other = message.unknown_attributes().find(|a| a.get_type().as_u16() == OTHER_ADDRESS);
    Some(Response { mapped: usable(mapped)?, other: other.and_then(|a| address(a.value())).and_then(usable) })
}

/// An address that can be sent to, as the IPv4 address it may be.
fn usable(addr: SocketAddr) -> Option<SocketAddr> {
    let addr = SocketAddr::new(addr.ip().to_canonical(), addr.port());
    (addr.port() != 0 && !addr.ip().is_unspecified()).then_some(addr)
}

/// The value of an attribute like MAPPED-ADDRESS.
fn address(value: &[u8]) -> Option<SocketAddr> {
    let [_, family, high, low, ip @ ..] = value else { return None };
    let ip: IpAddr = match family {
        1 => Ipv4Addr::from(<[u8; 4]>::try_from(ip).ok()?).into(),
        2 => Ipv6Addr::from(<[u8; 16]>::try_from(ip).ok()?).into(),
        _ => return None,
    };
    Some(SocketAddr::new(ip, u16::from_be_bytes([*high, *low])))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A success response: XOR-MAPPED-ADDRESS 203.0.113.1:9, and more attributes.
    fn answer(more: &[u8]) -> Vec<u8> {
        let mut bytes = vec![1, 1, 0, 12 + more.len() as u8];
        bytes.extend(COOKIE);
        bytes.extend([7; TXID_LEN]);
        bytes.extend([0, 0x20, 0, 8, 0, 1, 0x21, 0x1b, 203 ^ 0x21, 0x12, 113 ^ 0xa4, 1 ^ 0x42]);
        bytes.extend(more);
        bytes
    }

    #[test]
    fn requests_have_the_rfc_s_bytes() {
        let plain = request([7; TXID_LEN], None);
        assert_eq!(plain[..8], [0, 1, 0, 0, 0x21, 0x12, 0xa4, 0x42]);
        assert!(is_request(&plain) && !is_request(&answer(&[])));
        assert_eq!((plain.len(), transaction(&plain)), (HEADER_LEN, Some([7; TXID_LEN])));
        for (change, bits) in [(Change::AddressAndPort, 6), (Change::Port, 2)] {
            let bytes = request([7; TXID_LEN], Some(change));
            assert_eq!((bytes[3], &bytes[HEADER_LEN..]), (8, &[0, 3, 0, 4, 0, 0, 0, bits][..]));
            let message = MessageDecoder::<Attribute>::new().decode_from_bytes(&bytes).unwrap().unwrap();
            assert_eq!(message.unknown_attributes().count(), 1);
        }
        let elsewhere = request_to_port([7; TXID_LEN], 0x1234);
        assert_eq!((elsewhere[3], &elsewhere[HEADER_LEN..]), (8, &[0, 0x27, 0, 4, 0x12, 0x34, 0, 0][..]));
    }

    #[test]
    fn responses_tell_the_mapped_and_the_other_address() {
        let mapped = "203.0.113.1:9".parse().unwrap();
        assert_eq!(response(&answer(&[])), Some(Response { mapped, other: None }));
        let other = [0x80, 0x2c, 0, 8, 0, 1, 0x0d, 0x97, 198, 51, 100, 2];
        let said = response(&answer(&other)).unwrap();
        assert_eq!((said.mapped, said.other), (mapped, Some("198.51.100.2:3479".parse().unwrap())));
        // One that makes no sense is none.
        for (at, value) in [(5, 0), (5, 2)] {
            let mut bad = other;
            bad[at] = value;
            assert_eq!(response(&answer(&bad)).unwrap().other, None);
        }
        let no_port = [0x80, 0x2c, 0, 8, 0, 1, 0, 0, 198, 51, 100, 2];
        assert_eq!(response(&answer(&no_port)).unwrap().other, None);
        // Padding up to the bound, and beyond it.
        let padded = |len: usize| {
            let value = len - answer(&[]).len() - 4;
            let mut bytes = answer(&[]);
            bytes.extend([0xc0, 0x01, (value >> 8) as u8, value as u8]);
            bytes.resize(len, b'x');
            let length = (len - HEADER_LEN) as u16;
            bytes[2..4].copy_from_slice(&length.to_be_bytes());
            bytes
        };
        assert!(response(&padded(MAX_RESPONSE_LEN)).is_some());
        assert!(response(&padded(MAX_RESPONSE_LEN + 4)).is_none());
        let mut error = answer(&[]);
        error[1] = 0x11;
        assert_eq!(response(&error), None);
        assert_eq!(response(&request([7; TXID_LEN], None)), None);
    }

    proptest! {
        #[test]
        fn nothing_panics(garbage in proptest::collection::vec(any::<u8>(), 0..600)) {
            let _ = (response(&garbage), transaction(&garbage));
            let mut head = vec![1, 1, (garbage.len() >> 8) as u8, garbage.len() as u8];
            head.extend(COOKIE);
            head.extend(&garbage);
            let _ = (response(&head), address(&garbage));
        }
    }
}
