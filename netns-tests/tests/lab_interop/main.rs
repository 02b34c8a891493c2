//! Interop on the wire: Debian's wireguard-go, configured by `wg`, completes handshakes and exchanges traffic with the
//! whole engine, over real sockets and real TUN devices.

mod node;

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use data_encoding::BASE64;
use warren_common::keys::{KEY_LEN, WgPublicKey};
use warren_netns_tests::lab::{self, Host, Lab, Process, eventually, workspace_binary};
use warren_netns_tests::programs::tool;

use node::{Node, Reached};

/// Bound for what must happen; only a failing test waits this long.
const LIMIT: Duration = Duration::from_secs(20);

const PROGRAMS: [(&str, &str); 2] = [("wireguard-go", "wireguard-go"), ("wg", "wireguard-tools")];

/// The stock device's name.
const DEVICE: &str = "stock0";
/// Where the stock device listens.
const PORT: u16 = 51_820;
/// Where services listen.
const TCP: u16 = 7000;
/// Bytes of each transfer: many full packets.
const TRANSFER: &str = "1000000";

/// A host that runs wireguard-go.
struct Stock {
    host: Host,
    key: WgPublicKey,
    addrs: [IpAddr; 2],
    _process: Process,
}

impl Stock {
    fn start(host: Host, addrs: [IpAddr; 2]) -> Result<Self> {
        let mut command = host.command("wireguard-go");
        command.args(["-f", DEVICE]);
        let mut process = host.spawn(command)?;
        let socket = host.dir().join("run/wireguard").join(format!("{DEVICE}.sock"));
        eventually("wireguard-go can be configured", LIMIT, || {
            ensure!(process.is_running()?, "wireguard-go ended: {}", process.log()?);
            Ok(socket.exists().then_some(()))
        })?;
        let secret = host.dir().join("wg-secret");
        std::fs::write(&secret, wg(&host, &["genkey"])?)?;
        let secret = secret.to_str().context("a path in ASCII")?;
        wg(&host, &["set", DEVICE, "private-key", secret, "listen-port", &PORT.to_string()])?;
        let key = BASE64.decode(wg(&host, &["show", DEVICE, "public-key"])?.trim().as_bytes())?;
        let key: [u8; KEY_LEN] = key.try_into().ok().context("a key's length")?;
        for addr in addrs {
            host.ip(&format!("addr add {addr} dev {DEVICE}"))?;
        }
        host.ip(&format!("link set {DEVICE} mtu 1420 up"))?;
        Ok(Self { host, key: WgPublicKey::from_bytes(key), addrs, _process: process })
    }

    fn endpoint(&self) -> SocketAddr {
        SocketAddr::new(self.host.v4().into(), PORT)
    }

    /// Makes our engine its peer. Without an endpoint it waits to be called.
    fn add_peer(&self, node: &Node<'_>, endpoint: Option<SocketAddr>) -> Result<()> {
        let key = BASE64.encode(node.key().as_bytes());
        let [v4, v6] = node::ADDRS;
        let allowed = format!("{v4}/32,{v6}/128");
        let mut args = vec!["set", DEVICE, "peer", &key, "allowed-ips", &allowed];
        let endpoint = endpoint.map(|endpoint| endpoint.to_string());
        if let Some(endpoint) = &endpoint {
            args.extend(["endpoint", endpoint]);
        }
        wg(&self.host, &args)?;
        for addr in node::ADDRS {
            self.host.ip(&format!("route add {addr} dev {DEVICE}"))?;
        }
        Ok(())
    }

    /// What `wg show` says of the peer: field of one line.
    fn shows(&self, what: &str) -> Result<Vec<String>> {
        let text = wg(&self.host, &["show", DEVICE, what])?;
        Ok(text.split_whitespace().skip(1).map(str::to_owned).collect())
    }
}

/// Runs `wg` to its end; what it printed.
fn wg(host: &Host, args: &[&str]) -> Result<String> {
    let output = host.run("wg", args)?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "wg {}: {}", args.join(" "), said.trim());
    Ok(String::from_utf8(output.stdout)?)
}

fn ping(from: &Host, to: IpAddr) -> Result<()> {
    // A full packet each, so that padding and fragments would show.
    let args = ["-n", "-c", "3", "-i", "0.2", "-W", "5", "-s", "1300", &to.to_string()];
    let output = from.run("ping", &args)?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success() && text.contains(" 0% packet loss"), "{}: {text}", from.name());
    Ok(())
}

fn transfer(from: &Host, to: &Host, addr: IpAddr) -> Result<()> {
    let at = SocketAddr::new(addr, TCP).to_string();
    let mut command = to.command(workspace_binary("lab-tool")?);
    command.args(["tcp-serve", &at]);
    let mut server = to.spawn(command)?;
    server.wait_for_line("listening", LIMIT)?;
    let end = tool(from, &["tcp-stream", &at, "--total", TRANSFER])?;
    ensure!(end["how"] == "complete", "{} to {at}: {end}", from.name());
    Ok(())
}

/// Each end pings the other and transfers to it, in both families; `first` begins.
fn talk(ours: (&Host, [IpAddr; 2]), theirs: (&Host, [IpAddr; 2]), we_begin: bool) -> Result<()> {
    let ways = [(ours.0, theirs.0, theirs.1), (theirs.0, ours.0, ours.1)];
    let order: [usize; 2] = if we_begin { [0, 1] } else { [1, 0] };
    for (from, to, addrs) in order.map(|n| ways[n]) {
        for addr in addrs {
            ping(from, addr)?;
            transfer(from, to, addr)?;
        }
    }
    Ok(())
}

fn meet(lab: &Lab, reached: Reached) -> Result<()> {
    let host = lab.host("ours")?;
    let stock = Stock::start(lab.host("stock")?, ["100.64.0.2".parse()?, "fd00:77::2".parse()?])?;
    let node = Node::new(&host, stock.key, stock.addrs)?;
    let we_begin = matches!(reached, Reached::ByUs);
    stock.add_peer(&node, (!we_begin).then(|| node.endpoint()))?;
    let status = node.run(&stock, reached, || {
        talk((&host, node::ADDRS), (&stock.host, stock.addrs), we_begin)?;
        let handshake = stock.shows("latest-handshakes")?;
        ensure!(handshake.first().is_some_and(|at| at != "0"), "no handshake: {handshake:?}");
        ensure!(stock.shows("endpoints")? == [node.endpoint().to_string()], "it is reached elsewhere");
        Ok(())
    })?;
    let peer = status.peers.first().context("a peer")?;
    ensure!(
        peer.last_handshake.is_some() && peer.rx_bytes > 4_000_000 && peer.tx_bytes > 4_000_000,
        "{peer:?}"
    );
    let refused: Vec<_> =
        status.drops.iter().filter(|(name, n)| name.starts_with("wireguard-") && **n > 0).collect();
    ensure!(refused.is_empty(), "the engine refused messages of a stock peer: {refused:?}");
    Ok(())
}

#[test]
fn wireguard_go_calls_and_talks_with_our_engine() -> Result<()> {
    lab::test_with("called", &PROGRAMS, |lab| meet(lab, Reached::ByThem))
}

#[test]
fn our_engine_calls_and_talks_with_wireguard_go() -> Result<()> {
    lab::test_with("calling", &PROGRAMS, |lab| meet(lab, Reached::ByUs))
}
