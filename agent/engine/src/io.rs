//! The engine's edges: where bytes come from, where they go, and the caller-owned buffers in between.
//!
//! Both buffers are arenas: one allocation at start, cleared and refilled for each batch, so that the data path
//! allocates nothing. An [`Outbox`] joins packets of one size to one destination into one [`Transmit`] that leaves as a
//! single `UDP_SEGMENT` send.

use std::net::SocketAddr;
use std::ops::Range;

use warren_common::ids::{DeviceId, RelayId};

use crate::offload::Ecn;

mod tun;

pub use tun::{Added, Burst, MAX_OPEN_FRAMES, MAX_TUN_PACKETS, TunOffload, TunOut};

/// Largest UDP payload over IPv4 (RFC 768), and so the largest batch one send can carry, in bytes.
pub const MAX_BATCH_BYTES: usize = 65_507;
/// Most segments of one `UDP_SEGMENT` send (Linux `UDP_MAX_SEGMENTS` before 6.9).
pub const MAX_SEGMENTS: usize = 64;
/// Most sends an [`Outbox`] holds before it must be drained.
pub const MAX_TRANSMITS: usize = 256;
/// Bytes of an [`Outbox`] or [`TunOut`] made by `new`: four full batches.
pub const DEFAULT_ARENA_BYTES: usize = 4 * 65_536;

/// Where a batch of datagrams came from. Whoever sent it is still unknown: only what authenticates is believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Source {
    /// A UDP socket.
    Direct {
        /// Which of our sockets, as numbered in [`LocalSocket::id`].
        socket: u8,
        /// The sender's address as we see it.
        remote: SocketAddr,
    },
    /// A relay, which vouches for the sender's device id.
    Relay {
        /// The relay that delivered it.
        relay: RelayId,
        /// The device that sent it, says the relay.
        device: DeviceId,
    },
    /// The coordinator's signal channel: sealed probe messages only.
    Signal {
        /// The device that sent it, says the coordinator.
        device: DeviceId,
    },
}

/// Where a datagram is to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Destination {
    /// Straight through a UDP socket.
    Direct {
        /// Which of our sockets, as numbered in [`LocalSocket::id`].
        socket: u8,
        /// The receiver's address.
        remote: SocketAddr,
    },
    /// Through a relay that is connected.
    Relay {
        /// The relay to hand it to.
        relay: RelayId,
        /// The device it is for.
        device: DeviceId,
    },
}

/// How the datagrams of one batch lie, and what the network did to them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Arrival {
    /// Bytes of each datagram (the last may be shorter); 0 for a single one.
    pub stride: usize,
    /// The congestion mark of their IP packets.
    pub ecn: Ecn,
    /// They waited for us for too long ([`crate::queue::Standing`]): one sender is to be told, by a mark or a loss.
    pub tell: bool,
}

impl Arrival {
    /// Bytes of each datagram of a batch of `len`; at least one.
    pub(crate) const fn stride_of(&self, len: usize) -> usize {
        match (self.stride, len) {
            (0, 0) => 1,
            (0, len) => len,
            (stride, _) => stride,
        }
    }
}

/// One UDP socket of ours and one address it can be reached at: a candidate for peers on the same network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LocalSocket {
    /// The shell's number for the socket; a socket with several addresses appears once for each.
    pub id: u8,
    /// A concrete local address (never unspecified) and the socket's port.
    pub addr: SocketAddr,
}

/// One send: one datagram, or several of `segment_size` bytes (the last may be shorter) laid end to end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transmit {
    /// Where it goes.
    pub to: Destination,
    /// Where its bytes begin in the outbox.
    pub offset: usize,
    /// How many bytes there are.
    pub len: usize,
    /// The size of each segment; `None` for a single datagram.
    pub segment_size: Option<usize>,
    /// The congestion mark of its IP packets.
    pub ecn: Ecn,
    /// It must arrive whole or not at all: no fragments (DF), whatever the kernel believes of the path.
    pub whole: bool,
}

impl Transmit {
    /// Where its bytes are in the outbox.
    pub const fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.len
    }

    /// True if a datagram of `len` bytes to `to` may join at the end.
    fn accepts(&self, to: Destination, ecn: Ecn, len: usize) -> bool {
        let size = self.segment_size.unwrap_or(self.len);
        self.to == to
            && !self.whole
            && self.ecn == ecn
            && len <= size
            && self.len.is_multiple_of(size) // a shorter segment closes the batch
            && self.len / size < MAX_SEGMENTS
            && self.len + len <= MAX_BATCH_BYTES
    }
}

