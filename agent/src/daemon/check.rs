//! `warren netcheck`: a fresh STUN round of the engine, and beside it a look at the NAT.

use std::time::Duration;

use tokio::sync::oneshot;
use warren_common::time::{Instant, Now};
use warren_engine::status::RelayStatus;

use super::Daemon;
use super::verbs::{done, not_up};
use crate::api::{Endpoint, Nat, Netcheck, RelayRtt, Reply};
use crate::netcheck;
use crate::os::MARK;
use crate::portmap::{self, Protocol};
use crate::problem::Problem;

/// Checks under way at a time: each holds two sockets for a few seconds.
pub(super) const MAX_CHECKS: usize = 4;
/// How long the engine's STUN round may take: three questions to each server.
const PATIENCE: Duration = Duration::from_secs(3);
/// Pause between two looks at it.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// The NAT is known; the engine may still be asking.
pub(super) struct Checked {
    nat: Nat,
    port_mapping: Vec<Protocol>,
    since: Instant,
    reply: oneshot::Sender<Reply>,
}

impl Daemon {
    pub(super) fn verb_netcheck(&mut self, now: Now, reply: oneshot::Sender<Reply>) {
        let engine = self.up.as_mut().and_then(|up| up.engine.as_mut()).filter(|e| e.netmap().is_some());
        let problem = match engine {
            _ if self.checks.len() >= MAX_CHECKS => {
                Problem::new("busy", "too many checks are under way", "try again in a moment")
            }
            None => not_up(),
            Some(engine) => {
                engine.refresh_net(now);
                let relays = engine.netmap().into_iter().flat_map(|m| m.relays.values());
                let servers: Vec<_> = relays.flat_map(|relay| relay.stun.iter().copied()).collect();
                let (own, since) = (self.surroundings.addrs().to_vec(), now.boot);
                let gateway = self.surroundings.gateway();
                self.checks.spawn(async move {
                    let ask_gateway = async {
                        match gateway {
                            Some(gateway) => portmap::probe(gateway, MARK).await,
                            None => Vec::new(),
                        }
                    };
                    let (nat, port_mapping) = tokio::join!(netcheck::nat(&servers, &own, MARK), ask_gateway);
                    Checked { nat, port_mapping, since, reply }
                });
                return;
            }
        };
        // The caller may have gone away; here and below nobody is left to tell then.
        let _ = reply.send(Reply::Problem(problem));
    }

    pub(super) fn on_checked(&mut self, now: Now, checked: Checked) {
        let Some((up, engine)) = self.up.as_deref().and_then(|up| Some((up, up.engine.as_ref()?))) else {
            let _ = checked.reply.send(Reply::Problem(not_up()));
            return;
        };
        let net = match engine.net_status() {
            Some(net) => net,
            None if now.boot.since(checked.since) < PATIENCE => {
                self.checks.spawn(async move {
                    tokio::time::sleep(LOOK_AGAIN).await;
                    checked
                });
                return;
            }
            None => engine.net_status_so_far(),
        };
        let mut nat = checked.nat;
        nat.mapping = nat.mapping.or_else(|| net.mapping.map(netcheck::word));
        let relay = |relay: RelayStatus| RelayRtt {
            transport: up.relays.link(relay.id).map(|(transport, _)| transport.as_str().to_owned()),
            proxy: up.relay_proxy(relay.id),
            name: relay.name,
            rtt_ms: relay.rtt_ms,
        };
        let endpoints = engine.own_endpoints().iter();
        let endpoints = endpoints.map(|own| Endpoint { kind: own.kind.as_str().to_owned(), addr: own.addr });
        let relays = net.relays.into_iter().filter(|relay| !relay.peer).map(relay).collect();
        let _ = checked.reply.send(done(&Netcheck {
            udp: net.udp,
            ipv4: net.ipv4,
            ipv6: net.ipv6,
            nat,
            port_mapping: checked.port_mapping.into_iter().map(|p| p.word().to_owned()).collect(),
            endpoints: endpoints.collect(),
            relays,
        }));
    }
}
