//! Packets for the TUN, joined to super-frames where it takes them.

use std::ops::Range;

use arrayvec::ArrayVec;

use super::{DEFAULT_ARENA_BYTES, MAX_BATCH_BYTES};
use crate::offload::coalesce::{Class, Joint, classify, may_be_one_flow};
use crate::offload::vnet;

/// Most frames a [`TunOut`] holds before it must be drained: more than one GRO batch can bring.
pub const MAX_TUN_PACKETS: usize = 1_024;
/// Flows whose frames are joined at a time, a count: packets of more flows than this in one batch go one by one.
pub const MAX_OPEN_FRAMES: usize = 8;

const NO_PIECE: u32 = u32::MAX;

/// What a TUN takes beyond single packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TunOffload {
    /// Super-frames of TCP.
    pub tcp: bool,
    /// Super-frames of UDP.
    pub udp: bool,
}

/// Plaintext IP packets for the TUN: a caller-owned arena. Each frame has `headroom` bytes in front of it: zeros, or its
/// virtio header if the arena was made for a TUN that takes super-frames.
#[derive(Debug)]
pub struct TunOut {
    buffer: Box<[u8]>,
    used: usize,
    headroom: usize,
    offload: TunOffload,
    frames: Vec<Frame>,
    pieces: Vec<Piece>,
    open: ArrayVec<u32, MAX_OPEN_FRAMES>,
    /// Frames before this one are settled.
    unsettled: usize,
}

/// One packet, or several that were joined.
#[derive(Clone, Copy, Debug)]
struct Frame {
    /// Whose it is, for the verdict.
    peer: u32,
    first: u32,
    last: u32,
    /// Length of the first packet.
    head_len: usize,
    joint: Option<Joint>,
    dropped: bool,
}

/// A range of the arena; a frame is a chain of them. Those of one flow lie end to end, so that the chain is one piece
/// unless flows take turns.
#[derive(Clone, Copy, Debug)]
struct Piece {
    start: usize,
    end: usize,
    next: u32,
}

/// What became of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Added {
    /// It is in.
    Yes,
    /// It is in, alone, since its checksum is wrong.
    BadChecksum,
    /// There is no room.
    Full,
}

/// Packets of one flow that are judged as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Burst {
    /// How many.
    pub packets: u32,
    /// Bytes of all of them as IP packets.
    pub bytes: usize,
    /// Payload behind what the judged packet itself has, in bytes.
    pub more_payload: u32,
}

impl Burst {
    /// Of one packet.
    pub const fn one(len: usize) -> Self {
        Self { packets: 1, bytes: len, more_payload: 0 }
    }
}

impl Default for TunOut {
    fn default() -> Self {
        Self::new(0)
    }
}

impl TunOut {
    /// An arena of [`DEFAULT_ARENA_BYTES`] for single packets, with `headroom` zero bytes before each.
    pub fn new(headroom: usize) -> Self {
        Self::with_capacity(DEFAULT_ARENA_BYTES, headroom, TunOffload::default())
    }

    /// An arena of [`DEFAULT_ARENA_BYTES`] for a TUN with virtio headers: each frame has its own in front.
    pub fn vectored(offload: TunOffload) -> Self {
        Self::with_capacity(DEFAULT_ARENA_BYTES, vnet::HEADER_LEN, offload)
    }

    /// Another arena, empty, for the same TUN.
    pub fn alike(&self) -> Self {
        Self::with_capacity(self.buffer.len(), self.headroom, self.offload)
    }

    fn with_capacity(bytes: usize, headroom: usize, offload: TunOffload) -> Self {
        Self {
            buffer: vec![0; bytes.max(MAX_BATCH_BYTES)].into_boxed_slice(),
            used: 0,
            headroom,
            offload,
            frames: Vec::with_capacity(MAX_TUN_PACKETS),
            pieces: Vec::with_capacity(MAX_TUN_PACKETS),
            open: ArrayVec::new(),
            unsettled: 0,
        }
    }

    /// True if packets of one flow are joined.
    pub fn joins(&self) -> bool {
        self.offload != TunOffload::default()
    }

    /// Forgets everything in it; the memory stays.
    pub fn clear(&mut self) {
        self.used = 0;
        self.frames.clear();
        self.pieces.clear();
        self.open.clear();
        self.unsettled = 0;
    }

    /// True if there is nothing to write.
    pub fn is_empty(&self) -> bool {
        self.frames.iter().all(|frame| frame.dropped)
    }

    /// How many frames there are.
    pub fn len(&self) -> usize {
        self.frames.iter().filter(|frame| !frame.dropped).count()
    }

    /// True if a packet of `len` bytes fits.
    pub fn has_room(&self, len: usize) -> bool {
        self.buffer.len() - self.used >= len + self.headroom && self.pieces.len() < MAX_TUN_PACKETS
    }

    /// The packets, in order, without their headroom. Of a joined frame that is in several pieces the first only: see
    /// [`frames`](Self::frames).
    pub fn iter(&self) -> impl Iterator<Item = &[u8]> {
        self.frames().filter_map(|mut pieces| pieces.next()?.get(self.headroom..))
    }

    /// The frames, in order, each as the pieces that make it up; the first piece begins with the headroom.
    pub fn frames(&self) -> impl Iterator<Item = impl Iterator<Item = &[u8]>> {
        self.frames.iter().filter(|frame| !frame.dropped).map(|frame| self.pieces_of(frame))
    }

