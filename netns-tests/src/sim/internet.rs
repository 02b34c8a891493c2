//! The virtual internet: hosts, private networks behind translators (nested if wanted), latency, jitter and loss.
//!
//! Sending translates outwards at once; the packet then travels, and is translated inwards when it arrives, so that a
//! mapping which expires on the way is expired.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use rand_chacha::ChaCha20Rng;
use rand_core::{RngCore, SeedableRng};
use warren_common::time::Instant;

use super::nat::{Degree, Nat, NatBehaviour};

/// Names a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostId(pub usize);

/// Names a translator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NatId(pub usize);

/// A network in which addresses mean something: the public internet, or the inside of a translator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Realm {
    /// The public internet.
    Public,
    /// Behind this translator.
    Behind(NatId),
}

/// How a host's packets fare.
#[derive(Clone, Copy, Debug)]
pub struct Link {
    /// One-way delay to the core of the internet.
    pub latency: Duration,
    /// Where on a line of regions it is: the difference of two hosts' positions is the one-way delay between them, beyond that
    /// of their links.
    pub position: Duration,
    /// Most extra delay, drawn evenly: reorders.
    pub jitter: Duration,
    /// Loss in parts per thousand.
    pub loss_permille: u32,
    /// False while the host has no network or blocks UDP.
    pub udp: bool,
    /// The longest IP packet, in bytes. A longer one is lost, and nobody is told.
    pub mtu: usize,
    /// Whether fragments pass.
    pub fragments: bool,
}

impl Default for Link {
    fn default() -> Self {
        Self {
            latency: Duration::from_millis(10),
            position: Duration::ZERO,
            jitter: Duration::ZERO,
            loss_permille: 0,
            udp: true,
            mtu: 1_500,
            fragments: true,
        }
    }
}

/// A datagram that has arrived.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Arrival {
    /// At which host.
    pub host: HostId,
    /// The host's port.
    pub port: u16,
    /// The source, as the host sees it.
    pub from: SocketAddr,
    /// The contents.
    pub payload: Vec<u8>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Owner {
    Host(HostId),
    Nat(NatId),
}

#[derive(Clone, Debug)]
struct Host {
    /// At most one of each family.
    interfaces: Vec<(Realm, IpAddr)>,
    link: Link,
}

impl Host {
    /// The interface that packets to `to` leave through.
    fn towards(&self, to: IpAddr) -> Option<(Realm, IpAddr)> {
        self.interfaces.iter().find(|(_, addr)| addr.is_ipv4() == to.is_ipv4()).copied()
    }
}

/// What becomes of a datagram that is longer than a link carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Oversize {
    /// It is lost, as with the DF bit.
    Lost,
    /// It travels in fragments.
    Fragmented,
}

/// How two hosts can reach each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// Directly, by what each can know.
    Direct,
    /// Directly, if somebody guesses a translator's port.
    ByGuessing,
    /// Through a relay at most.
    Relayed,
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct InFlight {
    due: Instant,
    seq: u64,
    realm: Realm,
    from: SocketAddr,
    to: SocketAddr,
    payload: Vec<u8>,
    oversize: Oversize,
}

/// Most datagrams in flight; more are lost, as in a full router.
pub const MAX_IN_FLIGHT: usize = 1 << 20;

/// The network between the hosts.
#[derive(Debug)]
pub struct Internet {
    hosts: Vec<Host>,
    nats: Vec<(Realm, Nat)>,
    owners: BTreeMap<(Realm, IpAddr), Owner>,
    in_flight: BinaryHeap<Reverse<InFlight>>,
    seq: u64,
    rng: ChaCha20Rng,
    /// Some host is in another region.
    spread: bool,
    /// Datagrams that no host got: lost on a link, filtered, or without a destination.
    pub lost: u64,
}

impl Internet {
    /// An empty internet; `seed` decides loss, jitter and ports.
    pub fn new(seed: u64) -> Self {
        Self {
            hosts: Vec::new(),
            nats: Vec::new(),
            owners: BTreeMap::new(),
            in_flight: BinaryHeap::new(),
            seq: 0,
            rng: ChaCha20Rng::seed_from_u64(seed),
            spread: false,
            lost: 0,
        }
    }

    /// Adds a translator with an outside address in `realm`.
    pub fn add_nat(&mut self, realm: Realm, outside: IpAddr, behaviour: NatBehaviour) -> NatId {
        let id = NatId(self.nats.len());
        self.nats.push((realm, Nat::new(behaviour, outside)));
        self.owners.insert((realm, outside), Owner::Nat(id));
        id
    }

