//! What is kept per peer, and its timers (whitepaper, section 6). Pure bookkeeping: keys are made in `device`.

use std::collections::VecDeque;
use std::time::Duration;

use rand_core::RngCore;
use warren_common::keys::{KEY_LEN, WgPublicKey};
use warren_common::time::{Instant, UnixTime};
use zeroize::Zeroizing;

use super::handshake::{Initiator, Timestamp};
use super::mac::Cookie;
use super::message::{INITIATION_LEN, MAC_LEN, RESPONSE_LEN};
use super::session::Session;
use super::{
    KEEPALIVE_TIMEOUT, MAX_HANDSHAKE_ATTEMPTS, MAX_QUEUED_PACKETS, REJECT_AFTER_TIME, REKEY_AFTER_MESSAGES,
    REKEY_TIMEOUT, REPEAT_INITIATION_AFTER, WakeReason,
};

/// Largest random delay added to a retry, so that two sides that started together part (whitepaper, 6.1).
const MAX_JITTER_MS: u32 = 334;

/// Responses tried per initiation of ours: each costs two agreements, and a forger must guess a 24-bit index first.
const MAX_RESPONSES: u8 = 8;

/// A known peer. Small until its first handshake: everything else is behind `active`.
pub(super) struct Peer {
    pub(super) public: WgPublicKey,
    pub(super) psk: Zeroizing<[u8; KEY_LEN]>,
    pub(super) persistent_keepalive: Option<Duration>,
    /// The newest time stamp of its initiations: older ones are replays.
    pub(super) newest_timestamp: Timestamp,
    /// When its last initiation was accepted.
    pub(super) initiated: Option<Instant>,
    pub(super) rx_bytes: u64,
    pub(super) tx_bytes: u64,
    pub(super) last_handshake: Option<UnixTime>,
    pub(super) active: Option<Box<Active>>,
}

impl Peer {
    pub(super) fn activate(&mut self) -> &mut Active {
        self.active.get_or_insert_default()
    }
}

/// An initiation of ours that waits for its response.
pub(super) struct Pending {
    pub(super) local: u32,
    pub(super) noise: Initiator,
    /// As sent: the same bytes go out again when the path changes or nothing answers, so that a response under way stays
    /// good.
    pub(super) message: [u8; INITIATION_LEN],
    pub(super) mac1: [u8; MAC_LEN],
    pub(super) responses_left: u8,
}

impl Pending {
    pub(super) fn new(
        local: u32,
        noise: Initiator,
        message: [u8; INITIATION_LEN],
        mac1: [u8; MAC_LEN],
    ) -> Self {
        Self { local, noise, message, mac1, responses_left: MAX_RESPONSES }
    }
}

/// Our last response: a cookie reply may be to it, and an initiation that is repeated gets it again.
pub(super) struct Response {
    /// Of the session that it offers.
    pub(super) local: u32,
    pub(super) message: [u8; RESPONSE_LEN],
    pub(super) mac1: [u8; MAC_LEN],
    /// When it went out last.
    pub(super) sent: Instant,
}

/// A peer with which something is under way.
#[derive(Default)]
pub(super) struct Active {
    pub(super) current: Option<Box<Session>>,
    /// The two before, newest first: only for receiving.
    pub(super) previous: [Option<Box<Session>>; 2],
    /// Made as responder, and not confirmed by a first message yet.
    pub(super) next: Option<Box<Session>>,
    pub(super) pending: Option<Box<Pending>>,
    pub(super) cookie: Option<Cookie>,
    pub(super) response: Option<Box<Response>>,
    pub(super) queue: VecDeque<Vec<u8>>,

    /// The device's list of peers with something to transmit has this one.
    pub(super) listed: bool,
    pub(super) wants_initiation: bool,
    pub(super) wants_resend: bool,
    pub(super) wants_keepalive: bool,

    attempts: u32,
    retry_at: Option<Instant>,
    initiation_sent: Option<Instant>,
    repeat_at: Option<Instant>,
    keepalive_at: Option<Instant>,
    another_keepalive: bool,
    answer_due: Option<Instant>,
    persistent_at: Option<Instant>,
    /// The current session's last-minute rekey (on receiving) was started.
    rekeyed_late: bool,
}

