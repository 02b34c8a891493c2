//! A day of traffic over bad links: no session is lost, and every packet that the link carried arrives once.

use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use warren_engine::wg::{Event, SealError};

use crate::net::{Link, Net, ms, secs};

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 12,
        rng_seed: RngSeed::Fixed(0x5EED),
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn a_day_of_rekeys_over_a_bad_link_loses_no_session(
        seed in any::<u64>(),
        loss in prop_oneof![Just(0), 1u32..120],
        duplicate in 0u32..100,
        delay in (1u64..100, 0u64..400),
        intervals in (200u64..9_000, 200u64..9_000),
        psk in any::<Option<[u8; 32]>>(),
        one_way in any::<bool>(),
    ) {
        let mut net = Net::new(seed, psk, [None, None]);
        net.connect();
        net.link = Link { loss, duplicate, delay_ms: (delay.0, delay.0 + delay.1) };
        let end = net.now.boot + secs(24 * 3600);
        let mut due = [net.now.boot, net.now.boot + ms(37)];
        if one_way {
            due[seed as usize % 2] = end + secs(1);
        }
        let mut sent = Vec::new();
        while net.now.boot < end {
            let next = due[0].min(due[1]).min(end);
            while net.step(next) {}
            for n in 0..2 {
                if due[n] <= net.now.boot {
                    let (id, result) = net.send(n, 60 + (net.now.boot.as_nanos() % 1200) as usize);
                    prop_assert_ne!(result, Err(SealError::Queued), "lost its session at {:?}", net.now);
                    prop_assert!(result.is_ok(), "{:?}", result);
                    sent.push((id, 1 - n));
                    due[n] += ms([intervals.0, intervals.1][n]);
                }
            }
        }
        net.run(secs(2));
        for host in &net.hosts {
            let bad = host.events.iter().find(|event| !matches!(event, Event::SessionEstablished { .. }));
            prop_assert_eq!(bad, None);
            // Every 120 s and a bit; lost keepalives make the sender look for the peer more often.
            let rekeys = host.established();
            prop_assert!(rekeys >= 600 && (loss > 0 || rekeys <= 720), "{} sessions in a day", rekeys);
            // One wake-up a packet at most, beside one for each timer of each session.
            let wakes: u32 = host.wakes.values().sum();
            prop_assert!(wakes < 40_000, "{:?}", host.wakes);
        }
        let lost: std::collections::BTreeSet<u64> = net.lost.iter().copied().collect();
        for (id, to) in sent {
            let times = net.hosts[to].got.get(&id).copied().unwrap_or(0);
            prop_assert_eq!(times, u32::from(!lost.contains(&id)), "packet {}", id);
        }
    }

    #[test]
    fn both_start_at_once_over_any_delays_and_settle_on_one_session(
        seed in any::<u64>(),
        delay in (1u64..200, 0u64..300),
        loss in 0u32..300,
        skew in 0u64..400,
    ) {
        let mut net = Net::new(seed, None, [None, None]);
        net.link = Link { loss, duplicate: 50, delay_ms: (delay.0, delay.0 + delay.1) };
        net.post(0);
        net.run(ms(skew));
        net.post(1);
        // Six minutes of traffic both ways from there: never without a session again once both have one.
        let mut both = false;
        for _ in 0..360 {
            net.run(secs(1));
            for n in 0..2 {
                let result = net.send(n, 60).1;
                prop_assert!(!both || result.is_ok(), "{:?} at {:?}", result, net.now);
            }
            both = net.hosts.iter().all(|host| host.device.has_session(host.peer, net.now));
        }
        net.link = Link { delay_ms: (20, 20), ..Link::default() };
        net.run(secs(1));
        // One of them renews: three sessions in six minutes, a few more when the link lost messages.
        let initiations = net.hosts.iter().map(|host| host.count(warren_engine::wg::TransmitKind::Initiation)).sum::<usize>();
        if loss < 10 {
            prop_assert!(initiations <= 7, "{} initiations", initiations);
        }
    }
}
