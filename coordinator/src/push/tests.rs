use std::collections::{BTreeMap, VecDeque};

use rand_chacha::ChaCha20Rng;
use rand_core::SeedableRng;
use warren_common::auth_key::AuthKey;
use warren_common::ids::{AuthKeyId, NetworkId};
use warren_common::keys::{Fingerprint, NetmapPublicKey};
use warren_common::netmap::Netmap;
use warren_common::wire::control::{
    Ack, ClientBody, ConfirmGeneration, Empty, Enroll, NetmapUpdate, Ping, RelayTokenRequest, Report, Resume,
    Signal, Signed, UpdateKind,
};
use warren_common::wire::token::RelayToken;

use super::*;
use crate::domain::{NewAuthKey, PolicySource, Settings};

mod peer_relay;
mod properties;
mod verdicts;

const ALL: &str = r#"{"acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}]}"#;
const A_TO_B: &str = r#"{"tagOwners": {"tag:a": [], "tag:b": []},
    "acls": [{"action": "accept", "src": ["tag:a"], "dst": ["tag:b:22"]}]}"#;
const B_TO_A: &str = r#"{"tagOwners": {"tag:a": [], "tag:b": []},
    "acls": [{"action": "accept", "src": ["tag:b"], "dst": ["tag:a:80"]},
             {"action": "accept", "src": ["autogroup:member"], "dst": ["tag:a:*"]}]}"#;
const POLICIES: [&str; 4] = ["{}", ALL, A_TO_B, B_TO_A];
const LEASE: Duration = Duration::from_secs(3_600);

/// An agent as strict as a real one: what it holds, and what it was sent but has not read.
#[derive(Default)]
struct Agent {
    control: u8,
    session: Option<SessionId>,
    device: Option<DeviceId>,
    generation: u64,
    revision: u64,
    netmap: Option<Netmap>,
    inbox: VecDeque<ServerBody>,
    updates: Vec<NetmapUpdate>,
    refused: Option<String>,
    closed: Option<CloseReason>,
}

struct Lab {
    coordinator: Coordinator,
    netmap_key: NetmapPublicKey,
    agents: BTreeMap<u8, Agent>,
    rng: ChaCha20Rng,
    now: Now,
    sessions: u64,
    tickets: u64,
    minimums: Vec<(u64, Vec<DeviceId>, Vec<DeviceId>)>,
}

impl Lab {
    fn new() -> Self {
        let settings = Settings {
            network: NetworkId::from_bytes([1; 16]),
            name: "test".into(),
            root: Fingerprint::from_bytes([2; 32]),
            ipv4: "100.64.0.0/10".parse().unwrap(),
            ipv6: "fd00::/48".parse().unwrap(),
            epoch: 1,
            revisions_reserved: 0,
        };
        let now = Now { boot: Instant::ZERO, unix: warren_common::time::UnixTime::from_secs(1_000_000_000) };
        let key = NetmapSecretKey::from_bytes([7; 32]);
        let netmap_key = key.public();
        let coordinator =
            Coordinator::new(Config { netmap_key: key, lease: LEASE }, State::new(settings), now);
        let (rng, agents) = (ChaCha20Rng::seed_from_u64(1), BTreeMap::new());
        Self { coordinator, netmap_key, agents, rng, now, sessions: 0, tickets: 0, minimums: Vec::new() }
    }

    /// Saves everything and delivers what comes out.
    fn settle(&mut self) {
        while let Some(command) = self.coordinator.poll_command() {
            self.coordinator.submit(Origin::Internal, command, self.now, &mut self.rng);
        }
        if self.coordinator.has_batch() {
            self.coordinator.saved(self.now);
        }
        self.deliver();
    }

    fn deliver(&mut self) {
        while let Some(output) = self.coordinator.poll_output() {
            match output {
                Output::Send { session, message } => {
                    if let Some(agent) = self.by_session(session) {
                        agent.inbox.push_back(*message);
                    }
                }
                Output::Close { session, reason } => {
                    if let Some(agent) = self.by_session(session) {
                        agent.closed = Some(reason);
                    }
                }
                Output::RelayMinimum { revision, devices, revoked } => {
                    self.minimums.push((revision, devices, revoked));
                }
                Output::Reply { .. } | Output::RelayRemoved(_) => {}
            }
        }
    }

    fn by_session(&mut self, id: SessionId) -> Option<&mut Agent> {
        self.agents.values_mut().find(|a| a.session == Some(id))
    }