/// What came due; sessions to drop are taken out by the device, which owns the indices.
#[derive(Default)]
pub(super) struct Fired {
    pub(super) failed: bool,
    pub(super) sessions_expired: bool,
}

impl Active {
    /// Asks for a new session, unless one is already being asked for.
    pub(super) fn request_handshake(&mut self, now: Instant) {
        if self.handshaking() {
            return;
        }
        self.attempts = 0;
        match self.initiation_sent.map(|sent| sent + REKEY_TIMEOUT) {
            Some(allowed) if now < allowed => self.retry_at = Some(allowed),
            _ => self.wants_initiation = true,
        }
    }

    /// An initiation under way goes out again at once.
    pub(super) fn resend(&mut self) {
        self.wants_resend = self.pending.is_some() && !self.wants_initiation;
    }

    /// A handshake of ours is under way or about to start.
    pub(super) const fn handshaking(&self) -> bool {
        self.wants_initiation || self.retry_at.is_some()
    }

    pub(super) fn end_series(&mut self) {
        self.attempts = 0;
        self.retry_at = None;
        self.repeat_at = None;
        self.wants_initiation = false;
        self.wants_resend = false;
    }

    pub(super) fn usable(&mut self, now: Instant) -> Option<&mut Session> {
        self.current.as_deref_mut().filter(|session| session.can_send(now))
    }

    pub(super) fn has_output(&self, now: Instant) -> bool {
        self.wants_initiation
            || self.wants_resend
            || self.wants_keepalive
            || (!self.queue.is_empty() && self.current.as_ref().is_some_and(|s| s.can_send(now)))
    }

    pub(super) fn queue_bytes(&self) -> usize {
        self.queue.iter().map(Vec::len).sum()
    }

    /// Where sessions are kept.
    pub(super) fn places(&mut self) -> impl Iterator<Item = &mut Option<Box<Session>>> {
        [&mut self.current, &mut self.next].into_iter().chain(&mut self.previous)
    }

    /// All sessions, the likeliest to receive first.
    pub(super) fn sessions(&mut self) -> impl Iterator<Item = &mut Session> {
        self.places().flatten().map(AsMut::as_mut)
    }

    /// Keeps `packet` until there is a session. Returns how many older ones were dropped for it.
    pub(super) fn enqueue(&mut self, packet: &[u8]) -> u64 {
        let dropped = self.queue.len() >= MAX_QUEUED_PACKETS;
        if dropped {
            self.queue.pop_front();
        }
        self.queue.push_back(packet.to_vec());
        u64::from(dropped)
    }

    pub(super) fn on_initiation_sent(
        &mut self,
        now: Instant,
        keepalive: Option<Duration>,
        rng: &mut impl RngCore,
    ) {
        self.wants_initiation = false;
        self.wants_resend = false;
        self.attempts += 1;
        self.initiation_sent = Some(now);
        self.retry_at = Some(now + REKEY_TIMEOUT + jitter(rng));
        // Later ones of the series may well be for somebody who isn't there.
        self.repeat_at = (self.attempts == 1).then(|| now + REPEAT_INITIATION_AFTER[0]);
        self.on_authentic_sent(now, keepalive);
    }

    /// The peer has too much to do for an initiation without its cookie: the next one will have it.
    pub(super) fn on_cookie(&mut self, cookie: Cookie) {
        self.cookie = Some(cookie);
        self.repeat_at = None;
    }

    /// Anything that the peer can authenticate went out.
    pub(super) fn on_authentic_sent(&mut self, now: Instant, keepalive: Option<Duration>) {
        self.keepalive_at = None;
        self.another_keepalive = false;
        self.persistent_at = keepalive.map(|interval| now + interval);
    }

    /// A packet or keepalive went out in the current session.
    pub(super) fn on_data_sent(
        &mut self,
        now: Instant,
        keepalive: Option<Duration>,
        is_keepalive: bool,
        rng: &mut impl RngCore,
    ) {
        let again = is_keepalive && self.another_keepalive;
        self.on_authentic_sent(now, keepalive);
        if again {
            self.keepalive_at = Some(now + KEEPALIVE_TIMEOUT);
        }
        if !is_keepalive && self.answer_due.is_none() {
            self.answer_due = Some(now + KEEPALIVE_TIMEOUT + REKEY_TIMEOUT + jitter(rng));
        }
        let stale = self.current.as_ref().is_some_and(|session| {
            session.sent >= REKEY_AFTER_MESSAGES || session.age(now) >= session.renew_after
        });
        if stale {
            self.request_handshake(now);
        }
    }

