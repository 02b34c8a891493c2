//! A raw commit object, taken apart as far as its signature needs: who signed which bytes, and when it says it was made.

use super::signers::{AllowedSigners, NoSigner};
use super::sshsig::{self, MAX_SIGNATURE, SignatureError};

/// Longest commit object that is looked at, in bytes.
pub const MAX_COMMIT: usize = 1 << 20;

/// The name of a commit: SHA-1 in lower-case hexadecimal. (Repositories of SHA-256 are not followed yet.)
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct CommitId(String);

impl CommitId {
    /// The id in `text`, if it is one.
    pub fn parse(text: &str) -> Option<Self> {
        let hex = |b: u8| matches!(b, b'0'..=b'9' | b'a'..=b'f');
        (text.len() == 40 && text.bytes().all(hex)).then(|| Self(text.to_owned()))
    }

    /// The whole id.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// As people show it.
    pub fn short(&self) -> &str {
        &self.0[..12]
    }
}

impl std::fmt::Display for CommitId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why a commit can't be trusted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Untrusted {
    /// Not what git writes.
    #[error("it is malformed")]
    Malformed,
    /// It has no signature.
    #[error("it is not signed")]
    Unsigned,
    /// It has more than one, or one of a kind that doesn't belong there.
    #[error("it has more than one signature")]
    Ambiguous,
    /// Its signature is none.
    #[error("{0}")]
    Signature(#[from] SignatureError),
    /// Its signer doesn't count.
    #[error("{0}")]
    Signer(#[from] NoSigner),
}

/// Checks the signature of the commit `raw` at `now` (seconds since the Unix epoch): who signed it.
///
/// # Errors
/// Nobody whose signature counts.
pub(super) fn signer<'s>(raw: &[u8], signers: &'s AllowedSigners, now: i64) -> Result<&'s str, Untrusted> {
    let parts = take_apart(raw)?;
    let signature = parts.signature.ok_or(Untrusted::Unsigned)?;
    let signature = std::str::from_utf8(&signature).map_err(|_| SignatureError::Malformed)?;
    let key = sshsig::verify(signature, &parts.payload)?;
    Ok(signers.principal(&key, parts.committed, now)?)
}

/// The header that holds the signature.
const SIGNATURE: &[u8] = b"gpgsig";

struct Parts {
    /// What was signed: the object without its signature.
    payload: Vec<u8>,
    signature: Option<Vec<u8>>,
    /// Seconds since the Unix epoch.
    committed: i64,
}

/// Headers stand in lines up to an empty one; lines that begin with a blank go on with the header before them.
fn take_apart(raw: &[u8]) -> Result<Parts, Untrusted> {
    let mut parts = Parts { payload: Vec::with_capacity(raw.len()), signature: None, committed: 0 };
    let (mut rest, mut in_signature, mut dated) = (raw, false, false);
    loop {
        let end = rest.iter().position(|b| *b == b'\n').ok_or(Untrusted::Malformed)?;
        let (line, after) = rest.split_at(end + 1);
        let text = &line[..end];
        if text.is_empty() {
            parts.payload.extend_from_slice(rest);
            break;
        }
        rest = after;
        if let Some(more) = text.strip_prefix(b" ") {
            match &mut parts.signature {
                Some(signature) if in_signature => {
                    signature.push(b'\n');
                    signature.extend_from_slice(more);
                    if signature.len() > MAX_SIGNATURE {
                        return Err(SignatureError::Malformed.into());
                    }
                }
                _ => parts.payload.extend_from_slice(line),
            }
            continue;
        }
        in_signature = false;
        let name = text.split(|b| *b == b' ').next().unwrap_or_default();
        let value = text.get(name.len() + 1..).unwrap_or_default();
        if name == SIGNATURE && parts.signature.is_none() {
            parts.signature = Some(value.to_vec());
            in_signature = true;
            continue;
        }
        if name.starts_with(b"gpgsig") {
            // Git would leave it out of what is signed; no tool makes such a commit here.
            return Err(Untrusted::Ambiguous);
        }
        if name == b"committer" {
            if dated {
                return Err(Untrusted::Malformed);
            }
            dated = true;
            parts.committed = date(value).ok_or(Untrusted::Malformed)?;
        }
        parts.payload.extend_from_slice(line);
    }
    if dated { Ok(parts) } else { Err(Untrusted::Malformed) }
}

/// The seconds of `Name <address> 1700000000 +0100`.
fn date(person: &[u8]) -> Option<i64> {
    let after = person.iter().rposition(|b| *b == b'>')? + 1;
    let text = std::str::from_utf8(person.get(after..)?).ok()?;
    text.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: &str = "tree 4b825dc642cb6eb9a060e54bf8d69288fbee4904\n\
                         author Ann <a@x.org> 1600000000 +0000\n\
                         committer Bob > <b@x.org> 1700000000 +0100\n\nmessage\n\n gpgsig no\n";

    fn apart(raw: &str) -> Result<Parts, Untrusted> {
        take_apart(raw.as_bytes())
    }

    #[test]
    fn the_signature_is_cut_out_and_nothing_else() {
        let parts = apart(PLAIN).unwrap();
        assert_eq!(
            (parts.payload.as_slice(), parts.signature, parts.committed),
            (PLAIN.as_bytes(), None, 1_700_000_000)
        );
        let signature = "gpgsig -----BEGIN\n \n abc\n -----END\n";
        for at in [PLAIN.find("author").unwrap(), PLAIN.find("\n\n").unwrap() + 1] {
            let mut signed = PLAIN.to_owned();
            signed.insert_str(at, signature);
            let parts = apart(&signed).unwrap();
            assert_eq!(parts.payload, PLAIN.as_bytes());
            assert_eq!(parts.signature.unwrap(), b"-----BEGIN\n\nabc\n-----END");
        }
    }

    #[test]
    fn two_signatures_and_broken_objects_are_refused() {
        let with = |extra: &str| apart(&PLAIN.replacen("author", &format!("{extra}author"), 1));
        assert_eq!(with("gpgsig a\ngpgsig b\n").err(), Some(Untrusted::Ambiguous));
        assert_eq!(with("gpgsig a\nmergetag x\n y\ngpgsig b\n").err(), Some(Untrusted::Ambiguous));
        assert_eq!(with("gpgsig-sha256 a\n").err(), Some(Untrusted::Ambiguous));
        // Lines of another header, although they look like a signature's.
        assert!(with("mergetag x\n gpgsig a\n").unwrap().signature.is_none());
        assert_eq!(with("committer x 1 +0\n").err(), Some(Untrusted::Malformed));
        assert_eq!(
            with(&format!("gpgsig x\n {}\n", "y".repeat(MAX_SIGNATURE))).err().unwrap().to_string(),
            SignatureError::Malformed.to_string()
        );
        for raw in ["", "\n", "tree x", "tree x\n\nno committer", "committer x\n\n", "committer <x> y\n\n"] {
            assert_eq!(apart(raw).err(), Some(Untrusted::Malformed), "{raw:?}");
        }
    }

    #[test]
    fn ids() {
        let sha1 = "4b825dc642cb6eb9a060e54bf8d69288fbee4904";
        assert_eq!(CommitId::parse(sha1).unwrap().short(), "4b825dc642cb");
        for bad in
            ["", "HEAD", &sha1[1..], &sha1.to_uppercase(), "--upload-pack=aaaaaaaaaaaaaaaaaaaaaaaaaaaaa"]
        {
            assert_eq!(CommitId::parse(bad), None, "{bad}");
        }
    }
}
