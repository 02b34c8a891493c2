//! The queue towards one end of a relay connection, used by relays and by devices alike.
//!
//! Data is queued by the device at the other end of the relay: whom it is from (at a relay) or for (at a device). These
//! flows take turns by bytes (deficit round robin, as in RFC 8290), and when there is no room the longest loses its oldest
//! frame: who sends too much to somebody loses and delays only packets of his own.

use std::collections::VecDeque;
use std::sync::Arc;

use super::{DATA_HEADER, MAX_PAYLOAD};

/// Most waiting frames of the relay protocol itself. An end that lets this many pile up does not read.
pub const MAX_CONTROL_FRAMES: usize = 64;
/// Most waiting WireGuard handshake messages: one each way per peer for a busy device, and retries.
pub const MAX_HANDSHAKE_FRAMES: usize = 64;
/// Default bound of waiting data in bytes: 40 ms at 100 Mbit/s; more would only be delay.
pub const DATA_QUEUE_BYTES: usize = 512 * 1024;
/// Flows of their own; what more devices send shares one. Bounds the work for each frame.
pub const MAX_FLOWS: usize = 64;
/// What a waiting frame costs beside its bytes.
const OVERHEAD: usize = 64;
/// Bytes of a turn: the longest frame of data.
const QUANTUM: usize = DATA_HEADER + MAX_PAYLOAD + OVERHEAD;

/// What a frame is, which decides what happens to it when the queue is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Of the relay protocol; refused when full, first out.
    Control,
    /// A WireGuard handshake message; never pushed out by data, second out. When full, a device that has fewer waiting than
    /// another takes the place of that one's newest.
    Handshake,
    /// Anything else: a `Send` or `Recv`. When full, the oldest of the longest flow is dropped; last out.
    Data,
}

/// A frame that waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueuedFrame {
    /// What it is.
    pub class: Class,
    /// The frame, encoded.
    pub bytes: Arc<[u8]>,
}

/// What became of a push.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pushed {
    /// It waits now; so many older data frames made room.
    Queued {
        /// Dropped to make room.
        dropped: usize,
    },
    /// Its class is full; it is gone.
    Full,
}

/// Bounded by construction: control and handshake frames by number, data by bytes.
#[derive(Debug)]
pub struct FrameQueue {
    control: VecDeque<Arc<[u8]>>,
    handshakes: VecDeque<Arc<[u8]>>,
    /// Those with something waiting, in the order of their turns.
    flows: VecDeque<Flow>,
    data_bytes: usize,
    max_data_bytes: usize,
}

/// What waits from or for one device; `None`: the rest.
#[derive(Debug)]
struct Flow {
    device: Option<[u8; 16]>,
    frames: VecDeque<Arc<[u8]>>,
    bytes: usize,
    /// What it may still send in this turn, in bytes.
    credit: usize,
}

impl Flow {
    fn pop(&mut self) -> Option<Arc<[u8]>> {
        let frame = self.frames.pop_front()?;
        self.bytes -= frame.len() + OVERHEAD;
        Some(frame)
    }
}

/// The device at the other end of the relay: it stands behind the type.
fn device(frame: &[u8]) -> Option<[u8; 16]> {
    frame.get(1..)?.first_chunk().copied()
}

impl FrameQueue {
    /// An empty queue that holds at most `max_data_bytes` of data ([`DATA_QUEUE_BYTES`]), overhead included.
    pub const fn new(max_data_bytes: usize) -> Self {
        Self {
            control: VecDeque::new(),
            handshakes: VecDeque::new(),
            flows: VecDeque::new(),
            data_bytes: 0,
            max_data_bytes,
        }
    }

    /// Adds a frame, if need be at the cost of others of its class.
    pub fn push(&mut self, class: Class, bytes: impl Into<Arc<[u8]>>) -> Pushed {
        self.push_within(class, bytes, usize::MAX)
    }

    /// The same, but a data frame only if no more than `room` bytes of data then wait, overhead included.
    pub fn push_within(&mut self, class: Class, bytes: impl Into<Arc<[u8]>>, room: usize) -> Pushed {
        let bytes = bytes.into();
        match class {
            Class::Control if self.control.len() >= MAX_CONTROL_FRAMES => return Pushed::Full,
            Class::Control => self.control.push_back(bytes),
            Class::Handshake => return self.push_handshake(bytes),
            Class::Data => return self.push_data(bytes, room.min(self.max_data_bytes)),
        }
        Pushed::Queued { dropped: 0 }
    }

