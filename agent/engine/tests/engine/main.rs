//! Engines against each other in virtual time, over a small internet with NATs, a relay and a signal channel.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a failed test panics")]

mod day;
mod jobs;
mod net;
mod offload;
mod paths;
mod policy;
mod storm;
