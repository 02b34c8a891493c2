//! What a policy is compiled against: the people and devices of a network, as the contract's JSON.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Deserializer, Serialize};

use super::posture::Attributes;

/// The people and devices of a network.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Inventory {
    /// Every person.
    #[serde(default)]
    pub users: Vec<User>,
    /// Every device by its key: the device id in the coordinator, the device's name in files.
    #[serde(default)]
    pub nodes: BTreeMap<String, Node>,
    /// Mail domains of this network, lower case. If empty, the domain of the person with the lowest id (who made the
    /// network): see [`Inventory::domains`].
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub own_domains: BTreeSet<String>,
    /// What the policy's `autoApprovers` approve counts as approved, besides `approved_routes`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub auto_approve: bool,
}

impl Inventory {
    /// The mail domains that `user:*@domain` and `localpart:*@domain` may name.
    pub fn domains(&self) -> BTreeSet<String> {
        if !self.own_domains.is_empty() {
            return self.own_domains.clone();
        }
        self.users
            .iter()
            .filter_map(|u| Some((u.order(), u.domain()?)))
            .min()
            .map(|(_, domain)| domain)
            .into_iter()
            .collect()
    }
}

/// A person.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct User {
    /// The user's id; a number in files is its decimal text.
    #[serde(deserialize_with = "text_or_number")]
    pub id: String,
    /// The name by which devices and policies may speak of the user.
    #[serde(default)]
    pub name: String,
    /// The mail address.
    #[serde(default)]
    pub email: Option<String>,
    /// What the person may administer: `owner`, `admin`, `it-admin`, …
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub roles: BTreeSet<String>,
    /// Facts about the person, keys in the `user:` namespace.
    #[serde(default, skip_serializing_if = "Attributes::is_empty")]
    pub attributes: Attributes,
}

impl User {
    /// The part of the mail address after the last @, lower case.
    pub fn domain(&self) -> Option<String> {
        let (_, domain) = self.email.as_deref()?.rsplit_once('@')?;
        (!domain.is_empty()).then(|| domain.to_ascii_lowercase())
    }

    /// Sorts ids that are numbers as numbers.
    fn order(&self) -> (usize, String) {
        let numeric = self.id.bytes().all(|b| b.is_ascii_digit());
        (if numeric { self.id.len() } else { 0 }, self.id.clone())
    }
}

/// A device.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Node {
    /// The name people see. Never selects in policy.
    #[serde(default)]
    pub hostname: String,
    /// Whose it is: a user's id, name or mail address. A device with tags is nobody's.
    #[serde(default)]
    pub user: Option<String>,
    /// Its roles, `tag:web`.
    #[serde(default, deserialize_with = "or_default")]
    pub tags: BTreeSet<String>,
    /// Its IPv4 overlay address.
    #[serde(default)]
    pub ipv4: Option<IpAddr>,
    /// Its IPv6 overlay address.
    #[serde(default)]
    pub ipv6: Option<IpAddr>,
    /// The networks it offers to carry.
    #[serde(default, deserialize_with = "or_default")]
    pub routable_ips: BTreeSet<IpNet>,
    /// The networks of `routable_ips` that it may carry.
    #[serde(default, deserialize_with = "or_default")]
    pub approved_routes: BTreeSet<IpNet>,
    /// Facts about the device.
    #[serde(default, skip_serializing_if = "Attributes::is_empty")]
    pub attributes: Attributes,
}

impl Node {
    /// The device's own overlay addresses.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> + '_ {
        self.ipv4.into_iter().chain(self.ipv6)
    }

    /// The routes it offers and may carry, without the default routes.
    pub fn subnet_routes(&self) -> impl Iterator<Item = IpNet> + '_ {
        self.carried().filter(|net| net.prefix_len() > 0)
    }

    /// True if it offers and may carry a default route.
    pub fn is_exit_node(&self) -> bool {
        self.carried().any(|net| net.prefix_len() == 0)
    }

    fn carried(&self) -> impl Iterator<Item = IpNet> + '_ {
        self.approved_routes.iter().filter(|net| self.routable_ips.contains(net)).map(IpNet::trunc)
    }
}

fn text_or_number<'de, D: Deserializer<'de>>(d: D) -> Result<String, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Id {
        Number(u64),
        Text(String),
    }
    Ok(match Id::deserialize(d)? {
        Id::Number(n) => n.to_string(),
        Id::Text(t) => t,
    })
}

/// `null` is the default.
fn or_default<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(d: D) -> Result<T, D::Error> {
    Ok(Option::<T>::deserialize(d)?.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_contract() {
        let inv: Inventory = serde_json::from_str(
            r#"{"users": [{"id": 10, "name": "zoe", "email": "zoe@b.example"}, {"id": 9, "name": "ann", "email": "ann@A.example"}],
                "nodes": {"n": {"hostname": "n", "user": "ann", "tags": null, "ipv4": "100.64.0.1", "ipv6": null,
                  "routable_ips": ["10.0.0.0/8", "0.0.0.0/0"], "approved_routes": ["10.0.0.0/8", "192.168.0.0/16"],
                  "attributes": {"node:os": {"value": "linux", "source": "agent", "grade": "self", "age_s": 3}}}}}"#,
        )
        .expect("valid");
        assert_eq!(inv.domains(), BTreeSet::from(["a.example".to_owned()]));
        let node = &inv.nodes["n"];
        assert_eq!(node.subnet_routes().count(), 1);
        assert!(!node.is_exit_node());
        assert_eq!(node.attributes["node:os"].age_s, Some(3));
    }
}
