//! The schema for editors: every policy that is accepted fits it, and what the reader calls an unknown field or a wrong
//! type doesn't.
#![expect(clippy::expect_used, reason = "helpers of tests: a failure is a failed test")]

mod cases;

use serde::Deserialize;
use serde_json::{Map, Value, json};
use warren_common::policy::{Policy, json_schema};

#[derive(Deserialize)]
struct Case {
    id: String,
    accepted: bool,
    policy: Value,
}

fn schema() -> Value {
    serde_json::from_str(&json_schema()).expect("JSON")
}

#[test]
fn accepted_policies_fit_the_schema() {
    let schema = schema();
    let Some(cases) = cases::all::<Case>() else { return };
    let mut fitting = 0;
    for case in cases.iter().filter(|case| case.accepted) {
        let policy = match &case.policy {
            Value::String(text) => match serde_json::from_str(text) {
                Ok(policy) => policy,
                Err(_) => continue, // HuJSON: an editor reads it, this test does not
            },
            other => other.clone(),
        };
        if let Err(why) = fits(&schema, &policy, &schema, "") {
            panic!("{}: {why}", case.id);
        }
        fitting += 1;
    }
    assert!(fitting > 100, "only {fitting} cases were looked at");
}

#[test]
fn everything_of_the_language_fits_the_schema() {
    let schema = schema();
    let policy = everything();
    if let Err(found) = Policy::parse(&policy.to_string()) {
        panic!("{}", found.iter().map(ToString::to_string).collect::<String>());
    }
    assert_eq!(fits(&schema, &policy, &schema, ""), Ok(()));
    // A field the reader doesn't know, in each object of the language, is unknown to both.
    let mut objects = 0;
    for at in
        ["", "/grants/0", "/acls/0", "/deny/0", "/grants/0/when", "/nodeAttrs/0", "/autoApprovers", "/ssh/0"]
            .iter()
            .chain(&["/tests/0", "/sshTests/0"])
    {
        let mut wrong = policy.clone();
        let object = wrong.pointer_mut(at).and_then(Value::as_object_mut).expect("an object");
        object.insert("colour".to_owned(), json!(1));
        assert!(fits(&schema, &wrong, &schema, "").is_err(), "{at} takes a colour");
        assert!(Policy::parse(&wrong.to_string()).is_err(), "{at}");
        objects += 1;
    }
    assert_eq!(objects, 10);
    // A number is no value of any field.
    for (at, value) in fields(&policy, "") {
        let mut wrong = policy.clone();
        *wrong.pointer_mut(&at).expect("it is there") = json!(-7.5);
        let free = value.is_number() || at.contains("/app/") || at.contains("/srcPostureAttrs/");
        assert_eq!(fits(&schema, &wrong, &schema, "").is_err(), !free, "{at}");
    }
}

/// Every field of every object.
fn everything() -> Value {
    json!({
        "$schema": "policy.schema.json",
        "groups": {"group:g": ["ann@example.com"]},
        "hosts": {"web": "100.64.0.9", "net": "10.0.0.0/8"},
        "ipsets": {"ipset:s": ["add 10.0.0.0/8", "remove 10.1.0.0/16"]},
        "tagOwners": {"tag:a": ["group:g"], "tag:b": []},
        "acls": [{"action": "accept", "src": ["*"], "dst": ["tag:a:80"], "proto": "tcp", "srcPosture": ["posture:p"],
            "dstPosture": "posture:p", "ignoreDefaultPosture": true, "when": {"from": "09:00", "to": "17:00"},
            "expires": "2099-01-01T00:00:00Z", "staged": true, "comment": "c", "#note": 1}],
        "grants": [{"src": ["*"], "dst": ["net"], "ip": ["tcp:443"], "app": {"example.com/cap/x": [{"y": 1}]},
            "via": ["tag:a"], "srcPosture": ["posture:p"], "dstPosture": ["posture:p"], "ignoreDefaultPosture": false,
            "when": {"days": ["mon"], "from": "09:00", "to": "17:00", "zone": "Europe/Berlin"},
            "expires": "2099-01-01T00:00:00Z", "staged": false, "comment": "c"}],
        "deny": [{"src": ["*"], "dst": ["tag:b"], "ip": ["22"], "comment": "c"}],
        "postures": {"posture:p": ["node:os == 'linux'"]},
        "defaultSrcPosture": ["posture:p"],
        "autoApprovers": {"routes": {"10.0.0.0/8": ["tag:a"]}, "exitNode": ["tag:b"]},
        "nodeAttrs": [{"target": ["*"], "attr": ["x"], "app": {"example.com/x": [{}]}, "ipPool": ["100.81.0.0/16"]}],
        "ssh": [{"action": "check", "src": ["autogroup:member"], "dst": ["tag:a"], "users": ["root"],
            "checkPeriod": "12h", "acceptEnv": ["GIT_*"], "srcPosture": ["posture:p"]}],
        "tests": [{"src": "ann@example.com", "accept": ["tag:a:80"], "deny": ["tag:b:22"], "proto": "tcp",
            "srcPostureAttrs": {"node:os": "linux"}}],
        "sshTests": [{"src": "ann@example.com", "dst": ["tag:a"], "accept": ["root"], "check": ["root"],
            "deny": ["eve"]}],
        "randomizeClientPort": true,
    })
}

