//! A random life of a network, checked step by step against the reference model.
//!
//! Properties: what is allowed is delivered, and its answers too; what is denied never is; what was taken back is not,
//! after the bound; a direct path is in use wherever the oracle says that one exists; nobody wakes up, sends or probes
//! without bound. A failure names its seed; `cargo xtask sim SEED` replays it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use rand_chacha::ChaCha20Rng;
use rand_core::{RngCore, SeedableRng};
use warren_common::time::Instant;
use warren_coordinator::domain::Command;

use super::internet::{Link, NatId, Reach, Realm};
use super::model::{DeviceNo, Model};
use super::nat::{Allocation, Degree, NatBehaviour};
use super::packet::Datagram;
use super::world::{APP_PORT, World};

/// How long a datagram of an allowed pair may take to arrive, with one try a second, while the pair has a way: several
/// handshake retries, and the time a restarted end needs to find the relay again.
const DELIVERY_BOUND: Duration = Duration::from_secs(25);
/// How long a calm network gets to find every direct path: the engine's longest pause between probe rounds (30 s), once to
/// learn that a router's address is another, once to use it, and a minute for what is lost on the way.
const SETTLE: Duration = Duration::from_secs(120);
/// Pause between the datagrams that each allowed pair exchanges meanwhile: often enough that no pair counts as idle.
const CHATTER: Duration = Duration::from_secs(15);
/// Wake-ups by timers per device and second, averaged over a run: far above what keep-alives, rekeys and probes of a
/// handful of active peers need, far below a storm.
const MAX_WAKES_PER_DEVICE_SECOND: f64 = 5.0;
/// Datagrams per device and second, averaged over a run.
const MAX_DATAGRAMS_PER_DEVICE_SECOND: f64 = 20.0;

/// How long a life, of how many.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Devices at the start.
    pub devices: usize,
    /// Random steps.
    pub steps: usize,
    /// Rules at the start, for each device.
    pub edges_per_device: usize,
}

/// What a run saw.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Summary {
    /// Datagrams of allowed pairs that were sent and arrived.
    pub delivered: u64,
    /// Datagrams of denied pairs that were sent, and did not.
    pub refused: u64,
    /// Pairs that were direct at the end.
    pub direct: usize,
    /// Pairs that had to stay on the relay.
    pub relayed: usize,
    /// Pairs of which one end could not be reached at all at the end.
    pub unreachable: usize,
    /// Wake-ups per device and second.
    pub wakes: f64,
    /// Datagrams per device and second.
    pub datagrams: f64,
}

struct Expected {
    from: DeviceNo,
    to: DeviceNo,
    v6: bool,
    since: Instant,
    next_try: Instant,
    numbers: BTreeSet<u64>,
    answered: bool,
}

struct Scenario {
    seed: u64,
    rng: ChaCha20Rng,
    world: World,
    model: Model,
    nats: Vec<NatId>,
    expected: Vec<Expected>,
    /// Who sent what, and whether it was allowed.
    sent: BTreeMap<u64, (DeviceNo, DeviceNo)>,
    refused: BTreeSet<u64>,
    summary: Summary,
}

/// Lives one life.
///
/// # Panics
/// If a property does not hold; the message names the seed and the virtual time.
pub fn run(seed: u64, plan: Plan) -> Summary {
    let mut scenario = Scenario {
        seed,
        rng: ChaCha20Rng::seed_from_u64(seed),
        world: World::new(seed),
        model: Model::default(),
        nats: Vec::new(),
        expected: Vec::new(),
        sent: BTreeMap::new(),
        refused: BTreeSet::new(),
        summary: Summary::default(),
    };
    scenario.build(plan);
    for _ in 0..plan.steps {
        scenario.step();
    }
    scenario.settle();
    scenario.finish();
    scenario.summary
}

fn tag(no: DeviceNo) -> String {
    format!("tag:d{no}")
}

impl Scenario {
    fn draw(&mut self, below: usize) -> usize {
        (self.rng.next_u64() % below.max(1) as u64) as usize
    }

    fn draw_device(&mut self) -> DeviceNo {
        self.draw(self.world.devices.len())
    }

    fn fail(&self, what: &str) -> ! {
        panic!("seed {}: at {:?}: {what}", self.seed, self.world.now.boot)
    }

