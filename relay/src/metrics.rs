//! A relay's metrics in Prometheus' text format (version 0.0.4). All are aggregates: no names, no addresses.

use std::fmt::Write as _;

use warren_common::wire::relay::RefusalCode;

use crate::core::DropReason;
use crate::server::ServerStats;

/// What the text is, for HTTP.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// What a metric is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only grows, until the process ends.
    Counter,
    /// Goes up and down.
    Gauge,
}

/// The metrics of one relay, behind what `out` holds.
pub fn render(stats: &ServerStats, out: &mut String) {
    use Kind::{Counter, Gauge};
    let core = &stats.core;
    let counters = &core.counters;
    let metrics = [
        ("warren_relay_clients", Gauge, "Devices connected to the relay.", core.clients as u64),
        ("warren_relay_half_open", Gauge, "Connections that have not authenticated.", core.half_open as u64),
        ("warren_relay_queued_bytes", Gauge, "Data that waits for devices.", core.queued_bytes as u64),
        ("warren_relay_forwarded_packets_total", Counter, "Packets carried.", counters.forwarded_packets),
        (
            "warren_relay_forwarded_udp_packets_total",
            Counter,
            "Those of them that went out as plain UDP.",
            counters.forwarded_udp_packets,
        ),
        ("warren_relay_forwarded_bytes_total", Counter, "Bytes carried.", counters.forwarded_bytes),
        (
            "warren_relay_udp_unsent_total",
            Counter,
            "Plain UDP datagrams that the socket did not take.",
            stats.udp_unsent,
        ),
        (
            "warren_relay_quic_dropped_total",
            Counter,
            "QUIC datagrams dropped since too many waited.",
            stats.quic_dropped,
        ),
        (
            "warren_relay_handshakes_refused_total",
            Counter,
            "Connections refused or ended since too many were in their handshake.",
            stats.handshakes_refused,
        ),
        (
            "warren_relay_handshakes_failed_total",
            Counter,
            "Handshakes that failed or took too long.",
            stats.handshakes_failed,
        ),
        (
            "warren_relay_networks_barred_total",
            Counter,
            "Times that a network was barred from TCP for a second, since its connections came to nothing.",
            stats.networks_barred,
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
    describe(out, "warren_relay_dropped_total", Counter, "Frames and datagrams dropped, by reason.");
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

/// Metrics without labels: name, kind, what it is, value.
pub fn write_all(out: &mut String, metrics: &[(&str, Kind, &str, u64)]) {
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
