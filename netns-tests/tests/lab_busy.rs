//! A server that is busy with two peers at once, so that its daemon's helpers take part: what goes in comes out, byte for
//! byte, both ways.

use std::io::Write as _;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::num::NonZero;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use warren_netns_tests::lab::{self, Lab, eventually};
use warren_netns_tests::programs::{Agent, Coordinator, number};
use warren_netns_tests::tunnel::{byte_at, take_all};

/// Bound for what must happen; only a failing test waits this long.
const LIMIT: Duration = Duration::from_secs(60);
const PORT: u16 = 7_000;
/// Bytes of one write.
const CHUNK: usize = 65_521;

const POLICY: &str = r#"{
  "tagOwners": {"tag:peer": [], "tag:server": []},
  "grants": [{"src": ["tag:peer", "tag:server"], "dst": ["tag:peer", "tag:server"], "ip": ["icmp:*", "tcp:7000-7001"]}],
}"#;

fn join(lab: &Lab, coordinator: &Coordinator, name: &str, tag: &str) -> Result<Agent> {
    let agent = Agent::start(lab.host(name)?)?;
    agent.up(&coordinator.url, &coordinator.auth_key(tag)?)?;
    Ok(agent)
}

/// Sends over one TCP connection until `enough`, and checks what comes. Returns how much.
fn transfer(from: &Agent, to: &Agent, port: u16, enough: &AtomicBool) -> Result<usize> {
    let address = SocketAddr::new(*to.addresses()?.first().context("an address")?, port);
    let listener = to.host.enter(|| TcpListener::bind(address))??;
    let mut sender = from.host.enter(|| TcpStream::connect_timeout(&address, LIMIT))??;
    let (mut receiver, _) = listener.accept()?;
    receiver.set_read_timeout(Some(LIMIT))?;
    sender.set_write_timeout(Some(LIMIT))?;
    thread::scope(|scope| {
        let writing = scope.spawn(move || -> std::io::Result<usize> {
            let mut at = 0;
            while !enough.load(Ordering::Relaxed) {
                let part: Vec<u8> = (at..at + CHUNK).map(byte_at).collect();
                sender.write_all(&part)?;
                at += part.len();
            }
            Ok(at)
        });
        let got = take_all(&mut receiver)?;
        let sent = writing.join().map_err(|_| anyhow!("the sender panicked"))??;
        ensure!(got == sent, "{got} of {sent} bytes came");
        Ok(got)
    })
}

#[test]
fn helpers_of_a_server_change_nothing_but_its_speed() -> Result<()> {
    let processors = thread::available_parallelism().map_or(1, NonZero::get);
    if processors < 2 {
        #[expect(clippy::print_stdout, reason = "a skipped test says so")]
        {
            println!("skipped: one processor, so the daemon has no helpers");
        }
        return Ok(());
    }
    lab::test("busy", |lab| {
        let coordinator = Coordinator::start(lab.host("coord")?, POLICY)?;
        let server = join(lab, &coordinator, "server", "tag:server")?;
        let peers =
            [join(lab, &coordinator, "ann", "tag:peer")?, join(lab, &coordinator, "bob", "tag:peer")?];
        for peer in &peers {
            peer.ping("server", 1)?;
            peer.wait_for_path("server", "direct")?;
        }
        let shared = || number(&server.json(&["status", "--json"])?["counters"]["turns_shared"]);
        for to_peers in [true, false] {
            let before = shared()?;
            let enough = AtomicBool::new(false);
            let bytes = thread::scope(|scope| -> Result<usize> {
                let running: Vec<_> = peers
                    .iter()
                    .zip([PORT, PORT + 1])
                    .map(|(peer, port)| {
                        let (enough, server) = (&enough, &server);
                        let (from, to) = if to_peers { (server, peer) } else { (peer, server) };
                        scope.spawn(move || transfer(from, to, port, enough))
                    })
                    .collect();
                let helped =
                    eventually("helpers take part", LIMIT, || Ok((shared()? >= before + 50).then_some(())));
                enough.store(true, Ordering::Relaxed);
                let bytes = running
                    .into_iter()
                    .map(|thread| thread.join().map_err(|_| anyhow!("a transfer panicked"))?)
                    .sum::<Result<usize>>()?;
                helped?;
                Ok(bytes)
            })?;
            ensure!(bytes > 1 << 20, "{bytes} bytes");
        }
        Ok(())
    })
}
