//! The daemon: one task that owns the engine and everything it is fed from. Nothing in it locks.
//!
//! Each turn waits for one thing (a readable TUN or socket, a control or relay event, a local call, a network change,
//! a timer, a finished save), feeds it to the engine in bounded batches and drains the engine's outputs. A netmap update
//! is checked, saved on a helper thread and only then applied, except that what it takes away ends at once; meanwhile
//! packets flow and control events wait.

mod check;
mod endpoints;
mod keep;
mod mapping;
mod packets;
mod peer_relay;
mod relays;
mod session;
mod status;
mod verbs;
mod verdicts;
mod why;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rand_core::RngCore as _;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, oneshot};
use tokio::task::{JoinHandle, JoinSet};
use warren_common::time::{Instant, Now};
use warren_engine::engine::Engine;
use warren_engine::event::PingToken;
use warren_engine::netmap::PendingUpdate;

use crate::api::{Call, Reply, Server};
use crate::captive;
use crate::clock::{self, BootTimer, MAX_SLEEP};
use crate::control::{ControlClient, ControlConfig, ControlEvent};
use crate::dataplane::{DataPlane, Ready};
use crate::egress::Egress;
use crate::entropy::OsEntropy;
use crate::os::journal::Journal;
use crate::os::tun::{self, Tun};
use crate::os::udp::{self, Udp};
use crate::os::{Host, HostPlan, NetworkChanges, Offloads, Surroundings};
use crate::peer_relay::{PeerRelay, PeerRelayOptions};
use crate::portmap;
use crate::problem::{Problem, Severity};
use crate::relay_client::RelayEvent;
use crate::state::{DeviceKeys, Identity, Membership, NetworkDir, Settings, StateDir};
use check::Checked;
use keep::Keep;
use mapping::Mapping;
use relays::Relays;
use verdicts::Verdicts;
use why::Whys;

/// The TUN's name unless told otherwise.
pub const DEFAULT_TUN: &str = "warren0";
/// How often the lease and the handshake clock are saved, so that a crash forgets no more than this.
const SAVE_INTERVAL: Duration = Duration::from_secs(120);
/// Wait before a failed save or a failed start is tried again.
const RETRY: Duration = Duration::from_secs(5);
/// Control events that wait for the daemon; behind them the session's TCP window fills.
const CONTROL_QUEUE: usize = 32;

/// How the daemon is started.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where its state is.
    pub state_dir: PathBuf,
    /// Where it listens for `warren`.
    pub socket: PathBuf,
    /// The TUN's name.
    pub tun: String,
    /// The UDP port; any if absent.
    pub listen_port: Option<u16>,
    /// User id that may change the agent's state beside root.
    pub operator: Option<u32>,
    /// What of the kernel's help for many packets at a time to use where there is any.
    pub offloads: Offloads,
    /// Asks the gateway to forward a port.
    pub port_mapping: bool,
    /// Where this host is reached from outside, as somebody says who knows the network.
    pub endpoints: Vec<SocketAddr>,
    /// The way out for TCP.
    pub egress: Arc<Egress>,
    /// Relays for others, where policy lets it.
    pub relay: Option<PeerRelayOptions>,
}

/// Runs until SIGTERM, SIGINT or SIGHUP, then puts the host back.
///
/// # Errors
/// Why the daemon can't start, or can't put the host back.
pub async fn run(options: Options) -> Result<(), Problem> {
    tun::check_name(&options.tun)?;
    endpoints::check(&options.endpoints)?;
    crate::os::check_privilege()?;
    let state = StateDir::open(&options.state_dir)?;
    let settings = state.settings()?;
    Journal::load(&state)?; // without it nothing can be put back
    let sockets = udp::bind(options.listen_port, settings.port, options.offloads)?;
    let (server, calls) = Server::listen(&options.socket, options.operator)?;
    let host = Host::open()?;
    let mut daemon = Daemon::new(options, state, settings, sockets, host)?;
    daemon.begin().await?;
    let result = daemon.serve(calls).await;
    drop(server);
    daemon.stop().await?;
    result
}

