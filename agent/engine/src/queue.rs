//! Where packets wait for a busy tunnel: fair between flows, and short.
//!
//! A TUN's own queue is first come, first served, and counts frames, of which one may be a ping and another 64 KiB of a
//! download. So its owner empties it here at once, and takes out again by flow: flows take turns by bytes, and one that
//! sends less than its share (a ping, a key press, a handshake) is served before those that fill the queue, as in
//! FQ-CoDel (RFC 8290). A flow of which more than [`TARGET`] stands here over an [`INTERVAL`] is told
//! so by single marks or losses, ever more often until it slows down ([`Standing`], RFC 8289).
//!
//! All memory is one arena, allocated at start. When it is full the oldest frames go, which are those of the flows that
//! filled it.

use std::hash::{BuildHasher as _, Hasher as _};
use std::time::Duration;

use arrayvec::ArrayVec;
use warren_common::filter::{PROTO_ICMPV6, PROTO_TCP};
use warren_common::time::Instant;

use crate::flow::table::FlowHash;
use crate::offload::segment::split;
use crate::offload::vnet::HEADER_LEN;

/// Bytes of one flow that may stand here: half a millisecond's work of a busy loop. In bytes, not in time, since a wait is also
/// that for a processor that runs others, about which no sender can do anything: a flow of a few packets is never told.
pub const TARGET: u64 = 256 * 1_024;
/// Time over which a queue must stand to be more than a burst: a round trip through most networks.
pub const INTERVAL: Duration = Duration::from_millis(20);
/// A flow that sent nothing for so long begins anew: what it did before was a burst.
const PAUSE: Duration = Duration::from_millis(10);
/// [`TARGET`] for received datagrams of all flows in a socket, as the kernel counts memory.
pub const RECEIVED_TARGET: u64 = 192 * 1_024;
/// Bytes that wait at most: at 2 Gbit/s they take 4 ms, which a flow that ignores every sign gets.
pub const MAX_WAITING_BYTES: usize = 1 << 20;
/// Frames that wait at most, a count: small packets fill this before they fill the bytes.
pub const MAX_WAITING_FRAMES: usize = 2_048;
/// Frames that may be taken out at a time, a count.
pub const MAX_TAKEN: usize = 128;
/// Longest frame, in bytes: a virtio header and an IP packet.
pub const MAX_FRAME: usize = 65_536 + 64;

/// Buckets that flows are spread over, a count: few flows at a time are busy enough to wait.
const BUCKETS: usize = 64;
/// Bytes that a flow may send in its turn: a quarter of a super-frame, so that a few small packets need one turn.
const QUANTUM: i64 = 16_384;

const NONE: u32 = u32::MAX;

/// Tells a standing queue from a burst, and how often to say so (RFC 8289, section 5).
///
/// RFC 8289 goes by the shortest wait of an interval. Where a sender and the one who empties the queue take turns on one
/// processor, all of a turn comes at once and nothing is left in the end, however long the queue was. So what counts here is the most of each turn, and a queue that stayed empty for `PAUSE` begins anew.
#[derive(Clone, Copy, Debug)]
pub struct Standing {
    limit: u64,
    /// The most since the queue was last empty, and of the time before that.
    most: u64,
    most_before: u64,
    is_empty: bool,
    emptied: Instant,
    /// When it will have been too much for an interval; absent while it is little.
    too_long_at: Option<Instant>,
    /// While it is being said: when next.
    next: Option<Instant>,
    /// How often it was said, and when last.
    said: u32,
    last: Instant,
}

impl Standing {
    /// An empty queue, which stands if it reaches `limit` bytes for an [`INTERVAL`].
    pub const fn new(limit: u64) -> Self {
        Self {
            limit,
            most: 0,
            most_before: 0,
            is_empty: true,
            emptied: Instant::ZERO,
            too_long_at: None,
            next: None,
            said: 0,
            last: Instant::ZERO,
        }
    }

