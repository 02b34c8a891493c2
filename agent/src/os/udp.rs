//! The UDP sockets that carry WireGuard, probes and STUN: batched both ways where the kernel can.

use std::ffi::c_int;
use std::io::{self, IoSliceMut};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsRawFd as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};

use quinn_udp::{BATCH_SIZE, RecvMeta, UdpSockRef, UdpSocketState};
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use warren_common::time::Now;
use warren_engine::io::Arrival;
use warren_engine::offload::Ecn;
use warren_engine::queue::{RECEIVED_TARGET, Standing};

use self::send::Sender;
use super::{MARK, Offloads};
use crate::problem::{Problem, io_text};

pub(crate) mod send;

/// Kernel buffer asked for in each direction, in bytes: 50 ms at 1 Gbit/s. The kernel may give less.
const BUFFER: usize = 7 << 20;
/// Bytes of one receive buffer: a GRO batch is at most one IP packet's length.
const SLOT: usize = 65_536;
/// Receive buffers of one call: a quarter of a millisecond's work when all are full; more bring little for single
/// datagrams.
const SLOTS: usize = if BATCH_SIZE < 4 { BATCH_SIZE } else { 4 };

/// Datagrams of one batch from which on its sender may be told that others wait for it, a count.
const TELLING: usize = 8;

/// One socket of one family.
#[derive(Debug)]
pub struct Udp {
    id: u8,
    /// Only heard of when there is something to receive: a send never waits, and being told of each datagram that left the
    /// socket would be a wake-up per send.
    socket: AsyncFd<Socket>,
    state: UdpSocketState,
    sender: Sender,
    /// Calls that sent nothing, or not all.
    unsent: AtomicU64,
    bound: SocketAddr,
    wanted: Offloads,
}

/// Memory for one receive call, and what it brought.
pub struct ReceiveBuffer {
    slots: [Box<[u8]>; SLOTS],
    meta: [RecvMeta; SLOTS],
    arrivals: [Arrival; SLOTS],
    count: usize,
    /// Of what waits for us in the socket.
    standing: Standing,
}

/// What came from one sender: a datagram, or several.
#[derive(Debug)]
pub struct Batch<'a> {
    /// The sender.
    pub remote: SocketAddr,
    /// How the datagrams lie.
    pub arrival: Arrival,
    /// Where they are. May be taken, and has to be [given back](ReceiveBuffer::give_back) before the next call then.
    pub slot: &'a mut Box<[u8]>,
    /// Bytes of all datagrams, at the front of the slot.
    pub len: usize,
}

impl std::fmt::Debug for ReceiveBuffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ReceiveBuffer")
    }
}

impl Default for ReceiveBuffer {
    fn default() -> Self {
        Self {
            slots: std::array::from_fn(|_| vec![0; SLOT].into_boxed_slice()),
            meta: [RecvMeta::default(); SLOTS],
            arrivals: [Arrival::default(); SLOTS],
            count: 0,
            standing: Standing::new(RECEIVED_TARGET),
        }
    }
}

impl ReceiveBuffer {
    /// What the last call brought, in the order it came.
    pub fn batches(&mut self) -> impl Iterator<Item = Batch<'_>> {
        let received = self.meta.iter().zip(&self.arrivals).take(self.count);
        received.zip(&mut self.slots).map(|((meta, arrival), slot)| Batch {
            remote: meta.addr,
            arrival: *arrival,
            slot,
            len: meta.len,
        })
    }

    /// Takes back the memory of a [`Batch`].
    pub fn give_back(&mut self, slot: Box<[u8]>) {
        if let Some(place) = self.slots.iter_mut().find(|place| place.is_empty()) {
            *place = slot;
        }
    }
}

