//! Dependencies point one way, and pure crates stay pure: checked on what cargo itself resolved.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

/// Who may name whom in `[dependencies]`, of the workspace's own crates.
const MAY_USE: [(&str, &[&str]); 7] = [
    ("warren-common", &[]),
    ("warren-engine", &["warren-common"]),
    ("warren-agent", &["warren-common", "warren-engine"]),
    ("warren-relay", &["warren-common"]),
    ("warren-coordinator", &["warren-common", "warren-relay"]),
    (
        "warren-netns-tests",
        &["warren-common", "warren-engine", "warren-agent", "warren-relay", "warren-coordinator"],
    ),
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
