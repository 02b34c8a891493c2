//! Pure types shared by every part of Warren: ids, keys, addresses, wire messages, netmap, policy, posture.
//!
//! Nothing here does I/O, reads a clock or makes randomness: time and generators come in as arguments.
#![forbid(unsafe_code)]

pub mod auth_key;
pub mod endpoint;
pub mod filter;
pub mod ids;
pub mod keys;
pub mod netmap;
pub mod noise;
pub mod policy;
pub mod time;
pub mod url;
pub mod wire;
