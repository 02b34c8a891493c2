//! The compiled rule set: which rule decides about a new flow, in bounded time whatever the rules look like.
//!
//! Every rule is cut into *terms*, boxes of (sources × destinations × one port range × protocols); a term is a bit.
//! For each axis (source, destination, destination port) the places where some term begins or ends cut the axis into
//! segments, and the set of terms that cover a segment is a row of bits. Rows aren't stored one by one (that would
//! be quadratic): a full row is kept every [`CHECKPOINT_TOGGLES`] toggles, and the toggles between are replayed on a
//! copy. A look-up is then three binary searches, at most that many toggles per axis, and one AND over the rows.
//! Terms are ordered: enforced denies, enforced allows, staged rules, each in the order of the rules, so the first
//! active bit is the rule that decides. [`FilterRule::covers`] is the oracle this is tested against.
//!
//! A rule set never changes. Rules that come into force or lapse by time are checked when they match;
//! [`Matcher::stable_span`] says how long answers keep.

use std::collections::BTreeMap;
use std::net::IpAddr;

use warren_common::filter::{Action, DEFAULT_PROTOS, FilterRule, PortRange, UnixInterval, has_ports};

/// Toggles replayed at most per axis and look-up, a count, unless [`MAX_CHECKPOINT_BYTES`] asks for more: about as
/// much work as copying the row of 10 000 rules.
pub const CHECKPOINT_TOGGLES: usize = 64;

/// Memory for the rows of one axis, in bytes. A rule set so large that it would take more trades time for memory.
pub const MAX_CHECKPOINT_BYTES: usize = 16 << 20;

/// The question: may this be the first packet of a flow?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Query {
    /// Source address.
    pub src: IpAddr,
    /// Destination address.
    pub dst: IpAddr,
    /// IP protocol.
    pub proto: u8,
    /// Destination port; ignored for protocols without ports.
    pub dst_port: u16,
}

/// The answer to a [`Query`].
#[derive(Clone, Copy, Debug)]
pub enum Decision<'a> {
    /// Allowed by this rule, the first of those that do.
    Allow(&'a FilterRule),
    /// Denied by this rule, the first of those that do.
    Deny(&'a FilterRule),
    /// No active enforced rule covers it, so it is denied.
    NoRule,
}

impl<'a> Decision<'a> {
    /// The rule that decided.
    pub const fn rule(&self) -> Option<&'a FilterRule> {
        match self {
            Self::Allow(rule) | Self::Deny(rule) => Some(rule),
            Self::NoRule => None,
        }
    }

    /// True if a rule allows and none denies.
    pub const fn is_allowed(&self) -> bool {
        matches!(self, Self::Allow(_))
    }
}

/// Working memory of look-ups, kept by the caller so that none allocates.
#[derive(Clone, Debug, Default)]
pub struct Scratch {
    rows: [Vec<u64>; 3],
}

/// One direction's rules, compiled.
#[derive(Debug, Default)]
pub struct Matcher {
    rules: Vec<FilterRule>,
    /// Rule index of each term; [`NO_TERM`] where a class was padded to a whole word.
    terms: Vec<u32>,
    /// First word behind the denies, the allows and the staged rules.
    class_end: [usize; 3],
    v4: AddrAxes<u32>,
    v6: AddrAxes<u128>,
    ports: Axis<u16>,
    /// Which row of `proto_rows` a protocol has.
    proto_row: Vec<u16>,
    proto_rows: Vec<Vec<u64>>,
    /// All seconds at which some rule comes into force or lapses, sorted.
    changes: Vec<i64>,
}

const NO_TERM: u32 = u32::MAX;
const DENIES: usize = 0;
const ALLOWS: usize = 1;
const STAGED: usize = 2;

impl Matcher {
    /// Compiles rules; their order decides which of several that match is named.
    pub fn compile(rules: Vec<FilterRule>) -> Self {
        let mut builder = Builder::default();
        let mut class_end = [0; 3];
        for class in [DENIES, ALLOWS, STAGED] {
            for (index, rule) in rules.iter().enumerate() {
                if class_of(rule) == class {
                    builder.add(index as u32, rule); // a netmap can't hold 2^32 rules
                }
            }
            builder.pad();
            class_end[class] = builder.terms.len() / 64;
        }
        let mut changes: Vec<i64> = rules
            .iter()
            .flat_map(|rule| rule.active.iter().flatten())
            .flat_map(|window| [window.from, window.until])
            .collect();
        changes.sort_unstable();
        changes.dedup();
        let words = builder.terms.len() / 64;
        let (proto_row, proto_rows) = compile_protos(&builder.protos, words);
        Self {
            terms: builder.terms,
            class_end,
            v4: AddrAxes::new(builder.v4_src, builder.v4_dst, words),
            v6: AddrAxes::new(builder.v6_src, builder.v6_dst, words),
            ports: Axis::new(builder.ports, words),
            proto_row,
            proto_rows,
            changes,
            rules,
        }
    }

