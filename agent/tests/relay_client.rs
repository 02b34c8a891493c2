//! The relay client against a real relay on loopback. No assertion is about time.
#![cfg(test)]

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use warren_agent::clock;
use warren_agent::relay_client::{
    REST_AFTER, RelayClient, RelayClientConfig, RelayEvent, RelayEventKind, Sent, Transport,
};
use warren_common::ids::{DeviceId, NetworkId, RelayId};
use warren_common::keys::{NetmapSecretKey, ProbeSecretKey};
use warren_common::netmap::Relay;
use warren_common::wire::control::Signed;
use warren_common::wire::relay::udp::is_plain;
use warren_common::wire::relay::{GoneReason, MAX_PAYLOAD, RefusalCode};
use warren_common::wire::token::RelayToken;
use warren_relay::core::{DropReason, Limits};
use warren_relay::server::{RelayServer, RelayServerConfig, StartError};

/// What is sent to see which way it takes.
const PROBE: &[u8] = b"probe";
/// A test that waits this long for anything has failed.
const PATIENCE: Duration = Duration::from_secs(60);

fn device(n: u8) -> DeviceId {
    DeviceId::from_bytes([n; 16])
}

fn relay_id() -> RelayId {
    RelayId::from_bytes([2; 16])
}

fn network() -> NetworkId {
    NetworkId::from_bytes([1; 16])
}

fn probe(n: u8) -> ProbeSecretKey {
    ProbeSecretKey::from_bytes([n + 100; 32])
}

fn server_config(dir: &tempfile::TempDir, listen: SocketAddr) -> RelayServerConfig {
    RelayServerConfig {
        listen,
        stun_listen: None,
        stun_second: None,
        state_dir: dir.path().to_owned(),
        network: network(),
        relay: relay_id(),
        netmap_key: NetmapSecretKey::from_bytes([77; 32]).public(),
        floor: 0,
        limits: Limits::default(),
    }
}

fn start() -> (tempfile::TempDir, RelayServer) {
    let dir = tempfile::tempdir().unwrap();
    let server = RelayServer::start(server_config(&dir, "127.0.0.1:0".parse().unwrap())).unwrap();
    (dir, server)
}

/// A relay with a runtime of its own: what is left of the relay ends with that, as with a process.
struct Process {
    server: RelayServer,
    runtime: Runtime,
}

