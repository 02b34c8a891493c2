//! The servers that are measured: child processes on a core of their own, with what they use of CPU and memory.

use std::io::{BufRead as _, BufReader};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use warren_common::ids::{DeviceId, NetworkId, RelayId};
use warren_common::keys::{NetmapSecretKey, ProbeSecretKey};
use warren_relay::core::Limits;
use warren_relay::server::{RelayServer, RelayServerConfig};

/// The core that a server runs on; the load runs on another.
const CORE: &str = "0";
/// How long a server may take to be there.
const PATIENCE: Duration = Duration::from_secs(10);

/// The benchmark's network.
pub const NETWORK: NetworkId = NetworkId::from_bytes([1; 16]);
/// Its relay.
pub const RELAY: RelayId = RelayId::from_bytes([2; 16]);

/// Who signs tokens.
pub fn coordinator() -> NetmapSecretKey {
    NetmapSecretKey::from_bytes([77; 32])
}

/// The id of device `n`.
pub fn device(n: u32) -> DeviceId {
    let mut bytes = [0xde; 16];
    bytes[..4].copy_from_slice(&n.to_be_bytes());
    DeviceId::from_bytes(bytes)
}

/// The probe key of device `n`.
pub fn probe(n: u32) -> ProbeSecretKey {
    let mut bytes = [0x42; 32];
    bytes[..4].copy_from_slice(&n.to_be_bytes());
    ProbeSecretKey::from_bytes(bytes)
}

/// Our relay, for as long as the process lives: prints where it is and what its certificate hashes to.
///
/// Devices may send as fast as they can, or at the product's own limit.
///
/// # Errors
/// It can't start.
#[expect(clippy::print_stdout, reason = "read by the parent process")]
pub async fn serve(state_dir: PathBuf, limited: bool) -> Result<()> {
    let unlimited = Limits { rate: u64::MAX / 1_000_000_000, burst: 1 << 30, ..Limits::default() };
    let server = RelayServer::start(RelayServerConfig {
        listen: (Ipv4Addr::LOCALHOST, 0).into(),
        stun_listen: None,
        stun_second: None,
        state_dir,
        network: NETWORK,
        relay: RELAY,
        netmap_key: coordinator().public(),
        floor: 0,
        limits: if limited { Limits::default() } else { unlimited },
    })?;
    println!("{}", RelayAt { addr: server.local_addr(), cert_sha256: server.cert_sha256() });
    std::future::pending().await
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Option<[u8; 32]> {
    let bytes: Option<Vec<u8>> =
        (0..text.len() / 2).map(|at| u8::from_str_radix(text.get(2 * at..2 * at + 2)?, 16).ok()).collect();
    bytes?.try_into().ok()
}

/// Where a relay of ours is.
#[derive(Clone, Copy, Debug)]
pub struct RelayAt {
    /// Its address.
    pub addr: SocketAddr,
    /// SHA-256 of its certificate.
    pub cert_sha256: [u8; 32],
}

impl std::str::FromStr for RelayAt {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (addr, hash) = text.split_once(' ').context("an address and a hash")?;
        Ok(Self { addr: addr.parse()?, cert_sha256: unhex(hash).context("a hash")? })
    }
}

impl std::fmt::Display for RelayAt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.addr, hex(&self.cert_sha256))
    }
}

/// A server in a process of its own; killed when this goes.
#[derive(Debug)]
pub struct Server {
    child: Child,
    dir: PathBuf,
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

impl Server {
    fn spawn(name: &str, program: &Path, arguments: impl FnOnce(&Path, &mut Command)) -> Result<Self> {
        let dir = std::env::temp_dir().join(format!("warren-bench-{name}-{}", std::process::id()));
        std::fs::create_dir(&dir)?;
        let mut command = Command::new("taskset");
        command.args(["-c", CORE]).arg(program).stdin(Stdio::null()).stdout(Stdio::piped());
        arguments(&dir, &mut command);
        Ok(Self { child: command.spawn().with_context(|| format!("starting {name}"))?, dir })
    }

    /// Our relay, on loopback; `limited` as the product limits each device.
    ///
    /// # Errors
    /// It does not start.
    pub fn warren(limited: bool) -> Result<(Self, RelayAt)> {
        let own = std::env::current_exe()?;
        let mut server = Self::spawn("relay", &own, |dir, command| {
            command.arg("serve").arg(dir).args(limited.then_some("--limited")).env("RUST_LOG", "error");
        })?;
        let mut line = String::new();
        BufReader::new(server.child.stdout.take().context("its output")?).read_line(&mut line)?;
        Ok((server, line.trim().parse().context("the relay did not start")?))
    }

    /// coturn on loopback, without authentication, TLS and logs: what it does for each packet is left.
    ///
    /// # Errors
    /// It does not start.
    pub fn coturn() -> Result<(Self, SocketAddr)> {
        // coturn takes no port 0.
        let port = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
        let mut server = Self::spawn("coturn", Path::new("turnserver"), |dir, command| {
            command.args(["-n", "-z", "--no-tls", "--no-dtls", "--no-cli", "--no-software-attribute"]);
            command.args(["--no-stdout-log", "--log-file", "/dev/null", "--allow-loopback-peers"]);
            command.args(["-L", "127.0.0.1", "-E", "127.0.0.1", "-p", &port.to_string()]);
            command.args(["--min-port", "40000", "--max-port", "65000"]);
            command.arg("--pidfile").arg(dir.join("pid")).arg("--userdb").arg(dir.join("db"));
            command.stdout(Stdio::null()).stderr(Stdio::null());
        })?;
        let addr = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        ensure!(super::turn::answers(addr, PATIENCE)?, "coturn does not answer");
        ensure!(server.child.try_wait()?.is_none(), "coturn ended");
        Ok((server, addr))
    }

    /// What its threads have used of a CPU so far, the kernel's work for them included.
    ///
    /// # Errors
    /// It has ended.
    pub fn cpu(&self) -> Result<Duration> {
        let mut nanos = 0;
        for task in std::fs::read_dir(format!("/proc/{}/task", self.child.id()))? {
            let text = std::fs::read_to_string(task?.path().join("schedstat"))?;
            nanos += text.split(' ').next().and_then(|word| word.parse::<u64>().ok()).context("schedstat")?;
        }
        Ok(Duration::from_nanos(nanos))
    }

    /// Its resident memory, in bytes.
    ///
    /// # Errors
    /// It has ended.
    pub fn memory(&self) -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("VmRSS")?;
        let kib: u64 = line.trim().trim_end_matches(" kB").parse()?;
        Ok(kib * 1024)
    }
}
