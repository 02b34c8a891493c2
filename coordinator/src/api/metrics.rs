//! Every metric of the coordinator, in Prometheus' text format (version 0.0.4). All are aggregates: no names, no addresses.

use std::fmt::Write as _;

use warren_common::wire::relay::RefusalCode;
use warren_relay::core::DropReason;
use warren_relay::server::ServerStats;

use super::Webhook;
use crate::policy_source::Report;
use crate::push::Coordinator;
use crate::server::Health;

pub(super) const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

#[derive(Clone, Copy)]
enum Kind {
    Counter,
    Gauge,
}

pub(super) fn render(coordinator: &Coordinator, health: &Health) -> String {
    use Kind::{Counter, Gauge};
    let (state, stats) = (coordinator.state(), coordinator.stats());
    let policy_revision = state.policy().map_or(0, |p| p.revision);
    let staged = coordinator.staged_counts().map(|(_, _, count)| count.sent + count.received).sum();
    let metrics = [
        ("warren_devices", Gauge, "Enrolled devices.", state.devices().len() as u64),
        ("warren_devices_online", Gauge, "Devices with a session.", coordinator.online_count() as u64),
        ("warren_users", Gauge, "Users.", state.users().len() as u64),
        (
            "warren_auth_keys",
            Gauge,
            "Auth keys, used and expired ones included.",
            state.auth_keys().len() as u64,
        ),
        ("warren_relays", Gauge, "Relays, the embedded one included.", state.relays().len() as u64),
        (
            "warren_sessions",
            Gauge,
            "Control sessions, those that are not welcomed yet included.",
            coordinator.session_count() as u64,
        ),
        ("warren_revision", Gauge, "The newest netmap revision.", coordinator.revision()),
        ("warren_policy_revision", Gauge, "How many policies were accepted.", policy_revision),
        ("warren_snapshots_total", Counter, "Netmaps sent whole.", stats.snapshots),
        ("warren_deltas_total", Counter, "Netmap deltas sent.", stats.deltas),
        ("warren_leases_total", Counter, "Updates that only renewed a lease.", stats.leases),
        ("warren_updates_rejected_total", Counter, "Updates that an agent did not apply.", stats.rejected),
        ("warren_signals_total", Counter, "Probe messages passed on.", stats.signals),
        ("warren_signals_dropped_total", Counter, "Probe messages dropped.", stats.signals_dropped),
        ("warren_relay_tokens_total", Counter, "Relay tokens made.", stats.relay_tokens),
        ("warren_refused_total", Counter, "Commands refused.", stats.refused),
        ("warren_sessions_closed_total", Counter, "Sessions the coordinator ended.", stats.closed),
        ("warren_copied_state_total", Counter, "Devices caught with a copied state directory.", stats.copied),
        (
            "warren_sessions_slow_total",
            Counter,
            "Sessions ended because they read too slowly.",
            health.slow_sessions,
        ),
        ("warren_commits_total", Counter, "Transactions that succeeded.", health.commits),
        ("warren_commit_failures_total", Counter, "Transactions that failed.", health.commit_failures),
        (
            "warren_commit_conflicts_total",
            Counter,
            "Transactions that another writer overtook.",
            health.conflicts,
        ),
        (
            "warren_store_up",
            Gauge,
            "1 if the last transaction succeeded.",
            u64::from(health.store_error.is_none()),
        ),
        (
            "warren_differing_verdicts_total",
            Counter,
            "Connections that one end let out and the other refused.",
            stats.differing,
        ),
        ("warren_staged_hits", Gauge, "Connections that staged rules in force would have decided.", staged),
        ("warren_epoch", Gauge, "The network's epoch.", state.settings().epoch),
        ("warren_agents_ahead_total", Counter, "Agents with newer netmaps than were made here.", stats.ahead),
    ];
    let mut out = String::new();
    write_all(&mut out, &metrics);
    out
}

/// What is known of relays of other processes.
pub(super) fn render_relays(out: &mut String, joined: usize) {
    let joined =
        ("warren_relays_joined", Kind::Gauge, "Relays of other processes with a session.", joined as u64);
    write_all(out, &[joined]);
}

/// The policy source's.
pub(super) fn render_policy(out: &mut String, found: &Report, webhook: Option<&Webhook>) {
    use Kind::{Counter, Gauge};
    let up = u64::from(found.error.is_none());
    write_all(
        out,
        &[("warren_policy_source_up", Gauge, "1 if what the policy source holds is in force.", up)],
    );
    let Some((accepted, refused)) = webhook.map(Webhook::counts) else { return };
    write_all(
        out,
        &[
            ("warren_policy_webhooks_total", Counter, "Webhooks that knew the secret.", accepted),
            ("warren_policy_webhooks_refused_total", Counter, "Webhooks that did not.", refused),
        ],
    );
}

/// The embedded relay's.
pub(super) fn render_relay(stats: &ServerStats, out: &mut String) {
    use Kind::{Counter, Gauge};
    let core = &stats.core;
    let counters = &core.counters;
    let metrics = [
        ("warren_relay_clients", Gauge, "Devices connected to the embedded relay.", core.clients as u64),
        ("warren_relay_half_open", Gauge, "Connections that have not authenticated.", core.half_open as u64),
        ("warren_relay_queued_bytes", Gauge, "Data that waits for devices.", core.queued_bytes as u64),
        ("warren_relay_forwarded_packets_total", Counter, "Packets carried.", counters.forwarded_packets),
        ("warren_relay_forwarded_bytes_total", Counter, "Bytes carried.", counters.forwarded_bytes),
        (
            "warren_relay_handshakes_refused_total",
            Counter,
            "Connections refused since too many were in their handshake.",
            stats.handshakes_refused,
        ),
        (
            "warren_relay_handshakes_failed_total",
            Counter,
            "Handshakes that failed or took too long.",
            stats.handshakes_failed,
        ),
        ("warren_stun_answered_total", Counter, "STUN questions answered.", stats.stun_answered),
        (
            "warren_stun_ignored_total",
            Counter,
            "STUN datagrams that were no question, or above the rate.",
            stats.stun_ignored,
        ),
    ];
    write_all(out, &metrics);
    describe(out, "warren_relay_dropped_total", Counter, "Frames dropped, by reason.");
    for reason in DropReason::ALL {
        let (word, count) = (reason.as_str(), counters.dropped(*reason));
        let _ = writeln!(out, "warren_relay_dropped_total{{reason=\"{word}\"}} {count}");
    }
    describe(out, "warren_relay_closed_total", Counter, "Connections that the relay ended, by reason.");
    for code in RefusalCode::KNOWN {
        let (word, count) = (code.as_str(), counters.closed(*code));
        let _ = writeln!(out, "warren_relay_closed_total{{reason=\"{word}\"}} {count}");
    }
}

fn write_all(out: &mut String, metrics: &[(&str, Kind, &str, u64)]) {
    for (name, kind, help, value) in metrics {
        describe(out, name, *kind, help);
        // Writing to a String can't fail, here and elsewhere.
        let _ = writeln!(out, "{name} {value}");
    }
}

fn describe(out: &mut String, name: &str, kind: Kind, help: &str) {
    let kind = match kind {
        Kind::Counter => "counter",
        Kind::Gauge => "gauge",
    };
    let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
}
