//! What the agent keeps on disk, and how it survives `kill -9`, a full disk and a second agent.
//!
//! ```text
//! DIR/                     0700, held by a lock for as long as the agent runs
//!   lock  settings  journal
//!   networks/<net_id>/     keys  identity  device  netmap  handshakes  resume  relay-tls.pem
//! ```
//!
//! Every file is replaced as a whole: written beside, synced, renamed, directory synced. Its first line names the
//! kind and the SHA-256 of the rest, so damage is told from contents. A damaged file is named and left alone.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use warren_common::ids::{DeviceId, NetworkId, RelayId};
use warren_common::keys::{
    ControlPublicKey, ControlSecretKey, Fingerprint, KEY_LEN, NetmapPublicKey, ProbeSecretKey, WgSecretKey,
};
use warren_common::time::UnixTime;
use warren_common::wire::control::Signed;
use warren_engine::netmap::SavedNetmap;
use warren_engine::paths::PathHint;
use zeroize::Zeroizing;

use crate::entropy::OsEntropy;
use crate::problem::{Problem, io_text};

const MAGIC: &str = "warren-state-1";
/// Longest state file that is read, in bytes: a netmap is at most one control message.
pub const MAX_FILE: u64 = 128 << 20;

/// The state directory, locked.
#[derive(Debug)]
pub struct StateDir {
    root: PathBuf,
    _lock: File,
}

/// What belongs to the agent and to no network.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Settings {
    /// The network that `up` joins; absent before the first enrolment and after `logout`.
    pub network: Option<NetworkId>,
    /// True if the agent should connect when it starts.
    pub want_up: bool,
    /// The UDP port of the last run: kept, so that peers and NATs find the restarted agent where they left it.
    pub port: Option<u16>,
    /// The name asked for at enrolment; the host's own if absent.
    pub hostname: Option<String>,
}

/// The three secrets of a device.
#[derive(Clone, Debug)]
pub struct DeviceKeys {
    /// Names it to the coordinator.
    pub control: ControlSecretKey,
    /// Its WireGuard key.
    pub wg: WgSecretKey,
    /// Authenticates its probes.
    pub probe: ProbeSecretKey,
}

/// The coordinator this device has pinned.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Where it was last reached.
    pub url: String,
    /// The root key's fingerprint: never changes for a network.
    pub root: Fingerprint,
    /// The network's name, for people.
    pub network_name: String,
    /// The coordinator's Noise key.
    pub control: ControlPublicKey,
    /// The key netmaps are signed with.
    pub netmap: NetmapPublicKey,
    /// The highest epoch seen; a coordinator with a lower one is refused.
    pub epoch: u64,
}

/// What lets traffic go on at once after a restart while the coordinator is away. It grants nothing by itself, and losing
/// it costs no more than a wait.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Resume {
    /// When it was saved.
    pub at: UnixTime,
    /// The latest token for each relay in use, as encoded: good for ten minutes at most, and only together with the keys.
    #[serde(with = "tokens")]
    pub tokens: BTreeMap<RelayId, Signed>,
    /// Where peers in use were reached.
    pub paths: Vec<PathHint>,
}

/// Who this device is in the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Membership {
    /// Its id.
    pub device: DeviceId,
    /// The session generation to present next.
    pub generation: u64,
}

