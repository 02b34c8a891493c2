use clap::Parser;

use super::*;

#[derive(Debug, Parser)]
struct Cli {
    #[command(flatten)]
    target: Target,
    #[command(subcommand)]
    command: AgentCommand,
}

fn parse(line: &str) -> Result<Cli, clap::Error> {
    Cli::try_parse_from(std::iter::once("warren").chain(line.split(' ')))
}

#[test]
fn up_takes_the_contract_s_options() {
    let cli =
        parse("--socket /x up --coordinator http://c --auth-key k --hostname h --timeout 500ms").unwrap();
    assert_eq!(cli.target.socket, PathBuf::from("/x"));
    let AgentCommand::Up(args) = cli.command else { panic!() };
    let Verb::Up(up) = up_verb(args).unwrap() else { panic!() };
    assert_eq!(up.timeout_ms, 500);
    assert_eq!((up.coordinator.as_deref(), up.auth_key.as_deref()), (Some("http://c"), Some("k")));
    let AgentCommand::Up(args) = parse("up").unwrap().command else { panic!() };
    assert_eq!(args.timeout, Duration::from_secs(30));
}

#[test]
fn bad_usage_ends_with_2() {
    for line in [
        "up --auth-key k --auth-key-file f",
        "up --timeout soon",
        "ping",
        "ping -c 0 x",
        "whois nobody",
        "why db:99999",
        "why db:1 --proto x",
        "--network dev_1 status",
        "frobnicate",
    ] {
        assert_eq!(parse(line).unwrap_err().exit_code(), 2, "{line}");
    }
    let AgentCommand::Why(args) = parse("why db --proto tcp").unwrap().command else { panic!() };
    assert_eq!(why_verb(&args).unwrap_err().exit, 2);
}

#[test]
fn destinations_and_protocols_are_understood() {
    for (line, dst, port, proto) in [
        ("why db1:5432", "db1", 5_432, PROTO_TCP),
        ("why db1:53 --proto udp", "db1", 53, PROTO_UDP),
        ("why db1", "db1", 0, PROTO_ICMP),
        ("why 100.64.0.1:22", "100.64.0.1", 22, PROTO_TCP),
        ("why fd00::1", "fd00::1", 0, PROTO_ICMPV6),
        ("why [fd00::1]:22", "fd00::1", 22, PROTO_TCP),
        ("why db1 --proto 47", "db1", 0, 47),
    ] {
        let AgentCommand::Why(args) = parse(line).unwrap().command else { panic!() };
        assert_eq!(why_verb(&args).unwrap(), Verb::Why { dst: dst.into(), port, proto }, "{line}");
    }
    for text in ["100.64.0.7", "100.64.0.7:22"] {
        assert_eq!(parse_address(text).unwrap().to_string(), "100.64.0.7");
    }
    assert_eq!(parse_address("[fd00::7]:22").unwrap(), parse_address("fd00::7").unwrap());
}

#[test]
fn ping_prints_the_contract_s_lines_and_sums_up() {
    assert_eq!(
        ping_summary(3, &[2.0, 1.0]).to_string(),
        r#"{"avg_ms":1.5,"max_ms":2.0,"min_ms":1.0,"received":2,"sent":3}"#
    );
    assert_eq!(
        ping_summary(1, &[]).to_string(),
        r#"{"avg_ms":null,"max_ms":null,"min_ms":null,"received":0,"sent":1}"#
    );
}

#[test]
fn people_see_paths_owners_and_fixes() {
    let none = |why: &str| {
        json!({
            "id": "dev_00000000000000000000000002", "name": why, "ips": [], "user": "b@x", "tags": [], "online": false,
            "path": {"kind": "none", "endpoint": null, "relay": null, "rtt_ms": null, "why_not_direct": why},
            "why_not_direct": "because", "rx_bytes": 0, "tx_bytes": 0, "last_handshake": null,
        })
    };
    let answer = json!({
        "state": "running", "network": {"id": "net_00000000000000000000000000", "name": "acme"},
        "self": {"id": "dev_00000000000000000000000000", "name": "laptop", "ips": ["100.64.0.1"], "user": "a@x", "tags": []},
        "coordinator": {"url": "http://c", "connected": false, "revision": 7},
        "peers": [{
            "id": "dev_00000000000000000000000001", "name": "db1", "ips": ["100.64.0.2"], "user": null,
            "tags": ["tag:db"], "online": true,
            "path": {"kind": "relay", "endpoint": null, "relay": "eu", "rtt_ms": 1.5},
            "rx_bytes": 5, "tx_bytes": 3_500_000, "last_handshake": null,
        }, none("idle"), none("no-network")],
        "relays": [
            {"name": "eu", "home": true, "transport": "udp", "rtt_ms": 1.25},
            {"name": "us", "home": false, "transport": null, "rtt_ms": null},
            {"name": "in", "home": false, "transport": "websocket", "proxy": "p.corp:3128", "rtt_ms": null},
        ],
        "health": [{"code": "coordinator-away", "severity": "warning", "text": "away", "fix": "wait"}],
        "counters": {},
    });
    assert_eq!(
        render::status(&answer).unwrap(),
        "\
running in acme
this device: laptop (100.64.0.1)
coordinator: http://c (not connected, revision 7)
relay: eu (over UDP, 1.2 ms, home)
relay: us (not connected)
relay: in (over WebSocket through the proxy p.corp:3128)

 PEER        ADDRESSES   OWNER   ONLINE  PATH      RECEIVED  SENT    
 db1         100.64.0.2  tag:db  yes     relay eu  5 B       3.3 MiB 
 idle                    b@x     no      none      0 B       0 B     
 no-network              b@x     no      none      0 B       0 B     
 no-network is not direct: because

warning: away [coordinator-away]
  fix: wait
"
    );
}

#[test]
fn a_missing_daemon_is_one_clear_message() {
    let request = Request { network: None, verb: Verb::Status };
    let problem = client::ask(Path::new("/nowhere/warren.sock"), &request).unwrap_err();
    assert_eq!((problem.code.as_str(), problem.exit), ("no-daemon", 1));
}
