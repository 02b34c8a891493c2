//! The relay and STUN server that run inside the coordinator unless it is told otherwise.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::net::lookup_host;
use warren_relay::core::Limits;
use warren_relay::server::{RelayServer, RelayServerConfig};
use warren_relay::tls;

use crate::domain::Command;
use crate::keys::Keys;
use crate::os::{self, OsEntropy};
use crate::serve::{Options, ServeError};
use crate::store::{Commit, Database, Loaded, Store as _};

/// The embedded relay's name.
const NAME: &str = "embedded";

/// Where the embedded relay listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RelayListen {
    /// QUIC (UDP) and TLS (TCP).
    pub relay: SocketAddr,
    /// STUN (UDP).
    pub stun: SocketAddr,
}

/// Starts the relay, and records where it is if that has changed; or records that there is none.
///
/// # Errors
/// A port can't be had, the address for agents is not known, or the store fails.
pub async fn start(
    options: &Options,
    keys: &Keys,
    mut loaded: Loaded,
    store: &mut Database,
) -> Result<(Loaded, Option<Arc<RelayServer>>), Box<ServeError>> {
    let known = |loaded: &Loaded| loaded.state.relays().values().find(|r| r.embedded).map(|r| r.id);
    let Some(listen) = options.relay else {
        if let Some(id) = known(&loaded) {
            loaded = record(loaded, store, Command::RemoveRelay(id)).await?;
        }
        return Ok((loaded, None));
    };
    let dir = &options.state_dir;
    let failed = |text: String| Box::new(ServeError::failed(text));
    let identity = tls::Identity::load_or_create(dir).map_err(|e| failed(e.to_string()))?;
    let command = Command::SetEmbeddedRelay {
        name: NAME.to_owned(),
        addrs: public(options, listen.relay).await?,
        stun: public(options, listen.stun).await?,
        cert_sha256: identity.sha256(),
    };
    let loaded = record(loaded, store, command).await?;
    let settings = loaded.state.settings();
    let relay = known(&loaded).ok_or_else(|| failed("the embedded relay was not recorded".to_owned()))?;
    let server = RelayServer::start(RelayServerConfig {
        listen: listen.relay,
        stun_listen: Some(listen.stun),
        state_dir: dir.clone(),
        network: settings.network,
        relay,
        netmap_key: keys.netmap.public(),
        // The coordinator numbers on from here: tokens from before it started are stale.
        floor: settings.revisions_reserved + 1,
        limits: Limits::default(),
    })
    .map_err(|e| failed(format!("{e} Choose others with --relay-listen and --stun-listen")))?;
    Ok((loaded, Some(Arc::new(server))))
}

async fn record(loaded: Loaded, store: &mut Database, command: Command) -> Result<Loaded, Box<ServeError>> {
    let Loaded { version, mut state } = loaded;
    let now = os::now().unix;
    let (changes, _) = state
        .apply(&command, now, &mut OsEntropy)
        .map_err(|refusal| ServeError::failed(format!("the embedded relay: {refusal}")))?;
    if changes.is_empty() {
        return Ok(Loaded { version, state });
    }
    match store.commit(version, &changes, now).await? {
        Commit::Committed(version) => {
            for change in changes {
                state.absorb(change);
            }
            Ok(Loaded { version, state })
        }
        Commit::Conflict(_) => Err(Box::new(ServeError::failed(
            "another coordinator has just started on this database; try again",
        ))),
    }
}

/// Where agents reach what listens on `listen`: there, or, if that is every address, at the public URL's host.
async fn public(options: &Options, listen: SocketAddr) -> Result<Vec<SocketAddr>, Box<ServeError>> {
    if listen.port() == 0 {
        let text = "the embedded relay and STUN need fixed ports, as agents remember them: not port 0";
        return Err(Box::new(ServeError::usage(text)));
    }
    if !listen.ip().is_unspecified() {
        return Ok(vec![listen]);
    }
    let host = &options.public_url.host;
    let found = lookup_host((host.as_str(), listen.port())).await.map_err(|e| {
        ServeError::failed(format!(
            "the embedded relay's address is not known, since `{host}` of --public-url can't be looked up: {e}; \
             give --relay-listen and --stun-listen a public address, or use --no-embedded-relay"
        ))
    })?;
    // A socket on 0.0.0.0 hears no IPv6; one on [::] hears both.
    let mut addrs: Vec<SocketAddr> = found.filter(|a| listen.is_ipv6() || a.is_ipv4()).collect();
    addrs.sort_unstable();
    addrs.dedup();
    Ok(addrs)
}
