//! Cutting a super-frame into packets, each written where it is wanted.

use warren_common::filter::{PROTO_TCP, PROTO_UDP};

use super::checksum::Sum;
use super::vnet::{Gso, GsoKind, HEADER_LEN, Header, PartialChecksum};
use crate::packet::{TCP_FIN, TCP_PSH};

const IPV4_HEADER: usize = 20;
const IPV6_HEADER: usize = 40;
const TCP_HEADER: usize = 20;
const UDP_HEADER: usize = 8;
/// Congestion window reduced (RFC 3168): said once, so in the first segment.
const TCP_CWR: u8 = 0x80;

/// Longest IP, extension and transport headers of a super-frame, in bytes: more than any stack makes.
pub const MAX_HEADERS: usize = 256;
/// Most packets of one super-frame, a count: however long their headers are, so many fit an
/// [`Outbox`](crate::io::Outbox) with a full batch in it. A frame that has more is taken in parts by the queue.
pub const MAX_SEGMENTS: usize = 430;
/// Most packets of a frame before it is split, a count: 64 KiB of what Linux' TCP sends at least in one segment, 8 bytes.
const MAX_UNSPLIT: usize = 8_192;

/// Why a frame can't be cut. The kernel makes no such frame; whoever else writes to the TUN might.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadFrame {
    /// Headers and the virtio header contradict each other.
    #[error("headers contradict the virtio header")]
    Headers,
    /// Segments without payload, or more than [`MAX_SEGMENTS`].
    #[error("impossible number of segments")]
    Segments,
    /// The checksum is to go outside the packet.
    #[error("the checksum's place is outside the packet")]
    Checksum,
}

/// A super-frame that was found to be sound. Cuts off nothing: all its bytes are in some segment.
#[derive(Clone, Copy, Debug)]
pub struct SuperFrame<'a> {
    headers: &'a [u8],
    payload: &'a [u8],
    size: usize,
    transport_at: usize,
    tcp: bool,
    ipv4: bool,
}

impl<'a> SuperFrame<'a> {
    /// Looks at a packet with the virtio header that was in front of it.
    ///
    /// # Errors
    /// See [`BadFrame`]. Nothing of such a frame can be sent.
    pub fn new(gso: Gso, checksum: Option<PartialChecksum>, packet: &'a [u8]) -> Result<Self, BadFrame> {
        Self::of(gso, checksum, packet, MAX_SEGMENTS)
    }

    /// The same with another bound.
    #[inline]
    fn of(
        gso: Gso,
        checksum: Option<PartialChecksum>,
        packet: &'a [u8],
        most: usize,
    ) -> Result<Self, BadFrame> {
        let tcp = gso.kind != GsoKind::Udp;
        let (ipv4, proto, transport_at) = match packet.first().map(|byte| byte >> 4) {
            Some(4) if packet.len() >= IPV4_HEADER && gso.kind != GsoKind::Tcp6 => {
                let at = usize::from(packet[0] & 0x0f) * 4;
                let fragmented = packet[6] & 0x3f != 0 || packet[7] != 0;
                let total = usize::from(u16::from_be_bytes([packet[2], packet[3]]));
                if at < IPV4_HEADER || fragmented || total != packet.len() {
                    return Err(BadFrame::Headers);
                }
                (true, packet[9], at)
            }
            Some(6) if packet.len() >= IPV6_HEADER && gso.kind != GsoKind::Tcp4 => {
                let total = IPV6_HEADER + usize::from(u16::from_be_bytes([packet[4], packet[5]]));
                // Behind extension headers only the kernel's word says where the transport header is.
                let start = checksum.map_or(IPV6_HEADER, |c| usize::from(c.start));
                let direct = start == IPV6_HEADER;
                let proto = match (direct, tcp) {
                    (true, _) => packet[6],
                    (false, true) => PROTO_TCP,
                    (false, false) => PROTO_UDP,
                };
                if start < IPV6_HEADER || total != packet.len() {
                    return Err(BadFrame::Headers);
                }
                (false, proto, start)
            }
            _ => return Err(BadFrame::Headers),
        };
        let transport = packet.get(transport_at..).ok_or(BadFrame::Headers)?;
        let transport_len = match (tcp, proto) {
            (true, PROTO_TCP) if transport.len() >= TCP_HEADER => usize::from(transport[12] >> 4) * 4,
            (false, PROTO_UDP) if transport.len() >= UDP_HEADER => UDP_HEADER,
            _ => return Err(BadFrame::Headers),
        };
        let minimum = if tcp { TCP_HEADER } else { UDP_HEADER };
        let header_len = transport_at + transport_len;
        if transport_len < minimum || header_len > packet.len() || header_len > MAX_HEADERS {
            return Err(BadFrame::Headers);
        }
        let (headers, payload) = packet.split_at(header_len);
        let size = usize::from(gso.size);
        if size == 0 || payload.is_empty() || payload.len().div_ceil(size) > most {
            return Err(BadFrame::Segments);
        }
        Ok(Self { headers, payload, size, transport_at, tcp, ipv4 })
    }

    /// How many packets it makes, at least one.
    pub const fn segments(&self) -> usize {
        self.payload.len().div_ceil(self.size)
    }

    /// The length of packet `index`, in bytes; the last one's may be less than the others'.
    pub fn segment_len(&self, index: usize) -> usize {
        self.headers.len() + self.part(index).len()
    }

