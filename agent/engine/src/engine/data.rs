//! The data path: packets from the TUN out, datagrams from the network in.

use std::net::IpAddr;
use std::time::Duration;

use warren_common::endpoint::is_endpoint;
use warren_common::time::Now;
use warren_common::wire::probe;

use super::Engine;
use super::frame::{FromTun, WG_ROOM, Way};
use crate::filter::{DropReason, Output, Verdict};
use crate::flow::Direction;
use crate::io::{Added, Arrival, Burst, Destination, Outbox, Source, TunOut};
use crate::offload::Ecn;
use crate::packet::{Addrs, build};
use crate::paths::{Carried, PeerIdx};
use crate::stun::is_stun;
use crate::wg;

/// What every IPv6 link carries (RFC 8200 section 5), in bytes.
const MIN_IPV6_MTU: usize = 1_280;
/// Senders told per second that their packets are too long for a path: each needs it once.
pub(super) const MAX_TOO_BIG_PER_SECOND: u32 = 100;

/// What the engine itself dropped. The filter, WireGuard and paths count their own.
#[derive(Clone, Debug, Default)]
pub(super) struct Drops {
    pub(super) no_path: u64,
    pub(super) outbox_full: u64,
    pub(super) too_long: u64,
    /// Longer than the path to the peer carries; the sender was told.
    pub(super) path_mtu: u64,
    pub(super) bad_frame: u64,
    pub(super) bad_endpoint: u64,
    pub(super) unknown_protocol: u64,
    pub(super) unknown_sender: u64,
    pub(super) not_granted: u64,
    pub(super) stun_unexpected: u64,
    pub(super) notices: u64,
    pub(super) events: u64,
    pub(super) bad_peers: u64,
    pub(super) presence: u64,
    /// Packets that the tunnel itself delayed, and so lost to tell their sender.
    pub(super) delayed: u64,
    pub(super) inbound: InboundDrops,
}

/// Of them, those of packets on their way to the host.
#[derive(Clone, Debug, Default)]
pub(super) struct InboundDrops {
    pub(super) tun_full: u64,
    pub(super) delayed: u64,
    /// Not dropped: the host sees for itself.
    pub(super) bad_checksum: u64,
    pub(super) wireguard: [u64; WG_REASONS.len()],
}

impl InboundDrops {
    pub(super) fn count_wireguard(&mut self, reason: wg::DropReason) {
        if let Some(at) = WG_REASONS.iter().position(|r| *r == reason) {
            self.wireguard[at] += 1;
        }
    }

    /// Adds what was counted elsewhere.
    pub(super) fn absorb(&mut self, Self { tun_full, delayed, bad_checksum, wireguard }: Self) {
        self.tun_full += tun_full;
        self.delayed += delayed;
        self.bad_checksum += bad_checksum;
        self.wireguard.iter_mut().zip(wireguard).for_each(|(to, more)| *to += more);
    }
}

/// WireGuard's reasons, in the order of the counters.
pub(super) const WG_REASONS: [wg::DropReason; 15] = [
    wg::DropReason::Malformed,
    wg::DropReason::BadMac1,
    wg::DropReason::CookieSent,
    wg::DropReason::RateLimited,
    wg::DropReason::BadHandshake,
    wg::DropReason::UnknownPeer,
    wg::DropReason::ReplayedInitiation,
    wg::DropReason::InitiationTooSoon,
    wg::DropReason::UnknownIndex,
    wg::DropReason::TooManyResponses,
    wg::DropReason::BadCookie,
    wg::DropReason::SessionExpired,
    wg::DropReason::Replayed,
    wg::DropReason::BadTag,
    wg::DropReason::NotIp,
];

impl Engine {
    /// Takes one IP packet from the TUN. Allowed ones are sealed straight into `out`, where packets of one size to one
    /// destination form one batch; the first ones to a peer wait for its handshake. Drain `out` when it has no room
    /// for a packet of the MTU and 64 bytes more: what doesn't fit is dropped.
    pub fn handle_tun(&mut self, now: Now, packet: &[u8], out: &mut Outbox) {
        self.take_from_tun(now, FromTun::Packet(packet), false, out);
    }

    /// [`Engine::handle_tun`], with `tell` as in [`Engine::handle_tun_frame`].
    pub fn handle_tun_packet(&mut self, now: Now, packet: &mut [u8], tell: bool, out: &mut Outbox) {
        let lose = tell && !Ecn::mark_congested(packet);
        self.take_from_tun(now, FromTun::Packet(packet), lose, out);
    }

