//! What the language means, one rule at a time, in a world of five devices.
#![expect(clippy::expect_used, reason = "helpers of tests: a failure is a failed test")]

use std::net::IpAddr;

use serde_json::{Value, json};
use warren_common::filter::{Action, FilterRule};
use warren_common::policy::{Compiled, Inventory, Policy, Truth, compile};

/// Friday, 27 March 2026, 12:00 UTC.
const NOW: i64 = 1_774_612_800;

fn inventory() -> Inventory {
    serde_json::from_value(json!({
        "users": [
            {"id": 1, "name": "ann", "email": "ann@example.com", "roles": ["admin"],
             "attributes": {"user:mfa": {"value": true, "source": "idp", "age_s": 3600}}},
            {"id": 2, "name": "bob", "email": "bob@example.com"},
        ],
        "nodes": {
            "laptop": {"user": "ann", "ipv4": "100.64.0.1",
                "attributes": {"node:os": {"value": "linux", "grade": "tpm", "age_s": 60}}},
            "phone": {"user": "ann", "ipv4": "100.64.0.2", "attributes": {"node:os": {"value": "ios", "age_s": 60}}},
            "desk": {"user": "bob", "ipv4": "100.64.0.3"},
            "db": {"tags": ["tag:db"], "ipv4": "100.64.0.4",
                "attributes": {"node:os": {"value": "linux", "age_s": 60}}},
            "router": {"tags": ["tag:router"], "ipv4": "100.64.0.5",
                "routable_ips": ["10.0.0.0/16", "10.9.0.0/16", "0.0.0.0/0"], "approved_routes": ["10.0.0.0/16", "0.0.0.0/0"]},
        },
    }))
    .expect("an inventory")
}

fn policy(extra: Value) -> Result<Policy, String> {
    let mut file = json!({
        "groups": {"group:eng": ["ann@example.com"]},
        "tagOwners": {"tag:db": [], "tag:router": []},
        "postures": {
            "posture:linux": ["node:os == 'linux'"],
            "posture:mfa": ["user:mfa == true WITHIN 2h"],
            "posture:tpm": ["attest:node:os >= 'tpm'"],
            "posture:friday": ["time:weekday == 'fri'"],
            "posture:monday": ["time:weekday == 'mon'"],
        },
    });
    for (key, value) in extra.as_object().expect("an object") {
        file[key] = value.clone();
    }
    Policy::parse(&file.to_string())
        .map_err(|found| found.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))
}

fn built(extra: Value) -> Compiled {
    compile(&policy(extra).expect("valid"), &inventory(), NOW, 86_400).expect("compiles")
}

fn open_at(compiled: &Compiled, from: &str, to: &str, port: u16, now: i64) -> bool {
    let inventory = inventory();
    let addr = |name: &str| -> IpAddr {
        name.parse().ok().or_else(|| inventory.nodes.get(name)?.ipv4).expect("a name or an address")
    };
    let (src, dst) = (addr(from), addr(to));
    let at = if inventory.nodes.contains_key(to) { to } else { "router" };
    let rules = compiled.ingress(at);
    let hit = |action: Action| {
        let live = |r: &&FilterRule| r.action == action && !r.staged && r.is_active(now);
        rules.iter().filter(live).any(|r| r.covers(src, dst, 6, port))
    };
    hit(Action::Allow) && !hit(Action::Deny)
}

fn open(compiled: &Compiled, from: &str, to: &str, port: u16) -> bool {
    open_at(compiled, from, to, port, NOW)
}

fn to_db(extra: Value) -> Value {
    let mut rule = json!({"src": ["autogroup:member"], "dst": ["tag:db"], "ip": ["5432"]});
    for (key, value) in extra.as_object().expect("an object") {
        rule[key] = value.clone();
    }
    rule
}

#[test]
fn nothing_is_allowed_by_nothing() {
    for file in [json!({}), json!({"grants": []}), json!({"acls": []})] {
        let compiled = built(file);
        assert!(compiled.names().all(|n| compiled.ingress(n).is_empty() && compiled.egress(n).is_empty()));
    }
    let empty = compile(&Policy::empty(), &inventory(), NOW, 0).expect("compiles");
    assert!(empty.names().all(|n| empty.node(n).is_some_and(|p| p.peers.is_empty())));
}

