//! Packets between the host and the engine: from the TUN and the sockets in, and what the engine has to say out again.
//!
//! While several peers are busy a turn's sealing and opening is shared with other threads ([`Crew`]); the turn ends when all
//! are done.
//!
//! A [`DataPlane`] holds the sockets and all memory that packets need, so that none is allocated for them. Whoever owns
//! the engine waits for readiness and calls one `from_…` method, then [`DataPlane::drain`].

use std::io::{self, ErrorKind};
use std::sync::Arc;
use std::task::{Context, Poll};

use rand_core::RngCore as _;
use warren_common::ids::{DeviceId, RelayId};
use warren_common::time::Now;
use warren_engine::engine::{Engine, OpenJob, SEND_AT, SealJob};
use warren_engine::io::{Destination, Outbox, Source, TunOffload, TunOut};
use warren_engine::offload::vnet::HEADER_LEN;
use warren_engine::queue::{TunQueue, Waited};

use crate::crew::Crew;
use crate::entropy::OsEntropy;
use crate::os::Offloads;
use crate::os::tun::{self, QUEUE_LEN, Tun};
use crate::os::udp::{ReceiveBuffer, Udp};

/// Bytes read from the TUN in one turn: four times what is sealed, so that the flows share, and are told, here and not in the
/// kernel's queue; and no more, or a host that sends faster than we seal would have us read and drop for most of the time.
const READ_BUDGET_BYTES: usize = 4 * SEAL_BUDGET_BYTES;
/// Frames read in one turn: all that the TUN's own queue can hold.
const READ_BUDGET: usize = QUEUE_LEN as usize;
/// Frames sealed in one turn, so that the sockets and timers get theirs.
const SEAL_BUDGET: usize = 128;
/// Extra sockets at once, a count: one that measures the NAT, and those of one search for a port.
pub const MAX_EXTRA_SOCKETS: usize = 129;
/// Bytes sealed in one turn: two super-frames, an eighth of a millisecond's work.
const SEAL_BUDGET_BYTES: usize = 2 * 65_536;
/// Receive calls on one socket in one turn.
const UDP_BUDGET: usize = 4;
/// Received bytes after which a turn ends.
const UDP_BUDGET_BYTES: usize = 2 * 65_536;

/// What carries sealed packets to peers that are not reached directly.
pub trait RelayLinks {
    /// Hands a sealed packet for `device` to `relay`; without a connection it is dropped, as the engine was told.
    fn send(&mut self, now: Now, relay: RelayId, device: DeviceId, packet: &[u8]);
}

/// None of them.
#[derive(Clone, Copy, Debug)]
pub struct NoRelays;

impl RelayLinks for NoRelays {
    fn send(&mut self, _: Now, _: RelayId, _: DeviceId, _: &[u8]) {}
}

/// See the module.
#[derive(Debug)]
pub struct DataPlane {
    /// First the usual ones, then those on ports of their own that the engine asked for, for a while.
    sockets: Arc<[Arc<Udp>]>,
    usual: usize,
    /// Shared with the crew while it seals, and by nobody else.
    waiting: Arc<TunQueue>,
    receive: ReceiveBuffer,
    outbox: Outbox,
    tun_out: TunOut,
    /// The kernel refused a super-frame that its TUN said it takes.
    refused: bool,
    /// Frames that the TUN did not take.
    untaken: u64,
    crew: Crew<Job>,
    seal_jobs: Vec<SealJob>,
    open_jobs: Vec<OpenJob>,
    jobs: Vec<Job>,
    /// Turns that more than one thread worked on.
    shared_turns: u64,
    /// There may be more to take than the last turn took.
    more: bool,
    /// Where the last turn took from: 0 is the TUN, then the sockets.
    last_place: usize,
}

/// Where there is something to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ready {
    /// [`DataPlane::from_tun`] has.
    Tun,
    /// [`DataPlane::from_udp`] has, from this socket.
    Udp(usize),
}

