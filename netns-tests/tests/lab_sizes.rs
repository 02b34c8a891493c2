//! Packets of every length up to the tunnel's MTU, from 1 280 to 9 000, arrive byte for byte and in one piece, over either
//! family, whatever help either kernel has.
//!
//! The underlay's MTU is the least that carries the tunnel's longest packet whole. `warrend` makes no TUN with an MTU above
//! 1 420; the benchmark node is the same data plane with any.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use socket2::SockRef;
use warren_netns_tests::lab::{self, Host};
use warren_netns_tests::tunnel::{PLAIN, Setup, Tunnel, Under, byte_at, tcp};

/// Bound for what must happen; only a failing test waits this long.
const LIMIT: Duration = Duration::from_secs(20);
/// Datagrams of each length, a count: enough to be joined.
const BURST: usize = 3;

/// Lengths of IP packets at which something may change: the shortest, steps of WireGuard's padding, MTUs that other links
/// have, powers of two, the longest.
fn lengths(shortest: usize, mtu: usize) -> Vec<usize> {
    let edges = [1_280, 1_420, 1_500, 2_048, 4_096, 8_192, mtu];
    let around = edges.into_iter().flat_map(|edge| [edge - 16, edge - 1, edge, edge + 1]);
    let mut all: Vec<usize> = (shortest..shortest + 17).step_by(4).chain(around).chain([mtu - 8]).collect();
    all.retain(|len| (shortest..=mtu).contains(len));
    all.sort_unstable();
    all.dedup();
    all
}

/// Bytes of an IP header.
const fn ip_header(to: IpAddr) -> usize {
    if to.is_ipv4() { 20 } else { 40 }
}

/// Echoes of each length, whose content ping compares; one that is longer than the MTU doesn't leave.
fn pings(from: &Host, to: IpAddr, mtu: usize) -> Result<()> {
    let headers = ip_header(to) + 8;
    let ping = |len: usize| -> Result<String> {
        let size = (len - headers).to_string();
        let args = ["-n", "-c", "1", "-W", "5", "-M", "do", "-p", "5a17c3", "-s", &size, &to.to_string()];
        let output = from.run("ping", &args)?;
        Ok(String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
    };
    for len in lengths(headers, mtu) {
        let said = ping(len)?;
        ensure!(said.contains(" 1 received") && !said.contains("wrong data"), "{len} bytes: {said}");
    }
    let said = ping(mtu + 1)?;
    ensure!(!said.contains(" 1 received"), "longer than the MTU: {said}");
    Ok(())
}

/// Datagrams of each length, a few of one after the other.
fn datagrams(from: &Host, to: &Host, addresses: [IpAddr; 2], mtu: usize) -> Result<()> {
    let [source, target] = addresses;
    let receiver = to.enter(|| UdpSocket::bind((target, 7_000)))??;
    let sender = from.enter(|| UdpSocket::bind((source, 0)))??;
    receiver.set_read_timeout(Some(LIMIT))?;
    let headers = ip_header(target) + 8;
    let mut buffer = vec![0; 65_536];
    for len in lengths(headers, mtu) {
        let size = len - headers;
        let datagram = |n: usize| -> Vec<u8> { (0..size).map(|i| byte_at(len * 97 + n * 31 + i)).collect() };
        for n in 0..BURST {
            sender.send_to(&datagram(n), (target, 7_000))?;
        }
        for n in 0..BURST {
            let got = receiver.recv(&mut buffer).with_context(|| format!("{len} bytes, number {n}"))?;
            ensure!(buffer[..got] == datagram(n), "{got} bytes came instead of {size}, or others");
        }
    }
    Ok(())
}

/// IP packets that this host has cut or tried to cut.
fn cut(host: &Host) -> Result<Vec<String>> {
    let output = host.run("cat", &["/proc/net/snmp", "/proc/net/snmp6"])?;
    let text = String::from_utf8(output.stdout)?;
    let mut found: Vec<String> =
        text.lines().filter(|line| line.starts_with("Ip6Frag")).map(str::to_owned).collect();
    let mut lines = text.lines().filter(|line| line.starts_with("Ip:"));
    let (names, values) = (lines.next().context("names")?, lines.next().context("values")?);
    let pairs = names.split_whitespace().zip(values.split_whitespace());
    found.extend(pairs.filter(|(name, _)| name.starts_with("Frag")).map(|(name, n)| format!("{name} {n}")));
    ensure!(found.len() == 6, "{found:?}");
    Ok(found)
}

#[test]
fn every_length_up_to_the_mtu_arrives_whole() -> Result<()> {
    lab::test("sizes", |lab| {
        let (a, b) = (lab.host("A")?, lab.host("B")?);
        let mut run = 0;
        for (mtu, v6) in [(1_280, false), (1_280, true), (9_000, false), (9_000, true)] {
            for without in [["", ""], ["", "all"], ["all", "all"]] {
                // Of IP, UDP and WireGuard.
                let under = Under::Cable { mtu: mtu + if v6 { 40 } else { 20 } + 8 + 32, v6 };
                let setup = Setup { without, mtu, under, inner_v6: run % 2 == 0 };
                let before = [cut(&a)?, cut(&b)?];
                let tunnel =
                    Tunnel::connect(lab, [&a, &b], setup, run).with_context(|| format!("{setup:?}"))?;
                for (from, to) in [(0, 1), (1, 0)] {
                    let (host, other) = (tunnel.hosts[from], tunnel.hosts[to]);
                    let ends = [tunnel.addresses[from], tunnel.addresses[to]];
                    let what = |what: &str| format!("{what} from {from}, {setup:?}");
                    pings(host, ends[1], mtu.into()).with_context(|| what("pings"))?;
                    datagrams(host, other, ends, mtu.into()).with_context(|| what("datagrams"))?;
                    let address = SocketAddr::new(ends[1], 7_001 + to as u16);
                    let sender = tcp(host, other, address).with_context(|| what("tcp"))?;
                    // Less the headers, and time stamps.
                    let full = usize::from(mtu) - ip_header(ends[1]) - 20 - 12;
                    let mss = SockRef::from(&sender).tcp_mss()?;
                    ensure!(mss as usize == full, "segments of {mss} bytes, {setup:?}");
                }
                drop(tunnel);
                ensure!([cut(&a)?, cut(&b)?] == before, "packets were cut: {setup:?}");
                run += 1;
            }
        }
        Ok(())
    })
}

/// A TCP whose peer announces tiny segments makes super-frames of more packets than are sealed at a time.
#[test]
fn a_tcp_of_tiny_segments_arrives_whole() -> Result<()> {
    lab::test("tiny segments", |lab| {
        let (a, b) = (lab.host("A")?, lab.host("B")?);
        for (run, inner_v6) in [false, true].into_iter().enumerate() {
            let tunnel = Tunnel::connect(lab, [&a, &b], Setup { inner_v6, ..PLAIN }, run as u8)?;
            let net = if inner_v6 { format!("fd00:99:0:{run}::/64") } else { format!("10.99.{run}.0/24") };
            let metric = if inner_v6 { "metric 256" } else { "" };
            b.ip(&format!("route replace {net} dev {} advmss 48 {metric}", tunnel.name))?;
            let sender = tcp(&a, &b, SocketAddr::new(tunnel.addresses[1], 7_000))?;
            let mss = SockRef::from(&sender).tcp_mss()?;
            ensure!(mss <= 48, "segments of {mss} bytes");
        }
        Ok(())
    })
}