    /// Bytes of all packets together.
    pub const fn total_len(&self) -> usize {
        self.headers.len() * self.segments() + self.payload.len()
    }

    /// Writes packet `index` to the front of `out` and returns its length. `out` must hold
    /// [`segment_len`](Self::segment_len) bytes.
    pub fn write(&self, index: usize, out: &mut [u8]) -> usize {
        let part = self.part(index);
        let len = self.headers.len() + part.len();
        let (headers, body) = out[..len].split_at_mut(self.headers.len());
        headers.copy_from_slice(self.headers);
        body.copy_from_slice(part);
        let (ip, transport) = headers.split_at_mut(self.transport_at);
        let ip_addresses = if self.ipv4 {
            // Both lengths are below that of the super-frame, which a 16-bit field held.
            ip[2..4].copy_from_slice(&(len as u16).to_be_bytes());
            let id = u16::from_be_bytes([ip[4], ip[5]]).wrapping_add(index as u16);
            ip[4..6].copy_from_slice(&id.to_be_bytes());
            ip[10..12].fill(0);
            let sum = Sum::default().add(ip).finish();
            ip[10..12].copy_from_slice(&sum);
            &ip[12..20]
        } else {
            ip[4..6].copy_from_slice(&((len - IPV6_HEADER) as u16).to_be_bytes());
            &ip[8..40]
        };
        let transport_len = len - self.transport_at;
        let (proto, place) = if self.tcp {
            let seq = u32::from_be_bytes([transport[4], transport[5], transport[6], transport[7]]);
            let seq = seq.wrapping_add((index * self.size) as u32);
            transport[4..8].copy_from_slice(&seq.to_be_bytes());
            if index + 1 < self.segments() {
                transport[13] &= !(TCP_FIN | TCP_PSH);
            }
            if index > 0 {
                transport[13] &= !TCP_CWR;
            }
            (PROTO_TCP, 16)
        } else {
            transport[4..6].copy_from_slice(&(transport_len as u16).to_be_bytes());
            (PROTO_UDP, 6)
        };
        transport[place..place + 2].fill(0);
        let sum = Sum::default().add_pseudo(ip_addresses, proto, transport_len).add(transport).add(body);
        let sum = match sum.finish() {
            [0, 0] if !self.tcp => [0xff, 0xff], // zero would mean "none" (RFC 768)
            sum => sum,
        };
        transport[place..place + 2].copy_from_slice(&sum);
        len
    }

    fn part(&self, index: usize) -> &'a [u8] {
        let start = (index * self.size).min(self.payload.len());
        &self.payload[start..(start + self.size).min(self.payload.len())]
    }
}

/// Cuts a frame, a virtio header in front, that has more than [`MAX_SEGMENTS`] into frames that make the same packets.
/// `None` if it needn't or can't be. A TCP with a tiny segment size makes such frames.
pub(crate) fn split(frame: &[u8]) -> Option<Vec<Vec<u8>>> {
    let header = Header::read(frame).ok()?;
    let gso = header.gso?;
    let packet = frame.get(HEADER_LEN..)?;
    // Nearly every frame ends here.
    if packet.len() <= MAX_SEGMENTS * usize::from(gso.size) {
        return None;
    }
    let whole = SuperFrame::of(gso, header.checksum, packet, MAX_UNSPLIT).ok()?;
    if whole.segments() <= MAX_SEGMENTS {
        return None;
    }
    // A part is a segment of many segments' length. That it has a whole checksum harms nobody: its packets get their own.
    let parts = SuperFrame { size: whole.size * MAX_SEGMENTS, ..whole };
    let part = |index: usize| {
        let mut part = vec![0; HEADER_LEN + parts.segment_len(index)];
        let (head, packet) = part.split_at_mut(HEADER_LEN);
        head.copy_from_slice(&header.to_bytes());
        parts.write(index, packet);
        if parts.ipv4 {
            let first = (index * MAX_SEGMENTS) as u16; // below MAX_UNSPLIT
            let id = u16::from_be_bytes([parts.headers[4], parts.headers[5]]).wrapping_add(first);
            packet[4..6].copy_from_slice(&id.to_be_bytes());
            packet[10..12].fill(0);
            let sum = Sum::default().add(&packet[..parts.transport_at]).finish();
            packet[10..12].copy_from_slice(&sum);
        }
        part
    };
    Some((0..parts.segments()).map(part).collect())
}

/// Completes the checksum of a packet that isn't a super-frame, if its virtio header asks for it.
///
/// # Errors
/// The place is outside the packet.
pub fn complete_checksum(header: &Header, packet: &mut [u8]) -> Result<(), BadFrame> {
    let Some(PartialChecksum { start, offset }) = header.checksum else { return Ok(()) };
    let transport = packet.get_mut(usize::from(start)..).ok_or(BadFrame::Checksum)?;
    let place = usize::from(offset);
    if place + 2 > transport.len() {
        return Err(BadFrame::Checksum);
    }
    let sum = match Sum::default().add(transport).finish() {
        [0, 0] => [0xff, 0xff], // the same number, and what UDP must say instead of "none"
        sum => sum,
    };
    transport[place..place + 2].copy_from_slice(&sum);
    Ok(())
}
