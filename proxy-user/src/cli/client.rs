//! A question to the admin socket, and its answer.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::Common;

/// How long an answer may take: a reload of a large configuration is the slowest.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Largest answer.
const ANSWER_BYTES_MAX: u64 = 256 << 20;

/// An answer of the daemon.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub body: Vec<u8>,
}

/// Asks; `None` when no daemon runs.
///
/// # Errors
/// The socket may not be used, or what comes back is no answer.
pub fn ask(
    common: &Common,
    method: &str,
    path: &str,
    body: Option<&Value>,
) -> Result<Option<Answer>> {
    let socket = common.admin();
    let mut stream = match UnixStream::connect(&socket) {
        Ok(stream) => stream,
        Err(error)
            if matches!(
                error.kind(),
                ErrorKind::NotFound | ErrorKind::ConnectionRefused
            ) =>
        {
            return Ok(None);
        }
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {
            bail!(
                "{} may be used by its owner and root only",
                socket.display()
            )
        }
        Err(error) => {
            return Err(error).with_context(|| format!("connect to {}", socket.display()));
        }
    };
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    let body = body.map(Value::to_string).unwrap_or_default();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: sluice\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream
        .write_all(head.as_bytes())
        .and_then(|()| stream.write_all(body.as_bytes()))
        .context("ask the daemon")?;
    let mut answer = Vec::new();
    stream
        .take(ANSWER_BYTES_MAX)
        .read_to_end(&mut answer)
        .context("read the daemon's answer")?;
    parse(answer).map(Some)
}

/// Asks a daemon that must be running, and whose answer must be good.
///
/// # Errors
/// As above; no daemon runs; it refuses.
pub fn ask_running(
    common: &Common,
    method: &str,
    path: &str,
    body: Option<&Value>,
) -> Result<Answer> {
    let answer = ask(common, method, path, body)?.ok_or_else(|| nobody(common))?;
    if answer.status / 100 == 2 {
        return Ok(answer);
    }
    let said: Value = serde_json::from_slice(&answer.body).unwrap_or_default();
    bail!("{}", said["error"].as_str().unwrap_or("the daemon refuses"))
}

/// What to say when no daemon runs.
pub fn nobody(common: &Common) -> anyhow::Error {
    anyhow!(
        "no Sluice runs as instance {} (nobody answers at {}): start one with `sluice run`",
        common.instance,
        common.admin().display()
    )
}

impl Answer {
    /// The body as a value.
    ///
    /// # Errors
    /// It is of another version.
    pub fn json<T: DeserializeOwned>(&self) -> Result<T> {
        serde_json::from_slice(&self.body)
            .context("understand the daemon: is it of another version?")
    }
}

fn parse(answer: Vec<u8>) -> Result<Answer> {
    let end = answer.windows(4).position(|four| four == b"\r\n\r\n");
    let end = end.ok_or_else(|| anyhow!("the daemon closed the connection without an answer"))?;
    let line = String::from_utf8_lossy(&answer[..end]);
    let status = line
        .split(' ')
        .nth(1)
        .and_then(|digits| digits.parse().ok());
    let status = status.ok_or_else(|| anyhow!("the daemon's answer is no HTTP"))?;
    Ok(Answer {
        status,
        body: answer[end + 4..].to_vec(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_has_a_status_and_a_body() -> Result<()> {
        let answer = parse(b"HTTP/1.1 422 Unprocessable\r\na: b\r\n\r\n{}".to_vec())?;
        assert_eq!(
            (answer.status, answer.body.as_slice()),
            (422, b"{}".as_slice())
        );
        assert!(parse(b"HTTP/1.1 200".to_vec()).is_err());
        assert!(parse(b"SSH-2.0\r\n\r\n".to_vec()).is_err());
        Ok(())
    }
}
