//! Sealing and opening for several peers at once: the owner of the engine judges, lends sessions to jobs, has the jobs run
//! on threads of their own, and takes the sessions back before it does anything else.
//!
//! One peer's packets are all in one job, in order, so that a flow keeps its order and a session has one owner. Nothing is
//! judged in a job, and when the turn is over all is as if it had been done one by one: a revocation needs nobody's
//! consent.

use std::ops::Range;
use std::time::Duration;

use arrayvec::ArrayVec;
use warren_common::time::{Instant, Now};

use super::Engine;
use super::data::{InboundDrops, deliver};
use super::frame::{FromTun, Way};
use crate::io::{Arrival, Destination, Outbox, Source, TunOut};
use crate::paths::PeerIdx;
use crate::queue::Waited;
use crate::wg;

/// Sealed bytes after which a job has them sent: about one full batch, which is still in the cache then.
pub const SEND_AT: usize = 48 * 1_024;
/// Bytes in a [`WINDOW`] from which on a peer is worth a thread: two super-frames, or 50 Mbit/s.
const BUSY_BYTES: usize = 2 * 65_536;
/// Time over which a peer's bytes are counted.
const WINDOW: Duration = Duration::from_millis(20);
/// Peers counted at a time, a count: with more of them busy it doesn't matter which.
const MAX_COUNTED: usize = 8;

/// How many peers are busy: with one there is nothing to be gained by a second thread.
#[derive(Debug, Default)]
pub(super) struct Busy {
    began: Instant,
    peers: ArrayVec<(PeerIdx, usize), MAX_COUNTED>,
    /// In the window before.
    before: usize,
}

impl Busy {
    pub(super) fn note(&mut self, now: Instant, peer: PeerIdx, bytes: usize) {
        let age = now.since(self.began);
        if age >= WINDOW {
            let busy = self.peers.iter().filter(|(_, bytes)| *bytes >= BUSY_BYTES).count();
            self.before = if age < 2 * WINDOW { busy } else { 0 };
            self.peers.clear();
            self.began = now;
        }
        match self.peers.iter_mut().find(|(known, _)| *known == peer) {
            Some((_, sum)) => *sum += bytes,
            None => drop(self.peers.try_push((peer, bytes))), // one of many
        }
    }
}

/// Frames of one peer or several, judged, that wait to be sealed.
#[derive(Debug, Default)]
pub struct SealJob {
    frames: Vec<Frame>,
    loans: Vec<SealLoan>,
    /// Of all frames.
    bytes: usize,
    out: Outbox,
}

#[derive(Debug)]
struct Frame {
    /// Where it is in the arena, with its virtio header.
    range: Range<usize>,
    /// Which of the loans.
    loan: usize,
    /// Packets at its front that are lost to tell their sender.
    lost: usize,
}

#[derive(Debug)]
struct SealLoan {
    peer: PeerIdx,
    way: Way,
    loan: wg::Loan,
    bytes: usize,
    dropped: usize,
}

impl SealJob {
    /// True if there is nothing to do.
    pub const fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// Seals everything; the frames are in `arena`. `send` sends what is in the outbox, all of it direct, and clears it: with `true`, more is to come.
    pub fn run(&mut self, arena: &[u8], mut send: impl FnMut(&mut Outbox, bool)) {
        let mut frames = self.frames.drain(..).peekable();
        while let Some(Frame { range, loan, lost }) = frames.next() {
            let Some(from_tun) = arena.get(range).and_then(FromTun::prepared) else { continue };
            let SealLoan { way, loan, bytes, dropped, .. } = &mut self.loans[loan];
            let sealed = loan.seal_batch(|sealer| from_tun.seal(sealer, *way, lost, &mut self.out));
            *bytes += sealed.bytes;
            *dropped += sealed.left;
            let more = frames.peek().is_some();
            if self.out.bytes() >= SEND_AT || !more {
                send(&mut self.out, more);
            }
        }
    }
}