#[test]
fn postures() {
    let c = built(json!({"grants": [to_db(json!({"srcPosture": "posture:linux"}))]}));
    assert!(
        open(&c, "laptop", "db", 5432) && !open(&c, "phone", "db", 5432) && !open(&c, "desk", "db", 5432)
    );
    let c = built(json!({"grants": [to_db(json!({"srcPosture": ["posture:linux", "posture:mfa"]}))]}));
    assert!(open(&c, "phone", "db", 5432) && !open(&c, "desk", "db", 5432));
    let c = built(json!({"grants": [to_db(json!({"srcPosture": "posture:tpm"}))]}));
    assert!(open(&c, "laptop", "db", 5432) && !open(&c, "phone", "db", 5432));
    let c = built(json!({"grants": [to_db(json!({"dstPosture": "posture:linux"}))]}));
    assert!(open(&c, "desk", "db", 5432));
    let c = built(json!({"grants": [to_db(json!({"dstPosture": "posture:tpm"}))]}));
    assert!(!open(&c, "desk", "db", 5432));
}

#[test]
fn a_rules_own_posture_adds_to_the_default() {
    let with = |rule| built(json!({"defaultSrcPosture": ["posture:linux"], "grants": [rule]}));
    let c = with(to_db(json!({"srcPosture": "posture:mfa"})));
    assert!(open(&c, "laptop", "db", 5432) && !open(&c, "phone", "db", 5432));
    let c = with(to_db(json!({"srcPosture": "posture:mfa", "ignoreDefaultPosture": true})));
    assert!(open(&c, "phone", "db", 5432));
}

#[test]
fn a_denial_wins_and_takes_the_unknown_with_it() {
    let with = |deny: Value| built(json!({"grants": [to_db(json!({"ip": ["*"]}))], "deny": [deny]}));
    let c = with(json!({"src": ["*"], "dst": ["tag:db"], "ip": ["tcp:22"]}));
    assert!(open(&c, "laptop", "db", 5432) && !open(&c, "laptop", "db", 22));
    // Nobody reports the desk's system, so the denial counts it in.
    let c = with(json!({"src": ["autogroup:member"], "dst": ["tag:db"], "srcPosture": "posture:linux"}));
    assert!(!open(&c, "laptop", "db", 22) && open(&c, "phone", "db", 22) && !open(&c, "desk", "db", 22));
}

#[test]
fn a_full_denial_hides_devices_from_each_other() {
    let grant = json!({"src": ["*"], "dst": ["*"], "ip": ["*"]});
    let deny = |extra: Value| {
        let mut rule = json!({"src": ["bob@example.com"], "dst": ["tag:db"]});
        for (key, value) in extra.as_object().expect("an object") {
            rule[key] = value.clone();
        }
        built(json!({"grants": [grant], "deny": [rule]}))
    };
    let need = |c: &Compiled| c.node("desk").expect("exists").peers.get("db").cloned();
    let c = deny(json!({}));
    assert!(need(&c).is_some_and(|n| !n.may_reach && n.may_be_reached_by), "the other direction is open");
    assert!(need(&deny(json!({"ip": ["tcp:22"]}))).is_some_and(|n| n.may_reach));
    assert!(need(&deny(json!({"expires": "2027-01-01T00:00:00Z"}))).is_some_and(|n| n.may_reach));
    let c = built(json!({"grants": [grant], "deny": [
        {"src": ["bob@example.com"], "dst": ["tag:db"]}, {"src": ["tag:db"], "dst": ["bob@example.com"]},
    ]}));
    assert!(need(&c).is_none());
}

#[test]
fn staged_rules_are_carried_and_not_enforced() {
    let c = built(json!({"grants": [to_db(json!({"staged": true}))]}));
    assert!(c.ingress("db")[0].staged && !open(&c, "laptop", "db", 5432));
    assert!(c.node("laptop").expect("exists").peers.is_empty());
}

