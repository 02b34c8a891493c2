//! How each command is decided.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use rand_core::{CryptoRng, RngCore};
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;
use warren_common::auth_key::{AuthKey, AuthKeySecret};
use warren_common::endpoint::is_endpoint;
use warren_common::ids::{AuthKeyId, DeviceId, RelayId, UserId};
use warren_common::keys::ControlPublicKey;
use warren_common::netmap;
use warren_common::time::UnixTime;
use warren_common::wire::relay_control::{MAX_ADDRS, RelayJoinKey, RelayJoinSecret};

use super::address::{REST, free_ipv4, free_ipv6};
use super::command::{Command, EnrollRequest, NewAuthKey, Refusal, Reply};
use super::entity::{
    AuthKeyRecord, Device, DeviceState, Generation, PolicyRecord, PolicySource, RelayOffer, RelayRecord,
    Settings, User,
};
use super::name::{MAX_NAME, sanitise_hostname, unique_name, valid_email, valid_tag};
use super::{Change, State};

/// Most devices of a network: what one coordinator process is built for, and what bounds every scan over them.
pub const MAX_DEVICES: usize = 100_000;
/// Most users, for the same reason.
pub const MAX_USERS: usize = 100_000;
/// Most auth keys kept at a time, used and expired ones included.
pub const MAX_AUTH_KEYS: usize = 100_000;
/// Most relays: what a netmap may hold beside peer relays.
pub const MAX_RELAYS: usize = netmap::MAX_RELAYS - netmap::MAX_PEER_RELAYS;
/// Most devices whose offer to relay is kept: what bounds every scan over them.
pub const MAX_RELAY_OFFERS: usize = 256;
/// Most tags of one auth key or device.
pub const MAX_TAGS: usize = 64;
/// Most subnets one device may offer.
pub const MAX_ROUTES: usize = 256;
/// Longest fact text (operating system, version) kept, in bytes; longer ones are cut.
pub(super) const MAX_FACT: usize = 64;
/// How long an auth key admits unless told otherwise.
pub const DEFAULT_AUTH_KEY_LIFE: Duration = Duration::from_secs(24 * 3_600);
/// The longest life an auth key may have: a year.
pub const MAX_AUTH_KEY_LIFE: Duration = Duration::from_secs(365 * 24 * 3_600);
/// How long an ephemeral device may be offline before it is removed.
pub const EPHEMERAL_OFFLINE: Duration = Duration::from_secs(30 * 60);
/// How long an auth key's record outlives the key, so that its late user hears "used" or "expired", not "invalid".
pub(super) const AUTH_KEY_MEMORY: Duration = Duration::from_secs(7 * 24 * 3_600);
/// How many revision numbers are reserved at a time: one write for some hundred pushes, and 2^54 restarts left.
pub const REVISION_BLOCK: u64 = 1_024;

pub(super) type Decision = Result<(Vec<Change>, Reply), Refusal>;