impl Process {
    /// Waits until the port is free, if it was another's a moment ago.
    async fn start(config: RelayServerConfig) -> Self {
        loop {
            let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
            let started = {
                let _inside = runtime.enter();
                RelayServer::start(config.clone())
            };
            match started {
                Ok(server) => return Self { server, runtime },
                Err(StartError::Listen { source, .. }) if source.kind() == ErrorKind::AddrInUse => {
                    runtime.shutdown_background();
                }
                Err(error) => panic!("{error}"),
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn end(self) {
        self.server.shutdown().await;
        self.runtime.shutdown_background();
    }
}

/// A client and its daemon, which answers each call for a token.
struct Agent {
    n: u8,
    client: RelayClient,
    events: mpsc::Receiver<RelayEvent>,
    revision: u64,
    peers: Vec<u8>,
    tokens: usize,
    /// What the client said last about the transport of packets.
    moved: Option<Transport>,
}

impl Agent {
    fn new(n: u8, cert_sha256: [u8; 32], addr: SocketAddr, peers: &[u8]) -> Self {
        Self::with_key(n, probe(n), cert_sha256, addr, peers)
    }

    /// A client that gives its connection up as soon as it can.
    fn restless(n: u8, server: &RelayServer, peers: &[u8]) -> Self {
        Self::restless_at(n, server, server.local_addr(), peers)
    }

    fn restless_at(n: u8, server: &RelayServer, addr: SocketAddr, peers: &[u8]) -> Self {
        Self::with(n, probe(n), server.cert_sha256(), addr, peers, Duration::from_millis(50))
    }

    fn with_key(n: u8, key: ProbeSecretKey, cert_sha256: [u8; 32], addr: SocketAddr, peers: &[u8]) -> Self {
        Self::with(n, key, cert_sha256, addr, peers, REST_AFTER)
    }

    fn with(
        n: u8,
        key: ProbeSecretKey,
        cert_sha256: [u8; 32],
        addr: SocketAddr,
        peers: &[u8],
        rest_after: Duration,
    ) -> Self {
        let relay = Relay {
            id: relay_id(),
            name: "r".into(),
            addrs: vec![addr],
            stun: vec![],
            cert_sha256,
            peer: false,
        };
        let (sender, events) = mpsc::channel(64);
        let (network, egress) = (network(), Arc::default());
        let config = RelayClientConfig { relay, network, probe: key, egress, own: vec![], rest_after };
        let client = RelayClient::spawn(config, sender);
        Self { n, client, events, revision: 1, peers: peers.to_vec(), tokens: 0, moved: None }
    }

    fn of(n: u8, server: &RelayServer, peers: &[u8]) -> Self {
        Self::new(n, server.cert_sha256(), server.local_addr(), peers)
    }

    fn token(&self) -> Signed {
        RelayToken {
            network: network(),
            relay: relay_id(),
            device: device(self.n),
            probe: probe(self.n).public(),
            revision: self.revision,
            expires: clock::now().unix + Duration::from_secs(600),
            peers: self.peers.iter().map(|p| device(*p)).collect(),
        }
        .sign(&NetmapSecretKey::from_bytes([77; 32]))
    }

    /// The next event that is not a call for a token, news about the transport, or what was sent to see which one it is.
    async fn event(&mut self) -> RelayEventKind {
        loop {
            let event = tokio::time::timeout(PATIENCE, self.events.recv()).await.expect("nothing happened");
            match event.unwrap().kind {
                RelayEventKind::NeedToken => {
                    self.tokens += 1;
                    self.client.provide_token(self.token());
                }
                RelayEventKind::Moved { transport } => self.moved = Some(transport),
                RelayEventKind::Received { payload, .. } if payload == PROBE => {}
                kind => return kind,
            }
        }
    }

    async fn connected(&mut self) -> Transport {
        loop {
            if let RelayEventKind::Connected { transport, .. } = self.event().await {
                return transport;
            }
        }
    }

    /// Sends to `to` until packets take `transport`.
    async fn moves_to(&mut self, transport: Transport, to: u8) {
        let wait = async {
            while self.client.transport() != Some(transport) {
                self.client.send(device(to), PROBE);
                tokio::select! {
                    _ = self.event() => {}
                    () = tokio::time::sleep(Duration::from_millis(10)) => {}
                }
            }
        };
        tokio::time::timeout(PATIENCE, wait).await.expect("the transport stays");
    }

    /// Sends `payload` to `to` until it arrives: no transport promises that the first one does.
    async fn reaches(&mut self, to: &mut Self, payload: &[u8]) {
        let wait = async {
            loop {
                self.client.send(device(to.n), payload);
                let pause = tokio::time::sleep(Duration::from_millis(200));
                tokio::pin!(pause);
                loop {
                    tokio::select! {
                        got = to.received() => if got == (device(self.n), payload.to_vec()) { return },
                        _ = self.event() => {}
                        () = &mut pause => break,
                    }
                }
            }
        };
        tokio::time::timeout(PATIENCE, wait).await.expect("it does not arrive");
    }

    /// Serves the client until `condition` holds.
    async fn until(&mut self, mut condition: impl FnMut(&Self) -> bool) {
        let wait = async {
            while !condition(self) {
                tokio::select! {
                    event = self.event() => assert!(matches!(event, RelayEventKind::Connected { .. }), "{event:?}"),
                    () = tokio::time::sleep(Duration::from_millis(10)) => {}
                }
            }
        };
        tokio::time::timeout(PATIENCE, wait).await.expect("it does not come to that");
    }

    /// Serves the client until the relay has let its session rest once more.
    async fn rests(&mut self, server: &RelayServer) {
        let rests = || server.stats().core.counters.closed(RefusalCode::Resting);
        let before = rests();
        self.until(|_| rests() > before).await;
        assert_eq!(self.client.transport(), Some(Transport::Udp));
    }

    async fn refused(&mut self) -> Option<RefusalCode> {
        loop {
            if let RelayEventKind::Disconnected { refused, .. } = self.event().await {
                return refused;
            }
        }
    }

    /// Waits until the connection is in doubt, which stood until now.
    async fn doubted(&mut self) {
        loop {
            match self.event().await {
                RelayEventKind::Doubt { doubt } => return assert!(doubt),
                RelayEventKind::Connected { .. } => {}
                event => panic!("{event:?}"),
            }
        }
    }

    /// The next packets, which have to come before any loss is told of.
    async fn receives(&mut self, packets: usize) -> Vec<(DeviceId, Vec<u8>)> {
        let mut got = Vec::new();
        while got.len() < packets {
            match self.event().await {
                RelayEventKind::Received { src, payload } => got.push((src, payload.to_vec())),
                RelayEventKind::Doubt { doubt: false } | RelayEventKind::Connected { .. } => {}
                event => panic!("{event:?}"),
            }
        }
        got
    }

    async fn received(&mut self) -> (DeviceId, Vec<u8>) {
        loop {
            if let RelayEventKind::Received { src, payload } = self.event().await {
                return (src, payload.to_vec());
            }
        }
    }
}

#[tokio::test]
async fn packets_of_any_length_cross_over_quic() {
    let (_dir, server) = start();
    let (mut a, mut b) = (Agent::of(1, &server, &[2]), Agent::of(2, &server, &[1]));
    assert_eq!((a.connected().await, b.connected().await), (Transport::Quic, Transport::Quic));
    for len in [1, 148, 1_100, 1_300, MAX_PAYLOAD] {
        let payload = vec![7; len];
        assert_eq!(a.client.send(device(2), &payload), Sent::Queued { dropped: 0 });
        assert_eq!(b.received().await, (device(1), payload.clone()));
        b.client.send(device(1), &payload);
        assert_eq!(a.received().await, (device(2), payload));
    }
    assert_eq!(a.client.send(device(2), &[0; MAX_PAYLOAD + 1]), Sent::Length);
    assert_eq!((a.tokens, b.tokens), (1, 1));
    until(|| a.client.rtt().is_some()).await;
}

#[tokio::test]
async fn another_certificate_is_refused() {
    let (_dir, server) = start();
    let mut a = Agent::new(1, [0; 32], server.local_addr(), &[2]);
    let RelayEventKind::Disconnected { refused, problem, .. } = a.event().await else { panic!("connected") };
    assert_eq!(problem.map(|problem| problem.code).as_deref(), Some("relay-certificate"));
    assert_eq!((refused, a.client.is_connected()), (None, false));
    assert_eq!(a.client.send(device(2), b"x"), Sent::NotConnected);
    assert_eq!(server.stats().core.clients, 0);
}

#[tokio::test]
async fn a_token_of_another_probe_key_is_of_no_use() {
    let (_dir, server) = start();
    let mut thief = Agent::with_key(1, probe(9), server.cert_sha256(), server.local_addr(), &[2]);
    assert_eq!(thief.refused().await, Some(RefusalCode::Possession));
    // It is not used again: the next attempt asks for another.
    assert_eq!(thief.refused().await, Some(RefusalCode::Possession));
    assert_eq!(thief.tokens, 2);
}

#[tokio::test]
async fn a_newer_token_is_fetched_when_access_changes() {
    let (_dir, server) = start();
    let (mut a, mut b) = (Agent::of(1, &server, &[]), Agent::of(2, &server, &[1]));
    a.connected().await;
    b.connected().await;
    // A peer that the token does not have yet.
    a.peers = vec![2];
    a.revision = 2;
    a.client.send(device(2), b"too early");
    let gone = RelayEventKind::PeerGone { device: device(2), why: GoneReason::NotPermitted };
    assert_eq!(a.event().await, gone);
    let both = async {
        loop {
            tokio::select! {
                // Answers the call for a token.
                event = a.event() => panic!("{event:?}"),
                got = b.received() => return got,
                () = tokio::time::sleep(Duration::from_millis(20)) => {}
            }
            a.client.send(device(2), b"now");
        }
    };
    assert_eq!(both.await, (device(1), b"now".to_vec()));
    // Suspended, then revoked.
    b.revision = 3;
    server.set_minimum_revision(device(2), 3);
    let suspended = async {
        loop {
            tokio::select! {
                event = b.event() => return event,
                () = tokio::time::sleep(Duration::from_millis(20)) => {}
            }
            a.client.send(device(2), b"again");
        }
    };
    assert!(matches!(suspended.await, RelayEventKind::Received { .. }));
    assert_eq!(b.tokens, 2);
    server.revoke(device(2), 4);
    assert_eq!(b.refused().await, Some(RefusalCode::Revoked));
    assert!(!b.client.is_connected());
}

#[tokio::test]
async fn a_relay_that_comes_back_is_found_again() {
    let (dir, server) = start();
    let addr = server.local_addr();
    let mut a = Agent::of(1, &server, &[2]);
    a.connected().await;
    let ((), refused) = tokio::join!(server.shutdown(), a.refused());
    assert_eq!(refused, Some(RefusalCode::ShuttingDown));
    let server = RelayServer::start(server_config(&dir, addr)).unwrap();
    a.client.network_changed();
    a.connected().await;
    assert_eq!((server.stats().core.clients, a.tokens), (1, 1), "the token is still good");
}

#[tokio::test]
async fn packets_wait_for_a_relay_that_is_restarted() {
    let dir = tempfile::tempdir().unwrap();
    let mut relay = Process::start(server_config(&dir, "127.0.0.1:0".parse().unwrap())).await;
    let addr = relay.server.local_addr();
    let (mut a, mut b) = (Agent::of(1, &relay.server, &[2]), Agent::of(2, &relay.server, &[1]));
    for n in 1..=3u8 {
        if n == 1 {
            tokio::join!(a.connected(), b.connected());
        } else {
            a.moves_to(Transport::Udp, 2).await;
            b.moves_to(Transport::Udp, 1).await;
        }
        tokio::join!(relay.end(), a.doubted(), b.doubted());
        assert_eq!((a.client.transport(), a.client.is_connected()), (None, false));
        for i in 0..100 {
            assert_eq!(a.client.send(device(2), &[n, i]), Sent::Queued { dropped: 0 });
            assert_eq!(b.client.send(device(1), &[n, i]), Sent::Queued { dropped: 0 });
        }
        // The relay hears of a newer policy before it serves, as the coordinator's own one does: other tokens are asked for.
        (a.revision, b.revision) = (n.into(), n.into());
        relay = Process::start(RelayServerConfig { floor: n.into(), ..server_config(&dir, addr) }).await;
        let (to_b, to_a) = tokio::join!(b.receives(100), a.receives(100));
        for i in 0..100 {
            assert_eq!(to_b[usize::from(i)], (device(1), vec![n, i]));
            assert_eq!(to_a[usize::from(i)], (device(2), vec![n, i]));
        }
    }
    assert_eq!((a.tokens, b.tokens), (3, 3));
    relay.end().await;
}

#[tokio::test]
async fn packets_wait_for_a_device_that_comes_to_a_restarted_relay_after_its_peer() {
    for n in 0..5u8 {
        let (_dir, server) = start();
        let mut a = Agent::of(1, &server, &[2]);
        a.connected().await;
        for i in 0..50 {
            a.client.send(device(2), &[n, i]);
        }
        until(|| server.stats().core.queued_bytes > 50 * 64).await;
        let mut b = Agent::of(2, &server, &[1]);
        let got = b.receives(50).await;
        assert!((0..50).all(|i| got[usize::from(i)] == (device(1), vec![n, i])), "{got:?}");
    }
}

#[tokio::test]
async fn a_relay_that_does_not_come_back_is_told_of_as_lost() {
    let (_dir, server) = start();
    let mut a = Agent::of(1, &server, &[2]);
    a.connected().await;
    tokio::join!(server.shutdown(), a.doubted());
    assert_eq!(a.client.send(device(2), b"held"), Sent::Queued { dropped: 0 });
    let told = a.event().await;
    assert!(
        matches!(
            told,
            RelayEventKind::Disconnected { refused: Some(RefusalCode::ShuttingDown), dropped: 1, .. }
        ),
        "{told:?}"
    );
    assert_eq!((a.client.send(device(2), b"lost"), a.client.is_connected()), (Sent::NotConnected, false));
    assert_eq!(a.refused().await, None, "it is tried again, and that fails");
}

#[tokio::test]
async fn a_websocket_where_udp_does_not_pass_and_quic_when_it_does() {
    let (_dir, server) = start();
    let gate = Gate::open(server.local_addr(), false, false).await;
    let mut a = Agent::new(1, server.cert_sha256(), gate.addr, &[2]);
    let mut b = Agent::of(2, &server, &[1]);
    assert_eq!((a.connected().await, b.connected().await), (Transport::WebSocket, Transport::Quic));
    for len in [1, MAX_PAYLOAD] {
        a.client.send(device(2), &vec![len as u8; len]);
        assert_eq!(b.received().await, (device(1), vec![len as u8; len]));
        b.client.send(device(1), b"back");
        assert_eq!(a.received().await, (device(2), b"back".to_vec()));
    }
    gate.quic.store(true, Ordering::Relaxed);
    a.client.network_changed();
    assert_eq!(a.connected().await, Transport::Quic);
    b.client.send(device(1), b"over QUIC");
    assert_eq!(a.received().await, (device(2), b"over QUIC".to_vec()));
}

#[tokio::test]
async fn plain_udp_carries_packets_while_it_passes_and_the_connection_does_when_it_does_not() {
    let (_dir, server) = start();
    for (n, quic) in [(1, true), (3, false)] {
        let gate = Gate::open(server.local_addr(), quic, true).await;
        let over = if quic { Transport::Quic } else { Transport::WebSocket };
        let mut a = Agent::new(n, server.cert_sha256(), gate.addr, &[n + 1]);
        let mut b = Agent::of(n + 1, &server, &[n]);
        assert_eq!((a.connected().await, b.connected().await), (over, Transport::Quic));
        a.moves_to(Transport::Udp, n + 1).await;
        b.moves_to(Transport::Udp, n).await;
        let before = server.stats().core.counters;
        for len in [2, 148, 1_300, MAX_PAYLOAD] {
            a.reaches(&mut b, &vec![7; len]).await;
            b.reaches(&mut a, &vec![8; len]).await;
        }
        let after = server.stats().core.counters;
        assert!(after.forwarded_udp_packets > before.forwarded_udp_packets);
        // A burst goes out in batches and arrives cut as it was.
        for i in 0..40u8 {
            a.client.send(device(n + 1), &[i; 1_000]);
        }
        a.reaches(&mut b, &[40; 1_000]).await;
        gate.plain.store(false, Ordering::Relaxed);
        a.moves_to(over, n + 1).await;
        assert_eq!(a.moved, Some(over));
        a.reaches(&mut b, b"over the connection").await;
        b.reaches(&mut a, b"back").await;
        gate.plain.store(true, Ordering::Relaxed);
        a.client.network_changed();
        a.moves_to(Transport::Udp, n + 1).await;
        b.reaches(&mut a, b"and again").await;
    }
}

#[tokio::test]
async fn a_silent_relay_is_noticed_by_who_uses_it() {
    let (_dir, server) = start();
    let gate = Gate::open(server.local_addr(), true, true).await;
    let mut a = Agent::new(1, server.cert_sha256(), gate.addr, &[2]);
    a.connected().await;
    a.moves_to(Transport::Udp, 2).await;
    // It dies without a word: no TLS alert, no QUIC close, no ICMP.
    gate.quic.store(false, Ordering::Relaxed);
    gate.plain.store(false, Ordering::Relaxed);
    let lost = async {
        loop {
            tokio::select! {
                event = a.event() => if matches!(event, RelayEventKind::Disconnected { refused: None, .. }) {
                    return;
                },
                () = tokio::time::sleep(Duration::from_millis(20)) => {
                    a.client.send(device(2), b"anybody there?");
                }
            }
        }
    };
    tokio::time::timeout(PATIENCE, lost).await.expect("not noticed");
}

#[tokio::test]
async fn dropping_the_client_disconnects() {
    let (_dir, server) = start();
    let mut a = Agent::of(1, &server, &[]);
    a.connected().await;
    drop(a);
    until(|| server.stats().core.clients == 0).await;
}

#[tokio::test]
async fn a_session_that_rests_carries_packets_and_none_is_lost_when_it_comes_back() {
    let (_dir, server) = start();
    let (mut a, mut b) = (Agent::restless(1, &server, &[2]), Agent::of(2, &server, &[1]));
    b.moves_to(Transport::Udp, 1).await;
    a.rests(&server).await;
    let before = server.stats().core.counters.dropped(DropReason::NotConnected);
    for n in 0..6u8 {
        if n > 0 {
            a.rests(&server).await;
        }
        assert_eq!(server.stats().core.clients, 2);
        // The packet that ends the rest, and those while the client connects and moves to its new session.
        for i in 0..100u8 {
            if n % 2 == 0 {
                assert_eq!(a.client.send(device(2), &[n, i]), Sent::Queued { dropped: 0 });
                assert_eq!(b.received().await, (device(1), vec![n, i]));
            } else {
                b.client.send(device(1), &[n, i]);
                assert_eq!(a.received().await, (device(2), vec![n, i]));
            }
        }
    }
    assert_eq!(server.stats().core.counters.dropped(DropReason::NotConnected), before);
}

#[tokio::test]
async fn a_session_that_rests_hears_what_the_relay_has_to_say() {
    let (_dir, server) = start();
    let (mut a, mut b) = (Agent::restless(1, &server, &[2]), Agent::of(2, &server, &[1]));
    a.rests(&server).await;
    // Access changes: it comes with a newer token.
    a.revision = 2;
    let tokens = a.tokens;
    server.set_minimum_revision(device(1), 2);
    a.until(|a| a.tokens > tokens).await;
    b.connected().await;
    b.reaches(&mut a, b"with the newer token").await;
    a.rests(&server).await;
    server.drain(Duration::from_secs(7));
    let drained = loop {
        match a.event().await {
            RelayEventKind::Draining { after } => break after,
            event => assert!(matches!(event, RelayEventKind::Connected { .. }), "{event:?}"),
        }
    };
    assert_eq!(drained, Duration::from_secs(7));
    // Dropped while it rests, it says so.
    drop(a);
    until(|| server.stats().core.clients == 1).await;
}

#[tokio::test]
async fn packets_that_are_too_long_for_udp_wait_for_the_connection() {
    let (_dir, server) = start();
    let (mut a, mut b) = (Agent::restless(1, &server, &[2]), Agent::of(2, &server, &[1]));
    b.connected().await;
    a.rests(&server).await;
    for n in 0..3u8 {
        assert_eq!(a.client.send(device(2), &[n; MAX_PAYLOAD]), Sent::Queued { dropped: 0 });
        let got = tokio::select! {
            got = b.received() => got,
            () = async { loop { a.event().await; } } => unreachable!("it never ends"),
        };
        assert_eq!(got, (device(1), vec![n; MAX_PAYLOAD]));
        a.rests(&server).await;
    }
}

#[tokio::test]
async fn a_network_without_udp_during_a_rest_costs_no_more_than_a_connection() {
    let (_dir, server) = start();
    let gate = Gate::open(server.local_addr(), true, true).await;
    let (mut a, mut b) = (Agent::restless_at(1, &server, gate.addr, &[2]), Agent::of(2, &server, &[1]));
    b.connected().await;
    a.rests(&server).await;
    gate.plain.store(false, Ordering::Relaxed);
    a.client.network_changed();
    a.connected().await;
    // What is too long for UDP comes after all that the client has told the relay.
    a.reaches(&mut b, &[1; MAX_PAYLOAD]).await;
    b.client.send(device(1), b"by the connection");
    let got = tokio::select! {
        got = a.received() => got,
        () = async { loop { b.event().await; } } => unreachable!("it never ends"),
    };
    assert_eq!(got, (device(2), b"by the connection".to_vec()));
}

#[tokio::test]
async fn a_relay_that_dies_during_a_rest_is_noticed() {
    let (_dir, server) = start();
    let gate = Gate::open(server.local_addr(), true, true).await;
    let mut a = Agent::restless_at(1, &server, gate.addr, &[2]);
    a.client.set_keepalive(Duration::from_millis(500));
    a.rests(&server).await;
    gate.quic.store(false, Ordering::Relaxed);
    gate.plain.store(false, Ordering::Relaxed);
    let mut doubted = false;
    loop {
        match a.event().await {
            RelayEventKind::Connected { .. } => {} // before the rest
            RelayEventKind::Doubt { doubt: true } => doubted = true,
            RelayEventKind::Disconnected { refused: None, .. } => break,
            event => panic!("{event:?}"),
        }
    }
    assert!(doubted, "whoever sends meanwhile may take another relay");
    assert!(!a.client.is_connected());
}

#[tokio::test]
async fn a_relay_that_was_restarted_during_a_rest_is_joined_again() {
    let (dir, server) = start();
    let addr = server.local_addr();
    let mut a = Agent::restless(1, &server, &[2]);
    a.rests(&server).await;
    server.shutdown().await;
    let server = RelayServer::start(server_config(&dir, addr)).unwrap();
    let mut b = Agent::of(2, &server, &[1]);
    b.connected().await;
    a.reaches(&mut b, b"there again").await;
}

async fn until(mut condition: impl FnMut() -> bool) {
    let wait = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.expect("never so");
}

/// A firewall in front of a relay that lets TCP through, and UDP when told to.
struct Gate {
    addr: SocketAddr,
    /// QUIC passes.
    quic: Arc<AtomicBool>,
    /// Plain UDP passes.
    plain: Arc<AtomicBool>,
    _tasks: JoinSet<()>,
}

impl Gate {
    async fn open(to: SocketAddr, quic: bool, plain: bool) -> Self {
        let (listener, socket) = loop {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            if let Ok(socket) = UdpSocket::bind(listener.local_addr().unwrap()).await {
                break (listener, socket);
            }
        };
        let addr = listener.local_addr().unwrap();
        let (quic, plain) = (Arc::new(AtomicBool::new(quic)), Arc::new(AtomicBool::new(plain)));
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut streams = JoinSet::new();
            while let Ok((mut from, _)) = listener.accept().await {
                streams.spawn(async move {
                    let mut to = TcpStream::connect(to).await.unwrap();
                    let _ = copy_bidirectional(&mut from, &mut to).await;
                });
            }
        });
        tasks.spawn(datagrams(Arc::new(socket), to, quic.clone(), plain.clone()));
        Self { addr, quic, plain, _tasks: tasks }
    }
}

/// Passes datagrams between each who asks and the relay.
async fn datagrams(inside: Arc<UdpSocket>, to: SocketAddr, quic: Arc<AtomicBool>, plain: Arc<AtomicBool>) {
    let (mut there, mut outsides, mut tasks) = ([0; 2_048], BTreeMap::new(), JoinSet::new());
    let passes = move |datagram: &[u8]| {
        if is_plain(datagram) { plain.load(Ordering::Relaxed) } else { quic.load(Ordering::Relaxed) }
    };
    while let Ok((len, from)) = inside.recv_from(&mut there).await {
        if !passes(&there[..len]) {
            continue;
        }
        let outside = match outsides.entry(from) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                let outside = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
                let (back_from, inside, passes) = (outside.clone(), inside.clone(), passes.clone());
                tasks.spawn(async move {
                    let mut back = [0; 2_048];
                    while let Ok((len, _)) = back_from.recv_from(&mut back).await {
                        if passes(&back[..len]) {
                            let _ = inside.send_to(&back[..len], from).await;
                        }
                    }
                });
                entry.insert(outside)
            }
        };
        let _ = outside.send_to(&there[..len], to).await;
    }
}
