use std::collections::BTreeMap;

use proptest::prelude::*;
use warren_common::filter::{PROTO_TCP, PROTO_UDP, RuleId};

use super::*;
use crate::packet::{Addrs, Selector};

fn at(secs: u64) -> Instant {
    Instant::from_nanos(secs * 1_000_000_000)
}

fn key(proto: u8, number: u32) -> FlowKey {
    let [a, b, c, d] = number.to_be_bytes();
    let addrs = Addrs::new([100, 64, 0, 1].into(), [10, a, b, c].into()).unwrap();
    FlowKey::new(Direction::Egress, addrs, proto, Selector::Ports { src: u16::from(d), dst: 53 })
}

fn flow(number: u32, peer: u32, opened: Direction, state: FlowState, now: Instant) -> Flow {
    let proto = match state {
        FlowState::Unanswered | FlowState::Answered => PROTO_UDP,
        _ => PROTO_TCP,
    };
    Flow { state, ..Flow::new(key(proto, number), peer, opened, RuleId(1), 1, now) }
}

fn udp(number: u32, peer: u32, now: Instant) -> Flow {
    flow(number, peer, Direction::Ingress, FlowState::Unanswered, now)
}

impl FlowTable {
    /// Checks that all views of the table agree.
    fn check(&self) {
        let live = self.slots.iter().flatten().count();
        assert_eq!(self.index.len(), live);
        assert!(live <= self.max);
        let walk = |order: Order, which: usize| {
            let mut count = 0;
            let (mut id, mut newer) = (order.newest, NIL);
            let mut last = Instant::FAR_FUTURE;
            while let Some(slot) = self.slot(id) {
                assert_eq!(slot.links[which].newer, newer);
                assert!(slot.ordered <= last, "out of order");
                last = slot.ordered;
                newer = id;
                id = slot.links[which].older;
                count += 1;
            }
            assert_eq!(order.oldest, newer);
            count
        };
        assert_eq!(KINDS.iter().map(|kind| walk(self.by_kind[*kind as usize], BY_KIND)).sum::<usize>(), live);
        let mut owned = 0;
        for (count, id) in &self.largest {
            let owner = &self.owners[*id as usize];
            let flows: usize = owner.orders.iter().map(|order| walk(*order, BY_OWNER)).sum();
            assert_eq!((flows, owner.flows), (*count as usize, *count));
            assert!(flows <= self.max_per_owner);
            assert_eq!(self.owner_index[&owner.key], *id);
            owned += flows;
        }
        assert_eq!(owned, live);
        assert_eq!(self.owner_index.len(), self.largest.len());
    }
}

#[test]
fn the_table_is_bounded() {
    let mut table = FlowTable::new([1, 2]);
    for number in 0..MAX_FLOWS as u32 + 5_000 {
        table.insert(udp(number, number % 5, at(0)), at(0)).unwrap();
    }
    assert_eq!(table.len(), MAX_FLOWS);
    assert_eq!(table.evicted(), 5_000);
    let mut table = FlowTable::new([1, 2]);
    for number in 0..MAX_FLOWS_PER_OWNER as u32 + 1_000 {
        table.insert(udp(number, 1, at(0)), at(0)).unwrap();
    }
    assert_eq!(table.len(), MAX_FLOWS_PER_OWNER);
    table.check();
}

#[test]
fn a_peer_that_floods_evicts_its_own_flows_only() {
    let mut table = FlowTable::with_limits([1, 2], 100, 80);
    let ours = flow(1, 9, Direction::Egress, FlowState::Unanswered, at(0));
    table.insert(ours, at(0)).unwrap();
    for number in 10..30 {
        table.insert(udp(number, 5, at(0)), at(0)).unwrap();
    }
    for number in 100..10_000 {
        table.insert(udp(number, 9, at(1)), at(1)).unwrap();
        table.check();
    }
    assert!(table.find(&ours.key, at(1)).is_some(), "what we opened towards the flooder");
    assert!((10..30).all(|number| table.find(&key(PROTO_UDP, number), at(1)).is_some()));
    // Somebody new gets room from the one that has most.
    for number in 20_000..20_030 {
        table.insert(udp(number, 6, at(1)), at(1)).unwrap();
    }
    assert!((20_000..20_030).all(|number| table.find(&key(PROTO_UDP, number), at(1)).is_some()));
}

