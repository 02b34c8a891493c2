//! What the peer let out and this end refuses.

use super::*;

#[test]
fn a_refused_connection_of_a_peer_is_news_once_and_then_once_a_minute() {
    for net in families() {
        let mut filter = filter(vec![net.rule_in(1, 80)], vec![]);
        assert_eq!(judge(&mut filter, IN, 0, &net.tcp(IN, (80, 5_000), TCP_SYN, 1, 0)), None);
        assert_eq!(filter.poll_disagreement(), None, "both ends agree");
        for secs in 0..59 {
            judge(&mut filter, IN, secs, &net.tcp(IN, (22, 5_000), TCP_SYN, 1, 0));
        }
        let news = filter.poll_disagreement().expect("news");
        assert_eq!((news.peer, news.src, news.dst), (PEER, net.remote, net.local));
        assert_eq!((news.port, news.reason, news.revision, news.count), (22, DropReason::NoRule, 1, 1));
        assert_eq!(filter.poll_disagreement(), None);
        judge(&mut filter, IN, 60, &net.tcp(IN, (22, 5_001), TCP_SYN, 1, 0));
        assert_eq!(filter.poll_disagreement().map(|d| d.count), Some(60), "whatever the source port");
        assert_eq!(filter.disagreements().count(), 1);
        filter.remove_peer(PEER, at(61));
        assert_eq!(filter.disagreements().count(), 0);
    }
}

#[test]
fn what_belongs_to_no_flow_or_goes_out_is_no_disagreement() {
    for net in families() {
        let mut filter = filter(vec![], vec![]);
        judge(&mut filter, OUT, 0, &net.tcp(OUT, (5_000, 22), TCP_SYN, 1, 0));
        judge(&mut filter, IN, 0, &net.tcp(IN, (22, 5_000), TCP_ACK, 1, 1));
        judge(&mut filter, IN, 0, &net.echo(IN, false, 1));
        judge(&mut filter, IN, 0, &[0x45, 0]);
        assert_eq!(filter.poll_disagreement(), None);
    }
}

#[test]
fn a_peer_that_tries_every_port_fills_neither_memory_nor_logs() {
    let net = families()[0];
    let mut filter = filter(vec![], vec![]);
    let mut news = 0;
    for port in 0..5_000_u16 {
        // Ten a second, each told of as soon as it happens.
        judge(&mut filter, IN, u64::from(port / 10), &net.udp(IN, (port, 5_000)));
        news += std::iter::from_fn(|| filter.poll_disagreement()).count();
    }
    assert_eq!(filter.disagreements().count(), MAX_DISAGREEMENTS);
    assert_eq!(filter.disagreements().map(|d| d.port).max(), Some(4_999), "the latest are kept");
    let most = u64::from(MAX_NEWS_BURST) + 500 / NEWS_EVERY.as_secs() + 1;
    assert!((u64::from(MAX_NEWS_BURST)..=most).contains(&(news as u64)), "{news} news in 500 s");
    // Nobody polls: what waits is bounded as well.
    for port in 0..5_000_u16 {
        judge(&mut filter, IN, 1_000 + 60 * u64::from(port), &net.udp(IN, (port, 5_000)));
    }
    assert_eq!(std::iter::from_fn(|| filter.poll_disagreement()).count(), MAX_DISAGREEMENTS);
}