    /// Adds a host with an address in `realm`.
    pub fn add_host(&mut self, realm: Realm, addr: IpAddr, link: Link) -> HostId {
        let id = HostId(self.hosts.len());
        self.spread |= link.position > Duration::ZERO;
        self.hosts.push(Host { interfaces: Vec::new(), link });
        self.set_interfaces(id, &[(realm, addr)]);
        id
    }

    /// The host's own addresses.
    pub fn addrs(&self, host: HostId) -> impl Iterator<Item = IpAddr> {
        self.hosts[host.0].interfaces.iter().map(|(_, addr)| *addr)
    }

    /// The networks it is in, with its address there.
    pub fn interfaces(&self, host: HostId) -> &[(Realm, IpAddr)] {
        &self.hosts[host.0].interfaces
    }

    /// Gives the host these interfaces, at most one of each family, and takes away all others.
    pub fn set_interfaces(&mut self, host: HostId, interfaces: &[(Realm, IpAddr)]) {
        for (realm, addr) in std::mem::take(&mut self.hosts[host.0].interfaces) {
            self.owners.remove(&(realm, addr));
        }
        for (realm, addr) in interfaces {
            self.owners.insert((*realm, *addr), Owner::Host(host));
        }
        self.hosts[host.0].interfaces = interfaces.to_vec();
    }

    /// Where the host is and how its translators behave, outermost last: for failure messages.
    pub fn describe(&self, host: HostId) -> String {
        let Host { interfaces, link } = &self.hosts[host.0];
        let mut out = format!("{link:?}");
        for (realm, addr) in interfaces {
            out.push_str(&format!(", {addr}"));
            let mut realm = *realm;
            while let Realm::Behind(id) = realm {
                let (outer, nat) = &self.nats[id.0];
                out.push_str(&format!(" behind {id:?} {:?} {:?}", nat.outside(), nat.behaviour));
                realm = *outer;
            }
        }
        out
    }

    /// The network on the translator's outside.
    pub fn realm_of(&self, nat: NatId) -> Realm {
        self.nats[nat.0].0
    }

    /// True if the host is behind that translator, however deep.
    pub fn is_behind(&self, host: HostId, nat: NatId) -> bool {
        self.hosts[host.0].interfaces.iter().any(|(realm, _)| {
            let mut realm = *realm;
            while let Realm::Behind(id) = realm {
                if id == nat {
                    return true;
                }
                realm = self.nats[id.0].0;
            }
            false
        })
    }

    /// One-way delay that lies between the regions of two hosts.
    pub fn distance(&self, a: HostId, b: HostId) -> Duration {
        self.hosts[a.0].link.position.abs_diff(self.hosts[b.0].link.position)
    }

    /// The host's link, to change it.
    pub fn link_mut(&mut self, host: HostId) -> &mut Link {
        &mut self.hosts[host.0].link
    }

    /// Whether UDP works for the host.
    pub fn has_udp(&self, host: HostId) -> bool {
        self.hosts[host.0].link.udp
    }

    /// Moves a host to another network, as roaming does.
    pub fn move_host(&mut self, host: HostId, realm: Realm, addr: IpAddr) {
        self.set_interfaces(host, &[(realm, addr)]);
    }

    /// Restarts a translator with another outside address.
    pub fn renumber_nat(&mut self, nat: NatId, outside: IpAddr) {
        let (realm, translator) = &mut self.nats[nat.0];
        self.owners.remove(&(*realm, translator.outside()));
        translator.renumber(outside);
        self.owners.insert((*realm, outside), Owner::Nat(nat));
    }

    /// Sends a datagram from `host`'s `port`.
    pub fn send(
        &mut self,
        now: Instant,
        host: HostId,
        port: u16,
        to: SocketAddr,
        payload: &[u8],
        oversize: Oversize,
    ) {
        let link = self.hosts[host.0].link;
        if !link.udp
            || !fits(link, to, payload.len(), oversize)
            || self.draw(1_000) < u64::from(link.loss_permille)
            || self.in_flight.len() >= MAX_IN_FLIGHT
        {
            self.lost += 1;
            return;
        }
        let way = self.hosts[host.0].towards(to.ip());
        let outside =
            way.and_then(|(realm, addr)| self.outwards(now, realm, SocketAddr::new(addr, port), to));
        let Some((realm, from)) = outside else {
            self.lost += 1;
            return;
        };
        let jitter = self.draw(u64::try_from(link.jitter.as_nanos()).unwrap_or(u64::MAX).saturating_add(1));
        let at = if self.spread { self.inwards(now, realm, from, to) } else { None };
        let distance = at.map_or(Duration::ZERO, |(at, _)| self.distance(host, at));
        let due = now + link.latency + distance + Duration::from_nanos(jitter);
        self.seq += 1;
        self.in_flight.push(Reverse(InFlight {
            due,
            seq: self.seq,
            realm,
            from,
            to,
            payload: payload.to_vec(),
            oversize,
        }));
    }

