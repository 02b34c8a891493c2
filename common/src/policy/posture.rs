//! Conditions over attributes, in three-valued logic.
//!
//! A fact has a value, a source, a grade of evidence and an age. A condition over a fact that nobody reports, that is
//! stale or that has another type is [`Truth::Unknown`]: a grant then does not match and a deny does.

mod words;

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use self::words::Words;
use super::selector::parse_duration_ms;

/// How old a fact may be unless a condition says otherwise (`… WITHIN 1h`): the default lease. Unit: seconds.
pub const DEFAULT_MAX_AGE_S: i64 = 24 * 3_600;

/// Most values in a list of an `IN` condition. Unit: values.
pub(super) const MAX_LIST: usize = 1_000;

/// Longest condition. Unit: bytes.
pub(super) const MAX_CONDITION: usize = 16 << 10;

/// The three truth values, ordered so that `and` is the minimum and `or` the maximum.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Truth {
    /// Certainly not.
    False,
    /// Nobody knows (any more).
    Unknown,
    /// Certainly.
    True,
}

impl From<bool> for Truth {
    fn from(b: bool) -> Self {
        if b { Self::True } else { Self::False }
    }
}

impl fmt::Display for Truth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::False => "false",
            Self::Unknown => "unknown",
            Self::True => "true",
        })
    }
}

/// The value of an attribute. `null` means a collector looked and found nothing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum AttrValue {
    /// Reported as absent.
    Absent,
    /// True or false.
    Bool(bool),
    /// A number.
    Number(f64),
    /// A string; ordered as a version.
    Text(String),
    /// Several values; conditions hold if they hold for one of them.
    List(Vec<AttrValue>),
}

impl fmt::Display for AttrValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Absent => f.write_str("absent"),
            Self::Bool(b) => write!(f, "{b}"),
            Self::Number(n) => write!(f, "{n}"),
            Self::Text(t) => write!(f, "'{t}'"),
            Self::List(items) => {
                f.write_str("[")?;
                for (i, item) in items.iter().enumerate() {
                    write!(f, "{}{item}", if i > 0 { ", " } else { "" })?;
                }
                f.write_str("]")
            }
        }
    }
}

/// How good the evidence for a fact is, worst first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Grade {
    /// The device says so.
    #[serde(rename = "self")]
    SelfReported,
    /// A process with root rights on the device says so.
    Root,
    /// Measured at boot.
    Boot,
    /// Quoted by a TPM.
    Tpm,
    /// Known to the coordinator without the device.
    Server,
}

const GRADES: [(&str, Grade); 5] = [
    ("self", Grade::SelfReported),
    ("root", Grade::Root),
    ("boot", Grade::Boot),
    ("tpm", Grade::Tpm),
    ("server", Grade::Server),
];

impl fmt::Display for Grade {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = GRADES.iter().find(|(_, g)| g == self).map_or("", |(w, _)| w);
        f.write_str(word)
    }
}

/// One fact about a device or a user.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Attribute {
    /// The value; `null` is reported absence.
    pub value: AttrValue,
    /// Who says so, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// How good the evidence is; absent counts as `self`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grade: Option<Grade>,
    /// Seconds since it was observed; absent means the fact does not age.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub age_s: Option<i64>,
}

impl Attribute {
    /// A fact that does not age, known to the coordinator.
    pub fn server(value: AttrValue) -> Self {
        Self { value, source: Some("coordinator".to_owned()), grade: Some(Grade::Server), age_s: None }
    }
}

/// Attributes by key, `node:os`.
pub type Attributes = BTreeMap<String, Attribute>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Op {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
    In,
    NotIn,
    IsSet,
    NotSet,
}

/// One condition, `node:osVersion >= '13.4' WITHIN 1h`.
#[derive(Clone, Debug, PartialEq)]
pub struct Condition {
    text: String,
    key: String,
    op: Op,
    values: Vec<AttrValue>,
    max_age_s: i64,
}

