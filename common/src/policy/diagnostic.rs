//! Messages about a policy file: where, what is wrong, what was expected, the nearest name that exists.

use std::fmt;

/// Most messages one parse reports; a hostile file must not turn into gigabytes of text. Unit: messages.
pub const MAX_DIAGNOSTICS: usize = 50;

/// Longest part of a source line a message quotes; a minified file is one line. Unit: characters.
pub(super) const MAX_SNIPPET: usize = 160;

/// Longest text of a message or its advice; more is cut in the middle of what it quotes. Unit: characters.
pub(super) const MAX_TEXT: usize = 600;

/// Names longer than this are not compared for a suggestion (the comparison is quadratic). Unit: characters.
pub(super) const MAX_SUGGESTION_NAME: usize = 64;

/// Most names one suggestion looks at. Unit: names.
pub(super) const MAX_SUGGESTION_CANDIDATES: usize = 2_000;

/// A range of bytes of the policy text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Span {
    /// First byte.
    pub start: usize,
    /// First byte after the range.
    pub end: usize,
}

impl Span {
    /// The range from `start` to `end` (exclusive).
    pub const fn new(start: usize, end: usize) -> Self {
        Self { start, end }
    }
}

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// The file cannot be used.
    Error,
    /// The file can be used, but probably does not mean what it says.
    Warning,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Error => "error",
            Self::Warning => "warning",
        })
    }
}

/// One message about the file. `Display` renders it over several lines, with the source line and a marker under it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnostic {
    /// Error or warning.
    pub severity: Severity,
    /// Line of the first marked character, from 1; 0 if the message is about no place in the text.
    pub line: usize,
    /// Column of the first marked character, from 1, in characters.
    pub column: usize,
    /// The marked bytes.
    pub span: Span,
    /// The source line, cut to `MAX_SNIPPET` characters around the mark.
    pub snippet: String,
    /// Where the mark starts inside `snippet`, in characters.
    pub mark_at: usize,
    /// How many characters of `snippet` are marked, at least 1.
    pub mark_len: usize,
    /// What is wrong.
    pub message: String,
    /// What to do about it.
    pub help: Option<String>,
}

impl Diagnostic {
    /// A message about no place in the text.
    pub fn general(severity: Severity, message: impl Into<String>) -> Self {
        Self {
            severity,
            line: 0,
            column: 0,
            span: Span::default(),
            snippet: String::new(),
            mark_at: 0,
            mark_len: 0,
            message: message.into(),
            help: None,
        }
    }

    /// The same message with advice.
    #[must_use]
    pub fn with_help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    /// The message as text, naming the file `path`.
    pub fn render(&self, path: &str) -> String {
        let mut out = format!("{}: {}", self.severity, self.message);
        if self.line > 0 {
            let number = self.line.to_string();
            let pad = " ".repeat(number.len());
            out.push_str(&format!(
                "\n{pad}--> {path}:{}:{}\n{pad} |\n{number} | {}\n{pad} | {}{}",
                self.line,
                self.column,
                self.snippet,
                " ".repeat(self.mark_at),
                "^".repeat(self.mark_len.max(1)),
            ));
        }
        if let Some(help) = &self.help {
            out.push_str(&format!("\n  = help: {help}"));
        }
        out
    }
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.render("policy"))
    }
}

impl std::error::Error for Diagnostic {}

/// The text of a policy with its line starts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Source {
    text: String,
    line_starts: Vec<usize>,
}

impl Source {
    pub(crate) fn new(text: &str) -> Self {
        let mut line_starts = vec![0];
        line_starts.extend(text.match_indices('\n').map(|(at, _)| at + 1));
        Self { text: text.to_owned(), line_starts }
    }

    pub(crate) fn text(&self) -> &str {
        &self.text
    }

    /// The line a byte is on, from 1.
    pub(crate) fn line_of(&self, at: usize) -> usize {
        self.line_starts.partition_point(|start| *start <= at)
    }

