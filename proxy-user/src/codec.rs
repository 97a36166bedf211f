//! Message bodies on the wire, without any I/O: bytes in, ranges of data out.

pub mod h1;
