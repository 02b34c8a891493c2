use proptest::prelude::*;
use warren_common::filter::{FilterDst, IpRange, PROTO_ICMP, PROTO_TCP, PROTO_UDP, RuleId};

use super::*;

/// What the matcher must say: a scan with the oracle.
fn scan(rules: &[FilterRule], query: &Query, unix: i64) -> (Option<(Action, RuleId)>, Vec<RuleId>) {
    let matching: Vec<&FilterRule> = rules
        .iter()
        .filter(|rule| rule.is_active(unix))
        .filter(|rule| rule.covers(query.src, query.dst, query.proto, query.dst_port))
        .collect();
    let first = |action| {
        matching.iter().find(|rule| !rule.staged && rule.action == action).map(|rule| (action, rule.id))
    };
    let staged = matching.iter().filter(|rule| rule.staged).map(|rule| rule.id);
    (first(Action::Deny).or_else(|| first(Action::Allow)), staged.collect())
}

fn ask(matcher: &Matcher, query: &Query, unix: i64) -> (Option<(Action, RuleId)>, Vec<RuleId>) {
    let mut staged = Vec::new();
    let decision = matcher.decide(&mut Scratch::default(), query, unix, |rule| {
        staged.push(rule.id);
    });
    let decided = match decision {
        Decision::Allow(rule) => Some((Action::Allow, rule.id)),
        Decision::Deny(rule) => Some((Action::Deny, rule.id)),
        Decision::NoRule => None,
    };
    (decided, staged)
}

/// Few distinct values, with the ends of the space, so that edges meet.
fn coordinate() -> impl Strategy<Value = u8> {
    prop_oneof![4 => 0u8..12, 1 => Just(254), 1 => Just(255)]
}

fn addr(v6: bool, at: u8) -> IpAddr {
    let spread = u32::from(at) * 0x0101_0101; // 0 and 255 are the ends of the space
    if v6 {
        let wide = u128::from(spread);
        IpAddr::V6((wide << 96 | wide << 64 | wide << 32 | wide).into())
    } else {
        IpAddr::V4(spread.into())
    }
}

fn ip_range() -> impl Strategy<Value = IpRange> {
    (any::<bool>(), coordinate(), coordinate())
        .prop_map(|(v6, a, b)| IpRange::new(addr(v6, a.min(b)), addr(v6, a.max(b))).unwrap())
}

fn port(at: u8) -> u16 {
    u16::from(at) * 257
}

fn port_range() -> impl Strategy<Value = PortRange> {
    prop_oneof![
        Just(PortRange::ALL),
        (coordinate(), coordinate())
            .prop_map(|(a, b)| PortRange { first: port(a.min(b)), last: port(a.max(b)) }),
    ]
}

fn window() -> impl Strategy<Value = UnixInterval> {
    (0i64..10, 0i64..10).prop_map(|(from, until)| UnixInterval { from, until })
}

fn rule() -> impl Strategy<Value = FilterRule> {
    (
        prop::bool::weighted(0.3),
        prop::bool::weighted(0.2),
        prop::collection::vec(ip_range(), 0..4),
        prop::collection::vec((ip_range(), port_range()), 0..4),
        prop::collection::vec(prop::sample::select(vec![1u8, 6, 17, 47, 132]), 0..3),
        prop::option::weighted(0.3, prop::collection::vec(window(), 0..3)),
    )
        .prop_map(|(deny, staged, src, dst, protos, active)| FilterRule {
            id: RuleId(0),
            origin: String::new(),
            action: if deny { Action::Deny } else { Action::Allow },
            staged,
            src,
            dst: dst.into_iter().map(|(net, ports)| FilterDst { net, ports }).collect(),
            protos,
            active,
        })
}

fn rules(count: std::ops::Range<usize>) -> impl Strategy<Value = Vec<FilterRule>> {
    prop::collection::vec(rule(), count).prop_map(|mut rules| {
        for (index, rule) in rules.iter_mut().enumerate() {
            rule.id = RuleId(index as u64);
        }
        rules
    })
}

