//! NAT routers with a stated behaviour, made of nftables rules.
//!
//! The words are those of RFC 4787. Mapping is endpoint-independent for all kinds but
//! [`NatKind::Symmetric`]: the kernel keeps the source port where it can. One limit of the model, which
//! Linux home routers share: when two LAN hosts use one source port, the second may get a mapping per
//! destination.
//!
//! Full-cone and address-restricted filtering need memory that the kernel's own NAT lacks: a map from
//! outside port to inside socket, learnt from outgoing packets, and for address-restricted a set of
//! (outside port, remote address) pairs. Unsolicited packets that no rule lets in are dropped in `input`
//! *silently*: if they were answered or kept, their conntrack entry would occupy the port and the next
//! outgoing packet would get another one, which turns hole punching into a lottery.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::ops::Deref;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use ipnet::{Ipv4Net, Ipv6Net};

use super::{Host, Link, Segment, netns};

/// How long a mapping of idle UDP lives unless a test says otherwise: RFC 4787's recommendation.
const DEFAULT_UDP_TIMEOUT: Duration = Duration::from_secs(300);

/// Most mappings that a router remembers; a lab has a handful of hosts.
const MAX_MAPPINGS: u32 = 4_096;

/// Before the router's own chains: what is mapped on request comes first. What it lets in passes the firewall as
/// translated traffic.
const PORT_MAPPING: &str = "table inet upnp {
 chain forward { }
 chain prerouting { }
 chain postrouting { }
 chain on_forward { type filter hook forward priority -5; jump forward; }
 chain on_prerouting { type nat hook prerouting priority dstnat - 1; jump prerouting; }
 chain on_postrouting { type nat hook postrouting priority srcnat - 1; jump postrouting; }
}
";

/// The behaviour of a router's NAT: mapping, then filtering.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum NatKind {
    /// Endpoint-independent mapping and filtering: who knows the outside address gets in.
    FullCone,
    /// Endpoint-independent mapping, address-dependent filtering: in gets any port of an address that
    /// was sent to.
    AddressRestricted,
    /// Endpoint-independent mapping, address-and-port-dependent filtering: the usual home router.
    PortRestricted,
    /// Address-and-port-dependent mapping and filtering: a random outside port per destination.
    Symmetric,
}

/// What the router lets out of its LAN.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Egress {
    /// Everything.
    #[default]
    Open,
    /// Only TCP, and of it only these ports; all TCP when the list is empty.
    TcpOnly {
        /// Destination ports.
        ports: Vec<u16>,
        /// What happens to the rest.
        refusal: Refusal,
    },
    /// Nothing. What runs on the router itself gets out.
    Closed {
        /// What happens to it.
        refusal: Refusal,
    },
}

/// How a refused packet is treated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Vanishes without a word.
    Drop,
    /// Answered with ICMP "administratively prohibited".
    Reject,
}

/// How a router behaves; change it at run time with [`Router::reconfigure`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouterSpec {
    nat: NatKind,
    lan: Option<Ipv4Net>,
    ipv6: bool,
    hairpin: bool,
    port_mapping: bool,
    link: Option<Link>,
    udp_timeout: Duration,
    egress: Egress,
}

impl RouterSpec {
    /// A router with this NAT, a LAN subnet of its own in 192.168.0.0/16, no IPv6, no hairpinning,
    /// everything allowed out.
    pub fn new(nat: NatKind) -> Self {
        Self {
            nat,
            lan: None,
            ipv6: false,
            hairpin: false,
            port_mapping: false,
            link: None,
            udp_timeout: DEFAULT_UDP_TIMEOUT,
            egress: Egress::Open,
        }
    }

    /// The LAN's subnet, for instance the same one as behind another router, or 100.64.0.0/10 for a
    /// carrier's NAT. Fixed once the router is made.
    #[must_use]
    pub fn lan(mut self, subnet: Ipv4Net) -> Self {
        self.lan = Some(subnet);
        self
    }

    /// Gives the LAN a public IPv6 prefix behind a stateful firewall that lets nothing unsolicited in.
    /// Only for a router on the internet itself. Fixed once the router is made.
    #[must_use]
    pub fn ipv6(mut self) -> Self {
        self.ipv6 = true;
        self
    }

    /// LAN hosts reach each other by their outside addresses.
    #[must_use]
    pub fn hairpin(mut self) -> Self {
        self.hairpin = true;
        self
    }

    /// Has empty chains in a table `inet upnp`, for a miniupnpd to fill: `forward`, `prerouting`, `postrouting`.
    #[must_use]
    pub fn port_mapping(mut self) -> Self {
        self.port_mapping = true;
        self
    }

    /// Its outside is a cable with delay, jitter or loss. Fixed once the router is made.
    #[must_use]
    pub fn link(mut self, link: Link) -> Self {
        self.link = Some(link);
        self
    }

