//! The coordinator's domain, pure: what is in the network, and what each command changes.
//!
//! [`State::apply`] decides: a command becomes a list of [`Change`]s or a [`Refusal`], and nothing is touched.
//! [`State::absorb`] carries one change out and returns its inverse, so that a shell can try a batch, persist it in one
//! transaction and take it back whole when the store refuses. Loading from a store is absorbing rows. Time and
//! randomness are arguments; the same inputs give the same outputs.

mod address;
mod apply;
mod command;
mod entity;
mod name;
mod peer_relay;
pub mod reach;
pub mod records;
mod token;

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use warren_common::ids::{ApiTokenId, AuthKeyId, DeviceId, RelayId, UserId};
use warren_common::keys::ControlPublicKey;
use warren_common::time::UnixTime;

pub use address::{RESERVED_V4, REST, derive_ipv6_prefix, free_ipv4, free_ipv6};
pub use apply::{
    DEFAULT_AUTH_KEY_LIFE, EPHEMERAL_OFFLINE, MAX_AUTH_KEY_LIFE, MAX_AUTH_KEYS, MAX_DEVICES,
    MAX_RELAY_OFFERS, MAX_RELAYS, MAX_ROUTES, MAX_TAGS, MAX_USERS, REVISION_BLOCK,
};
pub use command::{Command, EnrollRequest, NewAuthKey, Refusal, Reply};
pub use entity::{
    AuthKeyRecord, Device, DeviceState, Generation, GitCommit, PolicyRecord, PolicySource, RelayOffer,
    RelayRecord, Settings, User,
};
pub use name::{MAX_NAME, sanitise_hostname, valid_email, valid_tag};
pub use peer_relay::{PeerRelays, RelayDifference};
pub use token::{
    API_TOKEN_PREFIX, ApiToken, ApiTokenRecord, DEFAULT_API_TOKEN_LIFE, MAX_API_TOKEN_LIFE, MAX_API_TOKENS,
    NewApiToken, ParseApiTokenError,
};

/// One row of the network's state that is put or removed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    /// The network's settings.
    PutSettings(Box<Settings>),
    /// A device, new or changed.
    PutDevice(Box<Device>),
    /// A device is gone.
    RemoveDevice(DeviceId),
    /// A user, new or changed.
    PutUser(User),
    /// A user is gone.
    RemoveUser(UserId),
    /// An auth key, new or used.
    PutAuthKey(Box<AuthKeyRecord>),
    /// An auth key is gone.
    RemoveAuthKey(AuthKeyId),
    /// A new token of the HTTP API.
    PutApiToken(Box<ApiTokenRecord>),
    /// A token of the HTTP API is gone.
    RemoveApiToken(ApiTokenId),
    /// A relay, new or changed.
    PutRelay(Box<RelayRecord>),
    /// A relay is gone.
    RemoveRelay(RelayId),
    /// The policy in force.
    PutPolicy(Box<PolicyRecord>),
    /// There is no policy (only the inverse of the first `PutPolicy`; no command removes a policy).
    RemovePolicy,
    /// An address rests until the time given.
    Rest(IpAddr, UnixTime),
    /// An address may be used again.
    EndRest(IpAddr),
}

/// Everything that is persisted about one network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    settings: Settings,
    devices: BTreeMap<DeviceId, Device>,
    users: BTreeMap<UserId, User>,
    auth_keys: BTreeMap<AuthKeyId, AuthKeyRecord>,
    api_tokens: BTreeMap<ApiTokenId, ApiTokenRecord>,
    relays: BTreeMap<RelayId, RelayRecord>,
    policy: Option<PolicyRecord>,
    resting: BTreeMap<IpAddr, UnixTime>,
    // Indexes, derived from the rows above.
    by_control: BTreeMap<ControlPublicKey, DeviceId>,
    by_name: BTreeMap<String, DeviceId>,
    by_addr: BTreeMap<IpAddr, DeviceId>,
    by_email: BTreeMap<String, UserId>,
}

impl State {
    /// A network with these settings and nothing in it.
    pub fn new(settings: Settings) -> Self {
        Self {
            settings,
            devices: BTreeMap::new(),
            users: BTreeMap::new(),
            auth_keys: BTreeMap::new(),
            api_tokens: BTreeMap::new(),
            relays: BTreeMap::new(),
            policy: None,
            resting: BTreeMap::new(),
            by_control: BTreeMap::new(),
            by_name: BTreeMap::new(),
            by_addr: BTreeMap::new(),
            by_email: BTreeMap::new(),
        }
    }

    /// The network's settings.
    pub const fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Devices by id.
    pub const fn devices(&self) -> &BTreeMap<DeviceId, Device> {
        &self.devices
    }

    /// Users by id.
    pub const fn users(&self) -> &BTreeMap<UserId, User> {
        &self.users
    }

    /// Auth keys by id; secrets are hashes.
    pub const fn auth_keys(&self) -> &BTreeMap<AuthKeyId, AuthKeyRecord> {
        &self.auth_keys
    }

    /// Tokens of the HTTP API by id; secrets are hashes.
    pub const fn api_tokens(&self) -> &BTreeMap<ApiTokenId, ApiTokenRecord> {
        &self.api_tokens
    }

    /// Relays by id.
    pub const fn relays(&self) -> &BTreeMap<RelayId, RelayRecord> {
        &self.relays
    }

    /// The policy in force; `None` until one was accepted, and then nothing is allowed.
    pub const fn policy(&self) -> Option<&PolicyRecord> {
        self.policy.as_ref()
    }