    /// The rules as given.
    pub fn rules(&self) -> &[FilterRule] {
        &self.rules
    }

    /// Decides at `unix` (seconds since the epoch). `on_staged` is called once for each active staged rule that
    /// covers the query, in the order of the rules.
    pub fn decide(
        &self,
        scratch: &mut Scratch,
        query: &Query,
        unix: i64,
        mut on_staged: impl FnMut(&FilterRule),
    ) -> Decision<'_> {
        let Some(protos) = self
            .proto_row
            .get(usize::from(query.proto))
            .and_then(|row| self.proto_rows.get(usize::from(*row)))
        else {
            return Decision::NoRule;
        };
        let [src_row, dst_row, port_row] = &mut scratch.rows;
        let src = match query.src {
            IpAddr::V4(src) => self.v4.src.row(src.to_bits(), src_row),
            IpAddr::V6(src) => self.v6.src.row(src.to_bits(), src_row),
        };
        let dst = match query.dst {
            IpAddr::V4(dst) => self.v4.dst.row(dst.to_bits(), dst_row),
            IpAddr::V6(dst) => self.v6.dst.row(dst.to_bits(), dst_row),
        };
        let ports = if has_ports(query.proto) {
            self.ports.row(query.dst_port, port_row)
        } else {
            protos // port ranges mean nothing here: a row that changes nothing
        };
        let rows = Rows { rows: [protos, src, dst, ports] };
        let first_active = |class: usize| {
            let begin = if class == 0 { 0 } else { self.class_end[class - 1] };
            rows.bits(begin, self.class_end[class])
                .filter_map(|term| self.rule_of(term))
                .find(|rule| rule.is_active(unix))
        };
        let decision = match first_active(DENIES) {
            Some(rule) => Decision::Deny(rule),
            None => first_active(ALLOWS).map_or(Decision::NoRule, Decision::Allow),
        };
        let mut last = NO_TERM;
        for term in rows.bits(self.class_end[ALLOWS], self.class_end[STAGED]) {
            let index = self.terms[term];
            // The terms of one rule are neighbours.
            if index != last
                && let Some(rule) = self.rule_of(term)
            {
                last = index;
                if rule.is_active(unix) {
                    on_staged(rule);
                }
            }
        }
        decision
    }

    /// The time around `unix` in which no rule comes into force or lapses, so that every answer keeps.
    pub fn stable_span(&self, unix: i64) -> UnixInterval {
        let next = self.changes.partition_point(|change| *change <= unix);
        UnixInterval {
            from: next
                .checked_sub(1)
                .and_then(|previous| self.changes.get(previous))
                .copied()
                .unwrap_or(i64::MIN),
            until: self.changes.get(next).copied().unwrap_or(i64::MAX),
        }
    }

    /// The next second after `unix` at which a rule comes into force or lapses.
    pub fn next_change(&self, unix: i64) -> Option<i64> {
        let next = self.changes.partition_point(|change| *change <= unix);
        self.changes.get(next).copied()
    }

    fn rule_of(&self, term: usize) -> Option<&FilterRule> {
        self.rules.get(*self.terms.get(term)? as usize)
    }
}

const fn class_of(rule: &FilterRule) -> usize {
    match (rule.staged, rule.action) {
        (true, _) => STAGED,
        (false, Action::Deny) => DENIES,
        (false, Action::Allow) => ALLOWS,
    }
}

/// One row per axis; a term matches if all have its bit.
struct Rows<'a> {
    rows: [&'a [u64]; 4],
}

impl Rows<'_> {
    /// The set bits of words `begin..end`, ascending.
    fn bits(&self, begin: usize, end: usize) -> impl Iterator<Item = usize> {
        let [a, b, c, d] = self.rows.map(|row| row.get(begin..end).unwrap_or(&[]));
        let words = a.iter().zip(b).zip(c.iter().zip(d));
        words
            .enumerate()
            .filter_map(move |(at, ((a, b), (c, d)))| {
                let word = a & b & c & d;
                (word != 0).then_some((begin + at, word))
            })
            .flat_map(|(at, word)| Bits { word, base: at * 64 })
    }
}

struct Bits {
    word: u64,
    base: usize,
}

