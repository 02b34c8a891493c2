//! Where a coordinator is.

use std::fmt;
use std::net::Ipv6Addr;
use std::str::FromStr;

/// `http://` or `https://`, a host, and maybe a port and a path.
#[derive(Clone, PartialEq, Eq)]
pub struct CoordinatorUrl {
    text: String,
    tls: bool,
    host: String,
    port: u16,
    path: String,
}

/// Why a text is not a coordinator's URL.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not the URL of a coordinator: write `https://host` or `http://host:port`")]
pub struct ParseUrlError(
    /// The text.
    pub String,
);

impl FromStr for CoordinatorUrl {
    type Err = ParseUrlError;

    fn from_str(text: &str) -> Result<Self, ParseUrlError> {
        let text = text.trim().trim_end_matches('/');
        parse(text).ok_or_else(|| ParseUrlError(text.to_owned()))
    }
}

fn parse(text: &str) -> Option<CoordinatorUrl> {
    let (scheme, rest) = text.split_once("://")?;
    let (tls, default_port) = match scheme.to_ascii_lowercase().as_str() {
        "https" => (true, 443),
        "http" => (false, 80),
        _ => return None,
    };
    let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    // A user name, a query or a fragment has no meaning here: better refused than dropped.
    if !path.bytes().all(|b| b.is_ascii_graphic() && !matches!(b, b'?' | b'#' | b'@' | b'\\')) {
        return None;
    }
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (host, port) = rest.split_once(']')?;
            host.parse::<Ipv6Addr>().ok()?;
            (host, port)
        }
        None => authority.split_at(authority.find(':').unwrap_or(authority.len())),
    };
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_' | b':');
    if host.is_empty() || !host.bytes().all(plain) {
        return None;
    }
    let port = match port.strip_prefix(':') {
        Some(port) => port.parse().ok().filter(|p| *p != 0)?,
        None if port.is_empty() => default_port,
        None => return None,
    };
    Some(CoordinatorUrl { text: text.to_owned(), tls, host: host.to_owned(), port, path: path.to_owned() })
}

impl CoordinatorUrl {
    /// True for `https`.
    pub const fn tls(&self) -> bool {
        self.tls
    }

    /// A host name or an address, IPv6 without brackets.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The port, that of the scheme if none is given.
    pub const fn port(&self) -> u16 {
        self.port
    }

    /// The URL of the WebSocket at `path` (beginning with `/`) below this one.
    pub fn websocket(&self, path: &str) -> String {
        let scheme = if self.tls { "wss" } else { "ws" };
        let host = if self.host.contains(':') { format!("[{}]", self.host) } else { self.host.clone() };
        format!("{scheme}://{host}:{}{}{path}", self.port, self.path)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_become_websocket_urls() {
        for (text, websocket) in [
            ("https://warren.example", "wss://warren.example:443/control/v1"),
            ("HTTPS://warren.example:8443", "wss://warren.example:8443/control/v1"),
            (" http://10.0.0.1:8080/ ", "ws://10.0.0.1:8080/control/v1"),
            ("http://[fd00::1]:80/base/", "ws://[fd00::1]:80/base/control/v1"),
            ("http://[fd00::1]", "ws://[fd00::1]:80/control/v1"),
        ] {
            let url: CoordinatorUrl = text.parse().unwrap();
            assert_eq!(url.websocket("/control/v1"), websocket);
            assert_eq!(url.to_string().parse(), Ok(url));
        }
    }

    #[test]
    fn anything_else_is_refused_by_name() {
        for text in [
            "",
            "warren",
            "ftp://x",
            "http://",
            "http://user@host",
            "http://h/?x=1",
            "http://h/#x",
            "http://h:99999",
            "http://h:0",
            "http://h:",
            "http://h:1:2",
            "http://a b",
            "http://fd00::1",
            "http://[fd00::1",
            "http://[fd00::1]x",
            "http://[h]",
        ] {
            let error = text.parse::<CoordinatorUrl>().unwrap_err();
            assert!(error.to_string().starts_with(&format!("`{}` is not", text.trim_end_matches('/'))));
        }
    }
}
