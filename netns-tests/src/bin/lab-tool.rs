//! Small traffic programs that tests and people run inside a lab's hosts. Each line of output is one
//! JSON object; `mono_ms` is CLOCK_MONOTONIC, which all programs of one machine share.
//!
//! ```text
//! lab-tool tcp-serve ADDR:PORT                      echoes every connection, tells what arrived and how it ended
//! lab-tool tcp-stream ADDR:PORT [--total BYTES] [--until FILE] [--rate BYTES_PER_S] [--stall SECONDS] [--answer MS]
//!                                                   sends a known pattern, checks its echo, tells how it ended
//! lab-tool udp-echo ADDR:PORT                       echoes every datagram
//! lab-tool udp-ping ADDR:PORT [--count N] [--until FILE] [--every MS] [--answer MS] [--from ADDR:PORT]
//!                                                   sends one datagram after the other, tells which came back
//! lab-tool udp-stream ADDR:PORT [--count N] [--until FILE] [--every MS] [--answer MS]
//!                                                   sends at a steady pace, whatever comes back; tells the longest gap between echoes
//! lab-tool hold                                     makes a lab with one busy host and waits for ever
//! lab-tool sweep                                    removes labs whose owner is dead, kept ones too
//! ```
//! `--until FILE` goes on until that file exists. Exit code: 0 when everything asked for was transferred, 1 when not, 2 for a wrong command line.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};
use warren_netns_tests::lab::{Lab, Stopwatch, monotonic_ms, sweep};

/// How often a running transfer says where it is.
const PROGRESS: Duration = Duration::from_millis(100);

/// Time for a TCP handshake or a UDP answer before it counts as lost, unless told otherwise.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// One write of a stream.
const CHUNK: usize = 16 * 1024;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let done = Options::parse(&args).and_then(|options| match options.verb.as_str() {
        "tcp-serve" => tcp_serve(options.address()?),
        "tcp-stream" => tcp_stream(&options),
        "udp-echo" => udp_echo(options.address()?),
        "udp-ping" => udp_ping(&options),
        "udp-stream" => udp_stream(&options),
        "hold" => hold(),
        "sweep" => {
            emit(&json!({"event": "swept", "labs": sweep(true)}));
            Ok(true)
        }
        verb => Err(Usage(format!("unknown verb {verb:?}")).into()),
    });
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            emit(&json!({"event": "error", "text": format!("{error:#}")}));
            ExitCode::from(if error.is::<Usage>() { 2 } else { 1 })
        }
    }
}

#[derive(Debug)]
struct Usage(String);

impl std::fmt::Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{}; the verbs are tcp-serve, tcp-stream, udp-echo, udp-ping, udp-stream, hold, sweep",
            self.0
        )
    }
}

impl std::error::Error for Usage {}

/// The command line: a verb, at most one address, `--key value` pairs.
#[derive(Debug)]
struct Options {
    verb: String,
    address: Option<SocketAddr>,
    total: Option<u64>,
    rate: Option<u64>,
    stall: Duration,
    count: Option<u64>,
    until: Option<PathBuf>,
    every: Duration,
    answer: Duration,
    from: Option<SocketAddr>,
}

impl Options {
    fn parse(args: &[String]) -> Result<Self> {
        let (verb, rest) = args.split_first().ok_or_else(|| Usage("no verb".into()))?;
        let mut options = Self {
            verb: verb.clone(),
            address: None,
            total: None,
            rate: None,
            stall: Duration::from_secs(10),
            count: None,
            until: None,
            every: Duration::ZERO,
            answer: ANSWER_LIMIT,
            from: None,
        };
        let mut rest = rest.iter();
        while let Some(word) = rest.next() {
            let mut value = || rest.next().ok_or_else(|| Usage(format!("{word} needs a value")));
            let number = |text: &String| -> Result<u64> {
                Ok(text.parse().map_err(|_| Usage(format!("{text:?} is not a number")))?)
            };
            let address = |text: &String| -> Result<SocketAddr> {
                Ok(text.parse().map_err(|_| Usage(format!("{text:?} is not ADDR:PORT")))?)
            };
            match word.as_str() {
                "--total" => options.total = Some(number(value()?)?),
                "--rate" => options.rate = Some(number(value()?)?.max(1)),
                "--stall" => options.stall = Duration::from_secs(number(value()?)?.max(1)),
                "--count" => options.count = Some(number(value()?)?),
                "--until" => options.until = Some(value()?.into()),
                "--every" => options.every = Duration::from_millis(number(value()?)?),
                "--answer" => options.answer = Duration::from_millis(number(value()?)?.max(1)),
                "--from" => options.from = Some(address(value()?)?),
                _ if options.address.is_none() => options.address = Some(address(word)?),
                _ => bail!(Usage(format!("unexpected {word:?}"))),
            }
        }
        Ok(options)
    }