    /// Addresses of removed devices and until when they rest.
    pub const fn resting(&self) -> &BTreeMap<IpAddr, UnixTime> {
        &self.resting
    }

    /// The device with this id.
    pub fn device(&self, id: DeviceId) -> Option<&Device> {
        self.devices.get(&id)
    }

    /// The device with this control key.
    pub fn device_by_control(&self, key: &ControlPublicKey) -> Option<&Device> {
        self.by_control.get(key).and_then(|id| self.devices.get(id))
    }

    /// The device with this name or id, as people type it.
    pub fn device_by_text(&self, text: &str) -> Option<&Device> {
        let id = text.parse().ok().or_else(|| self.by_name.get(text).copied())?;
        self.devices.get(&id)
    }

    /// The device with this overlay address.
    pub fn device_by_addr(&self, addr: IpAddr) -> Option<&Device> {
        self.by_addr.get(&addr).and_then(|id| self.devices.get(id))
    }

    /// The user with this e-mail address.
    pub fn user_by_email(&self, email: &str) -> Option<&User> {
        self.by_email.get(email).and_then(|id| self.users.get(id))
    }

    /// What stands between the device and the network, if anything does.
    pub fn device_state(&self, device: &Device) -> DeviceState {
        let suspended = device.user.and_then(|id| self.users.get(&id)).is_some_and(|u| u.suspended);
        match () {
            () if device.copied => DeviceState::NeedsLogin,
            () if device.expired => DeviceState::Expired,
            () if !device.approved => DeviceState::AwaitsApproval,
            () if suspended => DeviceState::Suspended,
            () => DeviceState::Active,
        }
    }

    /// Carries out one change and returns the change that takes it back.
    pub fn absorb(&mut self, change: Change) -> Change {
        match change {
            Change::PutSettings(new) => {
                Change::PutSettings(Box::new(std::mem::replace(&mut self.settings, *new)))
            }
            Change::PutDevice(new) => {
                let id = new.id;
                let old = self.take_device(id);
                self.index_device(&new);
                self.devices.insert(id, *new);
                old.map_or(Change::RemoveDevice(id), |d| Change::PutDevice(Box::new(d)))
            }
            Change::RemoveDevice(id) => {
                self.take_device(id).map_or(Change::RemoveDevice(id), |old| Change::PutDevice(Box::new(old)))
            }
            Change::PutUser(new) => {
                let id = new.id;
                let old = self.take_user(id);
                self.by_email.insert(new.email.clone(), id);
                self.users.insert(id, new);
                old.map_or(Change::RemoveUser(id), Change::PutUser)
            }
            Change::RemoveUser(id) => self.take_user(id).map_or(Change::RemoveUser(id), Change::PutUser),
            Change::PutAuthKey(new) => {
                let id = new.id;
                let old = self.auth_keys.insert(id, *new);
                old.map_or(Change::RemoveAuthKey(id), |k| Change::PutAuthKey(Box::new(k)))
            }
            Change::RemoveAuthKey(id) => self
                .auth_keys
                .remove(&id)
                .map_or(Change::RemoveAuthKey(id), |k| Change::PutAuthKey(Box::new(k))),
            Change::PutApiToken(new) => {
                let id = new.id;
                let old = self.api_tokens.insert(id, *new);
                old.map_or(Change::RemoveApiToken(id), |t| Change::PutApiToken(Box::new(t)))
            }
            Change::RemoveApiToken(id) => self
                .api_tokens
                .remove(&id)
                .map_or(Change::RemoveApiToken(id), |t| Change::PutApiToken(Box::new(t))),
            Change::PutRelay(new) => {
                let id = new.id;
                let old = self.relays.insert(id, *new);
                old.map_or(Change::RemoveRelay(id), |r| Change::PutRelay(Box::new(r)))
            }
            Change::RemoveRelay(id) => {
                self.relays.remove(&id).map_or(Change::RemoveRelay(id), |r| Change::PutRelay(Box::new(r)))
            }
            Change::PutPolicy(new) => {
                self.policy.replace(*new).map_or(Change::RemovePolicy, |p| Change::PutPolicy(Box::new(p)))
            }
            Change::RemovePolicy => {
                self.policy.take().map_or(Change::RemovePolicy, |p| Change::PutPolicy(Box::new(p)))
            }
            Change::Rest(addr, until) => self
                .resting
                .insert(addr, until)
                .map_or(Change::EndRest(addr), |until| Change::Rest(addr, until)),
            Change::EndRest(addr) => {
                self.resting.remove(&addr).map_or(Change::EndRest(addr), |until| Change::Rest(addr, until))
            }
        }
    }

    fn index_device(&mut self, device: &Device) {
        self.by_control.insert(device.control, device.id);
        self.by_name.insert(device.name.clone(), device.id);
        for addr in device.addrs() {
            self.by_addr.insert(addr, device.id);
        }
    }

    fn take_device(&mut self, id: DeviceId) -> Option<Device> {
        let old = self.devices.remove(&id)?;
        self.by_control.remove(&old.control);
        self.by_name.remove(&old.name);
        for addr in old.addrs() {
            self.by_addr.remove(&addr);
        }
        Some(old)
    }

    fn take_user(&mut self, id: UserId) -> Option<User> {
        let old = self.users.remove(&id)?;
        self.by_email.remove(&old.email);
        Some(old)
    }
}

#[cfg(test)]
mod tests;
