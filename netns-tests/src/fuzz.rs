//! What the fuzz targets share: how many inputs, how an input tampers with a good message, and the committed corpus.
//!
//! `tests/__fuzz__/TARGET/corpus` holds the good messages that a target starts from, made from golden frames and fixed
//! keys, and inputs that once failed. They run before the random ones, and a coverage-guided fuzzer
//! (`cargo bolero test TARGET`) starts from them.

use std::path::{Path, PathBuf};

use data_encoding::HEXLOWER_PERMISSIVE;

/// Inputs of a target whose input costs microseconds, where nothing else is asked for. Unit: inputs.
pub const INPUTS: usize = 20_000;
/// Longest message that tampering makes longer still. Unit: bytes.
const MAX_GROWN: usize = 65_536;
/// Most edits one input makes: more leave nothing of the message. Unit: edits.
const MAX_EDITS: usize = 64;

/// Inputs of a target whose input costs `cost` times what a small decoder's costs: `WARREN_FUZZ_ITERATIONS`, or that
/// share of [`INPUTS`].
pub fn inputs(cost: usize) -> usize {
    let asked = std::env::var("WARREN_FUZZ_ITERATIONS").ok().and_then(|text| text.parse().ok());
    asked.unwrap_or(INPUTS / cost)
}

/// Applies `input` as a list of edits to `seed`: flips bits, cuts, repeats, inserts, appends.
pub fn tamper(seed: &[u8], input: &[u8]) -> Vec<u8> {
    let mut out = seed.to_vec();
    for edit in input.chunks_exact(4).take(MAX_EDITS) {
        let at = usize::from(u16::from_be_bytes([edit[1], edit[2]])) % out.len().max(1);
        match edit[0] % 5 {
            0 if !out.is_empty() => out[at] ^= edit[3].max(1),
            1 => out.truncate(at),
            2 if out.len() < MAX_GROWN => out.extend_from_within(at..),
            3 if out.len() < MAX_GROWN => out.insert(at, edit[3]),
            4 if out.len() < MAX_GROWN => out.extend_from_slice(input),
            _ => {}
        }
    }
    out
}

/// Runs `target` over `input` itself and over each of `seeds` tampered with by `input`.
pub fn each(input: &[u8], seeds: &[Vec<u8>], target: impl Fn(&[u8])) {
    target(input);
    for seed in seeds {
        target(&tamper(seed, input));
    }
}

/// For targets too costly for [`each`]: the seed that the first byte of `input` names, tampered with by the rest.
pub fn pick(input: &[u8], seeds: &[Vec<u8>]) -> Vec<u8> {
    match (input.split_first(), seeds.len()) {
        (None, _) | (_, 0) => input.to_vec(),
        (Some((which, rest)), count) => tamper(&seeds[usize::from(*which) % count], rest),
    }
}

/// The golden frames in the file `name`, one a line unless a frame takes several, as the first release sent them.
///
/// # Panics
/// There is no such file.
pub fn golden(name: &str) -> Vec<u8> {
    let path = root().join("../common/tests/golden").join(format!("{name}.hex"));
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let digits: String = text.split_whitespace().collect();
    HEXLOWER_PERMISSIVE
        .decode(digits.as_bytes())
        .unwrap_or_else(|e| panic!("{} is not hexadecimal: {e}", path.display()))
}

/// The good messages of `target`, after a check that its committed corpus holds them. With `WARREN_BLESS` set, those
/// that are missing are written, never others.
///
/// # Panics
/// The corpus lacks one of them, or holds something else under its name.
pub fn corpus(target: &str, seeds: Vec<(&str, Vec<u8>)>) -> Vec<Vec<u8>> {
    let dir = root().join("tests/__fuzz__").join(target).join("corpus");
    let mut out = Vec::with_capacity(seeds.len());
    for (name, seed) in seeds {
        let path = dir.join(name);
        if std::env::var_os("WARREN_BLESS").is_some() && !path.exists() {
            let written = std::fs::create_dir_all(&dir).and_then(|()| std::fs::write(&path, &seed));
            written.unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        }
        let held = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        assert!(held == seed, "{} is not the message that the target starts from", path.display());
        out.push(seed);
    }
    out
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tampering_is_bounded_and_an_empty_input_changes_nothing() {
        let seed: Vec<u8> = (0..100).collect();
        assert_eq!(tamper(&seed, &[]), seed);
        for kind in 0..5 {
            let input: Vec<u8> = [kind, 0, 3, 7].repeat(4 * MAX_EDITS);
            assert!(tamper(&seed, &input).len() <= 2 * MAX_GROWN + input.len());
            assert!(tamper(&[], &input).len() <= 2 * MAX_GROWN + input.len());
        }
        assert_eq!(pick(&[], std::slice::from_ref(&seed)), Vec::<u8>::new());
        assert_eq!(pick(&[9], std::slice::from_ref(&seed)), seed);
    }
}
