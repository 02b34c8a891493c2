//! Nine kinds of network with each other, in virtual time: NAT time-outs from 10 s to 5 min, routers that start anew, a
//! relay that goes away, machines that sleep, silence, bad links.
//!
//! `WARREN_SIM_SEED=n` runs that seed alone (`cargo xtask sim n`); `WARREN_SIM_SEEDS=n` runs another number of seeds.

use std::collections::BTreeMap;
use std::sync::Mutex;

use warren_netns_tests::sim::matrix::{Kind, Table, run};

/// In CI; a thousand take half an hour.
const SEEDS: u64 = 40;

fn env(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name} must be a number")))
}

#[test]
fn every_kind_of_network_reaches_every_other_as_well_as_can_be() {
    let seeds: Vec<u64> = match env("WARREN_SIM_SEED") {
        Some(seed) => vec![seed],
        None => (1..=env("WARREN_SIM_SEEDS").unwrap_or(SEEDS)).collect(),
    };
    let queue = Mutex::new(seeds.into_iter());
    let total = Mutex::new(BTreeMap::<(Kind, Kind), [u32; 4]>::new());
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let next = queue.lock().unwrap().next();
                    let Some(seed) = next else { break };
                    let table = run(seed); // before the lock is taken, or one thread works at a time
                    add(&mut total.lock().unwrap(), &table);
                }
            });
        }
    });
    print_table(&total.lock().unwrap());
}

/// The same seed lives the same life: failures can be replayed.
#[test]
fn a_matrix_is_decided_by_its_seed() {
    assert_eq!(run(7), run(7));
}

fn add(total: &mut BTreeMap<(Kind, Kind), [u32; 4]>, table: &Table) {
    for (kinds, cell) in table {
        let sums = total.entry(*kinds).or_default();
        let counts = [cell.direct, cell.relayed, cell.lucky, cell.unlucky];
        sums.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
    }
}

#[expect(clippy::print_stdout, reason = "the result of a long run")]
fn print_table(total: &BTreeMap<(Kind, Kind), [u32; 4]>) {
    println!("{:<42} {:>8} {:>8} {:>8} {:>8}", "pair", "direct", "relayed", "guessed", "missed");
    for ((a, b), [direct, relayed, lucky, unlucky]) in total {
        println!("{:<42} {direct:>8} {relayed:>8} {lucky:>8} {unlucky:>8}", format!("{a:?} - {b:?}"));
    }
}
