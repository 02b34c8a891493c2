//! How the agent is: `status`, its health items, and the bug report.

use std::time::Duration;

use serde_json::{Value, json};
use warren_common::ids::RelayId;
use warren_common::netmap::Relay;
use warren_common::time::Now;
use warren_engine::engine::Engine;
use warren_engine::status::{LeaseStatus, RelayStatus, Status as EngineStatus};

use super::{Daemon, Up};
use crate::api::{Coordinator, NetworkStatus, RelayLink, Status, round_ms};
use crate::egress::Proxy;
use crate::peer_relay::PeerRelay;
use crate::problem::{HealthItem, Problem, Severity};
use crate::relay_client::Transport;

/// A clock this far off is told of, in microseconds.
const MAX_SKEW_US: u64 = 5 * 60 * 1_000_000;
/// A lease with less than this left is told of: the coordinator renews long before.
const LEASE_WARNING: Duration = Duration::from_secs(3_600);
/// A nearest relay farther away than this is told of, in milliseconds: calls over it are no pleasure any more.
const FAR_MS: f64 = 250.0;
/// What stands for a name or an address in a bug report without them.
const HIDDEN: &str = "(hidden)";
/// Health items whose texts name nobody and no place.
const CLEAN: [&str; 7] = [
    "clock-skew",
    "captive-portal",
    "no-ipv6",
    "port-mapping-lost",
    "lease-ending",
    "relay-far",
    "udp-blocked",
];
/// Time that relays and UDP get after coming up before their absence is told of.
const GRACE: Duration = Duration::from_secs(5);

impl Daemon {
    /// The state in one word.
    pub(super) fn state_word(&self) -> &'static str {
        match &self.up {
            Some(up) if up.plan.is_some() => "running",
            Some(_) => "connecting",
            None if self.needs_login || self.settings.network.is_none() => "needs-login",
            None => "stopped",
        }
    }

    pub(super) fn status(&self, now: Now) -> Status {
        let engine = self.up.as_ref().and_then(|up| up.engine.as_ref()).map(|e| e.status(now));
        let health = self.health(now, engine.as_ref());
        let up = self.up.as_deref();
        // While down, what is on disk: the device is in the network all the same.
        let pinned = self.settings.network.filter(|_| up.is_none());
        let pinned = pinned.and_then(|id| Some((id, self.state.network(id).ok()?.identity().ok()??)));
        let network = match (up, &pinned) {
            (Some(up), _) => up.membership.map(|_| {
                let name = up.identity.as_ref().map(|i| i.network_name.clone()).unwrap_or_default();
                NetworkStatus { id: up.config.network, name }
            }),
            (None, Some((id, i))) => Some(NetworkStatus { id: *id, name: i.network_name.clone() }),
            (None, None) => None,
        };
        let (device, peers, revision, counters) = match engine {
            None => (None, Vec::new(), 0, json!({})),
            Some(mut status) => {
                let relays = up.map(|up| up.relays.drops()).unwrap_or_default();
                let (unsent, untaken) = self.plane.refused_counts();
                status.drops.insert("send-refused".into(), unsent);
                status.drops.insert("tun-refused".into(), untaken);
                status.drops.insert("relay-queue-full".into(), relays.queue_full);
                status.drops.insert("relay-not-connected".into(), relays.not_connected);
                status.drops.retain(|_, count| *count > 0);
                let counters = json!({
                    "drops": status.drops,
                    "wakes": status.wakes,
                    "staged": status.staged,
                    "disagreements": status.disagreements,
                    "queue": {"dropped": self.plane.queue_counts().0, "told": self.plane.queue_counts().1},
                    "turns_shared": self.plane.shared_turns(),
                });
                (status.device, status.peers, status.revision, counters)
            }
        };
        Status {
            state: self.state_word().to_owned(),
            network,
            device,
            coordinator: match (up, pinned) {
                (Some(up), _) => {
                    let url = up.config.url.to_string();
                    Some(Coordinator { url, connected: up.welcomed, revision })
                }
                (None, Some((_, i))) => Some(Coordinator { url: i.url, connected: false, revision: 0 }),
                (None, None) => None,
            },
            peers,
            relays: up.map_or_else(Vec::new, Up::relay_links),
            relaying: up.and_then(|up| up.peer_relay.as_ref()).map(PeerRelay::status),
            health,
            counters,
            offloads: self
                .plane
                .offloads(up.and_then(|up| up.tun.as_ref()))
                .named()
                .map(|(name, on)| (name.to_owned(), on))
                .into(),
        }
    }

    fn health(&self, now: Now, engine: Option<&EngineStatus>) -> Vec<HealthItem> {
        let mut out = Vec::new();
        if let Some((problem, severity)) = &self.problem {
            out.push(problem.health(*severity));
        }
        if let Some(up) = &self.up {
            let netmap = up.engine.as_ref().and_then(Engine::netmap);
            out.extend(netmap.and_then(|m| self.endpoint_health((m.network.ipv4, m.network.ipv6))));
            up.health(now, engine, &mut out);
        }
        out
    }

    /// Status, host and settings, without keys and auth keys; without names and addresses unless `names`.
    pub(super) fn bugreport(&self, now: Now, names: bool) -> Value {
        let mut status = self.status(now);
        if !names {
            redact(&mut status);
        }
        let mapping = self.up.as_ref().map(|up| up.mapping.state()).unwrap_or_default();
        let engine = self.up.as_ref().and_then(|up| up.engine.as_ref());
        let net = engine.map(|engine| engine.status(now).net);
        let egress = &self.options.egress;
        json!({
            "network": net.map(|net| json!({
                "udp": net.udp,
                "ipv4": net.ipv4.is_some(),
                "ipv6": net.ipv6.is_some(),
                "nat_mapping": net.mapping.map(crate::netcheck::word),
                "port_mapping": mapping.mapping.map(|(_, protocol)| protocol.word()),
                "gateway": self.surroundings.gateway().is_some(),
                "relays": net.relays.iter().map(|relay| json!({
                    "name": names.then(|| relay.name.clone()),
                    "id": relay.id,
                    "connected": relay.connected,
                    "home": relay.home,
                    "rtt_ms": relay.rtt_ms,
                })).collect::<Vec<_>>(),
            })),
            "version": env!("CARGO_PKG_VERSION"),
            "os": std::env::consts::OS,
            "kernel": rustix::system::uname().release().to_string_lossy(),
            "time": now.unix.to_rfc3339(),
            "tun": self.options.tun,
            "mtu": self.up.as_ref().map(|up| up.mtu),
            "egress": {
                "proxy": egress.proxy().map(|proxy| if names { proxy.to_string() } else { HIDDEN.to_owned() }),
                "credentials": egress.proxy().is_some_and(Proxy::has_credentials),
                "exceptions": egress.exceptions().len(),
                "authorities": egress.authorities().len(),
            },
            "status": status,
        })
    }
}