    /// Takes how many bytes the queue has when something is taken from it, and whether it is empty then. True if a sender
    /// is to be told.
    pub fn observe(&mut self, now: Instant, bytes: u64, is_empty: bool) -> bool {
        if self.is_empty {
            let paused = now.since(self.emptied) >= PAUSE;
            if paused {
                self.too_long_at = None;
                self.next = None;
            }
            self.most_before = if paused { 0 } else { self.most };
            self.most = 0;
        }
        self.most = self.most.max(bytes);
        self.is_empty = is_empty;
        if is_empty {
            self.emptied = now;
        }
        // Only who is in a long queue is told, not who comes right after one.
        self.is_due(now) && bytes >= self.limit && {
            self.on_said(now);
            true
        }
    }

    /// True if the queue has been long for so long that it is time to say so.
    fn is_due(&mut self, now: Instant) -> bool {
        if self.most.max(self.most_before) < self.limit {
            self.too_long_at = None;
            self.next = None;
            return false;
        }
        let Some(at) = self.too_long_at else {
            self.too_long_at = Some(now + INTERVAL);
            return false;
        };
        now >= at && self.next.is_none_or(|next| now >= next)
    }

    fn on_said(&mut self, now: Instant) {
        self.said = match self.next {
            Some(_) => self.said.saturating_add(1),
            // Soon after the last time the pace goes on where it was.
            None if self.said > 2 && now.since(self.last) < 16 * INTERVAL => self.said - 2,
            None => 1,
        };
        self.last = now;
        // Shorter with the square root of how often it was said, to which TCP's rate answers in proportion.
        self.next = Some(self.next.unwrap_or(now) + INTERVAL.div_f64(f64::from(self.said).sqrt()));
    }
}

/// See the module. One owner; it takes time as an argument.
pub struct TunQueue {
    arena: Box<[u8]>,
    /// Where the next frame goes.
    tail: usize,
    /// Where it is written if there is no room for it yet: only a frame that has come makes others go.
    spare: Box<[u8]>,
    frames: Vec<Frame>,
    /// Frames in the order they came: the oldest, and how many there are with those that are gone in between.
    oldest: usize,
    count: usize,
    buckets: [Bucket; BUCKETS],
    /// Buckets that just began to wait, and those that have had a turn, each a chain.
    fresh: Chain,
    busy: Chain,
    hash: FlowHash,
    /// Frames that were taken out, whose memory is not free yet.
    taken: ArrayVec<u32, MAX_TAKEN>,
    dropped: u64,
    told: u64,
}

#[derive(Clone, Copy, Debug)]
struct Frame {
    start: usize,
    len: usize,
    bucket: u32,
    next: u32,
    gone: bool,
}

#[derive(Clone, Copy, Debug)]
struct Bucket {
    head: u32,
    tail: u32,
    credit: i64,
    listed: bool,
    next: u32,
    bytes: u64,
    standing: Standing,
}

#[derive(Clone, Copy, Debug)]
struct Chain {
    head: u32,
    tail: u32,
}

const EMPTY: Chain = Chain { head: NONE, tail: NONE };

impl std::fmt::Debug for TunQueue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TunQueue").field("frames", &self.count).finish_non_exhaustive()
    }
}

/// A frame taken out.
#[derive(Debug)]
pub struct Waited<'a> {
    /// Its bytes.
    pub frame: &'a mut [u8],
    /// Where they are in [`TunQueue::arena`].
    pub at: usize,
    /// Its flow makes its packets wait, and is to be told by it.
    pub tell: bool,
}

impl TunQueue {
    /// An empty queue of [`MAX_WAITING_BYTES`]. `seed` must be secret: it keeps others from choosing flows that share a
    /// bucket.
    pub fn new(seed: [u64; 2]) -> Self {
        let frame = Frame { start: 0, len: 0, bucket: 0, next: NONE, gone: true };
        let bucket = Bucket {
            head: NONE,
            tail: NONE,
            credit: 0,
            listed: false,
            next: NONE,
            bytes: 0,
            standing: Standing::new(TARGET),
        };
        Self {
            arena: vec![0; MAX_WAITING_BYTES].into_boxed_slice(),
            tail: 0,
            spare: Box::default(),
            frames: vec![frame; MAX_WAITING_FRAMES],
            oldest: 0,
            count: 0,
            buckets: [bucket; BUCKETS],
            fresh: EMPTY,
            busy: EMPTY,
            hash: FlowHash::new(seed),
            taken: ArrayVec::new(),
            dropped: 0,
            told: 0,
        }
    }

    /// True if nothing waits.
    pub const fn is_empty(&self) -> bool {
        self.fresh.head == NONE && self.busy.head == NONE
    }

