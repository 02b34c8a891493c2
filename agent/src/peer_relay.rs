//! This device as a relay for others, where its owner (`--relay-port`) and the policy both want that.
//!
//! The relay is the same library as everywhere, on a thread of its own with less priority: a flood at the relay must not
//! take the owner's own packets. It serves only while the coordinator says so, first of all from which revision on tokens
//! count. Without a coordinator it goes on: tokens end within ten minutes, and then nobody gets in.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;

use tokio::runtime::Builder;
use tokio::sync::oneshot;
use warren_common::ids::{NetworkId, RelayId};
use warren_common::keys::NetmapPublicKey;
use warren_common::wire::relay_control::{MAX_ADDRS, RelayCommand, RelayDuty, RelayOffer};
use warren_relay::core::{DropReason, Limits};
use warren_relay::server::{RelayServer, RelayServerConfig, StartError};
use warren_relay::tls::Identity;

use crate::api::Relaying;
use crate::problem::Problem;

/// Devices that it serves at most.
const MAX_CLIENTS: usize = 1_000;
/// Connections that have not shown a token: a quarter of what a relay of its own takes.
const MAX_HALF_OPEN: usize = 64;
/// What may wait for all devices together, in bytes.
const MAX_QUEUED: usize = 32 << 20;
/// How much less than everything else the relay's thread is worth to the scheduler.
const NICENESS: i32 = 5;

/// What the owner wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerRelayOptions {
    /// The port to listen on: QUIC and plain UDP on UDP, WebSockets inside TLS on TCP.
    pub port: u16,
    /// Where others reach it; this host's addresses and that port if empty.
    pub advertise: Vec<SocketAddr>,
    /// What one device may send through it in the long run, in bytes per second.
    pub rate: u64,
}

/// Why its thread has no server.
enum Start {
    Runtime(std::io::Error),
    Server(StartError),
}

/// This device as a relay.
#[derive(Debug)]
pub struct PeerRelay {
    options: PeerRelayOptions,
    dir: PathBuf,
    network: NetworkId,
    /// `None` without a certificate: then nothing is offered.
    cert_sha256: Option<[u8; 32]>,
    addrs: Vec<SocketAddr>,
    running: Option<Running>,
    trouble: Option<Problem>,
}

#[derive(Debug)]
struct Running {
    relay: RelayId,
    key: NetmapPublicKey,
    server: RelayServer,
    /// Takes the server, to end it in good order.
    end: oneshot::Sender<RelayServer>,
    thread: thread::JoinHandle<()>,
}

impl PeerRelay {
    /// Nothing runs yet. The certificate is in `dir`, made there at the first start.
    pub fn new(options: PeerRelayOptions, dir: &Path, network: NetworkId) -> Self {
        let identity = Identity::load_or_create(dir);
        let trouble = identity.as_ref().err().map(|error| {
            Problem::new(
                "relay-certificate-file",
                format!("this device can't relay for others: {error}"),
                "make room or put permissions right, then restart the agent; or start it without --relay-port",
            )
        });
        Self {
            options,
            dir: dir.to_owned(),
            network,
            cert_sha256: identity.ok().map(|identity| identity.sha256()),
            addrs: Vec::new(),
            running: None,
            trouble,
        }
    }

    /// Takes this host's addresses as it sees them, and as others do. True if what is offered has changed.
    pub fn set_addresses(
        &mut self,
        own: impl Iterator<Item = IpAddr>,
        outside: impl Iterator<Item = IpAddr>,
    ) -> bool {
        let addrs = match self.options.advertise.as_slice() {
            [] => {
                // First those that most can reach; one that is neither ours nor leads to us only costs an attempt.
                let mut own: Vec<IpAddr> = own.collect();
                own.sort_by_key(|addr| is_private(*addr));
                let mut addrs = Vec::with_capacity(MAX_ADDRS);
                for ip in outside.chain(own) {
                    let addr = SocketAddr::new(ip, self.options.port);
                    if addrs.len() < MAX_ADDRS && !addrs.contains(&addr) {
                        addrs.push(addr);
                    }
                }
                addrs
            }
            advertise => advertise.iter().take(MAX_ADDRS).copied().collect(),
        };
        let changed = self.addrs != addrs;
        self.addrs = addrs;
        changed
    }

    /// What the coordinator is told.
    pub fn offer(&self) -> Option<RelayOffer> {
        let addrs = self.addrs.iter().map(ToString::to_string).collect();
        Some(RelayOffer { addrs, cert_sha256: self.cert_sha256?.to_vec() })
    }