    fn build(&mut self, plan: Plan) {
        for _ in 0..plan.devices {
            self.add_device();
        }
        self.world.run(Duration::from_secs(2));
        for from in 0..plan.devices {
            for _ in 0..plan.edges_per_device {
                let to = self.draw(plan.devices);
                if from != to {
                    self.model.allow(from, to);
                }
            }
        }
        self.publish_policy();
        self.world.run(Duration::from_secs(5));
        if let Some(no) = (0..plan.devices).find(|no| !self.world.devices[*no].connected()) {
            self.fail(&format!("device {no} has not joined"));
        }
    }

    fn add_device(&mut self) -> DeviceNo {
        let link = Link {
            latency: Duration::from_millis(1 + self.draw(60) as u64),
            jitter: Duration::from_millis(self.draw(5) as u64),
            loss_permille: if self.draw(10) == 0 { 20 } else { 0 },
            udp: self.draw(20) != 0,
            ..Link::default()
        };
        let (realm, addr) = self.place();
        let no = self.world.devices.len();
        match self.world.add_device(&tag(no), realm, addr, link) {
            Ok(no) => no,
            Err(refusal) => self.fail(&format!("device {no} was refused: {refusal}")),
        }
    }

    /// A place to be: public, behind a translator of its own, or on a network with others.
    fn place(&mut self) -> (Realm, IpAddr) {
        let shared = !self.nats.is_empty() && self.draw(6) == 0;
        if shared {
            let at = self.draw(self.nats.len());
            return (Realm::Behind(self.nats[at]), self.private_addr());
        }
        if self.draw(8) == 0 {
            return (Realm::Public, self.world.fresh_addr());
        }
        let behaviour = NatBehaviour {
            mapping: Degree::ALL[self.draw(3)],
            allocation: Allocation::ALL[self.draw(3)],
            filtering: Degree::ALL[self.draw(3)],
            timeout: Duration::from_secs(30 + self.draw(270) as u64),
            hairpin: self.draw(2) == 0,
        };
        let nat = self.world.add_nat(behaviour);
        self.nats.push(nat);
        (Realm::Behind(nat), self.private_addr())
    }

    fn private_addr(&mut self) -> IpAddr {
        let [.., a, b] = (self.rng.next_u32() | 2).to_be_bytes();
        [192, 168, a, b.clamp(2, 254)].into()
    }

    fn publish_policy(&mut self) {
        let edges = self.model.edges();
        let mut text = String::from("{\n  \"tagOwners\": {\n");
        for no in 0..self.world.devices.len() {
            text.push_str(&format!("    \"{}\": [\"admin@example.com\"],\n", tag(no)));
        }
        text.push_str("  },\n  \"grants\": [\n");
        for (from, to) in edges {
            text.push_str(&format!(
                "    {{\"src\": [\"{}\"], \"dst\": [\"{}\"], \"ip\": [\"udp:{APP_PORT}\"]}},\n",
                tag(*from),
                tag(*to),
            ));
        }
        text.push_str("  ],\n}\n");
        if let Err(refusal) = self.world.set_policy(text) {
            self.fail(&format!("the policy was refused: {refusal}"));
        }
    }

    fn step(&mut self) {
        match self.draw(100) {
            0..50 => self.send_allowed(),
            50..68 => self.send_denied(),
            68..78 => self.edit_policy(),
            78..82 => self.roam(),
            82..86 => self.restart_agent(),
            86..88 => self.toggle_relay(),
            88..91 => self.toggle_coordinator(),
            91..92 => self.replace_device(),
            92..93 => self.pass(Duration::from_secs(150)),
            _ => {}
        }
        let millis = 100 + self.draw(2_000) as u64;
        self.pass(Duration::from_millis(millis));
    }

    fn is_up(&self, no: DeviceNo) -> bool {
        self.world.devices[no].connected() && !self.world.devices[no].gone
    }

    /// True if the pair has a way to exchange packets, and both ends know what the coordinator knows.
    fn has_a_way(&self, a: DeviceNo, b: DeviceNo) -> bool {
        let devices = &self.world.devices;
        self.is_up(a) && self.is_up(b) && devices[a].relay_ready() && devices[b].relay_ready()
    }

    fn send_allowed(&mut self) {
        let edges = self.model.edges().len();
        if edges == 0 {
            return;
        }
        let at = self.draw(edges);
        let Some((from, to)) = self.model.edges().iter().nth(at).copied() else { return };
        let (v6, now) = (self.draw(2) == 0, self.world.now.boot);
        self.expected.push(Expected {
            from,
            to,
            v6,
            since: now,
            next_try: now,
            numbers: BTreeSet::new(),
            answered: false,
        });
    }

