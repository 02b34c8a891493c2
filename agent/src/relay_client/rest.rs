//! A client whose session rests: there is no connection, and packets take plain UDP. An idle device costs its relay a
//! session that way and not a connection, of which there may be tens of thousands.
//!
//! Whatever needs the connection ends the rest: a packet, in either direction, as silence is judged better with two ways
//! than with one; a call of the relay; a network that changed; UDP that may not pass any more. Packets go on over UDP while
//! the client connects, and until the new connection's own UDP is proved.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::sleep;
use warren_common::wire::relay::udp::{Call, Calling, UdpKeys};
use warren_common::wire::relay::{Class, DATA_QUEUE_BYTES, Frame, FrameQueue, RefusalCode};

use super::link::{End, Link};
use super::task::{Outcome, Signs, Task};
use super::udp::UdpLink;
use super::{Command, Events, RelayEventKind, Shared, has_packets, micros};

/// A connection over which no packet has passed for so long is given up.
pub const REST_AFTER: Duration = Duration::from_secs(60);
/// Tells the relay that packets do not reach us by what the session rested on, nor yet by the new one's own UDP. Otherwise it
/// would go on sending there until it has missed our pings for long.
pub(super) const NOT_OVER_UDP: Frame<'static> = Frame::UdpLost { counter: 0 };

/// What the parts of a rest tell each other.
#[derive(Default)]
pub(super) struct RestSigns {
    /// There is a reason to connect.
    pub(super) wanted: Notify,
    /// The relay wants us to.
    called: Notify,
    /// It has said that it drains.
    draining: AtomicBool,
    /// UDP does not answer as it should.
    pub(super) doubt: Notify,
    /// UDP does not answer any more.
    pub(super) dead: Notify,
}

/// Asks the relay to let the session rest whenever nothing has passed for `after`. Never returns.
pub(super) async fn ask_when_idle(after: Duration, shared: &Shared, signs: &Signs) {
    let after_us = u64::try_from(after.as_micros()).unwrap_or(u64::MAX);
    loop {
        let idle = micros().saturating_sub(signs.active.load(Ordering::Relaxed));
        if idle < after_us {
            sleep(Duration::from_micros(after_us - idle)).await;
            continue;
        }
        if signs.udp().is_some() && shared.queue().is_empty() {
            shared.push(Class::Control, &Frame::Rest);
        }
        sleep(after).await; // it may have had a reason not to
    }
}

/// What follows from the end of a session: a rest, if it was asked for and the relay agrees.
pub(super) fn outcome(end: Outcome, udp: Option<UdpLink>) -> Outcome {
    match (end, udp) {
        (Outcome::End(end @ End::Refused(RefusalCode::ShuttingDown)), _) => Outcome::Replaced(end),
        (Outcome::End(End::Refused(RefusalCode::Resting)), Some(udp)) if udp.is_up() => {
            Outcome::Rest(Box::new(udp))
        }
        (end, _) => end,
    }
}

impl Task {
    /// Carries packets over `udp` until there is a reason to connect, and while that goes on. Returns the connection, and `udp`
    /// if it still carries packets.
    pub(super) async fn rest(
        &mut self,
        udp: Box<UdpLink>,
    ) -> (Result<(Link, UdpKeys), End>, Option<Box<UdpLink>>) {
        let (shared, events) = (self.shared.clone(), self.events.clone());
        let rest = Arc::new(RestSigns::default());
        let signs = Signs::of_rest(rest.clone());
        let leaving = Leaving(Some(&udp));
        let mut left = FrameQueue::new(DATA_QUEUE_BYTES);
        let (mut in_doubt, mut moved) = (false, false);
        let back = tokio::select! {
            () = udp.run(&shared, &events, &signs) => Err(End::Lost("the host is shutting down".to_owned())),
            () = carry(&udp, &shared, &signs, &mut left) => Err(End::Lost("the client ends".to_owned())),
            () = tell_doubt(&events, &rest, &mut in_doubt) => Err(End::Lost("the client ends".to_owned())),
            // A connection may come yet, but whoever needs the relay should not wait for that.
            () = rest.dead.notified() => Err(End::Lost("it stopped answering".to_owned())),
            back = async {
                moved = self.until_wanted(&udp, &rest).await;
                self.connect(None).await
            } => back,
        };
        leaving.stay();
        if back.is_err() {
            return (back, None);
        }
        if in_doubt {
            events.send(RelayEventKind::Doubt { doubt: false }).await;
        }
        while let Some(frame) = left.pop() {
            shared.queue().push(frame.class, frame.bytes);
        }
        if udp.is_up() && !in_doubt && !moved {
            return (back, Some(udp));
        }
        shared.set_udp(false);
        shared.push(Class::Control, &NOT_OVER_UDP);
        (back, None)
    }

    /// Waits for a reason to have a connection. Returns whether it is another network.
    async fn until_wanted(&mut self, udp: &UdpLink, rest: &RestSigns) -> bool {
        loop {
            tokio::select! {
                command = self.commands.recv() => match command {
                    Some(Command::Token(token)) => self.keep(token),
                    Some(Command::NetworkChanged) => {
                        udp.network_changed();
                        if udp.footing().check(&self.config).is_err() {
                            rest.doubt.notify_one();
                        }
                        return true;
                    }
                    None => std::future::pending().await, // the handle is gone: so is this task, in a moment
                },
                () = rest.called.notified() => {
                    // The relay wants another token, mostly.
                    self.forget_token();
                    return false;
                }
                () = rest.wanted.notified() => return false,
            }
        }
    }
}

/// Lets packets take another relay and the client connect, once UDP does not answer. Never returns.
async fn tell_doubt(events: &Events, rest: &RestSigns, told: &mut bool) {
    rest.doubt.notified().await;
    *told = true;
    events.send(RelayEventKind::Doubt { doubt: true }).await;
    rest.wanted.notify_one();
    std::future::pending().await
}

/// Sends what waits over UDP, as a session does. Packets that are too long for it are `left` for the connection, which they
/// are a reason to have.
async fn carry(udp: &UdpLink, shared: &Shared, signs: &Signs, left: &mut FrameQueue) {
    let (mut batch, mut buffer) = (Vec::new(), Vec::new());
    loop {
        shared.next_batch(&mut batch).await;
        if has_packets(&batch) {
            signs.mark_active();
        }
        udp.send(&mut batch, &mut buffer);
        for frame in batch.drain(..).filter(|frame| frame.class != Class::Control) {
            left.push(frame.class, frame.bytes);
        }
    }
}

/// What the relay says while the session rests.
pub(super) async fn on_call(call: Call, events: &Events, rest: &RestSigns) {
    match call.why {
        Calling::Connect => rest.called.notify_one(),
        Calling::Drain { after_ms } => {
            if rest.draining.swap(true, Ordering::Relaxed) {
                return; // told before
            }
            events.send(RelayEventKind::Draining { after: Duration::from_millis(u64::from(after_ms)) }).await;
        }
    }
}

/// Tells the relay that the device goes, if the client is dropped during its rest.
struct Leaving<'a>(Option<&'a UdpLink>);

impl Leaving<'_> {
    fn stay(mut self) {
        self.0 = None;
    }
}

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        if let Some(udp) = self.0 {
            udp.leave();
        }
    }
}
