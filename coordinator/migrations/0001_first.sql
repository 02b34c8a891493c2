-- The first schema. Columns hold what the database itself must keep unique or look up; `body` is the row as JSON.
-- The text runs on SQLite and PostgreSQL alike.
CREATE TABLE state (
    id BIGINT PRIMARY KEY CHECK (id = 1),
    version BIGINT NOT NULL
);

CREATE TABLE settings (
    id BIGINT PRIMARY KEY CHECK (id = 1),
    body TEXT NOT NULL
);

CREATE TABLE devices (
    id TEXT PRIMARY KEY,
    control_key TEXT NOT NULL UNIQUE,
    wg_key TEXT NOT NULL UNIQUE,
    name TEXT NOT NULL UNIQUE,
    ipv4 TEXT NOT NULL UNIQUE,
    ipv6 TEXT NOT NULL UNIQUE,
    body TEXT NOT NULL
);

CREATE TABLE users (
    id TEXT PRIMARY KEY,
    email TEXT NOT NULL UNIQUE,
    body TEXT NOT NULL
);

CREATE TABLE auth_keys (
    id TEXT PRIMARY KEY,
    body TEXT NOT NULL
);

CREATE TABLE relays (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    body TEXT NOT NULL
);

CREATE TABLE policy (
    id BIGINT PRIMARY KEY CHECK (id = 1),
    body TEXT NOT NULL
);

CREATE TABLE resting (
    addr TEXT PRIMARY KEY,
    until_us BIGINT NOT NULL
);

-- What each version changed: another coordinator on the same database catches up from here.
CREATE TABLE change_log (
    version BIGINT PRIMARY KEY,
    at_us BIGINT NOT NULL,
    changes TEXT NOT NULL
);
