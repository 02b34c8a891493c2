//! From text to a tree with spans: strict JSON plus comments and trailing commas, nothing looser.

use std::fmt::Write as _;

use jsonc_parser::ast;
use jsonc_parser::common::Ranged;
use jsonc_parser::{CollectOptions, ParseOptions, parse_to_ast};

use super::diagnostic::{Diagnostic, Report, Severity, Source, Span};

/// Largest policy file. The tree takes about ten times the text, so this bounds memory. Unit: bytes.
pub const MAX_POLICY_BYTES: usize = 16 << 20;

/// Deepest nesting of arrays and objects; the language needs 4, applications' capability values may need more.
pub const MAX_POLICY_DEPTH: usize = 64;

/// A value with the bytes it stands at.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Node {
    pub(crate) span: Span,
    pub(crate) value: Value,
}

/// A JSON value.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Value {
    Null,
    Bool(bool),
    /// Kept as text: numbers of application capabilities pass through unchanged.
    Number(String),
    String(String),
    Array(Vec<Node>),
    Object(Vec<Member>),
}

/// A member of an object.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Member {
    pub(crate) key: String,
    pub(crate) key_span: Span,
    pub(crate) value: Node,
}

impl Node {
    /// What a message calls this kind of value.
    pub(crate) const fn kind(&self) -> &'static str {
        match &self.value {
            Value::Null => "null",
            Value::Bool(_) => "a boolean",
            Value::Number(_) => "a number",
            Value::String(_) => "a string",
            Value::Array(_) => "an array",
            Value::Object(_) => "an object",
        }
    }

    /// The value without comments and spaces, members in sorted order: equal text means equal meaning.
    pub(crate) fn canonical(&self, skip_key: &str) -> String {
        let mut out = String::new();
        self.write_canonical(skip_key, &mut out);
        out
    }

    fn write_canonical(&self, skip_key: &str, out: &mut String) {
        match &self.value {
            Value::Null => out.push_str("null"),
            Value::Bool(b) => out.push_str(if *b { "true" } else { "false" }),
            Value::Number(n) => out.push_str(n),
            Value::String(s) => write_string(s, out),
            Value::Array(items) => {
                out.push('[');
                for (i, item) in items.iter().enumerate() {
                    if i > 0 {
                        out.push(',');
                    }
                    item.write_canonical(skip_key, out);
                }
                out.push(']');
            }
            Value::Object(members) => {
                let mut sorted: Vec<&Member> = members.iter().filter(|m| m.key != skip_key).collect();
                sorted.sort_by(|a, b| a.key.cmp(&b.key));
                out.push('{');
                for (i, member) in sorted.into_iter().enumerate() {
                    if i > 0 {
                        out.push(',');
                    }
                    write_string(&member.key, out);
                    out.push(':');
                    member.value.write_canonical(skip_key, out);
                }
                out.push('}');
            }
        }
    }

    /// The value for serde; `None` for a number JSON cannot hold.
    pub(crate) fn to_json(&self) -> Option<serde_json::Value> {
        Some(match &self.value {
            Value::Null => serde_json::Value::Null,
            Value::Bool(b) => serde_json::Value::Bool(*b),
            Value::Number(n) => serde_json::Value::Number(n.parse().ok()?),
            Value::String(s) => serde_json::Value::String(s.clone()),
            Value::Array(items) => {
                serde_json::Value::Array(items.iter().map(Self::to_json).collect::<Option<_>>()?)
            }
            Value::Object(members) => serde_json::Value::Object(
                members.iter().map(|m| Some((m.key.clone(), m.value.to_json()?))).collect::<Option<_>>()?,
            ),
        })
    }
}

