//! The agent's life: coming up, talking with the coordinator, taking netmaps into force, going down.

use std::time::Duration;

use tokio::sync::mpsc;
use warren_common::ids::DeviceId;
use warren_common::time::Now;
use warren_common::wire::control::{
    Ack, ClientBody, ConfirmGeneration, CoordinatorIdentity, Empty, Enroll, Refused, RefusedCode, Report,
    Resume, ServerBody, Signed, Welcome,
};
use warren_engine::engine::{Config, Engine};
use warren_engine::netmap::{Identity as EngineIdentity, PendingUpdate, RestoreError, UpdateRefused};

use super::keep::Keep;
use super::mapping::Mapping;
use super::relays::Relays;
use super::verdicts::Verdicts;
use super::why::Whys;
use super::{CONTROL_QUEUE, Daemon, Enrolment, RETRY, SAVE_INTERVAL, Saving, Then, Up, bound, seed};
use crate::captive;
use crate::clock;
use crate::control::{ControlClient, ControlConfig, ControlEvent};
use crate::os::HostPlan;
use crate::os::tun::Tun;
use crate::peer_relay::PeerRelay;
use crate::problem::{Problem, Severity, io_text};
use crate::state::{Identity, Membership};

/// Wait before a start that the host refused is tried again: somebody must do something first.
const HOST_RETRY: Duration = Duration::from_secs(30);

/// Whom to join, as whom.
pub(super) struct Join {
    pub(super) control: ControlConfig,
    pub(super) identity: Option<Identity>,
    pub(super) membership: Option<Membership>,
    pub(super) enrolment: Option<Enrolment>,
}

impl Daemon {
    /// Comes up as the device that is on disk.
    pub(super) async fn rejoin(&mut self) -> Result<(), Problem> {
        let Some(network) = self.settings.network else { return Ok(()) };
        let dir = self.state.network(network)?;
        let (Some(identity), Some(membership)) = (dir.identity()?, dir.membership()?) else {
            return Err(Problem::new(
                "state-incomplete",
                format!("the state of network {network} lacks its identity or device file"),
                "put the files back from a backup, or run `warren logout` and join again with a new auth key",
            ));
        };
        let control = ControlConfig {
            url: identity.url.parse()?,
            network,
            root: identity.root,
            min_epoch: identity.epoch,
            secret: dir.keys()?.control,
            egress: self.options.egress.clone(),
        };
        let join = Join { control, identity: Some(identity), membership: Some(membership), enrolment: None };
        self.start(clock::now(), join).await
    }

    /// Starts connecting, and puts what is saved in force at once.
    pub(super) async fn start(&mut self, now: Now, join: Join) -> Result<(), Problem> {
        let dir = self.state.network(join.control.network)?;
        let keys = dir.keys()?;
        self.problem = None;
        self.needs_login = false;
        self.retry_at = None;
        let (sender, events) = mpsc::channel(CONTROL_QUEUE);
        let control = ControlClient::spawn(join.control.clone(), sender);
        let keep = Keep::new(dir.resume());
        let peer_relay = self.options.relay.clone();
        let peer_relay = peer_relay.map(|o| PeerRelay::new(o, dir.path(), join.control.network));
        self.up = Some(Box::new(Up {
            dir,
            config: join.control,
            identity: join.identity,
            keys,
            membership: join.membership,
            enrolment: join.enrolment,
            control,
            events,
            relays: Relays::default(),
            mapping: Mapping::default(),
            keep,
            reconnect_at: None,
            away: None,
            portal: captive::Watch::default(),
            welcomed: false,
            skew_us: 0,
            engine: None,
            mtu: 0,
            tun: None,
            plan: None,
            no_ipv6: false,
            saving: None,
            stalled: None,
            missed_update: false,
            save_problem: None,
            next_save: now.boot + SAVE_INTERVAL,
            since: now.boot,
            waiters: Vec::new(),
            pings: Vec::new(),
            whys: Whys::default(),
            verdicts: Verdicts::default(),
            peer_relay,
        }));
        if let Some(up) = &mut self.up {
            up.follow_addresses(self.surroundings.addrs());
        }
        self.make_engine(now).await?;
        if let Err(problem) = self.configure_host().await {
            self.come_down_later(now, problem).await;
        }
        Ok(())
    }

