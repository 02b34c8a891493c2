//! Links, addresses, routes and rules by rtnetlink.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::pin::Pin;
use std::time::Duration;

use futures_util::stream::{Stream, StreamExt as _, TryStreamExt as _};
use ipnet::IpNet;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{AddressAttribute, AddressScope};
use netlink_packet_route::link::{LinkAttribute, LinkFlags};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteScope, RouteType};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage};
use rtnetlink::{Handle, IpVersion, LinkUnspec, MulticastGroup, RouteMessageBuilder};
use tokio_util::task::AbortOnDropHandle;

use super::tun::QUEUE_LEN;
use crate::problem::{Problem, io_text};

/// Metric of the routes through the TUN.
const TUN_METRIC: u32 = 64;
/// Metric of the `unreachable` routes below them: they count only when the TUN is gone.
const BLOCK_METRIC: u32 = 4_096;
/// MTU assumed of the network around us if the host has no default route.
const USUAL_MTU: u32 = 1_500;
/// Changes come in bursts: one notice per burst, this long after its first sign.
const DEBOUNCE: Duration = Duration::from_millis(200);

/// A connection to the kernel.
#[derive(Debug)]
pub(super) struct Netlink {
    handle: Handle,
    _task: AbortOnDropHandle<()>,
}

/// A route of the host that is not ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ForeignRoute {
    pub(super) net: IpNet,
    pub(super) via: String,
}

impl Netlink {
    pub(super) fn open() -> Result<Self, Problem> {
        let (connection, handle, _) = rtnetlink::new_connection()
            .map_err(|e| problem("open netlink", &rtnetlink::Error::InvalidNla(io_text(&e))))?;
        #[expect(clippy::disallowed_methods, reason = "owned by the handle: dropping it aborts the task")]
        let task = tokio::task::spawn(connection);
        Ok(Self { handle, _task: AbortOnDropHandle::new(task) })
    }

    async fn routes(&self, ipv6: bool) -> Result<Vec<RouteMessage>, Problem> {
        let filter = if ipv6 {
            RouteMessageBuilder::<Ipv6Addr>::new().build()
        } else {
            RouteMessageBuilder::<Ipv4Addr>::new().build()
        };
        let listed = self.handle.route().get(filter).execute().try_collect().await;
        match listed {
            Err(e) if ipv6 && is_no_ipv6(&e) => Ok(Vec::new()),
            other => other.map_err(|e| problem("list routes", &e)),
        }
    }

    /// Unicast and blocking routes outside of `table` that do not go through `tun`.
    pub(super) async fn foreign_routes(&self, table: u32, tun: &str) -> Result<Vec<ForeignRoute>, Problem> {
        let links = self.links().await?;
        let name = |index: u32| links.iter().find(|l| l.index == index).map(|l| l.name.clone());
        let mut out = Vec::new();
        for ipv6 in [false, true] {
            for route in self.routes(ipv6).await? {
                let local = matches!(
                    route.header.kind,
                    RouteType::Local | RouteType::Broadcast | RouteType::Multicast | RouteType::Anycast
                );
                let Some(net) = destination(&route) else { continue };
                let device = oif(&route).and_then(name);
                if local || table_of(&route) == table || device.as_deref() == Some(tun) {
                    continue;
                }
                let via = device.map_or_else(|| "no interface".to_owned(), |d| format!("interface {d}"));
                out.push(ForeignRoute { net, via });
            }
        }
        Ok(out)
    }

    /// The MTU of the interface with the best default route, other than the TUN.
    pub(super) async fn underlay_mtu(&self, tun: &str) -> Result<u32, Problem> {
        let links = self.links().await?;
        let mut defaults = Vec::new();
        for ipv6 in [false, true] {
            defaults.extend(
                self.routes(ipv6).await?.into_iter().filter(|r| r.header.destination_prefix_length == 0),
            );
        }
        Ok(defaults
            .iter()
            .filter_map(|route| links.iter().find(|l| Some(l.index) == oif(route) && l.name != tun))
            .map(|link| link.mtu)
            .min()
            .unwrap_or(USUAL_MTU))
    }

