//! From the tree to typed data: field names, kinds of values and words are checked here; names in `check`.

mod entries;
mod rules;

use std::collections::BTreeMap;

use self::rules::RuleIds;
use super::diagnostic::{Report, Source, Span};
use super::grammar::{self, Field, Shape};
use super::model::{At, IpSetStep, Model, Section};
use super::posture::Condition;
use super::selector::{self, Autogroup, Selector, WordError};
use super::syntax::{Member, Node, Value};

/// Longest time between two sign-ins of an SSH `check` rule. Unit: seconds.
pub const MAX_CHECK_PERIOD_S: u64 = 168 * 3_600;

/// Time between two sign-ins of an SSH `check` rule that does not say. Unit: seconds.
pub const DEFAULT_CHECK_PERIOD_S: u64 = 12 * 3_600;

pub(crate) fn read(root: &Node, source: &Source, report: &mut Report<'_>) -> Model {
    let mut r = Reader { source, report };
    let mut model = Model::default();
    let Some(file) = r.object(root, &grammar::FILE) else {
        return model;
    };
    r.groups(&file, &mut model);
    r.hosts(&file, &mut model);
    r.ipsets(&file, &mut model);
    for (name, key_span, node) in r.map(file.get("tagOwners")) {
        let value = r.selectors_of(node);
        model.tag_owners.insert(name.trim().to_owned(), At { value, span: key_span });
    }
    r.postures(&file, &mut model);
    model.default_src_posture = r.texts(file.get("defaultSrcPosture"));

    let mut ids = RuleIds::default();
    for (section, key, shape) in [
        (Section::Acls, "acls", &grammar::ACL),
        (Section::Grants, "grants", &grammar::GRANT),
        (Section::Deny, "deny", &grammar::DENY),
    ] {
        for (index, node) in r.list(file.get(key)).iter().enumerate() {
            if let Some(fields) = r.object(node, shape) {
                let rule = r.rule(section, index, node, &fields, &mut ids);
                model.rules.push(rule);
            }
        }
    }
    r.approvers(&file, &mut model);
    for node in r.list(file.get("nodeAttrs")) {
        if let Some(fields) = r.object(node, &grammar::NODE_ATTR) {
            let attr = r.node_attr(&fields);
            model.node_attrs.push(attr);
        }
    }
    for (index, node) in r.list(file.get("ssh")).iter().enumerate() {
        if let Some(fields) = r.object(node, &grammar::SSH) {
            let ssh = r.ssh(index, node, &fields);
            model.ssh.push(ssh);
        }
    }
    for (index, node) in r.list(file.get("tests")).iter().enumerate() {
        if let Some(fields) = r.object(node, &grammar::TEST) {
            let test = r.test(index, node, &fields);
            model.tests.push(test);
        }
    }
    for (index, node) in r.list(file.get("sshTests")).iter().enumerate() {
        if let Some(fields) = r.object(node, &grammar::SSH_TEST) {
            let test = r.ssh_test(index, node, &fields);
            model.ssh_tests.extend(test);
        }
    }
    model.randomize_client_port = r.bool(file.get("randomizeClientPort"));
    model
}

/// The fields of an object by the name of the grammar.
struct Fields<'n> {
    span: Span,
    by_name: BTreeMap<&'static str, &'n Member>,
}

impl<'n> Fields<'n> {
    /// The value, `None` if absent or null.
    fn get(&self, name: &str) -> Option<&'n Node> {
        self.by_name.get(name).map(|m| &m.value).filter(|n| n.value != Value::Null)
    }
}

struct Reader<'r, 's> {
    source: &'r Source,
    report: &'r mut Report<'s>,
}

impl Reader<'_, '_> {
    fn object<'n>(&mut self, node: &'n Node, shape: &'static Shape) -> Option<Fields<'n>> {
        let Value::Object(members) = &node.value else {
            self.report
                .error(node.span, format!("expected an object ({}), found {}", shape.name, node.kind()));
            return None;
        };
        let mut by_name = BTreeMap::new();
        for member in members {
            // A key that starts with # is a note some editors of policies leave.
            if member.key.starts_with('#') {
                continue;
            }
            let Some(field) = find_field(shape, &member.key) else {
                self.report.error_near(
                    member.key_span,
                    format!("unknown field \"{}\" in {}", member.key, shape.name),
                    &member.key,
                    shape.fields.iter().map(|f| f.name),
                );
                continue;
            };
            if by_name.insert(field.name, member).is_some() {
                self.report.error(
                    member.key_span,
                    format!("\"{}\" stands twice in this {}", field.name, shape.name),
                );
            }
            if matches!(field.kind, grammar::Kind::Ignored) {
                self.report
                    .warning(member.key_span, format!("\"{}\" has no effect: {}", member.key, field.doc));
            }
        }
        Some(Fields { span: node.span, by_name })
    }