/// Takes out what says who somebody is, or where.
fn redact(status: &mut Status) {
    for peer in &mut status.peers {
        peer.path.endpoint = None;
        peer.path.relay = peer.path.relay.take().map(|_| HIDDEN.to_owned());
        peer.name = None;
        peer.user = peer.user.take().map(|_| HIDDEN.to_owned());
        peer.tags.iter_mut().for_each(|tag| HIDDEN.clone_into(tag));
        peer.ips.clear();
    }
    if let Some(device) = &mut status.device {
        HIDDEN.clone_into(&mut device.name);
        device.user = device.user.take().map(|_| HIDDEN.to_owned());
        device.tags.iter_mut().for_each(|tag| HIDDEN.clone_into(tag));
        device.attributes.iter_mut().for_each(|attribute| HIDDEN.clone_into(attribute));
        device.ips.clear();
    }
    for relay in &mut status.relays {
        HIDDEN.clone_into(&mut relay.name);
        relay.proxy = relay.proxy.take().map(|_| HIDDEN.to_owned());
    }
    if let Some(network) = &mut status.network {
        HIDDEN.clone_into(&mut network.name);
    }
    if let Some(coordinator) = &mut status.coordinator {
        HIDDEN.clone_into(&mut coordinator.url);
    }
    // The code says what is wrong; most texts name hosts, addresses or files, and some are not even ours.
    for item in status.health.iter_mut().filter(|item| !CLEAN.contains(&item.code.as_str())) {
        HIDDEN.clone_into(&mut item.text);
        HIDDEN.clone_into(&mut item.fix);
    }
    if let Some(counters) = status.counters.as_object_mut() {
        // They name rules, and so people and machines.
        counters.remove("disagreements");
        counters.remove("staged");
    }
}

impl Up {
    /// The proxy that packets to and from a relay go through at the moment.
    pub(super) fn relay_proxy(&self, relay: RelayId) -> Option<String> {
        self.config.egress.proxy().filter(|_| self.relays.is_proxied(relay)).map(ToString::to_string)
    }

    fn relay_links(&self) -> Vec<RelayLink> {
        let Some(engine) = &self.engine else { return Vec::new() };
        let link = |status: RelayStatus| {
            let link = self.relays.link(status.id);
            let measured = link.and_then(|(_, rtt)| rtt).map(|rtt| round_ms(rtt.as_secs_f64() * 1_000.0));
            RelayLink {
                name: status.name,
                home: status.home,
                peer: status.peer,
                transport: link.map(|(transport, _)| transport.as_str().to_owned()),
                proxy: self.relay_proxy(status.id),
                rtt_ms: measured.or(status.rtt_ms),
            }
        };
        engine.net_status_so_far().relays.into_iter().map(link).collect()
    }