    async fn links(&self) -> Result<Vec<Link>, Problem> {
        let messages: Vec<_> = self
            .handle
            .link()
            .get()
            .execute()
            .try_collect()
            .await
            .map_err(|e| problem("list interfaces", &e))?;
        Ok(messages
            .into_iter()
            .map(|message| {
                let mut link = Link {
                    index: message.header.index,
                    name: String::new(),
                    mtu: USUAL_MTU,
                    usable: message.header.flags.contains(LinkFlags::Up)
                        && !message.header.flags.contains(LinkFlags::Loopback),
                };
                for attribute in message.attributes {
                    match attribute {
                        LinkAttribute::IfName(name) => link.name = name,
                        LinkAttribute::Mtu(mtu) => link.mtu = mtu,
                        _ => {}
                    }
                }
                link
            })
            .collect())
    }

    /// Global addresses of the interfaces that are up, without loopback and the TUN.
    pub(super) async fn addresses(&self, tun: &str) -> Result<Vec<IpAddr>, Problem> {
        let links = self.links().await?;
        let messages: Vec<_> = self
            .handle
            .address()
            .get()
            .execute()
            .try_collect()
            .await
            .map_err(|e| problem("list addresses", &e))?;
        let mut out: Vec<IpAddr> = messages
            .iter()
            .filter(|m| m.header.scope == AddressScope::Universe)
            .filter(|m| links.iter().any(|l| l.index == m.header.index && l.usable && l.name != tun))
            .filter_map(|m| {
                let find = |want_local| {
                    m.attributes.iter().find_map(|a| match a {
                        AddressAttribute::Local(ip) if want_local => Some(*ip),
                        AddressAttribute::Address(ip) if !want_local => Some(*ip),
                        _ => None,
                    })
                };
                find(true).or_else(|| find(false)) // on point-to-point links `Address` is the other end
            })
            .collect();
        out.sort_unstable();
        out.dedup();
        Ok(out)
    }

    /// Default routes, as far as they tell one network from another: gateway and interface.
    pub(super) async fn default_routes(&self) -> Result<Vec<(Option<IpAddr>, Option<u32>)>, Problem> {
        let mut out = Vec::new();
        for ipv6 in [false, true] {
            let routes = self.routes(ipv6).await?;
            out.extend(routes.iter().filter(|r| r.header.destination_prefix_length == 0).map(|route| {
                let gateway = route.attributes.iter().find_map(|a| match a {
                    RouteAttribute::Gateway(RouteAddress::Inet(ip)) => Some(IpAddr::V4(*ip)),
                    RouteAttribute::Gateway(RouteAddress::Inet6(ip)) => Some(IpAddr::V6(*ip)),
                    _ => None,
                });
                (gateway, oif(route))
            }));
        }
        out.sort_unstable();
        Ok(out)
    }

    /// The next hop of the best IPv4 default route of the main table.
    pub(super) async fn gateway(&self) -> Result<Option<Ipv4Addr>, Problem> {
        let routes = self.routes(false).await?;
        let defaults = routes.iter().filter(|route| {
            route.header.destination_prefix_length == 0 && table_of(route) == u32::from(libc::RT_TABLE_MAIN)
        });
        let found = defaults.filter_map(|route| {
            let metric = route.attributes.iter().find_map(|a| match a {
                RouteAttribute::Priority(metric) => Some(*metric),
                _ => None,
            });
            let gateway = route.attributes.iter().find_map(|a| match a {
                RouteAttribute::Gateway(RouteAddress::Inet(ip)) => Some(*ip),
                _ => None,
            });
            Some((metric.unwrap_or(0), gateway?))
        });
        Ok(found.min().map(|(_, gateway)| gateway))
    }