    fn pieces_of(&self, frame: &Frame) -> impl Iterator<Item = &[u8]> {
        let mut next = frame.first;
        let mut headroom = self.headroom;
        std::iter::from_fn(move || {
            let piece = self.pieces.get(next as usize)?;
            next = piece.next;
            self.buffer.get(piece.start - std::mem::take(&mut headroom)..piece.end)
        })
    }

    /// Copies one packet in that needs no verdict. False if it doesn't fit.
    #[must_use]
    pub(crate) fn push(&mut self, packet: &[u8]) -> bool {
        self.add_frame(u32::MAX, packet, None) && {
            self.unsettled = self.frames.len();
            true
        }
    }

    /// Copies a packet of `peer` in, joined with the ones before if it may be; [`settle`](Self::settle) must follow.
    #[must_use]
    pub fn add(&mut self, peer: u32, packet: &[u8]) -> Added {
        if !self.joins() {
            return if self.add_frame(peer, packet, None) { Added::Yes } else { Added::Full };
        }
        if !self.has_room(packet.len()) {
            return Added::Full;
        }
        let class = classify(packet);
        let segment = match class {
            Class::Segment(segment) if segment.tcp && self.offload.tcp => Some(segment),
            Class::Segment(segment) if !segment.tcp && self.offload.udp => Some(segment),
            _ => None,
        };
        let mut at = self.open.len();
        while at > 0 {
            at -= 1;
            let Some(frame) = self.frames.get_mut(self.open[at] as usize) else { continue };
            let Some(piece) = self.pieces.get(frame.first as usize) else { continue };
            let Some(joint) = &mut frame.joint else { continue };
            let head = &self.buffer[piece.start..piece.start + frame.head_len];
            if frame.peer != peer || !may_be_one_flow(head, packet) {
                continue;
            }
            if let Some(segment) = segment
                && joint.join(head, packet, segment)
            {
                self.append(self.open[at], &packet[segment.header_len..]);
                return Added::Yes;
            }
            // What comes later must not overtake this packet.
            self.open.remove(at);
        }
        if !self.add_frame(peer, packet, segment.map(Joint::new)) {
            return Added::Full;
        }
        if segment.is_some() {
            if self.open.is_full() {
                self.open.remove(0);
            }
            self.open.push((self.frames.len() - 1) as u32); // at most MAX_TUN_PACKETS
        }
        if class == Class::BadChecksum { Added::BadChecksum } else { Added::Yes }
    }

    /// Ends the joining: `admit` says of each frame whether it passes, from its peer, its first packet and what is
    /// behind that.
    pub fn settle(&mut self, mut admit: impl FnMut(u32, &[u8], Burst) -> bool) {
        self.open.clear();
        let Self { frames, pieces, buffer, headroom, .. } = self;
        for frame in frames.iter_mut().skip(self.unsettled) {
            let Some(piece) = pieces.get(frame.first as usize) else { continue };
            let head = piece.start..piece.start + frame.head_len;
            let burst = match &frame.joint {
                Some(joint) => Burst {
                    packets: u32::from(joint.packets()),
                    bytes: joint.bytes(),
                    more_payload: joint.more_payload() as u32, // of at most 64 KiB
                },
                None => Burst::one(frame.head_len),
            };
            if !admit(frame.peer, &buffer[head.clone()], burst) {
                frame.dropped = true;
            } else if let Some(joint) = &frame.joint
                && joint.packets() > 1
            {
                let header = joint.finish(&mut buffer[head.clone()]);
                buffer[head.start - *headroom..head.start].copy_from_slice(&header.to_bytes());
            }
        }
        self.unsettled = self.frames.len();
    }

    fn add_frame(&mut self, peer: u32, packet: &[u8], joint: Option<Joint>) -> bool {
        if !self.has_room(packet.len()) {
            return false;
        }
        let start = self.used + self.headroom;
        self.buffer[self.used..start].fill(0);
        self.used = start;
        let piece = self.copy(packet);
        let head_len = packet.len();
        self.frames.push(Frame { peer, first: piece, last: piece, head_len, joint, dropped: false });
        true
    }

    fn append(&mut self, frame: u32, payload: &[u8]) {
        let Some(last) = self.frames.get(frame as usize).map(|frame| frame.last) else { return };
        if let Some(piece) = self.pieces.get_mut(last as usize)
            && piece.end == self.used
        {
            let range = self.used..self.used + payload.len();
            self.buffer[range.clone()].copy_from_slice(payload);
            self.used = range.end;
            piece.end = range.end;
            return;
        }
        let piece = self.copy(payload);
        if let Some(last) = self.pieces.get_mut(last as usize) {
            last.next = piece;
        }
        if let Some(frame) = self.frames.get_mut(frame as usize) {
            frame.last = piece;
        }
    }

    /// A new piece; that it fits was checked.
    fn copy(&mut self, bytes: &[u8]) -> u32 {
        let range: Range<usize> = self.used..self.used + bytes.len();
        self.buffer[range.clone()].copy_from_slice(bytes);
        self.used = range.end;
        self.pieces.push(Piece { start: range.start, end: range.end, next: NO_PIECE });
        (self.pieces.len() - 1) as u32 // at most MAX_TUN_PACKETS
    }
}