    fn command(&mut self, command: Command) -> Result<Reply, Refusal> {
        self.tickets += 1;
        let ticket = self.tickets;
        self.coordinator.submit(Origin::Ticket(ticket), command, self.now, &mut self.rng);
        self.coordinator.saved(self.now);
        let mut reply = None;
        let mut others = VecDeque::new();
        while let Some(output) = self.coordinator.poll_output() {
            match output {
                Output::Reply { ticket: t, result } if t == ticket => reply = Some(result),
                other => others.push_back(other),
            }
        }
        self.coordinator.outputs = others;
        self.settle();
        reply.expect("a ticket is answered")
    }

    fn policy(&mut self, text: &str) {
        self.command(Command::SetPolicy { source: PolicySource::Api, text: text.into() }).unwrap();
    }

    fn key(&mut self, new: NewAuthKey) -> AuthKey {
        match self.command(Command::CreateAuthKey(new)) {
            Ok(Reply::AuthKey(key)) => key,
            other => panic!("{other:?}"),
        }
    }

    fn tag_key(&mut self, tag: &str) -> AuthKey {
        self.key(NewAuthKey { tags: vec![tag.into()], reusable: true, ..NewAuthKey::default() })
    }

    fn connect(&mut self, n: u8) {
        self.sessions += 1;
        let id = SessionId(self.sessions);
        self.coordinator.connect(id, ControlPublicKey::from_bytes([n; 32]), self.now).unwrap();
        let agent = self.agents.entry(n).or_insert_with(|| Agent { control: n, ..Agent::default() });
        agent.session = Some(id);
        agent.inbox.clear();
        (agent.refused, agent.closed) = (None, None);
    }

    fn say(&mut self, n: u8, body: ClientBody) {
        if let Some(session) = self.agents[&n].session {
            self.coordinator.handle(session, body, self.now, &mut self.rng);
            self.settle();
        }
    }

    fn enroll(&mut self, n: u8, key: &AuthKey) {
        self.connect(n);
        let enroll = Enroll {
            auth_key: key.expose(),
            hostname: format!("host{n}"),
            wg: vec![n; 32],
            probe: vec![n; 32],
            os: "linux".into(),
            version: "0".into(),
        };
        self.say(n, ClientBody::Enroll(enroll));
    }

    fn join(&mut self, n: u8, key: &AuthKey) -> DeviceId {
        self.enroll(n, key);
        self.read(n);
        self.agents[&n].device.unwrap()
    }

    fn resume(&mut self, n: u8) {
        self.connect(n);
        let agent = &self.agents[&n];
        let Some(device) = agent.device else { return };
        let resume = Resume {
            device: device.to_bytes().to_vec(),
            generation: agent.generation,
            epoch: 1,
            revision: agent.revision,
            hash: agent.netmap.as_ref().map_or_else(Vec::new, |m| m.hash().to_vec()),
            version: "0".into(),
        };
        self.say(n, ClientBody::Resume(resume));
    }

    fn disconnect(&mut self, n: u8) {
        if let Some(session) = self.agents.get_mut(&n).and_then(|a| a.session.take()) {
            self.coordinator.disconnect(session, self.now);
            self.settle();
        }
    }

    /// The agent reads everything there is and acknowledges it, until nothing more comes.
    fn read(&mut self, n: u8) {
        while self.read_one(n) {}
    }

    fn read_one(&mut self, n: u8) -> bool {
        let key = self.netmap_key;
        let agent = self.agents.get_mut(&n).unwrap();
        let Some(body) = agent.inbox.pop_front() else { return false };
        let answer = match body {
            ServerBody::Welcome(welcome) => {
                agent.device = DeviceId::from_slice(&welcome.device);
                agent.generation = welcome.generation;
                Some(ClientBody::ConfirmGeneration(ConfirmGeneration { generation: welcome.generation }))
            }
            ServerBody::Update(signed) => Some(ClientBody::Ack(agent.apply(&signed, &key))),
            ServerBody::Refused(refused) => {
                agent.refused = Some(refused.code);
                None
            }
            _ => None,
        };
        if let Some(answer) = answer {
            self.say(n, answer);
        }
        true
    }

    fn pass(&mut self, time: Duration) {
        self.now = self.now + time;
        self.coordinator.handle_timeout(self.now);
        self.settle();
    }
}

