//! Devices that relay for others: who hears of them, who gets tokens for whom, and what they are told themselves.

use std::collections::BTreeSet;

use proptest::prelude::*;
use warren_common::wire::relay_control::{RelayCommand, RelayDuty, RelayOffer};

use super::*;

/// Devices with `tag:a` may use those with `tag:r` as relays; all of `tag:a` and `tag:b` see each other.
const RELAYING: &str = r#"{"tagOwners": {"tag:a": [], "tag:b": [], "tag:r": []},
    "grants": [{"src": ["tag:a"], "dst": ["tag:r"], "app": {"warren/cap/relay": []}},
               {"src": ["tag:a", "tag:b"], "dst": ["tag:a", "tag:b"], "ip": ["*"]}]}"#;
/// The same without the relay.
const NOT_RELAYING: &str = r#"{"tagOwners": {"tag:a": [], "tag:b": [], "tag:r": []},
    "grants": [{"src": ["tag:a", "tag:b"], "dst": ["tag:a", "tag:b"], "ip": ["*"]}]}"#;

impl Lab {
    fn offer(&mut self, n: u8, relays: bool) {
        let relay =
            relays.then(|| RelayOffer { addrs: vec![format!("192.0.2.{n}:3340")], cert_sha256: vec![n; 32] });
        self.say(n, ClientBody::Report(Report { relay, ..Report::default() }));
    }

    /// What an agent was told of relaying itself, and has not read.
    fn told(&self, n: u8) -> (Vec<RelayDuty>, Vec<RelayCommand>) {
        let (mut duties, mut commands) = (vec![], vec![]);
        for body in &self.agents[&n].inbox {
            match body {
                ServerBody::RelayDuty(duty) => duties.push(duty.clone()),
                ServerBody::RelayCommand(command) => commands.push(command.clone()),
                _ => {}
            }
        }
        (duties, commands)
    }

    /// The tokens an agent was sent for that relay, and has not read.
    fn tokens(&self, n: u8, relay: RelayId) -> Vec<RelayToken> {
        let grants = self.agents[&n].inbox.iter().filter_map(|body| match body {
            ServerBody::RelayToken(grant) => grant.token.as_ref(),
            _ => None,
        });
        let tokens = grants.map(|token| RelayToken::verify(token, &self.netmap_key).unwrap());
        tokens.filter(|token| token.relay == relay).collect()
    }

    fn ask_token(&mut self, n: u8, relay: RelayId) {
        let ask = RelayTokenRequest { relay: relay.to_bytes().to_vec() };
        self.say(n, ClientBody::RelayToken(ask));
    }

    fn peer_relays(&self, n: u8) -> Vec<RelayId> {
        let relays = self.agents[&n].netmap.iter().flat_map(|netmap| netmap.relays.values());
        relays.filter(|relay| relay.peer).map(|relay| relay.id).collect()
    }

    fn read_all(&mut self) {
        (0..3).for_each(|_| {
            self.agents.keys().copied().collect::<Vec<_>>().into_iter().for_each(|n| self.read(n))
        });
    }
}

/// Agents 1 and 2 may use 9 as a relay, which offers it; 3 may not.
fn relaying() -> (Lab, RelayId) {
    let mut lab = Lab::new();
    let keys = ["tag:a", "tag:b", "tag:r"].map(|tag| lab.tag_key(tag));
    lab.policy(RELAYING);
    for (n, key) in [(1, 0), (2, 0), (3, 1), (9, 2)] {
        lab.join(n, &keys[key]);
    }
    lab.offer(9, true);
    let device = lab.agents[&9].device.unwrap();
    let relay = lab.coordinator.state().device(device).unwrap().relay_id();
    (lab, relay)
}

#[test]
fn a_device_that_offers_and_is_granted_serves_and_those_in_the_grant_hear_of_it() {
    let (mut lab, relay) = relaying();
    let (duties, commands) = lab.told(9);
    assert_eq!((duties.len(), commands.len()), (1, 0));
    assert_eq!(duties[0].relay, relay.to_bytes());
    assert!(duties[0].floor > 0);
    lab.read_all();
    assert_eq!((lab.peer_relays(1), lab.peer_relays(2)), (vec![relay], vec![relay]));
    assert!(lab.peer_relays(3).is_empty() && lab.peer_relays(9).is_empty());
    let entry = lab.agents[&1].netmap.as_ref().unwrap().relays[&relay].clone();
    assert_eq!((entry.addrs, entry.cert_sha256), (vec!["192.0.2.9:3340".parse().unwrap()], [9; 32]));
    assert!(entry.stun.is_empty() && !entry.name.contains("host9"));
    // Neither end alone makes it so.
    lab.policy(NOT_RELAYING);
    assert_eq!(lab.told(9).0.last().unwrap().relay, [0u8; 0]);
    lab.read_all();
    assert!(lab.peer_relays(1).is_empty());
    lab.policy(RELAYING);
    lab.offer(9, false);
    lab.read_all();
    assert!(lab.peer_relays(1).is_empty());
}

