//! What a policy edit costs with everybody connected: `cargo bench -p warren-coordinator --bench push [-- DEVICES…]`. Time
//! and bytes from the edit to the last update handed to the network, without the store. Results in docs/performance.md.
#![expect(
    clippy::expect_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "a bench's helper fails by panicking, and it measures time and prints it"
)]

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use prost::Message as _;
use rand_chacha::ChaCha20Rng;
use rand_core::SeedableRng as _;
use warren_common::ids::{AuthKeyId, DeviceId, NetworkId};
use warren_common::keys::{ControlPublicKey, Fingerprint, NetmapSecretKey, ProbePublicKey, WgPublicKey};
use warren_common::time::{Instant, Now, UnixTime};
use warren_common::wire::control::{Ack, ClientBody, NetmapUpdate, Resume, ServerBody, ServerMessage};
use warren_coordinator::domain::{Change, Command, Device, Generation, PolicySource, Settings, State};
use warren_coordinator::push::{Config, Coordinator, Origin, Output, SessionId};

/// Devices of one site, which see each other.
const SITE: usize = 50;
/// Devices that see all others: monitoring servers.
const WATCHERS: usize = 3;
/// Runs of each edit; the middle one is shown.
const RUNS: usize = 5;

fn main() {
    let asked: Vec<usize> = std::env::args().filter_map(|a| a.parse().ok()).collect();
    let sizes = if asked.is_empty() { vec![1_000, 10_000] } else { asked };
    println!("devices | edit touches | first update out | all out | updates | bytes in all | largest");
    for devices in sizes {
        let mut lab = Lab::new(devices);
        for (what, edits) in [("two sites", [1, 2]), ("everybody", [3, 4])] {
            let mut runs: Vec<Run> = (0..2 * RUNS).map(|i| lab.edit(edits[i % 2])).collect();
            runs.sort_by_key(|run| run.all);
            let run = &runs[RUNS];
            println!(
                "{devices} | {what} | {:.1} ms | {:.1} ms | {} | {} | {}",
                ms(run.first),
                ms(run.all),
                run.updates,
                run.bytes,
                run.largest
            );
        }
    }
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1_000.0
}

#[derive(Default)]
struct Run {
    first: Duration,
    all: Duration,
    others: Duration,
    updates: usize,
    bytes: usize,
    largest: usize,
}

struct Lab {
    coordinator: Coordinator,
    sites: usize,
    by_session: BTreeMap<SessionId, u64>,
    rng: ChaCha20Rng,
    key: warren_common::keys::NetmapPublicKey,
}

const NOW: Now = Now { boot: Instant::ZERO, unix: UnixTime::from_secs(1_774_000_000) };

impl Lab {
    /// Everybody is connected and up to date.
    fn new(devices: usize) -> Self {
        let mut state = State::new(Settings {
            network: NetworkId::from_bytes([1; 16]),
            name: "bench".into(),
            root: Fingerprint::from_bytes([2; 32]),
            ipv4: "100.64.0.0/10".parse().expect("a pool"),
            ipv6: "fd00::/48".parse().expect("a prefix"),
            epoch: 1,
            revisions_reserved: 0,
        });
        for n in 0..devices {
            state.absorb(Change::PutDevice(Box::new(device(n))));
        }
        let key = NetmapSecretKey::from_bytes([7; 32]);
        let public = key.public();
        let config = Config { netmap_key: key, lease: Duration::from_secs(86_400) };
        let mut lab = Self {
            coordinator: Coordinator::new(config, state, NOW),
            sites: devices.div_ceil(SITE),
            by_session: BTreeMap::new(),
            rng: ChaCha20Rng::seed_from_u64(1),
            key: public,
        };
        lab.edit(1);
        for n in 0..devices {
            let session = SessionId(n as u64 + 1);
            lab.coordinator.connect(session, control(n), NOW).expect("there is room");
            let resume = Resume {
                device: id(n).to_bytes().to_vec(),
                generation: 1,
                epoch: 1,
                revision: 0,
                hash: Vec::new(),
                version: "0".into(),
            };
            lab.by_session.insert(session, 0);
            lab.coordinator.handle(session, ClientBody::Resume(resume), NOW, &mut lab.rng);
            lab.deliver(&mut Run::default(), std::time::Instant::now());
        }
        lab
    }

