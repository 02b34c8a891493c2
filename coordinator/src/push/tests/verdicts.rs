//! What agents report of their filters.

use warren_common::filter::RuleId;
use warren_common::wire::control::{DifferingVerdict, FilterReport, StagedHits};

use super::*;

const STAGED: &str = r#"{"tagOwners": {"tag:a": [], "tag:b": []}, "grants": [
    {"src": ["tag:a"], "dst": ["tag:b"], "ip": ["22"]},
    {"src": ["tag:a"], "dst": ["tag:b"], "ip": ["443"], "staged": true}]}"#;

fn pair(lab: &mut Lab) -> [DeviceId; 2] {
    lab.policy(STAGED);
    let (a, b) = (lab.tag_key("tag:a"), lab.tag_key("tag:b"));
    let ids = [lab.join(1, &a), lab.join(2, &b)];
    lab.read(1);
    ids
}

fn staged_rule(lab: &Lab) -> RuleId {
    let netmap = lab.agents[&2].netmap.as_ref().unwrap();
    netmap.ingress.iter().find(|r| r.staged).unwrap().id
}

fn differs(peer: DeviceId) -> DifferingVerdict {
    DifferingVerdict {
        peer: peer.to_bytes().to_vec(),
        src: vec![100, 64, 0, 1],
        dst: vec![100, 64, 0, 2],
        proto: 6,
        port: 80,
        reason: "no-rule".into(),
        revision: 1,
        count: 1,
    }
}

#[test]
fn staged_rules_add_up_over_devices_until_they_leave_the_file() {
    let mut lab = Lab::new();
    pair(&mut lab);
    let rule = staged_rule(&lab);
    let other = lab.agents[&2].netmap.as_ref().unwrap().ingress.iter().find(|r| !r.staged).unwrap().id;
    for (n, sent, received) in [(1, 3, 0), (2, 0, 2), (2, 0, 1)] {
        let staged = [rule, other, RuleId(7)].map(|rule| StagedHits { rule: rule.0, sent, received });
        lab.say(n, ClientBody::FilterReport(FilterReport { staged: staged.to_vec(), differing: vec![] }));
    }
    let counts: Vec<_> = lab
        .coordinator
        .staged_counts()
        .map(|(id, origin, c)| (id, origin.to_owned(), c.sent, c.received, c.devices.len()))
        .collect();
    assert_eq!(counts, [(rule, "grants[1] line 3".to_owned(), 3, 3, 2)], "no others can be made up");
    lab.policy(A_TO_B);
    lab.policy(STAGED);
    assert_eq!(lab.coordinator.staged_counts().count(), 0);
}

#[test]
fn differing_verdicts_say_whether_both_ends_were_up_to_date_and_are_bounded() {
    let mut lab = Lab::new();
    let [a, _] = pair(&mut lab);
    let report = |differing| ClientBody::FilterReport(FilterReport { staged: vec![], differing });
    lab.say(2, report(vec![differs(a)]));
    // An update is on its way to one of the two.
    lab.policy(A_TO_B);
    lab.say(2, report(vec![differs(a)]));
    let both: Vec<bool> = lab.coordinator.differing_verdicts().map(|d| d.both_current).collect();
    assert_eq!(both, [true, false]);
    assert!(lab.coordinator.differing_verdicts().all(|d| d.reason == "no-rule"), "the word is kept whole");
    let nonsense = [
        DifferingVerdict { peer: vec![1; 15], ..differs(a) },
        DifferingVerdict { src: vec![1; 5], ..differs(a) },
        DifferingVerdict { proto: 256, ..differs(a) },
        DifferingVerdict { port: 65_536, ..differs(a) },
    ];
    lab.say(2, report(nonsense.to_vec()));
    assert_eq!(lab.coordinator.differing_verdicts().count(), 2);
    let hostile = DifferingVerdict { reason: "x\n".repeat(10_000), ..differs(a) };
    for _ in 0..20 {
        lab.pass(Duration::from_secs(1));
        lab.say(2, report(vec![hostile.clone(); 1_000]));
    }
    assert_eq!(lab.coordinator.differing_verdicts().count(), MAX_DIFFERING_KEPT);
    assert!(lab.coordinator.differing_verdicts().all(|d| d.reason.len() <= 32 && !d.reason.contains('\n')));
}
