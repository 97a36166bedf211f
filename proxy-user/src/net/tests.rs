//! The loop with real sockets on the loopback: both halves of a connection, back-pressure, lack of everything, and an orderly end.

use std::{
    cell::{Cell, RefCell},
    future::Future,
    io::{Read, Write},
    net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    rc::Rc,
    task::Poll,
    time::Duration,
};

use socket2::{Domain, SockRef, Type};

use super::*;

/// Runs each of these tests on each back-end. One that is not listed is dead code, and the compiler says so.
macro_rules! on_each_backend {
    ($($test:ident)*) => {
        mod uring {
            $(#[test] fn $test() -> super::Outcome { super::BACKEND.set(super::Backend::Uring); super::$test() })*
        }
        mod epoll {
            $(#[test] fn $test() -> super::Outcome { super::BACKEND.set(super::Backend::Epoll); super::$test() })*
        }
    };
}

mod splice;

on_each_backend! {
    a_hundred_mebibytes_come_back_as_they_went
    a_slow_reader_leaves_the_rest_in_the_kernel
    a_thousand_connections_are_served_at_once
    each_direction_ends_on_its_own
    a_reset_is_an_error_on_either_side
    an_abort_wakes_who_waits_for_the_stream
    a_refused_connection_is_an_error_and_an_unanswered_one_a_matter_of_the_deadline
    what_stands_behind_urgent_data_is_received_too
    a_dropped_receive_loses_nothing
    a_dropped_send_is_sent_whole_and_the_next_one_follows_it
    parts_are_sent_in_order_and_empty_ones_are_nothing
    four_buffers_are_enough_for_sixty_four_connections
    connections_that_nobody_reads_do_not_starve_the_others
    a_doorbell_and_a_foreign_waker_reach_a_sleeping_worker
    a_task_that_panics_ends_alone_and_is_counted
    a_task_that_never_rests_does_not_keep_the_others_from_the_network
    quiesce_returns_what_had_arrived_and_a_socket_that_goes_on
    a_listener_hands_over_without_losing_a_connection
    a_descriptor_number_that_comes_again_is_another_descriptor
    the_end_closes_everything
    a_worker_that_ends_closes_every_connection_however_many_there_are
}

thread_local! {
    /// Of the workers that the tests of this thread make: `SLUICE_NET_BACKEND` says so for those that know nothing of it.
    static BACKEND: Cell<Backend> = Cell::new(match std::env::var("SLUICE_NET_BACKEND").as_deref() {
        Ok("epoll") => Backend::Epoll,
        Ok("uring") | Err(_) => Backend::Uring,
        Ok(other) => panic!("SLUICE_NET_BACKEND={other}: uring or epoll"),
    });
}

/// What [`Settings::default`] says in tests.
pub(super) fn backend() -> Backend {
    BACKEND.get()
}

type Outcome = Result<(), Box<dyn std::error::Error>>;

/// Runs on a thread of its own, as each test must: a thread is one worker at most.
fn on_worker<T>(settings: &Settings, main: impl Future<Output = T>) -> T {
    match run(settings, main) {
        Ok(output) => output,
        Err(error) => panic!("{:?} is needed for this test: {error}", settings.backend),
    }
}

fn here() -> Result<(Listener, SocketAddr), std::io::Error> {
    let socket = socket2::Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into())?;
    socket.listen(1024)?;
    let listener = Listener::from_fd(socket.into())?;
    let address = listener.local();
    Ok((listener, address))
}

/// Our stream and a plain blocking socket at its other end.
async fn pair() -> Result<(Stream, TcpStream), std::io::Error> {
    let (listener, address) = here()?;
    let plain = TcpStream::connect(address)?;
    Ok((listener.accept().await?, plain))
}

/// Does blocking work on another thread and waits for it without blocking the worker, which alone moves the bytes.
async fn elsewhere<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Box<dyn std::error::Error>> {
    let (bell, done) = doorbell()?;
    let thread = std::thread::spawn(move || {
        let output = work();
        bell.ring();
        output
    });
    timeout(after(20_000), done.wait()).await??;
    thread
        .join()
        .map_err(|_| "the other thread panicked".into())
}

fn read_to_end(mut plain: TcpStream) -> std::io::Result<Vec<u8>> {
    let mut all = Vec::new();
    plain.read_to_end(&mut all).map(|_| all)
}

fn after(ms: u64) -> Instant {
    Instant::read() + Duration::from_millis(ms)
}

async fn receive_all(stream: &Stream) -> std::io::Result<Vec<u8>> {
    let mut all = Vec::new();
    while let Some(chunk) = stream.recv().await? {
        all.extend_from_slice(&chunk);
    }
    Ok(all)
}

/// Bytes in which a lost, doubled or swapped piece shows.
fn pattern(len: usize) -> Vec<u8> {
    (0..len as u64)
        .map(|index| (index.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as u8)
        .collect()
}

fn a_hundred_mebibytes_come_back_as_they_went() -> Outcome {
    let sent = pattern(1 << 20);
    let expected = sent.clone();
    on_worker(&Settings::default(), async move {
        let (listener, address) = here()?;
        spawn(async move {
            if let Ok(stream) = listener.accept().await {
                while let Ok(Some(chunk)) = stream.recv().await {
                    if stream.send(chunk).await.is_err() {
                        return;
                    }
                }
            }
        });
        let stream = connect(address).await?;
        let sender = async {
            for _ in 0..100 {
                stream.send(sent.clone()).await?;
            }
            stream.shutdown().await
        };
        let receiver = async {
            let mut position = 0;
            while let Some(chunk) = stream.recv().await? {
                let start = position % expected.len();
                let front = chunk.len().min(expected.len() - start);
                assert!(chunk[..front] == expected[start..start + front]);
                assert!(chunk[front..] == expected[..chunk.len() - front]);
                position += chunk.len();
            }
            Ok::<usize, std::io::Error>(position)
        };
        let (sent, received) = join(sender, receiver).await;
        sent?;
        assert_eq!(received?, 100 << 20);
        assert_eq!(stream.sent_bytes(), 100 << 20);
        Ok(())
    })
}

fn a_slow_reader_leaves_the_rest_in_the_kernel() -> Outcome {
    let settings = Settings::default();
    let bound = settings.inbox_high_buffers + 32 + 1;
    on_worker(&settings, async move {
        let (stream, mut plain) = pair().await?;
        let writer = std::thread::spawn(move || plain.write_all(&pattern(64 << 20)));
        let mut received = stream.recv().await?.map_or(0, |chunk| chunk.len());
        // Nobody reads meanwhile; what was on its way comes, and then nothing more.
        let mut before = 0;
        while stream.received_bytes() > before {
            before = stream.received_bytes();
            sleep_until(after(30)).await;
        }
        let unread = before as usize - received;
        assert!(
            unread <= bound * (16 << 10),
            "{unread} bytes wait in the inbox"
        );
        while let Some(chunk) = stream.recv().await? {
            received += chunk.len();
        }
        assert_eq!(received, 64 << 20);
        writer.join().map_err(|_| "the writer panicked")??;
        Ok(())
    })
}

fn a_thousand_connections_are_served_at_once() -> Outcome {
    let served = Rc::new(Cell::new(0));
    let count = served.clone();
    on_worker(&Settings::default(), async move {
        let (listener, address) = here()?;
        spawn(async move {
            while let Ok(stream) = listener.accept().await {
                spawn(async move {
                    while let Ok(Some(chunk)) = stream.recv().await {
                        let _ = stream.send(chunk).await;
                    }
                });
            }
        });
        let (done, all_done) = doorbell()?;
        for number in 0..1000_u32 {
            let (count, done) = (count.clone(), done.clone());
            spawn(async move {
                if let Ok(stream) = connect(address).await
                    && stream.send(number.to_be_bytes().to_vec()).await.is_ok()
                    && let Ok(Some(chunk)) = stream.recv().await
                    && chunk[..] == number.to_be_bytes()
                {
                    count.set(count.get() + 1);
                    if count.get() == 1000 {
                        done.ring();
                    }
                }
            });
        }
        timeout(after(20_000), all_done.wait()).await??;
        Ok::<(), Box<dyn std::error::Error>>(())
    })?;
    assert_eq!(served.get(), 1000);
    Ok(())
}

fn each_direction_ends_on_its_own() -> Outcome {
    on_worker(&Settings::default(), async {
        let (stream, mut plain) = pair().await?;
        plain.write_all(b"last words")?;
        plain.shutdown(Shutdown::Write)?;
        assert_eq!(receive_all(&stream).await?, b"last words");
        assert!(stream.recv().await?.is_none(), "an end stays the end");
        stream.send(b"an answer after the end").await?;
        stream.shutdown().await?;
        let answer = elsewhere(|| read_to_end(plain)).await??;
        assert_eq!(answer, b"an answer after the end");

        let (stream, mut plain) = pair().await?;
        stream.shutdown().await?;
        assert_eq!(plain.read(&mut [0; 1])?, 0);
        plain.write_all(b"still heard")?;
        drop(plain);
        assert_eq!(receive_all(&stream).await?, b"still heard");
        Ok(())
    })
}

fn a_reset_is_an_error_on_either_side() -> Outcome {
    on_worker(&Settings::default(), async {
        let (stream, plain) = pair().await?;
        SockRef::from(&plain).set_linger(Some(Duration::ZERO))?;
        drop(plain);
        let error = stream.recv().await.err().ok_or("no error")?;
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        assert!(stream.send(b"to nobody").await.is_err());

        let (stream, mut plain) = pair().await?;
        stream.abort();
        let error = stream.recv().await.err().ok_or("no error")?;
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionAborted);
        let read = elsewhere(move || plain.read(&mut [0; 1])).await?;
        let error = read.err().ok_or("no error")?;
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        Ok(())
    })
}

fn an_abort_wakes_who_waits_for_the_stream() -> Outcome {
    on_worker(&Settings::default(), async {
        let (stream, _plain) = pair().await?;
        let aborted = async {
            sleep_until(after(5)).await;
            stream.abort();
        };
        let endless = async { while stream.send(vec![0; 1 << 20]).await.is_ok() {} };
        let ((received, ()), ()) = join(join(stream.recv(), endless), aborted).await;
        let error = received.err().ok_or("no error")?;
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionAborted);
        Ok(())
    })
}

