//! The form in which a client gets our answers: text, HTML, JSON or a problem (RFC 9457), as its `Accept` says (RFC 9110 section 12.5.1).

use super::meaning::options;

/// A form of our answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// For whoever says nothing, or takes anything: mostly somebody at a terminal.
    Text,
    Problem,
    Json,
    Html,
}

/// How well a range names a form: the more exactly, the more it counts.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Match {
    Any,
    Type,
    Exact,
}

impl Form {
    /// In the order in which they are preferred where a client names them all the same.
    const ALL: [Self; 4] = [Self::Problem, Self::Json, Self::Html, Self::Text];

    /// The form for a client with these values of `Accept`. Who takes none of them gets text: what went wrong is worth more
    /// than its form.
    pub fn choose<'a>(accept: impl Iterator<Item = &'a [u8]>) -> Self {
        let ranges: Vec<(&[u8], u16)> = accept.flat_map(options).filter_map(parse_range).collect();
        let mut best = (0, Match::Any, Self::Text);
        for form in Self::ALL {
            let matches = ranges
                .iter()
                .filter_map(|(range, quality)| Some((form.matches(range)?, *quality)));
            // Of the ranges that name it the most exact one counts (RFC 9110 section 12.5.1), be it a refusal.
            let Some((matched, quality)) = matches.max_by_key(|(matched, _)| *matched) else {
                continue;
            };
            let is_better = (quality, matched) > (best.0, best.1);
            let is_text = form == Self::Text && (quality, matched) == (best.0, best.1);
            if quality > 0 && (is_better || is_text && matched < Match::Exact) {
                best = (quality, matched, form);
            }
        }
        best.2
    }

    /// `Content-Type`.
    pub const fn content_type(self) -> &'static str {
        match self {
            Self::Text => "text/plain; charset=utf-8",
            Self::Problem => "application/problem+json",
            Self::Json => "application/json",
            Self::Html => "text/html; charset=utf-8",
        }
    }

    fn matches(self, range: &[u8]) -> Option<Match> {
        let media: &[u8] = match self {
            Self::Text => b"text/plain",
            Self::Problem => b"application/problem+json",
            Self::Json => b"application/json",
            Self::Html => b"text/html",
        };
        if range == b"*/*" {
            return Some(Match::Any);
        }
        if range.eq_ignore_ascii_case(media) {
            return Some(Match::Exact);
        }
        let kind = range.strip_suffix(b"*")?;
        let is_same = kind.ends_with(b"/")
            && media
                .get(..kind.len())
                .is_some_and(|begin| begin.eq_ignore_ascii_case(kind));
        is_same.then_some(Match::Type)
    }
}

/// A media range without its parameters, and its quality in thousandths. One whose quality makes no sense is left out.
fn parse_range(member: &[u8]) -> Option<(&[u8], u16)> {
    let mut parts = member.split(|b| *b == b';').map(<[u8]>::trim_ascii);
    let range = parts.next()?;
    for parameter in parts {
        if let [b'q' | b'Q', b'=', quality @ ..] = parameter {
            return Some((range, parse_quality(quality)?));
        }
    }
    Some((range, 1000))
}

/// `0`, `0.5`, `1.000`: three decimals at most (RFC 9110 section 12.4.2).
fn parse_quality(text: &[u8]) -> Option<u16> {
    let (whole, decimals) = match text {
        [whole @ (b'0' | b'1')] => (whole, &[][..]),
        [whole @ (b'0' | b'1'), b'.', decimals @ ..] if decimals.len() <= 3 => (whole, decimals),
        _ => return None,
    };
    let mut quality = u16::from(whole - b'0') * 1000;
    for (digit, weight) in decimals.iter().zip([100, 10, 1]) {
        if !digit.is_ascii_digit() {
            return None;
        }
        quality += u16::from(digit - b'0') * weight;
    }
    (quality <= 1000).then_some(quality)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_gets_the_form_that_it_likes_best() {
        for (accept, form) in [
            (&[][..], Form::Text),
            (&["*/*"], Form::Text),
            (&["image/png"], Form::Text),
            (&["nonsense, ;q=1, text/html;q=2"], Form::Text),
            (
                &["text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8"],
                Form::Html,
            ),
            (&["application/json, text/plain, */*"], Form::Json),
            (&["Application/JSON"], Form::Json),
            (&["application/json;charset=utf-8"], Form::Json),
            (
                &["application/problem+json, application/json"],
                Form::Problem,
            ),
            (
                &["application/problem+json;q=0.5, application/json;q=0.501"],
                Form::Json,
            ),
            (&["application/*"], Form::Problem),
            (&["text/*"], Form::Text),
            (&["text/*, text/plain;q=0"], Form::Html),
            (
                &["text/*;q=0.3, text/html;q=0.7, text/html;level=1, application/json;q=0.71"],
                Form::Html,
            ),
            (&["*/*;q=0.1, text/*;q=0"], Form::Problem),
            (&["text/plain;q=0, application/*;q=0, */*"], Form::Html),
            (&["text/html;q=0.2", "application/json ; q=0.9"], Form::Json),
            (&["text/html;q=1.001, application/json;q=0.001"], Form::Json),
            (&["text/html;q=0.0001, application/json;q=0.1"], Form::Json),
            (&["*/*;q=0"], Form::Text),
        ] {
            let values = accept.iter().map(|value| value.as_bytes());
            assert_eq!(Form::choose(values), form, "{accept:?}");
        }
    }
}
