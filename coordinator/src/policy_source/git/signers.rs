//! The file that says whose signatures count: OpenSSH's allowed-signers format (ssh-keygen(1), ALLOWED SIGNERS).
//!
//! It lives outside the repository, so that no commit can add its own author. A line that is not understood whole makes
//! the whole file unusable: half a file must not decide who may change the policy.

use std::path::Path;

use jiff::civil::{Date, DateTime, Time};
use jiff::tz::TimeZone;

use super::sshsig::{NAMESPACE, PublicKey};

/// Largest file, in bytes.
pub const MAX_SIGNERS_BYTES: u64 = 1 << 20;
/// Most keys in it: each signature is looked up by a scan.
pub const MAX_SIGNERS: usize = 4_096;

/// Keys, and when and for what each counts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AllowedSigners(Vec<Signer>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Signer {
    principals: String,
    key: PublicKey,
    /// Seconds since the Unix epoch; counts from then on.
    after: Option<i64>,
    /// Seconds since the Unix epoch; counts until before then.
    before: Option<i64>,
    for_git: bool,
}

/// Why the file can't be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SignersError {
    /// It can't be read.
    #[error("can't read the allowed-signers file {path}: {why}")]
    Unreadable {
        /// The file.
        path: String,
        /// What is wrong.
        why: String,
    },
    /// A line makes no sense.
    #[error("{path}:{line}: {why}")]
    Line {
        /// The file.
        path: String,
        /// Which, from 1.
        line: usize,
        /// What is wrong with it.
        why: String,
    },
}

/// Why a key that signed does not count.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoSigner {
    /// It isn't in the file.
    #[error("its key {0:?} is not among the allowed signers")]
    Unknown(PublicKey),
    /// It is there for something else.
    #[error("the key of {0} is not allowed to sign for git")]
    Purpose(String),
    /// It is there, but not for that time.
    #[error("the key of {0} does not count {1}")]
    Time(String, When),
}

/// A moment that a key must cover.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// The commit's own date.
    AtCommit,
    /// The moment it is checked: who holds an expired key can write any date into a commit.
    Now,
}

impl std::fmt::Display for When {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::AtCommit => "at the commit's own date",
            Self::Now => "now",
        })
    }
}

impl AllowedSigners {
    /// Reads the file.
    ///
    /// # Errors
    /// It can't be read, or some line of it makes no sense.
    pub fn read(path: &Path) -> Result<Self, SignersError> {
        let name = path.display().to_string();
        let unreadable = |why: &dyn std::fmt::Display| SignersError::Unreadable {
            path: name.clone(),
            why: why.to_string(),
        };
        let meta = std::fs::metadata(path).map_err(|e| unreadable(&e))?;
        if !meta.is_file() || meta.len() > MAX_SIGNERS_BYTES {
            return Err(unreadable(&format!("it is no file of at most {MAX_SIGNERS_BYTES} bytes")));
        }
        let text = std::fs::read_to_string(path).map_err(|e| unreadable(&e))?;
        Self::parse(&text).map_err(|(line, why)| SignersError::Line { path: name, line, why })
    }

    /// Reads a file's text; the error is the line's number and what is wrong with it.
    pub(super) fn parse(text: &str) -> Result<Self, (usize, String)> {
        let mut signers = Vec::new();
        for (at, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            if signers.len() >= MAX_SIGNERS {
                return Err((at + 1, format!("more than {MAX_SIGNERS} keys")));
            }
            signers.push(Signer::parse(line).map_err(|why| (at + 1, why))?);
        }
        Ok(Self(signers))
    }

    /// True if nobody's signature counts.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whose key it is, if it counts at both times: the commit's own date and now, in seconds since the Unix epoch.
    ///
    /// # Errors
    /// It doesn't count, and why.
    pub fn principal(&self, key: &PublicKey, committed: i64, now: i64) -> Result<&str, NoSigner> {
        let mut why = NoSigner::Unknown(key.clone());
        for signer in self.0.iter().filter(|s| s.key == *key) {
            let covers = |t: i64| signer.after.is_none_or(|a| a <= t) && signer.before.is_none_or(|b| t < b);
            let who = || signer.principals.clone();
            match () {
                () if !signer.for_git => why = NoSigner::Purpose(who()),
                () if !covers(now) => why = NoSigner::Time(who(), When::Now),
                () if !covers(committed) => why = NoSigner::Time(who(), When::AtCommit),
                () => return Ok(&signer.principals),
            }
        }
        Err(why)
    }
}

