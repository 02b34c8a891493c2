//! A relay client on a host whose addresses come and go, against a real relay: what leads nowhere any more is left at once, and
//! what may still work is not disturbed. No assertion is about time: silence would end a connection as well, but not without
//! the client saying that it lost it.

use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::mpsc;
use tokio::time::timeout;
use warren_agent::clock;
use warren_agent::relay_client::{
    REST_AFTER, RelayClient, RelayClientConfig, RelayEvent, RelayEventKind, Transport,
};
use warren_common::ids::{DeviceId, NetworkId, RelayId};
use warren_common::keys::{NetmapSecretKey, ProbeSecretKey};
use warren_common::netmap::Relay;
use warren_common::wire::token::RelayToken;
use warren_netns_tests::lab::{self, Host, Lab};
use warren_relay::core::Limits;
use warren_relay::server::{RelayServer, RelayServerConfig};

/// A test that waits this long for anything has failed.
const LIMIT: Duration = Duration::from_secs(30);
const PORT: u16 = 3_340;
/// Stands for the overlay's own address: what is left when the interface has no IPv6 any more.
const OVERLAY: &str = "fd7a:115c::5";

fn signer() -> NetmapSecretKey {
    NetmapSecretKey::from_bytes([77; 32])
}

fn network() -> NetworkId {
    NetworkId::from_bytes([1; 16])
}

fn relay_id() -> RelayId {
    RelayId::from_bytes([2; 16])
}

fn device(n: u8) -> DeviceId {
    DeviceId::from_bytes([n; 16])
}

fn probe(n: u8) -> ProbeSecretKey {
    ProbeSecretKey::from_bytes([n + 100; 32])
}

/// Threads are born into the namespace of the thread that makes them.
fn runtime(host: &Host) -> Result<Runtime> {
    Ok(host.enter(|| Builder::new_multi_thread().worker_threads(1).enable_all().build())??)
}

struct Server {
    host: Host,
    runtime: Runtime,
    server: RelayServer,
}

impl Server {
    fn start(host: Host) -> Result<Self> {
        let runtime = runtime(&host)?;
        let config = RelayServerConfig {
            listen: format!("[::]:{PORT}").parse()?,
            stun_listen: None,
            stun_second: None,
            state_dir: host.dir().join("state"),
            network: network(),
            relay: relay_id(),
            netmap_key: signer().public(),
            floor: 0,
            limits: Limits::default(),
        };
        std::fs::create_dir_all(&config.state_dir)?;
        let server = host.enter(|| runtime.block_on(async { RelayServer::start(config) }))??;
        Ok(Self { host, runtime, server })
    }

    fn relay(&self) -> Result<Relay> {
        let addrs = [IpAddr::from(self.host.v6().context("IPv6")?), self.host.v4().into()];
        Ok(Relay {
            id: relay_id(),
            name: "r".into(),
            addrs: addrs.map(|ip| SocketAddr::new(ip, PORT)).into(),
            stun: vec![],
            cert_sha256: self.server.cert_sha256(),
            peer: false,
        })
    }
}

/// A client, and the daemon that it answers to.
struct Client {
    host: Host,
    runtime: Runtime,
    n: u8,
    client: RelayClient,
    events: mpsc::Receiver<RelayEvent>,
}

impl Client {
    fn start(host: Host, n: u8, relay: Relay) -> Result<Self> {
        let runtime = runtime(&host)?;
        let (sender, events) = mpsc::channel(256);
        let config = RelayClientConfig {
            relay,
            network: network(),
            probe: probe(n),
            egress: std::sync::Arc::default(),
            own: vec![OVERLAY.parse()?],
            rest_after: REST_AFTER,
        };
        let client = {
            let _inside = runtime.enter();
            RelayClient::spawn(config, sender)
        };
        Ok(Self { host, runtime, n, client, events })
    }

