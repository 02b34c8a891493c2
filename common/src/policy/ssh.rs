//! SSH rules: who may log in at a device, as which user.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::Serialize;
use sha2::{Digest, Sha256};

use super::compile::Compiled;
use super::inventory::User;
use super::model::{LoginUser, SshDef};
use super::nodeset::NodeSet;
use super::selector::{Autogroup, Selector};
use super::world::{Device, wide};
use crate::filter::UnixInterval;

/// What happens to a login that a rule matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum SshAction {
    /// Accepted after a fresh sign-in. Tried before `Accept`: the stricter rule wins.
    Check,
    /// Accepted.
    Accept,
}

/// One SSH rule, seen by one device. Rules are tried in order; what none matches is refused.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct SshRule {
    /// Where the rule stands: `ssh[0] line 12`.
    pub origin: String,
    /// Source addresses. A device with several tags stands once per tag.
    pub principals: Vec<IpAddr>,
    /// Login user to local user; `*` to `=` is every user but root, to "" is refused.
    pub users: BTreeMap<String, String>,
    /// Accept or check.
    pub action: SshAction,
    /// How long a sign-in counts, in seconds; 0 is every login anew.
    pub check_period_s: u64,
    /// Environment variables to pass, with `*` and `?`.
    pub accept_env: Vec<String>,
    /// When the rule is in force; `None` is always.
    pub active: Option<Vec<UnixInterval>>,
}

#[derive(Clone, Debug)]
pub(crate) struct CompiledSsh {
    pub(crate) index: usize,
    pub(crate) src: usize,
    windows: Option<Vec<UnixInterval>>,
    to_self: bool,
    /// Identities and addresses, without autogroup:self.
    dst: Vec<Selector>,
    localpart: bool,
    pub(super) print: u128,
    /// Devices of `dst`.
    pub(super) at: NodeSet,
}

impl CompiledSsh {
    pub(crate) fn new(ssh: &SshDef, src: usize, windows: Option<Vec<UnixInterval>>) -> Self {
        let is_self = |s: &Selector| *s == Selector::Auto(Autogroup::SelfDevices);
        let mut hash = Sha256::new();
        hash.update(format!("{:?}", (ssh.check, ssh.check_period_s)));
        hash.update(format!("{:?}{:?}", ssh.accept_env, windows));
        for user in &ssh.users {
            hash.update(format!("{:?}", user.value));
        }
        Self {
            index: ssh.index,
            src,
            windows,
            to_self: ssh.dst.iter().any(|d| is_self(&d.value)),
            dst: ssh.dst.iter().map(|d| d.value.clone()).filter(|s| !is_self(s)).collect(),
            localpart: ssh.users.iter().any(|u| matches!(u.value, LoginUser::Localpart(_))),
            print: wide(hash),
            at: NodeSet::new(),
        }
    }
}

/// The sources of a rule: per user, then the tagged ones.
struct Principals {
    by_user: BTreeMap<usize, Vec<IpAddr>>,
    tagged: Vec<IpAddr>,
}

impl Compiled {
    pub(crate) fn ssh_at(&self, slot: usize, device: &Device) -> Vec<SshRule> {
        let mut out = Vec::new();
        for rule in &self.ssh {
            self.ssh_rule(rule, slot, device, &mut out);
        }
        // Stable: the order of the file within an action.
        out.sort_by_key(|r: &SshRule| r.action);
        out
    }

    fn ssh_rule(&self, rule: &CompiledSsh, slot: usize, device: &Device, out: &mut Vec<SshRule>) {
        let def = &self.policy.model().ssh[rule.index];
        let nodes = &self.sources[rule.src].nodes;
        if nodes.is_empty() {
            return;
        }
        let users = base_users(def);
        let mut emit = |principals: Vec<IpAddr>, user: Option<usize>| {
            if principals.is_empty() {
                return;
            }
            let make = |users: BTreeMap<String, String>| SshRule {
                origin: format!("ssh[{}] line {}", def.index, def.line),
                principals: principals.clone(),
                users,
                action: if def.check { SshAction::Check } else { SshAction::Accept },
                check_period_s: if def.check { def.check_period_s } else { 0 },
                accept_env: def.accept_env.clone(),
                active: rule.windows.clone(),
            };
            out.push(make(users.clone()));
            let local = user.and_then(|u| localpart(def, self.world.users.get(u)?));
            if let Some(local) = local {
                out.push(make(BTreeMap::from([(local.clone(), local)])));
            }
        };
        if rule.to_self
            && let Some(user) = device.user
        {
            emit(self.of_user(nodes, user), Some(user));
        }
        if rule.at.has(slot) {
            let principals = self.principals(nodes);
            if rule.localpart {
                for (user, addrs) in principals.by_user {
                    emit(addrs, Some(user));
                }
                emit(principals.tagged, None);
            } else {
                let mut all: Vec<IpAddr> = principals.by_user.into_values().flatten().collect();
                all.extend(principals.tagged);
                emit(all, None);
            }
        } else if rule.localpart && !rule.dst.is_empty() && nodes.has(slot) {
            // A source also gets the rule for itself: its own user may log in at home.
            match device.user {
                Some(user) => emit(self.of_user(nodes, user), Some(user)),
                None if device.is_tagged() => emit(device.node.addresses().collect(), None),
                None => {}
            }
        }
    }

