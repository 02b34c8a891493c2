//! What goes wrong while the agent runs: a health item with its fix, and the agent goes on.

use super::*;

/// Health as people read it: the item's text, code and fix.
async fn told(world: &World, code: &str) {
    let item = world.health(code).await;
    let text = world.warren(&["status"]).await.stdout;
    let word = |field: &str| item[field].as_str().unwrap().to_owned();
    let want = format!("{}: {} [{code}]\n  fix: {}\n", word("severity"), word("text"), word("fix"));
    assert!(text.contains(&want), "{want} is not in {text}");
    assert!(!word("fix").is_empty());
}

#[test]
fn a_copied_state_must_log_in_again_and_a_wrong_clock_is_told() {
    in_world(async |mut world| {
        let before = host();
        world.fake.with(|w| w.clock_offset = Duration::from_secs(3_600));
        world.join().await;
        told(&world, "clock-skew").await;
        let item = world.health("clock-skew").await;
        assert_eq!(item["severity"], "warning");
        assert!(item["text"].as_str().unwrap().contains("60 minutes behind"), "{item}");
        world.end(libc::SIGKILL).await;
        world.fake.with(|w| w.refuse = Some("copied-state"));
        world.start().await;
        assert_eq!(world.health("copied-state").await["severity"], "error");
        assert_eq!(world.status().await["state"], "needs-login");
        assert_eq!(host(), before);
        // A new key makes a new device.
        let old = world.fake.with(|w| w.heard.iter().find_map(enrolled_key).unwrap());
        world.fake.with(|w| {
            w.refuse = None;
            w.heard.clear();
        });
        assert_eq!(world.up(&world.fake.auth_key()).await.code, 0);
        assert_ne!(world.fake.with(|w| w.heard.iter().find_map(enrolled_key).unwrap()), old);
    });
}

#[test]
fn on_a_full_disk_an_update_waits_and_then_applies() {
    in_world(async |mut world| {
        std::fs::create_dir(world.state_dir()).unwrap();
        sh(&format!("mount -t tmpfs -o size=128k,mode=700 tmpfs {}", world.state_dir().display()));
        world.join().await;
        wait(|| !world.fake.acks().is_empty()).await;
        sh(&format!("cat /dev/zero > {}/filler 2>/dev/null; true", world.state_dir().display()));
        world.fake.with(|w| w.netmap.peers.clear());
        world.fake.push(world.fake.snapshot(2));
        assert_eq!(world.health("disk-full").await["severity"], "error");
        told(&world, "disk-full").await;
        let status = world.status().await;
        assert_eq!(status["coordinator"]["revision"], 1);
        assert_eq!(world.fake.acks().len(), 1);
        std::fs::remove_file(world.state_dir().join("filler")).unwrap();
        wait(|| world.fake.acks().iter().any(|a| a.revision == 2)).await;
        let status = world.status().await;
        assert_eq!(
            (&status["coordinator"]["revision"], &status["health"]),
            (&2.into(), &serde_json::json!([]))
        );
    });
}

#[test]
fn on_a_full_disk_it_restarts_and_stops_cleanly() {
    in_world(async |mut world| {
        let before = host();
        std::fs::create_dir(world.state_dir()).unwrap();
        sh(&format!("mount -t tmpfs -o size=128k,mode=700 tmpfs {}", world.state_dir().display()));
        world.join().await;
        wait(|| !world.fake.acks().is_empty()).await;
        world.end(libc::SIGKILL).await;
        sh(&format!("cat /dev/zero > {}/filler 2>/dev/null; true", world.state_dir().display()));
        world.start().await;
        // The session can't be confirmed without space, but what was allowed goes on.
        told(&world, "disk-full").await;
        assert_eq!(world.status().await["state"], "running");
        assert!(sh("ip route get 100.64.0.2").contains("dev warren0"));
        world.end(libc::SIGTERM).await;
        assert_eq!(host(), before);
        std::fs::remove_file(world.state_dir().join("filler")).unwrap();
        world.start().await;
        assert_eq!(world.warren(&["up"]).await.code, 0);
    });
}

#[test]
fn a_coordinator_that_is_away_is_told_and_nothing_else_changes() {
    in_world(async |mut world| {
        world.join().await;
        world._server.shutdown().await;
        told(&world, "coordinator-away").await;
        let status = world.status().await;
        assert_eq!(
            (&status["state"], &status["coordinator"]["connected"]),
            (&"running".into(), &false.into())
        );
        let output = world.warren(&["up", "--timeout", "500ms"]).await;
        output.failed(1, "can't be reached");
        assert_eq!(world.status().await["state"], "running");
    });
}

