//! Many devices that want to come in at once, as after a relay's restart: each from an address of its own, with the pauses
//! of an agent between its attempts.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use tokio::task::JoinSet;
use warren_common::time::Instant as Boot;
use warren_engine::redial::{Ended, Redial};

use super::device::{Device, Transport};
use super::server::RelayAt;

/// Addresses of loopback that devices have: 127.1.0.0 and up.
const FIRST_ADDR: u32 = 0x7f01_0000;

/// How the devices came in.
#[derive(Debug)]
pub struct Storm {
    /// From the first attempt until each was in, sorted.
    pub took: Vec<Duration>,
    /// Attempts that failed, by what they were told.
    pub failed: BTreeMap<String, u32>,
    /// Keeps them there.
    _devices: Vec<Device>,
}

/// Lets `count` devices come at once and waits until the last is in.
///
/// # Errors
/// The system has no more sockets.
pub async fn storm(relay: RelayAt, transport: Transport, count: u32) -> Result<Storm> {
    let (began, mut joining) = (now(), JoinSet::new());
    for n in 0..count {
        joining.spawn(async move {
            let mut redial = Redial::default();
            let mut failed = Vec::new();
            loop {
                match join(relay, transport, n).await {
                    Ok(device) => return (device, began.elapsed(), failed),
                    Err(error) => failed.push(format!("{error:#}")),
                }
                let at = Boot::from_nanos(began.elapsed().as_nanos() as u64);
                // Any numbers do, if they differ.
                let random = (n + failed.len() as u32).wrapping_mul(0x9e37_79b9);
                tokio::time::sleep(redial.on_ended(at, Duration::ZERO, Ended::Lost, random)).await;
            }
        });
    }
    let mut storm = Storm { took: Vec::new(), failed: BTreeMap::new(), _devices: Vec::new() };
    while let Some(joined) = joining.join_next().await {
        let (device, took, failed) = joined.context("a device")?;
        storm.took.push(took);
        storm._devices.push(device);
        failed.into_iter().for_each(|why| *storm.failed.entry(why).or_default() += 1);
    }
    storm.took.sort_unstable();
    Ok(storm)
}

async fn join(relay: RelayAt, transport: Transport, n: u32) -> Result<Device> {
    let from = Ipv4Addr::from_bits(FIRST_ADDR + n);
    match transport {
        Transport::Quic => {
            let endpoint = quinn::Endpoint::client((from, 0).into())?;
            Device::join(relay, transport, &endpoint, n, &[n + 1]).await
        }
        Transport::WebSocket => Device::join_from(relay, from, n, &[n + 1]).await,
    }
}

#[expect(clippy::disallowed_methods, reason = "a benchmark reads the clock")]
fn now() -> Instant {
    Instant::now()
}
