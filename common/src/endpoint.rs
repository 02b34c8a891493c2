//! Which addresses may ever be sent to outside the overlay.

use std::net::{IpAddr, SocketAddr};

use ipnet::{Ipv4Net, Ipv6Net};

/// True for a unicast address with a port, outside the overlay (promise 12): all that a device sends to because another
/// one said so.
pub fn is_endpoint(overlay: Option<(Ipv4Net, Ipv6Net)>, addr: SocketAddr) -> bool {
    let fine = match addr.ip() {
        IpAddr::V4(ip) => {
            !(ip.octets()[0] == 0
                || ip.is_loopback()
                || ip.is_multicast()
                || ip.is_broadcast()
                || ip.is_link_local()
                || overlay.is_some_and(|(v4, _)| v4.contains(&ip)))
        }
        IpAddr::V6(ip) => {
            !(ip.is_unspecified()
                || ip.is_loopback()
                || ip.is_multicast()
                || ip.is_unicast_link_local()
                || ip.to_ipv4_mapped().is_some()
                || overlay.is_some_and(|(_, v6)| v6.contains(&ip)))
        }
    };
    fine && addr.port() != 0
}
