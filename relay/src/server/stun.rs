//! The STUN socket.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::net::UdpSocket;

use super::Shared;
use crate::core::Gcra;
use crate::{os, stun};

/// Most answers per second in the long run: 256 kB/s, ten times what 20 000 devices ask.
pub(super) const MAX_ANSWERS_PER_S: u32 = 8_000;

pub(super) fn bind(addr: SocketAddr) -> io::Result<UdpSocket> {
    let socket = std::net::UdpSocket::bind(addr)?;
    socket.set_nonblocking(true)?;
    UdpSocket::from_std(socket)
}

pub(super) async fn serve(shared: Arc<Shared>, socket: UdpSocket) {
    let (cost, burst) = (Duration::from_secs(1) / MAX_ANSWERS_PER_S, Duration::from_secs(1));
    let mut limit = Gcra::default();
    let mut buffer = [0; stun::MAX_REQUEST + 1];
    loop {
        // An error here is an ICMP message about an earlier answer: nothing to do about it.
        let Ok((len, from)) = socket.recv_from(&mut buffer).await else { continue };
        match stun::answer(&buffer[..len], from) {
            Some(answer) if limit.allow(os::now().boot, cost, burst) => {
                shared.stun_answered.fetch_add(1, Ordering::Relaxed);
                let _ = socket.try_send_to(&answer, from); // a full socket buffer loses it, as the network would
            }
            _ => {
                shared.stun_ignored.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}
