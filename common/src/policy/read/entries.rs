//! Everything of a file that is not a rule: approvers, attributes, SSH and tests.

use ipnet::IpNet;

use super::{DEFAULT_CHECK_PERIOD_S, Fields, MAX_CHECK_PERIOD_S, Reader, is_empty};
use crate::policy::grammar;
use crate::policy::model::{At, LoginUser, Model, NodeAttr, SshDef, SshTestDef, TestDef};
use crate::policy::posture::{AttrValue, Attribute, Attributes};
use crate::policy::selector;
use crate::policy::syntax::{Node, Value};

impl Reader<'_, '_> {
    pub(super) fn approvers(&mut self, file: &Fields<'_>, model: &mut Model) {
        let Some(node) = file.get("autoApprovers") else {
            return;
        };
        let Some(fields) = self.object(node, &grammar::APPROVERS) else {
            return;
        };
        for (net, key_span, who) in self.map(fields.get("routes")) {
            let parsed = net
                .trim()
                .parse::<IpNet>()
                .or_else(|_| net.trim().parse::<std::net::IpAddr>().map(IpNet::from));
            match parsed {
                Ok(value) => {
                    let who = self.selectors_of(who);
                    model.route_approvers.push((At { value: value.trunc(), span: key_span }, who));
                }
                Err(_) => self.report.error(key_span, format!("\"{net}\" is not a network like 10.0.0.0/8")),
            }
        }
        model.exit_approvers = self.selectors(fields.get("exitNode"));
    }

    pub(super) fn node_attr(&mut self, fields: &Fields<'_>) -> NodeAttr {
        let mut ip_pool = Vec::new();
        for item in self.texts(fields.get("ipPool")) {
            match item.value.parse::<IpNet>() {
                Ok(net) => {
                    if let Err(message) = check_pool(net) {
                        self.report.error(item.span, message);
                    }
                    ip_pool.push(net);
                }
                Err(_) => self
                    .report
                    .error(item.span, format!("\"{}\" is not a network like 100.81.0.0/16", item.value)),
            }
        }
        NodeAttr {
            target: self.selectors(fields.get("target")),
            attr: self.texts(fields.get("attr")).into_iter().map(|t| t.value).collect(),
            app: self.app(fields.get("app"), false),
            ip_pool,
        }
    }

    pub(super) fn ssh(&mut self, index: usize, node: &Node, fields: &Fields<'_>) -> SshDef {
        let mut check = false;
        match fields.get("action") {
            None => self.report.error(fields.span, "action must be specified"),
            Some(action) => match self.text(action).map(str::trim) {
                Some("accept") | None => {}
                Some("check") => check = true,
                Some("") => self.report.error(action.span, "action must be specified"),
                Some(other) => self.report.error_help(
                    action.span,
                    format!("\"{other}\" is not a valid action"),
                    "expected \"accept\" or \"check\"",
                ),
            },
        }
        let mut users = Vec::new();
        for item in self.texts(fields.get("users")) {
            let value = match item.value.as_str() {
                "" | "*" => {
                    self.report.error_help(
                        item.span,
                        format!("user \"{}\" is not valid", item.value),
                        "autogroup:nonroot is every login user but root",
                    );
                    continue;
                }
                "root" => LoginUser::Root,
                "autogroup:nonroot" => LoginUser::NonRoot,
                other => match other.strip_prefix("localpart:*@") {
                    Some(domain) if !domain.is_empty() => LoginUser::Localpart(domain.to_ascii_lowercase()),
                    _ => LoginUser::Name(other.to_owned()),
                },
            };
            users.push(At { value, span: item.span });
        }
        if fields.get("users").is_none_or(is_empty) {
            self.report.error(fields.span, "users must be specified");
        }
        let mut accept_env = Vec::new();
        for item in self.texts(fields.get("acceptEnv")) {
            if item.value.is_empty() {
                self.report.error(item.span, "acceptEnv values cannot be empty");
            }
            accept_env.push(item.value);
        }
        SshDef {
            index,
            span: node.span,
            line: self.line(node.span),
            check,
            src: self.selectors(fields.get("src")),
            dst: self.selectors(fields.get("dst")),
            users,
            check_period_s: self.check_period(fields.get("checkPeriod"), check),
            accept_env,
            src_posture: self.text_or_texts(fields.get("srcPosture")),
        }
    }

