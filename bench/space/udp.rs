//! What UDP would be for the smallest reads: a bare echo of a request and a reply of eight
//! bytes by datagrams, against the same over TCP.

use std::net::UdpSocket;
use std::time::Instant;

use anyhow::ensure;
use uffd_sync::space::frame::{REPLY_BYTES, REQUEST_BYTES};

use crate::echo::Echo;
use crate::harness::{Channel, Child, Options, Outcome, Rounds};
use crate::line::Waits;
use crate::servers::PLACEMENT;
use crate::work::{Bursts, Over, PATIENCE, Shape, What};

pub(crate) const ROLE: &str = "space-udp";
const CASE: &str = "udp-8";
pub(crate) const CASES: &[&str] = &[CASE];
const ANSWER: usize = REPLY_BYTES + 8;

/// The echoing process.
pub(crate) fn serve(mut channel: Channel, _: &[String]) -> anyhow::Result<()> {
    let socket = UdpSocket::bind("127.0.0.1:0")?;
    channel.send(&socket.local_addr()?.port().to_string(), &[])?;
    let mut room = [0; 2048];
    loop {
        let (bytes, from) = socket.recv_from(&mut room)?;
        if bytes < REQUEST_BYTES {
            return Ok(());
        }
        socket.send_to(&room[..ANSWER], from)?;
    }
}

pub(crate) fn run(options: &Options) -> anyhow::Result<Vec<Outcome>> {
    let shape = Shape {
        what: What::Read,
        len: 8,
        depth: 1,
    };
    let mut tcp = Echo::start(Over::Tcp, shape, Waits::Asleep)?;
    let [_, core] = PLACEMENT.cores();
    let mut child = Child::spawn(ROLE, core, &[])?;
    let port: u16 = child.hear()?.0.parse()?;
    let udp = UdpSocket::bind("127.0.0.1:0")?;
    udp.connect(("127.0.0.1", port))?;
    udp.set_read_timeout(Some(PATIENCE))?;
    let mut bursts = Bursts::new(options, shape);
    let count = options.pick(500, 4000);
    let rounds = Rounds::run_placed(options, PLACEMENT, 2, |variant, _| {
        if variant == 1 {
            return bursts.rate(&mut tcp);
        }
        let mut room = [0; 2048];
        let begun = Instant::now();
        for _ in 0..count {
            udp.send(&[1; REQUEST_BYTES])?;
            ensure!(
                udp.recv(&mut room)? == ANSWER,
                "a datagram of another length"
            );
        }
        Ok(f64::from(count) / begun.elapsed().as_secs_f64())
    })?;
    // Ends the other process.
    udp.send(&[0])?;
    child.end()?;
    let peer = ("a bare echo over TCP", rounds.of(1));
    Ok(vec![Outcome::times(CASE, "op/s", rounds.of(0), peer)])
}
