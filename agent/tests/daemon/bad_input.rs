//! What people get wrong, and what their hosts lack: one message with the fix, nothing lost.

use std::os::unix::fs::PermissionsExt as _;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::*;

#[test]
fn a_wrong_url_is_told_for_what_it_is_and_the_key_still_works() {
    in_world(async |mut world| {
        let before = host();
        world.start().await;
        let key = world.fake.auth_key();
        let up = async |url: &str, timeout: &str| {
            world.warren(&["up", "--coordinator", url, "--auth-key", &key, "--timeout", timeout]).await
        };
        for (url, said) in [
            ("warren", "`warren` is not the URL"),
            ("ftp://127.0.0.1", "is not the URL"),
            ("http://ann@127.0.0.1", "is not the URL"),
        ] {
            up(url, "20s").await.failed(2, said);
        }
        world.warren(&["up", "--auth-key", &key]).await.failed(2, "where the coordinator is");

        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let web_server = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let _ = stream.read(&mut [0; 2_048]).await.unwrap();
            stream.write_all(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n").await.unwrap();
        };
        let (output, ()) = tokio::join!(up(&url, "20s"), web_server);
        output.failed(1, "is not a Warren coordinator: its answer is HTTP status 404");
        // It takes connections and says nothing.
        up(&url, "500ms").await.failed(1, "nobody has answered at");
        drop(listener);
        up(&url, "500ms").await.failed(1, "can't be reached: connection refused");

        assert_eq!(world.status().await["state"], "needs-login");
        assert_eq!(host(), before);
        assert!(world.fake.with(|w| w.heard.is_empty()));
        assert_eq!(world.up(&key).await.code, 0);
        // Once joined, another URL that does not work is not kept.
        up(&url, "500ms").await.failed(1, "can't be reached");
        let output = world.warren(&["up", "--timeout", "20s"]).await;
        assert_eq!(output.code, 0, "{}", output.stderr);
        assert_eq!(world.status().await["coordinator"]["url"], world.url);
    });
}

#[test]
fn an_auth_key_that_does_not_work_is_told_why() {
    in_world(async |mut world| {
        let before = host();
        world.start().await;
        let good = world.fake.auth_key();
        let cut = &good[..good.len() - 3];
        for key in ["", "hello", "wkey-x", cut] {
            world.up(key).await.failed(2, "auth key");
        }
        let file = world.dir.path().join("key");
        let from_file = ["up", "--coordinator", &world.url, "--auth-key-file", file.to_str().unwrap()];
        world.warren(&from_file).await.failed(2, "key` can't be read: no such file");
        std::fs::write(&file, "\n").unwrap();
        world.warren(&from_file).await.failed(2, "auth key");
        assert!(world.fake.with(|w| w.heard.is_empty()));

        for code in ["auth-key-expired", "auth-key-used", "auth-key-invalid"] {
            world.fake.with(|w| w.refuse = Some(code));
            world.up(&good).await.failed(1, code);
            assert_eq!(world.health(code).await["severity"], "error");
        }
        assert_eq!(world.status().await["state"], "needs-login");
        assert_eq!(host(), before);
        world.fake.with(|w| w.refuse = None);
        std::fs::write(&file, format!("{good}\n")).unwrap();
        assert_eq!(world.warren(&from_file).await.code, 0);
        // Every try was by the same device.
        let keys: Vec<_> = world.fake.with(|w| w.heard.iter().filter_map(enrolled_key).collect());
        assert_eq!((keys.len(), keys.iter().all(|k| *k == keys[0])), (4, true));
    });
}

#[test]
fn another_coordinator_hears_no_key() {
    in_world(async |mut world| {
        world.start().await;
        // One with another root key: the auth key names the right one.
        world.up(&Fake::new().auth_key()).await.failed(1, "is not the expected one: wanted root key");
        // One that shows the right document and does not hold the key in it.
        let impostor = world.fake.impostor();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let _server = impostor.serve(listener);
        let key = world.fake.auth_key();
        let args = ["up", "--coordinator", &url, "--auth-key", &key, "--timeout", "500ms"];
        world.warren(&args).await.failed(1, "did not prove that it holds its key");
        // A fingerprint that contradicts the key.
        let other = Fake::new().fingerprint();
        let args = [&args[..], &["--coordinator-fingerprint", &other]].concat();
        world.warren(&args).await.failed(1, "another root key");
        assert!(world.fake.with(|w| w.heard.is_empty()));
        assert_eq!(world.up(&key).await.code, 0);
    });
}

