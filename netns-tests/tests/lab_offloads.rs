//! Real TUNs, real sockets, every mixture of offloads: what goes in at one end comes out at the other, byte for byte
//! and in order.
//!
//! Frames that a TUN says it completes are not checked by the receiving kernel, so at least one end of most mixtures has
//! no offload: there the kernel itself verifies each packet's checksum.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use socket2::{Domain, Protocol, Socket, Type};
use warren_engine::packet::{Addrs, build};
use warren_netns_tests::lab::{self, Host, Lab};
use warren_netns_tests::tunnel::{PLAIN, Setup, Tunnel, Under, byte_at, tcp};

/// Bound for what must happen; only a failing test waits this long.
const LIMIT: Duration = Duration::from_secs(20);
/// Raw IP, whose headers the sender writes.
const IPPROTO_RAW: i32 = 255;

/// Datagrams of many sizes, some of them longer than the MTU: numbered, so that order and content show. Sent in small
/// bursts with an answer each, so that none is lost to a full queue.
fn udp(from: &Host, to: &Host, address: SocketAddr, source: IpAddr) -> Result<()> {
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
            let number = u32::from_be_bytes([buffer[0], buffer[1], buffer[2], buffer[3]]);
            if number != expected {
                receiver.set_read_timeout(Some(Duration::from_millis(500)))?;
                let mut rest = vec![];
                while let Ok((n, _)) = receiver.recv_from(&mut buffer) {
                    rest.push((u32::from_be_bytes([buffer[0], buffer[1], buffer[2], buffer[3]]), n));
                }
                bail!("number {number} came instead of {expected}, then {rest:?}");
            }
            ensure!((4..len).all(|i| buffer[i] == byte_at(expected as usize * 31 + i)), "another content");
            if i + 1 == sizes.len() {
                receiver.send_to(b"got", peer)?;
            }
        }
        ensure!(sender.recv(&mut buffer)? == 3, "no answer");
    }
    Ok(())
}

/// Runs this thread, and what it starts, on one processor: a sender that moves to another in the middle of a burst is
/// overtaken by itself in the kernel, whose queues between interfaces are per processor.
fn stay_on_one_processor() -> Result<()> {
    let mut set = sched_getaffinity(None)?;
    let first = (0..CpuSet::MAX_CPU).find(|cpu| set.is_set(*cpu)).context("a processor")?;
    set.clear();
    set.set(first);
    Ok(sched_setaffinity(None, &set)?)
}

fn check(lab: &Lab, hosts: [&Host; 2], setup: Setup, run: u8) -> Result<()> {
    let tunnel = Tunnel::connect(lab, hosts, setup, run).with_context(|| format!("{setup:?}"))?;
    for (from, to) in [(0, 1), (1, 0)] {
        let address = SocketAddr::from((tunnel.addresses[to], 7_000 + to as u16));
        tcp(tunnel.hosts[from], tunnel.hosts[to], address).with_context(|| format!("tcp, {setup:?}"))?;
        udp(tunnel.hosts[from], tunnel.hosts[to], address, tunnel.addresses[from])
            .with_context(|| format!("udp, {setup:?}"))?;
    }
    Ok(())
}

#[test]
fn data_arrives_whole_whatever_either_kernel_lacks() -> Result<()> {
    stay_on_one_processor()?;
    lab::test("offloads", |lab| {
        let (a, b) = (lab.host("A")?, lab.host("B")?);
        let setups = [
            PLAIN,
            Setup { without: ["", "all"], ..PLAIN },
            Setup { without: ["tun", "udp-receive"], ..PLAIN },
            Setup { without: ["tun-udp", "all"], ..PLAIN },
            Setup { without: ["udp-send", "all"], ..PLAIN },
        ];
        for (run, setup) in (0..).zip(setups) {
            check(lab, [&a, &b], setup, run)?;
        }
        Ok(())
    })
}

