//! Two hosts and a tunnel of benchmark nodes between them: the product's data plane without the rest.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};

use crate::lab::{self, Host, Lab, Process};

/// Bound for what must happen; only a failing test waits this long.
const LIMIT: Duration = Duration::from_secs(20);
/// Bytes of each TCP transfer.
const TOTAL: usize = 12_000_000;

/// How a pair is set up.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// Offloads switched off by name, at either end.
    pub without: [&'static str; 2],
    /// The TUNs' MTU.
    pub mtu: u16,
    /// What carries it.
    pub under: Under,
    /// The family of the packets inside: IPv6, or else IPv4.
    pub inner_v6: bool,
}

/// What is under a tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Under {
    /// The lab's internet, over IPv4.
    V4,
    /// The lab's internet, over IPv6.
    V6,
    /// A cable of its own.
    Cable {
        /// Its MTU.
        mtu: u16,
        /// It carries IPv6, or else IPv4.
        v6: bool,
    },
}

/// The usual.
pub const PLAIN: Setup = Setup { without: ["", ""], mtu: 1_420, under: Under::V4, inner_v6: false };

/// A running tunnel between two hosts.
#[derive(Debug)]
pub struct Tunnel<'a> {
    /// Its ends.
    pub hosts: [&'a Host; 2],
    /// Their addresses inside.
    pub addresses: [IpAddr; 2],
    /// The UDP port of both ends.
    pub port: u16,
    /// The TUN's name at both ends.
    pub name: String,
    _ends: Vec<Process>,
}

impl<'a> Tunnel<'a> {
    /// Connects two hosts and waits until a packet passes; `run` numbers the pairs of a lab.
    ///
    /// # Errors
    /// None passes.
    pub fn connect(lab: &Lab, hosts: [&'a Host; 2], setup: Setup, run: u8) -> Result<Self> {
        let dir = lab.dir().join(format!("pair-{run}"));
        std::fs::create_dir(&dir)?;
        let addresses = [1, 2].map(|n| {
            if setup.inner_v6 {
                IpAddr::from(Ipv6Addr::new(0xfd00, 0x99, 0, u16::from(run), 0, 0, 0, n))
            } else {
                IpAddr::from([10, 99, run, n as u8])
            }
        });
        let port = 52_000 + u16::from(run);
        let name = format!("w{run}");
        let mut under: Vec<IpAddr> = hosts.iter().map(|host| host.v4().into()).collect();
        match setup.under {
            Under::V4 => {}
            Under::V6 => {
                under = hosts
                    .iter()
                    .map(|host| host.v6().map(IpAddr::from))
                    .collect::<Option<_>>()
                    .context("IPv6")?;
            }
            Under::Cable { mtu, v6 } => {
                let peer = format!(
                    "link add c{run} mtu {mtu} type veth peer name c{run} mtu {mtu} netns {}",
                    hosts[1].netns()
                );
                hosts[0].ip(&peer)?;
                under = [1, 2]
                    .map(|n| {
                        if v6 {
                            IpAddr::from(Ipv6Addr::new(0x2001, 0xdb8, 0x98, u16::from(run), 0, 0, 0, n))
                        } else {
                            IpAddr::from([192, 0, 2, run * 2 + n as u8 - 1])
                        }
                    })
                    .to_vec();
                for (host, address) in hosts.iter().zip(&under) {
                    let bits = if v6 { 64 } else { 31 };
                    host.ip(&format!("addr add {address}/{bits} dev c{run}"))?;
                    host.ip(&format!("link set c{run} up"))?;
                }
            }
        }
        let mut ends = Vec::new();
        for (n, role) in ["a", "b"].into_iter().enumerate() {
            let host = hosts[n];
            let mut command = host.command(lab::workspace_binary("warren-bench-node")?);
            command.args(["--role", role, "--tun", &name, "--mtu", &setup.mtu.to_string()]);
            command.arg("--addr").arg(addresses[n].to_string());
            command.arg("--peer-addr").arg(addresses[1 - n].to_string());
            command.arg("--listen").arg(SocketAddr::from((under[n], port)).to_string());
            command.arg("--state").arg(&dir);
            if !setup.without[n].is_empty() {
                command.args(["--without-offload", setup.without[n]]);
            }
            let mut process = host.spawn(command)?;
            process.wait_for_line("ready", LIMIT)?;
            let prefix = if setup.inner_v6 { "64 nodad" } else { "24" };
            let (bits, flags) = prefix.split_once(' ').unwrap_or((prefix, ""));
            host.ip(&format!("addr add {}/{bits} dev {name} {flags}", addresses[n]))?;
            host.ip(&format!("link set {name} mtu {} up", setup.mtu))?;
            ends.push(process);
        }
        lab::eventually("a ping through the tunnel", LIMIT, || {
            Ok(hosts[0].pings(addresses[1])?.then_some(()))
        })?;
        Ok(Self { hosts, addresses, port, name, _ends: ends })
    }
}

/// What byte stands at a place of a stream.
pub const fn byte_at(place: usize) -> u8 {
    (place.wrapping_mul(0x9e37_79b9) >> 13) as u8
}

/// Reads a stream to its end. Returns how long it was.
///
/// # Errors
/// A byte is not the one of its place.
pub fn take_all(stream: &mut TcpStream) -> Result<usize> {
    let (mut got, mut buffer) = (0, vec![0; 100_000]);
    loop {
        let n = stream.read(&mut buffer)?;
        if n == 0 {
            return Ok(got);
        }
        for (i, byte) in buffer[..n].iter().enumerate() {
            ensure!(*byte == byte_at(got + i), "byte {} is another", got + i);
        }
        got += n;
    }
}

/// One TCP connection, with writes of many sizes; its sender, which has sent all.
///
/// # Errors
/// Something else arrives, or not all of it.
pub fn tcp(from: &Host, to: &Host, address: SocketAddr) -> Result<TcpStream> {
    let listener = to.enter(|| TcpListener::bind(address))??;
    let mut sender = from.enter(|| TcpStream::connect_timeout(&address, LIMIT))??;
    let (mut receiver, _) = listener.accept()?;
    receiver.set_read_timeout(Some(LIMIT))?;
    sender.set_write_timeout(Some(LIMIT))?;
    let writing = std::thread::spawn(move || -> std::io::Result<TcpStream> {
        let (mut at, mut size) = (0, 1);
        while at < TOTAL {
            size = size * 7 % 65_521 + 1;
            let part: Vec<u8> = (at..(at + size).min(TOTAL)).map(byte_at).collect();
            sender.write_all(&part)?;
            at += part.len();
        }
        sender.shutdown(Shutdown::Write)?;
        Ok(sender)
    });
    let got = take_all(&mut receiver)?;
    let sender = writing.join().map_err(|_| anyhow!("the sender panicked"))??;
    ensure!(got == TOTAL, "{got} bytes came");
    Ok(sender)
}
