//! The task that owns the coordinator: takes requests, saves each batch in one transaction, sends what comes out.
//!
//! Everything else (HTTP, admin socket, policy watcher) talks to it through a [`Handle`]. While a commit runs nothing
//! else happens here; requests gather meanwhile and share the next commit.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use warren_common::keys::ControlPublicKey;
use warren_common::time::Instant;
use warren_common::wire::control::{ClientBody, ServerBody};

use crate::domain::{Command, Refusal, Reply};
use crate::os::{self, OsEntropy};
use crate::push::{CloseReason, Coordinator, Origin, Output, SessionId};
use crate::relays::Relays;
use crate::store::{Commit, Store, StoreError};

/// Requests that may wait for the task; beyond this their senders wait.
pub const MAX_REQUESTS: usize = 4_096;
/// Requests decided together at most: bounds how long the first of them waits for its commit.
pub const MAX_BATCH: usize = 256;
/// Messages that may wait for one slow connection; beyond this it is closed.
pub const MAX_OUTBOUND: usize = 256;
/// How often a batch is decided again after conflicts before its callers hear that the store is unavailable.
pub const MAX_CONFLICTS: usize = 8;

/// How long after a failed commit the store is tried again.
pub const STORE_RETRY: Duration = Duration::from_secs(2);
/// How long the task sleeps at most.
const IDLE: Duration = Duration::from_secs(3_600);

/// What a session's connection is told.
#[derive(Debug)]
pub enum ToSession {
    /// Send this.
    Message(Box<ServerBody>),
    /// Close, once everything before is sent.
    Close(CloseReason),
}

/// Sees the coordinator between two batches.
type Look = Box<dyn FnOnce(&Coordinator, &Health) + Send>;

enum Request {
    Connect {
        control: ControlPublicKey,
        outbound: mpsc::Sender<ToSession>,
        reply: oneshot::Sender<Result<SessionId, Refusal>>,
    },
    Message(SessionId, ClientBody),
    Disconnect(SessionId),
    Command(Command, oneshot::Sender<Result<Reply, Refusal>>),
    Look(Look),
}

/// How the task fares.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Health {
    /// Why the last commit failed; `None` if it didn't.
    pub store_error: Option<String>,
    /// Commits that succeeded since the start.
    pub commits: u64,
    /// Commits that failed since the start.
    pub commit_failures: u64,
    /// Commits that another writer overtook.
    pub conflicts: u64,
    /// Connections closed because they took messages too slowly.
    pub slow_sessions: u64,
}

/// The task is gone: the coordinator is stopping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the coordinator is stopping")]
pub struct Stopping;

/// Talks to the task.
#[derive(Clone, Debug)]
pub struct Handle {
    requests: mpsc::Sender<Request>,
}

impl Handle {
    /// Opens a session whose handshake proved `control`; what it must be told goes to `outbound`.
    ///
    /// # Errors
    /// Stopping, or there are too many sessions.
    pub async fn connect(
        &self,
        control: ControlPublicKey,
        outbound: mpsc::Sender<ToSession>,
    ) -> Result<Result<SessionId, Refusal>, Stopping> {
        let (reply, answer) = oneshot::channel();
        self.request(Request::Connect { control, outbound, reply }).await?;
        answer.await.map_err(|_| Stopping)
    }

    /// Passes on what a session's agent says.
    ///
    /// # Errors
    /// Stopping.
    pub async fn message(&self, session: SessionId, body: ClientBody) -> Result<(), Stopping> {
        self.request(Request::Message(session, body)).await
    }

    /// A session's connection is gone.
    pub async fn disconnect(&self, session: SessionId) {
        // When the task is gone, so is the session.
        let _ = self.request(Request::Disconnect(session)).await;
    }

    /// Carries out a command; durable when this returns `Ok(Ok(_))`.
    ///
    /// # Errors
    /// Stopping; the inner error is the domain's refusal.
    pub async fn command(&self, command: Command) -> Result<Result<Reply, Refusal>, Stopping> {
        let (reply, answer) = oneshot::channel();
        self.request(Request::Command(command, reply)).await?;
        answer.await.map_err(|_| Stopping)
    }