    /// Blocks the pools in `table`: what no better route takes is unreachable. Without IPv6 there is nothing to block.
    pub(super) async fn block_pools(&self, table: u32, pools: &[IpNet]) -> Result<(), Problem> {
        for pool in pools {
            let route = route(*pool, table, BLOCK_METRIC, None);
            match self.handle.route().add(route).replace().execute().await {
                Err(e) if pool.addr().is_ipv6() && is_no_ipv6(&e) => {}
                other => other.map_err(|e| problem(&format!("block {pool}"), &e))?,
            }
        }
        Ok(())
    }

    /// Routes the pools through the TUN and removes routes of `table` to other destinations.
    pub(super) async fn route_pools(
        &self,
        table: u32,
        tun: &str,
        pools: &[IpNet],
        ipv6: bool,
    ) -> Result<(), Problem> {
        let index = self.link_index(tun).await?;
        for pool in pools.iter().filter(|p| ipv6 || p.addr().is_ipv4()) {
            let route = route(*pool, table, TUN_METRIC, Some(index));
            self.handle
                .route()
                .add(route)
                .replace()
                .execute()
                .await
                .map_err(|e| problem(&format!("route {pool} to {tun}"), &e))?;
        }
        self.prune(table, |net| pools.contains(net)).await
    }

    /// Removes every route of `table`.
    pub(super) async fn flush_table(&self, table: u32) -> Result<(), Problem> {
        self.prune(table, |_| false).await
    }

    async fn prune(&self, table: u32, keep: impl Fn(&IpNet) -> bool) -> Result<(), Problem> {
        for ipv6 in [false, true] {
            for route in self.routes(ipv6).await? {
                if table_of(&route) != table || destination(&route).is_some_and(|net| keep(&net)) {
                    continue;
                }
                gone_is_fine(self.handle.route().del(route).execute().await)
                    .map_err(|e| problem("remove a route", &e))?;
            }
        }
        Ok(())
    }

    /// Sends all traffic without `mark` through `table`. False if the host has no IPv6.
    pub(super) async fn add_rules(&self, table: u32, priority: u32, mark: u32) -> Result<bool, Problem> {
        for ipv6 in [false, true] {
            if self.has_rule(ipv6, table, priority).await? {
                continue;
            }
            let added = if ipv6 {
                let mut request = self.handle.rule().add().v6();
                *request.message_mut() = rule(true, table, priority, mark);
                request.execute().await
            } else {
                let mut request = self.handle.rule().add().v4();
                *request.message_mut() = rule(false, table, priority, mark);
                request.execute().await
            };
            match added {
                Err(e) if ipv6 && is_no_ipv6(&e) => return Ok(false),
                Err(e) if errno(&e) == Some(libc::EEXIST) => {}
                other => other.map_err(|e| problem("add a routing rule", &e))?,
            }
        }
        Ok(true)
    }

    async fn has_rule(&self, ipv6: bool, table: u32, priority: u32) -> Result<bool, Problem> {
        let version = if ipv6 { IpVersion::V6 } else { IpVersion::V4 };
        let rules: Vec<RuleMessage> = match self.handle.rule().get(version).execute().try_collect().await {
            Err(e) if ipv6 && is_no_ipv6(&e) => return Ok(false),
            other => other.map_err(|e| problem("list routing rules", &e))?,
        };
        Ok(rules.iter().any(|r| {
            r.attributes.contains(&RuleAttribute::Priority(priority))
                && r.attributes.contains(&RuleAttribute::Table(table))
        }))
    }

    /// Removes our rule, as often as it is there.
    pub(super) async fn remove_rule(
        &self,
        ipv6: bool,
        table: u32,
        priority: u32,
        mark: u32,
    ) -> Result<(), Problem> {
        while self.has_rule(ipv6, table, priority).await? {
            gone_is_fine(self.handle.rule().del(rule(ipv6, table, priority, mark)).execute().await)
                .map_err(|e| problem("remove a routing rule", &e))?;
        }
        Ok(())
    }

