//! The relay's certificate: self-signed, kept in the state directory, pinned by everybody by its SHA-256.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{DigitallySignedStruct, SignatureScheme};
use sha2::{Digest as _, Sha256};
use warren_common::wire::relay::{ALPN, SERVER_NAME};

/// Name of the file with certificate and key (PEM, 0600) in the state directory.
pub const FILE: &str = "relay-tls.pem";

/// Why there is no certificate to serve with.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The file can't be read or written.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file holds something else.
    #[error(
        "{path} does not hold a certificate and its key: {why}. Restore it from a backup; without one, remove it, and the relay makes another, which devices accept once the coordinator has told them"
    )]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// No certificate could be made.
    #[error("no certificate could be made: {0}")]
    Make(String),
}

/// A certificate and its key.
#[derive(Debug)]
pub struct Identity {
    cert: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
}

impl Identity {
    /// The one in `state_dir`; made there at the first start.
    ///
    /// # Errors
    /// The file can't be read, written or understood. A file that is there is never overwritten.
    pub fn load_or_create(state_dir: &Path) -> Result<Self, IdentityError> {
        let path = state_dir.join(FILE);
        let file = |source| IdentityError::File { path: path.clone(), source };
        match fs::read(&path) {
            Ok(pem) => Self::parse(&pem).map_err(|why| IdentityError::Corrupt { path, why }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let pem = make().map_err(|e| IdentityError::Make(e.to_string()))?;
                write_private(&path, pem.as_bytes()).map_err(file)?;
                Self::parse(pem.as_bytes()).map_err(IdentityError::Make)
            }
            Err(error) => Err(file(error)),
        }
    }

    fn parse(pem: &[u8]) -> Result<Self, String> {
        let cert = CertificateDer::from_pem_slice(pem).map_err(|e| e.to_string())?;
        let key = PrivateKeyDer::from_pem_slice(pem).map_err(|e| e.to_string())?;
        let identity = Self { cert, key };
        identity.server_config(ALPN).map(|_| identity).map_err(|e| e.to_string()) // certificate and key belong together
    }

    /// What clients pin.
    pub fn sha256(&self) -> [u8; 32] {
        Sha256::digest(&self.cert).into()
    }

    /// A secret that only whoever has the certificate's key can make: the same after a restart.
    pub(crate) fn derive(&self, purpose: &str) -> [u8; 32] {
        let mut hash = Sha256::new();
        hash.update(b"warren relay secret 1\0");
        hash.update(purpose);
        hash.update(b"\0");
        hash.update(self.key.secret_der());
        hash.finalize().into()
    }

    /// TLS 1.3 with this certificate, one application protocol, no resumption.
    ///
    /// # Errors
    /// Key and certificate don't belong together.
    pub(crate) fn server_config(&self, alpn: &[u8]) -> Result<rustls::ServerConfig, rustls::Error> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_no_client_auth()
            .with_single_cert(vec![self.cert.clone()], self.key.clone_key())?;
        config.alpn_protocols = vec![alpn.to_vec()];
        // Sessions last for hours and a ticket would only be one more secret to keep.
        config.send_tls13_tickets = 0;
        config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
        Ok(config)
    }
}

/// TLS 1.3 as a client that accepts the one certificate of this hash, and offers one application protocol: for tools that speak
/// to a relay themselves.
///
/// # Errors
/// The provider lacks what TLS 1.3 needs.
pub fn pinned_client_config(
    cert_sha256: [u8; 32],
    alpn: &[u8],
) -> Result<rustls::ClientConfig, rustls::Error> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let pin = Arc::new(Pin { cert_sha256, algorithms: provider.signature_verification_algorithms });
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(pin)
        .with_no_client_auth();
    config.alpn_protocols = vec![alpn.to_vec()];
    Ok(config)
}

#[derive(Debug)]
struct Pin {
    cert_sha256: [u8; 32],
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for Pin {
    fn verify_server_cert(
        &self,
        cert: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if <[u8; 32]>::from(Sha256::digest(cert)) == self.cert_sha256 {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(rustls::Error::General("another certificate".to_owned()))
        }
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::PeerIncompatible::ServerDoesNotSupportTls12Or13.into()) // never offered
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

fn make() -> Result<String, rcgen::Error> {
    let key = rcgen::KeyPair::generate()?;
    let cert = rcgen::CertificateParams::new([SERVER_NAME.to_owned()])?.self_signed(&key)?;
    Ok(format!("{}{}", cert.pem(), key.serialize_pem()))
}

/// Writes a file that only its owner may read, whole or not at all.
pub(crate) fn write_private(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let dir = path.parent().unwrap_or(Path::new("."));
    let mut temp = path.as_os_str().to_owned();
    temp.push(".new");
    let temp = PathBuf::from(temp);
    match fs::remove_file(&temp) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {} // what an interrupted write left, if any, is gone
    }
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temp)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&temp, path)?;
    fs::File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn a_certificate_is_made_once_and_kept_private() {
        let dir = tempfile::tempdir().unwrap();
        let first = Identity::load_or_create(dir.path()).unwrap().sha256();
        fs::write(dir.path().join("relay-tls.pem.new"), b"left over").unwrap();
        assert_eq!(Identity::load_or_create(dir.path()).unwrap().sha256(), first);
        let mode = fs::metadata(dir.path().join(FILE)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn derived_secrets_are_stable_and_differ_by_purpose_and_relay() {
        let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let of = |n: usize, purpose| Identity::load_or_create(dirs[n].path()).unwrap().derive(purpose);
        assert_eq!(of(0, "a"), of(0, "a"));
        assert_ne!(of(0, "a"), of(0, "b"));
        assert_ne!(of(0, "a"), of(1, "a"));
    }

    #[test]
    fn a_corrupt_file_is_named_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        Identity::load_or_create(dir.path()).unwrap();
        let path = dir.path().join(FILE);
        let pem = fs::read_to_string(&path).unwrap();
        let other = tempfile::tempdir().unwrap();
        Identity::load_or_create(other.path()).unwrap();
        let other = fs::read_to_string(other.path().join(FILE)).unwrap();
        let key_at = pem.find("-----BEGIN PRIVATE").unwrap();
        let foreign_key = &other[other.find("-----BEGIN PRIVATE").unwrap()..];
        let mixed = format!("{}{foreign_key}", &pem[..key_at]);
        for bad in ["", "nonsense", &pem[..key_at], &pem[key_at..], &mixed] {
            fs::write(&path, bad).unwrap();
            assert!(matches!(Identity::load_or_create(dir.path()), Err(IdentityError::Corrupt { .. })));
            assert_eq!(fs::read_to_string(&path).unwrap(), bad);
        }
    }
}
