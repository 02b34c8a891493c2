//! A simulated device's connection to one relay: what the agent's relay client does, without its I/O. When to ping, to
//! give up and to try again is decided by the modules that the agent uses.

use std::time::Duration;

use warren_common::ids::{DeviceId, RelayId};
use warren_common::keys::ProbeSecretKey;
use warren_common::time::Instant;
use warren_common::wire::control::Signed;
use warren_common::wire::relay::{
    Binding, Challenge, Class, DATA_QUEUE_BYTES, Frame, FrameQueue, GoneReason, RefusalCode, TokenRef,
    is_handshake,
};
use warren_engine::redial::{Ended, HOLD_TIME, Redial};
use warren_engine::relay_link::{CONNECTION_MIN_PAUSE, Check, Liveness};

/// A token is asked for again after so long without one.
const ASK_INTERVAL: Duration = Duration::from_secs(5);
/// A token older than this (of at most 10 min of life) is not used for a new connection.
const TOKEN_FRESH: Duration = Duration::from_secs(420);
/// How long a relay may take to let us in once it is connected.
const STEP_TIMEOUT: Duration = Duration::from_secs(9);

/// Names an attempt to connect, and the connection that it becomes: a device uses each number once.
pub(super) type DialNo = u64;

/// What an uplink wants done, or has to tell.
#[derive(Debug)]
pub(super) enum Out {
    Dial(DialNo),
    Frame(DialNo, Vec<u8>),
    HangUp(DialNo),
    WantToken,
    Up,
    Down,
    Doubt(bool),
    Draining,
    /// A packet for that device went nowhere.
    Gone(DeviceId),
    Received(DeviceId, Vec<u8>),
}

#[derive(Debug)]
enum State {
    Waiting { until: Instant },
    Dialling { dial: DialNo, until: Instant },
    Open { dial: DialNo, challenge: Challenge, until: Instant },
    Ready { dial: DialNo, since: Instant, liveness: Box<Liveness> },
}

/// See the module.
#[derive(Debug)]
pub(super) struct Uplink {
    binding: Binding,
    state: State,
    token: Option<(Signed, Instant)>,
    /// When a token was last asked for that has not come.
    asked: Option<Instant>,
    redial: Redial,
    /// What waits for a connection that replaces the last one, and until when.
    held: Option<(FrameQueue, Instant)>,
    rtt: Duration,
    /// When it was last of use.
    pub(super) used: Instant,
}

impl Uplink {
    /// It dials when its first deadline, now, is handled.
    pub(super) fn new(now: Instant, binding: Binding) -> Self {
        Self {
            binding,
            state: State::Waiting { until: now },
            token: None,
            asked: None,
            redial: Redial::default(),
            held: None,
            rtt: Duration::ZERO,
            used: now,
        }
    }

    pub(super) const fn relay(&self) -> RelayId {
        self.binding.relay
    }

    /// The connection, if the relay forwards over it.
    pub(super) const fn ready(&self) -> Option<DialNo> {
        match &self.state {
            State::Ready { dial, .. } => Some(*dial),
            State::Waiting { .. } | State::Dialling { .. } | State::Open { .. } => None,
        }
    }

    pub(super) const fn dial_no(&self) -> Option<DialNo> {
        match &self.state {
            State::Waiting { .. } => None,
            State::Dialling { dial, .. } | State::Open { dial, .. } | State::Ready { dial, .. } => {
                Some(*dial)
            }
        }
    }

    pub(super) fn deadline(&self) -> Instant {
        let held = self.held.as_ref().map_or(Instant::FAR_FUTURE, |(_, until)| *until);
        self.state_deadline().min(held)
    }

    fn state_deadline(&self) -> Instant {
        let ask = self.asked.filter(|_| !matches!(self.state, State::Waiting { .. }));
        let ask = ask.map_or(Instant::FAR_FUTURE, |at| at + ASK_INTERVAL);
        match &self.state {
            State::Waiting { until } => *until,
            State::Dialling { until, .. } | State::Open { until, .. } => (*until).min(ask),
            State::Ready { liveness, .. } => liveness.deadline().min(ask),
        }
    }

