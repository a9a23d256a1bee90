use crate::program::{etcd, node, refusal, wait_initialised};

#[test]
fn a_disk_of_another_node_or_cluster_is_refused_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let (_etcd, url) = etcd(&dir.path().join("etcd"), "http", &[]);
    let disk = dir.path().join("disk");
    std::fs::create_dir(&disk).unwrap();
    let mut first = node("one", "a", &url, &disk, &[]);
    wait_initialised(&mut first, &disk);
    drop(first);
    let identity = disk.join("identity.json");
    let before = std::fs::read(&identity).unwrap();
    for (cluster, name, reason) in [
        ("one", "b", "the folder belongs to node \"a\", expected \"b\""),
        ("two", "a", "the folder belongs to cluster "),
    ] {
        let (status, said) = refusal(node(cluster, name, &url, &disk, &[]));
        assert!(!status.success(), "{status}");
        // The last line is what a pod's status shows.
        let last = said.lines().last().unwrap_or_default();
        assert!(last.contains(reason), "{said}");
        assert!(last.contains("or give the node an empty folder"), "{said}");
        assert_eq!(std::fs::read(&identity).unwrap(), before, "the disk was changed");
    }
}
