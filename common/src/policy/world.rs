//! The devices of a network with the indexes that look-ups need: by name, by address, by route, by identity.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::ops::Bound;

use ipnet::IpNet;
use sha2::{Digest, Sha256};

use super::check::internet;
use super::inventory::{Inventory, Node, User};
use super::ipset::IpSet;
use super::model::{At, Model};
use super::nodeset::NodeSet;
use super::posture::{AttrValue, Attribute};
use super::selector::{self, Autogroup, Selector};
use crate::filter::IpRange;

/// Where overlay addresses usually come from; devices outside are added one by one.
const OVERLAY: [&str; 2] = ["100.64.0.0/10", "fd7a:115c:a1e0::/48"];

/// Inside the IPv4 overlay, but used by a virtual machine on some laptops.
const NOT_OVERLAY: &str = "100.115.92.0/23";

/// A device with what is derived from it alone.
#[derive(Clone, Debug)]
pub(crate) struct Device {
    pub(crate) name: String,
    pub(crate) node: Node,
    /// Its own addresses.
    pub(crate) own: Vec<IpRange>,
    /// The networks it carries, without default routes.
    pub(crate) routes: IpSet,
    pub(crate) exit: bool,
    /// Whose it is; `None` for tagged devices.
    pub(crate) user: Option<usize>,
    /// Every address it answers for.
    pub(crate) answers: IpSet,
    /// The identities it has, sorted.
    pub(crate) identities: Vec<u32>,
    /// Of its name, addresses and routes: what other devices' rules depend on.
    pub(crate) print: u128,
    /// The same with its user and tags: what SSH rules depend on besides.
    pub(crate) who: u128,
    /// When its attributes were read, in seconds since the Unix epoch.
    pub(crate) since: i64,
}

impl Device {
    pub(crate) fn is_tagged(&self) -> bool {
        !self.node.tags.is_empty()
    }

    pub(crate) fn has(&self, identity: u32) -> bool {
        self.identities.binary_search(&identity).is_ok()
    }
}

/// The distinct identities a policy speaks of.
#[derive(Clone, Debug, Default)]
pub(crate) struct Identities {
    index: BTreeMap<Selector, u32>,
    /// Per user, the identities the user's devices have.
    of_user: Vec<Vec<u32>>,
    /// Devices that have the identity.
    pub(crate) members: Vec<NodeSet>,
    /// Their own addresses.
    pub(crate) addresses: Vec<IpSet>,
}

impl Identities {
    pub(crate) fn id(&mut self, selector: &Selector) -> u32 {
        if let Some(id) = self.index.get(selector) {
            return *id;
        }
        let id = u32::try_from(self.index.len()).unwrap_or(u32::MAX);
        self.index.insert(selector.clone(), id);
        self.members.push(NodeSet::new());
        self.addresses.push(IpSet::new());
        id
    }

    pub(crate) fn find(&self, selector: &Selector) -> Option<u32> {
        self.index.get(selector).copied()
    }

    /// The text of every identity, by id. Hashes use it: ids depend on the rest of the file, texts do not.
    pub(crate) fn names(&self) -> Vec<String> {
        let mut out = vec![String::new(); self.index.len()];
        for (selector, id) in &self.index {
            if let Some(name) = out.get_mut(*id as usize) {
                *name = selector.to_string();
            }
        }
        out
    }
}

/// All devices.
#[derive(Clone, Debug)]
pub(crate) struct World {
    pub(crate) devices: Vec<Option<Device>>,
    pub(crate) by_name: BTreeMap<String, usize>,
    free: Vec<usize>,
    by_addr: BTreeMap<IpAddr, usize>,
    /// Devices that carry routes or are exit nodes.
    pub(crate) routers: BTreeSet<usize>,
    /// Untagged devices by user.
    pub(crate) of_user: Vec<BTreeSet<usize>>,
    pub(crate) users: Vec<User>,
    user_by_key: BTreeMap<String, usize>,
    /// Per user, the groups of the policy.
    groups_of: Vec<Vec<AttrValue>>,
    pub(crate) identities: Identities,
    pub(crate) everyone: NodeSet,
    /// What `*` as a source always covers.
    pub(crate) overlay: IpSet,
    /// Devices' own addresses that are not in it.
    pub(crate) outside: IpSet,
    internet: IpSet,
    approvers: Approvers,
    /// What they approve is approved.
    auto_approve: bool,
}

