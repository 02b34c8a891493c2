//! This device as a relay for others, where its owner (`--relay-port`) and the policy both want that.
//!
//! The relay is the same library as everywhere, on a thread of its own with less priority: a flood at the relay must not
//! take the owner's own packets. It serves only while the coordinator says so, first of all from which revision on tokens
//! count. Without a coordinator it goes on: tokens end within ten minutes, and then nobody gets in.

use std::future::pending;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::thread;

use tokio::runtime::Builder;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
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
#[derive(Debug, thiserror::Error)]
enum Start {
    #[error("no thread for it: {0}")]
    Thread(std::io::Error),
    #[error(transparent)]
    Server(#[from] StartError),
}

/// This device as a relay.
#[derive(Debug)]
pub struct PeerRelay {
    options: PeerRelayOptions,
    dir: PathBuf,
    network: NetworkId,
    /// The certificate is being read or made: a slow disk holds up no packet.
    loading: Option<JoinHandle<Result<[u8; 32], Problem>>>,
    /// `None` without a certificate: then nothing is offered.
    cert_sha256: Option<[u8; 32]>,
    addrs: Vec<SocketAddr>,
    /// What the coordinator wants of us.
    duty: Option<Duty>,
    running: Option<Running>,
    /// The thread of a former server, which may have the port still.
    ending: Option<thread::JoinHandle<()>>,
    no_certificate: Option<Problem>,
    no_port: Option<Problem>,
}

#[derive(Clone, Copy, Debug)]
struct Duty {
    relay: RelayId,
    /// What verifies tokens.
    key: NetmapPublicKey,
    /// From which revision on tokens count.
    floor: u64,
}

#[derive(Debug)]
struct Running {
    server: Server,
    /// Takes the server, to end it in good order.
    end: oneshot::Sender<RelayServer>,
    thread: thread::JoinHandle<()>,
}

#[derive(Debug)]
enum Server {
    Starting(oneshot::Receiver<Result<RelayServer, Start>>),
    Serving(RelayServer),
}

impl PeerRelay {
    /// Nothing runs yet. The certificate is in `dir`, made there at the first start: [`changed`](Self::changed) takes it.
    /// Needs a tokio runtime.
    pub fn new(options: PeerRelayOptions, dir: &Path, network: NetworkId) -> Self {
        let files = dir.to_owned();
        let load = move || {
            Identity::load_or_create(&files).map(|identity| identity.sha256()).map_err(|error| {
                Problem::new(
                    "relay-certificate-file",
                    format!("this device can't relay for others: {error}"),
                    "make room or put permissions right, then restart the agent; or start it without --relay-port",
                )
            })
        };
        Self {
            options,
            dir: dir.to_owned(),
            network,
            loading: Some(tokio::task::spawn_blocking(load)),
            cert_sha256: None,
            addrs: Vec::new(),
            duty: None,
            running: None,
            ending: None,
            no_certificate: None,
            no_port: None,
        }
    }

