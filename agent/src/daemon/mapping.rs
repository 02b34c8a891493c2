//! A port of the NAT in front of us: asked for while the agent is up, told to the engine, given back at the end.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use sha2::{Digest as _, Sha256};
use warren_common::time::Now;

use super::{Daemon, Up};
use crate::os::MARK;
use crate::portmap::{Config, Mapper, NONCE_LEN, State, Timing};
use crate::state::DeviceKeys;

/// The mapper and the network that it was started in.
#[derive(Default)]
pub(super) struct Mapping {
    mapper: Option<Mapper>,
    /// Our IPv4 addresses then: a mapping leads to one of them.
    own: Vec<IpAddr>,
}

impl Mapping {
    /// Waits for news. Cancel safe.
    pub(super) async fn changed(&mut self) -> State {
        match &mut self.mapper {
            Some(mapper) => mapper.changed().await,
            None => std::future::pending().await,
        }
    }

    /// How things are.
    pub(super) fn state(&self) -> State {
        self.mapper.as_ref().map(Mapper::state).unwrap_or_default()
    }

    /// Gives a mapping back.
    pub(super) async fn close(self) {
        if let Some(mapper) = self.mapper {
            mapper.close().await;
        }
    }
}

impl Daemon {
    /// Asks the gateway that there is now, unless it is being asked already.
    pub(super) fn follow_gateway(&mut self, now: Now) {
        let Some(up) = self.up.as_deref_mut().filter(|up| up.engine.is_some()) else { return };
        let gateway = self.surroundings.gateway().filter(|_| self.options.port_mapping);
        let port = self.plane.sockets().iter().find(|s| s.bound().is_ipv4()).map(|s| s.bound().port());
        let wanted = gateway.zip(port).map(|(gateway, port)| Config {
            gateway,
            port,
            nonce: nonce(&up.keys, gateway, port),
            mark: MARK,
            timing: Timing::default(),
        });
        let own: Vec<IpAddr> = self.surroundings.addrs().iter().copied().filter(IpAddr::is_ipv4).collect();
        let mapping = &mut up.mapping;
        if mapping.mapper.as_ref().map(Mapper::config) != wanted.as_ref() || mapping.own != own {
            let former = mapping.mapper.take();
            let mapper = wanted.map(|wanted| match former {
                // Behind the same router we have another address, or one more.
                Some(former) if former.config().gateway == wanted.gateway => {
                    Mapper::spawn_after(former, wanted)
                }
                // What the former network mapped ends by itself: most often it is out of reach by now.
                _ => Mapper::spawn(wanted),
            });
            *mapping = Mapping { mapper, own };
            if let Some(engine) = &mut up.engine {
                engine.handle_port_mapping(now, None); // the new one may find none, and says nothing then
            }
        }
    }

    pub(super) fn on_mapping(&mut self, now: Now, state: State) {
        let Some(engine) = self.up.as_mut().and_then(|up| up.engine.as_mut()) else { return };
        engine.handle_port_mapping(now, state.mapping.map(|(external, _)| SocketAddr::V4(external)));
    }
}

impl Up {
    /// Tells a new engine what is mapped.
    pub(super) fn tell_mapping(&mut self, now: Now) {
        if let (Some(engine), Some((external, _))) = (&mut self.engine, self.mapping.state().mapping) {
            engine.handle_port_mapping(now, Some(SocketAddr::V4(external)));
        }
    }
}

/// The same after a restart, so that the gateway lets us have our mapping again; nobody else can guess it.
fn nonce(keys: &DeviceKeys, gateway: Ipv4Addr, port: u16) -> [u8; NONCE_LEN] {
    let mut hash = Sha256::new();
    hash.update(b"warren port mapping\0");
    hash.update(keys.probe.expose());
    hash.update(gateway.octets());
    hash.update(port.to_be_bytes());
    let mut nonce = [0; NONCE_LEN];
    nonce.copy_from_slice(&hash.finalize()[..NONCE_LEN]);
    nonce
}
