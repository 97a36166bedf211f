//! Connections that live through a change: each knows who answers it, and every byte that comes back is checked.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};

use anyhow::{Context, Result, ensure};

use crate::client::connect;

/// A connection to an echo, and who answers it.
pub struct Flow {
    stream: TcpStream,
    /// Who answers.
    pub endpoint: String,
    /// How often it was asked and has answered.
    pub rounds: u64,
}

impl Flow {
    /// Connects, and reads the line in which the echo says its name.
    pub fn open(to: SocketAddr) -> Result<Self> {
        let mut stream = connect(None, to)?;
        let mut name = vec![];
        let mut byte = [0];
        while byte != *b"\n" {
            let read = stream.read_exact(&mut byte);
            read.context("read the endpoint's name")?;
            name.extend(byte);
        }
        Ok(Self {
            stream,
            endpoint: String::from_utf8_lossy(&name).trim_end().to_owned(),
            rounds: 0,
        })
    }

    /// 64 bytes that no other flow and no other round has.
    fn message(&self, number: usize) -> Vec<u8> {
        let words = [number as u64, self.rounds];
        words.map(u64::to_be_bytes).concat().repeat(4)
    }
}

/// Every flow sends once and hears exactly that.
pub fn round(flows: &mut [Flow]) -> Result<()> {
    for (number, flow) in flows.iter_mut().enumerate() {
        let message = flow.message(number);
        let sent = flow.stream.write_all(&message);
        sent.with_context(|| format!("flow {number} to {} broke", flow.endpoint))?;
    }
    for (number, flow) in flows.iter_mut().enumerate() {
        let mut back = [0; 64];
        let heard = flow.stream.read_exact(&mut back);
        heard.with_context(|| format!("flow {number} to {} broke", flow.endpoint))?;
        ensure!(back[..] == flow.message(number), "its echo differs");
        flow.rounds += 1;
    }
    Ok(())
}
