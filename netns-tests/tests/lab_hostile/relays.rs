//! A relay gives nothing to whoever has no right to it, over QUIC and by WebSocket, embedded or not.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use warren_agent::clock;
use warren_agent::entropy::OsEntropy;
use warren_agent::relay_client::Transport;
use warren_common::ids::{DeviceId, NetworkId};
use warren_common::keys::{NetmapSecretKey, ProbeSecretKey};
use warren_common::netmap::Relay as RelayInfo;
use warren_common::wire::control::Signed;
use warren_common::wire::relay::{GoneReason, RefusalCode};
use warren_common::wire::token::RelayToken;
use warren_coordinator::keys::Keys;
use warren_netns_tests::lab::{self, Host, Lab, eventually};
use warren_netns_tests::programs::{Agent, Coordinator, Relay};

use crate::LIMIT;
use crate::thief::{Inside, Loot, Session, Visit, Welcome};

const POLICY: &str = r#"{
  "tagOwners": {"tag:ann": [], "tag:bob": [], "tag:cyd": []},
  "grants": [
    {"src": ["tag:ann"], "dst": ["tag:bob"], "ip": ["*"]},
    {"src": ["tag:bob"], "dst": ["tag:cyd"], "ip": ["*"]},
  ],
}"#;

/// A coordinator with its relay, a relay `fra` of its own, and three agents, of which `ann` is robbed by `eve`.
struct World {
    coordinator: Coordinator,
    _fra: Relay,
    cyd: Agent,
    _bob: Agent,
    /// Where the thief is: one host where everything passes, and one where UDP does not.
    eve: [Host; 2],
    loot: Loot,
    cyd_id: DeviceId,
    /// What the coordinator signs tokens with: for tokens that are right but for one thing.
    signer: NetmapSecretKey,
}

impl World {
    fn new(lab: &Lab) -> Result<Self> {
        let coordinator = Coordinator::start(lab.host("coord")?, POLICY)?;
        let fra = Relay::start(lab.host("fra")?, &coordinator, "fra")?;
        let join = |name: &str| -> Result<Agent> {
            let agent = Agent::start(lab.host(name)?)?;
            agent.up(&coordinator.url, &coordinator.auth_key(&format!("tag:{name}"))?)?;
            Ok(agent)
        };
        let (mut ann, bob, cyd) = (join("ann")?, join("bob")?, join("cyd")?);
        eventually("ann knows both relays", LIMIT, || {
            let relays = ann.json(&["netcheck", "--json"])?["relays"].as_array().map_or(0, Vec::len);
            Ok((relays == 2).then_some(()))
        })?;
        ensure!(ann.process.stop(LIMIT)?.success(), "ann stops");
        let loot = Loot::take(&ann)?;
        let eve = [lab.host("eve")?, lab.host("eve_tcp")?];
        eve[1].nft("table inet noudp {\n chain out {\n type filter hook output priority 0;\n udp dport != 0 drop\n }\n}\n")?;
        let cyd_id = cyd.json(&["status", "--json"])?["self"]["id"].as_str().unwrap_or_default().parse()?;
        let signer = Keys::load(&coordinator.state_dir, false, &mut OsEntropy)?.netmap;
        Ok(Self { coordinator, _fra: fra, cyd, _bob: bob, eve, loot, cyd_id, signer })
    }

    /// What the embedded relay has counted under a label of one of its counters.
    fn counted(&self, counter: &str, reason: &str) -> Result<u64> {
        let address = self.coordinator.url.trim_start_matches("http://");
        let mut stream = self.eve[0].enter(|| TcpStream::connect(address))??;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: c\r\nconnection: close\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        let start = format!("{counter}{{reason=\"{reason}\"}} ");
        let value = text.lines().find_map(|line| line.strip_prefix(start.as_str()));
        Ok(value.with_context(|| format!("no {start}in {text}"))?.trim().parse()?)
    }

    fn relays(&self) -> Result<[&RelayInfo; 2]> {
        Ok([self.loot.relay("embedded")?, self.loot.relay("fra")?])
    }

    /// A token for `ann` as good as the coordinator's.
    fn token(&self, relay: &RelayInfo, revision: u64) -> RelayToken {
        RelayToken {
            network: self.loot.network,
            relay: relay.id,
            device: self.loot.membership.device,
            probe: self.loot.keys.probe.public(),
            revision,
            expires: clock::now().unix + Duration::from_secs(600),
            peers: self.loot.netmap.peers.keys().copied().collect(),
        }
    }

