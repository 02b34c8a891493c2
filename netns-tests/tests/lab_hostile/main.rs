//! Everybody but the coordinator lies, in a lab of real programs: agents that ignore their filter, thieves with copied
//! state directories, machines in the middle, strangers at relays. What honest programs promise must hold all the same.

mod agents;
mod copies;
mod enrolment;
mod logs;
mod middle;
mod proxy;
mod relays;
mod secrets;
mod thief;

use std::time::Duration;

/// Bound for what must happen; only a failing test waits this long.
const LIMIT: Duration = Duration::from_secs(30);