    /// Takes what one read of a TUN with virtio headers brought: the header, then a packet or a super-frame, which is
    /// judged once and cut into packets where they are sealed. Drain `out` before if it holds more than
    /// [`MAX_BATCH_BYTES`](crate::io::MAX_BATCH_BYTES): what doesn't fit is dropped.
    ///
    /// With `tell` its flow makes packets wait ([`crate::queue`]): it is marked if its sender understands that, or else
    /// one packet of it is lost.
    pub fn handle_tun_frame(&mut self, now: Now, frame: &mut [u8], tell: bool, out: &mut Outbox) {
        match FromTun::prepare(frame, tell) {
            Some((from_tun, lose)) => self.take_from_tun(now, from_tun, lose, out),
            None => self.drops.bad_frame += 1,
        }
    }

    fn take_from_tun(&mut self, now: Now, from_tun: FromTun<'_>, lose: bool, out: &mut Outbox) {
        let Some(peer) = self.admit_from_tun(now, &from_tun) else { return };
        self.drops.delayed += u64::from(lose);
        self.send_packets(now, peer, from_tun, usize::from(lose), out);
        self.resend_handshakes(now);
    }

    /// Whose it is, if it may go there and fits the path.
    pub(super) fn admit_from_tun(&mut self, now: Now, from_tun: &FromTun<'_>) -> Option<PeerIdx> {
        self.notice_jump(now);
        self.end_lease_if_over(now);
        let packet = from_tun.bytes();
        let burst = from_tun.burst();
        let Some((src, dst)) = ip_ends(packet) else {
            // The filter knows how to say what is wrong with it; it passes nothing that it can't parse.
            self.filter.judge_burst(Direction::Egress, now, packet, PeerIdx::MAX, burst);
            return None;
        };
        if from_tun.segment_len(0) > self.mtu {
            self.drops.too_long += u64::from(burst.packets);
            return None;
        }
        let reason = if self.enforced.is_none() {
            DropReason::LeaseEnded
        } else if !self.own.contains(&src) {
            DropReason::SpoofedSource
        } else if let Some(owner) = self.routes.lookup(dst) {
            let verdict = self.filter.judge_burst(Direction::Egress, now, packet, owner.peer, burst);
            return (verdict == Verdict::Pass && self.fits_path(now, owner.peer, from_tun))
                .then_some(owner.peer);
        } else {
            DropReason::NoPeer
        };
        self.filter.record_drops(Direction::Egress, now, packet, burst.packets, reason);
        None
    }

    /// False if the path is too narrow for packets that must not be cut: then their sender is told.
    fn fits_path(&mut self, now: Now, peer: PeerIdx, from_tun: &FromTun<'_>) -> bool {
        let mtu = self.paths.mtu(peer);
        let packet = from_tun.bytes();
        let len = from_tun.segment_len(0);
        if len <= mtu {
            return true;
        }
        let mtu = match packet {
            // Without its DF bit it may be cut anywhere: it is cut outside of the tunnel.
            [0x40..=0x4f, _, _, _, _, _, flags, ..] if flags & 0x40 == 0 => return true,
            [0x40..=0x4f, ..] => mtu,
            // Nobody makes shorter ones (RFC 8200 section 5): those are cut outside of the tunnel.
            _ if len <= MIN_IPV6_MTU => return true,
            _ => mtu.max(MIN_IPV6_MTU),
        };
        self.drops.path_mtu += from_tun.segments() as u64;
        if self.too_big.take(now.boot, Duration::from_secs(1), MAX_TOO_BIG_PER_SECOND)
            && let Some((src, dst)) = ip_ends(packet)
            && let (Some(addrs), Ok(mtu)) = (Addrs::new(dst, src), u16::try_from(mtu))
        {
            self.push_notice(build::too_big(addrs, mtu, packet));
        }
        false
    }

    /// Seals allowed packets, but the first `lost` of them, and hands them to the path.
    pub(super) fn send_packets(
        &mut self,
        now: Now,
        peer: PeerIdx,
        from_tun: FromTun<'_>,
        lost: usize,
        out: &mut Outbox,
    ) {
        let Some(handle) = self.peers.get(peer as usize).and_then(Option::as_ref).map(|p| p.handle) else {
            return;
        };
        self.before_use(now, peer);
        let count = from_tun.segments();
        let Some(to) = self.paths.route(now.boot, peer) else {
            if self.wg.has_session(handle, now) {
                self.drops.no_path += count as u64;
            } else {
                self.queue_packets(now, handle, peer, from_tun);
            }
            return;
        };
        let way = self.way(peer, to);
        match self.wg.seal_batch(handle, now, |sealer| from_tun.seal(sealer, way, lost, out)) {
            Ok(Some(sealed)) => {
                self.count_sent(now, peer, sealed.bytes);
                self.drops.outbox_full += sealed.left as u64;
            }
            Ok(None) => self.queue_packets(now, handle, peer, from_tun),
            Err(_) => self.drops.too_long += count as u64,
        }
    }

