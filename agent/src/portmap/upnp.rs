//! UPnP-IGD: finds the gateway's control service by SSDP, and speaks SOAP with it over HTTP.
//!
//! Everybody on the LAN may answer a search. Only what comes from the gateway itself counts, and only addresses at the
//! gateway are ever connected to, whatever documents say. Everything read is bounded in length and time.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UdpSocket;
use tokio::time::{Instant, timeout, timeout_at};

use crate::egress::connect_marked;
use crate::os::udp;

/// Longest answer that is read, in bytes: device descriptions have 5 to 20 KiB.
pub const MAX_ANSWER: usize = 128 << 10;
/// Most services of one gateway that are tried: few have more than one way out.
const MAX_SERVICES: usize = 4;
/// Most header lines of an answer.
const MAX_HEADERS: usize = 64;
/// Longest SSDP answer that is looked at, in bytes.
const MAX_DATAGRAM: usize = 2_048;
const GROUP: Ipv4Addr = Ipv4Addr::new(239, 255, 255, 250);
const SSDP_PORT: u16 = 1_900;
/// How long a gateway has for an answer: it waits up to a second (`MX: 1`) before it answers a search.
const PATIENCE: Duration = Duration::from_millis(1_600);
/// How long one HTTP exchange may take.
const HTTP_PATIENCE: Duration = Duration::from_secs(3);
/// The search is repeated after so long: multicast over Wi-Fi gets lost.
const REPEAT: Duration = Duration::from_millis(500);
/// Services that map ports, best first.
const KINDS: [&str; 3] = [
    "urn:schemas-upnp-org:service:WANIPConnection:2",
    "urn:schemas-upnp-org:service:WANIPConnection:1",
    "urn:schemas-upnp-org:service:WANPPPConnection:1",
];
/// "ConflictInMappingEntry".
const CONFLICT: u16 = 718;
/// "OnlyPermanentLeasesSupported".
const ONLY_PERMANENT: u16 = 725;

/// Where to send orders.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Service {
    at: SocketAddrV4,
    path: String,
    kind: &'static str,
    mark: u32,
}

/// Why an order was not carried out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Error {
    /// No answer, or none that makes sense.
    #[error("{0}")]
    Broken(String),
    /// The gateway said no.
    #[error("error {0}")]
    Refused(u16),
}

impl From<io::Error> for Error {
    fn from(e: io::Error) -> Self {
        Self::Broken(crate::problem::io_text(&e))
    }
}

/// The gateway's services that map ports, best first; empty if it has none.
pub(super) async fn find(gateway: Ipv4Addr, own: Ipv4Addr, mark: u32) -> Vec<Service> {
    let Some((at, path)) = search(gateway, own, mark).await else { return Vec::new() };
    match http(at, &get(at, &path), mark).await {
        Ok((200, description)) => services(at, &description, mark),
        Ok((status, _)) => {
            tracing::debug!(status, "the gateway does not show its UPnP description");
            Vec::new()
        }
        Err(e) => {
            tracing::debug!("the gateway does not show its UPnP description: {e}");
            Vec::new()
        }
    }
}

/// Where the gateway's description is.
async fn search(gateway: Ipv4Addr, own: Ipv4Addr, mark: u32) -> Option<(SocketAddrV4, String)> {
    let socket = udp::socket(SocketAddr::new(own.into(), 0), mark).and_then(UdpSocket::from_std).ok()?;
    let end = Instant::now() + PATIENCE;
    let mut repeat = Instant::now();
    let mut buffer = [0; MAX_DATAGRAM];
    while Instant::now() < end {
        if repeat <= Instant::now() {
            repeat += REPEAT;
            for version in [1, 2] {
                for to in [GROUP, gateway] {
                    let text = format!(
                        "M-SEARCH * HTTP/1.1\r\nHOST: {GROUP}:{SSDP_PORT}\r\nMAN: \"ssdp:discover\"\r\nMX: 1\r\nST: urn:schemas-upnp-org:device:InternetGatewayDevice:{version}\r\n\r\n"
                    );
                    // What can't be sent is not answered.
                    let _ = socket.send_to(text.as_bytes(), (to, SSDP_PORT)).await;
                }
            }
        }
        if let Ok(Ok((len, from))) = timeout_at(repeat.min(end), socket.recv_from(&mut buffer)).await
            && from.ip() == gateway
            && let Some(found) = location(&buffer[..len], gateway)
        {
            return Some(found);
        }
    }
    None
}

