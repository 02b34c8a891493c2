//! The lab itself: its NATs behave as their names claim, labs do not disturb each other, and nothing is
//! left behind.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use warren_netns_tests::lab::{self, Egress, Host, Lab, NatKind, Refusal, RouterSpec, eventually};

/// Bound for what must happen; only a failing test waits this long.
const LIMIT: Duration = Duration::from_secs(20);

/// Grace for what must not happen, after later packets have arrived already.
const GRACE: Duration = Duration::from_millis(100);

const KINDS: [NatKind; 4] =
    [NatKind::FullCone, NatKind::AddressRestricted, NatKind::PortRestricted, NatKind::Symmetric];

/// RFC 5780's server: two addresses with two ports each. Index 0 is (first, first), 1 the other port of
/// the same address, 2 the other address, 3 both other.
struct Reflector([UdpSocket; 4]);

impl Reflector {
    fn new(lab: &Lab) -> Result<Self> {
        let host = lab.host("S")?;
        let (first, second) = (host.v4(), host.add_v4()?);
        let at = |ip: Ipv4Addr, port| socket(&host, SocketAddr::from((ip, port)));
        Ok(Self([at(first, 3478)?, at(first, 3479)?, at(second, 3478)?, at(second, 3479)?]))
    }

    /// Where a datagram of `client` seems to come from at each of the four addresses.
    fn reflexive(&self, client: &UdpSocket) -> Result<[SocketAddr; 4]> {
        let mut seen = Vec::new();
        for server in &self.0 {
            client.send_to(b"where", server.local_addr()?)?;
            let (_, from) = receive(server)?.context("a request never arrived")?;
            seen.push(from);
        }
        seen.try_into().ok().context("four answers")
    }
}

fn socket(host: &Host, bind: SocketAddr) -> Result<UdpSocket> {
    let socket = host.enter(|| UdpSocket::bind(bind))?;
    let socket = socket.with_context(|| format!("binding {bind} in {}", host.name()))?;
    socket.set_read_timeout(Some(LIMIT))?;
    Ok(socket)
}

fn any() -> SocketAddr {
    SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0))
}