    fn push_handshake(&mut self, bytes: Arc<[u8]>) -> Pushed {
        let mut dropped = 0;
        if self.handshakes.len() >= MAX_HANDSHAKE_FRAMES {
            let waiting = |of| self.handshakes.iter().filter(|frame| device(frame) == of).count();
            let most = self.handshakes.iter().map(|frame| device(frame)).max_by_key(|of| waiting(*of));
            let Some(most) = most.filter(|most| waiting(*most) > waiting(device(&bytes)) + 1) else {
                return Pushed::Full;
            };
            let newest = self.handshakes.iter().rposition(|frame| device(frame) == most);
            dropped = usize::from(newest.and_then(|at| self.handshakes.remove(at)).is_some());
        }
        self.handshakes.push_back(bytes);
        Pushed::Queued { dropped }
    }

    fn push_data(&mut self, bytes: Arc<[u8]>, most: usize) -> Pushed {
        let cost = bytes.len() + OVERHEAD;
        if cost > most {
            return Pushed::Full;
        }
        let mut dropped = 0;
        while self.data_bytes + cost > most && self.drop_oldest() {
            dropped += 1;
        }
        self.data_bytes += cost;
        let flow = self.flow(device(&bytes));
        flow.bytes += cost;
        flow.frames.push_back(bytes);
        Pushed::Queued { dropped }
    }

    /// The flow of a device, made anew where it has none.
    fn flow(&mut self, device: Option<[u8; 16]>) -> &mut Flow {
        let own = self.flows.iter().position(|flow| flow.device == device);
        let device = device.filter(|_| own.is_some() || self.flows.len() < MAX_FLOWS);
        let at = own.or_else(|| self.flows.iter().position(|flow| flow.device == device));
        let at = at.unwrap_or_else(|| {
            self.flows.push_back(Flow { device, frames: VecDeque::new(), bytes: 0, credit: QUANTUM });
            self.flows.len() - 1
        });
        &mut self.flows[at]
    }

    /// Drops the oldest frame of the longest flow.
    fn drop_oldest(&mut self) -> bool {
        let longest = self.flows.iter_mut().enumerate().max_by_key(|(_, flow)| flow.bytes);
        let Some((at, frame)) = longest.and_then(|(at, flow)| Some((at, flow.pop()?))) else { return false };
        self.data_bytes -= frame.len() + OVERHEAD;
        if self.flows[at].frames.is_empty() {
            self.flows.remove(at);
        }
        true
    }

    /// Takes the next frame: control, then handshakes, each in order of arrival; then data, by turns of the flows.
    pub fn pop(&mut self) -> Option<QueuedFrame> {
        let take = |class| move |bytes| QueuedFrame { class, bytes };
        if let Some(frame) = self.control.pop_front().map(take(Class::Control)) {
            return Some(frame);
        }
        if let Some(frame) = self.handshakes.pop_front().map(take(Class::Handshake)) {
            return Some(frame);
        }
        loop {
            let flow = self.flows.front_mut()?;
            let cost = flow.frames.front().map_or(0, |frame| frame.len() + OVERHEAD);
            if flow.credit < cost {
                flow.credit += QUANTUM;
                self.flows.rotate_left(1);
                continue;
            }
            flow.credit -= cost;
            let frame = flow.pop();
            if flow.frames.is_empty() {
                self.flows.pop_front();
            }
            self.data_bytes -= cost;
            return frame.map(take(Class::Data));
        }
    }

    /// Drops the handshake and data frames that `which` chooses; returns how many.
    pub fn drop_payloads(&mut self, which: impl Fn(&[u8]) -> bool) -> usize {
        let count = |queue: &Self| {
            queue.handshakes.len() + queue.flows.iter().map(|flow| flow.frames.len()).sum::<usize>()
        };
        let before = count(self);
        self.handshakes.retain(|frame| !which(frame));
        for flow in &mut self.flows {
            flow.frames.retain(|frame| !which(frame));
            flow.bytes = flow.frames.iter().map(|frame| frame.len() + OVERHEAD).sum();
        }
        self.flows.retain(|flow| !flow.frames.is_empty());
        self.data_bytes = self.flows.iter().map(|flow| flow.bytes).sum();
        before - count(self)
    }

    /// True if nothing waits.
    pub fn is_empty(&self) -> bool {
        self.control.is_empty() && self.handshakes.is_empty() && self.flows.is_empty()
    }

