//! TLS over TCP: for networks that let no UDP through.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use warren_common::wire::relay::{Deframer, RefusalCode, put_on_stream};

use super::{
    Client, GOODBYE_TIMEOUT, HANDSHAKE_TIMEOUT, MAX_HANDSHAKES, Shared, WRITE_TIMEOUT, family, reap,
};

/// What the kernel may hold unsent for one connection, in bytes: more would only be delay, and packets that a revocation
/// can't call back.
const UNSENT_BYTES: u32 = 64 * 1024;
/// Bytes read at once; small, since an idle connection holds that much.
const READ_BYTES: usize = 4 * 1024;
/// Pause after the system refused to accept (out of file descriptors, mostly): it will not be better at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

pub(super) async fn accept(
    shared: Arc<Shared>,
    listener: TcpListener,
    tls: Arc<rustls::ServerConfig>,
    stop: CancellationToken,
) {
    let acceptor = TlsAcceptor::from(tls);
    let handshakes = Arc::new(Semaphore::new(MAX_HANDSHAKES));
    let mut tasks = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        reap(&mut tasks);
        match accepted {
            Ok((stream, from)) => match handshakes.clone().try_acquire_owned() {
                Ok(permit) => {
                    tasks.spawn(serve(shared.clone(), acceptor.clone(), stream, from, permit));
                }
                Err(_) => {
                    shared.handshakes_refused.fetch_add(1, Ordering::Relaxed);
                }
            },
            Err(error) => {
                tracing::warn!(%error, "the relay can't accept a TCP connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(listener);
    while tasks.join_next().await.is_some() {}
}

async fn serve(
    shared: Arc<Shared>,
    acceptor: TlsAcceptor,
    stream: TcpStream,
    from: SocketAddr,
    permit: OwnedSemaphorePermit,
) {
    // Best effort: without these it is only slower.
    let _ = stream.set_nodelay(true);
    let _ = socket2::SockRef::from(&stream).set_tcp_notsent_lowat(UNSENT_BYTES);
    let Ok(Ok(stream)) = timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await else {
        shared.handshakes_failed.fetch_add(1, Ordering::Relaxed);
        return;
    };
    drop(permit);
    let client = shared.connect();
    tracing::debug!(%from, "connected over TLS");
    let (reader, writer) = tokio::io::split(stream);
    let mut writer = Writer { writer, buffer: Vec::new(), whole: true };
    let reason = tokio::select! {
        biased;
        reason = client.closing() => Some(reason),
        reason = read(&client, reader) => reason,
        reason = writer.run(&client) => reason,
    };
    if let Some(reason) = reason {
        let _ = timeout(GOODBYE_TIMEOUT, writer.goodbye(reason)).await;
    }
    tracing::debug!(family = family(from), reason = reason.map(RefusalCode::as_str), "disconnected (TLS)");
}

/// Reads frames into the core until the stream ends (`None`) or makes no sense.
async fn read(client: &Client, mut reader: impl AsyncRead + Unpin) -> Option<RefusalCode> {
    let mut deframer = Deframer::default();
    loop {
        let buffer = deframer.buffer();
        buffer.reserve(READ_BYTES);
        match reader.read_buf(buffer).await {
            Ok(0) | Err(_) => return None,
            Ok(_) => {}
        }
        loop {
            match deframer.next_frame() {
                Ok(Some(frame)) => client.frame(frame),
                Ok(None) => break,
                Err(_) => return Some(RefusalCode::Protocol),
            }
        }
    }
}

struct Writer<W> {
    writer: W,
    buffer: Vec<u8>,
    /// The stream ends with a whole frame, so that another may follow.
    whole: bool,
}

impl<W: AsyncWrite + Unpin> Writer<W> {
    /// Writes what waits, whenever there is something, until the stream breaks or stands still.
    async fn run(&mut self, client: &Client) -> Option<RefusalCode> {
        let mut batch = Vec::new();
        loop {
            client.wake().await;
            loop {
                client.take(&mut batch);
                if batch.is_empty() {
                    break;
                }
                self.buffer.clear();
                batch.drain(..).for_each(|frame| put_on_stream(&frame.bytes, &mut self.buffer));
                match timeout(WRITE_TIMEOUT, self.flush()).await {
                    Ok(Ok(())) => {}
                    Ok(Err(_)) => return None,
                    Err(_) => return Some(RefusalCode::SlowReader),
                }
            }
            // An idle connection holds no buffer.
            self.buffer = Vec::new();
            batch = Vec::new();
        }
    }

    async fn flush(&mut self) -> io::Result<()> {
        self.whole = false;
        self.writer.write_all(&self.buffer).await?;
        self.writer.flush().await?;
        self.whole = true;
        Ok(())
    }

    async fn goodbye(&mut self, reason: RefusalCode) -> io::Result<()> {
        if self.whole {
            self.buffer.clear();
            put_on_stream(&reason.frame().to_vec(), &mut self.buffer);
            self.flush().await?;
        }
        self.writer.shutdown().await
    }
}
