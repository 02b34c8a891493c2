//! The seam to the operating system: everything that changes the host, or asks it, is behind [`Host`].
//!
//! What is changed, on Linux (all of it noted in the [`journal`] first, all of it undone on a clean stop):
//!
//! * a TUN device, which vanishes with the process, with our addresses;
//! * a routing table of our own with the overlay's prefixes: through the TUN, and below that `unreachable`;
//! * one rule per family that sends all traffic but our own (marked) sockets' through that table;
//! * nftables tables of our own that drop what is to us, or from an overlay address, and did not come through the TUN.
//!
//! If the process is killed, the `unreachable` routes and the nftables tables stay, so that no overlay packet leaves by
//! the default route and no neighbour can pretend to be a peer. The next start takes them over or removes them.

pub mod journal;
pub mod tun;
pub mod udp;

mod firewall;
mod netlink;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use ipnet::IpNet;
use warren_engine::io::LocalSocket;

use crate::problem::Problem;
use crate::state::StateDir;
use journal::{Change, Journal};
use netlink::Netlink;
pub use netlink::NetworkChanges;

/// Mark of our own sockets (`SO_MARK`); the rule for the overlay's table excludes it.
pub const MARK: u32 = 0x7761_7272;
/// Our routing table.
pub const TABLE: u32 = 30_561;
/// Priority of our rules: before `main` (32 766) and before other VPNs' catch-all rules. The table holds the overlay's
/// prefixes only, so it takes nothing else away from them.
pub const RULE_PRIORITY: u32 = 3_056;
/// Our nftables tables, in families `inet` and `arp`.
pub const NFT_TABLE: &str = "warren";
/// Largest TUN MTU: a 1 500-byte underlay less IPv6, UDP and WireGuard headers.
pub const MAX_MTU: u32 = 1_420;
/// Smallest TUN MTU: what IPv6 requires (RFC 8200 section 5).
pub const MIN_MTU: u32 = 1_280;
/// Bytes that the tunnel adds to a packet at most: IPv6 40, UDP 8, WireGuard 32.
pub const OVERHEAD: u32 = 80;

/// Refuses to go on without the right to configure the network: better at the start than half-way up.
///
/// # Errors
/// This process lacks `CAP_NET_ADMIN`.
pub fn check_privilege() -> Result<(), Problem> {
    use rustix::thread::{CapabilitySet, capabilities};
    // Where the kernel does not say, it will when it is asked for something.
    if capabilities(None).is_ok_and(|sets| !sets.effective.contains(CapabilitySet::NET_ADMIN)) {
        return Err(Problem::new(
            "not-privileged",
            "warrend has no permission to configure the network (it makes a network device, routes and filter rules)",
            "run it as root (`systemctl start warrend`, or sudo) or with CAP_NET_ADMIN; in a container add `--cap-add NET_ADMIN --device /dev/net/tun`",
        ));
    }
    Ok(())
}

/// What of the kernel's help for many packets at a time is to be used. Each is looked for at run time; where one is
/// missing, packets go one by one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offloads {
    /// Super-frames of TCP through the TUN (`IFF_VNET_HDR`, TSO).
    pub tun: bool,
    /// Super-frames of UDP through the TUN (USO, Linux 6.2); nothing without `tun`.
    pub tun_udp: bool,
    /// Many datagrams by one send (`UDP_SEGMENT`).
    pub udp_send: bool,
    /// Many datagrams by one receive (`UDP_GRO`).
    pub udp_receive: bool,
}

impl Offloads {
    /// Everything.
    pub const ALL: Self = Self { tun: true, tun_udp: true, udp_send: true, udp_receive: true };
    /// Nothing.
    pub const NONE: Self = Self { tun: false, tun_udp: false, udp_send: false, udp_receive: false };

    /// Everything but what `names` say: `tun`, `tun-udp`, `udp-send`, `udp-receive`, `all`.
    ///
    /// # Errors
    /// The name that is none of these.
    pub fn without<'a>(names: impl Iterator<Item = &'a str>) -> Result<Self, &'a str> {
        let mut out = Self::ALL;
        for name in names {
            match name {
                "tun" => (out.tun, out.tun_udp) = (false, false),
                "tun-udp" => out.tun_udp = false,
                "udp-send" => out.udp_send = false,
                "udp-receive" => out.udp_receive = false,
                "all" => out = Self::NONE,
                other => return Err(other),
            }
        }
        Ok(out)
    }

    /// Each with its name.
    pub const fn named(self) -> [(&'static str, bool); 4] {
        [
            ("tun", self.tun),
            ("tun-udp", self.tun_udp),
            ("udp-send", self.udp_send),
            ("udp-receive", self.udp_receive),
        ]
    }
}

/// What the host should look like while the overlay is up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostPlan {
    /// The TUN device's name.
    pub tun: String,
    /// This device's overlay addresses.
    pub addrs: Vec<IpAddr>,
    /// The overlay's prefixes.
    pub pools: Vec<IpNet>,
    /// The TUN's MTU, in bytes.
    pub mtu: u32,
}

/// The host's network configuration.
#[derive(Debug)]
pub struct Host {
    netlink: Netlink,
}

impl Host {
    /// Opens the kernel's configuration interface.
    ///
    /// # Errors
    /// Netlink is not available.
    pub fn open() -> Result<Self, Problem> {
        Ok(Self { netlink: Netlink::open()? })
    }

