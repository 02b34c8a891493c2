//! Reading IP packets: a zero-copy view of what the filter needs, from any bytes at all.
//!
//! [`Packet::parse`] walks one IPv4 or IPv6 header (with a bounded number of IPv6 extension headers) and the
//! transport header behind it. It never panics and never reads behind the length the IP header states. What it
//! refuses is a [`ParseError`]; checksums are left to the receiving host, since a packet inside the tunnel is
//! authenticated and one from the TUN may carry a checksum that is still to be computed. Super-frames (TSO, USO)
//! are ordinary packets here. Source routing is refused in both families: with it, the destination in the header
//! isn't where the packet goes, so nothing could be decided about it.
//!
//! Parsing is inlined into its few callers: handing a [`Packet`] over in memory costs more than half of reading it.
//!
//! Packets that the filter makes itself are in [`build`].

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use warren_common::filter::{PROTO_ICMP, PROTO_ICMPV6, PROTO_SCTP, PROTO_TCP, PROTO_UDP};

pub mod build;
pub mod mss;

/// IPv6 extension headers walked before the transport header, a count. RFC 8200 names six kinds, each wanted once
/// (destination options twice); a longer chain exists only to tire parsers.
pub const MAX_EXTENSION_HEADERS: usize = 8;

/// Finish flag of TCP.
pub const TCP_FIN: u8 = 0x01;
/// Synchronise flag of TCP.
pub const TCP_SYN: u8 = 0x02;
/// Reset flag of TCP.
pub const TCP_RST: u8 = 0x04;
/// Push flag of TCP.
pub const TCP_PSH: u8 = 0x08;
/// Acknowledgement flag of TCP.
pub const TCP_ACK: u8 = 0x10;

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION_OPTIONS: u8 = 60;
const MOBILITY: u8 = 135;
const HIP: u8 = 139;
const SHIM6: u8 = 140;

const IPV4_HEADER: usize = 20;
const IPV6_HEADER: usize = 40;
const TCP_HEADER: usize = 20;
const UDP_HEADER: usize = 8;
const ICMP_HEADER: usize = 8;
const MAX_DATAGRAM: usize = 65_535;

/// Why bytes aren't a packet the filter can judge.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ParseError {
    /// The first four bits are neither 4 nor 6, or there are no bytes.
    #[error("not an IPv4 or IPv6 packet")]
    NotIp,
    /// There are fewer bytes than the headers or their length fields say.
    #[error("the packet is shorter than its headers say")]
    Truncated,
    /// A length field is below the smallest legal value.
    #[error("a header length field is below its minimum")]
    HeaderLength,
    /// An IPv4 source route option or an IPv6 routing header (RFC 5095, RFC 7126).
    #[error("the packet asks for source routing")]
    SourceRoute,
    /// An IPv4 option with a length that can't be (RFC 791).
    #[error("an IPv4 option has an impossible length")]
    Options,
    /// More than [`MAX_EXTENSION_HEADERS`], or in an order RFC 8200 forbids.
    #[error("too many IPv6 extension headers, or in a forbidden order")]
    ExtensionHeaders,
    /// A first fragment without its whole transport header (RFC 1858, RFC 7112).
    #[error("the first fragment lacks part of the transport header")]
    TinyFragment,
    /// A fragment that ends behind 65 535 bytes, or an inner one that isn't a multiple of eight bytes.
    #[error("a fragment has an impossible place or length")]
    FragmentBounds,
    /// A combination of TCP flags that no TCP sends: none, or SYN together with FIN or RST.
    #[error("the TCP flags contradict each other")]
    TcpFlags,
}

/// Source and destination address, of one family by construction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Addrs {
    /// IPv4.
    V4 {
        /// Source.
        src: Ipv4Addr,
        /// Destination.
        dst: Ipv4Addr,
    },
    /// IPv6.
    V6 {
        /// Source.
        src: Ipv6Addr,
        /// Destination.
        dst: Ipv6Addr,
    },
}

impl Addrs {
    /// The pair, or `None` if the families differ.
    pub const fn new(src: IpAddr, dst: IpAddr) -> Option<Self> {
        match (src, dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => Some(Self::V4 { src, dst }),
            (IpAddr::V6(src), IpAddr::V6(dst)) => Some(Self::V6 { src, dst }),
            _ => None,
        }
    }

