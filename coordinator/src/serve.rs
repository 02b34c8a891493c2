//! `serve`: puts the parts together, runs them until a signal, and takes them apart in order.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ipnet::{Ipv4Net, Ipv6Net};
use prost::Message as _;
use tokio::net::TcpListener;
use tokio::sync::{Notify, Semaphore};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use warren_common::ids::NetworkId;
use warren_common::policy::Policy;
use zeroize::Zeroizing;

use crate::admin::AdminServer;
use crate::api::{self, MAX_HALF_OPEN, Shared, Webhook};
use crate::domain::{Change, Settings, State, derive_ipv6_prefix};
use crate::embedded_relay::{self, RelayListen};
use crate::keys::Keys;
use crate::os::{self, DirLock, OsEntropy};
use crate::policy_source::file::Watcher;
use crate::policy_source::git::{
    AllowedSigners, Follower, GitOptions, MAX_POLL, MIN_POLL, Mirror, Scheme, Signatures, read_secret,
};
use crate::policy_source::{self, Active, Source};
use crate::push::{Config, Coordinator};
use crate::relays::Relays;
use crate::server::Server;
use crate::store::{Commit, Database, Loaded, Store as _, StoreError};

/// The IPv4 pool unless `--ipv4-pool` says otherwise: the range that RFC 6598 sets aside.
pub const DEFAULT_IPV4_POOL: &str = "100.64.0.0/10";
/// The shortest lease: agents refuse less.
pub const MIN_LEASE: Duration = Duration::from_secs(5 * 60);
/// The longest lease: agents refuse more.
pub const MAX_LEASE: Duration = Duration::from_secs(7 * 24 * 3_600);

/// What `serve` is told.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where everything is kept.
    pub state_dir: PathBuf,
    /// Where to listen.
    pub listen: SocketAddr,
    /// Under which URL agents reach it.
    pub public_url: PublicUrl,
    /// Where policy comes from.
    pub policy: Source,
    /// The database's URL.
    pub database: Option<String>,
    /// PEM files of certificate chain and key.
    pub tls: Option<(PathBuf, PathBuf)>,
    /// Where the embedded relay and STUN listen; no relay if `None`.
    pub relay: Option<RelayListen>,
    /// The pool of IPv4 addresses; as stored, or [`DEFAULT_IPV4_POOL`], if `None`.
    pub ipv4_pool: Option<Ipv4Net>,
    /// The prefix of IPv6 addresses; as stored, or derived from the network's id, if `None`.
    pub ipv6_prefix: Option<Ipv6Net>,
    /// The lease of netmaps.
    pub lease: Duration,
    /// The network's name; the stored one if absent, at first the host of the public URL.
    pub network_name: Option<NetworkName>,
}

/// An `http://` or `https://` URL without path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublicUrl {
    /// The URL without a trailing slash.
    pub text: String,
    /// Its host: a name or an address.
    pub host: String,
    /// True for `https`.
    pub tls: bool,
}

impl std::str::FromStr for PublicUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "`{text}` is not a URL that agents can use: expected http://HOST[:PORT] or https://HOST[:PORT], without a path"
            )
        };
        let trimmed = text.strip_suffix('/').unwrap_or(text);
        let (scheme, authority) = trimmed.split_once("://").ok_or_else(wrong)?;
        let tls = match scheme {
            "http" => false,
            "https" => true,
            _ => return Err(wrong()),
        };
        let (host, port) = match authority.strip_prefix('[') {
            Some(rest) => {
                let (host, port) = rest.split_once(']').ok_or_else(wrong)?;
                host.parse::<std::net::Ipv6Addr>().map_err(|_| wrong())?;
                (host, port.strip_prefix(':').or_else(|| port.is_empty().then_some("0")))
            }
            None => match authority.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (authority, Some("0")),
            },
        };
        let name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | ':');
        if host.is_empty() || !host.chars().all(name) || port.and_then(|p| p.parse::<u16>().ok()).is_none() {
            return Err(wrong());
        }
        Ok(Self { text: trimmed.to_owned(), host: host.to_owned(), tls })
    }
}