    /// Every site is a mesh, a few devices watch all others; the edit changes the last digit of one port.
    fn policy(&self, edit: u16) -> String {
        let (site_port, watch_port) = if edit < 3 { (8_000 + edit, 9_100) } else { (8_000, 9_100 + edit) };
        let tags: Vec<String> = (0..self.sites).map(|s| format!("\"tag:s{s}\": []")).collect();
        let mut grants: Vec<String> = (0..self.sites)
            .map(|s| {
                format!(
                    "{{\"src\": [\"tag:s{s}\"], \"dst\": [\"tag:s{s}\"], \"ip\": [\"tcp:443\", \"udp:53\"]}}"
                )
            })
            .collect();
        grants
            .push(format!("{{\"src\": [\"tag:s0\"], \"dst\": [\"tag:s1\"], \"ip\": [\"tcp:{site_port}\"]}}"));
        grants
            .push(format!("{{\"src\": [\"tag:watch\"], \"dst\": [\"*\"], \"ip\": [\"tcp:{watch_port}\"]}}"));
        while grants.len() < 1_000 {
            let (a, b) = (grants.len() % self.sites, grants.len() * 7 % self.sites);
            let port = grants.len();
            grants.push(format!(
                "{{\"src\": [\"tag:none{}\"], \"dst\": [\"tag:s{b}\"], \"ip\": [\"tcp:{port}\"]}}",
                a % 10
            ));
        }
        let none: Vec<String> = (0..10).map(|i| format!("\"tag:none{i}\": []")).collect();
        format!(
            "{{\"tagOwners\": {{{}, {}, \"tag:watch\": []}},\n\"grants\": [\n{}]}}",
            tags.join(", "),
            none.join(", "),
            grants.join(",\n")
        )
    }

    fn edit(&mut self, edit: u16) -> Run {
        let text = self.policy(edit);
        let started = std::time::Instant::now();
        let command = Command::SetPolicy { source: PolicySource::Api, text };
        self.coordinator.submit(Origin::Internal, command, NOW, &mut self.rng);
        let mut run = Run::default();
        self.deliver(&mut run, started);
        run.all = started.elapsed() - run.others;
        run
    }

    /// Saves, sends and acknowledges until nothing more comes.
    fn deliver(&mut self, run: &mut Run, started: std::time::Instant) {
        loop {
            while let Some(command) = self.coordinator.poll_command() {
                self.coordinator.submit(Origin::Internal, command, NOW, &mut self.rng);
            }
            if self.coordinator.has_batch() {
                self.coordinator.saved(NOW);
            }
            let Some(output) = self.coordinator.poll_output() else { return };
            let Output::Send { session, message } = output else { continue };
            let message = ServerMessage { body: Some(*message) };
            let bytes = message.encode_to_vec();
            let Some(ServerBody::Update(signed)) = message.body else { continue };
            if run.updates == 0 {
                run.first = started.elapsed();
            }
            run.updates += 1;
            run.bytes += bytes.len();
            run.largest = run.largest.max(bytes.len());
            // What agents do costs the coordinator nothing.
            let paused = std::time::Instant::now();
            let update = NetmapUpdate::verify(&signed, &self.key).expect("it is signed");
            run.others += paused.elapsed();
            let ack = Ack { epoch: 1, revision: update.to, want_snapshot: false, reason: String::new() };
            self.coordinator.handle(session, ClientBody::Ack(ack), NOW, &mut self.rng);
        }
    }
}

fn control(n: usize) -> ControlPublicKey {
    ControlPublicKey::from_bytes(bytes(n, 1))
}

fn id(n: usize) -> DeviceId {
    let mut id = [0; 16];
    id[8..].copy_from_slice(&(n as u64 + 1).to_be_bytes());
    DeviceId::from_bytes(id)
}

fn bytes(n: usize, kind: u8) -> [u8; 32] {
    let mut out = [kind; 32];
    out[..8].copy_from_slice(&(n as u64 + 1).to_be_bytes());
    out
}

fn device(n: usize) -> Device {
    let tag = if n % 500 == 499 && n / 500 < WATCHERS {
        "tag:watch".to_owned()
    } else {
        format!("tag:s{}", n / SITE)
    };
    Device {
        id: id(n),
        control: control(n),
        wg: WgPublicKey::from_bytes(bytes(n, 2)),
        probe: ProbePublicKey::from_bytes(bytes(n, 3)),
        name: format!("d{n}"),
        hostname: format!("d{n}"),
        ipv4: Ipv4Addr::from_bits(0x6440_0000 + 1 + n as u32),
        ipv6: Ipv6Addr::from_bits((0xfd00 << 112) + 1 + n as u128),
        user: None,
        tags: vec![tag],
        ephemeral: false,
        approved: true,
        expired: false,
        copied: false,
        generation: Generation { current: 1, pending: None, confirmed: true },
        auth_key: AuthKeyId::from_bytes([1; 16]),
        os: "linux".into(),
        version: "0".into(),
        created: NOW.unix,
        home_relay: None,
        routes: Vec::new(),
        relay: None,
    }
}