    fn send_denied(&mut self) {
        let count = self.world.devices.len();
        let (from, to, v6) = (self.draw(count), self.draw(count), self.draw(2) == 0);
        let now = self.world.now.boot;
        if from == to || self.model.may_pass(now, from, to) {
            return;
        }
        if let Some(number) = self.world.send(from, to, v6) {
            self.sent.insert(number, (from, to));
            self.refused.insert(number);
        }
    }

    fn edit_policy(&mut self) {
        if !self.world.coordinator_up() {
            return;
        }
        for _ in 0..1 + self.draw(3) {
            let count = self.world.devices.len();
            let (from, to) = (self.draw(count), self.draw(count));
            if self.draw(2) == 0 && !self.model.edges().is_empty() {
                let at = self.draw(self.model.edges().len());
                if let Some((from, to)) = self.model.edges().iter().nth(at).copied() {
                    self.deny(from, to);
                }
            } else if from != to && self.is_member(from) && self.is_member(to) {
                self.model.allow(from, to);
            }
        }
        self.publish_policy();
    }

    fn is_member(&self, no: DeviceNo) -> bool {
        !self.world.devices[no].gone
    }

    fn deny(&mut self, from: DeviceNo, to: DeviceNo) {
        let connected = self.is_up(from) || self.is_up(to);
        self.model.deny(self.world.now.boot, from, to, connected);
    }

    fn roam(&mut self) {
        let no = self.draw_device();
        if self.draw(2) == 0 && !self.nats.is_empty() {
            let at = self.draw(self.nats.len());
            let nat = self.nats[at];
            let outside = self.world.fresh_addr();
            self.world.net.renumber_nat(nat, outside);
        } else {
            let (realm, addr) = self.place();
            self.world.move_device(no, realm, addr);
        }
    }

    fn restart_agent(&mut self) {
        let no = self.draw_device();
        if self.is_member(no) {
            self.world.restart_agent(no);
        }
    }

    fn toggle_relay(&mut self) {
        if self.world.relay_up(0) {
            self.world.stop_relay(0);
        } else {
            self.world.start_relay(0);
        }
    }

    fn toggle_coordinator(&mut self) {
        if self.world.coordinator_up() {
            self.world.stop_coordinator();
        } else {
            self.world.start_coordinator();
        }
    }

    /// Removes a device for good; another one joins.
    fn replace_device(&mut self) {
        let no = self.draw_device();
        let Some(id) = self.world.devices[no].id().filter(|_| self.world.coordinator_up()) else { return };
        if self.world.devices[no].gone {
            return;
        }
        let mine: Vec<_> = self.model.edges().iter().filter(|(a, b)| *a == no || *b == no).copied().collect();
        mine.into_iter().for_each(|(from, to)| self.deny(from, to));
        if let Err(refusal) = self.world.command(Command::RemoveDevice(id)) {
            self.fail(&format!("removing device {no}: {refusal}"));
        }
        self.world.devices[no].gone = true;
        let new = self.add_device();
        self.pass(Duration::from_secs(1));
        let other = self.draw_device();
        if other != new && self.is_member(other) {
            self.model.allow(new, other);
            self.model.allow(other, new);
        }
        self.publish_policy();
    }

    /// Lets time pass, with a try a second for everything that is expected to arrive.
    fn pass(&mut self, duration: Duration) {
        let end = self.world.now.boot + duration;
        while self.world.now.boot < end {
            self.try_expected();
            let next = self.expected.iter().map(|e| e.next_try).min().unwrap_or(end);
            self.world.run_until(next.min(end));
            self.note_connections();
            self.check_deliveries();
        }
        self.check_expected();
    }

    fn note_connections(&mut self) {
        let up: Vec<_> = (0..self.world.devices.len()).filter(|no| self.is_up(*no)).collect();
        up.into_iter().for_each(|no| self.model.heard(self.world.now.boot, no));
    }

    fn try_expected(&mut self) {
        let now = self.world.now.boot;
        for mut expected in std::mem::take(&mut self.expected) {
            if expected.next_try <= now {
                expected.next_try = now + Duration::from_secs(1);
                if let Some(number) = self.world.send(expected.from, expected.to, expected.v6) {
                    self.sent.insert(number, (expected.from, expected.to));
                    expected.numbers.insert(number);
                }
            }
            self.expected.push(expected);
        }
    }

