//! What a relay counts. No payload, no address, no name: numbers only.

use warren_common::wire::relay::RefusalCode;

macro_rules! drop_reasons {
    ($($(#[$doc:meta])* $name:ident = $word:literal,)*) => {
        /// Why a frame was dropped.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum DropReason {
            $($(#[$doc])* $name,)*
        }

        impl DropReason {
            /// Every reason, in the order of [`Counters`].
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// A stable word: the label of the counter.
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$name => $word,)*
                }
            }
        }
    };
}

drop_reasons!(
    /// Data on a connection that has not authenticated.
    NotAuthenticated = "not-authenticated",
    /// Above the device's rate.
    RateLimited = "rate-limited",
    /// From or to a session that must present a newer token first.
    Suspended = "suspended",
    /// The destination is not in the sender's token.
    NotPermitted = "not-permitted",
    /// The destination is not connected.
    NotConnected = "not-connected",
    /// The destination's queue was full: the oldest data of whoever sent most of it went.
    QueueFull = "queue-full",
    /// The destination's queue was full of handshake messages.
    HandshakeQueueFull = "handshake-queue-full",
    /// The destination's queue had its part of what may wait for all devices together.
    MemoryFull = "memory-full",
    /// Queued, but then access was withdrawn.
    Withdrawn = "withdrawn",
    /// A notice that a packet went nowhere, above the rate of notices.
    NoticeLimited = "notice-limited",
    /// A token above the rate of tokens.
    RefreshLimited = "refresh-limited",
    /// A token older than the one in force.
    OldToken = "old-token",
    /// A frame of a type this version does not know.
    UnknownFrame = "unknown-frame",
    /// A UDP datagram that can't be one of a device.
    UdpMalformed = "udp-malformed",
    /// A UDP datagram of no session there is (any more).
    UdpUnknown = "udp-unknown",
    /// A UDP datagram that is not authentic.
    UdpForged = "udp-forged",
    /// A UDP datagram that came before, or so late that it can't be told.
    UdpReplayed = "udp-replayed",
);

/// Totals since the relay started.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Packets put into a destination's queue or sent to it.
    pub forwarded_packets: u64,
    /// Those of them that were sent as plain UDP.
    pub forwarded_udp_packets: u64,
    /// Their payload in bytes.
    pub forwarded_bytes: u64,
    dropped: [u64; DropReason::ALL.len()],
    closed: [u64; RefusalCode::KNOWN.len()],
}

impl Counters {
    /// Frames dropped for `reason`.
    pub const fn dropped(&self, reason: DropReason) -> u64 {
        self.dropped[reason as usize]
    }

    /// Connections that the relay closed for `reason`.
    pub fn closed(&self, reason: RefusalCode) -> u64 {
        RefusalCode::KNOWN.iter().position(|known| *known == reason).map_or(0, |at| self.closed[at])
    }

    pub(super) const fn forward(&mut self, payload: usize, udp: bool) {
        self.forwarded_packets += 1;
        self.forwarded_udp_packets += udp as u64;
        self.forwarded_bytes += payload as u64;
    }

    pub(super) const fn drop(&mut self, reason: DropReason, frames: u64) {
        self.dropped[reason as usize] += frames;
    }

    pub(super) fn close(&mut self, reason: RefusalCode) {
        if let Some(at) = RefusalCode::KNOWN.iter().position(|known| *known == reason) {
            self.closed[at] += 1;
        }
    }
}

/// What a relay holds now, and its totals.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Sessions.
    pub clients: usize,
    /// Connections that have not authenticated.
    pub half_open: usize,
    /// Data that waits, in bytes, overhead included.
    pub queued_bytes: usize,
    /// Devices whose minimum revision is remembered.
    pub minimums: usize,
    /// The revision that every token must have.
    pub floor: u64,
    /// Totals.
    pub counters: Counters,
}
