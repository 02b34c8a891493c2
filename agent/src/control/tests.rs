//! The client against a server made of the shared session code: no coordinator is linked here.

use futures_util::{SinkExt as _, StreamExt as _};
use tokio::net::TcpListener;
use tokio_tungstenite::tungstenite::Message;
use warren_common::keys::{NetmapSecretKey, RootSecretKey};
use warren_common::wire::control::{Ack, Empty, Pong, RelayTokenRequest, Report, Resume, Welcome};
use warren_common::wire::session as wire;

use super::*;

const NET: NetworkId = NetworkId::from_bytes([3; 16]);

struct Fake {
    root: RootSecretKey,
    control: ControlSecretKey,
    epoch: u64,
}

impl Fake {
    fn new() -> Self {
        Self {
            root: RootSecretKey::generate(&mut OsEntropy),
            control: ControlSecretKey::generate(&mut OsEntropy),
            epoch: 5,
        }
    }

    fn config(&self, listener: &TcpListener) -> ControlConfig {
        ControlConfig {
            url: format!("http://{}", listener.local_addr().unwrap()).parse().unwrap(),
            network: NET,
            root: self.root.public().fingerprint(),
            min_epoch: 5,
            secret: ControlSecretKey::generate(&mut OsEntropy),
            egress: Arc::new(Egress::direct(0)),
        }
    }

    fn identity(&self) -> Vec<u8> {
        CoordinatorIdentity {
            network: NET,
            network_name: "acme".into(),
            root: self.root.public(),
            control: self.control.public(),
            netmap: NetmapSecretKey::from_bytes([1; 32]).public(),
            epoch: self.epoch,
        }
        .sign(&self.root)
        .encode_to_vec()
    }

    /// Serves one session: answers pings, welcomes who resumes, ends at `Logout`.
    async fn serve(&self, listener: &TcpListener) -> Vec<ClientBody> {
        let mut socket = tokio_tungstenite::accept_async(listener.accept().await.unwrap().0).await.unwrap();
        socket.send(Message::binary(self.identity())).await.unwrap();
        let hello = socket.next().await.unwrap().unwrap().into_data();
        let (mut session, _, answer) = wire::accept(&self.control, NET, &hello, &mut OsEntropy).unwrap();
        socket.send(Message::binary(answer)).await.unwrap();
        let mut heard = Vec::new();
        while let Some(Ok(Message::Binary(frame))) = socket.next().await {
            let Some(bytes) = session.open(&frame).unwrap() else { continue };
            let body = ClientMessage::decode(bytes.as_slice()).unwrap().body.unwrap();
            heard.push(body.clone());
            let body = match body {
                ClientBody::Ping(ping) => Some(ServerBody::Pong(Pong { nonce: ping.nonce, unix_us: 7 })),
                ClientBody::Resume(_) => Some(ServerBody::Welcome(Welcome::default())),
                ClientBody::Logout(_) => break,
                _ => continue,
            };
            for frame in session.seal(&ServerMessage { body }.encode_to_vec()).unwrap() {
                socket.send(Message::binary(frame)).await.unwrap();
            }
        }
        heard
    }
}

async fn listener() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").await.unwrap()
}

async fn away(events: &mut mpsc::Receiver<ControlEvent>) -> (String, bool) {
    loop {
        if let ControlEvent::Away { problem, permanent } = events.recv().await.unwrap() {
            return (problem.code, permanent);
        }
    }
}

async fn welcomed(events: &mut mpsc::Receiver<ControlEvent>) {
    while !matches!(events.recv().await.unwrap(), ControlEvent::Message(ServerBody::Welcome(_))) {}
}

#[tokio::test]
async fn it_connects_talks_and_comes_back_after_the_session_ends() {
    let (fake, listener) = (Fake::new(), listener().await);
    let (sender, mut events) = mpsc::channel(16);
    let client = ControlClient::spawn(fake.config(&listener), sender);
    for _ in 0..2 {
        let server = fake.serve(&listener);
        let daemon = async {
            assert!(matches!(events.recv().await, Some(ControlEvent::Connected(id)) if id.network == NET));
            assert!(matches!(
                events.recv().await,
                Some(ControlEvent::Message(ServerBody::Pong(Pong { unix_us: 7, .. })))
            ));
            assert!(client.send(ClientBody::Resume(Resume::default())));
            welcomed(&mut events).await;
            assert!(client.send(ClientBody::Logout(Empty {})));
        };
        let (heard, ()) = tokio::join!(server, daemon);
        assert!(matches!(heard.last(), Some(ClientBody::Logout(_))));
        assert_eq!(away(&mut events).await, ("coordinator-away".into(), false));
        client.retry_now();
    }
}

