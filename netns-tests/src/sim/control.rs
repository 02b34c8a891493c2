//! The simulated world's coordinator, and the sessions with it: ordered streams with latency that break when an end goes
//! away.

use std::time::Duration;

use warren_coordinator::domain::{Command, PolicySource, Refusal, Reply};
use warren_coordinator::push::{Config, Coordinator, Origin, Output, SessionId};

use super::model::DeviceNo;
use super::world::{Parcel, RECONNECT_AFTER, STREAM_LATENCY, STREAM_SETUP, World};

impl World {
    /// Carries out an administrator's command.
    ///
    /// # Errors
    /// The coordinator is away, or its refusal.
    pub fn command(&mut self, command: Command) -> Result<Reply, Refusal> {
        let (now, ticket) = (self.now, self.next_ticket);
        self.next_ticket += 1;
        let Some(coordinator) = &mut self.coordinator else {
            return Err(Refusal::Busy("the coordinator is away"));
        };
        coordinator.run(Origin::Ticket(ticket), command, now, &mut self.rng);
        self.drain_coordinator();
        self.replies.remove(&ticket).unwrap_or(Err(Refusal::Busy("no answer")))
    }

    /// Puts a policy in force.
    ///
    /// # Errors
    /// As [`World::command`].
    pub fn set_policy(&mut self, text: String) -> Result<(), Refusal> {
        self.command(Command::SetPolicy { source: PolicySource::Api, text }).map(|_| ())
    }

    /// True if a coordinator runs.
    pub const fn coordinator_up(&self) -> bool {
        self.coordinator.is_some()
    }

    /// Stops the coordinator as `kill -9` does: what was saved remains.
    pub fn stop_coordinator(&mut self) {
        if let Some(coordinator) = self.coordinator.take() {
            self.disk = coordinator.state().clone();
        }
        for (session, no) in std::mem::take(&mut self.sessions) {
            self.session_lost(no, session);
        }
    }

    /// Starts a coordinator from what was saved.
    pub fn start_coordinator(&mut self) {
        let config = Config { netmap_key: self.netmap_key.clone(), lease: Duration::from_secs(24 * 3_600) };
        self.coordinator = Some(Coordinator::new(config, self.disk.clone(), self.now));
        self.drain_coordinator();
    }

    /// The device finds its session dead, and connects again.
    pub(super) fn lose_session(&mut self, no: DeviceNo) {
        self.devices[no].cut = false;
        if let Some(session) = self.devices[no].session {
            self.sessions.remove(&session);
            if let Some(coordinator) = &mut self.coordinator {
                coordinator.disconnect(session, self.now);
            }
            self.devices[no].session_lost();
            self.after(STREAM_SETUP, Parcel::ConnectCoordinator(no));
        }
        self.drain_coordinator();
        self.drain_device(no);
    }

    pub(super) fn connect_coordinator(&mut self, no: DeviceNo) {
        if self.devices[no].session.is_some() || self.devices[no].gone {
            return;
        }
        if self.devices[no].asleep {
            return self.after(RECONNECT_AFTER, Parcel::ConnectCoordinator(no));
        }
        let session = SessionId(self.sequence);
        self.sequence += 1;
        let control = self.devices[no].control_key();
        let connected =
            self.coordinator.as_mut().is_some_and(|c| c.connect(session, control, self.now).is_ok());
        if !connected {
            return self.after(RECONNECT_AFTER, Parcel::ConnectCoordinator(no));
        }
        self.sessions.insert(session, no);
        let hello = self.devices[no].greet(session);
        self.after(STREAM_LATENCY, Parcel::ToCoordinator(session, hello));
    }

    fn session_lost(&mut self, no: DeviceNo, session: SessionId) {
        if self.devices[no].session == Some(session) {
            self.devices[no].session_lost();
            self.after(RECONNECT_AFTER, Parcel::ConnectCoordinator(no));
        }
    }

    pub(super) fn drain_coordinator(&mut self) {
        while let Some(coordinator) = &mut self.coordinator {
            if let Some(command) = coordinator.poll_command() {
                coordinator.submit(Origin::Internal, command, self.now, &mut self.rng);
                coordinator.saved(self.now);
                continue;
            }
            let Some(output) = coordinator.poll_output() else { break };
            match output {
                Output::Send { session, message } => {
                    if let Some(no) = self.sessions.get(&session).copied() {
                        self.after(STREAM_LATENCY, Parcel::ToDevice(no, session, message));
                    }
                }
                Output::RelayRemoved(_) => {}
                Output::Close { session, .. } => {
                    coordinator.disconnect(session, self.now);
                    if let Some(no) = self.sessions.remove(&session) {
                        self.session_lost(no, session);
                    }
                }
                Output::Reply { ticket, result } => {
                    self.replies.insert(ticket, result);
                }
                Output::RelayMinimum { revision, devices, revoked } => {
                    self.raise_minimum(revision, &devices, &revoked);
                }
            }
        }
    }
}
