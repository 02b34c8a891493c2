//! Threads that help the one who owns the engine with a turn's work.
//!
//! Whoever has jobs works on them as well and takes the next one whenever one is done, so that a helper that the host
//! doesn't run just now delays nothing that it hasn't begun.

use std::collections::VecDeque;
use std::num::NonZero;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

/// Helpers at most, a count: reading, judging and writing are done by one thread, which more would wait for.
const MAX_HELPERS: usize = 3;

/// See the module. `J` is what has to be done.
#[derive(Debug)]
pub struct Crew<J> {
    shared: Arc<Shared<J>>,
    helpers: usize,
    threads: Vec<thread::JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared<J> {
    state: Mutex<State<J>>,
    /// There is work, or the end has come.
    work: Condvar,
    /// A helper is done with something.
    done: Condvar,
    run: fn(&mut J),
}

#[derive(Debug)]
struct State<J> {
    todo: VecDeque<J>,
    done: Vec<J>,
    over: bool,
}

impl<J> Shared<J> {
    /// A helper that panicked ends the process (see `help`), so that what it left can't be seen.
    fn lock(&self) -> MutexGuard<'_, State<J>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<J: Send + 'static> Crew<J> {
    /// As many helpers as there are processors for this process beside the caller's, at most three; `run` does a job.
    pub fn new(run: fn(&mut J)) -> Self {
        let processors = thread::available_parallelism().map_or(1, NonZero::get);
        Self::with_helpers(processors.saturating_sub(1).min(MAX_HELPERS), run)
    }

    /// This many helpers. Their threads start with the first work.
    pub fn with_helpers(helpers: usize, run: fn(&mut J)) -> Self {
        let state = Mutex::new(State { todo: VecDeque::new(), done: Vec::new(), over: false });
        let shared = Arc::new(Shared { state, work: Condvar::new(), done: Condvar::new(), run });
        Self { shared, helpers, threads: Vec::new() }
    }

    /// Who can work at once, the caller included.
    pub const fn size(&self) -> usize {
        self.helpers + 1
    }

    /// Does all of `jobs`, which come back in any order. Blocks until they are done.
    pub fn run(&mut self, jobs: &mut Vec<J>) {
        if jobs.len() > 1 {
            self.start();
        }
        let count = jobs.len();
        let mut state = self.shared.lock();
        state.todo.extend(jobs.drain(..));
        for _ in 1..count {
            self.shared.work.notify_one();
        }
        while let Some(mut job) = state.todo.pop_front() {
            drop(state);
            (self.shared.run)(&mut job);
            state = self.shared.lock();
            state.done.push(job);
        }
        while state.done.len() < count {
            state = self.shared.done.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        jobs.append(&mut state.done);
    }

    fn start(&mut self) {
        while self.threads.len() < self.helpers {
            let shared = Arc::clone(&self.shared);
            let name = format!("helper-{}", self.threads.len() + 1);
            match thread::Builder::new().name(name).spawn(move || help(&shared)) {
                Ok(thread) => self.threads.push(thread),
                Err(e) => {
                    tracing::warn!("no thread to help with packets: {e}");
                    self.helpers = self.threads.len();
                }
            }
        }
    }
}

impl<J> Drop for Crew<J> {
    fn drop(&mut self) {
        self.shared.lock().over = true;
        self.shared.work.notify_all();
        for thread in self.threads.drain(..) {
            // One that panicked has ended the process.
            let _ = thread.join();
        }
    }
}

/// A job that is lost with its thread would be waited for in vain, and it holds the only copy of a session.
struct EndsWithMe;

impl Drop for EndsWithMe {
    fn drop(&mut self) {
        if thread::panicking() {
            std::process::abort();
        }
    }
}

fn help<J>(shared: &Shared<J>) {
    let _end = EndsWithMe;
    let mut state = shared.lock();
    while !state.over {
        match state.todo.pop_front() {
            Some(mut job) => {
                drop(state);
                (shared.run)(&mut job);
                state = shared.lock();
                state.done.push(job);
                shared.done.notify_one();
            }
            None => state = shared.work.wait(state).unwrap_or_else(PoisonError::into_inner),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_job_is_done_once_and_comes_back() {
        for helpers in [0, 1, 3] {
            let mut crew = Crew::with_helpers(helpers, |n: &mut u64| *n *= 3);
            for count in [0, 1, 2, 7, 100] {
                let mut jobs: Vec<u64> = (0..count).collect();
                crew.run(&mut jobs);
                jobs.sort_unstable();
                assert_eq!(jobs, (0..count).map(|n| n * 3).collect::<Vec<_>>());
            }
            assert!(crew.threads.len() == helpers);
        }
    }

    #[test]
    fn two_work_at_the_same_time() {
        // Each waits for the other: one after the other they would never end.
        static BOTH: std::sync::Barrier = std::sync::Barrier::new(2);
        let mut crew = Crew::with_helpers(1, |(): &mut ()| {
            BOTH.wait();
        });
        crew.run(&mut vec![(), ()]);
    }
}