    fn address(&self) -> Result<SocketAddr> {
        Ok(self.address.ok_or_else(|| Usage("an ADDR:PORT is missing".into()))?)
    }

    /// Whoever started this wants it to come to its end.
    fn is_to_end(&self) -> bool {
        self.until.as_ref().is_some_and(|file| file.exists())
    }
}

fn tcp_serve(address: SocketAddr) -> Result<bool> {
    let listener = TcpListener::bind(address).with_context(|| format!("listening on {address}"))?;
    emit(&json!({"event": "listening", "address": listener.local_addr()?.to_string()}));
    loop {
        let (stream, peer) = listener.accept()?;
        std::thread::spawn(move || serve_one(stream, peer));
    }
}

fn serve_one(mut stream: TcpStream, peer: SocketAddr) {
    let peer = peer.to_string();
    emit(&json!({"event": "accepted", "peer": peer, "mono_ms": monotonic_ms()}));
    let mut buffer = vec![0; CHUNK];
    let mut bytes = 0_u64;
    let mut last_byte_ms = monotonic_ms();
    let mut since_progress = Stopwatch::start();
    let how = loop {
        match stream.read(&mut buffer) {
            Ok(0) => break "eof",
            Ok(n) => {
                bytes += n as u64;
                last_byte_ms = monotonic_ms();
                if since_progress.elapsed() >= PROGRESS {
                    since_progress = Stopwatch::start();
                    emit(
                        &json!({"event": "received", "peer": peer, "bytes": bytes, "last_byte_ms": last_byte_ms}),
                    );
                }
                if let Err(error) = stream.write_all(&buffer[..n]) {
                    break how_it_ended(&error);
                }
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => break how_it_ended(&error),
        }
    };
    emit(&json!({"event": "end", "peer": peer, "how": how, "bytes": bytes,
        "last_byte_ms": last_byte_ms, "mono_ms": monotonic_ms()}));
}

fn tcp_stream(options: &Options) -> Result<bool> {
    let address = options.address()?;
    let stream = match TcpStream::connect_timeout(&address, options.answer) {
        Ok(stream) => stream,
        Err(error) => {
            emit(&json!({"event": "end", "how": how_it_ended(&error), "bytes": 0, "text": error.to_string(),
                "mono_ms": monotonic_ms()}));
            return Ok(false);
        }
    };
    emit(
        &json!({"event": "connected", "local": stream.local_addr()?.to_string(), "mono_ms": monotonic_ms()}),
    );
    stream.set_read_timeout(Some(options.stall))?;
    let sent = AtomicU64::new(0);
    let total = AtomicU64::new(options.total.unwrap_or(u64::MAX));
    let outcome = std::thread::scope(|scope| {
        let writer = scope.spawn(|| send_pattern(&stream, options, &total, &sent));
        let mut outcome = check_echo(&stream, &total);
        let _ = stream.shutdown(Shutdown::Both);
        // The kernel tells of a reset once: whoever comes second, reads an ordinary end.
        if outcome.how == "eof"
            && let Ok(Err(error)) = writer.join()
            && error.kind() == ErrorKind::ConnectionReset
        {
            outcome.how = "reset";
        }
        outcome
    });
    emit(&json!({"event": "end", "how": outcome.how, "bytes": outcome.bytes, "sent": sent.into_inner(),
        "gap_ms": outcome.gap_ms, "last_byte_ms": outcome.last_byte_ms, "mono_ms": monotonic_ms()}));
    Ok(outcome.how == "complete")
}

/// Sends until `total` bytes are sent, or until told to end: `total` is then what was sent.
fn send_pattern(
    mut stream: &TcpStream,
    options: &Options,
    total: &AtomicU64,
    sent: &AtomicU64,
) -> std::io::Result<()> {
    let watch = Stopwatch::start();
    let mut at = 0;
    let mut buffer = vec![0; CHUNK];
    let most = total.load(Ordering::SeqCst);
    while at < most && !options.is_to_end() {
        let mut n = usize::try_from(most - at).unwrap_or(CHUNK).min(CHUNK);
        if let Some(rate) = options.rate {
            // Ten steps a second, so that a slow stream is still a steady one.
            n = n.min(usize::try_from(rate.div_ceil(10)).unwrap_or(CHUNK));
            let due = Duration::from_secs_f64(at as f64 / rate as f64);
            std::thread::sleep(due.saturating_sub(watch.elapsed()));
        }
        for (i, byte) in buffer[..n].iter_mut().enumerate() {
            *byte = pattern(at + i as u64);
        }
        stream.write_all(&buffer[..n])?;
        at += n as u64;
        sent.store(at, Ordering::Relaxed);
    }
    // Before the other side hears of the end, and so before its own end comes back.
    total.store(at, Ordering::SeqCst);
    stream.shutdown(Shutdown::Write)
}

struct Outcome {
    how: &'static str,
    bytes: u64,
    last_byte_ms: u64,
    /// Longest time without a byte.
    gap_ms: u64,
}

fn check_echo(mut stream: &TcpStream, total: &AtomicU64) -> Outcome {
    let mut buffer = vec![0; CHUNK];
    let mut bytes = 0_u64;
    let mut last_byte_ms = monotonic_ms();
    let mut gap_ms = 0;
    let mut since_progress = Stopwatch::start();
    let how = loop {
        match stream.read(&mut buffer) {
            Ok(0) if bytes == total.load(Ordering::SeqCst) => break "complete",
            Ok(0) => break "eof",
            Ok(n) => {
                let right = buffer[..n].iter().zip(bytes..).all(|(byte, at)| *byte == pattern(at));
                if !right {
                    break "corrupt";
                }
                bytes += n as u64;
                let now = monotonic_ms();
                gap_ms = gap_ms.max(now - last_byte_ms);
                last_byte_ms = now;
                if since_progress.elapsed() >= PROGRESS {
                    since_progress = Stopwatch::start();
                    emit(&json!({"event": "echoed", "bytes": bytes, "last_byte_ms": last_byte_ms}));
                }
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => break "stalled",
            Err(error) => break how_it_ended(&error),
        }
    };
    Outcome { how, bytes, last_byte_ms, gap_ms }
}

/// The byte at an offset of every stream: any shift, loss or repetition shows.
fn pattern(at: u64) -> u8 {
    let mixed = (at ^ (at >> 8)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed.to_be_bytes()[0]
}

fn udp_echo(address: SocketAddr) -> Result<bool> {
    let socket = UdpSocket::bind(address).with_context(|| format!("binding {address}"))?;
    emit(&json!({"event": "listening", "address": socket.local_addr()?.to_string()}));
    let mut buffer = vec![0; usize::from(u16::MAX)];
    loop {
        match socket.recv_from(&mut buffer) {
            Ok((n, peer)) => {
                emit(
                    &json!({"event": "datagram", "peer": peer.to_string(), "bytes": n, "mono_ms": monotonic_ms()}),
                );
                let _ = socket.send_to(&buffer[..n], peer);
            }
            // An ICMP error for an earlier answer; the next datagram may be fine.
            Err(error) => emit(&json!({"event": "socket-error", "how": how_it_ended(&error)})),
        }
    }
}

fn udp_ping(options: &Options) -> Result<bool> {
    let to = options.address()?;
    let any: IpAddr = match to {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let from = options.from.unwrap_or(SocketAddr::new(any, 0));
    let socket = UdpSocket::bind(from).with_context(|| format!("binding {from}"))?;
    // Connected, so that an ICMP error is reported as one.
    if let Err(error) = socket.connect(to) {
        emit(&json!({"event": "end", "sent": 0, "received": 0, "how": how_it_ended(&error)}));
        return Ok(false);
    }
    socket.set_read_timeout(Some(options.answer))?;
    let most = options.count.unwrap_or(if options.until.is_some() { u64::MAX } else { 1 });
    let (mut sent, mut received) = (0, 0);
    while sent < most && !options.is_to_end() {
        let seq = sent;
        let watch = Stopwatch::start();
        sent += 1;
        match socket.send(&seq.to_be_bytes()).and_then(|_| await_echo(&socket, seq)) {
            Ok(()) => {
                received += 1;
                emit(&json!({"event": "pong", "seq": seq, "rtt_us": watch.elapsed().as_micros() as u64}));
            }
            Err(error) => emit(&json!({"event": "lost", "seq": seq, "how": how_it_ended(&error)})),
        }
        std::thread::sleep(options.every.saturating_sub(watch.elapsed()));
    }
    emit(&json!({"event": "end", "sent": sent, "received": received}));
    Ok(received == sent)
}

/// Sends numbered datagrams at a steady pace, and listens meanwhile.
fn udp_stream(options: &Options) -> Result<bool> {
    let to = options.address()?;
    let any: IpAddr = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).with_context(|| format!("binding {any}"))?;
    // What comes late counts until this long after the last datagram.
    socket.set_read_timeout(Some(options.answer))?;
    let most = options.count.unwrap_or(u64::MAX);
    let every = options.every.max(Duration::from_millis(1));
    std::thread::scope(|scope| {
        let sender = scope.spawn(|| {
            let watch = Stopwatch::start();
            let (mut turn, mut sent) = (0_u32, 0_u64);
            while u64::from(turn) < most && !options.is_to_end() {
                std::thread::sleep((every * turn).saturating_sub(watch.elapsed()));
                // Without a route there is nothing to send it by: lost like any other.
                sent += u64::from(socket.send_to(&u64::from(turn).to_be_bytes(), to).is_ok());
                turn += 1;
            }
            (u64::from(turn), sent)
        });
        let mut buffer = [0; 16];
        let (mut received, mut gap_ms, mut last_ms) = (0_u64, 0, monotonic_ms());
        let mut since_progress = Stopwatch::start();
        loop {
            match socket.recv_from(&mut buffer) {
                Ok((8, from)) if from == to => {
                    let now = monotonic_ms();
                    (gap_ms, last_ms, received) = (gap_ms.max(now - last_ms), now, received + 1);
                    if received == 1 || since_progress.elapsed() >= PROGRESS {
                        since_progress = Stopwatch::start();
                        emit(&json!({"event": "echoed", "received": received, "gap_ms": gap_ms}));
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock && sender.is_finished() => break,
                // A timeout, or an ICMP error about an earlier one.
                Ok(_) | Err(_) => {}
            }
            if sender.is_finished() && monotonic_ms() - last_ms >= options.answer.as_millis() as u64 {
                break;
            }
        }
        let (turns, sent) = sender.join().map_err(|_| anyhow::anyhow!("the sender panicked"))?;
        emit(&json!({"event": "end", "turns": turns, "sent": sent, "received": received, "gap_ms": gap_ms}));
        Ok(received == turns)
    })
}

fn await_echo(socket: &UdpSocket, seq: u64) -> std::io::Result<()> {
    let mut buffer = [0; 16];
    loop {
        let n = socket.recv(&mut buffer)?;
        if buffer[..n] == seq.to_be_bytes() {
            return Ok(());
        }
    }
}

/// For the test that kills a lab's owner.
fn hold() -> Result<bool> {
    let lab = Lab::new("hold")?;
    let host = lab.host("S")?;
    let mut command = host.command("sleep");
    command.arg("86400");
    let sleeper = host.spawn(command)?;
    emit(&json!({"event": "holding", "lab": lab.name(), "pid": sleeper.pid()}));
    loop {
        std::thread::park();
    }
}

/// One word for the end of a connection.
fn how_it_ended(error: &std::io::Error) -> &'static str {
    match error.kind() {
        ErrorKind::ConnectionRefused => "refused",
        ErrorKind::ConnectionReset | ErrorKind::ConnectionAborted => "reset",
        ErrorKind::BrokenPipe => "closed",
        ErrorKind::TimedOut | ErrorKind::WouldBlock => "timeout",
        ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable => "unreachable",
        ErrorKind::PermissionDenied => "prohibited",
        _ => "other",
    }
}

/// Prints one line at once, also into a pipe or a file.
fn emit(line: &Value) {
    let mut out = std::io::stdout().lock();
    // A reader that went away is no reason to stop the traffic.
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}