impl State {
    /// Decides what `command` changes. Touches nothing: [`State::absorb`] carries the changes out, in order.
    ///
    /// # Errors
    /// The reason why not, with its fix. A refusal for [`Refusal::CopiedState`] comes with changes of its own:
    /// see [`State::flag_copied`].
    pub fn apply(&self, command: &Command, now: UnixTime, rng: &mut (impl RngCore + CryptoRng)) -> Decision {
        match command {
            Command::CreateAuthKey(new) => self.create_auth_key(new, now, rng),
            Command::RevokeAuthKey(id) => {
                let key = self.auth_keys.get(id).ok_or_else(|| not_found("auth key", id))?;
                done(vec![Change::RemoveAuthKey(key.id)])
            }
            Command::CreateApiToken(new) => self.create_api_token(new, now, rng),
            Command::RevokeApiToken(id) => self.revoke_api_token(*id),
            Command::Enroll(request) => self.enroll(request, now, rng),
            Command::Resume { device, control, generation, version } => {
                self.resume(*device, control, *generation, version, rng)
            }
            Command::ConfirmGeneration { device, generation } => self.confirm(*device, *generation),
            Command::Report { device, home_relay, routes, relay } => {
                let mut device = self.device(*device).ok_or(Refusal::UnknownDevice)?.clone();
                let routes: BTreeSet<_> = routes.iter().map(ipnet::IpNet::trunc).take(MAX_ROUTES).collect();
                device.home_relay = home_relay.filter(|id| self.relays.contains_key(id));
                device.routes = routes.into_iter().collect();
                device.relay = self.acceptable_offer(&device, relay.as_ref());
                done(self.changed(device))
            }
            Command::RemoveDevice(id) => {
                let device = self.device(*id).ok_or_else(|| not_found("device", id))?;
                done(remove_device(device, now))
            }
            Command::ApproveDevice(id) => self.edit_device(*id, |d| d.approved = true),
            Command::ExpireDevice(id) => self.edit_device(*id, |d| d.expired = true),
            Command::CreateUser(email) => {
                let email = email.to_lowercase();
                if self.user_by_email(&email).is_some() {
                    return Err(Refusal::Exists { what: "user", name: email });
                }
                done(vec![Change::PutUser(self.new_user(email, now, rng)?)])
            }
            Command::SuspendUser { user, suspended } => {
                let user = self.users.get(user).ok_or_else(|| not_found("user", user))?;
                done(vec![Change::PutUser(User { suspended: *suspended, ..user.clone() })])
            }
            Command::RemoveUser(id) => self.remove_user(*id, now),
            Command::CreateRelay(name) => self.create_relay(name, now, rng),
            Command::JoinRelay { relay, control, secret } => self.join_relay(*relay, *control, *secret),
            Command::ReportRelay { relay, control, addrs, stun, cert_sha256 } => {
                let old = self.relays.get(relay).filter(|r| r.control == Some(*control));
                let new = RelayRecord {
                    addrs: addrs.clone(),
                    stun: stun.clone(),
                    cert_sha256: Some(*cert_sha256),
                    ..old.ok_or(Refusal::JoinKeyInvalid)?.clone()
                };
                done(self.changed_relay(new))
            }
            Command::SetEmbeddedRelay { name, addrs, stun, cert_sha256 } => {
                let old = self.relays.values().find(|r| r.embedded);
                let id = old.map_or_else(|| RelayId::generate(now.as_millis(), rng), |r| r.id);
                let taken = |n: &str| self.relays.values().any(|r| r.name == n && r.id != id);
                done(self.changed_relay(RelayRecord {
                    id,
                    name: unique_name(name, taken),
                    embedded: true,
                    join_hash: None,
                    control: None,
                    addrs: addrs.clone(),
                    stun: stun.clone(),
                    cert_sha256: Some(*cert_sha256),
                    created: old.map_or(now, |r| r.created),
                }))
            }
            Command::RemoveRelay(id) => {
                let relay = self.relays.get(id).ok_or_else(|| not_found("relay", id))?;
                done(vec![Change::RemoveRelay(relay.id)])
            }
            Command::SetPolicy { source, text } => self.set_policy(source, text, now),
            Command::EditPolicy { text, expected } => match self.policy.as_ref().map(|p| p.sha256) {
                held if held == *expected => self.set_policy(&PolicySource::Api, text, now),
                _ => Err(Refusal::PolicyChanged),
            },
            Command::ReserveRevisions => {
                let settings = Settings {
                    revisions_reserved: self.settings.revisions_reserved + REVISION_BLOCK,
                    ..self.settings.clone()
                };
                done(vec![Change::PutSettings(Box::new(settings))])
            }
            Command::Sweep => done(self.sweep(now)),
        }
    }

