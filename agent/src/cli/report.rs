//! `warren bugreport`: a text that people can read before they pass it on.

use std::fmt::Write as _;
use std::fs::OpenOptions;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;

use serde_json::{Value, json};

use crate::problem::{Problem, io_text};

const HEAD: &str = "\
Warren bug report. It stays here until somebody passes it on: look through it first.
No keys and no tokens are in it; names and addresses only if --with-names was given.
";

/// Netcheck's answer, without addresses and names unless they are wanted.
pub(super) fn netcheck(mut check: Value, names: bool) -> Value {
    if !names {
        for family in ["ipv4", "ipv6"] {
            check[family] = json!(check[family].is_string());
        }
        for own in check["endpoints"].as_array_mut().into_iter().flatten() {
            if let Some(own) = own.as_object_mut() {
                own.remove("addr");
            }
        }
        for relay in check["relays"].as_array_mut().into_iter().flatten() {
            if let Some(relay) = relay.as_object_mut() {
                relay.remove("name");
                relay.remove("proxy");
            }
        }
    }
    check
}

/// What the daemon says, what was measured, and the host.
pub(super) fn whole(mut report: Value, check: Result<Value, Problem>) -> Value {
    report["netcheck"] = check.unwrap_or_else(|problem| json!({ "problem": problem.code }));
    report["cli"] = json!(env!("CARGO_PKG_VERSION"));
    let release = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
    let name = release.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="));
    report["distribution"] = json!(name.map(|name| name.trim_matches('"')));
    report
}

/// Writes the report to a file that only its owner can read, which must not exist yet; its name.
pub(super) fn write(path: Option<PathBuf>, report: &Value) -> Result<PathBuf, Problem> {
    let time: String = report["time"].as_str().unwrap_or_default().chars().take(19).collect();
    let path = path.unwrap_or_else(|| format!("warren-bugreport-{}.txt", time.replace(':', "")).into());
    let written = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&path)
        .and_then(|mut file| file.write_all(text(report).as_bytes()));
    written.map_err(|e| {
        Problem::new(
            "report-file",
            format!("the report can't be written to `{}`: {}", path.display(), io_text(&e)),
            "name another file with --output; one that exists is not overwritten",
        )
    })?;
    Ok(path)
}

/// One line for each value, under its place.
fn text(report: &Value) -> String {
    let mut out = HEAD.to_owned();
    for (section, value) in report.as_object().into_iter().flatten() {
        if value.is_object() {
            let _ = writeln!(out, "\n{section}");
            lines(&mut out, "", value);
        } else {
            let _ = writeln!(out, "{section}: {}", plain(value));
        }
    }
    out
}

fn lines(out: &mut String, place: &str, value: &Value) {
    let below = |key: &str| if place.is_empty() { key.to_owned() } else { format!("{place}.{key}") };
    match value {
        Value::Object(fields) => fields.iter().for_each(|(key, value)| lines(out, &below(key), value)),
        Value::Array(items) if items.iter().any(Value::is_object) => {
            items.iter().enumerate().for_each(|(n, value)| lines(out, &below(&n.to_string()), value));
        }
        Value::Array(items) => {
            let all: Vec<String> = items.iter().map(plain).collect();
            let _ =
                writeln!(out, "  {place}: {}", if all.is_empty() { "none".into() } else { all.join(" ") });
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {
            let _ = writeln!(out, "  {place}: {}", plain(value));
        }
    }
}

fn plain(value: &Value) -> String {
    match value {
        Value::Null => "unknown".to_owned(),
        Value::String(text) => text.clone(),
        Value::Bool(yes) => if *yes { "yes" } else { "no" }.to_owned(),
        Value::Number(_) | Value::Array(_) | Value::Object(_) => value.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_readable_private_and_overwrites_nothing() {
        let report = json!({
            "time": "2026-11-24T15:00:00.5Z", "mtu": null,
            "status": {"state": "running", "peers": [{"online": true, "ips": []}], "counters": {}},
        });
        let body = text(&report);
        assert!(body.starts_with(HEAD), "{body}");
        assert!(body.contains("\nmtu: unknown\n"), "{body}");
        assert!(
            body.contains("\nstatus\n  peers.0.ips: none\n  peers.0.online: yes\n  state: running\n"),
            "{body}"
        );
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r.txt");
        assert_eq!(write(Some(path.clone()), &report).unwrap(), path);
        let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&path).unwrap().permissions());
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(write(Some(path), &report).unwrap_err().code, "report-file");
    }

    #[test]
    fn a_measurement_tells_no_addresses_unless_they_are_wanted() {
        let check = json!({
            "udp": true, "ipv4": "192.0.2.1:5", "ipv6": null, "endpoints": [{"kind": "static", "addr": "192.0.2.1:5"}],
            "relays": [{"name": "fra", "rtt_ms": 2.0}],
        });
        assert_eq!(netcheck(check.clone(), true), check);
        let hidden = json!({
            "udp": true, "ipv4": true, "ipv6": false, "endpoints": [{"kind": "static"}], "relays": [{"rtt_ms": 2.0}],
        });
        assert_eq!(netcheck(check, false), hidden);
    }
}
