//! A port of the NAT in front of us, forwarded to ours on request: by PCP (RFC 6887), NAT-PMP (RFC 6886) or UPnP-IGD.
//!
//! With it peers get in whatever that NAT does to others. A task asks the gateway of the default route, and nobody else,
//! which of the three it speaks, takes the first that gives a mapping, renews it at half its life, and gives it back at the
//! end. A gateway that was restarted has forgotten its mappings: it says so to the LAN (which is a hint, checked by asking), its
//! epoch goes back, or it no longer answers.
//!
//! What a gateway says is never trusted more than any other candidate: peers probe the address with authenticated probes before
//! a packet goes there. Answers count only from the gateway's address and about our own question; everything is bounded.

mod natpmp;
mod pcp;
mod upnp;

use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};
use std::time::Duration;

use rand_core::RngCore as _;
use socket2::{Domain, Protocol as IpProtocol, Socket, Type};
use tokio::net::UdpSocket;
use tokio::sync::{oneshot, watch};
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;
use warren_common::time::Instant;

use crate::clock::{self, BootTimer};
use crate::entropy::OsEntropy;
use crate::os::udp;
pub use pcp::NONCE_LEN;
pub use upnp::MAX_ANSWER;

/// Port of PCP and NAT-PMP servers.
const SERVER_PORT: u16 = 5_351;
/// Where gateways announce that they were restarted.
const ANNOUNCE_PORT: u16 = 5_350;
/// How long each of three questions waits for its answer: RFC 6886 begins so; on a LAN an answer takes milliseconds.
const WAITS: [Duration; 3] =
    [Duration::from_millis(250), Duration::from_millis(500), Duration::from_millis(1_000)];
/// Longest answer that is looked at, in bytes (RFC 6887 section 7).
const MAX_ANSWER_UDP: usize = 1_100;
/// Least time between two renewals (RFC 6887 section 11.2.1), and between two announcements that are believed.
const SPACING: Duration = Duration::from_secs(4);
/// Whatever address and port the gateway likes.
const ANY: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0);
/// Outside ports that are tried with UPnP, where others may hold the one we ask for.
const MAX_PORTS: usize = 4;
/// How long giving a mapping back may hold up the end.
const RELEASE_PATIENCE: Duration = Duration::from_millis(700);

/// A way to ask for a mapping, best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Protocol {
    /// RFC 6887.
    Pcp,
    /// RFC 6886.
    NatPmp,
    /// UPnP-IGD.
    Upnp,
}

impl Protocol {
    /// As `warren netcheck` says it.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Pcp => "pcp",
            Self::NatPmp => "nat-pmp",
            Self::Upnp => "upnp",
        }
    }
}

/// How often what is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// Life that is asked for. Mappings that nobody gives back stay for so long.
    pub lifetime: Duration,
    /// How often the gateway is asked whether it still remembers.
    pub check: Duration,
    /// Wait before trying again to get a mapping; doubled each time, up to `rest`.
    pub retry: Duration,
    /// Longest wait between two tries.
    pub rest: Duration,
}

impl Default for Timing {
    /// Two hours as RFC 6886 recommends; a check every two minutes costs nothing on a LAN and is what a restart without an
    /// announcement costs at most.
    fn default() -> Self {
        Self {
            lifetime: Duration::from_secs(7_200),
            check: Duration::from_secs(120),
            retry: Duration::from_secs(10),
            rest: Duration::from_secs(900),
        }
    }
}

/// Which port is to be mapped, by whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// The default route's gateway.
    pub gateway: Ipv4Addr,
    /// Our UDP port.
    pub port: u16,
    /// Shows that a mapping is ours (PCP's nonce): a secret, and the same one after a restart of ours.
    pub nonce: [u8; NONCE_LEN],
    /// Mark of our sockets; 0 for none.
    pub mark: u32,
    /// How often what is done.
    pub timing: Timing,
}

/// How things are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// What peers reach us at, and by which protocol it was got.
    pub mapping: Option<(SocketAddrV4, Protocol)>,
    /// There was a mapping in this network, and there is none now.
    pub lost: bool,
}

/// Keeps a port mapped until it is closed. Dropped without that, it leaves the mapping to its end.
#[derive(Debug)]
pub struct Mapper {
    config: Config,
    state: watch::Receiver<State>,
    stop: oneshot::Sender<()>,
    task: AbortOnDropHandle<()>,
}

