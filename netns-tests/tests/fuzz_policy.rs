//! What administrators write: policy files, their conditions, inventories. See `fuzz.rs` for the method.
#![expect(clippy::unwrap_used, reason = "a test's helper fails by panicking")]

use std::borrow::Cow;

use bolero::check;
use warren_common::policy::{
    AttrValue, Attribute, Condition, Grade, Inventory, MAX_DIAGNOSTICS, Policy, compile, diff,
};
use warren_netns_tests::fuzz::{corpus, inputs, pick, tamper};

const EVERYTHING: &str = include_str!("../../common/tests/policies/everything.hujson");
const OLDER: &str = include_str!("../../common/tests/policies/older.hujson");
const INVENTORY: &str = include_str!("../../common/tests/policies/inventory.json");
const NOW: i64 = 1_774_612_800;
/// Longest message as people see it, whatever the file holds. Unit: bytes.
const MAX_RENDERED: usize = 4_096;

/// A file is refused with messages that point into it, or it compiles, always to the same, and every tool answers.
#[test]
fn policy_files() {
    let seeds = corpus(
        "policy_files",
        vec![
            ("everything.hujson", EVERYTHING.as_bytes().to_vec()),
            ("older.hujson", OLDER.as_bytes().to_vec()),
        ],
    );
    let inventory: Inventory = serde_json::from_str(INVENTORY).unwrap();
    check!().with_iterations(inputs(10)).for_each(|input: &[u8]| {
        examine(&String::from_utf8_lossy(input), &inventory);
        examine(&String::from_utf8_lossy(&pick(input, &seeds)), &inventory);
        for seed in [EVERYTHING, OLDER] {
            examine(&reworded(seed, input), &inventory);
        }
    });
}

fn examine(text: &str, inventory: &Inventory) {
    let policy = match Policy::parse(text) {
        Ok(policy) => policy,
        Err(found) => {
            assert!(!found.is_empty() && found.len() <= MAX_DIAGNOSTICS + 1);
            for message in &found {
                assert!(message.span.start <= message.span.end && message.span.end <= text.len() + 1);
                assert!(message.render("policy").len() <= MAX_RENDERED);
            }
            assert_eq!(Policy::parse(text).unwrap_err(), found, "the same messages each time");
            return;
        }
    };
    assert_eq!(policy.text(), text);
    let Ok(compiled) = compile(&policy, inventory, NOW, 86_400) else { return };
    let again = compile(&policy, inventory, NOW, 86_400).unwrap();
    for name in inventory.nodes.keys() {
        assert_eq!(compiled.fingerprint(name), again.fingerprint(name));
        assert_eq!(compiled.node(name), again.node(name));
        for rule in compiled.ingress(name).iter().chain(&compiled.egress(name)) {
            assert!(!rule.src.is_empty() && !rule.dst.is_empty());
            assert!(rule.dst.iter().all(|d| d.ports.first <= d.ports.last));
        }
        assert!(compiled.explain(name, "server:22", None).is_ok());
    }
    assert!(diff(&compiled, &again).is_empty());
    compiled.run_tests();
}

/// Edits whole words, so that many results are nearly valid.
fn reworded(text: &str, input: &[u8]) -> String {
    let mut words: Vec<&str> = text.split_inclusive(['"', ',', ':', '[', ']', '{', '}']).collect();
    for edit in input.chunks_exact(4).take(16) {
        let at = usize::from(u16::from_be_bytes([edit[1], edit[2]])) % words.len().max(1);
        let len = usize::from(edit[3] % 8);
        let end = (at + len).min(words.len());
        match edit[0] % 4 {
            0 if words.len() > 1 => {
                let other = (at + len) % words.len();
                words.swap(at, other);
            }
            1 => drop(words.drain(at..end)),
            2 if words.len() < 4_096 => {
                let copy = words[at..end].to_vec();
                let to = usize::from(edit[3]) * 31 % words.len().max(1);
                words.splice(to..to, copy);
            }
            // A word that stands somewhere else in the language.
            3 if !words.is_empty() => {
                const OTHER: [&str; 8] =
                    ["null", "*\"", "10.0.0.0/33", "tag:\"", "999999\"", "-1", "é\"", "{}"];
                words[at] = OTHER[len];
            }
            _ => {}
        }
    }
    words.concat()
}

#[test]
fn policy_conditions() {
    let texts = [
        ("equals", "node:os == 'linux'"),
        ("list", "node:os NOT IN ['linux', \"mac\", 3, true] WITHIN 1h30m"),
        ("order", "node:version >= '1.10.2-rc1'"),
        ("set", "custom:n IS SET"),
        ("grade", "attest:node:os >= 'tpm'"),
        ("time", "time:hour < 12"),
    ];
    let seeds =
        corpus("policy_conditions", texts.map(|(name, text)| (name, text.as_bytes().to_vec())).to_vec());
    let fact = |value| Attribute { value, source: None, grade: Some(Grade::Root), age_s: Some(5) };
    let text = |t: &str| AttrValue::Text(t.to_owned());
    let facts = [
        fact(AttrValue::Absent),
        fact(AttrValue::Bool(true)),
        fact(AttrValue::Number(3.0)),
        fact(text("1.10.2-rc10.é")),
        fact(AttrValue::List(vec![text("linux"), AttrValue::Number(-0.0), AttrValue::Absent])),
    ];
    check!().with_iterations(inputs(1)).for_each(|input: &[u8]| {
        for bytes in [Cow::Borrowed(input), pick(input, &seeds).into()] {
            let text = String::from_utf8_lossy(&bytes);
            match Condition::parse(&text) {
                Err(error) => assert!(text.is_char_boundary(error.at) && !error.message.is_empty()),
                Ok(condition) => {
                    assert_eq!(Condition::parse(condition.text()).as_ref(), Ok(&condition));
                    for fact in &facts {
                        let finding = condition.evaluate(|_| Some(Cow::Borrowed(fact)), 1);
                        assert_eq!(finding, condition.evaluate(|_| Some(Cow::Borrowed(fact)), 1));
                    }
                }
            }
        }
    });
}

#[test]
fn inventories() {
    let seeds = corpus("inventories", vec![("inventory.json", INVENTORY.as_bytes().to_vec())]);
    let policy = Policy::parse(EVERYTHING).unwrap();
    check!().with_iterations(inputs(10)).for_each(|input: &[u8]| {
        for bytes in [input, &tamper(&seeds[0], input), reworded(INVENTORY, input).as_bytes()] {
            let Ok(inventory) = serde_json::from_slice::<Inventory>(bytes) else { continue };
            let text = serde_json::to_string(&inventory).unwrap();
            assert_eq!(serde_json::from_str::<Inventory>(&text).unwrap(), inventory);
            if let Ok(compiled) = compile(&policy, &inventory, NOW, 86_400) {
                for name in inventory.nodes.keys() {
                    assert!(compiled.node(name).is_some());
                }
            }
        }
    });
}
