//! Network namespaces: names, life and death, and how to get a process or a closure into one.
//!
//! A name is `wl-<pid>-<start time>-<n>-<host>`. The first two fields identify the owning process even
//! after its pid was used again, so that [`sweep`] can tell a lab whose owner was killed from a lab
//! that is in use by a neighbour.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write as _;
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context as _, Result, bail};
use rustix::process::{Pid, Signal};
use rustix::thread::LinkNameSpaceType;

/// Where `ip netns` mounts the namespaces.
const NETNS_DIR: &str = "/run/netns";

/// First part of every name that a lab makes.
const PREFIX: &str = "wl";

/// A file of this name in a lab's directory protects the lab from [`sweep`].
const KEEP_MARKER: &str = "keep";

/// Environment variable of every program that a lab starts; its value is the lab's name.
pub(super) const MARKER: &str = "WARREN_LAB";

/// Where administrators' tools live; an ordinary user's PATH often lacks these.
const SBIN: [&str; 3] = ["/usr/sbin", "/sbin", "/usr/local/sbin"];

/// One lab's name: unique on this machine at any one time.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct LabName(String);

impl LabName {
    /// The next free name of this process.
    pub(super) fn next() -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let pid = std::process::id();
        let start = start_time(pid).context("reading the own start time from /proc")?;
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        Ok(Self(format!("{PREFIX}-{pid}-{start}-{n}")))
    }

    /// The lab that a namespace name belongs to, if it is one of ours.
    fn of(name: &str) -> Option<Self> {
        let mut parts = name.split('-');
        let (prefix, pid, start, n) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        let numbers = [pid, start, n].iter().all(|part| part.parse::<u64>().is_ok());
        (prefix == PREFIX && numbers).then(|| Self(format!("{prefix}-{pid}-{start}-{n}")))
    }

    /// Whether the process that made the lab still runs.
    fn owner_lives(&self) -> bool {
        let mut parts = self.0.split('-').skip(1);
        let pid = parts.next().and_then(|pid| pid.parse().ok());
        let start = parts.next().and_then(|start| start.parse::<u64>().ok());
        match (pid.and_then(start_time), start) {
            (Some(now), Some(then)) => now == then,
            _ => false,
        }
    }

    /// The text, for messages and for `ip netns`.
    pub(super) fn as_str(&self) -> &str {
        &self.0
    }

    /// The lab's private directory.
    pub(super) fn dir(&self) -> PathBuf {
        std::env::temp_dir().join(&self.0)
    }

    /// The namespace name of one host.
    pub(super) fn netns(&self, host: &str) -> String {
        format!("{}-{host}", self.0)
    }

    /// Protects the lab from [`sweep`] after its owner has ended.
    pub(super) fn keep(&self) -> Result<()> {
        fs::write(self.dir().join(KEEP_MARKER), "").context("marking the lab as kept")
    }

    fn is_kept(&self) -> bool {
        self.dir().join(KEEP_MARKER).exists()
    }

    /// Ends every process inside the lab, removes its namespaces and its directory. Idempotent.
    pub(super) fn remove(&self) {
        let names: Vec<String> =
            list().into_iter().filter(|name| Self::of(name).as_ref() == Some(self)).collect();
        let inodes = names.iter().filter_map(|name| Some(fs::metadata(path(name)).ok()?.ino())).collect();
        // Names first: no program can enter any more while the ones inside are killed.
        for name in &names {
            // A second sweeper may have been faster: gone is what we want.
            let _ = ip().args(["netns", "del", name]).output();
        }
        self.kill_inside(&inodes);
        let _ = fs::remove_dir_all(self.dir());
    }

    /// Kills the lab's processes until none is left: those whose main thread is in one of the
    /// namespaces, and those on their way into one, which only their environment gives away.
    fn kill_inside(&self, inodes: &BTreeSet<u64>) {
        /// A process may fork while we read /proc: look again, but not for ever.
        const MAX_ROUNDS: usize = 50;
        let marker = format!("{MARKER}={}", self.0);
        for _ in 0..MAX_ROUNDS {
            let mut found = false;
            for pid in file_names(Path::new("/proc")).filter_map(|name| name.parse::<i32>().ok()) {
                let own = u32::try_from(pid) == Ok(std::process::id());
                let inside = fs::metadata(format!("/proc/{pid}/ns/net"))
                    .is_ok_and(|netns| inodes.contains(&netns.ino()));
                let marked = || {
                    let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
                    environment.split(|byte| *byte == 0).any(|entry| entry == marker.as_bytes())
                };
                if !own && (inside || marked()) {
                    found = true;
                    if let Some(pid) = Pid::from_raw(pid) {
                        let _ = rustix::process::kill_process(pid, Signal::KILL);
                    }
                }
            }
            if !found {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }
}

/// Removes every lab whose owner is dead and that was not kept on purpose; `kept` includes the latter.
/// Returns how many labs were removed. Labs of living processes are never touched.
pub fn sweep(kept: bool) -> usize {
    let stale: BTreeSet<LabName> = list()
        .iter()
        .chain(&stray_directories())
        .filter_map(|name| LabName::of(name))
        .filter(|lab| !lab.owner_lives() && (kept || !lab.is_kept()))
        .collect();
    for lab in &stale {
        lab.remove();
    }
    stale.len()
}

/// The names of all labs' namespaces that exist on this machine at the moment.
pub fn list() -> Vec<String> {
    let prefix = format!("{PREFIX}-");
    file_names(Path::new(NETNS_DIR)).filter(|name| name.starts_with(&prefix)).collect()
}

fn stray_directories() -> Vec<String> {
    file_names(&std::env::temp_dir()).collect()
}

fn file_names(dir: &Path) -> impl Iterator<Item = String> {
    fs::read_dir(dir).into_iter().flatten().filter_map(|entry| entry.ok()?.file_name().into_string().ok())
}

/// Field 22 of `/proc/PID/stat`: clock ticks after boot at which the process started.
fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command name, field 2, may hold spaces and parentheses: count from the last one.
    let after_name = stat.rsplit_once(')')?.1;
    after_name.split_whitespace().nth(19)?.parse().ok()
}

