//! A client whose session rests: there is no connection, and packets take plain UDP. An idle device costs its relay a
//! session that way and not a connection, of which there may be tens of thousands.
//!
//! Whatever needs the connection ends the rest: a packet, in either direction, as silence is judged better with two ways
//! than with one; a call of the relay; a network that changed; UDP that may not pass any more. Packets go on over UDP while
//! the client connects, and until the new connection's own UDP is proved.

use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::sleep;
use warren_common::wire::relay::udp::{Call, Calling, UdpKeys};
use warren_common::wire::relay::{Class, Frame, RefusalCode};

use super::link::{End, Link};
use super::task::{Outcome, Signs, Task};
use super::udp::UdpLink;
use super::{Command, Events, RelayEventKind, Shared, micros};

/// A connection over which no packet has passed for so long is given up.
pub const REST_AFTER: Duration = Duration::from_secs(60);

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

/// The end of a session that was asked to rest, if the relay agrees.
pub(super) fn outcome(end: Outcome, udp: Option<UdpLink>) -> Outcome {
    match (end, udp) {
        (Outcome::End(End::Refused(RefusalCode::Resting)), Some(udp)) if udp.is_up() => {
            Outcome::Rest(Box::new(udp))
        }
        (end, _) => end,
    }
}

impl Task {
    /// Carries packets over `udp` until there is a reason to connect, and while that goes on.
    pub(super) async fn rest(&mut self, udp: &UdpLink) -> Result<(Link, UdpKeys), End> {
        let (shared, events) = (self.shared.clone(), self.events.clone());
        let signs = Signs::of_rest();
        let leaving = Leaving(Some(udp));
        let mut in_doubt = false;
        let back = tokio::select! {
            () = udp.run(&shared, &events, &signs) => Err(End::Lost("the host is shutting down".to_owned())),
            () = carry(udp, &shared, &signs) => Err(End::Lost("the client ends".to_owned())),
            () = tell_doubt(&events, &signs, &mut in_doubt) => Err(End::Lost("the client ends".to_owned())),
            // A connection may come yet, but whoever needs the relay should not wait for that.
            () = signs.dead.notified() => Err(End::Lost("it stopped answering".to_owned())),
            back = async {
                self.until_wanted(udp, &signs).await;
                self.connect(None).await
            } => back,
        };
        if in_doubt && back.is_ok() {
            events.send(RelayEventKind::Doubt { doubt: false }).await;
        }
        leaving.stay();
        back
    }

    /// Waits for a reason to have a connection.
    async fn until_wanted(&mut self, udp: &UdpLink, signs: &Signs) {
        loop {
            tokio::select! {
                command = self.commands.recv() => match command {
                    Some(Command::Token(token)) => self.keep(token),
                    Some(Command::NetworkChanged) => {
                        udp.network_changed();
                        return;
                    }
                    None => std::future::pending().await, // the handle is gone: so is this task, in a moment
                },
                () = signs.called.notified() => {
                    // The relay wants another token, mostly.
                    self.forget_token();
                    return;
                }
                () = signs.suspect.notified() => {} // a ping like any other
                () = signs.wanted.notified() => return,
            }
        }
    }
}

/// Lets packets take another relay and the client connect, once UDP does not answer. Never returns.
async fn tell_doubt(events: &Events, signs: &Signs, told: &mut bool) {
    signs.doubt.notified().await;
    *told = true;
    events.send(RelayEventKind::Doubt { doubt: true }).await;
    signs.wanted.notify_one();
    std::future::pending().await
}

/// Sends what waits over UDP, as a session does; what can't go that way is lost.
async fn carry(udp: &UdpLink, shared: &Shared, signs: &Signs) {
    let (mut batch, mut buffer) = (Vec::new(), Vec::new());
    loop {
        loop {
            shared.take(&mut batch);
            if batch.is_empty() {
                break;
            }
            if batch.iter().any(|frame| frame.class != Class::Control) {
                signs.mark_active();
            }
            udp.send(&mut batch, &mut buffer);
            batch.clear();
        }
        shared.wake.notified().await;
    }
}

/// What the relay says while the session rests.
pub(super) async fn on_call(call: Call, events: &Events, signs: &Signs) {
    match call.why {
        Calling::Connect => signs.called.notify_one(),
        Calling::Drain { after_ms } => {
            if signs.draining.swap(true, Ordering::Relaxed) {
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
