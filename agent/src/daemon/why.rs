//! `warren why`: the engine's answer, with the lines of its rules as they are in the policy now.
//!
//! Rules come with the line they stood on when they were sent, and an edit that only moves them sends nothing. So the
//! coordinator is asked where they stand; without it, the older line must do.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::sync::oneshot;
use warren_common::filter::RuleId;
use warren_common::time::{Instant, Now};
use warren_common::wire::control::{ClientBody, MAX_RULE_ORIGINS, RuleOrigins, RuleOriginsRequest};
use warren_engine::status::Why;

use super::Up;
use super::verbs::done;
use crate::api::Reply;

/// Most answers that wait for the coordinator at a time; more are given with older lines.
const MAX_WAITING: usize = 16;
/// How long an answer waits for the coordinator.
const PATIENCE: Duration = Duration::from_secs(1);

/// Answers that wait to hear where their rules stand.
#[derive(Default)]
pub(super) struct Whys {
    waiting: Vec<Waiting>,
    next_nonce: u64,
}

struct Waiting {
    nonce: u64,
    why: Why,
    reply: oneshot::Sender<Reply>,
    deadline: Instant,
}

impl Whys {
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.waiting.iter().map(|w| w.deadline).min()
    }

    /// Gives the answers that have waited long enough as they are.
    pub(super) fn time_out(&mut self, now: Instant) {
        for waiting in self.waiting.extract_if(.., |w| w.deadline <= now) {
            // Here and below: the caller may have gone away, and nobody is left to tell then.
            let _ = waiting.reply.send(done(&waiting.why));
        }
    }

    pub(super) fn settle(&mut self, answer: RuleOrigins) {
        let Some(at) = self.waiting.iter().position(|w| w.nonce == answer.nonce) else { return };
        let mut waiting = self.waiting.swap_remove(at);
        let origins: BTreeMap<RuleId, String> =
            answer.rules.into_iter().take(MAX_RULE_ORIGINS).map(|r| (RuleId(r.rule), r.origin)).collect();
        waiting.why.set_origins(&origins);
        let _ = waiting.reply.send(done(&waiting.why));
    }
}

impl Up {
    /// Answers `why`, once the coordinator has said where its rules stand if it can be asked.
    pub(super) fn answer_why(&mut self, now: Now, why: Why, reply: oneshot::Sender<Reply>) {
        let rules: Vec<u64> = why.rules().into_iter().take(MAX_RULE_ORIGINS).map(|id| id.0).collect();
        let whys = &mut self.whys;
        let nonce = whys.next_nonce;
        let ask = self.welcomed && !rules.is_empty() && whys.waiting.len() < MAX_WAITING;
        if ask && self.control.send(ClientBody::RuleOrigins(RuleOriginsRequest { nonce, rules })) {
            whys.next_nonce += 1;
            whys.waiting.push(Waiting { nonce, why, reply, deadline: now.boot + PATIENCE });
        } else {
            let _ = reply.send(done(&why));
        }
    }
}