    pub(crate) fn locate(
        &self,
        severity: Severity,
        span: Span,
        message: String,
        help: Option<String>,
    ) -> Diagnostic {
        let at = self.floor(span.start);
        let line = self.line_of(at).max(1);
        let start = self.line_starts[line - 1];
        let end = self.line_starts.get(line).map_or(self.text.len(), |next| next - 1);
        let line_text = self.text[start..end].trim_end_matches('\r');
        let before = self.text[start..at].chars().count();
        let marked = self
            .text
            .get(at..self.floor(span.end.max(at)).min(end.max(at)))
            .unwrap_or("")
            .chars()
            .count()
            .max(1);
        // Cut so that the mark stays visible with some text before it.
        let skip =
            if line_text.chars().count() > MAX_SNIPPET { before.saturating_sub(MAX_SNIPPET / 4) } else { 0 };
        let snippet: String = line_text
            .chars()
            .skip(skip)
            .take(MAX_SNIPPET)
            .map(|c| if c == '\t' || c.is_control() { ' ' } else { c })
            .collect();
        let shown = snippet.chars().count();
        let mark_at = (before - skip).min(shown);
        Diagnostic {
            severity,
            line,
            column: before + 1,
            span,
            mark_at,
            mark_len: marked.min(shown.saturating_sub(mark_at).max(1)),
            snippet,
            message: shortened(message),
            help: help.map(shortened),
        }
    }

    /// The largest character boundary at or before `at`.
    fn floor(&self, at: usize) -> usize {
        let mut at = at.min(self.text.len());
        while !self.text.is_char_boundary(at) {
            at -= 1;
        }
        at
    }
}

/// Collects messages while a file is read and checked.
#[derive(Debug)]
pub(crate) struct Report<'a> {
    source: &'a Source,
    found: Vec<Diagnostic>,
    errors: usize,
    dropped: usize,
}

impl<'a> Report<'a> {
    pub(crate) fn new(source: &'a Source) -> Self {
        Self { source, found: Vec::new(), errors: 0, dropped: 0 }
    }

    pub(crate) fn error(&mut self, span: Span, message: impl Into<String>) {
        self.push(Severity::Error, span, message.into(), None);
    }

    pub(crate) fn error_help(&mut self, span: Span, message: impl Into<String>, help: impl Into<String>) {
        self.push(Severity::Error, span, message.into(), Some(help.into()));
    }

    /// An error whose advice is the nearest of `candidates`, if one is near.
    pub(crate) fn error_near<'n>(
        &mut self,
        span: Span,
        message: impl Into<String>,
        wanted: &str,
        candidates: impl Iterator<Item = &'n str>,
    ) {
        let help = nearest(wanted, candidates).map(|name| format!("did you mean \"{name}\"?"));
        self.push(Severity::Error, span, message.into(), help);
    }

    pub(crate) fn warning(&mut self, span: Span, message: impl Into<String>) {
        self.push(Severity::Warning, span, message.into(), None);
    }

    pub(crate) fn has_errors(&self) -> bool {
        self.errors > 0
    }

    /// True once further errors are only counted: long checks may stop.
    pub(crate) fn is_full(&self) -> bool {
        self.errors >= MAX_DIAGNOSTICS
    }

    fn push(&mut self, severity: Severity, span: Span, message: String, help: Option<String>) {
        if severity == Severity::Error {
            self.errors += 1;
        }
        if self.found.len() >= MAX_DIAGNOSTICS {
            self.dropped += 1;
            return;
        }
        self.found.push(self.source.locate(severity, span, message, help));
    }

    /// Everything found, in the order of the text.
    pub(crate) fn finish(mut self) -> Vec<Diagnostic> {
        self.found.sort_by(|a, b| (a.span, a.severity, &a.message).cmp(&(b.span, b.severity, &b.message)));
        if self.dropped > 0 {
            self.found.push(Diagnostic::general(
                Severity::Error,
                format!("{} more messages are not shown", self.dropped),
            ));
        }
        self.found
    }
}

/// The text, cut in the middle if it is longer than [`MAX_TEXT`]: messages quote what the file holds.
fn shortened(text: String) -> String {
    let count = text.chars().count();
    if count <= MAX_TEXT {
        return text;
    }
    let head: String = text.chars().take(MAX_TEXT / 2).collect();
    let tail: String = text.chars().skip(count - MAX_TEXT / 2).collect();
    format!("{head} … {tail}")
}