    /// Bytes of data that wait, overhead included.
    pub const fn data_bytes(&self) -> usize {
        self.data_bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of one device; the last byte tells them apart.
    fn frame(byte: u8, len: usize) -> Vec<u8> {
        of(1, byte, len)
    }

    fn of(device: u8, byte: u8, len: usize) -> Vec<u8> {
        let mut frame = vec![device; len];
        frame[len - 1] = byte;
        frame
    }

    fn last(frame: &[u8]) -> u8 {
        frame[frame.len() - 1]
    }

    #[test]
    fn data_drops_the_oldest_and_stays_within_its_bytes() {
        let mut queue = FrameQueue::new(10 * (100 + OVERHEAD));
        for i in 0..25 {
            let dropped = usize::from(i >= 10);
            assert_eq!(queue.push(Class::Data, frame(i, 100)), Pushed::Queued { dropped });
            assert!(queue.data_bytes() <= 10 * (100 + OVERHEAD));
        }
        assert_eq!(last(&queue.pop().unwrap().bytes), 15);
        assert_eq!(queue.push(Class::Data, frame(0, 2_000)), Pushed::Full);
        assert_eq!(queue.drop_payloads(|frame| last(frame) < 20), 4);
        assert_eq!(queue.data_bytes(), 5 * (100 + OVERHEAD));
        assert_eq!(queue.drop_payloads(|_| true), 5);
        assert!(queue.is_empty() && queue.data_bytes() == 0);
    }

    #[test]
    fn handshakes_and_control_are_bounded_and_never_pushed_out() {
        let mut queue = FrameQueue::new(1_000);
        for (class, max) in [(Class::Control, MAX_CONTROL_FRAMES), (Class::Handshake, MAX_HANDSHAKE_FRAMES)] {
            for i in 0..max {
                assert_eq!(queue.push(class, frame(i as u8, 148)), Pushed::Queued { dropped: 0 });
            }
            assert_eq!(queue.push(class, frame(0, 148)), Pushed::Full);
        }
        for _ in 0..100 {
            queue.push(Class::Data, frame(7, 500));
        }
        let order: Vec<_> = std::iter::from_fn(|| queue.pop()).map(|f| f.class).collect();
        assert_eq!(order.iter().filter(|c| **c == Class::Control).count(), MAX_CONTROL_FRAMES);
        assert_eq!(order.iter().filter(|c| **c == Class::Handshake).count(), MAX_HANDSHAKE_FRAMES);
        assert_eq!(order[0], Class::Control);
        assert_eq!(order[MAX_CONTROL_FRAMES], Class::Handshake);
        assert_eq!(order.last(), Some(&Class::Data));
    }

    #[test]
    fn flows_take_turns_by_bytes_and_only_the_greedy_lose() {
        let mut queue = FrameQueue::new(DATA_QUEUE_BYTES);
        let mut lost = 0;
        // A flood of long and one of short frames, and between them one frame of the third device after each thousand.
        for n in 0..20_000u32 {
            for frame in [of(1, 0, 1_400), of(2, 0, 20)] {
                let Pushed::Queued { dropped } = queue.push(Class::Data, frame) else { panic!("full") };
                lost += dropped;
            }
            if n % 1_000 == 0 {
                queue.push(Class::Data, of(3, (n / 1_000) as u8, 500));
            }
        }
        assert!(lost > 30_000 && queue.data_bytes() <= DATA_QUEUE_BYTES, "{lost}");
        let (mut bytes, mut third) = ([0; 4], Vec::new());
        while third.len() < 20 {
            let frame = queue.pop().unwrap().bytes;
            bytes[usize::from(frame[0])] += frame.len() + OVERHEAD;
            if frame[0] == 3 {
                third.push(last(&frame));
            }
        }
        assert_eq!(third, Vec::from_iter(0..20), "the third lost nothing and kept its order");
        let most = 20 * (500 + OVERHEAD) + 2 * QUANTUM;
        assert!(bytes[1] <= most && bytes[2] <= most, "{bytes:?}");
    }

    #[test]
    fn a_flood_of_handshakes_leaves_room_for_those_of_others() {
        let mut queue = FrameQueue::new(1_000);
        for _ in 0..1_000 {
            queue.push(Class::Handshake, of(1, 0, 148));
        }
        for n in 0..10 {
            assert_eq!(queue.push(Class::Handshake, of(2, n, 148)), Pushed::Queued { dropped: 1 });
        }
        let frames: Vec<_> = std::iter::from_fn(|| queue.pop()).collect();
        assert_eq!(frames.len(), MAX_HANDSHAKE_FRAMES);
        assert_eq!(frames.iter().filter(|f| f.bytes[0] == 2).count(), 10);
    }

    #[test]
    fn any_number_of_devices_has_a_bounded_number_of_flows() {
        let mut queue = FrameQueue::new(DATA_QUEUE_BYTES);
        for n in 0..1_000u16 {
            let mut frame = vec![6; 100];
            frame[1..3].copy_from_slice(&n.to_be_bytes());
            assert_eq!(queue.push(Class::Data, frame), Pushed::Queued { dropped: 0 });
        }
        assert_eq!(queue.flows.len(), MAX_FLOWS + 1);
        assert_eq!(std::iter::from_fn(|| queue.pop()).count(), 1_000);
        assert!(queue.is_empty() && queue.data_bytes() == 0);
    }
}
