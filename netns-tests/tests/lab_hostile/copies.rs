//! A copy of a state directory on another host puts both in needs-login: nobody can tell which is the thief.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use warren_netns_tests::lab::{self, eventually};
use warren_netns_tests::programs::{Agent, Coordinator};

use crate::LIMIT;
use crate::thief::copy_dir;

const POLICY: &str =
    r#"{"tagOwners": {"tag:ann": [], "tag:bob": []}, "grants": [{"src": ["*"], "dst": ["*"], "ip": ["*"]}]}"#;

struct World {
    coordinator: Coordinator,
    ann: Agent,
    bob: Agent,
    /// Holds a copy of `ann`'s state, and does not run yet.
    copy: Agent,
}

impl World {
    fn new(lab: &lab::Lab) -> Result<Self> {
        let coordinator = Coordinator::start(lab.host("coord")?, POLICY)?;
        let join = |name: &str| -> Result<Agent> {
            let agent = Agent::start(lab.host(name)?)?;
            agent.up(&coordinator.url, &coordinator.auth_key(&format!("tag:{name}"))?)?;
            Ok(agent)
        };
        let (ann, bob) = (join("ann")?, join("bob")?);
        let mut copy = Agent::start(lab.host("copy")?)?;
        copy.process.stop(LIMIT)?;
        fs::remove_dir_all(&copy.state_dir)?;
        copy_dir(&ann.state_dir, &copy.state_dir)?;
        Ok(Self { coordinator, ann, bob, copy })
    }

    /// Both have to sign in again, say so, and are out; signing in makes two devices of them.
    fn both_are_out(&self) -> Result<()> {
        for agent in [&self.ann, &self.copy] {
            let name = agent.host.name();
            let item = eventually(&format!("{name} is told of the copy"), LIMIT, || {
                let status = agent.json(&["status", "--json"])?;
                let health = status["health"].as_array().cloned().unwrap_or_default();
                let item = health.into_iter().find(|item| item["code"] == "copied-state");
                Ok(item.filter(|_| status["state"] == "needs-login"))
            })?;
            let words =
                ["text", "fix"].map(|field| item[field].as_str().is_some_and(|text| !text.is_empty()));
            ensure!(item["severity"] == "error" && words == [true, true], "{item}");
            let links = agent.host.run("ip", &["link", "show", "warren0"])?;
            ensure!(!links.status.success(), "{name} still has its TUN");
        }
        let list: Value = serde_json::from_str(&self.coordinator.admin(&["device", "list", "--json"])?)?;
        let device = |name: &str| {
            let devices = list.as_array().map(Vec::as_slice).unwrap_or_default();
            devices
                .iter()
                .find(|d| d["name"] == name)
                .cloned()
                .with_context(|| format!("no {name} in {list}"))
        };
        ensure!(device("ann")?["state"] == "needs-login" && device("bob")?["state"] == "active", "{list}");
        eventually("bob does not know ann any more", LIMIT, || {
            let status = self.bob.json(&["status", "--json"])?;
            Ok(status["peers"].as_array().is_some_and(Vec::is_empty).then_some(()))
        })?;
        let mut ids = Vec::new();
        for agent in [&self.ann, &self.copy] {
            agent.up(&self.coordinator.url, &self.coordinator.auth_key("tag:ann")?)?;
            ids.push(agent.json(&["status", "--json"])?["self"]["id"].clone());
        }
        ensure!(ids[0] != ids[1] && ids.iter().all(|id| id.is_string()), "{ids:?}");
        self.ann.ping("bob", 1)?;
        self.copy.ping("bob", 1)?;
        Ok(())
    }
}

#[test]
fn an_old_copy_beside_a_running_agent_puts_both_in_needs_login() -> Result<()> {
    lab::test("old-copy", |lab| {
        let mut world = World::new(lab)?;
        // The original has moved on by one session: the copy is stale.
        world.ann.process.stop(LIMIT)?;
        world.ann.start_again()?;
        eventually("ann is back", LIMIT, || {
            let status = world.ann.json(&["status", "--json"])?;
            Ok((status["coordinator"]["connected"] == true).then_some(()))
        })?;
        world.copy.start_again()?;
        world.both_are_out()
    })
}

#[test]
fn a_fresh_copy_beside_a_running_agent_puts_both_in_needs_login() -> Result<()> {
    lab::test("fresh-copy", |lab| {
        let mut world = World::new(lab)?;
        // The copy has what the original would come back with, and comes first: then the original is stale.
        world.copy.start_again()?;
        world.both_are_out()
    })
}
