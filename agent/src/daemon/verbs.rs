//! What local callers ask for.

use std::net::IpAddr;
use std::time::Duration;

use serde::Serialize;
use serde_json::json;
use tokio::sync::oneshot;
use tokio::time::timeout;
use warren_common::auth_key::AuthKey;
use warren_common::ids::DeviceId;
use warren_common::keys::Fingerprint;
use warren_common::netmap::Peer;
use warren_common::time::Now;
use warren_common::url::CoordinatorUrl;
use warren_common::wire::control::CoordinatorIdentity;
use warren_engine::status::Why;
use zeroize::Zeroizing;

use super::session::Join;
use super::{Daemon, Enrolment, Up, Waiter};
use crate::api::{self, Call, Reply, Verb};
use crate::control::{self, CONNECT_TIMEOUT, ControlConfig};
use crate::os::tun::Tun;
use crate::problem::Problem;

/// Longest time that `up` waits.
const MAX_UP_WAIT: Duration = Duration::from_secs(3_600);

/// An answer that is one document.
pub(super) fn done(value: &impl Serialize) -> Reply {
    match serde_json::to_value(value) {
        Ok(value) => Reply::Done(value),
        Err(e) => {
            Reply::Problem(Problem::new("encoding", e.to_string(), "this should not happen; report it"))
        }
    }
}

/// The name of this host.
pub(super) fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// What `up` has begun.
enum Begun {
    /// The agent comes up.
    Joining,
    /// There is nothing to join with: only see who is there.
    Look(FirstContact),
}

/// A coordinator that this device has never met, and what proves who it is.
struct FirstContact {
    url: CoordinatorUrl,
    /// Its root key's fingerprint; absent if TLS is the proof.
    root: Option<Fingerprint>,
}

fn first_contact(url: Option<CoordinatorUrl>, root: Option<Fingerprint>) -> Result<FirstContact, Problem> {
    let Some(url) = url else {
        return Err(Problem::new(
            "needs-login",
            "this device is not enrolled, so it needs an auth key",
            "run `warren up --coordinator URL --auth-key-file FILE`; an administrator makes keys with `warren-coordinator auth-key create`",
        ));
    };
    if root.is_none() && !url.tls() {
        return Err(Problem::usage(
            "unverified-coordinator",
            format!(
                "nothing proves who answers at `{url}`: it is plain http, and there is neither an auth key nor a fingerprint"
            ),
            "add --auth-key-file FILE (a key names its coordinator) or --coordinator-fingerprint, or use the coordinator's https URL",
        ));
    }
    Ok(FirstContact { url, root })
}

fn needs_auth_key(url: &CoordinatorUrl, shown: &CoordinatorIdentity) -> Problem {
    let name: String = shown.network_name.chars().filter(|c| !c.is_control()).collect();
    Problem::new(
        "needs-login",
        format!(
            "this device is not enrolled in the network `{name}` (root key {}) of the coordinator at `{url}`",
            shown.root.fingerprint()
        ),
        format!(
            "signing in with a browser does not exist yet: have an administrator make an auth key (`warren-coordinator auth-key create`), then run `warren up --coordinator {url} --auth-key-file FILE`"
        ),
    )
}

impl Daemon {
    pub(super) async fn on_call(&mut self, now: Now, call: Call) {
        let Call { request, reply } = call;
        tracing::debug!(verb = ?request.verb, "local call");
        if let Some(network) = request.network.filter(|n| Some(*n) != self.settings.network) {
            // The caller may have gone away; here and below nobody is left to tell then.
            let _ = reply.send(Reply::Problem(Problem::usage(
                "unknown-network",
                format!("this device is not in network {network}"),
                "see `warren status`; leave --network away to mean the only one",
            )));
            return;
        }
        let answer = match request.verb {
            Verb::Up(up) => return self.verb_up(now, up, reply).await,
            Verb::Ping { peer } => return self.verb_ping(now, &peer, reply),
            Verb::Netcheck => return self.verb_netcheck(now, reply),
            Verb::Why { dst, port, proto } => return self.verb_why(now, &dst, port, proto, reply),
            Verb::Down => self.verb_down().await,
            Verb::Logout => self.verb_logout().await,
            Verb::Status => Ok(done(&self.status(now))),
            Verb::Whois { ip } => self.verb_whois(now, ip),
            Verb::Version => Ok(done(&json!({ "version": env!("CARGO_PKG_VERSION") }))),
            Verb::Bugreport { names } => Ok(done(&self.bugreport(now, names))),
        };
        let _ = reply.send(answer.unwrap_or_else(Reply::Problem));
    }

