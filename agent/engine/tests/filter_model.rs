//! The filter against a slow model: a packet passes only if a rule allows it now, or if it answers a packet that a
//! rule allowed and has gone on allowing. And it does pass where it must.
//!
//! Every step runs in IPv4 and in IPv6, in a filter of its own; the verdicts must be the same.
#![expect(clippy::unwrap_used, reason = "a test's helpers; clippy exempts test functions only")]

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use proptest::prelude::*;
use warren_common::filter::{
    Action, FilterDst, FilterRule, IpRange, PROTO_ICMP, PROTO_ICMPV6, PROTO_TCP, PROTO_UDP, PortRange,
    RuleId, UnixInterval,
};
use warren_common::time::{Instant, Now, UnixTime};
use warren_engine::filter::{EndReason, EndedFlow, Filter, Verdict};
use warren_engine::flow::Direction;
use warren_engine::packet::build::{Segment, prohibited, stub};
use warren_engine::packet::{Addrs, Selector, TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN};

const START: i64 = 1_800_000_000;
/// No flow lives longer without packets.
const LONGEST: Duration = Duration::from_secs(124 * 60);
/// Every flow lives this long without packets.
const SHORTEST: Duration = Duration::from_secs(10);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Tcp(u8),
    Udp,
    Echo { request: bool },
    Error { about: Talk },
}

/// What an ICMP error quotes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Talk {
    Tcp,
    Udp,
    Echo { request: bool },
}

#[derive(Clone, Copy, Debug)]
struct Sent {
    direction: Direction,
    /// Which remote host, 0 or 1; it belongs to the peer of that handle.
    host: u8,
    /// Now and then the packet comes from, or goes to, the other peer.
    peer: u32,
    local_port: u16,
    remote_port: u16,
    kind: Kind,
}

#[derive(Clone, Debug)]
enum Step {
    Packet(Sent),
    Rules { ingress: Vec<RuleSpec>, egress: Vec<RuleSpec> },
    Wait(u64),
    Close,
    RemovePeer(u32),
}

/// A rule without a family.
#[derive(Clone, Debug)]
struct RuleSpec {
    id: u64,
    deny: bool,
    staged: bool,
    host: Option<u8>,
    ports: Option<u16>,
    proto: Option<u8>,
    window: Option<(i64, i64)>,
}

#[derive(Clone, Copy, Debug)]
struct Family {
    local: IpAddr,
    hosts: [IpAddr; 2],
    icmp: u8,
    all: IpRange,
}

fn families() -> [Family; 2] {
    let v6 = |last| IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, last]);
    [
        Family {
            local: [100, 64, 0, 1].into(),
            hosts: [[100, 64, 0, 2].into(), [100, 64, 0, 3].into()],
            icmp: PROTO_ICMP,
            all: IpRange::ALL_V4,
        },
        Family { local: v6(1), hosts: [v6(2), v6(3)], icmp: PROTO_ICMPV6, all: IpRange::ALL_V6 },
    ]
}

impl Family {
    fn rule(&self, direction: Direction, spec: &RuleSpec) -> FilterRule {
        let remote = spec.host.map_or(self.all, |host| self.hosts[usize::from(host)].into());
        let local = IpRange::from(self.local);
        let (src, net) = match direction {
            Direction::Egress => (local, remote),
            Direction::Ingress => (remote, local),
        };
        let ports = spec.ports.map_or(PortRange::ALL, |port| PortRange { first: port, last: port });
        FilterRule {
            id: RuleId(spec.id),
            origin: String::new(),
            action: if spec.deny { Action::Deny } else { Action::Allow },
            staged: spec.staged,
            src: vec![src],
            dst: vec![FilterDst { net, ports }],
            protos: spec
                .proto
                .map(|proto| if proto == PROTO_ICMP { self.icmp } else { proto })
                .into_iter()
                .collect(),
            active: spec
                .window
                .map(|(from, until)| vec![UnixInterval { from: START + from, until: START + until }]),
        }
    }

    fn addrs(&self, direction: Direction, host: u8) -> Addrs {
        let out = Addrs::new(self.local, self.hosts[usize::from(host)]).unwrap();
        match direction {
            Direction::Egress => out,
            Direction::Ingress => out.reversed(),
        }
    }