/// What evaluating a condition found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Finding {
    /// The condition's text.
    pub condition: String,
    /// The verdict.
    pub truth: Truth,
    /// The fact looked at, if anybody reports it.
    pub fact: Option<Attribute>,
    /// Why, for people: `is 'linux'`, `nobody reports it`, `is 2 h old, at most 1 h is good`.
    pub why: String,
}

/// Namespaces a condition may speak of, beside those of other vendors' collectors.
pub(crate) const NAMESPACES: [&str; 7] = ["node", "custom", "user", "ip", "time", "risk", "attest"];

/// Collectors of other vendors whose namespaces people's files contain.
pub(crate) const VENDOR_NAMESPACES: [&str; 9] =
    ["falcon", "fleet", "huntress", "intune", "jamf", "jamfPro", "kandji", "kolide", "sentinelOne"];

impl Condition {
    /// Reads a condition. The error says what was expected and at which byte.
    pub fn parse(text: &str) -> Result<Self, ConditionError> {
        if text.len() > MAX_CONDITION {
            return Err(ConditionError::new(0, format!("a condition has at most {MAX_CONDITION} bytes")));
        }
        let mut words = Words { text, at: 0 };
        let key = words.key()?;
        let op_at = words.skip();
        let op = words.operator()?;
        let values = match op {
            Op::IsSet | Op::NotSet => Vec::new(),
            Op::In | Op::NotIn => words.list()?,
            _ => vec![words.value()?],
        };
        let mut max_age_s = DEFAULT_MAX_AGE_S;
        words.skip();
        if words.keyword("WITHIN") {
            words.skip();
            let rest = text[words.at..].trim_end();
            let ms = parse_duration_ms(rest).ok().filter(|ms| *ms > 0).ok_or_else(|| {
                ConditionError::new(words.at, "expected a duration after WITHIN, as in WITHIN 30m")
            })?;
            max_age_s = ms.div_euclid(1_000).max(1);
            words.at = text.len();
        }
        words.skip();
        if words.at < text.len() {
            return Err(ConditionError::new(
                words.at,
                format!("expected the end or WITHIN, found \"{}\"", &text[words.at..]),
            ));
        }
        let condition = Self { text: text.trim().to_owned(), key, op, values, max_age_s };
        condition.check(op_at)?;
        Ok(condition)
    }

    fn check(&self, op_at: usize) -> Result<(), ConditionError> {
        let ordering = matches!(self.op, Op::Lt | Op::Le | Op::Gt | Op::Ge);
        if ordering && matches!(self.values.first(), Some(AttrValue::Bool(_))) {
            return Err(ConditionError::new(op_at, "true and false have no order; expected == or !="));
        }
        if self.namespace() == "attest" {
            let known = |v: &AttrValue| matches!(v, AttrValue::Text(t) if grade(t).is_some());
            if matches!(self.op, Op::IsSet | Op::NotSet) || !self.values.iter().all(known) {
                return Err(ConditionError::new(
                    op_at,
                    "attest: compares a grade: expected 'self', 'root', 'boot', 'tpm' or 'server'",
                ));
            }
        }
        if self.is_time() && !TIME_KEYS.contains(&self.key.as_str()) {
            return Err(ConditionError::new(
                0,
                format!("\"{}\" is not one of {}", self.key, TIME_KEYS.join(", ")),
            ));
        }
        Ok(())
    }

    /// The text as written.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The attribute it speaks of.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// The part of the key before the first colon.
    pub fn namespace(&self) -> &str {
        self.key.split(':').next().unwrap_or("")
    }

    /// True if the condition speaks of the clock, which every agent has, and not of a fact.
    pub fn is_time(&self) -> bool {
        self.namespace() == "time"
    }