    /// The next event that is not about a token or about where packets go.
    fn event(&mut self, what: &str) -> Result<RelayEventKind> {
        let next = async {
            loop {
                match self.events.recv().await.context("the client is gone")?.kind {
                    RelayEventKind::NeedToken => {
                        let token = RelayToken {
                            network: network(),
                            relay: relay_id(),
                            device: device(self.n),
                            probe: probe(self.n).public(),
                            revision: 1,
                            expires: clock::now().unix + Duration::from_secs(600),
                            peers: [1, 2].map(device).into(),
                        };
                        self.client.provide_token(token.sign(&signer()));
                    }
                    RelayEventKind::Moved { .. } => {}
                    kind => return Ok(kind),
                }
            }
        };
        wait(&self.runtime, what, next)
    }

    /// The next connection, with nothing lost before it.
    fn connected(&mut self) -> Result<(Transport, IpAddr)> {
        loop {
            match self.event("it connects")? {
                RelayEventKind::Connected { transport, addr } => return Ok((transport, addr.ip())),
                RelayEventKind::Disconnected { why, .. } => bail!("lost before it was left: {why}"),
                _ => {}
            }
        }
    }

    /// The network changed so that the connection leads nowhere: the next one is there before it counts as lost, and carries the
    /// packet that was sent meanwhile.
    fn moves_over(&mut self, to: &mut Self, word: &'static [u8]) -> Result<(Transport, IpAddr)> {
        self.client.network_changed();
        let doubt = self.event("it is in doubt")?;
        ensure!(doubt == RelayEventKind::Doubt { doubt: true }, "{doubt:?}");
        self.client.send(device(to.n), word);
        let found = self.connected()?;
        to.hears(self.n, word)?;
        Ok(found)
    }

    /// Waits for that packet, on the connection that there is.
    fn hears(&mut self, from: u8, word: &[u8]) -> Result<()> {
        loop {
            match self.event("a packet arrives")? {
                RelayEventKind::Received { src, payload } if src == device(from) && payload == word => {
                    return Ok(());
                }
                RelayEventKind::Connected { .. } | RelayEventKind::Disconnected { .. } => {
                    bail!("another connection")
                }
                _ => {}
            }
        }
    }

    /// The network changed, and the connection is what it was.
    fn stays(&mut self, with: &mut Self, what: &'static str) -> Result<()> {
        self.client.network_changed();
        // More than one: the first may go before the client has looked.
        for _ in 0..3 {
            self.client.send(device(with.n), what.as_bytes());
            with.hears(self.n, what.as_bytes()).context(what)?;
            with.client.send(device(self.n), what.as_bytes());
            self.hears(with.n, what.as_bytes()).context(what)?;
        }
        Ok(())
    }

    fn ip(&self, words: &str) -> Result<()> {
        self.host.ip(words)
    }

    /// IPv6 leaves the interface. Its default route stays, as it does where somebody set it.
    fn leave_v6(&self) -> Result<()> {
        self.ip("addr flush dev eth0 to ::/0")
    }

    fn leave_v4(&self) -> Result<()> {
        self.ip("addr flush dev eth0 to 0.0.0.0/0")
    }

    fn come_v6(&self, address: &str) -> Result<()> {
        self.ip(&format!("addr add {address}/64 dev eth0 nodad"))
    }

    fn come_v4(&self) -> Result<()> {
        self.ip(&format!("addr add {}/24 dev eth0", self.host.v4()))
    }
}

fn wait<T>(runtime: &Runtime, what: &str, future: impl Future<Output = Result<T>>) -> Result<T> {
    let patience = async { timeout(LIMIT, future).await };
    runtime.block_on(patience).with_context(|| format!("still not: {what}"))?
}

/// A relay, a client that will move, and one that will not.
fn talk(lab: &Lab, rules: Option<&str>) -> Result<(Server, Client, Client)> {
    let server = Server::start(lab.host("relay")?)?;
    let host = lab.host("a")?;
    host.ip("tuntap add dev overlay0 mode tun")?;
    host.ip("link set overlay0 up")?;
    host.ip(&format!("addr add {OVERLAY}/128 dev overlay0 nodad"))?;
    rules.map_or(Ok(()), |rules| host.nft(rules))?;
    let a = Client::start(host, 1, server.relay()?)?;
    let b = Client::start(lab.host("b")?, 2, server.relay()?)?;
    Ok((server, a, b))
}

