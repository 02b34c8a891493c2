//! What is wrong, for a person: a stable code, one clear sentence and what to do about it.

use std::fmt;
use std::io;

use serde::{Deserialize, Serialize};
use warren_common::url::ParseUrlError;

/// How bad a health item is. Readers treat unknown words as a warning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", from = "String")]
pub enum Severity {
    /// Worth knowing.
    Info,
    /// Something works less well than it should.
    Warning,
    /// Something does not work.
    Error,
}

impl From<String> for Severity {
    fn from(word: String) -> Self {
        match word.as_str() {
            "info" => Self::Info,
            "error" => Self::Error,
            _ => Self::Warning,
        }
    }
}

/// A condition of a running daemon, as `status` shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealthItem {
    /// Stable word, such as `coordinator-away`.
    pub code: String,
    /// How bad it is.
    pub severity: Severity,
    /// What is wrong.
    pub text: String,
    /// What to do about it.
    pub fix: String,
}

/// Why a verb failed or a process can't go on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// Stable word, such as `auth-key-expired`.
    pub code: String,
    /// What is wrong, and where.
    pub text: String,
    /// What to do about it.
    pub fix: String,
    /// The exit code of a command that ends with it: 1 for a failure, 2 for bad usage.
    pub exit: u8,
}

impl Problem {
    /// A failure (exit code 1).
    pub fn new(code: impl Into<String>, text: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { code: code.into(), text: text.into(), fix: fix.into(), exit: 1 }
    }

    /// Bad usage (exit code 2).
    pub fn usage(code: impl Into<String>, text: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { exit: 2, ..Self::new(code, text, fix) }
    }

    /// This problem as a lasting condition.
    pub fn health(&self, severity: Severity) -> HealthItem {
        HealthItem { code: self.code.clone(), severity, text: self.text.clone(), fix: self.fix.clone() }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}\n  fix: {}", self.text, self.fix)
    }
}

impl std::error::Error for Problem {}

impl From<ParseUrlError> for Problem {
    fn from(ParseUrlError(text): ParseUrlError) -> Self {
        Self::usage(
            "bad-url",
            format!("`{text}` is not the URL of a coordinator"),
            "write it as the coordinator's --public-url: `https://host` or `http://host:port`",
        )
    }
}

/// The last sentence of an I/O error, without the number that Rust appends.
pub(crate) fn io_text(error: &io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error").next().unwrap_or(&text).to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_names_its_fix() {
        let problem = Problem::usage("bad-url", "`x` is not a URL", "write http://host:port");
        assert_eq!(problem.to_string(), "`x` is not a URL\n  fix: write http://host:port");
        assert_eq!(problem.exit, 2);
        assert_eq!(problem.health(Severity::Error).code, "bad-url");
        let bad = "warren".parse::<warren_common::url::CoordinatorUrl>().unwrap_err();
        let problem = Problem::from(bad);
        assert_eq!((problem.code.as_str(), problem.exit), ("bad-url", 2));
    }

    #[test]
    fn an_unknown_severity_reads_as_a_warning() {
        assert_eq!(serde_json::from_str::<Severity>(r#""loud""#).unwrap(), Severity::Warning);
        for severity in [Severity::Info, Severity::Warning, Severity::Error] {
            let word = serde_json::to_string(&severity).unwrap();
            assert_eq!(word, format!("\"{severity:?}\"").to_lowercase());
            assert_eq!(serde_json::from_str::<Severity>(&word).unwrap(), severity);
        }
    }

    #[test]
    fn os_errors_read_as_words() {
        assert_eq!(io_text(&io::Error::from_raw_os_error(28)), "no space left on device");
    }
}
