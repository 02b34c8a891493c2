//! The UDP sockets that carry WireGuard, probes and STUN: batched both ways where the kernel can.

use std::io::{self, IoSliceMut};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use quinn_udp::{BATCH_SIZE, RecvMeta, Transmit, UdpSockRef, UdpSocketState};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::Interest;
use tokio::net::UdpSocket;

use super::MARK;
use crate::problem::{Problem, io_text};

/// Kernel buffer asked for in each direction, in bytes: 50 ms at 1 Gbit/s. The kernel may give less.
const BUFFER: usize = 7 << 20;
/// Bytes of one receive buffer: a GRO batch is at most one IP packet's length.
const SLOT: usize = 65_536;
/// Receive buffers of one call: enough for a batch of single datagrams; more cost memory and bring nothing under GRO.
const SLOTS: usize = if BATCH_SIZE < 8 { BATCH_SIZE } else { 8 };

/// One socket of one family.
#[derive(Debug)]
pub struct Udp {
    id: u8,
    socket: UdpSocket,
    state: UdpSocketState,
    bound: SocketAddr,
}

/// Memory for one receive call.
pub struct ReceiveBuffer {
    bytes: Box<[u8]>,
    meta: [RecvMeta; SLOTS],
}

impl std::fmt::Debug for ReceiveBuffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ReceiveBuffer")
    }
}

impl Default for ReceiveBuffer {
    fn default() -> Self {
        Self { bytes: vec![0; SLOT * SLOTS].into_boxed_slice(), meta: [RecvMeta::default(); SLOTS] }
    }
}

