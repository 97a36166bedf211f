//! Bytes through a pipe: whole, waited for, and never left for somebody else.

use super::*;

on_each_backend! {
    what_is_spliced_arrives_and_the_sockets_go_on_as_before
    a_spliced_socket_is_waited_for_and_not_asked_again_and_again
    bytes_in_a_pipe_are_lost_with_it_and_never_found_by_the_next
    an_abort_ends_a_splice_that_waits
    there_are_only_so_many_pipes_and_they_come_back
}

/// One splice after another, as an exchange does it, until the source has nothing more for it.
async fn pass_all(from: &Stream, to: &Stream) -> std::io::Result<usize> {
    let mut passed = 0;
    while let Some(chunk) = at_once(from.recv()).await {
        let Some(chunk) = chunk? else {
            return Ok(passed);
        };
        passed += chunk.len();
        to.send(chunk).await?;
    }
    let mut splice = Splice::new(from, to)
        .ok_or("no pipe")
        .map_err(std::io::Error::other)?;
    while splice.is_behind().await {
        if let Some(chunk) = from.recv().await? {
            passed += chunk.len();
            to.send(chunk).await?;
        } else {
            return Ok(passed);
        }
    }
    loop {
        let taken = splice.take(usize::MAX).await;
        if taken == 0 {
            return Ok(passed);
        }
        passed += taken;
        while splice.held() > 0 {
            splice.give().await?;
        }
    }
}

fn what_is_spliced_arrives_and_the_sockets_go_on_as_before() -> Outcome {
    on_worker(&Settings::default(), async {
        let ((from, mut source), (to, sink)) = (pair().await?, pair().await?);
        let bytes = pattern(20 << 20);
        let expected = [&bytes[..], b"more"].concat();
        let sending = std::thread::spawn(move || {
            source.write_all(&bytes)?;
            source.shutdown(Shutdown::Write)?;
            Ok::<TcpStream, std::io::Error>(source)
        });
        let reading = std::thread::spawn(move || read_to_end(sink));
        let passed = pass_all(&from, &to).await?;
        assert_eq!(from.recv().await?.map(|chunk| chunk.len()), None);
        assert_eq!(passed, 20 << 20);
        assert_eq!(
            (from.received_bytes(), to.sent_bytes()),
            (20 << 20, 20 << 20)
        );
        to.send(b"more".to_vec()).await?;
        to.shutdown().await?;
        let read = elsewhere(move || reading.join()).await?;
        assert!(read.map_err(|_| "panicked")?? == expected);
        let mut source = sending.join().map_err(|_| "panicked")??;
        from.send(b"back".to_vec()).await?;
        let mut back = [0; 4];
        source.read_exact(&mut back)?;
        assert_eq!(&back, b"back");
        Ok(())
    })
}

/// The uring has to wait for sockets that were made non-blocking, and not to be told again and again that they are not ready.
fn a_spliced_socket_is_waited_for_and_not_asked_again_and_again() -> Outcome {
    on_worker(&Settings::default(), async {
        let ((from, mut source), (to, mut sink)) = (pair().await?, pair().await?);
        drop(Splice::new(&from, &to).ok_or("no pipe")?);
        let before = turns();
        assert!(timeout(after(100), from.recv()).await.is_err());
        source.write_all(b"late")?;
        assert_eq!(from.recv().await?.as_deref(), Some(&b"late"[..]));
        // More than the kernel takes at once, to a peer that does not read.
        let large = vec![b'x'; 64 << 20];
        assert!(timeout(after(100), to.send(large)).await.is_err());
        assert!(turns() - before < 1000, "{} turns", turns() - before);
        let mut splice = Splice::new(&from, &to).ok_or("no pipe")?;
        assert!(!splice.is_behind().await);
        assert!(timeout(after(100), splice.take(10)).await.is_err());
        assert!(turns() - before < 1000, "{} turns", turns() - before);
        drop(splice);
        source.write_all(b"again")?;
        assert_eq!(from.recv().await?.as_deref(), Some(&b"again"[..]));
        let reading = std::thread::spawn(move || sink.read_exact(&mut vec![0; 64 << 20]));
        to.idle().await?;
        elsewhere(move || reading.join())
            .await?
            .map_err(|_| "panicked")??;
        Ok(())
    })
}

fn bytes_in_a_pipe_are_lost_with_it_and_never_found_by_the_next() -> Outcome {
    on_worker(&Settings::default(), async {
        let ((from, mut source), (to, mut sink)) = (pair().await?, pair().await?);
        source.write_all(b"secret")?;
        let mut splice = Splice::new(&from, &to).ok_or("no pipe")?;
        assert!(!splice.is_behind().await);
        assert_eq!(splice.take(3).await, 3);
        drop(splice);
        let mut splice = Splice::new(&from, &to).ok_or("no pipe")?;
        assert_eq!((splice.held(), splice.take(100).await), (0, 3));
        while splice.held() > 0 {
            splice.give().await?;
        }
        let mut read = [0; 3];
        sink.read_exact(&mut read)?;
        assert_eq!(&read, b"ret");
        Ok(())
    })
}

fn an_abort_ends_a_splice_that_waits() -> Outcome {
    on_worker(&Settings::default(), async {
        let ((from, mut source), (to, _sink)) = (pair().await?, pair().await?);
        let mut splice = Splice::new(&from, &to).ok_or("no pipe")?;
        assert!(!splice.is_behind().await);
        let abort = async {
            yield_now().await;
            from.abort();
        };
        let (taken, ()) = timeout(after(5000), join(splice.take(10), abort)).await?;
        assert_eq!(taken, 0);
        let end = elsewhere(move || source.read(&mut [0])).await?;
        assert_eq!(
            end.map_err(|error| error.kind()),
            Err(std::io::ErrorKind::ConnectionReset)
        );
        Ok(())
    })
}

fn there_are_only_so_many_pipes_and_they_come_back() -> Outcome {
    on_worker(&Settings::default(), async {
        let ((from, _source), (to, _sink)) = (pair().await?, pair().await?);
        let all: Vec<_> = std::iter::from_fn(|| Splice::new(&from, &to))
            .take(1000)
            .collect();
        assert!((1..1000).contains(&all.len()));
        let count = all.len();
        drop(all);
        let again = std::iter::from_fn(|| Splice::new(&from, &to)).take(1000);
        assert_eq!(again.collect::<Vec<_>>().len(), count);
        Ok(())
    })
}
