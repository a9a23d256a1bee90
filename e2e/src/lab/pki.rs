//! Certificates and kubeconfigs of the lab.

use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    SanType,
};
use serde_json::json;

use super::config::LabConfig;

/// Certificate authority of the whole lab, and its folder.
pub(super) struct Pki {
    dir: PathBuf,
    issuer: Issuer<'static, KeyPair>,
}

impl Pki {
    /// Makes a new authority and everything that the control plane needs.
    pub(super) fn create(config: &LabConfig) -> Result<Self> {
        let dir = config.pki();
        fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "lazarette-lab");
        params.key_usages = vec![
            KeyUsagePurpose::DigitalSignature,
            KeyUsagePurpose::KeyCertSign,
            KeyUsagePurpose::CrlSign,
        ];
        let key = KeyPair::generate()?;
        let certificate = params.self_signed(&key)?;
        write(&dir.join("ca.crt"), &certificate.pem())?;
        write(&dir.join("ca.key"), &key.serialize_pem())?;
        let pki = Self {
            dir,
            issuer: Issuer::new(params, key),
        };

        let dns = [
            "kubernetes",
            "kubernetes.default",
            "kubernetes.default.svc",
            "kubernetes.default.svc.cluster.local",
        ];
        let ips = [
            config.control_plane_address(),
            config.kubernetes_service(),
            Ipv4Addr::LOCALHOST,
        ];
        pki.server("apiserver", "kube-apiserver", &dns, &ips)?;
        pki.client(
            "apiserver-kubelet-client",
            "kube-apiserver-kubelet-client",
            Some("system:masters"),
        )?;
        let service_account = KeyPair::generate()?;
        write(&pki.dir.join("service-account.key"), &service_account.serialize_pem())?;
        write(&pki.dir.join("service-account.pub"), &service_account.public_key_pem())?;
        Ok(pki)
    }

    /// A certificate for a server, as `NAME.crt` and `NAME.key`.
    pub(super) fn server(&self, name: &str, common_name: &str, dns: &[&str], ips: &[Ipv4Addr]) -> Result<()> {
        let mut params = CertificateParams::new(dns.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>())?;
        params
            .subject_alt_names
            .extend(ips.iter().map(|ip| SanType::IpAddress(IpAddr::V4(*ip))));
        params.distinguished_name.push(DnType::CommonName, common_name);
        self.sign(name, params, ExtendedKeyUsagePurpose::ServerAuth)
    }

    /// A certificate for a client, as `NAME.crt` and `NAME.key`.
    pub(super) fn client(&self, name: &str, user: &str, group: Option<&str>) -> Result<()> {
        let mut params = CertificateParams::new(Vec::new())?;
        params.distinguished_name.push(DnType::CommonName, user);
        if let Some(group) = group {
            params.distinguished_name.push(DnType::OrganizationName, group);
        }
        self.sign(name, params, ExtendedKeyUsagePurpose::ClientAuth)
    }

    /// A client certificate with a kubeconfig that uses it, at `path`.
    pub(super) fn kubeconfig(
        &self,
        config: &LabConfig,
        name: &str,
        user: &str,
        group: Option<&str>,
        path: &Path,
    ) -> Result<()> {
        self.client(name, user, group)?;
        let content = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "lazarette-lab", "cluster": {
                "server": config.api_server(),
                "certificate-authority": self.dir.join("ca.crt"),
            }}],
            "users": [{"name": user, "user": {
                "client-certificate": self.dir.join(format!("{name}.crt")),
                "client-key": self.dir.join(format!("{name}.key")),
            }}],
            "contexts": [{"name": "lazarette-lab", "context": {"cluster": "lazarette-lab", "user": user}}],
            "current-context": "lazarette-lab",
        });
        write(path, &serde_json::to_string_pretty(&content)?)
    }

    fn sign(&self, name: &str, mut params: CertificateParams, usage: ExtendedKeyUsagePurpose) -> Result<()> {
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages = vec![usage];
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate()?;
        let certificate = params
            .signed_by(&key, &self.issuer)
            .with_context(|| format!("sign {name}"))?;
        write(&self.dir.join(format!("{name}.crt")), &certificate.pem())?;
        write(&self.dir.join(format!("{name}.key")), &key.serialize_pem())
    }
}

/// Writes a file that only root reads.
fn write(path: &Path, content: &str) -> Result<()> {
    use std::io::Write;
    let mut file = fs::File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .with_context(|| format!("create {}", path.display()))?;
    file.write_all(content.as_bytes())
        .with_context(|| format!("write {}", path.display()))
}
