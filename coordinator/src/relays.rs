//! Tells relays at once whose access has changed: the embedded one by a call, the others over their sessions.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::mpsc;
use warren_common::ids::{DeviceId, RelayId};
use warren_common::wire::relay_control::RelayCommand;
use warren_relay::server::{RelayServer, ServerStats};

/// Commands that may wait for one relay; beyond this its session ends, and it starts again with a floor.
pub const MAX_COMMANDS: usize = 64;

/// Every relay that must hear of changes.
#[derive(Clone, Debug)]
pub struct Relays {
    embedded: Option<Arc<RelayServer>>,
    joined: Arc<Mutex<Joined>>,
}

#[derive(Debug)]
struct Joined {
    /// The newest command's revision; tokens that a relay must not honour any more are older.
    newest: u64,
    sessions: BTreeMap<RelayId, (u64, mpsc::Sender<RelayCommand>)>,
    next_session: u64,
}

/// A relay's place among those that hear of changes.
#[derive(Debug)]
pub struct Seat {
    /// The commands, in order. It ends when the relay was too slow, is removed, or has a newer session.
    pub commands: mpsc::Receiver<RelayCommand>,
    /// For [`warren_common::wire::relay_control::RelayWelcome::floor`].
    pub floor: u64,
    relay: RelayId,
    session: u64,
    relays: Relays,
}

impl Relays {
    /// The embedded relay, if there is one, and no others yet. `revision` is the coordinator's at its start: whatever was
    /// forbidden before has a lower number.
    pub fn new(embedded: Option<Arc<RelayServer>>, revision: u64) -> Self {
        let joined = Joined { newest: revision, sessions: BTreeMap::new(), next_session: 1 };
        Self { embedded, joined: Arc::new(Mutex::new(joined)) }
    }

    /// Takes a joined relay in, which has obeyed commands up to revision `obeyed`. An older session of it ends.
    pub fn sit(&self, relay: RelayId, obeyed: u64) -> Seat {
        let (sender, commands) = mpsc::channel(MAX_COMMANDS);
        let mut joined = self.joined();
        let session = joined.next_session;
        joined.next_session += 1;
        joined.sessions.insert(relay, (session, sender));
        let floor = if obeyed == joined.newest { 0 } else { joined.newest };
        Seat { commands, floor, relay, session, relays: self.clone() }
    }

    /// Tokens of `devices` count only from `revision` on; `revoked` devices are out. The embedded relay has obeyed when
    /// this returns.
    pub fn restrict(&self, revision: u64, devices: &[DeviceId], revoked: &[DeviceId]) {
        if let Some(relay) = &self.embedded {
            devices.iter().for_each(|device| relay.set_minimum_revision(*device, revision));
            revoked.iter().for_each(|device| relay.revoke(*device, revision));
        }
        let mut joined = self.joined();
        joined.newest = revision;
        let command = RelayCommand::restrict(revision, devices, revoked);
        // A relay that can't take it loses its session, and gets a floor when it comes back.
        joined.sessions.retain(|relay, (_, sender)| {
            let told = sender.try_send(command.clone()).is_ok();
            if !told {
                tracing::warn!(%relay, "a relay is too slow or gone; it must join again");
            }
            told
        });
    }

    /// The relay is no longer one of ours.
    pub fn remove(&self, relay: RelayId) {
        self.joined().sessions.remove(&relay);
    }

    /// What the embedded relay holds and has done.
    pub fn embedded_stats(&self) -> Option<ServerStats> {
        self.embedded.as_ref().map(|relay| relay.stats())
    }

    /// How many relays have a session.
    pub fn joined_count(&self) -> usize {
        self.joined().sessions.len()
    }

    fn joined(&self) -> MutexGuard<'_, Joined> {
        self.joined.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut joined = self.relays.joined();
        if joined.sessions.get(&self.relay).is_some_and(|(session, _)| *session == self.session) {
            joined.sessions.remove(&self.relay);
        }
    }
}

#[cfg(test)]
mod tests {
    use warren_common::wire::relay_control::MAX_COMMAND_DEVICES;

    use super::*;

    fn device(n: u8) -> DeviceId {
        DeviceId::from_bytes([n; 16])
    }

    #[test]
    fn a_relay_that_missed_something_gets_a_floor() {
        let relays = Relays::new(None, 10);
        let id = RelayId::from_bytes([1; 16]);
        let mut seat = relays.sit(id, 0);
        assert_eq!(seat.floor, 10);
        relays.restrict(12, &[device(1)], &[device(2)]);
        let command = seat.commands.try_recv().unwrap();
        assert_eq!((command.revision, command.minimums.len(), command.revoked.len()), (12, 1, 1));
        drop(seat);
        assert_eq!(relays.joined_count(), 0);
        // It was away for a moment and missed nothing, then something.
        assert_eq!(relays.sit(id, 12).floor, 0);
        relays.restrict(14, &[device(1)], &[]);
        assert_eq!(relays.sit(id, 12).floor, 14);
    }

    #[test]
    fn a_newer_session_takes_the_seat_and_the_older_one_leaves_it() {
        let relays = Relays::new(None, 1);
        let id = RelayId::from_bytes([1; 16]);
        let older = relays.sit(id, 0);
        let mut newer = relays.sit(id, 0);
        drop(older);
        relays.restrict(2, &[device(1)], &[]);
        assert_eq!(newer.commands.try_recv().unwrap().revision, 2);
        relays.remove(id);
        assert!(newer.commands.try_recv().is_err() && newer.commands.is_closed());
    }

    #[test]
    fn a_slow_relay_and_a_large_change_are_bounded() {
        let relays = Relays::new(None, 1);
        let seat = relays.sit(RelayId::from_bytes([1; 16]), 0);
        (0..=MAX_COMMANDS as u64).for_each(|n| relays.restrict(n, &[device(1)], &[]));
        assert_eq!(relays.joined_count(), 0);
        drop(seat);
        let many: Vec<DeviceId> = (0..=MAX_COMMAND_DEVICES).map(|_| device(1)).collect();
        let command = RelayCommand::restrict(9, &many, &[]);
        assert_eq!((command.floor, command.minimums.len()), (9, 0));
    }
}