    fn bytes(&self, sent: &Sent) -> Vec<u8> {
        let addrs = self.addrs(sent.direction, sent.host);
        let ports = |direction| match direction {
            Direction::Egress => (sent.local_port, sent.remote_port),
            Direction::Ingress => (sent.remote_port, sent.local_port),
        };
        let (src, dst) = ports(sent.direction);
        match sent.kind {
            Kind::Tcp(flags) => Segment {
                addrs,
                src_port: src,
                dst_port: dst,
                seq: 1,
                ack: (flags & TCP_ACK != 0).then_some(1),
                flags: flags & !TCP_ACK,
            }
            .to_bytes(),
            Kind::Udp => stub(addrs, PROTO_UDP, Selector::Ports { src, dst }),
            Kind::Echo { request } => stub(addrs, self.icmp, Selector::Echo { request, id: sent.local_port }),
            Kind::Error { about } => {
                let (src, dst) = ports(sent.direction.reversed());
                let (proto, selector) = match about {
                    Talk::Tcp => (PROTO_TCP, Selector::Ports { src, dst }),
                    Talk::Udp => (PROTO_UDP, Selector::Ports { src, dst }),
                    Talk::Echo { request } => (self.icmp, Selector::Echo { request, id: sent.local_port }),
                };
                prohibited(addrs, &stub(addrs.reversed(), proto, selector))
            }
        }
    }
}

/// What the model tells flows apart by: protocol, local port or identifier, remote port or who asks, remote host.
type Tuple = (u8, u16, u16, u8);

#[derive(Clone, Debug)]
struct Known {
    peer: u32,
    /// Directions in which a packet passed that a rule allowed, and has gone on allowing.
    openers: BTreeSet<Direction>,
    /// Some direction was taken away since: whether the filter still has the flow depends on which it opened it.
    uncertain: bool,
    passed: BTreeSet<Direction>,
    last: Duration,
}

/// The slow model, for one family.
struct Model {
    family: Family,
    rules: BTreeMap<Direction, Vec<FilterRule>>,
    known: BTreeMap<Tuple, Known>,
}

impl Model {
    fn allows(&self, direction: Direction, tuple: &Tuple, unix: i64) -> bool {
        let (proto, local_port, remote_port, host) = *tuple;
        let addrs = self.family.addrs(direction, host);
        let port = match direction {
            Direction::Egress => remote_port,
            Direction::Ingress => local_port,
        };
        let any = |action| {
            self.rules[&direction].iter().any(|rule| {
                rule.action == action
                    && !rule.staged
                    && rule.is_active(unix)
                    && rule.covers(addrs.src(), addrs.dst(), proto, port)
            })
        };
        any(Action::Allow) && !any(Action::Deny)
    }

    fn recheck(&mut self, now: Duration, unix: i64) {
        let mut known = std::mem::take(&mut self.known);
        known.retain(|tuple, known| {
            let before = known.openers.len();
            known.openers.retain(|direction| self.allows(*direction, tuple, unix));
            known.uncertain |= known.openers.len() < before;
            !known.openers.is_empty() && now.saturating_sub(known.last) < LONGEST
        });
        self.known = known;
    }

    fn tuple(&self, direction: Direction, sent: &Sent, talk: Talk) -> Tuple {
        match talk {
            Talk::Tcp => (PROTO_TCP, sent.local_port, sent.remote_port, sent.host),
            Talk::Udp => (PROTO_UDP, sent.local_port, sent.remote_port, sent.host),
            Talk::Echo { request } => {
                let ours = (direction == Direction::Egress) == request;
                (self.family.icmp, sent.local_port, u16::from(ours), sent.host)
            }
        }
    }

    /// Whether the packet may pass, and whether it must.
    fn judge(&self, sent: &Sent, now: Duration, unix: i64) -> (bool, bool) {
        let direction = sent.direction;
        let (talk, by_rule, as_reply) = match sent.kind {
            Kind::Tcp(flags) => {
                let opens = flags & (TCP_SYN | TCP_ACK) == TCP_SYN;
                (Talk::Tcp, flags & TCP_RST == 0, !opens)
            }
            Kind::Udp => (Talk::Udp, true, true),
            Kind::Echo { request } => (Talk::Echo { request }, request, true),
            Kind::Error { about } => {
                let quoted = direction.reversed();
                let tuple = self.tuple(quoted, sent, about);
                let related = self
                    .known
                    .get(&tuple)
                    .is_some_and(|known| known.peer == sent.peer && known.passed.contains(&quoted));
                return (related, false);
            }
        };
        let tuple = self.tuple(direction, sent, talk);
        let known = self.known.get(&tuple).filter(|known| known.peer == sent.peer);
        let allowed = by_rule && self.allows(direction, &tuple, unix);
        let reply = as_reply && known.is_some();
        let certain = known.is_some_and(|known| !known.uncertain && now - known.last < SHORTEST);
        let along = known.is_some_and(|known| known.openers.contains(&direction));
        (allowed || reply || along, allowed || (reply && certain))
    }

