//! Is there a captive portal, a network that answers in everybody's name until somebody signs in?
//!
//! Asked only while the coordinator is away: one plain HTTP request to the coordinator's own host, so that nobody else hears
//! of us. What a portal says instead: status 511 (RFC 6585), a redirect to another host, or a page where there can be none.
//! Where the coordinator itself speaks plain HTTP at that port it is asked whether it is well, and anything that is not its
//! answer is a portal's, except that a proxy of its own may say that it is down (5xx). Where it speaks HTTPS, a path is asked for
//! that no web server beside it has.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;
use warren_common::url::CoordinatorUrl;

use crate::egress::{Egress, dial};

/// How long one look may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// Most that is read of an answer, in bytes: status line, headers and the beginning of the body.
const MAX_ANSWER: usize = 8_192;
/// Most header lines of an answer.
const MAX_HEADERS: usize = 64;

/// Where a coordinator says that it is well, and how it begins.
const HEALTH: &str = "/healthz";
const OK: &[u8] = b"ok";
/// What no web server has.
const NOWHERE: &str = "/warren-looks-for-a-captive-portal";

/// Looks for a portal when it is told to, one look at a time.
#[derive(Debug, Default)]
pub struct Watch {
    found: Arc<AtomicBool>,
    look: Option<AbortOnDropHandle<()>>,
}

impl Watch {
    /// True if the last look found one.
    pub fn found(&self) -> bool {
        self.found.load(Ordering::Relaxed)
    }

    /// The coordinator can't be reached: why? Behind a proxy there is no telling.
    pub fn look(&mut self, url: &CoordinatorUrl, egress: &Egress) {
        let under_way = self.look.as_ref().is_some_and(|look| !look.is_finished());
        if under_way || egress.proxy_for(url.host(), url.port()).is_some() {
            return;
        }
        let mark = egress.mark();
        let (url, found) = (url.clone(), Arc::clone(&self.found));
        #[expect(clippy::disallowed_methods, reason = "owned by the handle: dropping it aborts the task")]
        let task = tokio::task::spawn(async move {
            let is_there = timeout(PATIENCE, is_captive(&url, mark)).await.ok().flatten().unwrap_or(false);
            found.store(is_there, Ordering::Relaxed);
        });
        self.look = Some(AbortOnDropHandle::new(task));
    }

    /// The coordinator is there, or the network is another one.
    pub fn clear(&mut self) {
        *self = Self::default();
    }
}