impl Agent {
    fn apply(&mut self, signed: &Signed, key: &NetmapPublicKey) -> Ack {
        let update = NetmapUpdate::verify(signed, key).unwrap();
        assert_eq!(update.device_key, ControlPublicKey::from_bytes([self.control; 32]));
        assert_eq!(Some(update.device), self.device);
        assert!(update.to >= self.revision, "an older update");
        let netmap = match &update.kind {
            UpdateKind::Snapshot(netmap) => netmap.as_ref().clone(),
            UpdateKind::Delta(delta) => {
                assert_eq!(update.from, self.revision);
                let mut netmap = self.netmap.clone().unwrap();
                netmap.apply(delta.as_ref().clone());
                netmap
            }
            UpdateKind::Lease => self.netmap.clone().unwrap(),
        };
        assert_eq!(netmap.hash(), update.hash);
        self.revision = update.to;
        self.netmap = Some(netmap);
        self.updates.push(update);
        Ack { epoch: 1, revision: self.revision, want_snapshot: false, reason: String::new() }
    }

    fn peers(&self) -> Vec<DeviceId> {
        self.netmap.as_ref().map_or_else(Vec::new, |n| n.peers.keys().copied().collect())
    }
}

#[test]
fn suspending_cuts_live_devices_and_restoring_lets_them_back() {
    let mut lab = Lab::new();
    lab.policy(ALL);
    let server_key = lab.tag_key("tag:a");
    let ann = NewAuthKey { user: Some("ann@x.org".into()), reusable: true, ..NewAuthKey::default() };
    let ann_key = lab.key(ann);
    lab.join(1, &server_key);
    let laptop = lab.join(2, &ann_key);
    lab.read(1);
    assert_eq!(lab.agents[&1].peers(), [laptop]);
    let user = lab.coordinator.state().user_by_email("ann@x.org").unwrap().id;
    for _ in 0..2 {
        lab.command(Command::SuspendUser { user, suspended: true }).unwrap();
        lab.read(1);
        lab.read(2);
        assert!(lab.agents[&1].peers().is_empty() && lab.agents[&2].peers().is_empty());
        assert_eq!(lab.agents[&2].closed, Some(CloseReason::Refused));
        lab.command(Command::SuspendUser { user, suspended: false }).unwrap();
        lab.read(1);
        assert_eq!(lab.agents[&1].peers(), [laptop]);
        lab.resume(2);
        lab.read(2);
        assert_eq!(lab.agents[&2].peers().len(), 1);
    }
    lab.command(Command::ExpireDevice(laptop)).unwrap();
    lab.read(1);
    lab.read(2);
    assert!(lab.agents[&1].peers().is_empty() && lab.agents[&2].peers().is_empty());
    assert_eq!(lab.agents[&2].refused.as_deref(), Some("needs-login"));
}

#[test]
fn what_waits_for_an_acknowledgement_follows_it() {
    let mut lab = Lab::new();
    lab.policy(ALL);
    let key = lab.tag_key("tag:a");
    let ann = NewAuthKey { user: Some("ann@x.org".into()), reusable: true, ..NewAuthKey::default() };
    let ann_key = lab.key(ann);
    lab.join(1, &key);
    let laptop = lab.join(2, &ann_key);
    lab.read(1);
    let user = lab.coordinator.state().user_by_email("ann@x.org").unwrap().id;
    lab.command(Command::SuspendUser { user, suspended: true }).unwrap();
    lab.read_one(1);
    lab.command(Command::SuspendUser { user, suspended: false }).unwrap();
    lab.read(1);
    assert_eq!(lab.agents[&1].peers(), [laptop]);
}

#[test]
fn leases_are_renewed_at_a_third() {
    let mut lab = Lab::new();
    let key = lab.tag_key("tag:a");
    lab.join(1, &key);
    for _ in 0..5 {
        lab.pass(LEASE / 3 - Duration::from_secs(1));
        assert!(lab.agents[&1].inbox.is_empty());
        lab.pass(Duration::from_secs(1));
        lab.read(1);
        let last = lab.agents[&1].updates.last().unwrap();
        assert_eq!((&last.kind, last.from), (&UpdateKind::Lease, last.to));
        assert_eq!(u128::from(last.lease_ms), LEASE.as_millis());
    }
    assert_eq!(lab.coordinator.stats().leases, 5);
}