    /// When the next datagram arrives.
    pub fn next_arrival(&self) -> Option<Instant> {
        self.in_flight.peek().map(|Reverse(packet)| packet.due)
    }

    /// The next datagram that has arrived by `now`.
    pub fn poll_arrival(&mut self, now: Instant) -> Option<Arrival> {
        while self.next_arrival().is_some_and(|due| due <= now) {
            let Reverse(packet) = self.in_flight.pop()?;
            match self.inwards(packet.due, packet.realm, packet.from, packet.to) {
                Some((host, port))
                    if self.hosts[host.0].link.udp
                        && fits(
                            self.hosts[host.0].link,
                            packet.to,
                            packet.payload.len(),
                            packet.oversize,
                        ) =>
                {
                    return Some(Arrival { host, port, from: packet.from, payload: packet.payload });
                }
                _ => self.lost += 1,
            }
        }
        None
    }

    /// Walks out through translators until `to` belongs to somebody in the realm.
    fn outwards(
        &mut self,
        now: Instant,
        mut realm: Realm,
        mut from: SocketAddr,
        to: SocketAddr,
    ) -> Option<(Realm, SocketAddr)> {
        while !self.owners.contains_key(&(realm, to.ip())) {
            let Realm::Behind(id) = realm else { return None };
            let (outer, nat) = &mut self.nats[id.0];
            let hairpins = nat.behaviour.hairpin;
            from = nat.outbound(now, from, to, &mut self.rng);
            if to.ip() == nat.outside() && !hairpins {
                return None;
            }
            realm = *outer;
        }
        Some((realm, from))
    }

    /// Walks in through translators to the host.
    fn inwards(
        &self,
        now: Instant,
        mut realm: Realm,
        from: SocketAddr,
        mut to: SocketAddr,
    ) -> Option<(HostId, u16)> {
        loop {
            match self.owners.get(&(realm, to.ip()))? {
                Owner::Host(host) => return Some((*host, to.port())),
                Owner::Nat(id) => {
                    to = self.nats[id.0].1.inbound(now, from, to.port())?;
                    realm = Realm::Behind(*id);
                }
            }
        }
    }

    fn draw(&mut self, below: u64) -> u64 {
        if below <= 1 { 0 } else { self.rng.next_u64() % below }
    }

    /// The oracle: how `a` and `b` can exchange datagrams, if each tells the other its own addresses and those that
    /// `stun` servers see, and keeps answering whatever arrives. Plays that exchange on a copy of the translators,
    /// without time, loss or any of the product's code. As in ICE (RFC 8445), a path is a pair of addresses that
    /// works both ways: each end sends to where the other's packets come from.
    pub fn reach(&self, a: HostId, b: HostId, stun: &[SocketAddr]) -> Reach {
        if self.can_meet(a, b, stun, |behaviour| behaviour) {
            return Reach::Direct;
        }
        // Who guesses a port right gets what a translator with one mapping for all gives for free.
        let easy = |behaviour| NatBehaviour { mapping: Degree::EndpointIndependent, ..behaviour };
        if self.can_meet(a, b, stun, easy) { Reach::ByGuessing } else { Reach::Relayed }
    }