    /// Makes the engine of an enrolled device, with the netmap from before a restart.
    async fn make_engine(&mut self, now: Now) -> Result<(), Problem> {
        let mtu = self.host.tunnel_mtu(&self.options.tun).await?;
        let Some(up) = &mut self.up else { return Ok(()) };
        let (Some(identity), Some(membership)) = (&up.identity, up.membership) else { return Ok(()) };
        up.mtu = u16::try_from(mtu).unwrap_or(u16::MAX);
        let mut engine = Engine::new(Config {
            identity: EngineIdentity {
                network: up.config.network,
                device: membership.device,
                control: up.keys.control.public(),
                netmap_key: identity.netmap,
                epoch: identity.epoch,
            },
            wg: up.keys.wg.clone(),
            probe: up.keys.probe.clone(),
            seed: seed(),
            boot_id: boot_id_bytes(&self.boot_id),
            mtu: up.mtu,
            handshake_floor: up.dir.handshake_floor()?,
        });
        if let Some(saved) = up.dir.netmap()? {
            engine.restore(now, &saved).map_err(|e| unusable_netmap(&up.dir.netmap_path(), &e))?;
        }
        engine.handle_interfaces(now, &self.surroundings.sockets(&bound(self.plane.sockets())));
        engine.handle_static_endpoints(now, &self.options.endpoints);
        match &up.engine {
            Some(old) => engine.resume(now, &old.path_hints()),
            None => engine.resume(now, up.keep.paths(now.unix)),
        }
        up.relays.connected().for_each(|id| engine.handle_relay_state(now, id, true));
        up.engine = Some(engine);
        up.tell_mapping(now);
        self.follow_gateway(now);
        Ok(())
    }

    /// Makes the host look as the netmap says, if it doesn't yet.
    async fn configure_host(&mut self) -> Result<(), Problem> {
        let Some(up) = &mut self.up else { return Ok(()) };
        let Some(netmap) = up.engine.as_ref().and_then(Engine::netmap) else { return Ok(()) };
        let plan = HostPlan {
            tun: self.options.tun.clone(),
            addrs: netmap.device.addrs.clone(),
            pools: vec![netmap.network.ipv4.into(), netmap.network.ipv6.into()],
            mtu: up.mtu.into(),
        };
        if up.plan.as_ref() == Some(&plan) {
            return Ok(());
        }
        self.host.check_collision(&plan).await?;
        if up.tun.is_none() {
            let tun = Tun::open(&plan.tun, self.options.offloads)?;
            self.plane.attach(&tun);
            up.tun = Some(tun);
        }
        up.no_ipv6 = !self.host.apply(&plan, &self.state).await?.ipv6;
        tracing::info!(tun = %plan.tun, mtu = plan.mtu, "the overlay is up");
        let missing = self.plane.offloads(up.tun.as_ref()).named().into_iter().filter(|(_, on)| !on);
        let missing: Vec<&str> = missing.map(|(name, _)| name).collect();
        if !missing.is_empty() {
            tracing::warn!("slower than could be, offloads are missing: {}", missing.join(", "));
        }
        up.plan = Some(plan);
        Ok(())
    }

    pub(super) async fn on_control(&mut self, now: Now, event: Option<ControlEvent>) {
        let Some(up) = &mut self.up else { return };
        match event {
            None => {} // the client ends only when it is dropped
            Some(ControlEvent::Connected(identity)) => {
                if let Err(problem) = self.on_connected(now, &identity).await {
                    self.on_save_failed(now, problem);
                }
            }
            Some(ControlEvent::Away { problem, permanent }) => {
                // What a proxy is called, and who we are to it, is not for every log.
                if problem.code.starts_with("proxy-") {
                    tracing::info!(code = %problem.code, "no control session");
                    tracing::debug!("{}", problem.text);
                } else {
                    tracing::info!(code = %problem.code, "no control session: {}", problem.text);
                }
                up.not_welcome(now);
                up.away = Some(problem.clone());
                up.portal.look(&up.config.url, &up.config.egress);
                if permanent {
                    up.fail_waiters(&problem);
                    if up.membership.is_none() {
                        self.give_up(problem).await;
                    }
                }
            }
            Some(ControlEvent::Message(body)) => self.on_message(now, body).await,
        }
    }

