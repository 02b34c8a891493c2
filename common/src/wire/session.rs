//! The control session: Noise_IK inside any ordered message transport (a WebSocket at `/control/v1`), sans-I/O.
//!
//! 1. The coordinator sends its root-signed identity ([`super::control::CoordinatorIdentity`]) in the clear.
//! 2. The agent sends `count, version…` (what it speaks) and the first Noise message. The prologue is a fixed label,
//!    the network's id and that version list, so that a changed list breaks the handshake.
//! 3. The coordinator answers with the second Noise message; its encrypted payload is the version it chose.
//! 4. Then each message is cut into chunks of at most [`MAX_CHUNK`] bytes, each sealed and sent as one frame.
//!
//! Handshake payloads carry no secrets: enrolment comes after it.

use rand_core::{CryptoRng, RngCore};
use snow::{Builder, HandshakeState, TransportState};

use super::WireError;
use crate::ids::NetworkId;
use crate::keys::{ControlPublicKey, ControlSecretKey};
use crate::noise;

/// The version of the control protocol that this code speaks.
pub const VERSION: u16 = 1;
/// The oldest version it still accepts; a lower choice is refused as a downgrade.
pub const MIN_VERSION: u16 = 1;
/// Most versions an agent may offer.
pub const MAX_VERSIONS: usize = 16;
/// Longest message, in bytes: bounds what a trusted peer can make us buffer.
pub const MAX_MESSAGE: usize = 64 << 20;
/// Longest message until [`Session::trust_peer`], in bytes. A coordinator never calls that: no device, enrolled or not, can
/// make it buffer more; the longest that a device says is a report of 256 routes, 16 KiB.
pub const MAX_MESSAGE_UNTRUSTED: usize = 64 << 10;
/// Plaintext of one frame: a Noise message holds 65 535 bytes, less the tag and our flag byte.
pub const MAX_CHUNK: usize = 65_535 - 16 - 1;

const PATTERN: &str = "Noise_IK_25519_ChaChaPoly_BLAKE2s";
const LABEL: &[u8] = b"warren control v1";
const WHAT: &str = "control session";
const LAST: u8 = 1;
const MORE: u8 = 0;

fn prologue(network: NetworkId, versions: &[u16]) -> Vec<u8> {
    let mut out = LABEL.to_vec();
    out.extend_from_slice(&network.to_bytes());
    out.extend(versions.iter().flat_map(|v| v.to_be_bytes()));
    out
}

fn noise_error(error: snow::Error) -> WireError {
    WireError::Malformed { what: WHAT, why: error.to_string() }
}

fn builder<'a>(
    secret: &'a ControlSecretKey,
    prologue: &'a [u8],
    rng: &mut (impl RngCore + CryptoRng),
) -> Result<Builder<'a>, WireError> {
    let params = PATTERN.parse().map_err(noise_error)?;
    Builder::with_resolver(params, noise::resolver(rng))
        .local_private_key(secret.expose())
        .and_then(|b| b.prologue(prologue))
        .map_err(noise_error)
}

/// The agent's half of the handshake.
pub struct ClientHandshake {
    state: HandshakeState,
}

impl std::fmt::Debug for ClientHandshake {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ClientHandshake")
    }
}

impl ClientHandshake {
    /// Starts towards the coordinator whose verified identity says `network` and `server`.
    /// Returns the frame to send.
    ///
    /// # Errors
    /// Only if the keys are unusable.
    pub fn start(
        secret: &ControlSecretKey,
        server: &ControlPublicKey,
        network: NetworkId,
        rng: &mut (impl RngCore + CryptoRng),
    ) -> Result<(Self, Vec<u8>), WireError> {
        let versions = [VERSION];
        let prologue = prologue(network, &versions);
        let mut state = builder(secret, &prologue, rng)?
            .remote_public_key(server.as_bytes())
            .and_then(Builder::build_initiator)
            .map_err(noise_error)?;
        let mut frame = vec![0; 1 + 2 * versions.len() + 128];
        frame[0] = versions.len() as u8;
        for (slot, version) in frame[1..].chunks_exact_mut(2).zip(versions) {
            slot.copy_from_slice(&version.to_be_bytes());
        }
        let head = 1 + 2 * versions.len();
        let len = state.write_message(&[], &mut frame[head..]).map_err(noise_error)?;
        frame.truncate(head + len);
        Ok((Self { state }, frame))
    }

