//! Messages on a connection, either side: what HTTP/1.1 makes of bytes, and bytes of it.

pub mod h1;
