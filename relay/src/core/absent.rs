//! Packets for devices that are not there yet.
//!
//! The devices of a relay that is restarted come back over a second, each in its own time, and who is back first sends at once
//! what it has held for that. So for [`RETURN_TIME`] after its start a relay lets packets for a device that is not connected
//! wait, as they do for one that is: from whom a token permits it, and within the bounds of one queue and of all of them
//! together. Later there is nobody to wait for, and a sender had better hear at once that its packet goes nowhere.

use super::*;

/// How long after its start a relay waits for devices to come back: their pause, an attempt that comes too early, and another.
pub const RETURN_TIME: Duration = Duration::from_secs(2);

/// What waits for devices that are not connected.
#[derive(Debug)]
pub(super) struct Absent {
    /// When nobody is waited for any more.
    until: Instant,
    /// None of them empty.
    queues: BTreeMap<DeviceId, FrameQueue>,
}

impl Absent {
    pub(super) fn new(started: Instant) -> Self {
        Self { until: started + RETURN_TIME, queues: BTreeMap::new() }
    }

    /// When what waits is given up.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        (!self.queues.is_empty()).then_some(self.until)
    }

    /// Drops what `which` chooses; returns how many, and their bytes.
    pub(super) fn drop_payloads(&mut self, which: impl Fn(&[u8]) -> bool) -> (usize, usize) {
        let (mut dropped, mut bytes) = (0, 0);
        for queue in self.queues.values_mut() {
            let before = queue.data_bytes();
            dropped += queue.drop_payloads(&which);
            bytes += before - queue.data_bytes();
        }
        self.queues.retain(|_, queue| !queue.is_empty());
        (dropped, bytes)
    }

    #[cfg(test)]
    pub(super) fn devices(&self) -> usize {
        self.queues.len()
    }

    #[cfg(test)]
    pub(super) fn data_bytes(&self) -> usize {
        self.queues.values().map(FrameQueue::data_bytes).sum()
    }
}

impl Relay {
    /// Lets a packet wait for `dst`, which is not connected. Returns whether that is how it goes now.
    pub(super) fn hold(&mut self, now: Instant, src: DeviceId, dst: DeviceId, payload: &[u8]) -> bool {
        let Limits { max_clients, queue_bytes, .. } = self.config.limits;
        let more = self.absent.queues.len() < max_clients || self.absent.queues.contains_key(&dst);
        if now >= self.absent.until || !more {
            return false;
        }
        let room = self.room();
        let mut queue = self.absent.queues.remove(&dst).unwrap_or_else(|| FrameQueue::new(queue_bytes));
        let before = queue.data_bytes();
        // Whatever it is: handshakes would be bounded by number for each device, but there is no bound for all.
        let pushed = queue.push_within(Class::Data, Frame::Recv { src, payload }.to_vec(), room);
        self.queued_bytes = self.queued_bytes - before + queue.data_bytes();
        self.count_pushed(pushed, Class::Data, room);
        if !queue.is_empty() {
            self.absent.queues.insert(dst, queue);
        }
        true
    }

    /// `device` is there now.
    pub(super) fn hand_over(&mut self, conn: ConnId, device: DeviceId) {
        let Some(mut queue) = self.absent.queues.remove(&device) else { return };
        self.queued_bytes -= queue.data_bytes();
        while let Some(frame) = queue.pop() {
            if let Ok(Some(Frame::Recv { src, payload })) = Frame::decode(&frame.bytes) {
                self.deliver(conn, src, payload);
            }
        }
    }

    /// Nobody is waited for any more, if it is time: who sent hears that it went nowhere.
    pub(super) fn give_up_absent(&mut self, now: Instant) {
        if now < self.absent.until {
            return;
        }
        for (device, mut queue) in std::mem::take(&mut self.absent.queues) {
            self.queued_bytes -= queue.data_bytes();
            let mut told = BTreeSet::new();
            while let Some(frame) = queue.pop() {
                let Ok(Some(Frame::Recv { src, .. })) = Frame::decode(&frame.bytes) else { continue };
                match self.sessions.get(&src).copied().filter(|_| told.insert(src)) {
                    Some(conn) => self.undeliverable(
                        conn,
                        now,
                        device,
                        GoneReason::NotConnected,
                        DropReason::NotConnected,
                    ),
                    None => self.counters.drop(DropReason::NotConnected, 1),
                }
            }
        }
    }
}