/// The next datagram, or `None` when the socket's timeout passes.
fn receive(socket: &UdpSocket) -> Result<Option<(Vec<u8>, SocketAddr)>> {
    let mut buffer = [0; 64];
    match socket.recv_from(&mut buffer) {
        Ok((n, from)) => Ok(Some((buffer[..n].to_vec(), from))),
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Everything that arrives up to a datagram `end`, and what trickles in right after it.
fn until_end(socket: &UdpSocket) -> Result<BTreeSet<String>> {
    let mut got = BTreeSet::new();
    let mut ended = false;
    while let Some((text, _)) = receive(socket)? {
        if text == b"end" {
            ended = true;
            socket.set_read_timeout(Some(GRACE))?;
        } else {
            got.insert(String::from_utf8_lossy(&text).into_owned());
        }
    }
    socket.set_read_timeout(Some(LIMIT))?;
    ensure!(ended, "the marker that must arrive did not");
    Ok(got)
}

/// Which unsolicited senders get through to a client that has sent to the first server only.
fn let_in(reflector: &Reflector, client: &UdpSocket) -> Result<BTreeSet<String>> {
    let [first, other_port, other_address, _] = &reflector.0;
    client.send_to(b"open", first.local_addr()?)?;
    let (_, outside) = receive(first)?.context("the opening packet never arrived")?;
    for _ in 0..3 {
        other_port.send_to(b"port", outside)?;
        other_address.send_to(b"address", outside)?;
    }
    first.send_to(b"end", outside)?;
    until_end(client)
}

fn names(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

#[test]
fn every_nat_maps_and_filters_as_its_name_says() -> Result<()> {
    lab::test("kinds", |lab| {
        let reflector = Reflector::new(lab)?;
        for (n, kind) in KINDS.into_iter().enumerate() {
            let router = lab.router(&format!("R{n}"), RouterSpec::new(kind))?;
            let inside = router.host(&format!("A{n}"))?;

            let seen = reflector.reflexive(&socket(&inside, any())?)?;
            ensure!(seen.iter().all(|from| from.ip() == router.v4()), "{kind:?}: {seen:?}");
            let ports: BTreeSet<u16> = seen.iter().map(SocketAddr::port).collect();
            if kind == NatKind::Symmetric {
                // Four random ports; two may be equal once in ten thousand runs, three never.
                ensure!(ports.len() >= 3, "{kind:?}: {seen:?}");
            } else {
                ensure!(ports.len() == 1, "{kind:?}: {seen:?}");
            }

            let got = let_in(&reflector, &socket(&inside, any())?)?;
            let expected = match kind {
                NatKind::FullCone => names(&["address", "port"]),
                NatKind::AddressRestricted => names(&["port"]),
                NatKind::PortRestricted | NatKind::Symmetric => names(&[]),
            };
            ensure!(got == expected, "{kind:?} lets in {got:?}");
        }
        Ok(())
    })
}

/// Simultaneous open: both learn their outside address from the server, exchange it, and send. Each
/// answers to where a packet came from. True when both have heard the other.
fn punch(reflector: &Reflector, a: &UdpSocket, b: &UdpSocket) -> Result<bool> {
    /// More than any kind that can succeed needs.
    const ROUNDS: usize = 8;
    let mut target = [reflector.reflexive(b)?[0], reflector.reflexive(a)?[0]];
    let mut heard = [false; 2];
    for _ in 0..ROUNDS {
        for (n, socket) in [a, b].into_iter().enumerate() {
            socket.send_to(b"punch", target[n])?;
            socket.set_read_timeout(Some(Duration::from_millis(10)))?;
            while let Some((_, from)) = receive(socket)? {
                heard[n] = true;
                target[n] = from;
            }
        }
        if heard == [true; 2] {
            return Ok(true);
        }
    }
    Ok(false)
}

#[test]
fn hole_punching_works_where_theory_says_so() -> Result<()> {
    lab::test("punch", |lab| {
        let reflector = Reflector::new(lab)?;
        let left = lab.router("R1", RouterSpec::new(NatKind::FullCone))?;
        let right = lab.router("R2", RouterSpec::new(NatKind::FullCone))?;
        let (a, b) = (left.host("A")?, right.host("B")?);
        for (n, &one) in KINDS.iter().enumerate() {
            for &other in &KINDS[n..] {
                left.reconfigure(|_| RouterSpec::new(one))?;
                right.reconfigure(|_| RouterSpec::new(other))?;
                let met = punch(&reflector, &socket(&a, any())?, &socket(&b, any())?)?;
                // A symmetric NAT's port for the peer is not the one the server saw: the peer must
                // accept a port that it never sent to.
                let expected = other != NatKind::Symmetric
                    || matches!(one, NatKind::FullCone | NatKind::AddressRestricted);
                ensure!(met == expected, "{one:?} with {other:?}: met is {met}");
            }
        }
        Ok(())
    })
}

#[test]
fn a_double_nat_is_as_strict_as_its_strictest_part() -> Result<()> {
    lab::test("double", |lab| {
        let reflector = Reflector::new(lab)?;
        let carrier_spec =
            RouterSpec::new(NatKind::Symmetric).lan("100.64.0.0/10".parse().context("a subnet")?);
        let carrier = lab.router("C", carrier_spec)?;
        let home = carrier.router("H", RouterSpec::new(NatKind::FullCone))?;
        let inside = home.host("A")?;
        let client = socket(&inside, any())?;
        let seen = reflector.reflexive(&client)?;
        ensure!(seen.iter().all(|from| from.ip() == carrier.v4()), "{seen:?}");
        let ports: BTreeSet<u16> = seen.iter().map(SocketAddr::port).collect();
        ensure!(ports.len() >= 3, "{seen:?}");

        carrier.reconfigure(|_| RouterSpec::new(NatKind::FullCone))?;
        let got = let_in(&reflector, &socket(&inside, any())?)?;
        ensure!(got == names(&["address", "port"]), "two full cones let in {got:?}");
        Ok(())
    })
}

#[test]
fn hairpinning_is_off_unless_asked_for() -> Result<()> {
    lab::test("hairpin", |lab| {
        let reflector = Reflector::new(lab)?;
        let router = lab.router("R", RouterSpec::new(NatKind::PortRestricted))?;
        let (a, b) = (router.host("A")?, router.host("B")?);
        for hairpin in [false, true] {
            if hairpin {
                router.reconfigure(RouterSpec::hairpin)?;
            }
            let (one, other) = (socket(&a, any())?, socket(&b, any())?);
            let outside = reflector.reflexive(&other)?[0];
            let own = reflector.reflexive(&one)?[0];
            one.send_to(b"hairpin", outside)?;
            reflector.0[0].send_to(b"end", outside)?;
            let mut got = Vec::new();
            while let Some((text, from)) = receive(&other)? {
                if text == b"end" {
                    other.set_read_timeout(Some(GRACE))?;
                } else {
                    got.push(from);
                }
            }
            let expected = if hairpin { vec![own] } else { vec![] };
            ensure!(got == expected, "hairpin {hairpin}: got packets from {got:?}");
        }
        Ok(())
    })
}

#[test]
fn udp_is_blocked_and_only_the_named_tcp_port_is_open() -> Result<()> {
    lab::test("blocked", |lab| {
        let server = lab.host("S")?;
        let to = |port| SocketAddr::from((server.v4(), port));
        let listen = |port| server.enter(|| std::net::TcpListener::bind(to(port)));
        let (_open, _shut) = (listen(443)??, listen(80)??);
        let udp = socket(&server, to(3478))?;
        let router = lab.router("R", RouterSpec::new(NatKind::PortRestricted))?;
        let inside = router.host("A")?;
        let connect = |port| {
            let limit = Duration::from_secs(1);
            inside.enter(|| std::net::TcpStream::connect_timeout(&to(port), limit))
        };
        for refusal in [Refusal::Drop, Refusal::Reject] {
            let egress = Egress::TcpOnly { ports: vec![443], refusal };
            router.reconfigure(|spec| spec.egress(egress))?;
            ensure!(connect(443)?.is_ok(), "443 is open");
            let error = connect(80)?.err().context("80 is shut")?;
            let at_once = error.kind() != std::io::ErrorKind::TimedOut;
            ensure!(at_once == (refusal == Refusal::Reject), "{refusal:?}: {error}");

            let client = socket(&inside, any())?;
            client.connect(to(3478))?;
            client.send(b"x")?;
            if refusal == Refusal::Reject {
                // The ICMP error is reported on the connected socket.
                ensure!(client.recv(&mut [0; 8]).is_err(), "the refusal is told");
            }
        }
        router.reconfigure(|spec| spec.egress(Egress::Open))?;
        let client = socket(&inside, any())?;
        client.send_to(b"open", to(3478))?;
        let (text, _) = receive(&udp)?.context("UDP passes again")?;
        ensure!(text == b"open", "a blocked datagram got through");
        Ok(())
    })
}

#[test]
fn an_idle_mapping_is_forgotten_after_the_stated_time() -> Result<()> {
    lab::test("timeout", |lab| {
        let reflector = Reflector::new(lab)?;
        let spec = RouterSpec::new(NatKind::PortRestricted).udp_timeout(Duration::from_secs(1));
        let router = lab.router("R", spec)?;
        let inside = router.host("A")?;
        let client = socket(&inside, any())?;
        let outside = reflector.reflexive(&client)?[0];
        eventually("the mapping is gone", LIMIT, || {
            Ok((!router.connections()?.contains("udp")).then_some(()))
        })?;
        reflector.0[0].send_to(b"late", outside)?;
        // A second client's exchange through the same router shows that "late" had its chance.
        let witness = socket(&inside, any())?;
        let got = let_in(&reflector, &witness)?;
        ensure!(got.is_empty(), "{got:?}");
        client.set_read_timeout(Some(GRACE))?;
        ensure!(receive(&client)?.is_none(), "a packet came through an expired mapping");
        Ok(())
    })
}

#[test]
fn a_renumbered_router_has_a_new_outside_address() -> Result<()> {
    lab::test("renumber", |lab| {
        let reflector = Reflector::new(lab)?;
        for (n, kind) in KINDS.into_iter().enumerate() {
            let router = lab.router(&format!("R{n}"), RouterSpec::new(kind))?;
            let inside = router.host(&format!("A{n}"))?;
            let client = socket(&inside, any())?;
            let before = reflector.reflexive(&client)?[0];
            let fresh = router.renumber()?;
            let after = reflector.reflexive(&client)?[0];
            ensure!(before.ip() != after.ip() && after.ip() == IpAddr::V4(fresh), "{kind:?}");
        }
        Ok(())
    })
}

#[test]
fn ipv6_is_routed_to_the_lan_and_firewalled() -> Result<()> {
    lab::test("ipv6", |lab| {
        let server = lab.host("S")?;
        let router = lab.router("R", RouterSpec::new(NatKind::PortRestricted).ipv6())?;
        let inside = router.host("A")?;
        let only = lab.internet().host_v6_only("V")?;
        let v6 = |host: &Host| host.v6().map(IpAddr::V6).context("a dual-stack host");
        ensure!(inside.pings(v6(&server)?)?, "out by IPv6");
        ensure!(only.pings(v6(&server)?)?, "an IPv6-only host reaches IPv6");
        ensure!(!only.pings(server.v4().into())?, "an IPv6-only host has no IPv4");
        ensure!(!server.pings(v6(&inside)?)?, "nothing unsolicited comes in");
        ensure!(inside.pings(server.v4().into())?, "out by IPv4");

        let v4_only = lab.router("R4", RouterSpec::new(NatKind::PortRestricted))?.host("B")?;
        ensure!(v4_only.v6().is_none(), "a LAN without IPv6 gives none");
        ensure!(!v4_only.pings(v6(&server)?)?, "a LAN without IPv6 has no way out by it");
        Ok(())
    })
}

#[test]
fn a_host_roams_between_networks() -> Result<()> {
    lab::test("roam", |lab| {
        let reflector = Reflector::new(lab)?;
        let home = lab.router("R1", RouterSpec::new(NatKind::PortRestricted))?;
        let phone = lab.router("R2", RouterSpec::new(NatKind::Symmetric))?;
        let host = home.host("A")?;
        let seen_from =
            |host: &Host| -> Result<IpAddr> { Ok(reflector.reflexive(&socket(host, any())?)?[0].ip()) };
        ensure!(seen_from(&host)? == IpAddr::V4(home.v4()), "at home");
        host.attach(phone.lan(), "wlan0")?;
        host.link_down("eth0")?;
        host.route_over("wlan0")?;
        ensure!(seen_from(&host)? == IpAddr::V4(phone.v4()), "on the phone's network");
        host.link_up("eth0")?;
        ensure!(seen_from(&host)? == IpAddr::V4(home.v4()), "home again");
        host.unplug("eth0")?;
        ensure!(!host.pings(home.lan().host("P")?.v4().into())?, "the cable is out");
        host.plug("eth0")?;
        ensure!(seen_from(&host)? == IpAddr::V4(home.v4()), "the cable is back");
        Ok(())
    })
}

#[test]
fn a_neighbour_can_aim_any_destination_at_a_network_card() -> Result<()> {
    lab::test("weakhost", |lab| {
        // What the product must defend against is possible here: Linux accepts, on one interface, a
        // packet to an address of another one.
        let victim = lab.host("V")?;
        victim.ip("addr add 10.66.0.1/32 dev lo")?;
        let to = SocketAddr::from((Ipv4Addr::new(10, 66, 0, 1), 7));
        let listening = socket(&victim, to)?;
        let hostile = lab.host("H")?;
        hostile.route_via("10.66.0.0/16", victim.v4().into())?;
        socket(&hostile, any())?.send_to(b"in", to)?;
        let (text, from) = receive(&listening)?.context("the weak host model lets it in")?;
        ensure!(text == b"in" && from.ip() == IpAddr::V4(hostile.v4()), "{from}");
        Ok(())
    })
}

#[test]
fn labs_side_by_side_do_not_disturb_each_other() -> Result<()> {
    const LABS: usize = 4;
    fn one(n: usize) -> Result<()> {
        lab::test(&format!("side {n}"), |lab| {
            // All labs use the same addresses and the same names.
            let reflector = Reflector::new(lab)?;
            let router = lab.router("R", RouterSpec::new(KINDS[n % KINDS.len()]))?;
            let client = socket(&router.host("A")?, any())?;
            let token = format!("lab {n}");
            for server in &reflector.0 {
                client.send_to(token.as_bytes(), server.local_addr()?)?;
                let (text, from) = receive(server)?.context("the token never arrived")?;
                ensure!(text == token.as_bytes(), "lab {n} got {text:?}");
                server.send_to(&text, from)?;
                let (text, _) = receive(&client)?.context("the answer never arrived")?;
                ensure!(text == token.as_bytes(), "lab {n} got {text:?} back");
            }
            Ok(())
        })
    }
    lab::test("outer", |_| {
        std::thread::scope(|scope| {
            let labs: Vec<_> = (0..LABS).map(|n| scope.spawn(move || one(n))).collect();
            for lab in labs {
                lab.join().map_err(|_| anyhow::anyhow!("a lab panicked"))??;
            }
            Ok(())
        })
    })
}

/// What of a lab still exists: namespaces, directory.
fn remains(name: &str) -> Vec<String> {
    let prefix = format!("{name}-");
    let mut left: Vec<String> = lab::list().into_iter().filter(|netns| netns.starts_with(&prefix)).collect();
    let dir = std::env::temp_dir().join(name);
    left.extend(dir.exists().then(|| dir.display().to_string()));
    left
}

fn runs(pid: u32) -> bool {
    // A killed child of somebody else may stay a zombie until that one waits for it.
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat.rsplit(')').next().unwrap_or_default().starts_with(" Z"))
}

#[test]
fn nothing_is_left_after_the_end_or_a_panic() -> Result<()> {
    lab::test("outer", |_| {
        for panics in [false, true] {
            let mut seen = None;
            let ended = catch_unwind(AssertUnwindSafe(|| -> Result<()> {
                let lab = Lab::new("inner")?;
                let router = lab.router("R", RouterSpec::new(NatKind::FullCone))?;
                let host = router.host("A")?;
                let mut command = host.command("sh");
                // A grandchild that outlives its parent must go, too.
                command.args(["-c", "sleep 86400 & echo $!; wait"]);
                let mut process = host.spawn(command)?;
                let grandchild = process.wait_for_line("", LIMIT)?.trim().parse::<u32>()?;
                seen = Some((lab.name().to_owned(), process.pid(), grandchild));
                assert!(!panics, "on purpose");
                Ok(())
            }));
            ensure!(ended.is_err() == panics, "the body {ended:?}");
            let (name, child, grandchild) = seen.context("the lab was made")?;
            ensure!(remains(&name).is_empty(), "left behind: {:?}", remains(&name));
            ensure!(!runs(child) && !runs(grandchild), "a process outlived its lab");
        }
        Ok(())
    })
}

#[test]
fn what_a_killed_owner_leaves_is_swept_by_the_next_lab() -> Result<()> {
    lab::test("sweeper", |lab| {
        let mut owner =
            Command::new(env!("CARGO_BIN_EXE_lab-tool")).arg("hold").stdout(Stdio::piped()).spawn()?;
        let stdout = owner.stdout.take().context("a pipe")?;
        let mut line = String::new();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(stdout), &mut line)?;
        let told: serde_json::Value = serde_json::from_str(&line)?;
        let name = told["lab"].as_str().context("the lab's name")?.to_owned();
        let pid = told["pid"].as_u64().and_then(|pid| pid.try_into().ok());
        let pid: u32 = pid.context("the sleeper's pid")?;

        lab::sweep(false);
        ensure!(!remains(&name).is_empty() && runs(pid), "a living owner's lab is left alone");
        owner.kill()?;
        owner.wait()?;
        ensure!(runs(pid), "the orphan still runs, or this test shows nothing");
        let next = Lab::new("next")?;
        ensure!(remains(&name).is_empty(), "left behind: {:?}", remains(&name));
        eventually("the orphan is gone", LIMIT, || Ok((!runs(pid)).then_some(())))?;
        ensure!(!remains(next.name()).is_empty(), "the new lab is not swept");
        ensure!(!remains(lab.name()).is_empty(), "the outer lab is not swept");
        Ok(())
    })
}
