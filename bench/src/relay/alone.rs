//! A core that nobody else uses: a relay has a machine of its own, and what the rest of this one does for a millisecond is
//! what its 99th percentile would show.

use std::fs;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result};

use super::server::{CORE, LOAD_CORE};

/// Everything that runs, but for the kernel's own threads, stays off [`CORE`] while this lives: for good, if the benchmark is killed.
#[derive(Debug)]
pub struct Alone {
    /// Processes that were sent away, and where they may run otherwise.
    sent_away: Vec<(String, String)>,
}

impl Alone {
    /// Sends them away, and with them what they start.
    ///
    /// # Errors
    /// The system shows no processes.
    pub fn on_core() -> Result<Self> {
        let mut sent_away = Vec::new();
        for entry in fs::read_dir("/proc").context("/proc")? {
            let Ok(pid) = entry?.file_name().into_string() else { continue };
            // One that has ended meanwhile has none.
            let Ok(status) = fs::read_to_string(format!("/proc/{pid}/status")) else { continue };
            let allowed = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
            if let Some(allowed) = allowed.map(str::trim)
                && allowed != LOAD_CORE
                && allowed != CORE
                && may_run(&pid, LOAD_CORE)
            {
                sent_away.push((pid, allowed.to_owned()));
            }
        }
        Ok(Self { sent_away })
    }
}

impl Drop for Alone {
    fn drop(&mut self) {
        for (pid, allowed) in &self.sent_away {
            may_run(pid, allowed);
        }
    }
}

/// False for a kernel thread, and for what has ended.
fn may_run(pid: &str, cores: &str) -> bool {
    let mut taskset = Command::new("taskset");
    taskset.args(["-a", "-c", "-p", cores, pid]).stdout(Stdio::null()).stderr(Stdio::null());
    taskset.status().is_ok_and(|status| status.success())
}
