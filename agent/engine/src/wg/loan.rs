//! Sessions on loan, so that the packets of several peers can be sealed or opened at once, each on a thread of its own.
//!
//! A [`Loan`] has the session itself: while it is out the device can neither send nor receive in it, so no number is used
//! twice and no replay passes. It comes back with [`Device::take_back`] before the device does anything else for that peer.

use std::fmt;
use std::ops::Range;

use warren_common::time::{Instant, Now};

use super::device::{Device, Sealer};
use super::message::{self, Message};
use super::peer::Active;
use super::receive::{DataBatch, open_batch};
use super::session::Session;
use super::{DropReason, PeerHandle};

/// One session, away from its device.
pub struct Loan {
    peer: PeerHandle,
    place: Place,
    session: Box<Session>,
    mtu: usize,
    /// Bytes of the datagrams that were sealed.
    sealed: u64,
    opened: DataBatch,
    /// Bytes of the authentic datagrams among `opened`.
    opened_bytes: u64,
}

/// Where a session belongs.
#[derive(Clone, Copy, Debug)]
enum Place {
    Current,
    Previous(usize),
}

impl fmt::Debug for Loan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Loan").field("peer", &self.peer).field("place", &self.place).finish_non_exhaustive()
    }
}

impl Loan {
    /// Whose session it is.
    pub const fn peer(&self) -> PeerHandle {
        self.peer
    }

    /// [`Device::seal_batch`] without the device.
    pub fn seal_batch<R>(&mut self, fill: impl FnOnce(&mut Sealer<'_>) -> R) -> R {
        let mut sealer = Sealer::new(&mut self.session, self.mtu);
        let result = fill(&mut sealer);
        self.sealed += sealer.bytes();
        result
    }

    /// True if the datagram at the front of `data` is for this session.
    pub fn is_for(&self, data: &[u8]) -> bool {
        matches!(message::parse(data), Ok(Message::Data { receiver, .. }) if receiver == self.session.local)
    }

    /// [`Device::handle_data_batch`] without the device.
    pub fn open_batch(
        &mut self,
        now: Instant,
        data: &mut [u8],
        stride: usize,
        each: impl FnMut(Result<Range<usize>, DropReason>, &mut [u8]),
    ) -> DataBatch {
        let (mut batch, bytes) = open_batch(&mut self.session, now, data, stride, each);
        if bytes > 0 {
            batch.peer = Some(self.peer);
        }
        self.opened.packets += batch.packets;
        self.opened.keepalives += batch.keepalives;
        self.opened_bytes += bytes;
        batch
    }
}

impl Device {
    /// Lends the session in which packets for `peer` are sealed. `None` without one.
    pub fn lend_for_sealing(&mut self, peer: PeerHandle, now: Now) -> Option<Loan> {
        let active = self.active_of(peer)?;
        active.usable(now.boot)?;
        self.lend(peer, Place::Current)
    }

    /// Lends the session that the datagram at the front of `data` is for. `None` if it is for no session, or for one that
    /// its first message confirms: that changes which is current, see [`Self::handle`].
    pub fn lend_for_opening(&mut self, data: &[u8]) -> Option<Loan> {
        let Ok(Message::Data { receiver, .. }) = message::parse(data) else { return None };
        let peer = self.handle_of(self.indices.get(receiver)?);
        let active = self.active_of(peer)?;
        let is_it = |session: &Option<Box<Session>>| session.as_ref().is_some_and(|s| s.local == receiver);
        let place = if is_it(&active.current) {
            Place::Current
        } else {
            Place::Previous(active.previous.iter().position(is_it)?)
        };
        self.lend(peer, place)
    }

    fn lend(&mut self, peer: PeerHandle, place: Place) -> Option<Loan> {
        let mtu = self.mtu();
        let session = place.of(self.active_of(peer)?).take()?;
        let opened = DataBatch::default();
        Some(Loan { peer, place, session, mtu, sealed: 0, opened, opened_bytes: 0 })
    }

    /// Takes a session back, and sees to the counters and timers of what was done with it.
    pub fn take_back(&mut self, now: Now, loan: Loan) {
        let Loan { peer, place, session, sealed, opened, opened_bytes, .. } = loan;
        let local = session.local;
        match self.active_of(peer).map(|active| place.of(active)) {
            Some(empty @ None) => *empty = Some(session),
            // The peer is gone, or something else took its place: the session ends.
            Some(Some(_)) | None => {
                self.indices.remove(local);
                return;
            }
        }
        self.count_sealed(peer, now, sealed);
        if opened_bytes > 0 {
            self.count_opened(peer, now, opened, opened_bytes);
        }
    }
}

impl Place {
    fn of(self, active: &mut Active) -> &mut Option<Box<Session>> {
        match self {
            Self::Current => &mut active.current,
            Self::Previous(at) => &mut active.previous[at],
        }
    }
}
