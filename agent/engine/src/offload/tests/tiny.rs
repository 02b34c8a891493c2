//! Frames of more packets than are taken at a time, as a TCP with a tiny segment size makes them.

use super::*;
use crate::offload::segment::split;

fn with_header(header: &Header, packet: &[u8]) -> Vec<u8> {
    [&header.to_bytes()[..], packet].concat()
}

fn gso(kind: GsoKind, size: u16) -> Gso {
    Gso { kind, size }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn the_parts_of_a_split_frame_make_its_packets(
        shape in shape(),
        size in 8usize..200,
        len in 0usize..65_400,
        pushed: bool,
    ) {
        let flags = if pushed && shape.tcp { TCP_ACK | TCP_PSH } else { TCP_ACK };
        let len = len.max(size).min(65_535 - 72);
        let whole = Shape { payload: (0..len).map(|i| (i * 7 / 3) as u8).collect(), flags, ..shape };
        let (header, packet) = whole.frame(size);
        let packets = whole.packets(size);
        match split(&with_header(&header, &packet)) {
            None => prop_assert!(packets.len() <= MAX_SEGMENTS),
            Some(parts) => {
                prop_assert!(packets.len() > MAX_SEGMENTS);
                prop_assert_eq!(parts.len(), packets.len().div_ceil(MAX_SEGMENTS));
                let got: Vec<Vec<u8>> = parts
                    .iter()
                    .flat_map(|part| cut(&Header::read(part).unwrap(), &part[HEADER_LEN..]))
                    .collect();
                prop_assert_eq!(got, packets);
            }
        }
    }
}

#[test]
fn the_most_that_a_kernel_makes_is_split_and_more_is_refused() {
    let whole = Shape { payload: vec![1; 65_472], ..shape_v4() };
    let packet = whole.packet();
    let parts = |size| {
        let header = Header { gso: Some(gso(GsoKind::Tcp4, size)), ..Header::default() };
        split(&with_header(&header, &packet)).map(|parts| parts.len())
    };
    assert_eq!(parts(8), Some(8_184_usize.div_ceil(MAX_SEGMENTS)));
    assert_eq!((parts(7), parts(0)), (None, None), "no kernel makes such a frame");
    assert_eq!(parts(1_400), None);
    let refused = |size| SuperFrame::new(gso(GsoKind::Tcp4, size), None, &packet).unwrap_err();
    assert_eq!((refused(7), refused(8)), (BadFrame::Segments, BadFrame::Segments));
}

#[test]
fn nonsense_is_not_split() {
    let header = Header { gso: Some(gso(GsoKind::Tcp4, 8)), ..Header::default() };
    let packet = Shape { payload: vec![1; 60_000], ..shape_v4() }.packet();
    for bad in [
        vec![],
        vec![0; HEADER_LEN],
        with_header(&header, &packet[..packet.len() - 1]),
        with_header(&header, &[0; 60_000]),
        with_header(&Header { gso: Some(gso(GsoKind::Udp, 8)), ..header }, &packet),
    ] {
        assert!(split(&bad).is_none());
    }
}
