//! What is kept per connection, and what its agent may say when.

use std::collections::BTreeSet;
use std::time::Duration;

use rand_core::{CryptoRng, RngCore};
use warren_common::auth_key::AuthKey;
use warren_common::filter::RuleId;
use warren_common::ids::{DeviceId, RelayId};
use warren_common::keys::{ControlPublicKey, ProbePublicKey, WgPublicKey};
use warren_common::time::{Instant, Now};
use warren_common::wire::control::{
    ClientBody, Enroll, MAX_RULE_ORIGINS, Pong, RelayTokenGrant, RelayTokenRequest, Report, Resume,
    RuleOrigin, RuleOrigins, RuleOriginsRequest, ServerBody, Signal,
};
use warren_common::wire::relay_control::MAX_ADDRS;
use warren_common::wire::token::{MAX_TOKEN_LIFE_S, MAX_TOKEN_PEERS, RelayToken};

use super::bucket::Bucket;
use super::live::Live;
use super::{CloseReason, Coordinator, Origin, SessionId};
use crate::domain::{Command, EnrollRequest, MAX_ROUTES, Refusal, RelayOffer};

/// How long a session may take from its handshake to `Enroll` or `Resume`.
pub const GREETING_PATIENCE: Duration = Duration::from_secs(10);
/// How long an agent may leave an update unacknowledged before its session is closed: it reconnects and starts afresh.
pub const ACK_PATIENCE: Duration = Duration::from_secs(60);
/// Messages a session may send per second, on average; far above what an agent needs, below what hurts.
pub const MAX_MESSAGES_PER_S: u32 = 50;
/// Signals a session may send per second, on average.
pub const MAX_SIGNALS_PER_S: u32 = 20;
/// Longest signal, in bytes: one probe datagram.
pub const MAX_SIGNAL: usize = 1_200;
/// Snapshots a session may ask for per minute before it is closed.
pub const MAX_SNAPSHOTS_PER_MIN: u32 = 6;

#[derive(Debug)]
pub(super) struct Session {
    pub(super) control: ControlPublicKey,
    pub(super) phase: Phase,
    /// The time under which the session stands in the timers.
    pub(super) armed: Instant,
    messages: Bucket,
    signals: Bucket,
}

#[derive(Debug)]
pub(super) enum Phase {
    /// Handshaken; must say who it is.
    Greeting { until: Instant },
    /// Its `Enroll` or `Resume` is in the batch.
    Deciding { known: Option<Known> },
    /// It belongs to a device.
    Live(Box<Live>),
}

/// The netmap an agent says it holds.
#[derive(Clone, Debug)]
pub(super) struct Known {
    pub(super) epoch: u64,
    pub(super) revision: u64,
    pub(super) hash: Vec<u8>,
}

impl Session {
    pub(super) fn new(control: ControlPublicKey, now: Now) -> Self {
        let until = now.boot + GREETING_PATIENCE;
        Self {
            control,
            phase: Phase::Greeting { until },
            armed: until,
            messages: Bucket::new(Duration::from_secs(1) / MAX_MESSAGES_PER_S, 4 * MAX_MESSAGES_PER_S),
            signals: Bucket::new(Duration::from_secs(1) / MAX_SIGNALS_PER_S, 4 * MAX_SIGNALS_PER_S),
        }
    }

    pub(super) fn live(&self) -> Option<&Live> {
        match &self.phase {
            Phase::Live(live) => Some(live),
            Phase::Greeting { .. } | Phase::Deciding { .. } => None,
        }
    }

    pub(super) fn live_mut(&mut self) -> Option<&mut Live> {
        match &mut self.phase {
            Phase::Live(live) => Some(live),
            Phase::Greeting { .. } | Phase::Deciding { .. } => None,
        }
    }

    /// When it needs attention next.
    pub(super) fn timer(&self) -> Instant {
        match &self.phase {
            Phase::Greeting { until } => *until,
            Phase::Deciding { .. } => Instant::FAR_FUTURE,
            Phase::Live(live) => live.timer(),
        }
    }
}

