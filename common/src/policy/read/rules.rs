//! Rules: ACLs, grants and denials, with their services, windows and ends.

use std::collections::BTreeMap;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use sha2::{Digest, Sha256};

use super::{Fields, Reader, is_empty};
use crate::filter::{PortRange, RuleId};
use crate::policy::diagnostic::Span;
use crate::policy::grammar;
use crate::policy::model::{At, Rule, Section, Service};
use crate::policy::selector::{self, Selector};
use crate::policy::syntax::{Node, Value};
use crate::policy::when::{self, Window};

impl Reader<'_, '_> {
    pub(super) fn rule(
        &mut self,
        section: Section,
        index: usize,
        node: &Node,
        fields: &Fields<'_>,
        ids: &mut RuleIds,
    ) -> Rule {
        let mut rule = Rule {
            section,
            index,
            span: node.span,
            line: self.line(node.span),
            id: ids.next(section, node),
            src: self.selectors(fields.get("src")),
            dst: Vec::new(),
            services: Vec::new(),
            app: BTreeMap::new(),
            via: Vec::new(),
            src_posture: self.text_or_texts(fields.get("srcPosture")),
            dst_posture: self.text_or_texts(fields.get("dstPosture")),
            ignore_default_posture: self.bool(fields.get("ignoreDefaultPosture")),
            when: self.when(fields.get("when")),
            expires: self.expires(fields.get("expires")),
            staged: self.bool(fields.get("staged")),
            comment: self.optional_text(fields.get("comment")),
        };
        match section {
            Section::Acls => self.acl(fields, &mut rule),
            Section::Grants | Section::Deny => {
                rule.dst = self.selectors(fields.get("dst"));
                self.services(fields, &mut rule);
            }
        }
        if section == Section::Grants {
            rule.app = self.app(fields.get("app"), true);
            for item in self.texts(fields.get("via")) {
                match Selector::parse(&item.value) {
                    Ok(value @ Selector::Tag(_)) => rule.via.push(At { value, span: item.span }),
                    _ => self
                        .report
                        .error(item.span, format!("via can only be a tag, found \"{}\"", item.value)),
                }
            }
            if rule.services.is_empty() && rule.app.is_empty() && fields.get("ip").is_none_or(is_empty) {
                self.report.error_help(
                    fields.span,
                    "ip and app can not both be empty",
                    "\"ip\": [\"*\"] grants every port",
                );
            }
        }
        for name in ["src", "dst"] {
            if fields.get(name).is_none() {
                let message = format!("this rule has no \"{name}\": it matches nothing");
                // A denial that matches nothing protects nothing; a grant that matches nothing is merely useless.
                if section == Section::Deny {
                    self.report.error(fields.span, message);
                } else {
                    self.report.warning(fields.span, message);
                }
            }
        }
        rule
    }

    fn acl(&mut self, fields: &Fields<'_>, rule: &mut Rule) {
        match fields.get("action") {
            Some(node) => match self.text(node) {
                Some("accept") | None => {}
                Some(other) => self.report.error_help(
                    node.span,
                    format!("action \"{other}\" is not supported"),
                    "expected \"accept\"; denials stand in the section \"deny\"",
                ),
            },
            None => {
                self.report.error_help(fields.span, "this rule has no action", "write \"action\": \"accept\"")
            }
        }
        let proto_node = fields.get("proto");
        let proto = self.proto(proto_node);
        let mut service = Service { proto, targets: Vec::new() };
        for item in self.texts(fields.get("dst")) {
            let Some((what, ports)) = self.destination(&item) else {
                continue;
            };
            let has_ports = proto.is_none_or(crate::filter::has_ports);
            if !has_ports && ports.iter().any(|p| *p != PortRange::ALL) {
                self.report.error_help(
                    item.span,
                    format!("protocol {} has no ports", proto.map(selector::proto_name).unwrap_or_default()),
                    "only \"*\" is allowed here",
                );
            }
            service.targets.push((rule.dst.len(), ports));
            rule.dst.push(what);
        }
        rule.services.push(service);
    }

    /// `selector:ports`.
    fn destination(&mut self, item: &At<String>) -> Option<(At<Selector>, Vec<PortRange>)> {
        let split = selector::split_ports(&item.value)
            .and_then(|(host, ports, _)| Ok((host, selector::parse_ports(ports)?)));
        match split {
            Ok((host, ports)) => Some((self.selector(&host, item.span)?, ports)),
            Err(error) => {
                self.word_error(item.span, error);
                None
            }
        }
    }

    pub(super) fn proto(&mut self, node: Option<&Node>) -> Option<u8> {
        let node = node?;
        let text = self.text(node)?;
        match selector::parse_proto(text) {
            Ok(proto) => proto,
            Err(error) => {
                self.word_error(node.span, error);
                None
            }
        }
    }

    fn services(&mut self, fields: &Fields<'_>, rule: &mut Rule) {
        let every = |ports: Vec<PortRange>| (0..rule.dst.len()).map(|i| (i, ports.clone())).collect();
        let Some(node) = fields.get("ip") else {
            if rule.section == Section::Deny {
                rule.services.push(Service { proto: None, targets: every(vec![PortRange::ALL]) });
            }
            return;
        };
        let mut by_proto: BTreeMap<Option<u8>, Vec<PortRange>> = BTreeMap::new();
        for item in self.texts(Some(node)) {
            match selector::parse_service(&item.value) {
                Ok((proto, ports)) => by_proto.entry(proto).or_default().extend(ports),
                Err(error) => self.word_error(item.span, error),
            }
        }
        rule.services =
            by_proto.into_iter().map(|(proto, ports)| Service { proto, targets: every(ports) }).collect();
    }

