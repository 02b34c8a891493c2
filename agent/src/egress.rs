//! How TCP connections leave this host: directly, or through an HTTP proxy. The control session and the relays' WebSockets
//! use it; UDP (tunnels, QUIC, STUN) always goes directly.
//!
//! Settings come from the command line, else from the environment as for other programs: [`Egress::from_settings`].

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpSocket, TcpStream, lookup_host};
use tokio::task::JoinSet;

use crate::problem::{Problem, io_text};

mod exceptions;
mod proxy;

pub use exceptions::Exceptions;
pub use proxy::Proxy;

/// A later address gets its chance after this long without a connection (RFC 8305, connection attempt delay).
const ATTEMPT_DELAY: Duration = Duration::from_millis(250);
/// Most addresses of one name that are tried.
const MAX_ADDRESSES: usize = 8;
/// What `--proxy` says to go directly whatever the environment says.
const NONE: &str = "none";

/// The way out.
#[derive(Debug, Default)]
pub struct Egress {
    mark: u32,
    proxy: Option<Proxy>,
    exceptions: Exceptions,
    authorities: Vec<CertificateDer<'static>>,
}

/// Why there is no connection.
#[derive(Debug)]
pub enum Error {
    /// The other end can't be reached, in words that go on from "it can't be reached: ".
    Away(String),
    /// The proxy can't be reached, or does not do what is asked of it.
    Proxy {
        /// What is wrong.
        problem: Problem,
        /// Trying again won't help until somebody changes something.
        lasting: bool,
    },
}

impl Egress {
    /// Everything goes directly, from sockets with `mark` (0 for none).
    pub fn direct(mark: u32) -> Self {
        Self { mark, ..Self::default() }
    }

    /// The same through a proxy, except to these.
    #[must_use]
    pub fn through(self, proxy: Proxy, exceptions: Exceptions) -> Self {
        Self { proxy: Some(proxy), exceptions, ..self }
    }

    /// What `--proxy` and `--ca` say, and where there is no `--proxy`, `HTTPS_PROXY`. `NO_PROXY` counts for both. `variable`
    /// looks a variable of the environment up; names in lower case count as well, and first, as with other programs.
    ///
    /// # Errors
    /// The proxy's URL or the file with certificates is of no use.
    pub fn from_settings(
        mark: u32,
        proxy: Option<&str>,
        authorities: Option<&Path>,
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, Problem> {
        let set = |name: &str| {
            let found = variable(&name.to_ascii_lowercase()).or_else(|| variable(name));
            found.filter(|value| !value.trim().is_empty())
        };
        let proxy = match proxy {
            Some(NONE) => None,
            Some(url) => Some(Proxy::parse(url, "--proxy")?),
            None => set("HTTPS_PROXY").map(|url| Proxy::parse(&url, "HTTPS_PROXY")).transpose()?,
        };
        let exceptions = set("NO_PROXY").map_or_else(Exceptions::default, |list| Exceptions::parse(&list));
        let authorities = authorities.map(load).transpose()?.unwrap_or_default();
        Ok(Self { mark, proxy, exceptions, authorities })
    }

    /// The mark of our sockets, so that no overlay route captures them; 0 for none.
    pub const fn mark(&self) -> u32 {
        self.mark
    }

    /// The proxy, if there is one.
    pub const fn proxy(&self) -> Option<&Proxy> {
        self.proxy.as_ref()
    }

    /// The proxy that connections to a host (a name, or an address without brackets) go through.
    pub fn proxy_for(&self, host: &str, port: u16) -> Option<&Proxy> {
        self.proxy.as_ref().filter(|_| !self.exceptions.cover(host, port))
    }

    /// Who is connected to directly all the same.
    pub const fn exceptions(&self) -> &Exceptions {
        &self.exceptions
    }

    /// Certificate authorities to trust beside the system's.
    pub fn authorities(&self) -> &[CertificateDer<'static>] {
        &self.authorities
    }

    /// Connects to a host: a name, which a proxy looks up itself, or an address without brackets.
    ///
    /// # Errors
    /// It can't be reached, or the proxy does not let us.
    pub async fn connect(&self, host: &str, port: u16) -> Result<TcpStream, Error> {
        match self.proxy_for(host, port) {
            None => dial(host, port, self.mark).await.map_err(Error::Away),
            Some(proxy) => proxy.connect(host, port, self.mark).await,
        }
    }
}

/// The certificates of a PEM file.
fn load(path: &Path) -> Result<Vec<CertificateDer<'static>>, Problem> {
    let bad = |why: String| {
        Problem::usage(
            "bad-ca",
            format!("{} holds no certificate authorities: {why}", path.display()),
            "give --ca a PEM file with one or more certificates (`-----BEGIN CERTIFICATE-----`)",
        )
    };
    let text = std::fs::read(path).map_err(|e| bad(io_text(&e)))?;
    let found: Vec<_> =
        CertificateDer::pem_slice_iter(&text).collect::<Result<_, _>>().map_err(|e| bad(e.to_string()))?;
    let mut roots = rustls::RootCertStore::empty();
    for certificate in &found {
        roots.add(certificate.clone()).map_err(|e| bad(e.to_string()))?;
    }
    if found.is_empty() { Err(bad("no certificate is in it".to_owned())) } else { Ok(found) }
}