    /// Does what is due; `next` numbers the next attempt, `random` is any number.
    pub(super) fn handle_timeout(
        &mut self,
        now: Instant,
        next: &mut DialNo,
        random: u32,
        out: &mut Vec<Out>,
    ) {
        if self.asked.is_some_and(|at| at + ASK_INTERVAL <= now) {
            self.ask(now, out);
        }
        if self.held.take_if(|(_, until)| *until <= now).is_some() {
            out.push(Out::Down);
        }
        match &mut self.state {
            State::Waiting { until } if *until <= now => {
                *next += 1;
                self.dial(now, *next, out);
            }
            State::Dialling { dial, until } | State::Open { dial, until, .. } if *until <= now => {
                out.push(Out::HangUp(*dial));
                self.on_ended(now, None, random, out);
            }
            State::Ready { dial, liveness, .. } => match liveness.check(now) {
                Check::Fine => {}
                Check::Ping => {
                    out.push(Out::Frame(*dial, Frame::Ping { nonce: now.as_nanos() / 1_000 }.to_vec()));
                    out.extend(liveness.doubt_news().map(Out::Doubt));
                }
                Check::Dead => {
                    out.push(Out::HangUp(*dial));
                    self.on_ended(now, None, random, out);
                }
            },
            State::Waiting { .. } | State::Dialling { .. } | State::Open { .. } => {}
        }
    }

    fn dial(&mut self, now: Instant, dial: DialNo, out: &mut Vec<Out>) {
        if self.fresh_token(now).is_none() {
            (self.token, self.asked) = (None, None);
            self.ask(now, out);
        }
        self.state = State::Dialling { dial, until: now + self.redial.dial_timeout(now, self.rtt) };
        out.push(Out::Dial(dial));
    }

    fn ask(&mut self, now: Instant, out: &mut Vec<Out>) {
        self.asked = Some(now);
        out.push(Out::WantToken);
    }

    fn fresh_token(&self, now: Instant) -> Option<&Signed> {
        self.token.as_ref().filter(|(_, at)| now.since(*at) < TOKEN_FRESH).map(|(token, _)| token)
    }

    /// The connection, or the attempt, is over; `refused`: the relay says so.
    pub(super) fn on_ended(
        &mut self,
        now: Instant,
        refused: Option<RefusalCode>,
        random: u32,
        out: &mut Vec<Out>,
    ) {
        let stood = match &self.state {
            State::Ready { since, .. } => now.since(*since),
            State::Waiting { .. } | State::Dialling { .. } | State::Open { .. } => Duration::ZERO,
        };
        let how = match refused {
            Some(RefusalCode::ShuttingDown) => Ended::ShuttingDown,
            Some(RefusalCode::Replaced) => Ended::Replaced,
            // Of the other reasons, those about the token matter most: no harm in asking for another in any case.
            Some(_) => {
                self.token = None;
                Ended::Lost
            }
            None => Ended::Lost,
        };
        if matches!(self.state, State::Ready { .. }) && how == Ended::ShuttingDown {
            self.held = Some((FrameQueue::new(DATA_QUEUE_BYTES), now + HOLD_TIME));
            out.push(Out::Doubt(true));
        }
        let pause = self.redial.on_ended(now, stood, how, random);
        self.state = State::Waiting { until: now + pause };
        if self.held.is_none() {
            out.push(Out::Down);
        }
    }

    /// The network may be another one: is the connection still alive? If there is none, now is a time to try.
    pub(super) fn on_network_change(&mut self, now: Instant, random: u32, out: &mut Vec<Out>) {
        match &mut self.state {
            State::Ready { liveness, .. } => liveness.suspect(now),
            State::Waiting { until } => {
                *until = now;
                self.redial.on_network_change();
            }
            State::Dialling { dial, .. } | State::Open { dial, .. } => {
                out.push(Out::HangUp(*dial));
                self.redial.on_network_change();
                self.on_ended(now, None, random, out);
            }
        }
    }