impl Signer {
    /// `principals [options] keytype base64 [comment]`
    fn parse(line: &str) -> Result<Self, String> {
        let (principals, rest) = word(line).ok_or("a quotation mark is not closed")?;
        if principals.is_empty() {
            return Err("expected the signer's name first".into());
        }
        let (second, after_second) = word(rest).ok_or("a quotation mark is not closed")?;
        let (options, kind, rest) = if is_key_type(second) {
            ("", second, after_second)
        } else {
            let (kind, rest) = word(after_second).ok_or("a quotation mark is not closed")?;
            (second, kind, rest)
        };
        if !is_key_type(kind) {
            return Err(format!("expected a key such as `ssh-ed25519 AAAA…`, found `{kind}`"));
        }
        let base64 = rest.split_whitespace().next().unwrap_or_default();
        let key = PublicKey::parse(kind, base64).map_err(|_| {
            format!("the {kind} key can't be used; accepted are Ed25519, ECDSA (P-256, P-384) and RSA")
        })?;
        let principals = principals.trim_matches('"').to_owned();
        let mut signer = Self { principals, key, after: None, before: None, for_git: true };
        for option in split_options(options) {
            signer.option(option)?;
        }
        Ok(signer)
    }

    fn option(&mut self, option: &str) -> Result<(), String> {
        let (name, value) = match option.split_once('=') {
            Some((name, value)) => (name, Some(value.trim_matches('"'))),
            None => (option, None),
        };
        match (name.to_ascii_lowercase().as_str(), value) {
            ("namespaces", Some(list)) => self.for_git = matches_list(list, NAMESPACE),
            ("valid-after", Some(time)) => self.after = Some(unix_time(time)?),
            ("valid-before", Some(time)) => self.before = Some(unix_time(time)?),
            ("cert-authority", _) => {
                return Err("certificates are not supported; list the signers' own keys".into());
            }
            _ => return Err(format!("the option `{option}` is not known")),
        }
        Ok(())
    }
}

fn is_key_type(word: &str) -> bool {
    ["ssh-", "ecdsa-", "sk-ssh-", "sk-ecdsa-"].iter().any(|prefix| word.starts_with(prefix))
}

/// The first word, in which blanks may stand between quotation marks, and the rest; `None` if those are not closed.
fn word(text: &str) -> Option<(&str, &str)> {
    let text = text.trim_start();
    let mut quoted = false;
    for (at, c) in text.char_indices() {
        match c {
            '"' => quoted = !quoted,
            c if c.is_whitespace() && !quoted => return Some(text.split_at(at)),
            _ => {}
        }
    }
    (!quoted).then_some((text, ""))
}

/// Options stand behind commas, which may also be part of a quoted value.
fn split_options(options: &str) -> impl Iterator<Item = &str> {
    let mut quoted = false;
    options
        .split(move |c| {
            if c == '"' {
                quoted = !quoted;
            }
            c == ',' && !quoted
        })
        .filter(|option| !option.is_empty())
}

/// OpenSSH's pattern lists: one must match, and none that begins with `!` may.
fn matches_list(list: &str, text: &str) -> bool {
    let mut found = false;
    for pattern in list.split(',') {
        match pattern.strip_prefix('!') {
            Some(pattern) if matches(pattern, text) => return false,
            Some(_) => {}
            None => found |= matches(pattern, text),
        }
    }
    found
}

/// `*` is any number of characters, `?` is one.
fn matches(pattern: &str, text: &str) -> bool {
    let (mut rest, mut text) = (pattern.chars(), text.chars());
    while let Some(c) = rest.next() {
        match c {
            '*' => {
                let tail = rest.as_str();
                return (0..=text.as_str().len())
                    .filter_map(|at| text.as_str().get(at..))
                    .any(|text| matches(tail, text));
            }
            '?' if text.next().is_some() => {}
            c if text.next() == Some(c) => {}
            _ => return false,
        }
    }
    text.next().is_none()
}

