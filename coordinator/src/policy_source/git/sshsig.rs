//! OpenSSH's detached signatures ("SSHSIG", PROTOCOL.sshsig), as `git commit -S` with `gpg.format=ssh` makes them.
//!
//! Verified here and not by `ssh-keygen`, so that nothing but our own code and ring decides. Plain keys only: no
//! certificates, no SHA-1, no keys that ring does not know (NIST P-521, DSA).

use data_encoding::{BASE64, BASE64_NOPAD};
use ring::digest::{self, SHA256, SHA512};
use ring::rsa::PublicKeyComponents;
use ring::signature::{
    self, ECDSA_P256_SHA256_FIXED, ECDSA_P384_SHA384_FIXED, ED25519, RSA_PKCS1_2048_8192_SHA256,
    RSA_PKCS1_2048_8192_SHA512, UnparsedPublicKey,
};

/// Longest armoured signature, in bytes: one by an RSA key of 16 384 bits takes some 6 000.
pub const MAX_SIGNATURE: usize = 16 << 10;
/// What commits and tags are signed for.
pub(super) const NAMESPACE: &str = "git";

const BEGIN: &str = "-----BEGIN SSH SIGNATURE-----";
const END: &str = "-----END SSH SIGNATURE-----";
const MAGIC: &[u8; 6] = b"SSHSIG";
/// The signer touched the security key: bit 0 of its flags (FIDO2's "user present").
const USER_PRESENT: u8 = 1;

/// Why a signature is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SignatureError {
    /// Another armour.
    #[error("it is not an SSH signature; set `gpg.format` to `ssh` in git")]
    NotSsh,
    /// Not what the format says.
    #[error("its SSH signature is malformed")]
    Malformed,
    /// A version after ours.
    #[error("its SSH signature has a version that is not known here")]
    Version,
    /// Signed for something else.
    #[error("its signature was made for another purpose than git")]
    Namespace,
    /// An algorithm that is too weak or unknown.
    #[error(
        "its signature is by a kind of key that is not accepted here; use Ed25519, ECDSA (P-256, P-384) or RSA of 2 048 bits and more"
    )]
    Algorithm,
    /// A security key signed without being touched.
    #[error("its security key was not touched for the signature")]
    NoTouch,
    /// The bytes or the key are others.
    #[error("its signature is not by that key over that commit")]
    Wrong,
}

/// A public key in OpenSSH's binary form: what stands in base64 in `authorized_keys` and allowed-signers files.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct PublicKey(Vec<u8>);

impl PublicKey {
    /// The key of a base64 text; `kind` is the word before it, which must agree.
    ///
    /// # Errors
    /// [`SignatureError::Malformed`] or [`SignatureError::Algorithm`].
    pub fn parse(kind: &str, base64: &str) -> Result<Self, SignatureError> {
        let text = base64.trim_end_matches('=').as_bytes();
        let blob = BASE64_NOPAD.decode(text).map_err(|_| SignatureError::Malformed)?;
        if Reader(&blob).string()? != kind.as_bytes() {
            return Err(SignatureError::Malformed);
        }
        Key::read(&blob)?;
        Ok(Self(blob))
    }

    /// `SHA256:…` as `ssh-keygen -l` prints it.
    pub fn fingerprint(&self) -> String {
        format!("SHA256:{}", BASE64_NOPAD.encode(digest::digest(&SHA256, &self.0).as_ref()))
    }
}

impl std::fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.fingerprint())
    }
}

/// Checks that `armoured` is a signature over `message` for git: by whom.
///
/// # Errors
/// It is none.
pub fn verify(armoured: &str, message: &[u8]) -> Result<PublicKey, SignatureError> {
    let blob = unarmour(armoured)?;
    let mut outer = Reader(&blob);
    if outer.take(MAGIC.len())? != MAGIC {
        return Err(SignatureError::Malformed);
    }
    if outer.u32()? != 1 {
        return Err(SignatureError::Version);
    }
    let key_blob = outer.string()?;
    let namespace = outer.string()?;
    let reserved = outer.string()?;
    let hash = outer.string()?;
    let signature = outer.string()?;
    outer.end()?;
    if namespace != NAMESPACE.as_bytes() {
        return Err(SignatureError::Namespace);
    }
    let algorithm = match hash {
        b"sha256" => &SHA256,
        b"sha512" => &SHA512,
        _ => return Err(SignatureError::Algorithm),
    };
    let mut signed = MAGIC.to_vec();
    for part in [namespace, reserved, hash, digest::digest(algorithm, message).as_ref()] {
        write_string(&mut signed, part);
    }
    Key::read(key_blob)?.verify(signature, &signed)?;
    Ok(PublicKey(key_blob.to_vec()))
}

