//! Questions people ask.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use warren_common::filter::{FilterRule, IpRange, RuleId};
use warren_common::netmap::Peer;
use warren_common::time::Now;
use warren_common::wire::probe::Candidate;

use super::Engine;
use super::data::WG_REASONS;
use crate::event::{Path, WakeReason};
use crate::filter::Outcome;
use crate::flow::Direction;
use crate::status::{
    LeaseStatus, NetStatus, NetworkStatus, PathStatus, PeerStatus, Refused, RelayStatus, SelfStatus,
    StagedRule, Status, Whois, Why,
};
use crate::stun::Stun;

/// What a device that isn't told of another can say about it.
const NOT_VISIBLE: &str = "is visible to this device: there is none, or no policy rule connects the two (a device is told of those only that it may talk with, and of the names only of those that it may reach)";

impl Engine {
    /// Everything at one moment.
    pub fn status(&self, now: Now) -> Status {
        let netmap = self.held.as_ref().map(|h| &h.netmap);
        Status {
            network: netmap.map(|m| NetworkStatus { id: m.network.id, name: m.network.name.clone() }),
            device: netmap.map(|m| SelfStatus {
                id: m.device.id,
                name: m.device.name.clone(),
                ips: m.device.addrs.clone(),
                user: m.device.user.clone(),
                tags: m.device.tags.clone(),
                attributes: m.device.attrs.clone(),
            }),
            epoch: self.held.as_ref().map_or(0, |h| h.epoch),
            revision: self.held.as_ref().map_or(0, |h| h.revision),
            lease: self.held.as_ref().map_or(LeaseStatus::None, |h| h.lease_status(now)),
            peers: netmap.map_or_else(Vec::new, |m| m.peers.values().map(|p| self.peer_status(p)).collect()),
            net: self.net_status_by(&self.stun),
            drops: self.drop_counters().collect(),
            staged: self.staged_rules(),
            disagreements: self.disagreements(),
            wakes: WakeReason::ALL.iter().map(|reason| (*reason, self.wakes[*reason as usize])).collect(),
        }
    }

    /// Staged rules of both directions with what they would have decided.
    pub fn staged_rules(&self) -> Vec<StagedRule> {
        let rules = self.filter.rules();
        let staged: BTreeMap<RuleId, &FilterRule> = [&rules.ingress, &rules.egress]
            .into_iter()
            .flat_map(|matcher| matcher.rules())
            .filter(|rule| rule.staged)
            .map(|rule| (rule.id, rule))
            .collect();
        let counted = self.filter.staged_hits().filter_map(|(id, sent, received)| {
            let rule = staged.get(&id)?;
            Some(StagedRule { rule: id, origin: rule.origin.clone(), action: rule.action, sent, received })
        });
        counted.collect()
    }

    fn disagreements(&self) -> Vec<Refused> {
        let device = |peer: u32| self.peers.get(peer as usize).and_then(Option::as_ref).map(|p| p.id);
        self.filter.disagreements().map(|what| Refused { device: device(what.peer), what: *what }).collect()
    }

    fn peer_status(&self, peer: &Peer) -> PeerStatus {
        let idx = self.paths.find(peer.id);
        let state = idx.and_then(|idx| self.peers.get(idx as usize)?.as_ref());
        let (path, rtt) = idx.map_or((Path::None, None), |idx| self.paths.path(idx));
        let why = idx.and_then(|idx| self.paths.why_not_direct(idx));
        PeerStatus {
            id: peer.id,
            name: peer.name.clone(),
            ips: peer.addrs.clone(),
            user: peer.user.clone(),
            tags: peer.tags.clone(),
            online: self.online.contains(&peer.id),
            path: PathStatus {
                why_not_direct: why.map(|why| why.as_str().into()),
                mtu: idx.filter(|_| path != Path::None).map(|idx| self.paths.mtu(idx)),
                ..self.path_status(path, rtt)
            },
            why_not_direct: why.map(|why| why.text().to_owned()),
            rx_bytes: state.map_or(0, |s| s.rx_bytes),
            tx_bytes: state.map_or(0, |s| s.tx_bytes),
            last_handshake: state.and_then(|s| self.wg.peer_stats(s.handle)?.last_handshake),
        }
    }