#[test]
fn a_connection_without_a_way_is_left_at_once_for_another_address_of_the_relay() -> Result<()> {
    lab::test("relaymoves", |lab| {
        let (server, mut a, mut b) = talk(lab, None)?;
        let v4 = IpAddr::from(server.host.v4());
        let v6 = IpAddr::from(server.host.v6().context("IPv6")?);
        let own_v6 = a.host.v6().context("IPv6")?.to_string();
        ensure!(a.connected()? == (Transport::Quic, v6));
        b.connected()?;
        // What is left as a source of IPv6 is the overlay's own address.
        a.leave_v6()?;
        ensure!(a.moves_over(&mut b, b"over IPv4")? == (Transport::Quic, v4));
        // Here the route goes, too.
        a.leave_v4()?;
        a.come_v6(&own_v6)?;
        ensure!(a.moves_over(&mut b, b"over IPv6")? == (Transport::Quic, v6));
        // Nowhere to go: that is told at once, and the way back as well.
        a.leave_v6()?;
        a.client.network_changed();
        loop {
            match a.event("the loss is told")? {
                RelayEventKind::Disconnected { .. } => break,
                RelayEventKind::Doubt { .. } => {}
                other => bail!("{other:?}"),
            }
        }
        a.come_v4()?;
        a.client.network_changed();
        loop {
            match a.event("it is back")? {
                RelayEventKind::Connected { addr, .. } if addr.ip() == v4 => break,
                RelayEventKind::Disconnected { .. } => {} // tries in between
                other => bail!("{other:?}"),
            }
        }
        a.stays(&mut b, "there again")?;
        server.runtime.block_on(server.server.shutdown());
        Ok(())
    })
}

#[test]
fn a_connection_that_may_go_on_is_not_disturbed() -> Result<()> {
    lab::test("relaystays", |lab| {
        let (server, mut a, mut b) = talk(lab, None)?;
        let v6 = IpAddr::from(server.host.v6().context("IPv6")?);
        let own_v6 = a.host.v6().context("IPv6")?.to_string();
        ensure!(a.connected()? == (Transport::Quic, v6));
        b.connected()?;
        a.ip("addr add 203.0.113.201/24 dev eth0")?;
        a.come_v6("2001:db8::201")?;
        a.stays(&mut b, "more addresses")?;
        a.ip(&format!("addr change {own_v6}/64 dev eth0 preferred_lft 0"))?;
        a.stays(&mut b, "ours is deprecated")?;
        // QUIC and plain UDP go on from another one.
        a.ip(&format!("addr del {own_v6}/64 dev eth0"))?;
        a.stays(&mut b, "ours is gone, another one there")?;
        a.leave_v4()?;
        a.stays(&mut b, "the other family is gone")?;
        server.runtime.block_on(server.server.shutdown());
        Ok(())
    })
}

#[test]
fn a_websocket_whose_address_is_gone_is_left_at_once() -> Result<()> {
    lab::test("relaytcp", |lab| {
        let no_udp = format!(
            "table inet f {{ chain c {{ type filter hook output priority 0; udp dport {PORT} drop; }}; }}"
        );
        let (server, mut a, mut b) = talk(lab, Some(&no_udp))?;
        let v6 = IpAddr::from(server.host.v6().context("IPv6")?);
        let own_v6 = a.host.v6().context("IPv6")?.to_string();
        ensure!(a.connected()? == (Transport::WebSocket, v6));
        b.connected()?;
        a.come_v6("2001:db8::201")?;
        a.stays(&mut b, "another address")?;
        // There is a route still, from the other address.
        a.ip(&format!("addr del {own_v6}/64 dev eth0"))?;
        ensure!(a.moves_over(&mut b, b"from the other address")? == (Transport::WebSocket, v6));
        server.runtime.block_on(server.server.shutdown());
        Ok(())
    })
}
