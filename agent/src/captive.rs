//! Is there a captive portal, a network that answers in everybody's name until somebody signs in?
//!
//! Asked only while the coordinator is away: one plain HTTP request to the coordinator's own host, so that nobody else hears
//! of us. What a portal says instead: status 511 (RFC 6585), a redirect to another host, or, where the coordinator itself
//! speaks plain HTTP at that port, anything that is not its answer.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::lookup_host;
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;
use warren_common::url::CoordinatorUrl;

use crate::egress::{Egress, connect_marked};

/// How long one look may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// Most that is read of an answer, in bytes: status line, headers and the beginning of the body.
const MAX_ANSWER: usize = 8_192;
/// Most header lines of an answer.
const MAX_HEADERS: usize = 64;

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
    let port = if url.tls() { 80 } else { url.port() };
    let address = lookup_host((url.host(), port)).await.ok()?.next()?;
    let mut stream = connect_marked(address, mark).await.ok()?;
    let request = format!("GET /healthz HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n", url.host());
    stream.write_all(request.as_bytes()).await.ok()?;
    let mut answer = Vec::new();
    // What arrived before an error counts as well.
    let _ = stream.take(MAX_ANSWER as u64).read_to_end(&mut answer).await;
    verdict(&answer, url.host(), !url.tls())
}

/// `own`: the coordinator itself listens there, and says `ok` or fails by itself.
fn verdict(answer: &[u8], host: &str, own: bool) -> Option<bool> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut response = httparse::Response::new(&mut headers);
    let Ok(httparse::Status::Complete(at)) = response.parse(answer) else { return None };
    Some(match response.code? {
        511 => true,
        301 | 302 | 303 | 307 | 308 => {
            let location = response.headers.iter().find(|h| h.name.eq_ignore_ascii_case("location"))?;
            let location = std::str::from_utf8(location.value).ok()?.trim();
            let Some((_, rest)) = location.split_once("://") else { return Some(false) };
            let there = rest.split(['/', '?', '#']).next().unwrap_or_default();
            let there = there.rsplit_once(':').map_or(there, |(name, port)| {
                if port.bytes().all(|b| b.is_ascii_digit()) { name } else { there }
            });
            !there.trim_matches(['[', ']']).eq_ignore_ascii_case(host)
        }
        200 => own && !answer[at..].starts_with(b"ok"),
        _ => false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_portal_is_told_from_a_coordinator_and_from_a_web_server_beside_it() {
        let is = |answer: &str, own| verdict(answer.as_bytes(), "warren.example", own);
        let redirect = |to: &str| format!("HTTP/1.1 302 Found\r\nLocation: {to}\r\n\r\n");
        for own in [false, true] {
            assert_eq!(is("HTTP/1.1 511 Sign in\r\n\r\n", own), Some(true));
            assert_eq!(is(&redirect("http://portal.hotel/login?x"), own), Some(true));
            assert_eq!(is(&redirect("http://192.168.0.1:8080/"), own), Some(true));
            assert_eq!(is(&redirect("https://Warren.example/healthz"), own), Some(false));
            assert_eq!(is(&redirect("https://warren.example:443/"), own), Some(false));
            assert_eq!(is(&redirect("/login"), own), Some(false));
            assert_eq!(is("HTTP/1.1 200 OK\r\n\r\nok", own), Some(false));
            assert_eq!(is("HTTP/1.1 503 Busy\r\n\r\nno", own), Some(false));
            assert_eq!((is("", own), is("SSH-2.0", own)), (None, None));
        }
        let page = "HTTP/1.1 200 OK\r\n\r\n<html>Welcome";
        assert_eq!((is(page, true), is(page, false)), (Some(true), Some(false)));
        assert_eq!(
            verdict(redirect("http://[2001:db8::1]:80/").as_bytes(), "2001:db8::1", true),
            Some(false)
        );
    }
}