    /// The session stands: pin what the coordinator showed, say who we are.
    async fn on_connected(&mut self, now: Now, shown: &CoordinatorIdentity) -> Result<(), Problem> {
        let Some(up) = &mut self.up else { return Ok(()) };
        let identity = Identity {
            url: up.config.url.to_string(),
            root: up.config.root,
            network_name: shown.network_name.clone(),
            control: shown.control,
            netmap: shown.netmap,
            epoch: shown.epoch,
        };
        let new_signer = up.identity.as_ref().is_some_and(|old| old.netmap != identity.netmap);
        if up.identity.as_ref() != Some(&identity) {
            up.dir.save_identity(&identity)?;
            up.config.min_epoch = identity.epoch;
            if let Some(engine) = &mut up.engine {
                engine.trust_epoch(identity.epoch);
            }
            up.identity = Some(identity);
        }
        if new_signer && let Some(engine) = &up.engine {
            // The root key vouches for another signer of netmaps: what is held stays, what comes must be by it.
            if let Some(saved) = engine.to_saved(now) {
                up.dir.save_netmap(&saved)?;
            }
            self.make_engine(now).await?;
        }
        let Some(up) = &mut self.up else { return Ok(()) };
        let hello = match (&up.membership, &up.enrolment) {
            (Some(member), _) => {
                let (epoch, revision, hash) = up.engine.as_ref().and_then(Engine::held).unwrap_or_default();
                ClientBody::Resume(Resume {
                    device: member.device.to_bytes().to_vec(),
                    generation: member.generation,
                    epoch,
                    revision,
                    hash: if revision == 0 { Vec::new() } else { hash.to_vec() },
                    version: env!("CARGO_PKG_VERSION").to_owned(),
                })
            }
            (None, Some(enrolment)) => ClientBody::Enroll(Enroll {
                auth_key: enrolment.auth_key.to_string(),
                hostname: enrolment.hostname.clone(),
                wg: up.keys.wg.public().as_bytes().to_vec(),
                probe: up.keys.probe.public().as_bytes().to_vec(),
                os: std::env::consts::OS.to_owned(),
                version: env!("CARGO_PKG_VERSION").to_owned(),
            }),
            (None, None) => return Ok(()), // `start` is given one of the two
        };
        up.control.send(hello);
        Ok(())
    }

    async fn on_message(&mut self, now: Now, body: ServerBody) {
        let Some(up) = &mut self.up else { return };
        match body {
            ServerBody::Welcome(welcome) => self.on_welcome(now, &welcome).await,
            ServerBody::Refused(refused) => self.on_refused(refused).await,
            ServerBody::Update(signed) => up.on_update(now, &signed),
            ServerBody::Signal(mut signal) => self.on_signal(now, &mut signal),
            ServerBody::Pong(pong) => up.skew_us = now.unix.as_micros().saturating_sub(pong.unix_us),
            ServerBody::Presence(presence) => {
                let ids = |list: &[Vec<u8>]| -> Vec<DeviceId> {
                    list.iter().filter_map(|id| DeviceId::from_slice(id)).collect()
                };
                if let Some(engine) = &mut up.engine {
                    engine.handle_presence(&ids(&presence.online), &ids(&presence.offline));
                }
            }
            ServerBody::RelayToken(grant) => up.on_relay_token(now, grant),
            ServerBody::RuleOrigins(answer) => up.whys.settle(answer),
            ServerBody::RelayDuty(duty) => up.on_relay_duty(&duty),
            ServerBody::RelayCommand(command) => up.on_relay_command(&command),
        }
    }