/// The place that an answer to a search names, if it is at the gateway.
fn location(answer: &[u8], gateway: Ipv4Addr) -> Option<(SocketAddrV4, String)> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut response = httparse::Response::new(&mut headers);
    response.parse(answer).ok()?;
    let location = response.headers.iter().find(|h| h.name.eq_ignore_ascii_case("location"))?;
    let (at, path) = split_url(std::str::from_utf8(location.value).ok()?.trim())?;
    (response.code == Some(200) && *at.ip() == gateway).then(|| (at, path.to_owned()))
}

/// Address and path of an `http` URL without a host name.
fn split_url(url: &str) -> Option<(SocketAddrV4, &str)> {
    let rest = url.strip_prefix("http://")?;
    let (host, path) = rest.find('/').map_or((rest, "/"), |at| rest.split_at(at));
    let at = host.parse().ok().or_else(|| Some(SocketAddrV4::new(host.parse().ok()?, 80)))?;
    is_plain(path).then_some((at, path))
}

/// True for a path that can't add lines to a request.
fn is_plain(path: &str) -> bool {
    path.starts_with('/') && path.bytes().all(|b| b.is_ascii_graphic())
}

/// The services of a description.
fn services(at: SocketAddrV4, description: &str, mark: u32) -> Vec<Service> {
    let mut found = Vec::new();
    let mut kind = None;
    for (name, text) in leaves(description) {
        match name {
            "serviceType" => kind = KINDS.into_iter().position(|k| k == text),
            "controlURL" => {
                let text = text.replace("&amp;", "&");
                let place = match split_url(&text) {
                    Some((there, path)) => Some((there, path.to_owned())),
                    None if text.contains("://") => None,
                    None => Some((at, format!("/{}", text.trim_start_matches('/')))),
                };
                let place = place.filter(|(there, path)| there.ip() == at.ip() && is_plain(path));
                if let (Some(rank), Some((at, path))) = (kind.take(), place) {
                    found.push((rank, Service { at, path, kind: KINDS[rank], mark }));
                }
            }
            _ => {}
        }
    }
    found.sort_by_key(|(rank, _)| *rank);
    found.into_iter().map(|(_, service)| service).take(MAX_SERVICES).collect()
}

/// Names (without prefix) and texts of a document's elements that hold text only, in order. Not an XML parser: it reads
/// what gateways write, of whom many write no proper XML.
fn leaves(xml: &str) -> impl Iterator<Item = (&str, &str)> {
    let mut rest = xml;
    std::iter::from_fn(move || {
        loop {
            rest = &rest[rest.find('<')? + 1..];
            let (tag, after) = rest.split_once('>')?;
            let (text, _) = after.split_once('<')?;
            let ends_here = after[text.len() + 1..].starts_with('/');
            let name = tag.split_ascii_whitespace().next().unwrap_or_default();
            let name = name.rsplit(':').next().unwrap_or_default();
            rest = after;
            if ends_here && !tag.starts_with(['/', '?', '!']) && !tag.ends_with('/') {
                return Some((name, text.trim()));
            }
        }
    })
}

impl Service {
    /// The outside address.
    pub(super) async fn external(&self) -> Result<Ipv4Addr, Error> {
        let answer = self.order("GetExternalIPAddress", &[]).await?;
        let text = leaves(&answer).find(|(name, _)| *name == "NewExternalIPAddress").map(|(_, text)| text);
        text.and_then(|text| text.parse().ok()).ok_or_else(|| Error::Broken("it names no address".into()))
    }

    /// Maps UDP `external` of the gateway to our port. True if the lease has an end.
    pub(super) async fn map(&self, own: SocketAddrV4, external: u16, lease: Duration) -> Result<bool, Error> {
        match self.add(own, external, lease).await {
            Err(Error::Refused(ONLY_PERMANENT)) if !lease.is_zero() => {
                self.add(own, external, Duration::ZERO).await.map(|()| false)
            }
            other => other.map(|()| true),
        }
    }