/// Connects to the first address of a name that answers, or says why none does.
pub(crate) async fn dial(host: &str, port: u16, mark: u32) -> Result<TcpStream, String> {
    let addresses = match lookup_host((host, port)).await {
        Ok(list) => in_turn(list),
        Err(_) => return Err(format!("the name `{host}` is not known")),
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
    Err(last)
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
    let socket = marked(address, Type::STREAM, Protocol::TCP, mark)?;
    let stream = TcpSocket::from_std_stream(socket.into()).connect(address).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// A socket that does not block, of the family of `address`, with `mark` (0 for none).
pub(crate) fn marked(address: SocketAddr, kind: Type, protocol: Protocol, mark: u32) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), kind, Some(protocol))?;
    socket.set_nonblocking(true)?;
    if mark != 0 {
        socket.set_mark(mark)?;
    }
    Ok(socket)
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

    #[test]
    fn the_command_line_comes_before_the_environment_and_lower_case_before_upper_case() {
        let from = |flag: Option<&str>, variables: &[(&str, &str)]| {
            let found = |name: &str| {
                variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
            };
            Egress::from_settings(0, flag, None, found).map(|e| {
                let through = |host| e.proxy_for(host, 443).map(ToString::to_string);
                (through("warren.example"), through("10.1.2.3"))
            })
        };
        let some = |text: &str| Some(text.to_owned());
        assert_eq!(from(None, &[]).unwrap(), (None, None));
        let upper = ("HTTPS_PROXY", "http://u:p@upper:1");
        assert_eq!(from(None, &[upper]).unwrap(), (some("upper:1"), some("upper:1")));
        let lower = ("https_proxy", "http://lower:2");
        assert_eq!(from(None, &[upper, lower]).unwrap().0, some("lower:2"));
        assert_eq!(from(None, &[upper, ("https_proxy", " ")]).unwrap().0, None, "switched off");
        let except = ("NO_PROXY", "10.0.0.0/8");
        assert_eq!(from(Some("http://flag"), &[upper, except]).unwrap(), (some("flag:80"), None));
        assert_eq!(from(Some("none"), &[upper]).unwrap(), (None, None));
        for (flag, variables, named) in [
            (Some("socks5://x"), &[][..], "--proxy"),
            (None, &[("HTTPS_PROXY", "ftp://x")][..], "HTTPS_PROXY"),
        ] {
            let problem = from(flag, variables).unwrap_err();
            assert_eq!((problem.code.as_str(), problem.exit), ("bad-proxy", 2));
            assert!(problem.text.contains(named), "{}", problem.text);
        }
    }

    #[test]
    fn authorities_are_read_from_a_file_or_the_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ca.pem");
        let load = |text: &str| {
            std::fs::write(&path, text).unwrap();
            Egress::from_settings(0, None, Some(&path), |_| None).map(|e| e.authorities().len())
        };
        let pem = || rcgen::generate_simple_self_signed(["ca".to_owned()]).unwrap().cert.pem();
        assert_eq!(load(&(pem() + "# a comment\n" + &pem())).unwrap(), 2);
        let garbage = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        for bad in ["", "nonsense", garbage] {
            let problem = load(bad).unwrap_err();
            assert_eq!(problem.code, "bad-ca");
            assert!(problem.text.contains("ca.pem"), "{}", problem.text);
        }
        let problem = Egress::from_settings(0, None, Some(&dir.path().join("none")), |_| None).unwrap_err();
        assert!(problem.text.contains("no such file"), "{}", problem.text);
    }
}
