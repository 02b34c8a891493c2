//! The real binary as a process.

use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::{PATIENCE, http_get};

/// A running process; killed when dropped.
pub struct Running(pub Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Running {
    /// SIGKILL, and gone when this returns.
    pub fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }

    /// Asks it to stop; it must end well.
    pub fn terminate(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.0);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        assert!(self.0.wait().unwrap().success());
    }
}

/// Runs the real binary.
pub fn binary() -> Command {
    Command::new(env!("CARGO_BIN_EXE_warren-coordinator"))
}

/// The arguments of a coordinator without a relay at `addr`.
pub fn serve_args(state_dir: &Path, addr: SocketAddr) -> Vec<String> {
    let (dir, addr) = (state_dir.display().to_string(), addr.to_string());
    let url = format!("http://{addr}");
    ["serve", "--no-embedded-relay", "--state-dir", &dir, "--listen", &addr, "--public-url", &url]
        .map(str::to_owned)
        .to_vec()
}

/// Starts a coordinator without a relay.
pub fn serve(state_dir: &Path, addr: SocketAddr) -> Running {
    serve_with(state_dir, addr, &[])
}

/// The same with more arguments.
pub fn serve_with(state_dir: &Path, addr: SocketAddr, more: &[&str]) -> Running {
    let mut command = binary();
    command.args(serve_args(state_dir, addr)).args(more).stderr(Stdio::null());
    Running(command.spawn().unwrap())
}

/// The same with its log in a file.
pub fn serve_logging(state_dir: &Path, addr: SocketAddr, more: &[&str], log: &Path) -> Running {
    let mut command = binary();
    let log = std::fs::File::create(log).unwrap();
    command.args(serve_args(state_dir, addr)).args(more).env_remove("RUST_LOG").stderr(log);
    Running(command.spawn().unwrap())
}

/// Waits until a coordinator says that all is well.
pub async fn up(addr: SocketAddr) {
    until(|| async move { http_get(addr, "/healthz").await.is_some_and(|r| r.ends_with("ok\n")) }).await;
}

/// Waits until something is so.
pub async fn until<F: Future<Output = bool>>(mut so: impl FnMut() -> F) {
    let wait = async {
        while !so().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.expect("it gets there");
}

/// Runs `serve` with these arguments; it must end by itself: exit code and stderr.
pub fn fails(args: &[&str]) -> (i32, String) {
    let out = binary().arg("serve").args(args).output().unwrap();
    (out.status.code().unwrap_or(-1), String::from_utf8(out.stderr).unwrap())
}

/// A verb on a state directory: exit code, stdout, stderr.
pub fn verb(state_dir: &Path, args: &[&str]) -> (i32, String, String) {
    let out = binary().args(args).arg("--state-dir").arg(state_dir).output().unwrap();
    let text = |b: Vec<u8>| String::from_utf8(b).unwrap();
    (out.status.code().unwrap_or(-1), text(out.stdout), text(out.stderr))
}
