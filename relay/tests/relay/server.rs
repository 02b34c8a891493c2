//! The server: both transports, STUN, its end.

use std::net::SocketAddr;
use std::time::Duration;

use crate::support::{Device, Seen, Transport, config, device, patient, probe, start, tls, token};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, UdpSocket};
use tokio_tungstenite::tungstenite::Message;
use warren_common::wire::relay::{
    Frame, GoneReason, MAX_FRAME, MAX_PAYLOAD, RefusalCode, TokenRef, WantedReason,
};
use warren_relay::core::{DropReason, Limits};
use warren_relay::server::{MAX_HANDSHAKES, RelayServer, RelayServerConfig, StartError};

const BOTH: [Transport; 2] = [Transport::Quic, Transport::WebSocket];

#[tokio::test]
async fn two_devices_talk_over_any_two_transports() {
    let (_dir, server) = start(Limits::default());
    for left in BOTH {
        for right in BOTH {
            let mut a = Device::join(&server, left, 1, &[2]).await;
            let mut b = Device::join(&server, right, 2, &[1]).await;
            // The longest payload needs the stream on QUIC, the others don't.
            for len in [1, 100, 1_150, MAX_PAYLOAD] {
                let payload = vec![len as u8; len];
                a.send(2, &payload).await;
                assert_eq!(b.receive().await, (device(1), payload.clone()), "{left:?} to {right:?}, {len}");
                b.send(1, &payload).await;
                assert_eq!(a.receive().await, (device(2), payload), "{right:?} to {left:?}, {len}");
            }
        }
    }
    // The last pair is still there; those before were replaced or have gone.
    assert_eq!(server.stats().core.clients, 2);
}

#[tokio::test]
async fn a_thief_with_a_token_gets_nothing() {
    let (_dir, server) = start(Limits::default());
    for transport in BOTH {
        let mut thief = Device::connect(&server, transport).await;
        let seen = thief.authenticate(&token(1, 1, &[2]), &probe(9)).await;
        assert_eq!(seen, Seen::Closed(Some(RefusalCode::Possession)));
    }
    assert_eq!(server.stats().core.clients, 0);
}

#[tokio::test]
async fn revocation_ends_the_connection_and_stops_what_waits() {
    let (_dir, server) = start(Limits::default());
    for (transport, n) in BOTH.into_iter().zip([1, 3]) {
        let mut a = Device::join(&server, transport, n, &[2]).await;
        let mut b = Device::join(&server, transport, 2, &[n]).await;
        a.send(2, b"before").await;
        assert_eq!(b.receive().await.1, b"before");
        server.revoke(device(n), 2);
        a.stream(&Frame::Send { dst: device(2), payload: b"after" }).await;
        assert_eq!(a.end().await, Some(RefusalCode::Revoked));
        b.send(n, b"back").await;
        let gone = Frame::PeerGone { device: device(n), why: GoneReason::NotConnected };
        assert_eq!(b.see().await, Seen::Frame(gone.to_vec()));
        let mut again = Device::connect(&server, transport).await;
        let seen = again.authenticate(&token(n, 1, &[2]), &probe(n)).await;
        assert_eq!(seen, Seen::Closed(Some(RefusalCode::TokenStale)));
    }
}

#[tokio::test]
async fn a_newer_token_lifts_a_suspension() {
    let (_dir, server) = start(Limits::default());
    let mut a = Device::join(&server, Transport::Quic, 1, &[2]).await;
    let mut b = Device::join(&server, Transport::WebSocket, 2, &[1]).await;
    server.set_minimum_revision(device(1), 2);
    assert_eq!(a.see().await, Seen::Frame(Frame::TokenWanted { why: WantedReason::Stale }.to_vec()));
    a.stream(&Frame::Send { dst: device(2), payload: b"suspended" }).await;
    let signed = token(1, 2, &[2]);
    a.stream(&Frame::TokenRefresh { token: TokenRef::new(&signed).unwrap() }).await;
    assert_eq!(a.see().await, Seen::Frame(Frame::Ready { revision: 2 }.to_vec()));
    a.send(2, b"lifted").await;
    assert_eq!(b.receive().await, (device(1), b"lifted".to_vec()));
    assert_eq!(server.stats().core.counters.dropped(DropReason::Suspended), 1);
}