#[test]
fn the_least_valuable_goes_first_and_connections_in_use_stay() {
    let order = [
        FlowState::Ended,
        FlowState::Closed,
        FlowState::IcmpQuery,
        FlowState::Unanswered,
        FlowState::Relearnt,
        FlowState::Answered,
        FlowState::Established,
    ];
    let mut table = FlowTable::with_limits([1, 2], 7, 7);
    for (number, state) in order.into_iter().enumerate().rev() {
        table.insert(flow(number as u32, 1, Direction::Ingress, state, at(0)), at(0)).unwrap();
    }
    for number in 0..6u32 {
        let established = flow(100 + number, 1, Direction::Ingress, FlowState::Established, at(1));
        table.insert(established, at(1)).unwrap();
        let left: Vec<FlowState> = order.iter().copied().skip(number as usize + 1).collect();
        assert!(left.iter().all(|state| table.flows().any(|flow| flow.state == *state)));
        assert!(!table.flows().any(|flow| flow.state == order[number as usize]));
    }
    assert_eq!(table.insert(udp(200, 1, at(2)), at(2)), Err(TableFull));
    assert_eq!(table.len(), 7);
    let idle = at(0) + PROTECTED;
    assert!(table.insert(udp(200, 1, idle), idle).is_ok());
    assert!(table.find(&key(PROTO_TCP, 6), idle).is_none(), "the longest unused");
    table.check();
}

#[derive(Clone, Debug)]
enum Step {
    Insert { number: u32, peer: u32, ours: bool, state: FlowState },
    Update { number: u32, state: FlowState },
    Remove { number: u32 },
    Wait { millis: u64 },
    Expire,
}

fn state() -> impl Strategy<Value = FlowState> {
    prop::sample::select(vec![
        FlowState::SynSent,
        FlowState::Established,
        FlowState::Closed,
        FlowState::TimeWait,
        FlowState::Ended,
    ])
}

fn step() -> impl Strategy<Value = Step> {
    let number = 0u32..30;
    prop_oneof![
        4 => (number.clone(), 0u32..3, any::<bool>(), state())
            .prop_map(|(number, peer, ours, state)| Step::Insert { number, peer, ours, state }),
        4 => (number.clone(), state()).prop_map(|(number, state)| Step::Update { number, state }),
        1 => number.prop_map(|number| Step::Remove { number }),
        2 => prop::sample::select(vec![1u64, 400, 2_000, 9_000, 130_000])
            .prop_map(|millis| Step::Wait { millis }),
        1 => Just(Step::Expire),
    ]
}

proptest! {
    /// A map without orders, shares or slots is the model; evictions are taken over from the table.
    #[test]
    fn behaves_like_a_map_with_expiry(steps in prop::collection::vec(step(), 1..200)) {
        let mut table = FlowTable::with_limits([7, 9], 16, 8);
        let mut model: BTreeMap<u32, (FlowState, Instant)> = BTreeMap::new();
        let mut now = at(1_000);
        for step in steps {
            let evicted = table.evicted();
            match step {
                Step::Insert { number, peer, ours, state } => {
                    let opened = if ours { Direction::Egress } else { Direction::Ingress };
                    let new = Flow { key: key(PROTO_TCP, number), ..flow(number, peer, opened, state, now) };
                    model.remove(&number);
                    if table.insert(new, now).is_ok() {
                        model.insert(number, (state, now));
                    }
                    if table.evicted() > evicted {
                        let left: Vec<FlowKey> = table.flows().map(|flow| flow.key).collect();
                        model.retain(|number, _| left.contains(&key(PROTO_TCP, *number)));
                    }
                }
                Step::Update { number, state } => {
                    if let Some(id) = table.find(&key(PROTO_TCP, number), now) {
                        table.update(id, now, |_| state);
                        model.insert(number, (state, now));
                    }
                }
                Step::Remove { number } => {
                    if let Some(id) = table.find(&key(PROTO_TCP, number), now) {
                        prop_assert!(table.remove(id).is_some());
                        model.remove(&number);
                    }
                }
                Step::Wait { millis } => now += Duration::from_millis(millis),
                Step::Expire => {
                    table.expire(now);
                    prop_assert!(table.next_expiry().is_none_or(|next| next > now));
                    // Late by a second at most.
                    let late = now - Duration::from_secs(1);
                    prop_assert!(table.flows().all(|flow| flow.expires() > late));
                }
            }
            table.check();
            for number in 0..30 {
                let known = model.get(&number).filter(|(state, seen)| *seen + state.timeout() > now);
                let found = table.find(&key(PROTO_TCP, number), now).and_then(|id| table.get(id));
                prop_assert_eq!(found.map(|flow| flow.state), known.map(|(state, _)| *state));
            }
        }
    }
}

#[test]
fn the_hash_depends_on_the_seed_and_spreads() {
    let spread = |seed: [u64; 2]| -> Vec<u64> {
        let hash = FlowHash::new(seed);
        (0..4_096).map(|number| hash.hash_one(key(PROTO_UDP, number)) & 0xfff).collect()
    };
    let (a, b) = (spread([1, 2]), spread([3, 4]));
    let same = a.iter().zip(&b).filter(|(a, b)| a == b).count();
    assert!(same < 20, "{same} of 4096 fall on the same place");
    // 4 096 balls in as many boxes leave about 37 % of them empty.
    let filled = a.iter().collect::<BTreeSet<_>>().len();
    assert!((2_400..2_800).contains(&filled), "{filled} of 4096 places used");
}
