//! A network address translator by RFC 4787's axes: mapping, filtering, expiry and hairpinning.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use rand_chacha::ChaCha20Rng;
use rand_core::RngCore;
use warren_common::time::Instant;

/// RFC 4787's three degrees, for mapping (section 4.1) as for filtering (section 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Degree {
    /// The remote end does not matter.
    EndpointIndependent,
    /// The remote address matters.
    AddressDependent,
    /// The remote address and port matter.
    AddressAndPortDependent,
}

impl Degree {
    /// All three.
    pub const ALL: [Self; 3] =
        [Self::EndpointIndependent, Self::AddressDependent, Self::AddressAndPortDependent];

    /// The part of `remote` that matters.
    fn key(self, remote: SocketAddr) -> (Option<IpAddr>, Option<u16>) {
        match self {
            Self::EndpointIndependent => (None, None),
            Self::AddressDependent => (Some(remote.ip()), None),
            Self::AddressAndPortDependent => (Some(remote.ip()), Some(remote.port())),
        }
    }
}

/// How a translator picks the outside port of a new mapping (RFC 4787 section 4.2 knows the first).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Allocation {
    /// The inside port where it is free, or else the next free one above it.
    Preserving,
    /// The one after the last.
    Sequential,
    /// Any.
    Random,
}

impl Allocation {
    /// All three.
    pub const ALL: [Self; 3] = [Self::Preserving, Self::Sequential, Self::Random];
}

/// How a translator behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NatBehaviour {
    /// When one inside endpoint gets another outside port.
    pub mapping: Degree,
    /// Which port that is.
    pub allocation: Allocation,
    /// Who may answer.
    pub filtering: Degree,
    /// How long a mapping lives after the last packet from inside.
    pub timeout: Duration,
    /// Whether inside hosts reach each other by their outside addresses.
    pub hairpin: bool,
}

impl NatBehaviour {
    /// Between two of these only luck or a relay helps.
    pub const HARD: Self = Self {
        mapping: Degree::AddressAndPortDependent,
        allocation: Allocation::Random,
        filtering: Degree::AddressAndPortDependent,
        timeout: Duration::from_secs(60),
        hairpin: false,
    };
}

/// Ports below this are not handed out.
const FIRST_PORT: u16 = 1_024;
/// Most mappings at once; the oldest goes first, as in a real router's table.
pub const MAX_MAPPINGS: usize = 4_096;

type Remote = (Option<IpAddr>, Option<u16>);

#[derive(Clone, Debug)]
struct Mapping {
    inside: SocketAddr,
    remote: Remote,
    last_out: Instant,
    permitted: BTreeMap<Remote, Instant>,
}

/// One translator.
#[derive(Clone, Debug)]
pub struct Nat {
    /// How it behaves.
    pub behaviour: NatBehaviour,
    outside: IpAddr,
    by_port: BTreeMap<u16, Mapping>,
    by_inside: BTreeMap<(SocketAddr, Remote), u16>,
    last_port: u16,
}

impl Nat {
    /// A translator that shows `outside` to the world.
    pub fn new(behaviour: NatBehaviour, outside: IpAddr) -> Self {
        Self {
            behaviour,
            outside,
            by_port: BTreeMap::new(),
            by_inside: BTreeMap::new(),
            last_port: FIRST_PORT,
        }
    }

    /// Its outside address.
    pub fn outside(&self) -> IpAddr {
        self.outside
    }

    /// Restarts it with another outside address: every mapping is lost.
    pub fn renumber(&mut self, outside: IpAddr) {
        self.outside = outside;
        self.by_port.clear();
        self.by_inside.clear();
    }

    /// Translates a packet from inside: the source the world sees.
    pub fn outbound(
        &mut self,
        now: Instant,
        inside: SocketAddr,
        remote: SocketAddr,
        rng: &mut ChaCha20Rng,
    ) -> SocketAddr {
        let key = self.behaviour.mapping.key(remote);
        let live = self.by_inside.get(&(inside, key)).copied().filter(|port| self.is_live(*port, now));
        let port = match live {
            Some(port) => port,
            None => self.open(now, inside, key, rng),
        };
        if let Some(mapping) = self.by_port.get_mut(&port) {
            mapping.last_out = now;
            mapping.permitted.insert(self.behaviour.filtering.key(remote), now);
        }
        SocketAddr::new(self.outside, port)
    }

    /// Translates a packet from the world to `port`: the inside endpoint it goes to, if it may pass.
    pub fn inbound(&self, now: Instant, remote: SocketAddr, port: u16) -> Option<SocketAddr> {
        let mapping = self.by_port.get(&port).filter(|_| self.is_live(port, now))?;
        let permitted = mapping.permitted.get(&self.behaviour.filtering.key(remote))?;
        (now.since(*permitted) <= self.behaviour.timeout).then_some(mapping.inside)
    }

    fn is_live(&self, port: u16, now: Instant) -> bool {
        self.by_port.get(&port).is_some_and(|m| now.since(m.last_out) <= self.behaviour.timeout)
    }

