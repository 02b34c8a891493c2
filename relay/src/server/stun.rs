//! The STUN sockets: one, or with a second address (RFC 5780) one at each pair of the addresses' hosts and ports.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::net::UdpSocket;
use tokio::task::JoinSet;
use warren_common::time::Instant;

use super::Shared;
use super::per_network::PerNetwork;
use crate::core::Gcra;
use crate::{os, stun};

/// Most answers per second in the long run, over all sockets: 256 kB/s, ten times what 20 000 devices ask.
pub(super) const MAX_ANSWERS_PER_S: u32 = 8_000;

/// The share of it that one network may have: 2 000 devices at ten times their need, be it that they share one address.
const SHARES: u32 = 10;
/// How many answers may be given at once, in the time that they would take.
const BURST: Duration = Duration::from_secs(1);

/// What may be answered: no network can use up what there is for all.
struct Budget {
    all: Gcra,
    cost: Duration,
    networks: PerNetwork,
}

impl Budget {
    /// One of so many that make up the whole.
    fn new(parts: u32) -> Self {
        Self {
            all: Gcra::default(),
            cost: Duration::from_secs(1) * parts / MAX_ANSWERS_PER_S,
            networks: PerNetwork::default(),
        }
    }

    fn allow(&mut self, now: Instant, from: IpAddr) -> bool {
        self.networks.of(network(from)).allow(now, self.cost * SHARES, BURST)
            && self.all.allow(now, self.cost, BURST)
    }
}

/// What one party can have all addresses of.
fn network(ip: IpAddr) -> [u8; 6] {
    match ip.to_canonical() {
        IpAddr::V4(ip) => {
            let [a, b, c, _] = ip.octets();
            [a, b, c, 0, 0, 4]
        }
        IpAddr::V6(ip) => {
            let [a, b, c, d, e, f, ..] = ip.octets();
            [a, b, c, d, e, f]
        }
    }
}

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
        let apart = self.other(n, true, true);
        let other = (apart != n).then(|| self.0[apart].local_addr().ok()).flatten();
        let mut budget = Budget::new(sockets);
        let mut buffer = [0; stun::MAX_REQUEST + 1];
        loop {
            // An error here is an ICMP message about an earlier answer: nothing to do about it.
            let Ok((len, from)) = self.0[n].recv_from(&mut buffer).await else { continue };
            match stun::answer(&buffer[..len], from, other) {
                Some(answer) if budget.allow(os::now().boot, from.ip()) => {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_network_that_asks_without_end_keeps_nobody_else_from_an_answer() {
        let mut budget = Budget::new(1);
        let mut now = Instant::ZERO;
        let (mut flood, mut others) = (0, 0);
        // Ten seconds: 20 000 questions a second from one network, 100 from others.
        for n in 0..200_000_u32 {
            now += Duration::from_micros(50);
            let at = |a: u8, b: u32| IpAddr::from([a, 0, (b >> 8) as u8, b as u8]);
            flood += u32::from(budget.allow(now, at(10, n % 256)));
            if n % 200 == 0 {
                others += u32::from(budget.allow(now, at(11, n / 200 * 256)));
            }
        }
        let share = MAX_ANSWERS_PER_S / SHARES;
        assert!((10 * share..=11 * share).contains(&flood), "{flood}");
        // One in 4 096 networks may fall together with it.
        assert!(others >= 900, "{others} of 1 000");
        // Whoever asks from everywhere gets no more than there is.
        let all =
            (0..100_000_u32).filter(|n| budget.allow(now, IpAddr::from((n << 8).to_be_bytes()))).count();
        assert!(all <= MAX_ANSWERS_PER_S as usize, "{all}");
        assert_eq!(network("::ffff:192.0.2.9".parse().unwrap()), network("192.0.2.1".parse().unwrap()));
        assert_ne!(network("2001:db8:1::1".parse().unwrap()), network("2001:db8:2::1".parse().unwrap()));
    }
}