    async fn add(&self, own: SocketAddrV4, external: u16, lease: Duration) -> Result<(), Error> {
        let arguments = [
            ("NewRemoteHost", String::new()),
            ("NewExternalPort", external.to_string()),
            ("NewProtocol", "UDP".to_owned()),
            ("NewInternalPort", own.port().to_string()),
            ("NewInternalClient", own.ip().to_string()),
            ("NewEnabled", "1".to_owned()),
            ("NewPortMappingDescription", "warren".to_owned()),
            ("NewLeaseDuration", lease.as_secs().to_string()),
        ];
        self.order("AddPortMapping", &arguments).await.map(drop)
    }

    /// Takes a mapping back.
    pub(super) async fn unmap(&self, external: u16) -> Result<(), Error> {
        let arguments = [
            ("NewRemoteHost", String::new()),
            ("NewExternalPort", external.to_string()),
            ("NewProtocol", "UDP".to_owned()),
        ];
        self.order("DeletePortMapping", &arguments).await.map(drop)
    }

    async fn order(&self, action: &str, arguments: &[(&str, String)]) -> Result<String, Error> {
        let Self { at, path, kind, mark } = self;
        let arguments: String =
            arguments.iter().map(|(name, value)| format!("<{name}>{value}</{name}>")).collect();
        let body = format!(
            "<?xml version=\"1.0\"?>\r\n<s:Envelope xmlns:s=\"http://schemas.xmlsoap.org/soap/envelope/\" s:encodingStyle=\"http://schemas.xmlsoap.org/soap/encoding/\"><s:Body><u:{action} xmlns:u=\"{kind}\">{arguments}</u:{action}></s:Body></s:Envelope>\r\n"
        );
        let request = format!(
            "POST {path} HTTP/1.1\r\nHost: {at}\r\nContent-Type: text/xml; charset=\"utf-8\"\r\nContent-Length: {}\r\nSOAPAction: \"{kind}#{action}\"\r\nConnection: close\r\n\r\n{body}",
            body.len()
        );
        match http(*at, &request, *mark).await? {
            (200, answer) => Ok(answer),
            (status, answer) => {
                let code = leaves(&answer).find(|(name, _)| *name == "errorCode");
                Err(Error::Refused(code.and_then(|(_, text)| text.parse().ok()).unwrap_or(status)))
            }
        }
    }
}

impl Error {
    /// Another port may do.
    pub(super) fn is_conflict(&self) -> bool {
        *self == Self::Refused(CONFLICT)
    }
}

fn get(at: SocketAddrV4, path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: {at}\r\nConnection: close\r\n\r\n")
}

/// One exchange: status and body.
async fn http(at: SocketAddrV4, request: &str, mark: u32) -> Result<(u16, String), Error> {
    let exchange = async {
        let mut stream = connect_marked(at.into(), mark).await?;
        stream.write_all(request.as_bytes()).await?;
        let mut answer = Vec::new();
        let mut limited = stream.take(MAX_ANSWER as u64);
        let mut buffer = [0; 4_096];
        loop {
            let got = limited.read(&mut buffer).await;
            match got {
                Ok(0) => break,
                Ok(n) => answer.extend_from_slice(&buffer[..n]),
                // Some close with a reset.
                Err(_) if !answer.is_empty() => break,
                Err(e) => return Err(e.into()),
            }
            // Some keep the connection open in spite of what they were asked.
            if let Some(done) = parse(&answer, false) {
                return Ok(done);
            }
        }
        parse(&answer, true).ok_or_else(|| Error::Broken("its answer is not HTTP".into()))
    };
    timeout(HTTP_PATIENCE, exchange).await.map_err(|_| Error::Broken("no answer in time".into()))?
}

/// Status and body, if the answer is whole; `ended` if no more will come.
fn parse(answer: &[u8], ended: bool) -> Option<(u16, String)> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut response = httparse::Response::new(&mut headers);
    let Ok(httparse::Status::Complete(at)) = response.parse(answer) else { return None };
    let header = |name: &str| {
        let header = response.headers.iter().find(|h| h.name.eq_ignore_ascii_case(name))?;
        std::str::from_utf8(header.value).ok()
    };
    let body = &answer[at..];
    let chunked = header("transfer-encoding").is_some_and(|v| v.trim().eq_ignore_ascii_case("chunked"));
    let body = if chunked {
        dechunk(body)?
    } else {
        match header("content-length").and_then(|v| v.trim().parse::<usize>().ok()) {
            Some(length) if body.len() >= length => body[..length].to_vec(),
            _ if ended => body.to_vec(),
            _ => return None,
        }
    };
    Some((response.code?, String::from_utf8_lossy(&body).into_owned()))
}