    fn health(&self, now: Now, engine: Option<&EngineStatus>, out: &mut Vec<HealthItem>) {
        let mut add = |code: &str, severity, text: String, fix: &str| {
            out.push(HealthItem { code: code.to_owned(), severity, text, fix: fix.to_owned() });
        };
        if self.skew_us.unsigned_abs() > MAX_SKEW_US {
            let (minutes, way) = (
                (self.skew_us.unsigned_abs() + 30_000_000) / 60_000_000,
                if self.skew_us > 0 { "ahead of" } else { "behind" },
            );
            add(
                "clock-skew",
                Severity::Warning,
                format!("this host's clock is {minutes} minutes {way} the coordinator's"),
                "set the clock, or switch time synchronisation on; rules with time windows act by this clock",
            );
        }
        if let Some(problem) = &self.save_problem {
            add(&problem.code, Severity::Error, problem.text.clone(), &problem.fix);
        }
        if let Some(problem) = self.away.as_ref().filter(|_| !self.welcomed) {
            add(&problem.code, Severity::Warning, problem.text.clone(), &problem.fix);
        }
        if self.portal.found() && !self.welcomed {
            add(
                "captive-portal",
                Severity::Warning,
                "this network wants a sign-in before it lets anything out (a captive portal)".into(),
                "open any http:// page in a browser on this network and sign in there; the agent goes on by itself",
            );
        }
        if self.no_ipv6 {
            add(
                "no-ipv6",
                Severity::Info,
                "this host has no IPv6, so overlay addresses of IPv6 don't work on it".into(),
                "switch IPv6 on (sysctl net.ipv6.conf.all.disable_ipv6=0) if they are needed",
            );
        }
        if let Some(problem) = self.peer_relay.as_ref().and_then(PeerRelay::trouble) {
            add(&problem.code, Severity::Warning, problem.text.clone(), &problem.fix);
        }
        if self.mapping.state().lost {
            add(
                "port-mapping-lost",
                Severity::Warning,
                "the router forwarded a port to this device and does so no more: some peers may be reached through relays only"
                    .into(),
                "nothing, if the router was just restarted (it is asked again); else switch UPnP, NAT-PMP or PCP on in its settings",
            );
        }
        let Some(status) = engine else { return };
        if let Some((severity, text)) = lease_ending(status.lease, self.welcomed) {
            add("lease-ending", severity, text, "make the coordinator reachable: it renews the lease");
        }
        // Those that may be home: a device that relays may be away without anybody missing it.
        let relays: Vec<&RelayStatus> = status.net.relays.iter().filter(|r| !r.peer).collect();
        if now.boot.since(self.since) < GRACE || self.plan.is_none() || relays.is_empty() {
            return;
        }
        if !relays.iter().any(|r| r.connected) {
            let (why, problem) = self.relays.trouble().unwrap_or(("still trying", None));
            add(
                "relay-away",
                Severity::Warning,
                format!("no relay can be reached ({why}): peers that have no direct path are out of reach"),
                "check that the relay runs and that its port is open for TCP and UDP",
            );
            // The way to the coordinator may be barred in the same manner.
            let told = |problem: &&Problem| self.welcomed || self.away.as_ref() != Some(*problem);
            if let Some(problem) = problem.filter(told) {
                add(&problem.code, Severity::Warning, problem.text.clone(), &problem.fix);
            }
        }
        // Where STUN gets no answer, what packets take tells how far it is.
        let measured = |r: &RelayStatus| self.relays.link(r.id).and_then(|(_, rtt)| rtt);
        let away = |r: &RelayStatus| r.rtt_ms.or_else(|| measured(r).map(|rtt| rtt.as_secs_f64() * 1_000.0));
        let nearest = relays.iter().filter_map(|r| away(r)).reduce(f64::min);
        if let Some(ms) = nearest.filter(|ms| *ms > FAR_MS) {
            add(
                "relay-far",
                Severity::Warning,
                format!(
                    "the nearest relay is {ms:.0} ms away: peers without a direct path are slow to reach"
                ),
                "have the administrator set up a relay nearby (`warren-coordinator relay create NAME`); behind a slow or full link nothing else helps",
            );
        }
        let transports = relays.iter().filter_map(|r| self.relays.link(r.id)).map(|(transport, _)| transport);
        let known = self.engine.as_ref().and_then(Engine::netmap).into_iter().flat_map(|m| m.relays.values());
        if !status.net.udp && is_udp_blocked(known, transports) {
            let proxied = relays.iter().any(|relay| self.relays.is_proxied(relay.id));
            let way = if proxied { "relays and the HTTP proxy only" } else { "relays only" };
            add(
                "udp-blocked",
                Severity::Warning,
                format!("no answer comes back by UDP: traffic goes through {way}"),
                "have outgoing UDP let out by the firewall, at best to any port, and replies let in",
            );
        }
    }
}