    /// How packets get to `peer`, which is reached at `to`.
    pub(super) fn way(&self, peer: PeerIdx, to: Destination) -> Way {
        let mtu = self.paths.mtu(peer);
        Way { to, clamp: (mtu < self.mtu).then_some(mtu) }
    }

    /// Keeps packets until there is a session.
    fn queue_packets(&mut self, now: Now, handle: wg::PeerHandle, peer: PeerIdx, from_tun: FromTun<'_>) {
        let mut packet = [0; wg::DEFAULT_MTU * 2];
        for index in 0..from_tun.segments() {
            let len = from_tun.segment_len(index);
            // An MTU that is longer than usual costs an allocation, which keeping the packet does in any case.
            let mut long = Vec::new();
            let packet = if len <= packet.len() {
                &mut packet[..len]
            } else {
                long.resize(len, 0);
                &mut long[..]
            };
            from_tun.write(index, packet);
            match self.wg.queue(handle, now, packet) {
                Ok(()) => self.count_sent(now, peer, len),
                Err(wg::SealError::QueueFull) => {} // counted there
                Err(wg::SealError::UnknownPeer) => self.drops.no_path += 1,
                Err(_) => self.drops.too_long += 1,
            }
        }
    }

    pub(super) fn count_sent(&mut self, now: Now, peer: PeerIdx, len: usize) {
        self.busy.note(now.boot, peer, len);
        if let Some(state) = self.peers.get_mut(peer as usize).and_then(Option::as_mut) {
            state.tx_bytes += len as u64;
        }
    }

    /// Takes a batch of datagrams from one source, each `stride` bytes long (the last may be shorter; 0 for a single
    /// datagram), and opens them in place. Allowed packets go to `tun`, which must have room for as many bytes and
    /// packets as the batch has: what doesn't fit is dropped.
    pub fn handle_datagram(
        &mut self,
        now: Now,
        from: Source,
        data: &mut [u8],
        stride: usize,
        tun: &mut TunOut,
    ) {
        self.handle_datagrams(now, from, Arrival { stride, ..Arrival::default() }, data, tun);
    }

    /// [`Engine::handle_datagram`] with what else is known of the batch. Packets of one flow that follow each other are
    /// joined in `tun` if it was made for that, and judged once.
    pub fn handle_datagrams(
        &mut self,
        now: Now,
        from: Source,
        arrival: Arrival,
        data: &mut [u8],
        tun: &mut TunOut,
    ) {
        self.notice_jump(now);
        self.end_lease_if_over(now);
        let mut arrival = arrival;
        self.take_datagrams(now, from, &mut arrival, data, tun);
        self.settle(now, tun);
    }

    pub(super) fn take_datagrams(
        &mut self,
        now: Now,
        from: Source,
        arrival: &mut Arrival,
        data: &mut [u8],
        tun: &mut TunOut,
    ) {
        let stride = arrival.stride_of(data.len());
        let mut rest = data;
        while !rest.is_empty() {
            let taken = match self.handle_sealed(now, from, arrival, rest, stride, tun) {
                0 => {
                    let (datagram, _) = rest.split_at_mut(stride.min(rest.len()));
                    self.handle_one(now, from, arrival, datagram, tun);
                    1
                }
                taken => taken,
            };
            let next = taken.saturating_mul(stride).min(rest.len());
            rest = &mut rest[next..];
        }
    }

    /// Judges what was put into `tun`.
    pub(super) fn settle(&mut self, now: Now, tun: &mut TunOut) {
        tun.settle(|peer, packet, burst| self.admit(now, peer, packet, burst));
        self.resend_handshakes(now);
    }

    /// True if data messages from there may be opened: the sender is at a possible place, and something is granted.
    pub(super) fn may_open(&self, from: Source) -> bool {
        self.enforced.is_some()
            && match from {
                Source::Direct { remote, .. } => is_endpoint(self.overlay(), remote),
                Source::Relay { device, .. } => self.paths.find(device).is_some(),
                Source::Signal { .. } => false,
            }
    }

