//! What an administrator should know about a running coordinator: conditions, each with what to do about it.

use serde::{Deserialize, Serialize};

use crate::policy_source::{self, Report, Source};
use crate::push::Coordinator;
use crate::server::Health;

/// How bad a health item is. Readers treat unknown words as a warning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Worth knowing.
    Info,
    /// Something works less well than it should.
    Warning,
    /// Something does not work.
    Error,
}

/// One condition.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealthItem {
    /// Stable word, such as `store-unavailable`.
    pub code: String,
    /// How bad it is.
    pub severity: Severity,
    /// What is wrong.
    pub text: String,
    /// What to do about it.
    pub fix: String,
}

fn item(code: &str, severity: Severity, text: impl Into<String>, fix: &str) -> HealthItem {
    HealthItem { code: code.to_owned(), severity, text: text.into(), fix: fix.to_owned() }
}

/// Everything that is not as it should be, the worst first.
pub fn list(coordinator: &Coordinator, health: &Health, source: &Source, found: &Report) -> Vec<HealthItem> {
    let mut items = Vec::new();
    if let Some(why) = &health.store_error {
        items.push(item(
            "store-unavailable",
            Severity::Error,
            format!("nothing can be stored, so nothing can be changed: {why}"),
            "make room on the disk of the database, or give its owner the right to write; it goes on by itself then",
        ));
    }
    if let Some(why) = coordinator.policy_error() {
        items.push(item(
            "policy-not-compiled",
            Severity::Error,
            format!("nothing is allowed, since the policy in force can't be used: {why}"),
            "correct the policy; `warren policy check` says more",
        ));
    }
    if coordinator.stats().ahead > 0 {
        items.push(item(
            "database-restored",
            Severity::Error,
            "agents hold newer netmaps than this coordinator ever made: its database was restored from a backup",
            "stop it, run `warren-coordinator restored` once, and start it again",
        ));
    }
    if let Some(why) = &found.error {
        items.push(item(
            "policy-refused",
            Severity::Warning,
            format!("{source} is refused, the last accepted policy stays in force: {why}"),
            "correct it; it is tried again by itself",
        ));
    }
    for why in policy_source::doubts(coordinator.state()) {
        items.push(item(
            "policy-unsigned",
            Severity::Warning,
            format!("the policy in force comes from commits that may not be trusted: {why}"),
            "sign commits with a key of the allowed-signers file, and use --policy-git-signatures required",
        ));
    }
    if coordinator.state().policy().is_none() {
        items.push(item(
            "no-policy",
            Severity::Info,
            "no policy was accepted yet: nothing is allowed",
            "`warren-coordinator policy set FILE`, or start `serve` with --policy",
        ));
    }
    items.sort_by_key(|item| std::cmp::Reverse(item.severity));
    items
}
