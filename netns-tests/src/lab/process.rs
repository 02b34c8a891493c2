//! A program running inside a host.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result};
use rustix::process::{Pid, Signal};

use super::wait::eventually;

/// A running program; dropping it kills it. Standard output and error go to one log file, in order.
#[derive(Debug)]
pub struct Process {
    child: Child,
    log: PathBuf,
    what: String,
}

impl Process {
    pub(super) fn start(mut command: Command, dir: &Path, host: &str, number: usize) -> Result<Self> {
        let log = dir.join(format!("{number}.log"));
        let file = File::options().create(true).append(true).open(&log)?;
        let what = format!("{host}: {command:?}");
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("starting {what}"))?;
        Ok(Self { child, log, what })
    }

    /// The process id; signals reach the program itself.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Where the output goes.
    pub fn log_path(&self) -> &Path {
        &self.log
    }

    /// The output so far, in whole lines: a line that crosses a page of the file can be read before its second half is there.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub fn log(&self) -> Result<String> {
        let mut log = self.output()?;
        log.truncate(log.rfind('\n').map_or(0, |end| end + 1));
        Ok(log)
    }

    fn output(&self) -> Result<String> {
        let bytes = fs::read(&self.log).with_context(|| format!("reading the log of {}", self.what))?;
        // Half a line may end in half a character.
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Waits until a line of the output holds `text` and returns that line.
    ///
    /// # Errors
    /// When the program ended without printing it, or `limit` passed.
    pub fn wait_for_line(&mut self, text: &str, limit: Duration) -> Result<String> {
        let what = format!("{:?} in the output of {}", text, self.what);
        eventually(&what, limit, || {
            // The status is taken first: what is not in the log then, never will be.
            let ended = self.child.try_wait()?;
            let log = if ended.is_some() { self.output()? } else { self.log()? };
            let line = log.lines().find(|line| line.contains(text));
            match (line, ended) {
                (Some(line), _) => Ok(Some(line.to_owned())),
                (None, None) => Ok(None),
                (None, Some(status)) => {
                    anyhow::bail!("{} ended ({status}) without printing {text:?}:\n{log}", self.what)
                }
            }
        })
    }

    /// Whether it still runs.
    ///
    /// # Errors
    /// When its status cannot be asked for.
    pub fn is_running(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// When the process is gone already.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        let ended = self.child.try_wait()?;
        anyhow::ensure!(ended.is_none(), "{} has ended already", self.what);
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw).context("a pid is positive")?;
        rustix::process::kill_process(pid, signal).with_context(|| self.what.clone())
    }

    /// `kill -9`, and waits until it is gone.
    ///
    /// # Errors
    /// When it cannot be waited for.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        self.child.kill()?;
        Ok(self.child.wait()?)
    }

    /// Asks it to end with SIGTERM and waits for that, for at most `limit`.
    ///
    /// # Errors
    /// When it is gone already or does not end in time.
    pub fn stop(&mut self, limit: Duration) -> Result<ExitStatus> {
        self.signal(Signal::TERM)?;
        self.wait(limit)
    }

    /// Waits for its end, for at most `limit`.
    ///
    /// # Errors
    /// When it does not end in time.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let what = format!("the end of {}", self.what);
        eventually(&what, limit, || Ok(self.child.try_wait()?))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // An error means that it has ended, which is what we want.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(30);

    #[test]
    fn half_a_line_is_not_read_until_the_rest_is_there() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let mut command = Command::new("sh");
        command
            .current_dir(&dir)
            .args(["-c", "printf half; until [ -e on ]; do sleep 0.01; done; echo ' whole'"]);
        let mut process = Process::start(command, dir.path(), "here", 0)?;
        eventually("half a line", LIMIT, || Ok((process.output()? == "half").then_some(())))?;
        assert_eq!(process.log()?, "");
        fs::write(dir.path().join("on"), "")?;
        assert_eq!(process.wait_for_line("half", LIMIT)?, "half whole");
        Ok(())
    }

    #[test]
    fn what_a_program_left_without_an_end_of_line_is_found() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let mut command = Command::new("printf");
        command.arg("last words");
        let mut process = Process::start(command, dir.path(), "here", 0)?;
        process.wait(LIMIT)?;
        assert_eq!(process.wait_for_line("words", LIMIT)?, "last words");
        Ok(())
    }
}