fn a_refused_connection_is_an_error_and_an_unanswered_one_a_matter_of_the_deadline() -> Outcome {
    on_worker(&Settings::default(), async {
        let closed = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let error = connect(closed).await.err().ok_or("connected")?;
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);

        // A listener whose queue is full answers no more.
        let socket = socket2::Socket::new(Domain::IPV4, Type::STREAM, None)?;
        socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into())?;
        socket.listen(0)?;
        let full = socket.local_addr()?.as_socket().ok_or("no address")?;
        let _first = timeout(after(2000), connect(full)).await??;
        let begun = Instant::read();
        assert_eq!(timeout(after(60), connect(full)).await.err(), Some(Elapsed));
        assert!(Instant::read() - begun >= Duration::from_millis(60));
        Ok(())
    })
}

/// A receive stops before the urgent byte, which is not for it, with more to come behind.
fn what_stands_behind_urgent_data_is_received_too() -> Outcome {
    on_worker(&Settings::default(), async {
        for is_armed in [false, true] {
            let (stream, mut plain) = pair().await?;
            if is_armed {
                assert!(timeout(now(), stream.recv()).await.is_err());
            }
            plain.write_all(b"before")?;
            SockRef::from(&plain).send_out_of_band(b"!")?;
            plain.write_all(b"behind")?;
            let mut received = Vec::new();
            while received.len() < 12 {
                let chunk = timeout(after(5000), stream.recv()).await??;
                received.extend_from_slice(&chunk.ok_or("the end")?);
            }
            assert_eq!(received, b"beforebehind");
        }
        Ok(())
    })
}

