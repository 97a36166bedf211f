//! The client's side of the handshake: whom we trust, for what control asks of endpoints itself.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};

use crate::config::Trust;

/// Connects by TLS 1.2 and 1.3. Cheap to clone.
#[derive(Clone)]
pub struct Connector(Arc<ClientConfig>);

/// What a server must show.
#[derive(Clone, Debug)]
pub struct PeerName(ServerName<'static>);

impl PeerName {
    /// Of a name of the DNS, or an address.
    ///
    /// # Errors
    /// It is neither.
    pub fn parse(text: &str) -> Result<Self, String> {
        let name = ServerName::try_from(text.to_owned());
        name.map(Self)
            .map_err(|_| format!("`{text}` is no name that a certificate could have"))
    }
}

impl From<IpAddr> for PeerName {
    fn from(ip: IpAddr) -> Self {
        Self(ServerName::from(ip))
    }
}

impl Connector {
    /// One that trusts the authorities of `trust`, those of this host where it names none, or everybody.
    ///
    /// # Errors
    /// A sentence: there is no authority, or the file holds something else.
    pub fn new(trust: &Trust) -> Result<Self, String> {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?;
        let config = if trust.verify {
            let roots = Arc::new(roots(trust)?);
            let verifier = WebPkiServerVerifier::builder_with_provider(roots, provider);
            let verifier = verifier.build().map_err(|error| error.to_string())?;
            builder.with_webpki_verifier(verifier)
        } else {
            let trusting = Arc::new(Trusting(provider));
            builder
                .dangerous()
                .with_custom_certificate_verifier(trusting)
        };
        Ok(Self(Arc::new(config.with_no_client_auth())))
    }

    /// What shakes hands over a stream, and the name in the form that it takes.
    pub fn client(&self, name: &PeerName) -> (tokio_rustls::TlsConnector, ServerName<'static>) {
        (Arc::clone(&self.0).into(), name.0.clone())
    }
}

impl fmt::Debug for Connector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Connector")
    }
}

fn roots(trust: &Trust) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    let Some(ca) = &trust.ca else {
        // Of those that this host has some may be broken, and that is nobody's fault here.
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        return match roots.is_empty() {
            false => Ok(roots),
            true => Err(
                "this host has no certificate authorities; name a file of them as `ca`".to_owned(),
            ),
        };
    };
    let wrong = |what: String| format!("{}: {what}", ca.path.display());
    for certificate in CertificateDer::pem_slice_iter(&ca.pem) {
        let certificate = certificate.map_err(|error| wrong(error.to_string()))?;
        roots
            .add(certificate)
            .map_err(|error| wrong(error.to_string()))?;
    }
    match roots.is_empty() {
        false => Ok(roots),
        true => Err(wrong("there is no certificate in it".to_owned())),
    }
}

/// Takes any certificate, but only from whoever has its key.
#[derive(Debug)]
struct Trusting(Arc<CryptoProvider>);

impl ServerCertVerifier for Trusting {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