    fn check_deliveries(&mut self) {
        for delivery in std::mem::take(&mut self.world.deliveries) {
            let Datagram { dst, number, .. } = delivery.datagram;
            let Some((from, to)) = self.sent.get(&number).copied() else {
                self.fail(&format!("datagram {number} was delivered, and nobody sent it"))
            };
            let is_answer = dst.port() != APP_PORT;
            if delivery.device != if is_answer { from } else { to } {
                self.fail(&format!("datagram {number} for {to} was delivered to {}", delivery.device));
            }
            if !self.model.may_pass(delivery.at, from, to) {
                self.fail(&format!("datagram {number} from {from} to {to} was delivered, which is denied"));
            }
            for expected in &mut self.expected {
                expected.answered |= is_answer && expected.numbers.contains(&number);
            }
        }
        let before = self.expected.len();
        self.expected.retain(|e| !e.answered);
        self.summary.delivered += (before - self.expected.len()) as u64;
    }

    fn check_expected(&mut self) {
        let now = self.world.now.boot;
        for mut expected in std::mem::take(&mut self.expected) {
            let Expected { from, to, .. } = expected;
            if !self.model.edges().contains(&(from, to)) {
                continue; // taken back meanwhile
            }
            if !self.has_a_way(from, to) {
                expected.since = now;
            } else if now.since(expected.since) > DELIVERY_BOUND {
                self.fail(&format!(
                    "{from} may reach {to} and has a way, but got no answer; {from}: {}; {to}: {}",
                    self.world.describe(from, to),
                    self.world.describe(to, from),
                ));
            }
            self.expected.push(expected);
        }
    }

    /// Everything comes back and stays; every allowed pair talks.
    fn settle(&mut self) {
        if !self.world.coordinator_up() {
            self.world.start_coordinator();
        }
        if !self.world.relay_up(0) {
            self.world.start_relay(0);
        }
        self.pass(Duration::from_secs(5));
        let end = self.world.now.boot + SETTLE;
        while self.world.now.boot < end {
            let edges: Vec<_> = self.model.edges().iter().copied().collect();
            for (from, to) in edges {
                if let Some(number) = self.world.send(from, to, false) {
                    self.sent.insert(number, (from, to));
                }
            }
            self.pass(CHATTER);
        }
    }

    fn finish(&mut self) {
        if let Some(expected) = self.expected.iter().find(|e| self.has_a_way(e.from, e.to)) {
            self.fail(&format!("{} got no answer from {} in a calm network", expected.from, expected.to));
        }
        let stun = self.world.stun_servers();
        let edges: Vec<_> = self.model.edges().iter().copied().collect();
        for (from, to) in edges {
            if !self.has_a_way(from, to) {
                self.summary.unreachable += 1;
                continue;
            }
            let [a, b] = [from, to].map(|no| self.world.devices[no].host);
            let exists = self.world.net.reach(a, b, &stun) == Reach::Direct;
            let peer = self.world.devices[to].id();
            let status = self.world.devices[from].status(self.world.now);
            let path = status.and_then(|s| s.peers.into_iter().find(|p| Some(p.id) == peer)).map(|p| p.path);
            let direct = path.as_ref().is_some_and(|p| p.kind == "direct");
            if exists && !direct {
                let [a, b] = [a, b].map(|host| self.world.net.describe(host));
                self.fail(&format!("{from} ({a}) and {to} ({b}) could talk directly: {path:?}"));
            }
            self.summary.direct += usize::from(direct);
            self.summary.relayed += usize::from(!direct);
        }
        self.summary.refused = self.refused.len() as u64;
        let seconds = self.world.now.boot.since(Instant::ZERO).as_secs_f64() - 3_600.0;
        let scale = seconds * self.world.devices.len() as f64;
        self.summary.wakes = self.world.tally.wakes as f64 / scale;
        self.summary.datagrams = self.world.tally.datagrams as f64 / scale;
        if self.summary.wakes > MAX_WAKES_PER_DEVICE_SECOND {
            self.fail(&format!("{:.1} wake-ups per device and second", self.summary.wakes));
        }
        if self.summary.datagrams > MAX_DATAGRAMS_PER_DEVICE_SECOND {
            self.fail(&format!("{:.1} datagrams per device and second", self.summary.datagrams));
        }
    }
}
