//! Looks for secrets in what was seen or logged, in any form they are written in.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use data_encoding::{BASE32_NOPAD, BASE64_NOPAD, BASE64URL_NOPAD, HEXLOWER, HEXUPPER};

/// Secret bytes, and how one would recognise them.
pub(crate) struct Secret {
    what: String,
    forms: Vec<Vec<u8>>,
}

impl Secret {
    pub(crate) fn new(what: impl Into<String>, bytes: &[u8]) -> Self {
        let mut forms = vec![
            bytes.to_vec(),
            HEXLOWER.encode(bytes).into_bytes(),
            HEXUPPER.encode(bytes).into_bytes(),
            BASE32_NOPAD.encode(bytes).into_bytes(),
            BASE32_NOPAD.encode(bytes).to_lowercase().into_bytes(),
            listed(bytes, ", "),
            listed(bytes, " "),
        ];
        // Base 64 reads otherwise at each of three places in a longer text; the characters at its ends hold bits of
        // neighbours and are left out.
        for shift in 0..3 {
            let mut padded = vec![0; shift];
            padded.extend_from_slice(bytes);
            let first = (8 * shift).div_ceil(6);
            let last = 8 * padded.len() / 6;
            for encoding in [BASE64_NOPAD, BASE64URL_NOPAD] {
                forms.push(encoding.encode(&padded).as_bytes()[first..last].to_vec());
            }
        }
        Self { what: what.into(), forms }
    }

    /// The last 32 bytes of an auth key or join key, which prove its possession.
    pub(crate) fn of_key(what: impl Into<String>, text: &str) -> Result<Self> {
        let body = text.trim().split_once('-').context("a key has a prefix")?.1;
        let bytes = BASE64URL_NOPAD.decode(body.as_bytes())?;
        ensure!(bytes.len() >= 32, "a key has a secret");
        Ok(Self::new(what, &bytes[bytes.len() - 32..]))
    }

    /// The private keys of an agent, by its state directory.
    pub(crate) fn of_agent(name: &str, state_dir: &Path) -> Result<Vec<Self>> {
        let networks = std::fs::read_dir(state_dir.join("networks"))?;
        let mut all = Vec::new();
        for network in networks {
            let file = std::fs::read(network?.path().join("keys"))?;
            let start = file.iter().position(|b| *b == b'\n').context("a state file has a first line")? + 1;
            let (keys, rest) = file[start..].as_chunks::<32>();
            ensure!(keys.len() == 3 && rest.is_empty(), "three keys");
            for (which, key) in ["control", "WireGuard", "probe"].iter().zip(keys) {
                all.push(Self::new(format!("{which} key of {name}"), key));
            }
        }
        Ok(all)
    }

    /// Fails if the secret is in `text`.
    pub(crate) fn is_not_in(&self, text: &[u8], place: &str) -> Result<()> {
        for form in &self.forms {
            if let Some(at) = find(text, form) {
                let near = String::from_utf8_lossy(&text[at.saturating_sub(80)..at]);
                anyhow::bail!("the {} is in {place}, after {near:?}", self.what);
            }
        }
        Ok(())
    }
}

fn listed(bytes: &[u8], separator: &str) -> Vec<u8> {
    let numbers: Vec<String> = bytes.iter().map(u8::to_string).collect();
    numbers.join(separator).into_bytes()
}

/// Where `needle` begins: a search for its rarest step first would be faster, but logs are short.
fn find(text: &[u8], needle: &[u8]) -> Option<usize> {
    let first = *needle.first()?;
    let mut from = 0;
    while let Some(at) = text.get(from..)?.iter().position(|b| *b == first) {
        if text[from + at..].starts_with(needle) {
            return Some(from + at);
        }
        from += at + 1;
    }
    None
}

#[test]
fn a_secret_is_found_in_every_form() {
    let bytes: Vec<u8> = (100..132).collect();
    let secret = Secret::new("secret", &bytes);
    let mut whole = vec![7; 64];
    whole.extend_from_slice(&bytes);
    for text in [
        whole.clone(),
        BASE64URL_NOPAD.encode(&whole).into_bytes(),
        BASE64_NOPAD.encode(&bytes).into_bytes(),
        BASE64URL_NOPAD.encode(&[&[1, 2], bytes.as_slice(), &[3]].concat()).into_bytes(),
        format!("{bytes:?}").into_bytes(),
        HEXLOWER.encode(&whole).into_bytes(),
        BASE32_NOPAD.encode(&bytes).into_bytes(),
    ] {
        assert!(secret.is_not_in(&text, "there").is_err(), "{}", String::from_utf8_lossy(&text));
    }
    assert!(secret.is_not_in(&whole[..90], "there").is_ok());
}
