//! How long packets take from one device to another through our relay.
//!
//! Over plain UDP until the kernel has them for the receiver: that shares its core with whoever attacks, and when it wakes up
//! is not the relay's doing. Over connections until the receiver has read them.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, anyhow, ensure};
use tokio::runtime::Runtime;

use super::device::{Device, Transport};
use super::load::{MEASURED, PlainUdp, quic_ends};
use super::server::RelayAt;

/// Packets per second.
const RATE: u32 = 500;
/// Longest payload: what a keystroke takes inside the tunnel, about.
const PAYLOAD: usize = 200;
/// What a packet that is measured begins with; others may flood the same device.
const MARK: &[u8; 4] = b"time";
/// Without a packet for so long, the receiver looks whether it is over.
const LOOK: Duration = Duration::from_millis(100);
/// From the last packet until what has not come is lost.
const LATEST: Duration = Duration::from_millis(300);
/// The connection behind a plain UDP session is not served meanwhile, and times out after half a minute.
const LONGEST: Duration = Duration::from_secs(20);

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Over {
    /// Both over plain UDP.
    Plain,
    /// Both over QUIC.
    Quic,
    /// Both over WebSockets.
    WebSocket,
}

impl Over {
    /// In words.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain UDP",
            Self::Quic => "QUIC",
            Self::WebSocket => "WebSockets",
        }
    }
}

/// What was sent, and how long each packet took that arrived, sorted.
#[derive(Debug)]
pub struct Latencies {
    took: Vec<Duration>,
    sent: u32,
}

impl Latencies {
    /// The percentile, in microseconds.
    pub fn percentile(&self, percent: usize) -> f64 {
        self.took.get(self.took.len() * percent / 100).map_or(f64::NAN, |t| t.as_secs_f64() * 1e6)
    }

    /// Per cent of the packets that did not arrive.
    pub fn lost(&self) -> f64 {
        100.0 * (1.0 - self.took.len() as f64 / f64::from(self.sent))
    }

    /// Sends for `span`.
    ///
    /// # Errors
    /// The relay won't have the pair, or loses it.
    pub fn measure(relay: RelayAt, runtime: &Runtime, over: Over, span: Duration) -> Result<Self> {
        ensure!(span <= LONGEST, "at most {} s", LONGEST.as_secs());
        let (mut took, sent) = match over {
            Over::Plain => plain(relay, runtime, span)?,
            Over::Quic => runtime.block_on(connected(relay, Transport::Quic, span))?,
            Over::WebSocket => runtime.block_on(connected(relay, Transport::WebSocket, span))?,
        };
        took.sort_unstable();
        Ok(Self { took, sent })
    }
}

fn plain(relay: RelayAt, runtime: &Runtime, span: Duration) -> Result<(Vec<Duration>, u32)> {
    let ends = quic_ends(runtime)?;
    let mut from = runtime.block_on(PlainUdp::new(relay, &ends, MEASURED - 1, &[MEASURED]))?;
    let mut to = runtime.block_on(PlainUdp::new(relay, &ends, MEASURED, &[MEASURED - 1]))?;
    let (began, over) = (now(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let receiving = scope.spawn(|| {
            let mut took = Vec::new();
            loop {
                to.wait(LOOK)?;
                let packets = to.receive(|payload, arrived| {
                    took.extend(
                        arrived.zip(sent_at(payload)).map(|(arrived, sent)| arrived.saturating_sub(sent)),
                    );
                })?;
                if packets == 0 && over.load(Ordering::Relaxed) {
                    return anyhow::Ok(took);
                }
            }
        });
        let mut sent = 0;
        while began.elapsed() < span {
            from.send(MEASURED, &packet(of_day()), 1)?;
            sent += 1;
            std::thread::sleep(
                (span.min(Duration::from_secs(1) / RATE * sent)).saturating_sub(began.elapsed()),
            );
        }
        std::thread::sleep(LATEST);
        over.store(true, Ordering::Relaxed);
        let took = receiving.join().map_err(|_| anyhow!("the receiver panicked"))??;
        ensure!(!took.is_empty(), "no packet arrived with its time");
        Ok((took, sent))
    })
}

async fn connected(relay: RelayAt, transport: Transport, span: Duration) -> Result<(Vec<Duration>, u32)> {
    let ends = super::device::endpoint()?;
    let mut from = Device::join(relay, transport, &ends, MEASURED - 1, &[MEASURED]).await?;
    let mut to = Device::join(relay, transport, &ends, MEASURED, &[MEASURED - 1]).await?;
    let (began, mut took) = (now(), Vec::new());
    let sending = async {
        let mut sent = 0;
        while began.elapsed() < span {
            from.send(MEASURED, &packet(began.elapsed()), 1).await?;
            sent += 1;
            tokio::time::sleep((Duration::from_secs(1) / RATE * sent).saturating_sub(began.elapsed())).await;
        }
        tokio::time::sleep(LATEST).await;
        anyhow::Ok(sent)
    };
    let receiving = async {
        loop {
            let each = |payload: &[u8]| {
                took.extend(sent_at(payload).map(|sent| began.elapsed().saturating_sub(sent)))
            };
            if let Err(error) = to.receive_each(each).await {
                return error;
            }
        }
    };
    let sent = tokio::select! {
        sent = sending => sent?,
        error = receiving => return Err(error).context("the receiver"),
    };
    Ok((took, sent))
}

fn packet(at: Duration) -> [u8; PAYLOAD] {
    let mut payload = [7; PAYLOAD];
    payload[..4].copy_from_slice(MARK);
    payload[4..12].copy_from_slice(&(at.as_nanos() as u64).to_be_bytes());
    payload
}

/// When a packet was sent, if it is one that is measured.
fn sent_at(payload: &[u8]) -> Option<Duration> {
    let at = payload.strip_prefix(MARK)?.first_chunk()?;
    Some(Duration::from_nanos(u64::from_be_bytes(*at)))
}

/// The clock that the kernel stamps what arrives with.
#[expect(clippy::disallowed_methods, reason = "a benchmark reads the clock")]
fn of_day() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

#[expect(clippy::disallowed_methods, reason = "a benchmark reads the clock")]
fn now() -> Instant {
    Instant::now()
}
