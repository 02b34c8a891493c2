//! Dependencies point one way, and pure crates stay pure: checked on what cargo itself resolved, and on the source where
//! pure code lives in a crate with I/O.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

/// Who may name whom in `[dependencies]`, of the workspace's own crates.
const MAY_USE: [(&str, &[&str]); 8] = [
    ("warren-common", &[]),
    ("warren-engine", &["warren-common"]),
    ("warren-agent", &["warren-common", "warren-engine", "warren-relay"]),
    ("warren-relay", &["warren-common"]),
    ("warren-coordinator", &["warren-common", "warren-relay"]),
    (
        "warren-netns-tests",
        &["warren-common", "warren-engine", "warren-agent", "warren-relay", "warren-coordinator"],
    ),
    ("warren-bench", &["warren-common", "warren-engine", "warren-agent", "warren-relay"]),
    ("xtask", &[]),
];

/// Crates without I/O, clock or operating system randomness.
const PURE: [&str; 2] = ["warren-common", "warren-engine"];

/// What a pure crate must not reach by any path.
const IO: [&str; 14] = [
    "async-std",
    "axum",
    "hyper",
    "libsqlite3-sys",
    "mio",
    "netlink-sys",
    "quinn",
    "quinn-udp",
    "rtnetlink",
    "socket2",
    "sqlx",
    "tokio",
    "tokio-tungstenite",
    "tun-rs",
];

/// What a pure crate must not name itself, although something below it may (snow brings a generator that
/// is never used, ring brings its own).
const AMBIENT: [&str; 6] = ["getrandom", "libc", "nix", "rand", "rustix", "tracing-subscriber"];

/// Pure code by its place in the workspace: files, and folders with all below. Those of relay and coordinator live
/// in crates with I/O, whose dependencies say nothing about them.
const PURE_SOURCE: [&str; 9] = [
    "common/src",
    "agent/engine/src",
    "relay/src/core.rs",
    "relay/src/core",
    "relay/src/stun.rs",
    "coordinator/src/domain.rs",
    "coordinator/src/domain",
    "coordinator/src/push.rs",
    "coordinator/src/push",
];

/// What pure code must not name: I/O and what does it, clocks, randomness that nobody handed in, other tasks.
const IMPURE: [&str; 36] = [
    "tokio",
    "tokio_util",
    "async_std",
    "sqlx",
    "quinn",
    "rustls",
    "axum",
    "hyper",
    "tungstenite",
    "tokio_tungstenite",
    "socket2",
    "libc",
    "nix",
    "rustix",
    "UdpSocket",
    "TcpStream",
    "TcpListener",
    "UnixStream",
    "std::fs",
    "std::io",
    "std::env",
    "std::process",
    "std::thread",
    "Instant::now",
    "SystemTime",
    "UNIX_EPOCH",
    "getrandom",
    "OsRng",
    "OsEntropy",
    "ThreadRng",
    "thread_rng",
    "from_entropy",
    "from_os_rng",
    // Their hashers are seeded by the system.
    "RandomState",
    "HashMap::new",
    "HashSet::new",
];

/// `cargo metadata` of this workspace.
struct Metadata(Value);

impl Metadata {
    fn load() -> Result<Self> {
        let output = Command::new(env!("CARGO"))
            .args(["metadata", "--format-version", "1", "--locked", "--offline"])
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .output()?;
        ensure!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
        Ok(Self(serde_json::from_slice(&output.stdout)?))
    }

    /// The workspace's own packages by name.
    fn members(&self) -> Result<BTreeMap<&str, &Value>> {
        let ids: BTreeSet<&str> = array(&self.0["workspace_members"])?.filter_map(Value::as_str).collect();
        let packages = array(&self.0["packages"])?;
        packages
            .filter(|package| package["id"].as_str().is_some_and(|id| ids.contains(id)))
            .map(|package| Ok((text(&package["name"])?, package)))
            .collect()
    }