#[test]
fn data_arrives_whole_at_every_mtu_and_in_both_families() -> Result<()> {
    stay_on_one_processor()?;
    lab::test("mtu", |lab| {
        let (a, b) = (lab.host("A")?, lab.host("B")?);
        // What mustn't be fragmented would be told the path's length, and the first datagram be lost.
        for host in [&a, &b] {
            host.sysctl(&["net.ipv4.ip_no_pmtu_disc=1"])?;
        }
        let receiver_plain = Setup { without: ["", "all"], ..PLAIN };
        let setups = [
            Setup { mtu: 1_280, ..receiver_plain },
            // Longer than the underlay's: the outer packets are fragmented.
            Setup { mtu: 1_700, ..receiver_plain },
            Setup { mtu: 9_000, ..receiver_plain },
            Setup { under: Under::V6, ..receiver_plain },
            Setup { inner_v6: true, ..receiver_plain },
            Setup { under: Under::V6, inner_v6: true, ..PLAIN },
        ];
        for (run, setup) in (0..).zip(setups) {
            check(lab, [&a, &b], setup, run)?;
        }
        Ok(())
    })
}

/// An IPv4 packet with one datagram in it, its checksum right.
fn datagram(addresses: [Ipv4Addr; 2], ports: [u16; 2], payload: &[u8]) -> Result<Vec<u8>> {
    let mut udp = Vec::new();
    ports.iter().for_each(|port| udp.extend(port.to_be_bytes()));
    udp.extend((8 + payload.len() as u16).to_be_bytes());
    udp.extend([0; 2]);
    udp.extend(payload);
    let ends = Addrs::new(addresses[0].into(), addresses[1].into()).context("one family")?;
    let sum = build::transport_checksum(ends, 17, &udp);
    udp[6..8].copy_from_slice(&sum.to_be_bytes());
    let mut packet = vec![0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, 17, 0, 0];
    packet[2..4].copy_from_slice(&(20 + udp.len() as u16).to_be_bytes());
    addresses.iter().for_each(|address| packet.extend(address.octets()));
    let sum = build::checksum(&[&packet]);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet.extend(udp);
    Ok(packet)
}

/// Datagrams that the host's own network stack found damaged.
fn damaged(host: &Host) -> Result<u64> {
    let output = host.run("cat", &["/proc/net/snmp"])?;
    let text = String::from_utf8(output.stdout)?;
    let mut lines = text.lines().filter(|line| line.starts_with("Udp:"));
    let (names, values) = (lines.next().context("names")?, lines.next().context("values")?);
    let at = names.split_whitespace().position(|name| name == "InCsumErrors").context("a counter")?;
    Ok(values.split_whitespace().nth(at).context("a value")?.parse()?)
}

/// One datagram among others of its flow is damaged before it is sealed: the far end's host must refuse it, and only it.
#[test]
fn a_damaged_packet_is_never_joined_with_good_ones() -> Result<()> {
    const COUNT: u32 = 20;
    const BAD: u32 = 9;
    lab::test("damaged", |lab| {
        let (a, b) = (lab.host("A")?, lab.host("B")?);
        for (run, without) in [["", "all"], ["", ""]].into_iter().enumerate() {
            let tunnel = Tunnel::connect(lab, [&a, &b], Setup { without, ..PLAIN }, run as u8)?;
            let [IpAddr::V4(from), IpAddr::V4(to)] = tunnel.addresses else { bail!("IPv4 inside") };
            let receiver = b.enter(|| UdpSocket::bind((to, 7_000)))??;
            receiver.set_read_timeout(Some(LIMIT))?;
            let raw =
                a.enter(|| Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(IPPROTO_RAW))))??;
            let before = damaged(&b)?;
            for number in 0..COUNT {
                let mut packet =
                    datagram([from, to], [6_000, 7_000], &[&number.to_be_bytes()[..], &[7; 600]].concat())?;
                if number == BAD {
                    *packet.last_mut().context("a payload")? ^= 0x40;
                }
                raw.send_to(&packet, &SocketAddr::from((to, 0)).into())?;
            }
            let mut buffer = [0; 2_000];
            for number in (0..COUNT).filter(|number| *number != BAD) {
                let len = receiver.recv(&mut buffer).context("a good datagram")?;
                ensure!(
                    len == 604 && buffer[..4] == number.to_be_bytes(),
                    "{len} bytes, not number {number}"
                );
                ensure!(buffer[4..len].iter().all(|byte| *byte == 7), "number {number} has changed");
            }
            ensure!(
                damaged(&b)? == before + 1,
                "the host of {without:?} refused another number of datagrams"
            );
        }
        Ok(())
    })
}

