//! Every kind of network with every other: does the engine find the path that the oracle says exists, also after trouble?

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use rand_chacha::ChaCha20Rng;
use rand_core::{RngCore, SeedableRng};

use super::internet::{Link, NatId, Reach, Realm};
use super::model::DeviceNo;
use super::nat::{Allocation, Degree, NatBehaviour};
use super::world::{APP_PORT, World};

/// What lies between a device and the internet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Nothing.
    Public,
    /// A full cone.
    EndpointIndependent,
    /// One that lets in addresses that were sent to.
    AddressRestricted,
    /// One that lets in addresses and ports that were sent to.
    PortRestricted,
    /// One that gives each destination another port.
    Symmetric,
    /// A router behind a carrier's translator.
    DoubleNat,
    /// A firewall that lets only TCP through.
    UdpBlocked,
    /// Nothing but a proxy: to the model the same, since a relay's stream takes either.
    ProxyOnly,
    /// No IPv4.
    Ipv6Only,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::Public,
        Self::EndpointIndependent,
        Self::AddressRestricted,
        Self::PortRestricted,
        Self::Symmetric,
        Self::DoubleNat,
        Self::UdpBlocked,
        Self::ProxyOnly,
        Self::Ipv6Only,
    ];
}

/// How the pairs of two kinds fared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cell {
    /// Pairs that had to be direct, and were.
    pub direct: u32,
    /// Pairs that had to stay on the relay, and did.
    pub relayed: u32,
    /// Pairs that needed luck, and had it.
    pub lucky: u32,
    /// Pairs that needed luck, and had none.
    pub unlucky: u32,
}

/// The kinds of each pair, the lesser first, and how it fared.
pub type Table = BTreeMap<(Kind, Kind), Cell>;

/// Pause between the datagrams of each pair.
const CHATTER: Duration = Duration::from_secs(10);
/// How long the network is calm before paths are looked at: the longest pause between probe rounds four times, since what
/// is to be found out may take a round at each end, and may be lost on the way.
const CALM: Duration = Duration::from_secs(150);
/// How long an answer may take at most in calm.
const ANSWER_WITHIN: Duration = Duration::from_secs(6);

struct Matrix {
    seed: u64,
    rng: ChaCha20Rng,
    world: World,
    kinds: Vec<Kind>,
    nats: Vec<NatId>,
    /// Who sent what to whom, and got no answer yet.
    open: BTreeMap<u64, (DeviceNo, DeviceNo)>,
}

/// Lives one life of a network with two devices of each kind.
///
/// # Panics
/// If a pair is not reached as the oracle says; the message names the seed.
pub fn run(seed: u64) -> Table {
    let mut matrix = Matrix {
        seed,
        rng: ChaCha20Rng::seed_from_u64(seed),
        world: World::new(seed),
        kinds: Vec::new(),
        nats: Vec::new(),
        open: BTreeMap::new(),
    };
    matrix.build();
    matrix.chat(Duration::from_secs(60) + CALM / 3);
    let mut table = Table::new();
    matrix.check("after the start", &mut table);
    for _ in 0..4 {
        let what = matrix.trouble();
        matrix.chat(CALM);
        matrix.check(&what, &mut table);
    }
    table
}

impl Matrix {
    fn draw(&mut self, below: u64) -> u64 {
        self.rng.next_u64() % below
    }

    fn fail(&self, what: &str) -> ! {
        panic!("seed {}: at {:?}: {what}", self.seed, self.world.now.boot)
    }