/// Why `serve` ended, other than by a signal.
#[derive(Debug, thiserror::Error)]
#[error("{text}")]
pub struct ServeError {
    /// What is wrong and what to do.
    pub text: String,
    /// True if an argument or a given file is at fault (exit code 2).
    pub usage: bool,
}

impl ServeError {
    pub(crate) fn failed(text: impl Into<String>) -> Self {
        Self { text: text.into(), usage: false }
    }

    pub(crate) fn usage(text: impl Into<String>) -> Self {
        Self { text: text.into(), usage: true }
    }
}

impl<E: std::error::Error + Send + Sync + 'static> From<E> for Box<ServeError>
where
    E: Into<Fault>,
{
    fn from(error: E) -> Self {
        let fault: Fault = error.into();
        Self::new(ServeError::failed(fault.0))
    }
}

/// An error whose own text says what to do.
#[derive(Debug)]
pub struct Fault(String);

impl From<StoreError> for Fault {
    fn from(error: StoreError) -> Self {
        let fix = match &error {
            StoreError::Unavailable(_) => {
                "; make room on its disk, let its owner write to it, or wait until nobody holds it, and start again"
            }
            _ => "",
        };
        Self(format!("{error}{fix}"))
    }
}

impl From<crate::keys::KeyError> for Fault {
    fn from(error: crate::keys::KeyError) -> Self {
        Self(error.to_string())
    }
}

/// Runs a coordinator until `stop` is cancelled.
///
/// # Errors
/// It can't start: the text says why and what to do.
pub async fn serve(options: Options, stop: CancellationToken) -> Result<(), Box<ServeError>> {
    check(&options)?;
    let webhook = webhook_secret(&options.policy)?;
    let dir = options.state_dir.clone();
    let dir = dir.as_path();
    let _lock = take_dir(dir)?;
    let tls = options.tls.as_ref().map(|(cert, key)| api::tls_acceptor(cert, key)).transpose();
    let tls = tls.map_err(|e| ServeError::usage(e.to_string()))?;
    let listener = TcpListener::bind(options.listen).await.map_err(|e| bind_error(options.listen, &e))?;

    let path =
        Database::path_of(options.database.as_deref(), dir).map_err(|e| ServeError::usage(e.to_string()))?;
    let mut store = Database::open(&path).await?;
    let loaded = store.load().await?;
    let keys = Keys::load(dir, loaded.is_none(), &mut OsEntropy)?;
    let loaded = open_network(&options, &keys, loaded, &mut store).await?;
    first_policy(&options, &loaded.state)?;
    let (loaded, embedded) = embedded_relay::start(&options, &keys, loaded, &mut store).await?;
    let settings = loaded.state.settings().clone();

    let shared_identity = keys.identity(&settings).encode_to_vec();
    let config = Config { netmap_key: keys.netmap.clone(), lease: options.lease };
    let coordinator = Coordinator::new(config, loaded.state, os::now());
    let relays = Relays::new(embedded.clone(), coordinator.revision());
    let (server, handle) = Server::new(coordinator, store, loaded.version, relays.clone());

    let wake = Arc::new(Notify::new());
    let active = Active::new(options.policy.clone(), handle.clone());
    let admin = AdminServer::bind(dir, handle.clone(), active.clone())
        .map_err(|e| ServeError::failed(format!("can't make the admin socket in {}: {e}", dir.display())))?;
    let shared = Arc::new(Shared {
        handle: handle.clone(),
        relays,
        identity: shared_identity,
        control_key: keys.control.clone(),
        network: settings.network,
        half_open: Arc::new(Semaphore::new(MAX_HALF_OPEN)),
        policy: active.clone(),
        webhook: webhook.map(|secret| Webhook::new(secret, wake.clone())),
        https: options.public_url.tls || options.tls.is_some(),
        stop: stop.clone(),
    });

    let mut parts = JoinSet::new();
    // The server outlives the rest, so that what they have begun is finished.
    let (serving, server_stop) = (CancellationToken::new(), CancellationToken::new());
    let server_task = {
        let stop = server_stop.clone();
        let serving = serving.clone();
        tokio_util::task::AbortOnDropHandle::new(spawn(async move {
            serving.cancel();
            server.run(stop).await;
        }))
    };
    serving.cancelled().await;
    match options.policy {
        Source::Api => {}
        Source::File(path) => {
            let mut watcher = Watcher::new(path, active);
            watcher.look().await;
            parts.spawn(watcher.run(stop.clone()));
        }
        Source::Git(git) => {
            let mirror = Mirror::new(dir.join("policy-git"), (*git).clone());
            parts.spawn(Follower::new(*git, mirror, active, wake).run(stop.clone()));
        }
    }
    parts.spawn(admin.run(stop.clone()));
    parts.spawn(api::serve(listener, tls, api::router(shared), stop.clone()));
    tracing::info!(
        network = %settings.network,
        fingerprint = %settings.root,
        epoch = settings.epoch,
        listen = %options.listen,
        url = %options.public_url.text,
        "the coordinator serves"
    );
    if !options.public_url.tls {
        tracing::warn!(
            "the public URL is http: control sessions are protected by Noise all the same, a browser is not"
        );
    }
    while parts.join_next().await.is_some() {}
    server_stop.cancel();
    if server_task.await.is_err() {
        return Err(Box::new(ServeError::failed("the coordinator's task failed; see the log")));
    }
    if let Some(relay) = embedded.and_then(Arc::into_inner) {
        relay.shutdown().await;
    }
    tracing::info!("the coordinator has stopped");
    Ok(())
}