    /// Refuses prefixes that overlap with what the host already reaches elsewhere.
    ///
    /// # Errors
    /// A collision, with both sides named.
    pub async fn check_collision(&self, plan: &HostPlan) -> Result<(), Problem> {
        for route in self.netlink.foreign_routes(TABLE, &plan.tun).await? {
            if let Some(pool) = plan.pools.iter().find(|pool| collides(pool, &route.net)) {
                return Err(Problem::new(
                    "pool-collision",
                    format!(
                        "the network's addresses {pool} collide with this host's route {} through {}",
                        route.net, route.via
                    ),
                    "remove that route, or have the administrator give the network another address pool (`warren-coordinator serve --help`)",
                ));
            }
        }
        Ok(())
    }

    /// The MTU that the TUN should have on this host's network: [`MAX_MTU`], or less if the interface with the default
    /// route takes less. A smaller link further on fragments (our sockets allow it).
    ///
    /// # Errors
    /// Netlink failed.
    pub async fn tunnel_mtu(&self, tun: &str) -> Result<u32, Problem> {
        let underlay = self.netlink.underlay_mtu(tun).await?;
        Ok(underlay.saturating_sub(OVERHEAD).clamp(MIN_MTU, MAX_MTU))
    }

    /// Makes the host look like `plan`. Can be called again with another plan, or after a kill: what is there already
    /// is taken over without a gap.
    ///
    /// # Errors
    /// A change is not possible; the journal then still knows what to undo.
    pub async fn apply(&self, plan: &HostPlan, state: &StateDir) -> Result<Applied, Problem> {
        let mut journal = Journal::load(state)?;
        journal.note(state, &changes())?;
        // The guard first, so that our addresses never exist without it.
        firewall::apply(NFT_TABLE, &plan.tun, &plan.addrs, &plan.pools).await?;
        self.netlink.block_pools(TABLE, &plan.pools).await?;
        // A kernel without IPv6, or one that was told to have none on new interfaces.
        let ipv6 =
            self.netlink.add_rules(TABLE, RULE_PRIORITY, MARK).await? && !netlink::is_ipv6_off(&plan.tun);
        self.netlink.configure_tun(&plan.tun, &plan.addrs, plan.mtu, ipv6).await?;
        self.netlink.route_pools(TABLE, &plan.tun, &plan.pools, ipv6).await?;
        Ok(Applied { ipv6 })
    }

    /// Undoes every change in the journal, also those of an earlier run. Things that are gone already are no error.
    ///
    /// # Errors
    /// Something can't be undone: the rest is, and the journal keeps all of it for the next try.
    pub async fn restore(&self, state: &StateDir) -> Result<(), Problem> {
        let mut journal = Journal::load(state)?;
        let mut result = Ok(());
        for change in journal.latest_first() {
            let undone = match change {
                Change::Nft { table } => firewall::remove(table).await,
                Change::Routes { table } => self.netlink.flush_table(*table).await,
                Change::Rule { ipv6, priority, mark, table } => {
                    self.netlink.remove_rule(*ipv6, *table, *priority, *mark).await
                }
            };
            result = result.and(undone);
        }
        result?;
        journal.clear(state)
    }

    /// What the network around this host looks like now, without the overlay's own part.
    ///
    /// # Errors
    /// Netlink failed.
    pub async fn surroundings(&self, tun: &str) -> Result<Surroundings, Problem> {
        Ok(Surroundings {
            addrs: self.netlink.addresses(tun).await?,
            defaults: self.netlink.default_routes().await?,
            gateway: self.netlink.gateway().await?,
        })
    }

    /// Tells when links, addresses or routes change.
    ///
    /// # Errors
    /// Netlink is not available.
    pub fn watch(&self) -> Result<NetworkChanges, Problem> {
        NetworkChanges::subscribe()
    }
}

/// How the host ended up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Applied {
    /// False if this host has no IPv6: the overlay then is IPv4 only.
    pub ipv6: bool,
}

/// The network around a host: two equal ones mean that nothing moved.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Surroundings {
    addrs: Vec<IpAddr>,
    defaults: Vec<(Option<IpAddr>, Option<u32>)>,
    gateway: Option<Ipv4Addr>,
}

impl Surroundings {
    /// This host's addresses, without the overlay's.
    pub fn addrs(&self) -> &[IpAddr] {
        &self.addrs
    }

    /// The next hop of the best IPv4 default route.
    pub const fn gateway(&self) -> Option<Ipv4Addr> {
        self.gateway
    }

    /// Our sockets (number and bound address) with every address they can be reached at.
    pub fn sockets(&self, bound: &[(u8, SocketAddr)]) -> Vec<LocalSocket> {
        let each = |(id, socket): &(u8, SocketAddr)| {
            let (id, port, v4) = (*id, socket.port(), socket.is_ipv4());
            let same_family = self.addrs.iter().filter(move |a| a.is_ipv4() == v4);
            same_family.map(move |a| LocalSocket { id, addr: SocketAddr::new(*a, port) }).collect::<Vec<_>>()
        };
        bound.iter().flat_map(each).collect()
    }
}

/// Everything that `apply` changes, in order; undone in reverse.
fn changes() -> [Change; 4] {
    let rule = |ipv6| Change::Rule { ipv6, priority: RULE_PRIORITY, mark: MARK, table: TABLE };
    [Change::Nft { table: NFT_TABLE.to_owned() }, Change::Routes { table: TABLE }, rule(false), rule(true)]
}

/// Prefixes shorter than this are catch-alls (the default route, or halves of it as other VPNs use): the overlay's own
/// table comes before them, so they are no collision.
const CATCH_ALL_BELOW: u8 = 8;

fn collides(pool: &IpNet, route: &IpNet) -> bool {
    route.prefix_len() >= CATCH_ALL_BELOW && (pool.contains(route) || route.contains(pool))
}

#[cfg(test)]
mod tests;