    /// The change that goes with a [`Refusal::CopiedState`]: the device must enrol again.
    pub fn flag_copied(&self, device: DeviceId) -> Vec<Change> {
        let flagged = self.device(device).map(|d| Device { copied: true, ..d.clone() });
        flagged.map_or_else(Vec::new, |d| self.changed(d))
    }

    fn changed(&self, device: Device) -> Vec<Change> {
        if self.device(device.id) == Some(&device) {
            vec![]
        } else {
            vec![Change::PutDevice(Box::new(device))]
        }
    }

    fn edit_device(&self, id: DeviceId, edit: impl FnOnce(&mut Device)) -> Decision {
        let mut device = self.device(id).ok_or_else(|| not_found("device", &id))?.clone();
        edit(&mut device);
        done(self.changed(device))
    }

    fn new_user(&self, email: String, now: UnixTime, rng: &mut impl RngCore) -> Result<User, Refusal> {
        if !valid_email(&email) {
            let why = "expected an e-mail address such as ann@example.com";
            return Err(Refusal::Invalid { what: "user", text: email, why });
        }
        if self.users.len() >= MAX_USERS {
            return Err(Refusal::TooMany { what: "users", max: MAX_USERS });
        }
        Ok(User { id: UserId::generate(now.as_millis(), rng), email, suspended: false, created: now })
    }

    fn create_auth_key(
        &self,
        new: &NewAuthKey,
        now: UnixTime,
        rng: &mut (impl RngCore + CryptoRng),
    ) -> Decision {
        let tags: BTreeSet<&String> = new.tags.iter().collect();
        if let Some(bad) = tags.iter().find(|t| !valid_tag(t)) {
            let why = "expected `tag:` and a name of lower-case letters, digits and dashes";
            return Err(Refusal::Invalid { what: "tag", text: (*bad).clone(), why });
        }
        if tags.len() > MAX_TAGS {
            return Err(Refusal::TooMany { what: "tags", max: MAX_TAGS });
        }
        let life = new.life.unwrap_or(DEFAULT_AUTH_KEY_LIFE);
        if life.is_zero() || life > MAX_AUTH_KEY_LIFE {
            let why = "an auth key lives between 1 second and 365 days";
            return Err(Refusal::Invalid { what: "life", text: format!("{}s", life.as_secs()), why });
        }
        if self.auth_keys.len() >= MAX_AUTH_KEYS {
            return Err(Refusal::TooMany { what: "auth keys", max: MAX_AUTH_KEYS });
        }
        let mut changes = Vec::new();
        let user = match &new.user {
            None => None,
            Some(_) if !tags.is_empty() => {
                let why = "a device has tags or a user, not both";
                return Err(Refusal::Invalid { what: "auth key", text: "--tag with --user".into(), why });
            }
            Some(email) => {
                let email = email.to_lowercase();
                if let Some(user) = self.user_by_email(&email) {
                    Some(user.id)
                } else {
                    let user = self.new_user(email, now, rng)?;
                    let id = user.id;
                    changes.push(Change::PutUser(user));
                    Some(id)
                }
            }
        };
        let key = AuthKey {
            network: self.settings.network,
            root: self.settings.root,
            id: AuthKeyId::generate(now.as_millis(), rng),
            secret: AuthKeySecret::generate(rng),
        };
        changes.push(Change::PutAuthKey(Box::new(AuthKeyRecord {
            id: key.id,
            hash: key.secret.hash(),
            tags: tags.into_iter().cloned().collect(),
            user,
            reusable: new.reusable,
            ephemeral: new.ephemeral,
            created: now,
            expires: now + life,
            used_by: None,
        })));
        Ok((changes, Reply::AuthKey(key)))
    }