fn query() -> impl Strategy<Value = (Query, i64)> {
    (
        any::<bool>(),
        prop::bool::weighted(0.05),
        coordinate(),
        coordinate(),
        prop::sample::select(vec![1u8, 6, 17, 47, 50, 132]),
        coordinate(),
        -1i64..11,
    )
        .prop_map(|(v6, mixed, src, dst, proto, at, unix)| {
            let query = Query { src: addr(v6, src), dst: addr(v6 != mixed, dst), proto, dst_port: port(at) };
            (query, unix)
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn equals_the_oracle(
        rules in rules(0..40),
        queries in prop::collection::vec(query(), 1..40),
    ) {
        let matcher = Matcher::compile(rules.clone());
        for (query, unix) in queries {
            prop_assert_eq!(
                ask(&matcher, &query, unix),
                scan(&rules, &query, unix),
                "{:?} at {}", query, unix
            );
        }
    }

    #[test]
    fn answers_keep_for_the_stable_span(rules in rules(1..10), (query, unix) in query()) {
        let matcher = Matcher::compile(rules);
        let span = matcher.stable_span(unix);
        prop_assert!(span.from <= unix && unix < span.until);
        let now = ask(&matcher, &query, unix);
        for other in span.from.max(-3)..span.until.min(14) {
            prop_assert_eq!(&ask(&matcher, &query, other), &now);
        }
        prop_assert_eq!(
            matcher.next_change(unix),
            (span.until != i64::MAX).then_some(span.until)
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    /// Enough rules that rows are put together from checkpoints and toggles.
    #[test]
    fn equals_the_oracle_with_many_rules(
        rules in rules(600..1_000),
        queries in prop::collection::vec(query(), 200),
    ) {
        let matcher = Matcher::compile(rules.clone());
        for (query, unix) in queries {
            prop_assert_eq!(ask(&matcher, &query, unix), scan(&rules, &query, unix));
        }
    }
}

fn simple(id: u64, action: Action, net: IpRange, first: u16, last: u16) -> FilterRule {
    FilterRule {
        id: RuleId(id),
        origin: format!("grants[{id}]"),
        action,
        staged: false,
        src: vec![IpRange::ALL_V4],
        dst: vec![FilterDst { net, ports: PortRange { first, last } }],
        protos: Vec::new(),
        active: None,
    }
}

fn to(dst: [u8; 4], proto: u8, dst_port: u16) -> Query {
    Query { src: [10, 0, 0, 1].into(), dst: dst.into(), proto, dst_port }
}

#[test]
fn nothing_is_allowed_without_rules() {
    let matcher = Matcher::default();
    assert_eq!(ask(&matcher, &to([10, 0, 0, 2], PROTO_TCP, 22), 0), (None, vec![]));
    let matcher = Matcher::compile(Vec::new());
    assert_eq!(ask(&matcher, &to([10, 0, 0, 2], PROTO_TCP, 22), 0), (None, vec![]));
}

#[test]
fn deny_wins_wherever_it_stands() {
    let all = IpRange::ALL_V4;
    let matcher = Matcher::compile(vec![
        simple(1, Action::Allow, all, 0, 65_535),
        simple(2, Action::Deny, all, 22, 22),
    ]);
    let (decided, _) = ask(&matcher, &to([10, 0, 0, 2], PROTO_TCP, 22), 0);
    assert_eq!(decided, Some((Action::Deny, RuleId(2))));
    let (decided, _) = ask(&matcher, &to([10, 0, 0, 2], PROTO_TCP, 23), 0);
    assert_eq!(decided, Some((Action::Allow, RuleId(1))));
}

#[test]
fn ports_mean_nothing_for_icmp() {
    let matcher = Matcher::compile(vec![simple(1, Action::Allow, IpRange::ALL_V4, 443, 443)]);
    let (icmp, _) = ask(&matcher, &to([10, 0, 0, 2], PROTO_ICMP, 0), 0);
    assert_eq!(icmp, Some((Action::Allow, RuleId(1))));
    let (udp, _) = ask(&matcher, &to([10, 0, 0, 2], PROTO_UDP, 53), 0);
    assert_eq!(udp, None);
}

#[test]
fn memory_of_many_rules_is_bounded() {
    let rules: Vec<FilterRule> = (0..20_000u32)
        .map(|at| {
            let net = IpRange::new(
                IpAddr::V4((0x0a00_0000 + at * 7).into()),
                IpAddr::V4((0x0a00_0000 + at * 11).into()),
            );
            simple(u64::from(at), Action::Allow, net.unwrap(), 1, 2)
        })
        .collect();
    let matcher = Matcher::compile(rules);
    let words = matcher.terms.len() / 64;
    for axis in [&matcher.v4.src, &matcher.v4.dst] {
        let bytes = axis.checkpoints.len() * 8;
        assert!(bytes <= MAX_CHECKPOINT_BYTES + 2 * words * 8, "{bytes} bytes");
    }
    let longest = matcher
        .v4
        .dst
        .segments
        .iter()
        .map(|segment| segment.toggles_end - matcher.v4.dst.checkpoint_at[segment.checkpoint as usize]);
    assert!(longest.max().unwrap() as usize <= CHECKPOINT_TOGGLES);
}
