//! The queue towards one end of a relay connection, used by relays and by devices alike.

use std::collections::VecDeque;
use std::sync::Arc;

/// Most waiting frames of the relay protocol itself. An end that lets this many pile up does not read.
pub const MAX_CONTROL_FRAMES: usize = 64;
/// Most waiting WireGuard handshake messages: one each way per peer for a busy device, and retries.
pub const MAX_HANDSHAKE_FRAMES: usize = 64;
/// Default bound of waiting data in bytes: 40 ms at 100 Mbit/s; more would only be delay.
pub const DATA_QUEUE_BYTES: usize = 512 * 1024;
/// What a waiting frame costs beside its bytes.
const OVERHEAD: usize = 64;

/// What a frame is, which decides what happens to it when the queue is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Of the relay protocol; refused when full, first out.
    Control,
    /// A WireGuard handshake message; refused when full (never pushed out by data), second out.
    Handshake,
    /// Anything else; the oldest are dropped when full, last out.
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

/// Bounded by construction: control and handshake frames by number, data by bytes with the oldest dropped first.
#[derive(Debug)]
pub struct FrameQueue {
    control: VecDeque<Arc<[u8]>>,
    handshakes: VecDeque<Arc<[u8]>>,
    data: VecDeque<Arc<[u8]>>,
    data_bytes: usize,
    max_data_bytes: usize,
}

impl FrameQueue {
    /// An empty queue that holds at most `max_data_bytes` of data ([`DATA_QUEUE_BYTES`]), overhead included.
    pub const fn new(max_data_bytes: usize) -> Self {
        Self {
            control: VecDeque::new(),
            handshakes: VecDeque::new(),
            data: VecDeque::new(),
            data_bytes: 0,
            max_data_bytes,
        }
    }

    /// Adds a frame, if need be at the cost of the oldest data.
    pub fn push(&mut self, class: Class, bytes: impl Into<Arc<[u8]>>) -> Pushed {
        let bytes = bytes.into();
        let (queue, max) = match class {
            Class::Control => (&mut self.control, MAX_CONTROL_FRAMES),
            Class::Handshake => (&mut self.handshakes, MAX_HANDSHAKE_FRAMES),
            Class::Data => return self.push_data(bytes),
        };
        if queue.len() >= max {
            return Pushed::Full;
        }
        queue.push_back(bytes);
        Pushed::Queued { dropped: 0 }
    }

    fn push_data(&mut self, bytes: Arc<[u8]>) -> Pushed {
        let cost = bytes.len() + OVERHEAD;
        if cost > self.max_data_bytes {
            return Pushed::Full;
        }
        let mut dropped = 0;
        while self.data_bytes + cost > self.max_data_bytes && self.drop_oldest() {
            dropped += 1;
        }
        self.data_bytes += cost;
        self.data.push_back(bytes);
        Pushed::Queued { dropped }
    }

    fn drop_oldest(&mut self) -> bool {
        let oldest = self.data.pop_front();
        self.data_bytes -= oldest.as_ref().map_or(0, |frame| frame.len() + OVERHEAD);
        oldest.is_some()
    }

    /// Takes the next frame: control, then handshakes, then data, each in order of arrival.
    pub fn pop(&mut self) -> Option<QueuedFrame> {
        let take = |class| move |bytes| QueuedFrame { class, bytes };
        if let Some(frame) = self.control.pop_front().map(take(Class::Control)) {
            return Some(frame);
        }
        if let Some(frame) = self.handshakes.pop_front().map(take(Class::Handshake)) {
            return Some(frame);
        }
        let frame = self.data.pop_front()?;
        self.data_bytes -= frame.len() + OVERHEAD;
        Some(take(Class::Data)(frame))
    }

    /// Drops the handshake and data frames that `which` chooses; returns how many.
    pub fn drop_payloads(&mut self, which: impl Fn(&[u8]) -> bool) -> usize {
        let before = self.handshakes.len() + self.data.len();
        self.handshakes.retain(|frame| !which(frame));
        self.data.retain(|frame| !which(frame));
        self.data_bytes = self.data.iter().map(|frame| frame.len() + OVERHEAD).sum();
        before - self.handshakes.len() - self.data.len()
    }

    /// True if nothing waits.
    pub fn is_empty(&self) -> bool {
        self.control.is_empty() && self.handshakes.is_empty() && self.data.is_empty()
    }

    /// Bytes of data that wait, overhead included.
    pub const fn data_bytes(&self) -> usize {
        self.data_bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(byte: u8, len: usize) -> Vec<u8> {
        vec![byte; len]
    }

    #[test]
    fn data_drops_the_oldest_and_stays_within_its_bytes() {
        let mut queue = FrameQueue::new(10 * (100 + OVERHEAD));
        for i in 0..25 {
            let dropped = usize::from(i >= 10);
            assert_eq!(queue.push(Class::Data, frame(i, 100)), Pushed::Queued { dropped });
            assert!(queue.data_bytes() <= 10 * (100 + OVERHEAD));
        }
        assert_eq!(queue.pop().unwrap().bytes[0], 15);
        assert_eq!(queue.push(Class::Data, frame(0, 2_000)), Pushed::Full);
        assert_eq!(queue.drop_payloads(|frame| frame[0] < 20), 4);
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
}
