//! snow with our randomness: its primitives, and a generator that the caller hands in.

use rand_chacha::ChaCha20Rng;
use rand_core::{CryptoRng, RngCore, SeedableRng};
use snow::params::{CipherChoice, DHChoice, HashChoice};
use snow::resolvers::{CryptoResolver, DefaultResolver};
use snow::types::{Cipher, Dh, Hash, Random};

/// A resolver for one handshake: snow's default primitives, with a generator seeded from `rng`.
///
/// The product seeds it from OS entropy, the simulator from its seed; snow itself never asks the system.
pub fn resolver(rng: &mut (impl RngCore + CryptoRng)) -> Box<dyn CryptoResolver + Send> {
    let mut seed = [0; 32];
    rng.fill_bytes(&mut seed);
    Box::new(InjectedRng { seed })
}

struct InjectedRng {
    seed: [u8; 32],
}

impl CryptoResolver for InjectedRng {
    fn resolve_rng(&self) -> Option<Box<dyn Random>> {
        Some(Box::new(Generator(ChaCha20Rng::from_seed(self.seed))))
    }

    fn resolve_dh(&self, choice: &DHChoice) -> Option<Box<dyn Dh>> {
        DefaultResolver.resolve_dh(choice)
    }

    fn resolve_hash(&self, choice: &HashChoice) -> Option<Box<dyn Hash>> {
        DefaultResolver.resolve_hash(choice)
    }

    fn resolve_cipher(&self, choice: &CipherChoice) -> Option<Box<dyn Cipher>> {
        DefaultResolver.resolve_cipher(choice)
    }
}

struct Generator(ChaCha20Rng);

impl Random for Generator {
    fn try_fill_bytes(&mut self, dest: &mut [u8]) -> Result<(), snow::Error> {
        self.0.fill_bytes(dest);
        Ok(())
    }
}
