//! `headers`: removes, sets and adds fields of requests and responses.

use super::Step;
use crate::config::HeaderEdit;
use crate::message::{RequestHead, ResponseHead};

#[derive(Debug)]
pub(super) struct Headers {
    request: HeaderEdit,
    response: HeaderEdit,
}

impl Headers {
    pub fn new(request: &HeaderEdit, response: &HeaderEdit) -> Self {
        Self {
            request: request.clone(),
            response: response.clone(),
        }
    }

    pub fn request(&self, head: &mut RequestHead) -> Step {
        let HeaderEdit { remove, set, add } = &self.request;
        remove.iter().for_each(|name| head.remove(name));
        set.iter().for_each(|(name, value)| head.set(name, value));
        add.iter().for_each(|(name, value)| head.add(name, value));
        Step::Continue
    }

    pub fn response(&self, head: &mut ResponseHead) {
        let HeaderEdit { remove, set, add } = &self.response;
        remove.iter().for_each(|name| head.remove(name));
        set.iter().for_each(|(name, value)| head.set(name, value));
        add.iter().for_each(|(name, value)| head.add(name, value));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{Forward, Limits, Method, Told};

    fn edit(remove: &[&str], set: &[(&str, &str)], add: &[(&str, &str)]) -> HeaderEdit {
        let own = |pairs: &[(&str, &str)]| {
            pairs
                .iter()
                .map(|(name, value)| (name.to_string(), value.to_string()))
                .collect()
        };
        HeaderEdit {
            remove: remove.iter().map(|name| name.to_string()).collect(),
            set: own(set),
            add: own(add),
        }
    }

    #[test]
    fn fields_of_a_request_are_removed_set_and_added_in_this_order() {
        let request = edit(
            &["x-old", "cookie"],
            &[("x-set", "ours"), ("host", "origin.example")],
            &[("x-add", "1"), ("x-old", "new")],
        );
        let policy = Headers::new(&request, &HeaderEdit::default());
        let mut head = RequestHead::default();
        let bytes = b"GET / HTTP/1.1\r\nHost: a.example\r\nX-Old: 1\r\nX-Set: theirs\r\nX-Set: twice\r\nX-Add: 0\r\n\r\n";
        assert!(head.parse(bytes, &Limits::default()).is_ok());
        assert_eq!(policy.request(&mut head), Step::Continue);
        let mut out = Vec::new();
        head.encode(
            &mut out,
            &Forward {
                peer: "192.0.2.1",
                scheme: "http",
                port: 80,
                told: Told::XForwarded,
                via: None,
                passes_trailers: false,
                fallback_authority: "",
            },
        );
        let text = String::from_utf8(out).expect("ASCII");
        assert_eq!(
            text,
            "GET / HTTP/1.1\r\nhost: origin.example\r\nx-add: 0\r\nx-set: ours\r\nx-add: 1\r\nx-old: new\r\nx-forwarded-for: 192.0.2.1\r\n\
             x-forwarded-proto: http\r\nx-forwarded-port: 80\r\nx-forwarded-host: a.example\r\n\r\n"
        );
        assert_eq!(
            head.host(),
            "a.example",
            "routing and metrics go on seeing what the client asked for"
        );
    }

    #[test]
    fn framing_cannot_be_set_by_a_policy() {
        let set = [
            ("content-length", "7"),
            ("transfer-encoding", "chunked"),
            ("connection", "close"),
            ("x-fine", "a\r\nb: c"),
        ];
        let policy = Headers::new(&edit(&[], &set, &set), &edit(&["server"], &set, &[]));
        let mut head = ResponseHead::default();
        assert!(
            head.parse(
                b"HTTP/1.1 200 OK\r\nServer: x\r\nContent-Length: 0\r\n\r\n",
                Method::Get,
                &Limits::default()
            )
            .is_ok()
        );
        policy.response(&mut head);
        assert!(head.fields().is_empty(), "{:?}", head.fields());
    }
}