    fn enroll(&self, request: &EnrollRequest, now: UnixTime, rng: &mut impl RngCore) -> Decision {
        let given = &request.auth_key;
        let key = self.auth_keys.get(&given.id).filter(|_| given.network == self.settings.network);
        // The hash is compared even for an unknown id, so that time doesn't tell which ids exist.
        let stored = key.map_or([0; 32], |k| k.hash);
        let right = bool::from(given.secret.hash().ct_eq(&stored));
        let key = key.filter(|_| right).ok_or(Refusal::AuthKeyInvalid)?;

        let known = self.device_by_control(&request.control);
        if let Some(device) = known.filter(|d| key.used_by == Some(d.id)) {
            // Its first reply was lost, or it can't have persisted it: answer again, burn nothing.
            return if device.generation.confirmed {
                Err(Refusal::AuthKeyUsed)
            } else {
                Ok((vec![], Reply::Admitted { device: device.id, generation: device.generation.current }))
            };
        }
        if !key.reusable && key.used_by.is_some() {
            return Err(Refusal::AuthKeyUsed);
        }
        if now >= key.expires {
            return Err(Refusal::AuthKeyExpired(key.expires));
        }
        if key.user.is_some_and(|id| self.users.get(&id).is_none_or(|u| u.suspended)) {
            return Err(Refusal::NotAdmitted("the key's user is suspended"));
        }

        let mut changes = Vec::new();
        let base = match known {
            Some(device) => device.clone(),
            None => self.new_device(request, now, rng)?,
        };
        let device = Device {
            wg: request.wg,
            probe: request.probe,
            user: key.user,
            tags: key.tags.clone(),
            ephemeral: key.ephemeral,
            approved: true,
            expired: false,
            copied: false,
            generation: Generation { current: nonzero(rng), pending: None, confirmed: false },
            auth_key: key.id,
            os: cut(&request.os),
            version: cut(&request.version),
            ..base
        };
        if self.devices.values().any(|d| d.id != device.id && (d.wg == device.wg || d.probe == device.probe))
        {
            let why = "another device has it";
            return Err(Refusal::Invalid { what: "key", text: device.wg.to_string(), why });
        }
        if !key.reusable {
            changes.push(Change::PutAuthKey(Box::new(AuthKeyRecord {
                used_by: Some(device.id),
                ..key.clone()
            })));
        }
        let reply = Reply::Admitted { device: device.id, generation: device.generation.current };
        changes.push(Change::PutDevice(Box::new(device)));
        Ok((changes, reply))
    }

    fn new_device(
        &self,
        request: &EnrollRequest,
        now: UnixTime,
        rng: &mut impl RngCore,
    ) -> Result<Device, Refusal> {
        if self.devices.len() >= MAX_DEVICES {
            return Err(Refusal::TooMany { what: "devices", max: MAX_DEVICES });
        }
        let used = |addr: IpAddr| {
            self.by_addr.contains_key(&addr) || self.resting.get(&addr).is_some_and(|until| now < *until)
        };
        let (pool, prefix) = (self.settings.ipv4, self.settings.ipv6);
        let ipv4 = free_ipv4(pool, |a| used(a.into()), rng)
            .ok_or_else(|| Refusal::PoolExhausted(pool.to_string()))?;
        let ipv6 = free_ipv6(prefix, |a| used(a.into()), rng)
            .ok_or_else(|| Refusal::PoolExhausted(prefix.to_string()))?;
        let hostname = sanitise_hostname(&request.hostname);
        Ok(Device {
            id: DeviceId::generate(now.as_millis(), rng),
            control: request.control,
            wg: request.wg,
            probe: request.probe,
            name: unique_name(&hostname, |n| self.by_name.contains_key(n)),
            hostname,
            ipv4,
            ipv6,
            user: None,
            tags: Vec::new(),
            ephemeral: false,
            approved: false,
            expired: false,
            copied: false,
            generation: Generation { current: 0, pending: None, confirmed: false },
            auth_key: request.auth_key.id,
            os: String::new(),
            version: String::new(),
            created: now,
            home_relay: None,
            routes: Vec::new(),
            relay: None,
        })
    }

