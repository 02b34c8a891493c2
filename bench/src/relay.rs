//! What the relay's benchmark is made of: servers as processes of their own, devices that speak to ours, a TURN client that
//! speaks to coturn, and one load for all of them.

pub mod alone;
pub mod device;
pub mod hostile;
pub mod idle;
pub mod latency;
pub mod load;
pub mod server;
pub mod storm;
pub mod turn;