    /// How long an idle UDP mapping lives. Whole seconds, at least 1.
    #[must_use]
    pub fn udp_timeout(mut self, timeout: Duration) -> Self {
        self.udp_timeout = timeout;
        self
    }

    /// What is let out.
    #[must_use]
    pub fn egress(mut self, egress: Egress) -> Self {
        self.egress = egress;
        self
    }

    /// The whole ruleset for a router whose outside address is `wan`.
    fn rules(&self, wan: Ipv4Addr) -> String {
        let mut rules = String::from("flush ruleset\n");
        self.nat_rules(wan, &mut rules);
        self.firewall_rules(&mut rules);
        if self.port_mapping {
            rules += PORT_MAPPING;
        }
        rules
    }

    fn nat_rules(&self, wan: Ipv4Addr, rules: &mut String) {
        let timeout = self.udp_timeout.as_secs();
        let to_learnt = "dnat ip to udp dport map @mapping";
        let (inbound, masquerade) = match self.nat {
            NatKind::FullCone => (format!("iifname wan meta l4proto udp {to_learnt}"), "masquerade"),
            NatKind::AddressRestricted => (
                format!("iifname wan meta l4proto udp udp dport . ip saddr @permitted {to_learnt}"),
                "masquerade",
            ),
            NatKind::PortRestricted => (String::new(), "masquerade"),
            NatKind::Symmetric => (String::new(), "masquerade random,fully-random"),
        };
        let (hairpin_in, hairpin_out) = if self.hairpin {
            (
                format!("iifname lan ip daddr {wan} meta l4proto udp {to_learnt}"),
                format!("iifname lan oifname lan ct status dnat snat to {wan}"),
            )
        } else {
            (String::new(), String::new())
        };
        // Learning comes after source NAT (100): there `udp sport` is the outside port. Only packets of
        // flows begun inside teach a mapping.
        *rules += &format!(
            "table ip nat {{
 map mapping {{ type inet_service : ipv4_addr . inet_service; flags dynamic,timeout; timeout {timeout}s; size {MAX_MAPPINGS}; }}
 set permitted {{ type inet_service . ipv4_addr; flags dynamic,timeout; timeout {timeout}s; size {MAX_MAPPINGS}; }}
 chain before {{ type nat hook prerouting priority dstnat;
  {inbound}
  {hairpin_in}
 }}
 chain hairpin {{ type nat hook postrouting priority 90;
  {hairpin_out}
 }}
 chain after {{ type nat hook postrouting priority srcnat;
  oifname wan {masquerade}
 }}
 chain learn {{ type filter hook postrouting priority 150;
  oifname wan ct direction original meta l4proto udp update @mapping {{ udp sport : ct original ip saddr . ct original proto-src }}
  oifname wan meta l4proto udp update @permitted {{ udp sport . ip daddr }}
 }}
}}
"
        );
    }

    fn firewall_rules(&self, rules: &mut String) {
        // Neighbour discovery is not tracked: the input chain must not touch ICMPv6.
        *rules += &format!(
            "table inet firewall {{
 chain egress {{ type filter hook forward priority -10;
  {}
 }}
 chain forwarding {{ type filter hook forward priority 0; policy drop;
  ct state established,related accept; iifname lan accept; ct status dnat accept
 }}
 chain to_router {{ type filter hook input priority 0;
  iifname wan meta l4proto {{ tcp, udp }} ct state new drop
 }}
}}
",
            self.egress_rules()
        );
    }

    fn egress_rules(&self) -> String {
        let (allowed, refusal) = match &self.egress {
            Egress::Open => return String::new(),
            Egress::Closed { refusal } => (None, refusal),
            Egress::TcpOnly { ports, refusal } if ports.is_empty() => {
                (Some("meta l4proto tcp".to_owned()), refusal)
            }
            Egress::TcpOnly { ports, refusal } => {
                let ports: Vec<String> = ports.iter().map(u16::to_string).collect();
                (Some(format!("tcp dport {{ {} }}", ports.join(", "))), refusal)
            }
        };
        let allow = allowed.map_or_else(String::new, |what| format!("iifname lan {what} accept; "));
        let refuse = match refusal {
            Refusal::Drop => "drop",
            Refusal::Reject => "reject with icmpx admin-prohibited",
        };
        format!("{allow}iifname lan {refuse}")
    }
}

/// A router: a host with an outside interface `wan` and a LAN behind it.
#[derive(Debug)]
pub struct Router {
    host: Host,
    lan: Segment,
    spec: Mutex<RouterSpec>,
}

