//! A certificate with its chain and key, as an operator gives them: two PEM texts that belong together.

use std::{fmt, sync::Arc};

use rustls::{
    InconsistentKeys,
    crypto::aws_lc_rs,
    pki_types::{
        CertificateDer, PrivateKeyDer,
        pem::{self, PemObject},
    },
    sign::CertifiedKey,
};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

/// A checked certificate: its key is the one that it certifies.
#[derive(Clone, Debug)]
pub struct Certificate {
    pub(super) key: Arc<CertifiedKey>,
    names: Vec<String>,
    not_before_s: i64,
    not_after_s: i64,
}

/// Why a certificate or its key cannot be used; to be printed after the name of the file.
#[derive(Debug)]
pub enum CertificateError {
    /// The text for the chain holds no certificate.
    NoCertificate,
    /// The text for the key holds none that could be read.
    NoKey,
    /// The text for the chain is broken PEM.
    ChainPem(pem::Error),
    /// The text for the key is broken PEM.
    KeyPem(pem::Error),
    /// The certificate with this number in the chain, from 0, is no X.509.
    Malformed { number: usize },
    /// The key is of no kind that can sign here.
    KeyUnusable(rustls::Error),
    /// The first certificate of the chain is for another key.
    KeyMismatch,
}

impl Certificate {
    /// Reads a chain, the server's own certificate first, and its private key (PKCS#8, PKCS#1 or SEC1).
    ///
    /// Validity in time is not checked here: an expired certificate is the operator's to replace, and serves better than none.
    ///
    /// # Errors
    /// When either is unreadable, or they do not belong together.
    pub fn parse(chain_pem: &[u8], key_pem: &[u8]) -> Result<Self, CertificateError> {
        let chain = CertificateDer::pem_slice_iter(chain_pem)
            .collect::<Result<Vec<_>, _>>()
            .map_err(CertificateError::ChainPem)?;
        let key = PrivateKeyDer::from_pem_slice(key_pem).map_err(|error| match error {
            pem::Error::NoItemsFound => CertificateError::NoKey,
            error => CertificateError::KeyPem(error),
        })?;
        for (number, certificate) in chain.iter().enumerate().skip(1) {
            X509Certificate::from_der(certificate)
                .map_err(|_| CertificateError::Malformed { number })?;
        }
        let first = chain.first().ok_or(CertificateError::NoCertificate)?;
        let (_, own) = X509Certificate::from_der(first)
            .map_err(|_| CertificateError::Malformed { number: 0 })?;
        let (names, validity) = (names(&own), own.validity());
        let (not_before_s, not_after_s) = (
            validity.not_before.timestamp(),
            validity.not_after.timestamp(),
        );
        let key = CertifiedKey::from_der(chain, key, &aws_lc_rs::default_provider()).map_err(
            |error| match error {
                rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => {
                    CertificateError::KeyMismatch
                }
                rustls::Error::InvalidCertificate(_) => CertificateError::Malformed { number: 0 },
                error => CertificateError::KeyUnusable(error),
            },
        )?;
        Ok(Self {
            key: Arc::new(key),
            names,
            not_before_s,
            not_after_s,
        })
    }

    /// The DNS names that it is for, in lower case; one may begin with `*.`, which stands for exactly one label (RFC 9525 section 6.3).
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// When it begins to be valid, in seconds of Unix time.
    pub fn not_before_s(&self) -> i64 {
        self.not_before_s
    }

    /// When it expires, in seconds of Unix time.
    pub fn not_after_s(&self) -> i64 {
        self.not_after_s
    }
}

/// From the subject alternative names only: clients have not looked at the common name for years (RFC 9525 section 2).
fn names(certificate: &X509Certificate<'_>) -> Vec<String> {
    let Ok(Some(extension)) = certificate.subject_alternative_name() else {
        return Vec::new();
    };
    extension
        .value
        .general_names
        .iter()
        .filter_map(|name| match name {
            GeneralName::DNSName(name) => Some(name.to_ascii_lowercase()),
            _ => None,
        })
        .collect()
}

impl fmt::Display for CertificateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoCertificate => f.write_str(
                "holds no certificate; expected PEM with `-----BEGIN CERTIFICATE-----`",
            ),
            Self::NoKey => f.write_str(
                "holds no private key; expected PEM with `-----BEGIN PRIVATE KEY-----`, and without a passphrase",
            ),
            Self::ChainPem(error) | Self::KeyPem(error) => write!(f, "is broken PEM: {error}"),
            Self::Malformed { number } => {
                write!(f, "certificate {} of the chain is no valid X.509", number + 1)
            }
            Self::KeyUnusable(error) => write!(
                f,
                "the private key cannot be used ({error}); use ECDSA P-256 or P-384, Ed25519, or RSA of at least 2048 bits",
            ),
            Self::KeyMismatch => f.write_str(
                "the private key is not the one of the certificate; the server's own certificate must come first in the chain",
            ),
        }
    }
}

impl std::error::Error for CertificateError {}
