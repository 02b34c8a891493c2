//! Packets through the daemon, and the engine's events.

use warren_common::time::Now;
use warren_common::wire::control::{ClientBody, Signal};
use warren_engine::engine::Engine;
use warren_engine::event::Event;
use warren_engine::io::Source;

use super::{Daemon, Up};
use crate::api::Pong;
use crate::dataplane::NoRelays;

impl Daemon {
    pub(super) async fn on_tun(&mut self, now: Now) {
        let Self { up: Some(up), plane, .. } = self else { return };
        let Up { tun: Some(tun), engine: Some(engine), relays, .. } = up.as_mut() else { return };
        if let Err(e) = plane.from_tun(now, tun, engine, relays) {
            self.on_tun_lost(now, &e).await;
        }
    }

    pub(super) fn on_udp(&mut self, now: Now, index: usize) {
        let Self { up, plane, .. } = self;
        match up.as_deref_mut() {
            Some(Up { engine, tun, relays, .. }) => {
                plane.from_udp(now, index, engine.as_mut(), tun.as_ref(), relays);
            }
            None => plane.from_udp(now, index, None, None, &mut NoRelays),
        }
    }

    /// Empties the engine's outputs.
    pub(super) fn drain(&mut self, now: Now) {
        let Self { up: Some(up), plane, .. } = self else { return };
        let Up { engine: Some(engine), tun, relays, .. } = up.as_mut() else { return };
        plane.drain(now, engine, tun.as_ref(), relays);
        while let Some(event) = up.engine.as_mut().and_then(Engine::poll_event) {
            match (event, &mut up.engine) {
                (Event::SocketsWanted { ids }, Some(engine)) => {
                    let open = plane.set_extra(&ids);
                    engine.handle_extra_sockets(now, &open);
                    plane.drain(now, engine, up.tun.as_ref(), &mut up.relays);
                }
                (event, _) => up.on_event(now, event),
            }
        }
        self.settle_waiters(now);
    }

    /// Sealed bytes that a peer sent through the coordinator.
    pub(super) fn on_signal(&mut self, now: Now, signal: &mut Signal) {
        let Self { up: Some(up), plane, .. } = self else { return };
        let (Some(engine), Some(device)) =
            (&mut up.engine, warren_common::ids::DeviceId::from_slice(&signal.device))
        else {
            return;
        };
        let from = Source::Signal { device };
        plane.from_elsewhere(now, from, &mut signal.sealed, engine, up.tun.as_ref());
    }
}

impl Up {
    fn on_event(&mut self, now: Now, event: Event) {
        match event {
            Event::Signal { device, sealed } => {
                let signal = Signal { device: device.to_bytes().to_vec(), sealed };
                if !self.control.send(ClientBody::Signal(signal)) {
                    tracing::debug!("no room for a signal to {device}");
                }
            }
            Event::PathChanged { device, path } => {
                tracing::debug!(%device, ?path, "path changed");
                self.keep.changed(now.boot);
            }
            Event::SessionEstablished { device } => tracing::debug!(%device, "session established"),
            Event::FlowEnded { device, rule } => tracing::debug!(?device, %rule, "a flow ended by policy"),
            Event::Disagreement { device, about } => self.verdicts.differ(now.boot, device, &about),
            Event::LeaseEnded => {
                tracing::warn!("the lease has ended: nothing passes until the coordinator is reached")
            }
            Event::PingResult { token, path, rtt } => {
                let Some(i) = self.pings.iter().position(|(t, _)| *t == token) else { return };
                let (_, reply) = self.pings.swap_remove(i);
                let Some(engine) = &self.engine else { return };
                let path = engine.path_status(path, rtt);
                let pong =
                    Pong { rtt_ms: rtt.map(|r| crate::api::round_ms(r.as_secs_f64() * 1_000.0)), path };
                // The caller may have gone away; then nobody wants to know.
                let _ = reply.send(super::verbs::done(&pong));
            }
            Event::RelayWanted { relay } => self.want_relay(now, relay),
            Event::NetworkSuspect => {
                self.relays.network_changed();
                self.control.retry_now();
            }
            Event::SocketsWanted { .. } => {} // only without an engine, which is gone
            Event::RelayKeepalive { pause } => self.relays.set_keepalive(pause),
            Event::HomeRelay { relay } => self.choose_home(now, relay),
            Event::HomeAnnounced { relay } => self.announce_home(relay),
        }
    }
}