/// Makes the state directory private and ours.
fn take_dir(dir: &Path) -> Result<DirLock, ServeError> {
    os::private_dir(dir).map_err(|e| {
        ServeError::failed(format!(
            "can't use the state directory {}: {e}; check its owner, or name another with --state-dir",
            dir.display()
        ))
    })?;
    let lock = DirLock::take(dir)
        .map_err(|e| ServeError::failed(format!("can't lock the state directory {}: {e}", dir.display())))?;
    lock.ok_or_else(|| {
        ServeError::failed(format!(
            "another coordinator runs on the state directory {}; stop it or name another directory with --state-dir",
            dir.display()
        ))
    })
}

/// Raises the epoch of the network in `state_dir` after its database was restored from a backup: agents then accept
/// revision numbers that they have seen before. The change is in the database's log with its time, and the root key
/// signs an identity with the new epoch, which agents insist on from then on.
///
/// # Errors
/// A coordinator runs there, there is no network, or the store fails.
pub async fn restored(state_dir: &Path, database: Option<&str>) -> Result<u64, Box<ServeError>> {
    if !state_dir.is_dir() {
        return Err(Box::new(ServeError::failed(format!(
            "there is no state directory {}; name the right one with --state-dir",
            state_dir.display()
        ))));
    }
    let _lock = take_dir(state_dir)?;
    let path = Database::path_of(database, state_dir).map_err(|e| ServeError::usage(e.to_string()))?;
    if !path.exists() {
        let text = format!("there is no database {}; put the backup there first", path.display());
        return Err(Box::new(ServeError::failed(text)));
    }
    let mut store = Database::open(&path).await?;
    let Some(Loaded { version, state }) = store.load().await? else {
        return Err(Box::new(ServeError::failed(format!(
            "the database {} holds no network",
            path.display()
        ))));
    };
    // Without the root key nothing could vouch for the new epoch.
    let keys = Keys::load(state_dir, false, &mut OsEntropy)?;
    if keys.root.public().fingerprint() != state.settings().root {
        return Err(Box::from(crate::keys::KeyError::OtherNetwork(state_dir.to_owned())));
    }
    // Not just the next number: the same backup may be restored a second time, and that must be a newer epoch again.
    let old = state.settings().epoch;
    let epoch = (old + 1).max(os::now().unix.as_secs().unsigned_abs());
    let settings = Settings { epoch, ..state.settings().clone() };
    match store.commit(version, &[Change::PutSettings(Box::new(settings))], os::now().unix).await? {
        Commit::Committed(_) => {
            store.close().await?;
            Ok(epoch)
        }
        Commit::Conflict(_) => {
            Err(Box::new(ServeError::failed("another coordinator uses this database; stop it first")))
        }
    }
}

#[expect(clippy::disallowed_methods, reason = "the handle is owned by an abort-on-drop guard")]
fn spawn(task: impl Future<Output = ()> + Send + 'static) -> tokio::task::JoinHandle<()> {
    tokio::spawn(task)
}

