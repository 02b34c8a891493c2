//! The flow table: bounded, fair between peers, allocation-free on a hit.
//!
//! Flows stand in two orders at once, both least recently used last: by idle time (its tail is the next to expire),
//! and by owner, where an owner is a peer together with who opened the flow. So a peer that opens flows towards us
//! competes with itself only, not with other peers and not with what the local host opened towards it.
//!
//! **Eviction.** An owner may hold [`MAX_FLOWS_PER_OWNER`]; beyond that its new flow takes the place of one of its
//! own. When the whole table is full the owner with the most flows gives one up. The victim is of the least valuable
//! kind (ended, closed, ICMP query, unanswered, TCP opening or closing, answered, established), the longest unused of
//! it; a connection that is established and was used within
//! [`PROTECTED`] is never evicted: then the new flow is refused. An evicted TCP connection is re-learnt from its next
//! packet in the permitted direction.

use std::collections::{BTreeSet, HashMap};
use std::hash::{BuildHasher, Hasher};
use std::time::Duration;

use warren_common::time::Instant;

use super::{Direction, Flow, FlowKey, FlowState};

/// Flows in the table, a count: enough for a busy server, at about 300 bytes each.
pub const MAX_FLOWS: usize = 65_536;
/// Flows of one peer that one side opened, a count: half the table, so that one busy peer (a proxy) can use much of
/// it but never all.
pub const MAX_FLOWS_PER_OWNER: usize = MAX_FLOWS / 2;
/// An established connection used within this time isn't evicted for another flow.
pub const PROTECTED: Duration = Duration::from_secs(5 * 60);

/// How stale a flow's place in the orders may get. Moving it at every packet would touch five flows' memory.
const REORDER_EVERY_NANOS: u64 = 1_000_000_000;

/// Flows of one idle time and value, the least valuable first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Ended,
    Closed,
    IcmpQuery,
    Unanswered,
    Transitory,
    Answered,
    Established,
}

const KINDS: [Kind; 7] = [
    Kind::Ended,
    Kind::Closed,
    Kind::IcmpQuery,
    Kind::Unanswered,
    Kind::Transitory,
    Kind::Answered,
    Kind::Established,
];

const fn kind_of(state: FlowState) -> Kind {
    match state {
        FlowState::Ended => Kind::Ended,
        FlowState::Closed => Kind::Closed,
        FlowState::IcmpQuery => Kind::IcmpQuery,
        FlowState::Unanswered => Kind::Unanswered,
        FlowState::SynSent | FlowState::SynReceived | FlowState::Relearnt | FlowState::TimeWait => {
            Kind::Transitory
        }
        FlowState::Answered => Kind::Answered,
        FlowState::Established | FlowState::HalfClosed => Kind::Established,
    }
}

/// Names a flow while it is in the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowId(u32);

/// The table is full of established connections in use, or the peer's share of it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the flow table is full of connections in use")]
pub struct TableFull;

const NIL: u32 = u32::MAX;
const BY_KIND: usize = 0;
const BY_OWNER: usize = 1;

#[derive(Clone, Copy, Debug)]
struct Link {
    newer: u32,
    older: u32,
}

const UNLINKED: Link = Link { newer: NIL, older: NIL };

#[derive(Clone, Copy, Debug)]
struct Order {
    newest: u32,
    oldest: u32,
}

const EMPTY: Order = Order { newest: NIL, oldest: NIL };

#[derive(Debug)]
struct Slot {
    flow: Flow,
    owner: u32,
    /// When the flow was last put at the head of its orders.
    ordered: Instant,
    links: [Link; 2],
}

#[derive(Debug)]
struct Owner {
    key: (u32, Direction),
    flows: u32,
    orders: [Order; KINDS.len()],
}