    /// Waits until the certificate is there, or a server that was started, or neither can be had. True if what is offered has
    /// changed. Cancel safe.
    pub async fn changed(&mut self) -> bool {
        let Self { loading, running, .. } = self;
        let loaded = async {
            match loading {
                Some(task) => task.await,
                None => pending().await,
            }
        };
        let started = async {
            match running {
                Some(Running { server: Server::Starting(started), .. }) => started.await,
                _ => pending().await,
            }
        };
        // Nothing is waited for after this, so nothing that has come can be lost.
        tokio::select! {
            loaded = loaded => {
                self.loading = None;
                match loaded {
                    Ok(Ok(sha256)) => self.cert_sha256 = Some(sha256),
                    Ok(Err(problem)) => self.no_certificate = Some(problem),
                    Err(_) => {} // the runtime is going down
                }
                self.start_if_due();
                true
            }
            started = started => {
                self.started(started.unwrap_or_else(|_| {
                    Err(Start::Thread(std::io::Error::other("it has ended")))
                }));
                false
            }
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
        let former = self.duty.take();
        let Some(relay) = RelayId::from_slice(&duty.relay) else {
            if self.running.is_some() {
                tracing::info!("this device relays for others no more");
            }
            self.no_port = None; // none is wanted
            return self.stop();
        };
        self.duty = Some(Duty { relay, key, floor: duty.floor });
        if let (Some(running), Some(former)) = (&self.running, former)
            && (former.relay, former.key) == (relay, key)
            // A lower one is of a coordinator that was restored and numbers anew.
            && former.floor <= duty.floor
        {
            if let Server::Serving(server) = &running.server {
                server.set_floor(duty.floor);
            }
            return;
        }
        self.stop();
        self.start_if_due();
    }

    /// Somebody's access has changed. In force when this returns.
    pub fn obey(&mut self, command: &RelayCommand) {
        let Some(duty) = &mut self.duty else { return };
        match &self.running {
            Some(Running { server: Server::Serving(server), .. }) => {
                warren_relay::join::obey(server, command);
                duty.floor = server.stats().core.floor;
            }
            // Stricter than what it asks for: nobody is there yet whom that could bother.
            _ => duty.floor = duty.floor.max(command.revision).max(command.floor),
        }
    }

    /// Starts a server if there is to be one, now that the certificate is there.
    fn start_if_due(&mut self) {
        let Some(duty) = self.duty.filter(|_| self.loading.is_none() && self.running.is_none()) else {
            return;
        };
        match self.start(duty) {
            Ok(running) => self.running = Some(running),
            Err(error) => self.failed(&error),
        }
    }

    fn started(&mut self, outcome: Result<RelayServer, Start>) {
        match (outcome, &mut self.running, self.duty) {
            (Ok(server), Some(running), Some(duty)) => {
                tracing::info!(port = self.options.port, "this device relays for others");
                server.set_floor(duty.floor); // it may have gone up meanwhile
                running.server = Server::Serving(server);
                self.no_port = None;
            }
            (Err(error), ..) => {
                self.stop();
                self.failed(&error);
            }
            (Ok(_), ..) => {} // there is no server without a duty
        }
    }

    fn failed(&mut self, error: &Start) {
        let text = format!("this device is to relay for others and can't: {error}");
        tracing::warn!("{text}");
        let fix = "free the port or choose another one with --relay-port, and restart the agent";
        self.no_port = Some(Problem::new("relay-port", text, fix));
    }

    fn start(&mut self, duty: Duty) -> Result<Running, Start> {
        let Duty { relay, key, floor } = duty;
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
        let first = config(listen(Ipv6Addr::UNSPECIFIED.into()));
        // A host without IPv6 has no such address.
        let second = config(listen(Ipv4Addr::UNSPECIFIED.into()));
        let (end, ended) = oneshot::channel::<RelayServer>();
        let (sender, started) = oneshot::channel();
        let former = self.ending.take();
        let thread = thread::Builder::new().name("peer-relay".to_owned()).spawn(move || {
            // Of this thread and those that it starts, on Linux. Without it the relay is only less polite.
            let _ = rustix::process::setpriority_process(None, NICENESS);
            if let Some(former) = former {
                let _ = former.join(); // the port is free then, also if it failed
            }
            let runtime = match Builder::new_current_thread().enable_all().build() {
                Ok(runtime) => runtime,
                Err(error) => return drop(sender.send(Err(Start::Thread(error)))),
            };
            runtime.block_on(async move {
                let server = match RelayServer::start(first).or_else(|_| RelayServer::start(second)) {
                    Ok(server) => server,
                    Err(error) => return drop(sender.send(Err(error.into()))),
                };
                // It comes back to be ended; at once if nobody wants it any more.
                let back = match sender.send(Ok(server)) {
                    Ok(()) => ended.await.ok(),
                    Err(unwanted) => unwanted.ok(),
                };
                if let Some(server) = back {
                    server.shutdown().await;
                }
            });
        });
        thread.map(|thread| Running { server: Server::Starting(started), end, thread }).map_err(Start::Thread)
    }

    /// Serves nobody any more: devices are told so within two seconds.
    fn stop(&mut self) {
        let Some(Running { server, end, thread }) = self.running.take() else { return };
        let server = match server {
            Server::Serving(server) => Some(server),
            Server::Starting(mut started) => started.try_recv().ok().and_then(Result::ok),
        };
        if let Some(server) = server {
            let _ = end.send(server); // its thread waits for that and for nothing else
        }
        self.ending = Some(thread);
    }

    /// Ends it. Whoever wants to can wait for the thread, which tells devices first.
    pub fn end(mut self) -> Option<thread::JoinHandle<()>> {
        self.stop();
        self.ending.take()
    }

    /// How it does, for people.
    pub fn status(&self) -> Relaying {
        let server = match &self.running {
            Some(Running { server: Server::Serving(server), .. }) => Some(server),
            _ => None,
        };
        let stats = server.map(RelayServer::stats).unwrap_or_default();
        let counters = &stats.core.counters;
        let dropped = DropReason::ALL.iter().map(|reason| (reason.as_str(), counters.dropped(*reason)));
        let unsent = [("quic-full", stats.quic_dropped), ("udp-unsent", stats.udp_unsent)];
        let dropped = dropped.chain(unsent).filter(|(_, count)| *count > 0);
        Relaying {
            serving: server.is_some(),
            wanted: self.duty.is_some(),
            port: self.options.port,
            clients: stats.core.clients as u64,
            forwarded_packets: counters.forwarded_packets,
            forwarded_bytes: counters.forwarded_bytes,
            queued_bytes: stats.core.queued_bytes as u64,
            dropped: dropped.map(|(reason, count)| (reason.to_owned(), count)).collect(),
        }
    }

    /// Why it does not do what it should.
    pub fn trouble(&self) -> Option<&Problem> {
        self.no_certificate.as_ref().or(self.no_port.as_ref())
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

    #[tokio::test]
    async fn it_offers_where_most_can_reach_it_first_and_says_when_that_changes() {
        let dir = tempfile::tempdir().unwrap();
        let mut peer = relay(dir.path(), 3340);
        assert!(peer.offer().is_none(), "without a certificate");
        assert!(peer.changed().await);
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

    fn floor(peer: &PeerRelay) -> u64 {
        match &peer.running {
            Some(Running { server: Server::Serving(server), .. }) => server.stats().core.floor,
            _ => panic!("it does not serve: {:?}", peer.trouble()),
        }
    }

    #[tokio::test]
    async fn it_serves_while_it_is_told_to_and_takes_floors() {
        let dir = tempfile::tempdir().unwrap();
        let key = |n| NetmapSecretKey::from_bytes([n; 32]).public();
        let port = free_port();
        let mut peer = relay(dir.path(), port);
        peer.on_duty(&duty(&[], 3), key(1));
        assert!(peer.changed().await && !peer.status().serving && peer.trouble().is_none());
        peer.on_duty(&duty(&[7; 16], 3), key(1));
        assert!(peer.status().wanted && !peer.status().serving, "packets don't wait for it");
        assert!(!peer.changed().await);
        let listens = || std::net::TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok();
        assert!(peer.status().serving && listens(), "{:?}", peer.trouble());
        peer.on_duty(&duty(&[7; 16], 9), key(1));
        assert_eq!(floor(&peer), 9);
        peer.obey(&RelayCommand { revision: 12, floor: 12, ..RelayCommand::default() });
        assert_eq!(floor(&peer), 12);
        let end = peer.end().unwrap();
        tokio::task::spawn_blocking(move || end.join().unwrap()).await.unwrap();
        assert!(!listens());
    }

    #[tokio::test]
    async fn a_server_takes_the_place_of_one_that_has_its_port_still() {
        let dir = tempfile::tempdir().unwrap();
        let key = |n| NetmapSecretKey::from_bytes([n; 32]).public();
        let mut peer = relay(dir.path(), free_port());
        // The duty comes before the certificate is there, and what it may let in less than that.
        peer.on_duty(&duty(&[7; 16], 3), key(1));
        peer.obey(&RelayCommand { revision: 5, ..RelayCommand::default() });
        assert!(peer.changed().await);
        peer.obey(&RelayCommand { revision: 6, ..RelayCommand::default() });
        assert!(!peer.changed().await);
        assert_eq!(floor(&peer), 6);
        // Another key, a lower floor; with clients the former server would take its time to go.
        for (n, to) in [(2, 7), (2, 4)] {
            peer.on_duty(&duty(&[7; 16], to), key(n));
            assert!(!peer.changed().await);
            assert_eq!(floor(&peer), to);
        }
        // The duty ends before the server is there.
        peer.on_duty(&duty(&[7; 16], 3), key(3));
        peer.on_duty(&duty(&[], 0), key(3));
        peer.on_duty(&duty(&[7; 16], 8), key(3));
        assert!(!peer.changed().await);
        assert_eq!(floor(&peer), 8);
    }

    #[tokio::test]
    async fn a_port_that_is_taken_is_told_while_it_is_wanted() {
        let dir = tempfile::tempdir().unwrap();
        let taken = std::net::TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
        let port = taken.local_addr().unwrap().port();
        let mut peer = relay(dir.path(), port);
        let key = NetmapSecretKey::from_bytes([1; 32]).public();
        peer.on_duty(&duty(&[7; 16], 3), key);
        assert!(peer.changed().await && !peer.changed().await);
        let problem = peer.trouble().unwrap();
        assert!(!peer.status().serving && problem.code == "relay-port", "{problem}");
        assert!(problem.text.contains(&port.to_string()), "{problem}");
        peer.on_duty(&duty(&[], 3), key);
        assert_eq!(peer.trouble(), None);
    }
}