#[tokio::test]
async fn half_open_connections_are_closed() {
    let limits = Limits { auth_timeout: Duration::from_millis(200), ..Limits::default() };
    let (_dir, server) = start(limits);
    for transport in BOTH {
        let mut device = Device::connect(&server, transport).await;
        assert_eq!(device.end().await, Some(RefusalCode::AuthTimeout));
    }
    assert_eq!(server.stats().core.half_open, 0);
}

#[tokio::test]
async fn nonsense_on_the_stream_closes_the_connection() {
    let (_dir, server) = start(Limits::default());
    for bytes in [&[0xff, 0xff, 0xff][..], &[0, 0, 0], &[0, 0, 2, 7, 7]] {
        let mut device = Device::join(&server, Transport::Quic, 1, &[]).await;
        device.quic_raw(bytes).await;
        assert_eq!(device.end().await, Some(RefusalCode::Protocol), "{bytes:?}");
    }
    for message in [
        Message::binary(Vec::new()),
        Message::binary(vec![7, 7]),
        Message::text("hello"),
        Message::binary(vec![5; MAX_FRAME + 1]),
    ] {
        let mut device = Device::join(&server, Transport::WebSocket, 1, &[]).await;
        device.message(message.clone()).await;
        assert_eq!(device.end().await, Some(RefusalCode::Protocol), "{} bytes", message.len());
    }
    // An unmasked message, and a length beyond all bounds, of which nothing is waited for.
    for bytes in
        [&[0x82, 1, 7][..], &[0x82, 0xff, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1, 2, 3, 4]]
    {
        let mut device = Device::join(&server, Transport::WebSocket, 1, &[]).await;
        device.websocket_raw(bytes).await;
        assert_eq!(device.end().await, Some(RefusalCode::Protocol), "{bytes:?}");
    }
}

#[tokio::test]
async fn pings_of_the_websocket_are_answered_and_messages_may_come_in_pieces() {
    let (_dir, server) = start(Limits::default());
    let mut a = Device::join(&server, Transport::WebSocket, 1, &[2]).await;
    let mut b = Device::join(&server, Transport::WebSocket, 2, &[1]).await;
    for _ in 0..100 {
        a.message(Message::Ping(vec![1; 125].into())).await;
    }
    let frame = Frame::Send { dst: device(2), payload: b"in pieces" }.to_vec();
    let (first, rest) = frame.split_at(5);
    // A binary message that goes on, and its last piece, both masked with zeros.
    for (head, piece) in [(0x02, first), (0x80, rest)] {
        let header = [head, 0x80 | piece.len() as u8, 0, 0, 0, 0];
        a.websocket_raw(&[&header, piece].concat()).await;
    }
    assert_eq!(b.receive().await, (device(1), b"in pieces".to_vec()));
}

#[tokio::test]
async fn who_does_not_ask_for_a_websocket_is_told_and_holds_nothing() {
    let (_dir, server) = start(Limits::default());
    let mut stream = tls(server.local_addr(), server.cert_sha256()).await;
    stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    patient(stream.read_to_string(&mut answer)).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 404 "), "{answer}");
    let stats = server.stats();
    assert_eq!((stats.handshakes_failed, stats.core.half_open, stats.core.clients), (1, 0, 0));
}

#[tokio::test]
async fn strangers_that_say_nothing_keep_nobody_out() {
    let (_dir, server) = start(Limits::default());
    let mut silent = Vec::new();
    for _ in 0..2 * MAX_HANDSHAKES {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.2:0".parse().unwrap()).unwrap();
        silent.push(socket.connect(server.local_addr()).await.unwrap());
    }
    let _device = Device::join(&server, Transport::WebSocket, 1, &[2]).await;
    let refused = server.stats().handshakes_refused;
    assert!(refused > MAX_HANDSHAKES as u64, "{refused}");
}