#[test]
fn time_ends_and_opens_at_the_agent() {
    let evening = json!({"days": ["fri"], "from": "14:00", "to": "16:00", "zone": "Europe/Berlin"});
    let c = built(json!({"grants": [to_db(json!({"when": evening}))]}));
    let hour = 3_600;
    // 14:00 in Berlin is 13:00 UTC before summer time.
    assert!(!open(&c, "laptop", "db", 5432));
    assert!(
        open_at(&c, "laptop", "db", 5432, NOW + hour) && !open_at(&c, "laptop", "db", 5432, NOW + 3 * hour)
    );
    assert!(c.reevaluate_at().is_some());
    let c = built(json!({"grants": [to_db(json!({"expires": "2026-03-27T13:00:00Z"}))]}));
    assert!(open(&c, "laptop", "db", 5432) && !open_at(&c, "laptop", "db", 5432, NOW + hour));
    assert_eq!(c.reevaluate_at(), Some(NOW + hour));
    let c = built(json!({"grants": [to_db(json!({"srcPosture": "posture:friday"}))]}));
    assert!(open(&c, "desk", "db", 5432) && !open_at(&c, "desk", "db", 5432, NOW + 12 * hour));
    let c = built(json!({"grants": [to_db(json!({"srcPosture": "posture:monday"}))]}));
    assert!(!open(&c, "desk", "db", 5432));
}

#[test]
fn a_fact_that_ages_asks_for_a_new_look() {
    let c = built(json!({"grants": [to_db(json!({"srcPosture": "posture:mfa"}))]}));
    assert_eq!(c.reevaluate_at(), Some(NOW + 3_601));
}

#[test]
fn own_devices() {
    let c =
        built(json!({"grants": [{"src": ["autogroup:member"], "dst": ["autogroup:self"], "ip": ["22"]}]}));
    assert!(open(&c, "laptop", "phone", 22) && !open(&c, "laptop", "desk", 22));
    let peers = c.node("laptop").expect("exists").peers;
    assert_eq!(peers.keys().collect::<Vec<_>>(), ["phone"]);
}

#[test]
fn routes_exit_nodes_and_via() {
    let c = built(json!({"grants": [{"src": ["group:eng"], "dst": ["10.0.0.0/8"], "ip": ["443"]}]}));
    assert!(open(&c, "laptop", "10.0.3.4", 443) && !open(&c, "desk", "10.0.3.4", 443));
    assert!(!open(&c, "laptop", "10.9.0.1", 443), "not approved");
    assert!(!open(&c, "laptop", "8.8.8.8", 443) && !open(&c, "laptop", "router", 443));
    let need = c.node("laptop").expect("exists").peers.remove("router").expect("needed");
    assert!(need.may_reach && !need.may_be_reached_by && !need.exit);
    assert_eq!(need.routes.iter().map(ToString::to_string).collect::<Vec<_>>(), ["10.0.0.0/16"]);
    let back = c.node("router").expect("exists").peers.remove("laptop").expect("needed");
    assert!(!back.may_reach && back.may_be_reached_by);

    let c = built(json!({"grants": [{"src": ["group:eng"], "dst": ["autogroup:internet"], "ip": ["*"]}]}));
    assert!(open(&c, "laptop", "8.8.8.8", 443) && !open(&c, "laptop", "10.0.3.4", 443));
    assert!(c.node("laptop").expect("exists").peers["router"].exit);

    let via = |tag: &str| {
        built(json!({"grants": [{"src": ["group:eng"], "dst": ["10.0.1.0/24"], "ip": ["*"], "via": [tag]}]}))
    };
    assert!(open(&via("tag:router"), "laptop", "10.0.1.1", 443));
    assert!(!open(&via("tag:db"), "laptop", "10.0.1.1", 443));
}