    fn list<'n>(&mut self, node: Option<&'n Node>) -> &'n [Node] {
        match node {
            None => &[],
            Some(Node { value: Value::Array(items), .. }) => items,
            Some(other) => {
                self.report.error(other.span, format!("expected an array, found {}", other.kind()));
                &[]
            }
        }
    }

    fn map<'n>(&mut self, node: Option<&'n Node>) -> Vec<(&'n str, Span, &'n Node)> {
        match node {
            None => Vec::new(),
            Some(Node { value: Value::Object(members), .. }) => {
                members.iter().map(|m| (m.key.as_str(), m.key_span, &m.value)).collect()
            }
            Some(other) => {
                self.report.error(other.span, format!("expected an object, found {}", other.kind()));
                Vec::new()
            }
        }
    }

    fn text<'n>(&mut self, node: &'n Node) -> Option<&'n str> {
        match &node.value {
            Value::String(s) => Some(s),
            _ => {
                self.report.error(node.span, format!("expected a string, found {}", node.kind()));
                None
            }
        }
    }

    fn bool(&mut self, node: Option<&Node>) -> bool {
        match node {
            None => false,
            Some(Node { value: Value::Bool(b), .. }) => *b,
            Some(other) => {
                self.report.error(other.span, format!("expected true or false, found {}", other.kind()));
                false
            }
        }
    }

    fn texts(&mut self, node: Option<&Node>) -> Vec<At<String>> {
        self.list(node)
            .iter()
            .filter_map(|item| Some(At { value: self.text(item)?.trim().to_owned(), span: item.span }))
            .collect()
    }

    fn text_or_texts(&mut self, node: Option<&Node>) -> Vec<At<String>> {
        match node {
            Some(Node { value: Value::String(s), span }) => {
                vec![At { value: s.trim().to_owned(), span: *span }]
            }
            other => self.texts(other),
        }
    }

    fn optional_text(&mut self, node: Option<&Node>) -> Option<String> {
        node.and_then(|n| self.text(n)).map(str::to_owned)
    }

    fn word_error(&mut self, span: Span, error: WordError) {
        match error.near {
            Some(near) => {
                self.report.error_help(span, error.message, format!("did you mean \"{near}\"?"));
            }
            None => self.report.error(span, error.message),
        }
    }

    fn selector(&mut self, text: &str, span: Span) -> Option<At<Selector>> {
        match Selector::parse(text) {
            Ok(value) => Some(At { value, span }),
            Err(error) => {
                self.word_error(span, error);
                None
            }
        }
    }

    fn selectors_of(&mut self, node: &Node) -> Vec<At<Selector>> {
        if node.value == Value::Null {
            return Vec::new();
        }
        self.texts(Some(node)).into_iter().filter_map(|t| self.selector(&t.value, t.span)).collect()
    }

    fn selectors(&mut self, node: Option<&Node>) -> Vec<At<Selector>> {
        node.map(|n| self.selectors_of(n)).unwrap_or_default()
    }

    fn line(&self, span: Span) -> usize {
        self.source.line_of(span.start)
    }

    fn groups(&mut self, file: &Fields<'_>, model: &mut Model) {
        for (name, key_span, node) in self.map(file.get("groups")) {
            if !name.starts_with("group:") || name.len() == "group:".len() {
                self.report.error_help(
                    key_span,
                    format!("\"{name}\" is not the name of a group"),
                    format!("write \"group:{}\"", name.trim_start_matches("group:")),
                );
                continue;
            }
            let members = if node.value == Value::Null { Vec::new() } else { self.texts(Some(node)) };
            for member in &members {
                if member.value.starts_with("group:") {
                    self.report.error_help(
                        member.span,
                        format!("\"{name}\" contains the group \"{}\": groups do not nest", member.value),
                        "list its users, or name both groups where they are used",
                    );
                } else if !member.value.contains('@') {
                    self.report.error_help(
                        member.span,
                        format!("\"{}\" is not a user", member.value),
                        "users contain an @: a mail address, or a name followed by @",
                    );
                }
            }
            model.groups.insert(name.to_owned(), At { value: members, span: key_span });
        }
    }

    fn hosts(&mut self, file: &Fields<'_>, model: &mut Model) {
        for (name, key_span, node) in self.map(file.get("hosts")) {
            if name.is_empty() || name.contains([':', '@', '/']) {
                self.report.error(
                    key_span,
                    format!("\"{name}\" is not the name of a host: it may not contain :, @ or /"),
                );
                continue;
            }
            let Some(text) = self.text(node) else { continue };
            match selector::parse_addresses(text.trim()) {
                Some(value) => {
                    let host = At { value, span: key_span };
                    model.hosts.insert(name.to_owned(), host);
                }
                None => self.report.error_help(
                    node.span,
                    format!("\"{text}\" is not an address"),
                    "expected an address like 10.1.2.3 or a network like 10.0.0.0/8",
                ),
            }
        }
    }

    fn ipsets(&mut self, file: &Fields<'_>, model: &mut Model) {
        for (name, key_span, node) in self.map(file.get("ipsets")) {
            if !name.starts_with("ipset:") {
                self.report.error_help(
                    key_span,
                    format!("\"{name}\" is not the name of an IP set"),
                    format!("write \"ipset:{name}\""),
                );
                continue;
            }
            let mut steps = Vec::new();
            for item in self.texts(Some(node)) {
                let (add, rest) = if let Some(rest) = item.value.strip_prefix("remove ") {
                    (false, rest)
                } else {
                    (true, item.value.strip_prefix("add ").unwrap_or(&item.value))
                };
                let Some(what) = self.selector(rest, item.span) else {
                    continue;
                };
                match what.value {
                    Selector::Addresses(_)
                    | Selector::Host(_)
                    | Selector::IpSet(_)
                    | Selector::Auto(Autogroup::Internet) => {
                        steps.push(At { value: IpSetStep { add, what: what.value }, span: item.span })
                    }
                    other => self.report.error_help(
                        item.span,
                        format!("\"{other}\" cannot be part of an IP set"),
                        "expected an address, a network, a host, another IP set or autogroup:internet",
                    ),
                }
            }
            model.ipsets.insert(name.to_owned(), At { value: steps, span: key_span });
        }
    }

    fn postures(&mut self, file: &Fields<'_>, model: &mut Model) {
        for (name, key_span, node) in self.map(file.get("postures")) {
            if !name.starts_with("posture:") || name.len() == "posture:".len() {
                self.report.error_help(
                    key_span,
                    format!("\"{name}\" is not the name of a posture"),
                    format!("write \"posture:{}\"", name.trim_start_matches("posture:")),
                );
                continue;
            }
            let mut conditions = Vec::new();
            for item in self.list(Some(node)) {
                let Some(text) = self.text(item) else { continue };
                match Condition::parse(text) {
                    Ok(value) => {
                        let namespace = value.namespace();
                        let known = grammar_knows(namespace);
                        if !known {
                            self.report.warning(
                                item.span,
                                format!("no collector is known to report \"{namespace}:\" attributes"),
                            );
                        }
                        conditions.push(At { value, span: item.span });
                    }
                    Err(error) => {
                        // Without escapes, byte n of the value stands n + 1 after the opening quote.
                        let plain = item.span.end - item.span.start == text.len() + 2;
                        let span = if plain {
                            let at = item.span.start + 1 + error.at;
                            Span::new(at, item.span.end.max(at + 1))
                        } else {
                            item.span
                        };
                        self.report.error(span, format!("condition: {}", error.message));
                    }
                }
            }
            if is_empty(node) {
                self.report.warning(key_span, format!("\"{name}\" has no conditions: every device meets it"));
            }
            model.postures.insert(name.to_owned(), At { value: conditions, span: key_span });
        }
    }
}

fn find_field(shape: &'static Shape, key: &str) -> Option<&'static Field> {
    shape.fields.iter().find(|f| {
        f.name.eq_ignore_ascii_case(key) || f.alias.is_some_and(|alias| alias.eq_ignore_ascii_case(key))
    })
}

fn grammar_knows(namespace: &str) -> bool {
    super::posture::NAMESPACES.contains(&namespace) || super::posture::VENDOR_NAMESPACES.contains(&namespace)
}

fn is_empty(node: &Node) -> bool {
    matches!(&node.value, Value::Array(items) if items.is_empty())
}
