//! Answers as people read them.

use std::fmt::Write as _;

use comfy_table::{Table, presets};
use serde_json::Value;

use super::client::decode;
use crate::api::{Netcheck, PathStatus, Pong, Status};
use crate::problem::Problem;

// Writing to a String can't fail, so the results of `writeln!` below mean nothing.

pub(super) fn up(answer: &Value) -> Result<String, Problem> {
    let status: Status = decode(answer.clone())?;
    let mut out = match &status.device {
        Some(device) => format!("{}: {} ({})\n", status.state, device.name, join(&device.ips)),
        None => format!("{}\n", status.state),
    };
    health(&status, &mut out);
    Ok(out)
}

pub(super) fn logout(answer: &Value) -> Result<String, Problem> {
    Ok(match answer["coordinator_told"].as_bool() {
        Some(true) => "logged out\n".into(),
        Some(false) => "logged out here; the coordinator was not reached, so an administrator should remove the device there\n".into(),
        None => "this device was not enrolled\n".into(),
    })
}

pub(super) fn status(answer: &Value) -> Result<String, Problem> {
    let status: Status = decode(answer.clone())?;
    let mut out = String::new();
    let network = status.network.as_ref().map_or(String::new(), |n| format!(" in {}", n.name));
    let _ = writeln!(out, "{}{network}", status.state);
    if let Some(device) = &status.device {
        let _ = writeln!(out, "this device: {} ({})", device.name, join(&device.ips));
    }
    if let Some(coordinator) = &status.coordinator {
        let connected = if coordinator.connected { "connected" } else { "not connected" };
        let _ = writeln!(
            out,
            "coordinator: {} ({connected}, revision {})",
            coordinator.url, coordinator.revision
        );
    }
    for relay in &status.relays {
        let over = over(relay.transport.as_deref(), relay.proxy.as_deref());
        let rtt = relay.rtt_ms.map_or(String::new(), |ms| format!(", {ms:.1} ms"));
        let home = if relay.home { ", home" } else { "" };
        let peer = if relay.peer { ", a device" } else { "" };
        let _ = writeln!(out, "relay: {} ({over}{rtt}{home}{peer})", relay.name);
    }
    if let Some(relaying) = &status.relaying {
        let port = relaying.port;
        let _ = match (relaying.serving, relaying.wanted) {
            (true, _) => writeln!(
                out,
                "relays for others: at port {port}, {} devices, {} passed on",
                relaying.clients,
                bytes(relaying.forwarded_bytes)
            ),
            (false, true) => {
                writeln!(out, "relays for others: not now, although a grant lets it (port {port})")
            }
            (false, false) => writeln!(out, "relays for others: not now, no grant lets it (port {port})"),
        };
    }
    if !status.peers.is_empty() {
        let mut table = table(&["PEER", "ADDRESSES", "OWNER", "ONLINE", "PATH", "RECEIVED", "SENT"]);
        for peer in &status.peers {
            let owner = peer.user.clone().unwrap_or_else(|| peer.tags.join(" "));
            table.add_row(vec![
                peer.name.clone().unwrap_or_else(|| peer.id.to_string()),
                join(&peer.ips),
                owner,
                if peer.online { "yes" } else { "no" }.to_owned(),
                path(&peer.path),
                bytes(peer.rx_bytes),
                bytes(peer.tx_bytes),
            ]);
        }
        let _ = writeln!(out, "\n{table}");
        // Of those that nobody talks with, none is expected to be.
        let wanted =
            |path: &PathStatus| path.kind != "direct" && path.why_not_direct.as_deref() != Some("idle");
        for peer in status.peers.iter().filter(|p| wanted(&p.path)) {
            if let Some(why) = &peer.why_not_direct {
                let name = peer.name.clone().unwrap_or_else(|| peer.id.to_string());
                let _ = writeln!(out, " {name} is not direct: {why}");
            }
        }
    }
    health(&status, &mut out);
    Ok(out)
}

/// What packets to and from a relay run over.
fn over(transport: Option<&str>, proxy: Option<&str>) -> String {
    let transport = match transport {
        None => return "not connected".to_owned(),
        Some("websocket") => "WebSocket".to_owned(),
        Some(other) => other.to_uppercase(),
    };
    let through = proxy.map_or_else(String::new, |proxy| format!(" through the proxy {proxy}"));
    format!("over {transport}{through}")
}

fn health(status: &Status, out: &mut String) {
    for item in &status.health {
        let severity = format!("{:?}", item.severity).to_lowercase();
        let _ = writeln!(out, "\n{severity}: {} [{}]\n  fix: {}", item.text, item.code, item.fix);
    }
}