/// Binds one socket per family on the same port. `wanted` is the user's; otherwise `last` is tried, then any port.
///
/// # Errors
/// The wanted port is taken, or the host has no usable UDP at all.
pub fn bind(wanted: Option<u16>, last: Option<u16>, offloads: Offloads) -> Result<Vec<Udp>, Problem> {
    let first = wanted.or(last).unwrap_or(0);
    match bind_pair(first, offloads) {
        Err(e) if e.kind() == io::ErrorKind::AddrInUse && wanted.is_none() => bind_pair(0, offloads),
        other => other,
    }
    .map_err(|e| {
        if e.kind() == io::ErrorKind::AddrInUse {
            return Problem::new(
                "port-in-use",
                format!("UDP port {first} is in use by another program"),
                "choose another with `warrend --listen-port N`, or leave the option away",
            );
        }
        if e.kind() == io::ErrorKind::PermissionDenied {
            return Problem::new(
                "udp-permission",
                "no permission to open a marked UDP socket",
                "run warrend as root or with CAP_NET_ADMIN; ports below 1024 also need CAP_NET_BIND_SERVICE",
            );
        }
        Problem::new(
            "udp",
            format!("no UDP socket: {}", io_text(&e)),
            "check the host's network configuration",
        )
    })
}

fn bind_pair(port: u16, offloads: Offloads) -> io::Result<Vec<Udp>> {
    let v4 = Udp::bind(0, (Ipv4Addr::UNSPECIFIED, port).into(), offloads)?;
    let port = v4.bound.port();
    match Udp::bind(1, (Ipv6Addr::UNSPECIFIED, port).into(), offloads) {
        Ok(v6) => Ok(vec![v4, v6]),
        Err(e)
            if e.raw_os_error() == Some(libc::EAFNOSUPPORT)
                || e.kind() == io::ErrorKind::AddrNotAvailable =>
        {
            Ok(vec![v4]) // a host without IPv6
        }
        Err(e) => Err(e),
    }
}

/// A non-blocking UDP socket with `mark` (0 for none), bound to `address`, of that family only.
///
/// # Errors
/// The address is taken, or there is no permission for a mark.
pub fn socket(address: SocketAddr, mark: u32) -> io::Result<std::net::UdpSocket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_nonblocking(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    if mark != 0 {
        socket.set_mark(mark)?;
    }
    socket.bind(&address.into())?;
    Ok(socket.into())
}

