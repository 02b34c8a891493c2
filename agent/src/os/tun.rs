//! The TUN device: IP packets from and to the host's applications, by the super-frame where the kernel can.

use std::ffi::c_int;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::task::{Context, Poll};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use warren_engine::io::TunOffload;

use super::Offloads;
use crate::problem::{Problem, io_text};

/// Longest name of an interface, in bytes (Linux `IFNAMSIZ` less the final zero).
pub const MAX_NAME: usize = 15;
/// Frames that the kernel queues for us before it drops: enough for one round of a busy loop.
pub const QUEUE_LEN: u32 = 1_000;
/// Most pieces that one frame is written from, a count.
const MAX_PIECES: usize = 80;

/// An open TUN device; it disappears with this value.
pub struct Tun {
    fd: AsyncFd<OwnedFd>,
    virtio: bool,
    offload: TunOffload,
}

impl std::fmt::Debug for Tun {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tun")
            .field("virtio", &self.virtio)
            .field("offload", &self.offload)
            .finish_non_exhaustive()
    }
}

impl Tun {
    /// Makes the device `name` (down, without addresses), with as much of `wanted` as the kernel has.
    ///
    /// # Errors
    /// There is no `/dev/net/tun`, no permission, or the name is taken or impossible.
    pub fn open(name: &str, wanted: Offloads) -> Result<Self, Problem> {
        check_name(name)?;
        open(name, wanted).map_err(|e| problem(name, &e))
    }

    /// Each frame has a virtio header in front, both ways.
    pub const fn has_virtio_headers(&self) -> bool {
        self.virtio
    }

    /// The super-frames that it takes and gives.
    pub const fn offload(&self) -> TunOffload {
        self.offload
    }

    /// Ready when there is something to receive. Only who asked last is woken.
    pub fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.fd.poll_read_ready(cx).map(|ready| {
            // An error means that the runtime is shutting down; the read then says so. Readiness is kept until one finds nothing.
            if let Ok(mut guard) = ready {
                guard.retain_ready();
            }
        })
    }

    /// One frame, if there is one: a buffer of [`MAX_FRAME`](warren_engine::queue::MAX_FRAME) holds any.
    ///
    /// # Errors
    /// `WouldBlock` if there is none; anything else if the device is gone or down.
    pub fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.fd.try_io(Interest::READABLE, |fd| Ok(rustix::io::read(fd, &mut *buffer)?))
    }

    /// [`receive`](Self::receive) also if the runtime has not heard yet that there is something: for what a frame just
    /// sent may have brought about.
    ///
    /// # Errors
    /// As of [`receive`](Self::receive).
    pub fn receive_now(&self, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::io::read(self.fd.get_ref(), buffer)?)
    }

    /// Hands one frame to the host, from its pieces.
    ///
    /// # Errors
    /// The host does not take it: it is dropped, as on any full link.
    pub fn send<'a>(&self, mut pieces: impl Iterator<Item = &'a [u8]>) -> io::Result<()> {
        let (Some(first), second) = (pieces.next(), pieces.next()) else { return Ok(()) };
        let Some(second) = second else {
            rustix::io::write(self.fd.get_ref(), first)?;
            return Ok(());
        };
        let mut slices = [IoSlice::new(&[]); MAX_PIECES];
        let mut count = 0;
        for piece in [first, second].into_iter().chain(pieces) {
            *slices.get_mut(count).ok_or(io::ErrorKind::InvalidInput)? = IoSlice::new(piece);
            count += 1;
        }
        rustix::io::writev(self.fd.get_ref(), &slices[..count])?;
        Ok(())
    }
}

fn open(name: &str, wanted: Offloads) -> io::Result<Tun> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let fd = rustix::fs::open("/dev/net/tun", flags, Mode::empty())?;
    let plain = libc::IFF_TUN | libc::IFF_NO_PI;
    let mut virtio = wanted.tun;
    if virtio {
        match make(&fd, name, plain | libc::IFF_VNET_HDR) {
            Ok(()) => {}
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => virtio = false,
            Err(e) => return Err(e),
        }
    }
    if !virtio {
        make(&fd, name, plain)?;
    }
    let offload = if virtio { choose_offload(&fd, wanted) } else { TunOffload::default() };
    #[expect(unsafe_code, reason = "registering a raw descriptor with the runtime")]
    // SAFETY: `fd` is an open descriptor that nothing else owns; the `AsyncFd` keeps it and never hands it out.
    let fd = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }.map_err(io::Error::from)?;
    Ok(Tun { fd, virtio, offload })
}