/// See the module's description.
#[derive(Debug)]
pub struct FlowTable {
    max: usize,
    max_per_owner: usize,
    index: HashMap<FlowKey, u32, FlowHash>,
    slots: Vec<Option<Slot>>,
    free: Vec<u32>,
    by_kind: [Order; KINDS.len()],
    owners: Vec<Owner>,
    free_owners: Vec<u32>,
    owner_index: HashMap<(u32, Direction), u32, FlowHash>,
    /// Owners by number of flows.
    largest: BTreeSet<(u32, u32)>,
    evicted: u64,
}

impl FlowTable {
    /// An empty table; `seed` must be secret, it keeps peers from choosing flows that collide.
    pub fn new(seed: [u64; 2]) -> Self {
        Self::with_limits(seed, MAX_FLOWS, MAX_FLOWS_PER_OWNER)
    }

    /// An empty table for at most `max` flows, of one owner at most `max_per_owner`.
    pub fn with_limits(seed: [u64; 2], max: usize, max_per_owner: usize) -> Self {
        let hash = FlowHash::new(seed);
        Self {
            max,
            max_per_owner,
            index: HashMap::with_hasher(hash),
            slots: Vec::new(),
            free: Vec::new(),
            by_kind: [EMPTY; KINDS.len()],
            owners: Vec::new(),
            free_owners: Vec::new(),
            owner_index: HashMap::with_hasher(hash),
            largest: BTreeSet::new(),
            evicted: 0,
        }
    }

    /// Flows in the table, remembered ended ones included.
    pub fn len(&self) -> usize {
        self.index.len()
    }

    /// True if there is no flow.
    pub fn is_empty(&self) -> bool {
        self.index.is_empty()
    }

    /// Flows evicted so far to make room for others.
    pub const fn evicted(&self) -> u64 {
        self.evicted
    }

    /// The flow with this key, unless it has expired by `now`.
    pub fn find(&self, key: &FlowKey, now: Instant) -> Option<FlowId> {
        let id = *self.index.get(key)?;
        (self.slot(id)?.flow.expires() > now).then_some(FlowId(id))
    }

    /// The flow of that name.
    pub fn get(&self, id: FlowId) -> Option<&Flow> {
        self.slot(id.0).map(|slot| &slot.flow)
    }

    /// Lets `change` alter the flow and return its new state; the flow counts as used at `now`.
    pub(crate) fn update(&mut self, id: FlowId, now: Instant, change: impl FnOnce(&mut Flow) -> FlowState) {
        let Some(slot) = self.slots.get_mut(id.0 as usize).and_then(Option::as_mut) else {
            return;
        };
        let before = slot.flow.state;
        let after = change(&mut slot.flow);
        slot.flow.seen = now;
        if before == after && now.as_nanos().saturating_sub(slot.ordered.as_nanos()) < REORDER_EVERY_NANOS {
            return;
        }
        self.unlink(id.0);
        if let Some(slot) = self.slots.get_mut(id.0 as usize).and_then(Option::as_mut) {
            slot.flow.state = after;
            slot.ordered = now;
        }
        self.link(id.0);
    }

    /// Notes that the flow was found allowed by `rule` of `revision`.
    pub(crate) fn confirm(&mut self, id: FlowId, rule: warren_common::filter::RuleId, revision: u64) {
        if let Some(slot) = self.slots.get_mut(id.0 as usize).and_then(Option::as_mut) {
            slot.flow.rule = rule;
            slot.flow.revision = revision;
        }
    }

    /// Adds a flow, in place of one with the same key if there is one.
    ///
    /// # Errors
    /// [`TableFull`] if nothing may be evicted for it.
    pub fn insert(&mut self, flow: Flow, now: Instant) -> Result<FlowId, TableFull> {
        if let Some(id) = self.index.get(&flow.key) {
            self.remove(FlowId(*id));
        }
        let owner_key = (flow.peer, flow.opened);
        if let Some(owner) = self.owner_index.get(&owner_key).copied()
            && self.flows_of(owner) >= self.max_per_owner
        {
            self.evict_from(owner, now)?;
        }
        if self.index.len() >= self.max {
            let (_, owner) = *self.largest.last().ok_or(TableFull)?;
            self.evict_from(owner, now)?;
        }
        let owner = self.owner_for(owner_key);
        let key = flow.key;
        let slot = Some(Slot { flow, owner, ordered: now, links: [UNLINKED; 2] });
        let id = match self.free.pop() {
            Some(id) => {
                self.slots[id as usize] = slot;
                id
            }
            None => {
                self.slots.push(slot);
                (self.slots.len() - 1) as u32 // at most MAX_FLOWS
            }
        };
        self.index.insert(key, id);
        self.link(id);
        self.resize_owner(owner, 1);
        Ok(FlowId(id))
    }