/// Sends everybody who asks for a page elsewhere.
async fn portal(listener: TcpListener) {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    while let Ok((mut stream, _)) = listener.accept().await {
        let _ = stream.read(&mut [0; 2_048]).await;
        let answer = "HTTP/1.1 302 Found\r\nLocation: http://portal.hotel/\r\nContent-Length: 0\r\n\r\n";
        let _ = stream.write_all(answer.as_bytes()).await;
    }
}

#[test]
fn a_captive_portal_is_told_and_over_with_the_sign_in() {
    in_world(async |mut world| {
        world.join().await;
        let address = world.url.trim_start_matches("http://").to_owned();
        world._server.shutdown().await;
        let mut server = tokio::task::JoinSet::new();
        server.spawn(portal(TcpListener::bind(&address).await.unwrap()));
        told(&world, "captive-portal").await;
        server.shutdown().await;
        world._server = world.fake.serve(TcpListener::bind(&address).await.unwrap());
        loop {
            let status = world.status().await;
            if status["coordinator"]["connected"] == true {
                assert_eq!(status["health"], serde_json::json!([]));
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
}

/// Answers STUN requests: where they came from.
async fn stun(socket: tokio::net::UdpSocket) {
    let mut buffer = [0; 100];
    while let Ok((_, from)) = socket.recv_from(&mut buffer).await {
        let std::net::SocketAddr::V4(seen) = from else { continue };
        let mut answer = vec![1, 1, 0, 12];
        answer.extend(&buffer[4..20]);
        answer.extend([0, 1, 0, 8, 0, 1]);
        answer.extend(seen.port().to_be_bytes());
        answer.extend(seen.ip().octets());
        let _ = socket.send_to(&answer, from).await;
    }
}

/// What `netcheck --json` says, but for the addresses that peers are told: the host's own.
fn without_endpoints(text: &str) -> Value {
    let mut found: Value = serde_json::from_str(text).unwrap();
    let endpoints = found.as_object_mut().unwrap().remove("endpoints").unwrap();
    assert!(endpoints.as_array().unwrap().iter().all(|e| e["kind"] == "local" && e["addr"].is_string()));
    found
}

#[test]
fn netcheck_asks_anew_says_what_it_knows_and_is_bounded() {
    in_world(async |mut world| {
        world.start().await;
        world.warren(&["netcheck"]).await.failed(1, "not up");
        let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let relay = warren_common::netmap::Relay {
            id: warren_common::ids::RelayId::from_bytes([6; 16]),
            name: "fra".into(),
            addrs: Vec::new(),
            stun: vec![socket.local_addr().unwrap()],
            cert_sha256: [0; 32],
            peer: false,
        };
        world.fake.with(|w| w.netmap.relays.insert(relay.id, relay));
        let mut server = tokio::task::JoinSet::new();
        server.spawn(stun(socket));
        assert_eq!(world.up(&world.fake.auth_key()).await.code, 0);
        let check =
            async || -> Value { without_endpoints(&world.warren(&["netcheck", "--json"]).await.stdout) };
        let mut found = check().await;
        let (mapped, rtt) = (found["ipv4"].take(), found["relays"][0]["rtt_ms"].take());
        assert!(mapped.as_str().unwrap().starts_with("127.0.0.1:") && rtt.is_number(), "{mapped} {rtt}");
        // Loopback counts as no address of the host: as if a NAT sent everything back.
        let want = serde_json::json!({
            "udp": true, "ipv4": null, "ipv6": null,
            "nat": {"mapping": null, "filtering": null, "hairpin": true},
            "port_mapping": [], "relays": [{"name": "fra", "rtt_ms": null}],
        });
        assert_eq!(found, want);
        let text = world.warren(&["netcheck"]).await.stdout;
        assert!(text.contains("NAT:     mapping unknown") && text.contains("hairpin yes"), "{text}");

        server.shutdown().await;
        let nothing = serde_json::json!({
            "udp": false, "ipv4": null, "ipv6": null,
            "nat": {"mapping": null, "filtering": null, "hairpin": null},
            "port_mapping": [], "relays": [{"name": "fra", "rtt_ms": null}],
        });
        // Several at a time, but not any number.
        let (a, b, c, d, e) = tokio::join!(
            world.warren(&["netcheck", "--json"]),
            world.warren(&["netcheck", "--json"]),
            world.warren(&["netcheck", "--json"]),
            world.warren(&["netcheck", "--json"]),
            world.warren(&["netcheck", "--json"]),
        );
        let (done, busy): (Vec<_>, Vec<_>) = [a, b, c, d, e].into_iter().partition(|o| o.code == 0);
        assert!(done.iter().all(|o| without_endpoints(&o.stdout) == nothing));
        assert_eq!((done.len(), busy.len()), (4, 1));
        busy[0].failed(1, "too many checks");
    });
}
