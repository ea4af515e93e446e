//! The manual, as pages of this documentation.
//!
//! | page | for |
//! |---|---|
//! | [`architecture`] | who changes the code, or wants to know where a store goes |
//! | [`wire_format`] | who writes another implementation, or reads a packet dump |
//! | [`shared_layouts`] | who attaches from another language, or reads a memory dump |
//! | [`channels`] | who speaks to a channel from another language, or must know what a peer can do |
//! | [`ordered`] | who relies on the order of variables, checks it, or implements it elsewhere |
//! | [`space`] | who runs the servers of an address space, or relies on what they promise |
//! | [`space_clients`] | who reads and writes an address space: promises, errors, pipelining |
//! | [`space_nbd`] | who reaches an address space with NBD tools: exports, promises, errors |
//! | [`operations`] | who runs nodes: configuration, signals, metrics, troubleshooting |

#[doc = include_str!("architecture.md")]
pub mod architecture {}

#[doc = include_str!("wire_format.md")]
pub mod wire_format {}

#[doc = include_str!("shared_layouts.md")]
pub mod shared_layouts {}

#[doc = include_str!("channels.md")]
pub mod channels {}

#[doc = include_str!("ordered.md")]
pub mod ordered {}

#[doc = include_str!("space.md")]
pub mod space {}

#[doc = include_str!("space_clients.md")]
pub mod space_clients {}

#[doc = include_str!("space_nbd.md")]
pub mod space_nbd {}

#[doc = include_str!("operations.md")]
pub mod operations {}