/// The candidate with the smallest edit distance to `wanted`, if it is small for the length of the name.
pub(crate) fn nearest<'n>(wanted: &str, candidates: impl Iterator<Item = &'n str>) -> Option<&'n str> {
    let wanted_chars: Vec<char> = wanted.chars().take(MAX_SUGGESTION_NAME + 1).collect();
    if wanted_chars.len() > MAX_SUGGESTION_NAME {
        return None;
    }
    let limit = |name: &str| wanted_chars.len().max(name.len()).div_ceil(3);
    candidates
        .take(MAX_SUGGESTION_CANDIDATES)
        .filter(|name| name.len() <= MAX_SUGGESTION_NAME)
        .map(|name| (distance(&wanted_chars, name), name))
        .filter(|(d, name)| *d <= limit(name))
        // Among equals, the one that starts alike: "ipp" is rather "ip" than "app".
        .min_by_key(|(d, name)| (*d, name.chars().next() != wanted.chars().next(), *name))
        .map(|(_, name)| name)
}

/// Optimal string alignment distance: insert, delete, replace and swap of neighbours cost one each; case is ignored.
fn distance(a: &[char], b: &str) -> usize {
    let a: Vec<char> = a.iter().map(|c| c.to_ascii_lowercase()).collect();
    let b: Vec<char> = b.chars().map(|c| c.to_ascii_lowercase()).collect();
    let mut before: Vec<usize> = Vec::new();
    let mut last: Vec<usize> = (0..=b.len()).collect();
    for i in 1..=a.len() {
        let mut row = vec![i; b.len() + 1];
        for j in 1..=b.len() {
            let same = usize::from(a[i - 1] != b[j - 1]);
            row[j] = (last[j] + 1).min(row[j - 1] + 1).min(last[j - 1] + same);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                row[j] = row[j].min(before[j - 2] + 1);
            }
        }
        before = std::mem::replace(&mut last, row);
    }
    last[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_marks_the_piece_of_text() {
        let source = Source::new("{\n  \"src\": [\"gruop:a\"],\n}\n");
        let at = source.text().find("\"gruop").expect("present");
        let d = source.locate(Severity::Error, Span::new(at, at + 9), "unknown".to_owned(), None);
        assert_eq!((d.line, d.column), (2, 11));
        let lines: Vec<String> = d.to_string().lines().map(str::to_owned).collect();
        assert_eq!(lines[1], " --> policy:2:11");
        assert_eq!(lines[3], "2 |   \"src\": [\"gruop:a\"],");
        assert_eq!(lines[4], "  |           ^^^^^^^^^");
    }

    #[test]
    fn a_long_line_is_cut_around_the_mark() {
        let text = format!("[{}\"here\"{}]", "1,".repeat(5000), ",2".repeat(5000));
        let source = Source::new(&text);
        let at = text.find("\"here").expect("present");
        let d = source.locate(Severity::Error, Span::new(at, at + 6), String::new(), None);
        assert_eq!(d.snippet.chars().count(), MAX_SNIPPET);
        assert_eq!(&d.snippet[d.mark_at..d.mark_at + d.mark_len], "\"here\"");
    }

    #[test]
    fn a_message_does_not_grow_with_what_it_quotes() {
        let source = Source::new("x");
        let mut report = Report::new(&source);
        report.error(Span::new(0, 1), format!("\"{}\" is not a user", "é".repeat(1_000_000)));
        let found = report.finish();
        assert!(
            found[0].message.chars().count() <= MAX_TEXT + 3 && found[0].message.ends_with("is not a user")
        );
    }

    #[test]
    fn suggestions_are_near_or_absent() {
        let names = ["group:devs", "group:ops", "tag:db"];
        assert_eq!(nearest("group:dvs", names.into_iter()), Some("group:devs"));
        assert_eq!(nearest("group:OPS", names.into_iter()), Some("group:ops"));
        assert_eq!(nearest("zzzz", names.into_iter()), None);
        assert_eq!(nearest(&"x".repeat(10_000), names.into_iter()), None);
    }

    #[test]
    fn the_number_of_messages_is_bounded() {
        let source = Source::new("x");
        let mut report = Report::new(&source);
        for _ in 0..10 * MAX_DIAGNOSTICS {
            report.error(Span::new(0, 1), "again");
        }
        assert!(report.is_full());
        assert_eq!(report.finish().len(), MAX_DIAGNOSTICS + 1);
    }
}
