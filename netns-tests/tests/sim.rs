//! Two hundred devices, a thousand random steps, fifty seeds, in virtual time.
//!
//! `WARREN_SIM_SEED=n` runs that seed alone (`cargo xtask sim n`); `WARREN_SIM_SEEDS=n` runs another number of seeds.

use std::sync::Mutex;

use warren_netns_tests::sim::scenario::{Plan, Summary, run};

const SEEDS: u64 = 50;
const PLAN: Plan = Plan { devices: 200, steps: 1_000, edges_per_device: 3 };

fn env(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name} must be a number")))
}

#[test]
fn random_lives_keep_every_property() {
    let seeds: Vec<u64> = match env("WARREN_SIM_SEED") {
        Some(seed) => vec![seed],
        None => (1..=env("WARREN_SIM_SEEDS").unwrap_or(SEEDS)).collect(),
    };
    let queue = Mutex::new(seeds.into_iter());
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let next = queue.lock().unwrap().next();
                    let Some(seed) = next else { break };
                    print_summary(seed, &run(seed, PLAN));
                }
            });
        }
    });
}

/// The same seed lives the same life: failures can be replayed.
#[test]
fn a_life_is_decided_by_its_seed() {
    let plan = Plan { devices: 20, steps: 100, edges_per_device: 3 };
    assert_eq!(run(7, plan), run(7, plan));
}

#[expect(clippy::print_stdout, reason = "progress of a long run")]
fn print_summary(seed: u64, summary: &Summary) {
    println!("seed {seed}: {summary:?}");
}
