//! The coordinator: decides who may reach what and tells every agent, at once.
//!
//! [`domain`] and [`push`] are pure and used by the simulator too. [`store`] persists, [`server`] is the one task that
//! owns both, [`policy_source`] feeds it, [`api`] and [`admin`] are its network and local sides,
//! [`serve`] puts everything together.
#![forbid(unsafe_code)]

pub mod admin;
pub mod api;
pub mod cli;
pub mod domain;
pub mod embedded_relay;
pub mod health;
pub mod keys;
pub mod os;
mod parallel;
pub mod policy_source;
pub mod push;
pub mod relays;
pub mod serve;
pub mod server;
pub mod store;