#[test]
fn what_the_file_approves_can_count_as_approved() {
    let file = policy(json!({
        "autoApprovers": {"routes": {"10.8.0.0/13": ["tag:router"]}, "exitNode": ["tag:db"]},
        "grants": [{"src": ["group:eng"], "dst": ["10.9.0.0/24", "10.16.0.0/16"], "ip": ["443"], "via": ["tag:router"]}],
    }));
    let file = file.expect("valid");
    let mut inventory = inventory();
    let by_hand = compile(&file, &inventory, NOW, 0).expect("compiles");
    assert!(!open(&by_hand, "laptop", "10.9.0.1", 443));
    inventory.auto_approve = true;
    let mut c = compile(&file, &inventory, NOW, 0).expect("compiles");
    assert!(open(&c, "laptop", "10.9.0.1", 443) && !open(&c, "desk", "10.9.0.1", 443));
    let need = c.node("laptop").expect("exists").peers.remove("router").expect("needed");
    assert_eq!(need.routes.iter().map(ToString::to_string).collect::<Vec<_>>(), ["10.9.0.0/16"]);
    // Who loses the role loses the approval, and who gains it may carry what it offers.
    let mut router = inventory.nodes["router"].clone();
    router.tags = ["tag:db".to_owned()].into();
    c.set_node("router", Some(&router), NOW).expect("no conflict");
    assert!(!open(&c, "laptop", "10.9.0.1", 443));
    router.tags = ["tag:router".to_owned()].into();
    router.routable_ips.insert("10.16.0.0/16".parse().expect("a network"));
    c.set_node("router", Some(&router), NOW).expect("no conflict");
    assert!(open(&c, "laptop", "10.9.0.1", 443) && !open(&c, "laptop", "10.16.0.1", 443));
}

#[test]
fn attributes_approvals_and_capabilities() {
    let c = built(json!({
        "nodeAttrs": [{"target": ["autogroup:admin"], "attr": ["x"], "ipPool": ["100.81.0.0/16"]}],
        "autoApprovers": {"routes": {"10.0.0.0/8": ["tag:router"]}, "exitNode": ["tag:db"]},
        "grants": [{"src": ["bob@"], "dst": ["tag:db"], "app": {"example.com/cap/sql": [{"role": "reader"}]}}],
        "randomizeClientPort": true,
    }));
    let laptop = c.node("laptop").expect("exists");
    assert!(laptop.attrs.contains("x") && laptop.attrs.contains("randomize-client-port"));
    assert_eq!(laptop.ip_pools.len(), 1);
    assert!(!c.node("desk").expect("exists").attrs.contains("x"));
    let approved = c.node("router").expect("exists").auto_approved_routes;
    assert_eq!(approved.iter().map(ToString::to_string).collect::<Vec<_>>(), ["10.0.0.0/16", "10.9.0.0/16"]);
    let db = c.node("db").expect("exists");
    assert!(db.ingress.is_empty() && db.peers.is_empty());
    assert_eq!(db.caps[0].name, "example.com/cap/sql");
    assert_eq!(db.caps[0].src.len(), 1);
}

#[test]
fn explain_names_what_is_missing() {
    let c = built(json!({"grants": [to_db(json!({"srcPosture": "posture:linux"}))]}));
    let found = c.explain("desk", "db:5432", None).expect("answerable");
    assert!(!found.allowed && found.nearest.len() == 1);
    let missing: Vec<_> = found.nearest[0].checks.iter().filter(|c| c.truth != Truth::True).collect();
    assert_eq!(missing.len(), 1);
    assert_eq!((missing[0].what, missing[0].truth), ("srcPosture", Truth::Unknown));
    assert_eq!(missing[0].conditions[0].why, "nobody reports it");
    assert_eq!(found.nearest[0].missing, ["srcPosture: node:os == 'linux': nobody reports it"]);
    let other = c.explain("laptop", "db:22", None).expect("answerable");
    assert_eq!(other.nearest[0].missing, ["ip: tcp:22 is not in any:5432"]);
    assert!(c.explain("laptop", "db:5432", None).expect("answerable").allowed);
    assert!(c.explain("laptop", "db", None).is_err());
    assert!(
        c.explain("ann@example.com", "db:1", None).expect_err("two devices").to_string().contains("phone")
    );
    assert!(c.explain("laptpo", "db:1", None).expect_err("unknown").to_string().contains("laptop"));
}