/// Everything the one task owns.
struct Daemon {
    options: Options,
    boot_id: String,
    state: Arc<StateDir>,
    settings: Settings,
    host: Host,
    changes: NetworkChanges,
    surroundings: Surroundings,
    plane: DataPlane,
    timer: BootTimer,
    up: Option<Box<Up>>,
    /// Why the agent is not up although it should be, or must sign in again.
    problem: Option<(Problem, Severity)>,
    /// When to try coming up once more.
    retry_at: Option<Instant>,
    needs_login: bool,
    /// Looks at coordinators that callers have no auth key for; each ends within [`crate::control::CONNECT_TIMEOUT`].
    looks: JoinSet<()>,
    checks: JoinSet<Checked>,
}

/// What exists while the agent is up.
struct Up {
    dir: NetworkDir,
    config: ControlConfig,
    /// What the coordinator has shown; absent before the first contact.
    identity: Option<Identity>,
    keys: DeviceKeys,
    membership: Option<Membership>,
    enrolment: Option<Enrolment>,
    control: ControlClient,
    events: mpsc::Receiver<ControlEvent>,
    relays: Relays,
    mapping: Mapping,
    keep: Keep,
    /// When to begin a new session in place of one that could not go on.
    reconnect_at: Option<Instant>,
    /// Why there is no session; absent while one stands or the first attempt is under way.
    away: Option<Problem>,
    portal: captive::Watch,
    /// The coordinator has welcomed us in this session.
    welcomed: bool,
    /// Our clock less the coordinator's, in microseconds.
    skew_us: i64,
    engine: Option<Engine>,
    mtu: u16,
    tun: Option<Tun>,
    plan: Option<HostPlan>,
    /// This host has no IPv6.
    no_ipv6: bool,
    saving: Option<Saving>,
    /// An accepted update that could not be saved, and when to try again.
    stalled: Option<(PendingUpdate, Instant)>,
    /// A stalled update did not add up: ask for a snapshot once it is through.
    missed_update: bool,
    save_problem: Option<Problem>,
    next_save: Instant,
    since: Instant,
    waiters: Vec<Waiter>,
    /// Pings of local callers, of whom there are [`crate::api::MAX_CONNECTIONS`] at most.
    pings: Vec<(PingToken, oneshot::Sender<Reply>)>,
    whys: Whys,
    verdicts: Verdicts,
    peer_relay: Option<PeerRelay>,
}

/// What a device shows to be let in.
struct Enrolment {
    auth_key: zeroize::Zeroizing<String>,
    hostname: String,
}

/// A save on a helper thread, and what follows it.
struct Saving {
    task: JoinHandle<Result<(), Problem>>,
    then: Then,
}

enum Then {
    Apply { update: Box<PendingUpdate>, want_snapshot: Option<String> },
    Confirm(Membership),
    Nothing,
}

/// A caller of `up` that waits until the agent is connected.
struct Waiter {
    reply: oneshot::Sender<Reply>,
    deadline: Instant,
}

/// What a turn of the loop begins with.
enum Wake {
    Packets(Ready),
    Control(Option<ControlEvent>),
    Relay(RelayEvent),
    Call(Option<Call>),
    Network,
    Timer,
    Saved(Result<(), Problem>),
    Checked(Box<Checked>),
    Mapping(portmap::State),
    PeerRelay { offer_changed: bool },
    Stop,
}

impl Daemon {
    fn new(
        options: Options,
        state: StateDir,
        mut settings: Settings,
        sockets: Vec<Udp>,
        host: Host,
    ) -> Result<Self, Problem> {
        let port = sockets.first().map(|s| s.bound().port());
        if settings.port != port {
            settings.port = port;
            state.save_settings(&settings)?;
        }
        let no_timer = |e: std::io::Error| {
            Problem::new("timer", format!("no timer: {e}"), "raise the limit of open files (ulimit -n)")
        };
        let no_boot_id = |_| {
            Problem::new(
                "boot-id",
                "the kernel's boot id can't be read",
                "mount /proc; leases are counted per boot",
            )
        };
        Ok(Self {
            boot_id: clock::boot_id().map_err(no_boot_id)?,
            changes: host.watch()?,
            timer: BootTimer::new().map_err(no_timer)?,
            options,
            state: Arc::new(state),
            settings,
            host,
            surroundings: Surroundings::default(),
            plane: DataPlane::new(sockets),
            up: None,
            problem: None,
            retry_at: None,
            needs_login: false,
            looks: JoinSet::new(),
            checks: JoinSet::new(),
        })
    }

