//! Networks whose TCP connections come to nothing again and again: for a while the kernel drops what they begin.
//!
//! A connection that is accepted and ended costs some fifty microseconds, half of them in the kernel, where nothing else can run
//! meanwhile, and costs whoever makes it less: ten thousand a second would be in the latency of everybody's packets. A SYN that a
//! socket filter drops costs the processor that took it from the wire next to nothing.
//!
//! Only connections count that were accepted: their addresses answered, so nobody is barred by another's forged SYNs. Who
//! is barred with a bad neighbour behind the same address is so for as long as the neighbour goes on: of each second some
//! tens of milliseconds are open. UDP is not barred.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::time::Duration;

use socket2::{SockFilter, SockRef};
use tokio::net::TcpListener;
use warren_common::time::Instant;

use super::MAX_HANDSHAKES;
use super::handshakes::network_of;
use super::per_network::PerNetwork;

/// Connections of one network that may come to nothing in the long run, per second.
const FAILURES_PER_S: u32 = MAX_HANDSHAKES as u32;
/// The same at once, in the time that they would take: an office that comes back after a restart loses some to its own others.
const BURST: Duration = Duration::from_secs(4);
/// How long a network is barred.
const BARRED_FOR: Duration = Duration::from_secs(1);
/// Most networks that are barred at once: each is a step of the filter for every SYN.
const MOST: usize = 64;

/// Who is barred, and who may be soon.
#[derive(Debug, Default)]
pub(super) struct Barred {
    failures: PerNetwork,
    until: BTreeMap<IpAddr, Instant>,
}

impl Barred {
    /// A connection from there came to nothing. True if its network is barred by that.
    pub(super) fn failed(&mut self, from: IpAddr, now: Instant) -> bool {
        let network = network_of(from);
        let allowed = self.failures.of(network).allow(now, Duration::from_secs(1) / FAILURES_PER_S, BURST);
        if allowed || self.until.len() >= MOST {
            return false;
        }
        // Those that were accepted before come to nothing as well.
        let new = !self.until.contains_key(&network);
        if new {
            self.until.insert(network, now + BARRED_FOR);
        }
        new
    }

    /// When the first one is barred no more.
    pub(super) fn due(&self) -> Option<Instant> {
        self.until.values().min().copied()
    }

    /// Lets in whose time is over.
    pub(super) fn lift(&mut self, now: Instant) {
        self.until.retain(|_, until| *until > now);
    }

    /// Tells the kernel, for what comes from here on. Connections that were accepted meanwhile keep the filter of then, which
    /// names others.
    ///
    /// # Errors
    /// The system has no socket filters, or no memory for one.
    pub(super) fn install(&self, listener: &TcpListener) -> io::Result<()> {
        let listener = SockRef::from(listener);
        if self.until.is_empty() {
            return listener.detach_filter();
        }
        let program: Vec<_> = program(self.until.keys().copied())
            .into_iter()
            .map(|Step { code, on_true, on_false, k }| SockFilter::new(code, on_true, on_false, k))
            .collect();
        listener.attach_filter(&program)
    }
}

/// A step of a classic BPF program (`bpf(4)`, and networking/filter in the kernel's documentation).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Step {
    code: u16,
    on_true: u8,
    on_false: u8,
    k: u32,
}

const LOAD_BYTE: u16 = 0x30; // BPF_LD | BPF_B | BPF_ABS
const LOAD_WORD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
const SHIFT_RIGHT: u16 = 0x74; // BPF_ALU | BPF_RSH | BPF_K
const JUMP: u16 = 0x05; // BPF_JMP | BPF_JA
const IF_EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
const RETURN: u16 = 0x06; // BPF_RET | BPF_K
/// Offsets from here on count from the IP header (`SKF_NET_OFF`).
const IP: u32 = 0xfff0_0000;
const IPV4_SOURCE: u32 = 12;
const IPV6_SOURCE: u32 = 8;

const DROP: Step = Step { code: RETURN, on_true: 0, on_false: 0, k: 0 };
const PASS: Step = Step { code: RETURN, on_true: 0, on_false: 0, k: u32::MAX };

