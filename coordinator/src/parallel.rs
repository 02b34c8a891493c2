//! Work on many things at once, by all processors.

use rayon::prelude::*;

/// From how many things on they are worked on side by side: fewer are done sooner than threads are woken.
pub(crate) const MANY: usize = 32;

/// What `work` makes of each of `items`, in their order.
pub(crate) fn side_by_side<T: Send, R: Send>(items: Vec<T>, work: impl Fn(T) -> R + Send + Sync) -> Vec<R> {
    if items.len() < MANY {
        items.into_iter().map(work).collect()
    } else {
        items.into_par_iter().map(work).collect()
    }
}
