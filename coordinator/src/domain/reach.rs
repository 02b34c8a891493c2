//! What the policy in force makes of the network: per device, whom it needs to know and what its filter is.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use warren_common::filter::{IpRange, RuleId};
use warren_common::ids::DeviceId;
use warren_common::netmap::{AppGrant, MAX_APPS, MAX_ATTRS, Netmap, Network, Peer, Relay, SelfDevice};
use warren_common::policy::{Compiled, Diagnostic, Inventory, IpSet, Need, Node, Policy, User, compile};
use warren_common::time::UnixTime;

use super::State;
use super::entity::{Device, DeviceState, RelayRecord};
use super::peer_relay::{PeerRelays, RelayDifference};
use super::records::PeerRecords;
use crate::parallel::side_by_side;

/// How far ahead time windows are worked out: the longest lease and a day, so that an agent that hears nothing for as
/// long as its lease lasts still opens and closes them on time. Unit: seconds.
pub const HORIZON_S: i64 = 8 * 24 * 3_600;

type Peers = BTreeMap<DeviceId, Need>;

/// The policy compiled against the active devices. Devices that are not among them reach nothing.
#[derive(Clone, Debug)]
pub struct Reach {
    compiled: Compiled,
    peers: BTreeMap<DeviceId, Arc<Peers>>,
    relays: PeerRelays,
    /// Why the policy in force could not be compiled; nothing is allowed then.
    error: Option<String>,
}

/// What following a change has touched.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Difference {
    /// Devices whose netmap may be another one.
    pub touched: BTreeSet<DeviceId>,
    /// Devices that no longer see some device they saw, and are still active.
    pub lost: BTreeSet<DeviceId>,
    /// Devices that are no longer active.
    pub out: BTreeSet<DeviceId>,
    /// Who may use which peer relay.
    pub relays: RelayDifference,
}

impl Reach {
    /// Compiles the policy in force against the devices that are active at `now`.
    pub fn compute(state: &State, now: UnixTime) -> Self {
        let (compiled, error) = compile_in_force(state, now);
        let ids = compiled.names().filter_map(|n| n.parse().ok()).collect();
        let peers = side_by_side(ids, |id: DeviceId| (id, peers_of(&compiled, id))).into_iter().collect();
        let mut relays = PeerRelays::default();
        relays.follow(state, &compiled, offering(state), now);
        Self { compiled, peers, relays, error }
    }

    /// Compiles anew: the policy, its users or the time are others. What stays is kept.
    pub fn recompute(&mut self, state: &State, now: UnixTime) -> Difference {
        let (compiled, error) = compile_in_force(state, now);
        let old = std::mem::replace(&mut self.compiled, compiled);
        self.error = error;
        let changed = self.compiled.changed_since(&old);
        let mut difference = self.meet(changed.iter().filter_map(|n| n.parse().ok()));
        // All of them, since a window of a grant may have opened or closed and changed nothing else.
        let served: Vec<DeviceId> = self.relays.serving().map(|(device, ..)| device).collect();
        let all: BTreeSet<DeviceId> = offering(state).chain(served).collect();
        difference.relays = self.relays.follow(state, &self.compiled, all, now);
        difference
    }

    /// Why the policy in force could not be compiled.
    pub fn error(&self) -> Option<&str> {
        self.error.as_deref()
    }

    /// Where a rule stands in the policy in force, `grants[3] line 41`.
    pub fn origin_of(&self, rule: RuleId) -> Option<&str> {
        self.compiled.origin_of(rule)
    }

    /// Where a staged rule stands in the policy in force; `None` for any other rule.
    pub fn staged_origin_of(&self, rule: RuleId) -> Option<&str> {
        self.compiled.staged_origin_of(rule)
    }

    /// When it must be computed again though nothing changed, in seconds since the Unix epoch.
    pub fn reevaluate_at(&self) -> Option<i64> {
        self.compiled.reevaluate_at()
    }

    /// The devices that serve as relays, and for whom.
    pub const fn relays(&self) -> &PeerRelays {
        &self.relays
    }

    /// Whom an active device needs to know; symmetric. `None` for a device that is not active.
    pub fn peers(&self, id: DeviceId) -> Option<&BTreeMap<DeviceId, Need>> {
        self.peers.get(&id).map(Arc::as_ref)
    }