    /// Takes a flow out.
    pub fn remove(&mut self, id: FlowId) -> Option<Flow> {
        self.slot(id.0)?;
        self.unlink(id.0);
        let slot = self.slots.get_mut(id.0 as usize)?.take()?;
        self.free.push(id.0);
        self.index.remove(&slot.flow.key);
        self.resize_owner(slot.owner, -1);
        Some(slot.flow)
    }

    /// Takes out the flows that have expired by `now` and says how many there were. Some stay for up to a second
    /// more, since their place in the order is that coarse; none of them is found any longer.
    pub fn expire(&mut self, now: Instant) -> usize {
        let mut count = 0;
        for kind in KINDS {
            while let id = self.by_kind[kind as usize].oldest
                && self.slot(id).is_some_and(|slot| slot.flow.expires() <= now)
            {
                self.remove(FlowId(id));
                count += 1;
            }
        }
        count
    }

    /// When to call [`FlowTable::expire`] next; `None` if there is no flow.
    pub fn next_expiry(&self) -> Option<Instant> {
        KINDS
            .iter()
            .filter_map(|kind| self.slot(self.by_kind[*kind as usize].oldest))
            .map(|slot| slot.flow.expires())
            .min()
    }

    /// The names of all flows, in an order that depends on nothing but the calls made.
    pub fn ids(&self) -> impl Iterator<Item = FlowId> + '_ {
        (0..self.slots.len() as u32).filter(|id| self.slot(*id).is_some()).map(FlowId)
    }

    /// All flows, in the order of [`FlowTable::ids`].
    pub fn flows(&self) -> impl Iterator<Item = &Flow> {
        self.slots.iter().flatten().map(|slot| &slot.flow)
    }

    /// Room for names up to which [`FlowTable::ids`] runs.
    pub(crate) const fn capacity(&self) -> u32 {
        self.slots.len() as u32
    }

    /// The flow's name at a place below [`FlowTable::capacity`], for walks that change flows.
    pub(crate) fn id_at(&self, place: u32) -> Option<FlowId> {
        self.slot(place).map(|_| FlowId(place))
    }

    fn evict_from(&mut self, owner: u32, now: Instant) -> Result<(), TableFull> {
        let orders = self.owners.get(owner as usize).map(|owner| owner.orders).ok_or(TableFull)?;
        for kind in KINDS {
            let oldest = orders[kind as usize].oldest;
            if let Some(slot) = self.slot(oldest) {
                if kind == Kind::Established && now.since(slot.flow.seen) < PROTECTED {
                    return Err(TableFull);
                }
                self.remove(FlowId(oldest));
                self.evicted += 1;
                return Ok(());
            }
        }
        Err(TableFull)
    }

    fn flows_of(&self, owner: u32) -> usize {
        self.owners.get(owner as usize).map_or(0, |owner| owner.flows as usize)
    }

    fn owner_for(&mut self, key: (u32, Direction)) -> u32 {
        if let Some(owner) = self.owner_index.get(&key) {
            return *owner;
        }
        let owner = Owner { key, flows: 0, orders: [EMPTY; KINDS.len()] };
        let id = match self.free_owners.pop() {
            Some(id) => {
                self.owners[id as usize] = owner;
                id
            }
            None => {
                self.owners.push(owner);
                (self.owners.len() - 1) as u32 // each has a flow, so at most MAX_FLOWS
            }
        };
        self.owner_index.insert(key, id);
        id
    }

    fn resize_owner(&mut self, id: u32, change: i32) {
        let Some(owner) = self.owners.get_mut(id as usize) else {
            return;
        };
        self.largest.remove(&(owner.flows, id));
        owner.flows = owner.flows.saturating_add_signed(change);
        if owner.flows > 0 {
            self.largest.insert((owner.flows, id));
        } else {
            self.owner_index.remove(&owner.key);
            self.free_owners.push(id);
        }
    }

    fn slot(&self, id: u32) -> Option<&Slot> {
        self.slots.get(id as usize)?.as_ref()
    }

    fn link_mut(&mut self, id: u32, which: usize) -> Option<&mut Link> {
        let slot = self.slots.get_mut(id as usize)?.as_mut()?;
        Some(&mut slot.links[which])
    }

    fn order_mut(&mut self, owner: u32, kind: Kind, which: usize) -> &mut Order {
        if which == BY_KIND {
            &mut self.by_kind[kind as usize]
        } else {
            &mut self.owners[owner as usize].orders[kind as usize] // a slot's owner exists
        }
    }

    fn link(&mut self, id: u32) {
        let Some((owner, kind)) = self.slot(id).map(|slot| (slot.owner, kind_of(slot.flow.state))) else {
            return;
        };
        for which in [BY_KIND, BY_OWNER] {
            let order = self.order_mut(owner, kind, which);
            let older = order.newest;
            order.newest = id;
            if older == NIL {
                order.oldest = id;
            }
            if let Some(link) = self.link_mut(older, which) {
                link.newer = id;
            }
            if let Some(link) = self.link_mut(id, which) {
                *link = Link { newer: NIL, older };
            }
        }
    }

    fn unlink(&mut self, id: u32) {
        let Some((owner, kind, links)) =
            self.slot(id).map(|slot| (slot.owner, kind_of(slot.flow.state), slot.links))
        else {
            return;
        };
        for which in [BY_KIND, BY_OWNER] {
            let Link { newer, older } = links[which];
            match self.link_mut(newer, which) {
                Some(link) => link.older = older,
                None => self.order_mut(owner, kind, which).newest = older,
            }
            match self.link_mut(older, which) {
                Some(link) => link.newer = newer,
                None => self.order_mut(owner, kind, which).oldest = newer,
            }
        }
    }
}

