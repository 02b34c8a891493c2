//! The WireGuard transport from outside: two devices in virtual time, stock peers, hostile input.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod hostile;
mod interop;
mod lifecycle;
mod net;
mod soak;
