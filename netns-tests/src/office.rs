//! An office that lets nothing out but HTTP: a router whose LAN has no way to the internet, and a real tinyproxy on it.

use std::fmt::Write as _;
use std::fs;
use std::time::Duration;

use anyhow::Result;

use crate::lab::{Egress, NatKind, Process, Refusal, Router, RouterSpec};

/// The program with the Debian package that holds it.
pub const TINYPROXY: (&str, &str) = ("tinyproxy", "tinyproxy");

/// Where the proxy listens.
pub const PORT: u16 = 3128;

/// Bound for a start; only a failing run waits this long.
const LIMIT: Duration = Duration::from_secs(30);

/// A router whose LAN reaches the router itself only.
pub fn router() -> RouterSpec {
    RouterSpec::new(NatKind::PortRestricted).egress(Egress::Closed { refusal: Refusal::Drop })
}

/// What a proxy allows, and whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HttpProxy<'a> {
    /// User and password that it wants (Basic), if any.
    pub credentials: Option<(&'a str, &'a str)>,
    /// Ports that it connects to on request.
    pub ports: &'a [u16],
}

impl HttpProxy<'_> {
    /// Starts it on a router's LAN side.
    ///
    /// # Errors
    /// It does not come to serve.
    pub fn start(self, router: &Router) -> Result<Process> {
        let gateway = router.lan().gateway()?;
        let mut config = format!(
            "Port {PORT}\nListen {gateway}\nAllow {}\nMaxClients 100\nTimeout 600\nLogLevel Info\n",
            router.lan().subnet()
        );
        for port in self.ports {
            writeln!(config, "ConnectPort {port}")?;
        }
        if let Some((user, password)) = self.credentials {
            writeln!(config, "BasicAuth {user} {password}")?;
        }
        let file = router.dir().join("tinyproxy.conf");
        fs::write(&file, config)?;
        let mut command = router.command(TINYPROXY.0);
        command.arg("-d").arg("-c").arg(&file);
        let mut process = router.spawn(command)?;
        process.wait_for_line("Accepting connections", LIMIT)?;
        Ok(process)
    }
}

/// The URL of the proxy on a router, with what stands before the `@` if there is anything.
///
/// # Errors
/// Never for a router that was made.
pub fn url(router: &Router, user_info: &str) -> Result<String> {
    let at = if user_info.is_empty() { "" } else { "@" };
    Ok(format!("http://{user_info}{at}{}:{PORT}", router.lan().gateway()?))
}