/// What to say of the lease, if anything: while there is a session it is renewed.
fn lease_ending(lease: LeaseStatus, welcomed: bool) -> Option<(Severity, String)> {
    let left = match lease {
        LeaseStatus::Valid { remaining_ms } => Duration::from_millis(remaining_ms),
        LeaseStatus::Ended => Duration::ZERO,
        LeaseStatus::None => return None,
    };
    if left.is_zero() {
        return Some((
            Severity::Error,
            "the lease of everything granted has ended: nothing passes".to_owned(),
        ));
    }
    let soon = left < LEASE_WARNING && !welcomed;
    soon.then(|| {
        (Severity::Warning, format!("everything granted ends in {} minutes", left.as_secs().div_ceil(60)))
    })
}

/// What no answer by STUN means: nothing without a server, and not that while packets to a relay are UDP.
fn is_udp_blocked<'a>(
    mut known: impl Iterator<Item = &'a Relay>,
    mut transports: impl Iterator<Item = Transport>,
) -> bool {
    known.any(|relay| !relay.stun.is_empty())
        && !transports.any(|transport| matches!(transport, Transport::Udp | Transport::Quic))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_is_told_of_when_it_has_ended_or_will_and_nobody_renews_it() {
        let valid = |minutes: u64| LeaseStatus::Valid { remaining_ms: minutes * 60_000 };
        assert_eq!(lease_ending(LeaseStatus::None, false), None);
        assert_eq!(lease_ending(valid(60), false), None);
        assert_eq!(lease_ending(valid(59), true), None);
        let (severity, text) = lease_ending(valid(59), false).unwrap();
        assert_eq!((severity, text.as_str()), (Severity::Warning, "everything granted ends in 59 minutes"));
        for ended in [LeaseStatus::Ended, valid(0)] {
            for welcomed in [false, true] {
                assert_eq!(lease_ending(ended, welcomed).unwrap().0, Severity::Error);
            }
        }
    }

    #[test]
    fn udp_is_blocked_if_there_is_a_server_to_tell_and_nothing_tells_otherwise() {
        let relay = |stun: &[&str]| Relay {
            id: RelayId::from_bytes([2; 16]),
            name: "r".into(),
            addrs: vec![],
            stun: stun.iter().map(|addr| addr.parse().unwrap()).collect(),
            cert_sha256: [1; 32],
            peer: false,
        };
        let (with, without) = ([relay(&[]), relay(&["192.0.2.1:3478"])], [relay(&[])]);
        let blocked =
            |known: &[Relay], over: &[Transport]| is_udp_blocked(known.iter(), over.iter().copied());
        assert!(blocked(&with, &[]) && blocked(&with, &[Transport::WebSocket]));
        assert!(!blocked(&without, &[]) && !blocked(&without, &[Transport::WebSocket]));
        assert!(
            !blocked(&with, &[Transport::WebSocket, Transport::Udp]) && !blocked(&with, &[Transport::Quic])
        );
    }

    #[test]
    fn a_report_without_names_has_none_in_what_is_wrong_either() {
        let item =
            |code: &str, text: &str| Problem::new(code, text, format!("mend {text}")).health(Severity::Error);
        let url = "https://warren.acme.example";
        let mut status = Status {
            state: "running".into(),
            network: None,
            device: None,
            coordinator: Some(Coordinator { url: url.into(), connected: false, revision: 1 }),
            peers: vec![],
            relays: vec![],
            relaying: None,
            health: vec![
                item("coordinator-away", &format!("`{url}`: the name `warren.acme.example` is not known")),
                item("bad-url", "`http:/warren.acme.example` is not the URL of a coordinator"),
                item("pool-collision", "100.64.0.0/10 is on the way to acme0"),
                item("relay-away", "no relay can be reached (192.0.2.7: refused)"),
                item("of-a-later-coordinator", "ask ann@acme.example"),
                item("udp-blocked", "no answer comes back by UDP"),
            ],
            counters: json!({}),
            offloads: Default::default(),
        };
        redact(&mut status);
        let text = serde_json::to_string(&status).unwrap();
        for name in ["acme", "192.0.2", "100.64", "http"] {
            assert!(!text.contains(name), "{name} is in {text}");
        }
        for kept in
            ["coordinator-away", "pool-collision", "of-a-later-coordinator", "no answer comes back by UDP"]
        {
            assert!(text.contains(kept), "{kept} is not in {text}");
        }
    }
}