/// Who may carry what without approval by hand.
#[derive(Clone, Debug, Default)]
struct Approvers {
    routes: Vec<(IpNet, Vec<u32>)>,
    exit: Vec<u32>,
}

/// Two devices have the same address.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{addr} is the address of both \"{first}\" and \"{second}\": an address belongs to one device")]
pub struct AddressConflict {
    /// The address.
    pub addr: IpAddr,
    /// The device that has it.
    pub first: String,
    /// The device that wants it.
    pub second: String,
}

impl World {
    /// No devices yet; `identities` are those the policy speaks of.
    pub(crate) fn new(model: &Model, inventory: &Inventory, selectors: &BTreeSet<Selector>) -> Self {
        let mut overlay: IpSet = OVERLAY.iter().filter_map(|net| selector::parse_addresses(net)).collect();
        if let Some(not) = selector::parse_addresses(NOT_OVERLAY) {
            overlay.remove(not);
        }
        let mut world = Self {
            devices: Vec::new(),
            by_name: BTreeMap::new(),
            free: Vec::new(),
            by_addr: BTreeMap::new(),
            routers: BTreeSet::new(),
            of_user: vec![BTreeSet::new(); inventory.users.len()],
            users: inventory.users.clone(),
            user_by_key: BTreeMap::new(),
            groups_of: vec![Vec::new(); inventory.users.len()],
            identities: Identities::default(),
            everyone: NodeSet::new(),
            overlay,
            outside: IpSet::new(),
            internet: internet(),
            approvers: Approvers::default(),
            auto_approve: inventory.auto_approve,
        };
        for selector in selectors {
            world.identities.id(selector);
        }
        let ids = |who: &[At<Selector>]| who.iter().filter_map(|w| world.identities.find(&w.value)).collect();
        world.approvers = Approvers {
            routes: model.route_approvers.iter().map(|(net, who)| (net.value, ids(who))).collect(),
            exit: ids(&model.exit_approvers),
        };
        // Later keys do not replace earlier ones; an id beats a mail address beats a name.
        let users = &inventory.users;
        let keys: [fn(&User) -> Option<String>; 3] =
            [|u| Some(u.id.clone()), |u| u.email.clone(), |u| Some(u.name.clone())];
        for key in keys {
            for (i, user) in users.iter().enumerate() {
                if let Some(key) = key(user).filter(|k| !k.is_empty()) {
                    world.user_by_key.entry(key).or_insert(i);
                }
            }
        }
        world.index_users(model);
        world
    }

