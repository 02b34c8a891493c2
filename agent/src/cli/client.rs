//! One question to the daemon.

use std::io::{self, ErrorKind, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;

use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::api::{Reply, Request};
use crate::problem::{Problem, io_text};

/// Asks and waits for the answer.
pub(super) fn ask(socket: &Path, request: &Request) -> Result<Value, Problem> {
    let mut stream = UnixStream::connect(socket).map_err(|e| no_daemon(socket, &e))?;
    let talk = || -> io::Result<Vec<u8>> {
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        // A daemon that does not read to the end may have answered all the same.
        let sent = stream.write_all(&line);
        let mut answer = Vec::new();
        match stream.read_to_end(&mut answer) {
            Err(e) if answer.is_empty() => Err(sent.err().unwrap_or(e)),
            _ => Ok(answer),
        }
    };
    let lost = |why: String| {
        Problem::new(
            "daemon-lost",
            format!("the daemon went away: {why}"),
            "see its log, and `systemctl status warrend`",
        )
    };
    let mut talk = talk;
    let answer = talk().map_err(|e| lost(io_text(&e)))?;
    match serde_json::from_slice(&answer).map_err(|_| lost("it gave no answer".into()))? {
        Reply::Done(value) => Ok(value),
        Reply::Problem(problem) => Err(problem),
    }
}

/// An answer as its type.
pub(super) fn decode<T: DeserializeOwned>(value: Value) -> Result<T, Problem> {
    serde_json::from_value(value).map_err(|e| {
        Problem::new(
            "daemon-version",
            format!("the daemon's answer is not understood: {e}"),
            "use a `warren` of the same version as `warrend`",
        )
    })
}

fn no_daemon(socket: &Path, error: &io::Error) -> Problem {
    let socket = socket.display();
    match error.kind() {
        ErrorKind::NotFound | ErrorKind::ConnectionRefused => Problem::new(
            "no-daemon",
            format!("no daemon listens at `{socket}`"),
            "start it (`systemctl start warrend`), or say where it listens with --socket",
        ),
        ErrorKind::PermissionDenied => Problem::new(
            "socket-permission",
            format!("no permission for the daemon's socket `{socket}`"),
            "use sudo, or start warrend with --operator and your user's name",
        ),
        _ => Problem::new(
            "socket",
            format!("the daemon's socket `{socket}` can't be used: {}", io_text(error)),
            "check the path given with --socket",
        ),
    }
}