/// `YYYYMMDD[Z]` or `YYYYMMDDHHMM[SS][Z]`. Without `Z`, OpenSSH takes the zone of the machine; here it is UTC, too.
fn unix_time(text: &str) -> Result<i64, String> {
    let wrong = || format!("`{text}` is not a time: expected YYYYMMDD or YYYYMMDDHHMM[SS], and Z for UTC");
    let digits = text.strip_suffix(['Z', 'z']).unwrap_or(text);
    if !matches!(digits.len(), 8 | 12 | 14) || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(wrong());
    }
    let number = |from: usize, to: usize| -> i16 {
        // At most four digits, or nothing.
        digits.get(from..to).and_then(|d| d.parse().ok()).unwrap_or(0)
    };
    let small = |from: usize| i8::try_from(number(from, from + 2)).map_err(|_| wrong());
    let date = Date::new(number(0, 4), small(4)?, small(6)?).map_err(|_| wrong())?;
    let time = Time::new(small(8)?, small(10)?, small(12)?, 0).map_err(|_| wrong())?;
    let zoned = TimeZone::UTC.to_timestamp(DateTime::from_parts(date, time)).map_err(|_| wrong())?;
    Ok(zoned.as_second())
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl";

    fn signers(text: &str) -> Result<AllowedSigners, (usize, String)> {
        AllowedSigners::parse(text)
    }

    fn key() -> PublicKey {
        let (kind, base64) = KEY.split_once(' ').unwrap();
        PublicKey::parse(kind, base64).unwrap()
    }

    #[test]
    fn lines_as_openssh_has_them() {
        let text = format!(
            "# people\n\nann@example.com,ann {KEY} a comment\n\
             *@x.org namespaces=\"git,file\",valid-after=\"20240101Z\",valid-before=\"20240201120000Z\" {KEY}\n\
             \"two words\" {KEY}\n"
        );
        let signers = signers(&text).unwrap();
        assert_eq!(signers.0.len(), 3);
        assert_eq!(signers.principal(&key(), 0, 0), Ok("ann@example.com,ann"));
        assert_eq!(signers.0[1].after, Some(1_704_067_200));
        assert_eq!(signers.0[1].before, Some(1_706_788_800));
        assert_eq!(signers.0[2].principals, "two words");
        for (line, why) in [
            (format!("ann cert-authority {KEY}"), "certificates"),
            (format!("ann no-such-option {KEY}"), "not known"),
            (format!("ann valid-after=\"yesterday\" {KEY}"), "not a time"),
            (format!("ann valid-after=\"20241301\" {KEY}"), "not a time"),
            (KEY.to_owned(), "expected a key"),
            ("ann ssh-ed25519 AAAA".to_owned(), "can't be used"),
            (format!("ann namespaces=\"git {KEY}"), "not closed"),
            ("ann".to_owned(), "expected a key"),
        ] {
            let (at, found) = self::signers(&format!("# one\n{line}\n")).unwrap_err();
            assert!(at == 2 && found.contains(why), "{line}: {found}");
        }
    }

    #[test]
    fn a_key_counts_at_both_times_and_for_git_only() {
        let valid =
            signers(&format!("ann valid-after=19700101000010Z,valid-before=19700101000020Z {KEY}")).unwrap();
        let at = |committed, now| valid.principal(&key(), committed, now);
        let out = |when| Err(NoSigner::Time("ann".into(), when));
        assert_eq!(at(10, 19), Ok("ann"));
        assert_eq!(at(9, 19), out(When::AtCommit));
        assert_eq!(at(10, 20), out(When::Now));
        // The date in a commit is whatever its author writes.
        assert_eq!(at(15, 1_000), out(When::Now));
        let other = signers(&format!("ann namespaces=\"file\" {KEY}")).unwrap();
        assert_eq!(other.principal(&key(), 0, 0), Err(NoSigner::Purpose("ann".into())));
        assert_eq!(AllowedSigners::default().principal(&key(), 0, 0), Err(NoSigner::Unknown(key())));
        // A second line may allow what the first does not.
        let both = signers(&format!("old valid-before=19700101Z {KEY}\nnew {KEY}")).unwrap();
        assert_eq!(both.principal(&key(), 5, 5), Ok("new"));
    }

    #[test]
    fn files_are_bounded() {
        let line = format!("ann {KEY}\n");
        assert_eq!(signers(&line.repeat(MAX_SIGNERS)).unwrap().0.len(), MAX_SIGNERS);
        let (at, why) = signers(&line.repeat(MAX_SIGNERS + 1)).unwrap_err();
        assert!(at == MAX_SIGNERS + 1 && why.contains("4096"), "{why}");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("signers");
        std::fs::write(&path, " ".repeat(MAX_SIGNERS_BYTES as usize + 1)).unwrap();
        for path in [path.as_path(), dir.path()] {
            let error = AllowedSigners::read(path).unwrap_err().to_string();
            assert!(error.contains("it is no file of at most"), "{error}");
        }
    }

    #[test]
    fn pattern_lists() {
        for (list, yes) in [
            ("git", true),
            ("file,g?t", true),
            ("*", true),
            ("*,!git", false),
            ("gi", false),
            ("gitx", false),
            ("g*x", false),
        ] {
            assert_eq!(matches_list(list, "git"), yes, "{list}");
        }
    }
}