    /// Comes up if that is wanted; otherwise removes what a killed run left on the host.
    async fn begin(&mut self) -> Result<(), Problem> {
        self.surroundings = self.host.surroundings(&self.options.tun).await?;
        if self.settings.want_up && self.settings.network.is_some() {
            // What is left of a killed run keeps guarding until it is taken over.
            return self.rejoin().await;
        }
        self.host.restore(&self.state).await
    }

    async fn serve(&mut self, mut calls: mpsc::Receiver<Call>) -> Result<(), Problem> {
        let mut stop = StopSignals::new()?;
        loop {
            let now = clock::now();
            let deadline = self.deadline(now);
            if let Err(e) = self.timer.set(deadline) {
                tracing::warn!("the timer can't be set: {e}");
            }
            let wake = self.next(&mut calls, &mut stop).await;
            let now = clock::now();
            // The engine's own next timer may be hours away, ours is not.
            if let Some(engine) = self.up.as_mut().and_then(|up| up.engine.as_mut()) {
                engine.handle_wake(now, deadline);
            }
            match wake {
                Wake::Stop | Wake::Call(None) => return Ok(()),
                Wake::Packets(Ready::Tun) => self.on_tun(now).await,
                Wake::Packets(Ready::Udp(index)) => self.on_udp(now, index),
                Wake::Control(event) => self.on_control(now, event).await,
                Wake::Relay(event) => self.on_relay(now, event),
                Wake::Call(Some(call)) => self.on_call(now, call).await,
                Wake::Network => self.on_network(now).await,
                Wake::Saved(result) => self.on_saved(now, result).await,
                Wake::Timer => self.on_timer(now).await,
                Wake::Checked(checked) => self.on_checked(now, *checked),
                Wake::Mapping(state) => self.on_mapping(now, state),
                Wake::PeerRelay { offer_changed } => {
                    if let Some(up) = &mut self.up {
                        up.on_peer_relay(offer_changed);
                    }
                }
            }
            self.drain(clock::now());
            if self.plane.has_more() {
                // The runtime looks at timers, signals and other tasks' sockets only while this one waits.
                tokio::task::yield_now().await;
            }
        }
    }

    /// Waits for the next thing to do. Cancel safe.
    async fn next(&mut self, calls: &mut mpsc::Receiver<Call>, stop: &mut StopSignals) -> Wake {
        let Self { up, plane, changes, timer, checks, .. } = self;
        let (tun, events, relays, mapping, peer_relay, saving) = match up.as_deref_mut() {
            Some(up) => {
                let Up { tun, events, relays, mapping, peer_relay, saving, .. } = up;
                (
                    tun.as_ref(),
                    Some(events),
                    Some(relays),
                    Some(mapping),
                    peer_relay.as_mut(),
                    saving.as_mut(),
                )
            }
            None => (None, None, None, None, None, None),
        };
        let is_saving = saving.is_some();
        let control = async {
            match events {
                // Updates are made on top of each other: the next one waits until this one is in force.
                Some(events) if !is_saving => events.recv().await,
                _ => std::future::pending().await,
            }
        };
        let relay = async {
            match relays {
                Some(relays) => relays.next().await,
                None => std::future::pending().await,
            }
        };
        let mapped = async {
            match mapping {
                Some(mapping) => mapping.changed().await,
                None => std::future::pending().await,
            }
        };
        let relaying = async {
            match peer_relay {
                Some(peer_relay) => peer_relay.changed().await,
                None => std::future::pending().await,
            }
        };
        let saved = async {
            match saving {
                Some(saving) => (&mut saving.task).await,
                None => std::future::pending().await,
            }
        };
        let checked = async {
            match checks.join_next().await {
                Some(Ok(checked)) => checked,
                _ => std::future::pending().await, // none is under way
            }
        };
        // A packet after a pause goes first: all that its way touches is cold then, and this is the shortest. While there are
        // more packets all the time they go last, or nothing else would have its turn.
        let packets_first = !plane.has_more();
        tokio::select! {
            biased;
            ready = plane.ready(tun), if packets_first => Wake::Packets(ready),
            () = stop.asked() => Wake::Stop,
            () = timer.fired() => Wake::Timer,
            event = control => Wake::Control(event),
            result = saved => Wake::Saved(result.unwrap_or_else(|e| {
                Err(Problem::new("save", format!("a save failed: {e}"), "this should not happen; report it"))
            })),
            checked = checked => Wake::Checked(Box::new(checked)),
            state = mapped => Wake::Mapping(state),
            offer_changed = relaying => Wake::PeerRelay { offer_changed },
            call = calls.recv() => Wake::Call(call),
            () = changes.changed() => Wake::Network,
            Some(event) = relay => Wake::Relay(event),
            ready = plane.ready(tun), if !packets_first => Wake::Packets(ready),
        }
    }

