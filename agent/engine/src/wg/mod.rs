//! The WireGuard transport: sessions with peers, driven by datagrams, packets and `now`; it does no I/O.
//!
//! A [`Device`] is one shard: our static key, the peers assigned to it, their sessions, timers and the handshake
//! limits. One task owns it. It speaks WireGuard as the whitepaper has it, so any implementation can be the other end.
//!
//! A peer that is only known costs little: no session, no timer, no key schedule. The first packet for it starts a
//! handshake and waits in a short queue; the first good initiation from it is answered. From then on a peer is *active*
//! until its last session is over, and then shrinks again.
//!
//! Call order: one input ([`Device::handle`], [`Device::seal`], [`Device::handle_timeout`], a command), then drain
//! [`Device::poll_transmit`] and [`Device::poll_event`], then sleep until [`Device::poll_timeout`].
//!
//! What we do beyond or unlike the whitepaper:
//! - sessions are wiped when they expire (180 s), not after three times that;
//! - when both sides initiate at once both sessions stay good for receiving, and neither handshake is lost; since each
//!   side may then hold the other for the initiator, a responder renews too, late, and not both at the same age;
//! - responses are bounded per initiation of ours rather than by cookie, so that a flood can't delay our handshakes;
//! - when the path changes an initiation under way is repeated byte for byte ([`Device::resend_handshake`]), and so is the
//!   first of a series that nothing answers ([`REPEAT_INITIATION_AFTER`]); until the session is confirmed its response is
//!   repeated as well.

mod device;
mod handshake;
mod index;
mod limiter;
mod loan;
mod mac;
mod message;
mod peer;
mod receive;
mod replay;
mod session;
#[cfg(test)]
mod tests;
mod timers;

use std::ops::Range;
use std::time::Duration;

pub use device::{Device, Sealer};
pub use limiter::{
    FREE_HANDSHAKES_PER_SECOND, MAX_FREE_BURST, MAX_PROVED_BURST, MAX_SOURCE_BURST, MAX_SOURCES,
    PROVED_HANDSHAKES_PER_SECOND, SOURCE_HANDSHAKES_PER_SECOND,
};
pub use loan::Loan;
pub use message::DATA_OVERHEAD;
pub use receive::{DataBatch, Initiation};
pub use replay::{MAX_REORDER, REPLAY_WINDOW_BITS};
use warren_common::time::UnixTime;

use crate::io::Source;

/// Messages after which a session is renewed (whitepaper, 6.1).
pub const REKEY_AFTER_MESSAGES: u64 = 1 << 60;
/// Messages after which a session is over (whitepaper, 6.1).
pub const REJECT_AFTER_MESSAGES: u64 = u64::MAX - (1 << 13);
/// Age at which the initiator of a session renews it when it sends (whitepaper, 6.1).
pub const REKEY_AFTER_TIME: Duration = Duration::from_secs(120);
/// Age at which a session is over (whitepaper, 6.1).
pub const REJECT_AFTER_TIME: Duration = Duration::from_secs(180);
/// Age at which the responder of a session renews it when it sends, if it has the greater public key: the initiator
/// didn't, and there is time left for several tries.
pub const RESPONDER_RENEWS_AFTER: Duration = Duration::from_secs(140);
/// The same for the smaller public key: both sides may be responders, and one starting is enough.
pub const RESPONDER_RENEWS_AFTER_LATER: Duration = Duration::from_secs(155);
/// How long a handshake is tried (whitepaper, 6.1).
pub const REKEY_ATTEMPT_TIME: Duration = Duration::from_secs(90);
/// Time between two initiations to one peer (whitepaper, 6.1); retries add up to a third of a second.
pub const REKEY_TIMEOUT: Duration = Duration::from_secs(5);
/// When the first initiation of a series goes out again, byte for byte, unless it was answered: the time since it was
/// sent. Beyond the whitepaper, since one lost datagram would make the first packet wait for [`REKEY_TIMEOUT`]; the first
/// is TCP's first timeout (RFC 6298 section 2). Who understands no repeats drops them as replays.
pub const REPEAT_INITIATION_AFTER: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(3)];
/// Silence after which a received packet is answered by a keepalive (whitepaper, 6.1).
pub const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// Initiations sent in one series: [`REKEY_ATTEMPT_TIME`] at [`REKEY_TIMEOUT`] each.
pub const MAX_HANDSHAKE_ATTEMPTS: u32 = (REKEY_ATTEMPT_TIME.as_secs() / REKEY_TIMEOUT.as_secs()) as u32;
/// Least time between two initiations that we accept from one peer: 50 a second, each costing 0.25 ms.
pub const INITIATION_INTERVAL: Duration = Duration::from_millis(20);
/// Peers of one device (shard): keeps live indices below 2 % of 2^24, and the map of keys below 5 MiB.
pub const MAX_PEERS: usize = 1 << 16;
/// Packets kept per peer until there is a session: a TCP SYN, a DNS query and their repeats; the oldest goes first.
pub const MAX_QUEUED_PACKETS: usize = 8;
/// Bytes kept for all peers together until there are sessions; when they are used up new packets are dropped.
pub const MAX_QUEUED_BYTES: usize = 4 << 20;
/// Responses and cookies waiting for [`Device::poll_transmit`], which the caller drains after each input (160 B each).
pub const MAX_REPLIES: usize = 64;
/// Events waiting for [`Device::poll_event`], which the caller drains after each input; the oldest goes first (24 B each).
pub const MAX_EVENTS: usize = 2 * MAX_PEERS;
/// Smallest buffer that [`Device::poll_transmit`] takes: one initiation.
pub const MIN_TRANSMIT_BUFFER: usize = message::INITIATION_LEN;
/// Largest packet that fits a UDP datagram with our overhead.
pub const MAX_PACKET: usize = 65_507 - DATA_OVERHEAD;
/// The packet size up to which padding may go, until [`Device::set_mtu`] says otherwise: IPv6's smallest.
pub const DEFAULT_MTU: usize = 1280;