    /// Evaluates against facts; `elapsed_s` is added to their ages.
    pub fn evaluate<'a>(
        &self,
        fact_of: impl Fn(&str) -> Option<std::borrow::Cow<'a, Attribute>>,
        elapsed_s: i64,
    ) -> Finding {
        let attested = self.key.strip_prefix("attest:");
        let key = attested.unwrap_or(&self.key);
        let Some(fact) = fact_of(key) else {
            return self.finding(Truth::Unknown, None, "nobody reports it".to_owned());
        };
        let mut fact = fact.into_owned();
        fact.age_s = fact.age_s.map(|age| age.saturating_add(elapsed_s.max(0)));
        if let Some(age) = fact.age_s
            && age > self.max_age_s
        {
            let why = format!("is {} old, at most {} is good", human(age), human(self.max_age_s));
            return self.finding(Truth::Unknown, Some(fact), why);
        }
        if attested.is_some() {
            let have = fact.grade.unwrap_or(Grade::SelfReported);
            let value = AttrValue::Text(have.to_string());
            let truth = self.hold(&value, |a, b| {
                let (AttrValue::Text(a), AttrValue::Text(b)) = (a, b) else {
                    return None;
                };
                Some(grade(a)?.cmp(&grade(b)?))
            });
            return self.finding(truth, Some(fact), format!("has grade {have}"));
        }
        let truth = self.hold(&fact.value, compare);
        let why = format!("is {}", fact.value);
        self.finding(truth, Some(fact), why)
    }

    /// When the fact the verdict rests on becomes stale: seconds from now, `None` if never.
    pub(crate) fn stale_in(&self, fact: &Attribute, elapsed_s: i64) -> Option<i64> {
        let age = fact.age_s?.saturating_add(elapsed_s.max(0));
        let left = self.max_age_s.saturating_sub(age);
        // At exactly the bound the fact is still good.
        (left >= 0).then(|| left.saturating_add(1))
    }

    /// Evaluates a condition over the clock, in UTC.
    pub(crate) fn evaluate_time(&self, clock: &TimeFacts) -> Truth {
        let value = match self.key.as_str() {
            "time:hour" => AttrValue::Number(f64::from(clock.hour)),
            "time:weekday" => AttrValue::Text(clock.weekday.to_owned()),
            "time:date" => AttrValue::Text(clock.date.clone()),
            _ => return Truth::Unknown,
        };
        self.hold(&value, |a, b| match (a, b) {
            // Dates order as text.
            (AttrValue::Text(a), AttrValue::Text(b)) => {
                Some(a.to_ascii_lowercase().cmp(&b.to_ascii_lowercase()))
            }
            _ => compare(a, b),
        })
    }

    fn finding(&self, truth: Truth, fact: Option<Attribute>, why: String) -> Finding {
        Finding { condition: self.text.clone(), truth, fact, why }
    }

    fn hold(
        &self,
        value: &AttrValue,
        order: impl Fn(&AttrValue, &AttrValue) -> Option<Ordering> + Copy,
    ) -> Truth {
        if let AttrValue::List(items) = value {
            return match self.op {
                Op::IsSet => Truth::from(!items.is_empty()),
                Op::NotSet => Truth::from(items.is_empty()),
                // "Not in" of several values means that none is in.
                Op::Ne | Op::NotIn => {
                    items.iter().map(|item| self.hold(item, order)).min().unwrap_or(Truth::True)
                }
                _ => items.iter().map(|item| self.hold(item, order)).max().unwrap_or(Truth::False),
            };
        }
        let absent = *value == AttrValue::Absent;
        let any_equal = || {
            self.values
                .iter()
                .map(|v| order(value, v).map_or(Truth::Unknown, |o| Truth::from(o.is_eq())))
                .max()
                .unwrap_or(Truth::False)
        };
        match self.op {
            Op::IsSet => Truth::from(!absent),
            Op::NotSet => Truth::from(absent),
            Op::Eq | Op::In if absent => Truth::False,
            // Nothing is neither larger nor smaller nor surely different.
            _ if absent => Truth::Unknown,
            Op::Eq | Op::In => any_equal(),
            Op::Ne | Op::NotIn => match any_equal() {
                Truth::True => Truth::False,
                Truth::False => Truth::True,
                Truth::Unknown => Truth::Unknown,
            },
            Op::Lt | Op::Le | Op::Gt | Op::Ge => {
                let Some(found) = self.values.first().and_then(|v| order(value, v)) else {
                    return Truth::Unknown;
                };
                Truth::from(match self.op {
                    Op::Lt => found.is_lt(),
                    Op::Le => found.is_le(),
                    Op::Gt => found.is_gt(),
                    _ => found.is_ge(),
                })
            }
        }
    }
}

