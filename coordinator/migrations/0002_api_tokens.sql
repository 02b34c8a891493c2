-- Bearer tokens of the HTTP API; secrets are hashes, inside `body`.
CREATE TABLE api_tokens (
    id TEXT PRIMARY KEY,
    body TEXT NOT NULL
);
