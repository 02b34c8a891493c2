//! The recorded decisions of a hosted control plane. They are others' data and stay outside the repository.
#![expect(
    clippy::expect_used,
    clippy::print_stdout,
    reason = "helpers of tests: a failure is a failed test, and a skip must be said"
)]

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

/// Every case, in the order of its path; none, after saying `skipped`, where they are absent.
pub(crate) fn all<T: DeserializeOwned>() -> Option<Vec<T>> {
    let Some(dir) = dir() else {
        println!(
            "skipped: no policy cases (set WARREN_SHARED, or put ../shared/policy-cases beside the repository)"
        );
        return None;
    };
    let mut files = Vec::new();
    collect(&dir, &mut files);
    files.sort();
    assert!(!files.is_empty(), "no cases in {}", dir.display());
    let read = |file: &PathBuf| {
        let text = std::fs::read_to_string(file).expect("readable");
        serde_json::from_str(&text).expect("a case")
    };
    Some(files.iter().map(read).collect())
}

fn dir() -> Option<PathBuf> {
    if let Some(shared) = std::env::var_os("WARREN_SHARED") {
        return Some(Path::new(&shared).join("policy-cases/cases")).filter(|d| d.is_dir());
    }
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .ancestors()
        .map(|dir| dir.join("shared/policy-cases/cases"))
        .find(|dir| dir.is_dir())
}

fn collect(dir: &Path, out: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).expect("a directory") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            collect(&path, out);
        } else if path.extension().is_some_and(|e| e == "json") {
            out.push(path);
        }
    }
}