impl Coordinator {
    /// Takes a message of a session's agent.
    pub fn handle(
        &mut self,
        id: SessionId,
        body: ClientBody,
        now: Now,
        rng: &mut (impl RngCore + CryptoRng),
    ) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        if !session.messages.take(now.boot) {
            return self.close(id, CloseReason::Flood, now);
        }
        let control = session.control;
        match (&mut session.phase, body) {
            (phase @ Phase::Greeting { .. }, ClientBody::Enroll(enroll)) => {
                *phase = Phase::Deciding { known: None };
                self.rearm(id);
                match enroll_request(control, &enroll) {
                    Ok(request) => self.submit(Origin::Session(id), request, now, rng),
                    Err(refusal) => self.refuse(id, &refusal, now),
                }
            }
            (phase @ Phase::Greeting { .. }, ClientBody::Resume(resume)) => {
                let Resume { device, generation, epoch, revision, hash, version } = resume;
                *phase = Phase::Deciding { known: Some(Known { epoch, revision, hash }) };
                self.rearm(id);
                match DeviceId::from_slice(&device) {
                    Some(device) => {
                        let command = Command::Resume { device, control, generation, version };
                        self.submit(Origin::Session(id), command, now, rng);
                    }
                    None => self.refuse(id, &Refusal::UnknownDevice, now),
                }
            }
            (_, ClientBody::Ping(ping)) => {
                let pong = Pong { nonce: ping.nonce, unix_us: now.unix.as_micros() };
                self.send(id, ServerBody::Pong(pong));
            }
            (Phase::Live(live), body) => {
                let device = live.device;
                self.handle_live(id, device, body, now, rng);
            }
            _ => self.close(id, CloseReason::Protocol, now),
        }
    }

    fn handle_live(
        &mut self,
        id: SessionId,
        device: DeviceId,
        body: ClientBody,
        now: Now,
        rng: &mut (impl RngCore + CryptoRng),
    ) {
        match body {
            ClientBody::ConfirmGeneration(confirm) => {
                let command = Command::ConfirmGeneration { device, generation: confirm.generation };
                self.submit(Origin::Session(id), command, now, rng);
            }
            ClientBody::Ack(ack) => self.acknowledged(id, &ack, now),
            ClientBody::Report(report) => {
                if let Some(command) = report_command(device, &report) {
                    self.submit(Origin::Session(id), command, now, rng);
                } else {
                    self.close(id, CloseReason::Protocol, now);
                }
            }
            ClientBody::Signal(signal) => self.forward(id, device, signal, now),
            ClientBody::RelayToken(RelayTokenRequest { relay }) => {
                if let Some(relay) = RelayId::from_slice(&relay) {
                    self.grant_token(id, relay, now);
                }
            }
            ClientBody::RuleOrigins(ask) => self.tell_origins(id, ask),
            ClientBody::FilterReport(report) => self.filter_report(device, report, now),
            ClientBody::Logout(_) => {
                self.submit(Origin::Session(id), Command::RemoveDevice(device), now, rng);
            }
            ClientBody::Enroll(_) | ClientBody::Resume(_) | ClientBody::Ping(_) => {
                self.close(id, CloseReason::Protocol, now);
            }
        }
    }

    /// Passes a sealed probe message on, if the two see each other.
    fn forward(&mut self, id: SessionId, from: DeviceId, signal: Signal, now: Now) {
        let within_rate = self.sessions.get_mut(&id).is_some_and(|s| s.signals.take(now.boot));
        let target = DeviceId::from_slice(&signal.device).filter(|to| {
            let sees = |session: Option<&Session>, other| {
                session.and_then(Session::live).is_some_and(|l| l.sees(other))
            };
            let other = self.by_device.get(to).and_then(|s| self.sessions.get(s));
            sees(self.sessions.get(&id), *to) && sees(other, from)
        });
        match target.and_then(|to| self.by_device.get(&to).copied()) {
            Some(session) if within_rate && signal.sealed.len() <= MAX_SIGNAL => {
                self.stats.signals += 1;
                let signal = Signal { device: from.to_bytes().to_vec(), sealed: signal.sealed };
                self.send(session, ServerBody::Signal(signal));
            }
            _ => self.stats.signals_dropped += 1,
        }
    }

    /// Makes a relay token for the peers of the netmap that was sent; nothing if that names no such relay.
    pub(super) fn grant_token(&mut self, id: SessionId, relay: RelayId, now: Now) {
        let network = self.state.settings().network;
        let revision = self.revision;
        let Some(live) = self.sessions.get_mut(&id).and_then(Session::live_mut) else { return };
        let Some(probe) = self.state.device(live.device).map(|d| d.probe) else { return };
        let Some(peers) = live.token_peers(relay, self.reach.relays()) else { return };
        let life = Duration::from_secs(MAX_TOKEN_LIFE_S.unsigned_abs());
        live.tokens.insert(relay, now.boot + life);
        let token = RelayToken {
            network,
            relay,
            device: live.device,
            probe,
            revision,
            expires: now.unix + life,
            peers: peers.into_iter().take(MAX_TOKEN_PEERS).collect(),
        };
        let grant = RelayTokenGrant {
            relay: relay.to_bytes().to_vec(),
            token: Some(token.sign(&self.config.netmap_key)),
        };
        self.stats.relay_tokens += 1;
        self.send(id, ServerBody::RelayToken(grant));
    }

    /// Answers where rules of the session's netmap stand in the policy now.
    fn tell_origins(&mut self, id: SessionId, ask: RuleOriginsRequest) {
        let Some(live) = self.sessions.get(&id).and_then(Session::live) else { return };
        let asked: BTreeSet<RuleId> = ask.rules.into_iter().take(MAX_RULE_ORIGINS).map(RuleId).collect();
        let rules = asked
            .into_iter()
            .filter(|rule| live.has_rule(*rule))
            .filter_map(|rule| {
                let origin = self.reach.origin_of(rule)?.to_owned();
                Some(RuleOrigin { rule: rule.0, origin })
            })
            .collect();
        self.send(id, ServerBody::RuleOrigins(RuleOrigins { nonce: ask.nonce, rules }));
    }

    pub(super) fn session_timeout(&mut self, id: SessionId, now: Now) {
        match self.sessions.get(&id).map(|s| &s.phase) {
            None => {}
            Some(Phase::Greeting { .. }) => self.close(id, CloseReason::Silent, now),
            Some(Phase::Deciding { .. }) => self.rearm(id),
            Some(Phase::Live(live)) if live.stuck(now.boot) => self.close(id, CloseReason::Stuck, now),
            Some(Phase::Live(_)) => {
                self.renew_lease(id, now);
                self.rearm(id);
            }
        }
    }
}

