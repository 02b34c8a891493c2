//! Our nftables tables: the weak-host guard (promise 12). Each is replaced as a whole, in one transaction.
//!
//! Overlay addresses belong to the TUN. Linux, a weak host, would answer for them on every interface, and takes packets
//! from anybody who claims to have one; so a neighbour could reach services on our overlay addresses past the filter, or
//! pretend to be a peer towards services that go by the source address.

use std::net::IpAddr;
use std::process::Stdio;

use ipnet::IpNet;
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;

use crate::problem::{Problem, io_text};

/// Drops packets to our overlay addresses, and from any overlay address, on every interface but the TUN and loopback,
/// before routing; and ARP for our overlay addresses.
pub(super) async fn apply(table: &str, tun: &str, addrs: &[IpAddr], pools: &[IpNet]) -> Result<(), Problem> {
    nft(&guard(table, tun, addrs, pools)).await?;
    if let Err(problem) = nft(&arp_guard(table, addrs)).await {
        // Few kernels are built without ARP rules. A neighbour then learns that we have the address, and no more.
        tracing::info!("ARP for overlay addresses is answered: {}", problem.text);
    }
    Ok(())
}

/// Removes the tables if they are there.
pub(super) async fn remove(table: &str) -> Result<(), Problem> {
    nft(&gone("inet", table)).await?;
    nft(&gone("arp", table)).await
}

/// Declaring it first makes the deletion succeed whether or not it was there.
fn gone(family: &str, table: &str) -> String {
    format!("table {family} {table}\ndelete table {family} {table}\n")
}

fn guard(table: &str, tun: &str, addrs: &[IpAddr], pools: &[IpNet]) -> String {
    let mut rules = format!("    iifname {{ \"lo\", \"{tun}\" }} accept\n");
    for (family, v4) in [("ip", true), ("ip6", false)] {
        if let Some(own) = set(addrs.iter().filter(|a| a.is_ipv4() == v4)) {
            rules += &format!("    {family} daddr {own} counter drop\n");
        }
        if let Some(pools) = set(pools.iter().filter(|p| p.addr().is_ipv4() == v4)) {
            if v4 {
                // Carriers number their routers from 100.64.0.0/10, too (RFC 6598), and path MTU discovery needs what
                // those say. It grants nothing: such errors are not authentic on any network.
                rules += &format!(
                    "    ip saddr {pools} icmp type {{ destination-unreachable, time-exceeded, parameter-problem }} accept\n"
                );
            }
            rules += &format!("    {family} saddr {pools} counter drop\n");
        }
    }
    let gone = gone("inet", table);
    format!(
        "{gone}table inet {table} {{\n  chain guard {{\n    \
         type filter hook prerouting priority raw; policy accept;\n{rules}  }}\n}}\n"
    )
}

fn arp_guard(table: &str, addrs: &[IpAddr]) -> String {
    let gone = gone("arp", table);
    let Some(own) = set(addrs.iter().filter(|a| a.is_ipv4())) else { return gone };
    format!(
        "{gone}table arp {table} {{\n  chain guard {{\n    \
         type filter hook input priority 0; policy accept;\n    arp daddr ip {own} counter drop\n  }}\n}}\n"
    )
}

/// An anonymous set; `None` if there is nothing to put in.
fn set<T: ToString>(items: impl Iterator<Item = T>) -> Option<String> {
    let items: Vec<String> = items.map(|item| item.to_string()).collect();
    (!items.is_empty()).then(|| format!("{{ {} }}", items.join(", ")))
}

async fn nft(script: &str) -> Result<(), Problem> {
    let failed = |why: String| {
        Problem::new(
            "firewall",
            format!("the packet filter can't be set: {why}"),
            "install nftables (command `nft`) and run warrend as root: without its guard the agent does not come up",
        )
    };
    let mut child = Command::new("nft")
        .args(["-f", "-"])
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin:/usr/local/sbin")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|e| failed(format!("`nft` can't be run: {}", io_text(&e))))?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(script.as_bytes()).await.map_err(|e| failed(io_text(&e)))?;
    }
    let output = child.wait_with_output().await.map_err(|e| failed(io_text(&e)))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(failed(said.lines().next().unwrap_or("nft failed").trim().to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guard_names_own_addresses_and_pools_of_both_families() {
        let addrs = ["100.64.0.1".parse().unwrap(), "fd00::1".parse().unwrap()];
        let pools = ["100.64.0.0/16".parse().unwrap(), "fd00::/64".parse().unwrap()];
        assert_eq!(
            guard("warren", "warren0", &addrs, &pools),
            r#"table inet warren
delete table inet warren
table inet warren {
  chain guard {
    type filter hook prerouting priority raw; policy accept;
    iifname { "lo", "warren0" } accept
    ip daddr { 100.64.0.1 } counter drop
    ip saddr { 100.64.0.0/16 } icmp type { destination-unreachable, time-exceeded, parameter-problem } accept
    ip saddr { 100.64.0.0/16 } counter drop
    ip6 daddr { fd00::1 } counter drop
    ip6 saddr { fd00::/64 } counter drop
  }
}
"#
        );
        assert_eq!(
            arp_guard("warren", &addrs),
            "table arp warren
delete table arp warren
table arp warren {
  chain guard {
    type filter hook input priority 0; policy accept;
    arp daddr ip { 100.64.0.1 } counter drop
  }
}
"
        );
        assert_eq!(arp_guard("warren", &addrs[1..]), "table arp warren\ndelete table arp warren\n");
    }
}