fn a_dropped_receive_loses_nothing() -> Outcome {
    on_worker(&Settings::default(), async {
        let (stream, mut plain) = pair().await?;
        assert!(timeout(after(5), stream.recv()).await.is_err());
        assert!(!stream.has_input());
        plain.write_all(b"came later")?;
        timeout(after(5000), stream.readable()).await?;
        assert!(stream.has_input());
        let chunk = stream.recv().await?.ok_or("the end")?;
        assert_eq!(&chunk[..], b"came later");
        assert!(!stream.has_input());
        drop(plain);
        timeout(after(5000), stream.readable()).await?;
        assert!(
            stream.has_input(),
            "a pooled connection that the peer closed is noticed"
        );
        Ok(())
    })
}

fn a_dropped_send_is_sent_whole_and_the_next_one_follows_it() -> Outcome {
    on_worker(&Settings::default(), async {
        let (stream, plain) = pair().await?;
        let first = pattern(8 << 20);
        let expected = [&first[..], b"second"].concat();
        assert!(
            timeout(after(20), stream.send(first)).await.is_err(),
            "nobody reads, so it cannot have ended"
        );
        let next = async {
            stream.send(b"second").await?;
            stream.shutdown().await
        };
        let (sent, received) = join(next, elsewhere(|| read_to_end(plain))).await;
        sent?;
        assert!(received?? == expected);
        Ok(())
    })
}