/// What a thread of the crew does.
#[derive(Debug)]
enum Job {
    /// Seals frames of this queue, and sends through these sockets.
    Seal(SealJob, Arc<TunQueue>, Arc<[Arc<Udp>]>),
    Open(OpenJob),
}

impl Job {
    fn run(&mut self) {
        match self {
            Self::Seal(job, waiting, sockets) => job.run(waiting.arena(), |out, more| {
                let keep_last = more && out.is_last_open() && out.len() > 1;
                send_direct(sockets, out, keep_last);
            }),
            Self::Open(job) => job.run(),
        }
    }
}

impl DataPlane {
    /// Memory for packets through `sockets`, of which there are one or two.
    pub fn new(sockets: Vec<Udp>) -> Self {
        Self {
            usual: sockets.len(),
            sockets: sockets.into_iter().map(Arc::new).collect(),
            waiting: Arc::new(TunQueue::new([OsEntropy.next_u64(), OsEntropy.next_u64()])),
            receive: ReceiveBuffer::default(),
            outbox: Outbox::new(),
            tun_out: TunOut::default(),
            refused: false,
            untaken: 0,
            crew: Crew::new(Job::run),
            seal_jobs: Vec::new(),
            open_jobs: Vec::new(),
            jobs: Vec::new(),
            shared_turns: 0,
            more: false,
            last_place: 0,
        }
    }

    /// Prepares for a TUN that was just opened.
    pub fn attach(&mut self, tun: &Tun) {
        self.refused = false;
        self.sockets = self.sockets().into();
        self.tun_out = arena(tun, tun.offload());
        self.open_jobs.clear();
        if let Some(waiting) = Arc::get_mut(&mut self.waiting) {
            waiting.clear();
        }
        self.outbox.clear();
    }

    /// What of the kernel's help is in use now: with a TUN, if there is one.
    pub fn offloads(&self, tun: Option<&Tun>) -> Offloads {
        let offload = tun.map_or_else(TunOffload::default, |tun| tun_in_use(tun.offload(), self.refused));
        Offloads {
            tun: offload.tcp,
            tun_udp: offload.udp,
            udp_send: self.sockets().iter().all(|socket| socket.joins_sends()),
            udp_receive: self.sockets().iter().all(|socket| socket.joins_receives()),
        }
    }

    /// The usual sockets.
    pub fn sockets(&self) -> &[Arc<Udp>] {
        &self.sockets[..self.usual]
    }

    /// Has exactly the extra IPv4 sockets of these numbers open, at most [`MAX_EXTRA_SOCKETS`]. Returns which are: fewer if
    /// the host has no more.
    pub fn set_extra(&mut self, ids: &[u8]) -> Vec<u8> {
        let (usual, extra) = self.sockets.split_at(self.usual);
        let mut kept: Vec<_> = extra.iter().filter(|socket| ids.contains(&socket.id())).cloned().collect();
        for id in ids.iter().take(MAX_EXTRA_SOCKETS) {
            if kept.iter().any(|socket| socket.id() == *id) {
                continue;
            }
            let Some(first) = usual.first() else { break };
            match first.extra(*id) {
                Ok(socket) => kept.push(Arc::new(socket)),
                Err(e) => {
                    tracing::debug!("no extra socket: {e}");
                    break;
                }
            }
        }
        let open = kept.iter().map(|socket| socket.id()).collect();
        self.sockets = usual.iter().cloned().chain(kept).collect();
        open
    }

    /// Waits until there is something to take or to seal, and says where; each place gets its turn. Without a TUN only the
    /// sockets are waited for. Cancel safe.
    ///
    /// A wait of its own for each place would be the same. But after a pause all code and memory that a packet's way touches is
    /// cold, and this touches least.
    pub async fn ready(&self, tun: Option<&Tun>) -> Ready {
        std::future::poll_fn(|cx| self.poll_ready(cx, tun)).await
    }

