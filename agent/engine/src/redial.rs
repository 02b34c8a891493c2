//! When a relay is tried again, and how long an attempt may take.
//!
//! A relay that is away is tried with pauses that double, from [`MIN_BACKOFF`] to [`MAX_BACKOFF`]. One that said it would
//! close is restarted, mostly: for [`RESTART_TIME`] it is tried every [`RESTART_PAUSE`]. Every pause is cut by up to half at
//! random, so that those who lost a relay together don't come back together.

use std::time::Duration;

use warren_common::time::Instant;

/// First pause after a lost or failed connection.
pub const MIN_BACKOFF: Duration = Duration::from_millis(250);
/// Longest pause between two attempts.
pub const MAX_BACKOFF: Duration = Duration::from_secs(30);
/// Pause after another connection of the same device took over: two hosts with one identity must not fight.
pub const REPLACED_BACKOFF: Duration = Duration::from_secs(20);
/// A relay that said it would close is expected back for so long.
pub const RESTART_TIME: Duration = Duration::from_secs(10);
/// Pause between attempts meanwhile.
pub const RESTART_PAUSE: Duration = Duration::from_millis(100);
/// The longest that one of them takes, or two round trips: what is sent before the relay listens is lost, and QUIC repeats
/// itself only after a second.
pub const RESTART_DIAL_TIMEOUT: Duration = Duration::from_millis(400);
/// How long a connection that is replaced by another one to the same relay, which is restarted or was left for another network,
/// holds packets for that one before it counts as lost.
pub const HOLD_TIME: Duration = Duration::from_millis(1_500);
/// Longest time from the first packet to a connection.
pub const DIAL_TIMEOUT: Duration = Duration::from_secs(15);
/// A connection that stood for so long starts over with the first pause.
pub const STABLE: Duration = Duration::from_secs(30);

/// How a connection, or an attempt to make one, ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// It broke, never came to be, or the relay refused it.
    Lost,
    /// The relay closes, to be started again.
    ShuttingDown,
    /// Another connection of this device took its place.
    Replaced,
    /// This host is in another network, where it leads nowhere. That says nothing of the relay.
    Moved,
}

/// Decides about attempts to reach one relay.
#[derive(Clone, Debug)]
pub struct Redial {
    backoff: Duration,
    /// Until when the relay is expected back at any moment.
    restarting: Option<Instant>,
}

impl Default for Redial {
    fn default() -> Self {
        Self { backoff: MIN_BACKOFF, restarting: None }
    }
}

impl Redial {
    /// A connection stood for `stood` (zero: an attempt failed) and ended. How long to wait before the next attempt;
    /// `random` is any number.
    pub fn on_ended(&mut self, now: Instant, stood: Duration, how: Ended, random: u32) -> Duration {
        if stood >= STABLE {
            self.backoff = MIN_BACKOFF;
        }
        if how == Ended::ShuttingDown {
            self.restarting = Some(now + RESTART_TIME);
        }
        let pause = match how {
            Ended::Replaced => REPLACED_BACKOFF,
            Ended::Moved => {
                self.on_network_change();
                Duration::ZERO
            }
            Ended::Lost | Ended::ShuttingDown if self.is_restarting(now) => RESTART_PAUSE,
            Ended::Lost | Ended::ShuttingDown => {
                let pause = self.backoff;
                self.backoff = (2 * pause).min(MAX_BACKOFF);
                pause
            }
        };
        pause.mul_f64(0.5 + f64::from(random) / f64::from(u32::MAX) / 2.0)
    }

    /// The relay has let us in.
    pub const fn on_connected(&mut self) {
        self.restarting = None;
    }

    /// The network is another one: what failed before says nothing, and an attempt is worth making at once.
    pub const fn on_network_change(&mut self) {
        self.backoff = MIN_BACKOFF;
    }

    /// How long an attempt that starts now may take; `rtt` is the round trip to the relay, if it is known, or zero.
    pub fn dial_timeout(&self, now: Instant, rtt: Duration) -> Duration {
        if self.is_restarting(now) { RESTART_DIAL_TIMEOUT.max(2 * rtt) } else { DIAL_TIMEOUT }
    }

    /// The relay said that it would close, and is expected back: that it is not there says nothing.
    pub fn is_restarting(&self, now: Instant) -> bool {
        self.restarting.is_some_and(|until| now < until)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const START: Instant = Instant::from_nanos(1_000_000_000);

    fn failed(redial: &mut Redial, now: Instant) -> Duration {
        redial.on_ended(now, Duration::ZERO, Ended::Lost, u32::MAX)
    }

    #[test]
    fn pauses_double_until_a_connection_stood() {
        let mut redial = Redial::default();
        let pauses: Vec<u64> = (0..9).map(|_| failed(&mut redial, START).as_millis() as u64).collect();
        assert_eq!(pauses, [250, 500, 1_000, 2_000, 4_000, 8_000, 16_000, 30_000, 30_000]);
        assert_eq!(redial.on_ended(START, STABLE, Ended::Lost, u32::MAX), MIN_BACKOFF);
        assert_eq!(failed(&mut redial, START), 2 * MIN_BACKOFF);
        redial.on_network_change();
        assert_eq!(failed(&mut redial, START), MIN_BACKOFF);
        assert_eq!(redial.on_ended(START, Duration::ZERO, Ended::Moved, u32::MAX), Duration::ZERO);
        assert_eq!(failed(&mut redial, START), MIN_BACKOFF);
    }

    #[test]
    fn a_relay_that_is_restarted_is_tried_often_for_a_while_and_no_longer() {
        let mut redial = Redial::default();
        let rtt = Duration::from_millis(300);
        assert_eq!(redial.dial_timeout(START, rtt), DIAL_TIMEOUT);
        let pause = redial.on_ended(START, STABLE, Ended::ShuttingDown, u32::MAX);
        assert_eq!(
            (pause, redial.dial_timeout(START, Duration::ZERO)),
            (RESTART_PAUSE, RESTART_DIAL_TIMEOUT)
        );
        assert_eq!(redial.dial_timeout(START, rtt), 2 * rtt);
        for _ in 0..50 {
            assert_eq!(failed(&mut redial, START + RESTART_TIME / 2), RESTART_PAUSE);
        }
        assert_eq!(failed(&mut redial, START + RESTART_TIME), MIN_BACKOFF, "it is not coming back");
        redial.on_ended(START, STABLE, Ended::ShuttingDown, 0);
        redial.on_connected();
        assert_eq!(redial.dial_timeout(START, Duration::ZERO), DIAL_TIMEOUT);
        assert_eq!(redial.on_ended(START, Duration::ZERO, Ended::Replaced, u32::MAX), REPLACED_BACKOFF);
    }

    proptest! {
        #[test]
        fn jitter_cuts_a_pause_by_half_at_most(random in any::<u32>()) {
            let pause = Redial::default().on_ended(START, Duration::ZERO, Ended::Lost, random);
            prop_assert!((MIN_BACKOFF / 2..=MIN_BACKOFF).contains(&pause));
        }
    }
}