    async fn on_welcome(&mut self, now: Now, welcome: &Welcome) {
        let Some(up) = &mut self.up else { return };
        up.skew_us = now.unix.as_micros().saturating_sub(welcome.unix_us);
        up.verdicts.rules_changed(now.boot);
        let device = DeviceId::from_slice(&welcome.device);
        let Some(device) = device.filter(|id| up.membership.is_none_or(|m| m.device == *id)) else {
            let problem = Problem::new(
                "wrong-device",
                "the coordinator takes this device for another one",
                "run `warren logout` and join again with a new auth key",
            );
            return self.require_login(problem).await;
        };
        let membership = Membership { device, generation: welcome.generation };
        let dir = up.dir.clone();
        // The generation is on disk before it is used: a copy of the state directory can then be told apart.
        let task = tokio::task::spawn_blocking(move || dir.save_membership(&membership));
        up.saving = Some(Saving { task, then: Then::Confirm(membership) });
    }

    async fn on_refused(&mut self, refused: Refused) {
        let Some(up) = &mut self.up else { return };
        let problem = Problem::new(refused.code.clone(), refused.text, refused.fix);
        tracing::warn!(code = %problem.code, "the coordinator refuses: {}", problem.text);
        up.away = Some(problem.clone());
        match RefusedCode::parse(&refused.code) {
            RefusedCode::AuthKeyInvalid | RefusedCode::AuthKeyUsed | RefusedCode::AuthKeyExpired => {
                self.give_up(problem).await;
            }
            RefusedCode::UnknownDevice | RefusedCode::NeedsLogin | RefusedCode::CopiedState => {
                self.require_login(problem).await;
            }
            RefusedCode::Version => up.fail_waiters(&problem),
            // Another try may do; the client's back-off sees to it.
            RefusedCode::StoreUnavailable | RefusedCode::Busy | RefusedCode::Other => {}
        }
    }

    pub(super) async fn on_saved(&mut self, now: Now, result: Result<(), Problem>) {
        let Some(up) = &mut self.up else { return };
        let Some(Saving { then, .. }) = up.saving.take() else { return };
        match (then, result) {
            (Then::Apply { update, want_snapshot }, Ok(())) => {
                up.save_problem = None;
                if let Some(engine) = &mut up.engine {
                    let peers = |e: &Engine| e.netmap().map(|m| m.peers.keys().copied().collect::<Vec<_>>());
                    let before = peers(engine);
                    engine.apply_update(now, *update);
                    let changed = before != peers(engine);
                    up.follow_netmap(now, changed);
                    up.verdicts.rules_changed(now.boot);
                }
                let missed = std::mem::take(&mut up.missed_update).then(|| "an update went by".to_owned());
                up.acknowledge(want_snapshot.or(missed));
                if let Err(problem) = self.configure_host().await {
                    self.come_down_later(now, problem).await;
                }
            }
            (Then::Apply { update, want_snapshot }, Err(problem)) => {
                tracing::warn!(
                    "a netmap can't be saved: only what it takes away is applied: {}",
                    problem.text
                );
                up.missed_update |= want_snapshot.is_some();
                up.stalled = Some((*update, now.boot + RETRY));
                up.save_problem = Some(problem);
            }
            (Then::Confirm(membership), Ok(())) => {
                if let Err(problem) = self.on_confirmed(now, membership).await {
                    self.on_save_failed(now, problem);
                }
            }
            (Then::Confirm(_), Err(problem)) => self.on_save_failed(now, problem),
            (Then::Nothing, Ok(())) => up.save_problem = None,
            (Then::Nothing, Err(problem)) => up.save_problem = Some(problem),
        }
    }

    async fn on_confirmed(&mut self, now: Now, membership: Membership) -> Result<(), Problem> {
        let Some(up) = &mut self.up else { return Ok(()) };
        let first = up.membership.is_none();
        up.membership = Some(membership);
        if first {
            self.settings.network = Some(up.config.network);
            self.settings.want_up = true;
            self.state.save_settings(&self.settings)?;
            up.enrolment = None;
            self.make_engine(now).await?;
        }
        let Some(up) = &mut self.up else { return Ok(()) };
        up.save_problem = None;
        up.away = None;
        up.portal.clear();
        up.welcomed = true;
        up.control
            .send(ClientBody::ConfirmGeneration(ConfirmGeneration { generation: membership.generation }));
        up.report();
        up.look_after_relays();
        if let Some(engine) = &mut up.engine {
            engine.handle_control_state(now, true);
        }
        Ok(())
    }

