//! `cargo xtask bench`: the tunnel against others on this machine, with the comparison script that lies beside the
//! repository, and the table of it in `docs/performance.md`. `cargo xtask bench paths`: how soon machines in different
//! places meet. `cargo xtask bench relay`: the relay against coturn, and its table there.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};

use crate::setup;
use crate::shell::{attached, cargo, root, say};
use crate::test::in_namespaces;

/// Where the script is, unless `PEERS_SH` says otherwise.
const SCRIPT: &str = "../shared/bench/peers.sh";
/// The page, and the lines between which a table is.
const PAGE: &str = "docs/performance.md";
const TUNNEL: &str = "<!-- table: written by cargo xtask bench -->";
const RELAY: &str = "<!-- table: written by cargo xtask bench relay -->";
const END: &str = "<!-- end of table -->";
/// How often the relay's packets are measured, and its idle clients.
const RELAY_REPEATS: &str = "3";
const IDLE_CLIENTS: &str = "10000";
/// Our name in the script, and whom it compares with.
const OURS: &str = "cand";
const PEERS: &str = "wggo wggo2 boring gota nebaes cand";

/// What is shown of what the script measures: its name there, ours, digits.
const METRICS: [(&str, &str, usize); 11] = [
    ("tcp1", "TCP 1 stream, Gbit/s", 2),
    ("tcp4", "4 streams, Gbit/s", 2),
    ("tcpr", "reverse, Gbit/s", 2),
    ("udpmtu", "UDP 1 372 B, packets/s", 0),
    ("udp64", "UDP 64 B, packets/s", 0),
    ("ping50", "RTT idle, ms", 2),
    ("pingl50", "RTT under TCP, ms", 2),
    ("cpu_gb", "CPU s/GB, both daemons", 2),
    ("rss_load", "RSS after load, MiB", 0),
    ("noise", "noise, %", 0),
    ("steal", "steal, %", 1),
];

pub(crate) fn run(repeats: u32) -> Result<bool> {
    let script = std::env::var_os("PEERS_SH").map_or_else(|| root().join(SCRIPT), PathBuf::from);
    ensure!(script.is_file(), "no comparison script at {}: say where it is with PEERS_SH", script.display());
    if !attached(cargo().args(["build", "--locked", "--release", "-p", "warren-bench"]))? {
        return Ok(false);
    }
    let target = target();
    let node = target.join("release/warren-bench-node");
    let candidate = format!(
        "exec {} --role {{role}} --tun {{if}} --addr {{ip}} --peer-addr {{pip}} --listen {{lip}}:{{port}} --mtu {{mtu}} --state {{dir}}",
        node.display()
    );
    let values = target.join("xtask/bench.tsv");
    std::fs::create_dir_all(target.join("xtask"))?;
    let mut compare = Command::new("bash");
    compare.arg(&script).args(["-c", "-p", PEERS, "-r", &repeats.to_string(), "-o"]).arg(&values);
    if !attached(compare.env("CANDIDATE", candidate))? {
        return Ok(false);
    }
    let batched = Command::new(target.join("release/warren-bench-udp"))
        .args(["compare", &repeats.to_string()])
        .stderr(Stdio::inherit())
        .output()?;
    ensure!(batched.status.success(), "warren-bench-udp failed");
    std::fs::write(target.join("xtask/bench-udp.txt"), batched.stdout)?;
    rewrite()
}

/// Writes the page from what was measured last.
pub(crate) fn rewrite() -> Result<bool> {
    let measured = target().join("xtask");
    let read =
        |name: &str| std::fs::read_to_string(measured.join(name)).with_context(|| format!("no {name} yet"));
    let values = Values::parse(&read("bench.tsv")?);
    write_page(TUNNEL, &format!("{}\n{}", table(&values, values.repeats()), read("bench-udp.txt")?))?;
    say(&format!("{PAGE} has the table"));
    Ok(true)
}

/// Prints a table of times to the first byte and to a direct path.
pub(crate) fn paths() -> Result<bool> {
    setup::for_demo()?;
    let mut build = cargo();
    if !attached(build.args(["build", "--locked", "--workspace", "--bins"]))? {
        return Ok(false);
    }
    attached(&mut in_namespaces(Command::new(target().join("debug/path-bench"))))
}

/// The relay against coturn: packets, and idle clients. The servers take core 0, the load core 1.
pub(crate) fn relay() -> Result<bool> {
    setup::for_relay_bench()?;
    if !attached(cargo().args(["build", "--locked", "--release", "-p", "warren-bench"]))? {
        return Ok(false);
    }
    let mut text = String::new();
    for words in [["packets", RELAY_REPEATS], ["idle", IDLE_CLIENTS]] {
        let mut bench = Command::new("taskset");
        bench.args(["-c", "1"]).arg(target().join("release/warren-bench-relay")).args(words);
        let done = bench.stderr(Stdio::inherit()).output()?;
        ensure!(done.status.success(), "warren-bench-relay {} failed", words.join(" "));
        let _ = writeln!(text, "\n`warren-bench-relay {}`\n", words.join(" "));
        text.push_str(&String::from_utf8(done.stdout)?);
    }
    write_page(RELAY, &text)?;
    say(&format!("{PAGE} has the table"));
    Ok(true)
}

fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

