//! The simulated internet's STUN server: binding responses (RFC 8489), written by hand so that the agent's client does
//! not talk to its own codec.

use std::net::{IpAddr, SocketAddr};

const COOKIE: [u8; 4] = [0x21, 0x12, 0xa4, 0x42];
const BINDING_REQUEST: [u8; 2] = [0, 1];
const BINDING_RESPONSE: [u8; 2] = [1, 1];
const XOR_MAPPED_ADDRESS: [u8; 2] = [0, 0x20];

const RESPONSE_PORT: [u8; 4] = [0, 0x27, 0, 4];

/// The answer to a binding request from `from`, and the port to send it to, which may be another one of the asker's
/// (RFC 5780 section 7.5); `None` for anything else.
pub fn answer(request: &[u8], from: SocketAddr) -> Option<(Vec<u8>, u16)> {
    let (kind, rest) = request.split_first_chunk::<2>()?;
    let (_, rest) = rest.split_first_chunk::<2>()?;
    let mask = rest.first_chunk::<16>()?; // cookie and transaction id
    if *kind != BINDING_REQUEST || mask[..4] != COOKIE {
        return None;
    }
    let xor = |bytes: &[u8]| bytes.iter().zip(mask).map(|(a, b)| a ^ b).collect::<Vec<u8>>();
    let (family, addr) = match from.ip() {
        IpAddr::V4(v4) => (1, xor(&v4.octets())),
        IpAddr::V6(v6) => (2, xor(&v6.octets())),
    };
    let mut value = vec![0, family];
    value.extend(xor(&from.port().to_be_bytes()));
    value.extend(addr);
    let mut out = Vec::new();
    out.extend(BINDING_RESPONSE);
    out.extend((value.len() as u16 + 4).to_be_bytes());
    out.extend(mask);
    out.extend(XOR_MAPPED_ADDRESS);
    out.extend((value.len() as u16).to_be_bytes());
    out.extend(value);
    let port = rest.get(16..).and_then(|attributes| attributes.strip_prefix(&RESPONSE_PORT));
    let port = port.and_then(<[u8]>::first_chunk::<2>).map_or(from.port(), |port| u16::from_be_bytes(*port));
    Some((out, port))
}
