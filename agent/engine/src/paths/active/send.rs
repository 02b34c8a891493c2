//! Probes to a peer in use: made, counted against their budget, sealed.

use arrayvec::ArrayVec;
use rand_core::RngCore as _;
use warren_common::time::Instant;
use warren_common::wire::probe::{MAX_PROBE_LEN, Message, NONCE_LEN, TXID_LEN, TxId};

use super::{Active, Inflight, MINUTE};
use crate::event::{Event, PingToken};
use crate::io::Destination;
use crate::paths::shared::Shared;
use crate::paths::{
    MAX_DEVICE_PROBES_PER_MINUTE, MAX_LONG_PROBES_PER_MINUTE, MAX_PROBES_PER_MINUTE, Way, mtu,
};

impl Active {
    /// Looks for a path over `way`, within the budget.
    pub(super) fn probe(&mut self, now: Instant, way: impl Into<Destination>, shared: &mut Shared) {
        if self.probes.take(now, MAX_PROBES_PER_MINUTE)
            && shared.probes.take(now, MAX_DEVICE_PROBES_PER_MINUTE)
        {
            self.ping(now, way.into(), None, shared);
        } else {
            shared.counters.probe_limited += 1;
        }
    }

    pub(super) fn ping(
        &mut self,
        now: Instant,
        to: Destination,
        token: Option<PingToken>,
        shared: &mut Shared,
    ) {
        let txid = self.expect_pong(now, to, token, None, shared);
        if let Destination::Direct { socket, remote } = to {
            let way = Way { socket, remote };
            if let Some(remote) = self.remotes.iter_mut().find(|r| r.way == way) {
                remote.pinged = Some(now);
            }
        }
        self.note_word(now, to);
        self.send(to, &Message::Ping { txid }, shared);
    }

    /// Makes a ping and takes note of it.
    pub(super) fn expect_pong(
        &mut self,
        now: Instant,
        to: Destination,
        token: Option<PingToken>,
        length: Option<usize>,
        shared: &mut Shared,
    ) -> TxId {
        let mut txid = [0; TXID_LEN];
        shared.rng.fill_bytes(&mut txid);
        if self.inflight.is_full() {
            let at = self.inflight.iter().position(|i| i.token.is_none()).unwrap_or(0);
            let given_up = self.inflight.remove(at);
            shared.counters.ping_replaced += 1;
            if let Some(token) = given_up.token {
                shared.push_event(Event::PingResult { token, path: self.told, rtt: None });
            }
        }
        self.inflight.push(Inflight { txid, to, sent: now, token, length });
        txid
    }

    /// Asks whether packets of `length` bytes pass on `way`, within the budget.
    pub(super) fn ping_long(&mut self, now: Instant, way: Way, length: usize, shared: &mut Shared) {
        if !self.long_probes.take(now, MINUTE, MAX_LONG_PROBES_PER_MINUTE) {
            shared.counters.probe_limited += 1;
            return;
        }
        let txid = self.expect_pong(now, way.into(), None, Some(length), shared);
        let mut nonce = [0; NONCE_LEN];
        shared.rng.fill_bytes(&mut nonce);
        if let Some(keys) = &self.keys {
            shared.enqueue_long(way.into(), keys.seal_padded(txid, nonce, mtu::sealed_len(length)));
        }
    }

    /// We say something on a way: the NATs on it remember from now on.
    pub(super) fn note_word(&mut self, now: Instant, to: Destination) {
        if let Some(current) = self.current.as_mut().filter(|c| Destination::from(c.way) == to) {
            current.last_tx = now;
        }
    }

    pub(in crate::paths) fn send(&self, to: Destination, message: &Message, shared: &mut Shared) {
        if let Some(probe) = self.seal(message, shared) {
            shared.enqueue(to, probe);
        }
    }

    pub(super) fn seal(&self, message: &Message, shared: &mut Shared) -> Option<ArrayVec<u8, MAX_PROBE_LEN>> {
        let mut nonce = [0; NONCE_LEN];
        shared.rng.fill_bytes(&mut nonce);
        self.keys.as_ref().map(|keys| keys.seal(message, nonce))
    }
}
