//! `warren policy` as people and CI call it: exit codes and output.
#![expect(clippy::expect_used, reason = "helpers of tests: a failure is a failed test")]

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

const POLICY: &str = r#"{
  "tagOwners": {"tag:db": []}, // who may be a database
  "grants": [{"src": ["ann@example.com"], "dst": ["tag:db"], "ip": ["tcp:5432"]}],
  "tests": [{"src": "ann@example.com", "accept": ["tag:db:5432"], "deny": ["tag:db:22"]}],
}"#;

const INVENTORY: &str = r#"{
  "users": [{"id": 1, "name": "ann", "email": "ann@example.com"}],
  "nodes": {"laptop": {"user": "ann", "ipv4": "100.64.0.1"}, "db": {"tags": ["tag:db"], "ipv4": "100.64.0.2"}}
}"#;

fn warren(dir: &Path, args: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_warren"))
        .current_dir(dir)
        .arg("policy")
        .args(args.split(' '))
        .output()
        .expect("starts")
}

fn files() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a directory");
    let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).expect("written");
    write("ok", POLICY);
    write("more", &POLICY.replace("tcp:5432\"", "tcp:5432\", \"tcp:9000\""));
    write("failing", &POLICY.replace("tag:db:22", "tag:db:5432"));
    write("broken", &POLICY.replace("\"tag:db\"]", "\"tag:bd\"]"));
    write("inv", INVENTORY);
    dir
}

#[test]
fn exit_codes() {
    let dir = files();
    for (args, code) in [
        ("check --policy ok", 0),
        ("check --policy broken", 2),
        ("check --policy missing", 2),
        ("check", 2),
        ("frobnicate", 2),
        ("test --policy ok --inventory inv", 0),
        ("test --policy failing --inventory inv", 1),
        ("compile --policy ok --inventory inv --format json", 0),
        ("compile --policy failing --inventory inv --format json", 2),
        ("compile --policy broken --inventory inv --format json", 2),
        ("compile --policy ok --inventory ok --format json", 2),
        ("explain --policy ok --inventory inv --from laptop --to db:5432", 0),
        ("explain --policy ok --inventory inv --from laptop --to db:22", 1),
        ("explain --policy ok --inventory inv --from nobody --to db:22", 2),
        ("explain --policy ok --inventory inv --from laptop --to db:22 --proto nope", 2),
        ("diff --old ok --new more --inventory inv", 0),
        ("diff --old ok --new broken --inventory inv", 2),
        ("check --help", 0),
    ] {
        let out = warren(dir.path(), args);
        assert_eq!(out.status.code(), Some(code), "{args}: {}", String::from_utf8_lossy(&out.stderr));
        if code == 2 {
            assert!(!out.stderr.is_empty(), "{args} must say why");
        }
    }
}

#[test]
fn json_is_one_document() {
    let dir = files();
    let json =
        |args: &str| -> Value { serde_json::from_slice(&warren(dir.path(), args).stdout).expect(args) };
    let broken = json("check --policy broken --json");
    assert_eq!(broken["messages"][0]["line"], 3);
    assert!(broken["messages"][0]["help"].as_str().is_some_and(|h| h.contains("tag:db")));
    assert_eq!(json("test --policy failing --inventory inv --json")["passed"], false);
    let compiled = json("compile --policy ok --inventory inv --format json");
    assert_eq!(compiled["nodes"]["db"]["filters"][0]["dst"][0]["first"], 5432);
    assert_eq!(compiled["nodes"]["laptop"]["filters"].as_array().map(Vec::len), Some(0));
    let why = json("explain --policy ok --inventory inv --from laptop --to db:22 --json");
    assert_eq!(why["allowed"], false);
    assert_eq!(why["nearest"][0]["line"], 3);
    let diff = json("diff --old ok --new more --inventory inv --json");
    assert_eq!(diff["changes"][0]["service"], "tcp:9000");
    assert_eq!(diff["changes"].as_array().map(Vec::len), Some(1));
}
