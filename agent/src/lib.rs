//! The agent's shells: everything of `warrend` and `warren` that touches the machine.

pub mod policy_cli;