fn parts_are_sent_in_order_and_empty_ones_are_nothing() -> Outcome {
    on_worker(&Settings::default(), async {
        let (stream, plain) = pair().await?;
        let body = pattern(3 << 20);
        let expected = [b"head", &body[..], b"tail"].concat();
        let sender = async move {
            stream.send(Vec::new()).await?;
            let parts = [
                (&b"head"[..]).into(),
                Vec::new().into(),
                body.into(),
                Payload::Shared(b"tail"[..].into()),
            ];
            stream.send_vectored(parts).await
        };
        let (sent, received) = join(sender, elsewhere(|| read_to_end(plain))).await;
        sent?;
        assert!(received?? == expected);
        Ok(())
    })
}

fn four_buffers_are_enough_for_sixty_four_connections() -> Outcome {
    let settings = Settings {
        buffers: 4,
        buffer_bytes: 512,
        ..Settings::default()
    };
    on_worker(&settings, async {
        let (listener, address) = here()?;
        let mut plains = Vec::new();
        let sums = Rc::new(RefCell::new(Vec::new()));
        let (done, all_done) = doorbell()?;
        for _ in 0..64 {
            plains.push(TcpStream::connect(address)?);
            let stream = listener.accept().await?;
            let (sums, done) = (sums.clone(), done.clone());
            spawn(async move {
                let mut sum = 0;
                while let Ok(Some(chunk)) = stream.recv().await {
                    yield_now().await;
                    sum += chunk.len();
                }
                sums.borrow_mut().push(sum);
                done.ring();
            });
        }
        for plain in &mut plains {
            plain.write_all(&pattern(10_000))?;
        }
        drop(plains);
        while sums.borrow().len() < 64 {
            timeout(after(20_000), all_done.wait()).await??;
        }
        assert_eq!(*sums.borrow(), [10_000; 64]);
        Ok(())
    })
}

fn connections_that_nobody_reads_do_not_starve_the_others() -> Outcome {
    let settings = Settings {
        buffers: 16,
        buffer_bytes: 512,
        ..Settings::default()
    };
    on_worker(&settings, async {
        let mut unread = Vec::new();
        for _ in 0..32 {
            let (stream, plain) = pair().await?;
            stream.with_socket(|socket| socket.set_recv_buffer_size(4096))?;
            // Armed, and then left alone with more than it may keep.
            assert!(timeout(now(), stream.recv()).await.is_err());
            plain.set_nonblocking(true)?;
            let _ = (&plain).write(&pattern(20_000))?;
            unread.push((stream, plain));
        }
        sleep_until(after(20)).await;
        let (stream, mut plain) = pair().await?;
        plain.write_all(&pattern(100_000))?;
        drop(plain);
        let received = timeout(after(20_000), receive_all(&stream)).await??;
        assert_eq!(received.len(), 100_000);
        assert!(unread.iter().all(|(stream, _)| stream.has_input()));
        Ok(())
    })
}

