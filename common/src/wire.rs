//! Messages between the parts of Warren, as bytes (docs/wire.md).
//!
//! Control messages are protobuf (prost): numbered fields, unknown ones are skipped, enums are open. Relay frames and
//! probes are fixed layouts of their own. Whatever is signed is signed over the bytes as sent.

pub mod control;
pub mod probe;
pub mod relay;
pub mod relay_control;
pub mod session;
pub mod token;

mod netmap;

/// Why bytes from the network are not the message they should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Not a well-formed message at all.
    #[error("malformed {what}: {why}")]
    Malformed {
        /// The message.
        what: &'static str,
        /// What the decoder said.
        why: String,
    },
    /// A field is missing, too long or makes no sense.
    #[error("{what}: field `{field}` is missing or invalid")]
    Field {
        /// The message.
        what: &'static str,
        /// The field.
        field: &'static str,
    },
    /// The signature is not by the expected key over these bytes.
    #[error("{what}: the signature is wrong")]
    Signature {
        /// The message.
        what: &'static str,
    },
}

impl WireError {
    pub(crate) fn field(what: &'static str, field: &'static str) -> Self {
        Self::Field { what, field }
    }

    pub(crate) fn decode(what: &'static str, error: &prost::DecodeError) -> Self {
        Self::Malformed { what, why: error.to_string() }
    }
}