    /// Takes a token.
    pub(super) fn on_token(
        &mut self,
        now: Instant,
        token: Signed,
        probe: &ProbeSecretKey,
        out: &mut Vec<Out>,
    ) {
        self.asked = None;
        if let (State::Ready { dial, .. }, Some(token)) = (&self.state, TokenRef::new(&token)) {
            out.push(Out::Frame(*dial, Frame::TokenRefresh { token }.to_vec()));
        }
        self.token = Some((token, now));
        self.authenticate(now, probe, out);
    }

    fn authenticate(&self, now: Instant, probe: &ProbeSecretKey, out: &mut Vec<Out>) {
        let State::Open { dial, challenge, .. } = &self.state else { return };
        let Some(token) = self.fresh_token(now).and_then(TokenRef::new) else { return };
        if let Some(proven) = challenge.prove(probe, &self.binding, token) {
            out.push(Out::Frame(*dial, Frame::Auth { proof: proven.proof, token }.to_vec()));
        }
    }

    /// The peers that a token must name have changed.
    pub(super) fn want_token(&mut self, now: Instant, out: &mut Vec<Out>) {
        self.ask(now, out);
    }

    /// Takes a frame of the relay.
    pub(super) fn on_frame(
        &mut self,
        now: Instant,
        frame: &[u8],
        probe: &ProbeSecretKey,
        out: &mut Vec<Out>,
    ) {
        if let State::Ready { liveness, .. } = &mut self.state {
            liveness.on_heard();
            out.extend(liveness.doubt_news().map(Out::Doubt));
        }
        let Ok(Some(frame)) = Frame::decode(frame) else { return };
        match (frame, &mut self.state) {
            (Frame::Challenge(challenge), State::Dialling { dial, .. }) => {
                self.state = State::Open { dial: *dial, challenge, until: now + STEP_TIMEOUT };
                if self.fresh_token(now).is_none() && self.asked.is_none() {
                    self.ask(now, out);
                }
                self.authenticate(now, probe, out);
            }
            (Frame::Ready { .. }, State::Open { dial, .. }) => {
                let (dial, mut liveness) = (*dial, Box::new(Liveness::new(CONNECTION_MIN_PAUSE)));
                self.redial.on_connected();
                if let Some((mut queue, _)) = self.held.take() {
                    out.push(Out::Doubt(false));
                    while let Some(frame) = queue.pop() {
                        liveness.on_sent(now);
                        out.push(Out::Frame(dial, frame.bytes.to_vec()));
                    }
                }
                self.state = State::Ready { dial, since: now, liveness };
                out.push(Out::Up);
            }
            (Frame::Pong { nonce }, State::Ready { liveness, .. }) => {
                self.rtt = Duration::from_micros((now.as_nanos() / 1_000).saturating_sub(nonce));
                liveness.on_pong(self.rtt);
            }
            (Frame::Recv { src, payload }, State::Ready { .. }) => {
                self.used = now;
                out.push(Out::Received(src, payload.to_vec()));
            }
            (Frame::TokenWanted { .. }, _) if self.asked.is_none() => self.ask(now, out),
            (Frame::PeerGone { device, why }, State::Ready { .. }) => {
                out.push(Out::Gone(device));
                if why == GoneReason::NotPermitted && self.asked.is_none() {
                    self.ask(now, out);
                }
            }
            (Frame::Ping { nonce }, State::Ready { dial, .. }) => {
                out.push(Out::Frame(*dial, Frame::Pong { nonce }.to_vec()));
            }
            (Frame::Drain { .. }, State::Ready { .. }) => out.push(Out::Draining),
            _ => {}
        }
    }

    /// Packs a packet for `dst`; `None` while the relay does not forward: then it waits, if it may, or is lost.
    pub(super) fn send(&mut self, now: Instant, dst: DeviceId, payload: &[u8]) -> Option<(DialNo, Vec<u8>)> {
        self.used = now;
        let frame = Frame::Send { dst, payload }.to_vec();
        match (&mut self.state, &mut self.held) {
            (State::Ready { dial, liveness, .. }, _) => {
                liveness.on_sent(now);
                return Some((*dial, frame));
            }
            (_, Some((queue, _))) => {
                let class = if is_handshake(payload) { Class::Handshake } else { Class::Data };
                queue.push(class, frame);
            }
            (_, None) => {}
        }
        None
    }
}