#[test]
fn a_host_that_can_t_have_a_tun_spends_no_key() {
    in_world(async |mut world| {
        world.start().await;
        let key = world.fake.auth_key();
        sh("mount -t tmpfs -o ro tmpfs /dev/net"); // nobody can make the device there, root included
        world.up(&key).await.failed(1, "there is no TUN device");
        sh("umount /dev/net");
        sh("ip link add warren0 type bridge");
        world.up(&key).await.failed(1, "`warren0` exists already");
        sh("ip link del warren0");
        assert!(world.fake.with(|w| w.heard.is_empty()));
        assert_eq!(world.up(&key).await.code, 0);
    });
}

#[test]
fn without_permission_nothing_begins() {
    in_world(async |world| {
        let daemon = world.command(&world.state_dir());
        let mut command = Command::new("setpriv");
        command.args(["--bounding-set", "-net_admin", "--inh-caps", "-net_admin", WARREND]);
        command.args(daemon.as_std().get_args());
        Output::of(command.output().await.unwrap()).failed(1, "no permission to configure the network");
        assert!(!world.state_dir().exists() && !world.socket().exists());
    });
}

#[test]
fn a_port_or_a_directory_that_is_not_free_is_named() {
    in_world(async |mut world| {
        let taken = std::net::UdpSocket::bind("0.0.0.0:41641").unwrap();
        world.refused(&["--listen-port", "41641"]).await.failed(1, "UDP port 41641 is in use");
        drop(taken);
        world.refused(&["--tun", "a/b"]).await.failed(2, "`a/b` can't be the name");

        let file = world.dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        world.refused_at(&file).await.failed(2, "is not a directory");
        let shared = world.dir.path().join("shared");
        std::fs::create_dir(&shared).unwrap();
        std::fs::set_permissions(&shared, std::fs::Permissions::from_mode(0o777)).unwrap();
        std::fs::write(shared.join("mine"), "").unwrap();
        world.refused_at(&shared).await.failed(2, "open to other users");

        // A second agent, on the same directory, then on the same socket.
        world.join().await;
        world.refused(&[]).await.failed(1, "another agent is running on the state directory");
        world.refused_at(&world.dir.path().join("other")).await.failed(1, "another warrend listens");
        assert_eq!(world.status().await["state"], "running");
        assert!(sh("ip route get 100.64.0.2").contains("dev warren0"));
    });
}

#[test]
fn a_damaged_state_file_is_named_and_left_alone() {
    in_world(async |mut world| {
        // A clean stop writes all of them, the kill after it leaves the journal.
        world.join().await;
        world.end(libc::SIGTERM).await;
        world.fake.with(|w| w.heard.clear());
        world.start().await;
        wait(|| !world.fake.acks().is_empty()).await;
        world.end(libc::SIGKILL).await;
        let state = world.state_dir();
        let network = std::fs::read_dir(state.join("networks")).unwrap().next().unwrap().unwrap().path();
        for file in [
            state.join("settings"),
            state.join("journal"),
            network.join("keys"),
            network.join("identity"),
            network.join("device"),
            network.join("netmap"),
            network.join("handshakes"),
        ] {
            let good = std::fs::read(&file).unwrap();
            let mut bad = good.clone();
            *bad.last_mut().unwrap() ^= 1;
            for bad in [bad, good[..good.len() / 2].to_vec(), Vec::new()] {
                std::fs::write(&file, &bad).unwrap();
                let name = format!("{}` is damaged", file.file_name().unwrap().display());
                world.refused(&[]).await.failed(1, &name);
                assert_eq!(std::fs::read(&file).unwrap(), bad);
            }
            std::fs::write(&file, good).unwrap();
        }
        // What is only for a quicker start is no reason not to start.
        std::fs::write(network.join("resume"), "x").unwrap();
        world.fake.with(|w| w.heard.clear());
        world.start().await;
        wait(|| world.fake.with(|w| w.heard.iter().any(|b| matches!(b, ClientBody::Resume(_))))).await;
        assert_eq!(world.status().await["state"], "running");
    });
}

#[test]
fn a_colliding_pool_is_refused_with_both_sides_named() {
    in_world(async |mut world| {
        sh("ip route add 100.64.3.0/24 via 192.0.2.9");
        let before = host();
        world.start().await;
        let output = world.up(&world.fake.auth_key()).await;
        output.failed(
            1,
            "addresses 100.64.0.0/16 collide with this host's route 100.64.3.0/24 through interface out0",
        );
        assert_eq!(host(), before);
        sh("ip route del 100.64.3.0/24");
        assert_eq!(world.warren(&["up"]).await.code, 0);
    });
}
