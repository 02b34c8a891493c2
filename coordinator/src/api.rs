//! The network side: one HTTP listener for control sessions, relays, health and metrics, with or without TLS.

mod control;
mod http;
mod metrics;
mod policy;
mod relay;

pub use control::{HANDSHAKE_PATIENCE, IDLE_LIMIT, MAX_FRAME, MAX_HALF_OPEN, PING_INTERVAL, WRITE_PATIENCE};
pub use http::{HEADER_PATIENCE, MAX_CONNECTIONS, TlsError, serve, tls_acceptor};
pub use policy::{BODY_PATIENCE, MAX_WEBHOOK, MAX_WEBHOOKS, Webhook};
pub use relay::MAX_RELAY_MESSAGES;

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use warren_common::ids::NetworkId;
use warren_common::keys::ControlSecretKey;

use warren_common::wire::relay_control::PATH;

use crate::policy_source::Active;
use crate::relays::Relays;
use crate::server::Handle;

/// What every handler needs.
#[derive(Debug)]
pub struct Shared {
    /// The coordinator.
    pub handle: Handle,
    /// The encoded, root-signed identity that each connection begins with.
    pub identity: Vec<u8>,
    /// Those who must hear whose access has changed.
    pub relays: Relays,
    /// The Noise static key.
    pub control_key: ControlSecretKey,
    /// The network, part of the prologue.
    pub network: NetworkId,
    /// One permit per connection that has not finished its handshake.
    pub half_open: Arc<Semaphore>,
    /// Where policy comes from.
    pub policy: Active,
    /// Who says that the policy's repository has news; nobody if `None`.
    pub webhook: Option<Webhook>,
    /// Requests come over https.
    pub https: bool,
    /// Cancelled at shutdown: sessions end.
    pub stop: CancellationToken,
}

/// The routes.
pub fn router(shared: Arc<Shared>) -> Router {
    Router::new()
        .route("/control/v1", get(control::upgrade))
        .route(PATH, get(relay::upgrade))
        .route("/api/v1/policy", get(policy::get).put(policy::put))
        .route("/api/v1/policy/status", get(policy::status))
        .route("/api/v1/policy/inventory", get(policy::inventory))
        .route("/api/v1/policy/webhook", post(policy::webhook))
        .route("/healthz", get(healthz))
        .route("/metrics", get(metrics))
        .with_state(shared)
}

/// 200 `ok` while commands can be stored, else 503 and why.
async fn healthz(State(shared): State<Arc<Shared>>) -> Response {
    match shared.handle.look(|_, health| health.store_error.clone()).await {
        Ok(None) => "ok\n".into_response(),
        Ok(Some(error)) => (StatusCode::SERVICE_UNAVAILABLE, format!("{error}\n")).into_response(),
        Err(stopping) => (StatusCode::SERVICE_UNAVAILABLE, format!("{stopping}\n")).into_response(),
    }
}

async fn metrics(State(shared): State<Arc<Shared>>) -> Response {
    match shared.handle.look(metrics::render).await {
        Ok(mut text) => {
            if let Some(stats) = shared.relays.embedded_stats() {
                metrics::render_relay(&stats, &mut text);
            }
            metrics::render_relays(&mut text, shared.relays.joined_count());
            metrics::render_policy(&mut text, &shared.policy.found(), shared.webhook.as_ref());
            ([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response()
        }
        Err(stopping) => (StatusCode::SERVICE_UNAVAILABLE, format!("{stopping}\n")).into_response(),
    }
}