fn a_doorbell_and_a_foreign_waker_reach_a_sleeping_worker() -> Outcome {
    on_worker(&Settings::default(), async {
        let (bell, receiver) = doorbell()?;
        let (message, inbox) = std::sync::mpsc::channel();
        let rings = std::thread::spawn(move || {
            for number in 0..1000 {
                if message.send(number).is_ok() {
                    bell.ring();
                }
            }
        });
        let mut seen = 0;
        while seen < 1000 {
            timeout(after(20_000), receiver.wait()).await??;
            seen += inbox.try_iter().count();
        }
        rings.join().map_err(|_| "the ringer panicked")?;

        let mut asleep = true;
        let woken = std::future::poll_fn(move |context| {
            if !std::mem::replace(&mut asleep, false) {
                return Poll::Ready(());
            }
            let waker = context.waker().clone();
            std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(5));
                waker.wake();
            });
            Poll::Pending
        });
        timeout(after(20_000), woken).await?;
        Ok(())
    })
}

fn a_task_that_panics_ends_alone_and_is_counted() -> Outcome {
    thread_local!(static PANICS: Cell<usize> = const { Cell::new(0) });
    let settings = Settings {
        task_panicked: |_| {
            PANICS.set(PANICS.get() + 1);
        },
        ..Settings::default()
    };
    on_worker(&settings, async {
        let (stream, mut plain) = pair().await?;
        spawn(async move {
            let held = stream;
            let _ = held.recv().await;
            panic!("a fault in one exchange, planted by the test");
        });
        plain.write_all(b"go")?;
        // The panicking task's stream is closed, and with it the connection.
        assert_eq!(elsewhere(move || plain.read(&mut [0; 1])).await??, 0);
        assert_eq!(PANICS.get(), 1);
        Ok(())
    })
}

fn a_task_that_never_rests_does_not_keep_the_others_from_the_network() -> Outcome {
    on_worker(&Settings::default(), async {
        let (stream, mut plain) = pair().await?;
        spawn(async {
            loop {
                yield_now().await;
            }
        });
        sleep_until(after(5)).await;
        plain.write_all(b"x")?;
        let chunk = timeout(after(20_000), stream.recv()).await??;
        assert_eq!(chunk.as_deref(), Some(&b"x"[..]));
        Ok(())
    })
}

fn quiesce_returns_what_had_arrived_and_a_socket_that_goes_on() -> Outcome {
    on_worker(&Settings::default(), async {
        let (stream, mut plain) = pair().await?;
        plain.write_all(b"before")?;
        stream.readable().await;
        let (chunks, fd) = stream.quiesce().await?;
        let arrived: Vec<u8> = chunks.iter().flat_map(|chunk| chunk.to_vec()).collect();
        assert_eq!(arrived, b"before");
        plain.write_all(b"after")?;
        let mut rest = [0; 5];
        TcpStream::from(fd).read_exact(&mut rest)?;
        assert_eq!(&rest, b"after");
        Ok(())
    })
}

fn a_listener_hands_over_without_losing_a_connection() -> Outcome {
    on_worker(&Settings::default(), async {
        let (listener, address) = here()?;
        let _first = TcpStream::connect(address)?;
        let _accepted = listener.accept().await?;
        let plains: Vec<_> = (0..5)
            .map(|_| TcpStream::connect(address))
            .collect::<Result<_, _>>()?;
        sleep_until(after(5)).await;
        let (accepted, fd) = listener.quiesce().await;
        let next = Listener::from_fd(fd?)?;
        let mut peers: Vec<_> = accepted.iter().map(Stream::peer).collect();
        while peers.len() < 5 {
            peers.push(timeout(after(20_000), next.accept()).await??.peer());
        }
        for plain in plains {
            assert!(peers.contains(&plain.local_addr()?));
        }
        Ok(())
    })
}

