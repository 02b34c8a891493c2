//! The simulator: a virtual internet in virtual time. One thread, one seed, no sleeping.

mod control;
pub mod device;
pub mod flows;
pub mod internet;
pub mod matrix;
pub mod model;
pub mod nat;
pub mod packet;
pub mod relays;
pub mod scenario;
pub mod stun;
mod uplink;
pub mod world;
