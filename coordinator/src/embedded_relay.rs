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
    /// A second address of this host for STUN, with another port.
    pub stun_second: Option<SocketAddr>,
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
        stun_second: listen.stun_second,
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
    if addrs.is_empty() {
        return Err(Box::new(ServeError::failed(format!(
            "`{host}` of --public-url has no IPv4 address, and the embedded relay listens on IPv4 only; \
             use --relay-listen [::]:{port} and --stun-listen with [::] too, or --no-embedded-relay",
            port = listen.port()
        ))));
    }
    Ok(addrs)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::policy_source::Source;

    fn options(url: &str, relay: &str, stun: &str) -> Options {
        Options {
            state_dir: "/nonexistent".into(),
            listen: ([127, 0, 0, 1], 0).into(),
            public_url: url.parse().unwrap(),
            policy: Source::Api,
            database: None,
            tls: None,
            relay: Some(RelayListen {
                relay: relay.parse().unwrap(),
                stun: stun.parse().unwrap(),
                stun_second: None,
            }),
            ipv4_pool: None,
            ipv6_prefix: None,
            network_name: None,
            lease: Duration::from_secs(3_600),
        }
    }

    async fn shown(url: &str, listen: &str) -> Result<Vec<SocketAddr>, Box<ServeError>> {
        public(&options(url, listen, listen), listen.parse().unwrap()).await
    }

    #[tokio::test]
    async fn agents_are_told_where_it_listens_or_the_public_host() {
        let addrs = |list: &[&str]| list.iter().map(|a| a.parse().unwrap()).collect::<Vec<SocketAddr>>();
        let there = shown("https://c.example", "192.0.2.7:3340").await.unwrap();
        assert_eq!(there, addrs(&["192.0.2.7:3340"]));
        let everywhere = shown("http://203.0.113.10:8080", "0.0.0.0:3340").await.unwrap();
        assert_eq!(everywhere, addrs(&["203.0.113.10:3340"]));
        let both = shown("http://[2001:db8::1]:8080", "[::]:3340").await.unwrap();
        assert_eq!(both, addrs(&["[2001:db8::1]:3340"]));
        // An IPv4 socket hears no IPv6.
        let error = shown("http://[2001:db8::1]:8080", "0.0.0.0:3340").await.unwrap_err();
        assert!(error.text.contains("--relay-listen [::]:3340"), "{error}");
    }

    #[tokio::test]
    async fn a_port_that_changes_and_a_host_without_address_are_named() {
        let error = shown("http://203.0.113.10", "192.0.2.7:0").await.unwrap_err();
        assert!(error.usage && error.text.contains("not port 0"), "{error}");
        // RFC 6761: never exists.
        let error = shown("http://coordinator.invalid", "0.0.0.0:3340").await.unwrap_err();
        assert!(!error.usage && error.text.contains("--no-embedded-relay"), "{error}");
    }
}