    async fn verb_up(&mut self, now: Now, up: api::Up, reply: oneshot::Sender<Reply>) {
        let wait = Duration::from_millis(up.timeout_ms).min(MAX_UP_WAIT);
        match self.bring_up(now, up).await {
            Ok(Begun::Joining) => {}
            Ok(Begun::Look(first)) => return self.look(first, wait, reply),
            Err(problem) => {
                let _ = reply.send(Reply::Problem(problem));
                return;
            }
        }
        match &mut self.up {
            Some(up) if !wait.is_zero() => {
                up.waiters.push(Waiter { reply, deadline: now.boot + wait });
            }
            Some(_) => {
                let _ = reply.send(done(&self.status(now)));
            }
            None => {
                let problem = self.problem.clone().map(|(problem, _)| problem);
                let _ = reply.send(problem.map_or_else(|| done(&self.status(now)), Reply::Problem));
            }
        }
    }

    async fn bring_up(&mut self, now: Now, ask: api::Up) -> Result<Begun, Problem> {
        let auth_key = ask.auth_key.map(Zeroizing::new);
        let key = auth_key.as_ref().map(|text| text.parse::<AuthKey>()).transpose().map_err(|e| {
            Problem::usage("bad-auth-key", e.to_string(), "copy the whole line, or use --auth-key-file")
        })?;
        let fingerprint: Option<Fingerprint> =
            ask.fingerprint.map(|text| text.parse()).transpose().map_err(|e| {
                Problem::usage("bad-fingerprint", format!("{e}"), "copy it as `warren-coordinator` prints it")
            })?;
        let url: Option<CoordinatorUrl> = ask.coordinator.map(|text| text.parse()).transpose()?;
        let joined = self.settings.network.filter(|_| !self.needs_login);
        if let Some(key) = key.as_ref().filter(|key| joined.is_some_and(|n| n != key.network)) {
            return Err(Problem::new(
                "already-joined",
                format!("this device is in another network already, not in {}", key.network),
                "run `warren logout` first, or leave the auth key away",
            ));
        }
        if joined.is_some() {
            return self.bring_up_again(now, url, fingerprint).await.map(|()| Begun::Joining);
        }
        let (Some(key), Some(auth_key)) = (key, auth_key) else {
            return first_contact(url, fingerprint).map(Begun::Look);
        };
        if fingerprint.is_some_and(|wanted| wanted != key.root) {
            return Err(wrong_fingerprint("the auth key is for a coordinator with another root key"));
        }
        let Some(url) = url else {
            return Err(Problem::usage(
                "no-coordinator",
                "the first time, `up` must be told where the coordinator is",
                "add --coordinator URL",
            ));
        };
        self.come_down().await?;
        // A host that can't have a TUN should not spend the key.
        drop(Tun::open(&self.options.tun, self.options.offloads)?);
        let mut dir = self.state.network(key.network)?;
        // Where no device came of an earlier try, the keys stay: the coordinator may have made one, and its reply was lost.
        let no_device = matches!(dir.membership(), Ok(None));
        if self.needs_login && !no_device {
            // The old device is of no use any more, and its keys may be on another host as well.
            self.state.remove_network(key.network)?;
            dir = self.state.network(key.network)?;
        }
        if let Some(hostname) = ask.hostname {
            self.settings.hostname = Some(hostname);
        }
        let join = Join {
            control: ControlConfig {
                url,
                network: key.network,
                root: key.root,
                min_epoch: 0,
                secret: dir.keys()?.control,
                egress: self.options.egress.clone(),
            },
            identity: dir.identity()?,
            membership: None,
            enrolment: Some(Enrolment {
                auth_key,
                hostname: self.settings.hostname.clone().unwrap_or_else(host_name),
            }),
        };
        self.start(now, join).await.map(|()| Begun::Joining)
    }

