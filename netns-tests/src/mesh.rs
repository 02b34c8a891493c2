//! Machines in every kind of place, in one network: which pairs of them can meet directly, and how soon they do.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use crate::lab::{
    Egress, Host, Lab, Link, NatKind, Process, Refusal, Router, RouterSpec, Stopwatch, eventually,
};
use crate::office::{self, HttpProxy};
use crate::programs::{Agent, CONTROL, Coordinator, RELAY, Relay};

/// Bound for what must happen; only a failing run waits this long.
const LIMIT: Duration = Duration::from_secs(60);

/// Everybody may reach everybody.
const POLICY: &str = r#"{
  "tagOwners": {"tag:all": []},
  "grants": [{"src": ["tag:all"], "dst": ["tag:all"], "ip": ["*"]}],
}"#;

/// What is between a machine and the internet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// Nothing; both families.
    Public,
    /// A NAT that maps and filters independently of who is talked with ("full cone").
    EndpointIndependent,
    /// A NAT that lets in who was sent to, from any port.
    AddressRestricted,
    /// A NAT that lets in exactly who was sent to: the usual home router.
    PortRestricted,
    /// A NAT with a random port for each destination.
    Symmetric,
    /// A home router behind a carrier's, both port-restricted.
    DoubleNat,
    /// A firewall that lets out TCP only.
    UdpBlocked,
    /// A firewall that lets nothing out but what an HTTP proxy connects.
    ProxyOnly,
    /// No IPv4 at all, and nothing in between.
    Ipv6Only,
}

/// Which path a pair is to end up with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// There is a direct one.
    Direct,
    /// There is none.
    Relay,
}

impl Expected {
    /// As `warren status` says it.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Relay => "relay",
        }
    }
}

impl Place {
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

    /// For tables.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Public => "public",
            Self::EndpointIndependent => "endpoint-independent",
            Self::AddressRestricted => "address-restricted",
            Self::PortRestricted => "port-restricted",
            Self::Symmetric => "symmetric",
            Self::DoubleNat => "double NAT",
            Self::UdpBlocked => "UDP blocked",
            Self::ProxyOnly => "HTTP proxy only",
            Self::Ipv6Only => "IPv6 only",
        }
    }

    /// For names of hosts.
    const fn short(self) -> &'static str {
        match self {
            Self::Public => "pub",
            Self::EndpointIndependent => "ei",
            Self::AddressRestricted => "ar",
            Self::PortRestricted => "pr",
            Self::Symmetric => "sym",
            Self::DoubleNat => "dbl",
            Self::UdpBlocked => "tcp",
            Self::ProxyOnly => "web",
            Self::Ipv6Only => "v6",
        }
    }

    const fn has_ipv6(self) -> bool {
        matches!(self, Self::Public | Self::Ipv6Only)
    }

    const fn has_ipv4(self) -> bool {
        !matches!(self, Self::Ipv6Only)
    }

    /// What theory says of a pair: whether packets that both send can meet.
    pub fn expected(self, other: Self) -> Expected {
        let (one, two) = if self <= other { (self, other) } else { (other, self) };
        let same_family = (one.has_ipv4() && two.has_ipv4()) || (one.has_ipv6() && two.has_ipv6());
        let strict = |place| matches!(place, Self::PortRestricted | Self::Symmetric | Self::DoubleNat);
        // A symmetric NAT's port for the peer is one that nobody was told: the peer must let in any port.
        let unknown_port = (one == Self::Symmetric && strict(two)) || (two == Self::Symmetric && strict(one));
        let blocked = [one, two].iter().any(|place| matches!(place, Self::UdpBlocked | Self::ProxyOnly));
        if same_family && !unknown_port && !blocked { Expected::Direct } else { Expected::Relay }
    }

    /// True if the pair may become direct although nobody knows how: one end guesses the port of the other end's symmetric NAT.
    pub fn may_be_guessed(self, other: Self) -> bool {
        let strict = |place| matches!(place, Self::PortRestricted | Self::DoubleNat);
        self == Self::Symmetric && strict(other) || other == Self::Symmetric && strict(self)
    }
}

/// A machine that has joined.
#[derive(Debug)]
pub struct Site {
    /// Where it is.
    pub place: Place,
    /// Its agent.
    pub agent: Agent,
    /// What is in front of it, the nearest first.
    pub routers: Vec<Router>,
    _proxy: Option<Process>,
}

impl Site {
    /// Its name in the network.
    pub fn name(&self) -> &str {
        self.agent.host.name()
    }
}

/// A coordinator and a relay that both speak IPv4 and IPv6.
#[derive(Debug)]
pub struct World<'a> {
    lab: &'a Lab,
    coordinator: Coordinator,
    _relay: Relay,
}

impl<'a> World<'a> {
    /// Starts both.
    ///
    /// # Errors
    /// One does not come to serve.
    pub fn new(lab: &'a Lab) -> Result<Self> {
        let coordinator = Coordinator::start_dual_stack(lab.host("coord")?, POLICY)?;
        let relay = Relay::start(lab.host("relay")?, &coordinator, "fra")?;
        Ok(Self { lab, coordinator, _relay: relay })
    }

