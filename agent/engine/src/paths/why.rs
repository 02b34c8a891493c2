//! Why a peer isn't reached directly, for people.

use super::active::Active;
use super::shared::Shared;

/// Why packets to a peer don't take a direct way. The first that is true, of those that can be known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum WhyNotDirect {
    /// Nothing was sent or received for a while, so none is looked for.
    Idle,
    /// This device has no network that could be used.
    NoNetwork,
    /// The peer's probe key is unusable.
    NoProbeKey,
    /// No UDP packet of ours comes back: something here blocks it.
    UdpBlocked,
    /// A way is being looked for; it takes a few seconds.
    Probing,
    /// The peer has not told where it can be reached.
    PeerSilent,
    /// One end has IPv4 only and the other IPv6 only.
    NoCommonFamily,
    /// The peer knows no address of its own from outside: UDP may be blocked there.
    PeerUdpBlocked,
    /// Both NATs give each destination another port.
    BothSymmetric,
    /// One end's NAT gives each destination another port, the other's lets in only whom it knows; a port was guessed in
    /// vain, or will be.
    HardNat,
    /// Every address that the peer listed was tried, and none answered: a firewall, perhaps.
    NoAnswer,
}

impl WhyNotDirect {
    /// The stable word for it.
    pub const fn as_str(self) -> &'static str {
        self.words().0
    }

    /// The same for people.
    pub const fn text(self) -> &'static str {
        self.words().1
    }

    const fn words(self) -> (&'static str, &'static str) {
        match self {
            Self::Idle => ("idle", "nothing was sent to it lately, so no path is kept"),
            Self::NoNetwork => ("no-network", "this device has no network"),
            Self::NoProbeKey => ("no-probe-key", "its probe key in the netmap is unusable"),
            Self::UdpBlocked => ("udp-blocked", "no UDP comes back into this network"),
            Self::Probing => ("probing", "a direct path is being looked for"),
            Self::PeerSilent => ("peer-silent", "it has not told its addresses yet"),
            Self::NoCommonFamily => {
                ("no-common-family", "it has no address of a family (IPv4 or IPv6) that this network has")
            }
            Self::PeerUdpBlocked => {
                ("peer-udp-blocked", "it knows no address of its own from outside: UDP may be blocked there")
            }
            Self::BothSymmetric => {
                ("both-symmetric", "both NATs have another port for each destination (symmetric)")
            }
            Self::HardNat => (
                "hard-nat",
                "one NAT has another port for each destination (symmetric), and the other lets in only whom it knows",
            ),
            Self::NoAnswer => (
                "no-answer",
                "nothing comes back from its addresses: a NAT or firewall, there or here, lets nothing in",
            ),
        }
    }
}

impl Active {
    /// See [`WhyNotDirect`]; `None` if a direct way is in use.
    pub(super) fn why_not_direct(&self, shared: &Shared) -> Option<WhyNotDirect> {
        use WhyNotDirect as Why;
        if self.is_direct() {
            return None;
        }
        let facts = self.facts();
        let (we_vary, they_vary) = (shared.varies(), facts.they_vary);
        Some(if shared.local.is_empty() {
            Why::NoNetwork
        } else if !facts.has_keys {
            Why::NoProbeKey
        } else if shared.stun_settled && shared.reflexive.is_empty() && shared.observed.is_empty() {
            Why::UdpBlocked
        } else if facts.looks_eagerly {
            Why::Probing
        } else if !facts.listed {
            Why::PeerSilent
        } else if !facts.common_family {
            Why::NoCommonFamily
        } else if !facts.seen_from_outside {
            Why::PeerUdpBlocked
        } else if we_vary && they_vary {
            Why::BothSymmetric
        } else if we_vary || they_vary {
            Why::HardNat
        } else {
            Why::NoAnswer
        })
    }
}

/// What one peer's state machine knows.
pub(super) struct Facts {
    pub(super) has_keys: bool,
    /// Rounds follow each other within seconds.
    pub(super) looks_eagerly: bool,
    pub(super) listed: bool,
    /// It has an address that one of our sockets can send to.
    pub(super) common_family: bool,
    /// It listed an address that isn't just its own interface's, or a public one.
    pub(super) seen_from_outside: bool,
    pub(super) they_vary: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_kebab_case_and_differ() {
        use WhyNotDirect::*;
        let all = [
            Idle,
            NoNetwork,
            NoProbeKey,
            UdpBlocked,
            Probing,
            PeerSilent,
            NoCommonFamily,
            PeerUdpBlocked,
            BothSymmetric,
            HardNat,
            NoAnswer,
        ];
        let words: std::collections::BTreeSet<_> = all.iter().map(|why| why.as_str()).collect();
        assert_eq!(words.len(), all.len());
        let texts: std::collections::BTreeSet<_> = all.iter().map(|why| why.text()).collect();
        assert_eq!(texts.len(), all.len());
        assert!(words.iter().all(|w| w.bytes().all(|b| b.is_ascii_lowercase() || b == b'-')));
    }
}