impl Iterator for Bits {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        if self.word == 0 {
            return None;
        }
        let bit = self.word.trailing_zeros() as usize;
        self.word &= self.word - 1;
        Some(self.base + bit)
    }
}

/// Inclusive ranges on one axis.
type Spans<K> = Vec<(K, K)>;

/// Inclusive ranges on one axis, each with the term it belongs to; those of one term are disjoint.
type Ranges<K> = Vec<(K, K, u32)>;

#[derive(Default)]
struct Builder {
    terms: Vec<u32>,
    v4_src: Ranges<u32>,
    v4_dst: Ranges<u32>,
    v6_src: Ranges<u128>,
    v6_dst: Ranges<u128>,
    ports: Ranges<u16>,
    /// Terms by protocol.
    protos: BTreeMap<u8, Vec<u32>>,
}

impl Builder {
    fn add(&mut self, index: u32, rule: &FilterRule) {
        let mut by_ports: BTreeMap<PortRange, (Spans<u32>, Spans<u128>)> = BTreeMap::new();
        for dst in &rule.dst {
            let (v4, v6) = by_ports.entry(dst.ports).or_default();
            push_range(dst.net.first(), dst.net.last(), v4, v6);
        }
        let (mut v4_src, mut v6_src) = (Vec::new(), Vec::new());
        for src in &rule.src {
            push_range(src.first(), src.last(), &mut v4_src, &mut v6_src);
        }
        let (v4_src, v6_src) = (union(v4_src), union(v6_src));
        let mut protos = if rule.protos.is_empty() { DEFAULT_PROTOS.to_vec() } else { rule.protos.clone() };
        protos.sort_unstable();
        protos.dedup();
        for (ports, (v4_dst, v6_dst)) in by_ports {
            let term = self.terms.len() as u32;
            self.terms.push(index);
            self.v4_src.extend(v4_src.iter().map(|(first, last)| (*first, *last, term)));
            self.v6_src.extend(v6_src.iter().map(|(first, last)| (*first, *last, term)));
            let tag = |(first, last)| (first, last, term);
            self.v4_dst.extend(union(v4_dst).into_iter().map(tag));
            let tag = |(first, last)| (first, last, term);
            self.v6_dst.extend(union(v6_dst).into_iter().map(tag));
            if ports.first <= ports.last {
                self.ports.push((ports.first, ports.last, term));
            }
            for proto in &protos {
                self.protos.entry(*proto).or_default().push(term);
            }
        }
    }

    fn pad(&mut self) {
        let len = self.terms.len().next_multiple_of(64);
        self.terms.resize(len, NO_TERM);
    }
}

fn push_range(first: IpAddr, last: IpAddr, v4: &mut Spans<u32>, v6: &mut Spans<u128>) {
    match (first, last) {
        (IpAddr::V4(first), IpAddr::V4(last)) if first <= last => {
            v4.push((first.to_bits(), last.to_bits()));
        }
        (IpAddr::V6(first), IpAddr::V6(last)) if first <= last => {
            v6.push((first.to_bits(), last.to_bits()));
        }
        _ => {} // such a range contains no address
    }
}

/// Overlapping ranges joined.
fn union<K: Ord + Copy>(mut ranges: Spans<K>) -> Spans<K> {
    ranges.sort_unstable();
    let mut joined: Spans<K> = Vec::with_capacity(ranges.len());
    for (first, last) in ranges {
        match joined.last_mut() {
            Some(previous) if first <= previous.1 => previous.1 = previous.1.max(last),
            _ => joined.push((first, last)),
        }
    }
    joined
}

fn compile_protos(protos: &BTreeMap<u8, Vec<u32>>, words: usize) -> (Vec<u16>, Vec<Vec<u64>>) {
    const NO_ROW: u16 = u16::MAX;
    let mut proto_row = vec![NO_ROW; 256];
    let mut proto_rows: Vec<Vec<u64>> = Vec::new();
    let mut known: BTreeMap<&[u32], u16> = BTreeMap::new();
    for (proto, terms) in protos {
        let row = *known.entry(terms).or_insert_with(|| {
            let mut row = vec![0; words];
            for term in terms {
                toggle(&mut row, *term);
            }
            proto_rows.push(row);
            (proto_rows.len() - 1) as u16 // at most 256 protocols
        });
        proto_row[usize::from(*proto)] = row;
    }
    (proto_row, proto_rows)
}

fn toggle(row: &mut [u64], term: u32) {
    row[term as usize / 64] ^= 1 << (term % 64);
}

