//! The relay: carries sealed packets between devices that can't reach each other, and can't read, forge or replay them.
//!
//! [`core`] decides everything and does no I/O; [`stun`] answers questions about addresses, as bytes. [`server`] is the
//! shell: QUIC, WebSocket, plain UDP and STUN sockets on tokio. [`join`] makes it a program of its own.

pub mod core;
pub mod join;
pub mod metrics;
pub mod observe;
pub mod server;
pub mod stun;
pub mod tls;

mod http;
mod os;
