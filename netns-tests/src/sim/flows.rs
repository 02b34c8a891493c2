//! Two devices and what runs between them: a stream of datagrams, and a flow that, as TCP does, waits for acknowledgements
//! and repeats what got none with growing pauses. Tells the longest time in which nothing arrived.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use warren_common::time::Instant;
use warren_engine::status::PathStatus;

use super::internet::{Link, NatId, Realm};
use super::model::DeviceNo;
use super::nat::NatBehaviour;
use super::world::{APP_PORT, World};

/// Between two datagrams of the stream: 20 a second, as speech has.
const STREAM_PAUSE: Duration = Duration::from_millis(50);
/// First pause before a segment is repeated (RFC 6298's floor as Linux has it), doubled each time.
const RTO: Duration = Duration::from_millis(200);
/// The longest such pause.
const MAX_RTO: Duration = Duration::from_secs(60);
/// Segments under way.
const WINDOW: usize = 4;

/// Where a device is.
#[derive(Clone, Copy, Debug)]
pub enum Place {
    /// On the public internet.
    Public,
    /// Behind a translator of its own.
    Behind(NatBehaviour),
}

/// Two devices that may talk, and the world around them.
#[derive(Debug)]
pub struct Pair {
    /// The world.
    pub world: World,
    /// The two.
    pub devices: [DeviceNo; 2],
    /// Their translators.
    pub nats: [Option<NatId>; 2],
    stream: [Stream; 2],
    flow: Flow,
    next: Instant,
}

/// A stream's longest pause.
#[derive(Clone, Copy, Debug, Default)]
struct Stream {
    last: Instant,
    longest: Duration,
}

/// From the first device to the second; the answers are the acknowledgements.
#[derive(Debug, Default)]
struct Flow {
    under_way: BTreeMap<u64, ()>,
    rto: Duration,
    repeat_at: Option<Instant>,
    last: Instant,
    longest: Duration,
    acknowledged: u64,
}

/// What a run saw.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Gaps {
    /// The longest time without a datagram of the stream, the worse of both directions.
    pub stream: Duration,
    /// The longest time without progress of the flow.
    pub flow: Duration,
}

/// # Panics
/// If the simulated coordinator refuses what it never does.
impl Pair {
    /// Two devices with an open policy that have just joined, where there is one relay.
    pub fn new(seed: u64, places: [Place; 2]) -> Self {
        Self::within(World::new(seed), places, [Duration::ZERO; 2])
    }

