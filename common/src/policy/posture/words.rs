//! The words of a condition.

use super::{AttrValue, ConditionError, MAX_LIST, Op};

/// What of a condition's text is still to be read.
pub(super) struct Words<'a> {
    pub(super) text: &'a str,
    pub(super) at: usize,
}

impl Words<'_> {
    pub(super) fn rest(&self) -> &str {
        &self.text[self.at..]
    }

    pub(super) fn skip(&mut self) -> usize {
        self.at = self.text.len() - self.rest().trim_start().len();
        self.at
    }

    pub(super) fn key(&mut self) -> Result<String, ConditionError> {
        let start = self.skip();
        let is_key = |c: char| c.is_ascii_alphanumeric() || matches!(c, ':' | '_' | '-' | '.' | '/');
        let len = self.rest().find(|c| !is_key(c)).unwrap_or(self.rest().len());
        let key = self.rest()[..len].to_owned();
        self.at += len;
        match key.split_once(':') {
            Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() => Ok(key),
            _ => Err(ConditionError::new(start, "expected an attribute, as in node:os")),
        }
    }

    pub(super) fn keyword(&mut self, word: &str) -> bool {
        let found = self.rest().get(..word.len()).is_some_and(|head| head.eq_ignore_ascii_case(word))
            && !self.rest()[word.len()..].starts_with(|c: char| c.is_ascii_alphanumeric());
        if found {
            self.at += word.len();
        }
        found
    }

    pub(super) fn operator(&mut self) -> Result<Op, ConditionError> {
        let start = self.skip();
        for (sign, op) in
            [("==", Op::Eq), ("!=", Op::Ne), ("<=", Op::Le), (">=", Op::Ge), ("<", Op::Lt), (">", Op::Gt)]
        {
            if self.rest().starts_with(sign) {
                self.at += sign.len();
                return Ok(op);
            }
        }
        if self.keyword("IN") {
            return Ok(Op::In);
        }
        if self.keyword("IS") {
            self.skip();
            if self.keyword("SET") {
                return Ok(Op::IsSet);
            }
            let not = self.keyword("NOT");
            self.skip();
            if not && self.keyword("SET") {
                return Ok(Op::NotSet);
            }
        } else if self.keyword("NOT") {
            self.skip();
            if self.keyword("IN") {
                return Ok(Op::NotIn);
            }
            if self.keyword("SET") {
                return Ok(Op::NotSet);
            }
        }
        Err(ConditionError::new(start, "expected ==, !=, <, <=, >, >=, IN, NOT IN, IS SET or NOT SET"))
    }

    pub(super) fn list(&mut self) -> Result<Vec<AttrValue>, ConditionError> {
        let start = self.skip();
        if !self.rest().starts_with('[') {
            return Err(ConditionError::new(start, "expected a list, as in ['a', 'b']"));
        }
        self.at += 1;
        let mut out = Vec::new();
        loop {
            self.skip();
            if self.rest().starts_with(']') {
                self.at += 1;
                return Ok(out);
            }
            if out.len() >= MAX_LIST {
                return Err(ConditionError::new(start, format!("a list has at most {MAX_LIST} values")));
            }
            out.push(self.value()?);
            let at = self.skip();
            if self.rest().starts_with(',') {
                self.at += 1;
            } else if !self.rest().starts_with(']') {
                return Err(ConditionError::new(at, "expected a comma or ]"));
            }
        }
    }

    pub(super) fn value(&mut self) -> Result<AttrValue, ConditionError> {
        let start = self.skip();
        if let Some(quote) = self.rest().chars().next().filter(|c| matches!(c, '\'' | '"')) {
            let body = &self.rest()[1..];
            let Some(end) = body.find(quote) else {
                return Err(ConditionError::new(start, "the string is not closed"));
            };
            let text = body[..end].to_owned();
            self.at += end + 2;
            return Ok(AttrValue::Text(text));
        }
        if self.keyword("true") {
            return Ok(AttrValue::Bool(true));
        }
        if self.keyword("false") {
            return Ok(AttrValue::Bool(false));
        }
        let len = self
            .rest()
            .find(|c: char| !(c.is_ascii_digit() || matches!(c, '.' | '-')))
            .unwrap_or(self.rest().len());
        if let Some(number) = self.rest()[..len].parse().ok().filter(|n: &f64| n.is_finite()) {
            self.at += len;
            return Ok(AttrValue::Number(number));
        }
        Err(ConditionError::new(start, "expected a value: 'text' in quotes, a number, true or false"))
    }
}