impl Mapper {
    /// Starts to look for a mapping.
    pub fn spawn(config: Config) -> Self {
        Self::start(config, None)
    }

    /// The same once `former`, at the same gateway, has given its own back: later that would take away ours.
    pub fn spawn_after(former: Self, config: Config) -> Self {
        Self::start(config, Some(former))
    }

    fn start(config: Config, former: Option<Self>) -> Self {
        let (sender, state) = watch::channel(State::default());
        let (stop, stopped) = oneshot::channel();
        let work = async move {
            if let Some(former) = former {
                former.close().await;
            }
            run(config, sender, stopped).await;
        };
        #[expect(clippy::disallowed_methods, reason = "owned by the handle: dropping it aborts the task")]
        let task = tokio::task::spawn(work);
        Self { config, state, stop, task: AbortOnDropHandle::new(task) }
    }

    /// What it was started with.
    pub const fn config(&self) -> &Config {
        &self.config
    }

    /// How things are now.
    pub fn state(&self) -> State {
        *self.state.borrow()
    }

    /// Waits until that changes. Cancel safe.
    pub async fn changed(&mut self) -> State {
        if self.state.changed().await.is_err() {
            std::future::pending::<()>().await; // the task ends only when it is told to
        }
        *self.state.borrow_and_update()
    }

    /// Gives the mapping back, within 700 ms.
    pub async fn close(self) {
        let _ = self.stop.send(());
        // A gateway that does not answer forgets by itself.
        let _ = timeout(RELEASE_PATIENCE, self.task).await;
    }
}

/// The protocols that the gateway answers to.
pub async fn probe(gateway: Ipv4Addr, mark: u32) -> Vec<Protocol> {
    let found = find(gateway, [0; NONCE_LEN], mark).await;
    let mut protocols: Vec<_> = found.into_iter().map(|(protocol, _)| protocol).collect();
    protocols.dedup(); // a gateway can have several UPnP services
    protocols
}

/// How to order what of the gateway, best first. Takes two seconds unless all three answer.
async fn find(gateway: Ipv4Addr, nonce: [u8; NONCE_LEN], mark: u32) -> Vec<(Protocol, Client)> {
    let server = Server { gateway, mark };
    let Ok(own) = server.own().await else { return Vec::new() };
    let (announce, address) = (pcp::announce(own), natpmp::address());
    let (pcp, natpmp, upnp) = tokio::join!(
        server.ask(&announce, pcp::announced),
        server.ask(&address, natpmp::addressed),
        upnp::find(gateway, own, mark),
    );
    let mut found = Vec::new();
    if let Some(pcp::Answer::Alive { .. }) = pcp {
        found.push((Protocol::Pcp, Client::Pcp { server, nonce }));
    }
    if let Some(Ok(_)) = natpmp {
        found.push((Protocol::NatPmp, Client::NatPmp { server }));
    }
    found.extend(upnp.into_iter().map(|service| (Protocol::Upnp, Client::Upnp { server, service })));
    found
}

/// A PCP or NAT-PMP server.
#[derive(Clone, Copy, Debug)]
struct Server {
    gateway: Ipv4Addr,
    mark: u32,
}

impl Server {
    /// A socket that hears only the gateway's server.
    async fn socket(&self) -> std::io::Result<UdpSocket> {
        let any = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
        let socket = udp::socket(any, self.mark).and_then(UdpSocket::from_std)?;
        socket.connect((self.gateway, SERVER_PORT)).await?;
        Ok(socket)
    }

    /// Our address on the gateway's link.
    async fn own(&self) -> std::io::Result<Ipv4Addr> {
        match self.socket().await?.local_addr()?.ip() {
            IpAddr::V4(ip) => Ok(ip),
            IpAddr::V6(_) => Err(std::io::ErrorKind::AddrNotAvailable.into()),
        }
    }

    /// Asks up to three times; `None` if no answer comes that `take` takes.
    async fn ask<T>(&self, request: &[u8], take: impl Fn(&[u8]) -> Option<T>) -> Option<T> {
        let socket = self.socket().await.ok()?;
        let mut buffer = [0; MAX_ANSWER_UDP];
        for wait in WAITS {
            socket.send(request).await.ok()?;
            let answer = async {
                loop {
                    // An error is a refusal by ICMP: there is no server.
                    let len = socket.recv(&mut buffer).await.ok()?;
                    if let Some(answer) = take(&buffer[..len]) {
                        return Some(answer);
                    }
                }
            };
            if let Ok(answer) = timeout(wait, answer).await {
                return answer;
            }
        }
        None
    }
}