    /// The source address.
    pub const fn src(&self) -> IpAddr {
        match *self {
            Self::V4 { src, .. } => IpAddr::V4(src),
            Self::V6 { src, .. } => IpAddr::V6(src),
        }
    }

    /// The destination address.
    pub const fn dst(&self) -> IpAddr {
        match *self {
            Self::V4 { dst, .. } => IpAddr::V4(dst),
            Self::V6 { dst, .. } => IpAddr::V6(dst),
        }
    }

    /// The addresses of an answer.
    pub const fn reversed(self) -> Self {
        match self {
            Self::V4 { src, dst } => Self::V4 { src: dst, dst: src },
            Self::V6 { src, dst } => Self::V6 { src: dst, dst: src },
        }
    }
}

/// What a flow is told apart by, beside addresses and protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Selector {
    /// Ports of TCP, UDP or SCTP.
    Ports {
        /// Source port.
        src: u16,
        /// Destination port.
        dst: u16,
    },
    /// An ICMP or ICMPv6 echo.
    Echo {
        /// Request, or reply.
        request: bool,
        /// The identifier both carry.
        id: u16,
    },
    /// Any other informational ICMP or ICMPv6 message.
    Icmp {
        /// Its type.
        kind: u8,
    },
    /// A protocol without anything of the kind.
    None,
}

/// The parts of a TCP header the filter uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TcpHeader {
    /// Source port.
    pub src_port: u16,
    /// Destination port.
    pub dst_port: u16,
    /// Sequence number.
    pub seq: u32,
    /// Acknowledgement number; means something only with [`TCP_ACK`].
    pub ack: u32,
    /// Flags, the low eight: see the `TCP_…` constants.
    pub flags: u8,
    /// Bytes of data; of the first fragment only if the datagram is fragmented.
    pub payload_len: u32,
}

impl TcpHeader {
    /// True if any of the given flags is set.
    pub const fn has(&self, flags: u8) -> bool {
        self.flags & flags != 0
    }

    /// True for a segment that asks for a new connection.
    pub const fn opens(&self) -> bool {
        self.flags & (TCP_SYN | TCP_ACK) == TCP_SYN
    }

    /// The sequence number behind this segment; SYN and FIN take one each (RFC 9293, section 3.4).
    pub const fn end(&self) -> u32 {
        self.seq
            .wrapping_add(self.payload_len)
            .wrapping_add(self.has(TCP_SYN) as u32)
            .wrapping_add(self.has(TCP_FIN) as u32)
    }
}

/// What is behind the IP header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// TCP.
    Tcp(TcpHeader),
    /// An ICMP or ICMPv6 error, which quotes the packet it is about: see [`Packet::quoted`].
    IcmpError {
        /// Its type.
        kind: u8,
        /// Its code.
        code: u8,
    },
    /// Everything else, told apart by its selector.
    Other(Selector),
    /// Not the first fragment: no transport header to see.
    LaterFragment,
}

/// Where a fragment belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fragment {
    /// Identification: 16 bits in IPv4, 32 in IPv6.
    pub id: u32,
    /// Bytes of the datagram's payload before this fragment.
    pub offset: u16,
    /// Bytes of the datagram's payload up to and with this fragment.
    pub end: u16,
    /// More fragments follow.
    pub more: bool,
}

/// A view of one IP packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet<'a> {
    /// Source and destination.
    pub addrs: Addrs,
    /// Protocol behind the IP header and its extensions.
    pub proto: u8,
    /// The transport header's parts.
    pub transport: Transport,
    /// Set if this is a fragment. An IPv6 "atomic" fragment (RFC 6946) isn't one.
    pub fragment: Option<Fragment>,
    /// The packet's bytes, cut to the length its IP header states.
    pub bytes: &'a [u8],
    transport_at: usize,
}

/// What an ICMP error says about the packet it quotes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quoted {
    /// Source and destination of the quoted packet.
    pub addrs: Addrs,
    /// Its protocol.
    pub proto: u8,
    /// Its ports or identifier.
    pub selector: Selector,
}