/// Datagrams to send: a caller-owned arena. Drain and [`clear`](Self::clear) it between calls to the engine whenever
/// [`has_room`](Self::has_room) is false; what doesn't fit is dropped and counted.
#[derive(Debug)]
pub struct Outbox {
    buffer: Box<[u8]>,
    used: usize,
    transmits: Vec<Transmit>,
}

impl Default for Outbox {
    fn default() -> Self {
        Self::new()
    }
}

impl Outbox {
    /// An outbox of [`DEFAULT_ARENA_BYTES`].
    pub fn new() -> Self {
        Self::with_capacity(DEFAULT_ARENA_BYTES)
    }

    /// An outbox of `bytes`, at least [`MAX_BATCH_BYTES`].
    pub fn with_capacity(bytes: usize) -> Self {
        Self {
            buffer: vec![0; bytes.max(MAX_BATCH_BYTES)].into_boxed_slice(),
            used: 0,
            transmits: Vec::with_capacity(MAX_TRANSMITS),
        }
    }

    /// Forgets everything in it; the memory stays.
    pub fn clear(&mut self) {
        self.used = 0;
        self.transmits.clear();
    }

    /// True if there is nothing to send.
    pub fn is_empty(&self) -> bool {
        self.transmits.is_empty()
    }

    /// Bytes to send.
    pub fn bytes(&self) -> usize {
        self.used
    }

    /// True if a datagram of `len` bytes fits, whatever its destination.
    pub fn has_room(&self, len: usize) -> bool {
        self.buffer.len() - self.used >= len && self.transmits.len() < MAX_TRANSMITS
    }

    /// True if more datagrams like the last may join it, so that it is worth keeping for a moment if more are at hand.
    pub fn is_last_open(&self) -> bool {
        self.transmits
            .last()
            .is_some_and(|last| last.accepts(last.to, last.ecn, last.segment_size.unwrap_or(last.len)))
    }

    /// Forgets everything but the last batch, which moves to the front.
    pub fn clear_but_last(&mut self) {
        let Some(mut last) = self.transmits.pop() else { return };
        self.buffer.copy_within(last.range(), 0);
        last.offset = 0;
        self.used = last.len;
        self.transmits.clear();
        self.transmits.push(last);
    }

    /// How many batches there are.
    pub fn len(&self) -> usize {
        self.transmits.len()
    }

