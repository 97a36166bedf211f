//! An origin that does what a script says, one thread for each connection.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use socket2::SockRef;

use super::client::{decode_chunked, find_head_end, value_of};
use super::{PATIENCE, wait_until};

/// Listens until it is dropped.
pub struct Origin {
    pub address: SocketAddr,
    seen: Arc<Seen>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Seen {
    requests: Mutex<Vec<Request>>,
    /// Connections that were accepted, and of these, that the other side has ended.
    connections: AtomicUsize,
    gone: AtomicUsize,
    is_over: AtomicBool,
}

/// A request as it arrived.
#[derive(Clone, Debug, Default)]
pub struct Request {
    pub head: String,
    pub body: Vec<u8>,
}

impl Request {
    pub fn path(&self) -> &str {
        self.head.split(' ').nth(1).unwrap_or_default()
    }
}

/// One connection, as a script has it.
pub struct Peer {
    /// From 0, in the order of accepting.
    pub number: usize,
    stream: TcpStream,
    unread: Vec<u8>,
    seen: Arc<Seen>,
}

impl Origin {
    /// Each connection is given to the script, and closed behind it.
    pub fn start(script: impl Fn(&mut Peer) + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a listening socket");
        let address = listener.local_addr().expect("an address");
        let (seen, script) = (Arc::<Seen>::default(), Arc::new(script));
        let thread = thread::spawn({
            let seen = Arc::clone(&seen);
            move || {
                while let Ok((stream, _)) = listener.accept() {
                    if seen.is_over.load(SeqCst) {
                        return;
                    }
                    let number = seen.connections.fetch_add(1, SeqCst);
                    let (seen, script) = (Arc::clone(&seen), Arc::clone(&script));
                    let _ = stream.set_read_timeout(Some(PATIENCE));
                    let _ = stream.set_nodelay(true);
                    thread::spawn(move || {
                        script(&mut Peer {
                            number,
                            stream,
                            unread: Vec::new(),
                            seen,
                        });
                    });
                }
            }
        });
        Self {
            address,
            seen,
            thread: Some(thread),
        }
    }

    /// Answers every request on every connection; the answer is the whole message.
    pub fn answering(answer: impl Fn(&Request) -> Vec<u8> + Send + Sync + 'static) -> Self {
        Self::start(move |peer| {
            while let Some(request) = peer.request() {
                peer.send(answer(&request));
            }
        })
    }

    /// Answers every request with its path.
    pub fn echoing() -> Self {
        Self::answering(|request| ok(request.path()))
    }

    /// An address at which nobody listens.
    pub fn nowhere() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a listening socket");
        listener.local_addr().expect("an address")
    }

    pub fn requests(&self) -> Vec<Request> {
        self.seen.requests.lock().expect("no panic").clone()
    }

    pub fn paths(&self) -> Vec<String> {
        let requests = self.requests();
        requests
            .iter()
            .map(|request| request.path().to_owned())
            .collect()
    }

    pub fn connections(&self) -> usize {
        self.seen.connections.load(SeqCst)
    }

    /// Waits until so many connections were ended by the other side.
    pub fn wait_until_gone(&self, count: usize) {
        wait_until("the origin sees its connection end", || {
            self.seen.gone.load(SeqCst) >= count
        });
    }
}

impl Drop for Origin {
    fn drop(&mut self) {
        self.seen.is_over.store(true, SeqCst);
        if TcpStream::connect(self.address).is_ok() {
            let _ = self.thread.take().map(JoinHandle::join);
        }
    }
}

impl Peer {
    /// The next request, whole, which is recorded; None when the connection ends.
    pub fn request(&mut self) -> Option<Request> {
        let mut request = self.head()?;
        request.body = self.body(&request.head)?;
        if let Some(last) = self.seen.requests.lock().expect("no panic").last_mut() {
            last.body.clone_from(&request.body);
        }
        Some(request)
    }