impl<'a> Packet<'a> {
    /// Reads the headers of `bytes`; bytes behind the stated length (WireGuard's padding) are left out of the view.
    ///
    /// # Errors
    /// A [`ParseError`] that names what is wrong; such a packet must be dropped.
    #[inline(always)]
    pub fn parse(bytes: &'a [u8]) -> Result<Self, ParseError> {
        let ip = IpHeader::parse(bytes)?;
        if ip.total_len > bytes.len() {
            return Err(ParseError::Truncated);
        }
        let bytes = &bytes[..ip.total_len];
        let payload = bytes.get(ip.transport_at..).ok_or(ParseError::HeaderLength)?;
        let fragment = match ip.fragment {
            Some(raw) => Some(raw.placed(payload.len())?),
            None => None,
        };
        let transport = match fragment {
            Some(fragment) if fragment.offset > 0 => Transport::LaterFragment,
            _ => parse_transport(&ip, payload, fragment.is_some()).map_err(|error| {
                match (fragment, error) {
                    (Some(_), ParseError::Truncated) => ParseError::TinyFragment,
                    _ => error,
                }
            })?,
        };
        Ok(Self {
            addrs: ip.addrs,
            proto: ip.proto,
            transport,
            fragment,
            bytes,
            transport_at: ip.transport_at,
        })
    }

    /// Source address.
    pub const fn src(&self) -> IpAddr {
        self.addrs.src()
    }

    /// Destination address.
    pub const fn dst(&self) -> IpAddr {
        self.addrs.dst()
    }

    /// Ports or identifier; [`Selector::None`] for ICMP errors and later fragments.
    pub const fn selector(&self) -> Selector {
        match self.transport {
            Transport::Tcp(tcp) => Selector::Ports { src: tcp.src_port, dst: tcp.dst_port },
            Transport::Other(selector) => selector,
            Transport::IcmpError { .. } | Transport::LaterFragment => Selector::None,
        }
    }

    /// Destination port, zero where there is none.
    pub const fn dst_port(&self) -> u16 {
        match self.selector() {
            Selector::Ports { dst, .. } => dst,
            _ => 0,
        }
    }

    /// Source port, zero where there is none.
    pub const fn src_port(&self) -> u16 {
        match self.selector() {
            Selector::Ports { src, .. } => src,
            _ => 0,
        }
    }

    /// The packet an ICMP error is about. `None` if this is no ICMP error, or the quotation is too short, a later
    /// fragment or an ICMP error itself, so that it says nothing about a flow.
    pub fn quoted(&self) -> Option<Quoted> {
        if !matches!(self.transport, Transport::IcmpError { .. }) {
            return None;
        }
        let quote = self.bytes.get(self.transport_at + ICMP_HEADER..)?;
        let ip = IpHeader::parse(quote).ok()?;
        if ip.fragment.is_some_and(|fragment| fragment.offset > 0) {
            return None;
        }
        // Eight bytes are all that RFC 792 promises of the quoted transport header.
        let transport: &[u8; 8] = quote.get(ip.transport_at..)?.first_chunk()?;
        let selector = match (ip.proto, ip.addrs) {
            (PROTO_TCP | PROTO_UDP | PROTO_SCTP, _) => ports(transport),
            (PROTO_ICMP, Addrs::V4 { .. }) | (PROTO_ICMPV6, Addrs::V6 { .. }) => {
                match parse_icmp(ip.proto, transport) {
                    Transport::Other(selector) => selector,
                    _ => return None,
                }
            }
            _ => Selector::None,
        };
        Some(Quoted { addrs: ip.addrs, proto: ip.proto, selector })
    }
}

/// The fragment fields as they stand in the header.
#[derive(Clone, Copy)]
struct RawFragment {
    id: u32,
    offset: usize,
    more: bool,
}

impl RawFragment {
    fn placed(self, len: usize) -> Result<Fragment, ParseError> {
        let end = self.offset + len;
        if end > MAX_DATAGRAM || len == 0 || (self.more && !len.is_multiple_of(8)) {
            return Err(ParseError::FragmentBounds);
        }
        Ok(Fragment {
            id: self.id,
            offset: self.offset as u16, // both at most MAX_DATAGRAM
            end: end as u16,
            more: self.more,
        })
    }
}

