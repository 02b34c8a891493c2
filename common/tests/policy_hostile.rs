//! Hostile and enormous policy files give an error or a result; growth is linear enough that these tests end.
#![expect(
    clippy::expect_used,
    reason = "helpers of tests: a failure is a failed test, and a skip must be said"
)]

use std::collections::BTreeMap;

use proptest::prelude::*;
use proptest::sample::Index;
use warren_common::policy::{
    Inventory, MAX_DIAGNOSTICS, MAX_POLICY_BYTES, MAX_POLICY_DEPTH, Node, Policy, User, compile, diff,
};

fn refused(text: &str) -> Vec<String> {
    let found = Policy::parse(text).expect_err("must be refused");
    assert!(found.len() <= MAX_DIAGNOSTICS + 1);
    found.iter().map(ToString::to_string).collect()
}

fn small_world() -> Inventory {
    let users =
        vec![User { id: "1".to_owned(), email: Some("u1@example.com".to_owned()), ..User::default() }];
    let node = Node { user: Some("1".to_owned()), ipv4: "100.64.0.1".parse().ok(), ..Node::default() };
    Inventory { users, nodes: BTreeMap::from([("n".to_owned(), node)]), ..Inventory::default() }
}

#[test]
fn a_hundred_thousand_groups() {
    let mut text = String::from("{\"groups\": {");
    for i in 0..100_000 {
        text.push_str(&format!("\"group:{i}\": [\"u{i}@example.com\"],\n"));
    }
    text.push_str(
        "}, \"grants\": [{\"src\": [\"group:1\", \"group:99999\"], \"dst\": [\"*\"], \"ip\": [\"*\"]}]}",
    );
    let policy = Policy::parse(&text).expect("valid");
    let compiled = compile(&policy, &small_world(), 0, 0).expect("compiles");
    assert_eq!(compiled.ingress("n").len(), 1);
}

#[test]
fn ten_megabytes() {
    let rule =
        "{\"src\": [\"group:missing\", \"tag:missing\"], \"dst\": [\"nowhere\"], \"ip\": [\"nonsense\"]},\n";
    let text = format!("{{\"grants\": [{}]}}", rule.repeat(10_000_000 / rule.len()));
    assert!(text.len() > 9_900_000);
    refused(&text);
    let comment = format!("/*{}*/ {{}}", "x".repeat(10_000_000));
    assert!(Policy::parse(&comment).is_ok());
    let blank = format!("{{}}{}", " ".repeat(MAX_POLICY_BYTES));
    assert!(refused(&blank)[0].contains("at most"));
    let long = format!("{{\"groups\": {{\"group:a\": [\"{}\"]}}}}", "a".repeat(10_000_000));
    refused(&long);
}

#[test]
fn cycles() {
    assert!(
        refused("{\"groups\": {\"group:a\": [\"group:b\"], \"group:b\": [\"group:a\"]}}")[0]
            .contains("do not nest")
    );
    assert!(
        refused("{\"ipsets\": {\"ipset:a\": [\"ipset:b\"], \"ipset:b\": [\"ipset:a\"]}}")[0]
            .contains("contains itself")
    );
    let tags =
        Policy::parse("{\"tagOwners\": {\"tag:a\": [\"tag:b\"], \"tag:b\": [\"tag:a\"]}}").expect("harmless");
    assert!(tags.warnings()[0].message.contains("owns itself"));
    // A chain of a hundred thousand sets is long, not circular.
    let mut text = String::from("{\"ipsets\": {\"ipset:0\": [\"10.0.0.0/8\"],");
    for i in 1..100_000 {
        text.push_str(&format!("\"ipset:{i}\": [\"ipset:{}\"],", i - 1));
    }
    text.push_str("}, \"grants\": [{\"src\": [\"ipset:99999\"], \"dst\": [\"*\"], \"ip\": [\"*\"]}]}");
    let policy = Policy::parse(&text).expect("valid");
    assert_eq!(compile(&policy, &small_world(), 0, 0).expect("compiles").ingress("n").len(), 1);
}

#[test]
fn deep_nesting() {
    refused(&"[".repeat(1_000_000));
    refused(&"{\"a\":".repeat(1_000_000));
    let deep = format!("{}{}", "[".repeat(MAX_POLICY_DEPTH - 5), "]".repeat(MAX_POLICY_DEPTH - 5));
    let text = format!(
        "{{\"grants\": [{{\"src\": [\"*\"], \"dst\": [\"*\"], \"app\": {{\"a.example/x\": [{deep}]}}}}]}}"
    );
    assert!(Policy::parse(&text).is_ok());
}