    async fn bring_up_again(
        &mut self,
        now: Now,
        url: Option<CoordinatorUrl>,
        fingerprint: Option<Fingerprint>,
    ) -> Result<(), Problem> {
        if !self.settings.want_up {
            self.settings.want_up = true;
            self.state.save_settings(&self.settings)?;
        }
        if self.up.is_none() {
            self.rejoin().await?;
        }
        let Some(up) = &mut self.up else { return Ok(()) };
        if fingerprint.is_some_and(|wanted| wanted != up.config.root) {
            return Err(wrong_fingerprint("the network this device is in has another root key"));
        }
        // Without one, back to where the coordinator was last met: another may have been tried in vain.
        let pinned = || up.identity.as_ref().and_then(|i| i.url.parse().ok());
        match url.or_else(pinned) {
            Some(url) if url != up.config.url => {
                up.config.url = url;
                up.reconnect(now);
            }
            _ => up.control.retry_now(),
        }
        Ok(())
    }

    /// Finds out who the coordinator is, for somebody who has no key to join with, without holding anything else up.
    fn look(&mut self, first: FirstContact, wait: Duration, reply: oneshot::Sender<Reply>) {
        let FirstContact { url, root } = first;
        while self.looks.try_join_next().is_some() {}
        let egress = self.options.egress.clone();
        self.looks.spawn(async move {
            let look = control::look(&url, root, &egress);
            let problem = match timeout(wait.min(CONNECT_TIMEOUT), look).await {
                Ok(Ok(identity)) => needs_auth_key(&url, &identity),
                Ok(Err(problem)) => problem,
                Err(_) => no_answer(&url),
            };
            // The caller may have gone away.
            let _ = reply.send(Reply::Problem(problem));
        });
    }

    async fn verb_down(&mut self) -> Result<Reply, Problem> {
        self.settings.want_up = false;
        self.retry_at = None;
        if !self.needs_login {
            self.problem = None;
        }
        self.state.save_settings(&self.settings)?;
        self.come_down().await?;
        Ok(done(&json!({ "state": self.state_word() })))
    }

    async fn verb_logout(&mut self) -> Result<Reply, Problem> {
        let told = self.up.as_ref().is_some_and(|up| up.say_goodbye());
        self.come_down().await?;
        let Some(network) = self.settings.network.take() else {
            return Ok(done(&json!({ "state": self.state_word(), "coordinator_told": null })));
        };
        self.state.remove_network(network)?;
        self.settings.want_up = false;
        self.state.save_settings(&self.settings)?;
        self.problem = None;
        self.retry_at = None;
        self.needs_login = false;
        Ok(done(&json!({ "state": self.state_word(), "coordinator_told": told })))
    }

    fn verb_ping(&mut self, now: Now, peer: &str, reply: oneshot::Sender<Reply>) {
        match self.begin_ping(now, peer) {
            Ok(token) => {
                if let Some(up) = &mut self.up {
                    up.pings.retain(|(_, reply)| !reply.is_closed());
                    up.pings.push((token, reply));
                }
            }
            Err(problem) => {
                let _ = reply.send(Reply::Problem(problem));
            }
        }
    }

    fn begin_ping(&mut self, now: Now, peer: &str) -> Result<warren_engine::event::PingToken, Problem> {
        let device = self.peer(peer)?.id;
        let up = self.up.as_mut().ok_or_else(not_up)?;
        let engine = up.engine.as_mut().ok_or_else(not_up)?;
        engine.start_ping(now, device).ok_or_else(|| {
            Problem::new(
                "nothing-granted",
                "nothing is allowed at present: the lease has ended",
                "it is renewed when the coordinator is reached; see `warren status`",
            )
        })
    }

    fn verb_whois(&self, now: Now, ip: IpAddr) -> Result<Reply, Problem> {
        let engine = self.up.as_ref().and_then(|up| up.engine.as_ref()).ok_or_else(not_up)?;
        let who = engine.whois(now, ip).ok_or_else(|| {
            Problem::new(
                "unknown-address",
                format!("no device that this one may know has the address {ip}"),
                "see `warren status` for the peers of this device",
            )
        })?;
        Ok(done(&who))
    }

    fn verb_why(&mut self, now: Now, dst: &str, port: u16, proto: u8, reply: oneshot::Sender<Reply>) {
        match (self.why(now, dst, port, proto), &mut self.up) {
            (Ok(why), Some(up)) => up.answer_why(now, why, reply),
            (Ok(why), None) => {
                let _ = reply.send(done(&why));
            }
            (Err(problem), _) => {
                let _ = reply.send(Reply::Problem(problem));
            }
        }
    }

