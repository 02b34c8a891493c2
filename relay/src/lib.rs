//! The relay: carries sealed packets between devices that can't reach each other, and can't read, forge or replay them.
//!
//! [`core`] decides everything and does no I/O; the rest are its shells.
#![forbid(unsafe_code)]

pub mod core;
