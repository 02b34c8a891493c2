//! Why packets are dropped, and how many were.

use serde::Serialize;
use warren_common::filter::RuleId;

use crate::packet::ParseError;

/// Why a packet was dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error, Serialize)]
#[serde(tag = "code", content = "detail", rename_all = "kebab-case")]
pub enum DropReason {
    /// No active rule allows it.
    #[error("no rule allows it")]
    NoRule,
    /// A deny rule covers it.
    #[error("{0} denies it")]
    DeniedByRule(#[serde(serialize_with = "super::why::as_text")] RuleId),
    /// The lease ended, or the rules were withdrawn for another reason: nothing is allowed.
    #[error("the lease of this device's rules has ended")]
    LeaseEnded,
    /// It isn't a packet that could be judged.
    #[error("malformed packet: {0}")]
    Malformed(ParseError),
    /// A fragment whose first fragment didn't pass, or that overlaps it.
    #[error("a fragment without its first fragment")]
    NotFirstFragment,
    /// An ICMP error about nothing that passed.
    #[error("an ICMP error that belongs to no flow")]
    UnrelatedIcmpError,
    /// An ICMP message that has no business between hosts of an overlay: redirects, neighbour and router discovery.
    #[error("an ICMP message that is never forwarded")]
    ForbiddenIcmp,
    /// A reply, or a TCP segment other than a SYN, without a flow and not in a permitted direction.
    #[error("it belongs to no flow")]
    NoFlow,
    /// Its flow was ended by policy.
    #[error("policy ended its flow")]
    FlowEnded,
    /// The flow table, or the peer's share of it, is full of connections in use.
    #[error("the flow table is full")]
    FlowTableFull,
    /// Its source doesn't belong to the peer it came from (or, on egress, to this device).
    #[error("its source address belongs to somebody else")]
    SpoofedSource,
    /// Its destination belongs to no peer.
    #[error("no peer has its destination address")]
    NoPeer,
}

impl DropReason {
    /// How many reasons there are.
    pub const COUNT: usize = 12;

    /// Every label, in the order of the counters.
    pub const LABELS: [&'static str; Self::COUNT] = [
        "no-rule",
        "denied-by-rule",
        "lease-ended",
        "malformed",
        "not-first-fragment",
        "unrelated-icmp-error",
        "forbidden-icmp",
        "no-flow",
        "flow-ended",
        "flow-table-full",
        "spoofed-source",
        "no-peer",
    ];

    /// The stable name, for counters and logs.
    pub const fn label(&self) -> &'static str {
        Self::LABELS[self.index()]
    }

    const fn index(&self) -> usize {
        match self {
            Self::NoRule => 0,
            Self::DeniedByRule(_) => 1,
            Self::LeaseEnded => 2,
            Self::Malformed(_) => 3,
            Self::NotFirstFragment => 4,
            Self::UnrelatedIcmpError => 5,
            Self::ForbiddenIcmp => 6,
            Self::NoFlow => 7,
            Self::FlowEnded => 8,
            Self::FlowTableFull => 9,
            Self::SpoofedSource => 10,
            Self::NoPeer => 11,
        }
    }
}

/// Packets of one direction, counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Packets that passed.
    pub passed: u64,
    drops: [u64; DropReason::COUNT],
}

impl Counters {
    /// Each reason's label with the number of packets dropped for it, zeros included.
    pub fn drops(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        DropReason::LABELS.iter().copied().zip(self.drops)
    }

    /// Packets dropped for `reason`, whatever its detail.
    pub const fn dropped(&self, reason: &DropReason) -> u64 {
        self.drops[reason.index()]
    }

    pub(super) const fn count(&mut self, reason: &DropReason, packets: u32) {
        self.drops[reason.index()] += packets as u64;
    }
}