#[tokio::test]
async fn a_network_whose_connections_come_to_nothing_is_barred_and_keeps_nobody_out() {
    let (_dir, server) = start(Limits::default());
    while server.stats().networks_barred == 0 {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.2:0".parse().unwrap()).unwrap();
        // The kernel may bar it just now.
        let _ = tokio::time::timeout(Duration::from_millis(100), socket.connect(server.local_addr())).await;
    }
    let _device = Device::join(&server, Transport::WebSocket, 1, &[2]).await;
    // It is let in again, by TCP's own next try.
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.2:0".parse().unwrap()).unwrap();
    socket.connect(server.local_addr()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_has_stopped_leaves_its_ports() {
    let (dir, mut server) = start(Limits::default());
    let (listen, stun_listen) = (server.local_addr(), server.stun_addr());
    let config = RelayServerConfig { listen, stun_listen, ..config(dir.path(), Limits::default()) };
    for _ in 0..20 {
        let mut there = Vec::new();
        for n in 1..=4 {
            there.push(Device::join(&server, Transport::Quic, n, &[]).await);
        }
        server.shutdown().await;
        server = RelayServer::start(config.clone()).unwrap();
    }
}

#[tokio::test]
async fn a_slow_reader_is_bounded_and_hurts_nobody_else() {
    for transport in BOTH {
        let (_dir, server) = start(Limits { rate: u64::MAX, ..Limits::default() });
        let mut sender = Device::join(&server, transport, 1, &[2, 3]).await;
        let mut slow = Device::join(&server, transport, 2, &[]).await;
        let mut quick = Device::join(&server, Transport::WebSocket, 3, &[]).await;
        let limit = Limits::default().queue_bytes;
        let mut sent = 0u32;
        // Far more than the queue, both socket buffers and QUIC's windows hold. Too long for datagrams, as QUIC's own
        // buffers would take those whether they are read or not.
        while server.stats().core.counters.dropped(DropReason::QueueFull) < 1_000 {
            for _ in 0..64 {
                let mut payload = [9; MAX_PAYLOAD];
                payload[..4].copy_from_slice(&sent.to_be_bytes());
                sender.send(2, &payload).await;
                sent += 1;
            }
            assert!(server.stats().core.queued_bytes <= limit);
            assert!(sent < 1_000_000, "{transport:?}: nothing was dropped: {:?}", server.stats());
            sender.send(3, b"quick").await;
            assert_eq!(quick.receive().await, (device(1), b"quick".to_vec()));
        }
        // What it reads at last ends with the newest: only older ones are gone.
        let mut last = 0;
        while last + 1 < sent {
            let (_, payload) = slow.receive().await;
            let serial = u32::from_be_bytes(*payload.first_chunk().unwrap());
            assert!(serial == 0 || serial > last);
            last = serial;
        }
    }
}

#[tokio::test]
async fn stun_answers_questions_only() {
    let (_dir, server) = start(Limits::default());
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    socket.connect(server.stun_addr().unwrap()).await.unwrap();
    socket.send(b"\x01\x00nonsense that is no question").await.unwrap();
    let mut question = [7; 20];
    question[..8].copy_from_slice(&[0, 1, 0, 0, 0x21, 0x12, 0xa4, 0x42]);
    socket.send(&question).await.unwrap();
    let mut answer = [0; 100];
    let len = patient(socket.recv(&mut answer)).await.unwrap();
    assert_eq!((len, &answer[..2]), (32, &[1, 1][..]));
    let port = u16::from_be_bytes([answer[26], answer[27]]) ^ 0x2112;
    assert_eq!(port, socket.local_addr().unwrap().port());
    let stats = server.stats();
    assert_eq!((stats.stun_answered, stats.stun_ignored), (1, 1));
}

#[tokio::test]
async fn stun_at_two_addresses_answers_from_where_it_is_asked_to() {
    let dir = tempfile::tempdir().unwrap();
    let with = |second: &str| {
        let second = Some(second.parse().unwrap());
        RelayServer::start(RelayServerConfig { stun_second: second, ..config(dir.path(), Limits::default()) })
    };
    for bad in ["127.0.0.1:9", "0.0.0.0:9", "[::1]:9"] {
        let text = with(bad).unwrap_err().to_string();
        assert!(text.contains("must be of the same family as the first and differ"), "{text}");
    }
    let server = with("127.0.0.2:0").unwrap();
    let first = server.stun_addr().unwrap();
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let ask = async |to: SocketAddr, flags: u8| {
        let mut question = vec![7; 20];
        question[..8].copy_from_slice(&[0, 1, 0, 8, 0x21, 0x12, 0xa4, 0x42]);
        question.extend([0, 3, 0, 4, 0, 0, 0, flags]);
        socket.send_to(&question, to).await.unwrap();
        let mut answer = [0; 100];
        let (len, from) = patient(socket.recv_from(&mut answer)).await.unwrap();
        assert_eq!((len, &answer[32..36]), (44, &[0x80, 0x2c, 0, 8][..]));
        let port = u16::from_be_bytes([answer[38], answer[39]]);
        (from, SocketAddr::from(([answer[40], answer[41], answer[42], answer[43]], port)))
    };
    let (from, other) = ask(first, 0).await;
    assert_eq!((from, other.ip().to_string()), (first, "127.0.0.2".to_owned()));
    assert_ne!(other.port(), first.port());
    for at in [first, other] {
        let apart = if at == first { other } else { first };
        assert_eq!(ask(at, 0).await, (at, apart));
        assert_eq!(ask(at, 2).await, (SocketAddr::new(at.ip(), apart.port()), apart));
        assert_eq!(ask(at, 4).await, (SocketAddr::new(apart.ip(), at.port()), apart));
        assert_eq!(ask(at, 6).await, (apart, apart));
    }
}

#[tokio::test]
async fn shutdown_says_so_and_frees_the_port() {
    let (dir, server) = start(Limits::default());
    let (addr, cert) = (server.local_addr(), server.cert_sha256());
    let mut quic = Device::join(&server, Transport::Quic, 1, &[]).await;
    let mut websocket = Device::join(&server, Transport::WebSocket, 2, &[]).await;
    let ends = async { (quic.end().await, websocket.end().await) };
    let (ends, ()) = tokio::join!(ends, server.shutdown());
    assert_eq!(ends, (Some(RefusalCode::ShuttingDown), Some(RefusalCode::ShuttingDown)));
    // Again at the same place, with the same certificate.
    let again =
        RelayServer::start(RelayServerConfig { listen: addr, ..config(dir.path(), Limits::default()) })
            .unwrap();
    assert_eq!(again.cert_sha256(), cert);
    Device::join(&again, Transport::Quic, 1, &[]).await;
}

#[tokio::test]
async fn a_relay_that_was_killed_and_started_again_resets_its_old_connections() {
    let dir = tempfile::tempdir().unwrap();
    // What is dropped with its runtime sends no goodbye, as a killed process.
    let killed = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let server = {
        let _context = killed.enter();
        RelayServer::start(config(dir.path(), Limits::default())).unwrap()
    };
    let mut quic = Device::join(&server, Transport::Quic, 1, &[]).await;
    let listen = server.local_addr();
    killed.shutdown_background();
    drop(server);
    let again = loop {
        // The killed one's sockets close in the background.
        let config = RelayServerConfig { listen, ..config(dir.path(), Limits::default()) };
        match RelayServer::start(config) {
            Ok(server) => break server,
            Err(StartError::Listen { .. }) => tokio::task::yield_now().await,
            Err(error) => panic!("{error}"),
        }
    };
    quic.stream(&Frame::Ping { nonce: 1 }).await;
    assert!(matches!(quic.quic_end().await, quinn::ConnectionError::Reset));
    Device::join(&again, Transport::Quic, 1, &[]).await;
}

#[tokio::test]
async fn dropping_the_server_ends_its_connections() {
    let (_dir, server) = start(Limits::default());
    let mut websocket = Device::join(&server, Transport::WebSocket, 1, &[]).await;
    drop(server);
    assert_eq!(websocket.end().await, None);
}

#[tokio::test]
async fn a_port_in_use_is_named() {
    let (dir, server) = start(Limits::default());
    let again = RelayServerConfig { listen: server.local_addr(), ..config(dir.path(), Limits::default()) };
    let error = RelayServer::start(again).unwrap_err();
    assert!(matches!(error, StartError::Listen { addr, .. } if addr == server.local_addr()));
}
