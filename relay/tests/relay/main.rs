//! The relay's shells and the program of its own, over real sockets on loopback. No assertion is about time.
#![cfg(test)]

mod join;
mod server;
mod support;
