//! An agent in an office that lets nothing out but HTTP: a real tinyproxy with and without credentials, one that goes away and
//! comes back, exceptions, an https coordinator of a corporate authority, and TLS inspection, which no relay gets past.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use warren_netns_tests::lab::{
    self, Egress, Host, Lab, NatKind, Refusal, Router, RouterSpec, Stopwatch, eventually, say,
};
use warren_netns_tests::office::{self, HttpProxy, TINYPROXY};
use warren_netns_tests::programs::{Agent, CONTROL, Coordinator, RELAY};

/// Bound for what must happen; only a failing test waits this long.
const LIMIT: Duration = Duration::from_secs(60);

const POLICY: &str = r#"{
  "tagOwners": {"tag:all": []},
  "grants": [{"src": ["tag:all"], "dst": ["tag:all"], "ip": ["*"]}],
}"#;

const OPEN: HttpProxy<'_> = HttpProxy { credentials: None, ports: &[CONTROL, RELAY] };

/// A coordinator with its relay, and an agent outside, called `home`.
struct Outside {
    coordinator: Coordinator,
    home: Agent,
}

impl Outside {
    fn new(lab: &Lab) -> Result<Self> {
        let coordinator = Coordinator::start(lab.host("coord")?, POLICY)?;
        let home = Agent::start(lab.host("home")?)?;
        join(&home, &coordinator)?;
        Ok(Self { coordinator, home })
    }
}

fn join(agent: &Agent, coordinator: &Coordinator) -> Result<()> {
    agent.up(&coordinator.url, &coordinator.auth_key("tag:all")?).map(drop)
}

/// An agent in an office, whose environment has this proxy.
fn desk(router: &Router, user_info: &str) -> Result<Agent> {
    let host = router.host("desk")?;
    set_proxy(&host, router, user_info)?;
    Agent::start(host)
}

fn set_proxy(host: &Host, router: &Router, user_info: &str) -> Result<()> {
    host.set_env("HTTPS_PROXY", &office::url(router, user_info)?);
    Ok(())
}

fn restart(agent: &mut Agent) -> Result<()> {
    agent.process.stop(LIMIT)?;
    agent.start_again()
}

/// The health item with this code, once it is there. It names a fix.
fn told(agent: &Agent, code: &str) -> Result<Value> {
    eventually(&format!("{} is told of {code}", agent.host.name()), LIMIT, || {
        let status = agent.json(&["status", "--json"])?;
        let items = status["health"].as_array().context("health")?;
        let item = items.iter().find(|item| item["code"] == code);
        Ok(item.filter(|item| item["fix"].as_str().is_some_and(|fix| !fix.is_empty())).cloned())
    })
}

/// `up` fails at once, and says this. The auth key is not spent.
fn refused(agent: &Agent, coordinator: &Coordinator, words: &[&str]) -> Result<()> {
    let key = coordinator.auth_key("tag:all")?;
    let output = agent.warren(&["up", "--coordinator", &coordinator.url, "--auth-key", &key])?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.code() == Some(1), "{text}");
    for word in words {
        ensure!(text.contains(word), "{word:?} is not in {text}");
    }
    Ok(())
}

/// Packets between the two go through the relay, by WebSocket through this proxy.
fn reach_each_other(desk: &Agent, home: &Agent, router: &Router) -> Result<()> {
    // The first one to a machine that has only just joined may get lost: the relay is about to hear of the pair.
    eventually("they answer each other", LIMIT, || {
        let answered = |from: &Agent, to: &Agent| -> Result<bool> {
            Ok(from.warren(&["ping", to.host.name(), "-c", "1"])?.status.success())
        };
        Ok((answered(desk, home)? && answered(home, desk)?).then_some(()))
    })?;
    desk.ping("home", 3)?;
    home.ping("desk", 3)?;
    ensure!(desk.peer("home")?["path"]["kind"] == "relay", "relayed");
    let proxy = office::url(router, "")?;
    let proxy = proxy.trim_start_matches("http://");
    for verb in ["status", "netcheck"] {
        let said = desk.json(&[verb, "--json"])?;
        let relay = &said["relays"][0];
        ensure!(relay["transport"] == "websocket" && relay["proxy"] == proxy, "{verb}: {relay}");
    }
    Ok(())
}

