//! Ordered variables between real processes: nodes and their commands, parties that are
//! cut off and stopped, a peer that lost its memory, hostile peers.

mod etcd;
mod example;
mod hostile;
#[path = "../../ordered/linear.rs"]
mod linear;
mod nodes_of;
mod party;
mod relay;
mod soak;
