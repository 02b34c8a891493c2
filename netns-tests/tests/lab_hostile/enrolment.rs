//! A one-use auth key makes one device, whoever uses it how often.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use warren_common::auth_key::AuthKey;
use warren_netns_tests::lab::{self, eventually};
use warren_netns_tests::programs::{Agent, Coordinator};

use crate::LIMIT;
use crate::proxy::{Conduct, Middle};

const POLICY: &str =
    r#"{"tagOwners": {"tag:ann": []}, "grants": [{"src": ["*"], "dst": ["*"], "ip": ["*"]}]}"#;

fn devices(coordinator: &Coordinator) -> Result<Vec<Value>> {
    let list: Value = serde_json::from_str(&coordinator.admin(&["device", "list", "--json"])?)?;
    Ok(list.as_array().context("a list of devices")?.clone())
}

#[test]
fn two_agents_with_one_key_at_once_make_one_device() -> Result<()> {
    lab::test("one-key", |lab| {
        let coordinator = Coordinator::start(lab.host("coord")?, POLICY)?;
        let key = coordinator.auth_key("tag:ann")?;
        let agents = [Agent::start(lab.host("ann")?)?, Agent::start(lab.host("bob")?)?];
        let outcomes: Vec<Result<String>> = std::thread::scope(|scope| {
            let tries = agents.each_ref().map(|agent| scope.spawn(|| agent.up(&coordinator.url, &key)));
            tries.map(|attempt| attempt.join().unwrap_or_else(|_| anyhow::bail!("it panicked"))).into()
        });
        let refusals: Vec<String> =
            outcomes.iter().filter_map(|o| o.as_ref().err()).map(|e| format!("{e:#}")).collect();
        ensure!(refusals.len() == 1, "{outcomes:?}");
        ensure!(
            refusals[0].contains("one-use and has been used") && refusals[0].contains("fix: "),
            "{}",
            refusals[0]
        );
        let list = devices(&coordinator)?;
        ensure!(list.len() == 1, "{list:?}");
        // The loser is as if it had never tried, and can join with a key of its own.
        let loser = &agents[usize::from(outcomes[1].is_err())];
        ensure!(loser.json(&["status", "--json"])?["state"] == "needs-login", "the loser is in");
        loser.up(&coordinator.url, &coordinator.auth_key("tag:ann")?)?;
        ensure!(devices(&coordinator)?.len() == 2, "the loser is out");
        Ok(())
    })
}

#[test]
fn a_lost_reply_to_an_enrolment_costs_nothing() -> Result<()> {
    lab::test("lost-reply", |lab| {
        let mut coordinator = Coordinator::start(lab.host("coord")?, POLICY)?;
        let text = coordinator.auth_key("tag:ann")?;
        let key: AuthKey = text.parse()?;
        let middle = Middle::start(&lab.host("middle")?, &coordinator.url, &key, Conduct::DropAnswers)?;
        let mut ann = Agent::start(lab.host("ann")?)?;
        let ids = |coordinator: &Coordinator| -> Result<BTreeSet<String>> {
            Ok(devices(coordinator)?.iter().map(|d| d["id"].to_string()).collect())
        };

        // The coordinator has made the device; the agent never hears of it, and is even killed meanwhile.
        let first = std::thread::scope(|scope| {
            let attempt = scope.spawn(|| ann.up(&middle.url, &text));
            let made = eventually("the device is made", LIMIT, || {
                let ids = ids(&coordinator)?;
                Ok((!ids.is_empty()).then_some(ids))
            });
            middle.behave(Conduct::DropAnswers);
            let pid = i32::try_from(ann.process.pid()).ok().and_then(rustix::process::Pid::from_raw);
            rustix::process::kill_process(pid.context("a pid")?, rustix::process::Signal::KILL)?;
            let attempt = attempt.join().unwrap_or_else(|_| anyhow::bail!("it panicked"));
            ensure!(attempt.is_err(), "up succeeded without an answer");
            made
        })?;
        ann.process.kill()?;
        // The coordinator may be killed as well: what it has acknowledged to nobody is there all the same.
        coordinator.process.kill()?;
        coordinator.start_again()?;
        ann.start_again()?;
        middle.behave(Conduct::Pass);
        ann.up(&middle.url, &text)?;
        ensure!(ids(&coordinator)? == first && first.len() == 1, "{first:?} became {:?}", ids(&coordinator)?);
        Ok(())
    })
}
