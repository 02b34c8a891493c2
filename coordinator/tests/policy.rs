//! From a policy edit to what agents hold: what is cut goes first, what is added follows, nothing else moves.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test's helper fails by panicking")]

mod support;

use std::net::IpAddr;
use std::path::PathBuf;

use support::{Client, TestCoordinator};
use warren_common::filter::Action;
use warren_common::wire::control::{
    ClientBody, Presence, Report, RuleOrigin, RuleOriginsRequest, ServerBody, Signal, UpdateKind,
};
use warren_coordinator::admin::Call;
use warren_coordinator::policy_source::Source;

const WEB_TO_DB: &str = r#"{ // comments are fine
  "tagOwners": {"tag:web": [], "tag:db": []},
  "acls": [{"action": "accept", "src": ["tag:web"], "dst": ["tag:db:5432"]}],
}"#;

async fn join(coordinator: &TestCoordinator, seed: u64, tag: &str, hostname: &str) -> Client {
    let key = coordinator.auth_key_with(&[tag], false).await;
    Client::join(coordinator.addr, &key, seed, hostname).await
}

fn presence(body: Option<ServerBody>) -> Presence {
    match body {
        Some(ServerBody::Presence(presence)) => presence,
        other => panic!("expected presence, got {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_allowed_until_a_policy_says_so_and_then_only_that() {
    let coordinator = TestCoordinator::start().await;
    let mut web = join(&coordinator, 1, "tag:web", "web").await;
    let mut db = join(&coordinator, 2, "tag:db", "db").await;
    let mut other = join(&coordinator, 3, "tag:other", "other").await;
    assert!(web.netmap().peers.is_empty() && db.netmap().peers.is_empty());

    let status = coordinator.set_policy(WEB_TO_DB).await;
    assert_eq!((status["source"].as_str(), status["revision"].as_u64()), (Some("api"), Some(1)));
    assert!(status["error"].is_null() && status["sha256"].as_str().unwrap().len() == 64);

    for client in [&mut web, &mut db] {
        client.until(|n| n.peers.len() == 1).await;
    }
    // The web server opens connections and learns the database's name; the database only answers.
    assert_eq!(web.netmap().peers[&db.id()].name.as_deref(), Some("db"));
    assert_eq!(db.netmap().peers[&web.id()].name, None);
    assert_eq!(db.netmap().peers[&web.id()].tags, ["tag:web"]);
    let (web_addr, db_addr) = (web.netmap().device.addrs[1], db.netmap().device.addrs[1]);
    let covers = |rules: &std::collections::BTreeSet<warren_common::filter::FilterRule>, port| {
        rules.iter().any(|r| r.action == Action::Allow && r.covers(web_addr, db_addr, 6, port))
    };
    assert!(covers(&web.netmap().egress, 5432) && covers(&db.netmap().ingress, 5432));
    assert!(
        !covers(&db.netmap().ingress, 22) && web.netmap().ingress.is_empty() && db.netmap().egress.is_empty()
    );
    assert!(presence(web.next_other().await).online.contains(&db.id().to_bytes().to_vec()));

    // Signals pass between the two and to nobody else.
    let signal = |to: &Client, bytes: usize| {
        ClientBody::Signal(Signal { device: to.id().to_bytes().to_vec(), sealed: vec![7; bytes] })
    };
    other.send(signal(&db, 10)).await;
    web.send(signal(&other, 10)).await;
    web.send(signal(&db, 1_201)).await;
    web.send(signal(&db, 1_200)).await;
    loop {
        match db.next_other().await {
            Some(ServerBody::Signal(got)) => {
                assert_eq!((got.device, got.sealed.len()), (web.id().to_bytes().to_vec(), 1_200));
                break;
            }
            Some(ServerBody::Presence(_)) => {}
            unexpected => panic!("{unexpected:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_cut_goes_first_and_what_both_allow_never_stops() {
    let coordinator = TestCoordinator::start().await;
    coordinator.set_policy(WEB_TO_DB).await;
    let mut db = join(&coordinator, 2, "tag:db", "db").await;
    let web = join(&coordinator, 1, "tag:web", "web").await;
    db.until(|n| n.peers.len() == 1).await;
    // Another web server joins: the database's rule gets a source; nothing is taken away.
    let second = join(&coordinator, 3, "tag:web", "web").await;
    assert_eq!(second.netmap().device.name, "web-1");
    let before = db.disk.revision;
    let update = db.next_update().await;
    let UpdateKind::Delta(delta) = &update.kind else { panic!("{update:?}") };
    assert_eq!((update.from, delta.removed_peers.len(), delta.peers.len()), (before, 0, 1));
    assert_eq!(db.netmap().peers.len(), 2);

    // An edit that cuts the one and adds something else: first the cut alone, then the rest.
    let edited = WEB_TO_DB.replace("tag:db:5432", "tag:db:5433");
    coordinator.set_policy(&edited).await;
    let update = db.next_update().await;
    let UpdateKind::Delta(cut) = &update.kind else { panic!("{update:?}") };
    assert!(!cut.removed_ingress.is_empty());
    let port_open = |client: &Client, port| {
        let (src, dst) = (web.netmap().device.addrs[0], client.netmap().device.addrs[0]);
        client.netmap().ingress.iter().any(|r| r.action == Action::Allow && r.covers(src, dst, 6, port))
    };
    assert!(!port_open(&db, 5432) && !port_open(&db, 5433));
    let update = db.next_update().await;
    assert!(matches!(&update.kind, UpdateKind::Delta(d) if !d.ingress.is_empty()));
    assert!(!port_open(&db, 5432) && port_open(&db, 5433));

    // A removed device disappears from its peers at once.
    coordinator.call(Call::DeviceRemove { device: web.id().to_string() }).await.unwrap();
    let update = db.next_update().await;
    assert!(matches!(&update.kind, UpdateKind::Delta(d) if d.removed_peers == [web.id()]));
    assert!(!port_open(&db, 5433));
}

/// What the file says beside connections: who carries networks and for whom, what a device is told of itself and of what
/// others may do at its applications.
#[tokio::test(flavor = "multi_thread")]
async fn approved_routes_via_attributes_and_capabilities_reach_their_devices() {
    let coordinator = TestCoordinator::start().await;
    let policy = r#"{
        "tagOwners": {"tag:web": [], "tag:gate": [], "tag:spare": []},
        "autoApprovers": {"routes": {"10.32.0.0/12": ["tag:gate", "tag:spare"]}, "exitNode": ["tag:gate"]},
        "nodeAttrs": [{"target": ["tag:web"], "attr": ["example.com/beta", "example.com/alpha"]}],
        "grants": [
            {"src": ["tag:web"], "dst": ["10.33.0.0/16"], "ip": ["tcp:443"], "via": ["tag:gate"]},
            {"src": ["tag:web"], "dst": ["tag:spare"], "ip": ["22"], "app": {"example.com/cap/shell": [{"as": "ops"}]}},
        ]}"#;
    coordinator.set_policy(policy).await;
    let mut web = join(&coordinator, 1, "tag:web", "web").await;
    let mut gate = join(&coordinator, 2, "tag:gate", "gate").await;
    let mut spare = join(&coordinator, 3, "tag:spare", "spare").await;
    web.until(|n| n.peers.contains_key(&spare.id())).await;
    assert_eq!(web.netmap().device.attrs, ["example.com/alpha", "example.com/beta"]);
    assert!(gate.netmap().device.attrs.is_empty());
    // Both offer the network, and another that nobody approves; `via` names one of them.
    for router in [&mut gate, &mut spare] {
        let routes = vec!["10.33.0.0/16".to_owned(), "192.168.0.0/16".to_owned()];
        router.send(ClientBody::Report(Report { routes, ..Report::default() })).await;
    }
    let (src, lan) = (web.netmap().device.addrs[0], IpAddr::from([10, 33, 0, 9]));
    gate.until(|n| n.ingress.iter().any(|r| r.covers(src, lan, 6, 443))).await;
    web.until(|n| n.peers.contains_key(&gate.id())).await;
    let carried = |client: &Client| -> Vec<String> {
        web.netmap().peers[&client.id()].routes.iter().map(ToString::to_string).collect()
    };
    assert_eq!((carried(&gate), carried(&spare)), (vec!["10.33.0.0/16".to_owned()], vec![]));
    let egress = |port| web.netmap().egress.iter().any(|r| r.covers(src, lan, 6, port));
    assert!(egress(443) && !egress(80));
    let private = IpAddr::from([192, 168, 0, 1]);
    assert!(!gate.netmap().ingress.iter().any(|r| r.covers(src, private, 6, 443)));
    spare.until(|n| !n.apps.is_empty()).await;
    let app = spare.netmap().apps.first().unwrap();
    assert_eq!(
        (app.name.as_str(), app.values.as_slice()),
        ("example.com/cap/shell", &[r#"{"as":"ops"}"#.to_owned()][..])
    );
    assert!(app.src.iter().any(|r| r.contains(src)) && gate.netmap().apps.is_empty());
    // Tools see the network as the coordinator does.
    let exported = coordinator.call(Call::PolicyInventory).await.unwrap();
    let inventory = serde_json::from_value(exported).unwrap();
    let parsed = warren_common::policy::Policy::parse(policy).unwrap();
    let compiled = warren_common::policy::compile(&parsed, &inventory, 0, 0).unwrap();
    assert!(compiled.explain("web", "10.33.0.9:443", None).unwrap().allowed);
    // An approval that leaves the file leaves the devices.
    coordinator.set_policy(&policy.replace("10.32.0.0/12", "10.48.0.0/12")).await;
    web.until(|n| !n.peers.contains_key(&gate.id())).await;
    gate.until(|n| n.ingress.is_empty()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn suspending_and_expiring_cut_and_restoring_lets_back() {
    let coordinator = TestCoordinator::start().await;
    coordinator.set_policy(r#"{"acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}]}"#).await;
    let call = Call::AuthKeyCreate {
        tags: vec![],
        user: Some("Ann@Example.com".into()),
        reusable: false,
        ephemeral: false,
        life_s: None,
    };
    let key = coordinator.call(call).await.unwrap()["key"].as_str().unwrap().parse().unwrap();
    let mut server = join(&coordinator, 1, "tag:server", "server").await;
    let mut laptop = Client::join(coordinator.addr, &key, 2, "laptop").await;
    assert_eq!(laptop.netmap().device.user.as_deref(), Some("ann@example.com"));
    server.until(|n| n.peers.len() == 1).await;
    assert_eq!(server.netmap().peers[&laptop.id()].user.as_deref(), Some("ann@example.com"));

    coordinator.call(Call::UserSuspend { email: "ann@example.com".into() }).await.unwrap();
    server.until(|n| n.peers.is_empty()).await;
    // The laptop itself loses everything before it hears why.
    laptop.next_update().await;
    assert!(laptop.netmap().peers.is_empty() && laptop.netmap().egress.is_empty());
    assert!(
        matches!(laptop.next_other().await, Some(ServerBody::Refused(r)) if r.text.contains("suspended"))
    );

    coordinator.call(Call::UserRestore { email: "ann@example.com".into() }).await.unwrap();
    server.until(|n| n.peers.len() == 1).await;
    let (disk, keys) = (laptop.disk.clone(), laptop.keys.clone());
    let mut laptop = Client::connect(coordinator.addr, &key.root, &keys).await.unwrap();
    let welcome = laptop.resume(disk).await.unwrap();
    laptop.confirm(&welcome).await;
    laptop.next_update().await;
    assert_eq!(laptop.netmap().peers.len(), 1);

    coordinator.call(Call::DeviceExpire { device: "laptop".into() }).await.unwrap();
    laptop.next_update().await;
    assert!(matches!(laptop.next_other().await, Some(ServerBody::Refused(r)) if r.code == "needs-login"));
    server.until(|n| n.peers.is_empty()).await;
}

/// Waits until `policy status` says what `wanted` wants.
async fn status(
    coordinator: &TestCoordinator,
    wanted: impl Fn(&serde_json::Value) -> bool,
) -> serde_json::Value {
    let poll = async {
        loop {
            let status = coordinator.call(Call::PolicyStatus).await.unwrap();
            if wanted(&status) {
                return status;
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(support::PATIENCE, poll).await.expect("the status gets there")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_file_is_followed_and_a_bad_edit_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path: PathBuf = dir.path().join("policy.hujson");
    std::fs::write(&path, WEB_TO_DB).unwrap();
    let mut coordinator = TestCoordinator::start_with(|o| o.policy = Source::File(path.clone())).await;
    let first = status(&coordinator, |s| s["revision"] == 1).await;
    assert_eq!((first["source"].as_str(), first["path"].as_str()), (Some("file"), path.to_str()));
    let mut web = join(&coordinator, 1, "tag:web", "web").await;
    let db = join(&coordinator, 2, "tag:db", "db").await;
    web.next_update().await;

    // A bad edit: the reason with its line is shown, the policy stays.
    std::fs::write(&path, WEB_TO_DB.replace("\"accept\"", "\"acept\"")).unwrap();
    let bad = status(&coordinator, |s| !s["error"].is_null()).await;
    assert!(bad["error"].as_str().unwrap().contains(":3:"), "{bad}");
    assert_eq!((&bad["revision"], &bad["sha256"]), (&first["revision"], &first["sha256"]));
    // It stays over a restart, with the file bad, and with the file gone.
    coordinator.restart().await;
    let after = status(&coordinator, |s| !s["error"].is_null()).await;
    assert_eq!(after["sha256"], first["sha256"]);
    std::fs::remove_file(&path).unwrap();
    coordinator.restart().await;
    let after = status(&coordinator, |s| s["error"].as_str().is_some_and(|e| e.contains("can't read"))).await;
    assert_eq!(after["sha256"], first["sha256"]);
    let mut again =
        Client::connect(coordinator.addr, &coordinator.auth_key().await.root, &web.keys).await.unwrap();
    let welcome = again.resume(web.disk.clone()).await.unwrap();
    again.confirm(&welcome).await;
    again.next_update().await;
    assert!(again.netmap().peers.contains_key(&db.id()));

    // The API can't take over from the file.
    let refused = coordinator.call(Call::PolicySet { text: "{}".into() }).await.unwrap_err();
    assert!(refused.text.contains("policy.hujson"), "{refused:?}");
    // A good edit is followed, and cuts.
    std::fs::write(&path, "{}").unwrap();
    status(&coordinator, |s| s["revision"] == 2 && s["error"].is_null()).await;
    again.until(|n| n.peers.is_empty()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_whose_own_tests_fail_is_refused_with_the_test() {
    let coordinator = TestCoordinator::start().await;
    join(&coordinator, 1, "tag:web", "web").await;
    join(&coordinator, 2, "tag:db", "db").await;
    let text =
        WEB_TO_DB.replace("\"acls\"", r#""tests": [{"src": "tag:web", "deny": ["tag:db:5432"]}], "acls""#);
    let refused = coordinator.call(Call::PolicySet { text }).await.unwrap_err();
    assert!(refused.usage && refused.text.contains("tests[0]"), "{refused:?}");
    let status = coordinator.call(Call::PolicyStatus).await.unwrap();
    assert_eq!(status["revision"], 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_edit_that_only_moves_lines_tells_nobody() {
    let coordinator = TestCoordinator::start().await;
    coordinator.set_policy(WEB_TO_DB).await;
    let mut db = join(&coordinator, 2, "tag:db", "db").await;
    let mut web = join(&coordinator, 1, "tag:web", "web").await;
    db.until(|n| n.peers.len() == 1).await;
    let rule = web.netmap().egress.first().unwrap().clone();
    assert_eq!(rule.origin, "acls[0] line 3");

    let edited = format!("// What this is for.\n\n/* by\n ann */ {WEB_TO_DB}\n\n");
    let status = coordinator.set_policy(&edited).await;
    assert_eq!(status["revision"], 2);
    for client in [&mut web, &mut db] {
        let before = client.updates.len();
        client.ping().await;
        assert_eq!(client.updates.len(), before, "an update came before the answer");
    }
    // Where it stands now is told to who asks, for rules it holds.
    let ask = RuleOriginsRequest { nonce: 7, rules: vec![rule.id.0, 1] };
    web.send(ClientBody::RuleOrigins(ask)).await;
    let answer = loop {
        match web.next_other().await {
            Some(ServerBody::RuleOrigins(answer)) => break answer,
            Some(ServerBody::Presence(_)) => {}
            unexpected => panic!("{unexpected:?}"),
        }
    };
    let moved = RuleOrigin { rule: rule.id.0, origin: "acls[0] line 6".into() };
    assert_eq!((answer.nonce, answer.rules), (7, vec![moved]));
    let mut other = join(&coordinator, 3, "tag:other", "other").await;
    other.send(ClientBody::RuleOrigins(RuleOriginsRequest { nonce: 8, rules: vec![rule.id.0] })).await;
    match other.next_other().await {
        Some(ServerBody::RuleOrigins(answer)) => assert!(answer.rules.is_empty()),
        unexpected => panic!("{unexpected:?}"),
    }
    // Nor does a reconnect: what the agent holds is what it should hold.
    let (keys, root) = (web.keys.clone(), coordinator.auth_key().await.root);
    let disk = web.close().await;
    let mut web = Client::connect(coordinator.addr, &root, &keys).await.unwrap();
    let welcome = web.resume(disk.clone()).await.unwrap();
    web.confirm(&welcome).await;
    let update = web.next_update().await;
    assert!(matches!(update.kind, UpdateKind::Lease) && update.to == disk.revision, "{update:?}");
}