    fn check_period(&mut self, node: Option<&Node>, check: bool) -> u64 {
        let Some(node) = node else {
            return DEFAULT_CHECK_PERIOD_S;
        };
        let Some(text) = self.text(node) else {
            return DEFAULT_CHECK_PERIOD_S;
        };
        if !check {
            self.report.error(node.span, "checkPeriod is only valid with action \"check\"");
        }
        if text == "always" {
            return 0;
        }
        match selector::parse_duration_ms(text) {
            // Days are an addition for conditions; whoever reads the file elsewhere knows none.
            Ok(_) if text.contains('d') => {
                let message =
                    format!("\"{text}\" has days: expected hours, minutes or seconds, as in \"168h\"");
                self.report.error(node.span, message);
                0
            }
            Ok(ms) if ms < 0 => {
                self.report.error(node.span, format!("checkPeriod {text} must be a positive duration"));
                0
            }
            Ok(ms) => {
                let ms = ms.unsigned_abs();
                if ms > MAX_CHECK_PERIOD_S * 1_000 {
                    self.report.error(node.span, format!("checkPeriod {text} is above the max (168h)"));
                }
                ms / 1_000
            }
            Err(error) => {
                self.word_error(node.span, error);
                0
            }
        }
    }

    pub(super) fn test(&mut self, index: usize, node: &Node, fields: &Fields<'_>) -> TestDef {
        let src = match fields.get("src") {
            Some(src) => At { value: self.text(src).unwrap_or("").trim().to_owned(), span: src.span },
            None => At { value: String::new(), span: fields.span },
        };
        TestDef {
            index,
            span: node.span,
            line: self.line(node.span),
            src,
            proto: self.proto(fields.get("proto")),
            accept: self.texts(fields.get("accept")),
            deny: self.texts(fields.get("deny")),
            attrs: self.attributes(fields.get("srcPostureAttrs")),
        }
    }

    pub(super) fn ssh_test(&mut self, index: usize, node: &Node, fields: &Fields<'_>) -> Option<SshTestDef> {
        let src = fields.get("src").and_then(|n| Some((self.text(n)?.trim(), n.span)));
        let src = match src {
            Some((text, span)) if !text.is_empty() => self.selector(text, span),
            _ => {
                self.report.error(fields.span, "an SSH test must have a non-empty src");
                None
            }
        };
        if fields.get("dst").is_none_or(is_empty) {
            self.report.error(fields.span, "an SSH test must have at least one dst");
        }
        Some(SshTestDef {
            index,
            span: node.span,
            line: self.line(node.span),
            dst: self.selectors(fields.get("dst")),
            accept: self.texts(fields.get("accept")),
            check: self.texts(fields.get("check")),
            deny: self.texts(fields.get("deny")),
            attrs: self.attributes(fields.get("srcPostureAttrs")),
            src: src?,
        })
    }

    fn attributes(&mut self, node: Option<&Node>) -> Attributes {
        self.map(node)
            .into_iter()
            .filter_map(|(name, _, value)| {
                let value = match &value.value {
                    Value::Null => AttrValue::Absent,
                    Value::Bool(b) => AttrValue::Bool(*b),
                    Value::String(s) => AttrValue::Text(s.clone()),
                    Value::Number(n) => AttrValue::Number(n.parse().ok()?),
                    Value::Array(_) | Value::Object(_) => {
                        self.report.error(
                            value.span,
                            format!("expected a string, a number, true or false, found {}", value.kind()),
                        );
                        return None;
                    }
                };
                Some((name.to_owned(), Attribute::server(value)))
            })
            .collect()
    }
}

/// Overlay addresses come from 100.64.0.0/10, less what clients use for themselves.
fn check_pool(net: IpNet) -> Result<(), String> {
    let overlay: [(&str, bool); 4] = [
        ("100.64.0.0/10", true),
        ("100.100.0.0/24", false),
        ("100.100.100.0/24", false),
        ("100.115.92.0/23", false),
    ];
    for (text, inside) in overlay {
        let Ok(range) = text.parse::<IpNet>() else {
            continue;
        };
        if inside && !range.contains(&net) {
            return Err(format!("ipPool {net} must be within {range}"));
        }
        if !inside && (range.contains(&net) || net.contains(&range)) {
            return Err(format!("ipPool {net} overlaps {range}, which is reserved"));
        }
    }
    Ok(())
}
