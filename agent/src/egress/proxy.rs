//! An HTTP proxy that is asked to CONNECT (RFC 9110, section 9.3.6), with Basic credentials (RFC 7617) if it has any.

use std::fmt;
use std::net::Ipv6Addr;
use std::time::Duration;

use data_encoding::BASE64;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;
use zeroize::Zeroizing;

use super::{Error, dial};
use crate::problem::{Problem, io_text};

/// Longest answer of a proxy with its headers, in bytes: some send a page with a refusal, of which this much is looked at.
const MAX_ANSWER: usize = 8 * 1024;
/// Most header lines of an answer.
const MAX_HEADERS: usize = 64;
/// How long a proxy may take to connect: it may try some addresses before it says no.
const PATIENCE: Duration = Duration::from_secs(10);
/// Its port where the URL has none, as curl has it for `http://`.
const DEFAULT_PORT: u16 = 80;

/// A proxy.
#[derive(Clone, PartialEq, Eq)]
pub struct Proxy {
    /// A name, or an address without brackets.
    host: String,
    port: u16,
    credentials: Option<Credentials>,
}

#[derive(Clone, PartialEq, Eq)]
struct Credentials {
    user: String,
    password: Zeroizing<String>,
}

/// Without credentials.
impl fmt::Display for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&authority(&self.host, self.port))
    }
}

