//! Sending, one system call at a time.
//!
//! Not by quinn-udp: kernels before 6.14 refuse a batch whose datagrams are too long for the path (a container's network, PPPoE,
//! another tunnel) with the same `EINVAL` as one they can't make at all, and quinn-udp gives batches and congestion marks up for
//! good at the first of them, for every peer.

use std::ffi::c_int;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};

use socket2::{MsgHdr, SockAddr, Socket};
use warren_engine::offload::Ecn;

/// A batch of datagrams no longer than this fits any path: 1 280 bytes less the headers of IPv6 and UDP.
const FITS_ANYWHERE: usize = 1_232;

/// Bytes of a control message's head (`cmsghdr`) on a 64-bit Linux, and what they are rounded to.
const CMSG_HEAD: usize = size_of::<usize>() + 2 * size_of::<c_int>();
const CMSG_ALIGN: usize = size_of::<usize>();
/// Room for two control messages of at most eight bytes.
const CONTROL_ROOM: usize = 2 * (CMSG_HEAD + 8);

/// That batches are refused is said once, not by each socket.
static TOLD: Once = Once::new();

/// What one socket's sends have shown about the kernel.
#[derive(Debug)]
pub(crate) struct Sender {
    /// Datagrams of one call at most, a count.
    most: usize,
    batches: AtomicBool,
    marks: AtomicBool,
}

impl Sender {
    /// `most`: datagrams that the kernel says it takes in one call.
    pub(crate) fn new(most: usize) -> Self {
        Self { most, batches: AtomicBool::new(most > 1), marks: AtomicBool::new(true) }
    }

    /// Datagrams of one call at most, a count: 1 once batches have been refused.
    pub(crate) fn most(&self) -> usize {
        if self.batches.load(Ordering::Relaxed) { self.most } else { 1 }
    }

    /// Sends `contents`, of at most [`most`](Self::most) datagrams of `segment` bytes (the last may be shorter), or of one.
    /// What can't go as a batch goes one by one.
    pub(crate) fn send(
        &self,
        socket: &Socket,
        to: SocketAddr,
        ecn: Ecn,
        contents: &[u8],
        segment: Option<usize>,
    ) -> io::Result<()> {
        let to = SockAddr::from(to);
        let Some(size) = segment.filter(|size| contents.len() > *size) else {
            return self.send_one(socket, &to, ecn, contents);
        };
        match sendmsg(socket, &to, self.mark(ecn), contents, u16::try_from(size).ok()) {
            Err(e) if is_refusal(&e) => {
                if is_for_good(&e, size) && self.batches.swap(false, Ordering::Relaxed) {
                    TOLD.call_once(|| {
                        tracing::warn!(
                            "datagrams are sent one by one from now on: the kernel refuses batches ({e})"
                        );
                    });
                }
                contents.chunks(size).try_for_each(|one| self.send_one(socket, &to, ecn, one))
            }
            sent => sent,
        }
    }

    fn send_one(&self, socket: &Socket, to: &SockAddr, ecn: Ecn, datagram: &[u8]) -> io::Result<()> {
        let marked = self.mark(ecn);
        match sendmsg(socket, to, marked, datagram, None) {
            // Some sandboxes know no marks.
            Err(e) if marked != Ecn::NotCapable && e.raw_os_error() == Some(libc::EINVAL) => {
                sendmsg(socket, to, Ecn::NotCapable, datagram, None)?;
                self.marks.store(false, Ordering::Relaxed);
                Ok(())
            }
            sent => sent,
        }
    }

    fn mark(&self, ecn: Ecn) -> Ecn {
        if self.marks.load(Ordering::Relaxed) { ecn } else { Ecn::NotCapable }
    }
}

/// True if a batch may go in pieces: it is too long for this path, or batches are impossible.
fn is_refusal(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EIO | libc::EINVAL | libc::EMSGSIZE))
}