    /// Forgets all that waits, without counting it as dropped.
    pub fn clear(&mut self) {
        while self.pop(Instant::ZERO).is_some() {}
        self.release();
    }

    /// Frames dropped so far because the queue was full.
    pub const fn dropped(&self) -> u64 {
        self.dropped
    }

    /// How often flows were told so far to slow down.
    pub const fn told(&self) -> u64 {
        self.told
    }

    /// Where the next frame may be written, [`MAX_FRAME`] bytes. [`commit`](Self::commit) takes what was written.
    pub fn space(&mut self) -> &mut [u8] {
        self.release();
        if self.has_room() {
            return &mut self.arena[self.tail..self.tail + MAX_FRAME];
        }
        if self.spare.is_empty() {
            self.spare = vec![0; MAX_FRAME].into_boxed_slice();
        }
        &mut self.spare
    }

    /// Takes the frame of `len` bytes just written to [`space`](Self::space), whose IP packet begins at `packet_at`, behind
    /// a virtio header or nothing. Makes room, if need be by dropping the oldest. A frame of more packets than the engine
    /// takes at a time becomes several.
    pub fn commit(&mut self, len: usize, packet_at: usize) {
        let len = len.min(MAX_FRAME);
        if packet_at == HEADER_LEN {
            let has_room = self.has_room();
            let written = if has_room { &self.arena[self.tail..] } else { &self.spare[..] };
            if let Some(parts) = written.get(..len).and_then(split) {
                // The first is written over what they are made of.
                for part in parts {
                    self.space()[..part.len()].copy_from_slice(&part);
                    self.put(part.len(), packet_at);
                }
                return;
            }
        }
        self.put(len, packet_at);
    }

    fn put(&mut self, len: usize, packet_at: usize) {
        if !self.has_room() {
            while !self.has_room() {
                self.drop_oldest();
            }
            self.arena[self.tail..self.tail + len].copy_from_slice(&self.spare[..len]);
        }
        let range = self.tail..self.tail + len;
        let bucket = self.bucket_of(self.arena.get(range.start + packet_at..range.end).unwrap_or_default());
        let place = (self.oldest + self.count) % MAX_WAITING_FRAMES;
        self.frames[place] =
            Frame { start: range.start, len, bucket: bucket as u32, next: NONE, gone: false };
        self.count += 1;
        self.tail = range.end;
        let place = place as u32; // below MAX_WAITING_FRAMES
        let entry = &mut self.buckets[bucket];
        match entry.tail {
            NONE => entry.head = place,
            last => self.frames[last as usize].next = place,
        }
        let entry = &mut self.buckets[bucket];
        entry.tail = place;
        entry.bytes += len as u64;
        if !entry.listed {
            entry.listed = true;
            entry.credit = QUANTUM;
            push(&mut self.fresh, &mut self.buckets, bucket as u32);
        }
    }

