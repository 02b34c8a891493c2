//! From a URL to a byte stream: names, raced addresses, our mark on the socket, TLS for `https`.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::ServerName;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpSocket, TcpStream, lookup_host};
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_util::either::Either;
use warren_common::url::CoordinatorUrl;

use super::session::Failure;
use crate::problem::{Problem, io_text};

/// A later address gets its chance after this long without a connection (RFC 8305, connection attempt delay).
const ATTEMPT_DELAY: Duration = Duration::from_millis(250);
/// Most addresses of one name that are tried.
const MAX_ADDRESSES: usize = 8;

/// A connection, encrypted by TLS or not.
pub(super) type Stream = Either<TcpStream, Box<TlsStream<TcpStream>>>;

/// Connects to the coordinator.
pub(super) async fn dial(url: &CoordinatorUrl, mark: u32) -> Result<Stream, Failure> {
    let tcp = dial_tcp(url, mark).await?;
    if !url.tls() {
        return Ok(Either::Left(tcp));
    }
    let name = ServerName::try_from(url.host().to_owned()).map_err(|_| {
        Failure::permanent(Problem::usage(
            "bad-url",
            format!("`{}` is not a host name", url.host()),
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
    Ok(Either::Right(Box::new(tls)))
}

async fn dial_tcp(url: &CoordinatorUrl, mark: u32) -> Result<TcpStream, Failure> {
    let unreachable = |why: String| {
        Failure::transient(Problem::new(
            "coordinator-away",
            format!("the coordinator at `{url}` can't be reached: {why}"),
            "check the URL, the network and any firewall; an agent that has joined keeps trying",
        ))
    };
    let found = lookup_host((url.host(), url.port())).await;
    let addresses = match found {
        Ok(list) => in_turn(list),
        Err(_) => return Err(unreachable(format!("the name `{}` is not known", url.host()))),
    };
    let mut attempts = JoinSet::new();
    for (i, address) in (0u32..).zip(addresses) {
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

/// The first addresses, families in turn, in the resolver's order within each.
fn in_turn(found: impl Iterator<Item = SocketAddr>) -> Vec<SocketAddr> {
    let addresses: Vec<SocketAddr> = found.take(MAX_ADDRESSES).collect();
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

/// A TCP connection with `mark` on its socket (0 for none).
pub(crate) async fn connect_marked(address: SocketAddr, mark: u32) -> io::Result<TcpStream> {
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
    fn families_take_turns() {
        let parse = |list: &[&str]| -> Vec<SocketAddr> { list.iter().map(|a| a.parse().unwrap()).collect() };
        let got = in_turn(parse(&["[::1]:1", "[::2]:1", "1.1.1.1:1"]).into_iter());
        assert_eq!(got, parse(&["[::1]:1", "1.1.1.1:1", "[::2]:1"]));
        // However many a name has.
        assert_eq!(in_turn(std::iter::repeat_n(got[0], 1_000)).len(), MAX_ADDRESSES);
    }
}
