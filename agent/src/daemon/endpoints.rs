//! Static endpoints (`warrend --endpoint`): where this host is reached from outside, as somebody says who knows the network,
//! because a router forwards a port by hand or a load balancer stands in front.
//!
//! Peers are told, as of any other address, and probe it before a packet goes there: a wrong one costs probes.

use std::net::SocketAddr;

use ipnet::{Ipv4Net, Ipv6Net};
use warren_common::endpoint::is_endpoint;
use warren_engine::paths::MAX_STATIC;

use super::Daemon;
use crate::problem::{HealthItem, Problem, Severity};

const CODE: &str = "bad-endpoint";

/// Looks at what `--endpoint` says before anything starts.
///
/// # Errors
/// Too many, or one that leads nowhere from outside.
pub(super) fn check(endpoints: &[SocketAddr]) -> Result<(), Problem> {
    if endpoints.len() > MAX_STATIC {
        return Err(Problem::usage(
            CODE,
            format!("{} endpoints are set, {MAX_STATIC} are the most", endpoints.len()),
            "leave those out that peers need least",
        ));
    }
    match endpoints.iter().find(|addr| !is_endpoint(None, **addr)) {
        None => Ok(()),
        Some(addr) => Err(Problem::usage(
            CODE,
            format!("`{addr}` can be no endpoint: {}", flaw(*addr)),
            "give --endpoint the address and UDP port that others reach this host at, such as 203.0.113.7:41641",
        )),
    }
}

/// Why nobody can be reached there.
fn flaw(addr: SocketAddr) -> &'static str {
    let ip = addr.ip().to_canonical();
    match addr {
        _ if addr.port() == 0 => "0 is no port",
        _ if ip.is_unspecified() => "it stands for any address",
        _ if ip.is_loopback() => "it leads to whoever uses it",
        _ if ip.is_multicast() => "it is a multicast address",
        SocketAddr::V6(v6) if v6.ip().to_ipv4_mapped().is_some() => {
            "it is an IPv4 address written as one of IPv6"
        }
        _ => "it is no unicast address that routers pass on",
    }
}

impl Daemon {
    /// Those that lie in the overlay: nobody is told of them.
    pub(super) fn endpoint_health(&self, overlay: (Ipv4Net, Ipv6Net)) -> Option<HealthItem> {
        let inside: Vec<String> = self
            .options
            .endpoints
            .iter()
            .filter(|addr| !is_endpoint(Some(overlay), **addr))
            .map(ToString::to_string)
            .collect();
        (!inside.is_empty()).then(|| HealthItem {
            code: CODE.to_owned(),
            severity: Severity::Warning,
            text: format!("peers are not told of `{}`: it lies in the overlay itself", inside.join("`, `")),
            fix: "give --endpoint an address of the network below, and restart the agent".to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_that_leads_nowhere_is_refused_with_the_reason() {
        let said = |addr: &str| check(&[addr.parse().unwrap()]).map_err(|p| (p.exit, p.text));
        assert_eq!(said("203.0.113.7:41641"), Ok(()));
        assert_eq!(said("[2001:db8::7]:41641"), Ok(()));
        assert_eq!(said("10.1.2.3:41641"), Ok(()), "within a company");
        for (addr, why) in [
            ("203.0.113.7:0", "0 is no port"),
            ("0.0.0.0:5", "any address"),
            ("[::]:5", "any address"),
            ("127.0.0.1:5", "whoever uses it"),
            ("224.0.0.1:5", "multicast"),
            ("[ff02::1]:5", "multicast"),
            ("[::ffff:203.0.113.7]:5", "IPv4 address written"),
            ("[fe80::1]:5", "no unicast address that routers pass on"),
            ("255.255.255.255:5", "no unicast address that routers pass on"),
        ] {
            let (exit, text) = said(addr).unwrap_err();
            assert!(exit == 2 && text.contains(why) && text.contains(addr), "{text}");
        }
        let many = |n| vec!["203.0.113.7:41641".parse().unwrap(); n];
        assert_eq!(check(&many(MAX_STATIC)), Ok(()));
        assert!(check(&many(MAX_STATIC + 1)).unwrap_err().text.contains("9 endpoints"));
    }
}