/// What a condition over the clock may speak of.
pub(crate) const TIME_KEYS: [&str; 3] = ["time:hour", "time:weekday", "time:date"];

/// One hour of the clock, in UTC.
#[derive(Clone, Debug)]
pub(crate) struct TimeFacts {
    pub(crate) hour: u8,
    pub(crate) weekday: &'static str,
    pub(crate) date: String,
}

fn grade(word: &str) -> Option<Grade> {
    GRADES.iter().find(|(w, _)| *w == word).map(|(_, grade)| *grade)
}

fn compare(a: &AttrValue, b: &AttrValue) -> Option<Ordering> {
    match (a, b) {
        (AttrValue::Bool(a), AttrValue::Bool(b)) => Some(a.cmp(b)),
        (AttrValue::Number(a), AttrValue::Number(b)) => a.partial_cmp(b),
        (AttrValue::Text(a), AttrValue::Text(b)) => Some(compare_versions(a, b)),
        _ => None,
    }
}

/// Orders versions: runs of digits as numbers, the rest as text; missing parts count as zero, so 1.40 = 1.40.0.
fn compare_versions(a: &str, b: &str) -> Ordering {
    if a == b {
        return Ordering::Equal;
    }
    let (a, b) = (pieces(a), pieces(b));
    for i in 0..a.len().max(b.len()) {
        let zero = Piece::Number("0");
        let (x, y) = (a.get(i).unwrap_or(&zero), b.get(i).unwrap_or(&zero));
        let order = match (x, y) {
            (Piece::Number(x), Piece::Number(y)) => {
                let (x, y) = (x.trim_start_matches('0'), y.trim_start_matches('0'));
                (x.len(), x).cmp(&(y.len(), y))
            }
            (Piece::Text(x), Piece::Text(y)) => x.cmp(y),
            // A word sorts before a number: 1.0-rc before 1.0.0.
            (Piece::Text(_), Piece::Number(_)) => Ordering::Less,
            (Piece::Number(_), Piece::Text(_)) => Ordering::Greater,
        };
        if order.is_ne() {
            return order;
        }
    }
    Ordering::Equal
}

enum Piece<'a> {
    Number(&'a str),
    Text(&'a str),
}

fn pieces(text: &str) -> Vec<Piece<'_>> {
    let mut out = Vec::new();
    for part in text.split(['.', '-', '_', '+', ' ']) {
        let mut rest = part;
        while let Some(first) = rest.chars().next() {
            let digits = first.is_ascii_digit();
            let end = rest.find(|c: char| c.is_ascii_digit() != digits).unwrap_or(rest.len());
            out.push(if digits { Piece::Number(&rest[..end]) } else { Piece::Text(&rest[..end]) });
            rest = &rest[end..];
        }
    }
    out
}

fn human(seconds: i64) -> String {
    match seconds {
        s if s < 120 => format!("{s} s"),
        s if s < 7_200 => format!("{} min", s / 60),
        s => format!("{} h", s / 3_600),
    }
}

/// Why a text is not a condition.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ConditionError {
    /// The byte of the condition's text it is about.
    pub at: usize,
    /// What was expected.
    pub message: String,
}