/// One gateway by one protocol.
#[derive(Clone, Debug)]
enum Client {
    Pcp { server: Server, nonce: [u8; NONCE_LEN] },
    NatPmp { server: Server },
    Upnp { server: Server, service: upnp::Service },
}

/// What a gateway gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Granted {
    external: SocketAddrV4,
    lifetime: Duration,
    /// When the gateway's memory began; UPnP has no such thing.
    epoch: Option<u32>,
}

impl Client {
    /// Maps `port`, at `former` again if it can be had.
    async fn map(&self, port: u16, former: Option<SocketAddrV4>, life: Duration) -> Result<Granted, String> {
        let suggested = former.unwrap_or(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port));
        let no_answer = || "no answer".to_owned();
        let granted = match self {
            Self::Pcp { server, nonce } => {
                let own = server.own().await.map_err(|e| e.to_string())?;
                let request = pcp::map(own, *nonce, port, suggested, life);
                match server.ask(&request, |bytes| pcp::mapped(bytes, *nonce, port)).await {
                    Some(pcp::Answer::Mapped { external, lifetime, epoch }) => {
                        Granted { external, lifetime, epoch: Some(epoch) }
                    }
                    Some(pcp::Answer::Refused { code }) => return Err(format!("result code {code}")),
                    Some(pcp::Answer::Alive { .. }) | None => return Err(no_answer()),
                }
            }
            Self::NatPmp { server } => {
                let outside = server.ask(&natpmp::address(), natpmp::addressed).await;
                let outside = outside.ok_or_else(no_answer)?.map_err(|code| format!("result code {code}"))?;
                let request = natpmp::map(port, suggested.port(), life);
                let mapped = server.ask(&request, |bytes| natpmp::mapped(bytes, port)).await;
                let mapped = mapped.ok_or_else(no_answer)?.map_err(|code| format!("result code {code}"))?;
                Granted {
                    external: SocketAddrV4::new(outside.ip, mapped.port),
                    lifetime: mapped.lifetime,
                    epoch: Some(mapped.epoch),
                }
            }
            Self::Upnp { server, service } => {
                let own = server.own().await.map_err(|e| e.to_string())?;
                upnp_map(service, SocketAddrV4::new(own, port), suggested.port(), life).await?
            }
        };
        let usable = granted.external.port() != 0
            && !granted.external.ip().is_unspecified()
            && !granted.lifetime.is_zero();
        usable.then_some(granted).ok_or_else(|| "a mapping of no use".to_owned())
    }

    /// The gateway's epoch. `None` if it says nothing, or has none.
    async fn epoch(&self) -> Option<u32> {
        match self {
            Self::Pcp { server, .. } => {
                let own = server.own().await.ok()?;
                match server.ask(&pcp::announce(own), pcp::announced).await? {
                    pcp::Answer::Alive { epoch } => Some(epoch),
                    pcp::Answer::Mapped { .. } | pcp::Answer::Refused { .. } => None,
                }
            }
            Self::NatPmp { server } => {
                server.ask(&natpmp::address(), natpmp::addressed).await?.ok().map(|outside| outside.epoch)
            }
            Self::Upnp { .. } => None,
        }
    }

    /// Gives a mapping back. Nothing is to be done about a gateway that won't have it.
    async fn release(&self, port: u16, external: SocketAddrV4) {
        match self {
            Self::Pcp { server, nonce } => {
                if let Ok(own) = server.own().await {
                    let request = pcp::map(own, *nonce, port, external, Duration::ZERO);
                    server.ask(&request, |bytes| pcp::mapped(bytes, *nonce, port)).await;
                }
            }
            Self::NatPmp { server } => {
                let request = natpmp::map(port, 0, Duration::ZERO);
                server.ask(&request, |bytes| natpmp::mapped(bytes, port)).await;
            }
            Self::Upnp { service, .. } => {
                if let Err(e) = service.unmap(external.port()).await {
                    tracing::debug!("a port mapping can't be given back: {e}");
                }
            }
        }
    }
}

async fn upnp_map(
    service: &upnp::Service,
    own: SocketAddrV4,
    first: u16,
    life: Duration,
) -> Result<Granted, String> {
    let outside = service.external().await.map_err(|e| e.to_string())?;
    let mut external = first;
    let mut result = Err(String::new());
    for _ in 0..MAX_PORTS {
        match service.map(own, external, life).await {
            Ok(_ends) => {
                let external = SocketAddrV4::new(outside, external);
                return Ok(Granted { external, lifetime: life, epoch: None });
            }
            Err(e) if e.is_conflict() => {
                result = Err(e.to_string());
                external = 1_024 + (OsEntropy.next_u32() % (65_536 - 1_024)) as u16;
            }
            Err(e) => return Err(e.to_string()),
        }
    }
    result
}

