//! Names that people and machines give: what is kept of them.

/// Longest device name, in bytes: one DNS label (RFC 1035).
pub const MAX_NAME: usize = 63;
/// Longest tag with its prefix, in bytes.
pub(super) const MAX_TAG: usize = 64;
/// Longest e-mail address, in bytes (RFC 5321).
pub(super) const MAX_EMAIL: usize = 254;

/// A host name as one DNS label: the part before the first dot in lower case, other characters as single dashes.
/// Never empty: a name without usable characters becomes `device`.
pub fn sanitise_hostname(text: &str) -> String {
    let mut out = String::new();
    for c in text.split('.').next().unwrap_or_default().chars().take(4 * MAX_NAME) {
        let c = c.to_ascii_lowercase();
        if c.is_ascii_alphanumeric() {
            out.push(c);
        } else if !out.is_empty() && !out.ends_with('-') {
            out.push('-');
        }
    }
    out.truncate(MAX_NAME);
    let out = out.trim_end_matches('-');
    if out.is_empty() { "device".to_owned() } else { out.to_owned() }
}

/// `wanted`, or `wanted-1`, `wanted-2`… : the first that `taken` doesn't know.
pub(super) fn unique_name(wanted: &str, taken: impl Fn(&str) -> bool) -> String {
    if !taken(wanted) {
        return wanted.to_owned();
    }
    let mut number = 1u64;
    loop {
        let suffix = format!("-{number}");
        let stem = &wanted[..wanted.len().min(MAX_NAME - suffix.len())];
        let name = format!("{}{suffix}", stem.trim_end_matches('-'));
        if !taken(&name) {
            return name;
        }
        number += 1; // ends: `taken` knows finitely many names (MAX_DEVICES)
    }
}

/// True for `tag:` followed by a letter and letters, digits or dashes.
pub fn valid_tag(text: &str) -> bool {
    text.len() <= MAX_TAG
        && text.strip_prefix("tag:").is_some_and(|name| {
            name.starts_with(|c: char| c.is_ascii_lowercase())
                && name.bytes().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-')
        })
}

/// True for something that policy can name as a user: one `@` with text on both sides, no spaces.
pub fn valid_email(text: &str) -> bool {
    text.len() <= MAX_EMAIL
        && !text.chars().any(|c| c.is_whitespace() || c.is_control())
        && text
            .split_once('@')
            .is_some_and(|(user, host)| !user.is_empty() && !host.is_empty() && !host.contains('@'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn host_names_become_labels() {
        for (text, want) in [
            ("web", "web"),
            ("Ann's MacBook Pro", "ann-s-macbook-pro"),
            ("db.example.com", "db"),
            ("--x--", "x"),
            ("", "device"),
            ("日本", "device"),
        ] {
            assert_eq!(sanitise_hostname(text), want);
        }
    }

    #[test]
    fn duplicates_get_a_suffix_within_the_bound() {
        let long = "a".repeat(MAX_NAME);
        let name = unique_name(&long, |n| n == long);
        assert_eq!(name.len(), MAX_NAME);
        assert!(name.ends_with("-1"));
        assert_eq!(unique_name("web", |n| n == "web" || n == "web-1"), "web-2");
    }

    #[test]
    fn tags_and_emails_are_checked() {
        assert!(valid_tag("tag:web-2"));
        for bad in ["web", "tag:", "tag:2", "tag:Web", "tag:a b", &format!("tag:{}", "a".repeat(MAX_TAG))] {
            assert!(!valid_tag(bad), "{bad}");
        }
        assert!(valid_email("ann@example.com"));
        for bad in ["ann", "@x", "a@", "a b@x", "a@b@c"] {
            assert!(!valid_email(bad), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn any_text_becomes_a_label(text in ".{0,300}") {
            let name = sanitise_hostname(&text);
            prop_assert!(!name.is_empty() && name.len() <= MAX_NAME);
            prop_assert!(name.bytes().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-'));
            prop_assert!(!name.starts_with('-') && !name.ends_with('-'));
        }
    }
}