/// Batches of datagrams of one peer or several that wait to be opened.
#[derive(Debug)]
pub struct OpenJob {
    batches: Vec<Batch>,
    loans: Vec<wg::Loan>,
    now: Instant,
    tun: TunOut,
    drops: InboundDrops,
}

#[derive(Debug)]
struct Batch {
    from: Source,
    arrival: Arrival,
    data: Box<[u8]>,
    len: usize,
    /// Which of the loans.
    loan: usize,
    opened: wg::DataBatch,
}

impl Batch {
    /// Nothing of it is left.
    const fn is_opened(&self) -> bool {
        self.opened.datagrams.saturating_mul(self.arrival.stride_of(self.len)) >= self.len
    }
}

impl OpenJob {
    /// A job that puts packets into `tun`.
    pub const fn new(tun: TunOut) -> Self {
        let drops = InboundDrops {
            tun_full: 0,
            delayed: 0,
            bad_checksum: 0,
            wireguard: [0; super::data::WG_REASONS.len()],
        };
        Self { batches: Vec::new(), loans: Vec::new(), now: Instant::ZERO, tun, drops }
    }

    /// True if there is nothing to do.
    pub const fn is_empty(&self) -> bool {
        self.batches.is_empty()
    }

    /// Opens everything; nothing is judged yet.
    pub fn run(&mut self) {
        let Self { batches, loans, now, tun, drops } = self;
        for at in 0..batches.len() {
            let (before, rest) = batches.split_at_mut(at);
            let Some(Batch { arrival, data, len, loan, opened, .. }) = rest.first_mut() else { break };
            let stride = arrival.stride_of(*len);
            // What is left of an earlier batch of the same peer comes first.
            let peer = loans[*loan].peer();
            if before.iter().any(|batch| loans[batch.loan].peer() == peer && !batch.is_opened()) {
                continue;
            }
            let loan = &mut loans[*loan];
            let slot = peer.slot();
            *opened = loan.open_batch(*now, &mut data[..*len], stride, |packet, datagram| match packet {
                Ok(packet) if packet.is_empty() => {}
                Ok(packet) => deliver(drops, tun, slot, arrival, &mut datagram[packet]),
                Err(reason) => drops.count_wireguard(reason),
            });
        }
    }

    /// What [`Engine::finish_open`] let through.
    pub const fn tun(&mut self) -> &mut TunOut {
        &mut self.tun
    }
}

impl Engine {
    /// True if at least two peers have lately had so many packets that it pays to work on them at once.
    pub fn has_busy_peers(&self, now: Now) -> bool {
        self.busy.before >= 2 && now.boot.since(self.busy.began) < WINDOW
    }

    /// [`Engine::handle_tun_frame`], but an allowed frame is put into one of `jobs`, to be sealed there: it must stay where it
    /// is until then. What can't wait, or is for a peer that isn't reached directly, is sealed into `out` as usual.
    /// [`SealJob::run`] and [`Engine::finish_seal`] must follow before any other call.
    pub fn begin_seal(&mut self, now: Now, waited: Waited<'_>, jobs: &mut [SealJob], out: &mut Outbox) {
        let Waited { frame, at, tell } = waited;
        let range = at..at + frame.len();
        let Some((from_tun, lose)) = FromTun::prepare(frame, tell) else {
            self.drops.bad_frame += 1;
            return;
        };
        let Some(peer) = self.admit_from_tun(now, &from_tun) else { return };
        self.drops.delayed += u64::from(lose);
        match self.place_for_sealing(now, peer, jobs) {
            Some((job, loan)) => {
                job.bytes += range.len();
                job.frames.push(Frame { range, loan, lost: usize::from(lose) });
            }
            None => self.send_packets(now, peer, from_tun, usize::from(lose), out),
        }
        self.resend_handshakes(now);
    }

