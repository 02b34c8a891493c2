//! Any sequence of what agents and administrators do.

use std::collections::BTreeSet;
use std::net::IpAddr;

use proptest::prelude::*;
use warren_common::filter::{Action, FilterRule};

use super::*;

#[derive(Clone, Debug)]
enum Step {
    Join(u8, usize),
    Resume(u8),
    Disconnect(u8),
    Read(u8),
    ReadOne(u8),
    Remove(u8),
    Expire(u8),
    Suspend(bool),
    Policy(usize),
    Pass(u16),
    Fail(u8),
}

fn step() -> impl Strategy<Value = Step> {
    let agent = 1..9u8;
    prop_oneof![
        5 => (agent.clone(), 0..3usize).prop_map(|(n, k)| Step::Join(n, k)),
        3 => agent.clone().prop_map(Step::Resume),
        2 => agent.clone().prop_map(Step::Disconnect),
        6 => agent.clone().prop_map(Step::Read),
        4 => agent.clone().prop_map(Step::ReadOne),
        1 => agent.clone().prop_map(Step::Remove),
        1 => agent.clone().prop_map(Step::Expire),
        1 => any::<bool>().prop_map(Step::Suspend),
        3 => (0..POLICIES.len()).prop_map(Step::Policy),
        1 => (0..5_000u16).prop_map(Step::Pass),
        1 => agent.prop_map(Step::Fail),
    ]
}