#[test]
fn a_token_names_only_peers_that_know_of_the_relay() {
    let (mut lab, relay) = relaying();
    lab.read_all();
    let two = lab.agents[&2].device.unwrap();
    lab.ask_token(1, relay);
    assert_eq!(lab.tokens(1, relay).remove(0).peers, [two]);
    // Who has no grant gets none, and neither does the relay itself.
    for n in [3, 9] {
        lab.ask_token(n, relay);
        assert!(lab.tokens(n, relay).is_empty());
    }
    // A device that comes into the grant is named at once in the tokens of its peers.
    lab.read_all();
    let key = lab.tag_key("tag:a");
    let four = lab.join(4, &key);
    let tokens = lab.tokens(1, relay);
    assert!(tokens.last().is_some_and(|token| token.peers.contains(&four)), "{tokens:?}");
}

#[test]
fn who_loses_the_grant_is_cut_at_the_relay_and_loses_it_from_the_netmap_first() {
    let (mut lab, relay) = relaying();
    lab.read_all();
    lab.ask_token(1, relay);
    let token = lab.tokens(1, relay).remove(0);
    lab.read_all();
    let (one, two) = (lab.agents[&1].device.unwrap(), lab.agents[&2].device.unwrap());
    // The other stays, so the relay goes on: it hears of the one alone, and so does no relay of its own.
    let others = lab.minimums.len();
    let only_two = RELAYING.replace(
        r#"{"src": ["tag:a"], "dst": ["tag:r"]"#,
        &format!(r#"{{"src": ["{}"], "dst": ["tag:r"]"#, lab.coordinator.state().device(two).unwrap().ipv4),
    );
    lab.policy(&only_two);
    let (duties, commands) = lab.told(9);
    assert!(duties.is_empty());
    let cut = commands.last().unwrap();
    assert_eq!(cut.minimums.iter().map(|m| m.device.clone()).collect::<Vec<_>>(), [one.to_bytes()]);
    assert!(cut.revoked.is_empty() && cut.minimums[0].revision > token.revision);
    assert_eq!(lab.minimums.len(), others);
    lab.ask_token(1, relay);
    assert!(lab.tokens(1, relay).is_empty(), "before it has heard of it");
    lab.read_all();
    assert_eq!((lab.peer_relays(1), lab.peer_relays(2)), (vec![], vec![relay]));
    // Out of the network: revoked there.
    lab.command(Command::RemoveDevice(two)).unwrap();
    let revoked = lab.told(9).1.last().unwrap().revoked.clone();
    assert_eq!(revoked, [two.to_bytes()]);
}

#[test]
fn a_relaying_device_hears_of_its_users_only_and_gets_a_floor_with_each_session() {
    let (mut lab, relay) = relaying();
    lab.read_all();
    // 3 goes, whom the relay must not learn of: its users 1 and 2 lose a peer.
    let three = lab.agents[&3].device.unwrap();
    let users: BTreeSet<_> = [1, 2].map(|n| lab.agents[&n].device.unwrap().to_bytes().to_vec()).into();
    lab.command(Command::RemoveDevice(three)).unwrap();
    let command = lab.told(9).1.remove(0);
    assert!(command.revoked.is_empty());
    assert_eq!(command.minimums.iter().map(|m| m.device.clone()).collect::<BTreeSet<_>>(), users);
    lab.disconnect(9);
    let one = lab.agents[&1].device.unwrap();
    lab.command(Command::RemoveDevice(one)).unwrap();
    lab.resume(9);
    lab.read(9);
    assert_eq!(lab.told(9), (vec![], vec![]), "nothing before it offers");
    lab.offer(9, true);
    let duty = lab.told(9).0.remove(0);
    assert_eq!(duty.relay, relay.to_bytes());
    assert!(duty.floor > command.revision);
}

#[derive(Clone, Debug)]
enum Step {
    Offer(u8, bool),
    Policy(bool),
    Remove(u8),
    Expire(u8),
    Join(u8),
    Disconnect(u8),
    Read(u8),
    Token(u8),
    Pass(u16),
}

fn step() -> impl Strategy<Value = Step> {
    let agent = 1..10u8;
    prop_oneof![
        4 => (agent.clone(), any::<bool>()).prop_map(|(n, relays)| Step::Offer(n, relays)),
        3 => any::<bool>().prop_map(Step::Policy),
        1 => agent.clone().prop_map(Step::Remove),
        1 => agent.clone().prop_map(Step::Expire),
        4 => agent.clone().prop_map(Step::Join),
        1 => agent.clone().prop_map(Step::Disconnect),
        5 => agent.clone().prop_map(Step::Read),
        3 => agent.prop_map(Step::Token),
        1 => (0..1_000u16).prop_map(Step::Pass),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Promise 3: whatever happens, and however slowly agents read, no netmap lists a relay that its device has no grant
    /// for at the time when it is made; and no token is for such a relay, or names somebody who does not know of it.
    #[test]
    fn no_netmap_lists_a_relay_without_a_grant(steps in prop::collection::vec(step(), 1..80)) {
        let mut lab = Lab::new();
        let keys = ["tag:a", "tag:b", "tag:r"].map(|tag| lab.tag_key(tag));
        let tag_of = |n: u8| ["tag:a", "tag:b", "tag:r"][usize::from(n % 3)];
        let mut granted = false;
        for step in steps {
            let live = |lab: &Lab, n: u8| lab.agents.get(&n).is_some_and(|a| a.session.is_some() && a.closed.is_none());
            let id = |lab: &Lab, n: u8| lab.coordinator.state().device_by_control(&ControlPublicKey::from_bytes([n; 32])).map(|d| d.id);
            match step {
                Step::Offer(n, relays) => if live(&lab, n) { lab.offer(n, relays) },
                Step::Policy(relays) => {
                    granted = relays;
                    lab.policy(if relays { RELAYING } else { NOT_RELAYING });
                }
                Step::Remove(n) => if let Some(id) = id(&lab, n) { lab.command(Command::RemoveDevice(id)).unwrap(); },
                Step::Expire(n) => if let Some(id) = id(&lab, n) { lab.command(Command::ExpireDevice(id)).unwrap(); },
                Step::Join(n) => {
                    if id(&lab, n).is_none() {
                        lab.agents.remove(&n);
                    }
                    lab.enroll(n, &keys[usize::from(n % 3)]);
                }
                Step::Disconnect(n) => lab.disconnect(n),
                Step::Read(n) => if lab.agents.contains_key(&n) { lab.read(n) },
                Step::Token(n) => {
                    let relays: Vec<RelayId> = lab.coordinator.peer_relays().serving().map(|(_, r, _)| r.id).collect();
                    for relay in relays {
                        if live(&lab, n) {
                            lab.ask_token(n, relay);
                        }
                    }
                }
                Step::Pass(seconds) => lab.pass(Duration::from_secs(seconds.into())),
            }
            let state = lab.coordinator.state();
            let may = |device: DeviceId| granted && state.device(device).is_some_and(|d| d.tags == ["tag:a"]);
            let offers = |relay: RelayId| state.devices().values().any(|d| {
                d.relay_id() == relay && d.relay.is_some() && d.tags == ["tag:r"]
                    && state.device_state(d) == DeviceState::Active
            });
            for device in state.devices().keys() {
                let netmap = lab.coordinator.netmap(*device);
                for relay in netmap.iter().flat_map(|netmap| netmap.relays.values()).filter(|relay| relay.peer) {
                    prop_assert!(may(*device) && offers(relay.id), "{device} is told of {}", relay.id);
                }
            }
            // The newest token of each, at the moment when it is made.
            if let Step::Token(n) = step {
                let newest = lab.agents.get(&n).and_then(|a| a.inbox.back());
                if let Some(ServerBody::RelayToken(grant)) = newest {
                    let token = RelayToken::verify(grant.token.as_ref().unwrap(), &lab.netmap_key).unwrap();
                    if token.revision == lab.coordinator.revision() {
                        prop_assert!(tag_of(n) == "tag:a");
                        prop_assert!(token.peers.iter().all(|peer| state.device(*peer).is_none_or(|d| d.tags == ["tag:a"])));
                    }
                }
            }
        }
        // Those who read what they were sent hold just that.
        for n in lab.agents.keys().copied().collect::<Vec<_>>() {
            lab.read(n);
        }
        for agent in lab.agents.values().filter(|a| a.session.is_some() && a.closed.is_none()) {
            if let Some(device) = agent.device.filter(|d| lab.coordinator.is_online(*d)) {
                let want = lab.coordinator.netmap(device);
                prop_assert_eq!(agent.netmap.as_ref(), want.as_ref());
            }
        }
    }
}
