//! Whether this host has a way out to a relay's address: what is sent without one is lost without a word.
//!
//! A route is not enough. When IPv6 leaves an interface its default route stays, and the kernel takes whatever address is left
//! as the source of what goes there, be it the overlay's own.

use std::io;
use std::net::{IpAddr, SocketAddr};

use socket2::{Protocol, Type};

use crate::egress::marked;

/// Fails if this host has no way out to `to`. `own`: its addresses in the overlay, which no answer from outside finds.
pub(super) fn check(to: SocketAddr, mark: u32, own: &[IpAddr]) -> io::Result<()> {
    let socket = marked(to, Type::DGRAM, Protocol::UDP, mark)?;
    socket.connect(&to.into())?;
    // Only of families that are no IP.
    let from = socket.local_addr()?.as_socket().ok_or(io::ErrorKind::Unsupported)?.ip();
    if own.contains(&from) || !is_answered(from, to.ip()) {
        return Err(io::ErrorKind::NetworkUnreachable.into());
    }
    Ok(())
}

/// True if what comes `from` there is answered at all: the scope of the address reaches as far.
const fn is_answered(from: IpAddr, to: IpAddr) -> bool {
    if from.is_loopback() {
        return to.is_loopback();
    }
    match (from, to) {
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            !from.is_unicast_link_local() || to.is_unicast_link_local() || to.is_loopback()
        }
        _ => true, // a translator may stand in front of an address of any scope
    }
}

/// True if `ip` was this host's address and is not any more: what is bound to it is dead, whatever routes there are.
pub(super) fn is_gone(ip: IpAddr) -> bool {
    let addr = SocketAddr::new(ip, 0);
    let bound = marked(addr, Type::DGRAM, Protocol::UDP, 0).and_then(|socket| socket.bind(&addr.into()));
    bound.is_err_and(|error| error.kind() == io::ErrorKind::AddrNotAvailable)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn a_source_of_smaller_scope_than_the_destination_is_no_way_out() {
        for (from, to, answered) in [
            ("2001:db8::2", "2001:db8:9::9", true),
            ("::1", "2001:db8:9::9", false),
            ("fe80::2", "2001:db8:9::9", false),
            ("fe80::2", "fe80::3", true),
            ("fd00::2", "2001:db8:9::9", true), // translated on the way, perhaps
            ("::1", "::1", true),
            ("192.168.1.2", "192.0.2.9", true),
            ("169.254.1.2", "192.0.2.9", true),
            ("127.0.0.1", "192.0.2.9", false),
            ("127.0.0.1", "127.0.0.1", true),
        ] {
            assert_eq!(is_answered(ip(from), ip(to)), answered, "{from} to {to}");
        }
    }

    #[test]
    fn an_address_of_the_overlay_is_no_source() {
        let to: SocketAddr = "127.0.0.1:9".parse().unwrap();
        assert!(check(to, 0, &[ip("127.0.0.2")]).is_ok());
        assert_eq!(check(to, 0, &[to.ip()]).unwrap_err().kind(), io::ErrorKind::NetworkUnreachable);
    }

    #[test]
    fn an_address_that_this_host_does_not_have_is_gone() {
        assert!(!is_gone(ip("127.0.0.1")));
        assert!(is_gone(ip("192.0.2.1")));
    }
}
