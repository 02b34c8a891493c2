//! The operating system's randomness: the only generator of the shipped agent.

use std::num::NonZeroU32;

use rand_core::{CryptoRng, Error, RngCore, impls};

/// Draws from the kernel for each request.
#[derive(Clone, Copy, Debug, Default)]
pub struct OsEntropy;

impl RngCore for OsEntropy {
    fn next_u32(&mut self) -> u32 {
        impls::next_u32_via_fill(self)
    }

    fn next_u64(&mut self) -> u64 {
        impls::next_u64_via_fill(self)
    }

    #[expect(clippy::expect_used, reason = "keys and nonces made without entropy are worse than no agent")]
    fn fill_bytes(&mut self, dest: &mut [u8]) {
        self.try_fill_bytes(dest).expect("the kernel's random generator answers");
    }

    #[expect(clippy::disallowed_methods, reason = "this is the shell's one source of entropy")]
    fn try_fill_bytes(&mut self, dest: &mut [u8]) -> Result<(), Error> {
        // The code only says that it is not an OS error number; the cause is always the same.
        getrandom::fill(dest).map_err(|_| Error::from(NonZeroU32::MIN.saturating_add(Error::CUSTOM_START)))
    }
}

impl CryptoRng for OsEntropy {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_draws_differ() {
        let (mut a, mut b) = ([0; 32], [0; 32]);
        OsEntropy.fill_bytes(&mut a);
        OsEntropy.fill_bytes(&mut b);
        assert_ne!(a, b);
    }
}