    /// Names of all packages reached from `member` over normal dependencies.
    fn closure(&self, member: &str) -> Result<BTreeSet<&str>> {
        let names: BTreeMap<&str, &str> = array(&self.0["packages"])?
            .map(|package| Ok((text(&package["id"])?, text(&package["name"])?)))
            .collect::<Result<_>>()?;
        let nodes: BTreeMap<&str, &Value> = array(&self.0["resolve"]["nodes"])?
            .map(|node| Ok((text(&node["id"])?, node)))
            .collect::<Result<_>>()?;
        let start = text(&self.members()?.get(member).with_context(|| format!("no crate {member}"))?["id"])?;
        let mut seen = BTreeSet::new();
        let mut todo = vec![start];
        while let Some(id) = todo.pop() {
            if !seen.insert(id) {
                continue;
            }
            for dependency in array(&nodes.get(id).context("a resolved package")?["deps"])? {
                // A kind of null is a normal dependency.
                if array(&dependency["dep_kinds"])?.any(|kind| kind["kind"].is_null()) {
                    todo.push(text(&dependency["pkg"])?);
                }
            }
        }
        Ok(seen.into_iter().filter_map(|id| names.get(id).copied()).collect())
    }
}

fn array(value: &Value) -> Result<impl Iterator<Item = &Value>> {
    Ok(value.as_array().context("cargo metadata: an array")?.iter())
}

fn text(value: &Value) -> Result<&str> {
    value.as_str().context("cargo metadata: a string")
}

/// The packages that `package` names in a dependency section: `None` is `[dependencies]`.
fn named<'a>(package: &'a Value, kind: Option<&str>) -> Result<BTreeSet<&'a str>> {
    array(&package["dependencies"])?
        .filter(|dependency| dependency["kind"].as_str() == kind)
        .map(|dependency| text(&dependency["name"]))
        .collect()
}

#[test]
fn dependencies_point_one_way() -> Result<()> {
    let metadata = Metadata::load()?;
    let members = metadata.members()?;
    let known: BTreeSet<&str> = MAY_USE.iter().map(|(name, _)| *name).collect();
    let found: BTreeSet<&str> = members.keys().copied().collect();
    ensure!(found == known, "a new crate needs its place in MAY_USE: {found:?} is not {known:?}");
    for (name, allowed) in MAY_USE {
        let own: BTreeSet<&str> =
            named(members[name], None)?.into_iter().filter(|used| known.contains(used)).collect();
        let wrong: Vec<_> = own.iter().filter(|used| !allowed.contains(used)).collect();
        ensure!(wrong.is_empty(), "{name} must not depend on {wrong:?}");
    }
    Ok(())
}

#[test]
fn pure_crates_reach_no_io() -> Result<()> {
    let metadata = Metadata::load()?;
    let members = metadata.members()?;
    for name in PURE {
        let reached = metadata.closure(name)?;
        ensure!(reached.contains(name), "{name} reaches itself, or this test sees nothing");
        let wrong: Vec<_> = IO.iter().filter(|io| reached.contains(*io)).collect();
        ensure!(wrong.is_empty(), "{name} reaches {wrong:?}; see `cargo tree -p {name} -e normal -i NAME`");
        let direct = named(members[name], None)?;
        let wrong: Vec<_> = AMBIENT.iter().filter(|ambient| direct.contains(*ambient)).collect();
        ensure!(wrong.is_empty(), "{name} names {wrong:?}");
    }
    // The same search finds what is there in a crate that may have it.
    ensure!(metadata.closure("warren-agent")?.contains("tokio"), "the search is blind");
    Ok(())
}