    /// A path in the words of `warren status` and `warren ping`.
    pub fn path_status(&self, path: Path, rtt: Option<Duration>) -> PathStatus {
        let (kind, endpoint, relay) = match path {
            Path::Direct { endpoint } => ("direct", Some(endpoint), None),
            Path::Relay { relay } => {
                let name = self.netmap().and_then(|m| m.relays.get(&relay)).map(|r| r.name.clone());
                ("relay", None, Some(name.unwrap_or_else(|| relay.to_string())))
            }
            Path::None => ("none", None, None),
        };
        PathStatus {
            kind: kind.into(),
            endpoint,
            relay,
            rtt_ms: rtt.map(millis),
            why_not_direct: None,
            mtu: None,
        }
    }

    /// Where peers are told that we are.
    pub fn own_endpoints(&self) -> &[Candidate] {
        self.paths.own()
    }

    /// The network around us by the answers to the last STUN round alone; `None` while they are still coming in.
    pub fn net_status(&self) -> Option<NetStatus> {
        (!self.stun.is_asking()).then(|| self.net_status_by(&self.stun.fresh()))
    }

    /// The same by the answers that have come so far.
    pub fn net_status_so_far(&self) -> NetStatus {
        self.net_status_by(&self.stun.fresh())
    }

    fn net_status_by(&self, stun: &Stun) -> NetStatus {
        let relays = self.netmap().map_or_else(Vec::new, |m| {
            let status = |r: &warren_common::netmap::Relay| RelayStatus {
                id: r.id,
                name: r.name.clone(),
                connected: self.paths.relay_connected(r.id),
                home: self.home.current() == Some(r.id),
                peer: r.peer,
                rtt_ms: stun.rtt(r.id).map(millis),
            };
            m.relays.values().map(status).collect()
        });
        NetStatus {
            udp: stun.mapped().next().is_some(),
            ipv4: stun.mapped().find(|a| a.is_ipv4()),
            ipv6: stun.mapped().find(|a| a.is_ipv6()),
            mapping: stun.mapping(self.paths.local()),
            relays,
        }
    }

    /// Whose an overlay address is: a peer's, our own, or nobody's; with the capabilities that the policy gives it at this
    /// device's applications.
    pub fn whois(&self, now: Now, ip: IpAddr) -> Option<Whois> {
        let who = self.owner(ip)?;
        let capabilities = if who.is_self { BTreeMap::new() } else { self.capabilities(now, ip) };
        Some(Whois { capabilities, ..who })
    }

    /// What `ip` may do at our applications: values of every grant in force, in the order of the rules' ids.
    fn capabilities(&self, now: Now, ip: IpAddr) -> BTreeMap<String, Vec<serde_json::Value>> {
        let mut out: BTreeMap<String, Vec<serde_json::Value>> = BTreeMap::new();
        if self.not_in_force(now).is_some() {
            return out;
        }
        // Who talks to an application does so within one family.
        let ours =
            |range: &IpRange| self.own.iter().any(|a| a.is_ipv4() == ip.is_ipv4() && range.contains(*a));
        for grant in self.netmap().into_iter().flat_map(|map| &map.apps) {
            let (from, to) = (grant.src.iter().any(|r| r.contains(ip)), grant.dst.iter().any(ours));
            if from && to && grant.is_active(now.unix.as_secs()) {
                let values = grant.values.iter().filter_map(|text| serde_json::from_str(text).ok());
                out.entry(grant.name.clone()).or_default().extend(values);
            }
        }
        out
    }

    fn owner(&self, ip: IpAddr) -> Option<Whois> {
        let netmap = self.netmap()?;
        let device = &netmap.device;
        if device.addrs.contains(&ip) {
            return Some(Whois {
                id: device.id,
                name: Some(device.name.clone()),
                user: device.user.clone(),
                tags: device.tags.clone(),
                is_self: true,
                exact: true,
                capabilities: BTreeMap::new(),
            });
        }
        let owner = self.routes.lookup(ip)?;
        let peer = netmap.peers.get(&self.peers.get(owner.peer as usize)?.as_ref()?.id)?;
        Some(Whois {
            id: peer.id,
            name: peer.name.clone(),
            user: peer.user.clone(),
            tags: peer.tags.clone(),
            is_self: false,
            exact: owner.exact,
            capabilities: BTreeMap::new(),
        })
    }