#[test]
fn huge_ranges_and_lists() {
    let dst: Vec<String> = (0..5_000).map(|i| format!("\"10.{}.{}.0/24\"", i / 256, i % 256)).collect();
    let ports: Vec<String> = (1..1_000).map(|p| format!("\"tcp:{p}\"")).collect();
    let text = format!(
        "{{\"grants\": [{{\"src\": [\"0.0.0.0-255.255.255.255\", \"::/0\"], \"dst\": [{}, \"::1-ffff::\"], \"ip\": [{}]}}]}}",
        dst.join(","),
        ports.join(",")
    );
    let policy = Policy::parse(&text).expect("valid");
    assert!(compile(&policy, &small_world(), 0, i64::MAX).is_ok());
    refused("{\"grants\": [{\"src\": [\"10.0.0.9-10.0.0.1\"], \"dst\": [\"*\"], \"ip\": [\"*\"]}]}");
}

#[test]
fn strange_times() {
    for (now, horizon) in [(i64::MIN, i64::MAX), (i64::MAX, i64::MAX), (0, -1), (253_402_207_200, i64::MAX)] {
        let text = "{\"postures\": {\"posture:t\": [\"time:hour < 12\"]},
            \"grants\": [{\"src\": [\"*\"], \"dst\": [\"*\"], \"ip\": [\"*\"], \"srcPosture\": \"posture:t\",
            \"when\": {\"days\": [\"mon\"], \"from\": \"09:00\", \"to\": \"17:00\", \"zone\": \"Asia/Kathmandu\"}}]}";
        let policy = Policy::parse(text).expect("valid");
        assert!(compile(&policy, &small_world(), now, horizon).is_ok(), "{now} {horizon}");
    }
}

/// A file with every section, to tamper with.
const EVERYTHING: &str = include_str!("policies/everything.hujson");

#[derive(Clone, Debug)]
enum Edit {
    Replace(Index, char),
    Cut(Index, Index),
    Copy(Index, Index, Index),
    Swap(Index, Index),
}

fn edit() -> impl Strategy<Value = Edit> {
    let at = any::<Index>;
    prop_oneof![
        (at(), any::<char>()).prop_map(|(a, c)| Edit::Replace(a, c)),
        (at(), proptest::sample::select(b"\"\\[]{},:*@/-019'".to_vec()))
            .prop_map(|(a, c)| Edit::Replace(a, char::from(c))),
        (at(), at()).prop_map(|(a, b)| Edit::Cut(a, b)),
        (at(), at(), at()).prop_map(|(a, b, c)| Edit::Copy(a, b, c)),
        (at(), at()).prop_map(|(a, b)| Edit::Swap(a, b)),
    ]
}

/// Pieces end where words of the file end, so that many results are nearly valid.
fn tampered(edits: &[Edit]) -> String {
    let mut pieces: Vec<String> =
        EVERYTHING.split_inclusive(['"', ',', ':', '[', ']', '{', '}']).map(str::to_owned).collect();
    for edit in edits {
        let n = pieces.len();
        match edit {
            Edit::Replace(at, c) => {
                let piece = &mut pieces[at.index(n)];
                piece.pop();
                piece.push(*c);
            }
            Edit::Cut(a, b) => {
                let a = a.index(n);
                let b = (a + b.index(4)).min(n - 1);
                pieces.drain(a..b);
            }
            Edit::Copy(a, b, to) => {
                let a = a.index(n);
                let b = (a + b.index(8)).min(n);
                let copy: Vec<String> = pieces[a..b].to_vec();
                let to = to.index(n);
                pieces.splice(to..to, copy);
            }
            Edit::Swap(a, b) => pieces.swap(a.index(n), b.index(n)),
        }
    }
    pieces.concat()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_tampered_file_gives_an_answer(edits in proptest::collection::vec(edit(), 0..6)) {
        let text = tampered(&edits);
        match Policy::parse(&text) {
            Err(found) => {
                prop_assert!(!found.is_empty());
                for message in found {
                    prop_assert!(message.span.end <= text.len() + 1);
                    prop_assert!(!message.to_string().is_empty());
                }
            }
            Ok(policy) => {
                if let Ok(compiled) = compile(&policy, &small_world(), 1_774_612_800, 86_400) {
                    let _ = (compiled.node("n"), compiled.egress("n"), compiled.run_tests());
                    prop_assert!(compiled.explain("n", "100.64.0.9:443", None).is_ok());
                    let empty = compile(&Policy::empty(), &small_world(), 1_774_612_800, 0).expect("compiles");
                    let _ = diff(&empty, &compiled);
                }
            }
        }
    }
}

#[test]
fn the_file_to_tamper_with_is_valid() {
    Policy::parse(EVERYTHING).map_err(|found| found[0].to_string()).expect("valid");
}