    /// Something that must be on disk before the session can go on is not: begin again a little later.
    fn on_save_failed(&mut self, now: Now, problem: Problem) {
        let Some(up) = &mut self.up else { return };
        tracing::warn!("{}", problem.text);
        up.save_problem = Some(problem);
        up.not_welcome(now);
        up.reconnect_at = Some(now.boot + RETRY);
    }

    /// An enrolment ends without a device: callers hear why, nothing stays up.
    async fn give_up(&mut self, problem: Problem) {
        if self.up.as_ref().is_some_and(|up| up.membership.is_some()) {
            return;
        }
        self.end(&problem).await;
        self.needs_login = true;
        self.problem = Some((problem, Severity::Error));
    }

    /// This device must be enrolled again: nothing of the old enrolment goes on.
    async fn require_login(&mut self, problem: Problem) {
        self.end(&problem).await;
        self.needs_login = true;
        self.problem = Some((problem, Severity::Error));
    }

    /// The host is not fit for the overlay: down, and try again in a while.
    pub(super) async fn come_down_later(&mut self, now: Now, problem: Problem) {
        tracing::error!("{problem}");
        let asked = self.up.as_ref().is_some_and(|up| !up.waiters.is_empty());
        self.end(&problem).await;
        if asked {
            // Whoever ran `up` has its answer; nothing happens behind their back.
            self.settings.want_up = false;
            if let Err(problem) = self.state.save_settings(&self.settings) {
                tracing::warn!("{}", problem.text);
            }
        } else {
            self.retry_at = Some(now.boot + HOST_RETRY);
        }
        self.problem = Some((problem, Severity::Error));
    }

    async fn end(&mut self, problem: &Problem) {
        if let Some(up) = &mut self.up {
            up.fail_waiters(problem);
        }
        if let Err(problem) = self.come_down().await {
            tracing::error!("{problem}");
        }
    }

    pub(super) async fn on_tun_lost(&mut self, now: Now, error: &std::io::Error) {
        let problem = Problem::new(
            "tun-gone",
            format!("the TUN device `{}` is gone: {}", self.options.tun, io_text(error)),
            "something removed it or switched it off; the agent makes it again in half a minute, or at once with `warren down` and `warren up`",
        );
        self.come_down_later(now, problem).await;
    }

    /// Ends the session, saves what must be, puts the host back.
    pub(super) async fn come_down(&mut self) -> Result<(), Problem> {
        if let Some(mut up) = self.up.take() {
            if let Some(saving) = up.saving.take() {
                // Whatever it was, it is repeated next time if it failed.
                let _ = saving.task.await;
            }
            up.keep.settle().await;
            if let Some(Err(problem)) = up.saved_state(clock::now()).map(|save| save()) {
                tracing::warn!("{}", problem.text);
            }
            up.fail_waiters(&Problem::new(
                "going-down",
                "the agent is going down",
                "run `warren up` again when it is down",
            ));
            drop(up.tun.take());
            self.plane.set_extra(&[]);
            let farewell = super::peer_relay::farewell(up.peer_relay.take());
            let (welcomed, mapping) = (up.welcomed, std::mem::take(&mut up.mapping));
            let goodbye = async {
                if welcomed {
                    up.control.close().await;
                }
            };
            tokio::join!(mapping.close(), goodbye, farewell);
        }
        self.host.restore(&self.state).await
    }
}

impl Up {
    fn on_update(&mut self, now: Now, signed: &Signed) {
        let Some(engine) = &mut self.engine else { return };
        match engine.check_update(now, signed) {
            Ok(update) => {
                engine.restrict(now, &update);
                match &mut self.stalled {
                    // Newer than the one that waits for the disk: a snapshot, then, which needs nothing of that.
                    Some((stalled, _)) => *stalled = update,
                    None => self.save_update(update, None),
                }
            }
            Err(UpdateRefused::HashMismatch { restriction: Some(restriction) }) => {
                tracing::warn!("an update does not add up: only what it takes away is applied");
                engine.restrict(now, &restriction);
                let why = "the hash differs".to_owned();
                match self.stalled {
                    Some(_) => self.send_ack(true, why),
                    None => self.save_update(*restriction, Some(why)),
                }
            }
            Err(refused) => {
                tracing::warn!("a netmap update is refused: {refused}");
                let want_snapshot = refused.wants_snapshot();
                self.send_ack(want_snapshot, refused.to_string());
            }
        }
    }

