//! Sessions that rest: their device has closed its connection, and they go on over plain UDP.
//!
//! What an idle device costs a relay is its connection, by far. So a device that takes plain UDP gives it up with
//! [`Frame::Rest`] and keeps its session: address, keys, permissions, rate. Packets pass as before. What only a
//! connection can carry makes the relay *call* the device, which connects and authenticates anew; the session it takes
//! over lends the new one its UDP side until that has one of its own, so that no packet is lost.

use warren_common::wire::relay::udp::{Call, Calling, Kind, UDP_HEADER};

use super::*;

/// A rest.
#[derive(Debug, Default)]
pub(super) struct Rest {
    /// The device has been called, and why. Its next pings are answered by a call as well: one may get lost.
    pub(super) called: Option<Calling>,
}

impl Conn {
    /// True if its session rests: there is no such transport any more.
    pub(super) fn rests(&self) -> bool {
        matches!(&self.state, State::Session(session) if session.rest.is_some())
    }
}

impl Relay {
    /// The device of `conn` asks to rest. Not if something waits for it, which would be lost, or if UDP does not reach it.
    pub(super) fn rest(&mut self, conn: ConnId, now: Instant) {
        let Some(entry) = self.conns.get_mut(&conn) else { return };
        let State::Session(session) = &mut entry.state else { return };
        if entry.queue.is_empty() && session.carries(now) && session.udp_path(now).is_some() {
            session.rest = Some(Rest::default());
            self.woken.remove(&conn);
            self.counters.close(RefusalCode::Resting);
            self.outputs.push_back(Output::Close(conn, RefusalCode::Resting));
        }
    }

    /// A frame for a device whose session rests: tells it to come. The frame itself is lost, and asked for or sent again
    /// when it has.
    pub(super) fn call(&mut self, conn: ConnId, class: Class, frame: &[u8]) {
        if class != Class::Control {
            self.counters.drop(DropReason::NotConnected, 1);
        }
        let why = match Frame::decode(frame) {
            Ok(Some(Frame::Drain { after_ms })) => Calling::Drain { after_ms },
            _ => Calling::Connect,
        };
        let Some(session) = self.session_mut(conn) else { return };
        let (Some(rest), Some(udp)) = (&mut session.rest, &mut session.udp) else { return };
        if rest.called == Some(why) || matches!(rest.called, Some(Calling::Drain { .. })) {
            return;
        }
        rest.called = Some(why);
        let Some(at) = udp.at else { return };
        let mut datagram = vec![0; UDP_HEADER];
        let sealer = udp.keys.sealer();
        if udp.seal(&sealer, Kind::Call, Call { nonce: None, why }.to_bytes(), &mut datagram) {
            self.datagrams.push_back((at, datagram));
        }
    }

    /// The device of `older` has a new connection. Returns what carries its packets until the new session can.
    pub(super) fn take_over(&mut self, older: ConnId) -> Option<Box<UdpSession>> {
        let lent = match self.session_mut(older) {
            Some(session) if session.rest.is_some() => session.udp.take(),
            _ => None,
        };
        if let Some(udp) = &lent {
            self.udp_ids.remove(&udp.id);
        }
        self.close(older, RefusalCode::Replaced);
        lent
    }
}