/// One IP header with its options or extensions. Says nothing about whether the payload is there.
struct IpHeader {
    addrs: Addrs,
    proto: u8,
    total_len: usize,
    transport_at: usize,
    fragment: Option<RawFragment>,
}

impl IpHeader {
    #[inline(always)]
    fn parse(bytes: &[u8]) -> Result<Self, ParseError> {
        match bytes.first().map(|byte| byte >> 4) {
            Some(4) => Self::parse_v4(bytes),
            Some(6) => Self::parse_v6(bytes),
            _ => Err(ParseError::NotIp),
        }
    }

    #[inline(always)]
    fn parse_v4(bytes: &[u8]) -> Result<Self, ParseError> {
        let header: &[u8; IPV4_HEADER] = bytes.first_chunk().ok_or(ParseError::Truncated)?;
        let header_len = usize::from(header[0] & 0x0f) * 4;
        let total_len = usize::from(be16(header[2], header[3]));
        if header_len < IPV4_HEADER || total_len < header_len {
            return Err(ParseError::HeaderLength);
        }
        if header_len > IPV4_HEADER {
            check_options(bytes.get(IPV4_HEADER..header_len).ok_or(ParseError::Truncated)?)?;
        }
        let flags_offset = be16(header[6], header[7]);
        let offset = usize::from(flags_offset & 0x1fff) * 8;
        let more = flags_offset & 0x2000 != 0;
        Ok(Self {
            addrs: Addrs::V4 {
                src: Ipv4Addr::from_bits(u32::from_be_bytes([
                    header[12], header[13], header[14], header[15],
                ])),
                dst: Ipv4Addr::from_bits(u32::from_be_bytes([
                    header[16], header[17], header[18], header[19],
                ])),
            },
            proto: header[9],
            total_len,
            transport_at: header_len,
            fragment: (offset > 0 || more).then(|| RawFragment {
                id: u32::from(be16(header[4], header[5])),
                offset,
                more,
            }),
        })
    }

    fn parse_v6(bytes: &[u8]) -> Result<Self, ParseError> {
        let (header, rest) = bytes.split_first_chunk::<IPV6_HEADER>().ok_or(ParseError::Truncated)?;
        let mut src = [0; 16];
        src.copy_from_slice(&header[8..24]);
        let mut dst = [0; 16];
        dst.copy_from_slice(&header[24..40]);
        let payload_len = usize::from(be16(header[4], header[5]));
        let rest = &rest[..payload_len.min(rest.len())];
        let mut proto = header[6];
        let mut at = 0;
        let mut fragment = None;
        for walked in 0.. {
            match proto {
                HOP_BY_HOP if walked > 0 => return Err(ParseError::ExtensionHeaders),
                ROUTING => return Err(ParseError::SourceRoute),
                FRAGMENT if fragment.is_some() => return Err(ParseError::ExtensionHeaders),
                HOP_BY_HOP | FRAGMENT | DESTINATION_OPTIONS | MOBILITY | HIP | SHIM6 => {}
                _ => break,
            }
            if walked >= MAX_EXTENSION_HEADERS {
                return Err(ParseError::ExtensionHeaders);
            }
            let extension: &[u8; 8] =
                rest.get(at..).and_then(|rest| rest.first_chunk()).ok_or(ParseError::Truncated)?;
            if proto == FRAGMENT {
                let field = be16(extension[2], extension[3]);
                let raw = RawFragment {
                    id: u32::from_be_bytes([extension[4], extension[5], extension[6], extension[7]]),
                    offset: usize::from(field & 0xfff8),
                    more: field & 1 != 0,
                };
                fragment = (raw.offset > 0 || raw.more).then_some(raw);
                at += 8;
                proto = extension[0];
                if raw.offset > 0 {
                    break; // what follows is the middle of something
                }
            } else {
                at += 8 + usize::from(extension[1]) * 8;
                proto = extension[0];
            }
        }
        Ok(Self {
            addrs: Addrs::V6 { src: Ipv6Addr::from(src), dst: Ipv6Addr::from(dst) },
            proto,
            total_len: IPV6_HEADER + payload_len,
            transport_at: IPV6_HEADER + at,
            fragment,
        })
    }
}

