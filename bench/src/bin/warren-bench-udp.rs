//! UDP through a tunnel: from a sender that makes one call per datagram, and from one that gives the kernel many at a time
//! (`UDP_SEGMENT`), as QUIC servers do; to a receiver that takes them one by one, and to one that takes what the kernel has
//! joined (`UDP_GRO`). `compare` sets a Warren tunnel up between two namespaces, one core per end as in
//! `peers.sh -c`, and finds for each the highest rate with less than one per cent lost.

#![expect(
    clippy::disallowed_methods,
    clippy::print_stdout,
    reason = "a benchmark reads the clock and prints"
)]

use std::io::{ErrorKind, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use clap::{Parser, Subcommand};
use quinn_udp::{RecvMeta, Transmit, UdpSockRef, UdpSocketState};
use socket2::SockRef;

/// Payload of a datagram, in bytes: what `peers.sh` sends.
const SIZE: usize = 1_372;
/// Datagrams of one call: as many as fit 64 KiB.
const MANY: usize = 47;
/// Time of one measurement.
const SPAN: Duration = Duration::from_millis(800);
/// What a receiver waits for another datagram before it counts, and for the first.
const QUIET: Duration = Duration::from_millis(400);
const PATIENCE: Duration = Duration::from_secs(5);
/// A call per datagram is paced by sleeps no shorter than this.
const SLEEP: Duration = Duration::from_micros(100);
/// Multiples of the rate that arrives at full blast which are tried, until less than one per cent is lost: a sender at
/// full blast takes the core from the tunnel, so more arrives at less.
const PARTS: [f64; 18] =
    [4.0, 3.5, 3.0, 2.6, 2.3, 2.0, 1.8, 1.6, 1.4, 1.2, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3];

/// The part that may be lost.
const BEARABLE: f64 = 0.01;

/// Who sends to whom.
#[derive(Clone, Copy, Debug)]
struct Pair {
    segments: usize,
    one_by_one: bool,
}

/// What is compared, the plainest first.
const PAIRS: [Pair; 3] = [
    Pair { segments: 1, one_by_one: true },
    Pair { segments: 1, one_by_one: false },
    Pair { segments: MANY, one_by_one: false },
];

/// Example: warren-bench-udp compare 3
#[derive(Debug, Parser)]
#[command(name = "warren-bench-udp")]
struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Sends, and prints how many datagrams.
    Send {
        /// Where to.
        to: SocketAddr,
        /// Datagrams of one call; 1 makes plain calls.
        #[arg(long, default_value_t = 1)]
        segments: usize,
        /// Datagrams a second; as many as possible if 0.
        #[arg(long, default_value_t = 0.0)]
        rate: f64,
    },
    /// Receives until nothing more comes, and prints how many datagrams came in how many seconds.
    Receive {
        /// Where.
        at: SocketAddr,
        /// One datagram for each call.
        #[arg(long)]
        one_by_one: bool,
    },
    /// Both through a tunnel, as often as this. Needs root, iproute2 and taskset.
    Compare {
        /// Repeats.
        repeats: usize,
    },
}

fn main() -> Result<()> {
    match Args::parse().what {
        What::Send { to, segments, rate } => println!("{}", send(to, segments, rate)?),
        What::Receive { at, one_by_one } => {
            let (count, seconds) = receive(at, one_by_one)?;
            println!("{count} {seconds}");
        }
        What::Compare { repeats } => compare(repeats)?,
    }
    Ok(())
}

fn send(to: SocketAddr, segments: usize, rate: f64) -> Result<u64> {
    ensure!((1..=MANY).contains(&segments), "1 to {MANY} segments");
    let socket = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
    socket.connect(to)?;
    let state = UdpSocketState::new(UdpSockRef::from(&socket))?;
    socket.set_nonblocking(false)?;
    let contents = vec![7; SIZE * segments];
    let batch =
        Transmit { destination: to, ecn: None, contents: &contents, segment_size: Some(SIZE), src_ip: None };
    let (began, mut sent) = (Instant::now(), 0);
    while began.elapsed() < SPAN {
        if rate > 0.0 {
            let due = Duration::from_secs_f64(sent as f64 / rate);
            if let Some(early) = due.checked_sub(began.elapsed()) {
                std::thread::sleep(early.max(SLEEP));
            }
        }
        let result = match segments {
            1 => socket.send(&contents).map(drop),
            _ => state.try_send(UdpSockRef::from(&socket), &batch),
        };
        match result {
            Ok(()) => sent += segments as u64,
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::ConnectionRefused) => {}
            Err(e) => return Err(e).context("sending"),
        }
    }
    Ok(sent)
}