    /// A machine in this place, number `n` of that kind, whose way out is `link`, and which has joined.
    ///
    /// # Errors
    /// A command fails, or it can't join.
    pub fn join(&self, place: Place, n: usize, link: Option<Link>) -> Result<Site> {
        let name = format!("{}{n}", place.short());
        let lab = self.lab;
        let routed = |spec: RouterSpec| -> Result<(Host, Vec<Router>)> {
            let spec = match link {
                Some(link) => spec.link(link),
                None => spec,
            };
            let router = lab.router(&format!("{name}R"), spec)?;
            Ok((router.host(&name)?, vec![router]))
        };
        let direct = || match link {
            Some(link) => lab.internet().host_over(&name, link),
            None => lab.host(&name),
        };
        let (host, routers) = match place {
            Place::Public => (direct()?, Vec::new()),
            Place::EndpointIndependent => routed(RouterSpec::new(NatKind::FullCone))?,
            Place::AddressRestricted => routed(RouterSpec::new(NatKind::AddressRestricted))?,
            Place::PortRestricted => routed(RouterSpec::new(NatKind::PortRestricted))?,
            Place::Symmetric => routed(RouterSpec::new(NatKind::Symmetric))?,
            Place::UdpBlocked => {
                let egress = Egress::TcpOnly { ports: Vec::new(), refusal: Refusal::Drop };
                routed(RouterSpec::new(NatKind::PortRestricted).egress(egress))?
            }
            Place::ProxyOnly => routed(office::router())?,
            Place::DoubleNat => {
                let carrier = RouterSpec::new(NatKind::PortRestricted).lan("10.64.0.0/16".parse()?);
                let carrier = match link {
                    Some(link) => carrier.link(link),
                    None => carrier,
                };
                let carrier = lab.router(&format!("{name}C"), carrier)?;
                let home = carrier.router(&format!("{name}H"), RouterSpec::new(NatKind::PortRestricted))?;
                (home.host(&name)?, vec![home, carrier])
            }
            Place::Ipv6Only => {
                let host = direct()?;
                host.ip("addr flush dev eth0 to 0.0.0.0/0")?;
                (host, Vec::new())
            }
        };
        let proxy = match (place, routers.first()) {
            (Place::ProxyOnly, Some(router)) => {
                host.set_env("HTTPS_PROXY", &office::url(router, "")?);
                Some(HttpProxy { credentials: None, ports: &[CONTROL, RELAY] }.start(router)?)
            }
            _ => None,
        };
        let agent = Agent::start(host)?;
        let url = if place.has_ipv4() { self.coordinator.url.clone() } else { self.coordinator.url_v6()? };
        agent.up(&url, &self.coordinator.auth_key("tag:all")?)?;
        Ok(Site { place, agent, routers, _proxy: proxy })
    }
}

/// How soon a pair got somewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// From the first packet to its answer.
    pub first_byte: Duration,
    /// From the first packet until both ends send directly; `None` if they are to use a relay.
    pub direct: Option<Duration>,
}

/// Has two machines that know nothing of each other's whereabouts meet: both agents and the NATs in front of them
/// start anew, and then one pings the other.
///
/// # Errors
/// They don't end up with the path that is expected of them.
pub fn meet(from: &mut Site, to: &mut Site) -> Result<Timing> {
    for site in [&mut *from, &mut *to] {
        site.agent.process.stop(LIMIT)?;
        site.agent.forget_paths()?;
        for router in &site.routers {
            router.restart()?;
        }
    }
    for site in [&mut *from, &mut *to] {
        site.agent.start_again()?;
    }
    for (site, peer) in [(&*from, &*to), (&*to, &*from)] {
        site.agent.wait_until_connected()?;
        site.agent.wait_until_relayed()?;
        eventually(&format!("{} knows {}", site.name(), peer.name()), LIMIT, || {
            Ok((site.agent.peer(peer.name())?["online"] == true).then_some(()))
        })?;
    }
    let kind = from.place.expected(to.place).word();
    let ip: IpAddr = *to.agent.addresses()?.first().context("it has an address")?;
    let watch = Stopwatch::start();
    // With a deadline it goes on until one is answered: cables may lose the first.
    let ping = from.agent.host.run("ping", &["-n", "-c", "1", "-i", "0.2", "-w", "30", &ip.to_string()])?;
    let first_byte = watch.elapsed();
    ensure!(ping.status.success(), "{} got no answer from {}", from.name(), to.name());
    eventually(&format!("{} and {} meet over {kind}", from.name(), to.name()), LIMIT, || {
        let there = from.agent.peer(to.name())?["path"]["kind"] == kind;
        Ok((there && to.agent.peer(from.name())?["path"]["kind"] == kind).then_some(()))
    })?;
    Ok(Timing { first_byte, direct: (kind == "direct").then(|| watch.elapsed()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_theory_says() {
        use Expected::{Direct, Relay};
        use Place::*;
        for (one, other, expected) in [
            (Public, Symmetric, Direct),
            (Symmetric, AddressRestricted, Direct),
            (Symmetric, PortRestricted, Relay),
            (Symmetric, Symmetric, Relay),
            (DoubleNat, PortRestricted, Direct),
            (DoubleNat, Symmetric, Relay),
            (UdpBlocked, Public, Relay),
            (ProxyOnly, Public, Relay),
            (ProxyOnly, ProxyOnly, Relay),
            (Ipv6Only, Public, Direct),
            (Ipv6Only, Ipv6Only, Direct),
            (Ipv6Only, EndpointIndependent, Relay),
        ] {
            assert_eq!((one.expected(other), other.expected(one)), (expected, expected), "{one:?} {other:?}");
            assert!(!one.may_be_guessed(other) || expected == Relay, "{one:?} {other:?}");
        }
        assert!(Symmetric.may_be_guessed(PortRestricted) && !Symmetric.may_be_guessed(Symmetric));
    }
}