/// When the gateway's memory began, as last seen.
#[derive(Clone, Copy, Debug)]
struct Epoch {
    value: u32,
    at: Instant,
}

impl Epoch {
    /// True if the gateway's time did not go on as ours did (RFC 6887 section 8.5): it has forgotten.
    fn has_restarted(self, now: Instant, value: u32) -> bool {
        let client = now.since(self.at).as_secs();
        let Some(server) = value.checked_sub(self.value) else {
            return self.value - value > 1; // answers may overtake each other
        };
        let server = u64::from(server);
        client + 2 < server - server / 16 || server + 2 < client - client / 16
    }

    /// True if the gateway's memory began after this one was seen: a restart that lies between two close looks and hides in
    /// the tolerance of [`has_restarted`](Self::has_restarted) shows here later.
    fn is_before_memory(self, now: Instant, value: u32) -> bool {
        let (client, server) = (now.since(self.at).as_secs(), u64::from(value));
        server + 2 < client - client / 16
    }
}

/// What a turn of the task waits for.
enum Wake {
    Timer,
    Announced,
    Stop,
}

/// The task's senses: its end, the clock, and what the gateway announces.
struct Senses {
    gateway: Ipv4Addr,
    stopped: oneshot::Receiver<()>,
    timer: Option<BootTimer>,
    announcements: Option<UdpSocket>,
    /// Announcements before this wait until then: anybody on the LAN can send them.
    deaf_until: Instant,
    /// One waits.
    announced: bool,
}

impl Senses {
    async fn wait(&mut self, until: Instant) -> Wake {
        let Some(timer) = &mut self.timer else { return Wake::Stop }; // without a clock nothing can be renewed
        let mut buffer = [0; 64];
        loop {
            let now = clock::now().boot;
            if self.announced && now >= self.deaf_until {
                (self.announced, self.deaf_until) = (false, now + SPACING);
                return Wake::Announced;
            }
            if now >= until {
                return Wake::Timer;
            }
            let wake = if self.announced { until.min(self.deaf_until) } else { until };
            if timer.set(wake).is_err() {
                return Wake::Stop;
            }
            let heard = async {
                match &self.announcements {
                    Some(socket) => socket.recv_from(&mut buffer).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                _ = &mut self.stopped => return Wake::Stop,
                () = timer.fired() => {}
                heard = heard => match heard {
                    Ok((_, from)) => self.announced |= from.ip() == self.gateway,
                    Err(_) => self.announcements = None,
                },
            }
        }
    }
}

/// A socket for announcements, which every program that maps ports listens to. Without it restarts are noticed later.
fn announcements() -> std::io::Result<UdpSocket> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(IpProtocol::UDP))?;
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&SocketAddr::from((Ipv4Addr::UNSPECIFIED, ANNOUNCE_PORT)).into())?;
    UdpSocket::from_std(socket.into()) // every host is in the group 224.0.0.1
}

async fn run(config: Config, state: watch::Sender<State>, stopped: oneshot::Receiver<()>) {
    let mut senses = Senses {
        gateway: config.gateway,
        stopped,
        timer: BootTimer::new().ok(),
        announcements: announcements().ok(),
        deaf_until: Instant::ZERO,
        announced: false,
    };
    let mut pause = config.timing.retry;
    let mut former = None;
    loop {
        let found = tokio::select! {
            found = find(config.gateway, config.nonce, config.mark) => found,
            _ = &mut senses.stopped => return,
        };
        for (protocol, client) in found {
            let granted = {
                let mapping = client.map(config.port, former, config.timing.lifetime);
                tokio::pin!(mapping);
                tokio::select! {
                    granted = &mut mapping => granted,
                    _ = &mut senses.stopped => {
                        // It may be mapped already.
                        let external = match client {
                            // Of which port only the answer tells; another one may be somebody else's.
                            Client::Upnp { .. } => mapping.await.ok().map(|granted| granted.external),
                            Client::Pcp { .. } | Client::NatPmp { .. } => Some(former.unwrap_or(ANY)),
                        };
                        if let Some(external) = external {
                            client.release(config.port, external).await;
                        }
                        return;
                    }
                }
            };
            match granted {
                Ok(granted) => {
                    tracing::info!(protocol = protocol.word(), "the gateway forwards a port to us");
                    tracing::debug!(external = %granted.external, lifetime = ?granted.lifetime, "port mapping");
                    let held = Held {
                        config,
                        protocol,
                        client,
                        epoch: None,
                        confirmed: None,
                        granted,
                        expires: Instant::ZERO,
                    };
                    match held.keep(&state, &mut senses).await {
                        Kept::Stopped => return,
                        Kept::Lost(external) => former = Some(external),
                    }
                    tracing::info!("the port mapping is lost");
                    state.send_replace(State { mapping: None, lost: true });
                    pause = config.timing.retry;
                    break;
                }
                Err(why) => tracing::debug!(protocol = protocol.word(), "no port mapping: {why}"),
            }
        }
        let until = clock::now().boot + pause;
        pause = (pause * 2).min(config.timing.rest);
        match senses.wait(until).await {
            Wake::Stop => return,
            Wake::Timer => {}
            Wake::Announced => pause = config.timing.retry,
        }
    }
}

