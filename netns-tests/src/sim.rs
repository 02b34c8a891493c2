//! The simulator: a virtual internet in virtual time. One thread, one seed, no sleeping.

pub mod internet;
pub mod nat;
