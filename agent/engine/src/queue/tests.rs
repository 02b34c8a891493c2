use std::collections::{BTreeMap, VecDeque};

use proptest::prelude::*;

use super::*;

const START: Instant = Instant::from_nanos(1_000_000_000);

/// An IPv4 UDP packet of `flow`, with a number in it; `len` is at least 40.
fn packet(flow: u16, number: u32, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    out[0] = 0x45;
    out[9] = 17;
    out[16..18].copy_from_slice(&flow.to_be_bytes());
    out[20..22].copy_from_slice(&flow.to_be_bytes());
    out[28..32].copy_from_slice(&number.to_be_bytes());
    out
}

fn put(queue: &mut TunQueue, packet: &[u8]) {
    queue.space()[..packet.len()].copy_from_slice(packet);
    queue.commit(packet.len(), 0);
}

fn flow_and_number(packet: &[u8]) -> (u16, u32) {
    (
        u16::from_be_bytes(packet[16..18].try_into().unwrap()),
        u32::from_be_bytes(packet[28..32].try_into().unwrap()),
    )
}

fn queue() -> TunQueue {
    TunQueue::new([3, 4])
}

#[test]
fn a_ping_does_not_wait_behind_a_download() {
    let mut queue = queue();
    for n in 0..10 {
        put(&mut queue, &packet(1, n, 60_000));
    }
    // The download has had its turn already.
    assert_eq!(flow_and_number(queue.pop(START).unwrap().frame), (1, 0));
    put(&mut queue, &packet(2, 0, 84));
    assert_eq!(flow_and_number(queue.pop(START).unwrap().frame), (2, 0));
    assert_eq!(flow_and_number(queue.pop(START).unwrap().frame), (1, 1));
}

#[test]
fn busy_flows_get_the_same_number_of_bytes() {
    let mut queue = queue();
    let mut sent = BTreeMap::<u16, usize>::new();
    let sizes = [(1u16, 60_000usize), (2, 1_400), (3, 20_000)];
    let mut waiting = BTreeMap::from([(1u16, 0usize), (2, 0), (3, 0)]);
    let mut number = 0;
    for _ in 0..20_000 {
        for (flow, size) in sizes {
            while waiting[&flow] < 120_000 {
                number += 1;
                put(&mut queue, &packet(flow, number, size));
                *waiting.get_mut(&flow).unwrap() += size;
            }
        }
        let got = queue.pop(START).unwrap();
        let flow = flow_and_number(got.frame).0;
        *waiting.get_mut(&flow).unwrap() -= got.frame.len();
        *sent.entry(flow).or_default() += got.frame.len();
    }
    assert_eq!(queue.dropped(), 0);
    let most = *sent.values().max().unwrap() as f64;
    assert!(sent.values().all(|bytes| *bytes as f64 > most * 0.9), "{sent:?}");
}

#[test]
fn a_full_queue_drops_its_oldest_and_counts_them() {
    let mut queue = queue();
    for n in 0..200 {
        put(&mut queue, &packet(1, n, 60_000));
    }
    let fit = std::iter::from_fn(|| queue.pop(START).map(|w| flow_and_number(w.frame).1)).collect::<Vec<_>>();
    assert!(fit.len() >= (MAX_WAITING_BYTES - 2 * MAX_FRAME) / 60_000, "{}", fit.len());
    assert_eq!(fit, (200 - fit.len() as u32..200).collect::<Vec<_>>());
    assert_eq!(queue.dropped(), 200 - fit.len() as u64);

    let mut queue = self::queue();
    for n in 0..MAX_WAITING_FRAMES as u32 + 10 {
        put(&mut queue, &packet(1, n, 40));
    }
    assert_eq!(queue.dropped(), 10);
}

#[test]
fn a_read_that_brings_nothing_costs_nothing() {
    let mut queue = queue();
    let mut number = 0;
    while queue.dropped() == 0 {
        put(&mut queue, &packet(1, number, 60_000));
        number += 1;
    }
    let before = queue.dropped();
    queue.space();
    assert_eq!(queue.dropped(), before);
    put(&mut queue, &packet(2, 7, 60_000));
    let dropped = queue.dropped();
    assert!(dropped > before);
    let rest: Vec<_> = std::iter::from_fn(|| queue.pop(START).map(|w| flow_and_number(w.frame))).collect();
    assert!(rest.contains(&(2, 7)));
    assert_eq!(rest.len() as u64, u64::from(number) + 1 - dropped);
}

#[test]
fn only_a_wait_that_lasts_is_told_and_ever_more_often() {
    let mut standing = Standing::new(1_000);
    let step = Duration::from_micros(100);
    let mut now = START;
    // A burst: too long, but not for an interval.
    while now < START + INTERVAL.mul_f64(0.9) {
        assert!(!standing.observe(now, 3_000, false));
        now += step;
    }
    assert!(!standing.observe(now, 0, true));
    now += PAUSE;
    assert!(!standing.observe(now, 10, false));
    let mut told = Vec::new();
    let began = now;
    while now < began + 12 * INTERVAL {
        if standing.observe(now, 3_000, false) {
            told.push(now);
        }
        now += step;
    }
    assert!(told[0] >= began + INTERVAL && told[0] < began + INTERVAL + 2 * step);
    let pauses: Vec<Duration> = told.windows(2).map(|w| w[1].since(w[0])).collect();
    assert!(pauses.windows(2).all(|w| w[1] <= w[0] + step), "{pauses:?}");
    assert!(told.len() > 14, "{}", told.len());
}

