//! `cargo xtask setup`: installs what the tests shell out to, where absent, and nothing else.

use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};

use crate::shell::{cargo, find, is_root, logged, say};

/// Programs and the Debian packages that hold them.
const PROGRAMS: [(&str, &str); 17] = [
    ("cc", "gcc"),
    ("ip", "iproute2"),
    ("nft", "nftables"),
    ("ping", "iputils-ping"),
    ("conntrack", "conntrack"),
    ("tcpdump", "tcpdump"),
    ("wg", "wireguard-tools"),
    ("wireguard-go", "wireguard-go"),
    ("iperf3", "iperf3"),
    ("jq", "jq"),
    ("unshare", "util-linux"),
    ("git", "git"),
    ("ssh-keygen", "openssh-client"),
    ("valgrind", "valgrind"),
    ("miniupnpd", "miniupnpd-nftables"),
    ("turnserver", "coturn"),
    ("tinyproxy", "tinyproxy"),
];

/// Cargo subcommands, at the versions that this repository is known to work with.
const SUBCOMMANDS: [(&str, &str); 2] = [("cargo-nextest", "0.9.143"), ("cargo-deny", "0.20.2")];

pub(crate) fn run() -> Result<()> {
    programs(&PROGRAMS)?;
    for (program, version) in SUBCOMMANDS {
        if find(program).is_none() {
            install_subcommand(program, version)?;
        }
    }
    Ok(())
}

/// Only what the demo shells out to: no minutes of compiling for what it does not need.
pub(crate) fn for_demo() -> Result<()> {
    only(&["cc", "ip", "nft", "ping", "conntrack", "unshare"])
}

/// Only what the relay is compared with.
pub(crate) fn for_relay_bench() -> Result<()> {
    only(&["turnserver"])
}

fn only(needed: &[&str]) -> Result<()> {
    let wanted: Vec<_> = PROGRAMS.into_iter().filter(|(program, _)| needed.contains(program)).collect();
    programs(&wanted)
}

fn programs(wanted: &[(&str, &'static str)]) -> Result<()> {
    let missing: Vec<&str> =
        wanted.iter().filter(|(program, _)| find(program).is_none()).map(|(_, package)| *package).collect();
    if missing.is_empty() { Ok(()) } else { install_packages(&missing) }
}

fn install_packages(packages: &[&str]) -> Result<()> {
    let by_hand = format!("apt-get install --no-install-recommends {}", packages.join(" "));
    ensure!(
        find("apt-get").is_some(),
        "these Debian packages' programs are missing, and there is no apt-get here: {}",
        packages.join(" ")
    );
    say(&format!("      installing {}", packages.join(" ")));
    apt("apt-update", &["update", "-q"]).with_context(|| format!("by hand: {by_hand}"))?;
    let mut args = vec!["install", "-q", "-y", "--no-install-recommends"];
    args.extend(packages);
    apt("apt-install", &args).with_context(|| format!("by hand: {by_hand}"))
}

fn apt(name: &str, args: &[&str]) -> Result<()> {
    let mut command = if is_root() {
        Command::new("apt-get")
    } else {
        ensure!(find("sudo").is_some(), "apt-get needs root, and there is no sudo");
        let mut sudo = Command::new("sudo");
        sudo.args(["-n", "--preserve-env=DEBIAN_FRONTEND", "apt-get"]);
        sudo
    };
    let done = logged(name, command.args(args).env("DEBIAN_FRONTEND", "noninteractive"))?;
    if !done.success {
        bail!("apt-get {} failed:\n{}", args.join(" "), done.output.trim_end());
    }
    Ok(())
}

fn install_subcommand(program: &str, version: &str) -> Result<()> {
    say(&format!("      building {program} {version} (minutes, once per machine)"));
    // Compiled once, run for seconds: link-time optimisation would cost more than it ever saves.
    let done = logged(
        &format!("install-{program}"),
        cargo()
            .args(["install", "--locked", program, "--version", version])
            .env_remove("CARGO_TARGET_DIR")
            .env("CARGO_PROFILE_RELEASE_LTO", "off")
            .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16")
            .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1")
            .env("CARGO_PROFILE_RELEASE_DEBUG", "0"),
    )?;
    if !done.success {
        bail!("cargo install {program} failed:\n{}", done.output.trim_end());
    }
    say(&format!("      {program} built in {} s", done.took.as_secs()));
    Ok(())
}