    fn save_update(&mut self, update: PendingUpdate, want_snapshot: Option<String>) {
        let (dir, saved) = (self.dir.clone(), update.to_saved());
        let task = tokio::task::spawn_blocking(move || dir.save_netmap(&saved));
        self.saving = Some(Saving { task, then: Then::Apply { update: Box::new(update), want_snapshot } });
    }

    /// Tries once more to save an update.
    pub(super) fn retry_stalled(&mut self, now: Now) {
        if self.saving.is_none()
            && self.stalled.as_ref().is_some_and(|(_, at)| *at <= now.boot)
            && let Some((update, _)) = self.stalled.take()
        {
            self.save_update(update, None);
        }
    }

    /// Opens a new control session in place of one that could not go on.
    pub(super) fn reconnect_if_due(&mut self, now: Now) {
        if self.reconnect_at.is_some_and(|at| at <= now.boot) {
            self.reconnect(now);
        }
    }

    /// Nothing is said to the coordinator until it has welcomed us anew.
    fn not_welcome(&mut self, now: Now) {
        self.welcomed = false;
        if let Some(engine) = &mut self.engine {
            engine.handle_control_state(now, false);
        }
    }

    pub(super) fn reconnect(&mut self, now: Now) {
        self.reconnect_at = None;
        self.not_welcome(now);
        let (sender, events) = mpsc::channel(CONTROL_QUEUE);
        self.control = ControlClient::spawn(self.config.clone(), sender);
        self.events = events;
    }

    fn acknowledge(&mut self, want_snapshot: Option<String>) {
        self.send_ack(want_snapshot.is_some(), want_snapshot.unwrap_or_default());
    }

    fn send_ack(&self, want_snapshot: bool, reason: String) {
        let (epoch, revision, _) = self.engine.as_ref().and_then(Engine::held).unwrap_or_default();
        // If there is no room the session is stuck and will end; the next one begins with what is held.
        self.control.send(ClientBody::Ack(Ack { epoch, revision, want_snapshot, reason }));
    }

    pub(super) fn report(&self) {
        self.control.send(ClientBody::Report(Report {
            home_relay: self.relays.home().map_or_else(Vec::new, |id| id.to_bytes().to_vec()),
            hostname: super::verbs::host_name(),
            routes: Vec::new(),
            relay: self.peer_relay.as_ref().and_then(PeerRelay::offer),
        }));
    }

    pub(super) fn say_goodbye(&self) -> bool {
        self.welcomed && self.control.send(ClientBody::Logout(Empty {}))
    }

    /// What to save now and then, as work for another thread.
    fn saved_state(&self, now: Now) -> Option<impl FnOnce() -> Result<(), Problem> + Send + use<>> {
        let engine = self.engine.as_ref()?;
        // What is held is older than a stalled update, which is then saved in its place.
        let saved = engine.to_saved(now);
        let (dir, floor, resume) = (self.dir.clone(), engine.handshake_floor(), self.resume(now));
        Some(move || {
            if let Some(saved) = &saved {
                dir.save_netmap(saved)?;
            }
            dir.save_handshake_floor(floor)?;
            dir.save_resume(&resume)
        })
    }

    pub(super) fn save_periodically(&mut self, now: Now) {
        if let Some(save) = self.saved_state(now) {
            self.saving = Some(Saving { task: tokio::task::spawn_blocking(save), then: Then::Nothing });
        }
    }
}

fn boot_id_bytes(text: &str) -> [u8; 16] {
    let hex: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    let bytes = data_encoding::HEXLOWER_PERMISSIVE.decode(hex.as_bytes()).unwrap_or_default();
    bytes.try_into().unwrap_or_default()
}

fn unusable_netmap(path: &std::path::Path, error: &RestoreError) -> Problem {
    Problem::new(
        "state-damaged",
        format!("the saved netmap `{}` can't be used: {error}", path.display()),
        "put it back from a backup, or move it away: the coordinator then sends a new one (nothing was overwritten)",
    )
}