    /// Which identities and groups each user has.
    fn index_users(&mut self, model: &Model) {
        // The names by which a policy may call a user, to the users.
        let mut called: BTreeMap<String, Vec<usize>> = BTreeMap::new();
        for (i, user) in self.users.iter().enumerate() {
            if let Some(email) = user.email.as_ref().filter(|e| !e.is_empty()) {
                called.entry(email.to_ascii_lowercase()).or_default().push(i);
            }
        }
        for (i, user) in self.users.iter().enumerate() {
            // A name never takes over what is another user's mail address.
            let name = user.name.to_ascii_lowercase();
            let taken = called.get(&name).is_some_and(|by| {
                by.iter()
                    .any(|u| self.users[*u].email.as_deref().is_some_and(|e| e.eq_ignore_ascii_case(&name)))
            });
            if !name.is_empty() && !taken {
                called.entry(name).or_default().push(i);
            }
        }
        let find = |name: &str| {
            let name = name.to_ascii_lowercase();
            let trimmed = name.strip_suffix('@').unwrap_or(&name);
            called.get(trimmed).cloned().unwrap_or_default()
        };
        let mut of_user = vec![BTreeSet::new(); self.users.len()];
        for (selector, id) in &self.identities.index {
            let users: Vec<usize> = match selector {
                Selector::User(name) => find(name),
                Selector::Group(name) => model
                    .groups
                    .get(name)
                    .map(|g| g.value.iter().flat_map(|m| find_member(&m.value, &find, &self.users)).collect())
                    .unwrap_or_default(),
                Selector::Domain(domain) => of_domain(&self.users, domain),
                Selector::Auto(Autogroup::Member) => (0..self.users.len()).collect(),
                Selector::Auto(Autogroup::Role(role)) => {
                    (0..self.users.len()).filter(|u| self.users[*u].roles.contains(role.word())).collect()
                }
                _ => Vec::new(),
            };
            for user in users {
                of_user[user].insert(*id);
            }
        }
        for (name, group) in &model.groups {
            let members: BTreeSet<usize> =
                group.value.iter().flat_map(|m| find_member(&m.value, &find, &self.users)).collect();
            for user in members {
                self.groups_of[user].push(AttrValue::Text(name.clone()));
            }
        }
        self.identities.of_user = of_user.into_iter().map(|ids| ids.into_iter().collect()).collect();
    }

    /// Everything derived from a device alone.
    pub(crate) fn derive(&self, name: &str, node: &Node, now: i64) -> Device {
        let tagged = !node.tags.is_empty();
        let user = node.user.as_ref().filter(|_| !tagged).and_then(|key| self.user_by_key.get(key).copied());
        let mut identities: Vec<u32> = Vec::new();
        let mut add = |selector: Selector| identities.extend(self.identities.find(&selector));
        if tagged {
            add(Selector::Auto(Autogroup::Tagged));
            for tag in &node.tags {
                add(Selector::Tag(tag.clone()));
            }
        } else {
            add(Selector::Auto(Autogroup::Member));
        }
        if let Some(user) = user {
            identities.extend(&self.identities.of_user[user]);
        }
        identities.sort_unstable();
        identities.dedup();
        let mut node = node.clone();
        if self.auto_approve {
            let approved = self.auto_approved(&node.routable_ips, &identities);
            node.approved_routes.extend(approved);
        }
        let own: Vec<IpRange> = node.addresses().map(IpRange::from).collect();
        let routes: IpSet = node.subnet_routes().map(IpRange::from).collect();
        let exit = node.is_exit_node();
        let mut answers: IpSet = own.iter().copied().collect();
        answers.extend(&routes);
        if exit {
            answers.extend(&self.internet);
        }
        let mut hash = Sha256::new();
        for part in [name, "\0"] {
            hash.update(part);
        }
        for addr in node.addresses() {
            hash.update(addr.to_string());
            hash.update([1]);
        }
        for route in node.approved_routes.intersection(&node.routable_ips) {
            hash.update(route.to_string());
            hash.update([2]);
        }
        hash.update([u8::from(exit)]);
        let print = wide(hash.clone());
        hash.update([u8::from(tagged)]);
        hash.update(user.map_or("", |u| &self.users[u].id));
        for tag in &node.tags {
            hash.update(tag);
            hash.update([3]);
        }
        Device {
            name: name.to_owned(),
            who: wide(hash),
            node,
            own,
            routes,
            exit,
            user,
            answers,
            identities,
            print,
            since: now,
        }
    }