/// Names one peer of one [`Device`]. Never reused: a handle of a removed peer finds nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerHandle {
    slot: u32,
    generation: u32,
}

impl PeerHandle {
    /// The peer's place: dense from 0, and free for another peer once this one is removed.
    pub const fn slot(self) -> u32 {
        self.slot
    }
}

/// Why a peer can't be added.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddPeerError {
    /// A peer with this key exists.
    #[error("a peer with this WireGuard key exists already")]
    Duplicate,
    /// The key is our own.
    #[error("the peer's WireGuard key is this device's own")]
    OwnKey,
    /// Agreement with the key gives zero whatever the other key is (RFC 7748, section 6.1).
    #[error("the WireGuard key is a low-order point and protects nothing")]
    LowOrderKey,
    /// There are [`MAX_PEERS`] peers.
    #[error("this shard has {MAX_PEERS} peers already")]
    TooMany,
}

/// Why [`Device::seal`] gave no datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    /// There is no session yet: a handshake was started and the packet waits for it (not an error for the sender).
    #[error("no session yet: the packet waits for the handshake")]
    Queued,
    /// There is no session yet, and [`MAX_QUEUED_BYTES`] packets wait already: the packet was dropped.
    #[error("no session yet, and too many packets wait for theirs: dropped")]
    QueueFull,
    /// The handle's peer was removed.
    #[error("no such peer")]
    UnknownPeer,
    /// `out` can't hold the padded packet and [`DATA_OVERHEAD`].
    #[error("the output buffer must hold {needed} bytes")]
    BufferTooSmall {
        /// Bytes that `out` must have.
        needed: usize,
    },
    /// The packet is empty (keepalives are made here) or longer than [`MAX_PACKET`].
    #[error("a packet must have 1 to {MAX_PACKET} bytes")]
    PacketSize,
}

/// Why a datagram was dropped. The text is a label for counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, thiserror::Error)]
pub enum DropReason {
    /// Type, reserved bytes or length fit no message.
    #[error("malformed")]
    Malformed,
    /// MAC1 is wrong: the sender doesn't know our public key.
    #[error("bad-mac1")]
    BadMac1,
    /// We are busy, and the sender was asked to prove its address by a cookie.
    #[error("cookie-sent")]
    CookieSent,
    /// The sender proved its address but starts too many handshakes, or all proved senders together do.
    #[error("rate-limited")]
    RateLimited,
    /// The handshake message is forged, damaged, or made with another key or pre-shared key.
    #[error("bad-handshake")]
    BadHandshake,
    /// The initiation is authentic, but its sender is no peer of ours.
    #[error("unknown-peer")]
    UnknownPeer,
    /// The initiation isn't newer than the last: a replay.
    #[error("replayed-initiation")]
    ReplayedInitiation,
    /// The peer's last initiation was accepted less than [`INITIATION_INTERVAL`] ago.
    #[error("initiation-too-soon")]
    InitiationTooSoon,
    /// No session or handshake has this receiver index.
    #[error("unknown-index")]
    UnknownIndex,
    /// Too many bad responses came for this handshake.
    #[error("too-many-responses")]
    TooManyResponses,
    /// The cookie reply doesn't answer our last message.
    #[error("bad-cookie")]
    BadCookie,
    /// The session is over, by age or by count.
    #[error("session-expired")]
    SessionExpired,
    /// The counter was seen before, or is too far behind.
    #[error("replayed")]
    Replayed,
    /// The message isn't authentic.
    #[error("bad-tag")]
    BadTag,
    /// The message is authentic, but holds no whole IP packet.
    #[error("not-ip")]
    NotIp,
}