    fn resume(
        &self,
        id: DeviceId,
        control: &ControlPublicKey,
        generation: u64,
        version: &str,
        rng: &mut impl RngCore,
    ) -> Decision {
        let device = self.device(id).filter(|d| d.control == *control).ok_or(Refusal::UnknownDevice)?;
        match self.device_state(device) {
            DeviceState::Active => {}
            DeviceState::NeedsLogin => return Err(Refusal::CopiedState { device: id }),
            DeviceState::Expired => return Err(Refusal::NeedsLogin("expired")),
            DeviceState::AwaitsApproval => {
                return Err(Refusal::NotAdmitted("it waits for an administrator's approval"));
            }
            DeviceState::Suspended => return Err(Refusal::NotAdmitted("its user is suspended")),
        }
        let live = device.generation;
        if generation != live.current && Some(generation) != live.pending {
            return Err(Refusal::CopiedState { device: id });
        }
        let pending = nonzero(rng);
        let device = Device {
            generation: Generation { current: generation, pending: Some(pending), confirmed: true },
            version: cut(version),
            ..device.clone()
        };
        Ok((vec![Change::PutDevice(Box::new(device))], Reply::Admitted { device: id, generation: pending }))
    }

    fn confirm(&self, id: DeviceId, generation: u64) -> Decision {
        let device = self.device(id).ok_or(Refusal::UnknownDevice)?;
        let live = device.generation;
        if live.current != generation && live.pending != Some(generation) {
            return Err(Refusal::CopiedState { device: id });
        }
        let generation = Generation { current: generation, pending: None, confirmed: true };
        done(self.changed(Device { generation, ..device.clone() }))
    }

    fn remove_user(&self, id: UserId, now: UnixTime) -> Decision {
        let user = self.users.get(&id).ok_or_else(|| not_found("user", &id))?;
        let mut changes: Vec<Change> = self
            .devices
            .values()
            .filter(|d| d.user == Some(id))
            .flat_map(|d| remove_device(d, now))
            .collect();
        let keys = self.auth_keys.values().filter(|k| k.user == Some(id));
        changes.extend(keys.map(|k| Change::RemoveAuthKey(k.id)));
        changes.push(Change::RemoveUser(user.id));
        done(changes)
    }

    fn create_relay(&self, name: &str, now: UnixTime, rng: &mut (impl RngCore + CryptoRng)) -> Decision {
        if name.is_empty() || name.len() > MAX_NAME || sanitise_hostname(name) != name {
            let why = "expected lower-case letters, digits and dashes, at most 63";
            return Err(Refusal::Invalid { what: "relay name", text: name.to_owned(), why });
        }
        if self.relays.values().any(|r| r.name == name) {
            return Err(Refusal::Exists { what: "relay", name: name.to_owned() });
        }
        if self.relays.len() >= MAX_RELAYS {
            return Err(Refusal::TooMany { what: "relays", max: MAX_RELAYS });
        }
        let id = RelayId::generate(now.as_millis(), rng);
        let secret = RelayJoinSecret::generate(rng);
        let relay = RelayRecord {
            id,
            name: name.to_owned(),
            embedded: false,
            join_hash: Some(secret.hash()),
            control: None,
            addrs: Vec::new(),
            stun: Vec::new(),
            cert_sha256: None,
            created: now,
        };
        let Settings { network, root, .. } = self.settings;
        let join_key = RelayJoinKey { network, root, relay: id, secret }.expose();
        Ok((vec![Change::PutRelay(Box::new(relay))], Reply::Relay { id, join_key }))
    }