    fn poll_ready(&self, cx: &mut Context<'_>, tun: Option<&Tun>) -> Poll<Ready> {
        let places = self.sockets.len() + 1;
        for place in (self.last_place + 1..=self.last_place + places).map(|place| place % places) {
            let (ready, what) = match place.checked_sub(1) {
                Some(index) => {
                    let Some(socket) = self.sockets.get(index) else { continue };
                    (socket.poll_readable(cx), Ready::Udp(index))
                }
                None => {
                    let Some(tun) = tun else { continue };
                    let ready = if self.has_waiting() { Poll::Ready(()) } else { tun.poll_readable(cx) };
                    (ready, Ready::Tun)
                }
            };
            if ready.is_ready() {
                return Poll::Ready(what);
            }
        }
        Poll::Pending
    }

    /// True if frames from the TUN wait for their turn, so that [`from_tun`](Self::from_tun) has something to do.
    pub fn has_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// True if the last turn left something to do for the next. Whoever owns this must let the runtime look at everything else
    /// in between: readiness is kept until a call finds nothing, so waiting for it would not.
    pub fn has_more(&self) -> bool {
        self.more || self.has_waiting()
    }

    /// What the queue of frames from the TUN dropped, and how often it told a flow to slow down.
    pub fn queue_counts(&self) -> (u64, u64) {
        (self.waiting.dropped(), self.waiting.told())
    }

    /// Sends so far that the kernel refused, and frames that the TUN did not take: both are lost, after they were counted as
    /// sent and received.
    pub fn refused_counts(&self) -> (u64, u64) {
        (self.sockets().iter().map(|socket| socket.unsent()).sum(), self.untaken)
    }

    /// Turns so far in which several peers' packets were worked on at once.
    pub const fn shared_turns(&self) -> u64 {
        self.shared_turns
    }

    /// Takes what the host sends: empties the TUN's queue, and seals some of what waits.
    ///
    /// # Errors
    /// The TUN is gone.
    pub fn from_tun(
        &mut self,
        now: Now,
        tun: &Tun,
        engine: &mut Engine,
        relays: &mut impl RelayLinks,
    ) -> io::Result<()> {
        self.last_place = 0;
        self.more = self.read_tun(tun, Tun::receive)?;
        self.seal_waiting(now, tun, engine, relays);
        Ok(())
    }

