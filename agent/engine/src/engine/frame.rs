//! A frame from the TUN on its way into sealed packets.

use crate::io::{Burst, DEFAULT_ARENA_BYTES, Destination, MAX_BATCH_BYTES, Outbox};
use crate::offload::Ecn;
use crate::offload::segment::{MAX_HEADERS, MAX_SEGMENTS, SuperFrame, complete_checksum};
use crate::offload::vnet::{HEADER_LEN, Header};
use crate::packet::mss;
use crate::wg::{self, Sealer};

/// Room a WireGuard message of up to the MTU may need: padding and overhead.
pub(super) const WG_ROOM: usize = 16 + wg::DATA_OVERHEAD;

/// An outbox with a full batch in it has room for all that a frame of 64 KiB makes.
const _: () =
    assert!(MAX_SEGMENTS * (MAX_HEADERS + WG_ROOM) + 65_535 + MAX_BATCH_BYTES <= DEFAULT_ARENA_BYTES);

/// What one read of the TUN brought.
#[derive(Clone, Copy, Debug)]
pub(super) enum FromTun<'a> {
    Packet(&'a [u8]),
    Super(SuperFrame<'a>, &'a [u8]),
}

impl<'a> FromTun<'a> {
    /// The packet; of a super-frame as it was read, one long packet.
    pub(super) const fn bytes(&self) -> &'a [u8] {
        match self {
            Self::Packet(packet) | Self::Super(_, packet) => packet,
        }
    }

    pub(super) fn burst(&self) -> Burst {
        match self {
            Self::Packet(packet) => Burst::one(packet.len()),
            Self::Super(frame, _) => Burst {
                packets: frame.segments() as u32, // at most MAX_SEGMENTS
                bytes: frame.total_len(),
                more_payload: 0, // the one packet has it all
            },
        }
    }

    pub(super) fn segments(&self) -> usize {
        match self {
            Self::Packet(_) => 1,
            Self::Super(frame, _) => frame.segments(),
        }
    }

    pub(super) fn segment_len(&self, index: usize) -> usize {
        match self {
            Self::Packet(packet) => packet.len(),
            Self::Super(frame, _) => frame.segment_len(index),
        }
    }

    pub(super) fn write(&self, index: usize, out: &mut [u8]) {
        match self {
            Self::Packet(packet) => out.copy_from_slice(packet),
            Self::Super(frame, _) => {
                frame.write(index, out);
            }
        }
    }

    /// Looks at a frame with its virtio header, and completes what the host left open. With `tell` the sender is told to
    /// slow down: by a mark, or, if it doesn't know those, by the loss of a packet; true then. `None` if it contradicts
    /// itself.
    pub(super) fn prepare(frame: &'a mut [u8], tell: bool) -> Option<(Self, bool)> {
        let header = Header::read(frame).ok()?;
        let packet = &mut frame[HEADER_LEN..];
        let lose = tell && !Ecn::mark_congested(packet);
        let from_tun = match header.gso {
            None => complete_checksum(&header, packet).map(|()| Self::Packet(packet)),
            Some(gso) => {
                SuperFrame::new(gso, header.checksum, packet).map(|frame| Self::Super(frame, packet))
            }
        };
        Some((from_tun.ok()?, lose))
    }

    /// A frame that was [prepared](Self::prepare) before.
    pub(super) fn prepared(frame: &'a [u8]) -> Option<Self> {
        let header = Header::read(frame).ok()?;
        let packet = &frame[HEADER_LEN..];
        Some(match header.gso {
            None => Self::Packet(packet),
            Some(gso) => Self::Super(SuperFrame::new(gso, header.checksum, packet).ok()?, packet),
        })
    }

    /// Seals its packets but the first `lost`, straight into `out`.
    pub(super) fn seal(&self, sealer: &mut Sealer<'_>, way: Way, lost: usize, out: &mut Outbox) -> Sealed {
        let ecn = Ecn::of_packet(self.bytes()).outside();
        let count = self.segments();
        let mut bytes = 0;
        for index in lost..count {
            let len = self.segment_len(index);
            let sealed = out.space(len + WG_ROOM).and_then(|space| {
                sealer.seal(len, space, |body| {
                    self.write(index, body);
                    if let Some(mtu) = way.clamp {
                        mss::clamp(body, mtu);
                    }
                })
            });
            let Some(datagram) = sealed else { return Sealed { bytes, left: count - index } };
            out.commit(way.to, ecn, datagram);
            bytes += len;
        }
        Sealed { bytes, left: 0 }
    }
}

/// How packets get to a peer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Way {
    pub(super) to: Destination,
    /// The path is narrower than the TUN: segments that TCP announces are made to fit this many bytes.
    pub(super) clamp: Option<usize>,
}

/// What [`FromTun::seal`] did.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sealed {
    /// Bytes of the packets that were sealed.
    pub(super) bytes: usize,
    /// Packets for which there was no room.
    pub(super) left: usize,
}
