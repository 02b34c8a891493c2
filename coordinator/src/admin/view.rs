//! The JSON that the admin verbs show. Fields are only ever added.

use data_encoding::HEXLOWER;
use serde_json::{Value, json};
use warren_common::netmap::Netmap;

use crate::domain::{ApiTokenRecord, AuthKeyRecord, Device, RelayRecord, User};
use crate::push::Coordinator;

pub(super) fn device(coordinator: &Coordinator, device: &Device) -> Value {
    let state = coordinator.state();
    json!({
        "id": device.id,
        "name": device.name,
        "ips": device.addrs(),
        "user": device.user.and_then(|id| state.users().get(&id)).map(|u| &u.email),
        "tags": device.tags,
        "state": state.device_state(device).word(),
        "online": coordinator.is_online(device.id),
        "ephemeral": device.ephemeral,
        "created_at": device.created.to_rfc3339(),
        "os": device.os,
        "version": device.version,
    })
}

pub(super) fn device_detail(coordinator: &Coordinator, record: &Device) -> Value {
    let mut value = device(coordinator, record);
    let netmap = coordinator.netmap(record.id);
    value["hostname"] = json!(record.hostname);
    value["control_key"] = json!(record.control);
    value["wg_key"] = json!(record.wg);
    value["probe_key"] = json!(record.probe);
    value["auth_key"] = json!(record.auth_key);
    value["home_relay"] = json!(record.home_relay);
    value["routes"] = json!(record.routes);
    value["relay_offer"] = json!(record.relay.as_ref().map(|offer| &offer.addrs));
    value["serves_as_relay"] = json!(coordinator.peer_relays().served_by(record.id));
    value["acked_revision"] = json!(coordinator.acked_revision(record.id));
    value["peers"] = json!(netmap.as_ref().map_or_else(Vec::new, |n| n.peers.keys().collect()));
    value["ingress_rules"] = json!(netmap.as_ref().map_or(0, |n: &Netmap| n.ingress.len()));
    value["egress_rules"] = json!(netmap.as_ref().map_or(0, |n| n.egress.len()));
    value
}

pub(super) fn user(coordinator: &Coordinator, user: &User) -> Value {
    let devices = coordinator.state().devices().values().filter(|d| d.user == Some(user.id)).count();
    json!({
        "id": user.id,
        "email": user.email,
        "suspended": user.suspended,
        "devices": devices,
        "created_at": user.created.to_rfc3339(),
    })
}

pub(super) fn auth_key(coordinator: &Coordinator, key: &AuthKeyRecord) -> Value {
    let users = coordinator.state().users();
    json!({
        "id": key.id,
        "user": key.user.and_then(|id| users.get(&id)).map(|u| &u.email),
        "tags": key.tags,
        "reusable": key.reusable,
        "ephemeral": key.ephemeral,
        "created_at": key.created.to_rfc3339(),
        "expires_at": key.expires.to_rfc3339(),
        "used_by": key.used_by,
    })
}

/// All relays: those with a record of their own, then devices that serve as such.
pub(super) fn relays(coordinator: &Coordinator) -> Value {
    let own = coordinator.state().relays().values().map(relay);
    let peers = coordinator.peer_relays().serving().map(|(device, relay, users)| {
        let record = coordinator.state().device(device);
        json!({
            "id": relay.id,
            "name": relay.name,
            "embedded": false,
            "joined": coordinator.is_online(device),
            "addrs": relay.addrs,
            "stun": relay.stun,
            "cert_sha256": HEXLOWER.encode(&relay.cert_sha256),
            "created_at": record.map(|d| d.created.to_rfc3339()),
            "device": record.map(|d| &d.name),
            "users": users.len(),
        })
    });
    own.chain(peers).collect()
}

fn relay(relay: &RelayRecord) -> Value {
    json!({
        "id": relay.id,
        "name": relay.name,
        "embedded": relay.embedded,
        "joined": relay.cert_sha256.is_some(),
        "addrs": relay.addrs,
        "stun": relay.stun,
        "cert_sha256": relay.cert_sha256.map(|c| HEXLOWER.encode(&c)),
        "created_at": relay.created.to_rfc3339(),
    })
}

pub(super) fn api_token(token: &ApiTokenRecord) -> Value {
    json!({
        "id": token.id,
        "name": token.name,
        "write": token.write,
        "created_at": token.created.to_rfc3339(),
        "expires_at": token.expires.to_rfc3339(),
    })
}

/// What agents report of the policy in force: staged rules' counts, and connections that two ends judge differently.
pub(super) fn verdicts(coordinator: &Coordinator, status: &mut Value) {
    let staged = coordinator.staged_counts().map(|(rule, origin, count)| {
        json!({
            "id": rule.to_string(),
            "origin": origin,
            "sent": count.sent,
            "received": count.received,
            "devices": count.devices.len(),
        })
    });
    let differing = coordinator.differing_verdicts().map(|d| {
        json!({
            "from": d.from,
            "at": d.at,
            "src": d.src,
            "dst": d.dst,
            "proto": d.proto,
            "port": d.port,
            "reason": d.reason,
            "count": d.count,
            "reported_at": d.reported.to_rfc3339(),
            "both_current": d.both_current,
        })
    });
    status["staged"] = staged.collect();
    status["differing"] = differing.collect();
}
