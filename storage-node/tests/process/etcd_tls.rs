use crate::program::{etcd, node, refusal, wait_initialised};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use std::fs;
use std::path::Path;

/// Writes `NAME-ca.crt`, and `NAME.crt` and `NAME.key` signed by it, for etcd and its clients.
fn certificates(folder: &Path, name: &str) {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
    let certificate = params.signed_by(&key, &ca).unwrap();
    let write = |file: String, text: String| fs::write(folder.join(file), text).unwrap();
    write(format!("{name}-ca.crt"), ca.pem());
    write(format!("{name}.crt"), certificate.pem());
    write(format!("{name}.key"), key.serialize_pem());
}

#[test]
fn a_storage_node_speaks_tls_with_an_external_etcd() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    certificates(dir.path(), "good");
    certificates(dir.path(), "other");
    let options = [
        "--client-cert-auth".to_owned(),
        format!("--trusted-ca-file={}", path("good-ca.crt")),
        format!("--cert-file={}", path("good.crt")),
        format!("--key-file={}", path("good.key")),
    ];
    let (_etcd, url) = etcd(&dir.path().join("etcd"), "https", &options);
    let with = |ca: &str, identity: &str| {
        [
            ("ca", format!("{ca}-ca.crt")),
            ("cert", format!("{identity}.crt")),
            ("key", format!("{identity}.key")),
        ]
        .map(|(flag, file)| format!("--etcd-{flag}={}", path(&file)))
    };
    let disk = |name: &str| {
        let disk = dir.path().join(name);
        fs::create_dir(&disk).unwrap();
        disk
    };
    // Whom etcd does not trust, and who does not trust etcd, have no place in the cluster.
    let strangers = [("a", with("good", "other")), ("b", with("other", "good"))];
    let strangers = strangers.map(|(name, options)| {
        let disk = disk(name);
        (node("ns/one", name, &url, &disk, &options), disk)
    });
    let good = disk("good");
    let mut accepted = node("ns/one", "c", &url, &good, &with("good", "good"));
    wait_initialised(&mut accepted, &good);
    for (_process, disk) in &strangers {
        assert!(
            !disk.join("identity.json").exists(),
            "{} was initialised",
            disk.display()
        );
    }
}

#[test]
fn half_of_the_settings_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let url = "https://127.0.0.1:1";
    let missing = format!("--etcd-ca={}", dir.path().join("ca.crt").display());
    for (url, options, reason) in [
        (
            url,
            vec![],
            "--etcd has \"https://127.0.0.1:1\": with --etcd-ca all begin with https://",
        ),
        (
            "http://127.0.0.1:1",
            vec![missing.clone()],
            "--etcd has \"http://127.0.0.1:1\"",
        ),
        (url, vec![missing.clone()], "--etcd-ca "),
        (url, vec!["--etcd-cert=x".to_owned()], "--etcd-ca"),
        (url, vec![missing, "--etcd-cert=x".to_owned()], "--etcd-key"),
    ] {
        let (status, said) = refusal(node("one", "a", url, dir.path(), &options));
        assert!(!status.success() && said.contains(reason), "{options:?}: {said}");
    }
}