/// What a datagram was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Received {
    /// A packet from `peer`. Whether it may use the inner source address is the caller's to check.
    Data {
        /// Who sealed it.
        peer: PeerHandle,
        /// Where the IP packet is in the datagram, without padding.
        packet: Range<usize>,
    },
    /// An empty message from `peer`.
    Keepalive {
        /// Who sealed it.
        peer: PeerHandle,
    },
    /// `peer` starts a handshake; the response is ready to be transmitted.
    Initiation {
        /// Who signed it.
        peer: PeerHandle,
    },
    /// `peer` answered ours: there is a session.
    Response {
        /// Who signed it.
        peer: PeerHandle,
    },
    /// A busy peer wants its cookie returned; the next initiation will. Proves nothing about the source.
    Cookie {
        /// Whom our message was for.
        peer: PeerHandle,
    },
}

impl Received {
    /// The peer that provably made this datagram just now, so that its source is a way to reach it.
    pub const fn authenticated(&self) -> Option<PeerHandle> {
        match self {
            Self::Data { peer, .. }
            | Self::Keepalive { peer }
            | Self::Initiation { peer }
            | Self::Response { peer } => Some(*peer),
            Self::Cookie { .. } => None,
        }
    }
}

/// A datagram to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transmit {
    /// Where to.
    pub to: Destination,
    /// Bytes written to the buffer.
    pub len: usize,
    /// What it is.
    pub kind: TransmitKind,
}

/// Where a datagram goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination {
    /// To the peer by its best path.
    Peer(PeerHandle),
    /// Back to where the message came from that it answers.
    Reply {
        /// Where that was.
        source: Source,
        /// Whom it is for, if that is proved.
        peer: Option<PeerHandle>,
    },
}

/// What a datagram to send is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TransmitKind {
    /// An initiation: the start of a handshake.
    Initiation,
    /// A response: the other half.
    Response,
    /// A cookie for a sender while we are busy.
    Cookie,
    /// An empty data message.
    Keepalive,
    /// A packet that waited for a session.
    Data,
}

/// What happened to a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Packets to the peer go out at once from now on.
    SessionEstablished {
        /// Which peer.
        peer: PeerHandle,
        /// It replaces a session that is still good.
        renewed: bool,
    },
    /// The last session is over; the next packet starts a handshake.
    SessionExpired {
        /// Which peer.
        peer: PeerHandle,
    },
    /// No answer in [`MAX_HANDSHAKE_ATTEMPTS`] tries; packets that waited are dropped. The next one tries again.
    HandshakeFailed {
        /// Which peer.
        peer: PeerHandle,
    },
}

/// Why the device wants to be woken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum WakeReason {
    /// An initiation wasn't answered.
    HandshakeRetry,
    /// A packet was received and nothing was sent since.
    Keepalive,
    /// A packet was sent and nothing was received since: the session may be dead.
    AnswerDue,
    /// A persistent keepalive is due.
    PersistentKeepalive,
    /// A session has reached [`REJECT_AFTER_TIME`].
    SessionExpiry,
}

/// A peer's counters since it was added.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PeerStats {
    /// Bytes of authentic datagrams received from it.
    pub rx_bytes: u64,
    /// Bytes of datagrams made for it.
    pub tx_bytes: u64,
    /// When the last session began.
    pub last_handshake: Option<UnixTime>,
}

/// A device's counters of what its bounds made it drop.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Packets that waited for a session and were dropped for newer ones, for want of room, or with the handshake.
    pub queued_packets_dropped: u64,
    /// Responses and cookies dropped since [`MAX_REPLIES`] waited.
    pub replies_dropped: u64,
    /// Events dropped since [`MAX_EVENTS`] waited.
    pub events_dropped: u64,
    /// Cookies sent: how often we were too busy to answer at once.
    pub cookies_sent: u64,
}

/// The shard whose device must handle `datagram`: all but initiations say. Those go to any device's
/// [`Device::read_initiation`] and from there to the one that has the peer.
pub fn receiver_shard(datagram: &[u8]) -> Option<u8> {
    message::receiver(datagram).map(index::shard_of)
}