    /// The `offered` networks that a device with these identities may carry without approval by hand.
    pub(crate) fn auto_approved(&self, offered: &BTreeSet<IpNet>, identities: &[u32]) -> BTreeSet<IpNet> {
        let approves = |who: &[u32]| who.iter().any(|id| identities.binary_search(id).is_ok());
        let approved = |offered: &&IpNet| {
            let exit = offered.prefix_len() == 0 && approves(&self.approvers.exit);
            exit || self.approvers.routes.iter().any(|(net, who)| {
                // An approval of a default route is not one of every network.
                let covers =
                    if net.prefix_len() == 0 { *net == offered.trunc() } else { net.contains(*offered) };
                covers && approves(who)
            })
        };
        offered.iter().filter(approved).copied().collect()
    }

    /// The slot a device of this name has or would get.
    pub(crate) fn slot_for(&mut self, name: &str) -> usize {
        if let Some(slot) = self.by_name.get(name) {
            return *slot;
        }
        self.free.pop().unwrap_or_else(|| {
            self.devices.push(None);
            self.devices.len() - 1
        })
    }

    /// Is one of the addresses another device's?
    pub(crate) fn conflict(&self, name: &str, node: &Node) -> Option<AddressConflict> {
        node.addresses().find_map(|addr| {
            let first = self.device(*self.by_addr.get(&addr)?)?;
            (first.name != name).then(|| AddressConflict {
                addr,
                first: first.name.clone(),
                second: name.to_owned(),
            })
        })
    }

    pub(crate) fn device(&self, slot: usize) -> Option<&Device> {
        self.devices.get(slot)?.as_ref()
    }

    pub(crate) fn named(&self, name: &str) -> Option<(usize, &Device)> {
        let slot = *self.by_name.get(name)?;
        Some((slot, self.device(slot)?))
    }

    /// The device with this address.
    pub(crate) fn at(&self, addr: IpAddr) -> Option<(usize, &Device)> {
        let slot = *self.by_addr.get(&addr)?;
        Some((slot, self.device(slot)?))
    }

    /// Devices that own an address of `set` or carry a part of it.
    pub(crate) fn lookup(&self, set: &IpSet, answers: bool) -> NodeSet {
        let mut out = NodeSet::new();
        for range in set.ranges() {
            let bounds = (Bound::Included(range.first()), Bound::Included(range.last()));
            for (_, slot) in self.by_addr.range::<IpAddr, _>(bounds) {
                out.insert(*slot);
            }
        }
        for slot in &self.routers {
            if let Some(device) = self.device(*slot) {
                let carried = if answers { &device.answers } else { &device.routes };
                if set_overlaps(set, carried) {
                    out.insert(*slot);
                }
            }
        }
        out
    }

    /// Every route of every device.
    pub(crate) fn all_routes(&self) -> IpSet {
        self.routers.iter().filter_map(|slot| self.device(*slot)).flat_map(|d| d.routes.ranges()).collect()
    }

    /// Everything any device answers for, given all routes.
    pub(crate) fn all_answers(&self, routes: &IpSet) -> IpSet {
        let mut set = self.overlay.clone();
        set.extend(routes);
        set.extend(&self.outside);
        if self.routers.iter().any(|s| self.device(*s).is_some_and(|d| d.exit)) {
            set.extend(&self.internet);
        }
        set
    }

    pub(crate) fn internet(&self) -> &IpSet {
        &self.internet
    }

    /// Puts a device into its slot and the indexes. The slot is empty.
    pub(crate) fn attach(&mut self, slot: usize, device: Device) {
        for range in &device.own {
            self.by_addr.insert(range.first(), slot);
            if !self.overlay.covers(*range) {
                self.outside.insert(*range);
            }
        }
        if device.exit || !device.routes.is_empty() {
            self.routers.insert(slot);
        }
        if let Some(user) = device.user {
            self.of_user[user].insert(slot);
        }
        for id in &device.identities {
            let id = *id as usize;
            self.identities.members[id].insert(slot);
            for range in &device.own {
                self.identities.addresses[id].insert(*range);
            }
        }
        self.everyone.insert(slot);
        self.by_name.insert(device.name.clone(), slot);
        self.devices[slot] = Some(device);
    }

