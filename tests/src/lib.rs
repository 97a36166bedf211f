//! rig

pub mod packet;
