//! The engine's edges: where bytes come from, where they go, and the caller-owned buffers in between.
//!
//! Both buffers are arenas: one allocation at start, cleared and refilled for each batch, so that the data path
//! allocates nothing. An [`Outbox`] joins packets of one size to one destination into one [`Transmit`] that leaves as a
//! single `UDP_SEGMENT` send.

use std::net::SocketAddr;
use std::ops::Range;

use warren_common::ids::{DeviceId, RelayId};

/// Largest UDP payload over IPv4 (RFC 768), and so the largest batch one send can carry, in bytes.
pub const MAX_BATCH_BYTES: usize = 65_507;
/// Most segments of one `UDP_SEGMENT` send (Linux `UDP_MAX_SEGMENTS` before 6.9).
pub const MAX_SEGMENTS: usize = 64;
/// Most sends an [`Outbox`] holds before it must be drained.
pub const MAX_TRANSMITS: usize = 256;
/// Most packets a [`TunOut`] holds before it must be drained: more than one GRO batch can bring.
pub const MAX_TUN_PACKETS: usize = 1_024;
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
}

impl Transmit {
    /// Where its bytes are in the outbox.
    pub const fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.len
    }

    /// True if a datagram of `len` bytes to `to` may join at the end.
    fn accepts(&self, to: Destination, len: usize) -> bool {
        let size = self.segment_size.unwrap_or(self.len);
        self.to == to
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

    /// True if a datagram of `len` bytes fits, whatever its destination.
    pub fn has_room(&self, len: usize) -> bool {
        self.buffer.len() - self.used >= len && self.transmits.len() < MAX_TRANSMITS
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
    pub(crate) fn commit(&mut self, to: Destination, len: usize) {
        debug_assert!(self.used + len <= self.buffer.len(), "committed more than there was space for");
        let offset = self.used;
        self.used += len;
        if let Some(last) = self.transmits.last_mut()
            && last.accepts(to, len)
        {
            last.segment_size = Some(last.segment_size.unwrap_or(last.len));
            last.len += len;
            return;
        }
        self.transmits.push(Transmit { to, offset, len, segment_size: None });
    }

    /// Copies one datagram in. False if it doesn't fit.
    #[must_use]
    pub(crate) fn push(&mut self, to: Destination, datagram: &[u8]) -> bool {
        let Some(space) = self.space(datagram.len()) else { return false };
        space[..datagram.len()].copy_from_slice(datagram);
        self.commit(to, datagram.len());
        true
    }
}

/// Plaintext IP packets for the TUN: a caller-owned arena. Each packet has `headroom` zero bytes in front of it, so
/// that a shell can put its virtio header there without moving anything.
#[derive(Debug)]
pub struct TunOut {
    buffer: Box<[u8]>,
    used: usize,
    headroom: usize,
    packets: Vec<Range<usize>>,
}

impl Default for TunOut {
    fn default() -> Self {
        Self::new(0)
    }
}

impl TunOut {
    /// An arena of [`DEFAULT_ARENA_BYTES`] with `headroom` bytes before each packet.
    pub fn new(headroom: usize) -> Self {
        Self::with_capacity(DEFAULT_ARENA_BYTES, headroom)
    }

    /// An arena of `bytes` (at least [`MAX_BATCH_BYTES`]) with `headroom` bytes before each packet.
    pub fn with_capacity(bytes: usize, headroom: usize) -> Self {
        Self {
            buffer: vec![0; bytes.max(MAX_BATCH_BYTES)].into_boxed_slice(),
            used: 0,
            headroom,
            packets: Vec::with_capacity(MAX_TUN_PACKETS),
        }
    }

    /// Forgets everything in it; the memory stays.
    pub fn clear(&mut self) {
        self.used = 0;
        self.packets.clear();
    }

    /// True if there is nothing to write.
    pub fn is_empty(&self) -> bool {
        self.packets.is_empty()
    }

    /// How many packets there are.
    pub fn len(&self) -> usize {
        self.packets.len()
    }

    /// True if a packet of `len` bytes fits.
    pub fn has_room(&self, len: usize) -> bool {
        self.buffer.len() - self.used >= len + self.headroom && self.packets.len() < MAX_TUN_PACKETS
    }

    /// The packets, in order, without their headroom.
    pub fn iter(&self) -> impl Iterator<Item = &[u8]> {
        self.packets.iter().map(|range| &self.buffer[range.clone()])
    }

    /// The packets, in order, each with its headroom in front, writable.
    pub fn for_each_mut(&mut self, mut each: impl FnMut(&mut [u8])) {
        for range in &self.packets {
            each(&mut self.buffer[range.start - self.headroom..range.end]);
        }
    }

    /// Copies one packet in. False if it doesn't fit.
    #[must_use]
    pub(crate) fn push(&mut self, packet: &[u8]) -> bool {
        if !self.has_room(packet.len()) {
            return false;
        }
        let start = self.used + self.headroom;
        self.buffer[self.used..start].fill(0);
        self.used = start + packet.len();
        self.buffer[start..self.used].copy_from_slice(packet);
        self.packets.push(start..self.used);
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
        tun.for_each_mut(|bytes| assert_eq!(bytes, [0, 0, 0, 0, 1, 2]));
        tun.for_each_mut(|bytes| bytes[0] = 9);
        tun.clear();
        assert!(tun.push(&[3]));
        tun.for_each_mut(|bytes| assert_eq!(bytes, [0, 0, 0, 0, 3]));
        assert_eq!(tun.iter().collect::<Vec<_>>(), [[3]]);
    }
}