/// Without credentials.
impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Proxy {
    /// Reads `http://[user[:password]@]host[:port]`, or the same without `http://`; user and password may be percent-encoded.
    /// `origin` says where the text is from; the text itself, which may hold a password, is not repeated.
    ///
    /// # Errors
    /// It is something else.
    pub fn parse(text: &str, origin: &str) -> Result<Self, Problem> {
        let text = text.trim();
        let (scheme, rest) = text.split_once("://").unwrap_or(("http", text));
        if !scheme.eq_ignore_ascii_case("http") {
            return Err(Problem::usage(
                "bad-proxy",
                format!("{origin} names a proxy of another kind than HTTP"),
                "name one as http://host:port (the way to the proxy is plain HTTP; what goes through it is encrypted), or say `--proxy none`",
            ));
        }
        parse(rest).ok_or_else(|| {
            Problem::usage(
                "bad-proxy",
                format!("{origin} is not the URL of a proxy"),
                "write it as http://host:port or http://user:password@host:port; write special characters of user and password as %XX (`@` is %40)",
            )
        })
    }

    /// True if it is told who we are.
    pub const fn has_credentials(&self) -> bool {
        self.credentials.is_some()
    }

    /// Connects to a host through it.
    pub(super) async fn connect(&self, host: &str, port: u16, mark: u32) -> Result<TcpStream, Error> {
        let mut stream = dial(&self.host, self.port, mark).await.map_err(|why| self.away(&why))?;
        timeout(PATIENCE, self.ask(&mut stream, host, port))
            .await
            .map_err(|_| self.away("it does not answer"))??;
        Ok(stream)
    }

    async fn ask(
        &self,
        stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
        host: &str,
        port: u16,
    ) -> Result<(), Error> {
        let target = authority(host, port);
        let request = self.request(&target);
        stream.write_all(request.as_bytes()).await.map_err(|e| self.away(&io_text(&e)))?;
        stream.flush().await.map_err(|e| self.away(&io_text(&e)))?;
        let mut got = Vec::new();
        loop {
            let room = MAX_ANSWER - got.len();
            let read = if room == 0 {
                return Err(self.broken("its answer is too long"));
            } else {
                stream.take(room as u64).read_buf(&mut got).await.map_err(|e| self.away(&io_text(&e)))?
            };
            let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
            let mut response = httparse::Response::new(&mut headers);
            match response.parse(&got) {
                Ok(httparse::Status::Complete(end)) => {
                    return self.judge(&response, got.len() > end, &target);
                }
                Ok(httparse::Status::Partial) if read == 0 => {
                    return Err(self.away("it closes the connection instead of answering"));
                }
                Ok(httparse::Status::Partial) => {}
                Err(_) => return Err(self.broken("what answers there does not speak HTTP")),
            }
        }
    }

    fn request(&self, target: &str) -> Zeroizing<String> {
        let mut request = Zeroizing::new(format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n"));
        if let Some(Credentials { user, password }) = &self.credentials {
            let pair = Zeroizing::new(format!("{user}:{}", password.as_str()));
            let encoded = Zeroizing::new(BASE64.encode(pair.as_bytes()));
            request.push_str("Proxy-Authorization: Basic ");
            request.push_str(&encoded);
            request.push_str("\r\n");
        }
        request.push_str("\r\n");
        request
    }

    fn judge(&self, response: &httparse::Response<'_, '_>, more: bool, target: &str) -> Result<(), Error> {
        match response.code.unwrap_or_default() {
            // Nobody behind a proxy speaks before we do.
            200..=299 if more => Err(self.broken("it sends something of its own into the connection")),
            200..=299 => Ok(()),
            // Tinyproxy says 401 where it should say 407.
            401 | 407 => Err(self.wants_other_credentials(response)),
            status @ 500..=599 => {
                Err(Error::Away(format!("the proxy does not get through to it (HTTP status {status})")))
            }
            status => Err(Error::Proxy {
                problem: Problem::new(
                    "proxy-refused",
                    format!("the proxy {self} refuses to connect to {target} (HTTP status {status})"),
                    format!(
                        "have {target} allowed for CONNECT at the proxy: most allow port 443 only, so coordinator and relays are best at that port"
                    ),
                ),
                lasting: true,
            }),
        }
    }

    fn wants_other_credentials(&self, response: &httparse::Response<'_, '_>) -> Error {
        // Those that we can't speak are of interest: Negotiate, NTLM, Digest.
        let schemes: Vec<String> = response
            .headers
            .iter()
            .filter(|h| {
                ["proxy-authenticate", "www-authenticate"]
                    .iter()
                    .any(|name| h.name.eq_ignore_ascii_case(name))
            })
            .filter_map(|h| std::str::from_utf8(h.value).ok()?.split_ascii_whitespace().next())
            .filter(|scheme| {
                scheme.len() <= 32 && scheme.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
            })
            .map(str::to_owned)
            .collect();
        let other = !schemes.is_empty() && !schemes.iter().any(|s| s.eq_ignore_ascii_case("basic"));
        let text = match &self.credentials {
            _ if other => {
                format!("the proxy {self} accepts only {}, and the agent speaks Basic", schemes.join(", "))
            }
            Some(Credentials { user, .. }) => {
                format!("the proxy {self} does not accept the user `{user}` with the password that is set")
            }
            None => format!("the proxy {self} wants a user and a password, and none are set"),
        };
        let fix = if other {
            "have the proxy accept Basic from this host or let it through without, or run a local proxy that speaks to it"
        } else {
            "set them in the proxy's URL, http://user:password@host:port (`warrend --proxy`, or HTTPS_PROXY in the service's environment), and restart warrend"
        };
        Error::Proxy { problem: Problem::new("proxy-auth", text, fix), lasting: true }
    }

    fn away(&self, why: &str) -> Error {
        Error::Proxy {
            problem: Problem::new(
                "proxy-away",
                format!("the proxy {self} can't be reached: {why}"),
                "check the proxy's URL and that it runs; `warrend --proxy none` does without it. The agent keeps trying",
            ),
            lasting: false,
        }
    }

    fn broken(&self, why: &str) -> Error {
        Error::Proxy {
            problem: Problem::new(
                "proxy-broken",
                format!("at {self} there is no HTTP proxy: {why}"),
                "check host and port of the proxy's URL (`warrend --proxy`, or HTTPS_PROXY in the service's environment)",
            ),
            lasting: true,
        }
    }
}

/// What is behind the scheme.
fn parse(rest: &str) -> Option<Proxy> {
    // No path means anything here; a password may hold what looks like one.
    let (user_info, host) = match rest.rsplit_once('@') {
        Some((user_info, host)) => (Some(user_info), host),
        None => (None, rest),
    };
    let host = host.strip_suffix('/').unwrap_or(host);
    let (host, port) = match host.strip_prefix('[') {
        Some(rest) => {
            let (host, port) = rest.split_once(']')?;
            host.parse::<Ipv6Addr>().ok()?;
            (host, port)
        }
        None => host.split_at(host.find(':').unwrap_or(host.len())),
    };
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_' | b':');
    if host.is_empty() || !host.bytes().all(plain) {
        return None;
    }
    let port = match port.strip_prefix(':') {
        Some(port) => port.parse().ok().filter(|p| *p != 0)?,
        None if port.is_empty() => DEFAULT_PORT,
        None => return None,
    };
    let credentials = match user_info {
        None => None,
        Some(text) => {
            let (user, password) = text.split_once(':').unwrap_or((text, ""));
            let (user, password) = (decode(user)?, decode(password)?);
            // RFC 7617, section 2: a colon would end the user's name.
            if user.contains(':') {
                return None;
            }
            Some(Credentials { user: user.to_string(), password })
        }
    };
    Some(Proxy { host: host.to_owned(), port, credentials })
}

/// Percent-decodes. `None` for control characters, with which a header could be broken out of, and for what is no text.
fn decode(text: &str) -> Option<Zeroizing<String>> {
    let mut bytes = Zeroizing::new(Vec::with_capacity(text.len()));
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        rest = tail;
        if *first == b'%' {
            let [high, low, tail @ ..] = rest else { return None };
            let digit = |b: &u8| char::from(*b).to_digit(16).and_then(|d| u8::try_from(d).ok());
            bytes.push(digit(high)? << 4 | digit(low)?);
            rest = tail;
        } else {
            bytes.push(*first);
        }
    }
    let text = std::str::from_utf8(&bytes).ok()?;
    (!text.chars().any(char::is_control)).then(|| Zeroizing::new(text.to_owned()))
}

