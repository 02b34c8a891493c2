//! An application that sends faster than its agent can seal is cut off like any other. (It was before the daemon's task yielded
//! each turn, too: on two cores the queue is empty often enough.)

use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use quinn_udp::{Transmit, UdpSocketState};
use warren_netns_tests::lab::{self, eventually};
use warren_netns_tests::programs::{Agent, Coordinator, number};

/// Bound for what must happen; only a failing test waits this long.
const LIMIT: Duration = Duration::from_secs(60);
const PORT: u16 = 7_001;
/// Bytes of a datagram, and datagrams of one call: 64 KiB, which the sender makes several times faster than anybody seals it.
const DATAGRAM: usize = 1_372;
const DATAGRAMS: usize = 47;

fn policy(protocols: &str) -> String {
    format!(
        r#"{{"tagOwners": {{"tag:ann": [], "tag:bob": []}},
            "grants": [{{"src": ["tag:ann"], "dst": ["tag:bob"], "ip": [{protocols}]}}]}}"#
    )
}

/// Sends as fast as it can until `enough`. Returns how many datagrams.
fn flood(socket: &UdpSocket, to: SocketAddr, enough: &AtomicBool) -> Result<usize> {
    let state = UdpSocketState::new(socket.into())?;
    ensure!(state.max_gso_segments() >= DATAGRAMS, "the kernel takes no batches");
    let contents = vec![7; DATAGRAM * DATAGRAMS];
    let transmit = Transmit {
        destination: to,
        ecn: None,
        contents: &contents,
        segment_size: Some(DATAGRAM),
        src_ip: None,
    };
    let mut sent = 0;
    while !enough.load(Ordering::Relaxed) {
        match state.try_send(socket.into(), &transmit) {
            Ok(()) => sent += DATAGRAMS,
            Err(e) if e.kind() == ErrorKind::WouldBlock => thread::yield_now(),
            // Cut off: the filter answers with ICMP errors.
            Err(e) if e.kind() == ErrorKind::ConnectionRefused || e.kind() == ErrorKind::PermissionDenied => {
            }
            Err(e) => return Err(e.into()),
        }
    }
    Ok(sent)
}

#[test]
fn who_floods_its_own_agent_is_cut_off_as_fast_as_anybody() -> Result<()> {
    lab::test("flood", |lab| {
        let coordinator = Coordinator::start(lab.host("coord")?, &policy(r#""icmp:*", "udp:7001""#))?;
        let join = |name: &str| -> Result<Agent> {
            let agent = Agent::start(lab.host(name)?)?;
            agent.up(&coordinator.url, &coordinator.auth_key(&format!("tag:{name}"))?)?;
            Ok(agent)
        };
        let (ann, bob) = (join("ann")?, join("bob")?);
        ann.ping("bob", 1)?;
        ann.wait_for_path("bob", "direct")?;
        let v4 = bob
            .addresses()?
            .into_iter()
            .find(std::net::IpAddr::is_ipv4)
            .context("an IPv4 overlay address")?;
        let to = SocketAddr::new(v4, PORT);
        let socket = ann.host.enter(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)))??;
        socket.set_nonblocking(true)?;
        let dropped = || number(&ann.json(&["status", "--json"])?["counters"]["queue"]["dropped"]);
        let enough = AtomicBool::new(false);
        thread::scope(|scope| -> Result<()> {
            let flooding = scope.spawn(|| flood(&socket, to, &enough));
            let told = (|| -> Result<()> {
                eventually("more comes than the agent can seal", LIMIT, || {
                    Ok((dropped()? > 1_000).then_some(()))
                })?;
                coordinator.edit_policy(&policy(r#""icmp:*""#))?;
                eventually("the flood is denied", LIMIT, || {
                    Ok((ann.why("bob", PORT)?["allowed"] == false).then_some(()))
                })
            })();
            enough.store(true, Ordering::Relaxed);
            let sent = flooding.join().map_err(|_| anyhow!("the flood panicked"))??;
            lab::say(&format!("{sent} datagrams were sent; the queue dropped {} frames", dropped()?));
            told
        })
    })
}
