//! Layer 7: TLS, routes by host and path, headers, keys, rates; every answer checked.

use anyhow::Result;
use rig::http::{Curl, Response};

use super::report::Layer7;
use super::stage::Stage;
use crate::say;

/// What a request should come to.
pub struct Case<'a> {
    pub what: &'a str,
    pub url: &'a str,
    pub fields: &'a [&'a str],
    pub status: u16,
    /// Prefixes of the names of the origins that may answer it; empty where Sluice itself answers.
    pub origin: &'a str,
}

/// Routing, headers and keys. The rate limit is seen at work in `guard`.
pub fn play(stage: &Stage) -> Result<Layer7> {
    say::section("Layer 7: TLS ended here, routes by host and path");
    let mut sum = Layer7::default();
    let key = &["-H", "x-api-key: open sesame"];
    let cases = [
        Case {
            what: "shop.test/",
            url: "https://shop.test/",
            fields: &[],
            status: 200,
            origin: "origin",
        },
        Case {
            what: "shop.test/",
            url: "https://shop.test/",
            fields: &[],
            status: 200,
            origin: "origin",
        },
        Case {
            what: "api.test/orders/7, no key",
            url: "https://api.test/orders/7",
            fields: &[],
            status: 401,
            origin: "",
        },
        Case {
            what: "... a wrong key",
            url: "https://api.test/orders/7",
            fields: &["-H", "x-api-key: guess"],
            status: 401,
            origin: "",
        },
        Case {
            what: "... the right key",
            url: "https://api.test/orders/7",
            fields: key,
            status: 200,
            origin: "origin3",
        },
        Case {
            what: "api.test/nowhere",
            url: "https://api.test/nowhere",
            fields: &[],
            status: 404,
            origin: "",
        },
    ];
    for case in &cases {
        let curl = stage.curl();
        check(&curl, case, &mut sum)?;
    }
    check(
        &stage.curl_v6(),
        &Case {
            what: "shop.test/ over IPv6",
            ..case_of(&cases[0])
        },
        &mut sum,
    )?;
    check_headers(stage, &mut sum)?;
    refuse_strangers(stage, &mut sum);
    Ok(sum)
}

/// Sends one request and counts what came of it.
pub fn check(curl: &Curl, case: &Case<'_>, sum: &mut Layer7) -> Result<Option<Response>> {
    let answer = curl.fetch(case.url, case.fields);
    let (text, good) = match &answer {
        Ok(response) => {
            let origin = response.origin().unwrap_or_default();
            let good = response.status == case.status
                && origin.starts_with(case.origin)
                && origin.is_empty() == case.origin.is_empty();
            sum.tls_version = response.tls.clone().unwrap_or_default();
            (format!("{} {origin}", response.status), good)
        }
        Err(error) => (format!("{error:#}"), false),
    };
    sum.count(answer.as_ref().ok().and_then(Response::origin), good);
    let expected = if good {
        String::new()
    } else {
        format!("  WRONG: {} {} was expected", case.status, case.origin)
    };
    say::step(
        if good { "ok" } else { "FAILED" },
        &format!("{:<28} {text}{expected}", case.what),
    );
    Ok(answer.ok())
}

/// What the policy `tidy-headers` does, seen from both sides.
fn check_headers(stage: &Stage, sum: &mut Layer7) -> Result<()> {
    let case = Case {
        what: "headers both ways",
        url: "https://shop.test/headers",
        fields: &["-H", "x-secret: of the client"],
        status: 200,
        origin: "origin",
    };
    let Some(response) = check(&stage.curl(), &case, sum)? else {
        return Ok(());
    };
    let seen: Vec<String> = stage
        .origins
        .iter()
        .flat_map(|origin| origin.requests())
        .filter(|line| line.contains("/headers"))
        .collect();
    let upstream = matches!(seen.as_slice(), [line] if line.contains("edge=sluice") && line.contains("secret=-"));
    let downstream = response.field("strict-transport-security").is_some()
        && response.field("x-powered-by").is_none();
    if !(upstream && downstream) {
        sum.failed += 1;
    }
    let word = if upstream && downstream {
        "ok"
    } else {
        "FAILED"
    };
    say::step(
        word,
        &format!(
            "  origin saw {:?}; x-powered-by is gone, strict-transport-security is there",
            seen.join(" ")
        ),
    );
    Ok(())
}

/// A client that does not trust the authority must not get through: the certificate is really checked.
fn refuse_strangers(stage: &Stage, sum: &mut Layer7) {
    let refused = Curl::new(&stage.field.client, rig::field::WEB_V4)
        .fetch("https://shop.test/", &[])
        .is_err();
    if !refused {
        sum.failed += 1;
    }
    let word = if refused { "ok" } else { "FAILED" };
    say::step(
        word,
        &format!(
            "{:<28} refused by curl; with it {}",
            "without our authority", sum.tls_version
        ),
    );
}

fn case_of<'a>(case: &Case<'a>) -> Case<'a> {
    Case { ..*case }
}