/// A mapping that is being kept.
struct Held {
    config: Config,
    protocol: Protocol,
    client: Client,
    granted: Granted,
    /// As last seen.
    epoch: Option<Epoch>,
    /// When the mapping was last confirmed.
    confirmed: Option<Epoch>,
    expires: Instant,
}

enum Kept {
    Stopped,
    Lost(SocketAddrV4),
}

impl Held {
    async fn keep(mut self, state: &watch::Sender<State>, senses: &mut Senses) -> Kept {
        let check = self.config.timing.check;
        let (mut renew, mut look) = self.took(state);
        loop {
            let due = match senses.wait(renew.min(look)).await {
                Wake::Stop => {
                    self.client.release(self.config.port, self.granted.external).await;
                    return Kept::Stopped;
                }
                Wake::Announced => self.epoch.is_none(),
                Wake::Timer => clock::now().boot >= renew,
            };
            look = clock::now().boot + check;
            let forgotten = self.was_forgotten().await;
            if !due && !forgotten {
                continue;
            }
            let Config { port, timing, .. } = self.config;
            let renewed = tokio::select! {
                renewed = self.client.map(port, Some(self.granted.external), timing.lifetime) => renewed,
                _ = &mut senses.stopped => {
                    self.client.release(port, self.granted.external).await;
                    return Kept::Stopped;
                }
            };
            let now = clock::now().boot;
            match renewed {
                Ok(granted) => {
                    self.granted = granted;
                    (renew, look) = self.took(state);
                }
                Err(_) if now < self.expires && !forgotten => {
                    // Half of what is left each time (RFC 6887 section 11.2.1).
                    renew = (now + (self.expires.since(now) / 2).max(SPACING)).min(self.expires);
                    look = now + check;
                }
                Err(why) => {
                    tracing::debug!("the port mapping can't be renewed: {why}");
                    return Kept::Lost(self.granted.external);
                }
            }
        }
    }

    /// A mapping was given: when to renew it, and when to look before that.
    fn took(&mut self, state: &watch::Sender<State>) -> (Instant, Instant) {
        let now = clock::now().boot;
        let life = self.granted.lifetime.min(self.config.timing.lifetime);
        self.expires = now + life;
        self.epoch = self.granted.epoch.map(|value| Epoch { value, at: now });
        self.confirmed = self.epoch;
        let mapping = Some((self.granted.external, self.protocol));
        state.send_if_modified(|state| {
            let new = State { mapping, lost: false };
            std::mem::replace(state, new) != new
        });
        let mut renew = (life / 2).max(SPACING.min(life));
        if self.epoch.is_none() {
            renew = renew.min(self.config.timing.check); // nothing tells that such a gateway has forgotten
        }
        (now + renew, now + self.config.timing.check)
    }

