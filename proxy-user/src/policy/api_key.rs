//! `api_key`: a key in a header field names the consumer; without a known one there is no way on.

use super::{Facts, Refusal, Step};
use crate::config;
use crate::message::{Reply, RequestHead};
use sha2::{Digest, Sha256};
use std::collections::HashMap;

#[derive(Debug)]
pub(super) struct ApiKey {
    /// Field name, lower case.
    header: String,
    /// Names by SHA-256 of the key. How long a look-up takes tells something about the digest of what was sent, which the
    /// sender knows anyway, and nothing about keys: no guess comes closer to one by having a closer digest.
    consumers: HashMap<[u8; 32], String>,
}

impl ApiKey {
    pub fn new(config: &config::ApiKey) -> Self {
        let consumers = config
            .consumers
            .iter()
            .map(|consumer| (consumer.key_sha256, consumer.name.clone()));
        Self {
            header: config.header.clone(),
            consumers: consumers.collect(),
        }
    }

    /// The key goes no further than this: origins have no use for it, and logs would keep it.
    pub fn request<'p>(&'p self, head: &mut RequestHead, facts: &mut Facts<'p>) -> Step {
        let consumer = self.find(head);
        head.remove(&self.header);
        match consumer {
            Ok(name) => {
                facts.consumer = Some(name);
                Step::Continue
            }
            Err(reason) => {
                let reply = Reply::new(401, reason).field("www-authenticate", "Key");
                Step::Refuse(Refusal {
                    reply,
                    offence: None,
                })
            }
        }
    }

    /// Who calls, or why that cannot be said.
    fn find(&self, head: &RequestHead) -> Result<&str, &'static str> {
        let mut keys = head.fields().values(&self.header);
        let key = keys.next().ok_or("api_key_missing")?;
        // Of two keys nobody could say which one counts.
        if keys.next().is_some() {
            return Err("api_key_twice");
        }
        let digest: [u8; 32] = Sha256::digest(key).into();
        self.consumers
            .get(&digest)
            .map(String::as_str)
            .ok_or("api_key_unknown")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Consumer;
    use crate::message::Limits;

    fn policy() -> ApiKey {
        let consumer = |name: &str, key: &str| Consumer {
            name: name.into(),
            key_sha256: Sha256::digest(key).into(),
        };
        let consumers = vec![
            consumer("alice", "key-of-alice"),
            consumer("bob", "key-of-bob"),
        ];
        ApiKey::new(&config::ApiKey {
            header: "x-api-key".into(),
            consumers,
        })
    }

    /// Runs the policy on a request with these field lines: the consumer, or status and reason; and what is left of the key.
    fn run(lines: &str) -> (Result<String, (u16, &'static str)>, bool) {
        let policy = policy();
        let mut head = RequestHead::default();
        let bytes = format!("GET / HTTP/1.1\r\nHost: a\r\n{lines}\r\n");
        assert!(head.parse(bytes.as_bytes(), &Limits::default()).is_ok());
        let mut facts = Facts {
            peer: [192, 0, 2, 1].into(),
            now_ns: 0,
            consumer: None,
        };
        let outcome = match policy.request(&mut head, &mut facts) {
            Step::Continue => Ok(facts.consumer.unwrap_or_default().to_owned()),
            Step::Refuse(refusal) => {
                assert_eq!(
                    refusal.reply.fields,
                    [("www-authenticate", "Key".to_owned())]
                );
                Err((refusal.reply.status, refusal.reply.reason))
            }
        };
        (outcome, head.fields().value("x-api-key").is_some())
    }

    #[test]
    fn a_known_key_names_its_consumer_and_goes_no_further() {
        assert_eq!(run("X-API-Key: key-of-bob\r\n"), (Ok("bob".into()), false));
    }

    #[test]
    fn no_key_a_wrong_key_and_two_keys_are_refused() {
        assert_eq!(run(""), (Err((401, "api_key_missing")), false));
        assert_eq!(
            run("X-API-Key: key-of-carol\r\n"),
            (Err((401, "api_key_unknown")), false)
        );
        assert_eq!(
            run("X-API-Key: \r\n"),
            (Err((401, "api_key_unknown")), false)
        );
        assert_eq!(
            run("X-API-Key: key-of-bob\r\nx-api-key: key-of-bob\r\n"),
            (Err((401, "api_key_twice")), false)
        );
        assert_eq!(
            run("X-API-Key: key-of-bob\r\nConnection: x-api-key\r\n"),
            (Err((401, "api_key_missing")), false)
        );
    }
}