fn receive(at: SocketAddr, one_by_one: bool) -> Result<(u64, f64)> {
    let socket = UdpSocket::bind(at)?;
    // Making the state switches UDP_GRO on.
    let state = if one_by_one { None } else { Some(UdpSocketState::new(UdpSockRef::from(&socket))?) };
    SockRef::from(&socket).set_recv_buffer_size(4 << 20)?;
    socket.set_nonblocking(false)?;
    println!("ready");
    let mut buffer = vec![0; 65_536];
    let (mut count, mut first, mut last) = (0, None, Instant::now());
    loop {
        socket.set_read_timeout(Some(if first.is_some() { QUIET } else { PATIENCE }))?;
        let received = match &state {
            None => socket.recv(&mut buffer).map(|_| 1),
            Some(state) => {
                let mut meta = [RecvMeta::default()];
                let into = &mut [IoSliceMut::new(&mut buffer)];
                let received = state.recv(UdpSockRef::from(&socket), into, &mut meta);
                received.map(|_| meta[0].len.div_ceil(meta[0].stride.max(1)) as u64)
            }
        };
        match received {
            Ok(datagrams) => {
                last = Instant::now();
                first.get_or_insert(last);
                count += datagrams;
            }
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => break,
            Err(e) => return Err(e).context("receiving"),
        }
    }
    Ok((count, first.map_or(0.0, |first| (last - first).as_secs_f64())))
}

/// Two namespaces, and what runs in them; all of it goes when this does.
struct World {
    names: [String; 2],
    running: Vec<Child>,
    dir: std::path::PathBuf,
}

