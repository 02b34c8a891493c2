//! The JSON schema of a policy file, for editors. Made from the tables the reader uses, so the two cannot disagree.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::grammar::{FILE, Kind, Shape};

/// The schema (JSON Schema, draft 2020-12) of a policy file, as text.
pub fn json_schema() -> String {
    let mut shapes = BTreeMap::new();
    collect(&FILE, &mut shapes);
    let definitions: Map<String, Value> =
        shapes.iter().map(|(name, shape)| ((*name).to_owned(), object(shape))).collect();
    let schema = json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Warren policy",
        "$ref": "#/$defs/policy",
        "$defs": definitions,
    });
    let mut text = format!("{schema:#}");
    text.push('\n');
    text
}

fn collect(shape: &'static Shape, out: &mut BTreeMap<&'static str, &'static Shape>) {
    if out.insert(shape.name, shape).is_some() {
        return;
    }
    for field in shape.fields {
        if let Kind::Object(inner) | Kind::ObjectOrList(inner) | Kind::List(inner) = field.kind {
            collect(inner, out);
        }
    }
}

fn object(shape: &Shape) -> Value {
    let mut properties = Map::new();
    for field in shape.fields {
        let mut value = kind(field.kind);
        if let Value::Object(map) = &mut value {
            map.insert("description".to_owned(), json!(field.doc));
        }
        properties.insert(field.name.to_owned(), value);
    }
    json!({
        "type": "object",
        "description": shape.doc,
        "properties": properties,
        "required": shape.required,
        // Keys that start with # are notes.
        "patternProperties": {"^#": true},
        "additionalProperties": false,
    })
}

fn kind(kind: Kind) -> Value {
    let texts = json!({"type": "array", "items": {"type": "string"}});
    let reference = |shape: &Shape| json!({"$ref": format!("#/$defs/{}", shape.name)});
    match kind {
        Kind::Bool => json!({"type": "boolean"}),
        Kind::Text => json!({"type": "string"}),
        Kind::Word(words) => json!({"enum": words}),
        Kind::Texts => texts,
        Kind::TextOrTexts => json!({"anyOf": [{"type": "string"}, texts]}),
        Kind::MapOfText => json!({"type": "object", "additionalProperties": {"type": "string"}}),
        Kind::MapOfTexts => json!({"type": "object", "additionalProperties": texts}),
        Kind::MapOfLists => json!({"type": "object", "additionalProperties": {"type": "array"}}),
        Kind::MapOfValues => json!({
            "type": "object",
            "additionalProperties": {"type": ["string", "number", "boolean", "null"]},
        }),
        Kind::Object(shape) => reference(shape),
        Kind::ObjectOrList(shape) => json!({
            "anyOf": [reference(shape), {"type": "array", "items": reference(shape)}],
        }),
        Kind::List(shape) => json!({"type": "array", "items": reference(shape)}),
        Kind::Ignored => json!({"deprecated": true}),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checked_in_schema_is_current() {
        let checked_in = include_str!("policy.schema.json");
        assert_eq!(
            checked_in,
            json_schema(),
            "write it anew: cargo run -p warren-common --example policy_schema > common/src/policy/policy.schema.json"
        );
    }
}
