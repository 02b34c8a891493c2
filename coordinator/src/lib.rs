//! The coordinator: decides who may reach what and tells every agent, at once.
//!
//! [`domain`] and [`push`] are pure; [`store`], [`server`], [`api`] and [`admin`] do the I/O around them.
#![forbid(unsafe_code)]

pub mod domain;
pub mod push;
