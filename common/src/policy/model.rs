//! The file as typed data, with the place of everything that messages speak about.

use std::collections::BTreeMap;

use ipnet::IpNet;

use super::diagnostic::Span;
use super::posture::{Attributes, Condition};
use super::selector::Selector;
use super::when::Window;
use crate::filter::{Action, IpRange, PortRange, RuleId};

/// A value and where it stands.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct At<T> {
    pub(crate) value: T,
    pub(crate) span: Span,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Model {
    pub(crate) groups: BTreeMap<String, At<Vec<At<String>>>>,
    pub(crate) hosts: BTreeMap<String, At<IpRange>>,
    pub(crate) ipsets: BTreeMap<String, At<Vec<At<IpSetStep>>>>,
    pub(crate) tag_owners: BTreeMap<String, At<Vec<At<Selector>>>>,
    /// ACLs first, then grants, then denials, each in the order of the file.
    pub(crate) rules: Vec<Rule>,
    pub(crate) postures: BTreeMap<String, At<Vec<At<Condition>>>>,
    pub(crate) default_src_posture: Vec<At<String>>,
    pub(crate) route_approvers: Vec<(At<IpNet>, Vec<At<Selector>>)>,
    pub(crate) exit_approvers: Vec<At<Selector>>,
    pub(crate) node_attrs: Vec<NodeAttr>,
    pub(crate) ssh: Vec<SshDef>,
    pub(crate) tests: Vec<TestDef>,
    pub(crate) ssh_tests: Vec<SshTestDef>,
    pub(crate) randomize_client_port: bool,
}

/// One step of an IP set, in order.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct IpSetStep {
    pub(crate) add: bool,
    /// Addresses, a host, another IP set or autogroup:internet.
    pub(crate) what: Selector,
}

/// Which section a rule stands in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Section {
    Acls,
    Grants,
    Deny,
}

impl Section {
    pub(crate) const fn word(self) -> &'static str {
        match self {
            Self::Acls => "acls",
            Self::Grants => "grants",
            Self::Deny => "deny",
        }
    }

    pub(crate) const fn action(self) -> Action {
        match self {
            Self::Acls | Self::Grants => Action::Allow,
            Self::Deny => Action::Deny,
        }
    }
}

/// A rule of any of the three sections.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Rule {
    pub(crate) section: Section,
    pub(crate) index: usize,
    pub(crate) span: Span,
    pub(crate) line: usize,
    pub(crate) id: RuleId,
    pub(crate) src: Vec<At<Selector>>,
    pub(crate) dst: Vec<At<Selector>>,
    pub(crate) services: Vec<Service>,
    pub(crate) app: BTreeMap<String, Vec<serde_json::Value>>,
    pub(crate) via: Vec<At<Selector>>,
    pub(crate) src_posture: Vec<At<String>>,
    pub(crate) dst_posture: Vec<At<String>>,
    pub(crate) ignore_default_posture: bool,
    /// `None` is always; an empty list is never.
    pub(crate) when: Option<Vec<Window>>,
    /// Seconds since the Unix epoch.
    pub(crate) expires: Option<i64>,
    pub(crate) staged: bool,
    pub(crate) comment: Option<String>,
}

impl Rule {
    /// How people find the rule.
    pub(crate) fn origin(&self) -> String {
        format!("{}[{}] line {}", self.section.word(), self.index, self.line)
    }
}

/// Traffic of one protocol that a rule speaks of.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Service {
    /// `None` is the default protocols; for a denial, every protocol.
    pub(crate) proto: Option<u8>,
    /// Which of the rule's destinations, by index, on which ports.
    pub(crate) targets: Vec<(usize, Vec<PortRange>)>,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct NodeAttr {
    pub(crate) target: Vec<At<Selector>>,
    pub(crate) attr: Vec<String>,
    pub(crate) app: BTreeMap<String, Vec<serde_json::Value>>,
    pub(crate) ip_pool: Vec<IpNet>,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct SshDef {
    pub(crate) index: usize,
    pub(crate) span: Span,
    pub(crate) line: usize,
    pub(crate) check: bool,
    pub(crate) src: Vec<At<Selector>>,
    pub(crate) dst: Vec<At<Selector>>,
    pub(crate) users: Vec<At<LoginUser>>,
    /// Seconds; 0 is always.
    pub(crate) check_period_s: u64,
    pub(crate) accept_env: Vec<String>,
    pub(crate) src_posture: Vec<At<String>>,
}

/// A login user of an SSH rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum LoginUser {
    Root,
    NonRoot,
    /// The part before the @ of the source's mail address, for this domain.
    Localpart(String),
    Name(String),
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct TestDef {
    pub(crate) index: usize,
    pub(crate) span: Span,
    pub(crate) line: usize,
    pub(crate) src: At<String>,
    pub(crate) proto: Option<u8>,
    pub(crate) accept: Vec<At<String>>,
    pub(crate) deny: Vec<At<String>>,
    pub(crate) attrs: Attributes,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct SshTestDef {
    pub(crate) index: usize,
    pub(crate) span: Span,
    pub(crate) line: usize,
    pub(crate) src: At<Selector>,
    pub(crate) dst: Vec<At<Selector>>,
    pub(crate) accept: Vec<At<String>>,
    pub(crate) check: Vec<At<String>>,
    pub(crate) deny: Vec<At<String>>,
    pub(crate) attrs: Attributes,
}