fn authority(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::duplex;

    fn proxy(text: &str) -> Proxy {
        Proxy::parse(text, "--proxy").unwrap()
    }

    #[test]
    fn urls_are_read_and_credentials_decoded_and_never_shown() {
        for (text, shown, user, password) in [
            ("http://proxy.corp:3128", "proxy.corp:3128", None, ""),
            ("HTTP://proxy.corp/", "proxy.corp:80", None, ""),
            (" proxy.corp:8080 ", "proxy.corp:8080", None, ""),
            ("http://bob@p:1", "p:1", Some("bob"), ""),
            ("http://bob:secret@p:1", "p:1", Some("bob"), "secret"),
            ("http://a%40b:p%3a%2F%25%C3%A4@[fd00::1]:1", "[fd00::1]:1", Some("a@b"), "p:/%ä"),
            ("http://bob:p@ss:/w@p:1/", "p:1", Some("bob"), "p@ss:/w"),
        ] {
            let got = proxy(text);
            assert_eq!((got.to_string().as_str(), format!("{got:?}").as_str()), (shown, shown));
            let credentials = got.credentials.as_ref();
            assert_eq!(credentials.map(|c| c.user.as_str()), user, "{text}");
            assert_eq!(credentials.map_or("", |c| c.password.as_str()), password, "{text}");
        }
        for text in [
            "",
            "http://",
            "https://p:1",
            "socks5://p:1",
            "http://p:0",
            "http://p:x",
            "http://p:1/path",
            "http://a b",
            "http://[p]:1",
            "http://fd00::1",
            "http://secret%0d%0aX-Y:1@p:1",
            "http://secret%zz@p",
            "http://secret%4@p",
            "http://secret%ff@p",
            "http://secret%3a:x@p",
        ] {
            let problem = Proxy::parse(text, "HTTPS_PROXY").unwrap_err();
            assert_eq!((problem.code.as_str(), problem.exit), ("bad-proxy", 2), "{text}");
            assert!(problem.text.contains("HTTPS_PROXY") && !problem.to_string().contains("secret"));
        }
    }

    /// What a proxy that answers so makes of `CONNECT host:443`, and what it was asked.
    async fn answered(proxy: &Proxy, host: &str, answer: &[u8]) -> (Result<(), Error>, String) {
        let (mut here, mut there) = duplex(1 << 20);
        let serve = async {
            let mut asked = Vec::new();
            while !asked.ends_with(b"\r\n\r\n") {
                there.read_buf(&mut asked).await.unwrap();
            }
            let _ = there.write_all(answer).await;
            let _ = there.shutdown().await;
            String::from_utf8(asked).unwrap()
        };
        tokio::join!(proxy.ask(&mut here, host, 443), serve)
    }

    fn code(result: Result<(), Error>) -> (String, String) {
        match result {
            Ok(()) => ("connected".to_owned(), String::new()),
            Err(Error::Away(why)) => ("away".to_owned(), why),
            Err(Error::Proxy { problem, .. }) => (problem.code, problem.text),
        }
    }

    #[tokio::test]
    async fn it_is_asked_to_connect_with_the_credentials_that_it_has() {
        let ok = b"HTTP/1.1 200 Connection established\r\nX: y\r\n\r\n";
        let (result, asked) = answered(&proxy("http://p:1"), "warren.example", ok).await;
        assert_eq!(code(result).0, "connected");
        assert_eq!(asked, "CONNECT warren.example:443 HTTP/1.1\r\nHost: warren.example:443\r\n\r\n");
        // The example of RFC 7617, section 2.
        let aladdin = proxy("http://Aladdin:open%20sesame@p:1");
        let (result, asked) = answered(&aladdin, "fd00::1", ok).await;
        assert_eq!(code(result).0, "connected");
        assert!(asked.starts_with("CONNECT [fd00::1]:443 HTTP/1.1\r\nHost: [fd00::1]:443\r\n"), "{asked}");
        assert!(asked.contains("\r\nProxy-Authorization: Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ==\r\n"), "{asked}");
    }

    #[tokio::test]
    async fn what_it_says_instead_is_told_apart() {
        let (bare, bob) = (proxy("http://p:1"), proxy("http://bob:hush@p:1"));
        let long = [&b"HTTP/1.1 200 OK\r\nX: "[..], &vec![b'x'; 2 * MAX_ANSWER]].concat();
        let asks =
            |schemes: &str| format!("HTTP/1.1 407 Who?\r\n{schemes}Content-Length: 2\r\n\r\nno").into_bytes();
        let basic = asks("Proxy-Authenticate: Basic realm=\"x\"\r\n");
        let ntlm = asks("Proxy-Authenticate: Negotiate\r\nproxy-authenticate: NTLM\r\n");
        for (proxy, answer, expected, says) in [
            (&bare, basic.as_slice(), "proxy-auth", "wants a user and a password, and none are set"),
            (&bob, &basic, "proxy-auth", "does not accept the user `bob`"),
            (
                &bob,
                b"HTTP/1.0 401 Unauthorized\r\nWWW-Authenticate: Basic realm=\"x\"\r\n\r\n",
                "proxy-auth",
                "does not accept the user `bob`",
            ),
            (&bob, &asks(""), "proxy-auth", "does not accept the user `bob`"),
            (&bob, &ntlm, "proxy-auth", "accepts only Negotiate, NTLM"),
            (
                &bob,
                b"HTTP/1.1 403 Filtered\r\n\r\n",
                "proxy-refused",
                "refuses to connect to h:443 (HTTP status 403)",
            ),
            (&bob, b"HTTP/1.0 405 No\r\n\r\n", "proxy-refused", "405"),
            (&bob, b"HTTP/1.1 302 Found\r\nLocation: http://portal\r\n\r\n", "proxy-refused", "302"),
            (&bob, b"HTTP/1.1 502 Bad Gateway\r\n\r\n", "away", "502"),
            (&bob, b"HTTP/1.1 200 OK\r\n\r\nsurprise", "proxy-broken", "of its own"),
            (&bob, &long, "proxy-broken", "too long"),
            (&bob, b"SSH-2.0-OpenSSH\r\n", "proxy-broken", "does not speak HTTP"),
            (&bob, b"", "proxy-away", "closes the connection"),
            (&bob, b"HTTP/1.1 200 OK\r\n", "proxy-away", "closes the connection"),
        ] {
            let (result, _) = answered(proxy, "h", answer).await;
            let (code, text) = code(result);
            assert_eq!(code, expected, "{}", String::from_utf8_lossy(answer));
            assert!(text.contains(says) && !text.contains("hush"), "{text}");
        }
    }

    proptest::proptest! {
        #[test]
        fn nothing_that_a_proxy_says_and_no_url_panics(
            code in 0u16..700, headers in "[ -~\r\n]{0,200}", raw: Vec<u8>, url in ".{0,40}",
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let says = format!("HTTP/1.1 {code:03} x\r\n{headers}\r\n\r\n").into_bytes();
            for answer in [says, raw] {
                let _ = runtime.block_on(answered(&proxy("http://u:p@h:1"), "h", &answer));
            }
            let _ = Proxy::parse(&url, "--proxy");
            let list = super::super::Exceptions::parse(&url);
            assert!(list.len() <= url.len());
            list.cover(&url, 1);
        }
    }

    #[tokio::test]
    async fn one_that_is_not_there_is_named() {
        let port = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
        let gone = proxy(&format!("http://127.0.0.1:{port}"));
        let (code, text) = code(gone.connect("h", 443, 0).await.map(drop));
        assert_eq!((code.as_str(), text.contains(&gone.to_string())), ("proxy-away", true), "{text}");
    }
}
