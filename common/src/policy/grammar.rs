//! The shape of the file as data: the reader, its suggestions and the JSON schema all come from these tables.

/// What a field holds.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Kind {
    Bool,
    /// Free text.
    Text,
    /// One of these words.
    Word(&'static [&'static str]),
    /// A list of strings.
    Texts,
    /// A string or a list of strings.
    TextOrTexts,
    /// An object whose values are strings.
    MapOfText,
    /// An object whose values are lists of strings.
    MapOfTexts,
    /// An object whose values are lists of anything: application capabilities.
    MapOfLists,
    /// An object whose values are strings, numbers or booleans.
    MapOfValues,
    /// An object of a known shape.
    Object(&'static Shape),
    /// An object of a known shape or a list of them.
    ObjectOrList(&'static Shape),
    /// A list of objects of a known shape.
    List(&'static Shape),
    /// Accepted and without meaning here.
    Ignored,
}

/// One field of an object.
#[derive(Debug)]
pub(crate) struct Field {
    pub(crate) name: &'static str,
    /// An older name of the same field.
    pub(crate) alias: Option<&'static str>,
    pub(crate) kind: Kind,
    pub(crate) doc: &'static str,
}

/// An object of the file.
#[derive(Debug)]
pub(crate) struct Shape {
    pub(crate) name: &'static str,
    pub(crate) doc: &'static str,
    pub(crate) required: &'static [&'static str],
    pub(crate) fields: &'static [Field],
}

const fn field(name: &'static str, kind: Kind, doc: &'static str) -> Field {
    Field { name, alias: None, kind, doc }
}

const fn field_or(name: &'static str, alias: &'static str, kind: Kind, doc: &'static str) -> Field {
    Field { name, alias: Some(alias), kind, doc }
}

pub(crate) static FILE: Shape = Shape {
    name: "policy",
    doc: "A Warren policy. What no rule allows is denied.",
    required: &[],
    fields: &[
        field("groups", Kind::MapOfTexts, "Sets of users: \"group:name\": [\"ann@example.com\"]."),
        field("hosts", Kind::MapOfText, "Names for addresses and networks."),
        field(
            "ipsets",
            Kind::MapOfTexts,
            "Sets of addresses: \"ipset:name\": [\"add 10.0.0.0/8\", \"remove 10.1.0.0/16\"].",
        ),
        field(
            "tagOwners",
            Kind::MapOfTexts,
            "Tags, and who may give them to a device. A tag used anywhere must stand here.",
        ),
        field("acls", Kind::List(&ACL), "Rules in the older form, with ports at the destination."),
        field(
            "grants",
            Kind::List(&GRANT),
            "Rules: who may reach what, on which ports and under which conditions.",
        ),
        field("deny", Kind::List(&DENY), "What is denied whatever the rules allow."),
        field(
            "postures",
            Kind::MapOfTexts,
            "Named conditions: \"posture:name\": [\"node:os == 'linux'\"]. All of a list must hold.",
        ),
        field(
            "defaultSrcPosture",
            Kind::Texts,
            "Postures of which every source must meet one, for every rule.",
        ),
        field(
            "autoApprovers",
            Kind::Object(&APPROVERS),
            "Whose routes and exit nodes need no approval by hand.",
        ),
        field("nodeAttrs", Kind::List(&NODE_ATTR), "Attributes for devices."),
        field("ssh", Kind::List(&SSH), "Who may log in where, as which user."),
        field(
            "tests",
            Kind::List(&TEST),
            "Connections that must be allowed or denied; a failing test blocks the file.",
        ),
        field(
            "sshTests",
            Kind::List(&SSH_TEST),
            "Logins that must be allowed or denied; a failing test blocks the file.",
        ),
        field("randomizeClientPort", Kind::Bool, "Gives every device the attribute randomize-client-port."),
        field("derpMap", Kind::Ignored, "Ignored: relays are not part of the policy."),
        field("disableIPv4", Kind::Ignored, "Ignored: give devices the attribute disable-ipv4."),
        field("oneCGNATRoute", Kind::Ignored, "Ignored: routes to the overlay are always exact."),
        field("$schema", Kind::Text, "The schema of this file, for editors."),
    ],
};

pub(crate) static ACL: Shape = Shape {
    name: "acl",
    doc: "A rule with ports at the destination.",
    required: &["action", "src", "dst"],
    fields: &[
        field("action", Kind::Word(&["accept"]), "Always accept; denials stand in \"deny\"."),
        field_or("src", "users", Kind::Texts, "Who: users, groups, tags, hosts, addresses, autogroups or *."),
        field_or("dst", "ports", Kind::Texts, "What: selector:ports, as in \"tag:web:80,443\"."),
        field("proto", Kind::Text, "A protocol by name or number; TCP, UDP and ICMP if absent."),
        SRC_POSTURE,
        DST_POSTURE,
        IGNORE_DEFAULT,
        WHEN,
        EXPIRES,
        STAGED,
        COMMENT,
    ],
};

pub(crate) static GRANT: Shape = Shape {
    name: "grant",
    doc: "A rule: src may reach dst.",
    required: &["src", "dst"],
    fields: &[
        field("src", Kind::Texts, "Who: users, groups, tags, hosts, addresses, IP sets, autogroups or *."),
        field("dst", Kind::Texts, "What: the same selectors, autogroup:self or autogroup:internet."),
        field("ip", Kind::Texts, "Which traffic: \"*\", \"443\", \"tcp:443\", \"udp:53,123\", \"icmp:*\"."),
        field(
            "app",
            Kind::MapOfLists,
            "Capabilities for applications at the destination: \"example.com/cap/x\": [{…}].",
        ),
        field("via", Kind::Texts, "Only through devices with one of these tags."),
        SRC_POSTURE,
        DST_POSTURE,
        IGNORE_DEFAULT,
        WHEN,
        EXPIRES,
        STAGED,
        COMMENT,
    ],
};

pub(crate) static DENY: Shape = Shape {
    name: "deny",
    doc: "A denial: wins over every rule. An unknown attribute counts as a match.",
    required: &["src", "dst"],
    fields: &[
        field("src", Kind::Texts, "Who must not."),
        field("dst", Kind::Texts, "Reach what."),
        field("ip", Kind::Texts, "Which traffic; everything if absent."),
        SRC_POSTURE,
        DST_POSTURE,
        WHEN,
        EXPIRES,
        STAGED,
        COMMENT,
    ],
};

const SRC_POSTURE: Field =
    field("srcPosture", Kind::TextOrTexts, "Postures of which the source must meet one.");
const DST_POSTURE: Field =
    field("dstPosture", Kind::TextOrTexts, "Postures of which the destination must meet one.");
const IGNORE_DEFAULT: Field =
    field("ignoreDefaultPosture", Kind::Bool, "True: defaultSrcPosture does not apply to this rule.");
const WHEN: Field = field(
    "when",
    Kind::ObjectOrList(&WHEN_SHAPE),
    "Weekly windows in which the rule is in force; always if absent.",
);
const EXPIRES: Field =
    field("expires", Kind::Text, "The rule ends here: a time as RFC 3339, 2027-01-31T18:00:00Z.");
const STAGED: Field = field("staged", Kind::Bool, "True: decided and counted, not enforced.");
const COMMENT: Field = field("comment", Kind::Text, "For people.");

pub(crate) static WHEN_SHAPE: Shape = Shape {
    name: "when",
    doc: "A weekly window.",
    required: &[],
    fields: &[
        field("days", Kind::Texts, "mon, tue, wed, thu, fri, sat, sun; every day if absent."),
        field("from", Kind::Text, "hh:mm, the start; 00:00 if absent."),
        field("to", Kind::Text, "hh:mm, the end, on the next day if not after the start; 24:00 if absent."),
        field("zone", Kind::Text, "A time zone, Europe/Berlin; UTC if absent."),
    ],
};

pub(crate) static APPROVERS: Shape = Shape {
    name: "autoApprovers",
    doc: "Whose routes need no approval by hand.",
    required: &[],
    fields: &[
        field(
            "routes",
            Kind::MapOfTexts,
            "By network: users, groups and tags whose devices may offer it or a part of it.",
        ),
        field("exitNode", Kind::Texts, "Users, groups and tags whose devices may be exit nodes."),
        field("services", Kind::Ignored, "Ignored: Warren has no services."),
    ],
};

pub(crate) static NODE_ATTR: Shape = Shape {
    name: "nodeAttr",
    doc: "Attributes for the devices of a target.",
    required: &["target"],
    fields: &[
        field("target", Kind::Texts, "Which devices."),
        field("attr", Kind::Texts, "Attributes to give them."),
        field("app", Kind::MapOfLists, "Configuration for applications on them."),
        field("ipPool", Kind::Texts, "Networks inside 100.64.0.0/10 to take their address from."),
        COMMENT,
    ],
};

pub(crate) static SSH: Shape = Shape {
    name: "ssh",
    doc: "Who may log in where, as which user.",
    required: &["action", "src", "dst", "users"],
    fields: &[
        field("action", Kind::Word(&["accept", "check"]), "accept, or check: accept after a fresh sign-in."),
        field("src", Kind::Texts, "Who: users, groups, tags, autogroup:member, autogroup:tagged."),
        field("dst", Kind::Texts, "Where: tags, users, autogroup:self, autogroup:member, autogroup:tagged."),
        field("users", Kind::Texts, "As: login names, autogroup:nonroot, localpart:*@domain."),
        field("checkPeriod", Kind::Text, "How long a sign-in counts: \"12h\", at most 168h, or \"always\"."),
        field("acceptEnv", Kind::Texts, "Environment variables to pass, with * and ?."),
        SRC_POSTURE,
        COMMENT,
    ],
};

pub(crate) static TEST: Shape = Shape {
    name: "test",
    doc: "Connections of one source that must be allowed or denied.",
    required: &["src"],
    fields: &[
        field_or("src", "user", Kind::Text, "From."),
        field_or("accept", "allow", Kind::Texts, "Each must be allowed: selector:port."),
        field("deny", Kind::Texts, "Each must be denied: selector:port."),
        field("proto", Kind::Text, "tcp, udp or sctp; any of TCP, UDP and ICMP if absent."),
        field("srcPostureAttrs", Kind::MapOfValues, "Attributes the source has in this test."),
        COMMENT,
    ],
};

pub(crate) static SSH_TEST: Shape = Shape {
    name: "sshTest",
    doc: "Logins of one source that must be allowed or denied.",
    required: &["src", "dst"],
    fields: &[
        field("src", Kind::Text, "From."),
        field("dst", Kind::Texts, "To: each of these."),
        field("accept", Kind::Texts, "Login names that must work, at once or after a sign-in."),
        field("check", Kind::Texts, "Login names that must work after a sign-in."),
        field("deny", Kind::Texts, "Login names that must not work."),
        field("srcPostureAttrs", Kind::MapOfValues, "Attributes the source has in this test."),
        COMMENT,
    ],
};
