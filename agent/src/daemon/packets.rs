//! Packets through the daemon: from the TUN and the sockets to the engine, and what it has to say out again.

use std::io::ErrorKind;

use warren_common::time::Now;
use warren_common::wire::control::{ClientBody, Signal};
use warren_engine::event::Event;
use warren_engine::io::{Destination, Outbox, Source, TunOut};

use super::relays::Relays;
use super::{Daemon, Up};
use crate::api::Pong;
use crate::os::tun::Tun;
use crate::os::udp::{ReceiveBuffer, Udp};

/// Packets taken from the TUN in one turn, so that the sockets and timers get theirs.
const TUN_BUDGET: usize = 256;
/// Receive calls on one socket in one turn; each brings up to a few hundred datagrams.
const UDP_BUDGET: usize = 4;
/// Bytes that sealing adds to a packet at most: WireGuard's header and tag 32, padding 15.
const SEAL_ROOM: usize = 64;
/// Room for one packet from the TUN: no MTU of ours is near it.
const PACKET: usize = 65_536;

/// Memory that lives as long as the daemon, so that packets allocate none.
pub(super) struct Buffers {
    packet: Box<[u8]>,
    receive: ReceiveBuffer,
    outbox: Outbox,
    tun_out: TunOut,
}

impl Default for Buffers {
    fn default() -> Self {
        Self {
            packet: vec![0; PACKET].into_boxed_slice(),
            receive: ReceiveBuffer::default(),
            outbox: Outbox::new(),
            tun_out: TunOut::default(),
        }
    }
}

impl Buffers {
    /// For packets that do not come from a socket.
    pub(super) fn tun_out(&mut self) -> &mut TunOut {
        &mut self.tun_out
    }
}

impl Daemon {
    pub(super) async fn on_tun(&mut self, now: Now) {
        let Self { up: Some(up), sockets, buffers, .. } = self else { return };
        let Up { tun: Some(tun), engine: Some(engine), mtu, relays, .. } = up.as_mut() else { return };
        let room = usize::from(*mtu) + SEAL_ROOM;
        let mut lost = None;
        for _ in 0..TUN_BUDGET {
            match tun.receive(&mut buffers.packet) {
                Ok(len) => {
                    if !buffers.outbox.has_room(room) {
                        send_all(now, &mut buffers.outbox, sockets, relays);
                    }
                    engine.handle_tun(now, &buffers.packet[..len], &mut buffers.outbox);
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) => {
                    lost = Some(e);
                    break;
                }
            }
        }
        send_all(now, &mut buffers.outbox, sockets, relays);
        if let Some(e) = lost {
            self.on_tun_lost(now, &e).await;
        }
    }

    pub(super) fn on_udp(&mut self, now: Now, index: usize) {
        let Self { up, sockets, buffers, .. } = self;
        let Buffers { receive, tun_out, .. } = buffers;
        let Some(socket) = sockets.get(index) else { return };
        let id = socket.id();
        for _ in 0..UDP_BUDGET {
            let received = socket.receive(receive, |remote, bytes, stride| {
                // While the agent is down, what strangers send is read and forgotten.
                let Some(up) = up.as_deref_mut() else { return };
                let Some(engine) = &mut up.engine else { return };
                engine.handle_datagram(now, Source::Direct { socket: id, remote }, bytes, stride, tun_out);
                deliver(tun_out, up.tun.as_ref());
            });
            match received {
                Ok(()) => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => return,
                // An ICMP error about something sent earlier: the paths find out by themselves.
                Err(e) => tracing::trace!("receive: {e}"),
            }
        }
    }

    /// Empties the engine's outputs.
    pub(super) fn drain(&mut self, now: Now) {
        let Self { up: Some(up), sockets, buffers, .. } = self else { return };
        let Up { engine: Some(engine), tun, relays, .. } = up.as_mut() else { return };
        loop {
            let more = engine.poll_transmit(now, &mut buffers.outbox);
            send_all(now, &mut buffers.outbox, sockets, relays);
            if !more {
                break;
            }
        }
        loop {
            let more = engine.poll_tun(&mut buffers.tun_out);
            deliver(&mut buffers.tun_out, tun.as_ref());
            if !more {
                break;
            }
        }
        while let Some(event) = up.engine.as_mut().and_then(warren_engine::engine::Engine::poll_event) {
            up.on_event(now, event);
        }
        self.settle_waiters(now);
    }

    /// Sealed bytes that a peer sent through the coordinator.
    pub(super) fn on_signal(&mut self, now: Now, signal: &mut Signal) {
        let Self { up: Some(up), buffers, .. } = self else { return };
        let (Some(engine), Some(device)) =
            (&mut up.engine, warren_common::ids::DeviceId::from_slice(&signal.device))
        else {
            return;
        };
        engine.handle_datagram(now, Source::Signal { device }, &mut signal.sealed, 0, &mut buffers.tun_out);
        deliver(&mut buffers.tun_out, up.tun.as_ref());
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
            Event::HomeRelay { relay } => self.set_home_relay(now, relay),
        }
    }
}

/// Hands plaintext packets to the host; without a TUN they are dropped.
pub(super) fn deliver(packets: &mut TunOut, tun: Option<&Tun>) {
    if let Some(tun) = tun {
        for packet in packets.iter() {
            if let Err(e) = tun.send(packet) {
                tracing::trace!("the TUN does not take a packet: {e}");
            }
        }
    }
    packets.clear();
}

/// Sends what the engine has sealed.
fn send_all(now: Now, outbox: &mut Outbox, sockets: &[Udp], relays: &mut Relays) {
    for (transmit, bytes) in outbox.iter() {
        match transmit.to {
            Destination::Direct { socket, remote } => {
                let Some(socket) = sockets.iter().find(|s| s.id() == socket) else { continue };
                if let Err(e) = socket.send(remote, bytes, transmit.segment_size) {
                    tracing::trace!("send to {remote}: {e}");
                }
            }
            Destination::Relay { relay, device } => {
                let size = transmit.segment_size.unwrap_or(bytes.len()).max(1);
                bytes.chunks(size).for_each(|packet| relays.send(now, relay, device, packet));
            }
        }
    }
    outbox.clear();
}
