//! The policy over HTTP: only for token holders, and never over what somebody else has just written.
#![expect(clippy::unwrap_used, reason = "a test's helper fails by panicking")]

mod support;

use serde_json::Value;
use support::{Client, TestCoordinator, http_get, http_send};
use warren_coordinator::admin::Call;
use warren_coordinator::policy_source::Source;

const PATH: &str = "/api/v1/policy";
const OPEN: &str = r#"{"acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}]}"#;

async fn token(
    coordinator: &TestCoordinator,
    name: &str,
    write: bool,
    life_s: Option<u64>,
) -> (String, String) {
    let made = coordinator.call(Call::ApiTokenCreate { name: name.into(), write, life_s }).await.unwrap();
    let text = |key: &str| made[key].as_str().unwrap().to_owned();
    (text("id"), format!("Bearer {}", text("token")))
}

fn code(response: &str) -> u16 {
    response.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or(0)
}

fn etag(response: &str) -> String {
    response.lines().find_map(|line| line.strip_prefix("etag: ")).unwrap().to_owned()
}

fn body(response: &str) -> Value {
    serde_json::from_str(response.split_once("\r\n\r\n").unwrap().1).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_is_replaced_only_by_who_has_read_it() {
    let coordinator = TestCoordinator::start().await;
    let (_, write) = token(&coordinator, "ci", true, None).await;
    let ask = async |method: &str, headers: &[(&str, &str)], text: &str| {
        let headers = [&[("authorization", write.as_str())], headers].concat();
        http_send(coordinator.addr, method, PATH, &headers, text).await
    };
    assert_eq!(code(&ask("GET", &[], "").await), 404);
    // It must be said what is replaced.
    let answer = ask("PUT", &[], OPEN).await;
    assert_eq!(code(&answer), 428);
    assert!(body(&answer)["error"]["fix"].as_str().unwrap().contains("If-Match"));
    let made = ask("PUT", &[("if-none-match", "*")], OPEN).await;
    assert_eq!((code(&made), body(&made)["revision"].as_u64()), (200, Some(1)), "{made}");
    assert_eq!(code(&ask("PUT", &[("if-none-match", "*")], "{}").await), 412);

    let got = ask("GET", &[], "").await;
    assert!(code(&got) == 200 && got.ends_with(OPEN) && etag(&got) == etag(&made), "{got}");
    let tag = etag(&got);
    assert_eq!(code(&ask("GET", &[("if-none-match", &tag)], "").await), 304);
    // A bad policy changes nothing; a good one does, and reaches agents.
    let key = coordinator.auth_key_with(&["tag:x"], true).await;
    let mut one = Client::join(coordinator.addr, &key, 1, "one").await;
    let two = Client::join(coordinator.addr, &key, 2, "two").await;
    one.until(|n| n.peers.contains_key(&two.id())).await;
    let answer = ask("PUT", &[("if-match", &tag)], "{ \"acls\": 7 }").await;
    assert_eq!(code(&answer), 422);
    assert!(body(&answer)["error"]["text"].as_str().unwrap().contains("policy:1"), "{answer}");
    assert_eq!(code(&ask("PUT", &[("if-match", &tag)], "{}").await), 200);
    one.until(|n| n.peers.is_empty()).await;
    // Somebody who still has the old one overwrites nothing.
    assert_eq!(code(&ask("PUT", &[("if-match", &tag)], OPEN).await), 412);
    assert!(ask("GET", &[], "").await.ends_with("\r\n\r\n{}"));
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_open_what_they_say_and_end() {
    let mut coordinator = TestCoordinator::start().await;
    let (id, read) = token(&coordinator, "dashboard", false, None).await;
    let (_, write) = token(&coordinator, "ci", true, Some(3_600)).await;
    let send = async |c: &TestCoordinator, method: &str, path: &str, auth: &str| {
        let headers = [("authorization", auth), ("if-none-match", "*")];
        code(&http_send(c.addr, method, path, &headers, "{}").await)
    };
    // Nobody, somebody else, nearly right.
    let unknown = http_get(coordinator.addr, PATH).await.unwrap();
    assert!(code(&unknown) == 401 && unknown.contains("www-authenticate: Bearer"), "{unknown}");
    for auth in
        ["", "Bearer", "Bearer x", "Basic eDp5", &read[..read.len() - 1], &read.replace("wapi-", "wapi-A")]
    {
        assert_eq!(send(&coordinator, "GET", PATH, auth).await, 401, "{auth}");
    }
    assert_eq!(send(&coordinator, "PUT", PATH, &read).await, 403);
    assert_eq!(send(&coordinator, "PUT", PATH, &write).await, 200);
    for path in [PATH, "/api/v1/policy/status", "/api/v1/policy/inventory"] {
        assert_eq!(send(&coordinator, "GET", path, &read).await, 200, "{path}");
        assert_eq!(send(&coordinator, "GET", path, "").await, 401, "{path}");
    }
    // Hashed at rest: the list and the database know no secret.
    let list = coordinator.call(Call::ApiTokenList).await.unwrap();
    let may_write = |name: &str| {
        let token = list.as_array().unwrap().iter().find(|token| token["name"] == name);
        token.unwrap()["write"].as_bool().unwrap()
    };
    assert!(may_write("ci") && !may_write("dashboard"));
    assert!(!list.to_string().contains(&read[30..]));
    let again = coordinator.call(Call::ApiTokenCreate { name: "ci".into(), write: true, life_s: None }).await;
    assert!(again.unwrap_err().text.contains("exists already"));
    for (name, life) in [("", None), ("x", Some(0)), ("x", Some(400 * 86_400))] {
        let bad = Call::ApiTokenCreate { name: name.into(), write: false, life_s: life };
        assert!(coordinator.call(bad).await.unwrap_err().usage, "{name} {life:?}");
    }
    // They outlive a restart, and a revocation ends them at once.
    coordinator.restart().await;
    assert_eq!(send(&coordinator, "GET", PATH, &read).await, 200);
    coordinator.call(Call::ApiTokenRevoke { token: id }).await.unwrap();
    assert_eq!(send(&coordinator, "GET", PATH, &read).await, 401);
    // A token for a second, some time later.
    let (_, short) = token(&coordinator, "short", false, Some(1)).await;
    while send(&coordinator, "GET", PATH, &short).await != 401 {
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    // While a file is the source, the API is refused.
    let file = coordinator.dir.path().join("policy.hujson");
    std::fs::write(&file, OPEN).unwrap();
    coordinator.restart_with(|o| o.policy = Source::File(file)).await;
    let answer =
        http_send(coordinator.addr, "PUT", PATH, &[("authorization", &write), ("if-none-match", "*")], "{}")
            .await;
    assert_eq!(code(&answer), 409);
    assert!(answer.contains("policy.hujson"), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_inventory_is_what_policy_tools_take() {
    let coordinator = TestCoordinator::start().await;
    let key = coordinator.auth_key_with(&["tag:web"], false).await;
    let web = Client::join(coordinator.addr, &key, 1, "web").await;
    let call = Call::AuthKeyCreate {
        tags: vec![],
        user: Some("ann@example.com".into()),
        reusable: false,
        ephemeral: false,
        life_s: None,
    };
    let key = coordinator.call(call).await.unwrap()["key"].as_str().unwrap().parse().unwrap();
    Client::join(coordinator.addr, &key, 2, "laptop").await;
    let exported = coordinator.call(Call::PolicyInventory).await.unwrap();
    let inventory: warren_common::policy::Inventory = serde_json::from_value(exported.clone()).unwrap();
    let node = &inventory.nodes["web"];
    assert_eq!(node.ipv4, Some(web.netmap().device.addrs[0]));
    assert!(node.tags.contains("tag:web") && inventory.nodes.len() == 2);
    let policy = warren_common::policy::Policy::parse(
        r#"{"tagOwners": {"tag:web": []}, "acls": [{"action": "accept", "src": ["ann@example.com"], "dst": ["tag:web:443"]}],
            "tests": [{"src": "ann@example.com", "accept": ["tag:web:443"], "deny": ["tag:web:22"]}]}"#,
    )
    .unwrap();
    let compiled = warren_common::policy::compile(&policy, &inventory, 0, 0).unwrap();
    assert!(compiled.run_tests().results.iter().all(|test| test.failures.is_empty()));
    // No keys in it.
    let shown = exported.to_string();
    assert!(!shown.contains(&web.keys.wg.public().to_string()), "{shown}");
}