    /// Gives the TUN its addresses (and takes others away), sets its MTU and queue and switches it on.
    pub(super) async fn configure_tun(
        &self,
        tun: &str,
        addrs: &[IpAddr],
        mtu: u32,
        ipv6: bool,
    ) -> Result<(), Problem> {
        let index = self.link_index(tun).await?;
        // No link-local address of its own: router solicitations into the tunnel serve nobody. It is our own
        // interface, so a kernel that does not know the setting is no harm.
        let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{tun}/addr_gen_mode"), "1");
        // The queue by netlink: the ioctl for it wants rights over the whole machine, which root of a container lacks.
        let link = LinkUnspec::new_with_index(index).mtu(mtu).txqueuelen(QUEUE_LEN).up().build();
        self.handle.link().set(link).execute().await.map_err(|e| problem(&format!("switch {tun} on"), &e))?;
        let wanted = |addr: &IpAddr| addrs.contains(addr) && (ipv6 || addr.is_ipv4());
        let present: Vec<_> = self
            .handle
            .address()
            .get()
            .set_link_index_filter(index)
            .execute()
            .try_collect()
            .await
            .map_err(|e| problem("list addresses", &e))?;
        for message in present {
            let ours =
                message.attributes.iter().any(|a| matches!(a, AddressAttribute::Address(ip) if wanted(ip)));
            if message.header.index == index && !ours {
                gone_is_fine(self.handle.address().del(message).execute().await)
                    .map_err(|e| problem("remove an address", &e))?;
            }
        }
        for addr in addrs.iter().filter(|a| wanted(a)) {
            let prefix = if addr.is_ipv4() { 32 } else { 128 };
            self.handle
                .address()
                .add(index, *addr, prefix)
                .replace()
                .execute()
                .await
                .map_err(|e| problem(&format!("give {tun} the address {addr}"), &e))?;
        }
        Ok(())
    }

    async fn link_index(&self, name: &str) -> Result<u32, Problem> {
        self.links().await?.into_iter().find(|l| l.name == name).map(|l| l.index).ok_or_else(|| {
            Problem::new(
                "tun-gone",
                format!("the TUN device `{name}` has disappeared"),
                "something removed it: run `warren up` again",
            )
        })
    }
}

struct Link {
    index: u32,
    name: String,
    mtu: u32,
    usable: bool,
}

fn destination(route: &RouteMessage) -> Option<IpNet> {
    let length = route.header.destination_prefix_length;
    let address = route.attributes.iter().find_map(|a| match a {
        RouteAttribute::Destination(RouteAddress::Inet(ip)) => Some(IpAddr::V4(*ip)),
        RouteAttribute::Destination(RouteAddress::Inet6(ip)) => Some(IpAddr::V6(*ip)),
        _ => None,
    });
    let unspecified = match route.header.address_family {
        AddressFamily::Inet => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        AddressFamily::Inet6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        _ => return None,
    };
    IpNet::new(address.unwrap_or(unspecified), length).ok()
}

fn oif(route: &RouteMessage) -> Option<u32> {
    route.attributes.iter().find_map(|a| match a {
        RouteAttribute::Oif(index) => Some(*index),
        _ => None,
    })
}

fn table_of(route: &RouteMessage) -> u32 {
    let attribute = route.attributes.iter().find_map(|a| match a {
        RouteAttribute::Table(table) => Some(*table),
        _ => None,
    });
    attribute.unwrap_or(route.header.table.into())
}

/// A route to `net` through the interface, or an `unreachable` one.
fn route(net: IpNet, table: u32, metric: u32, interface: Option<u32>) -> RouteMessage {
    macro_rules! build {
        ($ip:ty, $net:expr) => {{
            let builder = RouteMessageBuilder::<$ip>::new()
                .destination_prefix($net.network(), $net.prefix_len())
                .table_id(table)
                .priority(metric);
            match interface {
                Some(index) => builder.output_interface(index).scope(RouteScope::Link).build(),
                None => builder.kind(RouteType::Unreachable).build(),
            }
        }};
    }
    match net {
        IpNet::V4(net) => build!(Ipv4Addr, net),
        IpNet::V6(net) => build!(Ipv6Addr, net),
    }
}

