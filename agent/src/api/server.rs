//! The listening side of the local API.

use std::fs::{self, DirBuilder};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _, chown};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use socket2::{Domain, SockAddr, Socket, Type};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::JoinSet;
use tokio_util::task::AbortOnDropHandle;

use super::{MAX_CONNECTIONS, MAX_REQUEST, Reply, Request};
use crate::problem::{Problem, io_text};

/// Requests that wait for the daemon's attention.
const QUEUE: usize = 16;
/// A caller that takes longer to say what it wants loses its connection.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// Connections that the kernel keeps waiting.
const BACKLOG: i32 = 64;

/// A request with the way to answer it. The caller may be gone by then.
#[derive(Debug)]
pub struct Call {
    /// What is asked.
    pub request: Request,
    /// Takes the answer.
    pub reply: oneshot::Sender<Reply>,
}

/// The listening socket; dropping it stops listening and removes the file.
#[derive(Debug)]
pub struct Server {
    path: PathBuf,
    _task: AbortOnDropHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        // Best effort: the next start replaces a file that nobody listens on.
        let _ = fs::remove_file(&self.path);
    }
}

impl Server {
    /// Listens at `path`. `operator` may use the verbs that change something, beside root and the daemon's own user.
    ///
    /// # Errors
    /// Another daemon listens there, the directory is open to others, or there is no permission.
    pub fn listen(path: &Path, operator: Option<u32>) -> Result<(Self, mpsc::Receiver<Call>), Problem> {
        let listener = bind(path, operator)?;
        let (calls, receiver) = mpsc::channel(QUEUE);
        #[expect(clippy::disallowed_methods, reason = "owned by the handle: dropping it aborts the task")]
        let task = tokio::task::spawn(accept(listener, operator, calls));
        Ok((Self { path: path.to_owned(), _task: AbortOnDropHandle::new(task) }, receiver))
    }
}

fn bind(path: &Path, operator: Option<u32>) -> Result<UnixListener, Problem> {
    let dir = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    prepare_directory(dir, operator)?;
    match StdUnixStream::connect(path) {
        Ok(_) => {
            return Err(Problem::new(
                "socket-in-use",
                format!("another warrend listens at `{}`", path.display()),
                "stop it, or give this one its own --socket",
            ));
        }
        // Left behind by a daemon that was killed.
        Err(e) if e.kind() == ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(|e| access(path, &e))?;
        }
        Err(e) if e.kind() == ErrorKind::NotFound => {}
        Err(e) => return Err(access(path, &e)),
    }
    let open = || -> io::Result<UnixListener> {
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
        socket.set_nonblocking(true)?;
        socket.bind(&SockAddr::unix(path)?)?;
        // Nobody can connect until `listen`, so nobody ever meets another owner or mode.
        fs::set_permissions(path, fs::Permissions::from_mode(0o660))?;
        if let Some(uid) = operator {
            chown(path, Some(uid), None)?;
        }
        socket.listen(BACKLOG)?;
        UnixListener::from_std(std::os::fd::OwnedFd::from(socket).into())
    };
    open().map_err(|e| access(path, &e))
}

fn prepare_directory(dir: &Path, operator: Option<u32>) -> Result<(), Problem> {
    match DirBuilder::new().mode(0o750).create(dir) {
        Ok(()) => {
            if let Some(uid) = operator {
                chown(dir, Some(uid), None).map_err(|e| access(dir, &e))?;
            }
            return Ok(());
        }
        Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
        Err(e) => return Err(access(dir, &e)),
    }
    let meta = fs::metadata(dir).map_err(|e| access(dir, &e))?;
    // In a directory that others can write to they could put a socket of their own in our place.
    if meta.mode() & 0o022 != 0 {
        return Err(Problem::usage(
            "socket-directory",
            format!("the socket's directory `{}` can be written by other users", dir.display()),
            "give --socket a path in a directory of its own; it is made with mode 0750 if it is missing",
        ));
    }
    Ok(())
}

fn access(path: &Path, error: &io::Error) -> Problem {
    Problem::new(
        "socket",
        format!("the socket `{}` can't be made: {}", path.display(), io_text(error)),
        "run warrend as root, or give --socket a path in a directory that belongs to its user",
    )
}