#[test]
fn credentials_that_are_right_wrong_and_missing() -> Result<()> {
    lab::test_with("proxy auth", &[TINYPROXY], |lab| {
        let Outside { coordinator, home } = Outside::new(lab)?;
        let router = lab.router("office", office::router())?;
        let proxy = HttpProxy { credentials: Some(("bob", "hush-_.7")), ..OPEN };
        let _proxy = proxy.start(&router)?;
        let mut desk = desk(&router, "")?;
        refused(&desk, &coordinator, &["wants a user and a password, and none are set", "HTTPS_PROXY"])?;
        set_proxy(&desk.host, &router, "bob:loud")?;
        restart(&mut desk)?;
        refused(&desk, &coordinator, &["does not accept the user `bob`"])?;
        set_proxy(&desk.host, &router, "bob:hush%2D_%2E7")?;
        restart(&mut desk)?;
        join(&desk, &coordinator)?;
        reach_each_other(&desk, &home, &router)?;
        let udp = told(&desk, "udp-blocked")?;
        ensure!(udp["text"].as_str().is_some_and(|text| text.contains("HTTP proxy")), "{udp}");
        let text = String::from_utf8(desk.warren(&["status"])?.stdout)?;
        ensure!(text.contains("over WebSocket through the proxy"), "{text}");

        // One that has joined keeps trying, says why, and goes on as soon as it can.
        set_proxy(&desk.host, &router, "bob:loud")?;
        restart(&mut desk)?;
        let auth = told(&desk, "proxy-auth")?;
        ensure!(auth["text"].as_str().is_some_and(|text| text.contains("`bob`")), "{auth}");
        let file = desk.host.dir().join("report.txt");
        let output = desk.warren(&["bugreport", "--output", file.to_str().context("a path")?])?;
        ensure!(output.status.success(), "bugreport");
        let report = fs::read_to_string(&file)?;
        let own = office::url(&router, "")?;
        for secret in ["bob", "loud", own.trim_start_matches("http://")] {
            ensure!(!report.contains(secret), "{secret} is in:\n{report}");
        }
        ensure!(report.contains("proxy-auth") && report.contains("  credentials: yes\n"), "{report}");
        set_proxy(&desk.host, &router, "bob:hush%2D_%2E7")?;
        restart(&mut desk)?;
        reach_each_other(&desk, &home, &router)?;
        let log = desk.process.log()?;
        ensure!(!log.contains("hush"), "the password is in the log");
        Ok(())
    })
}

#[test]
fn a_proxy_that_goes_and_comes_back() -> Result<()> {
    lab::test_with("proxy restart", &[TINYPROXY], |lab| {
        let Outside { coordinator, home } = Outside::new(lab)?;
        let router = lab.router("office", office::router())?;
        let mut proxy = OPEN.start(&router)?;
        let desk = desk(&router, "")?;
        join(&desk, &coordinator)?;
        reach_each_other(&desk, &home, &router)?;
        proxy.kill()?;
        let away = told(&desk, "proxy-away")?;
        ensure!(away["fix"].as_str().is_some_and(|fix| fix.contains("--proxy none")), "{away}");
        let _proxy = OPEN.start(&router)?;
        let watch = Stopwatch::start();
        reach_each_other(&desk, &home, &router)?;
        say(&format!("reached again {} ms after the proxy came back", watch.elapsed().as_millis()));
        desk.wait_until_connected()?;
        ensure!(!desk.health()?.iter().any(|code| code.starts_with("proxy-")), "{:?}", desk.health()?);
        Ok(())
    })
}

#[test]
fn exceptions_go_directly_and_ports_that_a_proxy_refuses_are_named() -> Result<()> {
    lab::test_with("proxy exceptions", &[TINYPROXY], |lab| {
        let Outside { coordinator, home } = Outside::new(lab)?;
        // The coordinator's port is let out; the relay's is what the proxy is for.
        let egress = RouterSpec::new(NatKind::PortRestricted)
            .egress(Egress::TcpOnly { ports: vec![CONTROL], refusal: Refusal::Reject });
        let router = lab.router("office", egress)?;
        let _proxy = HttpProxy { credentials: None, ports: &[RELAY] }.start(&router)?;
        let mut desk = desk(&router, "")?;
        let target = format!("{}:{CONTROL}", coordinator.host.v4());
        refused(&desk, &coordinator, &["refuses to connect to", &target, "403"])?;
        let except = format!("localhost,{}:{CONTROL}", coordinator.host.v4());
        desk.host.set_env("NO_PROXY", &except);
        restart(&mut desk)?;
        join(&desk, &coordinator)?;
        reach_each_other(&desk, &home, &router)?;
        // The command line comes before the environment, and the exceptions count for it as well.
        desk.host.set_env("HTTPS_PROXY", "http://192.0.2.1:1");
        desk.args = vec!["--proxy".into(), office::url(&router, "")?.into()];
        restart(&mut desk)?;
        reach_each_other(&desk, &home, &router)?;
        // Without the proxy there is no relay, while the coordinator is reached.
        desk.args = vec!["--proxy".into(), "none".into()];
        restart(&mut desk)?;
        desk.wait_until_connected()?;
        told(&desk, "relay-away")?;
        ensure!(!desk.health()?.iter().any(|code| code.starts_with("proxy-")), "{:?}", desk.health()?);
        Ok(())
    })
}