    fn why(&self, now: Now, dst: &str, port: u16, proto: u8) -> Result<Why, Problem> {
        let engine = self.up.as_ref().and_then(|up| up.engine.as_ref()).ok_or_else(not_up)?;
        let ip = dst.parse().ok().or_else(|| self.peer(dst).ok()?.addrs.first().copied());
        Ok(match ip {
            Some(ip) => engine.why(now, ip, proto, port),
            None => engine.why_unknown(now, dst),
        })
    }

    /// The peer with this name, address or id.
    fn peer(&self, text: &str) -> Result<&Peer, Problem> {
        let netmap = self.up.as_ref().and_then(|up| up.engine.as_ref()).and_then(|e| e.netmap());
        let peers = &netmap.ok_or_else(not_up)?.peers;
        let by_id = text.parse::<DeviceId>().ok().and_then(|id| peers.get(&id));
        let ip = text.parse::<IpAddr>().ok();
        let named = || {
            peers.values().find(|p| {
                p.name.as_deref().is_some_and(|name| name.eq_ignore_ascii_case(text))
                    || ip.is_some_and(|ip| p.addrs.contains(&ip))
            })
        };
        by_id.or_else(named).map(AsRef::as_ref).ok_or_else(|| unknown_peer(text))
    }

    /// Answers those who wait for `up`, if it is.
    pub(super) fn settle_waiters(&mut self, now: Now) {
        let Some(up) = &mut self.up else { return };
        if up.waiters.is_empty() || !up.is_joined() {
            return;
        }
        let waiters = std::mem::take(&mut up.waiters);
        for waiter in waiters {
            let _ = waiter.reply.send(done(&self.status(now)));
        }
    }

    /// Answers those who have waited long enough. An enrolment that nobody waits for any more ends.
    pub(super) async fn time_out_waiters(&mut self, now: Now) {
        let Some(up) = &mut self.up else { return };
        let (late, waiting): (Vec<_>, Vec<_>) =
            std::mem::take(&mut up.waiters).into_iter().partition(|w| w.deadline <= now.boot);
        up.waiters = waiting;
        if late.is_empty() {
            return;
        }
        let problem = up.save_problem.clone().or_else(|| up.away.clone()).unwrap_or_else(|| {
            if !up.welcomed {
                return no_answer(&up.config.url);
            }
            Problem::new(
                "timeout",
                "the coordinator has let this device in, and has not sent its netmap yet",
                "wait longer with --timeout, and see `warren status`",
            )
        });
        for waiter in late {
            let _ = waiter.reply.send(Reply::Problem(problem.clone()));
        }
        if up.waiters.is_empty()
            && up.membership.is_none()
            && let Err(problem) = self.come_down().await
        {
            tracing::error!("{problem}");
        }
    }
}

impl Up {
    /// True if `up` has nothing left to wait for.
    fn is_joined(&self) -> bool {
        self.welcomed && self.plan.is_some()
    }

    /// Tells everybody who waits for `up` that it fails.
    pub(super) fn fail_waiters(&mut self, problem: &Problem) {
        for waiter in self.waiters.drain(..) {
            let _ = waiter.reply.send(Reply::Problem(problem.clone()));
        }
    }
}

pub(super) fn not_up() -> Problem {
    Problem::new(
        "not-up",
        "the agent is not up, or has no netmap yet",
        "run `warren up`, and see `warren status`",
    )
}

fn unknown_peer(text: &str) -> Problem {
    Problem::new(
        "unknown-peer",
        format!("no peer of this device is called `{text}`"),
        "see `warren status` for names and addresses; a peer that no policy rule connects to this device is not listed",
    )
}

fn no_answer(url: &CoordinatorUrl) -> Problem {
    Problem::new(
        "coordinator-away",
        format!("nobody has answered at `{url}` in time"),
        "check the URL, the network and any firewall, or wait longer with --timeout",
    )
}

fn wrong_fingerprint(text: &str) -> Problem {
    Problem::new(
        "coordinator-fingerprint",
        text,
        "compare --coordinator-fingerprint with what the coordinator's administrator says",
    )
}