    fn can_meet(
        &self,
        a: HostId,
        b: HostId,
        stun: &[SocketAddr],
        change: impl Fn(NatBehaviour) -> NatBehaviour,
    ) -> bool {
        const PORT: u16 = 40_000;
        const ROUNDS: usize = 6;
        if !self.hosts[a.0].link.udp || !self.hosts[b.0].link.udp {
            return false;
        }
        let mut probe = Self::new(1);
        probe.nats = self
            .nats
            .iter()
            .map(|(realm, nat)| (*realm, Nat::new(change(nat.behaviour), nat.outside())))
            .collect();
        probe.owners.clone_from(&self.owners);
        let link = Link::default();
        probe.hosts = self.hosts.iter().map(|h| Host { interfaces: h.interfaces.clone(), link }).collect();
        let ends = [a, b];
        let mut known: [Vec<SocketAddr>; 2] = Default::default();
        let mut heard: [Vec<(SocketAddr, SocketAddr)>; 2] = Default::default();
        for (i, host) in ends.iter().enumerate() {
            let interfaces = probe.interfaces(*host).to_vec();
            let own = interfaces.iter().map(|(_, addr)| SocketAddr::new(*addr, PORT));
            known[1 - i] = own.collect();
            for server in stun {
                known[1 - i].extend(probe.played(*host, PORT, *server).map(|(_, from)| from));
            }
        }
        for _ in 0..ROUNDS {
            for i in [0, 1] {
                for to in known[i].clone() {
                    let Some((realm, from)) = probe.played(ends[i], PORT, to) else { continue };
                    let arrived = probe.inwards(Instant::ZERO, realm, from, to);
                    if arrived == Some((ends[1 - i], PORT)) {
                        heard[i].push((to, from));
                        if !known[1 - i].contains(&from) {
                            known[1 - i].push(from);
                        }
                    }
                }
            }
        }
        heard[0].iter().any(|(to, from)| heard[1].contains(&(*from, *to)))
    }

    /// Where a datagram from the host's port goes, and as what.
    fn played(&mut self, host: HostId, port: u16, to: SocketAddr) -> Option<(Realm, SocketAddr)> {
        let (realm, addr) = self.hosts[host.0].towards(to.ip())?;
        self.outwards(Instant::ZERO, realm, SocketAddr::new(addr, port), to)
    }
}

