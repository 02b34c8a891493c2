//! What the benchmarks share: the product's engine on two static devices, without a coordinator.
//!
//! Nothing here is packaged. The devices' keys follow from a seed, so that either side can make both; a policy file
//! is compiled and signed into each one's netmap by the product's own code, and the engine checks it like any other.

pub mod crowd;
pub mod memory;
pub mod pair;
pub mod relay;
