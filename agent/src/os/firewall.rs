//! Our nftables table: the weak-host guard (promise 12). Replaced as a whole, in one transaction.

use std::fmt::Write as _;
use std::net::IpAddr;
use std::process::Stdio;

use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;

use crate::problem::{Problem, io_text};

/// Drops packets to or from our overlay addresses on every interface but the TUN and loopback, before routing: a
/// neighbour can then neither reach a service on an overlay address nor pretend to be us towards peers.
pub(super) async fn apply(table: &str, tun: &str, addrs: &[IpAddr]) -> Result<(), Problem> {
    nft(&ruleset(table, tun, addrs)).await
}

/// Removes the table if it is there.
pub(super) async fn remove(table: &str) -> Result<(), Problem> {
    // Declaring it first makes the deletion succeed whether or not it was there.
    nft(&format!("table inet {table}\ndelete table inet {table}\n")).await
}

fn ruleset(table: &str, tun: &str, addrs: &[IpAddr]) -> String {
    let mut out = format!(
        "table inet {table}\ndelete table inet {table}\ntable inet {table} {{\n  chain guard {{\n    \
         type filter hook prerouting priority raw; policy accept;\n    iifname {{ \"lo\", \"{tun}\" }} accept\n"
    );
    for (family, list) in [
        ("ip", addrs.iter().filter(|a| a.is_ipv4()).collect::<Vec<_>>()),
        ("ip6", addrs.iter().filter(|a| a.is_ipv6()).collect()),
    ] {
        if list.is_empty() {
            continue;
        }
        let set = list.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        for direction in ["daddr", "saddr"] {
            // Writing to a String can't fail.
            let _ = writeln!(out, "    {family} {direction} {{ {set} }} counter drop");
        }
    }
    out.push_str("  }\n}\n");
    out
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
    fn the_guard_names_both_directions_and_families() {
        let addrs = ["100.64.0.1".parse().unwrap(), "fd00::1".parse().unwrap()];
        assert_eq!(
            ruleset("warren", "warren0", &addrs),
            r#"table inet warren
delete table inet warren
table inet warren {
  chain guard {
    type filter hook prerouting priority raw; policy accept;
    iifname { "lo", "warren0" } accept
    ip daddr { 100.64.0.1 } counter drop
    ip saddr { 100.64.0.1 } counter drop
    ip6 daddr { fd00::1 } counter drop
    ip6 saddr { fd00::1 } counter drop
  }
}
"#
        );
    }
}
