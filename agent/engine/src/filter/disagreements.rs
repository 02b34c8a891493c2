//! Connections that the other end let out and this end refuses. Both ends hold the same policy, so one of them has an
//! older revision (which passes), or it doesn't obey, or one of the two has a fault: all of it worth an event.
//!
//! The other direction can't be seen: what the sender refuses never leaves it.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::time::Duration;

use serde::Serialize;
use warren_common::time::{Instant, Now, UnixTime};

use super::DropReason;
use super::notices::Budget;
use crate::packet::Packet;

/// Refused connections remembered, a count; the one that was quiet for longest goes first.
pub const MAX_DISAGREEMENTS: usize = 64;
/// Time after which a connection that is still refused is news again.
pub const DISAGREEMENT_INTERVAL: Duration = Duration::from_secs(60);
/// News at once, a count; in the long run one each [`NEWS_EVERY`]. A peer that tries every port is logged no more often.
pub const MAX_NEWS_BURST: u32 = 16;
/// See [`MAX_NEWS_BURST`].
pub const NEWS_EVERY: Duration = Duration::from_secs(6);

/// A connection that the peer let out and this end refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Disagreement {
    /// The peer, by the engine's handle.
    pub peer: u32,
    /// Source address.
    pub src: IpAddr,
    /// Destination address.
    pub dst: IpAddr,
    /// The IP protocol.
    pub proto: u8,
    /// Destination port, or zero.
    pub port: u16,
    /// Why this end refuses it.
    pub reason: DropReason,
    /// The revision of this end's rules.
    pub revision: u64,
    /// Packets refused so far.
    pub count: u64,
    /// When the last one was.
    pub last: UnixTime,
}

#[derive(Debug)]
struct Known {
    about: Disagreement,
    seen: Instant,
    told: Instant,
}

#[derive(Debug)]
pub(super) struct Disagreements {
    known: Vec<Known>,
    news: VecDeque<Disagreement>,
    budget: Budget,
}

impl Default for Disagreements {
    fn default() -> Self {
        // Full from the start: nothing is allocated per packet.
        let (known, news) =
            (Vec::with_capacity(MAX_DISAGREEMENTS), VecDeque::with_capacity(MAX_DISAGREEMENTS));
        Self { known, news, budget: Budget::default() }
    }
}

impl Disagreements {
    pub(super) fn note(
        &mut self,
        now: Now,
        packet: &Packet<'_>,
        peer: u32,
        reason: DropReason,
        revision: u64,
    ) {
        let about = Disagreement {
            peer,
            src: packet.src(),
            dst: packet.dst(),
            proto: packet.proto,
            port: packet.dst_port(),
            reason,
            revision,
            count: 1,
            last: now.unix,
        };
        let same = |known: &&mut Known| {
            let old = &known.about;
            (old.peer, old.src, old.dst, old.proto, old.port)
                == (about.peer, about.src, about.dst, about.proto, about.port)
        };
        let news = match self.known.iter_mut().find(same) {
            Some(known) => {
                known.about = Disagreement { count: known.about.count + 1, ..about };
                known.seen = now.boot;
                if now.boot.since(known.told) < DISAGREEMENT_INTERVAL {
                    return;
                }
                known.told = now.boot;
                known.about
            }
            None => {
                let known = Known { about, seen: now.boot, told: now.boot };
                if self.known.len() < MAX_DISAGREEMENTS {
                    self.known.push(known);
                } else if let Some(quiet) = self.known.iter_mut().min_by_key(|known| known.seen) {
                    *quiet = known;
                }
                about
            }
        };
        if self.news.len() < MAX_DISAGREEMENTS && self.budget.take(now.boot, NEWS_EVERY, MAX_NEWS_BURST) {
            self.news.push_back(news);
        }
    }

    pub(super) fn forget(&mut self, peer: u32) {
        self.known.retain(|known| known.about.peer != peer);
        self.news.retain(|about| about.peer != peer);
    }

    pub(super) fn poll(&mut self) -> Option<Disagreement> {
        self.news.pop_front()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Disagreement> {
        self.known.iter().map(|known| &known.about)
    }
}
