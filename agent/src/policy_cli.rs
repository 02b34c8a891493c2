//! `warren policy …`: check, test, compile, explain and compare policy files without a network.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Subcommand, ValueEnum};
use jiff::Timestamp;
use serde::Serialize;
use serde_json::{Map, Value, json};
use warren_common::filter::{Action, FilterRule};
use warren_common::policy::{
    Change, Compiled, Diagnostic, ExplainError, Explanation, Inventory, NodePolicy, Policy, Truth, compile,
    diff, json_schema, parse_protocol,
};

/// A failing test, a denied connection: the answer is "no".
const NO: u8 = 1;
/// Bad usage or an invalid file.
const INVALID: u8 = 2;

/// Work on policy files, offline.
#[derive(Debug, Subcommand)]
pub enum PolicyCommand {
    /// Check a policy file: syntax and meaning.
    ///
    /// Example: warren policy check --policy policy.hujson
    Check(CheckArgs),
    /// Run the tests a policy file contains.
    ///
    /// Example: warren policy test --policy policy.hujson --inventory inventory.json
    Test(WorldArgs),
    /// Print what every device lets in.
    ///
    /// Example: warren policy compile --policy policy.hujson --inventory inventory.json --format json
    Compile(CompileArgs),
    /// Say why a connection is allowed or denied.
    ///
    /// Example: warren policy explain --policy policy.hujson --inventory inventory.json --from laptop --to db:5432
    Explain(ExplainArgs),
    /// List the connections that open or close between two policy files.
    ///
    /// Example: warren policy diff --old old.hujson --new new.hujson --inventory inventory.json
    Diff(DiffArgs),
    /// Print the JSON schema of policy files, for editors.
    ///
    /// Example: warren policy schema > policy.schema.json
    Schema,
}

/// Which file to check.
#[derive(Args, Debug)]
pub struct CheckArgs {
    /// The policy file; - reads standard input.
    #[arg(long, value_name = "FILE")]
    policy: PathBuf,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
}

/// A policy and the network it is for.
#[derive(Args, Debug)]
pub struct WorldArgs {
    /// The policy file; - reads standard input.
    #[arg(long, value_name = "FILE")]
    policy: PathBuf,
    /// The users and devices, as JSON.
    #[arg(long, value_name = "FILE")]
    inventory: PathBuf,
    /// Pretend that it is this time.
    #[arg(long, value_name = "RFC3339")]
    now: Option<Timestamp>,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
}

/// What to compile, and how to print it.
#[derive(Args, Debug)]
pub struct CompileArgs {
    #[command(flatten)]
    world: WorldArgs,
    /// How to print.
    #[arg(long, value_enum, default_value = "json")]
    format: Format,
}

/// Which connection to explain.
#[derive(Args, Debug)]
pub struct ExplainArgs {
    #[command(flatten)]
    world: WorldArgs,
    /// The source: a device, a user with one device, or an address.
    #[arg(long, value_name = "A")]
    from: String,
    /// The destination: a device or an address, and a port.
    #[arg(long, value_name = "B:PORT")]
    to: String,
    /// The protocol, by name or number.
    #[arg(long, default_value = "tcp")]
    proto: String,
}

/// Which policies to compare.
#[derive(Args, Debug)]
pub struct DiffArgs {
    /// The policy in force.
    #[arg(long, value_name = "FILE")]
    old: PathBuf,
    /// The policy to come.
    #[arg(long, value_name = "FILE")]
    new: PathBuf,
    /// The users and devices, as JSON.
    #[arg(long, value_name = "FILE")]
    inventory: PathBuf,
    /// Pretend that it is this time.
    #[arg(long, value_name = "RFC3339")]
    now: Option<Timestamp>,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
}

/// Output formats.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Format {
    /// One JSON document.
    Json,
}