fn write_string(s: &str, out: &mut String) {
    out.push('"');
    for c in s.chars() {
        match c {
            '"' | '\\' => {
                out.push('\\');
                out.push(c);
            }
            c if c.is_control() => {
                // Writing to a String cannot fail.
                let _ = write!(out, "\\u{:04x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

/// Reads the text. On failure the one message says what was expected where.
pub(crate) fn parse(source: &Source) -> Result<Node, Box<Diagnostic>> {
    let text = source.text();
    let fail = |span: Span, message: String, help: Option<String>| {
        Box::new(source.locate(Severity::Error, span, message, help))
    };
    if text.len() > MAX_POLICY_BYTES {
        return Err(Box::new(Diagnostic::general(
            Severity::Error,
            format!("the policy has {} bytes; at most {MAX_POLICY_BYTES} are read", text.len()),
        )));
    }
    scan(text).map_err(|(span, message)| fail(span, message, None))?;
    let options = ParseOptions {
        allow_comments: true,
        allow_trailing_commas: true,
        allow_loose_object_property_names: false,
        allow_missing_commas: false,
        allow_single_quoted_strings: false,
        allow_hexadecimal_numbers: false,
        allow_unary_plus_numbers: false,
        allow_bare_decimal_point_numbers: false,
        allow_non_finite_numbers: false,
        allow_extended_string_escapes: false,
    };
    let parsed = parse_to_ast(text, &CollectOptions::default(), &options).map_err(|error| {
        let range = error.range();
        let mut message = error.kind().to_string();
        if let Some(first) = message.get(..1) {
            message = first.to_ascii_lowercase() + &message[1..];
        }
        fail(
            Span::new(range.start, range.end),
            format!("syntax: {message}"),
            Some("a policy is JSON with comments and trailing commas".to_owned()),
        )
    })?;
    let Some(value) = parsed.value else {
        return Err(Box::new(
            Diagnostic::general(Severity::Error, "the policy is empty")
                .with_help("an empty object, {}, is a policy that allows nothing"),
        ));
    };
    Ok(convert(value))
}

/// What the parser would take and JSON does not, and nesting that is too deep for it, since it recurses.
fn scan(text: &str) -> Result<(), (Span, String)> {
    let bytes = text.as_bytes();
    let at = |i: usize, message: String| {
        let length = text.get(i..).and_then(|rest| rest.chars().next()).map_or(1, char::len_utf8);
        Err((Span::new(i, i + length), message))
    };
    let mut depth = 0_usize;
    let mut i = 0;
    while i < bytes.len() {
        match bytes[i] {
            b'"' => {
                i += 1;
                while i < bytes.len() && bytes[i] != b'"' {
                    if bytes[i] < b' ' {
                        let escape =
                            format!("a string can't hold this byte as it is: write \\u{:04x}", bytes[i]);
                        return at(i, format!("syntax: {escape}"));
                    }
                    i += if bytes[i] == b'\\' { 2 } else { 1 };
                }
            }
            b'/' if bytes.get(i + 1) == Some(&b'/') => {
                while i < bytes.len() && bytes[i] != b'\n' {
                    if bytes[i] == b'\r' && bytes.get(i + 1) != Some(&b'\n') {
                        // Parsers disagree whether the comment ends here.
                        return at(
                            i,
                            "syntax: a carriage return without a line feed in a comment".to_owned(),
                        );
                    }
                    i += 1;
                }
            }
            b'/' if bytes.get(i + 1) == Some(&b'*') => {
                i += 2;
                while i < bytes.len() && !(bytes[i] == b'*' && bytes.get(i + 1) == Some(&b'/')) {
                    i += 1;
                }
                i += 1;
            }
            b'[' | b'{' => {
                depth += 1;
                if depth > MAX_POLICY_DEPTH {
                    return at(i, format!("more than {MAX_POLICY_DEPTH} levels of nesting"));
                }
            }
            b']' | b'}' => depth = depth.saturating_sub(1),
            b' ' | b'\t' | b'\n' | b'\r' | b'!'..=b'~' => {}
            _ => {
                let found = text.get(i..).and_then(|rest| rest.chars().next()).map_or(0, u32::from);
                return at(i, format!("syntax: U+{found:04X} stands outside of strings and comments"));
            }
        }
        i += 1;
    }
    Ok(())
}

fn convert(value: ast::Value<'_>) -> Node {
    let range = value.range();
    let span = Span::new(range.start, range.end);
    let value = match value {
        ast::Value::NullKeyword(_) => Value::Null,
        ast::Value::BooleanLit(b) => Value::Bool(b.value),
        ast::Value::NumberLit(n) => Value::Number(n.value.to_owned()),
        ast::Value::StringLit(s) => Value::String(s.value.into_owned()),
        ast::Value::Array(array) => Value::Array(array.elements.into_iter().map(convert).collect()),
        ast::Value::Object(object) => Value::Object(
            object
                .properties
                .into_iter()
                .map(|property| {
                    let range = property.name.range();
                    Member {
                        key: property.name.into_string(),
                        key_span: Span::new(range.start, range.end),
                        value: convert(property.value),
                    }
                })
                .collect(),
        ),
    };
    Node { span, value }
}

/// Reports every key that stands twice in an object: JSON readers disagree on which one counts.
pub(crate) fn check_duplicates(node: &Node, report: &mut Report<'_>) {
    match &node.value {
        Value::Array(items) => items.iter().for_each(|item| check_duplicates(item, report)),
        Value::Object(members) => {
            let mut seen = std::collections::BTreeSet::new();
            for member in members {
                if !seen.insert(member.key.as_str()) {
                    report.error_help(
                        member.key_span,
                        format!("\"{}\" stands twice in this object", member.key),
                        "merge the two entries",
                    );
                }
                check_duplicates(&member.value, report);
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ok(text: &str) -> bool {
        parse(&Source::new(text)).is_ok()
    }

    #[test]
    fn comments_and_trailing_commas_and_nothing_looser() {
        assert!(ok("{\"a\": [1, 2,], /* x */ // y\n}"));
        for bad in [
            "{a: 1}",
            "{'a': 1}",
            "{\"a\": 0x1}",
            "{\"a\": +1}",
            "{\"a\": .5}",
            "{\"a\": 5.}",
            "{\"a\": NaN}",
            "{\"a\": Infinity}",
            "{\"a\": 1 \"b\": 2}",
            "[1 2]",
            "{} {}",
            "",
            "// only a comment",
            "{\"a\": \"\\x41\"}",
            "{",
            "[,]",
            "{\"a\": 01}",
            "\u{feff}{}",
            "{\u{a0}}",
            "{\u{b}}",
            "{\"a\tb\": 1}",
            "{\"a\nb\": 1}",
            "{} // a\rb",
        ] {
            assert!(!ok(bad), "{bad} must be refused");
        }
    }

    /// Comments as spaces, and no trailing commas: what a strict JSON parser reads.
    fn standard(text: &str) -> String {
        let mut out = String::new();
        let mut rest = text;
        while let Some(c) = rest.chars().next() {
            let mut end = c.len_utf8();
            if c == '"' {
                let mut escaped = false;
                let closes = |c: char| {
                    let closes = c == '"' && !escaped;
                    escaped = c == '\\' && !escaped;
                    closes
                };
                end = rest[1..].find(closes).map_or(rest.len(), |at| at + 2);
            } else if rest.starts_with("//") {
                rest = rest.find('\n').map_or("", |at| &rest[at..]);
                continue;
            } else if rest.starts_with("/*") {
                let Some(at) = rest[2..].find("*/") else { return "unfinished".to_owned() };
                out.push(' ');
                rest = &rest[at + 4..];
                continue;
            } else if c == ']' || c == '}' {
                let before = out.trim_end_matches([' ', '\t', '\n', '\r']);
                if let Some(inner) = before.strip_suffix(',') {
                    let value = inner.trim_end_matches([' ', '\t', '\n', '\r']);
                    if !value.ends_with([',', '[', '{', ':']) && !value.is_empty() {
                        out.truncate(inner.len());
                    }
                }
            }
            out.push_str(&rest[..end]);
            rest = &rest[end..];
        }
        out
    }

    const TOKENS: [&str; 16] =
        ["{", "\"a\"", ":", "[", "1", ",", "{", "\"b\"", ":", "null", "}", "]", ",", "\"c\"", ":", "\"d\""];
    const PIECES: [&str; 30] = [
        "{",
        "}",
        "[",
        "]",
        ",",
        ":",
        "\"a\"",
        "\"b\\n\"",
        "\"é\"",
        "\"\t\"",
        "\"\u{1}\"",
        "\"\\u00e9\"",
        "1",
        "-2.5",
        "01",
        "1.",
        ".5",
        "+1",
        "true",
        "nul",
        "'x'",
        "a",
        "\t",
        "\r\n",
        "\u{a0}",
        "\u{b}",
        "// é\n",
        "/* \" */",
        "/*",
        "*/",
    ];

    proptest::proptest! {
        #![proptest_config(proptest::test_runner::Config { cases: 4_096, failure_persistence: None, ..Default::default() })]

        #[test]
        fn what_is_read_is_strict_json_but_for_comments_and_trailing_commas(
            edits in proptest::collection::vec((0..=TOKENS.len() + 1, 0..PIECES.len()), 0..4),
        ) {
            let mut tokens: Vec<&str> = TOKENS.iter().copied().chain(["}"]).collect();
            for (at, piece) in edits {
                tokens.insert(at, PIECES[piece]);
            }
            let text = tokens.join(" ");
            let strict = serde_json::from_str::<serde_json::Value>(&standard(&text)).is_ok();
            proptest::prop_assert_eq!(ok(&text), strict, "{}", text);
        }
    }

    #[test]
    fn depth_and_size_are_bounded() {
        assert!(ok(&format!("{}{}", "[".repeat(64), "]".repeat(64))));
        assert!(!ok(&format!("{}{}", "[".repeat(65), "]".repeat(65))));
        assert!(!ok(&"[".repeat(5_000_000)));
        assert!(!ok(&" ".repeat(MAX_POLICY_BYTES + 1)));
    }

    #[test]
    fn canonical_text_ignores_order_and_spaces() {
        let a = parse(&Source::new("{\"b\": [1,  true], \"a\": \"x\\\"\"}")).expect("valid");
        let b = parse(&Source::new("{ // c\n\"a\":\"x\\\"\",\"note\":1,\"b\":[1,true]}")).expect("valid");
        assert_eq!(a.canonical("note"), b.canonical("note"));
    }
}