/// A whole number that an axis runs over.
trait Coordinate: Ord + Copy + std::fmt::Debug {
    /// The next greater one.
    fn successor(self) -> Option<Self>;
}

impl Coordinate for u16 {
    fn successor(self) -> Option<Self> {
        self.checked_add(1)
    }
}

impl Coordinate for u32 {
    fn successor(self) -> Option<Self> {
        self.checked_add(1)
    }
}

impl Coordinate for u128 {
    fn successor(self) -> Option<Self> {
        self.checked_add(1)
    }
}

#[derive(Debug)]
struct AddrAxes<K> {
    src: Axis<K>,
    dst: Axis<K>,
}

impl<K: Coordinate> AddrAxes<K> {
    fn new(src: Ranges<K>, dst: Ranges<K>, words: usize) -> Self {
        Self { src: Axis::new(src, words), dst: Axis::new(dst, words) }
    }
}

impl<K> Default for AddrAxes<K> {
    fn default() -> Self {
        Self { src: Axis::default(), dst: Axis::default() }
    }
}

#[derive(Clone, Copy, Debug)]
struct Segment {
    /// Index of the last full row at or before this segment.
    checkpoint: u32,
    /// End, in `toggles`, of those that lead to this segment.
    toggles_end: u32,
}

/// One axis cut into segments.
#[derive(Debug)]
struct Axis<K> {
    words: usize,
    /// First coordinate of each segment, ascending. What lies before the first is covered by nothing.
    starts: Vec<K>,
    segments: Vec<Segment>,
    toggles: Vec<u32>,
    /// Where in `toggles` each full row stands.
    checkpoint_at: Vec<u32>,
    /// Full rows, `words` each.
    checkpoints: Vec<u64>,
}

impl<K> Default for Axis<K> {
    fn default() -> Self {
        Self {
            words: 0,
            starts: Vec::new(),
            segments: Vec::new(),
            toggles: Vec::new(),
            checkpoint_at: Vec::new(),
            checkpoints: Vec::new(),
        }
    }
}

impl<K: Coordinate> Axis<K> {
    fn new(ranges: Ranges<K>, words: usize) -> Self {
        let mut edges: Vec<(K, u32)> = Vec::with_capacity(ranges.len() * 2);
        for (first, last, term) in ranges {
            edges.push((first, term));
            edges.extend(last.successor().map(|behind| (behind, term)));
        }
        edges.sort_unstable();
        // Two ranges of one term may touch: its two edges there cancel.
        let mut kept: Vec<(K, u32)> = Vec::with_capacity(edges.len());
        for edge in edges {
            if kept.last() == Some(&edge) {
                kept.pop();
            } else {
                kept.push(edge);
            }
        }
        let row_bytes = words * 8;
        let between = CHECKPOINT_TOGGLES.max(kept.len() * row_bytes / MAX_CHECKPOINT_BYTES);
        let mut axis = Self { words, ..Self::default() };
        let mut row = vec![0; words];
        axis.checkpoint_at.push(0);
        axis.checkpoints.extend_from_slice(&row);
        for edges in kept.chunk_by(|a, b| a.0 == b.0) {
            for (_, term) in edges {
                toggle(&mut row, *term);
                axis.toggles.push(*term);
            }
            let end = axis.toggles.len();
            let last = axis.checkpoint_at.last().map_or(0, |at| *at as usize);
            if end - last > between {
                axis.checkpoint_at.push(end as u32);
                axis.checkpoints.extend_from_slice(&row);
            }
            axis.starts.push(edges[0].0); // `chunk_by` yields no empty chunk
            axis.segments
                .push(Segment { checkpoint: (axis.checkpoint_at.len() - 1) as u32, toggles_end: end as u32 });
        }
        axis
    }

    /// The row of terms that cover `at`: a stored one, or one put together in `scratch`.
    fn row<'a>(&'a self, at: K, scratch: &'a mut Vec<u64>) -> &'a [u64] {
        let behind = self.starts.partition_point(|start| *start <= at);
        let Some(segment) = behind.checked_sub(1).and_then(|index| self.segments.get(index)) else {
            return &self.checkpoints[..self.words]; // the first row is empty of terms
        };
        let checkpoint = segment.checkpoint as usize;
        let row = &self.checkpoints[checkpoint * self.words..][..self.words];
        let toggles = &self.toggles[self.checkpoint_at[checkpoint] as usize..segment.toggles_end as usize];
        if toggles.is_empty() {
            return row;
        }
        scratch.clear();
        scratch.extend_from_slice(row);
        for term in toggles {
            toggle(scratch, *term);
        }
        scratch
    }
}

#[cfg(test)]
mod tests;