fn path(name: &str) -> PathBuf {
    Path::new(NETNS_DIR).join(name)
}

/// Runs `f` on a thread that is inside the namespace. Sockets that it opens stay inside for their life.
pub(super) fn enter<T: Send>(name: &str, f: impl FnOnce() -> T + Send) -> Result<T> {
    let netns = fs::File::open(path(name)).with_context(|| format!("opening namespace {name}"))?;
    std::thread::scope(|scope| {
        let inside = scope.spawn(|| {
            let kind = Some(LinkNameSpaceType::Network);
            rustix::thread::move_into_link_name_space(netns.as_fd(), kind)
                .with_context(|| format!("entering namespace {name}"))?;
            Ok(f())
        });
        match inside.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// Sets kernel parameters (`net.ipv4.ip_forward=1`) inside the namespace.
pub(super) fn sysctl(name: &str, settings: &[&str]) -> Result<()> {
    enter(name, || {
        for setting in settings {
            let (key, value) = setting.split_once('=').context("a sysctl is KEY=VALUE")?;
            let file = format!("/proc/sys/{}", key.replace('.', "/"));
            fs::write(&file, value).with_context(|| format!("writing {value} to {file}"))?;
        }
        Ok(())
    })?
}

/// Creates a namespace with its loopback interface up.
pub(super) fn add(name: &str) -> Result<()> {
    feed(ip().args(["netns", "add", name]), "")?;
    batch(name, "link set lo up\n")
}

/// Runs several `ip` commands, one a line, inside the namespace.
pub(super) fn batch(name: &str, lines: &str) -> Result<()> {
    feed(ip().args(["-n", name, "-batch", "-"]), lines)
}

/// Runs a program with `input` on its standard input; its error text is the error.
pub(super) fn feed(command: &mut Command, input: &str) -> Result<()> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting {command:?}"))?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(input.as_bytes())?;
    }
    let output = child.wait_with_output()?;
    if !output.status.success() {
        bail!(
            "{command:?} ended with {}: {}\nits input was:\n{input}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}

/// The `ip` command.
pub(super) fn ip() -> Command {
    Command::new(tool("ip").unwrap_or_else(|| PathBuf::from("ip")))
}

/// Finds a program on PATH or among the administrators' tools.
pub(super) fn tool(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(SBIN.iter().map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_and_foreign_names_are_left_alone() {
        let lab = LabName::next().unwrap();
        assert_eq!(LabName::of(&lab.netns("R1-lan")), Some(lab.clone()));
        assert_eq!(LabName::of(lab.as_str()), Some(lab));
        for foreign in ["", "wl", "wl-1-2", "wl-a-2-3-S", "vpn", "xwl-1-2-3-S"] {
            assert_eq!(LabName::of(foreign), None, "{foreign}");
        }
    }

    #[test]
    fn an_owner_is_its_pid_and_its_start_time() {
        assert!(LabName::next().unwrap().owner_lives());
        let reused = format!("{PREFIX}-{}-1-0", std::process::id());
        assert!(!LabName::of(&reused).unwrap().owner_lives());
    }
}
