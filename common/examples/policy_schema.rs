//! Prints the JSON schema of a policy file; `common/src/policy/policy.schema.json` is its checked-in output.

use std::io::Write as _;

fn main() -> std::io::Result<()> {
    std::io::stdout().lock().write_all(warren_common::policy::json_schema().as_bytes())
}
