//! What of the kernel's help is in use, and what is not, is shown and said.

use std::fs::File;
use std::time::Duration;

use serde_json::{Value, json};

use crate::{World, in_world, wait};

const NAMES: [&str; 4] = ["tun", "tun-udp", "udp-send", "udp-receive"];

/// Starts the daemon without what is named, and has it up. Returns what it shows to be in use.
async fn in_use(world: &mut World, without: &str) -> Value {
    let mut command = world.command(&world.state_dir());
    command.stderr(File::create(world.dir.path().join("log")).unwrap());
    if !without.is_empty() {
        command.args(["--without-offload", without]);
    }
    world.start_as(&mut command).await;
    if without.is_empty() {
        assert_eq!(world.up(&world.fake.auth_key()).await.code, 0);
    }
    loop {
        let status = world.status().await;
        if status["state"] == "running" {
            return status["offloads"].clone();
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[test]
fn an_offload_that_is_switched_off_is_shown_and_said_once() {
    in_world(async |mut world| {
        // What this kernel has: all four since Linux 6.2.
        let all = in_use(&mut world, "").await;
        assert_eq!(all.as_object().unwrap().len(), NAMES.len(), "{all}");
        world.end(libc::SIGTERM).await;
        for (without, off) in [
            ("tun", &["tun", "tun-udp"][..]),
            ("tun-udp", &["tun-udp"]),
            ("udp-send", &["udp-send"]),
            ("udp-receive", &["udp-receive"]),
            ("udp-send,udp-receive", &["udp-send", "udp-receive"]),
            ("all", &NAMES),
        ] {
            let shown = in_use(&mut world, without).await;
            for name in NAMES {
                let wanted = json!(all[name] == true && !off.contains(&name));
                assert_eq!(shown[name], wanted, "{name} without {without}: {shown}");
            }
            // Told in words as well, to who reads the log; the second look at the status says no more.
            world.status().await;
            let log = || std::fs::read_to_string(world.dir.path().join("log")).unwrap();
            wait(|| log().contains("offloads are missing")).await;
            let said: Vec<String> =
                log().lines().filter(|l| l.contains("offloads are missing")).map(str::to_owned).collect();
            assert_eq!(said.len(), 1, "{said:?}");
            let named = said[0].rsplit(": ").next().unwrap().split(", ").collect::<Vec<_>>();
            let missing: Vec<&str> = NAMES.into_iter().filter(|name| shown[name] == false).collect();
            assert_eq!(named, missing);
            assert!(world.end(libc::SIGTERM).await.success());
        }
    });
}
