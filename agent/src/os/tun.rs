//! The TUN device: IP packets from and to the host's applications.
//!
//! One packet per system call for now; [`Tun::receive`] and [`Tun::send`] are the only calls, so that super-frames with
//! a virtio header can come in behind them.

use std::io;

use tun_rs::{AsyncDevice, DeviceBuilder};

use crate::problem::{Problem, io_text};

/// Longest name of an interface, in bytes (Linux `IFNAMSIZ` less the final zero).
pub const MAX_NAME: usize = 15;
/// Packets that the kernel queues for us before it drops: enough for one round of a busy loop.
pub const QUEUE_LEN: u32 = 1_000;

/// An open TUN device; it disappears with this value.
pub struct Tun {
    device: AsyncDevice,
}

impl std::fmt::Debug for Tun {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Tun")
    }
}

impl Tun {
    /// Makes the device `name` (down, without addresses).
    ///
    /// # Errors
    /// There is no `/dev/net/tun`, no permission, or the name is taken or impossible.
    pub fn open(name: &str) -> Result<Self, Problem> {
        check_name(name)?;
        DeviceBuilder::new()
            .name(name)
            .with(|builder| {
                builder.packet_information(false).offload(false);
            })
            .enable(false)
            .build_async()
            .map(|device| Self { device })
            .map_err(|e| problem(name, &e))
    }

    /// Waits until there is something to receive.
    ///
    /// # Errors
    /// The device is gone.
    pub async fn readable(&self) -> io::Result<()> {
        self.device.readable().await
    }

    /// One packet, if there is one.
    ///
    /// # Errors
    /// `WouldBlock` if there is none; anything else if the device is gone or down.
    pub fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.device.try_recv(buffer)
    }

    /// Hands one packet to the host.
    ///
    /// # Errors
    /// The host does not take it: it is dropped, as on any full link.
    pub fn send(&self, packet: &[u8]) -> io::Result<usize> {
        self.device.try_send(packet)
    }
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