/// Drops what comes from these networks.
fn program(networks: impl Iterator<Item = IpAddr>) -> Vec<Step> {
    let load = |code, at| Step { code, on_true: 0, on_false: 0, k: IP + at };
    let unless = |k, skip| Step { code: IF_EQUAL, on_true: 0, on_false: skip, k };
    let (mut v4, mut v6) = (vec![load(LOAD_WORD, IPV4_SOURCE)], Vec::new());
    for network in networks {
        match network {
            IpAddr::V4(ip) => v4.extend([unless(ip.to_bits(), 1), DROP]),
            IpAddr::V6(ip) => {
                let [high, low] = [ip.to_bits() >> 96, ip.to_bits() >> 64].map(|bits| bits as u32);
                v6.extend([
                    load(LOAD_WORD, IPV6_SOURCE),
                    unless(high, 3),
                    load(LOAD_WORD, IPV6_SOURCE + 4),
                    unless(low, 1),
                    DROP,
                ]);
            }
        }
    }
    v4.push(PASS);
    v6.push(PASS);
    let version = [load(LOAD_BYTE, 0), Step { code: SHIFT_RIGHT, on_true: 0, on_false: 0, k: 4 }];
    // Steps to skip have eight bits in a condition, and more in a jump.
    let choose = [unless(4, 1), Step { code: JUMP, on_true: 0, on_false: 0, k: 1 }];
    let to_v6 = Step { code: JUMP, on_true: 0, on_false: 0, k: v4.len() as u32 };
    version.into_iter().chain(choose).chain([to_v6]).chain(v4).chain(v6).collect()
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use futures_util::poll;
    use proptest::prelude::*;
    use tokio::net::{TcpSocket, TcpStream};

    use super::*;

    const EARLY: Instant = Instant::ZERO;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    /// How many failures at once it takes, at least.
    fn until_barred(barred: &mut Barred, from: IpAddr, now: Instant) -> u32 {
        (1..).find(|_| barred.failed(from, now)).unwrap()
    }

    #[test]
    fn who_fails_too_often_is_barred_for_a_while() {
        let mut barred = Barred::default();
        let burst = FAILURES_PER_S * BURST.as_secs() as u32;
        assert_eq!(until_barred(&mut barred, ip("192.0.2.1"), EARLY), burst + 1);
        assert_eq!(until_barred(&mut barred, ip("2001:db8::1"), EARLY), burst + 1);
        assert!(!barred.failed(ip("2001:db8::2"), EARLY), "it is barred already");
        assert_eq!(barred.due(), Some(EARLY + BARRED_FOR));
        barred.lift(EARLY + BARRED_FOR / 2);
        assert_eq!(barred.until.len(), 2);
        barred.lift(EARLY + BARRED_FOR);
        assert_eq!(barred.due(), None);
        // Meanwhile there is room for some more.
        let again = until_barred(&mut barred, ip("192.0.2.1"), EARLY + BARRED_FOR);
        assert_eq!(again, FAILURES_PER_S + 1);
    }

    #[test]
    fn who_fails_now_and_then_never_is() {
        let mut barred = Barred::default();
        let apart = Duration::from_secs(1) / FAILURES_PER_S;
        assert!((0..100 * FAILURES_PER_S).all(|n| !barred.failed(ip("192.0.2.1"), EARLY + apart * n)));
    }

    #[test]
    fn so_many_at_once_and_no_more() {
        let mut barred = Barred::default();
        for n in 0..MOST as u32 {
            until_barred(&mut barred, IpAddr::from((n << 8).to_be_bytes()), EARLY);
        }
        assert!((0..10_000).all(|_| !barred.failed(ip("192.0.2.1"), EARLY)));
    }

    /// What the kernel does with the program, for one IP packet.
    fn run(program: &[Step], packet: &[u8]) -> u32 {
        let at = |k: u32, len: usize| {
            let from = (k - IP) as usize;
            packet[from..from + len].iter().fold(0, |value, byte| value << 8 | u32::from(*byte))
        };
        let (mut counter, mut accumulator) = (0, 0);
        loop {
            let step = program[counter];
            counter += 1;
            match step.code {
                LOAD_BYTE => accumulator = at(step.k, 1),
                LOAD_WORD => accumulator = at(step.k, 4),
                SHIFT_RIGHT => accumulator >>= step.k,
                JUMP => counter += step.k as usize,
                IF_EQUAL => {
                    counter += usize::from(if accumulator == step.k { step.on_true } else { step.on_false });
                }
                RETURN => return step.k,
                code => panic!("{code}"),
            }
        }
    }

    fn syn(from: IpAddr) -> Vec<u8> {
        let mut packet = vec![0; 60];
        match from {
            IpAddr::V4(ip) => {
                packet[0] = 0x45;
                packet[12..16].copy_from_slice(&ip.octets());
            }
            IpAddr::V6(ip) => {
                packet[0] = 0x60;
                packet[8..24].copy_from_slice(&ip.octets());
            }
        }
        packet
    }

    /// Few networks, so that addresses are often of one of them.
    fn addr() -> impl Strategy<Value = IpAddr> {
        prop_oneof![
            (0..4u8, 0..40u8).prop_map(|(a, b)| IpAddr::from([10, 0, a, b])),
            (0..4u16, 0..20u16, any::<u64>()).prop_map(|(a, b, host)| {
                let net = u128::from(0x2001_0db8_0000_0000_u64 | u64::from(a) << 32 | u64::from(b)) << 64;
                IpAddr::from((net | u128::from(host)).to_be_bytes())
            }),
        ]
    }

    proptest! {
        #[test]
        fn the_filter_drops_what_comes_from_them_and_nothing_else(
            networks in prop::collection::btree_set(addr().prop_map(network_of), 0..MOST),
            from in addr(),
        ) {
            let kept = run(&program(networks.iter().copied()), &syn(from));
            prop_assert_eq!(kept, if networks.contains(&network_of(from)) { 0 } else { u32::MAX });
        }
    }

    async fn connect(from: &str, listener: &TcpListener) -> io::Result<TcpStream> {
        let from = std::net::SocketAddr::new(ip(from), 0);
        let socket = if from.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        socket.bind(from)?;
        let to = if from.is_ipv4() { ip("127.0.0.1") } else { ip("::1") };
        socket.connect((to, listener.local_addr()?.port()).into()).await
    }

    #[tokio::test]
    async fn the_kernel_keeps_them_waiting_until_their_time_is_over() {
        let listener = TcpListener::bind("[::]:0").await.unwrap();
        let mut barred = Barred::default();
        until_barred(&mut barred, ip("127.0.0.2"), EARLY);
        until_barred(&mut barred, ip("::1"), EARLY);
        barred.install(&listener).unwrap();
        let mut waiting = [pin!(connect("127.0.0.2", &listener)), pin!(connect("::1", &listener))];
        for one in &mut waiting {
            assert!(poll!(one).is_pending());
        }
        // On loopback theirs were there before.
        drop(connect("127.0.0.3", &listener).await.unwrap());
        let (_, first) = listener.accept().await.unwrap();
        assert_eq!(network_of(first.ip()), ip("127.0.0.3"));
        barred.lift(EARLY + BARRED_FOR);
        barred.install(&listener).unwrap();
        // TCP tries again by itself, a second later.
        for one in waiting {
            drop(one.await.unwrap());
        }
    }
}