    /// Anything authentic came in: the peer hears us.
    pub(super) fn on_authentic_received(&mut self, now: Instant, keepalive: Option<Duration>) {
        self.answer_due = None;
        self.persistent_at = keepalive.map(|interval| now + interval);
    }

    /// A packet or keepalive came in.
    pub(super) fn on_data_received(&mut self, now: Instant, keepalive: Option<Duration>, is_keepalive: bool) {
        self.on_authentic_received(now, keepalive);
        if !is_keepalive {
            if self.keepalive_at.is_none() {
                self.keepalive_at = Some(now + KEEPALIVE_TIMEOUT);
            } else {
                self.another_keepalive = true;
            }
        }
        let late = self.current.as_ref().is_some_and(|session| {
            session.initiator && session.age(now) >= REJECT_AFTER_TIME - KEEPALIVE_TIMEOUT - REKEY_TIMEOUT
        });
        if late && !self.rekeyed_late {
            self.rekeyed_late = true;
            self.request_handshake(now);
        }
    }

    /// A new current session is in place.
    pub(super) fn on_established(&mut self) {
        self.end_series();
        self.rekeyed_late = false;
    }

    /// Does what is due at `now`.
    pub(super) fn fire(&mut self, now: Instant, keepalive: Option<Duration>) -> Fired {
        let mut fired = Fired::default();
        if due(&mut self.retry_at, now) {
            if self.attempts >= MAX_HANDSHAKE_ATTEMPTS {
                self.end_series();
                fired.failed = true;
            } else {
                self.wants_initiation = true;
            }
        }
        if due(&mut self.repeat_at, now) {
            self.resend();
            let next = |sent: Instant| {
                REPEAT_INITIATION_AFTER.into_iter().map(|after| sent + after).find(|at| *at > now)
            };
            self.repeat_at = self.initiation_sent.and_then(next);
        }
        if due(&mut self.keepalive_at, now) {
            self.wants_keepalive |= self.current.as_ref().is_some_and(|s| s.can_send(now));
        }
        if due(&mut self.answer_due, now) {
            self.request_handshake(now);
        }
        if due(&mut self.persistent_at, now) {
            self.persistent_at = keepalive.map(|interval| now + interval);
            self.wants_keepalive = true;
        }
        fired.sessions_expired = self.session_expiry().is_some_and(|at| at <= now);
        fired
    }

    /// The next time at which [`Self::fire`] has something to do.
    pub(super) fn deadline(&self) -> Option<(Instant, WakeReason)> {
        [
            (self.retry_at, WakeReason::HandshakeRetry),
            (self.repeat_at, WakeReason::HandshakeRetry),
            (self.keepalive_at, WakeReason::Keepalive),
            (self.answer_due, WakeReason::AnswerDue),
            (self.persistent_at, WakeReason::PersistentKeepalive),
            (self.session_expiry(), WakeReason::SessionExpiry),
        ]
        .into_iter()
        .filter_map(|(at, reason)| at.map(|at| (at, reason)))
        .min()
    }

    fn session_expiry(&self) -> Option<Instant> {
        [&self.current, &self.next]
            .into_iter()
            .chain(&self.previous)
            .flatten()
            .map(|session| session.created + REJECT_AFTER_TIME)
            .min()
    }

    /// True if nothing is left that needs remembering, so that the peer can shrink to an idle one.
    pub(super) fn is_over(&self, now: Instant) -> bool {
        self.deadline().is_none()
            && self.pending.is_none()
            && self.queue.is_empty()
            && !self.has_output(now)
            && self.initiation_sent.is_none_or(|sent| now.since(sent) >= REKEY_TIMEOUT)
    }
}

fn due(timer: &mut Option<Instant>, now: Instant) -> bool {
    timer.take_if(|at| *at <= now).is_some()
}

fn jitter(rng: &mut impl RngCore) -> Duration {
    Duration::from_millis(u64::from(rng.next_u32() % MAX_JITTER_MS))
}