#[test]
fn boringtun_is_a_witness_in_tests_and_never_shipped() -> Result<()> {
    let metadata = Metadata::load()?;
    for (name, package) in metadata.members()? {
        for kind in [None, Some("build")] {
            ensure!(!named(package, kind)?.contains("boringtun"), "{name} ships boringtun");
        }
        ensure!(!metadata.closure(name)?.contains("boringtun"), "{name} reaches boringtun");
    }
    let nodes = array(&metadata.0["resolve"]["nodes"])?;
    let boringtun: Vec<&Value> =
        nodes.filter(|node| node["id"].as_str().is_some_and(|id| id.contains("boringtun@"))).collect();
    ensure!(boringtun.len() == 1, "one boringtun is in the tests, not {}", boringtun.len());
    for node in boringtun {
        let features: Vec<&str> = array(&node["features"])?.filter_map(Value::as_str).collect();
        // Its mock clock would reach every binary that is built together with the tests.
        ensure!(!features.iter().any(|feature| feature.contains("mock")), "{features:?}");
    }
    Ok(())
}

/// The Rust files at `place`, which is one or holds them, without tests.
fn rust_files(place: &Path) -> Result<Vec<PathBuf>> {
    if place.is_file() {
        return Ok(vec![place.to_owned()]);
    }
    let mut files = Vec::new();
    for entry in fs::read_dir(place).with_context(|| format!("reading {}", place.display()))? {
        let path = entry?.path();
        match path.file_name().and_then(|name| name.to_str()) {
            Some("tests" | "tests.rs") => {}
            _ if path.is_dir() => files.extend(rust_files(&path)?),
            Some(name) if name.ends_with(".rs") => files.push(path),
            _ => {}
        }
    }
    Ok(files)
}

/// Where the code (not its comments and tests) of `source` names something impure.
fn impurities(source: &str) -> Vec<(usize, &'static str)> {
    let lines: Vec<&str> = source.lines().collect();
    let tests =
        lines.windows(2).position(|pair| pair[0] == "#[cfg(test)]" && pair[1].starts_with("mod tests {"));
    let code = &lines[..tests.unwrap_or(lines.len())];
    let found = code.iter().enumerate().flat_map(|(number, line)| {
        let line = line.split("//").next().unwrap_or_default();
        let named = IMPURE.iter().filter(move |word| names(line, word));
        let waits = (line.contains("async ") || line.contains(".await")).then_some(&"async");
        named.chain(waits).map(move |word| (number + 1, *word))
    });
    found.collect()
}

/// True if `word` stands in `line` and is no part of a longer name.
fn names(line: &str, word: &str) -> bool {
    let part = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(word).any(|(at, _)| {
        !line[..at].chars().next_back().is_some_and(part)
            && !line[at + word.len()..].chars().next().is_some_and(part)
    })
}

#[test]
fn pure_code_names_no_io_clock_or_randomness_of_the_system() -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut wrong = Vec::new();
    for place in PURE_SOURCE {
        let files = rust_files(&root.join(place))?;
        ensure!(!files.is_empty(), "{place} has no source: it has moved, and PURE_SOURCE must follow");
        for file in files {
            let found = impurities(&fs::read_to_string(&file)?);
            let name = file.strip_prefix(&root).unwrap_or(&file).display().to_string();
            wrong.extend(found.into_iter().map(|(line, word)| format!("{name}:{line} names {word}")));
        }
    }
    ensure!(
        wrong.is_empty(),
        "time, randomness and I/O are handed to pure code as arguments:\n{}",
        wrong.join("\n")
    );
    Ok(())
}

#[test]
fn the_search_for_impure_names_sees_them() -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    for (file, word) in [
        ("relay/src/server/quic.rs", "quinn"),
        ("relay/src/server.rs", "tokio"),
        ("relay/src/os.rs", "SystemTime"),
        ("coordinator/src/os.rs", "OsEntropy"),
        ("coordinator/src/store/sqlite.rs", "sqlx"),
        ("agent/src/control.rs", "async"),
    ] {
        let found = impurities(&fs::read_to_string(root.join(file))?);
        ensure!(found.iter().any(|(_, seen)| *seen == word), "{word} is not seen in {file}: {found:?}");
    }
    let clean =
        "let now = instant::now; // tokio\nlet tokios = 1;\n#[cfg(test)]\nmod tests {\n use std::fs;\n}";
    ensure!(impurities(clean).is_empty(), "{:?}", impurities(clean));
    Ok(())
}