    fn build(&mut self) {
        for side in ["tag:left", "tag:right"] {
            for kind in Kind::ALL {
                self.add(side, kind);
            }
        }
        self.world.run(Duration::from_secs(2));
        let policy = format!(
            r#"{{"tagOwners": {{"tag:left": ["admin@example.com"], "tag:right": ["admin@example.com"]}},
                "grants": [{{"src": ["tag:left"], "dst": ["tag:right"], "ip": ["udp:{APP_PORT}"]}},
                           {{"src": ["tag:right"], "dst": ["tag:left"], "ip": ["udp:{APP_PORT}"]}}]}}"#
        );
        if let Err(refusal) = self.world.set_policy(policy) {
            self.fail(&format!("the policy was refused: {refusal}"));
        }
        self.world.run(Duration::from_secs(3));
    }

    fn add(&mut self, side: &str, kind: Kind) {
        let link = Link {
            latency: Duration::from_millis(1 + self.draw(60)),
            jitter: Duration::from_millis(self.draw(5)),
            loss_permille: if self.draw(4) == 0 { 20 } else { 0 },
            udp: !matches!(kind, Kind::UdpBlocked | Kind::ProxyOnly),
            ..Link::default()
        };
        let (ei, ad, apd) =
            (Degree::EndpointIndependent, Degree::AddressDependent, Degree::AddressAndPortDependent);
        let v6 = (Realm::Public, self.world.fresh_v6());
        let v4 = match kind {
            Kind::Public => Some((Realm::Public, self.world.fresh_addr())),
            Kind::EndpointIndependent => Some(self.behind(Realm::Public, ei, ei)),
            Kind::AddressRestricted => Some(self.behind(Realm::Public, ei, ad)),
            Kind::PortRestricted | Kind::UdpBlocked | Kind::ProxyOnly => {
                Some(self.behind(Realm::Public, ei, apd))
            }
            Kind::Symmetric => {
                let mapping = if self.draw(2) == 0 { ad } else { apd };
                Some(self.behind(Realm::Public, mapping, apd))
            }
            Kind::DoubleNat => {
                let filtering = [ei, ad, apd][self.draw(3) as usize];
                let (carrier, _) = self.behind(Realm::Public, ei, filtering);
                Some(self.behind(carrier, ei, apd))
            }
            Kind::Ipv6Only => None,
        };
        // Some public hosts, and few others, have both families.
        let both = match kind {
            Kind::Public => self.draw(2) == 0,
            Kind::Ipv6Only => true,
            _ => self.draw(16) == 0,
        };
        let interfaces: Vec<(Realm, IpAddr)> = v4.into_iter().chain(both.then_some(v6)).collect();
        if let Err(refusal) = self.world.add_device_at(side, &interfaces, link) {
            self.fail(&format!("a device was refused: {refusal}"));
        }
        self.kinds.push(kind);
    }

    /// A place behind a new translator in `outer`.
    fn behind(&mut self, outer: Realm, mapping: Degree, filtering: Degree) -> (Realm, IpAddr) {
        let behaviour = NatBehaviour {
            mapping,
            allocation: Allocation::ALL[self.draw(3) as usize],
            filtering,
            timeout: Duration::from_secs(10 + self.draw(290)),
            hairpin: self.draw(2) == 0,
        };
        let outside = match outer {
            Realm::Public => self.world.fresh_addr(),
            Realm::Behind(_) => [100, 64, self.draw(250) as u8, 2].into(),
        };
        let nat = self.world.net.add_nat(outer, outside, behaviour);
        self.nats.push(nat);
        (Realm::Behind(nat), [192, 168, 1, 2 + self.draw(250) as u8].into())
    }

    fn pairs(&self) -> Vec<(DeviceNo, DeviceNo)> {
        let half = self.kinds.len() / 2;
        (0..half).flat_map(|a| (half..2 * half).map(move |b| (a, b))).collect()
    }

    /// Every pair talks both ways now and then.
    fn chat(&mut self, duration: Duration) {
        let end = self.world.now.boot + duration;
        while self.world.now.boot < end {
            for (a, b) in self.pairs() {
                for (from, to) in [(a, b), (b, a)] {
                    if let Some(number) = self.world.send(from, to, false) {
                        self.open.insert(number, (from, to));
                    }
                }
            }
            self.world.run_until((self.world.now.boot + CHATTER).min(end));
            self.take_deliveries();
        }
    }

    fn take_deliveries(&mut self) {
        for delivery in std::mem::take(&mut self.world.deliveries) {
            let datagram = delivery.datagram;
            if datagram.dst.port() == APP_PORT {
                continue;
            }
            match self.open.remove(&datagram.number) {
                Some((from, _)) if from == delivery.device => {}
                other => self.fail(&format!("{datagram:?} came back to {}: {other:?}", delivery.device)),
            }
        }
    }

    /// Something happens. Returns what.
    fn trouble(&mut self) -> String {
        match self.draw(6) {
            0 | 1 => {
                let at = self.draw(self.nats.len() as u64) as usize;
                let nat = self.nats[at];
                self.world.reboot_nat(nat);
                format!("after {nat:?} started anew")
            }
            2 => {
                let away = Duration::from_secs(5 + self.draw(60));
                self.world.stop_relay(0);
                self.chat(away);
                self.world.start_relay(0);
                format!("after the relay was away for {away:?}")
            }
            3 => {
                let no = self.draw(self.kinds.len() as u64) as usize;
                let asleep = Duration::from_secs(20 + self.draw(1_200));
                self.world.sleep(no, asleep);
                self.chat(asleep + Duration::from_secs(1));
                format!("after {no} slept for {asleep:?}")
            }
            4 => {
                let silent = Duration::from_secs(15 + self.draw(600));
                self.world.run(silent);
                self.take_deliveries();
                format!("after a silence of {silent:?}")
            }
            _ => {
                let no = self.draw(self.kinds.len() as u64) as usize;
                let before = *self.world.net.link_mut(self.world.devices[no].host);
                let bad = Link { loss_permille: 50, jitter: Duration::from_millis(50), ..before };
                *self.world.net.link_mut(self.world.devices[no].host) = bad;
                self.chat(Duration::from_secs(40));
                *self.world.net.link_mut(self.world.devices[no].host) = before;
                format!("after {no} had a bad link")
            }
        }
    }

    /// Every pair is reached as the oracle says, and gets answers.
    fn check(&mut self, when: &str, table: &mut Table) {
        self.open.clear();
        let mut waiting = BTreeSet::new();
        for (a, b) in self.pairs() {
            for (from, to) in [(a, b), (b, a)] {
                waiting.extend(self.world.send(from, to, self.seed.is_multiple_of(2)).map(|n| (n, from, to)));
            }
        }
        // A loss may cost one try.
        self.world.run(ANSWER_WITHIN / 2);
        let heard: BTreeSet<u64> = std::mem::take(&mut self.world.deliveries)
            .iter()
            .filter(|d| d.datagram.dst.port() != APP_PORT)
            .map(|d| d.datagram.number)
            .collect();
        waiting.retain(|(number, ..)| !heard.contains(number));
        let again: Vec<_> =
            waiting.iter().map(|(_, from, to)| (*from, *to, self.world.send(*from, *to, false))).collect();
        self.world.run(ANSWER_WITHIN / 2);
        let heard: BTreeSet<u64> =
            std::mem::take(&mut self.world.deliveries).iter().map(|d| d.datagram.number).collect();
        if let Some((from, to, _)) =
            again.iter().find(|(.., number)| number.is_none_or(|number| !heard.contains(&number)))
            && self.world.net.link_mut(self.world.devices[*from].host).loss_permille == 0
            && self.world.net.link_mut(self.world.devices[*to].host).loss_permille == 0
        {
            self.fail(&format!(
                "{when}: {from} got no answer from {to}: {}",
                self.world.describe(*from, *to)
            ));
        }
        let stun = self.world.stun_servers();
        for (a, b) in self.pairs() {
            let [x, y] = [a, b].map(|no| self.world.devices[no].host);
            let reach = self.world.net.reach(x, y, &stun);
            let direct = [(a, b), (b, a)].map(|(at, peer)| self.path_kind(at, peer) == "direct");
            let mut kinds = [self.kinds[a], self.kinds[b]];
            kinds.sort_unstable();
            let cell = table.entry((kinds[0], kinds[1])).or_default();
            match (reach, direct) {
                (Reach::Direct, [true, true]) => cell.direct += 1,
                (Reach::Relayed, [false, false]) => cell.relayed += 1,
                (Reach::ByGuessing, [true, true]) => cell.lucky += 1,
                (Reach::ByGuessing, [false, false]) => cell.unlucky += 1,
                // One end may have just found out that a guess is stale.
                (Reach::ByGuessing, _) => cell.unlucky += 1,
                _ => {
                    let [x, y] = [x, y].map(|host| self.world.net.describe(host));
                    self.fail(&format!(
                        "{when}: {a} {kinds:?} ({x}) and {b} ({y}) should be {reach:?} and are direct: {direct:?}; \
                         {a}: {}; {b}: {}",
                        self.world.describe(a, b),
                        self.world.describe(b, a)
                    ));
                }
            }
        }
    }

    fn path_kind(&self, at: DeviceNo, peer: DeviceNo) -> String {
        let id = self.world.devices[peer].id();
        let status = self.world.devices[at].status(self.world.now);
        let peer = status.and_then(|s| s.peers.into_iter().find(|p| Some(p.id) == id));
        peer.map_or_else(|| "unknown".to_owned(), |p| p.path.kind.into_owned())
    }
}