    /// Looks at the coordinator between two batches.
    ///
    /// # Errors
    /// Stopping.
    pub async fn look<T: Send + 'static>(
        &self,
        look: impl FnOnce(&Coordinator, &Health) -> T + Send + 'static,
    ) -> Result<T, Stopping> {
        let (reply, answer) = oneshot::channel();
        let look: Look = Box::new(move |coordinator, health| {
            // If nobody waits for the answer any more, nobody misses it.
            let _ = reply.send(look(coordinator, health));
        });
        self.request(Request::Look(look)).await?;
        answer.await.map_err(|_| Stopping)
    }

    async fn request(&self, request: Request) -> Result<(), Stopping> {
        self.requests.send(request).await.map_err(|_| Stopping)
    }
}

/// The task's state; [`Server::run`] is the task.
pub struct Server<S> {
    coordinator: Coordinator,
    store: S,
    relays: Relays,
    version: u64,
    requests: mpsc::Receiver<Request>,
    sessions: BTreeMap<SessionId, mpsc::Sender<ToSession>>,
    next_session: u64,
    tickets: BTreeMap<u64, oneshot::Sender<Result<Reply, Refusal>>>,
    next_ticket: u64,
    health: Health,
    /// When the store is tried again after it has failed.
    retry_at: Option<Instant>,
    looks: Vec<Look>,
}

impl<S> std::fmt::Debug for Server<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server").field("version", &self.version).finish_non_exhaustive()
    }
}

impl<S: Store> Server<S> {
    /// A server over `coordinator`, whose state is version `version` of `store`.
    pub fn new(coordinator: Coordinator, store: S, version: u64, relays: Relays) -> (Self, Handle) {
        let (sender, requests) = mpsc::channel(MAX_REQUESTS);
        let server = Self {
            coordinator,
            store,
            relays,
            version,
            requests,
            sessions: BTreeMap::new(),
            next_session: 1,
            tickets: BTreeMap::new(),
            next_ticket: 1,
            health: Health::default(),
            retry_at: None,
            looks: Vec::new(),
        };
        (server, Handle { requests: sender })
    }

    /// Serves until `stop` is cancelled; what was taken in by then is finished.
    pub async fn run(mut self, stop: CancellationToken) {
        self.upkeep().await;
        let mut batch = Vec::with_capacity(MAX_BATCH);
        loop {
            let due = self.coordinator.poll_timeout().min(self.retry_at.unwrap_or(Instant::FAR_FUTURE));
            let wait = due.since(os::now().boot).min(IDLE);
            tokio::select! {
                () = stop.cancelled() => break,
                count = self.requests.recv_many(&mut batch, MAX_BATCH) => {
                    if count == 0 {
                        break; // every handle is gone
                    }
                    batch.drain(..).for_each(|request| self.take(request));
                }
                () = tokio::time::sleep(wait) => {}
            }
            // Also when requests come all the time.
            self.handle_timeouts();
            self.upkeep().await;
        }
        if let Err(error) = self.store.close().await {
            tracing::warn!(%error, "the database is not closed well; it puts itself right at the next start");
        }
    }

    fn handle_timeouts(&mut self) {
        let now = os::now();
        if self.coordinator.poll_timeout() <= now.boot {
            self.coordinator.handle_timeout(now);
        }
        if self.retry_at.is_some_and(|at| at <= now.boot) {
            self.retry_at = None;
            // Something to store: health says so as soon as it works again.
            self.coordinator.submit(Origin::Internal, Command::ReserveRevisions, now, &mut OsEntropy);
        }
    }