fn check(options: &Options) -> Result<(), ServeError> {
    if !(MIN_LEASE..=MAX_LEASE).contains(&options.lease) {
        return Err(ServeError::usage("--lease must be between 5m and 7d: agents refuse anything else"));
    }
    if let Source::Git(git) = &options.policy {
        check_git(git)?;
    }
    if let Some(pool) = options.ipv4_pool.filter(|p| p.prefix_len() > 30 || p.prefix_len() < 8) {
        return Err(ServeError::usage(format!("--ipv4-pool {pool}: expected a prefix between /8 and /30")));
    }
    if let Some(prefix) = options.ipv6_prefix {
        let local = prefix.network().octets()[0] & 0xfe == 0xfc;
        if !local || !(8..=112).contains(&prefix.prefix_len()) {
            let text =
                format!("--ipv6-prefix {prefix}: expected a prefix inside fc00::/7 between /8 and /112");
            return Err(ServeError::usage(text));
        }
    }
    Ok(())
}

fn bind_error(listen: SocketAddr, error: &std::io::Error) -> ServeError {
    let fix = match error.kind() {
        std::io::ErrorKind::AddrInUse => {
            "another process has it; stop that one or choose another port with --listen"
        }
        std::io::ErrorKind::PermissionDenied => {
            "ports below 1024 need CAP_NET_BIND_SERVICE; choose another with --listen"
        }
        std::io::ErrorKind::AddrNotAvailable => "this host has no such address; see `ip address`",
        _ => "choose another address with --listen",
    };
    ServeError::failed(format!("can't listen on {listen}: {error}; {fix}"))
}

/// A network's name, for people: it identifies nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkName(String);

/// Longest name of a network, in bytes: it is shown in one line with others.
pub const MAX_NETWORK_NAME: usize = 63;

impl std::str::FromStr for NetworkName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let printable =
            |c: char| !c.is_control() && !matches!(c, '\u{2028}' | '\u{2029}' | '\u{202a}'..='\u{202e}');
        if text.trim().is_empty() || text.len() > MAX_NETWORK_NAME || !text.chars().all(printable) {
            return Err(format!("expected 1 to {MAX_NETWORK_NAME} bytes of printable text"));
        }
        Ok(Self(text.trim().to_owned()))
    }
}

/// The network as stored, its name and pools as asked for; a new one in an empty store.
async fn open_network(
    options: &Options,
    keys: &Keys,
    loaded: Option<Loaded>,
    store: &mut Database,
) -> Result<Loaded, Box<ServeError>> {
    let now = os::now().unix;
    let root = keys.root.public().fingerprint();
    let (version, mut state, fresh) = match loaded {
        Some(Loaded { version, state }) => (version, state, false),
        None => {
            let network = NetworkId::generate(now.as_millis(), &mut OsEntropy);
            let ipv4 = options.ipv4_pool.or_else(|| DEFAULT_IPV4_POOL.parse().ok());
            let settings = Settings {
                network,
                name: options.public_url.host.clone(),
                root,
                ipv4: ipv4.ok_or_else(|| ServeError::usage("--ipv4-pool is missing"))?.trunc(),
                ipv6: options.ipv6_prefix.unwrap_or_else(|| derive_ipv6_prefix(network)).trunc(),
                epoch: 1,
                revisions_reserved: 0,
            };
            (0, State::new(settings), true)
        }
    };
    let stored = state.settings().clone();
    if stored.root != root {
        return Err(Box::from(crate::keys::KeyError::OtherNetwork(options.state_dir.clone())));
    }
    let wanted = Settings {
        ipv4: options.ipv4_pool.map_or(stored.ipv4, |p| p.trunc()),
        ipv6: options.ipv6_prefix.map_or(stored.ipv6, |p| p.trunc()),
        name: options.network_name.as_ref().map_or_else(|| stored.name.clone(), |name| name.0.clone()),
        ..stored.clone()
    };
    let outside = state.devices().values().find(|d| {
        d.addrs().iter().any(|a| match a {
            IpAddr::V4(a) => !wanted.ipv4.contains(a),
            IpAddr::V6(a) => !wanted.ipv6.contains(a),
        })
    });
    if let Some(device) = outside {
        return Err(Box::new(ServeError::usage(format!(
            "the device {} has addresses outside of {} and {}: a pool can only grow while devices have addresses in it (now {} and {})",
            device.name, wanted.ipv4, wanted.ipv6, stored.ipv4, stored.ipv6
        ))));
    }
    if !fresh && wanted == stored {
        return Ok(Loaded { version, state });
    }
    let change = Change::PutSettings(Box::new(wanted));
    match store.commit(version, std::slice::from_ref(&change), now).await? {
        Commit::Committed(version) => {
            state.absorb(change);
            Ok(Loaded { version, state })
        }
        Commit::Conflict(_) => Err(Box::new(ServeError::failed(
            "another coordinator has just started on this database; try again",
        ))),
    }
}

