//! Administration over a local socket: `admin.sock` in the state directory, one JSON document per line each way.
//!
//! The directory is 0700 before the socket exists, and the peer's credentials are checked: root or our own user.
//! A [`Call`] is answered by `{"ok": …}` or `{"error": {"text", "fix"}}`.

mod view;

use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::domain::{Command, NewApiToken, NewAuthKey, Refusal, Reply};
use crate::health;
use crate::policy_source::Active;
use crate::server::{Handle, Stopping};

/// Most connections of the admin socket at a time.
pub const MAX_ADMIN_CONNECTIONS: usize = 32;
/// Longest call, in bytes: a policy of the largest size, escaped.
pub const MAX_CALL: u64 = 40 << 20;
/// How long a caller may take to send its call.
pub const CALL_PATIENCE: Duration = Duration::from_secs(30);

/// Where the socket of a state directory is.
pub fn socket_path(state_dir: &Path) -> PathBuf {
    state_dir.join("admin.sock")
}

/// What can be asked.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "verb", rename_all = "kebab-case")]
#[expect(missing_docs, reason = "each field is the argument of the command-line verb of the same name")]
pub enum Call {
    /// `auth-key create`
    AuthKeyCreate {
        tags: Vec<String>,
        user: Option<String>,
        reusable: bool,
        ephemeral: bool,
        life_s: Option<u64>,
    },
    /// `auth-key list`
    AuthKeyList,
    /// `auth-key revoke`
    AuthKeyRevoke { key: String },
    /// `device list`
    DeviceList,
    /// `device show`
    DeviceShow { device: String },
    /// `device approve`
    DeviceApprove { device: String },
    /// `device expire`
    DeviceExpire { device: String },
    /// `device remove`
    DeviceRemove { device: String },
    /// `user list`
    UserList,
    /// `user create`
    UserCreate { email: String },
    /// `user suspend`
    UserSuspend { email: String },
    /// `user restore`
    UserRestore { email: String },
    /// `user remove`
    UserRemove { email: String },
    /// `policy get`
    PolicyGet,
    /// `policy set`
    PolicySet { text: String },
    /// `policy status`
    PolicyStatus,
    /// `policy inventory`
    PolicyInventory,
    /// `api-token create`
    ApiTokenCreate { name: String, write: bool, life_s: Option<u64> },
    /// `api-token list`
    ApiTokenList,
    /// `api-token revoke`
    ApiTokenRevoke { token: String },
    /// `health`
    Health,
    /// `relay list`
    RelayList,
    /// `relay create`
    RelayCreate { name: String },
    /// `relay remove`
    RelayRemove { relay: String },
}

/// What went wrong, and what to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{text}")]
pub struct Failure {
    /// What went wrong.
    pub text: String,
    /// What to do about it.
    pub fix: String,
    /// True if the arguments are at fault (exit code 2).
    #[serde(default)]
    pub usage: bool,
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        let usage = matches!(refusal, Refusal::Invalid { .. } | Refusal::PolicyInvalid(_));
        Self { text: refusal.to_string(), fix: refusal.fix().to_owned(), usage }
    }
}

impl From<Stopping> for Failure {
    fn from(stopping: Stopping) -> Self {
        Self { text: stopping.to_string(), fix: "try again when it runs".to_owned(), usage: false }
    }
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Answer {
    Ok(Value),
    Error(Failure),
}

/// The server's side of the socket.
#[derive(Debug)]
pub struct AdminServer {
    listener: UnixListener,
    handle: Handle,
    policy: Active,
}

impl AdminServer {
    /// Listens in `state_dir`, which must be private and locked by this process. Needs a tokio runtime.
    ///
    /// # Errors
    /// The socket can't be made.
    pub fn bind(state_dir: &Path, handle: Handle, policy: Active) -> io::Result<Self> {
        let path = socket_path(state_dir);
        // A left-over of a killed process: we hold the directory's lock, so nobody listens on it.
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        // Nobody but us can reach it before its mode is set, since the directory is 0700.
        let listener = std::os::unix::net::UnixListener::bind(&path)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
        listener.set_nonblocking(true)?;
        Ok(Self { listener: UnixListener::from_std(listener)?, handle, policy })
    }