    /// Takes out the frame whose turn it is. Its memory stays as it is until the next call.
    pub fn pop(&mut self, now: Instant) -> Option<Waited<'_>> {
        self.release();
        self.pop_also(now)
    }

    /// All memory, in which the frames taken out are.
    pub const fn arena(&self) -> &[u8] {
        &self.arena
    }

    /// [`pop`](Self::pop), but what was taken out before stays as well, up to [`MAX_TAKEN`] frames.
    pub fn pop_also(&mut self, now: Instant) -> Option<Waited<'_>> {
        if self.taken.is_full() {
            return None;
        }
        loop {
            let is_fresh = self.fresh.head != NONE;
            let chain = if is_fresh { &mut self.fresh } else { &mut self.busy };
            let bucket = chain.head;
            let entry = self.buckets.get_mut(bucket as usize)?;
            if entry.credit <= 0 {
                entry.credit += QUANTUM;
                unlink_first(chain, &mut self.buckets);
                push(&mut self.busy, &mut self.buckets, bucket);
                continue;
            }
            if entry.head == NONE {
                unlink_first(chain, &mut self.buckets);
                // One turn more among the busy ones, so that a flow can't stay fresh by sending one at a time.
                if is_fresh && self.busy.head != NONE {
                    push(&mut self.busy, &mut self.buckets, bucket);
                } else {
                    self.buckets[bucket as usize].listed = false;
                }
                continue;
            }
            let place = entry.head;
            let Frame { start, len, next, .. } = self.frames[place as usize];
            entry.head = next;
            if next == NONE {
                entry.tail = NONE;
            }
            entry.credit -= len as i64;
            let tell = entry.standing.observe(now, entry.bytes, next == NONE);
            entry.bytes = entry.bytes.saturating_sub(len as u64);
            self.told += u64::from(tell);
            self.taken.push(place);
            return Some(Waited { frame: &mut self.arena[start..start + len], at: start, tell });
        }
    }

    fn bucket_of(&self, packet: &[u8]) -> usize {
        let mut hasher = self.hash.build_hasher();
        let word =
            |at: usize| packet.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_ne_bytes);
        // Ports tell flows of TCP apart. Of anything else a packet may come in fragments, which have no ports and must
        // not overtake the ones before, nor be overtaken.
        let ports = match packet.first().map(|byte| byte >> 4) {
            Some(4) => {
                hasher.write_u64(u64::from(word(12)) << 32 | u64::from(word(16)));
                let proto = packet.get(9).copied().unwrap_or(0);
                hasher.write_u32(u32::from(proto));
                let whole = packet.get(6..8).is_some_and(|b| b[0] & 0x3f == 0 && b[1] == 0);
                (whole && proto == PROTO_TCP).then(|| usize::from(packet[0] & 0x0f) * 4)
            }
            Some(6) => {
                for at in (8..40).step_by(8) {
                    hasher.write_u64(u64::from(word(at)) << 32 | u64::from(word(at + 4)));
                }
                // Behind extension headers (a fragment's among them) the protocol isn't looked for.
                let proto = packet.get(6).copied().unwrap_or(0);
                let is_tcp = proto == PROTO_TCP;
                // A fragment of TCP has another one than a whole segment, whatever else is in front of either.
                hasher.write_u32(if is_tcp || proto == PROTO_ICMPV6 { u32::from(proto) } else { 0 });
                is_tcp.then_some(40)
            }
            _ => None,
        };
        if let Some(at) = ports {
            hasher.write_u32(word(at));
        }
        hasher.finish() as usize % BUCKETS
    }

    /// Room for one frame of any length in one piece.
    fn has_room(&mut self) -> bool {
        if self.count == 0 {
            self.tail = 0;
            return true;
        }
        if self.count >= MAX_WAITING_FRAMES {
            return false;
        }
        let first = self.frames[self.oldest].start;
        if self.tail <= first {
            // The free part is between the newest and the oldest; equal means full.
            return first - self.tail >= MAX_FRAME;
        }
        if self.arena.len() - self.tail >= MAX_FRAME {
            return true;
        }
        if first >= MAX_FRAME {
            self.tail = 0;
            return true;
        }
        false
    }

    /// Frees the memory of what was taken out, and of whatever else is gone at the old end.
    pub fn release(&mut self) {
        for place in self.taken.drain(..) {
            self.frames[place as usize].gone = true;
        }
        while self.count > 0 && self.frames[self.oldest].gone {
            self.oldest = (self.oldest + 1) % MAX_WAITING_FRAMES;
            self.count -= 1;
        }
    }

    /// The oldest frame is the first of its bucket.
    fn drop_oldest(&mut self) {
        let Frame { bucket, next, len, .. } = self.frames[self.oldest];
        let entry = &mut self.buckets[bucket as usize];
        entry.head = next;
        if next == NONE {
            entry.tail = NONE;
        }
        entry.bytes = entry.bytes.saturating_sub(len as u64);
        self.frames[self.oldest].gone = true;
        self.dropped += 1;
        self.release();
    }
}

fn push(chain: &mut Chain, buckets: &mut [Bucket; BUCKETS], bucket: u32) {
    buckets[bucket as usize].next = NONE;
    match chain.tail {
        NONE => chain.head = bucket,
        last => buckets[last as usize].next = bucket,
    }
    chain.tail = bucket;
}

fn unlink_first(chain: &mut Chain, buckets: &mut [Bucket; BUCKETS]) {
    let Some(first) = buckets.get(chain.head as usize) else { return };
    chain.head = first.next;
    if chain.head == NONE {
        chain.tail = NONE;
    }
}

#[cfg(test)]
mod tests;