/// True if the link carries a datagram of so many bytes.
fn fits(link: Link, to: SocketAddr, payload: usize, oversize: Oversize) -> bool {
    let headers = if to.is_ipv4() { 28 } else { 48 };
    oversize == Oversize::Fragmented && link.fragments || payload + headers <= link.mtu
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::nat::Allocation;

    const STUN: &str = "198.51.100.1:3478";

    fn behaviour(mapping: Degree, filtering: Degree) -> NatBehaviour {
        let (allocation, timeout) = (Allocation::Preserving, Duration::from_secs(60));
        NatBehaviour { mapping, allocation, filtering, timeout, hairpin: false }
    }

    fn world(nats: [Option<NatBehaviour>; 2]) -> (Internet, [HostId; 2]) {
        let mut net = Internet::new(3);
        net.add_host(Realm::Public, "198.51.100.1".parse().unwrap(), Link::default());
        let hosts = [0u8, 1].map(|i| match nats[usize::from(i)] {
            None => net.add_host(Realm::Public, [203, 0, 113, 10 + i].into(), Link::default()),
            Some(b) => {
                let nat = net.add_nat(Realm::Public, [203, 0, 113, 100 + i].into(), b);
                net.add_host(Realm::Behind(nat), [192, 168, 1, 2].into(), Link::default())
            }
        });
        (net, hosts)
    }

    /// What theory says about hole punching, for the pairs everybody knows.
    #[test]
    fn the_oracle_agrees_with_theory() {
        use Degree::{AddressAndPortDependent as Apd, AddressDependent as Ad, EndpointIndependent as Ei};
        let (cone, addr, port, sym) =
            (behaviour(Ei, Ei), behaviour(Ei, Ad), behaviour(Ei, Apd), behaviour(Apd, Apd));
        for (a, b, expected) in [
            (None, None, Reach::Direct),
            (None, Some(sym), Reach::Direct),
            (Some(cone), Some(sym), Reach::Direct),
            (Some(addr), Some(sym), Reach::Direct),
            (Some(port), Some(port), Reach::Direct),
            (Some(port), Some(sym), Reach::ByGuessing),
            (Some(sym), Some(sym), Reach::ByGuessing),
        ] {
            let (mut net, [x, y]) = world([a, b]);
            let stun = [STUN.parse().unwrap()];
            assert_eq!(net.reach(x, y, &stun), expected, "{a:?} {b:?}");
            assert_eq!(net.reach(y, x, &stun), expected, "{b:?} {a:?}");
            net.link_mut(x).udp = false;
            assert_eq!(net.reach(x, y, &stun), Reach::Relayed);
        }
    }

    #[test]
    fn hosts_with_one_family_each_meet_only_in_that_family() {
        let (mut net, [x, y]) = world([None, None]);
        let v6 = |n: u16| (Realm::Public, IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, n]));
        net.set_interfaces(x, &[v6(1)]);
        let reach = |net: &Internet| net.reach(x, y, &[STUN.parse().unwrap()]);
        assert_eq!(reach(&net), Reach::Relayed);
        let v4 = net.interfaces(y)[0];
        net.set_interfaces(y, &[v4, v6(2)]);
        assert_eq!(reach(&net), Reach::Direct);
        let to = SocketAddr::new(v6(2).1, 9);
        net.send(Instant::ZERO, x, 7, to, b"hi", Oversize::Lost);
        let got = net.poll_arrival(Instant::FAR_FUTURE).unwrap();
        assert_eq!((got.host, got.from), (y, SocketAddr::new(v6(1).1, 7)));
    }

    #[test]
    fn a_short_link_loses_long_datagrams_unless_they_may_be_cut() {
        let (mut net, [x, y]) = world([None, None]);
        net.link_mut(y).mtu = 1_280;
        let to = SocketAddr::new(net.addrs(y).next().unwrap(), 9);
        let mut arrives = |len: usize, oversize| {
            net.send(Instant::ZERO, x, 7, to, &vec![0; len], oversize);
            net.poll_arrival(Instant::FAR_FUTURE).is_some()
        };
        assert!(arrives(1_252, Oversize::Lost) && !arrives(1_253, Oversize::Lost));
        assert!(arrives(1_253, Oversize::Fragmented));
        net.link_mut(y).fragments = false;
        net.send(Instant::ZERO, x, 7, to, &[0; 1_253], Oversize::Fragmented);
        assert!(net.poll_arrival(Instant::FAR_FUTURE).is_none());
    }

    #[test]
    fn datagrams_cross_two_translators_and_back() {
        let b = behaviour(Degree::EndpointIndependent, Degree::AddressAndPortDependent);
        let mut net = Internet::new(1);
        let server = net.add_host(Realm::Public, "198.51.100.1".parse().unwrap(), Link::default());
        let carrier = net.add_nat(Realm::Public, "203.0.113.1".parse().unwrap(), b);
        let home = net.add_nat(Realm::Behind(carrier), "100.64.0.2".parse().unwrap(), b);
        let host = net.add_host(Realm::Behind(home), "192.168.1.2".parse().unwrap(), Link::default());
        net.send(Instant::ZERO, host, 5000, STUN.parse().unwrap(), b"hi", Oversize::Lost);
        let at = net.next_arrival().unwrap();
        let got = net.poll_arrival(at).unwrap();
        assert_eq!(
            (got.host, got.from.ip(), got.payload.as_slice()),
            (server, "203.0.113.1".parse().unwrap(), &b"hi"[..])
        );
        net.send(at, server, 3478, got.from, b"yo", Oversize::Lost);
        let at = net.next_arrival().unwrap();
        let back = net.poll_arrival(at).unwrap();
        assert_eq!((back.host, back.port, back.from), (host, 5000, STUN.parse().unwrap()));
        // Nobody else gets in.
        net.send(at, server, 3479, got.from, b"no", Oversize::Lost);
        assert_eq!(net.poll_arrival(Instant::FAR_FUTURE), None);
        assert_eq!(net.lost, 1);
    }

    #[test]
    fn neighbours_meet_on_their_lan_and_hairpin_only_where_it_works() {
        for hairpin in [false, true] {
            let mut b = behaviour(Degree::EndpointIndependent, Degree::EndpointIndependent);
            b.hairpin = hairpin;
            let mut net = Internet::new(1);
            net.add_host(Realm::Public, "198.51.100.1".parse().unwrap(), Link::default());
            let nat = net.add_nat(Realm::Public, "203.0.113.1".parse().unwrap(), b);
            let x = net.add_host(Realm::Behind(nat), "192.168.1.2".parse().unwrap(), Link::default());
            let y = net.add_host(Realm::Behind(nat), "192.168.1.3".parse().unwrap(), Link::default());
            net.send(Instant::ZERO, x, 1, "192.168.1.3:2".parse().unwrap(), b"lan", Oversize::Lost);
            assert_eq!(net.poll_arrival(Instant::FAR_FUTURE).map(|a| a.host), Some(y));
            net.send(Instant::ZERO, y, 2, STUN.parse().unwrap(), b"open", Oversize::Lost);
            net.poll_arrival(Instant::FAR_FUTURE).unwrap();
            net.send(Instant::ZERO, x, 1, "203.0.113.1:2".parse().unwrap(), b"hairpin", Oversize::Lost);
            assert_eq!(net.poll_arrival(Instant::FAR_FUTURE).is_some(), hairpin);
        }
    }
}