    /// What becomes of connections between here and `dst` on `proto` and `port`, and on what grounds.
    pub fn why(&self, now: Now, dst: IpAddr, proto: u8, port: u16) -> Why {
        let src = self.own.iter().find(|a| a.is_ipv4() == dst.is_ipv4()).copied();
        let filter = self.filter.why(now, src, dst, proto, port);
        let peer = self.owner(dst);
        let path = self.routes.lookup(dst).map(|owner| {
            let (path, rtt) = self.paths.path(owner.peer);
            self.path_status(path, rtt)
        });
        let (reason, text) = match (self.not_in_force(now), &peer) {
            (Some(problem), _) => problem,
            (None, None) => ("not-visible", format!("no device with the address {dst} {NOT_VISIBLE}")),
            (None, Some(who)) if who.is_self => ("self", format!("{dst} is this device's own address")),
            (None, Some(_)) => match filter.egress.outcome {
                Outcome::Allowed => ("allowed", filter.egress.verdict()),
                Outcome::DeniedByRule => ("denied-by-rule", filter.egress.verdict()),
                Outcome::NoRule => ("no-rule", "no rule allows it".to_owned()),
                Outcome::Closed => ("closed", "nothing is allowed at present".to_owned()),
            },
        };
        Why { allowed: reason == "allowed", reason, text, peer, path, filter: Some(filter) }
    }

    /// The same for a name that no peer we know has: there is no address to ask about.
    pub fn why_unknown(&self, now: Now, name: &str) -> Why {
        let (reason, text) = self
            .not_in_force(now)
            .unwrap_or_else(|| ("not-visible", format!("no device called `{name}` {NOT_VISIBLE}")));
        Why { allowed: false, reason, text, peer: None, path: None, filter: None }
    }

    /// Why nothing at all is allowed, if so.
    fn not_in_force(&self, now: Now) -> Option<(&'static str, String)> {
        match self.held.as_ref().map(|h| h.lease_status(now)) {
            None => Some(("no-netmap", "no netmap was received yet, so nothing is allowed".to_owned())),
            Some(LeaseStatus::Ended | LeaseStatus::None) => Some((
                "lease-ended",
                "the lease of everything granted has ended; it is renewed when the coordinator is reached"
                    .to_owned(),
            )),
            Some(LeaseStatus::Valid { .. }) => None,
        }
    }

    fn drop_counters(&self) -> impl Iterator<Item = (String, u64)> {
        let d = &self.drops;
        let p = self.paths.counters();
        let own = [
            ("no-path", d.no_path),
            ("outbox-full", d.outbox_full),
            ("tun-full", d.inbound.tun_full),
            ("handshake-queue-full", self.wg.counters().queued_packets_dropped),
            ("longer-than-mtu", d.too_long),
            ("longer-than-path", d.path_mtu),
            ("queue-delay", d.delayed + d.inbound.delayed),
            ("bad-super-frame", d.bad_frame),
            ("bad-inner-checksum", d.inbound.bad_checksum),
            ("bad-endpoint", d.bad_endpoint),
            ("unknown-protocol", d.unknown_protocol),
            ("unknown-sender", d.unknown_sender),
            ("nothing-granted", d.not_granted),
            ("stun-unexpected", d.stun_unexpected),
            ("notices-full", d.notices),
            ("events-full", d.events + p.events),
            ("unusable-peer-key", d.bad_peers),
            ("probe-unknown", p.probe_unknown),
            ("probe-forged", p.probe_forged),
            ("probe-limited", p.probe_limited),
            ("probe-queue-full", p.probe_queue_full),
            ("candidate-refused", p.candidate_refused),
            ("candidate-replaced", p.candidate_replaced),
            ("ping-replaced", p.ping_replaced),
            ("pong-unexpected", p.pong_unexpected),
            ("guess-refused", p.guess_refused),
            ("presence-full", d.presence),
        ];
        let own = own.into_iter().map(|(name, count)| (name.to_owned(), count));
        let wg = WG_REASONS
            .iter()
            .zip(d.inbound.wireguard)
            .map(|(reason, count)| (format!("wireguard-{reason}"), count));
        let filter = [(Direction::Egress, "egress"), (Direction::Ingress, "ingress")];
        let filter = filter.into_iter().flat_map(|(direction, name)| {
            self.filter
                .counters(direction)
                .drops()
                .map(move |(reason, count)| (format!("{name}-{reason}"), count))
        });
        own.chain(wg).chain(filter)
    }
}

/// Milliseconds with three digits after the point: a clock says no more.
fn millis(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1_000_000.0).round() / 1_000.0
}
