//! The agent: the daemon `warrend`, the command `warren`, and what connects the pure engine to one Linux host.
//!
//! One task owns the engine; everything else talks to it over bounded channels.

pub mod api;
pub mod captive;
pub mod cli;
pub mod clock;
pub mod control;
pub mod crew;
pub mod daemon;
pub mod dataplane;
pub mod egress;
pub mod entropy;
pub mod netcheck;
pub mod os;
pub mod peer_relay;
pub mod policy_cli;
pub mod portmap;
pub mod problem;
pub mod relay_client;
pub mod state;
