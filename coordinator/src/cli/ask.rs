//! Verbs that ask a running coordinator, and its answers for people.

use comfy_table::Table;
use comfy_table::presets::NOTHING;
use serde_json::Value;

use super::{ApiTokenVerb, Ask, AuthKeyVerb, DeviceVerb, PolicyVerb, RelayVerb, UserVerb, Verb};
use crate::admin::{Call, Failure, call};
use crate::policy_source::file;

/// Carries out any verb that asks a running coordinator: what to print on stdout.
///
/// # Errors
/// What the coordinator, or reading a file, says.
pub fn administer(verb: Verb) -> Result<String, Failure> {
    let (ask, request) = request(verb)?;
    let value = call(&ask.dir.state_dir, &request)?;
    Ok(if ask.json { format!("{value:#}") } else { present(&request, &value) })
}

fn request(verb: Verb) -> Result<(Ask, Call), Failure> {
    Ok(match verb {
        Verb::Serve(_) | Verb::Restored(_) => {
            let text = "this verb works on the state directory itself".into();
            return Err(Failure { text, fix: "see `warren-coordinator help`".into(), usage: true });
        }
        Verb::AuthKey(AuthKeyVerb::Create { tags, user, reusable, ephemeral, expires, ask }) => {
            let life_s = expires.map(|e| e.as_secs());
            (ask, Call::AuthKeyCreate { tags, user, reusable, ephemeral, life_s })
        }
        Verb::AuthKey(AuthKeyVerb::List { ask }) => (ask, Call::AuthKeyList),
        Verb::AuthKey(AuthKeyVerb::Revoke { key, ask }) => (ask, Call::AuthKeyRevoke { key }),
        Verb::Device(DeviceVerb::List { ask }) => (ask, Call::DeviceList),
        Verb::Device(DeviceVerb::Show(a)) => (a.ask, Call::DeviceShow { device: a.device }),
        Verb::Device(DeviceVerb::Approve(a)) => (a.ask, Call::DeviceApprove { device: a.device }),
        Verb::Device(DeviceVerb::Expire(a)) => (a.ask, Call::DeviceExpire { device: a.device }),
        Verb::Device(DeviceVerb::Remove(a)) => (a.ask, Call::DeviceRemove { device: a.device }),
        Verb::User(UserVerb::List { ask }) => (ask, Call::UserList),
        Verb::User(UserVerb::Create(a)) => (a.ask, Call::UserCreate { email: a.email }),
        Verb::User(UserVerb::Suspend(a)) => (a.ask, Call::UserSuspend { email: a.email }),
        Verb::User(UserVerb::Restore(a)) => (a.ask, Call::UserRestore { email: a.email }),
        Verb::User(UserVerb::Remove(a)) => (a.ask, Call::UserRemove { email: a.email }),
        Verb::Policy(PolicyVerb::Get { ask }) => (ask, Call::PolicyGet),
        Verb::Policy(PolicyVerb::Set { file: path, ask }) => {
            let read = if path.as_os_str() == "-" {
                std::io::read_to_string(std::io::stdin()).map_err(|e| format!("can't read stdin: {e}"))
            } else {
                file::read(&path)
            };
            let fix = || "name a readable policy file".to_owned();
            let text = read.map_err(|text| Failure { text, fix: fix(), usage: true })?;
            (ask, Call::PolicySet { text })
        }
        Verb::Policy(PolicyVerb::Status { ask }) => (ask, Call::PolicyStatus),
        Verb::Policy(PolicyVerb::Inventory { ask }) => (ask, Call::PolicyInventory),
        Verb::ApiToken(ApiTokenVerb::Create { name, write, expires, ask }) => {
            (ask, Call::ApiTokenCreate { name, write, life_s: expires.map(|e| e.as_secs()) })
        }
        Verb::ApiToken(ApiTokenVerb::List { ask }) => (ask, Call::ApiTokenList),
        Verb::ApiToken(ApiTokenVerb::Revoke { token, ask }) => (ask, Call::ApiTokenRevoke { token }),
        Verb::Health { ask } => (ask, Call::Health),
        Verb::Relay(RelayVerb::List { ask }) => (ask, Call::RelayList),
        Verb::Relay(RelayVerb::Create { name, ask }) => (ask, Call::RelayCreate { name }),
        Verb::Relay(RelayVerb::Remove { relay, ask }) => (ask, Call::RelayRemove { relay }),
    })
}

/// The answer for people.
fn present(call: &Call, value: &Value) -> String {
    match call {
        Call::AuthKeyCreate { .. } => text(&value["key"]),
        Call::RelayCreate { .. } => text(&value["join_key"]),
        Call::ApiTokenCreate { .. } => text(&value["token"]),
        Call::PolicyGet => text(&value["policy"]),
        Call::PolicyInventory => format!("{value:#}"),
        Call::ApiTokenList => table(value, &["id", "name", "write", "created_at", "expires_at"]),
        Call::Health if value.as_array().is_some_and(Vec::is_empty) => "all is well".to_owned(),
        Call::Health => {
            let line = |item: &Value| {
                format!(
                    "{}: {} [{}]\n  fix: {}",
                    text(&item["severity"]),
                    text(&item["text"]),
                    text(&item["code"]),
                    text(&item["fix"])
                )
            };
            value.as_array().into_iter().flatten().map(line).collect::<Vec<_>>().join("\n")
        }
        Call::AuthKeyList => {
            table(value, &["id", "user", "tags", "reusable", "ephemeral", "expires_at", "used_by"])
        }
        Call::DeviceList => table(value, &["id", "name", "ips", "user", "tags", "state", "online"]),
        Call::UserList => table(value, &["id", "email", "devices", "suspended"]),
        Call::RelayList => table(value, &["id", "name", "embedded", "joined", "addrs", "stun", "device"]),
        Call::DeviceShow { .. } | Call::PolicyStatus | Call::PolicySet { .. } => {
            let mut shown = Table::new();
            shown.load_style(NOTHING);
            for (key, value) in value.as_object().into_iter().flatten() {
                shown.add_row([key.clone(), text(value)]);
            }
            trimmed(&shown)
        }
        Call::AuthKeyRevoke { .. }
        | Call::ApiTokenRevoke { .. }
        | Call::DeviceApprove { .. }
        | Call::DeviceExpire { .. }
        | Call::DeviceRemove { .. }
        | Call::UserCreate { .. }
        | Call::UserSuspend { .. }
        | Call::UserRestore { .. }
        | Call::UserRemove { .. }
        | Call::RelayRemove { .. } => "done".to_owned(),
    }
}

fn table(rows: &Value, columns: &[&str]) -> String {
    let mut table = Table::new();
    table.load_style(NOTHING);
    table.set_header(columns.iter().map(|c| c.to_uppercase()));
    for row in rows.as_array().into_iter().flatten() {
        table.add_row(columns.iter().map(|c| text(&row[*c])));
    }
    trimmed(&table)
}

fn trimmed(table: &Table) -> String {
    table.lines().map(|line| line.trim().to_owned()).collect::<Vec<_>>().join("\n")
}

fn text(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        Value::Array(items) if items.is_empty() => "-".to_owned(),
        Value::Array(items) => items.iter().map(text).collect::<Vec<_>>().join(","),
        Value::Bool(_) | Value::Number(_) | Value::Object(_) => value.to_string(),
    }
}