async fn accept(listener: UnixListener, operator: Option<u32>, calls: mpsc::Sender<Call>) {
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        match listener.accept().await {
            Ok((stream, _)) => {
                let Ok(permit) = Arc::clone(&room).try_acquire_owned() else {
                    refuse(&stream);
                    continue;
                };
                let calls = calls.clone();
                connections.spawn(async move {
                    if let Err(e) = serve(stream, operator, calls).await {
                        tracing::debug!("a local caller went away: {e}");
                    }
                    drop(permit);
                });
            }
            Err(e) => {
                tracing::warn!("the local API can't accept a connection: {e}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Tells one caller too many, without waiting for it.
fn refuse(stream: &UnixStream) {
    let busy = Problem::new("busy", "too many callers talk with the daemon", "try again in a moment");
    let mut out = serde_json::to_vec(&Reply::Problem(busy)).unwrap_or_default();
    out.push(b'\n');
    let _ = stream.try_write(&out); // a fresh socket has room for it
}

async fn serve(stream: UnixStream, operator: Option<u32>, calls: mpsc::Sender<Call>) -> io::Result<()> {
    let uid = stream.peer_cred()?.uid();
    let (reader, mut writer) = stream.into_split();
    let mut reader = BufReader::new(reader.take(MAX_REQUEST as u64));
    let mut line = String::new();
    tokio::time::timeout(REQUEST_TIMEOUT, reader.read_line(&mut line)).await??;
    let reply = match serde_json::from_str::<Request>(&line) {
        Err(e) => Reply::Problem(Problem::usage(
            "bad-request",
            format!("the daemon does not understand the request: {e}"),
            "use a `warren` of the same version as `warrend`",
        )),
        Ok(request) if request.verb.writes() && !may_write(uid, operator) => Reply::Problem(Problem::new(
            "not-permitted",
            "only root and the operator may change the agent's state",
            "use sudo, or start warrend with --operator and your user's name",
        )),
        Ok(request) => {
            let (reply, answer) = oneshot::channel();
            if calls.send(Call { request, reply }).await.is_err() {
                return Ok(());
            }
            match answer.await {
                Ok(reply) => reply,
                Err(_) => Reply::Problem(Problem::new(
                    "stopping",
                    "the daemon stopped before it was done",
                    "start it again and repeat the command",
                )),
            }
        }
    };
    let mut out = serde_json::to_vec(&reply)?;
    out.push(b'\n');
    writer.write_all(&out).await?;
    writer.shutdown().await
}

fn may_write(uid: u32, operator: Option<u32>) -> bool {
    uid == 0 || uid == rustix::process::geteuid().as_raw() || Some(uid) == operator
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead as _, Write as _};

    use super::super::Verb;
    use super::*;

    async fn ask(path: &Path, line: &str) -> Reply {
        let (path, line) = (path.to_owned(), format!("{line}\n"));
        let text = tokio::task::spawn_blocking(move || {
            let mut stream = StdUnixStream::connect(path).unwrap();
            // Who is refused, or says too much, may not be read to the end; the answer still comes.
            let _ = stream.write_all(line.as_bytes());
            let mut text = String::new();
            io::BufReader::new(stream).read_line(&mut text).unwrap();
            text
        });
        serde_json::from_str(&text.await.unwrap()).unwrap()
    }

    #[tokio::test]
    async fn it_listens_privately_answers_and_cleans_up() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run").join("w.sock");
        let (server, mut calls) = Server::listen(&path, None).unwrap();
        assert_eq!(fs::metadata(path.parent().unwrap()).unwrap().mode() & 0o777, 0o750);
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o660);
        let answer = async {
            let call = calls.recv().await.unwrap();
            assert_eq!(call.request.verb, Verb::Status);
            call.reply.send(Reply::Done(serde_json::json!(1))).unwrap();
        };
        let (reply, ()) = tokio::join!(ask(&path, r#"{"verb":"status"}"#), answer);
        assert!(matches!(reply, Reply::Done(v) if v == 1));
        let reply = ask(&path, "rubbish").await;
        assert!(matches!(reply, Reply::Problem(p) if p.code == "bad-request" && p.exit == 2));
        // A second daemon is refused, and a dead one's socket is replaced.
        assert_eq!(Server::listen(&path, None).unwrap_err().code, "socket-in-use");
        drop(server);
        assert!(!path.exists());
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        Server::listen(&path, None).unwrap();
    }

    #[tokio::test]
    async fn callers_and_their_requests_are_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run").join("w.sock");
        let (_server, _calls) = Server::listen(&path, None).unwrap();
        // The request never ends, and only so much of it is read.
        let long = format!(r#"{{"verb":"{}"#, "x".repeat(MAX_REQUEST));
        let reply = ask(&path, &long).await;
        assert!(matches!(reply, Reply::Problem(p) if p.code == "bad-request"));

        let mut idle = Vec::new();
        for _ in 0..MAX_CONNECTIONS {
            idle.push(UnixStream::connect(&path).await.unwrap());
        }
        let reply = ask(&path, r#"{"verb":"status"}"#).await;
        assert!(matches!(reply, Reply::Problem(p) if p.code == "busy" && p.exit == 1));
    }

    #[tokio::test]
    async fn a_directory_open_to_others_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
        assert_eq!(Server::listen(&dir.path().join("s"), None).unwrap_err().code, "socket-directory");
    }

    #[test]
    fn only_root_ourselves_and_the_operator_may_write() {
        let me = rustix::process::geteuid().as_raw();
        assert!(may_write(0, None) && may_write(me, None) && may_write(4_242, Some(4_242)));
        assert!(!may_write(4_242, None) && !may_write(4_242, Some(4_243)));
    }
}