    /// The head of the next request, which is recorded.
    pub fn head(&mut self) -> Option<Request> {
        let end = loop {
            if let Some(end) = find_head_end(&self.unread) {
                break end;
            }
            self.receive()?;
        };
        let rest = self.unread.split_off(end);
        let head = String::from_utf8(std::mem::replace(&mut self.unread, rest)).ok()?;
        let request = Request {
            head,
            body: Vec::new(),
        };
        let mut requests = self.seen.requests.lock().expect("no panic");
        requests.push(request.clone());
        Some(request)
    }

    /// The body behind this head; None when it is cut short.
    pub fn body(&mut self, head: &str) -> Option<Vec<u8>> {
        if value_of(head, "transfer-encoding").is_some() {
            loop {
                if let Some((body, end)) = decode_chunked(&self.unread) {
                    self.unread.drain(..end);
                    return Some(body);
                }
                self.receive()?;
            }
        }
        let length =
            value_of(head, "content-length").map_or(0, |value| value.parse().expect("a number"));
        while self.unread.len() < length {
            self.receive()?;
        }
        let rest = self.unread.split_off(length);
        Some(std::mem::replace(&mut self.unread, rest))
    }

    /// A chunked body as it stands on the wire, trailers and all.
    pub fn raw_chunked(&mut self) -> Vec<u8> {
        loop {
            let last = self.unread.windows(3).position(|window| window == b"0\r\n");
            let end = last.and_then(|at| Some(at + find_head_end(&self.unread[at..])?));
            match end {
                Some(end) => return self.unread.drain(..end).collect(),
                None if self.receive().is_none() => return Vec::new(),
                None => {}
            }
        }
    }

    /// Records this as the body of the last request.
    pub fn note(&mut self, body: &[u8]) {
        if let Some(last) = self.seen.requests.lock().expect("no panic").last_mut() {
            last.body = body.to_vec();
        }
    }

    fn receive(&mut self) -> Option<()> {
        let mut buffer = [0; 64 << 10];
        let n = self.stream.read(&mut buffer).unwrap_or(0);
        if n == 0 {
            self.seen.gone.fetch_add(1, SeqCst);
            return None;
        }
        self.unread.extend_from_slice(&buffer[..n]);
        Some(())
    }

    /// Reads until the other side ends the connection.
    pub fn wait_for_end(&mut self) {
        while self.receive().is_some() {}
    }

    /// Says that nothing more comes, and waits for the other side to say the same.
    pub fn shutdown_and_wait(&mut self) {
        let _ = self.stream.shutdown(std::net::Shutdown::Write);
        self.wait_for_end();
    }

    /// Sends; that nobody listens any more is no fault of the script.
    pub fn send(&mut self, bytes: impl AsRef<[u8]>) -> bool {
        self.stream.write_all(bytes.as_ref()).is_ok()
    }

    /// Waits until it may go on; false when the other side ends the connection first.
    pub fn wait_for(&mut self, released: &Mutex<Receiver<()>>) -> bool {
        loop {
            if released.lock().expect("no panic").try_recv().is_ok() {
                return true;
            }
            let _ = self.stream.set_read_timeout(Some(Duration::from_millis(2)));
            let peeked = self.stream.peek(&mut [0]);
            let _ = self.stream.set_read_timeout(Some(PATIENCE));
            if peeked.is_ok_and(|n| n == 0) {
                self.wait_for_end();
                return false;
            }
        }
    }

    /// The connection will be reset when the script ends.
    pub fn reset(&mut self) {
        let _ = SockRef::from(&self.stream).set_linger(Some(Duration::ZERO));
    }
}

/// A response with this content.
pub fn ok(content: impl AsRef<[u8]>) -> Vec<u8> {
    let content = content.as_ref();
    let head = format!(
        "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n",
        content.len()
    );
    [head.as_bytes(), content].concat()
}
