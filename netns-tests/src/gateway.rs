//! A real miniupnpd on a lab's router: PCP, NAT-PMP and UPnP-IGD.

use std::fmt::Write as _;
use std::fs;
use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::{Context as _, Result};
use ipnet::Ipv4Net;

use crate::lab::{Process, Router};

/// The program with the Debian package that holds it.
pub const MINIUPNPD: (&str, &str) = ("miniupnpd", "miniupnpd-nftables");

/// An internet whose addresses miniupnpd takes for public ones. Nothing leaves the lab.
pub const INTERNET: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(5, 5, 5, 0), 24);

/// Bound for a start; only a failing run waits this long.
const LIMIT: Duration = Duration::from_secs(30);

/// Which protocols a router speaks, and what it allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gateway {
    /// PCP (RFC 6887).
    pub pcp: bool,
    /// NAT-PMP (RFC 6886).
    pub natpmp: bool,
    /// UPnP-IGD.
    pub upnp: bool,
    /// Maps ports; refuses to otherwise.
    pub allows: bool,
}

impl Gateway {
    /// Speaks all three.
    pub const ALL: Self = Self { pcp: true, natpmp: true, upnp: true, allows: true };

    /// Starts miniupnpd on a router made with [`RouterSpec::port_mapping`](crate::lab::RouterSpec::port_mapping).
    ///
    /// # Errors
    /// It does not come to serve.
    pub fn start(self, router: &Router) -> Result<Process> {
        let lan = router.lan().subnet();
        let yes = |on: bool| if on { "yes" } else { "no" };
        let config = format!(
            "ext_ifname=wan\nlistening_ip=lan\nhttp_port=5000\nenable_upnp={}\nenable_natpmp={}\nsecure_mode=yes\n\
             min_lifetime=1\nmax_lifetime=86400\nuuid=7a31b2a6-0000-4000-8000-000000000001\n\
             upnp_table_name=upnp\nupnp_nat_table_name=upnp\nupnp_forward_chain=forward\n\
             upnp_nat_chain=prerouting\nupnp_nat_postrouting_chain=postrouting\n{}deny 0-65535 0.0.0.0/0 0-65535\n",
            yes(self.upnp),
            yes(self.pcp || self.natpmp),
            if self.allows { format!("allow 1024-65535 {lan} 1024-65535\n") } else { String::new() },
        );
        // It can't be told to speak only one of the two that share a port: their first byte is the version.
        let mut rules = String::from("table inet versions { }\ndelete table inet versions\n");
        for (version, on) in [(2, self.pcp), (0, self.natpmp)] {
            if !on {
                let _ = writeln!(
                    rules,
                    "add table inet versions\nadd chain inet versions to_router {{ type filter hook input priority -10; }}\n\
                     add rule inet versions to_router udp dport 5351 @th,64,8 {version} drop"
                );
            }
        }
        router.nft(&rules)?;
        // Anything that an earlier one has mapped is forgotten, as when a router starts.
        router.nft("flush chain inet upnp forward\nflush chain inet upnp prerouting\nflush chain inet upnp postrouting\n")?;
        let file = router.dir().join("miniupnpd.conf");
        fs::write(&file, config)?;
        let mut command = router.command(MINIUPNPD.0);
        command.arg("-d").arg("-f").arg(&file);
        let mut process = router.spawn(command)?;
        let serves = if self.pcp || self.natpmp { "Listening for NAT-PMP" } else { "HTTP listening" };
        process.wait_for_line(serves, LIMIT)?;
        Ok(process)
    }

    /// What a router maps at the moment, as rules.
    ///
    /// # Errors
    /// The rules can't be listed.
    pub fn mapped(router: &Router) -> Result<String> {
        let output = router.run("nft", &["list", "chain", "inet", "upnp", "prerouting"])?;
        let text = String::from_utf8(output.stdout).context("nft prints text")?;
        Ok(text
            .lines()
            .filter(|line| line.contains("dnat"))
            .map(|line| format!("{}\n", line.trim()))
            .collect())
    }
}