    /// The way of nearly everything: data messages of one session at the front of a batch. Returns how many it took; none
    /// if the first datagram is something else, or must be looked at more closely.
    fn handle_sealed(
        &mut self,
        now: Now,
        from: Source,
        arrival: &mut Arrival,
        data: &mut [u8],
        stride: usize,
        tun: &mut TunOut,
    ) -> usize {
        if !self.may_open(from) {
            return 0;
        }
        let Self { wg, drops, .. } = self;
        let batch = wg.handle_data_batch(now, data, stride, |peer, opened, datagram| match opened {
            Ok(packet) if packet.is_empty() => {}
            Ok(packet) => {
                if let Some(packet) = datagram.get_mut(packet) {
                    deliver(&mut drops.inbound, tun, peer.slot(), arrival, packet);
                }
            }
            Err(reason) => drops.inbound.count_wireguard(reason),
        });
        self.on_opened(now, from, batch, data.len());
        batch.datagrams
    }

    /// A peer provably sent `batch`, of about `bytes`.
    pub(super) fn on_opened(&mut self, now: Now, from: Source, batch: wg::DataBatch, bytes: usize) {
        let Some(peer) = batch.peer.map(wg::PeerHandle::slot) else { return };
        let carried = if batch.packets > 0 { Carried::Data } else { Carried::Nothing };
        if carried != Carried::Nothing {
            self.before_use(now, peer);
        }
        self.paths.on_authentic(now.boot, peer, from, carried);
        self.busy.note(now.boot, peer, bytes);
    }

    /// Judges packets that a peer sent.
    fn admit(&mut self, now: Now, peer: PeerIdx, packet: &[u8], burst: Burst) -> bool {
        let Some((src, dst)) = ip_ends(packet) else {
            self.filter.judge_burst(Direction::Ingress, now, packet, peer, burst);
            return false;
        };
        let reason = if self.routes.lookup(src).is_none_or(|owner| owner.peer != peer) {
            DropReason::SpoofedSource
        } else if !self.own.contains(&dst) {
            DropReason::NoPeer
        } else {
            let verdict = self.filter.judge_burst(Direction::Ingress, now, packet, peer, burst);
            if verdict == Verdict::Pass
                && let Some(state) = self.peers.get_mut(peer as usize).and_then(Option::as_mut)
            {
                state.rx_bytes += burst.bytes as u64;
            }
            return verdict == Verdict::Pass;
        };
        self.filter.record_drops(Direction::Ingress, now, packet, burst.packets, reason);
        false
    }

    fn handle_one(
        &mut self,
        now: Now,
        from: Source,
        arrival: &mut Arrival,
        datagram: &mut [u8],
        tun: &mut TunOut,
    ) {
        if let Source::Direct { socket, remote } = from {
            if is_stun(datagram) {
                if self.lifetime.handle(now.boot, socket, remote, datagram) {
                    return;
                }
                match self.stun.handle(now.boot, socket, remote, datagram) {
                    Some(_) => self.on_stun_news(now),
                    None => self.drops.stun_unexpected += 1,
                }
                return;
            }
            if !is_endpoint(self.overlay(), remote) {
                self.drops.bad_endpoint += 1;
                return;
            }
        }
        if self.enforced.is_none() {
            self.drops.not_granted += 1;
        } else if probe::is_probe(datagram) {
            if let Source::Relay { device, .. } | Source::Signal { device } = from
                && let Some(idx) = self.paths.find(device)
            {
                self.before_use(now, idx);
            }
            self.paths.handle_probe(now.boot, from, datagram);
        } else if matches!(datagram, [1..=4, 0, 0, 0, ..]) {
            match from {
                Source::Relay { device, .. } if self.paths.find(device).is_none() => {
                    self.drops.unknown_sender += 1;
                }
                Source::Signal { .. } => self.drops.unknown_protocol += 1,
                Source::Direct { .. } | Source::Relay { .. } => {
                    self.handle_wireguard(now, from, arrival, datagram, tun)
                }
            }
        } else {
            self.drops.unknown_protocol += 1;
        }
    }

    fn handle_wireguard(
        &mut self,
        now: Now,
        from: Source,
        arrival: &mut Arrival,
        datagram: &mut [u8],
        tun: &mut TunOut,
    ) {
        let received = match self.wg.handle(now, from, datagram) {
            Ok(received) => received,
            Err(reason) => {
                self.drops.inbound.count_wireguard(reason);
                return;
            }
        };
        let carried = match &received {
            wg::Received::Data { .. } => Carried::Data,
            wg::Received::Initiation { .. } | wg::Received::Response { .. } => Carried::Handshake,
            wg::Received::Keepalive { .. } => Carried::Nothing,
            wg::Received::Cookie { .. } => return,
        };
        let Some(peer) = received.authenticated().map(wg::PeerHandle::slot) else { return };
        if carried != Carried::Nothing {
            self.before_use(now, peer);
        }
        self.paths.on_authentic(now.boot, peer, from, carried);
        let wg::Received::Data { packet, .. } = received else { return };
        if let Some(packet) = datagram.get_mut(packet) {
            deliver(&mut self.drops.inbound, tun, peer, arrival, packet);
        }
    }

