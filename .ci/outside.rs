//! A program outside the tree: it links the crate by path, runs an engine inside
//! itself, stores into a region, and joins that region again as a reader.

use std::time::Duration;

use uffd_sync::client::{Node as Connection, Reader, Writer, WriterOptions};
use uffd_sync::node::{Node, NodeConfig};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let node = Node::embedded(&NodeConfig::default())?;
    let connect = || -> Result<Connection, Box<dyn std::error::Error>> {
        Ok(Connection::from_socket(node.connect()?)?)
    };
    let options = WriterOptions::default();
    let region = Writer::create_over(connect()?, "prices", 1 << 20, &options)?;
    region.write(4096, b"42.17")?;
    region.commit(Duration::from_secs(5))?;

    let status = connect()?.status()?;
    let prices = &status.regions[0];
    assert_eq!((prices.name.as_str(), prices.bytes_changed), ("prices", 5));

    let reader = Reader::attach_over(connect()?, "prices")?;
    let mut bytes = [0; 5];
    reader.read(4096, &mut bytes)?;
    assert_eq!(&bytes, b"42.17");
    println!(
        "epoch {} of {} bytes: {} changed",
        prices.epoch, prices.size, prices.bytes_changed
    );

    drop((reader, region));
    node.stop()?;
    Ok(())
}
