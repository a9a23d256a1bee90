//! Starts etcd and kube-apiserver.

use k8s_openapi::api::core::v1::Namespace;
use kube::{Api, Client, Config};
use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

const TOKEN: &str = "admin-token";
const START: Duration = Duration::from_secs(120);

/// A running API server; ends when the last test that uses it lets go of it.
pub(crate) struct ControlPlane {
    children: Vec<Child>,
    url: String,
    folder: tempfile::TempDir,
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The path of a program: from the environment, or from where `cargo xtask tools` puts it.
pub(crate) fn program(variable: &str, name: &str) -> PathBuf {
    let var = |name| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    if let Some(path) = var(variable) {
        return path;
    }
    let cache = var("LAZARETTE_CACHE")
        .or_else(|| var("XDG_CACHE_HOME"))
        .or_else(|| Some(var("HOME")?.join(".cache")))
        .expect("HOME is not set");
    let path = cache.join("lazarette/bin").join(name);
    assert!(
        path.exists(),
        "{} is missing: build it with `cargo xtask tools`, or set {variable} to the path of {name}",
        path.display()
    );
    path
}

pub(crate) fn free_port() -> u16 {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    listener.local_addr().unwrap().port()
}

fn spawn(program: &Path, arguments: &[String], log: &Path) -> Child {
    let log = fs::File::create(log).unwrap();
    Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap_or_else(|error| panic!("start {}: {error}", program.display()))
}

impl ControlPlane {
    /// The API server that all tests of this process share.
    pub(crate) async fn shared() -> Arc<Self> {
        static SHARED: Mutex<Weak<ControlPlane>> = Mutex::new(Weak::new());
        static STARTING: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
        let _one = STARTING.lock().await;
        let current = || SHARED.lock().unwrap_or_else(PoisonError::into_inner).upgrade();
        if let Some(running) = current() {
            return running;
        }
        let started = Arc::new(Self::start().await);
        *SHARED.lock().unwrap_or_else(PoisonError::into_inner) = Arc::downgrade(&started);
        started
    }

    async fn start() -> Self {
        let etcd = program("LAZARETTE_ETCD", "etcd");
        let apiserver = program("LAZARETTE_KUBE_APISERVER", "kube-apiserver");
        let deadline = Instant::now() + START;
        // Another process may have taken one of the ports meanwhile: begin again then.
        for _ in 0..3 {
            let mut plane = Self::spawn(&etcd, &apiserver);
            loop {
                if let Ok(Ok(_)) = tokio::time::timeout(Duration::from_secs(5), plane.probe()).await {
                    return plane;
                }
                assert!(
                    Instant::now() < deadline,
                    "the API server did not start:\n{}",
                    plane.logs()
                );
                let ended = plane.children.iter_mut().any(|c| c.try_wait().unwrap().is_some());
                if ended {
                    eprintln!("etcd or kube-apiserver ended, starting again:\n{}", plane.logs());
                    break;
                }
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        }
        panic!("etcd or kube-apiserver ended at once, three times");
    }

    fn spawn(etcd: &Path, apiserver: &Path) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let [client, peer, secure] = [free_port(), free_port(), free_port()];
        let etcd_url = format!("http://127.0.0.1:{client}");
        let key = rcgen::KeyPair::generate().unwrap();
        fs::write(at("service-accounts.key"), key.serialize_pem()).unwrap();
        fs::write(at("service-accounts.pub"), key.public_key_pem()).unwrap();
        fs::write(at("tokens"), format!("{TOKEN},admin,admin,system:masters\n")).unwrap();
        let etcd_arguments = [
            format!("--data-dir={}", at("etcd").display()),
            format!("--listen-client-urls={etcd_url}"),
            format!("--advertise-client-urls={etcd_url}"),
            format!("--listen-peer-urls=http://127.0.0.1:{peer}"),
            "--unsafe-no-fsync".to_owned(),
            "--log-level=error".to_owned(),
        ];
        let apiserver_arguments = [
            format!("--etcd-servers={etcd_url}"),
            "--bind-address=127.0.0.1".to_owned(),
            format!("--secure-port={secure}"),
            format!("--cert-dir={}", at("certificates").display()),
            format!("--token-auth-file={}", at("tokens").display()),
            "--authorization-mode=RBAC".to_owned(),
            "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
            format!("--service-account-key-file={}", at("service-accounts.pub").display()),
            format!(
                "--service-account-signing-key-file={}",
                at("service-accounts.key").display()
            ),
            "--service-cluster-ip-range=10.96.0.0/16".to_owned(),
            "--allow-privileged=true".to_owned(),
            // Nothing makes the service accounts of namespaces here.
            "--disable-admission-plugins=ServiceAccount".to_owned(),
            "--profiling=false".to_owned(),
        ];
        Self {
            children: vec![
                spawn(etcd, &etcd_arguments, &at("etcd.log")),
                spawn(apiserver, &apiserver_arguments, &at("apiserver.log")),
            ],
            url: format!("https://127.0.0.1:{secure}"),
            folder,
        }
    }

    fn logs(&self) -> String {
        let last = |name: &str| {
            let text = fs::read_to_string(self.folder.path().join(name)).unwrap_or_default();
            let lines: Vec<_> = text.lines().collect();
            lines[lines.len().saturating_sub(20)..].join("\n")
        };
        format!(
            "--- etcd\n{}\n--- kube-apiserver\n{}",
            last("etcd.log"),
            last("apiserver.log")
        )
    }

    async fn probe(&self) -> Result<Namespace, kube::Error> {
        Api::<Namespace>::all(self.admin()).get("default").await
    }

    /// Helm's flags for full access.
    pub(crate) fn helm_flags(&self) -> [String; 3] {
        [
            format!("--kube-apiserver={}", self.url),
            format!("--kube-token={TOKEN}"),
            "--kube-insecure-skip-tls-verify".to_owned(),
        ]
    }

    fn config(&self) -> Config {
        let mut config = Config::new(self.url.parse().unwrap());
        // Its certificate is its own, made a moment ago, on the loopback interface.
        config.accept_invalid_certs = true;
        config.auth_info.token = Some(TOKEN.to_owned().into());
        config
    }

    /// A client that may do everything.
    pub(crate) fn admin(&self) -> Client {
        Client::try_from(self.config()).unwrap()
    }

    /// A client with the rights of a service account.
    pub(crate) fn service_account(&self, namespace: &str, name: &str) -> Client {
        let mut config = self.config();
        config.auth_info.impersonate = Some(format!("system:serviceaccount:{namespace}:{name}"));
        Client::try_from(config).unwrap()
    }
}