/// The kernel gives a number again as soon as it is free; what was known of its last owner must not be believed of the next.
fn a_descriptor_number_that_comes_again_is_another_descriptor() -> Outcome {
    on_worker(&Settings::default(), async {
        let unanswered = SocketAddr::from(([192, 0, 2, 1], 9));
        for round in 0..20 {
            // Given up while it connects, or just when it has; handed to somebody else, with and without a share that stays open.
            let _ = timeout(after(1), connect(unanswered)).await;
            let (listener, address) = here()?;
            drop(at_once(connect(address)).await);
            let (handed, _plain) = (listener.accept().await?, ());
            let (_, fd) = handed.quiesce().await?;
            let shared = fd.try_clone()?;
            drop(fd);
            let (_, fd) = listener.quiesce().await;
            drop(fd);
            let (bell, receiver) = doorbell()?;
            bell.ring();
            receiver.wait().await?;
            drop((bell, receiver));
            yield_now().await;

            let mut pairs = Vec::new();
            for _ in 0..4 {
                let (stream, mut plain) = timeout(after(5000), pair()).await??;
                plain.write_all(b"hello")?;
                pairs.push((stream, plain));
            }
            for (stream, _plain) in &pairs {
                let chunk = timeout(after(5000), stream.recv()).await??;
                assert_eq!(chunk.as_deref(), Some(&b"hello"[..]), "in round {round}");
            }
            drop(shared);
        }
        Ok(())
    })
}

fn the_end_closes_everything() -> Outcome {
    let descriptors = || std::fs::read_dir("/proc/self/fd").map(Iterator::count);
    // Other tests open descriptors at the same time; a process of its own has its own table.
    if std::env::var_os("SLUICE_TEST_ALONE").is_none() {
        let backend = format!("{:?}", backend()).to_lowercase();
        let test = format!("net::tests::{backend}::the_end_closes_everything");
        let alone = std::process::Command::new(std::env::current_exe()?)
            .args(["--exact", &test])
            .env("SLUICE_TEST_ALONE", "1")
            .output()?;
        assert!(
            alone.status.success(),
            "{}{}",
            String::from_utf8_lossy(&alone.stdout),
            String::from_utf8_lossy(&alone.stderr)
        );
        return Ok(());
    }
    let before = descriptors()?;
    let (plain, left) = on_worker(&Settings::default(), async {
        let (listener, address) = here()?;
        let mut plains = Vec::new();
        for number in 0..50 {
            plains.push(TcpStream::connect(address)?);
            let stream = listener.accept().await?;
            spawn(async move {
                match number % 3 {
                    0 => drop(stream.recv().await),
                    1 => drop(stream.send(vec![0; 64 << 20]).await),
                    _ => sleep_until(after(1 << 40)).await,
                }
            });
        }
        // One that is accepted and not taken, one that connects for ever, and one that is left over when all is closed.
        plains.push(TcpStream::connect(address)?);
        spawn(async {
            let _ = connect(SocketAddr::from(([192, 0, 2, 1], 9))).await;
        });
        let (left, plain) = pair().await?;
        plains.push(plain);
        let _ = timeout(after(10), left.recv()).await;
        Ok::<_, Box<dyn std::error::Error>>((plains, left))
    })?;
    assert_eq!(descriptors()?, before + 52 + 1);
    drop((plain, left));
    assert_eq!(descriptors()?, before);
    Ok(())
}

fn a_worker_that_ends_closes_every_connection_however_many_there_are() -> Outcome {
    // Far fewer entries than operations to cancel and descriptors to close.
    let settings = Settings {
        entries: 16,
        ..Settings::default()
    };
    let mut peers = Vec::new();
    on_worker(&settings, async {
        for _ in 0..400 {
            let (stream, plain) = pair().await?;
            peers.push(plain);
            spawn(async move { while let Ok(Some(_)) = stream.recv().await {} });
        }
        yield_now().await;
        Ok::<_, std::io::Error>(())
    })?;
    for mut peer in peers {
        peer.set_read_timeout(Some(Duration::from_secs(5)))?;
        assert_eq!(peer.read(&mut [0])?, 0);
    }
    Ok(())
}