impl Udp {
    fn bind(id: u8, address: SocketAddr, wanted: Offloads) -> io::Result<Self> {
        let socket = Socket::from(socket(address, MARK)?);
        let state = UdpSocketState::new(UdpSockRef::from(&socket))?;
        set_fragments(&socket, address.is_ipv6(), Fragments::IfNeeded)?;
        // Which of our addresses a datagram came to isn't used, and quinn-udp's room for what the kernel tells beside one
        // is too small for this, batches, time stamps and congestion marks together: the marks would be cut off.
        if address.is_ipv6() {
            set_option(&socket, libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO, 0)?;
        } else {
            set_option(&socket, libc::IPPROTO_IP, libc::IP_PKTINFO, 0)?;
        }
        if !wanted.udp_receive {
            set_option(&socket, libc::SOL_UDP, libc::UDP_GRO, 0)?;
        }
        // Smaller buffers than asked for only cost throughput.
        let _ = state.set_send_buffer_size(UdpSockRef::from(&socket), BUFFER);
        let _ = state.set_recv_buffer_size(UdpSockRef::from(&socket), BUFFER);
        let bound = socket.local_addr()?.as_socket().ok_or(io::ErrorKind::InvalidInput)?;
        #[expect(unsafe_code, reason = "registering a raw descriptor with the runtime")]
        // SAFETY: `socket` is an open descriptor that nothing else owns; the `AsyncFd` keeps it and never hands it out.
        let socket = unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) }
            .map_err(io::Error::from)?;
        let sender = Sender::new(if wanted.udp_send { state.max_gso_segments() } else { 1 });
        Ok(Self { id, socket, state, sender, unsent: AtomicU64::new(0), bound, wanted })
    }

    /// An IPv4 socket on any free port, with what this one was to use.
    ///
    /// # Errors
    /// There is none, or the host has no room for more files.
    pub fn extra(&self, id: u8) -> io::Result<Self> {
        Self::bind(id, (Ipv4Addr::UNSPECIFIED, 0).into(), self.wanted)
    }

    /// True if there is something to receive; otherwise the task is woken when there is.
    pub fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.socket.poll_read_ready(cx).map(|ready| {
            // An error means that the runtime is shutting down; the receive call then says so.
            if let Ok(mut guard) = ready {
                guard.retain_ready();
            }
        })
    }

    /// Our number for it: [`warren_engine::io::LocalSocket::id`].
    pub fn id(&self) -> u8 {
        self.id
    }

    /// The unspecified address and the port it is bound to.
    pub fn bound(&self) -> SocketAddr {
        self.bound
    }

    /// One send may hold many datagrams. May become false: only a send shows that a network card can't.
    pub fn joins_sends(&self) -> bool {
        self.sender.most() > 1
    }

    /// One receive may bring many datagrams.
    pub fn joins_receives(&self) -> bool {
        self.wanted.udp_receive && self.state.gro_segments() > 1
    }

    /// Receives what is there into `buffer`. True if there may be more.
    ///
    /// # Errors
    /// `WouldBlock` if there is nothing; other errors concern earlier sends (ICMP) and are no reason to stop.
    pub fn receive(&self, buffer: &mut ReceiveBuffer, now: Now) -> io::Result<bool> {
        let ReceiveBuffer { slots, meta, arrivals, count, standing } = buffer;
        *count = 0;
        let done = {
            let mut slots = slots.each_mut().map(|slot| IoSliceMut::new(slot));
            self.socket.try_io(Interest::READABLE, |socket| {
                *count = self.state.recv(UdpSockRef::from(socket), &mut slots, meta)?;
                // Fewer than there was room for: the runtime may wait for the next ones without another call.
                if *count < SLOTS { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
            })
        };
        let more = done.is_ok();
        if *count == 0 {
            done?;
        }
        let meta = &meta[..*count];
        // Only one batch is told, and none of single datagrams: who sends one at a time isn't who makes them wait.
        let is_batch = |meta: &RecvMeta| meta.len / meta.stride.max(1) >= TELLING;
        let mut tell = meta.iter().any(is_batch) && {
            let waiting = self.waiting();
            standing.observe(now.boot, waiting, waiting == 0)
        };
        for (arrival, meta) in arrivals.iter_mut().zip(meta) {
            let ecn = Ecn::from_bits(meta.ecn.map_or(0, |ecn| ecn as u8));
            let tell = is_batch(meta) && std::mem::take(&mut tell);
            *arrival = Arrival { stride: meta.stride.max(1), ecn, tell };
        }
        Ok(more)
    }

    /// Bytes that wait in the socket, as the kernel counts memory; 0 if it doesn't say.
    fn waiting(&self) -> u64 {
        const FIELDS: usize = 9; // of `SO_MEMINFO`; the first is what was received
        let mut fields = [0u32; FIELDS];
        let mut len = size_of_val(&fields) as libc::socklen_t;
        // SAFETY: the descriptor is open, and pointer and length describe one live array of plain numbers.
        #[expect(unsafe_code, reason = "no crate in use has this socket option")]
        let result = unsafe {
            libc::getsockopt(
                self.socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_MEMINFO,
                (&raw mut fields).cast(),
                &raw mut len,
            )
        };
        if result == 0 { u64::from(fields[0]) } else { 0 }
    }

    /// Sends one datagram or a batch of `segment`-sized ones. What the kernel has no room for is dropped, as on any
    /// full link; a batch that the kernel can't segment goes out one by one.
    ///
    /// # Errors
    /// The network is unreachable, or the datagram too long for it.
    pub fn send(&self, to: SocketAddr, ecn: Ecn, contents: &[u8], segment: Option<usize>) -> io::Result<()> {
        let size = segment.unwrap_or(contents.len()).max(1);
        let batches = contents.chunks(size.saturating_mul(self.sender.most()));
        let sent = batches.map(|batch| self.sender.send(self.socket.get_ref(), to, ecn, batch, segment));
        let sent = sent.fold(Ok(()), Result::and);
        if sent.is_err() {
            self.unsent.fetch_add(1, Ordering::Relaxed);
        }
        sent
    }

    /// Calls so far that sent nothing, or not all that they should: no room in the kernel, no route, too long.
    pub fn unsent(&self) -> u64 {
        self.unsent.load(Ordering::Relaxed)
    }

    /// Sends one datagram that arrives whole or not at all: with the DF bit, and without asking what the kernel believes
    /// of the path. The kernel's own refusal counts as a loss.
    ///
    /// # Errors
    /// The network is unreachable, or the datagram too long for the first link.
    pub fn send_whole(&self, to: SocketAddr, contents: &[u8]) -> io::Result<()> {
        let socket = SockRef::from(&self.socket);
        let ipv6 = self.bound.is_ipv6();
        // Two more system calls, for the few datagrams that explore a path.
        set_fragments(&socket, ipv6, Fragments::Never)?;
        let sent = self.sender.send(self.socket.get_ref(), to, Ecn::NotCapable, contents, None);
        set_fragments(&socket, ipv6, Fragments::IfNeeded)?;
        sent
    }
}

