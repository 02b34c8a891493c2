//! Overlay addresses: a free one from the pool, never one that is reserved, in use or resting.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use ipnet::{Ipv4Net, Ipv6Net};
use rand_core::RngCore;
use warren_common::ids::NetworkId;

/// How long a removed device's addresses stay unused, so that nothing cached elsewhere reaches a stranger.
pub const REST: Duration = Duration::from_secs(7 * 24 * 3_600);

/// Parts of 100.64.0.0/10 that other software on the same host uses: never given to a device.
/// The first is where overlay networks commonly answer DNS, the second is ChromeOS's for its guests.
pub const RESERVED_V4: [(Ipv4Addr, u8); 2] =
    [(Ipv4Addr::new(100, 100, 100, 0), 24), (Ipv4Addr::new(100, 115, 92, 0), 23)];

/// How many random IPv6 addresses are tried; with 2^64 of them a second try is already unheard of.
const IPV6_TRIES: usize = 64;

/// The IPv6 prefix of a network that names none: `fd` and 40 bits of the network id's random part (RFC 4193).
pub fn derive_ipv6_prefix(network: NetworkId) -> Ipv6Net {
    let id = network.to_bytes();
    let mut octets = [0; 16];
    octets[0] = 0xfd;
    octets[1..6].copy_from_slice(&id[11..16]);
    Ipv6Net::new_assert(Ipv6Addr::from(octets), 48)
}

/// A free address of `pool`, chosen at random; `None` if every one is reserved or `used`.
///
/// The network's and the broadcast address are never given out, nor is the first one of a pool of /24 or more
/// (kept for the network's own services).
pub fn free_ipv4(pool: Ipv4Net, used: impl Fn(Ipv4Addr) -> bool, rng: &mut impl RngCore) -> Option<Ipv4Addr> {
    let (first, last) = (u32::from(pool.network()), u32::from(pool.broadcast()));
    let low = first.checked_add(if pool.prefix_len() <= 24 { 2 } else { 1 })?;
    let count = last.checked_sub(low).filter(|c| *c > 0)?;
    let start = (u64::from(rng.next_u32()) * u64::from(count)) >> 32;
    let reserved: Vec<(u32, u32)> = RESERVED_V4
        .iter()
        .map(|(net, len)| (u32::from(*net), u32::from(*net) + ((1u32 << (32 - len)) - 1)))
        .collect();
    (0..u64::from(count))
        .map(|i| low + ((start + i) % u64::from(count)) as u32)
        .filter(|a| !reserved.iter().any(|(lo, hi)| (lo..=hi).contains(&a)))
        .map(Ipv4Addr::from)
        .find(|a| !used(*a))
}

/// A free address of `prefix`, its host bits random and not zero.
pub fn free_ipv6(
    prefix: Ipv6Net,
    used: impl Fn(Ipv6Addr) -> bool,
    rng: &mut impl RngCore,
) -> Option<Ipv6Addr> {
    // The subnet id stays 0 and the low 64 bits are random where the prefix leaves as many.
    let host_bits = u32::from(128 - prefix.prefix_len()).min(64);
    let mask = if host_bits == 64 { u64::MAX } else { (1u64 << host_bits) - 1 };
    (0..IPV6_TRIES)
        .map(|_| rng.next_u64() & mask)
        .filter(|host| *host != 0)
        .map(|host| Ipv6Addr::from(u128::from(prefix.network()) | u128::from(host)))
        .find(|a| !used(*a))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand_chacha::ChaCha20Rng;
    use rand_core::SeedableRng;
    use std::collections::BTreeSet;

    #[test]
    fn a_small_pool_is_given_out_whole_and_then_refused() {
        let pool: Ipv4Net = "10.1.0.0/24".parse().unwrap();
        let mut rng = ChaCha20Rng::seed_from_u64(1);
        let mut used = BTreeSet::new();
        while let Some(addr) = free_ipv4(pool, |a| used.contains(&a), &mut rng) {
            assert!(used.insert(addr) && pool.contains(&addr));
        }
        assert_eq!(used.len(), 253); // 256 less network, first and broadcast
        assert!(!used.contains(&pool.network()) && !used.contains(&pool.broadcast()));
    }

    #[test]
    fn reserved_addresses_are_skipped() {
        let mut rng = ChaCha20Rng::seed_from_u64(1);
        let pool = "100.100.100.0/24".parse().unwrap();
        assert_eq!(free_ipv4(pool, |_| false, &mut rng), None);
        let pool = "100.115.92.0/22".parse().unwrap();
        let addr = free_ipv4(pool, |_| false, &mut rng).unwrap();
        assert!(addr >= Ipv4Addr::new(100, 115, 94, 0));
    }

    #[test]
    fn tiny_pools_do_not_overflow() {
        let mut rng = ChaCha20Rng::seed_from_u64(1);
        for (pool, want) in
            [("10.0.0.0/30", 2), ("10.0.0.0/31", 0), ("10.0.0.0/32", 0), ("255.255.255.252/30", 2)]
        {
            let pool: Ipv4Net = pool.parse().unwrap();
            let mut used = BTreeSet::new();
            while let Some(addr) = free_ipv4(pool, |a| used.contains(&a), &mut rng) {
                used.insert(addr);
            }
            assert_eq!(used.len(), want, "{pool}");
        }
    }

    #[test]
    fn the_ipv6_prefix_is_local_and_the_networks_own() {
        let mut rng = ChaCha20Rng::seed_from_u64(1);
        let a = derive_ipv6_prefix(NetworkId::generate(0, &mut rng));
        let b = derive_ipv6_prefix(NetworkId::generate(0, &mut rng));
        assert_ne!(a, b);
        assert_eq!((a.prefix_len(), a.addr().octets()[0]), (48, 0xfd));
        let addr = free_ipv6(a, |_| false, &mut rng).unwrap();
        assert!(a.contains(&addr));
        assert!(free_ipv6(a, |_| true, &mut rng).is_none());
    }
}