/// Where each value that is no object stands, with the value.
fn fields(value: &Value, at: &str) -> Vec<(String, Value)> {
    match value {
        Value::Object(map) => {
            let inner = map.iter().filter(|(key, _)| !key.starts_with('#'));
            let escaped = inner.map(|(key, value)| (key.replace('~', "~0").replace('/', "~1"), value));
            escaped.flat_map(|(key, value)| fields(value, &format!("{at}/{key}"))).collect()
        }
        Value::Array(items) if items.first().is_some_and(Value::is_object) => {
            items.iter().enumerate().flat_map(|(i, item)| fields(item, &format!("{at}/{i}"))).collect()
        }
        other => vec![(at.to_owned(), other.clone())],
    }
}

/// True JSON Schema for as much of it as our schema uses; a keyword it doesn't know fails the test.
fn fits(rule: &Value, value: &Value, root: &Value, at: &str) -> Result<(), String> {
    if *rule == Value::Bool(true) {
        return Ok(());
    }
    let empty = Map::new();
    let rule = rule.as_object().ok_or("a schema is an object")?;
    let properties = rule.get("properties").and_then(Value::as_object).unwrap_or(&empty);
    for (keyword, what) in rule {
        let good = match keyword.as_str() {
            "$schema" | "$defs" | "title" | "description" | "deprecated" | "properties" => true,
            "patternProperties" => *what == json!({"^#": true}),
            "$ref" => {
                let path = what.as_str().and_then(|r| r.strip_prefix('#')).ok_or("a reference in here")?;
                fits(root.pointer(path).ok_or("what is referred to")?, value, root, at)?;
                true
            }
            "type" => match what {
                Value::Array(any) => any.iter().any(|kind| is(kind, value)),
                kind => is(kind, value),
            },
            "enum" => what.as_array().is_some_and(|any| any.contains(value)),
            "anyOf" => {
                let any = what.as_array().ok_or("a list")?;
                any.iter().any(|rule| fits(rule, value, root, at).is_ok())
            }
            "items" => {
                let items = value.as_array().into_iter().flatten().enumerate();
                items.into_iter().try_for_each(|(i, item)| fits(what, item, root, &format!("{at}/{i}")))?;
                true
            }
            "required" => {
                let names = what.as_array().into_iter().flatten().filter_map(Value::as_str);
                names.into_iter().all(|name| value.get(name).is_some())
            }
            "additionalProperties" => {
                for (key, inner) in value.as_object().unwrap_or(&empty) {
                    let at = format!("{at}/{key}");
                    match (properties.get(key), what) {
                        (Some(rule), _) => fits(rule, inner, root, &at)?,
                        (None, _) if key.starts_with('#') => {}
                        (None, Value::Bool(false)) => return Err(format!("{at} is unknown")),
                        (None, rule) => fits(rule, inner, root, &at)?,
                    }
                }
                true
            }
            other => return Err(format!("this test does not know the keyword {other}")),
        };
        if !good {
            return Err(format!("{at}: {value} against {keyword} {what}"));
        }
    }
    Ok(())
}

fn is(kind: &Value, value: &Value) -> bool {
    match kind.as_str() {
        Some("object") => value.is_object(),
        Some("array") => value.is_array(),
        Some("string") => value.is_string(),
        Some("number") => value.is_number(),
        Some("boolean") => value.is_boolean(),
        Some("null") => value.is_null(),
        _ => false,
    }
}
