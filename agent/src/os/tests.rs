//! Host changes in a network namespace of their own, where root allows one.

use std::process::Command;

use super::*;
use crate::os::tun::Tun;

/// Runs the test in a fresh network namespace, or says why not.
fn in_namespace(test: impl Future<Output = ()>) {
    if !enter_namespace() {
        return;
    }
    run("ip link set lo up");
    // A bridge without ports never has a carrier, so nothing about it changes behind the test's back.
    run("ip link add out0 type bridge");
    run("ip addr add 192.0.2.5/24 dev out0");
    run("ip link set out0 up");
    run("ip route add default via 192.0.2.1");
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test);
}

#[expect(clippy::print_stdout, reason = "a skipped test says so")]
#[expect(unsafe_code, reason = "no crate in use has unshare")]
fn enter_namespace() -> bool {
    // SAFETY: takes no pointer; it moves only the calling test thread to a new namespace.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
        println!("skipped: no permission to make a network namespace (run as root)");
        return false;
    }
    true
}

fn run(command: &str) -> String {
    let mut words = command.split(' ');
    let output = Command::new(words.next().unwrap()).args(words).output().unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Everything the agent may touch, as text.
fn host() -> String {
    [
        "ip rule",
        "ip -6 rule",
        "ip route show table all",
        "ip -6 route show table all",
        "ip -br addr",
        "nft list ruleset",
    ]
    .map(run)
    .join("\n")
}

/// Closes a TUN and waits until it is gone: a test that forks at the same time holds it open a little longer.
async fn close(tun: Tun) {
    drop(tun);
    while Command::new("ip").args(["link", "show", "wtest0"]).output().unwrap().status.success() {
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
}

fn plan() -> HostPlan {
    HostPlan {
        tun: "wtest0".into(),
        addrs: vec!["100.64.0.1".parse().unwrap(), "fd00:77::1".parse().unwrap()],
        pools: vec!["100.64.0.0/16".parse().unwrap(), "fd00:77::/64".parse().unwrap()],
        mtu: 1_300,
    }
}

fn state(dir: &tempfile::TempDir) -> StateDir {
    StateDir::open(&dir.path().join("s")).unwrap()
}

#[test]
fn up_routes_guards_and_a_clean_stop_leaves_nothing() {
    in_namespace(async {
        let dir = tempfile::tempdir().unwrap();
        let state = state(&dir);
        let before = host();
        let host_os = Host::open().unwrap();
        let tun = Tun::open("wtest0", Offloads::ALL).unwrap();
        host_os.check_collision(&plan()).await.unwrap();
        let applied = host_os.apply(&plan(), &state).await.unwrap();
        assert_eq!(applied, Applied { ipv6: true });
        let link = run("ip link show wtest0");
        assert!(link.contains("mtu 1300") && link.contains("qlen 1000"), "{link}");
        assert!(run("ip route get 100.64.9.9").contains("dev wtest0"));
        assert!(run("ip -6 route get fd00:77::9").contains("dev wtest0"));
        // Our own sockets never see the overlay's routes.
        let mark = format!("ip route get 100.64.9.9 mark {MARK}");
        assert!(run(&mark).contains("dev out0"));
        assert!(run("ip route get 198.51.100.1").contains("dev out0"));
        assert!(run("nft list table inet warren").contains("100.64.0.1"));
        // A second time changes nothing, and our own routes are no collision.
        let once = host();
        host_os.check_collision(&plan()).await.unwrap();
        host_os.apply(&plan(), &state).await.unwrap();
        assert_eq!(host(), once);
        close(tun).await;
        host_os.restore(&state).await.unwrap();
        assert_eq!(host(), before);
        host_os.restore(&state).await.unwrap();
    });
}

/// A container's root has no rights over the machine: the test above once more, in a user namespace.
#[test]
fn root_of_a_user_namespace_is_enough() {
    const TEST: &str = "os::tests::up_routes_guards_and_a_clean_stop_leaves_nothing";
    let exe = std::env::current_exe().unwrap();
    let mut unshare = Command::new("unshare");
    let output = unshare.arg("-Urnm").arg(exe).args(["--exact", TEST, "--nocapture"]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{text}{errors}");
    assert!(!text.contains("skipped:"), "{text}");
}

#[test]
fn after_a_kill_nothing_leaks_and_the_next_start_undoes_it() {
    in_namespace(async {
        let dir = tempfile::tempdir().unwrap();
        let state = state(&dir);
        let before = host();
        let host_os = Host::open().unwrap();
        let tun = Tun::open("wtest0", Offloads::ALL).unwrap();
        host_os.apply(&plan(), &state).await.unwrap();
        close(tun).await; // what the kernel does to a killed process
        let get = Command::new("ip").args(["route", "get", "100.64.9.9"]).output().unwrap();
        assert!(!get.status.success(), "unreachable: {get:?}");
        let get = Command::new("ip").args(["-6", "route", "get", "fd00:77::9"]).output().unwrap();
        assert!(!get.status.success(), "unreachable: {get:?}");
        assert!(run("nft list table inet warren").contains("daddr 100.64.0.1"));
        // A new start: another connection, the same journal.
        Host::open().unwrap().restore(&state).await.unwrap();
        assert_eq!(host(), before);
    });
}

#[test]
fn a_new_plan_replaces_the_old_one() {
    in_namespace(async {
        let dir = tempfile::tempdir().unwrap();
        let state = state(&dir);
        let host_os = Host::open().unwrap();
        let _tun = Tun::open("wtest0", Offloads::ALL).unwrap();
        host_os.apply(&plan(), &state).await.unwrap();
        let moved = HostPlan {
            addrs: vec!["100.99.0.7".parse().unwrap()],
            pools: vec!["100.99.0.0/16".parse().unwrap()],
            ..plan()
        };
        host_os.apply(&moved, &state).await.unwrap();
        assert!(run("ip route get 100.64.9.9").contains("dev out0"));
        assert!(run("ip route get 100.99.9.9").contains("src 100.99.0.7"));
        let addrs = run("ip -br addr show wtest0");
        assert!(addrs.contains("100.99.0.7/32") && !addrs.contains("100.64.0.1"), "{addrs}");
        assert!(!run("nft list ruleset").contains("100.64.0.1"));
    });
}

#[test]
fn a_pool_that_the_host_uses_is_refused_by_name() {
    in_namespace(async {
        run("ip route add 100.64.3.0/24 via 192.0.2.9");
        run("ip route add 0.0.0.0/1 via 192.0.2.9");
        let problem = Host::open().unwrap().check_collision(&plan()).await.unwrap_err();
        assert_eq!(problem.code, "pool-collision");
        assert!(problem.text.contains("100.64.3.0/24") && problem.text.contains("out0"), "{}", problem.text);
        run("ip route del 100.64.3.0/24");
        Host::open().unwrap().check_collision(&plan()).await.unwrap();
    });
}

#[test]
fn surroundings_hold_our_addresses_and_notice_a_move() {
    in_namespace(async {
        let host_os = Host::open().unwrap();
        let mut changes = host_os.watch().unwrap();
        assert_eq!(host_os.tunnel_mtu("wtest0").await.unwrap(), MAX_MTU);
        run("ip link set out0 mtu 1400");
        assert_eq!(host_os.tunnel_mtu("wtest0").await.unwrap(), 1_320);
        let before = host_os.surroundings("wtest0").await.unwrap();
        let sockets = before.sockets(&[(0, "0.0.0.0:7".parse().unwrap()), (1, "[::]:7".parse().unwrap())]);
        assert_eq!(sockets, [LocalSocket { id: 0, addr: "192.0.2.5:7".parse().unwrap() }]);
        run("ip addr add 192.0.2.6/24 dev out0");
        changes.changed().await;
        assert_ne!(host_os.surroundings("wtest0").await.unwrap(), before);
    });
}

#[test]
fn prefixes_collide_when_either_holds_the_other() {
    let net = |text: &str| -> IpNet { text.parse().unwrap() };
    let pool = net("100.64.0.0/16");
    for (route, want) in [
        ("100.64.0.0/16", true),
        ("100.64.5.0/24", true),
        ("100.64.0.0/10", true),
        ("100.65.0.0/16", false),
        ("0.0.0.0/0", false),
        ("0.0.0.0/1", false),
        ("fd00::/8", false),
    ] {
        assert_eq!(collides(&pool, &net(route)), want, "{route}");
    }
}