impl StateDir {
    /// Opens (or makes) the directory and locks it.
    ///
    /// # Errors
    /// Another agent holds it, it is not a directory of ours, or there is no permission.
    pub fn open(root: &Path) -> Result<Self, Problem> {
        make_private(root)?;
        let path = root.join("lock");
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(|e| access(&path, &e))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(Problem::new(
                    "state-in-use",
                    format!("another agent is running on the state directory `{}`", root.display()),
                    "stop the other `warrend`, or give this one its own --state-dir (a copy of a state directory does not work: each device enrols by itself)",
                ));
            }
            Err(TryLockError::Error(e)) => return Err(access(&path, &e)),
        }
        Ok(Self { root: root.to_owned(), _lock: lock })
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.root
    }

    /// The agent's settings; the defaults before any were saved.
    ///
    /// # Errors
    /// The file is damaged or unreadable.
    pub fn settings(&self) -> Result<Settings, Problem> {
        Ok(load_json(&self.root.join("settings"), "settings")?.unwrap_or_default())
    }

    /// Saves the settings.
    ///
    /// # Errors
    /// The disk is full or unwritable; the old settings stay.
    pub fn save_settings(&self, settings: &Settings) -> Result<(), Problem> {
        save_json(&self.root.join("settings"), "settings", settings)
    }

    /// The journal of host changes, if there is one.
    ///
    /// # Errors
    /// The file is damaged or unreadable.
    pub fn journal<T: DeserializeOwned>(&self) -> Result<Option<T>, Problem> {
        load_json(&self.root.join("journal"), "journal")
    }

    /// Replaces the journal; `None` removes it.
    ///
    /// # Errors
    /// The disk is full or unwritable; the old journal stays.
    pub fn save_journal<T: Serialize>(&self, journal: Option<&T>) -> Result<(), Problem> {
        let path = self.root.join("journal");
        match journal {
            Some(journal) => save_json(&path, "journal", journal),
            None => match fs::remove_file(&path) {
                Err(e) if e.kind() != ErrorKind::NotFound => Err(access(&path, &e)),
                _ => sync_dir(&self.root),
            },
        }
    }

    /// The directory of one network, made if it is missing.
    ///
    /// # Errors
    /// The disk is full or unwritable.
    pub fn network(&self, id: NetworkId) -> Result<NetworkDir, Problem> {
        let networks = self.root.join("networks");
        make_private(&networks)?;
        let path = networks.join(id.to_string());
        make_private(&path)?;
        Ok(NetworkDir { path })
    }

    /// Forgets a network with its keys, for good.
    ///
    /// # Errors
    /// The files can't be removed.
    pub fn remove_network(&self, id: NetworkId) -> Result<(), Problem> {
        let path = self.root.join("networks").join(id.to_string());
        match fs::remove_dir_all(&path) {
            Err(e) if e.kind() != ErrorKind::NotFound => Err(access(&path, &e)),
            _ => Ok(()),
        }
    }
}

/// One network's files.
#[derive(Clone, Debug)]
pub struct NetworkDir {
    path: PathBuf,
}

impl NetworkDir {
    /// The directory: what else belongs to the network may be kept there.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The device's keys, made and saved if there are none: they are on disk before anyone hears of them, so a lost
    /// reply to an enrolment is repeated by the same device.
    ///
    /// # Errors
    /// The file is damaged, or the disk is full.
    pub fn keys(&self) -> Result<DeviceKeys, Problem> {
        let path = self.path.join("keys");
        if let Some(body) = load(&path, "keys")? {
            let keys: Option<&[[u8; KEY_LEN]; 3]> = body.as_chunks::<KEY_LEN>().0.first_chunk();
            let [control, wg, probe] = keys
                .filter(|_| body.len() == 3 * KEY_LEN)
                .ok_or_else(|| damaged(&path, "it does not hold three keys"))?;
            return Ok(DeviceKeys {
                control: ControlSecretKey::from_bytes(*control),
                wg: WgSecretKey::from_bytes(*wg),
                probe: ProbeSecretKey::from_bytes(*probe),
            });
        }
        let mut rng = OsEntropy;
        let keys = DeviceKeys {
            control: ControlSecretKey::generate(&mut rng),
            wg: WgSecretKey::generate(&mut rng),
            probe: ProbeSecretKey::generate(&mut rng),
        };
        let mut body = Zeroizing::new(Vec::with_capacity(3 * KEY_LEN));
        body.extend_from_slice(keys.control.expose());
        body.extend_from_slice(keys.wg.expose());
        body.extend_from_slice(keys.probe.expose());
        save(&path, "keys", &body)?;
        Ok(keys)
    }

    /// The pinned coordinator.
    ///
    /// # Errors
    /// The file is damaged or unreadable.
    pub fn identity(&self) -> Result<Option<Identity>, Problem> {
        load_json(&self.path.join("identity"), "identity")
    }

    /// Pins a coordinator.
    ///
    /// # Errors
    /// The disk is full or unwritable.
    pub fn save_identity(&self, identity: &Identity) -> Result<(), Problem> {
        save_json(&self.path.join("identity"), "identity", identity)
    }

    /// Who this device is; absent until it is enrolled.
    ///
    /// # Errors
    /// The file is damaged or unreadable.
    pub fn membership(&self) -> Result<Option<Membership>, Problem> {
        load_json(&self.path.join("device"), "device")
    }