#[test]
fn a_slow_agent_gets_one_newer_delta_and_removals_run_ahead() {
    let mut lab = Lab::new();
    let (a, b) = (lab.tag_key("tag:a"), lab.tag_key("tag:b"));
    lab.policy(ALL);
    lab.join(1, &a);
    lab.join(2, &b);
    // Agent 1 reads nothing while many join.
    for n in 3..40 {
        lab.join(n, &b);
    }
    let updates =
        |lab: &Lab| lab.agents[&1].inbox.iter().filter(|m| matches!(m, ServerBody::Update(_))).count();
    assert!(updates(&lab) <= 2, "{}", updates(&lab));
    // A removal does not wait.
    let gone = lab.agents[&2].device.unwrap();
    let waiting = updates(&lab);
    lab.command(Command::RemoveDevice(gone)).unwrap();
    assert_eq!(updates(&lab), waiting + 1);
    lab.read(1);
    assert_eq!(lab.agents[&1].peers().len(), 37);
    let mut deltas = lab.agents[&1].updates.iter().filter(|u| matches!(u.kind, UpdateKind::Delta(_)));
    assert!(deltas.clone().count() <= 4, "one newer delta, not a queue");
    assert!(
        deltas.any(
            |u| matches!(&u.kind, UpdateKind::Delta(d) if d.removed_peers == [gone] && d.peers.is_empty())
        )
    );
    // But they are bounded too, and an agent that acknowledges nothing is told to start again.
    for n in 3..30 {
        let id = lab.agents[&n].device.unwrap();
        lab.command(Command::RemoveDevice(id)).unwrap();
    }
    assert!(updates(&lab) <= MAX_UNACKED, "{}", updates(&lab));
    lab.pass(ACK_PATIENCE);
    assert_eq!(lab.agents[&1].closed, Some(CloseReason::Stuck));
}

#[test]
fn an_agent_that_asks_gets_a_snapshot_once_and_not_forever() {
    let mut lab = Lab::new();
    let key = lab.tag_key("tag:a");
    lab.join(1, &key);
    let (revision, snapshots) = (lab.agents[&1].revision, lab.coordinator.stats().snapshots);
    let again =
        |revision| ClientBody::Ack(Ack { epoch: 1, revision, want_snapshot: true, reason: "hash".into() });
    lab.say(1, again(revision));
    lab.say(1, again(revision));
    assert_eq!(lab.coordinator.stats().snapshots, snapshots + 2);
    lab.read(1);
    for _ in 0..10 {
        lab.say(1, again(revision));
    }
    assert_eq!(lab.agents[&1].closed, Some(CloseReason::Flood));
    assert!(lab.coordinator.stats().snapshots <= snapshots + u64::from(MAX_SNAPSHOTS_PER_MIN) + 1);
}

#[test]
fn sessions_are_bounded_in_time_rate_and_number() {
    let mut lab = Lab::new();
    let key = lab.tag_key("tag:a");
    lab.connect(1);
    lab.pass(GREETING_PATIENCE);
    assert_eq!(lab.agents[&1].closed, Some(CloseReason::Silent));
    lab.connect(1);
    lab.say(1, ClientBody::Logout(Empty {}));
    assert_eq!(lab.agents[&1].closed, Some(CloseReason::Protocol));
    lab.join(1, &key);
    for _ in 0..5 * MAX_MESSAGES_PER_S {
        lab.say(1, ClientBody::Ping(Ping { nonce: 1 }));
    }
    assert_eq!(lab.agents[&1].closed, Some(CloseReason::Flood));
    let control = ControlPublicKey::from_bytes([9; 32]);
    let have = lab.coordinator.session_count() as u64;
    for n in have..MAX_SESSIONS as u64 {
        lab.coordinator.connect(SessionId(1_000_000 + n), control, lab.now).unwrap();
    }
    let more = lab.coordinator.connect(SessionId(1), control, lab.now);
    assert!(matches!(more, Err(Refusal::Busy(_))));
}

#[test]
fn signals_are_bounded_and_only_between_peers() {
    let mut lab = Lab::new();
    let key = lab.tag_key("tag:a");
    let (one, two) = (lab.join(1, &key), lab.join(2, &key));
    let signal = |to: DeviceId, len| Signal { device: to.to_bytes().to_vec(), sealed: vec![0; len] };
    lab.say(1, ClientBody::Signal(signal(two, 8)));
    assert_eq!(lab.coordinator.stats().signals, 0, "no policy, no peers");
    lab.policy(ALL);
    lab.read(1);
    lab.read(2);
    lab.say(1, ClientBody::Signal(signal(two, MAX_SIGNAL + 1)));
    lab.say(1, ClientBody::Signal(signal(one, 8)));
    assert_eq!(lab.coordinator.stats().signals, 0);
    for _ in 0..4 * MAX_SIGNALS_PER_S + 10 {
        lab.say(1, ClientBody::Signal(signal(two, 8)));
    }
    // What was dropped before counted as well.
    assert!(
        (4 * MAX_SIGNALS_PER_S - 3..=4 * MAX_SIGNALS_PER_S)
            .contains(&(lab.coordinator.stats().signals as u32))
    );
}