    fn of_user(&self, nodes: &NodeSet, user: usize) -> Vec<IpAddr> {
        let mut out: Vec<IpAddr> = self
            .world
            .of_user
            .get(user)
            .into_iter()
            .flatten()
            .filter(|slot| nodes.has(**slot))
            .filter_map(|slot| self.world.device(*slot))
            .flat_map(|d| d.node.addresses())
            .collect();
        out.sort_unstable();
        out
    }

    fn principals(&self, nodes: &NodeSet) -> Principals {
        let mut out = Principals { by_user: BTreeMap::new(), tagged: Vec::new() };
        for device in nodes.iter().filter_map(|slot| self.world.device(slot)) {
            if device.is_tagged() {
                for _ in &device.node.tags {
                    out.tagged.extend(device.node.addresses());
                }
            } else if let Some(user) = device.user {
                out.by_user.entry(user).or_default().extend(device.node.addresses());
            }
        }
        out.by_user.values_mut().for_each(|a| a.sort_unstable());
        out.tagged.sort_unstable();
        out
    }

    /// Works out where a rule lets people log in.
    pub(super) fn fill_ssh(&mut self, index: usize) {
        for slot in self.world.everyone.clone().iter() {
            self.touch_ssh(index, slot);
        }
    }

    /// Puts a device in or out of a rule's destinations, as it now is.
    pub(super) fn touch_ssh(&mut self, index: usize, slot: usize) {
        let dst = &self.ssh[index].dst;
        if self.world.device(slot).is_some_and(|d| dst.iter().any(|s| self.selects(s, d))) {
            self.ssh[index].at.insert(slot);
        } else {
            self.ssh[index].at.remove(slot);
        }
    }

    /// Logins between the devices of one user, or of a tagged device at itself.
    pub(super) fn print_own_logins(&self, slot: usize, device: &Device, hash: &mut Sha256) {
        for rule in &self.ssh {
            let nodes = &self.sources[rule.src].nodes;
            let to_self = rule.to_self && device.user.is_some();
            let at_home = rule.localpart && !rule.dst.is_empty() && nodes.has(slot) && !rule.at.has(slot);
            if !to_self && !at_home {
                continue;
            }
            hash.update(rule.print.to_be_bytes());
            hash.update([u8::from(to_self), u8::from(at_home)]);
            let own = device.user.and_then(|u| self.world.of_user.get(u)).into_iter().flatten();
            let sources = own.filter(|s| nodes.has(**s)).filter_map(|s| self.world.device(*s));
            let sum = sources.fold(device.who, |sum, d| sum.wrapping_add(d.who));
            hash.update(sum.to_be_bytes());
        }
    }
}

/// Login users without those that depend on the source's mail address. Root always stands in it: allowed or refused.
fn base_users(def: &SshDef) -> BTreeMap<String, String> {
    let has = |u: &LoginUser| def.users.iter().any(|at| at.value == *u);
    let mut users = BTreeMap::new();
    if has(&LoginUser::NonRoot) {
        users.insert("*".to_owned(), "=".to_owned());
    }
    let root = if has(&LoginUser::Root) { "root" } else { "" };
    users.insert("root".to_owned(), root.to_owned());
    for at in &def.users {
        if let LoginUser::Name(name) = &at.value {
            users.insert(name.clone(), name.clone());
        }
    }
    users
}

/// The part of the user's mail address before the @, if the rule speaks of its domain.
fn localpart(def: &SshDef, user: &User) -> Option<String> {
    let (local, domain) = user.email.as_deref()?.rsplit_once('@')?;
    def.users
        .iter()
        .any(|at| matches!(&at.value, LoginUser::Localpart(d) if d.eq_ignore_ascii_case(domain)))
        .then(|| local.to_owned())
}