impl Router {
    pub(super) fn new(outside: &Segment, name: &str, spec: RouterSpec) -> Result<Self> {
        let shared = &outside.inner.shared;
        let host = Host::new(shared, name)?;
        let wan = host.attach_over(outside, "wan", spec.link)?;
        let number = {
            let mut state = shared.state();
            state.lans = state.lans.checked_add(1).context("a lab has at most 255 LANs")?;
            state.lans
        };
        let v4 = match spec.lan {
            Some(subnet) => subnet,
            None => Ipv4Net::new(Ipv4Addr::new(192, 168, number, 0), 24)?,
        };
        let v6 = if spec.ipv6 {
            let internet = outside.inner.v6.context("the router's outside has no IPv6")?;
            ensure!(
                outside.inner.netns == shared.name.netns("internet"),
                "{name}: only a router on the internet itself can have IPv6"
            );
            let prefix = internet.network().to_bits() | (u128::from(number) << 64);
            Some(Ipv6Net::new(Ipv6Addr::from_bits(prefix), 64)?)
        } else {
            None
        };
        let lan = Segment::new(shared, host.netns().to_owned(), "lan", v4, v6)?;
        host.sysctl(&["net.ipv4.ip_forward=1"])?;
        if let (Some(prefix), Some(next_hop)) = (v6, wan.v6) {
            host.sysctl(&["net.ipv6.conf.all.forwarding=1"])?;
            netns::batch(&outside.inner.netns, &format!("route add {prefix} via {next_hop}\n"))?;
        }
        let router = Self { host, lan, spec: Mutex::new(spec) };
        router.apply()?;
        Ok(router)
    }

    /// The segment behind the router.
    pub fn lan(&self) -> &Segment {
        &self.lan
    }

    /// A host on the LAN.
    ///
    /// # Errors
    /// When the name is taken or a command fails.
    pub fn host(&self, name: &str) -> Result<Host> {
        self.lan.host(name)
    }

    /// A router on the LAN: whatever is behind it has two NATs before it.
    ///
    /// # Errors
    /// When the name is taken or a command fails.
    pub fn router(&self, name: &str, spec: RouterSpec) -> Result<Self> {
        Self::new(&self.lan, name, spec)
    }

    /// Changes the behaviour and forgets all mappings, as a router with new firmware does. The LAN's
    /// subnets stay as they were made.
    ///
    /// # Errors
    /// When a command fails.
    pub fn reconfigure(&self, change: impl FnOnce(RouterSpec) -> RouterSpec) -> Result<()> {
        {
            let mut spec = self.spec();
            *spec = change(spec.clone());
        }
        self.apply()?;
        self.forget()
    }

    /// Forgets all mappings and connections: a restart that keeps the address.
    ///
    /// # Errors
    /// When a command fails.
    pub fn restart(&self) -> Result<()> {
        self.apply()?;
        self.forget()
    }

    /// Restarts with a new outside IPv4 address, which is returned.
    ///
    /// # Errors
    /// When the outside segment is full or a command fails.
    pub fn renumber(&self) -> Result<Ipv4Addr> {
        let fresh = {
            let mut interfaces = self.host.interfaces();
            let wan = interfaces.first_mut().context("a router has an outside")?;
            wan.v4 = wan.segment.v4_of(wan.segment.next_host())?;
            wan.clone()
        };
        let len = fresh.segment.subnet().prefix_len();
        self.host.ip("addr flush dev wan to 0.0.0.0/0")?;
        self.host.ip(&format!("addr add {}/{len} broadcast + dev wan", fresh.v4))?;
        self.host.route_over("wan")?;
        self.restart()?;
        Ok(fresh.v4)
    }

    /// Connections that the router tracks at the moment, one a line.
    ///
    /// # Errors
    /// When `conntrack` cannot be run.
    pub fn connections(&self) -> Result<String> {
        let output = self.host.run("conntrack", &["-L"])?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn apply(&self) -> Result<()> {
        let spec = self.spec();
        let seconds = spec.udp_timeout.as_secs();
        ensure!(
            seconds >= 1 && spec.udp_timeout.subsec_nanos() == 0,
            "a UDP timeout is whole seconds, at least 1, not {:?}",
            spec.udp_timeout
        );
        self.host.sysctl(&[
            &format!("net.netfilter.nf_conntrack_udp_timeout={seconds}"),
            &format!("net.netfilter.nf_conntrack_udp_timeout_stream={seconds}"),
        ])?;
        self.host.nft(&spec.rules(self.host.v4()))
    }

    fn forget(&self) -> Result<()> {
        let output = self.host.run("conntrack", &["-F"])?;
        ensure!(output.status.success(), "flushing connections: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }

    fn spec(&self) -> MutexGuard<'_, RouterSpec> {
        self.spec.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A router is a host, too: it has addresses, a namespace, and runs programs.
impl Deref for Router {
    type Target = Host;

    fn deref(&self) -> &Host {
        &self.host
    }
}