/// An authority, a certificate for a host of its own, and the key: files in the lab.
fn corporate(lab: &Lab, host: &Host) -> Result<[PathBuf; 3]> {
    use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
    let mut params = CertificateParams::new(Vec::new())?;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
    let key = KeyPair::generate()?;
    let certificate = CertificateParams::new([host.v4().to_string()])?.signed_by(&key, &authority)?;
    let files = ["ca.pem", "cert.pem", "key.pem"].map(|name| lab.dir().join(name));
    for (file, text) in files.iter().zip([authority.pem(), certificate.pem(), key.serialize_pem()]) {
        fs::write(file, text)?;
    }
    Ok(files)
}

#[test]
fn an_https_coordinator_of_a_corporate_authority() -> Result<()> {
    lab::test_with("corporate CA", &[TINYPROXY], |lab| {
        let host = lab.host("coord")?;
        let [authority, certificate, key] = corporate(lab, &host)?;
        let coordinator = Coordinator::start_https(host, POLICY, &certificate, &key)?;
        let trusted = vec!["--ca".into(), authority.into_os_string()];
        let home = Agent::start_with(lab.host("home")?, trusted.clone())?;
        join(&home, &coordinator)?;
        let router = lab.router("office", office::router())?;
        let _proxy = OPEN.start(&router)?;
        let mut desk = desk(&router, "")?;
        refused(&desk, &coordinator, &["no valid certificate", "--ca FILE"])?;
        desk.args = trusted;
        restart(&mut desk)?;
        join(&desk, &coordinator)?;
        reach_each_other(&desk, &home, &router)?;
        // Restarted, it comes back by itself.
        restart(&mut desk)?;
        desk.wait_until_connected()?;
        reach_each_other(&desk, &home, &router)
    })
}

/// The relay's connection is opened on its way: here by sending it to another TLS server, the coordinator's.
fn inspection(lab: &Lab, proxied: bool) -> Result<()> {
    let host = lab.host("coord")?;
    let [authority, certificate, key] = corporate(lab, &host)?;
    let coordinator = Coordinator::start_https(host, POLICY, &certificate, &key)?;
    let (spec, hook) = if proxied {
        (office::router(), "output")
    } else {
        let egress = Egress::TcpOnly { ports: Vec::new(), refusal: Refusal::Drop };
        (RouterSpec::new(NatKind::PortRestricted).egress(egress), "prerouting")
    };
    let router = lab.router("office", spec)?;
    router.nft(&format!(
        "table ip inspection {{\n chain inspect {{ type nat hook {hook} priority -100;\n tcp dport {RELAY} dnat to {}:{CONTROL}\n }}\n}}\n",
        coordinator.host.v4()
    ))?;
    let _proxy = if proxied { Some(OPEN.start(&router)?) } else { None };
    let host = router.host("desk")?;
    if proxied {
        set_proxy(&host, &router, "")?;
    }
    let desk = Agent::start_with(host, vec!["--ca".into(), authority.into_os_string()])?;
    join(&desk, &coordinator)?;
    let item = told(&desk, "relay-certificate")?;
    let text = item["text"].as_str().context("a text")?;
    ensure!(text.contains("another certificate") && text.contains("the proxy") == proxied, "{item}");
    let status = desk.json(&["status", "--json"])?;
    ensure!(status["relays"][0]["transport"].is_null(), "{status}");
    ensure!(status["coordinator"]["connected"] == true, "{status}");
    Ok(())
}

#[test]
fn tls_inspection_on_the_way_to_a_relay_is_told_and_not_accepted() -> Result<()> {
    lab::test("inspection", |lab| inspection(lab, false))
}

#[test]
fn a_proxy_that_inspects_tls_is_told_and_not_accepted() -> Result<()> {
    lab::test_with("inspecting proxy", &[TINYPROXY], |lab| inspection(lab, true))
}
