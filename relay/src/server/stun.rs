//! The STUN sockets: one, or with a second address (RFC 5780) one at each pair of the addresses' hosts and ports.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::net::UdpSocket;
use tokio::task::JoinSet;

use super::Shared;
use crate::core::Gcra;
use crate::{os, stun};

/// Most answers per second in the long run, over all sockets: 256 kB/s, ten times what 20 000 devices ask.
pub(super) const MAX_ANSWERS_PER_S: u32 = 8_000;

/// In pairs: neighbours differ by the port, the second half by the host.
#[derive(Debug)]
pub(super) struct Sockets(Vec<UdpSocket>);

impl Sockets {
    pub(super) fn bind(addr: SocketAddr, second: Option<SocketAddr>) -> io::Result<Self> {
        let first = bind(addr)?;
        let Some(second) = second else { return Ok(Self(vec![first])) };
        let addr = first.local_addr()?;
        let apart = addr.ip() != second.ip() && addr.port() != second.port();
        let own = |addr: &SocketAddr| !addr.ip().is_unspecified();
        if !apart || addr.is_ipv4() != second.is_ipv4() || !own(&addr) || !own(&second) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the second STUN address must be of the same family as the first and differ from it in address and port, and both must name one address of this host",
            ));
        }
        let fourth = bind(second)?;
        let port = fourth.local_addr()?.port();
        Ok(Self(vec![
            first,
            bind(SocketAddr::new(addr.ip(), port))?,
            bind(SocketAddr::new(second.ip(), addr.port()))?,
            fourth,
        ]))
    }

    /// The first address.
    pub(super) fn local_addr(&self) -> Option<SocketAddr> {
        self.0.first()?.local_addr().ok()
    }

    /// The socket that differs from the `n`th by host, port or both; the same one if there is no second address.
    fn other(&self, n: usize, host: bool, port: bool) -> usize {
        if self.0.len() > 1 { n ^ usize::from(port) ^ (2 * usize::from(host)) } else { n }
    }

    async fn serve(&self, n: usize, shared: &Shared) {
        let sockets = u32::try_from(self.0.len()).unwrap_or(1);
        let (cost, burst) = (Duration::from_secs(1) * sockets / MAX_ANSWERS_PER_S, Duration::from_secs(1));
        let apart = self.other(n, true, true);
        let other = (apart != n).then(|| self.0[apart].local_addr().ok()).flatten();
        let mut limit = Gcra::default();
        let mut buffer = [0; stun::MAX_REQUEST + 1];
        loop {
            // An error here is an ICMP message about an earlier answer: nothing to do about it.
            let Ok((len, from)) = self.0[n].recv_from(&mut buffer).await else { continue };
            match stun::answer(&buffer[..len], from, other) {
                Some(answer) if limit.allow(os::now().boot, cost, burst) => {
                    shared.stun_answered.fetch_add(1, Ordering::Relaxed);
                    let via = self.other(n, answer.other_address, answer.other_port);
                    let to = SocketAddr::new(from.ip(), answer.to_port.unwrap_or(from.port()));
                    // A full socket buffer loses it, as the network would.
                    let _ = self.0[via].try_send_to(&answer.bytes, to);
                }
                _ => {
                    shared.stun_ignored.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
    }
}

fn bind(addr: SocketAddr) -> io::Result<UdpSocket> {
    let socket = std::net::UdpSocket::bind(addr)?;
    socket.set_nonblocking(true)?;
    UdpSocket::from_std(socket)
}

pub(super) async fn serve(shared: Arc<Shared>, sockets: Sockets) {
    let sockets = Arc::new(sockets);
    let mut tasks = JoinSet::new();
    for n in 0..sockets.0.len() {
        let (sockets, shared) = (sockets.clone(), shared.clone());
        tasks.spawn(async move { sockets.serve(n, &shared).await });
    }
    while tasks.join_next().await.is_some() {}
}