    /// Puts many devices in at once: sorts once instead of inserting one by one.
    pub(crate) fn attach_all(&mut self, devices: Vec<Device>) {
        let mut addresses: Vec<Vec<IpRange>> = vec![Vec::new(); self.identities.members.len()];
        for mut device in devices {
            let slot = self.slot_for(&device.name);
            for id in &device.identities {
                let id = *id as usize;
                self.identities.members[id].insert(slot);
                addresses[id].extend_from_slice(&device.own);
            }
            let identities = std::mem::take(&mut device.identities);
            self.attach(slot, device);
            if let Some(Some(device)) = self.devices.get_mut(slot) {
                device.identities = identities;
            }
        }
        for (set, ranges) in self.identities.addresses.iter_mut().zip(addresses) {
            *set = ranges.into_iter().collect();
        }
    }

    /// Takes a device out of its slot and the indexes.
    pub(crate) fn detach(&mut self, slot: usize) -> Option<Device> {
        let device = self.devices.get_mut(slot)?.take()?;
        for range in &device.own {
            self.by_addr.remove(&range.first());
            self.outside.remove(*range);
        }
        self.routers.remove(&slot);
        if let Some(user) = device.user {
            self.of_user[user].remove(&slot);
        }
        for id in &device.identities {
            let id = *id as usize;
            self.identities.members[id].remove(slot);
            for range in &device.own {
                self.identities.addresses[id].remove(*range);
            }
        }
        self.everyone.remove(slot);
        self.by_name.remove(&device.name);
        Some(device)
    }

    /// Makes an empty slot free for another device.
    pub(crate) fn release(&mut self, slot: usize) {
        if self.device(slot).is_none() && !self.free.contains(&slot) {
            self.free.push(slot);
        }
    }

    /// A fact about a device or its user.
    pub(crate) fn fact<'w>(&'w self, device: &'w Device, key: &str) -> Option<Cow<'w, Attribute>> {
        if let Some(fact) = device.node.attributes.get(key) {
            return Some(Cow::Borrowed(fact));
        }
        let name = key.strip_prefix("user:")?;
        let index = device.user?;
        let user = &self.users[index];
        if let Some(fact) = user.attributes.get(key) {
            return Some(Cow::Borrowed(fact));
        }
        let text = |t: &str| AttrValue::Text(t.to_owned());
        let value = match name {
            "groups" => AttrValue::List(self.groups_of[index].clone()),
            "roles" => AttrValue::List(user.roles.iter().map(|r| text(r)).collect()),
            "email" => user.email.as_deref().map_or(AttrValue::Absent, text),
            "name" => text(&user.name),
            "id" => text(&user.id),
            _ => return None,
        };
        Some(Cow::Owned(Attribute::server(value)))
    }
}

/// A member of a group: one user, or everyone of a domain.
fn find_member(member: &str, find: &impl Fn(&str) -> Vec<usize>, users: &[User]) -> Vec<usize> {
    match member.strip_prefix("user:*@") {
        Some(domain) => of_domain(users, domain),
        None => find(member),
    }
}

fn of_domain(users: &[User], domain: &str) -> Vec<usize> {
    (0..users.len()).filter(|u| users[*u].domain().is_some_and(|d| d.eq_ignore_ascii_case(domain))).collect()
}

pub(crate) fn set_overlaps(a: &IpSet, b: &IpSet) -> bool {
    let (small, large) = if a.range_count() <= b.range_count() { (a, b) } else { (b, a) };
    small.ranges().any(|r| large.overlaps(r))
}

/// The first 128 bits of a hash.
pub(crate) fn wide(hash: Sha256) -> u128 {
    hash.finalize().iter().take(16).fold(0, |acc, b| (acc << 8) | u128::from(*b))
}
