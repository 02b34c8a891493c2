//! STUN both ways against coturn: our client with its server, its clients with ours, RFC 5780 included.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use warren_agent::api::Nat;
use warren_agent::netcheck;
use warren_netns_tests::lab::{self, Host, NatKind, RouterSpec, eventually, workspace_binary};
use warren_netns_tests::programs::Coordinator;

/// Bound for what must happen; only a failing test waits this long.
const LIMIT: Duration = Duration::from_secs(30);

/// Kinds of NATs, with mapping and filtering in our words and in those of coturn's `turnutils_natdiscovery`.
const KINDS: [(NatKind, [&str; 2], [&str; 2]); 4] = [
    (
        NatKind::FullCone,
        ["endpoint-independent", "endpoint-independent"],
        ["Endpoint Independent Mapping", "Endpoint Independent Filtering"],
    ),
    (
        NatKind::AddressRestricted,
        ["endpoint-independent", "address-dependent"],
        ["Endpoint Independent Mapping", "Address Dependent Filtering"],
    ),
    (
        NatKind::PortRestricted,
        ["endpoint-independent", "address-and-port-dependent"],
        ["Endpoint Independent Mapping", "Address and Port Dependent Filtering"],
    ),
    (
        NatKind::Symmetric,
        ["address-and-port-dependent", "address-and-port-dependent"],
        ["Address and Port Dependent Mapping", "Address and Port Dependent Filtering"],
    ),
];

fn check(host: &Host, server: SocketAddr) -> Result<Nat> {
    let own = [IpAddr::from(host.v4())];
    let run = || -> std::io::Result<Nat> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Ok(runtime.block_on(netcheck::nat(&[server], &own, 0)))
    };
    Ok(host.enter(run)??)
}

#[test]
fn our_client_understands_coturn_s_server() -> Result<()> {
    lab::test_with("coturn", &[("turnserver", "coturn")], |lab| {
        let server = lab.host("S")?;
        let (first, second) = (server.v4().to_string(), server.add_v4()?.to_string());
        let mut command = server.command("turnserver");
        command.args([
            "-n",
            "-z",
            "--no-tls",
            "--no-dtls",
            "--no-cli",
            "--log-file",
            "stdout",
            "--simple-log",
        ]);
        command.args(["-L", &first, "-L", &second, "-p", "3478", "--alt-listening-port", "3479"]);
        command.arg("--pidfile").arg(server.dir().join("pid")).arg("--db").arg(server.dir().join("db"));
        let _program = server.spawn(command)?;
        let at = SocketAddr::new(server.v4().into(), 3478);
        let public = lab.host("P")?;
        eventually("coturn answers", LIMIT, || Ok(check(&public, at)?.mapping.map(drop)))?;
        let nat = check(&public, at)?;
        ensure!([nat.mapping.as_deref(), nat.filtering.as_deref()] == [Some("none"); 2], "{nat:?}");
        for (n, (kind, words, _)) in KINDS.into_iter().enumerate() {
            let router = lab.router(&format!("R{n}"), RouterSpec::new(kind))?;
            let nat = check(&router.host(&format!("H{n}"))?, at)?;
            let found = [nat.mapping.as_deref(), nat.filtering.as_deref()];
            ensure!(found == words.map(Some) && nat.hairpin == Some(false), "{kind:?}: {nat:?}");
        }
        Ok(())
    })
}

const POLICY: &str =
    r#"{"tagOwners": {"tag:a": []}, "grants": [{"src": ["tag:a"], "dst": ["tag:a"], "ip": ["*"]}]}"#;

#[test]
fn coturn_s_clients_understand_our_server() -> Result<()> {
    let programs = [("turnutils_stunclient", "coturn"), ("turnutils_natdiscovery", "coturn")];
    lab::test_with("clients", &programs, |lab| {
        let coordinator = Coordinator::start_without_relay(lab.host("coord")?, POLICY)?;
        let fra = lab.host("fra")?;
        let (first, second) = (fra.v4(), fra.add_v4()?);
        let key = coordinator.admin(&["relay", "create", "fra"])?;
        let mut command = fra.command(workspace_binary("warren-relay")?);
        command.args(["serve", "--coordinator", &coordinator.url, "--join-key", key.trim(), "--state-dir"]);
        command.arg(fra.dir().join("state")).args(["--listen", &format!("{first}:3340")]);
        command.args(["--stun-listen", &format!("{first}:3478"), "--stun-second", &format!("{second}:3479")]);
        let mut relay = fra.spawn(command)?;
        relay.wait_for_line("joined", LIMIT)?;
        let at = first.to_string();
        let one = |n: usize| -> Result<()> {
            let (kind, _, words) = KINDS[n];
            let router = lab.router(&format!("R{n}"), RouterSpec::new(kind))?;
            let host = router.host(&format!("H{n}"))?;
            // They wait for ever where no answer comes.
            let output = host.run("timeout", &["30", "turnutils_stunclient", "-p", "3478", &at])?;
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            let seen =
                text.lines().find_map(|line| line.split_once("reflexive addr: ")).context(text.clone())?.1;
            ensure!(seen.trim().parse::<SocketAddr>()?.ip() == router.v4(), "{kind:?}: {text}");
            let output =
                host.run("timeout", &["30", "turnutils_natdiscovery", "-m", "-f", "-p", "3478", &at])?;
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            for word in words {
                ensure!(text.contains(word), "{kind:?}: no {word:?} in {text}");
            }
            Ok(())
        };
        // They wait long where a NAT lets nothing in.
        std::thread::scope(|scope| {
            let one = &one;
            let running: Vec<_> = (0..KINDS.len()).map(|n| scope.spawn(move || one(n))).collect();
            running
                .into_iter()
                .try_for_each(|r| r.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?)
        })
    })
}