    /// Serves, or not, as the coordinator says. `key` is what verifies tokens.
    pub fn on_duty(&mut self, duty: &RelayDuty, key: NetmapPublicKey) {
        let Some(relay) = RelayId::from_slice(&duty.relay) else {
            if self.stop().is_some() {
                tracing::info!("this device relays for others no more");
            }
            return;
        };
        if let Some(running) = &self.running
            && (running.relay, running.key) == (relay, key)
            // A lower one is of a coordinator that was restored and numbers anew.
            && running.server.stats().core.floor <= duty.floor
        {
            return running.server.set_floor(duty.floor);
        }
        self.stop();
        match self.start(relay, key, duty.floor) {
            Ok(running) => {
                tracing::info!(port = self.options.port, "this device relays for others");
                self.running = Some(running);
                self.trouble = None;
            }
            Err(error) => {
                let text = format!("this device is to relay for others and can't: {error}");
                tracing::warn!("{text}");
                let fix = "free the port or choose another one with --relay-port, and restart the agent";
                self.trouble = Some(Problem::new("relay-port", text, fix));
            }
        }
    }

    /// Somebody's access has changed. In force when this returns.
    pub fn obey(&self, command: &RelayCommand) {
        if let Some(running) = &self.running {
            warren_relay::join::obey(&running.server, command);
        }
    }

    fn start(&self, relay: RelayId, key: NetmapPublicKey, floor: u64) -> Result<Running, StartError> {
        let listen = |ip: IpAddr| SocketAddr::new(ip, self.options.port);
        let limits = Limits {
            max_clients: MAX_CLIENTS,
            max_half_open: MAX_HALF_OPEN,
            rate: self.options.rate,
            total_queue_bytes: MAX_QUEUED,
            ..Limits::default()
        };
        let config = |listen| RelayServerConfig {
            listen,
            stun_listen: None,
            stun_second: None,
            state_dir: self.dir.clone(),
            network: self.network,
            relay,
            netmap_key: key,
            floor,
            limits: limits.clone(),
        };
        let both = config(listen(Ipv6Addr::UNSPECIFIED.into()));
        // A host without IPv6 has no such address.
        let v4 = config(listen(Ipv4Addr::UNSPECIFIED.into()));
        let no_thread = |source| StartError::Listen { addr: both.listen, what: "its own thread", source };
        let (end, ended) = oneshot::channel::<RelayServer>();
        let (sender, started) = mpsc::sync_channel(1);
        let (first, second) = (both.clone(), v4);
        let thread = thread::Builder::new().name("peer-relay".to_owned()).spawn(move || {
            // Of this thread alone, on Linux. Without it the relay is only less polite.
            let _ = rustix::process::setpriority_process(None, NICENESS);
            let runtime = match Builder::new_current_thread().enable_all().build() {
                Ok(runtime) => runtime,
                Err(error) => return drop(sender.send(Err(Start::Runtime(error)))),
            };
            runtime.block_on(async move {
                let server = RelayServer::start(first).or_else(|_| RelayServer::start(second));
                let serves = server.is_ok();
                if sender.send(server.map_err(Start::Server)).is_ok()
                    && serves
                    && let Ok(server) = ended.await
                {
                    server.shutdown().await;
                }
            });
        });
        let thread = thread.map_err(no_thread)?;
        match started.recv() {
            Ok(Ok(server)) => Ok(Running { relay, key, server, end, thread }),
            Ok(Err(Start::Server(error))) => Err(error),
            Ok(Err(Start::Runtime(error))) => Err(no_thread(error)),
            Err(_) => Err(no_thread(std::io::Error::other("it has ended"))),
        }
    }

    /// Serves nobody any more: devices are told so within two seconds, which whoever wants to can wait for.
    pub fn stop(&mut self) -> Option<thread::JoinHandle<()>> {
        let Running { server, end, thread, .. } = self.running.take()?;
        let _ = end.send(server); // its thread waits for that and for nothing else
        Some(thread)
    }

    /// How it does, for people.
    pub fn status(&self) -> Relaying {
        let stats = self.running.as_ref().map(|running| running.server.stats()).unwrap_or_default();
        let counters = &stats.core.counters;
        let dropped = DropReason::ALL.iter().map(|reason| (reason.as_str(), counters.dropped(*reason)));
        let unsent = [("quic-full", stats.quic_dropped), ("udp-unsent", stats.udp_unsent)];
        let dropped = dropped.chain(unsent).filter(|(_, count)| *count > 0);
        Relaying {
            serving: self.running.is_some(),
            port: self.options.port,
            clients: stats.core.clients as u64,
            forwarded_packets: counters.forwarded_packets,
            forwarded_bytes: counters.forwarded_bytes,
            queued_bytes: stats.core.queued_bytes as u64,
            dropped: dropped.map(|(reason, count)| (reason.to_owned(), count)).collect(),
        }
    }