    /// The same in a world that is there already, in these regions (see [`Link::position`]).
    pub fn within(mut world: World, places: [Place; 2], positions: [Duration; 2]) -> Self {
        let mut nats = [None; 2];
        let devices = [0, 1].map(|n| {
            let interfaces = match places[n] {
                Place::Public => vec![(Realm::Public, world.fresh_addr())],
                Place::Behind(behaviour) => {
                    let nat = world.add_nat(behaviour);
                    nats[n] = Some(nat);
                    vec![(Realm::Behind(nat), IpAddr::from([192, 168, 1, 10 + n as u8]))]
                }
            };
            world
                .add_device_at("tag:a", &interfaces, Link { position: positions[n], ..Link::default() })
                .unwrap_or_else(|e| panic!("a device was refused: {e}"))
        });
        world.run(Duration::from_secs(2));
        let policy = format!(
            r#"{{"tagOwners": {{"tag:a": ["admin@example.com"]}},
                "grants": [{{"src": ["tag:a"], "dst": ["tag:a"], "ip": ["udp:{APP_PORT}"]}}]}}"#
        );
        world.set_policy(policy).unwrap_or_else(|e| panic!("the policy was refused: {e}"));
        world.run(Duration::from_secs(3));
        let next = world.now.boot;
        Self { world, devices, nats, stream: Default::default(), flow: Flow::default(), next }
    }

    /// What `at` (0 or 1) says of its path to the other.
    pub fn path(&self, at: usize) -> Option<PathStatus> {
        let status = self.world.devices[self.devices[at]].status(self.world.now)?;
        let peer = self.world.devices[self.devices[1 - at]].id();
        Some(status.peers.into_iter().find(|p| Some(p.id) == peer)?.path)
    }

    /// How `at` reaches the other.
    pub fn path_kind(&self, at: usize) -> String {
        self.path(at).map_or_else(|| "unknown".to_owned(), |path| path.kind.into_owned())
    }

    /// Why `at` doesn't reach the other directly.
    pub fn why_not_direct(&self, at: usize) -> Option<String> {
        self.path(at)?.why_not_direct.map(std::borrow::Cow::into_owned)
    }

    /// Sends one datagram. How long its answer took; `None` if it did not come within `limit`.
    pub fn ask(&mut self, limit: Duration) -> Option<Duration> {
        self.ask_long(limit, false, 0)
    }

    /// The same in an IPv6 packet if `v6`, with `extra` bytes.
    pub fn ask_long(&mut self, limit: Duration, v6: bool, extra: u16) -> Option<Duration> {
        self.world.deliveries.clear();
        let start = self.world.now.boot;
        let number = self.world.send_long(self.devices[0], self.devices[1], v6, extra)?;
        self.world.run(limit);
        let answers = |d: &&super::world::Delivery| {
            d.datagram.number == number && d.device == self.devices[0] && d.datagram.dst.port() != APP_PORT
        };
        let answer = self.world.deliveries.iter().find(answers).map(|d| d.at.since(start));
        self.world.deliveries.clear();
        answer
    }

    /// Forgets the pauses seen so far.
    pub fn start_measuring(&mut self) {
        let now = self.world.now.boot;
        self.stream = [Stream { last: now, longest: Duration::ZERO }; 2];
        (self.flow.last, self.flow.longest) = (now, Duration::ZERO);
    }

    /// The pauses since then, those still going on too.
    pub fn gaps(&self) -> Gaps {
        let now = self.world.now.boot;
        let stream = self.stream.iter().map(|s| s.longest.max(now.since(s.last))).max();
        Gaps { stream: stream.unwrap_or_default(), flow: self.flow.longest.max(now.since(self.flow.last)) }
    }

    /// Lets stream and flow run for so long.
    pub fn run(&mut self, duration: Duration) {
        let end = self.world.now.boot + duration;
        while self.world.now.boot < end {
            let now = self.world.now.boot;
            if self.next <= now {
                self.next = now + STREAM_PAUSE;
                // The stream is even-handed: each end sends, and no answers are counted but the flow's.
                for (from, to) in [(0, 1), (1, 0)] {
                    self.world.send(self.devices[from], self.devices[to], true);
                }
            }
            self.drive_flow();
            let repeat = self.flow.repeat_at.unwrap_or(end);
            self.world.run_until(self.next.min(repeat).min(end).max(now + Duration::from_millis(1)));
            self.take_deliveries();
        }
    }

    fn drive_flow(&mut self) {
        let now = self.world.now.boot;
        if self.flow.repeat_at.is_some_and(|at| at <= now) {
            // Everything under way counts as lost; one segment feels its way.
            self.flow.under_way.clear();
            self.flow.rto = (self.flow.rto * 2).min(MAX_RTO);
            self.send_segment();
        } else {
            while self.flow.under_way.len() < WINDOW && self.flow.rto <= RTO {
                self.send_segment();
            }
        }
    }

    fn send_segment(&mut self) {
        let now = self.world.now.boot;
        self.flow.rto = self.flow.rto.max(RTO);
        self.flow.repeat_at = Some(now + self.flow.rto);
        if let Some(number) = self.world.send(self.devices[0], self.devices[1], false) {
            self.flow.under_way.insert(number, ());
        }
    }

    fn take_deliveries(&mut self) {
        for delivery in std::mem::take(&mut self.world.deliveries) {
            let (datagram, at) = (delivery.datagram, delivery.at);
            let stream = datagram.dst.is_ipv6() && datagram.dst.port() == APP_PORT;
            if stream && let Some(to) = self.devices.iter().position(|no| *no == delivery.device) {
                let stream = &mut self.stream[to];
                stream.longest = stream.longest.max(at.since(stream.last));
                stream.last = at;
            } else if datagram.dst.port() != APP_PORT
                && self.flow.under_way.remove(&datagram.number).is_some()
            {
                let flow = &mut self.flow;
                flow.longest = flow.longest.max(at.since(flow.last));
                (flow.last, flow.rto, flow.acknowledged) = (at, RTO, flow.acknowledged + 1);
                flow.repeat_at = Some(at + RTO);
            }
        }
    }
}