    /// Follows changes of single devices: what policy knows of them is in `state` already, and what those in `offers`
    /// offer as relays.
    pub fn follow(
        &mut self,
        state: &State,
        devices: &BTreeSet<DeviceId>,
        offers: &BTreeSet<DeviceId>,
        now: UnixTime,
    ) -> Difference {
        let mut names = BTreeSet::new();
        // Leaving devices first: an address may pass from one to another in one batch.
        let (stay, leave): (Vec<&DeviceId>, Vec<&DeviceId>) =
            devices.iter().partition(|id| active(state, **id).is_some());
        for id in leave.into_iter().chain(stay) {
            let node = active(state, *id).map(|device| node(state, device));
            match self.compiled.set_node(&id.to_string(), node.as_ref(), now.as_secs()) {
                Ok(changed) => names.extend(changed),
                Err(conflict) => {
                    tracing::error!(%conflict, "the state has an address twice; compiling anew");
                    return self.recompute(state, now);
                }
            }
        }
        let ids: BTreeSet<DeviceId> = names.iter().filter_map(|n| n.parse().ok()).collect();
        // A device whose users are others is told so, and is among those whose policy has changed.
        let offers_now = |id: &DeviceId| state.device(*id).is_none_or(|d| d.relay.is_some());
        let told = ids.iter().chain(devices).filter(|id| offers_now(id));
        let relays: BTreeSet<DeviceId> = told.chain(offers).copied().collect();
        let mut difference = self.meet(ids);
        difference.relays = self.relays.follow(state, &self.compiled, relays, now);
        difference
    }

    /// Works out whom these devices need to know now.
    fn meet(&mut self, ids: impl IntoIterator<Item = DeviceId>) -> Difference {
        let compiled = &self.compiled;
        let meets: Vec<(DeviceId, Option<Arc<Peers>>)> =
            side_by_side(ids.into_iter().collect(), |id: DeviceId| {
                (id, compiled.fingerprint(&id.to_string()).map(|_| peers_of(compiled, id)))
            });
        let mut difference = Difference::default();
        for (id, new) in meets {
            let old = match new {
                Some(peers) => self.peers.insert(id, peers),
                None => self.peers.remove(&id),
            };
            difference.note(id, old.as_ref(), self.peers.get(&id));
        }
        difference
    }

    /// The netmap of `id`, with the `records` of its peers; `None` unless it is an active device.
    pub fn netmap(&self, state: &State, id: DeviceId, records: &PeerRecords) -> Option<Netmap> {
        let (device, peers) = (state.device(id)?, self.peers.get(&id)?);
        let name = id.to_string();
        let settings = state.settings();
        let peers: BTreeMap<DeviceId, Arc<Peer>> = peers
            .iter()
            .filter_map(|(id, need)| Some((*id, records.get(state, state.device(*id)?, need))))
            .collect();
        let apps = self.apps(&name, &peers);
        let own_relays = state.relays().values().filter_map(relay_record);
        Some(Netmap {
            network: Network {
                id: settings.network,
                name: settings.name.clone(),
                ipv4: settings.ipv4,
                ipv6: settings.ipv6,
            },
            device: SelfDevice {
                id,
                name: device.name.clone(),
                addrs: device.addrs().to_vec(),
                user: email_of(state, device).map(str::to_owned),
                tags: device.tags.clone(),
                attrs: self.compiled.attributes(&name).into_iter().take(MAX_ATTRS).collect(),
            },
            peers,
            ingress: self.compiled.ingress(&name).into_iter().collect(),
            egress: self.compiled.egress(&name).into_iter().collect(),
            relays: own_relays.chain(self.relays.listed_for(id).cloned()).map(|r| (r.id, r)).collect(),
            apps,
        })
    }

    /// The capabilities that those whom the device knows have at it. Of others it need not learn, since they can't get to
    /// its applications.
    fn apps(&self, name: &str, peers: &BTreeMap<DeviceId, Arc<Peer>>) -> BTreeSet<AppGrant> {
        let capabilities = self.compiled.capabilities(name);
        if capabilities.is_empty() {
            return BTreeSet::new();
        }
        let addrs = peers.values().flat_map(|p| p.addrs.iter().copied().map(IpRange::from));
        let routes = peers.values().flat_map(|p| p.routes.iter().copied().map(IpRange::from));
        let known: IpSet = addrs.chain(routes).collect();
        let grants = capabilities.into_iter().map(|cap| AppGrant {
            id: cap.id,
            name: cap.name,
            src: cap.src.into_iter().collect::<IpSet>().intersect(&known).to_ranges(),
            dst: cap.dst,
            values: cap.values.iter().map(ToString::to_string).collect(),
            active: cap.active,
        });
        grants.filter(|grant| !grant.src.is_empty()).take(MAX_APPS).collect()
    }
}

impl Difference {
    fn note(&mut self, id: DeviceId, old: Option<&Arc<Peers>>, new: Option<&Arc<Peers>>) {
        self.touched.insert(id);
        match (old, new) {
            (Some(_), None) => {
                self.out.insert(id);
            }
            (Some(old), Some(new)) if old.keys().any(|p| !new.contains_key(p)) => {
                self.lost.insert(id);
            }
            _ => {}
        }
    }
}

/// Compiles the policy in force against the active devices; with why not, if that failed.
fn compile_in_force(state: &State, now: UnixTime) -> (Compiled, Option<String>) {
    let text = state.policy().map_or("{}", |p| p.text.as_str());
    let inventory = inventory(state);
    let compiled = Policy::parse(text)
        .and_then(|policy| compile(&policy, &inventory, now.as_secs(), HORIZON_S))
        .map_err(|found| render("policy", &found));
    match compiled {
        Ok(compiled) => (compiled, None),
        // Accepted once, so only a state that no command makes gets here. Nothing is allowed then.
        Err(error) => {
            let empty = compile(&Policy::empty(), &inventory, now.as_secs(), HORIZON_S);
            (empty.unwrap_or_else(|_| nothing(now)), Some(error))
        }
    }
}

