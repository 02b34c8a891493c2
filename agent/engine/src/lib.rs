//! All agent logic, sans-I/O: peers, WireGuard, paths, filter, flows, netmap.
//!
//! An [`Engine`](engine::Engine) is a state machine. It has inputs (`handle_*`: a packet from the TUN, a batch of
//! datagrams from a socket, a signed netmap update, a network change, a timer), outputs (`poll_*`) and queries. The
//! shell mutates, drains every output fully, then mutates again; one task owns an engine and nothing in it locks.
//! Time and randomness come in as arguments ([`warren_common::time::Now`], a seed), so that a simulator runs the same
//! code in virtual time.
#![forbid(unsafe_code)]

pub mod engine;
pub mod event;
pub mod filter;
pub mod flow;
pub mod home;
pub mod io;
pub mod matcher;
pub mod netmap;
pub mod offload;
pub mod packet;
pub mod paths;
pub mod queue;
pub mod redial;
pub mod relay_link;
pub mod status;
pub mod stun;
pub mod wg;

mod routes;
