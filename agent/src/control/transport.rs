//! From a URL to a byte stream: names, raced addresses, our mark on the socket, TLS for `https`.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::str::FromStr;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use rustls::pki_types::ServerName;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpSocket, TcpStream, lookup_host};
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_tungstenite::tungstenite::http::Uri;

use super::session::Failure;
use crate::problem::{Problem, io_text};

/// A later address gets its chance after this long without a connection (RFC 8305, connection attempt delay).
const ATTEMPT_DELAY: Duration = Duration::from_millis(250);
/// Most addresses of one name that are tried.
const MAX_ADDRESSES: usize = 8;

/// Where a coordinator is: `http://` or `https://`, host, optional port and path.
#[derive(Clone, PartialEq, Eq)]
pub struct CoordinatorUrl {
    text: String,
    tls: bool,
    host: String,
    port: u16,
    path: String,
}

impl FromStr for CoordinatorUrl {
    type Err = Problem;

    fn from_str(text: &str) -> Result<Self, Problem> {
        let bad = || {
            Problem::usage(
                "bad-url",
                format!("`{text}` is not the URL of a coordinator"),
                "write it as the coordinator's --public-url: `https://host` or `http://host:port`",
            )
        };
        let text = text.trim().trim_end_matches('/');
        let uri: Uri = text.parse().map_err(|_| bad())?;
        let (tls, default_port) = match uri.scheme_str() {
            Some("https") => (true, 443),
            Some("http") => (false, 80),
            _ => return Err(bad()),
        };
        let authority = uri.authority().ok_or_else(bad)?;
        let host = authority.host().trim_start_matches('[').trim_end_matches(']');
        if host.is_empty() || authority.as_str().contains('@') || uri.query().is_some() {
            return Err(bad());
        }
        let port = authority.as_str().strip_prefix(authority.host()).unwrap_or_default();
        Ok(Self {
            text: text.to_owned(),
            tls,
            host: host.to_owned(),
            port: match port.strip_prefix(':') {
                Some(port) => port.parse().map_err(|_| bad())?,
                None => default_port,
            },
            path: uri.path().trim_end_matches('/').to_owned(),
        })
    }
}

impl fmt::Display for CoordinatorUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for CoordinatorUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl CoordinatorUrl {
    /// The WebSocket's URL.
    pub(super) fn websocket(&self) -> String {
        let scheme = if self.tls { "wss" } else { "ws" };
        let host = if self.host.contains(':') { format!("[{}]", self.host) } else { self.host.clone() };
        format!("{scheme}://{host}:{}{}/control/v1", self.port, self.path)
    }
}

/// A connection, encrypted by TLS or not.
pub(super) enum Stream {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(s) => Pin::new(s).poll_read(cx, buf),
            Self::Tls(s) => Pin::new(s).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(s) => Pin::new(s).poll_write(cx, buf),
            Self::Tls(s) => Pin::new(s).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(s) => Pin::new(s).poll_flush(cx),
            Self::Tls(s) => Pin::new(s).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(s) => Pin::new(s).poll_shutdown(cx),
            Self::Tls(s) => Pin::new(s).poll_shutdown(cx),
        }
    }
}

/// Connects to the coordinator.
pub(super) async fn dial(url: &CoordinatorUrl, mark: u32) -> Result<Stream, Failure> {
    let tcp = dial_tcp(url, mark).await?;
    if !url.tls {
        return Ok(Stream::Plain(tcp));
    }
    let name = ServerName::try_from(url.host.clone()).map_err(|_| {
        Failure::permanent(Problem::usage(
            "bad-url",
            format!("`{}` is not a host name", url.host),
            "check the coordinator's URL",
        ))
    })?;
    let tls = TlsConnector::from(tls_config()?).connect(name, tcp).await.map_err(|e| {
        Failure::permanent(Problem::new(
            "coordinator-tls",
            format!("`{url}` has no valid certificate: {}", io_text(&e)),
            "check the host name and the clock; install the certificate authority on this machine if it is your own",
        ))
    })?;
    Ok(Stream::Tls(Box::new(tls)))
}

