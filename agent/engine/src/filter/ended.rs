//! Flows that policy ended, and how their local application learns of it.

use serde::Serialize;
use warren_common::filter::PROTO_TCP;

use crate::flow::{Direction, Flow};
use crate::packet::{TCP_RST, build};

/// Why permissions ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum EndReason {
    /// New rules don't allow it.
    PolicyChanged,
    /// The rule that allowed it lapsed, or a deny rule came into force, by time.
    WindowClosed,
    /// The lease of the rules ended.
    LeaseEnded,
    /// Its peer is gone.
    PeerRemoved,
    /// The agent goes down.
    Stopped,
}

/// A flow that policy ended.
#[derive(Clone, Copy, Debug)]
pub struct EndedFlow {
    /// The flow as it was.
    pub flow: Flow,
    /// Why it ended.
    pub reason: EndReason,
}

impl EndedFlow {
    /// The IP packet that tells the local application, to be written to the TUN and nowhere else: a TCP reset with
    /// exactly the sequence number its TCP expects (RFC 5961), or an ICMP error "administratively prohibited" that
    /// quotes the flow. `None` if a TCP flow is over already, or too little of it was seen; then the application is
    /// reset when it sends next.
    pub fn notice(&self) -> Option<Vec<u8>> {
        let key = &self.flow.key;
        let towards_local = key.addrs(Direction::Ingress);
        if key.proto() == PROTO_TCP {
            if self.flow.state.is_over() {
                return None;
            }
            let numbers = self.flow.reset_numbers()?;
            return Some(
                build::Segment {
                    addrs: towards_local,
                    src_port: key.remote_port(),
                    dst_port: key.local_port(),
                    seq: numbers.seq,
                    ack: numbers.ack,
                    flags: TCP_RST,
                }
                .to_bytes(),
            );
        }
        let quoted = build::stub(key.addrs(Direction::Egress), key.proto(), key.selector(Direction::Egress));
        Some(build::prohibited(towards_local, &quoted))
    }
}