    /// Takes the coordinator's answer.
    ///
    /// # Errors
    /// The answer is not by the expected coordinator, or it chose a version below [`MIN_VERSION`].
    pub fn finish(mut self, frame: &[u8]) -> Result<Session, WireError> {
        let mut payload = [0; 256];
        let len = self.state.read_message(frame, &mut payload).map_err(noise_error)?;
        let version = payload[..len].first_chunk().map(|v| u16::from_be_bytes(*v));
        if !version.is_some_and(|v| (MIN_VERSION..=VERSION).contains(&v)) {
            return Err(WireError::field(WHAT, "version"));
        }
        Session::new(self.state)
    }
}

/// The coordinator's half: one call, since it answers the first message with the last.
///
/// Returns the session, the agent's (proved) control key and the frame to send.
///
/// # Errors
/// Anything but a handshake for this coordinator and network with a version in common.
pub fn accept(
    secret: &ControlSecretKey,
    network: NetworkId,
    frame: &[u8],
    rng: &mut (impl RngCore + CryptoRng),
) -> Result<(Session, ControlPublicKey, Vec<u8>), WireError> {
    let field = |name| WireError::field(WHAT, name);
    let (count, rest) = frame.split_first().ok_or(field("versions"))?;
    let count = usize::from(*count);
    if count == 0 || count > MAX_VERSIONS || rest.len() < 2 * count {
        return Err(field("versions"));
    }
    let (list, message) = rest.split_at(2 * count);
    let versions: Vec<u16> = list.as_chunks::<2>().0.iter().map(|v| u16::from_be_bytes(*v)).collect();
    let chosen =
        versions.iter().filter(|v| (MIN_VERSION..=VERSION).contains(*v)).max().ok_or(field("version"))?;
    let prologue = prologue(network, &versions);
    let mut state = builder(secret, &prologue, rng)?.build_responder().map_err(noise_error)?;
    let mut payload = [0; 256];
    state.read_message(message, &mut payload).map_err(noise_error)?;
    let peer = state.get_remote_static().and_then(ControlPublicKey::from_slice).ok_or(field("static key"))?;
    let mut answer = vec![0; 256];
    let len = state.write_message(&chosen.to_be_bytes(), &mut answer).map_err(noise_error)?;
    answer.truncate(len);
    Ok((Session::new(state)?, peer, answer))
}

/// An established session: seals messages into frames and opens frames into messages.
pub struct Session {
    state: TransportState,
    partial: Vec<u8>,
    max_message: usize,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Session")
    }
}

impl Session {
    fn new(state: HandshakeState) -> Result<Self, WireError> {
        let state = state.into_transport_mode().map_err(noise_error)?;
        Ok(Self { state, partial: Vec::new(), max_message: MAX_MESSAGE_UNTRUSTED })
    }

    /// Accepts messages up to [`MAX_MESSAGE`] from now on: the other side is our coordinator.
    pub fn trust_peer(&mut self) {
        self.max_message = MAX_MESSAGE;
    }

    /// The frames that carry `message`, to be sent in order.
    ///
    /// # Errors
    /// The message is longer than [`MAX_MESSAGE`], or the session's nonces are used up.
    pub fn seal(&mut self, message: &[u8]) -> Result<Vec<Vec<u8>>, WireError> {
        if message.len() > MAX_MESSAGE {
            return Err(WireError::field(WHAT, "length"));
        }
        let count = message.len().div_ceil(MAX_CHUNK).max(1);
        let mut plain = Vec::with_capacity(1 + message.len().min(MAX_CHUNK));
        (0..count)
            .map(|i| {
                let chunk = &message[i * MAX_CHUNK..message.len().min((i + 1) * MAX_CHUNK)];
                plain.clear();
                plain.push(if i + 1 == count { LAST } else { MORE });
                plain.extend_from_slice(chunk);
                let mut frame = vec![0; plain.len() + 16];
                let len = self.state.write_message(&plain, &mut frame).map_err(noise_error)?;
                frame.truncate(len);
                Ok(frame)
            })
            .collect()
    }

