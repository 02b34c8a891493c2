//! `NO_PROXY`: who is connected to directly although there is a proxy.

use std::net::IpAddr;

use ipnet::IpNet;

/// A list such as `localhost,.example.com,10.0.0.0/8,host:8443`, understood as by most programs: a name covers itself and what
/// is below it, with or without a dot in front; `*` covers everything. This host is covered always.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exceptions(Vec<Exception>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Exception {
    host: Pattern,
    port: Option<u16>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Pattern {
    Everything,
    Network(IpNet),
    Name(String),
}

impl Exceptions {
    /// Reads a list. What can't be understood covers nothing.
    pub fn parse(list: &str) -> Self {
        let words = list.split([',', ' ', '\t']).map(str::trim).filter(|word| !word.is_empty());
        Self(words.filter_map(exception).collect())
    }

    /// How many there are.
    pub const fn len(&self) -> usize {
        self.0.len()
    }

    /// True if there is none.
    pub const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// True if this host (a name, or an address without brackets) is connected to directly.
    pub fn cover(&self, host: &str, port: u16) -> bool {
        let name = host.trim_end_matches('.').to_ascii_lowercase();
        let address = name.parse::<IpAddr>().ok().map(|ip| ip.to_canonical());
        if name == "localhost" || address.is_some_and(|ip| ip.is_loopback()) {
            return true;
        }
        self.0.iter().filter(|e| e.port.is_none_or(|p| p == port)).any(|exception| match &exception.host {
            Pattern::Everything => true,
            Pattern::Network(net) => address.is_some_and(|ip| net.contains(&ip)),
            Pattern::Name(covered) => {
                let below = name.strip_suffix(covered.as_str());
                address.is_none() && below.is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
            }
        })
    }
}

fn exception(word: &str) -> Option<Exception> {
    if let Some(host) = pattern(word) {
        return Some(Exception { host, port: None });
    }
    let (host, port) = word.rsplit_once(':')?;
    Some(Exception { host: pattern(host)?, port: Some(port.parse().ok()?) })
}

fn pattern(word: &str) -> Option<Pattern> {
    if word == "*" {
        return Some(Pattern::Everything);
    }
    let bare = word.strip_prefix('[').and_then(|word| word.strip_suffix(']')).unwrap_or(word);
    if let Ok(ip) = bare.parse::<IpAddr>() {
        return Some(Pattern::Network(ip.to_canonical().into()));
    }
    if let Ok(net) = word.parse::<IpNet>() {
        return Some(Pattern::Network(net));
    }
    let name = word.trim_start_matches("*.").trim_matches('.').to_ascii_lowercase();
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
    (!name.is_empty() && name.bytes().all(plain)).then_some(Pattern::Name(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_networks_and_ports() {
        let list = Exceptions::parse(
            "Example.com, .corp.internal *.lab,10.0.0.0/8 192.0.2.7,2001:db8::/32,[fd00::1]:443,only.port:8080,*:9999",
        );
        assert_eq!(list.len(), 9);
        for (host, port, covered) in [
            ("example.com", 443, true),
            ("EXAMPLE.com.", 443, true),
            ("a.example.com", 443, true),
            ("notexample.com", 443, false),
            ("corp.internal", 443, true),
            ("x.y.corp.internal", 443, true),
            ("z.lab", 1, true),
            ("10.255.0.1", 443, true),
            ("11.0.0.1", 443, false),
            ("::ffff:10.0.0.1", 443, true),
            ("192.0.2.7", 443, true),
            ("192.0.2.8", 443, false),
            ("2001:db8::9", 443, true),
            ("2001:db9::9", 443, false),
            ("fd00::1", 443, true),
            ("fd00::1", 444, false),
            ("only.port", 8080, true),
            ("only.port", 443, false),
            ("whatever", 9999, true),
        ] {
            assert_eq!(list.cover(host, port), covered, "{host}:{port}");
        }
    }

    #[test]
    fn this_host_is_always_covered_and_nonsense_covers_nothing() {
        for host in ["localhost", "127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"] {
            assert!(Exceptions::default().cover(host, 443), "{host}");
        }
        let list = Exceptions::parse(",, http://x ,a b:c,10.0.0.0/99,.,%");
        assert_eq!(list, Exceptions::parse("a"));
        assert!(!list.is_empty() && !list.cover("10.0.0.1", 443) && Exceptions::parse("*").cover("::2", 1));
    }
}