/// Before any policy was accepted, a file that can't even be read or parsed is a mistake of whoever starts us.
/// Afterwards it never keeps us from starting.
fn first_policy(options: &Options, state: &State) -> Result<(), ServeError> {
    match &options.policy {
        _ if state.policy().is_some() => Ok(()),
        Source::Api => Ok(()),
        Source::File(path) => {
            let text = policy_source::file::read(path).map_err(|e| {
                ServeError::usage(format!(
                    "{e}; correct --policy, or leave it out to start with nothing allowed"
                ))
            })?;
            Policy::parse(&text).map(|_| ()).map_err(|found| {
                let name = path.display().to_string();
                let messages: Vec<String> = found.iter().map(|d| d.render(&name)).collect();
                ServeError::usage(messages.join("\n"))
            })
        }
        Source::Git(git) => match &git.allowed_signers {
            Some(path) => {
                AllowedSigners::read(path).map(|_| ()).map_err(|e| ServeError::usage(e.to_string()))
            }
            None => Ok(()),
        },
    }
}

/// What webhooks must know, if any are taken.
fn webhook_secret(source: &Source) -> Result<Option<Zeroizing<String>>, ServeError> {
    let Source::Git(git) = source else { return Ok(None) };
    let secret = git.webhook_secret.as_deref().map(read_secret).transpose();
    secret.map_err(|e| ServeError::usage(e.to_string()))
}

fn check_git(git: &GitOptions) -> Result<(), ServeError> {
    if git.signatures != Signatures::Off && git.allowed_signers.is_none() {
        return Err(ServeError::usage(
            "say whose signatures count with --policy-git-allowed-signers FILE, or give up on them with \
             --policy-git-signatures off: whoever can write to the repository rules the network then",
        ));
    }
    if !(MIN_POLL..=MAX_POLL).contains(&git.poll) {
        return Err(ServeError::usage("--policy-git-poll must be between 1s and 24h"));
    }
    match git.url.scheme() {
        Scheme::Ssh if git.ssh_key.is_none() => Err(ServeError::usage(
            "an ssh URL needs --policy-git-ssh-key FILE, a private key that may read the repository",
        )),
        Scheme::Ssh | Scheme::File if git.token.is_some() => {
            Err(ServeError::usage("--policy-git-token-file is for https URLs"))
        }
        Scheme::Https | Scheme::File if git.ssh_key.is_some() || git.known_hosts.is_some() => {
            Err(ServeError::usage("--policy-git-ssh-key and --policy-git-known-hosts are for ssh URLs"))
        }
        Scheme::Https | Scheme::Ssh | Scheme::File => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn network_names() {
        assert_eq!("Acme Ltd ".parse(), Ok(NetworkName("Acme Ltd".into())));
        for bad in ["", "  ", "a\nb", "a\u{202e}b", &"x".repeat(MAX_NETWORK_NAME + 1)] {
            assert!(bad.parse::<NetworkName>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn public_urls() {
        let url = |text: &str| text.parse::<PublicUrl>();
        assert_eq!(url("https://c.example:8443/").unwrap().host, "c.example");
        assert_eq!(url("http://[fd00::1]:80").unwrap().host, "fd00::1");
        assert!(url("https://c.example").unwrap().tls);
        for bad in [
            "c.example",
            "ftp://c",
            "http://",
            "http://c:x",
            "http://c/path",
            "http://[::1",
            "http://c:99999",
            "http://a b",
        ] {
            assert!(url(bad).unwrap_err().contains("expected http"), "{bad}");
        }
    }
}
