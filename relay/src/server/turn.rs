//! What a task may do before others get their turn. A stream whose bytes are there already is read without ever waiting,
//! and the threads that do so are those that pass the others' packets on.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::task::yield_now;

/// Counts what a task does in one turn.
#[derive(Debug)]
pub(super) struct Turn {
    most: usize,
    done: usize,
}

impl Turn {
    pub(super) const fn of(most: usize) -> Self {
        Self { most, done: 0 }
    }

    /// One more is done.
    pub(super) async fn one(&mut self) {
        self.done += 1;
        if self.done == self.most {
            self.done = 0;
            yield_now().await;
        }
    }
}

/// The same for what is polled: every so often it waits until others had their turn, and the sockets were looked at.
#[derive(Default)]
pub(super) struct Pause(Option<Pin<Box<dyn Future<Output = ()> + Send + Sync>>>);

impl Pause {
    /// Begins a pause, unless there is one.
    pub(super) fn begin(&mut self) {
        self.0.get_or_insert_with(|| Box::pin(yield_now()));
    }

    /// Ready when there is none (any more).
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if let Some(pause) = &mut self.0 {
            ready!(pause.as_mut().poll(cx));
            self.0 = None;
        }
        Poll::Ready(())
    }
}

impl std::fmt::Debug for Pause {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Pause")
    }
}
