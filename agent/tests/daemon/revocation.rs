//! What is taken away ends at once, whatever the disk is like.

use crate::{in_world, sh, wait};
use warren_common::ids::DeviceId;

#[test]
fn on_a_full_disk_what_is_revoked_ends_and_what_is_new_waits() {
    in_world(async |mut world| {
        std::fs::create_dir(world.state_dir()).unwrap();
        sh(&format!("mount -t tmpfs -o size=128k,mode=700 tmpfs {}", world.state_dir().display()));
        let (old, new) = (DeviceId::from_bytes([5; 16]), DeviceId::from_bytes([6; 16]));
        let peer = world.fake.with(|w| {
            let other = DeviceId::from_bytes([7; 16]);
            let mut peer = w.netmap.peers[&old].as_ref().clone();
            (peer.id, peer.addrs) = (other, vec!["100.64.0.7".parse().unwrap()]);
            peer.wg = warren_common::keys::WgPublicKey::from_bytes([7; 32]);
            w.netmap.peers.insert(other, peer.clone().into());
            peer
        });
        world.join().await;
        wait(|| !world.fake.acks().is_empty()).await;
        sh(&format!("cat /dev/zero > {}/filler 2>/dev/null; true", world.state_dir().display()));

        // One peer goes, one comes; then the other one goes, too.
        for (revision, gone, left) in [(2, old, 1), (3, peer.id, 0)] {
            world.fake.with(|w| {
                w.netmap.peers.remove(&gone);
                let mut peer = peer.clone();
                (peer.id, peer.addrs) = (new, vec!["100.64.0.6".parse().unwrap()]);
                peer.wg = warren_common::keys::WgPublicKey::from_bytes([6; 32]);
                w.netmap.peers.insert(new, peer.into());
            });
            world.fake.push(world.fake.snapshot(revision));
            world.health("disk-full").await;
            while world.status().await["peers"].as_array().unwrap().len() != left {
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            }
            assert_eq!(world.status().await["coordinator"]["revision"], 1);
        }
        assert_eq!(world.fake.acks().len(), 1, "nothing is acknowledged that a restart would forget");

        std::fs::remove_file(world.state_dir().join("filler")).unwrap();
        wait(|| world.fake.acks().iter().any(|a| a.revision == 3)).await;
        let status = world.status().await;
        assert_eq!(status["coordinator"]["revision"], 3);
        assert_eq!(status["peers"][0]["id"], new.to_string());
    });
}