/// Whether the network may cut our datagrams into fragments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fragments {
    /// Until the path's MTU is known a small link should slow a tunnel, not break it. quinn-udp forbids fragments, since
    /// QUIC must.
    IfNeeded,
    /// The DF bit is set.
    Never,
}

fn set_fragments(socket: &Socket, ipv6: bool, fragments: Fragments) -> io::Result<()> {
    if ipv6 {
        let (value, never) = match fragments {
            Fragments::IfNeeded => (libc::IPV6_PMTUDISC_DONT, 0),
            Fragments::Never => (libc::IPV6_PMTUDISC_PROBE, 1),
        };
        // IPv6 has a switch of its own beside that, which quinn-udp has set.
        set_option(socket, libc::IPPROTO_IPV6, libc::IPV6_DONTFRAG, never)?;
        set_option(socket, libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, value)
    } else {
        let value = match fragments {
            Fragments::IfNeeded => libc::IP_PMTUDISC_DONT,
            Fragments::Never => libc::IP_PMTUDISC_PROBE,
        };
        set_option(socket, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, value)
    }
}

#[expect(unsafe_code, reason = "no crate in use has these socket options")]
fn set_option(socket: &Socket, level: c_int, option: c_int, value: c_int) -> io::Result<()> {
    // SAFETY: the descriptor is open, and the pointer and length describe one live `c_int`.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw const value).cast(),
            size_of_val(&value) as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[expect(clippy::print_stdout, reason = "a skipped test says so")]
    fn marked_sockets() -> Option<Vec<Udp>> {
        match bind(None, None, Offloads::ALL) {
            Ok(sockets) => Some(sockets),
            Err(problem) => {
                assert_eq!(problem.code, "udp-permission");
                println!("skipped: {}", problem.text);
                None
            }
        }
    }

    #[tokio::test]
    async fn batches_arrive_as_they_were_sent() {
        let Some(sockets) = marked_sockets() else { return };
        let port = sockets[0].bound().port();
        for socket in &sockets {
            assert_eq!(socket.bound().port(), port);
        }
        let to = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let sent: Vec<u8> = (0..2_500u32).map(|i| i as u8).collect();
        sockets[0].send(to, Ecn::Capable0, &sent, Some(1_000)).unwrap();
        let (mut buffer, mut got, mut sizes) = (ReceiveBuffer::default(), Vec::new(), Vec::new());
        while got.len() < sent.len() {
            std::future::poll_fn(|cx| sockets[0].poll_readable(cx)).await;
            let result = sockets[0].receive(&mut buffer, crate::clock::now());
            for Batch { arrival, slot, len, .. } in buffer.batches() {
                assert_eq!(arrival.ecn, Ecn::Capable0);
                sizes.extend(slot[..len].chunks(arrival.stride).map(<[u8]>::len));
                got.extend_from_slice(&slot[..len]);
            }
            assert!(result.as_ref().is_ok() || result.is_err_and(|e| e.kind() == io::ErrorKind::WouldBlock));
        }
        assert_eq!((got, sizes), (sent, vec![1_000, 1_000, 500]));
    }

    #[tokio::test]
    async fn a_wanted_port_that_is_taken_is_an_error_and_a_remembered_one_is_not() {
        let Some(sockets) = marked_sockets() else { return };
        let port = sockets[0].bound().port();
        assert_eq!(bind(Some(port), None, Offloads::ALL).unwrap_err().code, "port-in-use");
        assert_ne!(bind(None, Some(port), Offloads::ALL).unwrap()[0].bound().port(), port);
    }
}