    /// Saves who this device is and its session generation.
    ///
    /// # Errors
    /// The disk is full or unwritable.
    pub fn save_membership(&self, membership: &Membership) -> Result<(), Problem> {
        save_json(&self.path.join("device"), "device", membership)
    }

    /// The last accepted netmap with its lease, as the engine made it.
    ///
    /// # Errors
    /// The file is damaged or unreadable.
    pub fn netmap(&self) -> Result<Option<SavedNetmap>, Problem> {
        let body = load(&self.netmap_path(), "netmap")?;
        Ok(body.map(|mut body| SavedNetmap::from_bytes(std::mem::take(&mut *body))))
    }

    /// Saves a netmap with its lease.
    ///
    /// # Errors
    /// The disk is full or unwritable; what was there stays.
    pub fn save_netmap(&self, saved: &SavedNetmap) -> Result<(), Problem> {
        save(&self.netmap_path(), "netmap", saved.as_bytes())
    }

    /// Where the netmap is, for messages about it.
    pub fn netmap_path(&self) -> PathBuf {
        self.path.join("netmap")
    }

    /// What was saved for a restart; nothing if there is none, or it can't be read: it is not needed.
    pub fn resume(&self) -> Resume {
        match load_json(&self.path.join("resume"), "resume") {
            Ok(resume) => resume.unwrap_or_default(),
            Err(problem) => {
                tracing::warn!("paths and relay tokens of the last run are lost: {}", problem.text);
                Resume::default()
            }
        }
    }

    /// Saves what is to be used after a restart.
    ///
    /// # Errors
    /// The disk is full or unwritable; what was there stays.
    pub fn save_resume(&self, resume: &Resume) -> Result<(), Problem> {
        save_json(&self.path.join("resume"), "resume", resume)
    }

    /// A time after every time stamp in our WireGuard handshakes so far; zero if none is known.
    ///
    /// # Errors
    /// The file is damaged or unreadable.
    pub fn handshake_floor(&self) -> Result<UnixTime, Problem> {
        Ok(load_json(&self.path.join("handshakes"), "handshakes")?.unwrap_or_default())
    }

    /// Saves that time.
    ///
    /// # Errors
    /// The disk is full or unwritable; what was there stays.
    pub fn save_handshake_floor(&self, floor: UnixTime) -> Result<(), Problem> {
        save_json(&self.path.join("handshakes"), "handshakes", &floor)
    }
}

/// Relay tokens as JSON: base64 of their encoding, by relay.
mod tokens {
    use super::{BTreeMap, RelayId, Signed};
    use data_encoding::BASE64;
    use prost::Message as _;
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    pub(super) fn serialize<S: Serializer>(
        tokens: &BTreeMap<RelayId, Signed>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_map(tokens.iter().map(|(relay, t)| (relay, BASE64.encode(&t.encode_to_vec()))))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<BTreeMap<RelayId, Signed>, D::Error> {
        let texts = BTreeMap::<RelayId, String>::deserialize(deserializer)?;
        let decode = |(relay, text): (RelayId, String)| {
            let bytes = BASE64.decode(text.as_bytes()).map_err(D::Error::custom)?;
            Ok((relay, Signed::decode(bytes.as_slice()).map_err(D::Error::custom)?))
        };
        texts.into_iter().map(decode).collect()
    }
}

fn make_private(path: &Path) -> Result<(), Problem> {
    match DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => {
            if let Some(parent) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
                sync_dir(parent)?;
            }
            return Ok(());
        }
        Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
        Err(e) if e.kind() == ErrorKind::NotFound => {
            DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|e| access(path, &e))?;
            return Ok(());
        }
        Err(e) => return Err(access(path, &e)),
    }
    let meta = fs::metadata(path).map_err(|e| access(path, &e))?;
    if !meta.is_dir() {
        return Err(Problem::usage(
            "state-not-a-directory",
            format!("`{}` is not a directory", path.display()),
            "give an own directory with --state-dir",
        ));
    }
    if meta.mode() & 0o077 == 0 {
        return Ok(());
    }
    // Others can look in. Close it if it is ours or empty; a shared directory such as /tmp is left as it is.
    let empty = fs::read_dir(path).map_err(|e| access(path, &e))?.next().is_none();
    if empty || path.join("lock").exists() {
        return fs::set_permissions(path, fs::Permissions::from_mode(0o700)).map_err(|e| access(path, &e));
    }
    Err(Problem::usage(
        "state-not-private",
        format!("`{}` is open to other users and holds other files", path.display()),
        "give --state-dir a directory of its own; it is made with mode 0700 if it is missing",
    ))
}