    /// The job that has the peer's session, or gets it now.
    fn place_for_sealing<'a>(
        &mut self,
        now: Now,
        peer: PeerIdx,
        jobs: &'a mut [SealJob],
    ) -> Option<(&'a mut SealJob, usize)> {
        let of_peer = |job: &SealJob| job.loans.iter().position(|loan| loan.peer == peer);
        if let Some((at, loan)) = jobs.iter().enumerate().find_map(|(at, job)| Some((at, of_peer(job)?))) {
            return Some((&mut jobs[at], loan));
        }
        let handle = self.peers.get(peer as usize)?.as_ref()?.handle;
        let job = jobs.iter_mut().min_by_key(|job| job.bytes)?;
        self.before_use(now, peer);
        let to = self.paths.route(now.boot, peer).filter(|to| matches!(to, Destination::Direct { .. }))?;
        let loan = self.wg.lend_for_sealing(handle, now)?;
        job.loans.push(SealLoan { peer, way: self.way(peer, to), loan, bytes: 0, dropped: 0 });
        let at = job.loans.len() - 1;
        Some((job, at))
    }

    /// Takes back the sessions of a job that ran.
    pub fn finish_seal(&mut self, now: Now, job: &mut SealJob) {
        job.bytes = 0;
        for SealLoan { peer, loan, bytes, dropped, .. } in job.loans.drain(..) {
            self.wg.take_back(now, loan);
            self.count_sent(now, peer, bytes);
            self.drops.outbox_full += dropped as u64;
        }
    }

    /// Puts a batch of `len` bytes into one of `jobs`, to be opened there, and takes its memory until
    /// [`Engine::finish_open`], which must follow before any other call. False, and nothing happens, if it must be handled
    /// the usual way; after the jobs, then.
    pub fn begin_open(
        &mut self,
        now: Now,
        from: Source,
        arrival: Arrival,
        data: &mut Box<[u8]>,
        len: usize,
        jobs: &mut [OpenJob],
    ) -> bool {
        self.notice_jump(now);
        self.end_lease_if_over(now);
        let Some(bytes) = data.get(..len) else { return false };
        if !self.may_open(from) {
            return false;
        }
        let is_for = |loan: &wg::Loan| loan.is_for(bytes);
        let found =
            jobs.iter().enumerate().find_map(|(at, job)| Some((at, job.loans.iter().position(is_for)?)));
        let Some((at, loan)) = found.or_else(|| self.lend_for_opening(bytes, jobs)) else { return false };
        let job = &mut jobs[at];
        job.now = now.boot;
        let (data, opened) = (std::mem::take(data), wg::DataBatch::default());
        job.batches.push(Batch { from, arrival, data, len, loan, opened });
        true
    }

    /// In which job the session went that this is for, and where there.
    fn lend_for_opening(&mut self, data: &[u8], jobs: &mut [OpenJob]) -> Option<(usize, usize)> {
        let idlest = (0..jobs.len()).min_by_key(|at| jobs[*at].batches.len())?;
        let loan = self.wg.lend_for_opening(data)?;
        // With another session of its peer, so that its packets stay in order.
        let same = jobs.iter().position(|job| job.loans.iter().any(|other| other.peer() == loan.peer()));
        let at = same.unwrap_or(idlest);
        jobs[at].loans.push(loan);
        Some((at, jobs[at].loans.len() - 1))
    }

    /// Takes back the sessions of a job that ran, gives back the memory of its batches, and judges what they brought:
    /// [`OpenJob::tun`] has what passes.
    pub fn finish_open(&mut self, now: Now, job: &mut OpenJob, mut give_back: impl FnMut(Box<[u8]>)) {
        for loan in job.loans.drain(..) {
            self.wg.take_back(now, loan);
        }
        self.drops.inbound.absorb(std::mem::take(&mut job.drops));
        for Batch { from, mut arrival, mut data, len, opened, .. } in job.batches.drain(..) {
            self.on_opened(now, from, opened, len);
            let taken = opened.datagrams.saturating_mul(arrival.stride_of(len)).min(len);
            arrival.stride = arrival.stride_of(len);
            self.take_datagrams(now, from, &mut arrival, &mut data[taken..len], &mut job.tun);
            give_back(data);
        }
        self.settle(now, &mut job.tun);
    }
}