    /// Serves until `stop` is cancelled.
    pub async fn run(self, stop: CancellationToken) {
        let server = Arc::new(self);
        let permits = Arc::new(Semaphore::new(MAX_ADMIN_CONNECTIONS));
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                Some(_) = connections.join_next() => {}
                accepted = server.listener.accept() => {
                    let Ok((stream, _)) = accepted else {
                        tokio::time::sleep(Duration::from_millis(100)).await;
                        continue;
                    };
                    let Ok(permit) = permits.clone().try_acquire_owned() else { continue };
                    let server = server.clone();
                    connections.spawn(async move {
                        if let Err(error) = server.connection(stream).await {
                            tracing::debug!(%error, "an admin connection ended badly");
                        }
                        drop(permit);
                    });
                }
            }
        }
    }

    async fn connection(&self, stream: UnixStream) -> io::Result<()> {
        let (peer, own) = (stream.peer_cred()?.uid(), rustix::process::geteuid().as_raw());
        let (reader, mut writer) = stream.into_split();
        let answer = if peer != 0 && peer != own {
            let text = format!("user {peer} may not administer this coordinator");
            Answer::Error(Failure {
                text,
                fix: "run the command as root or the coordinator's user".into(),
                usage: false,
            })
        } else {
            let mut line = String::new();
            let mut reader = BufReader::new(reader.take(MAX_CALL));
            timeout(CALL_PATIENCE, reader.read_line(&mut line)).await??;
            match serde_json::from_str(&line) {
                Ok(call) => match self.call(call).await {
                    Ok(value) => Answer::Ok(value),
                    Err(failure) => Answer::Error(failure),
                },
                Err(error) => Answer::Error(Failure {
                    text: format!("the call makes no sense to this coordinator: {error}"),
                    fix: "use the command of the same version as the running coordinator".into(),
                    usage: true,
                }),
            }
        };
        let mut text = serde_json::to_vec(&answer)?;
        text.push(b'\n');
        writer.write_all(&text).await
    }

    async fn call(&self, call: Call) -> Result<Value, Failure> {
        match call {
            Call::AuthKeyCreate { tags, user, reusable, ephemeral, life_s } => {
                let life = life_s.map(Duration::from_secs);
                let new = NewAuthKey { tags, user, reusable, ephemeral, life };
                match self.command(Command::CreateAuthKey(new)).await? {
                    Reply::AuthKey(key) => {
                        let id = key.id;
                        let text = key.expose();
                        let found = self
                            .look(move |c, _| c.state().auth_keys().get(&id).map(|k| view::auth_key(c, k)));
                        let mut value = found.await?.unwrap_or_else(|| json!({}));
                        value["key"] = json!(text);
                        Ok(value)
                    }
                    _ => Ok(json!({})),
                }
            }
            Call::AuthKeyList => {
                self.look(|c, _| c.state().auth_keys().values().map(|k| view::auth_key(c, k)).collect()).await
            }
            Call::AuthKeyRevoke { key } => {
                let id = key.parse().map_err(|e| usage(&e))?;
                self.done(Command::RevokeAuthKey(id)).await
            }
            Call::DeviceList => {
                self.look(|c, _| c.state().devices().values().map(|d| view::device(c, d)).collect()).await
            }
            Call::DeviceShow { device } => {
                let shown = device.clone();
                let found = self
                    .look(move |c, _| c.state().device_by_text(&device).map(|d| view::device_detail(c, d)));
                found.await?.ok_or_else(|| not_found("device", shown))
            }
            Call::DeviceApprove { device } => {
                let id = self.device(device).await?;
                self.done(Command::ApproveDevice(id)).await
            }
            Call::DeviceExpire { device } => {
                let id = self.device(device).await?;
                self.done(Command::ExpireDevice(id)).await
            }
            Call::DeviceRemove { device } => {
                let id = self.device(device).await?;
                self.done(Command::RemoveDevice(id)).await
            }
            Call::UserList => {
                self.look(|c, _| c.state().users().values().map(|u| view::user(c, u)).collect()).await
            }
            Call::UserCreate { email } => self.done(Command::CreateUser(email)).await,
            Call::UserSuspend { email } => {
                let user = self.user(email).await?;
                self.done(Command::SuspendUser { user, suspended: true }).await
            }
            Call::UserRestore { email } => {
                let user = self.user(email).await?;
                self.done(Command::SuspendUser { user, suspended: false }).await
            }
            Call::UserRemove { email } => {
                let user = self.user(email).await?;
                self.done(Command::RemoveUser(user)).await
            }
            Call::PolicyGet => {
                let text = self.look(|c, _| c.state().policy().map(|p| p.text.clone())).await?;
                match text {
                    Some(text) => Ok(json!({ "policy": text })),
                    None => Err(Failure {
                        text: "no policy was accepted yet: nothing is allowed".into(),
                        fix: "`warren-coordinator policy set FILE`, or start `serve` with --policy".into(),
                        usage: false,
                    }),
                }
            }
            Call::PolicySet { text } => {
                self.policy.put(text, None).await??;
                Ok(self.policy.status().await?)
            }
            Call::PolicyStatus => {
                let mut status = self.policy.status().await?;
                self.look(move |c, _| {
                    view::verdicts(c, &mut status);
                    status
                })
                .await
            }
            Call::PolicyInventory => {
                let inventory = self.look(|c, _| crate::domain::reach::export(c.state())).await?;
                serde_json::to_value(inventory).map_err(|e| usage(&e))
            }
            Call::ApiTokenCreate { name, write, life_s } => {
                let new = NewApiToken { name, write, life: life_s.map(Duration::from_secs) };
                match self.command(Command::CreateApiToken(new)).await? {
                    Reply::ApiToken(token) => {
                        let (id, text) = (token.id, token.expose());
                        let found =
                            self.look(move |c, _| c.state().api_tokens().get(&id).map(view::api_token));
                        let mut value = found.await?.unwrap_or_else(|| json!({}));
                        value["token"] = json!(text);
                        Ok(value)
                    }
                    _ => Ok(json!({})),
                }
            }
            Call::ApiTokenList => {
                self.look(|c, _| c.state().api_tokens().values().map(view::api_token).collect()).await
            }
            Call::ApiTokenRevoke { token } => {
                let id = token.parse().map_err(|e| usage(&e))?;
                self.done(Command::RevokeApiToken(id)).await
            }
            Call::Health => {
                let policy = self.policy.clone();
                self.look(move |c, health| json!(health::list(c, health, policy.source(), &policy.found())))
                    .await
            }
            Call::RelayList => self.look(|c, _| view::relays(c)).await,
            Call::RelayCreate { name } => match self.command(Command::CreateRelay(name.clone())).await? {
                Reply::Relay { id, join_key } => Ok(json!({ "id": id, "name": name, "join_key": join_key })),
                _ => Ok(json!({})),
            },
            Call::RelayRemove { relay } => {
                let shown = relay.clone();
                let found = self.look(move |c, _| {
                    let text = relay.as_str();
                    c.state()
                        .relays()
                        .values()
                        .find(|r| r.name == text || r.id.to_string() == text)
                        .map(|r| r.id)
                });
                let id = found.await?.ok_or_else(|| not_found("relay", shown))?;
                self.done(Command::RemoveRelay(id)).await
            }
        }
    }

    async fn command(&self, command: Command) -> Result<Reply, Failure> {
        Ok(self.handle.command(command).await??)
    }

    async fn done(&self, command: Command) -> Result<Value, Failure> {
        self.command(command).await.map(|_| json!({}))
    }

    async fn look<T: Send + 'static>(
        &self,
        look: impl FnOnce(&crate::push::Coordinator, &crate::server::Health) -> T + Send + 'static,
    ) -> Result<T, Failure> {
        Ok(self.handle.look(look).await?)
    }

    async fn device(&self, text: String) -> Result<warren_common::ids::DeviceId, Failure> {
        let shown = text.clone();
        let found = self.look(move |c, _| c.state().device_by_text(&text).map(|d| d.id));
        found.await?.ok_or_else(|| not_found("device", shown))
    }

    async fn user(&self, email: String) -> Result<warren_common::ids::UserId, Failure> {
        let shown = email.clone();
        let found = self.look(move |c, _| c.state().user_by_email(&email.to_lowercase()).map(|u| u.id));
        found.await?.ok_or_else(|| not_found("user", shown))
    }
}