    /// Takes one frame; returns a message when one is whole. After an error the session must be dropped.
    ///
    /// # Errors
    /// The frame is not the next one of this session, or the message grows past the bound.
    pub fn open(&mut self, frame: &[u8]) -> Result<Option<Vec<u8>>, WireError> {
        let mut plain = vec![0; frame.len()];
        let len = self.state.read_message(frame, &mut plain).map_err(noise_error)?;
        let (flag, chunk) = plain[..len].split_first().ok_or(WireError::field(WHAT, "flag"))?;
        if self.partial.len() + chunk.len() > self.max_message {
            return Err(WireError::field(WHAT, "length"));
        }
        self.partial.extend_from_slice(chunk);
        match *flag {
            LAST => Ok(Some(std::mem::take(&mut self.partial))),
            MORE => Ok(None),
            _ => Err(WireError::field(WHAT, "flag")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand_chacha::ChaCha20Rng;
    use rand_core::SeedableRng;

    fn pair() -> (Session, Session) {
        let mut rng = ChaCha20Rng::seed_from_u64(1);
        let (client, server) = (ControlSecretKey::generate(&mut rng), ControlSecretKey::generate(&mut rng));
        let network = NetworkId::from_bytes([1; 16]);
        let (handshake, frame) =
            ClientHandshake::start(&client, &server.public(), network, &mut rng).unwrap();
        let (s, who, answer) = accept(&server, network, &frame, &mut rng).unwrap();
        assert_eq!(who, client.public());
        (handshake.finish(&answer).unwrap(), s)
    }

    #[test]
    fn messages_of_any_length_cross_in_order() {
        let (mut client, mut server) = pair();
        server.trust_peer();
        for len in [0, 1, MAX_CHUNK, MAX_CHUNK + 1, 3 * MAX_CHUNK] {
            let message: Vec<u8> = (0..len).map(|i| i as u8).collect();
            let frames = client.seal(&message).unwrap();
            assert_eq!(frames.len(), len.div_ceil(MAX_CHUNK).max(1));
            let got: Vec<_> = frames.iter().filter_map(|f| server.open(f).unwrap()).collect();
            assert_eq!(got, [message]);
        }
    }

    #[test]
    fn a_stranger_cannot_make_us_buffer_much() {
        let (mut client, mut server) = pair();
        let frames = client.seal(&vec![0; 2 * MAX_MESSAGE_UNTRUSTED]).unwrap();
        assert!(frames.iter().any(|f| server.open(f).is_err()));
    }

    #[test]
    fn replayed_and_tampered_frames_end_the_session() {
        let (mut client, mut server) = pair();
        let frame = client.seal(b"hi").unwrap().remove(0);
        assert!(server.open(&frame).unwrap().is_some());
        assert!(server.open(&frame).is_err());
        let mut next = client.seal(b"hi").unwrap().remove(0);
        next[3] ^= 1;
        assert!(server.open(&next).is_err());
    }

    #[test]
    fn another_coordinator_network_or_version_list_fails() {
        let mut rng = ChaCha20Rng::seed_from_u64(1);
        let (client, server) = (ControlSecretKey::generate(&mut rng), ControlSecretKey::generate(&mut rng));
        let network = NetworkId::from_bytes([1; 16]);
        let (_, frame) = ClientHandshake::start(&client, &server.public(), network, &mut rng).unwrap();
        assert!(accept(&client, network, &frame, &mut rng).is_err());
        assert!(accept(&server, NetworkId::from_bytes([2; 16]), &frame, &mut rng).is_err());
        let mut listed = frame.clone();
        listed[2] = 9;
        assert!(accept(&server, network, &listed, &mut rng).is_err());
        for cut in 0..frame.len() {
            assert!(accept(&server, network, &frame[..cut], &mut rng).is_err());
        }
    }
}