/// What a capture holds, filtered by an expression.
fn captured(host: &Host, file: &str, filter: &str) -> Result<Vec<String>> {
    let output = host.run("tcpdump", &["-nn", "-r", file, filter])?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?.lines().map(str::to_owned).collect())
}

#[test]
fn inside_is_seen_inside_and_only_sealed_packets_outside() -> Result<()> {
    lab::test_with("tcpdump", &[("tcpdump", "tcpdump")], |lab| {
        let (a, b) = (lab.host("A")?, lab.host("B")?);
        let tunnel = Tunnel::connect(lab, [&a, &b], PLAIN, 0)?;
        let mut captures = Vec::new();
        for interface in ["eth0", &tunnel.name] {
            let file = a.dir().join(format!("{interface}.pcap")).display().to_string();
            let mut command = a.command("tcpdump");
            command.args(["-i", interface, "-s", "0", "-U", "-Z", "root", "-w", &file]);
            let mut process = a.spawn(command)?;
            process.wait_for_line("listening on", LIMIT)?;
            captures.push((process, file));
        }
        let marker = b"plain as day, and in nobody else's hands";
        let receiver = b.enter(|| UdpSocket::bind((tunnel.addresses[1], 7_000)))??;
        receiver.set_read_timeout(Some(LIMIT))?;
        let sender = a.enter(|| UdpSocket::bind((tunnel.addresses[0], 6_000)))??;
        let mut buffer = [0; 2_000];
        for repeats in 1..30 {
            let payload = marker.repeat(repeats);
            sender.send_to(&payload, (tunnel.addresses[1], 7_000))?;
            ensure!(receiver.recv(&mut buffer)? == payload.len(), "another length");
        }
        tcp(&a, &b, SocketAddr::from((tunnel.addresses[1], 7_001)))?;
        for (process, _) in &mut captures {
            process.stop(LIMIT)?;
        }
        let [(_, outside), (_, inside)] = captures.as_slice() else { bail!("two captures") };
        let shows = |file: &str| -> Result<bool> {
            Ok(std::fs::read(file)?.windows(marker.len()).any(|bytes| bytes == marker))
        };
        ensure!(shows(inside)?, "the capture inside shows no payload: it proves nothing");
        ensure!(!shows(outside)?, "payload outside");
        // Between the two ports, neighbours' questions aside, and nothing of the addresses inside.
        let port = tunnel.port;
        let foreign =
            captured(&a, outside, &format!("not arp and not src net fe80::/10 and not udp port {port}"))?;
        ensure!(foreign.is_empty(), "outside: {foreign:?}");
        let sealed = captured(&a, outside, &format!("udp port {port}"))?;
        ensure!(sealed.len() > 29, "{} packets outside", sealed.len());
        let inner = captured(&a, outside, "net 10.99.0.0/16")?;
        ensure!(inner.is_empty(), "inner addresses outside: {inner:?}");
        // A length that tells the payload's would be no multiple of 16: but for packets as long as the MTU allows, all are.
        let odd = captured(
            &a,
            outside,
            &format!("udp port {port} and udp[4:2] < 1400 and udp[8] = 4 and udp[4:2] & 15 != 8"),
        )?;
        ensure!(odd.is_empty(), "lengths that were not padded: {odd:?}");
        let strangers = captured(&a, inside, "not net 10.99.0.0/16 and not ip6")?;
        ensure!(strangers.is_empty(), "inside: {strangers:?}");
        Ok(())
    })
}