    /// Probes and STUN. True if all fitted.
    pub(super) fn transmit_probes(&mut self, now: Now, out: &mut Outbox) -> bool {
        if !self.paths.poll_transmit(out) {
            return false;
        }
        while out.has_room(crate::stun::REQUEST_LEN) {
            let other = self.paths.local().iter().find(|l| l.addr.is_ipv4()).map(|l| l.id);
            let asked = self.stun.poll(now.boot, &mut self.rng);
            let asked = asked.or_else(|| self.lifetime.poll(now.boot, other?, &mut self.rng));
            let Some(asked) = asked else { return true };
            let to = Destination::Direct { socket: asked.socket, remote: asked.server };
            if !out.push(to, &asked.bytes) {
                self.drops.outbox_full += 1;
            }
        }
        false
    }

    /// Handshakes, keep-alives, packets that waited, and what the filter sends to peers. True if all fitted.
    pub(super) fn transmit_wireguard(&mut self, now: Now, out: &mut Outbox) -> bool {
        let room = self.mtu.max(wg::MIN_TRANSMIT_BUFFER) + WG_ROOM;
        loop {
            let Some(space) = out.space(room) else { return false };
            let Some(transmit) = self.wg.poll_transmit(now, space) else { break };
            let to = match transmit.to {
                wg::Destination::Peer(handle) => {
                    let idx = handle.slot();
                    match transmit.kind {
                        wg::TransmitKind::Data => self.paths.route(now.boot, idx),
                        _ => self.paths.peek_route(now.boot, idx),
                    }
                }
                wg::Destination::Reply { source, peer } => self.reply_to(now, source, peer),
            };
            match to {
                // Their congestion marks were inside: these are the few that had to wait.
                Some(to) => out.commit(to, Ecn::NotCapable, transmit.len),
                // A handshake is sent again as soon as there is a way.
                None => self.drops.no_path += 1,
            }
        }
        self.take_filter_output();
        while let Some((peer, packet)) = self.peer_packets.pop_front() {
            self.send_packets(now, peer, FromTun::Packet(&packet), 0, out);
        }
        true
    }

    pub(super) fn take_filter_output(&mut self) {
        while let Some(output) = self.filter.poll_output() {
            match output {
                Output::Local(packet) => self.push_notice(packet),
                Output::Peer { peer, packet } => {
                    if self.peer_packets.len() < super::MAX_NOTICES {
                        self.peer_packets.push_back((peer, packet));
                    } else {
                        self.drops.notices += 1;
                    }
                }
            }
        }
    }

    /// Where an answer to a datagram goes: back, or if that relay is gone by another way.
    fn reply_to(&self, now: Now, source: Source, peer: Option<wg::PeerHandle>) -> Option<Destination> {
        match source {
            Source::Direct { socket, remote } => Some(Destination::Direct { socket, remote }),
            Source::Relay { relay, device } if self.paths.relay_connected(relay) => {
                Some(Destination::Relay { relay, device })
            }
            Source::Relay { .. } | Source::Signal { .. } => self.paths.peek_route(now.boot, peer?.slot()),
        }
    }
}

/// Puts a packet that a peer sealed among those for the TUN; the verdict follows.
pub(super) fn deliver(
    drops: &mut InboundDrops,
    tun: &mut TunOut,
    peer: PeerIdx,
    arrival: &mut Arrival,
    packet: &mut [u8],
) {
    if arrival.ecn == Ecn::Congested {
        Ecn::mark_congested(packet);
    }
    if std::mem::take(&mut arrival.tell) && !Ecn::mark_congested(packet) {
        drops.delayed += 1;
        return;
    }
    match tun.add(peer, packet) {
        Added::Yes => {}
        Added::BadChecksum => drops.bad_checksum += 1,
        Added::Full => drops.tun_full += 1,
    }
}

/// Source and destination of an IP packet, without a look at the rest of it.
fn ip_ends(packet: &[u8]) -> Option<(IpAddr, IpAddr)> {
    match packet.first()? >> 4 {
        4 => {
            let (src, rest) = packet.get(12..)?.split_first_chunk::<4>()?;
            Some(((*src).into(), (*rest.first_chunk::<4>()?).into()))
        }
        6 => {
            let (src, rest) = packet.get(8..)?.split_first_chunk::<16>()?;
            Some(((*src).into(), (*rest.first_chunk::<16>()?).into()))
        }
        _ => None,
    }
}
