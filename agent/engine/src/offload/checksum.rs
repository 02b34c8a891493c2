//! The Internet checksum (RFC 1071), fast. Sums are of native-endian words: the byte order of a one's complement sum is
//! that of its words, so that [`finish`] gives the bytes to store without a swap.

#[cfg(test)]
use crate::packet::Addrs;

/// An unfolded sum, of less than 2^32 bytes.
#[derive(Clone, Copy, Default)]
pub(crate) struct Sum(u64);

impl Sum {
    /// With `bytes` added; only the last piece that is added may have an odd length.
    #[must_use]
    pub(crate) fn add(self, bytes: &[u8]) -> Self {
        const LANES: usize = 8;
        let (blocks, rest) = bytes.as_chunks::<{ 4 * LANES }>();
        // Independent sums, so that the compiler uses vectors.
        let mut lanes = [0u64; LANES];
        for block in blocks {
            let (words, _) = block.as_chunks::<4>();
            for (lane, word) in lanes.iter_mut().zip(words) {
                *lane += u64::from(u32::from_ne_bytes(*word));
            }
        }
        let (words, rest) = rest.as_chunks::<4>();
        let words: u64 = words.iter().map(|word| u64::from(u32::from_ne_bytes(*word))).sum();
        let mut last = [0; 4];
        last[..rest.len()].copy_from_slice(rest);
        Self(self.0 + lanes.iter().sum::<u64>() + words + u64::from(u32::from_ne_bytes(last)))
    }

    /// With one 16-bit number added, as it stands in a header.
    #[must_use]
    pub(crate) fn add_u16(self, value: u16) -> Self {
        Self(self.0 + u64::from(u16::from_ne_bytes(value.to_be_bytes())))
    }

    /// With the addresses, protocol and length of a pseudo-header added (RFC 9293, RFC 8200).
    #[must_use]
    pub(crate) fn add_pseudo(self, addresses: &[u8], proto: u8, len: usize) -> Self {
        let len = len as u32; // of a packet
        self.add(addresses).add_u16(u16::from(proto)).add_u16((len >> 16) as u16).add_u16(len as u16)
    }

    /// The sum folded to 16 bits, as bytes of a header. What a kernel wants to find where it is to complete a checksum.
    pub(crate) const fn folded(self) -> [u8; 2] {
        let mut sum = self.0;
        sum = (sum & 0xffff_ffff) + (sum >> 32);
        sum = (sum & 0xffff) + (sum >> 16);
        sum = (sum & 0xffff) + (sum >> 16);
        sum = (sum & 0xffff) + (sum >> 16);
        (sum as u16).to_ne_bytes()
    }

    /// The checksum, as bytes of a header.
    pub(crate) const fn finish(self) -> [u8; 2] {
        let [a, b] = self.folded();
        [!a, !b]
    }

    /// True if what was summed has a right checksum in it.
    pub(crate) const fn is_right(self) -> bool {
        matches!(self.finish(), [0, 0])
    }
}

/// A checksum after one 16-bit word of what it covers changed (RFC 1624).
pub(crate) const fn replaced(checksum: u16, before: u16, after: u16) -> u16 {
    let sum = (!checksum as u32) + (!before as u32) + after as u32;
    let sum = (sum & 0xffff) + (sum >> 16);
    !((sum & 0xffff) + (sum >> 16)) as u16
}

/// Of a pseudo-header.
#[cfg(test)]
pub(crate) fn pseudo(addrs: &Addrs, proto: u8, len: usize) -> Sum {
    match addrs {
        Addrs::V4 { src, dst } => Sum::default().add(&src.octets()).add_pseudo(&dst.octets(), proto, len),
        Addrs::V6 { src, dst } => Sum::default().add(&src.octets()).add_pseudo(&dst.octets(), proto, len),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::build;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn agrees_with_the_plain_one(bytes in prop::collection::vec(any::<u8>(), 0..3_000), even in 0usize..200) {
            let plain = build::checksum(&[&bytes]).to_be_bytes();
            prop_assert_eq!(Sum::default().add(&bytes).finish(), plain);
            let (a, b) = bytes.split_at((even * 2).min(bytes.len() & !1));
            prop_assert_eq!(Sum::default().add(a).add(b).finish(), plain);
        }

        #[test]
        fn a_replaced_word_is_as_if_summed_anew(mut words in prop::collection::vec(any::<u16>(), 2..20), new: u16) {
            // The all-zero sum has two forms; a header, which is never all zero, has one.
            words[0] = 0x4500;
            let sum = |words: &[u16]| {
                let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_be_bytes()).collect();
                build::checksum(&[&bytes])
            };
            let before = sum(&words);
            let old = std::mem::replace(&mut words[1], new);
            prop_assert_eq!(replaced(before, old, new), sum(&words));
        }
    }
}