/// Per peer and metric, the value of each repeat.
struct Values(BTreeMap<String, BTreeMap<String, BTreeMap<u32, f64>>>);

impl Values {
    /// Lines `repeat, peer, metric, value`; what is no number was not measured.
    fn parse(text: &str) -> Self {
        let mut out = BTreeMap::<String, BTreeMap<String, BTreeMap<u32, f64>>>::new();
        for line in text.lines() {
            let fields: Vec<&str> = line.split('\t').collect();
            let [repeat, peer, metric, value] = fields.as_slice() else { continue };
            let (Ok(repeat), Ok(value)) = (repeat.parse(), value.parse()) else { continue };
            let metrics = out.entry((*peer).to_owned()).or_default();
            metrics.entry((*metric).to_owned()).or_default().insert(repeat, value);
        }
        Self(out)
    }

    fn repeats(&self) -> u32 {
        let numbers = self.0.values().flat_map(BTreeMap::values).flat_map(BTreeMap::keys);
        numbers.copied().max().unwrap_or(0)
    }

    fn of(&self, peer: &str, metric: &str) -> Option<&BTreeMap<u32, f64>> {
        self.0.get(peer)?.get(metric).filter(|values| !values.is_empty())
    }

    /// Median of ours to theirs, repeat by repeat.
    fn ratio(&self, peer: &str, metric: &str) -> Option<f64> {
        let (ours, theirs) = (self.of(OURS, metric)?, self.of(peer, metric)?);
        let ratios =
            ours.iter().filter_map(|(repeat, value)| Some(value / theirs.get(repeat).filter(|v| **v > 0.0)?));
        median(ratios.collect())
    }
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let upper = *values.get(values.len() / 2)?;
    let lower = *values.get((values.len() - 1) / 2)?;
    Some((upper + lower) / 2.0)
}

fn table(values: &Values, repeats: u32) -> String {
    let mut out = format!(
        "`cargo xtask bench {repeats}`: medians of {repeats} interleaved repeats with least and most, one core per end; \
         in brackets Warren's ratio to it (medians of each repeat's).\n\n|"
    );
    let peers: Vec<&str> = values.0.keys().map(String::as_str).filter(|peer| *peer != OURS).collect();
    let _ = write!(out, " | Warren");
    peers.iter().for_each(|peer| out.push_str(&format!(" | {}", full_name(peer))));
    out.push_str(" |\n|---|---");
    peers.iter().for_each(|_| out.push_str("|---"));
    out.push_str("|\n");
    for (metric, name, digits) in METRICS {
        let _ = write!(out, "| {name}");
        for peer in std::iter::once(OURS).chain(peers.iter().copied()) {
            let cell = values.of(peer, metric).and_then(|values| {
                let all: Vec<f64> = values.values().copied().collect();
                let (least, most) =
                    (all.iter().copied().reduce(f64::min)?, all.iter().copied().reduce(f64::max)?);
                Some(format!("{:.digits$} ({least:.digits$}–{most:.digits$})", median(all)?))
            });
            let ratio = (peer != OURS && metric != "noise" && metric != "steal")
                .then(|| values.ratio(peer, metric))
                .flatten()
                .map(|ratio| format!(" [{ratio:.2}]"));
            let _ = write!(out, " | {}{}", cell.unwrap_or_else(|| "–".to_owned()), ratio.unwrap_or_default());
        }
        out.push_str(" |\n");
    }
    out
}

/// What the script's short names stand for.
fn full_name(peer: &str) -> &str {
    match peer {
        "wggo" => "wireguard-go (Debian)",
        "wggo2" => "wireguard-go (newer)",
        "boring" => "boringtun-cli",
        "boring1" => "boringtun-cli, 1 thread",
        "gota" => "gotatun-cli",
        "nebaes" => "nebula AES",
        "nebcha" => "nebula ChaCha",
        other => other,
    }
}

fn write_page(begin: &str, table: &str) -> Result<()> {
    let path = root().join(PAGE);
    let page = std::fs::read_to_string(&path).with_context(|| format!("reading {PAGE}"))?;
    let (before, rest) = page.split_once(begin).context("the page's mark for the table")?;
    let (_, after) = rest.split_once(END).context("the page's mark for the table's end")?;
    std::fs::write(&path, format!("{before}{begin}\n{table}{END}{after}"))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_spreads_and_ratios_of_each_repeat() {
        let text = "1\tcand\ttcp1\t4\n1\tboring\ttcp1\t2\n2\tcand\ttcp1\t9\n2\tboring\ttcp1\t3\n\
                    3\tcand\ttcp1\t5\n3\tboring\ttcp1\t5\n0\tboring\trss_idle\tx\n";
        let values = Values::parse(text);
        assert_eq!(values.ratio("boring", "tcp1"), Some(2.0));
        assert_eq!(values.ratio("boring", "rss_idle"), None);
        assert_eq!(values.repeats(), 3);
        assert_eq!(median(vec![1.0, 2.0]), Some(1.5));
        let table = table(&values, 3);
        assert!(
            table.contains("| TCP 1 stream, Gbit/s | 5.00 (4.00–9.00) | 3.00 (2.00–5.00) [2.00] |"),
            "{table}"
        );
        assert!(table.contains("| RTT idle, ms | – | – |"), "{table}");
    }
}
