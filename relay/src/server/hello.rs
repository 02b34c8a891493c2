//! Answers to the first messages of handshakes: each takes an agreement and a signature, some 100 µs.
//!
//! Anybody can ask for one, as often as a line carries. They are made one at a time by a thread that comes after all
//! others, and that rests after each for as long as it took: what answers strangers may be slow, and what carries the
//! devices' packets is not held up by it. Thousands that come back after a restart are still answered within a second or two.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, mpsc};
use std::thread;

use tokio::runtime::Handle;
use tokio::sync::{Mutex, OwnedMutexGuard, oneshot};

use crate::os::used;

/// How much nicer its thread is than those of the runtime, if there is room for it.
const NICER: i32 = 10;
/// The nicest that there is.
const NICEST: i32 = 19;

/// The thread. It ends when this is gone.
#[derive(Debug)]
pub(super) struct Hellos {
    /// Who holds it is answered. Bounds what waits: who leaves while it is answered keeps the turn until then.
    turn: Arc<Mutex<()>>,
    jobs: mpsc::Sender<Job>,
}

struct Job {
    answer: Box<dyn FnOnce() + Send>,
    _turn: OwnedMutexGuard<()>,
}

impl Hellos {
    /// Inside a tokio runtime, whose context the answers are made in.
    ///
    /// # Errors
    /// There is no thread to be had.
    pub(super) fn start() -> io::Result<Self> {
        let (sender, jobs) = mpsc::channel();
        let context = Handle::current();
        thread::Builder::new().name("relay-hello".to_owned()).spawn(move || {
            let _context = context.enter();
            be_nice();
            answer_all(&jobs);
        })?;
        Ok(Self { turn: Arc::default(), jobs: sender })
    }

    /// What `answer` returns, when its turn has come. `None` if it panicked.
    pub(super) async fn answer<T: Send + 'static>(
        &self,
        answer: impl FnOnce() -> T + Send + 'static,
    ) -> Option<T> {
        let turn = self.turn.clone().lock_owned().await;
        let (sender, answered) = oneshot::channel();
        let answer = move || {
            if !sender.is_closed() {
                drop(sender.send(answer())); // who asked may be gone by now
            }
        };
        self.jobs.send(Job { answer: Box::new(answer), _turn: turn }).ok()?;
        answered.await.ok()
    }
}

fn answer_all(jobs: &mpsc::Receiver<Job>) {
    for Job { answer, _turn } in jobs {
        let began = used();
        // As in a task of the runtime: a panic is reported, and ends this handshake and no other.
        let _ = catch_unwind(AssertUnwindSafe(answer));
        thread::sleep(used().saturating_sub(began));
    }
}

/// Best effort: of this thread alone, on Linux.
fn be_nice() {
    let before = rustix::process::getpriority_process(None).unwrap_or(0);
    let _ = rustix::process::setpriority_process(None, (before + NICER).min(NICEST));
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::task::JoinSet;

    use super::*;

    #[tokio::test]
    async fn answers_one_at_a_time_and_not_on_the_runtimes_threads() {
        let (hellos, running) = (Arc::new(Hellos::start().unwrap()), Arc::new(AtomicUsize::new(0)));
        let own = thread::current().id();
        let mut asked = JoinSet::new();
        for n in 0..20 {
            let (hellos, running) = (hellos.clone(), running.clone());
            asked.spawn(async move {
                let answer = move || {
                    assert_eq!(running.fetch_add(1, Ordering::SeqCst), 0);
                    assert_ne!(thread::current().id(), own);
                    // What an answer begins runs on the runtime.
                    assert!(Handle::try_current().is_ok());
                    running.fetch_sub(1, Ordering::SeqCst);
                    n
                };
                hellos.answer(answer).await
            });
        }
        let mut answers = asked.join_all().await;
        answers.sort_unstable();
        assert_eq!(answers, (0..20).map(Some).collect::<Vec<_>>());
    }

    #[tokio::test]
    async fn one_that_panics_is_the_last_of_nobody() {
        let hellos = Hellos::start().unwrap();
        assert_eq!(hellos.answer(|| assert!(std::hint::black_box(false), "as a test")).await, None);
        assert_eq!(hellos.answer(|| 3).await, Some(3));
    }

    #[tokio::test]
    async fn who_left_is_not_answered_and_holds_up_nobody() {
        let hellos = Hellos::start().unwrap();
        let (release, held) = mpsc::channel::<()>();
        let answered = Arc::new(AtomicUsize::new(0));
        let mut first = Box::pin(hellos.answer(move || held.recv()));
        assert!(futures_util::poll!(&mut first).is_pending());
        // It has its turn already.
        drop(first);
        let counted = answered.clone();
        let mut second = Box::pin(hellos.answer(move || counted.fetch_add(1, Ordering::SeqCst)));
        assert!(futures_util::poll!(&mut second).is_pending());
        drop(second);
        release.send(()).unwrap();
        assert_eq!(hellos.answer(|| 3).await, Some(3));
        assert_eq!(answered.load(Ordering::SeqCst), 0);
    }
}