fn unarmour(text: &str) -> Result<Vec<u8>, SignatureError> {
    let text = text.trim();
    let body = text.strip_prefix(BEGIN).ok_or(SignatureError::NotSsh)?;
    let body = body.strip_suffix(END).ok_or(SignatureError::Malformed)?;
    if text.len() > MAX_SIGNATURE {
        return Err(SignatureError::Malformed);
    }
    let base64: Vec<u8> = body.bytes().filter(|b| !b.is_ascii_whitespace()).collect();
    BASE64.decode(&base64).map_err(|_| SignatureError::Malformed)
}

/// A public key, taken apart.
enum Key<'b> {
    Ed25519(&'b [u8]),
    Ecdsa { curve: Curve, point: &'b [u8] },
    Rsa { e: &'b [u8], n: &'b [u8] },
    SkEd25519 { key: &'b [u8], application: &'b [u8] },
    SkEcdsa { point: &'b [u8], application: &'b [u8] },
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Curve {
    P256,
    P384,
}

impl Curve {
    /// Bytes of one coordinate.
    const fn len(self) -> usize {
        match self {
            Self::P256 => 32,
            Self::P384 => 48,
        }
    }
}

impl<'b> Key<'b> {
    fn read(blob: &'b [u8]) -> Result<Self, SignatureError> {
        let mut reader = Reader(blob);
        let key = match reader.string()? {
            b"ssh-ed25519" => Self::Ed25519(reader.string()?),
            b"ssh-rsa" => Self::Rsa { e: reader.positive()?, n: reader.positive()? },
            b"ecdsa-sha2-nistp256" => {
                Self::Ecdsa { curve: Curve::P256, point: reader.point(b"nistp256", Curve::P256)? }
            }
            b"ecdsa-sha2-nistp384" => {
                Self::Ecdsa { curve: Curve::P384, point: reader.point(b"nistp384", Curve::P384)? }
            }
            b"sk-ssh-ed25519@openssh.com" => {
                Self::SkEd25519 { key: reader.string()?, application: reader.string()? }
            }
            b"sk-ecdsa-sha2-nistp256@openssh.com" => Self::SkEcdsa {
                point: reader.point(b"nistp256", Curve::P256)?,
                application: reader.string()?,
            },
            _ => return Err(SignatureError::Algorithm),
        };
        reader.end()?;
        match key {
            Self::Ed25519(key) | Self::SkEd25519 { key, .. } if key.len() != 32 => {
                Err(SignatureError::Malformed)
            }
            key => Ok(key),
        }
    }

    fn verify(&self, signature: &[u8], signed: &[u8]) -> Result<(), SignatureError> {
        let mut reader = Reader(signature);
        let algorithm = reader.string()?;
        let blob = reader.string()?;
        let wrong = |_| SignatureError::Wrong;
        match (self, algorithm) {
            (Self::Ed25519(key), b"ssh-ed25519") => {
                reader.end()?;
                UnparsedPublicKey::new(&ED25519, key).verify(signed, blob).map_err(wrong)
            }
            (Self::Ecdsa { curve: Curve::P256, point }, b"ecdsa-sha2-nistp256") => {
                reader.end()?;
                let fixed = fixed(blob, Curve::P256)?;
                UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, point).verify(signed, &fixed).map_err(wrong)
            }
            (Self::Ecdsa { curve: Curve::P384, point }, b"ecdsa-sha2-nistp384") => {
                reader.end()?;
                let fixed = fixed(blob, Curve::P384)?;
                UnparsedPublicKey::new(&ECDSA_P384_SHA384_FIXED, point).verify(signed, &fixed).map_err(wrong)
            }
            (Self::Rsa { e, n }, b"rsa-sha2-256" | b"rsa-sha2-512") => {
                reader.end()?;
                let parameters: &signature::RsaParameters = match algorithm {
                    b"rsa-sha2-256" => &RSA_PKCS1_2048_8192_SHA256,
                    _ => &RSA_PKCS1_2048_8192_SHA512,
                };
                // A signature with leading zeros is stored shorter than the modulus.
                let padded = left_pad(blob, n.len())?;
                PublicKeyComponents { n, e }.verify(parameters, signed, &padded).map_err(wrong)
            }
            (Self::SkEd25519 { key, application }, b"sk-ssh-ed25519@openssh.com") => {
                let signed = touched(&mut reader, application, signed)?;
                UnparsedPublicKey::new(&ED25519, key).verify(&signed, blob).map_err(wrong)
            }
            (Self::SkEcdsa { point, application }, b"sk-ecdsa-sha2-nistp256@openssh.com") => {
                let signed = touched(&mut reader, application, signed)?;
                let fixed = fixed(blob, Curve::P256)?;
                UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, point).verify(&signed, &fixed).map_err(wrong)
            }
            _ => Err(SignatureError::Algorithm),
        }
    }
}