fn enroll_request(control: ControlPublicKey, enroll: &Enroll) -> Result<Command, Refusal> {
    let auth_key: AuthKey = enroll.auth_key.parse().map_err(|_| Refusal::AuthKeyInvalid)?;
    let key = |what| Refusal::Invalid { what, text: String::new(), why: "expected 32 bytes" };
    Ok(Command::Enroll(Box::new(EnrollRequest {
        control,
        wg: WgPublicKey::from_slice(&enroll.wg).ok_or_else(|| key("WireGuard key"))?,
        probe: ProbePublicKey::from_slice(&enroll.probe).ok_or_else(|| key("probe key"))?,
        auth_key,
        hostname: enroll.hostname.clone(),
        os: enroll.os.clone(),
        version: enroll.version.clone(),
    })))
}

fn report_command(device: DeviceId, report: &Report) -> Option<Command> {
    let home_relay = match report.home_relay.as_slice() {
        [] => None,
        id => Some(RelayId::from_slice(id)?),
    };
    if report.routes.len() > MAX_ROUTES {
        return None;
    }
    let routes = report.routes.iter().map(|r| r.parse().ok()).collect::<Option<_>>()?;
    let relay = match &report.relay {
        None => None,
        Some(offer) if offer.addrs.len() > MAX_ADDRS => return None,
        Some(offer) => Some(RelayOffer {
            addrs: offer.addrs.iter().map(|a| a.parse().ok()).collect::<Option<_>>()?,
            cert_sha256: offer.cert_sha256.as_slice().try_into().ok()?,
        }),
    };
    Some(Command::Report { device, home_relay, routes, relay })
}