/// Binds one socket per family on the same port. `wanted` is the user's; otherwise `last` is tried, then any port.
///
/// # Errors
/// The wanted port is taken, or the host has no usable UDP at all.
pub fn bind(wanted: Option<u16>, last: Option<u16>) -> Result<Vec<Udp>, Problem> {
    let first = wanted.or(last).unwrap_or(0);
    match bind_pair(first) {
        Err(e) if e.kind() == io::ErrorKind::AddrInUse && wanted.is_none() => bind_pair(0),
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

fn bind_pair(port: u16) -> io::Result<Vec<Udp>> {
    let v4 = Udp::bind(0, (Ipv4Addr::UNSPECIFIED, port).into())?;
    let port = v4.bound.port();
    match Udp::bind(1, (Ipv6Addr::UNSPECIFIED, port).into()) {
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
    fn bind(id: u8, address: SocketAddr) -> io::Result<Self> {
        let socket = Socket::from(socket(address, MARK)?);
        let state = UdpSocketState::new(UdpSockRef::from(&socket))?;
        fragment_if_needed(&socket, address.is_ipv6())?;
        // Smaller buffers than asked for only cost throughput.
        let _ = state.set_send_buffer_size(UdpSockRef::from(&socket), BUFFER);
        let _ = state.set_recv_buffer_size(UdpSockRef::from(&socket), BUFFER);
        let socket = UdpSocket::from_std(socket.into())?;
        let bound = socket.local_addr()?;
        Ok(Self { id, socket, state, bound })
    }

    /// Our number for it: [`warren_engine::io::LocalSocket::id`].
    pub fn id(&self) -> u8 {
        self.id
    }

    /// The unspecified address and the port it is bound to.
    pub fn bound(&self) -> SocketAddr {
        self.bound
    }

    /// Waits until there is something to receive.
    ///
    /// # Errors
    /// The runtime is shutting down.
    pub async fn readable(&self) -> io::Result<()> {
        self.socket.readable().await
    }

    /// Receives what is there and calls `each` with sender, bytes and the size of each datagram in them.
    ///
    /// # Errors
    /// `WouldBlock` if there is nothing; other errors concern earlier sends (ICMP) and are no reason to stop.
    pub fn receive(
        &self,
        buffer: &mut ReceiveBuffer,
        mut each: impl FnMut(SocketAddr, &mut [u8], usize),
    ) -> io::Result<()> {
        let ReceiveBuffer { bytes, meta } = buffer;
        let count = {
            let mut chunks = bytes.chunks_exact_mut(SLOT);
            let mut slots: [IoSliceMut<'_>; SLOTS] =
                std::array::from_fn(|_| IoSliceMut::new(chunks.next().unwrap_or_default()));
            self.socket.try_io(Interest::READABLE, || {
                self.state.recv(UdpSockRef::from(&self.socket), &mut slots, meta)
            })?
        };
        for (slot, meta) in bytes.chunks_exact_mut(SLOT).zip(meta.iter()).take(count) {
            if meta.len > 0 {
                each(meta.addr, &mut slot[..meta.len], meta.stride.max(1));
            }
        }
        Ok(())
    }

    /// Sends one datagram or a batch of `segment`-sized ones. What the kernel has no room for is dropped, as on any
    /// full link; a batch that the kernel can't segment goes out one by one.
    ///
    /// # Errors
    /// The network is unreachable, or the datagram too long for it.
    pub fn send(&self, to: SocketAddr, contents: &[u8], segment: Option<usize>) -> io::Result<()> {
        let most = self.state.max_gso_segments();
        let size = segment.unwrap_or(contents.len()).max(1);
        for batch in contents.chunks(size.saturating_mul(most.max(1))) {
            match self.send_batch(to, batch, segment) {
                // GSO is off from now on (quinn-udp notices); this batch is sent again in pieces.
                Err(e)
                    if batch.len() > size && matches!(e.raw_os_error(), Some(libc::EIO | libc::EINVAL)) =>
                {
                    batch.chunks(size).try_for_each(|one| self.send_batch(to, one, None))?;
                }
                other => other?,
            }
        }
        Ok(())
    }

    fn send_batch(&self, to: SocketAddr, contents: &[u8], segment_size: Option<usize>) -> io::Result<()> {
        let transmit = Transmit { destination: to, ecn: None, contents, segment_size, src_ip: None };
        // Straight to the kernel: there is nothing to wait for, since what has no room is dropped.
        self.state.try_send(UdpSockRef::from(&self.socket), &transmit)
    }
}

/// Lets the network fragment our datagrams: the TUN's MTU is chosen for a 1 500-byte path, and a rare smaller one
/// should slow a tunnel, not break it. quinn-udp forbids fragments, since QUIC must.
#[expect(unsafe_code, reason = "no crate in use has this socket option")]
fn fragment_if_needed(socket: &Socket, ipv6: bool) -> io::Result<()> {
    use std::os::fd::AsRawFd as _;
    let (level, option, value) = if ipv6 {
        (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_DONT)
    } else {
        (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DONT)
    };
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
        match bind(None, None) {
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
        sockets[0].send(to, &sent, Some(1_000)).unwrap();
        let (mut buffer, mut got, mut sizes) = (ReceiveBuffer::default(), Vec::new(), Vec::new());
        while got.len() < sent.len() {
            sockets[0].readable().await.unwrap();
            let result = sockets[0].receive(&mut buffer, |_, bytes, stride| {
                sizes.extend(bytes.chunks(stride).map(<[u8]>::len));
                got.extend_from_slice(bytes);
            });
            assert!(result.is_ok() || result.is_err_and(|e| e.kind() == io::ErrorKind::WouldBlock));
        }
        assert_eq!((got, sizes), (sent, vec![1_000, 1_000, 500]));
    }

    #[tokio::test]
    async fn a_wanted_port_that_is_taken_is_an_error_and_a_remembered_one_is_not() {
        let Some(sockets) = marked_sockets() else { return };
        let port = sockets[0].bound().port();
        assert_eq!(bind(Some(port), None).unwrap_err().code, "port-in-use");
        assert_ne!(bind(None, Some(port)).unwrap()[0].bound().port(), port);
    }
}
