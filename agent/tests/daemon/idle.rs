//! What an agent costs that has nothing to do: memory for those it knows, and no time.

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::time::Duration;

use warren_common::filter::{Action, FilterDst, FilterRule, IpRange, PortRange, RuleId};
use warren_common::ids::DeviceId;
use warren_common::keys::{ProbePublicKey, WgPublicKey};

use crate::fake::Fake;
use crate::{World, in_world, wait};

/// Resident memory of an idle agent, in bytes, and of each peer beyond that.
const IDLE: u64 = 20 << 20;
const EACH: u64 = 2 << 10;
/// Time that is looked at.
const SPAN: Duration = Duration::from_secs(10);

/// A netmap with this many peers, from all of whom one rule takes packets, at addresses that make no range.
async fn know(fake: &Fake, revision: u64, peers: u32) {
    fake.with(|world| {
        let netmap = &mut world.netmap;
        let model = netmap.peers.pop_first().unwrap().1;
        netmap.peers.clear();
        netmap.ingress.clear();
        let mut sources = Vec::new();
        for n in 0..peers {
            let mut peer = model.as_ref().clone();
            let (mut id, mut key) = ([5; 16], [6; 32]);
            id[..4].copy_from_slice(&n.to_be_bytes());
            key[..4].copy_from_slice(&n.to_be_bytes());
            peer.id = DeviceId::from_bytes(id);
            peer.wg = WgPublicKey::from_bytes(key);
            peer.probe = ProbePublicKey::from_bytes(key);
            peer.addrs = vec![IpAddr::from(Ipv4Addr::from_bits(0x6440_0002 + 2 * n))];
            peer.name = Some(format!("host-{n}"));
            sources.extend(peer.addrs.iter().copied());
            netmap.peers.insert(peer.id, peer.into());
        }
        netmap.ingress.insert(FilterRule {
            id: RuleId(1),
            origin: "grants[0]".into(),
            action: Action::Allow,
            staged: false,
            src: sources.into_iter().map(IpRange::from).collect(),
            dst: vec![FilterDst { net: IpRange::from(netmap.device.addrs[0]), ports: PortRange::ALL }],
            protos: Vec::new(),
            active: None,
        });
    });
    fake.push(fake.snapshot(revision));
    wait(|| fake.acks().iter().any(|ack| ack.revision == revision)).await;
}

fn proc(world: &World, file: &str) -> String {
    let path = PathBuf::from("/proc").join(world.daemon.as_ref().unwrap().id().unwrap().to_string());
    std::fs::read_to_string(path.join(file)).unwrap()
}

fn field(text: &str, name: &str) -> u64 {
    let line = text.lines().find(|line| line.starts_with(name)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Time on a processor of the thread that does everything but saves, which come every two minutes.
fn processor_time(world: &World) -> Duration {
    let text = proc(world, "schedstat");
    Duration::from_nanos(text.split_whitespace().next().unwrap().parse().unwrap())
}

#[test]
fn an_idle_agent_takes_little_memory_for_each_peer_and_no_time() {
    in_world(async |mut world| {
        world.join().await;
        for (revision, peers) in [(2, 100), (3, 1_000), (4, 10_000), (5, 100)] {
            know(&world.fake, revision, peers).await;
            let bytes = field(&proc(&world, "status"), "VmRSS:") << 10;
            println!("{peers} known peers: {:.1} MiB resident", bytes as f64 / f64::from(1 << 20));
            if revision < 5 {
                assert!(bytes <= IDLE + EACH * u64::from(peers), "{bytes} bytes with {peers} peers");
            }
        }
        // What the last update brings about is over by then.
        tokio::time::sleep(Duration::from_secs(3)).await;
        let wakes = |world: &World| field(&proc(world, "status"), "voluntary_ctxt_switches:");
        let (time, woken) = (processor_time(&world), wakes(&world));
        tokio::time::sleep(SPAN).await;
        let (time, woken) = (processor_time(&world) - time, wakes(&world) - woken);
        println!(
            "100 idle peers: {woken} wake-ups and {:.3} % of a core in {SPAN:?}",
            100.0 * time.as_secs_f64() / SPAN.as_secs_f64()
        );
        assert!(woken <= 20 && time <= SPAN / 1_000, "{woken} wake-ups, {time:?} on a core");
    });
}