    fn passed(&mut self, sent: &Sent, now: Duration, unix: i64) {
        let talk = match sent.kind {
            Kind::Tcp(_) => Talk::Tcp,
            Kind::Udp => Talk::Udp,
            Kind::Echo { request } => Talk::Echo { request },
            Kind::Error { .. } => return,
        };
        let tuple = self.tuple(sent.direction, sent, talk);
        let allowed = self.allows(sent.direction, &tuple, unix);
        let fresh = Known {
            peer: sent.peer,
            openers: BTreeSet::new(),
            uncertain: false,
            passed: BTreeSet::new(),
            last: now,
        };
        let known = self.known.entry(tuple).or_insert_with(|| fresh.clone());
        if known.peer != sent.peer {
            *known = fresh;
        }
        if allowed {
            known.openers.insert(sent.direction);
        }
        known.passed.insert(sent.direction);
        known.last = now;
    }
}

/// Both implementations in one family.
struct World {
    filter: Filter,
    model: Model,
    now: Duration,
}

impl World {
    fn new(family: Family) -> Self {
        let rules = [(Direction::Egress, Vec::new()), (Direction::Ingress, Vec::new())].into();
        Self {
            filter: Filter::new([11, 13]),
            model: Model { family, rules, known: BTreeMap::new() },
            now: Duration::ZERO,
        }
    }

    fn now(&self) -> Now {
        Now {
            boot: Instant::from_nanos(1_000_000_000) + self.now,
            unix: UnixTime::from_secs(START) + self.now,
        }
    }

    /// Does one step; says what was decided, for comparison between families.
    fn step(&mut self, step: &Step) -> Result<String, TestCaseError> {
        let now = self.now();
        let unix = now.unix.as_secs();
        match step {
            Step::Wait(secs) => self.now += Duration::from_secs(*secs),
            Step::Rules { ingress, egress } => {
                let rules = |direction, specs: &[RuleSpec]| {
                    specs.iter().map(|spec| self.model.family.rule(direction, spec)).collect::<Vec<_>>()
                };
                let ingress = rules(Direction::Ingress, ingress);
                let egress = rules(Direction::Egress, egress);
                self.model.rules =
                    [(Direction::Egress, egress.clone()), (Direction::Ingress, ingress.clone())].into();
                self.model.recheck(self.now, unix);
                let ended = self.filter.set_rules(ingress, egress, 1, now);
                self.check_ended(&ended)?;
                return Ok(format!("{} ended", ended.len()));
            }
            Step::Close => {
                self.model.rules = [(Direction::Egress, Vec::new()), (Direction::Ingress, Vec::new())].into();
                self.model.recheck(self.now, unix);
                let ended = self.filter.close_all(EndReason::LeaseEnded, now);
                return Ok(format!("{} ended", ended.len()));
            }
            Step::RemovePeer(peer) => {
                self.model.known.retain(|_, known| known.peer != *peer);
                let ended = self.filter.remove_peer(*peer, now);
                return Ok(format!("{} ended", ended.len()));
            }
            Step::Packet(sent) => {
                self.model.recheck(self.now, unix);
                let bytes = self.model.family.bytes(sent);
                let verdict = match sent.direction {
                    Direction::Egress => self.filter.egress(now, &bytes, sent.peer),
                    Direction::Ingress => self.filter.ingress(now, &bytes, sent.peer),
                };
                let (may, must) = self.model.judge(sent, self.now, unix);
                let passes = verdict == Verdict::Pass;
                prop_assert!(may || !passes, "passed without permission: {sent:?}");
                prop_assert!(passes || !must, "{verdict:?} though allowed: {sent:?}");
                if passes {
                    self.model.passed(sent, self.now, unix);
                }
                let made = std::iter::from_fn(|| self.filter.poll_output()).count();
                return Ok(format!("{verdict:?}, {made} made"));
            }
        }
        Ok(String::new())
    }

    /// Flows end only when nothing allows them. (Those that a window ended before may be allowed again.)
    fn check_ended(&self, ended: &[EndedFlow]) -> Result<(), TestCaseError> {
        let unix = self.now().unix.as_secs();
        for EndedFlow { flow, reason } in ended {
            if *reason != EndReason::PolicyChanged {
                continue;
            }
            let host = self.model.family.hosts.iter().position(|host| *host == flow.key.remote());
            let tuple =
                (flow.key.proto(), flow.key.local_port(), flow.key.remote_port(), host.unwrap() as u8);
            prop_assert!(!self.model.allows(flow.opened, &tuple, unix), "ended though allowed: {flow:?}");
        }
        Ok(())
    }
}

