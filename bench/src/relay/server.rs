//! The servers that are measured: child processes on a core of their own, with what they use of CPU and memory.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use warren_common::ids::{DeviceId, NetworkId, RelayId};
use warren_common::keys::{NetmapSecretKey, ProbeSecretKey};
use warren_relay::core::Limits;
use warren_relay::server::{RelayServer, RelayServerConfig};

/// The core that a server runs on; the load runs on another.
pub const CORE: &str = "0";
/// Where the load runs.
pub const LOAD_CORE: &str = "1";
/// How long a server may take to be there: the machine may do something else as well.
const PATIENCE: Duration = Duration::from_secs(60);
/// Where coturn's allocations are: below the ports that Linux gives to clients, which have ten thousand of those here.
const TURN_PORTS: [&str; 2] = ["10000", "32000"];
/// What a server says, in its directory, and how much of it is shown if it does not start.
const LOG: &str = "log";
const SHOWN: usize = 4_000;
/// Descriptors of a process beside its clients'.
const OTHER_FILES: u64 = 500;

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
    let stats = server.stats_handle();
    // Ends with the parent, which has the other end.
    std::thread::spawn(move || {
        for _ in std::io::stdin().lines() {
            println!("{:?}", stats.stats());
        }
    });
    std::future::pending().await
}

/// Lets this process, and those that it starts, have descriptors for so many clients.
///
/// # Errors
/// The system does not allow it.
pub fn allow_files(clients: u32) -> Result<()> {
    let needed = u64::from(clients) + OTHER_FILES;
    let [soft, hard] = files()?;
    if soft < needed.min(hard) {
        let pid = std::process::id().to_string();
        // If it can't, the next look at the limit says so.
        let _ = Command::new("prlimit").args(["--pid", &pid, &format!("--nofile={hard}:{hard}")]).status();
    }
    let [soft, hard] = files()?;
    ensure!(soft >= needed, "{clients} clients need {needed} open files; the limit is {soft} (hard: {hard})");
    Ok(())
}

/// The soft and the hard limit of open files.
fn files() -> Result<[u64; 2]> {
    let text = std::fs::read_to_string("/proc/self/limits")?;
    let line = text.lines().find_map(|line| line.strip_prefix("Max open files")).context("a limit")?;
    let mut limits = line.split_whitespace().map(|word| word.parse().unwrap_or(u64::MAX)); // "unlimited"
    Ok([limits.next().context("a soft limit")?, limits.next().context("a hard limit")?])
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
    /// What ours prints.
    output: Option<BufReader<ChildStdout>>,
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
    fn spawn(
        name: &str,
        before: &[&str],
        program: &Path,
        arguments: impl FnOnce(&Path, &mut Command, File),
    ) -> Result<Self> {
        let dir = std::env::temp_dir().join(format!("warren-bench-{name}-{}", std::process::id()));
        std::fs::create_dir(&dir).with_context(|| format!("creating {}", dir.display()))?;
        let mut command = Command::new("taskset");
        command.args(["-c", CORE]).args(before).arg(program).stdin(Stdio::piped()).stdout(Stdio::piped());
        let log = File::options().create(true).append(true).open(dir.join(LOG))?;
        command.stderr(log.try_clone()?);
        arguments(&dir, &mut command, log);
        let mut child = command.spawn().with_context(|| format!("starting {name}"))?;
        let output = child.stdout.take().map(BufReader::new);
        Ok(Self { child, output, dir })
    }

    /// Our relay, on loopback; `limited` as the product limits each device, and with a program `before` it that sets its
    /// priority.
    ///
    /// # Errors
    /// It does not start.
    pub fn warren(limited: bool, before: &[&str]) -> Result<(Self, RelayAt)> {
        let own = std::env::current_exe()?;
        let mut server = Self::spawn("relay", before, &own, |dir, command, _| {
            command.arg("serve").arg(dir).args(limited.then_some("--limited")).env("RUST_LOG", "error");
        })?;
        let line = server.line()?;
        let at = line.parse().with_context(|| format!("the relay did not start: {}", server.log()))?;
        Ok((server, at))
    }

    /// coturn on loopback, without authentication and TLS: what it does for each packet is left. It logs when an
    /// allocation begins and every few thousand packets.
    ///
    /// # Errors
    /// It does not start, or grants nothing.
    pub fn coturn() -> Result<(Self, SocketAddr)> {
        // coturn takes no port 0.
        let port = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
        let mut server = Self::spawn("coturn", &[], Path::new("turnserver"), |dir, command, log| {
            command.args(["-n", "-z", "--no-tls", "--no-dtls", "--no-cli", "--no-software-attribute"]);
            command.args(["--log-file", "stdout", "--allow-loopback-peers"]);
            command.args(["-L", "127.0.0.1", "-E", "127.0.0.1", "-p", &port.to_string()]);
            command.args(["--min-port", TURN_PORTS[0], "--max-port", TURN_PORTS[1]]);
            command.arg("--pidfile").arg(dir.join("pid")).arg("--userdb").arg(dir.join("db"));
            command.stdout(log);
        })?;
        let addr = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let began = now();
        loop {
            let ended = server.child.try_wait()?;
            match super::turn::Allocation::of_one_try(addr) {
                Ok(_) => return Ok((server, addr)),
                Err(error) if ended.is_some() || began.elapsed() > PATIENCE => {
                    let ended =
                        ended.map_or_else(|| "it runs".to_owned(), |status| format!("it ended, {status}"));
                    bail!("coturn grants nothing: {error:#}; {ended}; {}", server.log());
                }
                Err(_) => {} // it has not started yet
            }
        }
    }

    /// What ours counts.
    ///
    /// # Errors
    /// It has ended.
    pub fn stats(&mut self) -> Result<String> {
        self.child.stdin.as_mut().context("its input")?.write_all(b"\n")?;
        self.line()
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.output.as_mut().context("its output")?.read_line(&mut line)?;
        Ok(line.trim().to_owned())
    }

    /// The end of what it has logged.
    fn log(&self) -> String {
        let log = std::fs::read(self.dir.join(LOG)).unwrap_or_default(); // none is none
        let end = String::from_utf8_lossy(&log[log.len().saturating_sub(SHOWN)..]).into_owned();
        format!("its log: {end}")
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

#[expect(clippy::disallowed_methods, reason = "a benchmark reads the clock")]
fn now() -> Instant {
    Instant::now()
}
