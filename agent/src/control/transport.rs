//! From a URL to a byte stream: the way out of this host, and TLS for `https`.

use std::sync::Arc;

use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_util::either::Either;
use warren_common::url::CoordinatorUrl;

use super::session::Failure;
use crate::egress::{Egress, Error};
use crate::problem::{Problem, io_text};

/// A connection, encrypted by TLS or not.
pub(super) type Stream = Either<TcpStream, Box<TlsStream<TcpStream>>>;

/// Connects to the coordinator.
pub(super) async fn dial(url: &CoordinatorUrl, egress: &Egress) -> Result<Stream, Failure> {
    let tcp = egress.connect(url.host(), url.port()).await.map_err(|error| match error {
        Error::Away(why) => Failure::transient(Problem::new(
            "coordinator-away",
            format!("the coordinator at `{url}` can't be reached: {why}"),
            "check the URL, the network and any firewall; an agent that has joined keeps trying",
        )),
        Error::Proxy { problem, lasting } => Failure { problem, permanent: lasting },
    })?;
    if !url.tls() {
        return Ok(Either::Left(tcp));
    }
    let name = ServerName::try_from(url.host().to_owned()).map_err(|_| {
        Failure::permanent(Problem::usage(
            "bad-url",
            format!("`{}` is not a host name", url.host()),
            "check the coordinator's URL",
        ))
    })?;
    let tls = TlsConnector::from(tls_config(egress)?).connect(name, tcp).await.map_err(|e| {
        Failure::permanent(Problem::new(
            "coordinator-tls",
            format!("`{url}` has no valid certificate: {}", io_text(&e)),
            "check the host name and the clock; if the certificate is of an authority of your own, or of a proxy that looks into TLS, give that authority to `warrend --ca FILE` or install it on this machine",
        ))
    })?;
    Ok(Either::Right(Box::new(tls)))
}

fn tls_config(egress: &Egress) -> Result<Arc<rustls::ClientConfig>, Failure> {
    let broken = |why: String| {
        Failure::permanent(Problem::new(
            "tls-roots",
            format!("no certificate authorities to check an https coordinator with: {why}"),
            "install the system's CA certificates (package ca-certificates), or give `warrend --ca` a file",
        ))
    };
    let mut roots = rustls::RootCertStore::empty();
    let native = rustls_native_certs::load_native_certs();
    roots.add_parsable_certificates(native.certs);
    roots.add_parsable_certificates(egress.authorities().iter().cloned());
    if roots.is_empty() {
        return Err(broken(native.errors.first().map_or_else(|| "none found".into(), ToString::to_string)));
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| broken(e.to_string()))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(Arc::new(config))
}