/// True if a batch of datagrams of `size` bytes was refused for what it is, not for where it goes.
fn is_for_good(error: &io::Error, size: usize) -> bool {
    match error.raw_os_error() {
        Some(libc::EIO) => true, // the network card can't finish the checksums
        Some(libc::EINVAL) => size <= FITS_ANYWHERE,
        _ => false,
    }
}

fn sendmsg(
    socket: &Socket,
    to: &SockAddr,
    ecn: Ecn,
    contents: &[u8],
    segment: Option<u16>,
) -> io::Result<()> {
    let mut control = Control::default();
    if ecn != Ecn::NotCapable {
        let mark = c_int::from(ecn.bits()).to_ne_bytes();
        if to.is_ipv6() {
            control.push(libc::IPPROTO_IPV6, libc::IPV6_TCLASS, &mark);
        } else {
            control.push(libc::IPPROTO_IP, libc::IP_TOS, &mark);
        }
    }
    if let Some(segment) = segment {
        control.push(libc::SOL_UDP, libc::UDP_SEGMENT, &segment.to_ne_bytes());
    }
    let buffers = [IoSlice::new(contents)];
    let message = MsgHdr::new().with_addr(to).with_buffers(&buffers).with_control(control.bytes());
    socket.sendmsg(&message, libc::MSG_NOSIGNAL).map(drop)
}

/// Control messages (cmsg(3)), laid out one after the other.
#[derive(Debug)]
struct Control {
    bytes: [u8; CONTROL_ROOM],
    len: usize,
}

impl Default for Control {
    fn default() -> Self {
        Self { bytes: [0; CONTROL_ROOM], len: 0 }
    }
}

impl Control {
    /// Adds one; there is room for two of at most eight bytes.
    fn push(&mut self, level: c_int, kind: c_int, data: &[u8]) {
        let len = CMSG_HEAD + data.len();
        let end = self.len + len.next_multiple_of(CMSG_ALIGN);
        let Some(place) = self.bytes.get_mut(self.len..end) else { return };
        let (head, body) = place.split_at_mut(CMSG_HEAD);
        head[..size_of::<usize>()].copy_from_slice(&len.to_ne_bytes());
        head[size_of::<usize>()..][..4].copy_from_slice(&level.to_ne_bytes());
        head[size_of::<usize>() + 4..].copy_from_slice(&kind.to_ne_bytes());
        body[..data.len()].copy_from_slice(data);
        self.len = end;
    }

    fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_no_path_can_explain_ends_batches() {
        let error = io::Error::from_raw_os_error;
        for (code, size, refused, for_good) in [
            (libc::EIO, 1_452, true, true),
            (libc::EINVAL, 1_452, true, false), // before Linux 6.14: too long for the route
            (libc::EMSGSIZE, 1_452, true, false),
            (libc::EINVAL, 1_000, true, true),
            (libc::EMSGSIZE, 1_000, true, false),
            (libc::EAGAIN, 1_000, false, false),
            (libc::ENETUNREACH, 1_000, false, false),
        ] {
            let error = error(code);
            assert_eq!(
                (is_refusal(&error), is_for_good(&error, size)),
                (refused, for_good),
                "{error} {size}"
            );
        }
    }

    #[test]
    fn control_messages_are_laid_out_as_the_system_does() {
        let mut control = Control::default();
        control.push(libc::IPPROTO_IP, libc::IP_TOS, &2i32.to_ne_bytes());
        control.push(libc::SOL_UDP, libc::UDP_SEGMENT, &1_452u16.to_ne_bytes());
        let (first, second) = control.bytes().split_at(24);
        assert_eq!(first[..8], 20usize.to_ne_bytes());
        assert_eq!(first[16..20], 2i32.to_ne_bytes());
        assert_eq!(second[..8], 18usize.to_ne_bytes());
        assert_eq!(second[16..18], 1_452u16.to_ne_bytes());
        assert_eq!(second.len(), 24);
    }
}