/// Checks that `text`, which messages call `name`, is a policy that can be put in force over `state`, its own tests
/// included.
///
/// # Errors
/// What is wrong with it, for people, over several lines.
pub fn check(state: &State, name: &str, text: &str, now: UnixTime) -> Result<(), String> {
    let policy = Policy::parse(text).map_err(|found| render(name, &found))?;
    let mut inventory = inventory(state);
    inventory.own_domains = domains(state, "");
    let compiled = compile(&policy, &inventory, now.as_secs(), 0).map_err(|found| render(name, &found))?;
    let failures: Vec<String> = compiled
        .run_tests()
        .results
        .iter()
        .flat_map(|test| {
            test.failures.iter().map(move |why| format!("{} (line {}): {why}", test.name, test.line))
        })
        .collect();
    if failures.is_empty() { Ok(()) } else { Err(failures.join("\n")) }
}

fn render(name: &str, found: &[Diagnostic]) -> String {
    found.iter().map(|d| d.render(name)).collect::<Vec<_>>().join("\n")
}

#[expect(clippy::expect_used, reason = "an empty policy over no devices has nothing that could conflict")]
fn nothing(now: UnixTime) -> Compiled {
    compile(&Policy::empty(), &Inventory::default(), now.as_secs(), HORIZON_S).expect("nothing conflicts")
}

fn active(state: &State, id: DeviceId) -> Option<&Device> {
    state.device(id).filter(|d| state.device_state(d) == DeviceState::Active)
}

fn offering(state: &State) -> impl Iterator<Item = DeviceId> {
    state.devices().values().filter(|d| d.relay.is_some()).map(|d| d.id)
}

fn peers_of(compiled: &Compiled, id: DeviceId) -> Arc<Peers> {
    let peers = compiled.peers(&id.to_string()).unwrap_or_default();
    Arc::new(peers.into_iter().filter_map(|(name, need)| Some((name.parse().ok()?, need))).collect())
}

/// The network as the policy compiler wants it: active devices by their id.
fn inventory(state: &State) -> Inventory {
    let devices = state.devices().values().filter(|d| state.device_state(d) == DeviceState::Active);
    Inventory {
        users: state
            .users()
            .values()
            .map(|u| User {
                id: u.id.to_string(),
                name: u.email.clone(),
                email: Some(u.email.clone()),
                ..User::default()
            })
            .collect(),
        nodes: devices.map(|d| (d.id.to_string(), node(state, d))).collect(),
        own_domains: domains(state, state.policy().map_or("", |p| p.text.as_str())),
        // What no policy approves nobody approves yet: there is no approval by hand.
        auto_approve: true,
    }
}

/// The network as policy tools take it: devices by their name.
pub fn export(state: &State) -> Inventory {
    let inventory = inventory(state);
    let name = |id: &str| state.device(id.parse().ok()?).map(|d| d.name.clone());
    let nodes = inventory.nodes.into_iter().filter_map(|(id, node)| Some((name(&id)?, node))).collect();
    Inventory { nodes, ..inventory }
}

/// The mail domains of the network: those of its users. A policy in force keeps those that it names after its last user
/// there has gone, since it was accepted with them.
fn domains(state: &State, in_force: &str) -> BTreeSet<String> {
    let users = state.users().values().filter_map(|u| Some(u.email.rsplit_once('@')?.1.to_owned()));
    let named = in_force.split("*@").skip(1).map(|rest| {
        rest.chars().take_while(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-')).collect::<String>()
    });
    users.chain(named.map(|d| d.to_ascii_lowercase())).filter(|d| !d.is_empty()).collect()
}

fn node(state: &State, device: &Device) -> Node {
    Node {
        hostname: device.name.clone(),
        user: device.user.map(|id| id.to_string()).filter(|_| email_of(state, device).is_some()),
        tags: device.tags.iter().cloned().collect(),
        ipv4: Some(device.ipv4.into()),
        ipv6: Some(device.ipv6.into()),
        routable_ips: device.routes.iter().copied().collect(),
        ..Node::default()
    }
}

pub(super) fn email_of<'s>(state: &'s State, device: &Device) -> Option<&'s str> {
    device.user.and_then(|id| state.users().get(&id)).map(|u| u.email.as_str())
}

/// A relay as devices see it; `None` until it has said where it is.
fn relay_record(relay: &RelayRecord) -> Option<Relay> {
    let cert_sha256 = relay.cert_sha256.filter(|_| !relay.addrs.is_empty())?;
    Some(Relay {
        id: relay.id,
        name: relay.name.clone(),
        addrs: relay.addrs.clone(),
        stun: relay.stun.clone(),
        cert_sha256,
        peer: false,
    })
}
