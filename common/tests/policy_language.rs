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
fn a_grant_of_relaying_names_who_relays_and_for_whom() {
    let relays = |grant: Value| {
        let mut base = json!({"dst": ["tag:router"], "app": {"warren/cap/relay": []}});
        for (key, value) in grant.as_object().expect("an object") {
            base[key] = value.clone();
        }
        json!({"grants": [base]})
    };
    let users =
        |c: &Compiled, relay: &str| -> Vec<String> { c.relay_users(relay, NOW).into_iter().collect() };
    let at = |grant: Value, relay: &str| users(&built(relays(grant)), relay);
    assert_eq!(at(json!({"src": ["group:eng"]}), "router"), ["laptop", "phone"]);
    assert_eq!(at(json!({"src": ["*"]}), "router"), ["db", "desk", "laptop", "phone"], "never for itself");
    assert!(at(json!({"src": ["*"]}), "db").is_empty());
    let tailscale = json!({"src": ["bob@"], "app": {"tailscale.com/cap/relay": []}});
    assert_eq!(at(tailscale, "router"), ["desk"]);
    assert!(at(json!({"src": ["*"], "app": {"example.com/cap/relay": []}}), "router").is_empty());
    assert!(at(json!({"src": ["*"], "staged": true}), "router").is_empty());
    assert_eq!(
        at(json!({"src": ["autogroup:member"], "srcPosture": ["posture:linux"]}), "router"),
        ["laptop"]
    );
    assert!(at(json!({"src": ["*"], "dstPosture": ["posture:linux"]}), "router").is_empty());
    assert!(at(json!({"src": ["*"], "expires": "2026-03-01T00:00:00Z"}), "router").is_empty());
    let own = json!({"src": ["autogroup:member"], "dst": ["autogroup:self"]});
    assert_eq!(at(own, "laptop"), ["phone"]);
    // What stands behind a route neither uses a relay nor is one.
    assert!(at(json!({"src": ["10.0.0.0/16"], "dst": ["tag:db"]}), "db").is_empty());
    assert!(at(json!({"src": ["bob@"], "dst": ["10.0.0.0/16"]}), "router").is_empty());
    assert_eq!(at(json!({"src": ["100.64.0.3"], "dst": ["100.64.0.5"]}), "router"), ["desk"]);
    // It opens no port, and makes nobody see anybody.
    let c = built(relays(json!({"src": ["*"]})));
    assert!(!open(&c, "laptop", "router", 443) && c.node("laptop").expect("exists").peers.is_empty());
    // A denial of everything between two wins.
    let mut denied = relays(json!({"src": ["*"]}));
    denied["deny"] = json!([{"src": ["bob@"], "dst": ["*"], "ip": ["*"]}]);
    assert_eq!(users(&built(denied), "router"), ["db", "laptop", "phone"]);
}

#[test]
fn relaying_by_the_clock_is_looked_at_again_when_it_begins_and_ends() {
    let windowed = |from: &str, to: &str| {
        built(json!({"grants": [{"src": ["bob@"], "dst": ["tag:router"], "app": {"warren/cap/relay": []},
            "when": {"from": from, "to": to}}]}))
    };
    let hour = 3_600;
    let c = windowed("13:00", "14:00");
    assert!(c.relay_users("router", NOW).is_empty());
    assert_eq!(c.reevaluate_at(), Some(NOW + hour));
    assert_eq!(c.relay_users("router", NOW + hour).len(), 1);
    let c = windowed("11:00", "14:00");
    assert_eq!((c.relay_users("router", NOW).len(), c.reevaluate_at()), (1, Some(NOW + 2 * hour)));
    assert!(c.relay_users("router", NOW + 2 * hour).is_empty());
}