fn not_found(what: &'static str, name: String) -> Failure {
    Refusal::NotFound { what, name }.into()
}

fn usage(error: &dyn std::fmt::Display) -> Failure {
    Failure { text: error.to_string(), fix: "see the `list` verb for what there is".into(), usage: true }
}

/// Makes one call to the coordinator that runs on `state_dir`.
///
/// # Errors
/// What the coordinator answers, or that none runs there.
pub fn call(state_dir: &Path, call: &Call) -> Result<Value, Failure> {
    use std::io::{BufRead as _, Write as _};
    let path = socket_path(state_dir);
    let attempt = || -> io::Result<Answer> {
        let mut stream = std::os::unix::net::UnixStream::connect(&path)?;
        let mut text = serde_json::to_vec(call)?;
        text.push(b'\n');
        stream.write_all(&text)?;
        let mut line = String::new();
        io::BufReader::new(stream).read_line(&mut line)?;
        Ok(serde_json::from_str(&line)?)
    };
    match attempt() {
        Ok(Answer::Ok(value)) => Ok(value),
        Ok(Answer::Error(failure)) => Err(failure),
        Err(error) => Err(match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Failure {
                text: format!("no coordinator runs on the state directory {}", state_dir.display()),
                fix: "start one with `warren-coordinator serve`, or name its directory with --state-dir"
                    .into(),
                usage: false,
            },
            io::ErrorKind::PermissionDenied => Failure {
                text: format!("no permission to use {}", path.display()),
                fix: "run the command as root or the coordinator's user".into(),
                usage: false,
            },
            _ => Failure {
                text: format!("the coordinator did not answer on {}: {error}", path.display()),
                fix: "look at its log; is it of the same version?".into(),
                usage: false,
            },
        }),
    }
}
