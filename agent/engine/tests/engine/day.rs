//! A day of virtual time: one connection outlives every rekey, every pause and every renewed lease.

use std::time::Duration;

use warren_engine::event::Event;
use warren_engine::packet::TCP_ACK;

use crate::net::{Behind, LEASE, Net};
use crate::policy::connect;

const S: Duration = Duration::from_secs(1);
const DAY: u32 = 24 * 3_600;

#[test]
fn a_connection_lives_through_a_day_of_rekeys_and_pauses() {
    let mut net = Net::new(&[Behind::PortRestricted, Behind::PortRestricted]);
    // Only node 0 may open connections: what node 1 says passes by the flow's entries or not at all.
    net.netmaps[0].ingress.clear();
    net.netmaps[1].egress.clear();
    (0..2).for_each(|n| net.push_netmap(n));
    let segment = connect(&mut net);
    let start = net.now;
    let (mut seq, mut sent) = ([101, 501], 0);
    let mut renewed = 0;
    while net.now.boot.since(start.boot) < DAY * S {
        let elapsed = net.now.boot.since(start.boot).as_secs();
        if elapsed / 3_600 > renewed {
            // The lease ends within the day: the coordinator renews it in time.
            renewed = elapsed / 3_600;
            (0..2).for_each(|n| net.push_netmap(n));
        }
        for from in [0, 1] {
            let to = 1 - from;
            let before = net.nodes[to].got.len();
            let packet = segment(from, seq[from], seq[to], TCP_ACK);
            net.send_packet(from, &packet);
            net.run(S);
            assert_eq!(net.nodes[to].got.len(), before + 1, "from {from} after {elapsed} s");
            assert_eq!(net.nodes[to].got.last(), Some(&packet));
            seq[from] += 1;
            sent += 1;
        }
        // Mostly a packet every few seconds; now and then long enough for the session to expire (180 s) and for a NAT to
        // forget (30 s), in turns begun by either side.
        let pause = match sent / 2 % 601 {
            600 => 1_200,
            n if n % 50 == 49 => 60 + n,
            n => 3 + n % 7,
        };
        net.run(pause as u32 * S);
        net.sent.clear();
    }
    assert!(DAY * S >= LEASE, "leases were renewed");
    assert!(renewed >= 23 && sent > 10_000, "{renewed} renewals, {sent} packets");
    // Every 120 s of traffic a new session, on both sides.
    for node in &net.nodes {
        let established =
            node.events.iter().filter(|event| matches!(event, Event::SessionEstablished { .. }));
        let sessions = established.count();
        assert!(sessions > 300, "{sessions} sessions");
    }
}