#[test]
fn relays_are_told_by_explain_and_diff_and_follow_a_device() {
    let file = |src: Value| {
        built(json!({"grants": [
            {"src": ["*"], "dst": ["tag:db"], "ip": ["5432"]},
            {"src": src, "dst": ["tag:router"], "app": {"warren/cap/relay": []}},
        ]}))
    };
    let mut both = file(json!(["bob@", "tag:db"]));
    let found = both.explain("desk", "db:5432", None).expect("answerable");
    assert_eq!(found.relays.len(), 1);
    assert_eq!(found.relays[0].device, "router (tag:router)");
    assert!(found.relays[0].grants.iter().all(|g| g.starts_with("grants[1]")), "{:?}", found.relays);
    // One end alone is not enough.
    let one = file(json!(["bob@"]));
    assert!(one.explain("desk", "db:5432", None).expect("answerable").relays.is_empty());
    assert!(both.explain("laptop", "db:5432", None).expect("answerable").relays.is_empty());
    assert!(both.explain("desk", "db:22", None).expect("answerable").relays.is_empty(), "it is denied");
    let told = warren_common::policy::diff(&one, &both).other;
    assert!(told.iter().any(|line| line == "router: may relay for db"), "{told:?}");
    let told = warren_common::policy::diff(&both, &one).other;
    assert!(told.iter().any(|line| line == "router: may no longer relay for db"), "{told:?}");
    // Who gets the tag becomes a user, and the relaying device is among those whose policy has changed.
    let mut node = inventory().nodes["desk"].clone();
    node.user = None;
    node.tags = ["tag:db".to_owned()].into();
    let mut by_tag = file(json!(["tag:db"]));
    let changed = by_tag.set_node("desk", Some(&node), NOW).expect("no conflict");
    assert!(changed.iter().any(|name| name == "router"), "{changed:?}");
    assert_eq!(by_tag.relay_users("router", NOW).len(), 2);
    both.set_node("router", None, NOW).expect("no conflict");
    assert!(both.relay_users("router", NOW).is_empty());
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

#[test]
fn a_bad_condition_is_named_alone() {
    let posture =
        |conditions: Value| Policy::parse(&json!({"postures": {"posture:p": conditions}}).to_string());
    let found = posture(json!(["node:os = 'linux'"])).expect_err("no such operator");
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!(posture(json!([])).expect("valid").warnings().len(), 1);
}

/// What users of other control planes find valid or not, by family.
#[test]
fn what_is_valid_elsewhere_is_valid_here() {
    let acl = |src: &str, dst: &str| json!({"acls": [{"action": "accept", "src": [src], "dst": [dst]}]});
    let proto = |proto: &str, dst: &str| json!({"acls": [{"action": "accept", "src": ["*"], "dst": [dst], "proto": proto}]});
    let grant = |ip: &str| json!({"grants": [{"src": ["*"], "dst": ["tag:db"], "ip": [ip]}]});
    let app = |name: &str| json!({"grants": [{"src": ["*"], "dst": ["*"], "app": {name: [{}]}}]});
    let via =
        |tag: &str| json!({"grants": [{"src": ["*"], "dst": ["10.0.0.0/8"], "ip": ["*"], "via": [tag]}]});
    let ssh = |src: &str, dst: &str| json!({"ssh": [{"action": "accept", "src": [src], "dst": [dst], "users": ["root"]}]});
    let check = |period: &str| {
        json!({"ssh": [{"action": "check", "src": ["autogroup:member"], "dst": ["tag:db"],
        "users": ["root"], "checkPeriod": period}]})
    };
    let attr = |target: &str| json!({"nodeAttrs": [{"target": [target], "attr": ["x"]}]});
    let valid = [
        acl("*", "*:*"),
        acl("*", "autogroup:self:*"),
        acl("autogroup:danger-all", "tag:db:22-22"),
        acl("bob@", "autogroup:internet:443"),
        acl("*", "[fd7a:115c:a1e0::]/64:22"),
        acl("nobody@example.com", "fd7a:115c:a1e0::1:22"),
        acl("0.0.0.0/0", "0.0.0.0/0:*"),
        proto("ICMP", "tag:db:*"),
        proto("132", "tag:db:1-9"),
        proto("99", "tag:db:*"),
        grant("22,80-90"),
        grant("icmp:*"),
        grant("47:*"),
        app("example.com/cap/x"),
        app("tailscale.com/cap/drive"),
        via("tag:router"),
        ssh("autogroup:member", "autogroup:self"),
        ssh("bob@example.com", "bob@example.com"),
        ssh("tag:db", "autogroup:tagged"),
        check("0s"),
        check("168h"),
        check("always"),
        attr("*"),
        attr("autogroup:admin"),
        attr("100.64.0.0/24"),
        json!({"tagOwners": {"tag:a": ["tag:b"], "tag:b": ["tag:a"], "tag:c": []}}),
        json!({"acls": [{"action": "accept", "src": [], "dst": ["*:*"]}]}),
        json!({"hosts": {"a b": "10.1.2.3/8"}}),
    ];
    for extra in valid {
        assert!(policy(extra.clone()).is_ok(), "{extra}: {:?}", policy(extra.clone()).err());
    }
    let refused = [
        acl("autogroup:self", "*:*"),
        acl("autogroup:internet", "*:*"),
        acl("tag:db", "autogroup:self:*"),
        acl("*", "autogroup:danger-all:*"),
        acl("*", "[10.0.0.1]:22"),
        acl("*", "tag:db:0"),
        acl("*", "tag:db:90-80"),
        acl("*", "tag:db:*,22"),
        acl("*", "tag:unknown:22"),
        acl("group:unknown", "*:*"),
        proto("icmp", "tag:db:22"),
        proto("*", "tag:db:*"),
        proto("06", "tag:db:*"),
        proto("256", "tag:db:*"),
        grant("*:22"),
        grant("tcp:22,udp:53"),
        grant("0"),
        app("https://example.com/cap/x"),
        app("tailscale.com/cap/ingress"),
        via("autogroup:tagged"),
        via("tag:unknown"),
        json!({"grants": [{"src": ["*"], "dst": ["autogroup:self"], "ip": ["*"]}]}),
        json!({"grants": [{"src": ["*"], "dst": ["::/0"], "ip": ["*"]}]}),
        json!({"grants": [{"src": ["*"], "dst": ["autogroup:internet"], "app": {"example.com/cap/x": []}}]}),
        ssh("*", "tag:db"),
        ssh("100.64.0.1", "tag:db"),
        ssh("autogroup:member", "*"),
        ssh("autogroup:member", "group:eng"),
        ssh("autogroup:member", "autogroup:internet"),
        ssh("tag:db", "autogroup:member"),
        ssh("tag:db", "autogroup:self"),
        ssh("autogroup:member", "bob@example.com"),
        check("-1h"),
        check("168h1s"),
        check(""),
        attr("autogroup:self"),
        attr("autogroup:internet"),
        attr("tag:unknown"),
        json!({"tagOwners": {"tag:1a": []}}),
        json!({"tagOwners": {"tag:a": ["*"]}}),
        json!({"groups": {"group:a": ["ann"]}}),
        json!({"groups": {"group:a": ["group:b"], "group:b": []}}),
        json!({"hosts": {"a:b": "10.0.0.1"}}),
        json!({"hosts": {"a": "10.0.0.1/33"}}),
        json!({"autoApprovers": {"exitNode": ["*"]}}),
        json!({"autoApprovers": {"routes": {"10.0.0.0/8": ["tag:unknown"]}}}),
    ];
    for extra in refused {
        assert!(policy(extra.clone()).is_err(), "{extra}");
    }
}

/// A rule through a device covers the networks it carries, as far as both speak of them, and never its own address.
#[test]
fn via_covers_carried_networks_alone() {
    let to = |dst: &str| {
        built(
            json!({"grants": [{"src": ["bob@example.com"], "dst": [dst], "ip": ["*"], "via": ["tag:router"]}]}),
        )
    };
    for (dst, inside, outside) in [
        ("10.0.0.0/8", Some("10.0.3.4"), "10.9.0.1"),
        ("10.0.7.0/24", Some("10.0.7.1"), "10.0.8.1"),
        ("*", None, "10.0.0.1"),
        ("tag:router", None, "100.64.0.5"),
        ("tag:db", None, "100.64.0.4"),
    ] {
        let c = to(dst);
        assert!(inside.is_none_or(|addr| open(&c, "desk", addr, 22)), "{dst}");
        assert!(!open(&c, "desk", outside, 22), "{dst}");
        assert!(!open(&c, "laptop", inside.unwrap_or(outside), 22), "{dst}");
        assert!(!open(&c, "desk", "router", 22) && !open(&c, "desk", "db", 22), "{dst}");
    }
}

/// An address selects itself and no other address of the device, in either family.
#[test]
fn literals_are_exactly_what_they_say() {
    let mut inventory = inventory();
    let v6: IpAddr = "fd7a:115c:a1e0::4".parse().expect("an address");
    inventory.nodes.get_mut("db").expect("exists").ipv6 = Some(v6);
    let from: IpAddr = "fd7a:115c:a1e0::3".parse().expect("an address");
    inventory.nodes.get_mut("desk").expect("exists").ipv6 = Some(from);
    let rules = |dst: &str| {
        let file = policy(json!({"grants": [{"src": ["bob@example.com"], "dst": [dst], "ip": ["tcp:22"]}]}));
        compile(&file.expect("valid"), &inventory, NOW, 0).expect("compiles").ingress("db")
    };
    let covers = |rules: &[FilterRule], v6: bool| {
        let (src, dst) =
            if v6 { ("fd7a:115c:a1e0::3", "fd7a:115c:a1e0::4") } else { ("100.64.0.3", "100.64.0.4") };
        let addr = |text: &str| text.parse::<IpAddr>().expect("an address");
        rules.iter().any(|r| r.covers(addr(src), addr(dst), 6, 22))
    };
    for (dst, v4, v6) in [
        ("100.64.0.4", true, false),
        ("100.64.0.4/32", true, false),
        ("100.64.0.0-100.64.0.4", true, false),
        ("fd7a:115c:a1e0::4", false, true),
        ("fd7a:115c:a1e0:0::0:4/128", false, true),
        ("fd7a:115c:a1e0::/48", false, true),
        ("tag:db", true, true),
        ("100.64.0.5", false, false),
    ] {
        let rules = rules(dst);
        assert_eq!((covers(&rules, false), covers(&rules, true)), (v4, v6), "{dst}");
    }
}

/// How the file's own tests count: protocols, networks, what nobody owns.
#[test]
fn how_tests_of_the_file_count() {
    let run = |rule: Value, test: Value| {
        let c = built(json!({"grants": [rule], "tests": [test]}));
        c.run_tests().passed()
    };
    let to_net =
        json!({"src": ["bob@example.com"], "dst": ["10.0.0.0/16"], "ip": ["22"], "via": ["tag:router"]});
    assert!(run(to_net.clone(), json!({"src": "bob@example.com", "accept": ["10.0.1.1:22"]})));
    assert!(run(to_net, json!({"src": "bob@example.com", "deny": ["10.9.1.1:22"]})));
    let all = json!({"src": ["*"], "dst": ["*"], "ip": ["*"]});
    assert!(run(all.clone(), json!({"src": "bob@example.com", "proto": "17", "accept": ["8.8.8.8:53"]})));
    assert!(run(all.clone(), json!({"src": "bob@example.com", "proto": "sctp", "deny": ["tag:db:22"]})));
    assert!(run(all.clone(), json!({"src": "8.8.8.8", "deny": ["tag:db:22"]})));
    assert!(!run(all, json!({"src": "nobody@example.com", "accept": ["tag:db:22"]})));
    let public = json!({"src": ["bob@example.com"], "dst": ["autogroup:internet"], "ip": ["*"]});
    assert!(run(
        public,
        json!({"src": "bob@example.com", "accept": ["8.8.8.8:443"], "deny": ["10.0.1.1:443"]})
    ));
    let own = json!({"src": ["autogroup:member"], "dst": ["autogroup:self"], "ip": ["*"]});
    assert!(run(own, json!({"src": "ann@example.com", "deny": ["ann@example.com:22"]})));
}
