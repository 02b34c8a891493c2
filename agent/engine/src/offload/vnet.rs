//! The header in front of each packet of a TUN with `IFF_VNET_HDR` (virtio 1.3, section 5.1.6), in its ten-byte form
//! with numbers in the host's own byte order.

/// Length of the header, in bytes.
pub const HEADER_LEN: usize = 10;

const NEEDS_CSUM: u8 = 1;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
/// Beside the type: the flow uses ECN.
const GSO_ECN: u8 = 0x80;

/// What a header says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// The transport checksum is to be completed.
    pub checksum: Option<PartialChecksum>,
    /// The packet is a super-frame.
    pub gso: Option<Gso>,
    /// Bytes of all headers, a hint for where the receiver may cut; 0 without `gso`.
    pub header_len: u16,
}

/// A checksum that holds the sum of the pseudo-header only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PartialChecksum {
    /// Where summing starts: at the transport header.
    pub start: u16,
    /// Where the result goes, from `start`.
    pub offset: u16,
}

/// How a super-frame is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gso {
    /// The protocol.
    pub kind: GsoKind,
    /// Bytes of payload in each segment; the last may have fewer.
    pub size: u16,
}

/// What a super-frame consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GsoKind {
    /// TCP over IPv4.
    Tcp4,
    /// TCP over IPv6.
    Tcp6,
    /// UDP, either family.
    Udp,
}

/// Why there is no header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// There are fewer than [`HEADER_LEN`] bytes.
    #[error("shorter than a virtio header")]
    Short,
    /// The kernel says it is a kind of super-frame that we never asked for.
    #[error("unknown kind of super-frame: {0}")]
    UnknownKind(u8),
}

impl Header {
    /// Reads the header in front of `bytes`.
    ///
    /// # Errors
    /// It is too short, or of a kind that no kernel sends us.
    pub fn read(bytes: &[u8]) -> Result<Self, HeaderError> {
        let bytes: &[u8; HEADER_LEN] = bytes.first_chunk().ok_or(HeaderError::Short)?;
        let u16_at = |at: usize| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
        let kind = match bytes[1] & !GSO_ECN {
            GSO_NONE => None,
            GSO_TCPV4 => Some(GsoKind::Tcp4),
            GSO_TCPV6 => Some(GsoKind::Tcp6),
            GSO_UDP_L4 => Some(GsoKind::Udp),
            other => return Err(HeaderError::UnknownKind(other)),
        };
        Ok(Self {
            checksum: (bytes[0] & NEEDS_CSUM != 0)
                .then(|| PartialChecksum { start: u16_at(6), offset: u16_at(8) }),
            gso: kind.map(|kind| Gso { kind, size: u16_at(4) }),
            header_len: u16_at(2),
        })
    }

    /// The header's bytes.
    pub fn to_bytes(&self) -> [u8; HEADER_LEN] {
        let mut out = [0; HEADER_LEN];
        if let Some(PartialChecksum { start, offset }) = self.checksum {
            out[0] = NEEDS_CSUM;
            out[6..8].copy_from_slice(&start.to_ne_bytes());
            out[8..10].copy_from_slice(&offset.to_ne_bytes());
        }
        if let Some(Gso { kind, size }) = self.gso {
            out[1] = match kind {
                GsoKind::Tcp4 => GSO_TCPV4,
                GsoKind::Tcp6 => GSO_TCPV6,
                GsoKind::Udp => GSO_UDP_L4,
            };
            out[4..6].copy_from_slice(&size.to_ne_bytes());
        }
        out[2..4].copy_from_slice(&self.header_len.to_ne_bytes());
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_layout_is_virtio_s() {
        let header = Header {
            checksum: Some(PartialChecksum { start: 20, offset: 16 }),
            gso: Some(Gso { kind: GsoKind::Tcp6, size: 0x0102 }),
            header_len: 60,
        };
        let size = 0x0102u16.to_ne_bytes();
        let (len, start, offset) = (60u16.to_ne_bytes(), 20u16.to_ne_bytes(), 16u16.to_ne_bytes());
        let wanted = [1, 4, len[0], len[1], size[0], size[1], start[0], start[1], offset[0], offset[1]];
        assert_eq!(header.to_bytes(), wanted);
        assert_eq!(Header::default().to_bytes(), [0; HEADER_LEN]);
    }

    proptest! {
        #[test]
        fn what_is_read_is_written(bytes: [u8; HEADER_LEN]) {
            match Header::read(&bytes) {
                Ok(header) => prop_assert_eq!(Header::read(&header.to_bytes()), Ok(header)),
                Err(e) => prop_assert!(matches!(e, HeaderError::UnknownKind(2 | 3 | 6..))),
            }
            prop_assert_eq!(Header::read(&bytes[..9]), Err(HeaderError::Short));
        }
    }
}