/// What a security key has signed (PROTOCOL.u2f): its application, flags, counter and the message, if it was touched.
fn touched(reader: &mut Reader<'_>, application: &[u8], message: &[u8]) -> Result<Vec<u8>, SignatureError> {
    let rest = reader.take(5)?;
    reader.end()?;
    if rest[0] & USER_PRESENT == 0 {
        return Err(SignatureError::NoTouch);
    }
    let (application, message) = (digest::digest(&SHA256, application), digest::digest(&SHA256, message));
    Ok([application.as_ref(), rest, message.as_ref()].concat())
}

/// ECDSA's two numbers as ring wants them: of fixed length, one behind the other.
fn fixed(blob: &[u8], curve: Curve) -> Result<Vec<u8>, SignatureError> {
    let mut reader = Reader(blob);
    let (r, s) = (reader.positive()?, reader.positive()?);
    reader.end()?;
    Ok([left_pad(r, curve.len())?, left_pad(s, curve.len())?].concat())
}

fn left_pad(bytes: &[u8], len: usize) -> Result<Vec<u8>, SignatureError> {
    let missing = len.checked_sub(bytes.len()).ok_or(SignatureError::Malformed)?;
    let mut out = vec![0; missing];
    out.extend_from_slice(bytes);
    Ok(out)
}

/// Writes a string as SSH does (RFC 4251, section 5).
fn write_string(out: &mut Vec<u8>, bytes: &[u8]) {
    // Everything written here was read from a signature of at most MAX_SIGNATURE bytes, or is a hash.
    out.extend_from_slice(&u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_be_bytes());
    out.extend_from_slice(bytes);
}

/// Reads SSH's data types (RFC 4251, section 5).
struct Reader<'b>(&'b [u8]);