    pub(super) fn app(
        &mut self,
        node: Option<&Node>,
        strict: bool,
    ) -> BTreeMap<String, Vec<serde_json::Value>> {
        let mut out = BTreeMap::new();
        for (name, key_span, value) in self.map(node) {
            if strict {
                self.capability_name(name, key_span);
            }
            let values = if value.value == Value::Null {
                Vec::new()
            } else {
                self.list(Some(value))
                    .iter()
                    .filter_map(|item| match item.to_json() {
                        Some(json) => Some(json),
                        None => {
                            self.report.error(item.span, "a number is out of range");
                            None
                        }
                    })
                    .collect()
            };
            out.insert(name.to_owned(), values);
        }
        out
    }

    fn capability_name(&mut self, name: &str, span: Span) {
        /// What the vendor's own applications read; everything else of the domain is not a user's to give.
        const VENDOR: [&str; 9] =
            ["aperture", "drive", "golink", "kubernetes", "relay", "secrets", "tailsql", "tsidp", "webui"];
        let valid = name
            .split_once('/')
            .is_some_and(|(domain, path)| !domain.is_empty() && !path.is_empty() && !domain.contains(':'));
        if !valid {
            self.report.error_help(
                span,
                format!("\"{name}\" is not the name of a capability"),
                "a capability name must have the form {domain}/{path}, without https://",
            );
        } else if let Some(path) = name.strip_prefix("tailscale.com/") {
            let known = path.strip_prefix("cap/").is_some_and(|cap| VENDOR.contains(&cap));
            if !known {
                self.report
                    .error(span, format!("capability \"{name}\" must not be in the tailscale.com domain"));
            }
        }
    }

    fn when(&mut self, node: Option<&Node>) -> Option<Vec<Window>> {
        let node = node?;
        let items = match &node.value {
            Value::Array(items) => items.as_slice(),
            _ => std::slice::from_ref(node),
        };
        let windows = items
            .iter()
            .filter_map(|item| {
                let fields = self.object(item, &grammar::WHEN_SHAPE)?;
                Some(self.window(&fields))
            })
            .collect();
        Some(windows)
    }

    fn window(&mut self, fields: &Fields<'_>) -> Window {
        let mut days = 0;
        match fields.get("days") {
            None => days = 0x7f,
            Some(node) => {
                for item in self.texts(Some(node)) {
                    match when::parse_day(&item.value) {
                        Some(day) => days |= day,
                        None => self.report.error_near(
                            item.span,
                            format!("\"{}\" is not a day", item.value),
                            &item.value,
                            when::DAYS.into_iter(),
                        ),
                    }
                }
            }
        }
        let mut minutes = |name: &str, default: u16| {
            let Some(node) = fields.get(name) else {
                return default;
            };
            let text = self.text(node).unwrap_or("00:00");
            when::parse_minutes(text).unwrap_or_else(|| {
                self.report.error(node.span, format!("\"{text}\" is not a time: expected hh:mm"));
                default
            })
        };
        let (from, to) = (minutes("from", 0), minutes("to", 24 * 60));
        let zone = match fields.get("zone") {
            None => TimeZone::UTC,
            Some(node) => {
                let text = self.text(node).unwrap_or("UTC");
                TimeZone::get(text).unwrap_or_else(|_| {
                    self.report.error_help(
                        node.span,
                        format!("unknown time zone \"{text}\""),
                        "expected a name like Europe/Berlin or UTC",
                    );
                    TimeZone::UTC
                })
            }
        };
        Window { days, from, to, zone }
    }

    fn expires(&mut self, node: Option<&Node>) -> Option<i64> {
        let node = node?;
        let text = self.text(node)?;
        match text.parse::<Timestamp>() {
            Ok(at) => Some(at.as_second()),
            Err(_) => {
                self.report.error_help(
                    node.span,
                    format!("\"{text}\" is not a time"),
                    "expected RFC 3339, as in 2027-01-31T18:00:00Z",
                );
                // Fail closed: a grant whose end nobody can read has ended.
                Some(i64::MIN)
            }
        }
    }
}

/// Names rules by the hash of their text; equal rules are told apart by their order.
#[derive(Default)]
pub(super) struct RuleIds {
    seen: BTreeMap<u64, u32>,
}

impl RuleIds {
    fn next(&mut self, section: Section, node: &Node) -> RuleId {
        let mut hash = Sha256::new();
        hash.update(b"warren rule\0");
        hash.update(section.word());
        hash.update([0]);
        hash.update(node.canonical("comment"));
        let base = first_u64(&hash.clone().finalize());
        let count = self.seen.entry(base).or_insert(0);
        *count += 1;
        if *count == 1 {
            return RuleId(base);
        }
        hash.update(count.to_be_bytes());
        RuleId(first_u64(&hash.finalize()))
    }
}

fn first_u64(bytes: &[u8]) -> u64 {
    bytes.iter().take(8).fold(0, |acc, b| (acc << 8) | u64::from(*b))
}