#[test]
fn who_comes_right_after_a_long_queue_is_not_told() {
    let mut standing = Standing::new(1_000);
    let mut now = START;
    while now < START + 2 * INTERVAL {
        standing.observe(now, 3_000, false);
        now += Duration::from_micros(100);
    }
    // The one who filled it is done; the last that was seen of it was a long queue. Others come, a few packets at a time.
    for _ in 0..200 {
        assert!(!standing.observe(now, 0, true));
        assert!(!standing.observe(now, 100, false));
        now += Duration::from_millis(1);
    }
}

#[test]
fn a_fragment_overtakes_nothing_of_its_addresses() {
    for ipv6 in [false, true] {
        let make = |number: u32, fragment: bool| {
            let mut out = packet(1, 0, 1_000);
            if ipv6 {
                out[0] = 0x60;
                out[6] = if fragment { 44 } else { 17 };
            } else if fragment {
                out[6] = 0x20;
            }
            out[500..504].copy_from_slice(&number.to_be_bytes());
            out
        };
        let mut queue = queue();
        for n in 0..40 {
            put(&mut queue, &make(n, n % 3 == 1));
        }
        let order = std::iter::from_fn(|| {
            queue.pop(START).map(|w| u32::from_be_bytes(w.frame[500..504].try_into().unwrap()))
        });
        assert!(order.eq(0..40));
    }
}

/// Sender and tunnel take turns on one core: each turn's frames come at once, and all are gone before the next.
#[test]
fn a_queue_that_stands_every_other_millisecond_stands() {
    let told = |gap: Duration, frames: u32| {
        let mut queue = queue();
        let mut now = START;
        for turn in 0..100 {
            for n in 0..frames {
                put(&mut queue, &packet(1, turn * 100 + n, 60_000));
            }
            while queue.pop(now).is_some() {
                now += Duration::from_micros(60);
            }
            now += gap;
        }
        queue.told()
    };
    assert!(told(Duration::from_millis(1), 14) > 5);
    assert_eq!(told(Duration::from_millis(1), 4), 0, "short");
    assert_eq!(told(PAUSE, 14), 0, "bursts with pauses");
}

/// A sender that keeps as much on the way as it is let, and slows down when told: the wait stays near the target.
#[test]
fn a_download_that_listens_keeps_the_queue_short() {
    let mut queue = queue();
    // 2.4 Gbit/s: 60 000 bytes each 200 us.
    let service = Duration::from_micros(200);
    let (mut window, mut under_way, mut number) = (4f64, 0usize, 0u32);
    let mut now = START;
    let mut waits = VecDeque::new();
    let mut sent_at = BTreeMap::new();
    for turn in 0..20_000 {
        while under_way < window as usize {
            number += 1;
            sent_at.insert(number, now);
            put(&mut queue, &packet(1, number, 60_000));
            under_way += 1;
        }
        now += service;
        let Some(waited) = queue.pop(now) else { continue };
        let (tell, number) = (waited.tell, flow_and_number(waited.frame).1);
        under_way -= 1;
        window += 1.0 / window;
        if tell {
            window = (window * 0.7).max(2.0);
        }
        if turn > 10_000 {
            waits.push_back(now.since(sent_at[&number]));
        }
        sent_at.retain(|n, _| *n >= number);
    }
    waits.make_contiguous().sort_unstable();
    let median = waits[waits.len() / 2];
    assert!(median < Duration::from_millis(2), "{median:?}");
    assert!(queue.dropped() < 5, "at first, before it is told: {}", queue.dropped());
}

fn take(
    queue: &mut TunQueue,
    now: Instant,
    model: &mut BTreeMap<u16, VecDeque<u32>>,
    waiting: &mut BTreeMap<u32, (u16, usize)>,
) -> Result<(), TestCaseError> {
    let Some(waited) = queue.pop(now) else {
        prop_assert!(waiting.is_empty());
        return Ok(());
    };
    let (flow, number) = flow_and_number(waited.frame);
    prop_assert_eq!(model.get_mut(&flow).unwrap().pop_front(), Some(number));
    let (_, len) = waiting.remove(&number).unwrap();
    prop_assert_eq!(&*waited.frame, &packet(flow, number, len)[..]);
    Ok(())
}

proptest! {
    #[test]
    fn nothing_is_lost_doubled_changed_or_overtaken_within_its_flow(
        steps in prop::collection::vec((0u16..6, 40usize..65_500, 0u8..3), 1..300),
    ) {
        let mut queue = queue();
        let mut model: BTreeMap<u16, VecDeque<u32>> = BTreeMap::new();
        // Frames that wait, in the order they came.
        let mut waiting: BTreeMap<u32, (u16, usize)> = BTreeMap::new();
        let mut now = START;
        let mut dropped = 0;
        for (number, (flow, len, what)) in (0u32..).zip(steps) {
            now += Duration::from_micros(50);
            if what < 2 {
                put(&mut queue, &packet(flow, number, len));
                for _ in dropped..queue.dropped() {
                    let (oldest, (flow, _)) = waiting.pop_first().unwrap();
                    prop_assert_eq!(model.get_mut(&flow).unwrap().pop_front(), Some(oldest));
                }
                dropped = queue.dropped();
                model.entry(flow).or_default().push_back(number);
                waiting.insert(number, (flow, len));
            } else {
                take(&mut queue, now, &mut model, &mut waiting)?;
            }
        }
        while !waiting.is_empty() {
            take(&mut queue, now, &mut model, &mut waiting)?;
        }
        prop_assert!(queue.pop(now).is_none() && queue.is_empty());
    }

    #[test]
    fn any_bytes_find_a_bucket(bytes in prop::collection::vec(any::<u8>(), 0..80), at in 0usize..100) {
        let mut queue = queue();
        queue.space()[..bytes.len()].copy_from_slice(&bytes);
        queue.commit(bytes.len(), at);
        prop_assert_eq!(&*queue.pop(START).unwrap().frame, &bytes[..]);
    }
}