    fn join_relay(&self, id: RelayId, control: ControlPublicKey, secret: Option<[u8; 32]>) -> Decision {
        let relay = self.relays.get(&id).filter(|r| !r.embedded).ok_or(Refusal::JoinKeyInvalid)?;
        let right = match (&relay.join_hash, secret) {
            (Some(stored), Some(given)) => bool::from(stored.ct_eq(&given)),
            _ => false,
        };
        let reply = Reply::Joined { name: relay.name.clone() };
        match relay.control {
            // Its own key is enough, also when it repeats the secret after a lost reply.
            Some(bound) if bound == control => Ok((vec![], reply)),
            None if right => {
                let joined = RelayRecord { control: Some(control), ..relay.clone() };
                Ok((self.changed_relay(joined), reply))
            }
            _ => Err(Refusal::JoinKeyInvalid),
        }
    }

    fn changed_relay(&self, relay: RelayRecord) -> Vec<Change> {
        if self.relays.get(&relay.id) == Some(&relay) {
            vec![]
        } else {
            vec![Change::PutRelay(Box::new(relay))]
        }
    }

    fn set_policy(&self, source: &PolicySource, text: &str, now: UnixTime) -> Decision {
        let sha256: [u8; 32] = Sha256::digest(text.as_bytes()).into();
        if let Some(old) = self.policy.as_ref().filter(|p| p.sha256 == sha256) {
            let moved = PolicyRecord { source: source.clone(), ..old.clone() };
            let changes = if moved == *old { vec![] } else { vec![Change::PutPolicy(Box::new(moved))] };
            return Ok((changes, Reply::Policy { revision: old.revision }));
        }
        let name = match source {
            PolicySource::File(path) => path,
            PolicySource::Git(commit) => &commit.path,
            PolicySource::Api => "policy",
        };
        super::reach::check(self, name, text, now).map_err(Refusal::PolicyInvalid)?;
        let revision = self.policy.as_ref().map_or(1, |p| p.revision + 1);
        let record =
            PolicyRecord { text: text.to_owned(), sha256, revision, applied: now, source: source.clone() };
        Ok((vec![Change::PutPolicy(Box::new(record))], Reply::Policy { revision }))
    }

    /// What is kept of an offer: addresses that others may be sent to, unless so many devices offer already.
    fn acceptable_offer(&self, device: &Device, offer: Option<&RelayOffer>) -> Option<RelayOffer> {
        let overlay = Some((self.settings.ipv4, self.settings.ipv6));
        let fine = |addr: &&SocketAddr| is_endpoint(overlay, **addr);
        let addrs: Vec<_> = offer?.addrs.iter().filter(fine).take(MAX_ADDRS).copied().collect();
        let offered = || self.devices.values().filter(|d| d.relay.is_some()).count();
        let room = device.relay.is_some() || offered() < MAX_RELAY_OFFERS;
        (room && !addrs.is_empty()).then_some(RelayOffer { addrs, cert_sha256: offer?.cert_sha256 })
    }

    fn sweep(&self, now: UnixTime) -> Vec<Change> {
        let rested = self.resting.iter().filter(|(_, until)| now >= **until);
        let keys = self.auth_keys.values().filter(|k| now >= k.expires + AUTH_KEY_MEMORY);
        rested
            .map(|(a, _)| Change::EndRest(*a))
            .chain(keys.map(|k| Change::RemoveAuthKey(k.id)))
            .chain(self.old_api_tokens(now))
            .collect()
    }
}

pub(super) fn done(changes: Vec<Change>) -> Decision {
    Ok((changes, Reply::Done))
}

pub(super) fn not_found(what: &'static str, name: &dyn std::fmt::Display) -> Refusal {
    Refusal::NotFound { what, name: name.to_string() }
}

fn remove_device(device: &Device, now: UnixTime) -> Vec<Change> {
    let rests = device.addrs().map(|a| Change::Rest(a, now + REST));
    std::iter::once(Change::RemoveDevice(device.id)).chain(rests).collect()
}

/// A generation: random and not 0, which agents send when they have none.
fn nonzero(rng: &mut impl RngCore) -> u64 {
    rng.next_u64().max(1)
}

fn cut(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(MAX_FACT / 4).collect()
}
