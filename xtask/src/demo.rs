//! `cargo xtask demo`: installs what is missing, builds, and shows the whole product on real packets.

use std::process::Command;

use anyhow::Result;

use crate::setup;
use crate::shell::{attached, cargo, root, say};
use crate::test::in_namespaces;

pub(crate) fn run(keep: bool) -> Result<bool> {
    setup::for_demo()?;
    say("building (minutes the first time)");
    let mut build = cargo();
    if !attached(build.args(["build", "--locked", "--workspace", "--bins"]))? {
        return Ok(false);
    }
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), Into::into);
    let mut demo = Command::new(target.join("debug/warren-demo"));
    if keep {
        demo.arg("--keep");
    }
    attached(&mut in_namespaces(demo))
}