/// `None` if there is no answer at all.
async fn is_captive(url: &CoordinatorUrl, mark: u32) -> Option<bool> {
    let (port, path) = if url.tls() { (80, NOWHERE) } else { (url.port(), HEALTH) };
    let mut stream = dial(url.host(), port, mark).await.ok()?;
    let name = if url.host().contains(':') { format!("[{}]", url.host()) } else { url.host().to_owned() };
    let request = format!("GET {path} HTTP/1.1\r\nHost: {name}:{port}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.ok()?;
    answer(stream, url.host(), !url.tls()).await
}

/// Reads until the answer is clear, and no longer: some keep the connection open.
async fn answer(stream: impl AsyncRead + Unpin, host: &str, own: bool) -> Option<bool> {
    let mut stream = stream.take(MAX_ANSWER as u64);
    let mut answer = Vec::new();
    loop {
        // What arrived before an error counts as well.
        let over = !matches!(stream.read_buf(&mut answer).await, Ok(1..));
        match verdict(&answer, host, own, over) {
            Verdict::Unclear if !over => {}
            Verdict::Unclear => return None,
            Verdict::Portal(is_one) => return Some(is_one),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// It is no answer so far.
    Unclear,
    Portal(bool),
}

/// `own`: the coordinator itself listens there, and says `ok` or fails by itself. `over`: no more comes.
fn verdict(answer: &[u8], host: &str, own: bool, over: bool) -> Verdict {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut response = httparse::Response::new(&mut headers);
    let Ok(httparse::Status::Complete(at)) = response.parse(answer) else { return Verdict::Unclear };
    let header = |name: &str| {
        let found = response.headers.iter().find(|h| h.name.eq_ignore_ascii_case(name))?;
        std::str::from_utf8(found.value).ok().map(str::trim)
    };
    Verdict::Portal(match response.code {
        Some(511) => true,
        Some(301 | 302 | 303 | 307 | 308) => match header("location").and_then(host_of) {
            Some(there) => !there.eq_ignore_ascii_case(host),
            None => own, // it redirects nobody
        },
        Some(200) => {
            let chunked = header("transfer-encoding").is_some_and(|v| v.eq_ignore_ascii_case("chunked"));
            let body = match &answer[at..] {
                // After the first chunk's length.
                rest if chunked => {
                    rest.iter().position(|b| *b == b'\n').map_or(&[][..], |end| &rest[end + 1..])
                }
                rest => rest,
            };
            if body.len() < OK.len() && !over {
                return Verdict::Unclear;
            }
            !body.starts_with(OK)
        }
        Some(500..) => false,
        _ => own,
    })
}

/// The host of an absolute URL, without brackets.
fn host_of(url: &str) -> Option<&str> {
    let (_, rest) = url.split_once("://")?;
    let there = rest.split(['/', '?', '#']).next().unwrap_or_default();
    let there = there
        .rsplit_once(':')
        .map_or(there, |(name, port)| if port.bytes().all(|b| b.is_ascii_digit()) { name } else { there });
    Some(there.trim_matches(['[', ']']))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_portal_is_told_from_a_coordinator_and_from_a_web_server_beside_it() {
        let is = |answer: &str, own| verdict(answer.as_bytes(), "warren.example", own, true);
        let (portal, none) = (Verdict::Portal(true), Verdict::Portal(false));
        let redirect = |to: &str| format!("HTTP/1.1 302 Found\r\nLocation: {to}\r\n\r\n");
        for own in [false, true] {
            assert_eq!(is("HTTP/1.1 511 Sign in\r\n\r\n", own), portal);
            assert_eq!(is(&redirect("http://portal.hotel/login?x"), own), portal);
            assert_eq!(is(&redirect("http://192.168.0.1:8080/"), own), portal);
            assert_eq!(is(&redirect("https://Warren.example/healthz"), own), none);
            assert_eq!(is(&redirect("https://warren.example:443/"), own), none);
            assert_eq!(is("HTTP/1.1 200 OK\r\n\r\nok", own), none);
            assert_eq!(
                is("HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", own),
                none
            );
            assert_eq!(is("HTTP/1.1 200 OK\r\n\r\n<html>Welcome", own), portal);
            assert_eq!(is("HTTP/1.1 200 OK\r\n\r\n", own), portal);
            assert_eq!(is("HTTP/1.1 502 Bad Gateway\r\n\r\nno", own), none, "a proxy of its own");
            // It has none of these, and a web server beside it may.
            let own_portal = Verdict::Portal(own);
            for answer in
                [&redirect("/login"), "HTTP/1.1 302 Found\r\n\r\n", "HTTP/1.1 404 Not Found\r\n\r\n"]
            {
                assert_eq!(is(answer, own), own_portal, "{answer}");
            }
            assert_eq!((is("", own), is("SSH-2.0", own)), (Verdict::Unclear, Verdict::Unclear));
        }
        let to = redirect("http://[2001:db8::1]:80/");
        assert_eq!(verdict(to.as_bytes(), "2001:db8::1", true, true), none);
    }

    #[tokio::test]
    async fn who_keeps_the_connection_open_is_not_waited_for() {
        for (parts, is_one) in [
            (&["HTTP/1.1 200 OK\r\n", "\r\n", "<", "html>"][..], true),
            (&["HTTP/1.1 200 OK\r\n\r\n", "o", "k"][..], false),
            (&["HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "2\r", "\no", "k"][..], false),
            (&["HTTP/1.1 302 Found\r\nLocation: http://portal/\r\n", "\r\n"][..], true),
        ] {
            let (mut there, here) = tokio::io::duplex(8);
            let say = async {
                for part in parts {
                    there.write_all(part.as_bytes()).await.unwrap();
                }
                std::future::pending::<()>().await;
            };
            let heard = tokio::select! {
                heard = answer(here, "warren.example", true) => heard,
                () = say => None,
            };
            assert_eq!(heard, Some(is_one), "{parts:?}");
        }
        // Who hangs up has said what there is to say.
        assert_eq!(answer(&b"HTTP/1.1 200 OK\r\n\r\no"[..], "warren.example", true).await, Some(true));
        assert_eq!(answer(&b"HTTP/1.1 2"[..], "warren.example", true).await, None);
    }
}