#[tokio::test]
async fn what_is_said_before_the_welcome_does_not_reach_the_coordinator() {
    let (fake, listener) = (Fake::new(), listener().await);
    let (sender, mut events) = mpsc::channel(16);
    let client = ControlClient::spawn(fake.config(&listener), sender);
    let daemon = async {
        assert!(matches!(events.recv().await, Some(ControlEvent::Connected(_))));
        // Of the former session: the news of this one waited behind a save.
        client.send(ClientBody::Ack(Ack::default()));
        client.send(ClientBody::Resume(Resume::default()));
        // The same turn.
        client.send(ClientBody::RelayToken(RelayTokenRequest::default()));
        welcomed(&mut events).await;
        client.send(ClientBody::Report(Report::default()));
        client.send(ClientBody::Logout(Empty {}));
    };
    let (mut heard, ()) = tokio::join!(fake.serve(&listener), daemon);
    heard.retain(|body| !matches!(body, ClientBody::Ping(_)));
    assert!(
        matches!(heard[..], [ClientBody::Resume(_), ClientBody::Report(_), ClientBody::Logout(_)]),
        "{heard:?}"
    );
}

#[tokio::test]
async fn another_root_key_an_older_epoch_and_a_stranger_are_told_apart() {
    let (fake, other, listener) = (Fake::new(), Fake::new(), listener().await);
    let old = Fake { root: fake.root.clone(), control: fake.control.clone(), epoch: 4 };
    let thief = Fake { root: fake.root.clone(), control: fake.control.clone(), epoch: 5 };
    for (server, code) in [(&other, "coordinator-fingerprint"), (&old, "coordinator-restored")] {
        let (sender, mut events) = mpsc::channel(16);
        let _client = ControlClient::spawn(fake.config(&listener), sender);
        let serve = async {
            let mut socket =
                tokio_tungstenite::accept_async(listener.accept().await.unwrap().0).await.unwrap();
            socket.send(Message::binary(server.identity())).await.unwrap();
            // The client says nothing to a stranger, not even a handshake.
            assert!(!matches!(socket.next().await, Some(Ok(Message::Binary(_)))));
        };
        let (got, ()) = tokio::join!(away(&mut events), serve);
        assert_eq!(got, (code.to_owned(), true));
    }
    // The right document, but not the key it vouches for.
    let (sender, mut events) = mpsc::channel(16);
    let _client = ControlClient::spawn(fake.config(&listener), sender);
    let serve = async {
        let mut socket = tokio_tungstenite::accept_async(listener.accept().await.unwrap().0).await.unwrap();
        socket.send(Message::binary(thief.identity())).await.unwrap();
        socket.next().await.unwrap().unwrap();
        socket.send(Message::binary(vec![0; 80])).await.unwrap();
        socket.next().await
    };
    let (got, _) = tokio::join!(away(&mut events), serve);
    assert_eq!(got, ("coordinator-key".to_owned(), true));
}

#[tokio::test]
async fn a_web_server_and_a_closed_port_are_told_apart() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let (fake, listener) = (Fake::new(), listener().await);
    for (answer, code, permanent) in [
        ("HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n", "not-a-coordinator", true),
        ("HTTP/1.1 502 Bad Gateway\r\ncontent-length: 0\r\n\r\n", "coordinator-away", false),
        ("SSH-2.0-x\r\n\r\n", "not-a-coordinator", true),
    ] {
        let (sender, mut events) = mpsc::channel(16);
        let _client = ControlClient::spawn(fake.config(&listener), sender);
        let serve = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = [0; 2_048];
            let _ = stream.read(&mut request).await.unwrap();
            stream.write_all(answer.as_bytes()).await.unwrap();
            stream
        };
        let (got, _) = tokio::join!(away(&mut events), serve);
        assert_eq!(got, (code.to_owned(), permanent));
    }
    let config = fake.config(&listener);
    drop(listener);
    let (sender, mut events) = mpsc::channel(16);
    let _client = ControlClient::spawn(config, sender);
    assert_eq!(away(&mut events).await, ("coordinator-away".into(), false));
}

#[tokio::test]
async fn a_message_that_is_too_long_ends_the_session() {
    let (fake, listener) = (Fake::new(), listener().await);
    let (sender, mut events) = mpsc::channel(16);
    let _client = ControlClient::spawn(fake.config(&listener), sender);
    let serve = async {
        let mut socket = tokio_tungstenite::accept_async(listener.accept().await.unwrap().0).await.unwrap();
        // The client may hang up before all of it is sent.
        let _ = socket.send(Message::binary(vec![0; session::MAX_FRAME + 1])).await;
        while let Some(Ok(_)) = socket.next().await {}
    };
    let (got, ()) = tokio::join!(away(&mut events), serve);
    assert_eq!(got, ("coordinator-away".to_owned(), false));
}

#[tokio::test]
async fn what_waits_for_the_coordinator_is_bounded() {
    let (fake, listener) = (Fake::new(), listener().await);
    let (sender, _events) = mpsc::channel(16);
    let client = ControlClient::spawn(fake.config(&listener), sender);
    // The task does not run meanwhile: this thread is the only one.
    let taken = (0..2 * MAX_QUEUED).filter(|_| client.send(ClientBody::Logout(Empty {}))).count();
    assert_eq!(taken, MAX_QUEUED);
}
