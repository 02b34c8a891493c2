//! Traffic that runs while something is done to what carries it.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::lab::{Host, Process, eventually, workspace_binary};
use crate::programs::number;

/// Bound for signs of life; only a failing test waits this long.
const LIMIT: Duration = Duration::from_secs(30);

/// Bytes per second of a transfer: steady, and no load for the machine.
const RATE: u64 = 256 * 1024;

/// A program of lab-tool that goes on until it is told to end.
#[derive(Debug)]
struct Running {
    process: Process,
    end: PathBuf,
}

impl Running {
    fn start(from: &Host, verb: &str, to: SocketAddr, options: &[&str]) -> Result<Self> {
        let end = from.dir().join(format!("end-{verb}-{}", to.port()));
        // Of an earlier one to the same place.
        let _ = fs::remove_file(&end);
        let mut command = from.command(workspace_binary("lab-tool")?);
        command.args([verb, &to.to_string()]).args(options).arg("--until").arg(&end);
        Ok(Self { process: from.spawn(command)?, end })
    }

    /// Lines that tell of this event.
    fn events(&self, event: &str) -> Result<Vec<Value>> {
        let log = self.process.log()?;
        let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        Ok(lines.filter(|line| line["event"] == event).collect())
    }

    fn finish(&mut self) -> Result<Value> {
        fs::write(&self.end, "")?;
        self.ended()
    }

    fn ended(&mut self) -> Result<Value> {
        let line = self.process.wait_for_line(r#""event":"end""#, LIMIT)?;
        serde_json::from_str(&line).context("the end of the traffic")
    }
}

/// A TCP connection to a `tcp-serve` that sends a known pattern and checks its echo.
#[derive(Debug)]
pub struct Transfer(Running);

impl Transfer {
    /// Connects, and waits until bytes come back.
    ///
    /// # Errors
    /// They don't.
    pub fn start(from: &Host, to: SocketAddr) -> Result<Self> {
        let mut running =
            Running::start(from, "tcp-stream", to, &["--rate", &RATE.to_string(), "--stall", "60"])?;
        running.process.wait_for_line("echoed", LIMIT)?;
        Ok(Self(running))
    }

    /// Bytes that came back so far, as last told.
    fn bytes(&self) -> Result<u64> {
        Ok(self.0.events("echoed")?.last().and_then(|line| line["bytes"].as_u64()).unwrap_or_default())
    }

    /// Waits until about `time`'s worth of bytes more have come back.
    ///
    /// # Errors
    /// They don't.
    pub fn goes_on(&self, time: Duration) -> Result<()> {
        let from = self.bytes()?;
        let goal = from + RATE * u64::try_from(time.as_millis())? / 1_000;
        eventually(&format!("a transfer gets from {from} bytes to {goal}"), LIMIT, || {
            if let Some(end) = self.0.events("end")?.first() {
                anyhow::bail!("the transfer has ended: {end}");
            }
            Ok((self.bytes()? >= goal).then_some(()))
        })
    }

    /// Has it end, and makes sure that every byte came back. The longest time without a byte.
    ///
    /// # Errors
    /// It ended in another way.
    pub fn finish(mut self) -> Result<Duration> {
        let end = self.0.finish()?;
        ensure!(end["how"] == "complete" && end["bytes"] == end["sent"], "the transfer ended: {end}");
        Ok(Duration::from_millis(number(&end["gap_ms"])?))
    }

    /// Waits for its end, which somebody else brings about; what the program told about it.
    ///
    /// # Errors
    /// It goes on.
    pub fn ended(mut self) -> Result<Value> {
        self.0.ended()
    }
}

/// UDP datagrams to a `udp-echo`, twenty a second, whatever comes back.
#[derive(Debug)]
pub struct Datagrams(Running);

/// What became of a stream of datagrams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Delivered {
    /// Datagrams that were to be sent.
    pub turns: u64,
    /// Datagrams that came back.
    pub received: u64,
    /// The longest time without one.
    pub gap: Duration,
}

impl Datagrams {
    /// Starts, and waits until one comes back.
    ///
    /// # Errors
    /// None does.
    pub fn start(from: &Host, to: SocketAddr) -> Result<Self> {
        let mut running = Running::start(from, "udp-stream", to, &["--every", "50", "--answer", "1000"])?;
        running.process.wait_for_line("echoed", LIMIT)?;
        Ok(Self(running))
    }

    /// Waits until `count` more have come back.
    ///
    /// # Errors
    /// They don't.
    pub fn go_on(&self, count: u64) -> Result<()> {
        let received = || -> Result<u64> {
            Ok(self.0.events("echoed")?.last().and_then(|l| l["received"].as_u64()).unwrap_or_default())
        };
        let goal = received()? + count;
        eventually(&format!("{count} more datagrams come back"), LIMIT, || {
            Ok((received()? >= goal).then_some(()))
        })
    }

    /// Has it end.
    ///
    /// # Errors
    /// It does not end.
    pub fn finish(mut self) -> Result<Delivered> {
        let end = self.0.finish()?;
        Ok(Delivered {
            turns: number(&end["turns"])?,
            received: number(&end["received"])?,
            gap: Duration::from_millis(number(&end["gap_ms"])?),
        })
    }
}

/// UDP datagrams to a `udp-echo`, one at a time, ten a second.
#[derive(Debug)]
pub struct Echoes(Running);

impl Echoes {
    /// Starts, and waits until one comes back.
    ///
    /// # Errors
    /// None does.
    pub fn start(from: &Host, to: SocketAddr) -> Result<Self> {
        let mut running = Running::start(from, "udp-ping", to, &["--every", "100", "--answer", "1000"])?;
        running.process.wait_for_line("pong", LIMIT)?;
        Ok(Self(running))
    }

    /// Waits until `count` more have come back.
    ///
    /// # Errors
    /// They don't.
    pub fn go_on(&self, count: usize) -> Result<()> {
        let goal = self.0.events("pong")?.len() + count;
        eventually(&format!("{count} more datagrams come back"), LIMIT, || {
            Ok((self.0.events("pong")?.len() >= goal).then_some(()))
        })
    }

    /// Has it end; how many were sent, and how many of those came back.
    ///
    /// # Errors
    /// It does not end.
    pub fn finish(mut self) -> Result<(u64, u64)> {
        let end = self.0.finish()?;
        let number = |key: &str| end[key].as_u64().with_context(|| format!("{key} in {end}"));
        Ok((number("sent")?, number("received")?))
    }
}