/// What a device may do at all by its netmap: for comparing an agent's with the domain's.
fn allowed(netmap: &Netmap) -> (BTreeSet<DeviceId>, BTreeSet<FilterRule>, BTreeSet<FilterRule>) {
    (netmap.peers.keys().copied().collect(), netmap.ingress.clone(), netmap.egress.clone())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Agents that read at their own pace end up with exactly the domain's netmap, through steps that first only take
    /// away, under numbers that only grow.
    #[test]
    fn agents_arrive_where_the_domain_is(steps in prop::collection::vec(step(), 1..80)) {
        let mut lab = Lab::new();
        let ann = NewAuthKey { user: Some("ann@x.org".into()), reusable: true, ..NewAuthKey::default() };
        let keys = [lab.tag_key("tag:a"), lab.tag_key("tag:b"), lab.key(ann)];
        let user = lab.coordinator.state().user_by_email("ann@x.org").unwrap().id;
        for step in steps {
            let known = |lab: &Lab, n: u8| {
                lab.coordinator.state().device_by_control(&ControlPublicKey::from_bytes([n; 32])).map(|d| d.id)
            };
            match step {
                Step::Join(n, key) => {
                    if known(&lab, n).is_none() {
                        lab.agents.remove(&n);
                    }
                    lab.enroll(n, &keys[key]);
                }
                Step::Resume(n) => if lab.agents.get(&n).is_some_and(|a| a.device.is_some()) { lab.resume(n) },
                Step::Disconnect(n) => lab.disconnect(n),
                Step::Read(n) => if lab.agents.contains_key(&n) { lab.read(n) },
                Step::ReadOne(n) => if lab.agents.contains_key(&n) { lab.read_one(n); },
                Step::Remove(n) => if let Some(id) = known(&lab, n) { lab.command(Command::RemoveDevice(id)).unwrap(); },
                Step::Expire(n) => if let Some(id) = known(&lab, n) { lab.command(Command::ExpireDevice(id)).unwrap(); },
                Step::Suspend(suspended) => { lab.command(Command::SuspendUser { user, suspended }).unwrap(); }
                Step::Policy(n) => lab.policy(POLICIES[n]),
                Step::Pass(seconds) => lab.pass(Duration::from_secs(seconds.into())),
                Step::Fail(n) => {
                    // A store that fails once in between.
                    if let Some(id) = known(&lab, n) {
                        lab.coordinator.submit(Origin::Internal, Command::RemoveDevice(id), lab.now, &mut lab.rng);
                        lab.coordinator.not_saved(&Refusal::StoreUnavailable(String::new()), lab.now);
                        lab.settle();
                    }
                }
            }
        }
        for n in lab.agents.keys().copied().collect::<Vec<_>>() {
            lab.read(n);
        }
        for agent in lab.agents.values() {
            prop_assert!(agent.updates.is_sorted_by_key(|u| u.to), "revisions go back");
            // Between two updates whose numbers follow each other, the first only takes away if anything is taken at all.
            for pair in agent.updates.windows(2) {
                if let UpdateKind::Delta(delta) = &pair[1].kind {
                    let adds = delta.peers.iter().any(|p| !delta.removed_peers.contains(&p.id));
                    prop_assert!(delta.removed_peers.is_empty() || !adds, "a removal with an addition");
                }
            }
            let live = agent.session.is_some() && agent.closed.is_none();
            let device = agent.device.filter(|d| live && lab.coordinator.is_online(*d));
            if let Some(id) = device {
                let want = lab.coordinator.netmap(id);
                prop_assert_eq!(agent.netmap.as_ref(), want.as_ref());
                prop_assert_eq!(lab.coordinator.acked_revision(id), Some(agent.revision));
            }
        }
        prop_assert!(lab.coordinator.revision() <= lab.coordinator.state().settings().revisions_reserved);
    }

    /// No step on the way to a new netmap opens anything that the old and the new one do not both allow, until the
    /// removals are through.
    #[test]
    fn a_removal_step_opens_nothing(first in 0..POLICIES.len(), second in 0..POLICIES.len()) {
        let mut lab = Lab::new();
        let keys = [lab.tag_key("tag:a"), lab.tag_key("tag:b")];
        for n in 1..7 {
            lab.join(n, &keys[usize::from(n % 2)]);
        }
        lab.policy(POLICIES[first]);
        (1..7).for_each(|n| lab.read(n));
        let addrs: Vec<IpAddr> = lab.coordinator.state().devices().values().flat_map(|d| d.addrs()).collect();
        let pairs = addrs.iter().flat_map(|src| addrs.iter().map(move |dst| (*src, *dst)));
        let kinds = [(1, 0), (6, 22), (6, 80), (17, 80), (132, 80)];
        let packets: Vec<_> = pairs.flat_map(|(s, d)| kinds.map(|(proto, port)| (s, d, proto, port))).collect();
        let before: Vec<Netmap> = (1..7).map(|n| lab.agents[&n].netmap.clone().unwrap()).collect();
        lab.policy(POLICIES[second]);
        for n in 1..7u8 {
            let updates = lab.agents[&n].inbox.iter().filter(|m| matches!(m, ServerBody::Update(_))).count();
            prop_assert!(updates <= 2);
            let old = &before[usize::from(n) - 1];
            let want = lab.coordinator.netmap(lab.agents[&n].device.unwrap()).unwrap();
            if updates == 2 {
                while lab.agents[&n].revision == lab.agents[&n].updates.last().map_or(0, |u| u.to)
                    && lab.agents[&n].netmap.as_ref() == Some(old)
                    && lab.read_one(n)
                {}
                let step = lab.agents[&n].netmap.clone().unwrap();
                prop_assert!(step.peers.keys().all(|p| old.peers.contains_key(p) && want.peers.contains_key(p)));
                for (src, dst, proto, port) in &packets {
                    let may = |rules: &BTreeSet<FilterRule>| {
                        let mut hits = rules.iter().filter(|r| r.covers(*src, *dst, *proto, *port));
                        hits.any(|r| r.action == Action::Allow) // these policies deny nothing
                    };
                    prop_assert_eq!(may(&step.ingress), may(&old.ingress) && may(&want.ingress));
                    prop_assert_eq!(may(&step.egress), may(&old.egress) && may(&want.egress));
                }
            }
            lab.read(n);
            prop_assert_eq!(allowed(lab.agents[&n].netmap.as_ref().unwrap()), allowed(&want));
        }
    }
}