    /// What to send, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&Transmit, &[u8])> {
        self.transmits.iter().map(|t| (t, &self.buffer[t.range()]))
    }

    /// The single datagrams, in order, with batches taken apart.
    pub fn datagrams(&self) -> impl Iterator<Item = (Destination, &[u8])> {
        self.iter().flat_map(|(t, bytes)| {
            bytes.chunks(t.segment_size.unwrap_or(t.len).max(1)).map(|segment| (t.to, segment))
        })
    }

    /// Where the next datagram may be written, if [`has_room`](Self::has_room) for `len` bytes; then
    /// [`commit`](Self::commit) what was written.
    pub(crate) fn space(&mut self, len: usize) -> Option<&mut [u8]> {
        if !self.has_room(len) {
            return None;
        }
        self.buffer.get_mut(self.used..)
    }

    /// Takes the `len` bytes just written to [`space`](Self::space) as one datagram to `to`.
    pub(crate) fn commit(&mut self, to: Destination, ecn: Ecn, len: usize) {
        debug_assert!(self.used + len <= self.buffer.len(), "committed more than there was space for");
        let offset = self.used;
        self.used += len;
        if let Some(last) = self.transmits.last_mut()
            && last.accepts(to, ecn, len)
        {
            last.segment_size = Some(last.segment_size.unwrap_or(last.len));
            last.len += len;
            return;
        }
        self.transmits.push(Transmit { to, offset, len, segment_size: None, ecn, whole: false });
    }

    /// Copies one datagram in that must not be fragmented. False if it doesn't fit.
    #[must_use]
    pub(crate) fn push_whole(&mut self, to: Destination, datagram: &[u8]) -> bool {
        let Some(space) = self.space(datagram.len()) else { return false };
        space[..datagram.len()].copy_from_slice(datagram);
        let (offset, len, ecn) = (self.used, datagram.len(), Ecn::NotCapable);
        self.used += len;
        self.transmits.push(Transmit { to, offset, len, segment_size: None, ecn, whole: true });
        true
    }

    /// Copies one datagram in. False if it doesn't fit.
    #[must_use]
    pub(crate) fn push(&mut self, to: Destination, datagram: &[u8]) -> bool {
        let Some(space) = self.space(datagram.len()) else { return false };
        space[..datagram.len()].copy_from_slice(datagram);
        self.commit(to, Ecn::NotCapable, datagram.len());
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn to(port: u16) -> Destination {
        Destination::Direct { socket: 0, remote: SocketAddr::from(([192, 0, 2, 1], port)) }
    }

    #[test]
    fn same_size_to_one_destination_is_one_batch_and_a_shorter_one_closes_it() {
        let mut out = Outbox::new();
        for len in [1_000, 1_000, 400, 1_000] {
            assert!(out.push(to(1), &vec![7; len]));
        }
        assert!(out.push(to(2), &[1; 1_000]));
        let seen: Vec<_> = out.iter().map(|(t, bytes)| (t.to, bytes.len(), t.segment_size)).collect();
        assert_eq!(seen, [(to(1), 2_400, Some(1_000)), (to(1), 1_000, None), (to(2), 1_000, None)]);
        let sizes: Vec<_> = out.datagrams().map(|(_, bytes)| bytes.len()).collect();
        assert_eq!(sizes, [1_000, 1_000, 400, 1_000, 1_000]);
        out.clear();
        assert!(out.is_empty() && out.has_room(DEFAULT_ARENA_BYTES));
    }

    #[test]
    fn an_open_batch_can_be_kept_for_more() {
        let mut out = Outbox::new();
        for n in 0..50 {
            assert!(out.push(to(1), &[n; 1_452]));
        }
        // 45 fit one send; the five behind them wait for company.
        assert_eq!((out.len(), out.is_last_open()), (2, true));
        out.clear_but_last();
        assert_eq!((out.len(), out.bytes()), (1, 5 * 1_452));
        assert!(out.push(to(1), &[50; 1_452]));
        let first: Vec<u8> = out.datagrams().map(|(_, bytes)| bytes[0]).collect();
        assert_eq!((out.len(), first), (1, vec![45, 46, 47, 48, 49, 50]));
        assert!(out.push(to(1), &[51; 100]));
        assert!(!out.is_last_open(), "a shorter one closes it");
        out.clear();
        out.clear_but_last();
        assert!(out.is_empty() && !out.is_last_open());
    }

    #[test]
    fn what_must_stay_whole_is_alone() {
        let mut out = Outbox::new();
        assert!(out.push(to(1), &[0; 100]) && out.push_whole(to(1), &[0; 100]) && out.push(to(1), &[0; 100]));
        assert_eq!(out.iter().map(|(t, _)| t.whole).collect::<Vec<_>>(), [false, true, false]);
    }

    #[test]
    fn a_longer_one_starts_a_new_batch() {
        let mut out = Outbox::new();
        assert!(out.push(to(1), &[0; 100]) && out.push(to(1), &[0; 101]));
        assert_eq!(out.iter().count(), 2);
    }

    #[test]
    fn batches_and_arena_are_bounded() {
        let mut out = Outbox::new();
        while out.push(to(1), &[0; 100]) {}
        assert!(out.iter().all(|(t, _)| t.len <= MAX_SEGMENTS * 100));
        out.clear();
        while out.push(to(1), &[0; 1_500]) {}
        assert!(out.iter().all(|(t, _)| t.len <= MAX_BATCH_BYTES));
        out.clear();
        let pushed = (0u16..).take_while(|port| out.push(to(*port), &[0; 10])).count();
        assert_eq!(pushed, MAX_TRANSMITS);

        let mut tun = TunOut::new(10);
        let pushed = (0..).take_while(|_| tun.push(&[0; 20])).count();
        assert_eq!(pushed, MAX_TUN_PACKETS);
    }

    #[test]
    fn headroom_is_zero_and_in_front() {
        let mut tun = TunOut::new(4);
        assert!(tun.push(&[1, 2]));
        assert_eq!(tun.frames().next().unwrap().collect::<Vec<_>>(), [[0, 0, 0, 0, 1, 2]]);
        assert_eq!(tun.iter().collect::<Vec<_>>(), [[1, 2]]);
        tun.clear();
        assert!(tun.is_empty());
    }
}
