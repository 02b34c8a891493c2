//! Which counters of a session have been seen: a sliding bitmap (RFC 6479).

const WORD_BITS: u64 = u64::BITS as u64;
const WORDS: usize = 128;

/// Bits of the bitmap: how much the packets of one session may overtake each other. 8 192 is what the Linux kernel
/// uses; a move from a relayed to a direct path reorders more than the 1 024 of some others hold.
pub const REPLAY_WINDOW_BITS: usize = WORDS * WORD_BITS as usize;

/// How far behind the newest counter a packet is still accepted: one word of the bitmap is always being filled.
pub const MAX_REORDER: u64 = REPLAY_WINDOW_BITS as u64 - WORD_BITS;

/// The counters a session has accepted.
pub(super) struct ReplayWindow {
    /// One more than the highest accepted counter; 0 when none was.
    next: u64,
    bits: [u64; WORDS],
}

impl ReplayWindow {
    pub(super) const fn new() -> Self {
        Self { next: 0, bits: [0; WORDS] }
    }

    /// True if a packet with `counter` may still be accepted. Cheap, so that replays cost no decryption.
    pub(super) const fn would_accept(&self, counter: u64) -> bool {
        if counter >= self.next {
            return counter < u64::MAX;
        }
        if self.next - counter > MAX_REORDER {
            return false;
        }
        let (word, bit) = position(counter);
        self.bits[word] & bit == 0
    }

    /// Records `counter`, whose packet was authentic. False if it was recorded before or is too old.
    pub(super) fn accept(&mut self, counter: u64) -> bool {
        if !self.would_accept(counter) {
            return false;
        }
        if counter >= self.next {
            // Words between the newest and this one hold counters from one turn ago.
            let newest = self.next.saturating_sub(1) / WORD_BITS;
            let turned = (counter / WORD_BITS - newest).min(WORDS as u64);
            for step in 1..=turned {
                self.bits[((newest + step) % WORDS as u64) as usize] = 0;
            }
            self.next = counter + 1;
        }
        let (word, bit) = position(counter);
        self.bits[word] |= bit;
        true
    }
}

const fn position(counter: u64) -> (usize, u64) {
    ((counter / WORD_BITS % WORDS as u64) as usize, 1 << (counter % WORD_BITS))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    /// The slow oracle: remembers every counter.
    #[derive(Default)]
    struct Oracle {
        seen: BTreeSet<u64>,
    }

    impl Oracle {
        fn accept(&mut self, counter: u64) -> bool {
            let too_old =
                self.seen.last().is_some_and(|newest| (newest + 1).saturating_sub(counter) > MAX_REORDER);
            counter < u64::MAX && !too_old && self.seen.insert(counter)
        }
    }

    #[test]
    fn edges_of_the_window() {
        let mut window = ReplayWindow::new();
        assert!(window.accept(0));
        assert!(!window.accept(0));
        assert!(window.accept(MAX_REORDER));
        assert!(window.accept(1));
        assert!(!window.accept(0), "just fell out");
        assert!(window.accept(10 * REPLAY_WINDOW_BITS as u64));
        assert!(!window.accept(MAX_REORDER));
        assert!(window.accept(u64::MAX - 1));
        assert!(!window.accept(u64::MAX), "the nonce that never is");
        assert!(!window.accept(u64::MAX - 1));
    }

    #[derive(Debug, Clone)]
    enum Step {
        Ahead(u64),
        Behind(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            6 => (0..130u64).prop_map(Step::Ahead),
            1 => (0..3 * REPLAY_WINDOW_BITS as u64).prop_map(Step::Ahead),
            6 => (0..200u64).prop_map(Step::Behind),
            3 => (MAX_REORDER - 70..MAX_REORDER + 70).prop_map(Step::Behind),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]

        #[test]
        fn agrees_with_the_slow_oracle(start in prop_oneof![Just(0u64), Just(1 << 40)], steps in prop::collection::vec(step(), 1..400)) {
            let (mut window, mut oracle) = (ReplayWindow::new(), Oracle::default());
            let mut newest = start;
            for step in steps {
                let counter = match step {
                    Step::Ahead(by) => newest + by,
                    Step::Behind(by) => newest.saturating_sub(by),
                };
                newest = newest.max(counter);
                let wanted = oracle.accept(counter);
                prop_assert_eq!(window.would_accept(counter), wanted);
                prop_assert_eq!(window.accept(counter), wanted);
            }
        }
    }
}