    /// Moves what is in the TUN's queue to ours. True if there may be more.
    fn read_tun(
        &mut self,
        tun: &Tun,
        read: impl Fn(&Tun, &mut [u8]) -> io::Result<usize>,
    ) -> io::Result<bool> {
        let packet_at = if tun.has_virtio_headers() { HEADER_LEN } else { 0 };
        let Some(waiting) = Arc::get_mut(&mut self.waiting) else { return Ok(false) };
        let mut bytes = 0;
        for _ in 0..READ_BUDGET {
            if bytes >= READ_BUDGET_BYTES {
                break;
            }
            match read(tun, waiting.space()) {
                Ok(len) => {
                    waiting.commit(len, packet_at);
                    bytes += len;
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(e) => return Err(e),
            }
        }
        Ok(true)
    }

    fn seal_waiting(&mut self, now: Now, tun: &Tun, engine: &mut Engine, relays: &mut impl RelayLinks) {
        if self.crew.size() > 1 && tun.has_virtio_headers() && engine.has_busy_peers(now) {
            self.seal_together(now, engine, relays);
        } else {
            self.seal_alone(now, tun, engine, relays);
        }
    }

    /// Seals some of what waits, with the crew's help.
    fn seal_together(&mut self, now: Now, engine: &mut Engine, relays: &mut impl RelayLinks) {
        self.send(now, relays, false); // what was kept goes first
        self.seal_jobs.resize_with(self.crew.size(), SealJob::default);
        let mut bytes = 0;
        while bytes < self.crew.size() * SEAL_BUDGET_BYTES {
            let Some(waited) = Arc::get_mut(&mut self.waiting).and_then(|w| w.pop_also(now.boot)) else {
                break;
            };
            bytes += waited.frame.len();
            engine.begin_seal(now, waited, &mut self.seal_jobs, &mut self.outbox);
            if self.outbox.bytes() >= SEND_AT {
                self.send(now, relays, false);
            }
        }
        self.send(now, relays, false);
        let Self { seal_jobs, jobs, waiting, sockets, crew, shared_turns, .. } = self;
        let (idle, due): (Vec<_>, Vec<_>) = seal_jobs.drain(..).partition(SealJob::is_empty);
        seal_jobs.extend(idle);
        jobs.extend(due.into_iter().map(|job| Job::Seal(job, Arc::clone(waiting), Arc::clone(sockets))));
        *shared_turns += u64::from(jobs.len() > 1);
        crew.run(jobs);
        for job in jobs.drain(..) {
            let Job::Seal(mut job, ..) = job else { continue };
            engine.finish_seal(now, &mut job);
            seal_jobs.push(job);
        }
        if let Some(waiting) = Arc::get_mut(waiting) {
            waiting.release();
        }
    }

    fn seal_alone(&mut self, now: Now, tun: &Tun, engine: &mut Engine, relays: &mut impl RelayLinks) {
        let mut bytes = 0;
        for _ in 0..SEAL_BUDGET {
            if bytes >= SEAL_BUDGET_BYTES {
                break;
            }
            let Some(waiting) = Arc::get_mut(&mut self.waiting) else { break };
            let Some(Waited { frame, tell, .. }) = waiting.pop(now.boot) else { break };
            bytes += frame.len();
            if tun.has_virtio_headers() {
                engine.handle_tun_frame(now, frame, tell, &mut self.outbox);
            } else {
                engine.handle_tun_packet(now, frame, tell, &mut self.outbox);
            }
            if self.outbox.bytes() >= SEND_AT {
                // A batch that is not full waits for the next frame, if there is one.
                let keep_last =
                    !self.waiting.is_empty() && self.outbox.is_last_open() && self.outbox.len() > 1;
                self.send(now, relays, keep_last);
            }
        }
        // What is left goes now, or with the next turn if that comes at once.
        let keep_last = !self.waiting.is_empty() && self.outbox.is_last_open();
        self.send(now, relays, keep_last);
    }

    /// Takes what came to socket `index`, and what the host answers at once. Without an engine what strangers send is
    /// read and forgotten.
    pub fn from_udp(
        &mut self,
        now: Now,
        index: usize,
        mut engine: Option<&mut Engine>,
        tun: Option<&Tun>,
        relays: &mut impl RelayLinks,
    ) {
        let Some(socket) = self.sockets.get(index).cloned() else { return };
        let together =
            self.crew.size() > 1 && engine.as_deref().is_some_and(|engine| engine.has_busy_peers(now));
        let mut taken = 0;
        self.last_place = index + 1;
        self.more = true;
        for _ in 0..UDP_BUDGET {
            if taken >= UDP_BUDGET_BYTES {
                break;
            }
            let received = socket.receive(&mut self.receive, now);
            if let Some(engine) = engine.as_deref_mut() {
                let opened = if together { self.open_together(now, socket.id(), engine, tun) } else { 0 };
                let Self { receive, tun_out, refused, untaken, .. } = self;
                for batch in receive.batches().skip(opened) {
                    let from = Source::Direct { socket: socket.id(), remote: batch.remote };
                    let data = &mut batch.slot[..batch.len];
                    engine.handle_datagrams(now, from, batch.arrival, data, tun_out);
                    *untaken += deliver(tun_out, tun, refused);
                }
            }
            taken += self.receive.batches().map(|batch| batch.len).sum::<usize>();
            match received {
                Ok(true) => {}
                Ok(false) => {
                    self.more = false;
                    break;
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => {
                    self.more = false;
                    break;
                }
                // An ICMP error about something sent earlier: the paths find out by themselves.
                Err(e) => tracing::trace!("receive: {e}"),
            }
        }
        if taken > 0
            && let (Some(engine), Some(tun)) = (engine, tun)
        {
            // What waited for a handshake that has just come to its end goes before what the host sends next.
            self.drain_sealed(now, engine, relays);
            // TCP acknowledges while it takes a frame: the answer is there before the runtime can tell.
            if self.read_tun(tun, Tun::receive_now).is_ok() {
                self.seal_waiting(now, tun, engine, relays);
            }
        }
    }

    /// Opens received batches with the crew's help, up to one that must be handled the usual way. Returns how many.
    fn open_together(&mut self, now: Now, socket: u8, engine: &mut Engine, tun: Option<&Tun>) -> usize {
        let Self { receive, tun_out, refused, untaken, crew, open_jobs, jobs, shared_turns, .. } = self;
        open_jobs.resize_with(crew.size(), || OpenJob::new(tun_out.alike()));
        let mut begun = 0;
        for batch in receive.batches() {
            let from = Source::Direct { socket, remote: batch.remote };
            if !engine.begin_open(now, from, batch.arrival, batch.slot, batch.len, open_jobs) {
                break;
            }
            begun += 1;
        }
        let (idle, due): (Vec<_>, Vec<_>) = open_jobs.drain(..).partition(OpenJob::is_empty);
        open_jobs.extend(idle);
        jobs.extend(due.into_iter().map(Job::Open));
        *shared_turns += u64::from(jobs.len() > 1);
        crew.run(jobs);
        for job in jobs.drain(..) {
            let Job::Open(mut job) = job else { continue };
            engine.finish_open(now, &mut job, |slot| receive.give_back(slot));
            *untaken += deliver(job.tun(), tun, refused);
            open_jobs.push(job);
        }
        begun
    }

    /// Takes one datagram that came through a relay or the coordinator.
    pub fn from_elsewhere(
        &mut self,
        now: Now,
        from: Source,
        datagram: &mut [u8],
        engine: &mut Engine,
        tun: Option<&Tun>,
    ) {
        engine.handle_datagram(now, from, datagram, 0, &mut self.tun_out);
        self.untaken += deliver(&mut self.tun_out, tun, &mut self.refused);
    }

    /// Empties the engine's outputs of packets.
    pub fn drain(&mut self, now: Now, engine: &mut Engine, tun: Option<&Tun>, relays: &mut impl RelayLinks) {
        self.drain_sealed(now, engine, relays);
        loop {
            let more = engine.poll_tun(&mut self.tun_out);
            self.untaken += deliver(&mut self.tun_out, tun, &mut self.refused);
            if !more {
                break;
            }
        }
    }

    /// Sends what the engine has of its own accord.
    fn drain_sealed(&mut self, now: Now, engine: &mut Engine, relays: &mut impl RelayLinks) {
        loop {
            let more = engine.poll_transmit(now, &mut self.outbox);
            let keep_last = !more && !self.waiting.is_empty() && self.outbox.is_last_open();
            self.send(now, relays, keep_last);
            if !more {
                break;
            }
        }
    }

    /// Sends what the engine has sealed, or all of it but the last batch.
    fn send(&mut self, now: Now, relays: &mut impl RelayLinks, keep_last: bool) {
        let count = self.outbox.len() - usize::from(keep_last);
        for (transmit, bytes) in self.outbox.iter().take(count) {
            if let Destination::Relay { relay, device } = transmit.to {
                let size = transmit.segment_size.unwrap_or(bytes.len()).max(1);
                bytes.chunks(size).for_each(|packet| relays.send(now, relay, device, packet));
            }
        }
        send_direct(&self.sockets, &mut self.outbox, keep_last);
    }
}

/// Sends what goes straight through `sockets`, and clears `out`; the last batch stays if it is to be kept.
fn send_direct(sockets: &[Arc<Udp>], out: &mut Outbox, keep_last: bool) {
    let count = out.len() - usize::from(keep_last);
    for (transmit, bytes) in out.iter().take(count) {
        let Destination::Direct { socket, remote } = transmit.to else { continue };
        let Some(socket) = sockets.iter().find(|s| s.id() == socket) else { continue };
        let sent = if transmit.whole {
            socket.send_whole(remote, bytes)
        } else {
            socket.send(remote, transmit.ecn, bytes, transmit.segment_size)
        };
        if let Err(e) = sent {
            tracing::trace!("send to {remote}: {e}");
        }
    }
    if keep_last { out.clear_but_last() } else { out.clear() }
}

/// What takes frames for the host: a TUN.
trait FrameSink {
    fn put<'a>(&self, pieces: impl Iterator<Item = &'a [u8]>) -> io::Result<()>;
    fn has_virtio_headers(&self) -> bool;
}

impl FrameSink for Tun {
    fn put<'a>(&self, pieces: impl Iterator<Item = &'a [u8]>) -> io::Result<()> {
        self.send(pieces)
    }