impl ConditionError {
    fn new(at: usize, message: impl Into<String>) -> Self {
        Self { at, message: message.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::borrow::Cow;

    fn truth(condition: &str, value: Option<AttrValue>) -> Truth {
        let fact = value.map(Attribute::server);
        Condition::parse(condition).expect("valid").evaluate(|_| fact.as_ref().map(Cow::Borrowed), 0).truth
    }

    fn text(t: &str) -> Option<AttrValue> {
        Some(AttrValue::Text(t.to_owned()))
    }

    #[test]
    fn every_operator() {
        use Truth::{False, True, Unknown};
        let absent = Some(AttrValue::Absent);
        for (condition, value, want) in [
            ("node:os == 'linux'", text("linux"), True),
            ("node:os == \"linux\"", text("macos"), False),
            ("node:os != 'linux'", text("macos"), True),
            ("node:os != 'linux'", absent.clone(), Unknown),
            ("node:os IN ['linux', 'macos']", text("macos"), True),
            ("node:os NOT IN ['linux']", text("macos"), True),
            ("node:os NOT IN ['linux']", None, Unknown),
            ("node:v >= '1.40'", text("1.40.0"), True),
            ("node:v > '1.9'", text("1.10"), True),
            ("node:v < '1.40'", text("1.40.1"), False),
            ("node:v<='1.40'", text("1.39"), True),
            ("node:n > 3", Some(AttrValue::Number(4.0)), True),
            ("node:n > 3", text("4"), Unknown),
            ("node:b == true", Some(AttrValue::Bool(true)), True),
            ("node:x IS SET", text("y"), True),
            ("node:x IS SET", absent.clone(), False),
            ("node:x IS SET", None, Unknown),
            ("node:x NOT SET", absent.clone(), True),
            ("node:x IS NOT SET", absent.clone(), True),
            ("node:x NOT SET", None, Unknown),
            ("node:x == 'a'", absent, False),
            (
                "user:groups IN ['group:a']",
                Some(AttrValue::List(vec![
                    AttrValue::Text("group:b".to_owned()),
                    AttrValue::Text("group:a".to_owned()),
                ])),
                True,
            ),
        ] {
            assert_eq!(truth(condition, value.clone()), want, "{condition} {value:?}");
        }
    }

    #[test]
    fn age_and_grade() {
        let fact = Attribute {
            value: AttrValue::Bool(true),
            source: None,
            grade: Some(Grade::Boot),
            age_s: Some(3_000),
        };
        let run = |c: &str, elapsed| {
            Condition::parse(c).expect("valid").evaluate(|_| Some(Cow::Borrowed(&fact)), elapsed).truth
        };
        assert_eq!(run("user:mfa == true WITHIN 1h", 0), Truth::True);
        assert_eq!(run("user:mfa == true WITHIN 1h", 601), Truth::Unknown);
        assert_eq!(run("node:x == true", 23 * 3_600), Truth::True);
        assert_eq!(run("node:x == true", 24 * 3_600), Truth::Unknown);
        assert_eq!(run("attest:node:x >= 'root'", 0), Truth::True);
        assert_eq!(run("attest:node:x >= 'tpm'", 0), Truth::False);
        let condition = Condition::parse("node:x == true WITHIN 1h").expect("valid");
        assert_eq!(condition.stale_in(&fact, 0), Some(601));
    }

    #[test]
    fn mistakes_are_placed() {
        for (bad, at) in [
            ("os == 'linux'", 0),
            ("node:os = 'linux'", 8),
            ("node:os == linux", 11),
            ("node:os == 'linux", 11),
            ("node:os IN 'linux'", 11),
            ("node:os == 'a' and", 15),
            ("node:b > true", 7),
            ("node:b == true WITHIN x", 22),
            ("attest:node:os == 'gold'", 15),
            ("time:minute == 3", 0),
            ("", 0),
        ] {
            assert_eq!(Condition::parse(bad).expect_err(bad).at, at, "{bad}");
        }
        assert!(Condition::parse(&format!("node:x == '{}'", "a".repeat(MAX_CONDITION))).is_err());
        let list = vec!["1"; MAX_LIST + 1].join(",");
        assert!(Condition::parse(&format!("node:x IN [{list}]")).is_err());
    }
}