impl Drop for World {
    fn drop(&mut self) {
        for child in &mut self.running {
            // It may have ended by itself.
            let _ = child.kill();
            let _ = child.wait();
        }
        for name in &self.names {
            let _ = ip(&["netns", "del", name]);
        }
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

fn ip(words: &[&str]) -> Result<()> {
    let status = Command::new("ip").args(words).status().context("running ip")?;
    ensure!(status.success(), "ip {} failed", words.join(" "));
    Ok(())
}

impl World {
    /// A tunnel from 10.99.0.1 to 10.99.0.2.
    fn new() -> Result<Self> {
        let id = std::process::id();
        let names = ["a", "b"].map(|end| format!("udp-{end}{id}"));
        let dir = std::env::temp_dir().join(format!("warren-bench-udp-{id}"));
        std::fs::create_dir(&dir)?;
        let mut world = Self { names, running: Vec::new(), dir };
        for name in &world.names {
            ip(&["netns", "add", name])?;
        }
        let [a, b] = world.names.clone();
        let (a, b) = (a.as_str(), b.as_str());
        ip(&["link", "add", "u0", "netns", a, "type", "veth", "peer", "name", "u0", "netns", b])?;
        let node = beside("warren-bench-node")?;
        for (n, (name, role)) in [(a, "a"), (b, "b")].into_iter().enumerate() {
            let (own, other) = (n + 1, 2 - n);
            ip(&["-n", name, "addr", "add", &format!("10.77.0.{own}/24"), "dev", "u0"])?;
            ip(&["-n", name, "link", "set", "u0", "up"])?;
            ip(&["-n", name, "link", "set", "lo", "up"])?;
            let mut command = world.command(n, &node);
            command.args(["--role", role, "--tun", "w0", "--addr", &format!("10.99.0.{own}")]);
            command.args([
                "--peer-addr",
                &format!("10.99.0.{other}"),
                "--listen",
                &format!("10.77.0.{own}:52000"),
            ]);
            command.arg("--state").arg(&world.dir).env("RUST_LOG", "error");
            world.running.push(command.spawn()?);
        }
        for (n, name) in [a, b].into_iter().enumerate() {
            let began = Instant::now();
            let own = format!("10.99.0.{}/24", n + 1);
            while Command::new("ip")
                .args(["-n", name, "addr", "add", &own, "dev", "w0"])
                .stderr(Stdio::null())
                .status()?
                .code()
                != Some(0)
            {
                ensure!(began.elapsed() < PATIENCE, "the node made no TUN");
                std::thread::sleep(Duration::from_millis(50));
            }
            ip(&["-n", name, "link", "set", "w0", "mtu", "1420", "up"])?;
        }
        let ping =
            world.command(0, Path::new("ping")).args(["-q", "-c", "5", "-i", ".2", "10.99.0.2"]).output()?;
        ensure!(ping.status.success(), "nothing passes the tunnel");
        Ok(world)
    }

    /// A command at one end, on its core.
    fn command(&self, end: usize, program: &Path) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.names[end], "taskset", "-c", &end.to_string()]).arg(program);
        command
    }

    /// Datagrams per second that arrive, and the part that does not.
    fn measure(&self, pair: Pair, rate: f64) -> Result<(f64, f64)> {
        use std::io::{BufRead as _, BufReader};
        let own = std::env::current_exe()?;
        let mut receiver = self.command(1, &own);
        receiver.args(["receive", "10.99.0.2:7000"]).args(pair.one_by_one.then_some("--one-by-one"));
        let mut receiver = receiver.stdout(Stdio::piped()).spawn()?;
        let mut lines = BufReader::new(receiver.stdout.take().context("its output")?).lines();
        ensure!(lines.next().transpose()?.is_some_and(|line| line == "ready"), "no receiver");
        let mut sender = self.command(0, &own);
        sender.args([
            "send",
            "10.99.0.2:7000",
            "--segments",
            &pair.segments.to_string(),
            "--rate",
            &rate.to_string(),
        ]);
        let sent: f64 =
            String::from_utf8(sender.output()?.stdout)?.trim().parse().context("what was sent")?;
        let line = lines.next().transpose()?.context("what came")?;
        receiver.wait()?;
        let (count, seconds) = line.split_once(' ').context("two numbers")?;
        let (count, seconds): (f64, f64) = (count.parse()?, seconds.parse()?);
        Ok((count / seconds.max(0.001), 1.0 - count / sent.max(1.0)))
    }

    /// The highest rate at which less than one per cent is lost, to two per cent.
    fn highest(&self, pair: Pair) -> Result<f64> {
        let (blast, lost) = self.measure(pair, 0.0)?;
        if lost < BEARABLE {
            return Ok(blast);
        }
        let mut too_much = PARTS[0];
        for part in PARTS {
            let (mut best, lost) = self.measure(pair, blast * part)?;
            if lost >= BEARABLE {
                too_much = part;
                continue;
            }
            let mut enough = part;
            while too_much / enough > 1.02 {
                let middle = f64::midpoint(enough, too_much);
                let (rate, lost) = self.measure(pair, blast * middle)?;
                match lost < BEARABLE {
                    true => (enough, best) = (middle, best.max(rate)),
                    false => too_much = middle,
                }
            }
            return Ok(best);
        }
        bail!("more than one per cent is lost at every rate")
    }
}

/// A program in our own directory.
fn beside(name: &str) -> Result<std::path::PathBuf> {
    let path = std::env::current_exe()?.with_file_name(name);
    ensure!(path.is_file(), "{} is not built", path.display());
    Ok(path)
}

fn compare(repeats: usize) -> Result<()> {
    let world = World::new()?;
    let mut rates: [Vec<f64>; PAIRS.len()] = Default::default();
    for _ in 0..repeats.max(1) {
        for (pair, rates) in PAIRS.iter().zip(&mut rates) {
            rates.push(world.highest(*pair)?);
        }
    }
    let ratio_to = |base: &[f64]| {
        let mut ratios: Vec<f64> = rates[2].iter().zip(base).map(|(many, base)| many / base).collect();
        ratios.sort_by(f64::total_cmp);
        ratios[ratios.len() / 2]
    };
    let (to_plain, to_joined) = (ratio_to(&rates[0]), ratio_to(&rates[1]));
    let spreads = rates.each_mut().map(|values| {
        values.sort_by(f64::total_cmp);
        let (least, most) = (values[0], values[values.len() - 1]);
        format!("{:.0} ({least:.0}–{most:.0})", values[values.len() / 2])
    });
    let [plain, joined, many] = spreads;
    println!(
        "Datagrams of {SIZE} bytes per second through Warren with less than 1 % lost: {plain} where each is sent and taken by \
         a call of its own; {joined} where the receiver takes what the kernel has joined (`UDP_GRO`); {many} where the \
         sender also gives the kernel {MANY} at a time (`UDP_SEGMENT`), {to_plain:.1} times the first and {to_joined:.1} \
         times the second."
    );
    Ok(())
}