/// Runs a command. Returns 0 on success, 1 if the answer is no, 2 on bad usage or an invalid file.
pub fn run(command: PolicyCommand) -> ExitCode {
    let done = match command {
        PolicyCommand::Check(args) => check(&args),
        PolicyCommand::Test(args) => test(&args),
        PolicyCommand::Compile(args) => print_compiled(&args),
        PolicyCommand::Explain(args) => explain(&args),
        PolicyCommand::Diff(args) => print_diff(&args),
        PolicyCommand::Schema => {
            write!(io::stdout().lock(), "{}", json_schema()).map(|()| 0).map_err(Failure::Write)
        }
    };
    match done {
        Ok(code) => ExitCode::from(code),
        Err(failure) => {
            // Nothing is left to do if standard error is closed.
            let _ = writeln!(io::stderr().lock(), "{failure}");
            ExitCode::from(INVALID)
        }
    }
}

/// Why a command could not do its work.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("cannot read {path}: {error}")]
    Read { path: String, error: io::Error },
    #[error("{path} is not an inventory: {error}")]
    Inventory { path: String, error: serde_json::Error },
    #[error("{0}")]
    Policy(String),
    #[error("{0}")]
    Question(#[from] ExplainError),
    #[error("{0}")]
    Usage(String),
    #[error("cannot write the result: {0}")]
    Write(#[from] io::Error),
    #[error("cannot write the result: {0}")]
    Json(#[from] serde_json::Error),
}

fn check(args: &CheckArgs) -> Result<u8, Failure> {
    let text = read(&args.policy)?;
    let path = args.policy.display().to_string();
    let (valid, found) = match Policy::parse(&text) {
        Ok(policy) => (true, policy.warnings().to_vec()),
        Err(found) => (false, found),
    };
    if args.json {
        let messages: Vec<Value> = found.iter().map(message).collect();
        print_json(&json!({"valid": valid, "messages": messages}))?;
    } else {
        if !found.is_empty() {
            writeln!(io::stderr().lock(), "{}", render(&found, &path))?;
        }
        if valid {
            writeln!(io::stdout().lock(), "{path} is valid")?;
        }
    }
    Ok(if valid { 0 } else { INVALID })
}

fn test(args: &WorldArgs) -> Result<u8, Failure> {
    let compiled = load(args)?;
    let report = compiled.run_tests();
    if args.json {
        print_json(&json!({"passed": report.passed(), "results": report.results}))?;
    } else {
        let mut out = io::stdout().lock();
        for result in &report.results {
            let verdict = if result.failures.is_empty() { "ok" } else { "FAILED" };
            writeln!(out, "{verdict:<6} {} (line {}): {}", result.name, result.line, result.src)?;
            for failure in &result.failures {
                writeln!(out, "       {failure}")?;
            }
            for note in &result.notes {
                writeln!(out, "       note: {note}")?;
            }
        }
        writeln!(out, "{} passed, {} failed", report.results.len() - report.failed(), report.failed())?;
    }
    Ok(if report.passed() { 0 } else { NO })
}

fn print_compiled(args: &CompileArgs) -> Result<u8, Failure> {
    let Format::Json = args.format;
    let compiled = load(&args.world)?;
    let report = compiled.run_tests();
    if !report.passed() {
        let mut text = String::from("test(s) failed: the policy is not used");
        for result in report.results.iter().filter(|r| !r.failures.is_empty()) {
            for failure in &result.failures {
                text.push_str(&format!("\n  {} (line {}): {failure}", result.name, result.line));
            }
        }
        return Err(Failure::Policy(text));
    }
    let mut nodes = Map::new();
    for name in compiled.names() {
        if let Some(node) = compiled.node(name) {
            nodes.insert(name.to_owned(), node_json(&node, compiled.now()));
        }
    }
    print_json(&json!({ "nodes": nodes }))?;
    Ok(0)
}

fn explain(args: &ExplainArgs) -> Result<u8, Failure> {
    let proto = parse_protocol(&args.proto).map_err(Failure::Usage)?;
    let found = load(&args.world)?.explain(&args.from, &args.to, proto)?;
    if args.world.json {
        print_json(&found)?;
    } else {
        print_explanation(&found)?;
    }
    Ok(if found.allowed { 0 } else { NO })
}

fn print_explanation(found: &Explanation) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    let verdict = if found.allowed { "ALLOWED" } else { "DENIED" };
    let port = found.port.map(|p| format!(" port {p}")).unwrap_or_default();
    writeln!(out, "{verdict}  {} -> {}, protocol {}{port}", found.from, found.to, found.proto)?;
    writeln!(out, "  {}", found.because)?;
    for (title, traces) in [
        ("matching rules", &found.matching),
        ("matching staged rules (not enforced)", &found.staged),
        ("nearest rules that would have allowed it, and what is missing", &found.nearest),
    ] {
        if traces.is_empty() {
            continue;
        }
        writeln!(out, "\n{title}:")?;
        for trace in traces {
            let comment = trace.comment.as_ref().map(|c| format!("  // {c}")).unwrap_or_default();
            writeln!(out, "  {}{comment}", trace.origin)?;
            for check in &trace.checks {
                let mark = match check.truth {
                    Truth::True => "yes",
                    Truth::False => "NO",
                    Truth::Unknown => "??",
                };
                writeln!(out, "    {mark:<3} {:<18} {}", check.what, check.why)?;
                for finding in &check.conditions {
                    write!(
                        out,
                        "        {:<7} {}: {}",
                        finding.truth.to_string(),
                        finding.condition,
                        finding.why
                    )?;
                    if let Some(fact) = &finding.fact {
                        let source = fact.source.as_deref().unwrap_or("unknown source");
                        let grade = fact.grade.map(|g| format!(", grade {g}")).unwrap_or_default();
                        let age = fact.age_s.map(|a| format!(", {a} s old")).unwrap_or_default();
                        write!(out, " ({source}{grade}{age})")?;
                    }
                    writeln!(out)?;
                }
            }
            for what in &trace.missing {
                writeln!(out, "    missing: {what}")?;
            }
        }
    }
    if !found.relays.is_empty() {
        writeln!(out, "\npeer relays that may carry it, if they run as such (warrend --relay-port):")?;
        for relay in &found.relays {
            let grants: Vec<&str> = relay.grants.iter().map(String::as_str).collect();
            writeln!(out, "  {}  ({})", relay.device, grants.join("; "))?;
        }
    }
    Ok(())
}

fn print_diff(args: &DiffArgs) -> Result<u8, Failure> {
    // Both sides are compared at one moment.
    let now = args.now.unwrap_or_else(Timestamp::now);
    let side = |policy: &Path| {
        load(&WorldArgs {
            policy: policy.to_owned(),
            inventory: args.inventory.clone(),
            now: Some(now),
            json: args.json,
        })
    };
    let found = diff(&side(&args.old)?, &side(&args.new)?);
    if args.json {
        print_json(&found)?;
        return Ok(0);
    }
    let mut out = io::stdout().lock();
    for (opens, title) in [(true, "Opens"), (false, "Closes")] {
        if !found.changes.iter().any(|c| c.opens == opens) {
            continue;
        }
        writeln!(out, "{title}:")?;
        // Owners whose devices get the same stand on one line.
        let mut services: BTreeMap<(&str, &str), Vec<&Change>> = BTreeMap::new();
        for change in found.changes.iter().filter(|c| c.opens == opens) {
            services.entry((&change.to, &change.from)).or_default().push(change);
        }
        let mut alike: BTreeMap<(&str, Vec<String>), Vec<&str>> = BTreeMap::new();
        for ((to, from), changes) in services {
            let sign = if opens { '+' } else { '-' };
            let lines = changes.iter().map(|c| {
                let rules: Vec<&str> = c.rules.iter().map(String::as_str).collect();
                format!(
                    "{sign} {:<16} at {} devices  ({})",
                    c.service,
                    c.destinations.len(),
                    rules.join("; ")
                )
            });
            alike.entry((to, lines.collect())).or_default().push(from);
        }
        for ((to, lines), from) in alike {
            writeln!(out, "  {} -> {to}", shorten(&from))?;
            for line in lines {
                writeln!(out, "    {line}")?;
            }
        }
    }
    if !found.other.is_empty() {
        writeln!(out, "Also changes:")?;
        // What happens to many devices alike stands there once.
        let mut alike: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (device, what) in found.other.iter().filter_map(|line| line.split_once(": ")) {
            alike.entry(what).or_default().push(device);
        }
        for (what, devices) in alike {
            writeln!(out, "  {}: {what}", shorten(&devices))?;
        }
    }
    if !found.undecided.is_empty() {
        writeln!(out, "Could not decide:")?;
        for line in &found.undecided {
            writeln!(out, "  {line}")?;
        }
    }
    if found.is_empty() {
        writeln!(out, "No connection opens or closes.")?;
    }
    Ok(0)
}

/// The first of many names, and how many more there are.
fn shorten(names: &[&str]) -> String {
    const SHOWN: usize = 8;
    match names.get(..SHOWN) {
        Some(shown) if names.len() > SHOWN => {
            format!("{} and {} more", shown.join(", "), names.len() - SHOWN)
        }
        _ => names.join(", "),
    }
}

/// One device as the contract prints it: `filters` is what is allowed now.
fn node_json(node: &NodePolicy, now: i64) -> Value {
    let mut filters = Vec::new();
    let mut denied = Vec::new();
    let mut staged = Vec::new();
    let mut scheduled = Vec::new();
    for rule in &node.ingress {
        let list = if rule.staged {
            &mut staged
        } else if !rule.is_active(now) {
            &mut scheduled
        } else if rule.action == Action::Deny {
            &mut denied
        } else {
            &mut filters
        };
        list.push(rule_json(rule));
    }
    json!({
        "filters": filters,
        "deny": denied,
        "staged": staged,
        "scheduled": scheduled,
        "ssh": node.ssh,
        "caps": node.caps,
        "attrs": node.attrs,
        "apps": node.apps,
        "ip_pools": node.ip_pools,
        "approved_routes": node.approved_routes,
        "auto_approved_routes": node.auto_approved_routes,
        "peers": node.peers,
    })
}

fn rule_json(rule: &FilterRule) -> Value {
    let src: Vec<String> = rule.src.iter().map(ToString::to_string).collect();
    let dst: Vec<Value> = rule
        .dst
        .iter()
        .map(|d| {
            json!({
                "net": d.net.to_string(),
                "first": d.ports.first,
                "last": d.ports.last,
            })
        })
        .collect();
    json!({
        "id": rule.id.to_string(),
        "origin": rule.origin,
        "action": rule.action,
        "src": src,
        "dst": dst,
        "proto": rule.protos,
        "active": rule.active,
    })
}

fn load(args: &WorldArgs) -> Result<Compiled, Failure> {
    let path = args.policy.display().to_string();
    let refused = |found: Vec<Diagnostic>| Failure::Policy(render(&found, &path));
    let policy = Policy::parse(&read(&args.policy)?).map_err(refused)?;
    let inventory = read_inventory(&args.inventory)?;
    let now = args.now.unwrap_or_else(Timestamp::now).as_second();
    compile(&policy, &inventory, now, HORIZON_S).map_err(refused)
}

/// How far ahead windows of time are worked out. Unit: seconds.
const HORIZON_S: i64 = 7 * 24 * 3_600;

fn read_inventory(path: &PathBuf) -> Result<Inventory, Failure> {
    serde_json::from_str(&read(path)?)
        .map_err(|error| Failure::Inventory { path: path.display().to_string(), error })
}

fn read(path: &PathBuf) -> Result<String, Failure> {
    let result = if path.as_os_str() == "-" {
        let mut text = String::new();
        io::stdin().lock().read_to_string(&mut text).map(|_| text)
    } else {
        fs::read_to_string(path)
    };
    result.map_err(|error| Failure::Read { path: path.display().to_string(), error })
}

fn render(found: &[Diagnostic], path: &str) -> String {
    let texts: Vec<String> = found.iter().map(|d| d.render(path)).collect();
    texts.join("\n\n")
}

fn message(d: &Diagnostic) -> Value {
    json!({
        "severity": d.severity.to_string(),
        "line": d.line,
        "column": d.column,
        "start": d.span.start,
        "end": d.span.end,
        "snippet": d.snippet,
        "message": d.message,
        "help": d.help,
    })
}

fn print_json(value: &impl Serialize) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    serde_json::to_writer_pretty(&mut out, value)?;
    writeln!(out)?;
    Ok(())
}