    /// Why it does not do what it should.
    pub const fn trouble(&self) -> Option<&Problem> {
        self.trouble.as_ref()
    }
}

impl Drop for PeerRelay {
    fn drop(&mut self) {
        self.stop();
    }
}

const fn is_private(addr: IpAddr) -> bool {
    match addr {
        IpAddr::V4(ip) => ip.is_private() || ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unique_local() || ip.is_unicast_link_local(),
    }
}

#[cfg(test)]
mod tests {
    use warren_common::keys::NetmapSecretKey;

    use super::*;

    fn relay(dir: &Path, port: u16) -> PeerRelay {
        let options = PeerRelayOptions { port, advertise: vec![], rate: 1_000_000 };
        PeerRelay::new(options, dir, NetworkId::from_bytes([1; 16]))
    }

    fn ips(list: &[&str]) -> impl Iterator<Item = IpAddr> {
        list.iter().map(|ip| ip.parse().unwrap()).collect::<Vec<_>>().into_iter()
    }

    fn duty(relay: &[u8], floor: u64) -> RelayDuty {
        RelayDuty { relay: relay.to_vec(), floor }
    }

    /// A port that nobody has at the moment, for TCP and UDP.
    fn free_port() -> u16 {
        loop {
            let tcp = std::net::TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
            let port = tcp.local_addr().unwrap().port();
            if std::net::UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)).is_ok() {
                return port;
            }
        }
    }

    #[test]
    fn it_offers_where_most_can_reach_it_first_and_says_when_that_changes() {
        let dir = tempfile::tempdir().unwrap();
        let mut peer = relay(dir.path(), 3340);
        assert!(peer.set_addresses(ips(&["192.168.1.2", "2001:db8::2"]), ips(&["203.0.113.7"])));
        assert!(!peer.set_addresses(ips(&["192.168.1.2", "2001:db8::2"]), ips(&["203.0.113.7"])));
        let offer = peer.offer().unwrap();
        assert_eq!(offer.addrs, ["203.0.113.7:3340", "[2001:db8::2]:3340", "192.168.1.2:3340"]);
        assert_eq!(offer.cert_sha256.len(), 32);
        let many: Vec<String> = (0..20).map(|n| format!("10.0.0.{n}")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        peer.set_addresses(ips(&many), ips(&[]));
        assert_eq!(peer.offer().unwrap().addrs.len(), MAX_ADDRS);
        peer.options.advertise = vec!["198.51.100.9:443".parse().unwrap()];
        peer.set_addresses(ips(&many), ips(&[]));
        assert_eq!(peer.offer().unwrap().addrs, ["198.51.100.9:443"]);
    }

    #[tokio::test]
    async fn it_serves_while_it_is_told_to_and_takes_floors() {
        let dir = tempfile::tempdir().unwrap();
        let key = |n| NetmapSecretKey::from_bytes([n; 32]).public();
        let port = free_port();
        let mut peer = relay(dir.path(), port);
        peer.on_duty(&duty(&[], 3), key(1));
        assert!(!peer.status().serving && peer.trouble().is_none());
        peer.on_duty(&duty(&[7; 16], 3), key(1));
        let listens = || std::net::TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok();
        assert!(peer.status().serving && listens(), "{:?}", peer.trouble());
        let floor = |peer: &PeerRelay| peer.running.as_ref().unwrap().server.stats().core.floor;
        peer.on_duty(&duty(&[7; 16], 9), key(1));
        assert_eq!(floor(&peer), 9);
        peer.obey(&RelayCommand { revision: 12, floor: 12, ..RelayCommand::default() });
        assert_eq!(floor(&peer), 12);
        let end = peer.stop().unwrap();
        tokio::task::spawn_blocking(move || end.join().unwrap()).await.unwrap();
        assert!(!peer.status().serving && !listens());
    }

    #[tokio::test]
    async fn a_port_that_is_taken_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let taken = std::net::TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
        let port = taken.local_addr().unwrap().port();
        let mut peer = relay(dir.path(), port);
        peer.on_duty(&duty(&[7; 16], 3), NetmapSecretKey::from_bytes([1; 32]).public());
        let problem = peer.trouble().unwrap();
        assert!(!peer.status().serving && problem.code == "relay-port", "{problem}");
        assert!(problem.text.contains(&port.to_string()), "{problem}");
    }
}
