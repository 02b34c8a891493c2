//! The arguments of `serve`.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use ipnet::{Ipv4Net, Ipv6Net};

use super::{StateDir, parse_duration};
use crate::embedded_relay::RelayListen;
use crate::policy_source::Source;
use crate::policy_source::git::{Branch, DEFAULT_POLL, GitOptions, GitUrl, RepoPath, Signatures};
use crate::serve::{NetworkName, Options, PublicUrl};

/// `serve`
#[derive(Clone, Debug, Args)]
pub struct ServeArgs {
    /// Where everything is kept.
    #[command(flatten)]
    pub dir: StateDir,
    /// Where to listen for agents
    #[arg(long, value_name = "ADDR:PORT")]
    pub listen: SocketAddr,
    /// Under which URL agents reach this coordinator
    #[arg(long, value_name = "URL")]
    pub public_url: PublicUrl,
    /// The policy file; watched, and applied when it changes
    #[arg(long, value_name = "FILE")]
    pub policy: Option<PathBuf>,
    /// The policy as a file in a git repository.
    #[command(flatten)]
    pub git: GitArgs,
    /// The database, sqlite:///path/to/file; the default is in the state directory
    #[arg(long, value_name = "URL")]
    pub database: Option<String>,
    /// The TLS certificate chain (PEM)
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,
    /// The TLS private key (PEM)
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
    /// Don't run a relay and STUN server inside the coordinator
    #[arg(long, conflicts_with_all = ["relay_listen", "stun_listen"])]
    pub no_embedded_relay: bool,
    /// Where the embedded relay listens (UDP and TCP)
    #[arg(long, value_name = "ADDR:PORT", default_value = "0.0.0.0:3340")]
    pub relay_listen: SocketAddr,
    /// Where the embedded STUN server listens (UDP)
    #[arg(long, value_name = "ADDR:PORT", default_value = "0.0.0.0:3478")]
    pub stun_listen: SocketAddr,
    /// A second address of this host for STUN, with another port: lets agents find out how their NAT behaves
    #[arg(long, value_name = "ADDR:PORT", conflicts_with = "no_embedded_relay")]
    pub stun_second: Option<SocketAddr>,
    /// The pool of IPv4 overlay addresses; 100.64.0.0/10 in a new network
    #[arg(long, value_name = "CIDR")]
    pub ipv4_pool: Option<Ipv4Net>,
    /// The prefix of IPv6 overlay addresses; derived from the network's id in a new network
    #[arg(long, value_name = "CIDR")]
    pub ipv6_prefix: Option<Ipv6Net>,
    /// The network's name, for people; the host of --public-url in a new network
    #[arg(long, value_name = "NAME")]
    pub network_name: Option<NetworkName>,
    /// How long an agent works without hearing from us: 5m to 7d
    #[arg(long, value_name = "TIME", default_value = "24h", value_parser = parse_duration)]
    pub lease: Duration,
}

/// The policy as a file in a git repository.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Policy in a git repository")]
pub struct GitArgs {
    /// Follow a policy file in this repository instead: https://, ssh://, USER@HOST:PATH or an absolute path
    #[arg(long, value_name = "URL", conflicts_with = "policy")]
    pub policy_git: Option<GitUrl>,
    /// The branch [default: main]
    #[arg(long, value_name = "NAME", requires = "policy_git")]
    pub policy_git_branch: Option<Branch>,
    /// The file in the repository [default: policy.hujson]
    #[arg(long, value_name = "PATH", requires = "policy_git")]
    pub policy_git_path: Option<RepoPath>,
    /// How often the repository is looked at, 1s to 24h [default: 1m]
    #[arg(long, value_name = "TIME", requires = "policy_git", value_parser = parse_duration)]
    pub policy_git_poll: Option<Duration>,
    /// What commits without a good SSH signature lead to [default: required]
    #[arg(long, value_name = "off|warn|required", requires = "policy_git")]
    pub policy_git_signatures: Option<Signatures>,
    /// Whose signatures count, in OpenSSH's allowed-signers format; not in the repository
    #[arg(long, value_name = "FILE", requires = "policy_git")]
    pub policy_git_allowed_signers: Option<PathBuf>,
    /// Follow the branch also when its history was rewritten
    #[arg(long, requires = "policy_git")]
    pub policy_git_allow_rewrite: bool,
    /// Take webhooks at /api/v1/policy/webhook that prove to know the secret in this file
    #[arg(long, value_name = "FILE", requires = "policy_git")]
    pub policy_git_webhook_secret_file: Option<PathBuf>,
    /// The token or password for an https URL
    #[arg(long, value_name = "FILE", requires = "policy_git")]
    pub policy_git_token_file: Option<PathBuf>,
    /// The private key for an ssh URL
    #[arg(long, value_name = "FILE", requires = "policy_git")]
    pub policy_git_ssh_key: Option<PathBuf>,
    /// The host keys for an ssh URL [default: ssh's own for the whole host]
    #[arg(long, value_name = "FILE", requires = "policy_git")]
    pub policy_git_known_hosts: Option<PathBuf>,
}

impl GitArgs {
    fn options(self) -> Option<GitOptions> {
        Some(GitOptions {
            url: self.policy_git?,
            branch: self.policy_git_branch.unwrap_or_default(),
            path: self.policy_git_path.unwrap_or_default(),
            poll: self.policy_git_poll.unwrap_or(DEFAULT_POLL),
            signatures: self.policy_git_signatures.unwrap_or(Signatures::Required),
            allowed_signers: self.policy_git_allowed_signers,
            allow_rewrite: self.policy_git_allow_rewrite,
            webhook_secret: self.policy_git_webhook_secret_file,
            token: self.policy_git_token_file,
            ssh_key: self.policy_git_ssh_key,
            known_hosts: self.policy_git_known_hosts,
        })
    }
}

impl ServeArgs {
    /// What `serve` needs.
    pub fn options(self) -> Options {
        Options {
            state_dir: self.dir.state_dir,
            listen: self.listen,
            public_url: self.public_url,
            policy: match (self.policy, self.git.options()) {
                (Some(path), _) => Source::File(path),
                (None, Some(git)) => Source::Git(Box::new(git)),
                (None, None) => Source::Api,
            },
            database: self.database,
            tls: self.tls_cert.zip(self.tls_key),
            relay: (!self.no_embedded_relay).then_some(RelayListen {
                relay: self.relay_listen,
                stun: self.stun_listen,
                stun_second: self.stun_second,
            }),
            ipv4_pool: self.ipv4_pool,
            ipv6_prefix: self.ipv6_prefix,
            lease: self.lease,
            network_name: self.network_name,
        }
    }
}
