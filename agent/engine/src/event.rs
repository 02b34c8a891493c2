//! What an engine tells its shell, and why it wants to be woken.

use std::net::SocketAddr;
use std::time::Duration;

use serde::Serialize;
use warren_common::filter::RuleId;
use warren_common::ids::{DeviceId, RelayId};

use crate::filter::Disagreement;

/// How packets reach a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub enum Path {
    /// Straight, by UDP.
    Direct {
        /// The peer's address.
        endpoint: SocketAddr,
    },
    /// Through a relay.
    Relay {
        /// The relay.
        relay: RelayId,
    },
    /// Not at all, for now.
    None,
}

/// Names a ping from `Engine::start_ping` to its result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PingToken(pub u64);

/// Something the shell should know or do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Send `sealed` to `device` over the control session's signal channel: no relay carries it now.
    Signal {
        /// The peer it is for.
        device: DeviceId,
        /// A sealed probe message, at most 1 200 bytes.
        sealed: Vec<u8>,
    },
    /// A peer without a direct way listens on this relay, or will should its present one fail: connect, and keep the
    /// connection until [`LEAVE_AFTER`](crate::home::LEAVE_AFTER) after the last packet through it or the last such word.
    RelayWanted {
        /// The relay.
        relay: RelayId,
    },
    /// This is the best relay to listen on: connect to it for good.
    HomeRelay {
        /// The relay; `None` if the netmap has none.
        relay: Option<RelayId>,
    },
    /// Peers find us at this relay from now on: report it to the coordinator as the home relay, and stay connected to it
    /// until the next such word.
    HomeAnnounced {
        /// The relay; `None` if there is none.
        relay: Option<RelayId>,
    },
    /// How long a connection to a relay over UDP may be silent before it needs a word, or the NAT forgets it: at most
    /// [`KEEPALIVE`](crate::relay_link::KEEPALIVE), which holds until this says otherwise.
    RelayKeepalive {
        /// So long.
        pause: Duration,
    },
    /// Packets to a peer take another way now.
    PathChanged {
        /// The peer.
        device: DeviceId,
        /// The way.
        path: Path,
    },
    /// A WireGuard handshake with a peer is done.
    SessionEstablished {
        /// The peer.
        device: DeviceId,
    },
    /// A flow ended because policy no longer allows it.
    FlowEnded {
        /// The peer at the other end, if it is still known.
        device: Option<DeviceId>,
        /// The rule that had allowed it.
        rule: RuleId,
    },
    /// The two ends judge a connection differently: the peer let it out, and this end refuses it. Told again once a
    /// minute while it goes on.
    Disagreement {
        /// The peer.
        device: DeviceId,
        /// What this end refuses.
        about: Disagreement,
    },
    /// Exactly these extra IPv4 UDP sockets should be open, each on a port of its own: open and close, then tell
    /// `Engine::handle_extra_sockets` which are open. Where it is not done, some NATs are not got through and keep-alives
    /// are denser than they need be.
    SocketsWanted {
        /// Their numbers, as in [`LocalSocket::id`](crate::io::LocalSocket::id); at least 16.
        ids: Vec<u8>,
    },
    /// The machine slept, or a way died: connections over the network may be dead without a sign. See whether relays and
    /// coordinator still answer.
    NetworkSuspect,
    /// The lease of everything granted is over: nothing passes until an update renews it.
    LeaseEnded,
    /// A ping came back, or didn't.
    PingResult {
        /// Which ping.
        token: PingToken,
        /// The way it went.
        path: Path,
        /// The round-trip time; `None` if no answer came inside the window.
        rtt: Option<Duration>,
    },
}

/// Why an engine wants to be woken, first the most urgent. Each wake-up is counted under its reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum WakeReason {
    /// A WireGuard timer: handshake retry, rekey, passive keep-alive, erasure of keys.
    WireGuard,
    /// A path to a peer in use: probe round, distress check, keep-alive, a ping given up, or its going idle.
    Path,
    /// A STUN request to repeat or to give up.
    Stun,
    /// A filter rule's time window opens or closes, or flows to forget.
    Filter,
    /// The lease ends.
    Lease,
}

impl WakeReason {
    /// Every reason, in order.
    pub const ALL: [Self; 5] = [Self::WireGuard, Self::Path, Self::Stun, Self::Filter, Self::Lease];
}