async fn dial_tcp(url: &CoordinatorUrl, mark: u32) -> Result<TcpStream, Failure> {
    let unreachable = |why: String| {
        Failure::transient(Problem::new(
            "coordinator-away",
            format!("the coordinator at `{url}` can't be reached: {why}"),
            "check the URL, the network and any firewall; the agent keeps trying",
        ))
    };
    let found = lookup_host((url.host.as_str(), url.port)).await;
    let addresses: Vec<SocketAddr> = match found {
        Ok(list) => list.take(MAX_ADDRESSES).collect(),
        Err(_) => return Err(unreachable(format!("the name `{}` is not known", url.host))),
    };
    let mut attempts = JoinSet::new();
    for (i, address) in (0u32..).zip(interleave(addresses)) {
        attempts.spawn(async move {
            tokio::time::sleep(ATTEMPT_DELAY * i).await;
            connect_marked(address, mark).await
        });
    }
    let mut last = "it has no address".to_owned();
    while let Some(result) = attempts.join_next().await {
        match result {
            Ok(Ok(stream)) => return Ok(stream), // dropping the set ends the other attempts
            Ok(Err(e)) => last = io_text(&e),
            Err(_) => {}
        }
    }
    Err(unreachable(last))
}

/// Families in turn, in the resolver's order within each.
fn interleave(addresses: Vec<SocketAddr>) -> Vec<SocketAddr> {
    let first_is_v6 = addresses.first().is_some_and(SocketAddr::is_ipv6);
    let (first, second): (Vec<_>, Vec<_>) = addresses.into_iter().partition(|a| a.is_ipv6() == first_is_v6);
    let mut out = Vec::with_capacity(first.len() + second.len());
    let (mut first, mut second) = (first.into_iter(), second.into_iter());
    loop {
        match (first.next(), second.next()) {
            (None, None) => return out,
            (a, b) => out.extend(a.into_iter().chain(b)),
        }
    }
}

async fn connect_marked(address: SocketAddr, mark: u32) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    if mark != 0 {
        socket.set_mark(mark)?;
    }
    let stream = TcpSocket::from_std_stream(socket.into()).connect(address).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

fn tls_config() -> Result<Arc<rustls::ClientConfig>, Failure> {
    let broken = |why: String| {
        Failure::permanent(Problem::new(
            "tls-roots",
            format!("no certificate authorities to check an https coordinator with: {why}"),
            "install the system's CA certificates (package ca-certificates)",
        ))
    };
    let mut roots = rustls::RootCertStore::empty();
    let native = rustls_native_certs::load_native_certs();
    roots.add_parsable_certificates(native.certs);
    if roots.is_empty() {
        return Err(broken(native.errors.first().map_or_else(|| "none found".into(), ToString::to_string)));
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| broken(e.to_string()))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(Arc::new(config))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_become_websocket_urls() {
        for (text, websocket) in [
            ("https://warren.example", "wss://warren.example:443/control/v1"),
            ("http://10.0.0.1:8080/", "ws://10.0.0.1:8080/control/v1"),
            ("http://[fd00::1]:80/base/", "ws://[fd00::1]:80/base/control/v1"),
        ] {
            assert_eq!(text.parse::<CoordinatorUrl>().unwrap().websocket(), websocket);
        }
    }

    #[test]
    fn what_is_not_a_url_is_bad_usage() {
        for text in [
            "",
            "warren",
            "ftp://x",
            "http://",
            "http://user@host",
            "http://h/?x=1",
            "http://h:99999",
            "http://h:",
        ] {
            let problem = text.parse::<CoordinatorUrl>().unwrap_err();
            assert_eq!((problem.code.as_str(), problem.exit), ("bad-url", 2), "{text}");
        }
    }

    #[test]
    fn families_take_turns() {
        let parse = |list: &[&str]| -> Vec<SocketAddr> { list.iter().map(|a| a.parse().unwrap()).collect() };
        let got = interleave(parse(&["[::1]:1", "[::2]:1", "1.1.1.1:1"]));
        assert_eq!(got, parse(&["[::1]:1", "1.1.1.1:1", "[::2]:1"]));
    }
}
