//! Every metric of the coordinator, in Prometheus' text format (version 0.0.4). All are aggregates: no names, no addresses.

pub(super) use warren_relay::metrics::{CONTENT_TYPE, render as render_relay};
use warren_relay::metrics::{Kind, write_all};

use super::Webhook;
use crate::policy_source::Report;
use crate::push::Coordinator;
use crate::server::Health;

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