#[test]
fn ephemeral_devices_go_after_they_were_away_long_enough() {
    let mut lab = Lab::new();
    let key = lab.key(NewAuthKey { ephemeral: true, reusable: true, ..NewAuthKey::default() });
    lab.join(1, &key);
    lab.pass(2 * EPHEMERAL_OFFLINE);
    assert_eq!(lab.coordinator.state().devices().len(), 1, "it is connected");
    lab.disconnect(1);
    lab.pass(EPHEMERAL_OFFLINE - Duration::from_secs(1));
    lab.resume(1);
    lab.read(1);
    lab.pass(Duration::from_secs(2));
    lab.disconnect(1);
    lab.pass(EPHEMERAL_OFFLINE);
    assert!(lab.coordinator.state().devices().is_empty());
}

#[test]
fn tokens_are_for_peers_and_renewed_when_a_peer_goes() {
    let mut lab = Lab::new();
    let key = lab.tag_key("tag:a");
    lab.policy(ALL);
    lab.command(Command::SetEmbeddedRelay {
        name: "embedded".into(),
        addrs: vec!["192.0.2.1:443".parse().unwrap()],
        stun: vec![],
        cert_sha256: [1; 32],
    })
    .unwrap();
    let relay = *lab.coordinator.state().relays().keys().next().unwrap();
    let (one, two) = (lab.join(1, &key), lab.join(2, &key));
    lab.read(1);
    let tokens = |lab: &mut Lab| -> Vec<RelayToken> {
        let key = lab.netmap_key;
        let grants = lab.agents[&1].inbox.iter().filter_map(|m| match m {
            ServerBody::RelayToken(grant) => {
                grant.token.as_ref().map(|t| RelayToken::verify(t, &key).unwrap())
            }
            _ => None,
        });
        grants.collect()
    };
    let ask = |relay: RelayId| ClientBody::RelayToken(RelayTokenRequest { relay: relay.to_bytes().to_vec() });
    lab.say(1, ask(RelayId::from_bytes([6; 16])));
    assert!(tokens(&mut lab).is_empty(), "no such relay");
    lab.say(1, ask(relay));
    let token = tokens(&mut lab).remove(0);
    assert_eq!((token.device, token.peers.as_slice()), (one, [two].as_slice()));
    assert!(token.expires <= lab.now.unix + Duration::from_secs(600));
    lab.command(Command::RemoveDevice(two)).unwrap();
    let (revision, devices, revoked) = lab.minimums.last().unwrap().clone();
    assert_eq!((devices.as_slice(), revoked.as_slice()), ([one].as_slice(), [two].as_slice()));
    let newer = tokens(&mut lab).remove(1);
    assert!(token.revision < revision && newer.revision >= revision && newer.peers.is_empty());
}

#[test]
fn the_newest_session_of_a_device_wins_and_presence_follows() {
    let mut lab = Lab::new();
    let key = lab.tag_key("tag:a");
    lab.policy(ALL);
    let (_, two) = (lab.join(1, &key), lab.join(2, &key));
    lab.read(1);
    let old = lab.agents[&2].session.unwrap();
    lab.resume(2);
    lab.read(2);
    assert_ne!(lab.agents[&2].session, Some(old));
    assert_eq!(lab.coordinator.online_count(), 2);
    // The old connection's end is noticed late and changes nothing.
    lab.coordinator.disconnect(old, lab.now);
    assert!(lab.coordinator.is_online(two));
    lab.agents.get_mut(&1).unwrap().inbox.clear();
    lab.disconnect(2);
    let gone = &lab.agents[&1].inbox[0];
    assert!(matches!(gone, ServerBody::Presence(p) if p.offline == [two.to_bytes().to_vec()]));
}

