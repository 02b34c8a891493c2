//! Which counters of a UDP session have been seen: a sliding bitmap (RFC 6479), small since there is one per client.

const WORD_BITS: u64 = u64::BITS as u64;
const WORDS: usize = 16;

/// How far behind the newest counter a datagram is still accepted: 10 ms of full packets at 1 Gbit/s. One word of the
/// bitmap is always being filled.
pub const MAX_UDP_REORDER: u64 = (WORDS as u64 - 1) * WORD_BITS;

/// What became of a counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Seen {
    /// Above all that came before.
    Newest,
    /// Overtaken, but new.
    Late,
    /// Seen before, or too old to tell.
    Replayed,
}

/// The counters that a session has accepted.
#[derive(Debug)]
pub(super) struct Window {
    /// One more than the highest accepted counter; 0 when none was.
    next: u64,
    bits: [u64; WORDS],
}

impl Window {
    pub(super) const fn new() -> Self {
        Self { next: 0, bits: [0; WORDS] }
    }

    /// Records `counter`, whose datagram was authentic.
    pub(super) fn record(&mut self, counter: u64) -> Seen {
        let (word, bit) = ((counter / WORD_BITS % WORDS as u64) as usize, 1 << (counter % WORD_BITS));
        if counter == u64::MAX {
            return Seen::Replayed; // there is no next one
        }
        if counter >= self.next {
            // Words between the newest and this one hold counters from one turn ago.
            let newest = self.next.saturating_sub(1) / WORD_BITS;
            for step in 1..=(counter / WORD_BITS - newest).min(WORDS as u64) {
                self.bits[((newest + step) % WORDS as u64) as usize] = 0;
            }
            self.next = counter + 1;
            self.bits[word] |= bit;
            return Seen::Newest;
        }
        if self.next - counter > MAX_UDP_REORDER || self.bits[word] & bit != 0 {
            return Seen::Replayed;
        }
        self.bits[word] |= bit;
        Seen::Late
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_agrees_with_a_set(steps in prop::collection::vec((0..3u8, 0..3_000u64), 1..400)) {
            let (mut window, mut seen, mut at) = (Window::new(), BTreeSet::new(), 0u64);
            for (way, by) in steps {
                at = match way {
                    0 => at + by,
                    1 => at.saturating_sub(by),
                    _ => at + by % 3,
                };
                let newest = seen.last().copied();
                let expected = match newest {
                    None => Seen::Newest,
                    Some(newest) if at > newest => Seen::Newest,
                    Some(newest) if newest + 1 - at > MAX_UDP_REORDER || seen.contains(&at) => Seen::Replayed,
                    Some(_) => Seen::Late,
                };
                prop_assert_eq!(window.record(at), expected);
                if expected != Seen::Replayed {
                    seen.insert(at);
                }
            }
        }
    }

    #[test]
    fn the_last_counter_is_never_accepted() {
        let mut window = Window::new();
        assert_eq!(window.record(u64::MAX - 1), Seen::Newest);
        assert_eq!(window.record(u64::MAX), Seen::Replayed);
    }
}