/// `not fwmark MARK lookup TABLE`.
fn rule(ipv6: bool, table: u32, priority: u32, mark: u32) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = if ipv6 { AddressFamily::Inet6 } else { AddressFamily::Inet };
    message.header.action = RuleAction::ToTable;
    message.header.flags = RuleFlags::Invert;
    message.attributes = vec![
        RuleAttribute::Table(table),
        RuleAttribute::Priority(priority),
        RuleAttribute::FwMark(mark),
        RuleAttribute::FwMask(u32::MAX),
    ];
    message
}

fn errno(error: &rtnetlink::Error) -> Option<i32> {
    match error {
        rtnetlink::Error::NetlinkError(message) => Some(message.raw_code().abs()),
        _ => None,
    }
}

fn gone_is_fine(result: Result<(), rtnetlink::Error>) -> Result<(), rtnetlink::Error> {
    match result {
        Err(e)
            if matches!(errno(&e), Some(libc::ESRCH | libc::ENOENT | libc::ENODEV | libc::EADDRNOTAVAIL)) =>
        {
            Ok(())
        }
        other => other,
    }
}

/// True if IPv6 is switched off on this interface (sysctl `disable_ipv6`), as it is in many containers.
pub(super) fn is_ipv6_off(interface: &str) -> bool {
    let file = format!("/proc/sys/net/ipv6/conf/{interface}/disable_ipv6");
    std::fs::read_to_string(file).is_ok_and(|text| text.trim() == "1")
}

/// True if the kernel says that it has no IPv6.
fn is_no_ipv6(error: &rtnetlink::Error) -> bool {
    matches!(errno(error), Some(libc::EAFNOSUPPORT | libc::EOPNOTSUPP))
}

fn problem(what: &str, error: &rtnetlink::Error) -> Problem {
    if errno(error) == Some(libc::EPERM) {
        return Problem::new(
            "network-permission",
            format!("no permission to {what}"),
            "run warrend as root or with CAP_NET_ADMIN",
        );
    }
    let why = errno(error).map_or_else(|| error.to_string(), |n| io_text(&io::Error::from_raw_os_error(n)));
    Problem::new(
        "network-config",
        format!("the host refuses to {what}: {why}"),
        "see the kernel's log; another VPN or network manager may be in the way",
    )
}

/// Tells that the host's network changed.
pub struct NetworkChanges {
    messages: Pin<Box<dyn Stream<Item = ()> + Send>>,
    /// When the burst that began is over.
    due: Option<tokio::time::Instant>,
    _task: AbortOnDropHandle<()>,
}

impl std::fmt::Debug for NetworkChanges {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("NetworkChanges")
    }
}

impl NetworkChanges {
    pub(super) fn subscribe() -> Result<Self, Problem> {
        let (connection, _, messages) = rtnetlink::new_multicast_connection(&[
            MulticastGroup::Link,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
        ])
        .map_err(|e| problem("watch the network", &rtnetlink::Error::InvalidNla(io_text(&e))))?;
        #[expect(clippy::disallowed_methods, reason = "owned by the handle: dropping it aborts the task")]
        let task = tokio::task::spawn(connection);
        Ok(Self { messages: Box::pin(messages.map(|_| ())), due: None, _task: AbortOnDropHandle::new(task) })
    }

    /// Waits for a change and for its burst to end. Cancel safe.
    pub async fn changed(&mut self) {
        loop {
            let Some(due) = self.due else {
                if self.messages.next().await.is_none() {
                    return std::future::pending().await;
                }
                self.due = Some(tokio::time::Instant::now() + DEBOUNCE);
                continue;
            };
            tokio::select! {
                biased;
                () = tokio::time::sleep_until(due) => {
                    self.due = None;
                    return;
                }
                more = self.messages.next() => if more.is_none() { return std::future::pending().await },
            }
        }
    }
}