#[test]
fn a_batch_that_is_not_saved_leaves_no_trace() {
    let mut lab = Lab::new();
    let key = lab.tag_key("tag:a");
    lab.connect(1);
    let session = lab.agents[&1].session.unwrap();
    let before = lab.coordinator.state().clone();
    let enroll = Enroll { auth_key: key.expose(), wg: vec![1; 32], probe: vec![1; 32], ..Enroll::default() };
    lab.coordinator.handle(session, ClientBody::Enroll(enroll), lab.now, &mut lab.rng);
    assert!(!lab.coordinator.unsaved().is_empty());
    assert_eq!(lab.coordinator.poll_output(), None, "nothing leaves before it is saved");
    lab.coordinator.not_saved(&Refusal::StoreUnavailable("disk full".into()), lab.now);
    lab.deliver();
    assert_eq!(lab.coordinator.state(), &before);
    lab.read(1);
    assert_eq!(lab.agents[&1].refused.as_deref(), Some("store-unavailable"));
    // And it works when the store does.
    lab.join(1, &key);
    assert_eq!(lab.coordinator.state().devices().len(), 1);
}

#[test]
fn a_conflict_is_decided_again_on_what_the_other_writer_did() {
    let mut lab = Lab::new();
    let key = lab.key(NewAuthKey::default());
    let mut twin = lab.coordinator.state().clone();
    lab.connect(1);
    let session = lab.agents[&1].session.unwrap();
    let enroll =
        |n: u8| Enroll { auth_key: key.expose(), wg: vec![n; 32], probe: vec![n; 32], ..Enroll::default() };
    lab.coordinator.handle(session, ClientBody::Enroll(enroll(1)), lab.now, &mut lab.rng);
    // Meanwhile another coordinator has let another device in with the one-use key.
    let command = Command::Enroll(Box::new(crate::domain::EnrollRequest {
        control: ControlPublicKey::from_bytes([2; 32]),
        wg: warren_common::keys::WgPublicKey::from_bytes([2; 32]),
        probe: warren_common::keys::ProbePublicKey::from_bytes([2; 32]),
        auth_key: key.clone(),
        hostname: "other".into(),
        os: String::new(),
        version: String::new(),
    }));
    let (changes, _) = twin.apply(&command, lab.now.unix, &mut lab.rng).unwrap();
    for change in &changes {
        twin.absorb(change.clone());
    }
    let commands = lab.coordinator.retract();
    lab.coordinator.absorb_foreign(changes, lab.now);
    assert_eq!(lab.coordinator.state(), &twin);
    for (origin, command) in commands {
        lab.coordinator.submit(origin, command, lab.now, &mut lab.rng);
    }
    lab.settle();
    lab.read(1);
    assert_eq!(lab.agents[&1].refused.as_deref(), Some("auth-key-used"));
}

#[test]
fn revisions_go_on_after_a_restart_and_never_repeat() {
    let mut lab = Lab::new();
    let key = lab.tag_key("tag:a");
    lab.join(1, &key);
    for round in 0..2_000 {
        lab.policy(if round % 2 == 0 { ALL } else { "{}" });
    }
    let (revision, state) = (lab.coordinator.revision(), lab.coordinator.state().clone());
    assert!(revision <= state.settings().revisions_reserved);
    let config = Config { netmap_key: NetmapSecretKey::from_bytes([7; 32]), lease: LEASE };
    let again = Coordinator::new(config, state, lab.now);
    assert!(again.revision() > revision);
}

#[test]
fn reports_that_make_no_sense_end_the_session() {
    let mut lab = Lab::new();
    let key = lab.tag_key("tag:a");
    lab.join(1, &key);
    let routes = vec!["10.0.0.0/8".into()];
    let good = Report { hostname: "x".into(), routes, ..Report::default() };
    lab.say(1, ClientBody::Report(good.clone()));
    assert_eq!(lab.coordinator.state().devices().values().next().unwrap().routes.len(), 1);
    lab.say(1, ClientBody::Report(Report { routes: vec!["ten".into()], ..good }));
    assert_eq!(lab.agents[&1].closed, Some(CloseReason::Protocol));
    // An id that no key has, in a message of the wrong length.
    lab.connect(2);
    let enroll = Enroll {
        auth_key: AuthKey { id: AuthKeyId::from_bytes([0; 16]), ..key }.expose(),
        wg: vec![1; 31],
        ..Enroll::default()
    };
    lab.say(2, ClientBody::Enroll(enroll));
    assert_eq!(lab.agents[&2].closed, Some(CloseReason::Refused));
}
