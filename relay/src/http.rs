//! The one thing that a relay understands of HTTP/1.1: the upgrade to a WebSocket (RFC 6455) at [`WEBSOCKET_PATH`]. What a
//! stranger can make it hold is one request of [`MAX_REQUEST`] bytes, for as long as the caller waits.

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::machine::TryParse as _;
use tokio_tungstenite::tungstenite::handshake::server::{Request, create_response, write_response};
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};
use warren_common::wire::relay::WEBSOCKET_PATH;

/// Longest request with its headers, in bytes: several times what our own says.
const MAX_REQUEST: usize = 4 * 1024;

/// Why there is no WebSocket. Whoever asked has been told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// It ended before the request did.
    Ended,
    /// The request is too long.
    TooLong,
    /// It is no request for a WebSocket of version 13.
    NoUpgrade,
    /// There is nothing at its path.
    NotFound,
}

impl Refused {
    const fn status(self) -> &'static str {
        match self {
            Self::Ended | Self::NoUpgrade => "400 Bad Request",
            Self::TooLong => "431 Request Header Fields Too Large",
            Self::NotFound => "404 Not Found",
        }
    }
}

/// Takes a request and turns the connection into a WebSocket. Waits as long as the other side does: the caller has a limit.
pub(crate) async fn upgrade<S: AsyncRead + AsyncWrite + Unpin>(
    mut stream: S,
    settings: WebSocketConfig,
) -> Result<WebSocketStream<S>, Refused> {
    match request(&mut stream).await {
        Ok((accepted, rest)) => {
            stream.write_all(&accepted).await.map_err(|_| Refused::Ended)?;
            stream.flush().await.map_err(|_| Refused::Ended)?;
            Ok(WebSocketStream::from_partially_read(stream, rest, Role::Server, Some(settings)).await)
        }
        Err(refused) => {
            let answer = format!(
                "HTTP/1.1 {}\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\nThis is a Warren relay: it speaks with agents only.\n",
                refused.status()
            );
            // Nobody may be there to read it.
            let _ = stream.write_all(answer.as_bytes()).await;
            let _ = stream.shutdown().await;
            Err(refused)
        }
    }
}

/// The answer to a request for a WebSocket, and what came behind it.
async fn request(stream: &mut (impl AsyncRead + Unpin)) -> Result<(Vec<u8>, Vec<u8>), Refused> {
    let mut got = Vec::new();
    loop {
        let room = MAX_REQUEST - got.len();
        if room == 0 {
            return Err(Refused::TooLong);
        }
        if !matches!(stream.take(room as u64).read_buf(&mut got).await, Ok(1..)) {
            return Err(Refused::Ended);
        }
        let Some((len, request)) = Request::try_parse(&got).map_err(|_| Refused::NoUpgrade)? else {
            continue;
        };
        if request.uri().path() != WEBSOCKET_PATH {
            return Err(Refused::NotFound);
        }
        let accepted = create_response(&request).map_err(|_| Refused::NoUpgrade)?;
        let mut bytes = Vec::new();
        write_response(&mut bytes, &accepted).map_err(|_| Refused::NoUpgrade)?;
        return Ok((bytes, got.split_off(len)));
    }
}

#[cfg(test)]
mod tests {
    use futures_util::StreamExt as _;
    use tokio::io::duplex;
    use tokio_tungstenite::tungstenite::Message;

    use super::*;

    const HEADERS: &str = "Host: warren-relay\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
        Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";

    fn asking(path: &str, more: &str) -> Vec<u8> {
        format!("GET {path} HTTP/1.1\r\n{HEADERS}{more}\r\n").into_bytes()
    }

    /// What becomes of these bytes, written one or all at a time, and what the other side reads.
    async fn outcome(bytes: &[u8], one_by_one: bool, ends: bool) -> (Option<Refused>, String) {
        let (mut here, there) = duplex(64 * 1024);
        let serve = async { upgrade(there, WebSocketConfig::default()).await.err() };
        let ask = async {
            for part in bytes.chunks(if one_by_one { 1 } else { bytes.len().max(1) }) {
                let _ = here.write_all(part).await;
                tokio::task::yield_now().await;
            }
            if ends {
                let _ = here.shutdown().await;
            }
            let mut answer = Vec::new();
            let _ = here.read_to_end(&mut answer).await;
            String::from_utf8(answer).unwrap()
        };
        tokio::join!(serve, ask)
    }

    #[tokio::test]
    async fn an_upgrade_is_accepted_however_it_arrives_and_what_follows_is_kept() {
        for one_by_one in [false, true] {
            let (refused, answer) = outcome(&asking(WEBSOCKET_PATH, ""), one_by_one, true).await;
            assert_eq!(refused, None);
            assert!(answer.starts_with("HTTP/1.1 101 "), "{answer}");
            // The example of RFC 6455, section 1.3.
            assert!(answer.contains("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="), "{answer}");
        }
        let (mut here, there) = duplex(1 << 16);
        let mut bytes = asking(WEBSOCKET_PATH, "");
        bytes.extend([0x82, 0x81, 0, 0, 0, 0, 42]); // a masked binary message of one byte
        here.write_all(&bytes).await.unwrap();
        let mut socket = upgrade(there, WebSocketConfig::default()).await.unwrap();
        assert_eq!(socket.next().await.unwrap().unwrap(), Message::binary(vec![42]));
    }

    #[tokio::test]
    async fn anything_else_is_answered_and_refused() {
        let head = |text: &str| format!("{text} HTTP/1.1\r\nHost: x\r\n\r\n").into_bytes();
        let old = String::from_utf8(asking(WEBSOCKET_PATH, "")).unwrap().replace(": 13", ": 8").into_bytes();
        for (bytes, refused, status) in [
            (head("GET /"), Refused::NotFound, "404"),
            (asking("/relay/v1", ""), Refused::NotFound, "404"),
            (head(&format!("GET {WEBSOCKET_PATH}")), Refused::NoUpgrade, "400"),
            (head(&format!("POST {WEBSOCKET_PATH}")), Refused::NoUpgrade, "400"),
            (old, Refused::NoUpgrade, "400"),
            (b"\x16\x03\x01 not HTTP at all\r\n\r\n".to_vec(), Refused::NoUpgrade, "400"),
            (Vec::new(), Refused::Ended, "400"),
            (b"GET /packets".to_vec(), Refused::Ended, "400"),
        ] {
            let (got, answer) = outcome(&bytes, false, true).await;
            assert_eq!(got, Some(refused), "{}", String::from_utf8_lossy(&bytes));
            assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");
        }
    }

    #[tokio::test]
    async fn a_request_is_bounded() {
        let fits = MAX_REQUEST - asking(WEBSOCKET_PATH, "X: \r\n").len();
        for (more, refused) in
            [(fits, None), (fits + 1, Some(Refused::TooLong)), (1 << 20, Some(Refused::TooLong))]
        {
            let bytes = asking(WEBSOCKET_PATH, &format!("X: {}\r\n", "x".repeat(more)));
            let (got, _) = outcome(&bytes, false, false).await;
            assert_eq!(got, refused, "{more}");
        }
        // Many short headers, which cost more memory than their bytes, are as bad.
        let many: String = (0..200).map(|n| format!("X{n}: y\r\n")).collect();
        let (got, _) = outcome(&asking(WEBSOCKET_PATH, &many), false, false).await;
        assert_eq!(got, Some(Refused::NoUpgrade));
    }
}
