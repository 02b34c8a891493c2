//! The lab's traffic programs tell the truth about what passed and how it ended.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use warren_netns_tests::lab::{self, Egress, Host, NatKind, Process, Refusal, RouterSpec};

/// Bound for what must happen; only a failing test waits this long.
const LIMIT: Duration = Duration::from_secs(20);

fn tool(host: &Host, args: &[&str]) -> Result<Process> {
    let mut command = host.command(env!("CARGO_BIN_EXE_lab-tool"));
    command.args(args);
    host.spawn(command)
}

fn server(host: &Host, verb: &str, port: u16) -> Result<(Process, String)> {
    let address = SocketAddr::from((host.v4(), port)).to_string();
    let mut process = tool(host, &[verb, &address])?;
    process.wait_for_line("listening", LIMIT)?;
    Ok((process, address))
}

/// The last line of a client, and whether it calls itself successful.
fn end(mut client: Process) -> Result<(Value, bool)> {
    let line = client.wait_for_line(r#""event":"end""#, LIMIT)?;
    Ok((serde_json::from_str(&line)?, client.wait(LIMIT)?.success()))
}

#[test]
fn a_stream_is_complete_refused_reset_or_stalled() -> Result<()> {
    lab::test("tcp", |lab| {
        let host = lab.host("S")?;
        let router = lab.router("R", RouterSpec::new(NatKind::PortRestricted))?;
        let inside = router.host("A")?;
        let (mut serving, address) = server(&host, "tcp-serve", 7)?;

        let (told, good) = end(tool(&inside, &["tcp-stream", &address, "--total", "1000003"])?)?;
        ensure!(good && told["how"] == "complete" && told["bytes"] == 1_000_003, "{told}");
        let served = serving.wait_for_line(r#""event":"end""#, LIMIT)?;
        ensure!(served.contains("\"bytes\":1000003") && served.contains("\"how\":\"eof\""), "{served}");

        let nobody = SocketAddr::from((host.v4(), 9)).to_string();
        let (told, good) = end(tool(&inside, &["tcp-stream", &nobody])?)?;
        ensure!(!good && told["how"] == "refused", "{told}");

        let mut endless = tool(&inside, &["tcp-stream", &address, "--rate", "100000"])?;
        endless.wait_for_line(r#""event":"echoed""#, LIMIT)?;
        serving.kill()?;
        let (told, good) = end(endless)?;
        // With unread data in its buffer a dying program resets, without it says goodbye.
        ensure!(!good && (told["how"] == "reset" || told["how"] == "eof"), "{told}");

        let (_serving, address) = server(&host, "tcp-serve", 8)?;
        let mut endless = tool(&inside, &["tcp-stream", &address, "--rate", "100000", "--stall", "1"])?;
        endless.wait_for_line(r#""event":"echoed""#, LIMIT)?;
        inside.unplug("eth0")?;
        let (told, good) = end(endless)?;
        ensure!(!good && told["how"] == "stalled", "{told}");
        Ok(())
    })
}

#[test]
fn a_datagram_is_answered_refused_or_prohibited() -> Result<()> {
    lab::test("udp", |lab| {
        let host = lab.host("S")?;
        let router = lab.router("R", RouterSpec::new(NatKind::Symmetric))?;
        let inside = router.host("A")?;
        let (_serving, address) = server(&host, "udp-echo", 7)?;
        let (told, good) = end(tool(&inside, &["udp-ping", &address, "--count", "3"])?)?;
        ensure!(good && told["received"] == 3, "{told}");

        let nobody = SocketAddr::from((host.v4(), 9)).to_string();
        let mut client = tool(&inside, &["udp-ping", &nobody])?;
        let lost = client.wait_for_line(r#""event":"lost""#, LIMIT)?;
        ensure!(lost.contains("refused"), "{lost}");

        router
            .reconfigure(|spec| spec.egress(Egress::TcpOnly { ports: vec![], refusal: Refusal::Reject }))?;
        let mut client = tool(&inside, &["udp-ping", &address])?;
        let lost = client.wait_for_line(r#""event":"lost""#, LIMIT)?;
        ensure!(lost.contains("unreachable"), "{lost}");
        Ok(())
    })
}

#[test]
fn a_wrong_command_line_says_what_is_right() -> Result<()> {
    lab::test("usage", |lab| {
        let host = lab.host("S")?;
        let anywhere = SocketAddr::from((Ipv4Addr::LOCALHOST, 1)).to_string();
        for args in
            [&["dance"][..], &["tcp-serve"], &["udp-ping", "here"], &["tcp-stream", &anywhere, "--total"]]
        {
            let output = host.run(env!("CARGO_BIN_EXE_lab-tool"), args)?;
            let code = output.status.code().context("an exit code")?;
            let told = String::from_utf8_lossy(&output.stdout).into_owned();
            ensure!(code == 2 && told.contains("the verbs are"), "{args:?}: {code}, {told}");
        }
        Ok(())
    })
}
