use super::*;

const NET: NetworkId = NetworkId::from_bytes([7; 16]);

#[test]
fn everything_comes_back_after_a_restart_and_is_private() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("state");
    let state = StateDir::open(&root).unwrap();
    assert_eq!(state.settings().unwrap(), Settings::default());
    let settings = Settings { network: Some(NET), want_up: true, port: Some(4), hostname: None };
    state.save_settings(&settings).unwrap();
    let network = state.network(NET).unwrap();
    let keys = network.keys().unwrap();
    let member = Membership { device: DeviceId::from_bytes([1; 16]), generation: 3 };
    network.save_membership(&member).unwrap();
    let saved = SavedNetmap::from_bytes(vec![1, 2, 3]);
    network.save_netmap(&saved).unwrap();
    network.save_handshake_floor(UnixTime::from_secs(9)).unwrap();
    let token = Signed { payload: vec![1, 2], signature: vec![3; 64] };
    let hint =
        PathHint { device: DeviceId::from_bytes([2; 16]), endpoints: vec!["192.0.2.1:7".parse().unwrap()] };
    let resume = Resume {
        at: UnixTime::from_secs(8),
        tokens: BTreeMap::from([(RelayId::from_bytes([5; 16]), token)]),
        paths: vec![hint],
    };
    network.save_resume(&resume).unwrap();
    drop(state);

    let state = StateDir::open(&root).unwrap();
    let network = state.network(NET).unwrap();
    assert_eq!(state.settings().unwrap(), settings);
    assert_eq!(network.keys().unwrap().wg.public(), keys.wg.public());
    assert_eq!(network.membership().unwrap(), Some(member));
    assert_eq!(network.netmap().unwrap(), Some(saved));
    assert_eq!(network.handshake_floor().unwrap(), UnixTime::from_secs(9));
    assert_eq!(network.resume(), resume);
    assert_eq!(network.identity().unwrap(), None);
    assert_eq!(fs::metadata(&root).unwrap().mode() & 0o777, 0o700);
    for entry in fs::read_dir(&network.path).unwrap() {
        assert_eq!(entry.unwrap().metadata().unwrap().mode() & 0o777, 0o600);
    }
}

#[test]
fn what_is_only_for_a_quick_restart_may_be_damaged() {
    let dir = tempfile::tempdir().unwrap();
    let state = StateDir::open(&dir.path().join("s")).unwrap();
    let network = state.network(NET).unwrap();
    assert_eq!(network.resume(), Resume::default());
    network.save_resume(&Resume { at: UnixTime::from_secs(8), ..Resume::default() }).unwrap();
    let path = network.path.join("resume");
    let mut bytes = fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&path, bytes).unwrap();
    assert_eq!(network.resume(), Resume::default());
}

#[test]
fn a_second_agent_is_refused_while_the_first_runs() {
    let dir = tempfile::tempdir().unwrap();
    let first = StateDir::open(&dir.path().join("s")).unwrap();
    let problem = StateDir::open(first.path()).unwrap_err();
    assert_eq!((problem.code.as_str(), problem.exit), ("state-in-use", 1));
    let path = first.path().to_owned();
    drop(first);
    StateDir::open(&path).unwrap();
}

#[test]
fn damage_anywhere_is_named_and_never_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let state = StateDir::open(&dir.path().join("s")).unwrap();
    let network = state.network(NET).unwrap();
    network.keys().unwrap();
    let path = network.path.join("keys");
    let good = fs::read(&path).unwrap();
    for i in 0..good.len() {
        let mut bad = good.clone();
        bad[i] ^= 0x20;
        fs::write(&path, &bad).unwrap();
        let problem = network.keys().unwrap_err();
        assert_eq!(problem.code, "state-damaged");
        assert!(problem.text.contains("keys"));
        assert_eq!(fs::read(&path).unwrap(), bad);
    }
    for cut in 0..good.len() {
        fs::write(&path, &good[..cut]).unwrap();
        assert_eq!(network.keys().unwrap_err().code, "state-damaged");
    }
    fs::write(&path, &good).unwrap();
    network.keys().unwrap();
}

#[test]
fn a_file_that_is_too_long_is_not_read() {
    let dir = tempfile::tempdir().unwrap();
    let state = StateDir::open(&dir.path().join("s")).unwrap();
    state.save_settings(&Settings::default()).unwrap();
    // Sparse: it takes no space.
    File::options().write(true).open(state.path().join("settings")).unwrap().set_len(MAX_FILE + 1).unwrap();
    let problem = state.settings().unwrap_err();
    assert_eq!(problem.code, "state-damaged");
    assert!(problem.text.contains("longer than any state file"), "{}", problem.text);
}

#[test]
fn a_file_of_another_kind_does_not_pass() {
    let dir = tempfile::tempdir().unwrap();
    let state = StateDir::open(&dir.path().join("s")).unwrap();
    let network = state.network(NET).unwrap();
    network.save_membership(&Membership { device: DeviceId::from_bytes([1; 16]), generation: 1 }).unwrap();
    fs::copy(network.path.join("device"), network.path.join("netmap")).unwrap();
    assert_eq!(network.netmap().unwrap_err().code, "state-damaged");
}

#[test]
fn a_failed_write_leaves_the_old_file_and_no_rubbish() {
    let dir = tempfile::tempdir().unwrap();
    let state = StateDir::open(&dir.path().join("s")).unwrap();
    let old = Settings { port: Some(1), ..Settings::default() };
    state.save_settings(&old).unwrap();
    // A directory in the way of the temporary file makes the write fail for every user, root included.
    fs::create_dir(state.path().join("settings.new")).unwrap();
    assert_eq!(state.save_settings(&Settings { port: Some(2), ..old.clone() }).unwrap_err().code, "state-io");
    assert_eq!(state.settings().unwrap(), old);
    // What a crash in the middle of a write leaves behind is ignored and replaced.
    fs::remove_dir(state.path().join("settings.new")).unwrap();
    fs::write(state.path().join("settings.new"), b"half").unwrap();
    assert_eq!(state.settings().unwrap(), old);
    state.save_settings(&Settings::default()).unwrap();
    assert!(!state.path().join("settings.new").exists());
}

#[test]
fn a_full_disk_is_told_as_such() {
    assert_eq!(access(Path::new("x"), &io::Error::from(ErrorKind::StorageFull)).code, "disk-full");
    assert_eq!(
        access(Path::new("x"), &io::Error::from(ErrorKind::PermissionDenied)).code,
        "state-permission"
    );
}

#[test]
fn a_shared_directory_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(dir.path().join("other"), b"").unwrap();
    assert_eq!(StateDir::open(dir.path()).unwrap_err().code, "state-not-private");
    assert_eq!(fs::metadata(dir.path()).unwrap().mode() & 0o777, 0o755);
}

#[test]
fn a_removed_network_is_gone_with_its_keys() {
    let dir = tempfile::tempdir().unwrap();
    let state = StateDir::open(&dir.path().join("s")).unwrap();
    let keys = state.network(NET).unwrap().keys().unwrap();
    state.remove_network(NET).unwrap();
    state.remove_network(NET).unwrap();
    assert_ne!(state.network(NET).unwrap().keys().unwrap().wg.public(), keys.wg.public());
}
