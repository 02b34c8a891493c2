//! Against servers on loopback that see and answer what a NAT would let them.

use tokio::task::JoinSet;

use super::*;

/// A server at two addresses and two ports of loopback, behind a NAT of this kind.
struct Server {
    primary: SocketAddr,
    _tasks: JoinSet<()>,
}

#[derive(Clone, Copy)]
struct Kind {
    /// The port that the NAT shows to the server's n-th socket (0: the asker's own).
    mapped: [u16; 4],
    /// Whether an answer from another address, or only from another port, comes through.
    lets_in: [bool; 2],
    /// The server says that it has another address, and answers from it.
    full: bool,
}

/// Sockets: address and port, address and other port, other address and port, other address and other port.
async fn server(kind: Kind) -> Server {
    // Two ports that are free at both addresses: other tests use loopback as well.
    let sockets = loop {
        let (Ok(first), Ok(other)) =
            (UdpSocket::bind("127.0.0.1:0").await, UdpSocket::bind("127.0.0.1:0").await)
        else {
            continue;
        };
        let port = |socket: &UdpSocket| socket.local_addr().unwrap().port();
        let third = UdpSocket::bind(("127.0.0.2", port(&first))).await;
        let fourth = UdpSocket::bind(("127.0.0.2", port(&other))).await;
        if let (Ok(third), Ok(fourth)) = (third, fourth) {
            break [first, other, third, fourth];
        }
    };
    let sockets = std::sync::Arc::new(sockets);
    let mut tasks = JoinSet::new();
    for n in 0..4 {
        let sockets = sockets.clone();
        tasks.spawn(async move {
            let mut buffer = [0; 100];
            loop {
                let (len, from) = sockets[n].recv_from(&mut buffer).await.unwrap();
                let flags = if len > 20 { buffer[27] } else { 0 };
                let via = match flags {
                    0 => n,
                    _ if !kind.full => n,
                    2 if kind.lets_in[1] => n ^ 1,
                    6 if kind.lets_in[0] => n ^ 3,
                    _ => continue,
                };
                let port = if kind.mapped[n] == 0 { from.port() } else { kind.mapped[n] };
                let other = kind.full.then(|| sockets[n ^ 3].local_addr().unwrap());
                sockets[via].send_to(&answer(&buffer[8..20], port, other), from).await.unwrap();
            }
        });
    }
    Server { primary: sockets[0].local_addr().unwrap(), _tasks: tasks }
}

fn answer(txid: &[u8], port: u16, other: Option<SocketAddr>) -> Vec<u8> {
    let attribute = |kind: u16, port: u16, ip: [u8; 4]| {
        let mut bytes = kind.to_be_bytes().to_vec();
        bytes.extend([0, 8, 0, 1]);
        bytes.extend(port.to_be_bytes());
        bytes.extend(ip);
        bytes
    };
    let mut more = attribute(0x0001, port, [127, 0, 0, 1]);
    if let Some(SocketAddr::V4(other)) = other {
        more.extend(attribute(0x802c, other.port(), other.ip().octets()));
    }
    let mut bytes = vec![1, 1, 0, more.len() as u8, 0x21, 0x12, 0xa4, 0x42];
    bytes.extend(txid);
    bytes.extend(more);
    bytes
}

async fn check(kind: Kind) -> Nat {
    let server = server(kind).await;
    nat(&[server.primary], &["127.0.0.1".parse().unwrap()], 0).await
}

fn known(mapping: &str, filtering: Option<&str>, hairpin: Option<bool>) -> Nat {
    Nat { mapping: Some(mapping.into()), filtering: filtering.map(str::to_owned), hairpin }
}

#[tokio::test]
async fn mapping_and_filtering_are_told_apart() {
    let restricted = Kind { mapped: [9; 4], lets_in: [false; 2], full: true };
    let (ei, ad, apd) = ("endpoint-independent", "address-dependent", "address-and-port-dependent");
    for (kind, want) in [
        (Kind { lets_in: [true; 2], ..restricted }, known(ei, Some(ei), Some(false))),
        (Kind { lets_in: [false, true], ..restricted }, known(ei, Some(ad), Some(false))),
        (restricted, known(ei, Some(apd), Some(false))),
        (Kind { mapped: [9, 9, 8, 8], ..restricted }, known(ad, Some(apd), Some(false))),
        (Kind { mapped: [9, 8, 7, 6], ..restricted }, known(apd, Some(apd), Some(false))),
        // No NAT, without and with a firewall.
        (Kind { mapped: [0; 4], lets_in: [true; 2], full: true }, known("none", Some("none"), None)),
        (Kind { mapped: [0; 4], ..restricted }, known("none", Some(apd), None)),
        // A server with one address.
        (Kind { full: false, ..restricted }, Nat { mapping: None, filtering: None, hairpin: Some(false) }),
        (Kind { mapped: [0; 4], full: false, ..restricted }, known("none", None, None)),
    ] {
        assert_eq!(check(kind).await, want);
    }
}

#[tokio::test]
async fn what_comes_back_to_the_asker_is_a_hairpin() {
    // The mapped address is the asker's own, which is not among the host's here: as if a NAT sent it back.
    let kind = Kind { mapped: [0; 4], lets_in: [false; 2], full: false };
    let server = server(kind).await;
    assert_eq!(nat(&[server.primary], &[], 0).await.hairpin, Some(true));
}

#[tokio::test]
async fn without_answers_nothing_is_claimed() {
    assert_eq!(nat(&[], &[], 0).await, Nat::default());
    let silent = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let many = vec![silent.local_addr().unwrap(); 3 * MAX_SERVERS];
    assert_eq!(nat(&many, &[], 0).await, Nat::default());
    let mut asked = std::collections::BTreeSet::new();
    let mut buffer = [0; 100];
    while let Ok((len, _)) = silent.try_recv_from(&mut buffer) {
        asked.insert(codec::transaction(&buffer[..len]).unwrap());
    }
    assert_eq!(asked.len(), MAX_SERVERS);
}

#[test]
fn servers_are_asked_by_a_family_that_the_host_has() {
    let by_v4 = |servers: &[&str], own: &[&str]| {
        let servers: Vec<SocketAddr> = servers.iter().map(|addr| addr.parse().unwrap()).collect();
        let own: Vec<IpAddr> = own.iter().map(|addr| addr.parse().unwrap()).collect();
        asks_by_ipv4(&servers, &own)
    };
    let (v4, v6) = ("192.0.2.1:3478", "[2001:db8::1]:3478");
    assert!(by_v4(&[v6, v4], &["10.0.0.1", "2001:db8::2"]) && by_v4(&[v4], &["10.0.0.1"]));
    assert!(!by_v4(&[v4, v6], &["2001:db8::2"]) && !by_v4(&[v6], &["10.0.0.1"]));
    assert!(by_v4(&[v4], &["2001:db8::2"]) && by_v4(&[v4, v6], &[]), "nothing better is known");
}
