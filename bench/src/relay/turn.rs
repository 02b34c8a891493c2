//! As much of a TURN client (RFC 8656) as an allocation with a channel takes.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use bytecodec::{DecodeExt as _, EncodeExt as _};
use stun_codec::rfc5766::Attribute;
use stun_codec::rfc5766::attributes::{ChannelNumber, RequestedTransport, XorPeerAddress, XorRelayAddress};
use stun_codec::rfc5766::methods::{ALLOCATE, CHANNEL_BIND};
use stun_codec::{Message, MessageClass, MessageDecoder, MessageEncoder, Method, TransactionId};

/// The one channel.
const CHANNEL: u16 = 0x4000;
/// What goes in front of a packet on it, in bytes.
pub const HEADER: usize = 4;
/// Protocol number of UDP.
const UDP: u8 = 17;
const RETRY: Duration = Duration::from_millis(500);
const TRIES: usize = 10;
/// Before one more try.
const PAUSE: Duration = Duration::from_millis(50);

/// An allocation of a server.
#[derive(Debug)]
pub struct Allocation {
    /// Connected to the server.
    pub socket: UdpSocket,
    /// Where the server takes packets for this client.
    pub relayed: SocketAddr,
}

impl Allocation {
    /// Asks for one.
    ///
    /// # Errors
    /// The server does not grant it.
    pub fn new(server: SocketAddr) -> Result<Self> {
        Self::of_tries(server, TRIES)
    }

    /// The same for a server that may not be there yet: asks once.
    ///
    /// # Errors
    /// The server does not grant it.
    pub fn of_one_try(server: SocketAddr) -> Result<Self> {
        Self::of_tries(server, 1)
    }

    fn of_tries(server: SocketAddr, tries: usize) -> Result<Self> {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
        socket.connect(server)?;
        let answer = ask(&socket, ALLOCATE, &[RequestedTransport::new(UDP).into()], tries)?;
        let relayed = answer.get_attribute::<XorRelayAddress>().context("no relayed address")?.address();
        Ok(Self { socket, relayed })
    }

    /// Lets packets go to `peer` and come from it, in channel messages.
    ///
    /// # Errors
    /// The server does not.
    pub fn bind(&self, peer: SocketAddr) -> Result<()> {
        let channel = ChannelNumber::new(CHANNEL).map_err(|e| anyhow::anyhow!("{e}"))?;
        let attributes = [channel.into(), XorPeerAddress::new(peer).into()];
        ask(&self.socket, CHANNEL_BIND, &attributes, TRIES).map(drop)
    }

    /// A packet of `payload` bytes in a channel message.
    pub fn message(payload: usize) -> Vec<u8> {
        let mut message = vec![7; HEADER + payload];
        message[..2].copy_from_slice(&CHANNEL.to_be_bytes());
        message[2..4].copy_from_slice(&(payload as u16).to_be_bytes());
        message
    }
}

fn ask(
    socket: &UdpSocket,
    method: Method,
    attributes: &[Attribute],
    tries: usize,
) -> Result<Message<Attribute>> {
    let transaction = TransactionId::new(*b"warren bench");
    let mut request = Message::<Attribute>::new(MessageClass::Request, method, transaction);
    attributes.iter().for_each(|attribute| request.add_attribute(attribute.clone()));
    let request = MessageEncoder::new().encode_into_bytes(request).map_err(|e| anyhow::anyhow!("{e}"))?;
    socket.set_read_timeout(Some(RETRY))?;
    let mut buffer = [0; 1_500];
    for _ in 0..tries {
        // Where nobody listens, the system says so at either call, at once.
        let Ok(len) = socket.send(&request).and_then(|_| socket.recv(&mut buffer)) else {
            std::thread::sleep(PAUSE);
            continue;
        };
        let Ok(Ok(answer)) = MessageDecoder::<Attribute>::new().decode_from_bytes(&buffer[..len]) else {
            continue;
        };
        if answer.method() == method {
            ensure!(answer.class() == MessageClass::SuccessResponse, "refused: {answer:?}");
            return Ok(answer);
        }
    }
    bail!("no answer from {:?}", socket.peer_addr())
}