impl<'b> Reader<'b> {
    fn take(&mut self, len: usize) -> Result<&'b [u8], SignatureError> {
        let (taken, rest) = self.0.split_at_checked(len).ok_or(SignatureError::Malformed)?;
        self.0 = rest;
        Ok(taken)
    }

    fn u32(&mut self) -> Result<u32, SignatureError> {
        let bytes = self.take(4)?;
        Ok(bytes.iter().fold(0, |n, b| n << 8 | u32::from(*b)))
    }

    fn string(&mut self) -> Result<&'b [u8], SignatureError> {
        let len = self.u32()? as usize;
        self.take(len)
    }

    /// An `mpint` above zero, without its leading zero.
    fn positive(&mut self) -> Result<&'b [u8], SignatureError> {
        match self.string()? {
            [0, rest @ ..] if rest.first().is_some_and(|b| *b >= 0x80) => Ok(rest),
            number @ [1..=0x7f, ..] => Ok(number),
            _ => Err(SignatureError::Malformed),
        }
    }

    /// A curve's name and an uncompressed point on it.
    fn point(&mut self, name: &[u8], curve: Curve) -> Result<&'b [u8], SignatureError> {
        if self.string()? != name {
            return Err(SignatureError::Malformed);
        }
        match self.string()? {
            point @ [4, ..] if point.len() == 1 + 2 * curve.len() => Ok(point),
            _ => Err(SignatureError::Malformed),
        }
    }

    fn end(&self) -> Result<(), SignatureError> {
        if self.0.is_empty() { Ok(()) } else { Err(SignatureError::Malformed) }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::process::{Command, Stdio};

    use ring::rand::SystemRandom;
    use ring::signature::{Ed25519KeyPair, KeyPair as _};

    use super::*;

    const MESSAGE: &[u8] = b"tree 1\n\na message\n";

    fn keygen(args: &[&str]) {
        let done = Command::new("ssh-keygen").args(args).stdin(Stdio::null()).output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    }

    fn public(key: &Path) -> PublicKey {
        let text = std::fs::read_to_string(key.with_extension("pub")).unwrap();
        let mut words = text.split_whitespace();
        PublicKey::parse(words.next().unwrap(), words.next().unwrap()).unwrap()
    }

    fn sign(key: &Path, namespace: &str, message: &[u8]) -> String {
        let file = key.with_extension("message");
        std::fs::write(&file, message).unwrap();
        // `-Y sign` asks before it replaces a signature.
        let signature = key.with_extension("message.sig");
        let _ = std::fs::remove_file(&signature);
        keygen(&["-q", "-Y", "sign", "-n", namespace, "-f", key.to_str().unwrap(), file.to_str().unwrap()]);
        std::fs::read_to_string(signature).unwrap()
    }

    #[test]
    fn what_ssh_keygen_signs_is_accepted_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        for (kind, bits) in
            [("ed25519", "256"), ("ecdsa", "256"), ("ecdsa", "384"), ("rsa", "2048"), ("rsa", "3072")]
        {
            let key = dir.path().join(format!("{kind}{bits}"));
            keygen(&["-q", "-t", kind, "-b", bits, "-N", "", "-f", key.to_str().unwrap()]);
            // Several, since numbers with leading zeros are stored shorter.
            for n in 0..8u8 {
                let message = [MESSAGE, &[n]].concat();
                let signature = sign(&key, "git", &message);
                assert_eq!(verify(&signature, &message), Ok(public(&key)), "{kind}{bits}");
                assert_eq!(verify(&signature, MESSAGE), Err(SignatureError::Wrong));
            }
            assert_eq!(verify(&sign(&key, "file", MESSAGE), MESSAGE), Err(SignatureError::Namespace));
        }
        let key = dir.path().join("ecdsa521");
        keygen(&["-q", "-t", "ecdsa", "-b", "521", "-N", "", "-f", key.to_str().unwrap()]);
        assert_eq!(verify(&sign(&key, "git", MESSAGE), MESSAGE), Err(SignatureError::Algorithm));
    }

    #[test]
    fn a_changed_byte_anywhere_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let key = dir.path().join("key");
        keygen(&["-q", "-t", "ed25519", "-N", "", "-f", key.to_str().unwrap()]);
        let blob = unarmour(&sign(&key, "git", MESSAGE)).unwrap();
        let armour = |blob: &[u8]| format!("{BEGIN}\n{}\n{END}\n", BASE64.encode(blob));
        assert!(verify(&armour(&blob), MESSAGE).is_ok());
        for at in 0..blob.len() {
            let mut changed = blob.clone();
            changed[at] ^= 1;
            assert!(verify(&armour(&changed), MESSAGE).is_err(), "byte {at}");
            assert!(verify(&armour(&blob[..at]), MESSAGE).is_err(), "cut at {at}");
        }
        assert!(verify(&armour(&[blob.as_slice(), &[0]].concat()), MESSAGE).is_err());
        assert_eq!(verify("-----BEGIN PGP SIGNATURE-----", MESSAGE), Err(SignatureError::NotSsh));
        assert_eq!(verify(&armour(&vec![0; MAX_SIGNATURE]), MESSAGE), Err(SignatureError::Malformed));
    }

    /// A security key, made in software.
    fn security_key_signature(flags: u8) -> String {
        let pair = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).unwrap();
        let pair = Ed25519KeyPair::from_pkcs8(pair.as_ref()).unwrap();
        let kind = b"sk-ssh-ed25519@openssh.com";
        let mut key = Vec::new();
        for part in [kind.as_slice(), pair.public_key().as_ref(), b"ssh:"] {
            write_string(&mut key, part);
        }
        let mut signed = MAGIC.to_vec();
        for part in [b"git".as_slice(), b"", b"sha512", digest::digest(&SHA512, MESSAGE).as_ref()] {
            write_string(&mut signed, part);
        }
        let tail = [flags, 0, 0, 0, 7];
        let (application, message) = (digest::digest(&SHA256, b"ssh:"), digest::digest(&SHA256, &signed));
        let by_device = pair.sign(&[application.as_ref(), &tail, message.as_ref()].concat());
        let mut signature = Vec::new();
        write_string(&mut signature, kind);
        write_string(&mut signature, by_device.as_ref());
        signature.extend_from_slice(&tail);
        let mut blob = [MAGIC.as_slice(), &1u32.to_be_bytes()].concat();
        for part in [key.as_slice(), b"git", b"", b"sha512", signature.as_slice()] {
            write_string(&mut blob, part);
        }
        format!("{BEGIN}\n{}\n{END}", BASE64.encode(&blob))
    }

    #[test]
    fn a_security_key_must_be_touched() {
        assert!(verify(&security_key_signature(USER_PRESENT), MESSAGE).is_ok());
        assert_eq!(verify(&security_key_signature(0), MESSAGE), Err(SignatureError::NoTouch));
    }
}