/// Attaches a device to the descriptor.
fn make(fd: &OwnedFd, name: &str, flags: c_int) -> io::Result<()> {
    // SAFETY: all zeros are a valid `ifreq`.
    #[expect(unsafe_code, reason = "a plain C struct with a union")]
    let mut request = unsafe { MaybeUninit::<libc::ifreq>::zeroed().assume_init() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes().take(MAX_NAME)) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = flags as libc::c_short; // constants below 2^15
    // SAFETY: the descriptor is open, and TUNSETIFF reads and writes one `ifreq`, which lives until the call returns.
    #[expect(unsafe_code, reason = "no crate in use has this request")]
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Asks for the most there is: UDP's came with Linux 6.2.
fn choose_offload(fd: &OwnedFd, wanted: Offloads) -> TunOffload {
    let tcp = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6;
    let udp = tcp | libc::TUN_F_USO4 | libc::TUN_F_USO6;
    if wanted.tun_udp && set_offload(fd, udp) {
        return TunOffload { tcp: true, udp: true };
    }
    TunOffload { tcp: set_offload(fd, tcp), udp: false }
}

fn set_offload(fd: &OwnedFd, flags: libc::c_uint) -> bool {
    // SAFETY: the descriptor is open, and TUNSETOFFLOAD takes a number, no pointer.
    #[expect(unsafe_code, reason = "no crate in use has this request")]
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(flags)) };
    result == 0
}

/// True if an error says that the kernel does not take this kind of frame, rather than that it has no room.
pub(crate) fn is_refusal(error: &io::Error) -> bool {
    error.raw_os_error() == Some(Errno::INVAL.raw_os_error())
}

/// Checks an interface's name.
///
/// # Errors
/// It is empty, too long or holds characters that Linux or nftables refuse.
pub fn check_name(name: &str) -> Result<(), Problem> {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if !name.is_empty() && name.len() <= MAX_NAME && name.chars().all(good) && !matches!(name, "." | "..") {
        return Ok(());
    }
    Err(Problem::usage(
        "tun-name",
        format!("`{name}` can't be the name of a network interface"),
        "use 1 to 15 letters, digits, `-`, `_` or `.`",
    ))
}

fn problem(name: &str, error: &io::Error) -> Problem {
    let code = error.raw_os_error();
    if error.kind() == io::ErrorKind::NotFound || code == Some(libc::ENODEV) || code == Some(libc::ENXIO) {
        return Problem::new(
            "no-tun",
            "there is no TUN device: /dev/net/tun is missing",
            "load the kernel module (`modprobe tun`); in a container pass the device in (`--device /dev/net/tun`)",
        );
    }
    if error.kind() == io::ErrorKind::PermissionDenied || code == Some(libc::EPERM) {
        return Problem::new(
            "tun-permission",
            "no permission to make a TUN device",
            "run warrend as root or with CAP_NET_ADMIN",
        );
    }
    if code == Some(libc::EBUSY) || code == Some(libc::EINVAL) {
        return Problem::new(
            "tun-busy",
            format!("the network interface `{name}` exists already and belongs to something else"),
            "choose another name with `warrend --tun NAME`, or stop what uses it",
        );
    }
    Problem::new(
        "tun",
        format!("the TUN device `{name}` can't be made: {}", io_text(error)),
        "check /dev/net/tun and the permissions of warrend",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked() {
        for good in ["warren0", "a", "tun-x_1.2", "fifteen-bytes-x"] {
            check_name(good).unwrap();
        }
        for bad in ["", "sixteen-bytes-xx", "a b", "a/b", "ü", "a\"", ".."] {
            assert_eq!(check_name(bad).unwrap_err().exit, 2, "{bad}");
        }
    }

    #[test]
    fn failures_name_their_fix() {
        for (code, want) in [
            (libc::ENOENT, "no-tun"),
            (libc::ENODEV, "no-tun"),
            (libc::EPERM, "tun-permission"),
            (libc::EACCES, "tun-permission"),
            (libc::EBUSY, "tun-busy"),
            (libc::EMFILE, "tun"),
        ] {
            assert_eq!(problem("x", &io::Error::from_raw_os_error(code)).code, want);
        }
    }
}
