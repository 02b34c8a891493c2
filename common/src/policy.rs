//! The policy file: its language, its compiler and its offline tools. Pure: time is an argument.
//!
//! [`Policy::parse`] reads and checks a file, [`compile`] turns it and an [`Inventory`] into what every device lets
//! in, sends, sees and offers. What no rule allows is denied; a policy without rules allows nothing.

mod check;
mod compile;
mod device;
mod diagnostic;
mod diff;
mod explain;
mod follow;
mod grammar;
mod inventory;
mod ipset;
mod model;
mod nodeset;
mod posture;
mod prints;
mod read;
mod relay;
mod schema;
mod selector;
mod selftest;
mod sources;
mod ssh;
mod syntax;
mod when;
mod world;

pub use compile::{Compiled, compile};
pub use device::{Capability, Need, NodePolicy};
pub use diagnostic::{Diagnostic, MAX_DIAGNOSTICS, Severity, Span};
pub use diff::{Change, Diff, MAX_CELLS, diff};
pub use explain::{Check, ExplainError, Explanation, MAX_NEAREST, RuleTrace};
pub use inventory::{Inventory, Node, User};
pub use ipset::IpSet;
pub use posture::{
    AttrValue, Attribute, Attributes, Condition, ConditionError, DEFAULT_MAX_AGE_S, Finding, Grade, Truth,
};
pub use prints::Fingerprint;
pub use read::{DEFAULT_CHECK_PERIOD_S, MAX_CHECK_PERIOD_S};
pub use relay::{CommonRelay, RELAY_CAPABILITIES};
pub use schema::json_schema;
pub use selector::{MAX_PORTS, parse_protocol};
pub use selftest::{TestReport, TestResult, run_tests};
pub use ssh::{SshAction, SshRule};
pub use syntax::{MAX_POLICY_BYTES, MAX_POLICY_DEPTH};
pub use when::MAX_HORIZON_S;
pub use world::AddressConflict;

use std::sync::Arc;

use diagnostic::{Report, Source};
use model::Model;

/// A policy that was read and checked. Keeps the text, so that everything can say where it comes from.
#[derive(Clone, Debug)]
pub struct Policy {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    source: Source,
    model: Model,
    warnings: Vec<Diagnostic>,
}

impl Policy {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// Every mistake found, up to [`MAX_DIAGNOSTICS`], in the order of the text; warnings among them.
    pub fn parse(text: &str) -> Result<Self, Vec<Diagnostic>> {
        let source = Source::new(text);
        let root = syntax::parse(&source).map_err(|d| vec![*d])?;
        let mut report = Report::new(&source);
        syntax::check_duplicates(&root, &mut report);
        let model = read::read(&root, &source, &mut report);
        check::check(&model, &mut report);
        let failed = report.has_errors();
        let found = report.finish();
        if failed {
            return Err(found);
        }
        Ok(Self { inner: Arc::new(Inner { source, model, warnings: found }) })
    }

    /// The policy that allows nothing: what is in force before any was accepted.
    pub fn empty() -> Self {
        Self {
            inner: Arc::new(Inner {
                source: Source::new("{}"),
                model: Model::default(),
                warnings: Vec::new(),
            }),
        }
    }

    /// The text it was read from.
    pub fn text(&self) -> &str {
        self.inner.source.text()
    }

    fn model(&self) -> &Model {
        &self.inner.model
    }

    fn source(&self) -> &Source {
        &self.inner.source
    }

    /// What is probably not meant, though the file can be used.
    pub fn warnings(&self) -> &[Diagnostic] {
        &self.inner.warnings
    }
}

impl Default for Policy {
    fn default() -> Self {
        Self::empty()
    }
}