pub(super) fn netcheck(answer: &Value) -> Result<String, Problem> {
    let check: Netcheck = decode(answer.clone())?;
    let or_unknown = |text: Option<String>| text.unwrap_or_else(|| "unknown".into());
    let mut out = String::new();
    let _ = writeln!(out, "UDP:     {}", if check.udp { "yes" } else { "no answer" });
    let _ =
        writeln!(out, "IPv4:    {}", check.ipv4.map_or_else(|| "no answer".to_owned(), |a| a.to_string()));
    let _ =
        writeln!(out, "IPv6:    {}", check.ipv6.map_or_else(|| "no answer".to_owned(), |a| a.to_string()));
    let nat = &check.nat;
    let hairpin = nat.hairpin.map(|yes| if yes { "yes" } else { "no" }.to_owned());
    for (what, found) in [("mapping", &nat.mapping), ("filtering", &nat.filtering), ("hairpin", &hairpin)] {
        let _ = writeln!(out, "NAT:     {what} {}", or_unknown(found.clone()));
    }
    let mapped = if check.port_mapping.is_empty() { "none".to_owned() } else { check.port_mapping.join(" ") };
    let _ = writeln!(out, "mapping: {mapped}");
    for own in &check.endpoints {
        let _ = writeln!(out, "told to peers: {} ({})", own.addr, own.kind);
    }
    for relay in &check.relays {
        let rtt = relay.rtt_ms.map_or_else(|| "no answer".to_owned(), |ms| format!("{ms:.1} ms"));
        let over = over(relay.transport.as_deref(), relay.proxy.as_deref());
        let _ = writeln!(out, "relay:   {} {rtt} ({over})", relay.name);
    }
    Ok(out)
}

pub(super) fn whois(answer: &Value) -> Result<String, Problem> {
    let name = answer["name"].as_str().or(answer["id"].as_str()).unwrap_or("unknown");
    let mut out = format!("device:  {name}\n");
    let _ = writeln!(out, "id:      {}", answer["id"].as_str().unwrap_or_default());
    if let Some(user) = answer["user"].as_str() {
        let _ = writeln!(out, "user:    {user}");
    }
    let tags: Vec<_> = answer["tags"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    if !tags.is_empty() {
        let _ = writeln!(out, "tags:    {}", tags.join(" "));
    }
    if answer["self"] == true {
        out.push_str("this is the device itself\n");
    }
    for (name, values) in answer["capabilities"].as_object().into_iter().flatten() {
        let _ = writeln!(out, "may:     {name}");
        for value in values.as_array().into_iter().flatten() {
            let _ = writeln!(out, "         {value}");
        }
    }
    Ok(out)
}

pub(super) fn why(answer: &Value) -> Result<String, Problem> {
    let verdict = if answer["allowed"] == true { "allowed" } else { "denied" };
    let mut out = format!("{verdict}: {} [{}]\n", text(&answer["text"]), text(&answer["reason"]));
    let peer = &answer["peer"];
    if let Some(name) = peer["name"].as_str().or(peer["id"].as_str()) {
        let _ = writeln!(out, "  peer:  {name}");
    }
    if let Some(kind) = answer["path"]["kind"].as_str() {
        let _ = writeln!(out, "  path:  {kind}");
    }
    let ingress = &answer["filter"]["ingress"]["outcome"];
    if let Some(outcome) = ingress.as_str() {
        let _ = writeln!(out, "  back:  connections from there to here: {}", outcome.replace('-', " "));
    }
    Ok(out)
}

pub(super) fn version(answer: &Value) -> Result<String, Problem> {
    let daemon = answer["daemon"].as_str().unwrap_or("not running");
    Ok(format!("warren {}\nwarrend {daemon}\n", text(&answer["version"])))
}

pub(super) fn pong(seq: u32, peer: &str, pong: &Pong) -> String {
    match pong.rtt_ms {
        Some(ms) => format!("{seq}: {peer} answers in {ms:.3} ms, {}\n", path(&pong.path)),
        None => format!("{seq}: {peer} does not answer\n"),
    }
}

pub(super) fn ping_summary(summary: &Value) -> String {
    let mut out = format!("{} sent, {} received", summary["sent"], summary["received"]);
    if let (Some(min), Some(avg), Some(max)) =
        (summary["min_ms"].as_f64(), summary["avg_ms"].as_f64(), summary["max_ms"].as_f64())
    {
        let _ = write!(out, "; min {min:.3} avg {avg:.3} max {max:.3} ms");
    }
    out.push('\n');
    out
}

fn path(path: &PathStatus) -> String {
    match (&path.endpoint, &path.relay) {
        (Some(endpoint), _) => format!("direct {endpoint}"),
        (None, Some(relay)) => format!("relay {relay}"),
        (None, None) => path.kind.to_string(),
    }
}

fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let (mut value, mut unit) = (count as f64, 0);
    while value >= 1_024.0 && unit + 1 < UNITS.len() {
        value /= 1_024.0;
        unit += 1;
    }
    if unit == 0 { format!("{count} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn join<T: ToString>(items: &[T]) -> String {
    items.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
}

fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header);
    table
}
