//! Super-frames: many segments of one flow with one set of headers, as Linux hands them to and takes them from a TUN.
//!
//! The cost of userspace tunnels is one packet at a time through the host's network stack. With a virtio header in
//! front ([`vnet`]) one read brings up to 64 KiB of one TCP or UDP flow, to be cut into packets by us ([`segment`]), and
//! one write takes as much (`coalesce`). All of it is pure: bytes in, bytes out.
//!
//! What is joined comes apart into the same bytes again, with one exception that RFC 6864 allows: the identification of
//! IPv4 packets that mustn't be fragmented means nothing, so it may be constant in what is joined and then counts up
//! in what comes apart. Checksums are verified before packets are joined, since nobody does so afterwards.

pub(crate) mod checksum;
pub(crate) mod coalesce;
pub mod segment;
pub mod vnet;

#[cfg(test)]
mod tests;

/// The congestion bits of an IP header (RFC 3168).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Ecn {
    /// The sender doesn't understand congestion marks.
    #[default]
    NotCapable,
    /// Capable, codepoint ECT(1).
    Capable1,
    /// Capable, codepoint ECT(0).
    Capable0,
    /// A queue on the way is filling.
    Congested,
}

impl Ecn {
    /// From the two bits.
    pub const fn from_bits(bits: u8) -> Self {
        match bits & 3 {
            0 => Self::NotCapable,
            1 => Self::Capable1,
            2 => Self::Capable0,
            _ => Self::Congested,
        }
    }

    /// The two bits.
    pub const fn bits(self) -> u8 {
        self as u8
    }

    /// Of an IP packet, [`Ecn::NotCapable`] if it is none.
    pub fn of_packet(packet: &[u8]) -> Self {
        match packet {
            [first, tos, ..] if first >> 4 == 4 => Self::from_bits(*tos),
            [first, second, ..] if first >> 4 == 6 => Self::from_bits(second >> 4),
            _ => Self::NotCapable,
        }
    }

    /// What the tunnel's own packet carries for an inner one with this mark (RFC 6040, "normal mode" as WireGuard has
    /// it: a mark made before the tunnel isn't shown outside, where it could be taken for one made on the way).
    pub const fn outside(self) -> Self {
        match self {
            Self::Congested => Self::Capable0,
            other => other,
        }
    }

    /// Marks a packet, if its sender understands that; false if not. One that is marked already stays so.
    pub(crate) fn mark_congested(packet: &mut [u8]) -> bool {
        match Self::of_packet(packet) {
            Self::NotCapable => return false,
            Self::Congested => return true,
            Self::Capable0 | Self::Capable1 => {}
        }
        match packet {
            [first, tos, rest @ ..] if *first >> 4 == 4 && rest.len() >= 18 => {
                let before = u16::from_be_bytes([*first, *tos]);
                *tos |= 3;
                let after = u16::from_be_bytes([*first, *tos]);
                let sum = u16::from_be_bytes([rest[8], rest[9]]);
                [rest[8], rest[9]] = checksum::replaced(sum, before, after).to_be_bytes();
                true
            }
            [first, second, ..] if *first >> 4 == 6 => {
                *second |= 0x30;
                true
            }
            _ => false,
        }
    }
}
