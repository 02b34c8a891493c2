//! What the agent has changed on the host: noted before each change, so that it can be undone after a kill.

use serde::{Deserialize, Serialize};

use crate::clock;
use crate::problem::Problem;
use crate::state::StateDir;

/// One change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Change {
    /// Tables of one name in nftables' families `inet` and `arp`.
    Nft {
        /// Its name.
        table: String,
    },
    /// All routes of a routing table of ours.
    Routes {
        /// Its number.
        table: u32,
    },
    /// A routing rule.
    Rule {
        /// Family.
        ipv6: bool,
        /// Its priority.
        priority: u32,
        /// The mark that it excludes.
        mark: u32,
        /// The table that it sends to.
        table: u32,
    },
}

/// Changes in the order they were made.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Journal {
    /// The boot they were made in: a reboot undoes them all.
    boot_id: String,
    changes: Vec<Change>,
}

impl Journal {
    /// The journal of this boot.
    ///
    /// # Errors
    /// The file is damaged or unreadable.
    pub fn load(state: &StateDir) -> Result<Self, Problem> {
        let boot_id = clock::boot_id().unwrap_or_default();
        let found = state.journal::<Self>()?.filter(|j| j.boot_id == boot_id);
        Ok(found.unwrap_or(Self { boot_id, changes: Vec::new() }))
    }

    /// Notes changes that are about to be made. On disk when it returns.
    ///
    /// # Errors
    /// The disk is full: then the changes must not be made.
    pub fn note(&mut self, state: &StateDir, changes: &[Change]) -> Result<(), Problem> {
        let new: Vec<_> = changes.iter().filter(|c| !self.changes.contains(c)).cloned().collect();
        if new.is_empty() {
            return Ok(());
        }
        let mut next = self.clone();
        next.changes.extend(new);
        state.save_journal(Some(&next))?;
        *self = next;
        Ok(())
    }

    /// The changes, the latest first: the order to undo them in.
    pub fn latest_first(&self) -> impl Iterator<Item = &Change> {
        self.changes.iter().rev()
    }

    /// Everything is undone. Needs no space on the disk.
    ///
    /// # Errors
    /// The disk is unwritable; the changes will then be undone once more, which is harmless.
    pub fn clear(&mut self, state: &StateDir) -> Result<(), Problem> {
        self.changes.clear();
        state.save_journal::<Self>(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_on_disk_once_and_come_back_last_first() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(&dir.path().join("s")).unwrap();
        let (a, b) = (Change::Nft { table: "t".into() }, Change::Routes { table: 7 });
        let mut journal = Journal::load(&state).unwrap();
        journal.note(&state, &[a.clone(), b.clone()]).unwrap();
        journal.note(&state, std::slice::from_ref(&b)).unwrap();

        let mut after_kill = Journal::load(&state).unwrap();
        assert_eq!(after_kill, journal);
        assert_eq!(after_kill.latest_first().collect::<Vec<_>>(), [&b, &a]);
        after_kill.clear(&state).unwrap();
        assert_eq!(state.journal::<Journal>().unwrap(), None);
    }

    #[test]
    fn a_journal_of_another_boot_has_nothing_to_undo() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(&dir.path().join("s")).unwrap();
        let old = Journal { boot_id: "another".into(), changes: vec![Change::Routes { table: 7 }] };
        state.save_journal(Some(&old)).unwrap();
        assert_eq!(Journal::load(&state).unwrap().latest_first().next(), None);
    }
}