    fn has_virtio_headers(&self) -> bool {
        self.has_virtio_headers()
    }
}

/// Hands plaintext packets to the host; without a TUN they are dropped. Returns how many frames it did not take.
fn deliver(packets: &mut TunOut, tun: Option<&impl FrameSink>, refused: &mut bool) -> u64 {
    let Some(tun) = tun else {
        packets.clear();
        return 0;
    };
    let (mut refuses, mut untaken) = (false, 0);
    for frame in packets.frames() {
        if let Err(e) = tun.put(frame) {
            untaken += 1;
            refuses |= tun::is_refusal(&e);
            tracing::trace!("the TUN does not take a frame: {e}");
        }
    }
    if refuses && packets.joins() {
        if !*refused {
            tracing::warn!("the kernel refuses super-frames: packets go to the TUN one by one from now on");
        }
        *refused = true;
        *packets = arena(tun, TunOffload::default());
    }
    packets.clear();
    untaken
}

/// Of what the TUN said it takes, what goes to it: nothing joined, once it has refused such a frame.
fn tun_in_use(said: TunOffload, refused: bool) -> TunOffload {
    if refused { TunOffload::default() } else { said }
}

/// Memory for packets that go to `tun`.
fn arena(tun: &impl FrameSink, offload: TunOffload) -> TunOut {
    if tun.has_virtio_headers() { TunOut::vectored(offload) } else { TunOut::default() }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use warren_engine::io::Added;
    use warren_engine::packet::{Addrs, build};

    use super::*;

    const BOTH: TunOffload = TunOffload { tcp: true, udp: true };

    /// A kernel that takes single packets only, whatever it said.
    #[derive(Default)]
    struct Old {
        taken: RefCell<Vec<Vec<u8>>>,
        refusals: RefCell<usize>,
    }

    impl FrameSink for Old {
        fn put<'a>(&self, pieces: impl Iterator<Item = &'a [u8]>) -> io::Result<()> {
            let frame = pieces.flatten().copied().collect::<Vec<u8>>();
            // The second byte of a virtio header says how to cut; 0 is not at all.
            if frame[1] != 0 {
                *self.refusals.borrow_mut() += 1;
                return Err(io::Error::from_raw_os_error(libc::EINVAL));
            }
            self.taken.borrow_mut().push(frame[HEADER_LEN..].to_vec());
            Ok(())
        }

        fn has_virtio_headers(&self) -> bool {
            true
        }
    }

    fn datagram(number: u8) -> Vec<u8> {
        let mut udp = [&[0x1f, 0x40, 0x1f, 0x41, 0, 108, 0, 0][..], &[number; 100]].concat();
        let addrs = Addrs::new([10, 0, 0, 2].into(), [10, 0, 0, 1].into()).unwrap();
        let sum = build::transport_checksum(addrs, 17, &udp);
        udp[6..8].copy_from_slice(&sum.to_be_bytes());
        let mut packet = vec![0x45, 0, 0, 128, 0, 0, 0x40, 0, 64, 17, 0, 0, 10, 0, 0, 2, 10, 0, 0, 1];
        let sum = build::checksum(&[&packet]);
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
        [packet, udp].concat()
    }

    #[test]
    fn after_a_refusal_packets_go_one_by_one_and_nothing_is_in_use() {
        let kernel = Old::default();
        let (mut packets, mut refused) = (arena(&kernel, BOTH), false);
        for batch in 0..3u8 {
            assert_eq!((tun_in_use(BOTH, refused) == BOTH, packets.joins()), (batch == 0, batch == 0));
            for n in 0..4 {
                assert_eq!(packets.add(0, &datagram(batch * 4 + n)), Added::Yes);
            }
            packets.settle(|_, _, _| true);
            let untaken = deliver(&mut packets, Some(&kernel), &mut refused);
            assert_eq!(untaken, u64::from(batch == 0));
            assert!(refused && packets.is_empty());
        }
        // The batch that was refused is lost, as on any link; it was one frame.
        assert_eq!(*kernel.refusals.borrow(), 1);
        let taken = kernel.taken.into_inner();
        assert_eq!(taken, (4..12).map(datagram).collect::<Vec<_>>());
    }

    #[test]
    fn a_full_queue_is_no_refusal() {
        struct Full;
        impl FrameSink for Full {
            fn put<'a>(&self, _: impl Iterator<Item = &'a [u8]>) -> io::Result<()> {
                Err(ErrorKind::WouldBlock.into())
            }

            fn has_virtio_headers(&self) -> bool {
                true
            }
        }
        let (mut packets, mut refused) = (arena(&Full, BOTH), false);
        assert_eq!(packets.add(0, &datagram(0)), Added::Yes);
        packets.settle(|_, _, _| true);
        assert_eq!(deliver(&mut packets, Some(&Full), &mut refused), 1);
        assert!(!refused && packets.joins() && packets.is_empty());
    }

    #[expect(clippy::print_stdout, reason = "a skipped test says so")]
    #[tokio::test]
    async fn extra_sockets_are_opened_and_closed_as_asked_and_bounded() {
        let Ok(sockets) = crate::os::udp::bind(None, None, Offloads::ALL) else {
            println!("skipped: no permission for marked sockets");
            return;
        };
        let mut plane = DataPlane::new(sockets);
        assert_eq!(plane.set_extra(&[16, 17]), [16, 17]);
        let port = plane.sockets[plane.usual + 1].bound().port();
        assert_eq!(plane.set_extra(&[17, 18]), [17, 18]);
        assert_eq!(plane.sockets[plane.usual].bound().port(), port, "one that stays keeps its port");
        let all: Vec<u8> = (0..=u8::MAX).collect();
        assert!(plane.set_extra(&all).len() <= MAX_EXTRA_SOCKETS);
        let to = std::net::SocketAddr::from(([127, 0, 0, 1], plane.sockets[plane.usual + 2].bound().port()));
        plane.sockets[0].send(to, warren_engine::offload::Ecn::NotCapable, b"hi", None).unwrap();
        assert_eq!(plane.ready(None).await, Ready::Udp(plane.usual + 2));
        assert!(plane.set_extra(&[]).is_empty());
    }

    #[expect(clippy::print_stdout, reason = "a skipped test says so")]
    #[tokio::test]
    async fn extra_sockets_do_without_what_is_switched_off_as_well() {
        for (wanted, joins) in [(Offloads::ALL, true), (Offloads::NONE, false)] {
            let Ok(sockets) = crate::os::udp::bind(None, None, wanted) else {
                println!("skipped: no permission for marked sockets");
                return;
            };
            let mut plane = DataPlane::new(sockets);
            assert_eq!(plane.set_extra(&[16]), [16]);
            let usual = &plane.sockets()[0];
            let extra = &plane.sockets[plane.usual];
            assert_eq!((extra.joins_sends(), extra.joins_receives()), (joins, joins));
            assert_eq!((usual.joins_sends(), usual.joins_receives()), (joins, joins));
        }
    }
}