fn check_options(mut options: &[u8]) -> Result<(), ParseError> {
    const END: u8 = 0;
    const NOP: u8 = 1;
    const LOOSE_SOURCE_ROUTE: u8 = 131;
    const STRICT_SOURCE_ROUTE: u8 = 137;
    while let [kind, rest @ ..] = options {
        match *kind {
            END => return Ok(()),
            NOP => options = rest,
            LOOSE_SOURCE_ROUTE | STRICT_SOURCE_ROUTE => return Err(ParseError::SourceRoute),
            _ => {
                let len = rest.first().copied().map_or(0, usize::from);
                if len < 2 {
                    return Err(ParseError::Options);
                }
                options = options.get(len..).ok_or(ParseError::Options)?;
            }
        }
    }
    Ok(())
}

#[inline(always)]
fn parse_transport(ip: &IpHeader, payload: &[u8], fragmented: bool) -> Result<Transport, ParseError> {
    match (ip.proto, ip.addrs) {
        (PROTO_TCP, _) => parse_tcp(payload).map(Transport::Tcp),
        (PROTO_UDP, _) => {
            let header: &[u8; UDP_HEADER] = payload.first_chunk().ok_or(ParseError::Truncated)?;
            let len = usize::from(be16(header[4], header[5]));
            if len < UDP_HEADER {
                return Err(ParseError::HeaderLength);
            }
            if len > payload.len() && !fragmented {
                return Err(ParseError::Truncated);
            }
            Ok(Transport::Other(ports(header)))
        }
        (PROTO_SCTP, _) => {
            let header: &[u8; 8] = payload.first_chunk().ok_or(ParseError::Truncated)?;
            Ok(Transport::Other(ports(header)))
        }
        (PROTO_ICMP, Addrs::V4 { .. }) | (PROTO_ICMPV6, Addrs::V6 { .. }) => {
            let header: &[u8; ICMP_HEADER] = payload.first_chunk().ok_or(ParseError::Truncated)?;
            Ok(parse_icmp(ip.proto, header))
        }
        _ => Ok(Transport::Other(Selector::None)),
    }
}

#[inline(always)]
fn parse_tcp(payload: &[u8]) -> Result<TcpHeader, ParseError> {
    let header: &[u8; TCP_HEADER] = payload.first_chunk().ok_or(ParseError::Truncated)?;
    let header_len = usize::from(header[12] >> 4) * 4;
    if header_len < TCP_HEADER {
        return Err(ParseError::HeaderLength);
    }
    let data = payload.get(header_len..).ok_or(ParseError::Truncated)?;
    let flags = header[13];
    let known = flags & (TCP_FIN | TCP_SYN | TCP_RST | TCP_ACK);
    if known == 0 || (known & TCP_SYN != 0 && known & (TCP_FIN | TCP_RST) != 0) {
        return Err(ParseError::TcpFlags);
    }
    Ok(TcpHeader {
        src_port: be16(header[0], header[1]),
        dst_port: be16(header[2], header[3]),
        seq: u32::from_be_bytes([header[4], header[5], header[6], header[7]]),
        ack: u32::from_be_bytes([header[8], header[9], header[10], header[11]]),
        flags,
        payload_len: data.len() as u32, // a packet has at most 65 575 bytes
    })
}

fn parse_icmp(proto: u8, header: &[u8; 8]) -> Transport {
    let kind = header[0];
    let id = be16(header[4], header[5]);
    match (proto, kind) {
        // Unreachable, source quench, time exceeded, parameter problem; unreachable to parameter problem.
        (PROTO_ICMP, 3 | 4 | 11 | 12) | (PROTO_ICMPV6, 0..=127) => {
            Transport::IcmpError { kind, code: header[1] }
        }
        (PROTO_ICMP, 8) | (PROTO_ICMPV6, 128) => Transport::Other(Selector::Echo { request: true, id }),
        (PROTO_ICMP, 0) | (PROTO_ICMPV6, 129) => Transport::Other(Selector::Echo { request: false, id }),
        _ => Transport::Other(Selector::Icmp { kind }),
    }
}

const fn ports(header: &[u8; 8]) -> Selector {
    Selector::Ports { src: be16(header[0], header[1]), dst: be16(header[2], header[3]) }
}

const fn be16(high: u8, low: u8) -> u16 {
    u16::from_be_bytes([high, low])
}

#[cfg(test)]
mod tests;