    fn open(&mut self, now: Instant, inside: SocketAddr, remote: Remote, rng: &mut ChaCha20Rng) -> u16 {
        let timeout = self.behaviour.timeout;
        self.by_port.retain(|_, m| now.since(m.last_out) <= timeout);
        if self.by_port.len() >= MAX_MAPPINGS
            && let Some(oldest) = self.by_port.iter().min_by_key(|(_, m)| m.last_out).map(|(port, _)| *port)
        {
            self.by_port.remove(&oldest);
        }
        self.by_inside.retain(|_, port| self.by_port.contains_key(port));
        let mut port = match self.behaviour.allocation {
            Allocation::Preserving => inside.port(),
            Allocation::Sequential => self.last_port.wrapping_add(1),
            Allocation::Random => rng.next_u32() as u16,
        };
        while self.by_port.contains_key(&port) || port < FIRST_PORT && port != inside.port() {
            port = match self.behaviour.allocation {
                Allocation::Random => rng.next_u32() as u16,
                Allocation::Preserving | Allocation::Sequential => port.wrapping_add(1).max(FIRST_PORT),
            };
        }
        self.last_port = port;
        self.by_port.insert(port, Mapping { inside, remote, last_out: now, permitted: BTreeMap::new() });
        self.by_inside.insert((inside, remote), port);
        debug_assert!(self.by_port[&port].remote == remote);
        port
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand_core::SeedableRng;

    fn addr(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn nat(mapping: Degree, filtering: Degree) -> (Nat, ChaCha20Rng) {
        let (allocation, timeout) = (Allocation::Random, Duration::from_secs(30));
        let behaviour = NatBehaviour { mapping, allocation, filtering, timeout, hairpin: false };
        (Nat::new(behaviour, "203.0.113.1".parse().unwrap()), ChaCha20Rng::seed_from_u64(1))
    }

    #[test]
    fn mappings_depend_on_what_their_degree_says() {
        let inside = addr("10.0.0.2:4000");
        for (degree, other_ip, other_port) in [
            (Degree::EndpointIndependent, true, true),
            (Degree::AddressDependent, false, true),
            (Degree::AddressAndPortDependent, false, false),
        ] {
            let (mut nat, mut rng) = nat(degree, Degree::EndpointIndependent);
            let mut out = |to: &str| nat.outbound(Instant::ZERO, inside, addr(to), &mut rng);
            let first = out("198.51.100.1:1");
            assert_eq!(first, out("198.51.100.1:1"));
            assert_eq!(first == out("198.51.100.2:1"), other_ip, "{degree:?}");
            assert_eq!(first == out("198.51.100.1:2"), other_port, "{degree:?}");
        }
    }

    #[test]
    fn ports_are_given_out_as_the_allocation_says() {
        for allocation in Allocation::ALL {
            let (mut nat, mut rng) = nat(Degree::AddressDependent, Degree::EndpointIndependent);
            nat.behaviour.allocation = allocation;
            let inside = addr("10.0.0.2:4000");
            let ports: Vec<u16> = (1..6u8)
                .map(|n| {
                    let to = SocketAddr::from(([198, 51, 100, n], 1));
                    nat.outbound(Instant::ZERO, inside, to, &mut rng).port()
                })
                .collect();
            let in_a_row = ports.windows(2).all(|two| two[1] == two[0] + 1);
            assert_eq!(in_a_row, allocation != Allocation::Random, "{allocation:?} {ports:?}");
            assert_eq!(ports[0] == inside.port(), allocation == Allocation::Preserving);
        }
    }

    #[test]
    fn answers_pass_by_what_the_filter_says() {
        for (degree, other_port, other_ip) in [
            (Degree::EndpointIndependent, true, true),
            (Degree::AddressDependent, true, false),
            (Degree::AddressAndPortDependent, false, false),
        ] {
            let (mut nat, mut rng) = nat(Degree::EndpointIndependent, degree);
            let inside = addr("10.0.0.2:4000");
            let port = nat.outbound(Instant::ZERO, inside, addr("198.51.100.1:1"), &mut rng).port();
            let passes = |from: &str| nat.inbound(Instant::ZERO, addr(from), port) == Some(inside);
            assert!(passes("198.51.100.1:1"));
            assert_eq!(passes("198.51.100.1:2"), other_port, "{degree:?}");
            assert_eq!(passes("198.51.100.2:1"), other_ip, "{degree:?}");
            assert_eq!(nat.inbound(Instant::ZERO, addr("198.51.100.1:1"), port ^ 1), None);
        }
    }

    #[test]
    fn only_packets_from_inside_keep_a_mapping() {
        let (mut nat, mut rng) = nat(Degree::EndpointIndependent, Degree::EndpointIndependent);
        let (inside, remote) = (addr("10.0.0.2:4000"), addr("198.51.100.1:1"));
        let port = nat.outbound(Instant::ZERO, inside, remote, &mut rng).port();
        let at = |s| Instant::ZERO + Duration::from_secs(s);
        assert!(nat.inbound(at(30), remote, port).is_some());
        assert!(nat.inbound(at(31), remote, port).is_none());
        nat.outbound(at(29), inside, remote, &mut rng);
        assert!(nat.inbound(at(59), remote, port).is_some());
        nat.renumber("203.0.113.9".parse().unwrap());
        assert!(nat.inbound(at(59), remote, port).is_none());
    }

    #[test]
    fn the_table_is_bounded() {
        let (mut nat, mut rng) = nat(Degree::AddressAndPortDependent, Degree::EndpointIndependent);
        for i in 0..=MAX_MAPPINGS as u16 + 10 {
            nat.outbound(
                Instant::ZERO,
                addr("10.0.0.2:4000"),
                SocketAddr::new("198.51.100.1".parse().unwrap(), i),
                &mut rng,
            );
        }
        assert!(nat.by_port.len() <= MAX_MAPPINGS && nat.by_inside.len() <= MAX_MAPPINGS);
    }
}