fn direction() -> impl Strategy<Value = Direction> {
    prop_oneof![Just(Direction::Egress), Just(Direction::Ingress)]
}

fn kind() -> impl Strategy<Value = Kind> {
    let talk = prop_oneof![
        Just(Talk::Tcp),
        Just(Talk::Udp),
        any::<bool>().prop_map(|request| Talk::Echo { request })
    ];
    prop_oneof![
        4 => prop::sample::select(vec![
            TCP_SYN, TCP_SYN | TCP_ACK, TCP_ACK, TCP_ACK | TCP_FIN, TCP_RST, TCP_RST | TCP_ACK,
        ])
        .prop_map(Kind::Tcp),
        3 => Just(Kind::Udp),
        2 => any::<bool>().prop_map(|request| Kind::Echo { request }),
        1 => talk.prop_map(|about| Kind::Error { about }),
    ]
}

fn packet() -> impl Strategy<Value = Step> {
    (direction(), 0u8..2, prop::bool::weighted(0.05), 0usize..2, 0usize..2, kind()).prop_map(
        |(direction, host, astray, local, remote, kind)| {
            Step::Packet(Sent {
                direction,
                host,
                peer: u32::from(host ^ u8::from(astray)),
                local_port: [22, 40_000][local],
                remote_port: [22, 443][remote],
                kind,
            })
        },
    )
}

fn rule_spec() -> impl Strategy<Value = RuleSpec> {
    (
        0u64..6,
        prop::bool::weighted(0.15),
        prop::bool::weighted(0.15),
        prop::option::of(0u8..2),
        prop::option::of(prop::sample::select(vec![22u16, 443, 40_000])),
        prop::option::of(prop::sample::select(vec![PROTO_TCP, PROTO_UDP, PROTO_ICMP])),
        prop::option::weighted(0.35, (0i64..100, 50i64..400)),
    )
        .prop_map(|(id, deny, staged, host, ports, proto, window)| RuleSpec {
            id,
            deny,
            staged,
            host,
            ports,
            proto,
            window,
        })
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let specs = || prop::collection::vec(rule_spec(), 0..4);
    let rules = || (specs(), specs()).prop_map(|(ingress, egress)| Step::Rules { ingress, egress });
    let step = prop_oneof![
        40 => packet(),
        3 => rules(),
        6 => prop::sample::select(vec![1u64, 5, 9, 20, 40, 61, 121, 241, 301, 7_441]).prop_map(Step::Wait),
        1 => (0u32..2).prop_map(Step::RemovePeer),
        1 => Just(Step::Close),
    ];
    (rules(), prop::collection::vec(step, 1..120)).prop_map(|(first, mut rest)| {
        rest.insert(0, first);
        rest
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn passes_what_the_model_permits_and_nothing_else(steps in steps()) {
        let mut worlds = families().map(World::new);
        for (at, step) in steps.iter().enumerate() {
            let [v4, v6] = &mut worlds;
            let v4 = v4.step(step)?;
            let v6 = v6.step(step)?;
            prop_assert_eq!(v4, v6, "the families differ at step {}: {:?}", at, step);
        }
    }

    /// Noise, and real packets with noise in them: no panic, and without rules nothing passes.
    #[test]
    fn nothing_passes_a_filter_without_rules(
        noise in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..120), 1..20),
        damage in prop::collection::vec((packet(), 0usize..80, any::<u8>()), 1..20),
    ) {
        let mut filter = Filter::new([1, 2]);
        let now = World::new(families()[0]).now();
        for bytes in &noise {
            prop_assert_ne!(filter.egress(now, bytes, 0), Verdict::Pass);
            prop_assert_ne!(filter.ingress(now, bytes, 0), Verdict::Pass);
        }
        for (step, at, value) in &damage {
            let Step::Packet(sent) = step else { continue };
            for family in families() {
                let mut bytes = family.bytes(sent);
                if let Some(byte) = bytes.get_mut(*at) {
                    *byte = *value;
                }
                prop_assert_ne!(filter.egress(now, &bytes, 0), Verdict::Pass);
                prop_assert_ne!(filter.ingress(now, &bytes, 0), Verdict::Pass);
            }
        }
        prop_assert!(filter.flows().is_empty());
    }
}
