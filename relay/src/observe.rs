//! `/metrics` and `/healthz` of a relay of its own, on an address for the operator.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header::CONTENT_TYPE};
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use tokio::net::TcpListener;

use crate::metrics;
use crate::server::{RelayServer, StatsHandle};

/// What the process does, as seen from outside.
#[derive(Clone, Debug, Default)]
pub struct Observed(Arc<Mutex<Inner>>);

#[derive(Debug, Default)]
struct Inner {
    serving: Option<StatsHandle>,
    joined: bool,
    draining: bool,
}

impl Observed {
    /// A server runs.
    pub fn serves(&self, server: &RelayServer) {
        self.with(|inner| inner.serving = Some(server.stats_handle()));
    }

    /// There is a session with the coordinator, or there isn't.
    pub fn joined(&self, joined: bool) {
        self.with(|inner| inner.joined = joined);
    }

    /// It is about to stop.
    pub fn drains(&self) {
        self.with(|inner| inner.draining = true);
    }

    fn with<T>(&self, f: impl FnOnce(&mut Inner) -> T) -> T {
        f(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Answers on `addr` for as long as it is polled; the address is bound when this returns.
///
/// # Errors
/// The address can't be had.
pub async fn serve(addr: SocketAddr, observed: Observed) -> io::Result<impl Future<Output = io::Result<()>>> {
    let listener = TcpListener::bind(addr).await?;
    tracing::info!(addr = %listener.local_addr()?, "metrics are served");
    let app =
        Router::new().route("/metrics", get(render)).route("/healthz", get(health)).with_state(observed);
    Ok(async move { axum::serve(listener, app).await })
}

async fn render(State(observed): State<Observed>) -> Response {
    use metrics::Kind::Gauge;
    let (stats, joined, draining) =
        observed.with(|inner| (inner.serving.as_ref().map(StatsHandle::stats), inner.joined, inner.draining));
    let mut text = String::new();
    metrics::write_all(
        &mut text,
        &[
            ("warren_relay_joined", Gauge, "1 while there is a session with the coordinator.", joined.into()),
            ("warren_relay_draining", Gauge, "1 once the relay is about to stop.", draining.into()),
        ],
    );
    if let Some(stats) = stats {
        metrics::render(&stats, &mut text);
    }
    ([(CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response()
}

/// Ready for devices: joined once, and not about to stop. That the coordinator is away is no reason to send them elsewhere.
async fn health(State(observed): State<Observed>) -> (StatusCode, &'static str) {
    match observed.with(|inner| (inner.serving.is_some(), inner.draining)) {
        (_, true) => (StatusCode::SERVICE_UNAVAILABLE, "draining\n"),
        (false, false) => (StatusCode::SERVICE_UNAVAILABLE, "not joined yet\n"),
        (true, false) => (StatusCode::OK, "ok\n"),
    }
}