    fn take(&mut self, request: Request) {
        let now = os::now();
        match request {
            Request::Connect { control, outbound, reply } => {
                let id = SessionId(self.next_session);
                let result = self.coordinator.connect(id, control, now).map(|()| {
                    self.next_session += 1;
                    self.sessions.insert(id, outbound);
                    id
                });
                // If the connection is gone by now, its `Disconnect` follows or its channel is found closed.
                let _ = reply.send(result);
            }
            Request::Message(session, body) => self.coordinator.handle(session, body, now, &mut OsEntropy),
            Request::Disconnect(session) => {
                self.sessions.remove(&session);
                self.coordinator.disconnect(session, now);
            }
            Request::Command(command, reply) => {
                let ticket = self.next_ticket;
                self.next_ticket += 1;
                self.tickets.insert(ticket, reply);
                self.coordinator.submit(Origin::Ticket(ticket), command, now, &mut OsEntropy);
            }
            // The state holds unsaved changes until the batch is through.
            Request::Look(look) => self.looks.push(look),
        }
    }

    /// Saves what is decided, carries out what the coordinator wants itself, and sends everything.
    async fn upkeep(&mut self) {
        loop {
            while let Some(command) = self.coordinator.poll_command() {
                self.coordinator.submit(Origin::Internal, command, os::now(), &mut OsEntropy);
            }
            if !self.coordinator.has_batch() {
                break;
            }
            self.save().await;
        }
        self.deliver();
        for look in self.looks.drain(..) {
            look(&self.coordinator, &self.health);
        }
    }

    async fn save(&mut self) {
        for _ in 0..MAX_CONFLICTS {
            if self.coordinator.unsaved().is_empty() {
                return self.coordinator.saved(os::now());
            }
            match self.store.commit(self.version, self.coordinator.unsaved(), os::now().unix).await {
                Ok(Commit::Committed(version)) => {
                    self.version = version;
                    self.health.commits += 1;
                    self.retry_at = None;
                    if self.health.store_error.take().is_some() {
                        tracing::info!("the database can be written again");
                    }
                    return self.coordinator.saved(os::now());
                }
                Ok(Commit::Conflict(newer)) => {
                    self.health.conflicts += 1;
                    let commands = self.coordinator.retract();
                    self.coordinator.absorb_foreign(newer.changes, os::now());
                    self.version = newer.version;
                    for (origin, command) in commands {
                        self.coordinator.submit(origin, command, os::now(), &mut OsEntropy);
                    }
                }
                Err(error) => return self.failed(&error),
            }
        }
        self.failed(&StoreError::Unavailable("other writers are always faster".into()));
    }

    fn failed(&mut self, error: &StoreError) {
        self.health.commit_failures += 1;
        let text = error.to_string();
        if self.health.store_error.as_ref() != Some(&text) {
            tracing::error!(error = %text, "nothing can be stored; requests are refused until it works again");
        }
        self.health.store_error = Some(text.clone());
        self.retry_at = Some(os::now().boot + STORE_RETRY);
        self.coordinator.not_saved(&Refusal::StoreUnavailable(text), os::now());
    }

    fn deliver(&mut self) {
        while let Some(output) = self.coordinator.poll_output() {
            match output {
                Output::Send { session, message } => self.tell(session, ToSession::Message(message)),
                Output::Close { session, reason } => {
                    self.tell(session, ToSession::Close(reason));
                    self.sessions.remove(&session);
                }
                Output::Reply { ticket, result } => {
                    if let Some(reply) = self.tickets.remove(&ticket) {
                        // The caller may have given up waiting; the command is done all the same.
                        let _ = reply.send(result);
                    }
                }
                Output::RelayRemoved(relay) => self.relays.remove(relay),
                Output::RelayMinimum { revision, devices, revoked } => {
                    self.relays.restrict(revision, &devices, &revoked);
                }
            }
        }
    }

    fn tell(&mut self, session: SessionId, what: ToSession) {
        let Some(outbound) = self.sessions.get(&session) else { return };
        if outbound.try_send(what).is_err() {
            // Too slow or gone. Without its channel the connection ends; the agent comes back and starts afresh.
            self.health.slow_sessions += 1;
            self.sessions.remove(&session);
            self.coordinator.disconnect(session, os::now());
        }
    }
}