    /// Asks the gateway whether it was restarted. True if it was; silence means nothing yet.
    async fn was_forgotten(&mut self) -> bool {
        let (Some(before), Some(value)) = (self.epoch, self.client.epoch().await) else { return false };
        let now = clock::now().boot;
        self.epoch = Some(Epoch { value, at: now });
        before.has_restarted(now, value)
            || self.confirmed.is_some_and(|epoch| epoch.is_before_memory(now, value))
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc;
    use tokio::task::JoinSet;

    use super::*;

    #[test]
    fn a_gateway_whose_time_does_not_go_on_as_ours_was_restarted() {
        let start = Instant::ZERO + Duration::from_secs(1_000);
        let epoch = Epoch { value: 5_000, at: start };
        let after = |seconds: u64, value| epoch.has_restarted(start + Duration::from_secs(seconds), value);
        assert!(!after(0, 5_000) && !after(1, 4_999) && !after(100, 5_100));
        assert!(!after(100, 5_095) && !after(100, 5_107), "clocks differ");
        assert!(after(10, 3) && after(1, 4_998) && after(100, 5_000) && after(10, 5_100));
        assert!(!epoch.has_restarted(start, 5_001));
        let extreme = Epoch { value: 0, at: Instant::ZERO };
        assert!(extreme.has_restarted(start, u32::MAX));
        // Mapped in its first second, restarted in its third, looked at in its fourth and twentieth.
        let young = Epoch { value: 1, at: start };
        let later = |seconds: u64, value| young.is_before_memory(start + Duration::from_secs(seconds), value);
        assert!(!later(2, 0) && later(20, 16) && !later(20, 21) && !later(20, 19));
    }

    #[tokio::test]
    async fn where_no_gateway_answers_there_is_none_and_the_end_comes_at_once() {
        // A discard address of this host: refused by ICMP.
        assert_eq!(
            Server { gateway: Ipv4Addr::LOCALHOST, mark: 0 }.ask(&[0, 0], natpmp::addressed).await,
            None
        );
        let config = Config {
            gateway: Ipv4Addr::LOCALHOST,
            port: 1,
            nonce: [1; NONCE_LEN],
            mark: 0,
            timing: Timing::default(),
        };
        let mapper = Mapper::spawn(config);
        assert_eq!(mapper.state(), State::default());
        mapper.close().await;
    }

    /// A gateway that speaks NAT-PMP: answers `answered` requests for a port, and tells the life that each request asks for.
    async fn gateway(ip: Ipv4Addr, mut answered: usize) -> (mpsc::UnboundedReceiver<u32>, JoinSet<()>) {
        let socket = UdpSocket::bind((ip, SERVER_PORT)).await.unwrap();
        let (sender, asked) = mpsc::unbounded_channel();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut buffer = [0; 64];
            loop {
                let (len, from) = socket.recv_from(&mut buffer).await.unwrap();
                let answer = match buffer[..len] {
                    [0, 0] => vec![0, 128, 0, 0, 0, 0, 0, 9, 198, 51, 100, 7],
                    [0, 1, _, _, high, low, _, _, a, b, c, d] => {
                        let life = u32::from_be_bytes([a, b, c, d]);
                        sender.send(life).unwrap();
                        if life > 0 && answered == 0 {
                            continue;
                        }
                        answered -= usize::from(life > 0);
                        let external = if life > 0 { 99 } else { 0 };
                        vec![0, 129, 0, 0, 0, 0, 0, 9, high, low, 0, external, a, b, c, d]
                    }
                    _ => continue, // PCP
                };
                socket.send_to(&answer, from).await.unwrap();
            }
        });
        (asked, tasks)
    }

    fn at(gateway: Ipv4Addr) -> Config {
        Config { gateway, port: 41_641, nonce: [1; NONCE_LEN], mark: 0, timing: Timing::default() }
    }

    #[tokio::test]
    async fn an_end_before_the_answer_gives_back_what_may_be_mapped() {
        let ip = Ipv4Addr::new(127, 0, 53, 51);
        let (mut asked, _tasks) = gateway(ip, 0).await;
        let mapper = Mapper::spawn(at(ip));
        assert_eq!(asked.recv().await, Some(7_200));
        mapper.close().await;
        let all: Vec<u32> = std::iter::from_fn(|| asked.try_recv().ok()).collect();
        assert!(all.contains(&0), "{all:?}");
    }

    #[tokio::test]
    async fn a_mapper_that_takes_anothers_place_asks_after_that_has_given_its_mapping_back() {
        let ip = Ipv4Addr::new(127, 0, 53, 52);
        let (mut asked, _tasks) = gateway(ip, 2).await;
        let mut first = Mapper::spawn(at(ip));
        assert!(first.changed().await.mapping.is_some());
        let mut second = Mapper::spawn_after(first, at(ip));
        assert!(second.changed().await.mapping.is_some());
        assert_eq!([asked.recv().await, asked.recv().await, asked.recv().await], [7_200, 0, 7_200].map(Some));
    }
}
