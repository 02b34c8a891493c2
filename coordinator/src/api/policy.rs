//! The policy over HTTP: read and replaced by token holders, and webhooks that say that a repository has news.
//!
//! `PUT` needs the ETag of what it replaces, so that two editors don't overwrite each other.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::Json;
use axum::body::{Body, to_bytes};
use axum::extract::{FromRequestParts, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use data_encoding::{HEXLOWER, HEXLOWER_PERMISSIVE};
use ring::hmac;
use serde_json::json;
use subtle::ConstantTimeEq as _;
use tokio::sync::{Notify, Semaphore};
use tokio::time::timeout;
use warren_common::policy::MAX_POLICY_BYTES;
use zeroize::Zeroizing;

use super::Shared;
use super::http::PeerAddr;
use crate::admin::Failure;
use crate::domain::{ApiToken, ApiTokenRecord, Refusal};
use crate::os;

/// Longest body of a webhook, in bytes: what a push of some thousand commits takes.
pub const MAX_WEBHOOK: usize = 4 << 20;
/// Webhooks that are read at a time; more are told to come back. They are not authenticated before they are read.
pub const MAX_WEBHOOKS: usize = 4;
/// How long a body may take.
pub const BODY_PATIENCE: Duration = Duration::from_secs(20);

/// Who calls, by their token. As an argument it makes a handler for token holders only.
pub(super) struct Caller(ApiTokenRecord);

/// The same, and the token may change things.
pub(super) struct Writer(ApiTokenRecord);

impl FromRequestParts<Arc<Shared>> for Caller {
    type Rejection = Refused;

    async fn from_request_parts(parts: &mut Parts, shared: &Arc<Shared>) -> Result<Self, Refused> {
        let peer = parts.extensions.get::<PeerAddr>().map(|peer| peer.0.ip());
        if !is_private(shared.https, peer) {
            // The token has been seen by everybody on the way by now; at least nobody gets used to it.
            return Err(Refused::new(
                StatusCode::FORBIDDEN,
                "API tokens are accepted over https only",
                "give --tls-cert and --tls-key, or use the API from the coordinator's host",
            ));
        }
        let unknown = || {
            Refused::new(
                StatusCode::UNAUTHORIZED,
                "a valid API token is needed",
                "make one with `warren-coordinator api-token create`, and send it as `Authorization: Bearer TOKEN`",
            )
        };
        let header = parts.headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let token: ApiToken = header
            .and_then(|text| text.split_once(' '))
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
            .and_then(|(_, token)| token.trim().parse().ok())
            .ok_or_else(unknown)?;
        let now = os::now().unix;
        let record = shared.handle.look(move |c, _| c.state().api_token(&token, now).cloned()).await?;
        record.map(Self).ok_or_else(unknown)
    }
}

impl FromRequestParts<Arc<Shared>> for Writer {
    type Rejection = Refused;

    async fn from_request_parts(parts: &mut Parts, shared: &Arc<Shared>) -> Result<Self, Refused> {
        let Caller(token) = Caller::from_request_parts(parts, shared).await?;
        if token.write {
            return Ok(Self(token));
        }
        Err(Refused::new(
            StatusCode::FORBIDDEN,
            "this token may only read",
            "make one with `warren-coordinator api-token create --write`",
        ))
    }
}

/// An answer that says no, and what to do.
pub(super) struct Refused(StatusCode, Failure);

impl Refused {
    fn new(status: StatusCode, text: &str, fix: &str) -> Self {
        Self(status, Failure { text: text.to_owned(), fix: fix.to_owned(), usage: false })
    }
}

impl From<crate::server::Stopping> for Refused {
    fn from(stopping: crate::server::Stopping) -> Self {
        Self(StatusCode::SERVICE_UNAVAILABLE, stopping.into())
    }
}

impl From<Refusal> for Refused {
    fn from(refusal: Refusal) -> Self {
        let status = match &refusal {
            Refusal::PolicyInvalid(_) => StatusCode::UNPROCESSABLE_ENTITY,
            Refusal::PolicyChanged => StatusCode::PRECONDITION_FAILED,
            Refusal::PolicySourceIsFile(_) | Refusal::PolicySourceIsGit(_) => StatusCode::CONFLICT,
            Refusal::StoreUnavailable(_) | Refusal::Busy(_) => StatusCode::SERVICE_UNAVAILABLE,
            _ => StatusCode::BAD_REQUEST,
        };
        Self(status, refusal.into())
    }
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        let Self(status, failure) = self;
        let body = Json(json!({ "error": { "text": failure.text, "fix": failure.fix } }));
        let mut response = (status, body).into_response();
        if status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

/// True if nobody between us and `peer` can read a token.
fn is_private(https: bool, peer: Option<IpAddr>) -> bool {
    https || peer.is_some_and(|ip| ip.to_canonical().is_loopback())
}

/// The policy in force, as it was given.
pub(super) async fn get(
    State(shared): State<Arc<Shared>>,
    _: Caller,
    headers: HeaderMap,
) -> Result<Response, Refused> {
    let policy = shared.handle.look(|c, _| c.state().policy().map(|p| (p.text.clone(), p.sha256))).await?;
    let Some((text, sha256)) = policy else {
        return Err(Refused::new(
            StatusCode::NOT_FOUND,
            "no policy was accepted yet: nothing is allowed",
            "send one with PUT and `If-None-Match: *`",
        ));
    };
    let etag = etag(&sha256);
    let held = headers.get(header::IF_NONE_MATCH).and_then(|value| value.to_str().ok());
    if held.is_some_and(|list| list.split(',').any(|tag| tag.trim().trim_start_matches("W/") == etag)) {
        return Ok((StatusCode::NOT_MODIFIED, [(header::ETAG, etag)]).into_response());
    }
    let head = [(header::ETAG, etag), (header::CONTENT_TYPE, "application/hujson; charset=utf-8".to_owned())];
    Ok((head, text).into_response())
}

/// Replaces the policy, if it is still the one that the caller has read.
pub(super) async fn put(
    State(shared): State<Arc<Shared>>,
    Writer(token): Writer,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Refused> {
    let expected = precondition(&headers)?;
    let bytes = timeout(BODY_PATIENCE, to_bytes(body, MAX_POLICY_BYTES)).await;
    let bytes = bytes.ok().and_then(Result::ok).ok_or_else(|| {
        let text = format!("the policy did not arrive whole, or is longer than {MAX_POLICY_BYTES} bytes");
        Refused::new(StatusCode::PAYLOAD_TOO_LARGE, &text, "send the file as the body of the request")
    })?;
    let text = String::from_utf8(bytes.to_vec()).map_err(|_| {
        Refused::new(StatusCode::UNPROCESSABLE_ENTITY, "the policy is not UTF-8", "send it as UTF-8")
    })?;
    let revision = shared.policy.put(text, Some(expected)).await??;
    tracing::info!(revision, token = %token.id, name = %token.name, "policy set over HTTP");
    let sha256 = shared.handle.look(|c, _| c.state().policy().map(|p| p.sha256)).await?;
    let status = shared.policy.status().await?;
    Ok(([(header::ETAG, etag(&sha256.unwrap_or_default()))], Json(status)).into_response())
}

/// What `policy status` says.
pub(super) async fn status(State(shared): State<Arc<Shared>>, _: Caller) -> Result<Response, Refused> {
    Ok(Json(shared.policy.status().await?).into_response())
}

/// What CI tests a policy against: people, devices and their addresses, without keys.
pub(super) async fn inventory(State(shared): State<Arc<Shared>>, _: Caller) -> Result<Response, Refused> {
    let inventory = shared.handle.look(|c, _| crate::domain::reach::export(c.state())).await?;
    Ok(Json(inventory).into_response())
}

fn etag(sha256: &[u8; 32]) -> String {
    format!("\"{}\"", HEXLOWER.encode(sha256))
}

/// Which policy the caller means to replace: the SHA-256 of its text, or none.
fn precondition(headers: &HeaderMap) -> Result<Option<[u8; 32]>, Refused> {
    let text = |name| headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok()).map(str::trim);
    let hash = |tag: &str| {
        let hex = tag.strip_prefix('"')?.strip_suffix('"')?;
        HEXLOWER_PERMISSIVE.decode(hex.as_bytes()).ok()?.try_into().ok()
    };
    match (text(header::IF_MATCH), text(header::IF_NONE_MATCH)) {
        (None, Some("*")) => Ok(None),
        // A tag that we never made is that of another policy.
        (Some(tag), None) if tag != "*" => hash(tag).map(Some).ok_or_else(|| Refusal::PolicyChanged.into()),
        _ => Err(Refused::new(
            StatusCode::PRECONDITION_REQUIRED,
            "say which policy this one replaces",
            "send `If-Match:` with the ETag of GET, or `If-None-Match: *` if there is none yet",
        )),
    }
}

/// Takes webhooks of code hosts: each makes the follower look at its repository at once.
#[derive(Debug)]
pub struct Webhook {
    secret: Zeroizing<String>,
    wake: Arc<Notify>,
    reading: Semaphore,
    accepted: AtomicU64,
    refused: AtomicU64,
}

impl Webhook {
    /// For those who know `secret`; `wake` is the follower's.
    pub fn new(secret: Zeroizing<String>, wake: Arc<Notify>) -> Self {
        let reading = Semaphore::new(MAX_WEBHOOKS);
        Self { secret, wake, reading, accepted: AtomicU64::new(0), refused: AtomicU64::new(0) }
    }

    /// How many were accepted and refused since the start.
    pub fn counts(&self) -> (u64, u64) {
        (self.accepted.load(Ordering::Relaxed), self.refused.load(Ordering::Relaxed))
    }

    /// True if the sender knows the secret: `X-Hub-Signature-256` is its HMAC-SHA256 over the body (GitHub, Gitea,
    /// Forgejo), or `X-Gitlab-Token` is the secret itself.
    fn is_genuine(&self, headers: &HeaderMap, body: &[u8]) -> bool {
        if let Some(signature) = headers.get("x-hub-signature-256") {
            let hex = signature.to_str().ok().and_then(|text| text.strip_prefix("sha256="));
            let mac = hex.and_then(|hex| HEXLOWER_PERMISSIVE.decode(hex.as_bytes()).ok());
            let key = hmac::Key::new(hmac::HMAC_SHA256, self.secret.as_bytes());
            return mac.is_some_and(|mac| hmac::verify(&key, body, &mac).is_ok());
        }
        let token = headers.get("x-gitlab-token").map(HeaderValue::as_bytes);
        token.is_some_and(|token| bool::from(token.ct_eq(self.secret.as_bytes())))
    }
}

/// Takes one webhook.
pub(super) async fn webhook(
    State(shared): State<Arc<Shared>>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Refused> {
    let Some(hook) = &shared.webhook else {
        return Err(Refused::new(
            StatusCode::NOT_FOUND,
            "this coordinator takes no webhooks",
            "start it with --policy-git-webhook-secret-file",
        ));
    };
    let Ok(_permit) = hook.reading.try_acquire() else {
        return Err(Refused::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "too many webhooks at once",
            "send it again",
        ));
    };
    let body = timeout(BODY_PATIENCE, to_bytes(body, MAX_WEBHOOK)).await;
    let genuine = body.ok().and_then(Result::ok).is_some_and(|body| hook.is_genuine(&headers, &body));
    if !genuine {
        hook.refused.fetch_add(1, Ordering::Relaxed);
        // Strangers can cause this as often as they like: it is counted, and no line of the log.
        tracing::debug!("a webhook without a valid signature was refused");
        return Err(Refused::new(
            StatusCode::FORBIDDEN,
            "the webhook's signature is not valid",
            "set the same secret at the sender and in the file of --policy-git-webhook-secret-file",
        ));
    }
    hook.accepted.fetch_add(1, Ordering::Relaxed);
    hook.wake.notify_one();
    Ok(StatusCode::ACCEPTED.into_response())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs
            .iter()
            .map(|(name, value)| (header::HeaderName::from_static(name), value.parse().unwrap()))
            .collect()
    }

    #[test]
    fn webhooks_prove_that_they_know_the_secret() {
        // The example of GitHub's documentation on validating deliveries.
        let hook = Webhook::new(Zeroizing::new("It's a Secret to Everybody".into()), Arc::default());
        let signature = "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17";
        let genuine = |pairs: &[(&'static str, &str)], body: &[u8]| hook.is_genuine(&headers(pairs), body);
        assert!(genuine(&[("x-hub-signature-256", signature)], b"Hello, World!"));
        assert!(!genuine(&[("x-hub-signature-256", signature)], b"Hello, World?"));
        assert!(genuine(&[("x-gitlab-token", "It's a Secret to Everybody")], b"anything"));
        for bad in [
            &[][..],
            &[("x-hub-signature-256", "")],
            &[("x-hub-signature-256", "sha256=")],
            &[("x-hub-signature-256", &signature[7..])],
            &[("x-hub-signature-256", "sha256=00")],
            &[("x-gitlab-token", "It's a Secret")],
            // A wrong signature is not made good by a token.
            &[("x-hub-signature-256", "sha256=00"), ("x-gitlab-token", "It's a Secret to Everybody")],
        ] {
            assert!(!genuine(bad, b"Hello, World!"), "{bad:?}");
        }
    }

    #[test]
    fn tokens_are_taken_over_https_or_from_this_host() {
        let ip = |text: &str| Some(text.parse().unwrap());
        assert!(is_private(true, ip("203.0.113.1")));
        assert!(
            is_private(false, ip("127.0.0.1"))
                && is_private(false, ip("::ffff:127.0.0.1"))
                && is_private(false, ip("::1"))
        );
        assert!(
            !is_private(false, ip("203.0.113.1"))
                && !is_private(false, ip("10.0.0.1"))
                && !is_private(false, None)
        );
    }

    #[test]
    fn a_put_says_what_it_replaces() {
        let tag = format!("\"{}\"", "ab".repeat(32));
        let status = |pairs: &[(&'static str, &str)]| precondition(&headers(pairs)).map_err(|r| r.0.as_u16());
        assert_eq!(status(&[("if-match", &tag)]), Ok(Some([0xab; 32])));
        assert_eq!(status(&[("if-none-match", "*")]), Ok(None));
        for none in [
            &[][..],
            &[("if-match", "*")],
            &[("if-none-match", &tag)],
            &[("if-match", &tag), ("if-none-match", "*")],
        ] {
            assert_eq!(status(none), Err(428), "{none:?}");
        }
        for other in ["\"1\"", "W/\"1\"", "x"] {
            assert_eq!(status(&[("if-match", other)]), Err(412), "{other}");
        }
    }
}