fn dechunk(mut rest: &[u8]) -> Option<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let Ok(httparse::Status::Complete((at, length))) = httparse::parse_chunk_size(rest) else {
            return None;
        };
        let length = usize::try_from(length).ok()?;
        if length == 0 {
            return Some(body);
        }
        let end = at.checked_add(length)?;
        body.extend_from_slice(rest.get(at..end)?);
        rest = rest.get(end.checked_add(2)?..)?;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const AT: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(192, 168, 1, 1), 5_000);

    fn description(url: &str) -> String {
        format!(
            "<?xml version=\"1.0\"?><root><device><serviceList>\
             <service><serviceType>urn:x:Layer3Forwarding:1</serviceType><controlURL>/no</controlURL></service>\
             <service><serviceType>{}</serviceType><SCPDURL>/s</SCPDURL><controlURL>/ppp</controlURL></service>\
             <service><serviceType> {} </serviceType><controlURL>{url}</controlURL></service>\
             </serviceList></device></root>",
            KINDS[2], KINDS[1]
        )
    }

    #[test]
    fn services_are_found_best_first_and_only_at_the_gateway() {
        let paths = |url: &str| -> Vec<(SocketAddrV4, String)> {
            services(AT, &description(url), 0).into_iter().map(|s| (s.at, s.path)).collect()
        };
        let ppp = (AT, "/ppp".to_owned());
        assert_eq!(paths("ctl?a=1&amp;b"), [(AT, "/ctl?a=1&b".into()), ppp.clone()]);
        let other_port = SocketAddrV4::new(*AT.ip(), 80);
        assert_eq!(paths("http://192.168.1.1/ctl"), [(other_port, "/ctl".into()), ppp.clone()]);
        for elsewhere in
            ["http://192.168.1.9/ctl", "http://evil.example/", "https://192.168.1.1/x", "/a\r\nb"]
        {
            assert_eq!(paths(elsewhere), std::slice::from_ref(&ppp), "{elsewhere}");
        }
        let many = description("/ctl").repeat(9);
        assert_eq!(services(AT, &many, 0).len(), MAX_SERVICES);
    }

    #[test]
    fn a_search_is_answered_by_the_gateway_about_itself() {
        let answer = |location: &str| format!("HTTP/1.1 200 OK\r\nST: x\r\nLocation: {location}\r\n\r\n");
        let place = |at: &str| location(answer(at).as_bytes(), *AT.ip());
        assert_eq!(place("http://192.168.1.1:5000/d.xml"), Some((AT, "/d.xml".into())));
        for elsewhere in ["http://192.168.1.9:5000/d.xml", "http://router/d.xml", "ftp://192.168.1.1/", ""] {
            assert_eq!(place(elsewhere), None, "{elsewhere}");
        }
        assert_eq!(location(b"NOTIFY * HTTP/1.1\r\n\r\n", *AT.ip()), None);
    }

    #[test]
    fn answers_end_by_length_by_chunks_or_with_the_connection() {
        let some = |text: &str| Some((200, text.to_owned()));
        assert_eq!(parse(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nabc", false), some("ab"));
        assert_eq!(parse(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nabc", false), None);
        assert_eq!(parse(b"HTTP/1.1 200 OK\r\n\r\nabc", false), None);
        assert_eq!(parse(b"HTTP/1.1 200 OK\r\n\r\nabc", true), some("abc"));
        let chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\n";
        assert_eq!(parse(chunked, false), some("abc"));
        assert_eq!(parse(b"nonsense", true), None);
        let huge = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\nab";
        assert_eq!(parse(huge, true), None);
    }

    proptest! {
        #[test]
        fn nothing_a_gateway_says_panics(bytes in prop::collection::vec(any::<u8>(), 0..300), text in "[<>/a-c: ?!]{0,80}") {
            let _ = parse(&bytes, true);
            let _ = dechunk(&bytes);
            let _ = location(&bytes, *AT.ip());
            let _ = services(AT, &text, 0);
            prop_assert!(leaves(&text).count() <= text.len());
        }
    }
}
