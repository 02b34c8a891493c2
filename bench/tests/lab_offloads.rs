//! Real TUNs, real sockets, every mixture of offloads: what goes in at one end comes out at the other, byte for byte
//! and in order.
//!
//! Frames that a TUN says it completes are not checked by the receiving kernel, so at least one end of most mixtures has
//! no offload: there the kernel itself verifies each packet's checksum.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use warren_netns_tests::lab::{self, Host, Lab, Process};

/// Bound for what must happen; only a failing test waits this long.
const LIMIT: Duration = Duration::from_secs(20);
/// Bytes of each TCP transfer.
const TOTAL: usize = 12_000_000;

/// One end of a tunnel: its offloads switched off by name.
struct End<'a> {
    host: &'a Host,
    without: &'a str,
    _process: Process,
}

/// Connects two hosts and waits until a packet passes.
fn connect<'a>(
    lab: &Lab,
    hosts: [&'a Host; 2],
    without: [&'a str; 2],
    mtu: u16,
    run: usize,
) -> Result<[End<'a>; 2]> {
    let dir = lab.dir().join(format!("pair-{run}"));
    std::fs::create_dir(&dir)?;
    let mut ends = Vec::new();
    for (n, role) in ["a", "b"].into_iter().enumerate() {
        let host = hosts[n];
        let mut command = host.command(env!("CARGO_BIN_EXE_warren-bench-node"));
        let name = format!("w{run}");
        command.args(["--role", role, "--tun", &name, "--mtu", &mtu.to_string()]);
        command.arg("--addr").arg(address(run, n).to_string());
        command.arg("--peer-addr").arg(address(run, 1 - n).to_string());
        command.arg("--listen").arg(SocketAddr::from((host.v4(), 52_000 + run as u16)).to_string());
        command.arg("--state").arg(&dir);
        if !without[n].is_empty() {
            command.args(["--without-offload", without[n]]);
        }
        let mut process = host.spawn(command)?;
        process.wait_for_line("ready", LIMIT)?;
        host.ip(&format!("addr add {}/24 dev {name}", address(run, n)))?;
        host.ip(&format!("link set {name} mtu {mtu} up"))?;
        ends.push(End { host, without: without[n], _process: process });
    }
    let to = IpAddr::from(address(run, 1));
    lab::eventually("a ping through the tunnel", LIMIT, || Ok(hosts[0].pings(to)?.then_some(())))?;
    ends.try_into().ok().context("two ends")
}

fn address(run: usize, n: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 99, run as u8, n as u8 + 1)
}

/// What byte stands at a place of a stream.
fn byte_at(place: usize) -> u8 {
    (place.wrapping_mul(0x9e37_79b9) >> 13) as u8
}

/// One TCP connection, with writes of many sizes.
fn tcp(from: &Host, to: &Host, address: SocketAddr) -> Result<()> {
    let listener = to.enter(|| TcpListener::bind(address))??;
    let mut sender = from.enter(|| TcpStream::connect_timeout(&address, LIMIT))??;
    let (mut receiver, _) = listener.accept()?;
    receiver.set_read_timeout(Some(LIMIT))?;
    sender.set_write_timeout(Some(LIMIT))?;
    let writing = std::thread::spawn(move || -> std::io::Result<()> {
        let (mut at, mut size) = (0, 1);
        while at < TOTAL {
            size = size * 7 % 65_521 + 1;
            let part: Vec<u8> = (at..(at + size).min(TOTAL)).map(byte_at).collect();
            sender.write_all(&part)?;
            at += part.len();
        }
        Ok(())
    });
    let (mut got, mut buffer) = (0, vec![0; 100_000]);
    loop {
        let n = receiver.read(&mut buffer)?;
        if n == 0 {
            break;
        }
        for (i, byte) in buffer[..n].iter().enumerate() {
            ensure!(*byte == byte_at(got + i), "byte {} is another", got + i);
        }
        got += n;
    }
    writing.join().map_err(|_| anyhow!("the sender panicked"))??;
    ensure!(got == TOTAL, "{got} bytes came");
    Ok(())
}

/// Datagrams of many sizes, some of them longer than the MTU: numbered, so that order and content show. Sent in small
/// bursts with an answer each, so that none is lost to a full queue.
fn udp(from: &Host, to: &Host, address: SocketAddr, source: Ipv4Addr) -> Result<()> {
    let receiver = to.enter(|| UdpSocket::bind(address))??;
    let sender = from.enter(|| UdpSocket::bind((source, 0)))??;
    for socket in [&receiver, &sender] {
        socket.set_read_timeout(Some(LIMIT))?;
    }
    sender.connect(address)?;
    let mut buffer = vec![0; 65_536];
    let mut number = 0u32;
    for burst in 0..60usize {
        // Runs of one size, as a video or QUIC sender makes them, between odd ones.
        let sizes: Vec<usize> =
            (0..12).map(|i| if burst % 2 == 0 { 1_200 } else { 5 + burst * 40 + i * 3 }).collect();
        let first = number;
        for size in &sizes {
            let mut datagram = number.to_be_bytes().to_vec();
            datagram.extend((4..*size).map(|i| byte_at(number as usize * 31 + i)));
            sender.send(&datagram)?;
            number += 1;
        }
        for (i, size) in sizes.iter().enumerate() {
            let (len, peer) = receiver.recv_from(&mut buffer).context("a datagram")?;
            let expected = first + i as u32;
            ensure!(len == *size, "{len} bytes instead of {size}");
            ensure!(buffer[..4] == expected.to_be_bytes(), "out of order");
            ensure!((4..len).all(|i| buffer[i] == byte_at(expected as usize * 31 + i)), "another content");
            if i + 1 == sizes.len() {
                receiver.send_to(b"got", peer)?;
            }
        }
        ensure!(sender.recv(&mut buffer)? == 3, "no answer");
    }
    Ok(())
}

fn check(lab: &Lab, hosts: [&Host; 2], without: [&str; 2], mtu: u16, run: usize) -> Result<()> {
    let what = || format!("without {without:?} at MTU {mtu}");
    let ends = connect(lab, hosts, without, mtu, run).with_context(what)?;
    for (from, to) in [(0, 1), (1, 0)] {
        let port = 7_000 + to as u16;
        let address_ = SocketAddr::from((address(run, to), port));
        tcp(ends[from].host, ends[to].host, address_).with_context(|| format!("tcp {}", what()))?;
        udp(ends[from].host, ends[to].host, address_, address(run, from))
            .with_context(|| format!("udp {}", what()))?;
    }
    ensure!(ends.iter().map(|end| end.without).eq(without), "as started");
    Ok(())
}

#[test]
fn data_arrives_whole_whatever_either_kernel_lacks() -> Result<()> {
    lab::test("offloads", |lab| {
        let (a, b) = (lab.host("A")?, lab.host("B")?);
        let mixtures = [
            (["", ""], 1_420),
            (["", "all"], 1_420),
            (["tun", "udp-receive"], 1_420),
            (["tun-udp", "all"], 1_420),
            (["udp-send", "all"], 1_420),
            (["", "all"], 1_280),
            // Longer than the underlay's: the outer packets are fragmented.
            (["", "all"], 1_700),
        ];
        for (run, (without, mtu)) in mixtures.into_iter().enumerate() {
            check(lab, [&a, &b], without, mtu, run)?;
        }
        Ok(())
    })
}