    /// When the timer must fire.
    fn deadline(&mut self, now: Now) -> Instant {
        let mut earliest = now.boot + MAX_SLEEP;
        let mut consider = |at: Option<Instant>| {
            if let Some(at) = at {
                earliest = earliest.min(at);
            }
        };
        consider(self.retry_at);
        if let Some(up) = &mut self.up {
            consider(up.engine.as_mut().and_then(|e| e.poll_timeout(now)).map(|(at, _)| at));
            consider(up.waiters.iter().map(|w| w.deadline).min());
            consider(up.whys.deadline());
            consider(up.stalled.as_ref().map(|(_, at)| *at));
            consider(up.reconnect_at);
            consider(up.keep.due());
            consider(up.verdicts.deadline().filter(|_| up.welcomed));
            consider(Some(up.next_save));
        }
        earliest
    }

    async fn on_timer(&mut self, now: Now) {
        if self.retry_at.is_some_and(|at| at <= now.boot) {
            self.retry_at = None;
            if let Err(problem) = self.rejoin().await {
                self.come_down_later(now, problem).await;
            }
        }
        let Some(up) = &mut self.up else { return };
        if let Some(engine) = &mut up.engine {
            engine.handle_timeout(now);
        }
        up.follow_addresses(self.surroundings.addrs());
        up.whys.time_out(now.boot);
        up.retry_stalled(now);
        up.reconnect_if_due(now);
        up.leave_idle_relays(now);
        up.keep_if_due(now);
        if let Some(engine) = up.engine.as_ref().filter(|_| up.welcomed) {
            up.verdicts.report_if_due(now.boot, engine, &up.control);
        }
        if up.next_save <= now.boot && up.saving.is_none() {
            up.next_save = now.boot + SAVE_INTERVAL;
            up.save_periodically(now);
        }
        self.time_out_waiters(now).await;
    }

    async fn on_network(&mut self, now: Now) {
        let surroundings = match self.host.surroundings(&self.options.tun).await {
            Ok(surroundings) => surroundings,
            Err(problem) => {
                tracing::warn!("the network can't be looked at: {}", problem.text);
                return;
            }
        };
        if surroundings == self.surroundings {
            return;
        }
        tracing::info!("the network changed");
        self.surroundings = surroundings;
        if let Some(up) = &mut self.up {
            up.control.retry_now();
            up.relays.network_changed();
            up.portal.clear();
            if let Some(engine) = &mut up.engine {
                engine.handle_interfaces(now, &self.surroundings.sockets(&bound(self.plane.sockets())));
            }
        }
        self.follow_gateway(now);
        if let Some(up) = &mut self.up {
            up.tell_mapping(now); // a network that changed elsewhere
            up.follow_addresses(self.surroundings.addrs());
        }
    }

    /// Ends everything and puts the host back.
    async fn stop(&mut self) -> Result<(), Problem> {
        tracing::info!("stopping");
        self.come_down().await
    }
}

/// What tells a process to end.
struct StopSignals([Signal; 3]);

impl StopSignals {
    fn new() -> Result<Self, Problem> {
        let of = |kind| {
            signal(kind).map_err(|e| {
                let what = format!("no signal handler: {e}");
                Problem::new("signals", what, "this should not happen; report it")
            })
        };
        Ok(Self([of(SignalKind::terminate())?, of(SignalKind::interrupt())?, of(SignalKind::hangup())?]))
    }

    /// Waits until one has come. Cancel safe.
    async fn asked(&mut self) {
        let [terminate, interrupt, hangup] = &mut self.0;
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            _ = hangup.recv() => {}
        }
    }
}

fn bound(sockets: &[Arc<Udp>]) -> Vec<(u8, SocketAddr)> {
    sockets.iter().map(|s| (s.id(), s.bound())).collect()
}

/// A seed for the engine's generators, from the system.
fn seed() -> [u8; 32] {
    let mut seed = [0; 32];
    OsEntropy.fill_bytes(&mut seed);
    seed
}
