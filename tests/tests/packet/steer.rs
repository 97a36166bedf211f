//! Steering: a connection goes to the socket of the CPU that took its packet, and to any socket where we have no say.

use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;

use aya::maps::ReusePortSockArray;
use aya::programs::SkReuseport;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use proxy_ebpf::abi::{Address, SteerKey, name};
use rig::packet::TCP;
use socket2::{Domain, Socket, Type};

use crate::loaded::{Loaded, Value, load, skip};

/// The kernel half with its second program loaded, too.
fn steering() -> Option<Loaded> {
    let mut loaded = load()?;
    loaded.load_select();
    Some(loaded)
}

/// A listening socket of a group.
fn listen(address: SocketAddr) -> Socket {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None).unwrap();
    socket.set_reuse_port(true).unwrap();
    socket.set_nonblocking(true).unwrap();
    socket.bind(&address.into()).unwrap();
    socket.listen(16).unwrap();
    socket
}

/// Two sockets on one free port of an address, and that port.
fn group(address: &str) -> ([Socket; 2], SocketAddr) {
    let first = listen(format!("{address}:0").parse().unwrap());
    let at = first.local_addr().unwrap().as_socket().unwrap();
    ([first, listen(at)], at)
}

/// Attaches the program to a socket's group; it goes with the last socket of it.
fn attach(loaded: &Loaded, socket: &Socket) {
    let program: &SkReuseport = loaded.program(name::SELECT).try_into().unwrap();
    program.attach(socket.as_fd()).unwrap();
}

fn steer(loaded: &mut Loaded, at: SocketAddr, address: Address, sockets: &[Socket; 2], base: u32) {
    let key = SteerKey {
        address,
        port: at.port().to_be_bytes(),
        protocol: TCP,
        zero: [0; 5],
    };
    loaded
        .hash(name::STEER)
        .insert(Value(key), Value(base), 0)
        .unwrap();
    let map = loaded.map_mut(name::SOCKETS);
    let mut array = ReusePortSockArray::try_from(map).unwrap();
    for (index, socket) in sockets.iter().enumerate() {
        array.set(base + index as u32, &socket.as_fd(), 0).unwrap();
    }
}

/// Connects from a CPU, on which the loopback also delivers; says which of the two sockets has the connection.
fn connect_from(cpu: usize, to: SocketAddr, sockets: &[Socket; 2]) -> usize {
    std::thread::scope(|scope| {
        let connect = scope.spawn(move || {
            let mut set = CpuSet::new();
            set.set(cpu).unwrap();
            sched_setaffinity(Pid::from_raw(0), &set).unwrap();
            TcpStream::connect(to).unwrap()
        });
        let _stream = connect.join().unwrap();
        let accepted = sockets.each_ref().map(|socket| socket.accept().is_ok());
        match accepted {
            [true, false] => 0,
            [false, true] => 1,
            other => panic!("accepted {other:?}"),
        }
    })
}

fn cpus() -> usize {
    std::thread::available_parallelism().unwrap().get()
}

#[test]
fn a_connection_goes_to_the_worker_on_the_cpu_that_took_it() {
    let Some(mut loaded) = steering() else { return };
    if cpus() < 2 {
        skip("needs two CPUs");
        return;
    }
    for (host, address) in [
        ("127.0.0.1", Address::v4(Ipv4Addr::LOCALHOST.octets())),
        ("0.0.0.0", Address::v4([0; 4])),
        (
            "[::1]",
            Address([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]),
        ),
        ("[::]", Address([0; 16])),
    ] {
        let (sockets, at) = group(host);
        attach(&loaded, &sockets[0]);
        steer(&mut loaded, at, address, &sockets, 4);
        for round in 0..10 {
            let cpu = round % 2;
            assert_eq!(
                connect_from(cpu, at, &sockets),
                cpu,
                "{host}, round {round}"
            );
        }
    }
}

#[test]
fn where_nothing_is_known_the_kernel_chooses() {
    let Some(mut loaded) = steering() else { return };
    let (sockets, at) = group("127.0.0.1");
    attach(&loaded, &sockets[0]);
    // No entry at all.
    connect_from(0, at, &sockets);
    // An entry that leads to places without a socket, and beyond the array.
    let key = SteerKey {
        address: Address::v4(Ipv4Addr::LOCALHOST.octets()),
        port: at.port().to_be_bytes(),
        protocol: TCP,
        zero: [0; 5],
    };
    for base in [0u32, 1_000_000, u32::MAX] {
        loaded
            .hash(name::STEER)
            .insert(Value(key), Value(base), 0)
            .unwrap();
        connect_from(0, at, &sockets);
    }
}

#[test]
fn a_socket_of_another_group_is_never_chosen() {
    let Some(mut loaded) = steering() else { return };
    let (ours, at) = group("127.0.0.1");
    let (others, _) = group("127.0.0.1");
    attach(&loaded, &ours[0]);
    let address = Address::v4(Ipv4Addr::LOCALHOST.octets());
    steer(&mut loaded, at, address, &others, 8);
    connect_from(0, at, &ours);
    let stray: TcpListener = others.map(TcpListener::from).into_iter().next().unwrap();
    assert!(stray.accept().is_err());
}