    /// Tokens that must not do, with the key they are shown with and what the relay says.
    fn bad_tokens(&self, relay: &RelayInfo, real: &Signed, other: &Signed) -> Result<Vec<BadToken>> {
        let right = self.loot.keys.probe.clone();
        let revision = RelayToken::verify(real, &self.loot.identity.netmap)?.revision;
        let but = |change: &dyn Fn(&mut RelayToken)| {
            let mut token = self.token(relay, revision);
            change(&mut token);
            token.sign(&self.signer)
        };
        let mut widened = real.clone();
        widened.payload.extend_from_slice(&[0; 16]);
        let forged = self.token(relay, revision).sign(&NetmapSecretKey::generate(&mut OsEntropy));
        let key = || ProbeSecretKey::generate(&mut OsEntropy);
        Ok(vec![
            ("forged", right.clone(), Some(forged), Some(RefusalCode::TokenInvalid)),
            ("tampered with", right.clone(), Some(widened), Some(RefusalCode::TokenInvalid)),
            ("stolen, without the key", key(), Some(real.clone()), Some(RefusalCode::Possession)),
            ("another relay's", right.clone(), Some(other.clone()), Some(RefusalCode::OtherRelay)),
            (
                "another network's",
                right.clone(),
                Some(but(&|t| t.network = NetworkId::from_bytes([7; 16]))),
                Some(RefusalCode::OtherRelay),
            ),
            (
                "expired",
                right.clone(),
                Some(but(&|t| t.expires = clock::now().unix)),
                Some(RefusalCode::TokenExpired),
            ),
            (
                "too long-lived",
                right.clone(),
                Some(but(&|t| t.expires = clock::now().unix + Duration::from_secs(3_600))),
                Some(RefusalCode::TokenLife),
            ),
            (
                "from before a change",
                right.clone(),
                Some(but(&|t| t.revision = 0)),
                Some(RefusalCode::TokenStale),
            ),
            ("absent", right, None, None),
        ])
    }
}

type BadToken = (&'static str, ProbeSecretKey, Option<Signed>, Option<RefusalCode>);

#[test]
fn without_a_token_of_its_own_nobody_gets_anything_from_a_relay() -> Result<()> {
    lab::test("relay-thief", |lab| {
        let world = World::new(lab)?;
        let insides = [Inside::new(&world.eve[0])?, Inside::new(&world.eve[1])?];
        let relays = world.relays()?;
        let mut session = Session::resume(&insides[0], &world.loot)?;
        let tokens = [
            session.relay_token(&insides[0], relays[0].id)?,
            session.relay_token(&insides[0], relays[1].id)?,
        ];

        // All at once: a relay over TLS is dialled after a pause, and a missing token is waited for.
        let mut visits = Vec::new();
        for inside in &insides {
            for (i, relay) in relays.into_iter().enumerate() {
                for (what, key, token, expected) in world.bad_tokens(relay, &tokens[i], &tokens[1 - i])? {
                    let visit = Visit::start(inside, relay, world.loot.network, &key, token);
                    visits.push((inside, format!("{what} at {}", relay.name), visit, expected));
                }
            }
        }
        for (inside, what, visit, expected) in &mut visits {
            let welcome = visit.welcome(inside)?;
            ensure!(welcome == Welcome::Out(*expected), "{what}: {welcome:?}");
        }
        drop(visits);
        for (reason, count) in [
            (RefusalCode::TokenInvalid, 4),
            (RefusalCode::Possession, 2),
            (RefusalCode::OtherRelay, 4),
            (RefusalCode::TokenExpired, 2),
            (RefusalCode::TokenLife, 2),
            (RefusalCode::TokenStale, 2),
        ] {
            let counted = world.counted("warren_relay_closed_total", reason.as_str())?;
            // A client that was refused tries again.
            ensure!(counted >= count, "{reason}: {counted}");
        }

        // The same with the right token and key is let in: it was the token each time.
        for (inside, transport) in insides.iter().zip([Transport::Quic, Transport::WebSocket]) {
            for (i, relay) in relays.into_iter().enumerate() {
                let token = Some(tokens[i].clone());
                let mut visit =
                    Visit::start(inside, relay, world.loot.network, &world.loot.keys.probe, token);
                let welcome = visit.welcome(inside)?;
                ensure!(
                    welcome == Welcome::In(transport),
                    "the rightful token at {}: {welcome:?}",
                    relay.name
                );
            }
        }
        Ok(())
    })
}

#[test]
fn a_relay_carries_only_allowed_pairs_and_cuts_a_removed_device() -> Result<()> {
    lab::test("relay-pairs", |lab| {
        let world = World::new(lab)?;
        let inside = Inside::new(&world.eve[0])?;
        let mut session = Session::resume(&inside, &world.loot)?;
        let mut visits = Vec::new();
        for relay in world.relays()? {
            let token = session.relay_token(&inside, relay.id)?;
            let key = &world.loot.keys.probe;
            let mut visit = Visit::start(&inside, relay, world.loot.network, key, Some(token.clone()));
            let welcome = visit.welcome(&inside)?;
            ensure!(matches!(welcome, Welcome::In(_)), "{welcome:?}");
            // `cyd` is there, but not for `ann`; and nobody speaks to himself or to who does not exist.
            for device in [world.cyd_id, world.loot.membership.device, DeviceId::from_bytes([1; 16])] {
                let why = visit.refused_to(&inside, device)?;
                ensure!(why == GoneReason::NotPermitted, "{device} at {}: {why:?}", relay.name);
            }
            visits.push((visit, token));
        }
        let status = world.cyd.json(&["status", "--json"])?;
        ensure!(status["counters"]["drops"]["unknown-sender"].is_null(), "a packet reached cyd: {status}");
        let counted = world.counted("warren_relay_dropped_total", "not-permitted")?;
        ensure!(counted == 3, "{counted} packets without a permit are counted");

        world.coordinator.admin(&["device", "remove", "ann"])?;
        for (visit, token) in &mut visits {
            let (first, then) = visit.cut(&inside, token)?;
            ensure!(first == Some(RefusalCode::Revoked), "{first:?}");
            ensure!(then == Some(RefusalCode::TokenStale), "{then:?}");
        }
        Ok(())
    })
}