#[test]
fn tests_of_the_file() {
    let run = |tests: Value| {
        built(json!({"grants": [to_db(json!({"srcPosture": "posture:linux"}))], "tests": tests})).run_tests()
    };
    assert!(!run(json!([{"src": "bob@example.com", "accept": ["tag:db:5432"]}])).passed());
    let attrs = json!({"node:os": "linux"});
    assert!(
        run(json!([{"src": "bob@example.com", "accept": ["tag:db:5432"], "srcPostureAttrs": attrs}]))
            .passed()
    );
    // One of ann's two devices gets through: not all do, so the denial holds, and what is open is told.
    assert!(!run(json!([{"src": "ann@example.com", "accept": ["tag:db:5432"]}])).passed());
    let denied = run(json!([{"src": "ann@example.com", "deny": ["tag:db:5432"]}]));
    assert!(denied.passed() && denied.results[0].notes[0].contains("laptop"));
    assert!(run(json!([{"src": "ann@example.com", "deny": ["tag:db:22"]}])).passed());
}

#[test]
fn an_edit_elsewhere_renames_no_rule_and_tells_nobody() {
    let old = built(json!({"grants": [to_db(json!({}))]}));
    let new = built(json!({"grants": [
        {"src": ["bob@example.com"], "dst": ["tag:router"], "ip": ["22"]}, to_db(json!({"comment": "now second"})),
    ]}));
    assert_eq!(old.ingress("db")[0].id, new.ingress("db")[0].id);
    assert_eq!(new.changed_since(&old), ["desk", "router"]);
}

#[test]
fn mistakes_are_named_with_what_exists() {
    for (extra, want) in [
        (json!({"grants": [{"src": ["group:egn"], "dst": ["*"], "ip": ["*"]}]}), "group:eng"),
        (json!({"grants": [{"src": ["*"], "dst": ["tag:bd"], "ip": ["*"]}]}), "tag:db"),
        (json!({"grants": [{"src": ["*"], "dst": ["*"], "ipp": ["*"], "ip": ["*"]}]}), "\"ip\""),
        (json!({"grants": [{"src": ["*"], "dst": ["*"], "ip": ["tpc:1"]}]}), "\"tcp\""),
        (json!({"grants": [to_db(json!({"srcPosture": "posture:linx"}))]}), "posture:linux"),
        (json!({"deny": [{"src": ["*"], "ip": ["*"]}]}), "no \"dst\""),
        (json!({"grants": [to_db(json!({"when": {"zone": "Mars/Base"}}))]}), "Europe/Berlin"),
        (json!({"grants": [to_db(json!({"expires": "tomorrow"}))]}), "RFC 3339"),
        (json!({"nodeAttrs": [{"target": ["*"], "ipPool": ["10.0.0.0/8"]}]}), "100.64.0.0/10"),
        (
            json!({"ssh": [{"action": "check", "src": ["group:eng"], "dst": ["tag:db"], "users": ["root"],
            "checkPeriod": "7d"}]}),
            "168h",
        ),
        (
            json!({"grants": [{"src": ["*"], "dst": ["*"], "app": {"tailscale.com/cap/is-admin": []}}]}),
            "tailscale.com",
        ),
        (json!({"ACLs": [{"Action": "drop", "src": ["*"], "dst": ["*:*"]}]}), "deny"),
    ] {
        let message = policy(extra).expect_err(want);
        assert!(message.contains(want), "{want} in {message}");
    }
}

#[test]
fn older_and_differently_written_files() {
    let text = "{\"Groups\": {\"group:a\": [\"ann@example.com\"]}, \"TagOwners\": {\"tag:db\": null},
        \"ACLs\": [{\"Action\": \"accept\", \"Users\": [\"group:a\"], \"Ports\": [\"tag:db:22\"], \"#note\": 1}],
        \"derpMap\": {}, \"Tests\": [{\"User\": \"ann@example.com\", \"Allow\": [\"tag:db:22\"]}]}";
    let policy = Policy::parse(text).expect("valid");
    assert_eq!(policy.warnings().len(), 1);
    let c = compile(&policy, &inventory(), NOW, 0).expect("compiles");
    assert!(open(&c, "phone", "db", 22) && c.run_tests().passed());
}