/// A keyed multiply-and-fold hash. It isn't a cryptographic one, but nobody outside sees its results, and whoever
/// doesn't know the seed can't aim at one bucket.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FlowHash {
    state: u64,
    factor: u64,
}

impl FlowHash {
    /// A factor with few bits would hardly mix, so the seed is spread first (the finaliser of SplitMix64).
    pub(crate) const fn new(seed: [u64; 2]) -> Self {
        const fn spread(word: u64) -> u64 {
            let word = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
            word ^ word >> 31
        }
        Self { state: spread(seed[0]), factor: spread(seed[1]) | 1 }
    }
}

impl BuildHasher for FlowHash {
    type Hasher = FlowHasher;

    fn build_hasher(&self) -> FlowHasher {
        FlowHasher { state: self.state, factor: self.factor }
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct FlowHasher {
    state: u64,
    factor: u64,
}

impl Hasher for FlowHasher {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u32(&mut self, word: u32) {
        self.write_u64(u64::from(word));
    }

    fn write_u64(&mut self, word: u64) {
        self.state = fold(self.state ^ word, self.factor);
    }

    fn finish(&self) -> u64 {
        fold(self.state, self.factor.rotate_left(31) | 1)
    }
}

/// Both halves of the 128-bit product, so that every bit of the input reaches the low bits too.
fn fold(a: u64, b: u64) -> u64 {
    let wide = u128::from(a) * u128::from(b);
    wide as u64 ^ (wide >> 64) as u64
}

#[cfg(test)]
mod tests;