fn load(path: &Path, kind: &str) -> Result<Option<Zeroizing<Vec<u8>>>, Problem> {
    let meta = match fs::metadata(path) {
        Ok(meta) => meta,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(access(path, &e)),
    };
    if meta.len() > MAX_FILE {
        return Err(damaged(path, "it is longer than any state file"));
    }
    let bytes = Zeroizing::new(fs::read(path).map_err(|e| access(path, &e))?);
    let line = bytes.iter().position(|b| *b == b'\n').ok_or_else(|| damaged(path, "it has no first line"))?;
    let body = Zeroizing::new(bytes[line + 1..].to_vec());
    if bytes[..line] != *header(kind, &body).as_bytes() {
        return Err(damaged(path, "its first line does not match its contents"));
    }
    Ok(Some(body))
}

fn save(path: &Path, kind: &str, body: &[u8]) -> Result<(), Problem> {
    let temporary = path.with_extension("new");
    let written = write_synced(&temporary, header(kind, body).as_bytes(), body)
        .and_then(|()| fs::rename(&temporary, path));
    if let Err(e) = written {
        // Best effort: the next save overwrites it anyway.
        let _ = fs::remove_file(&temporary);
        return Err(access(path, &e));
    }
    path.parent().map_or(Ok(()), sync_dir)
}

fn write_synced(path: &Path, header: &[u8], body: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(path)?;
    file.write_all(header)?;
    file.write_all(b"\n")?;
    file.write_all(body)?;
    file.sync_all()
}

fn sync_dir(path: &Path) -> Result<(), Problem> {
    File::open(path).and_then(|dir| dir.sync_all()).map_err(|e| access(path, &e))
}

fn header(kind: &str, body: &[u8]) -> String {
    format!("{MAGIC} {kind} sha256:{}", data_encoding::HEXLOWER.encode(&Sha256::digest(body)))
}

fn load_json<T: DeserializeOwned>(path: &Path, kind: &str) -> Result<Option<T>, Problem> {
    let Some(body) = load(path, kind)? else { return Ok(None) };
    serde_json::from_slice(&body).map(Some).map_err(|e| damaged(path, &e.to_string()))
}

fn save_json<T: Serialize>(path: &Path, kind: &str, value: &T) -> Result<(), Problem> {
    let mut body = serde_json::to_vec_pretty(value).map_err(|e| access(path, &e.into()))?;
    body.push(b'\n');
    save(path, kind, &body)
}

fn damaged(path: &Path, why: &str) -> Problem {
    let fix = match path.file_name().and_then(|name| name.to_str()) {
        Some("settings") => {
            "put it back from a backup; or move it away and run `warren up` with an auth key of the same network, where this device keeps its keys and its place"
        }
        Some("journal") => {
            "put it back from a backup; or move it away, and if the agent was killed before, restart the machine: that undoes what the file notes (nftables table `warren`, rules and routes of table 30561)"
        }
        Some("netmap") => {
            "put it back from a backup; or move it away: the coordinator then sends a new one, and until then nothing is allowed"
        }
        Some("handshakes") => {
            "put it back from a backup; or move it away: peers refuse this device only if its clock was set back meanwhile"
        }
        _ => "put it back from a backup; or move the state directory away and join again with a new auth key",
    };
    let text = format!("the state file `{}` is damaged: {why}", path.display());
    Problem::new("state-damaged", text, format!("{fix} (nothing was overwritten)"))
}

fn access(path: &Path, error: &io::Error) -> Problem {
    let path = path.display();
    match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Problem::new(
            "disk-full",
            format!("there is no space left to write `{path}`"),
            "free some space; the agent keeps its last state and tries again",
        ),
        ErrorKind::PermissionDenied => Problem::new(
            "state-permission",
            format!("no permission for `{path}`"),
            "run warrend as root, or give --state-dir a directory that belongs to its user",
        ),
        ErrorKind::ReadOnlyFilesystem => Problem::new(
            "state-read-only",
            format!("`{path}` is on a read-only file system"),
            "give --state-dir a writable directory",
        ),
        _ => Problem::new(
            "state-io",
            format!("`{path}`: {}", io_text(error)),
            "check the path and the disk that it is on",
        ),
    }
}

#[cfg(test)]
mod tests;
