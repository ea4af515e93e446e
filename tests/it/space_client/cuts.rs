//! Connections that end in the middle of everything, servers that live on: what was
//! acknowledged is there once, what is unknown is there once or not at all.

use uffd_sync::client::space::{Answer, Space, SpaceOptions, Transport};

use super::proxy::Proxy;
use super::{PATIENT, Way, client, config};
use crate::space::servers::Servers;

fn through(servers: &Servers, proxy: &Proxy) -> Space {
    let options = SpaceOptions {
        deadline: Some(PATIENT),
        transport: Transport::Unix,
        sockets: Some(proxy.folder().to_owned()),
        no_mapping: true,
    };
    Space::connect_with(config(servers), options).expect("a client")
}

#[test]
fn unknown_outcomes_are_counted_right() {
    let servers = Servers::start(1, 1 << 20, "");
    let proxy = Proxy::start(servers.socket(0), 2000);
    let mut space = through(&servers, &proxy);
    let mut direct = client(&servers, Way::Tcp, PATIENT);
    let (mut done, mut unknown) = (0, 0);
    for round in 0..200 {
        let tickets: Vec<_> = (0..8)
            .map(|_| space.submit_fetch_add(64, 1).expect("room"))
            .collect();
        for ticket in tickets {
            match space.wait(ticket) {
                Ok(answer) => {
                    assert!(matches!(answer, Answer::Value(_)));
                    done += 1;
                }
                Err(error) if error.is_indeterminate() => unknown += 1,
                Err(error) => panic!("round {round}: {error}"),
            }
        }
        // A read is asked again: it never fails here.
        let mut bytes = [0; 8];
        space.read(64, &mut bytes).expect("asked again");
        let found = u64::from_le_bytes(bytes);
        assert!(
            (done..=done + unknown).contains(&found),
            "{done}, {unknown}: {found}"
        );
    }
    assert!(
        proxy.cuts() > 10 && unknown > 0,
        "{} cuts, {unknown}",
        proxy.cuts()
    );
    let found = direct.fetch_add(64, 0).expect("asked");
    assert!(
        (done..=done + unknown).contains(&found),
        "{done}, {unknown}: {found}"
    );
    proxy.lets_all_pass();
}

#[test]
fn a_long_read_comes_whole_over_many_connections() {
    let servers = Servers::start(1, 4 << 20, "");
    let mut direct = client(&servers, Way::Tcp, PATIENT);
    let bytes: Vec<u8> = (0..4_u32 << 20).map(|at| (at % 253) as u8).collect();
    direct.write(0, &bytes).expect("written");
    // Room for one piece and a part of the next.
    let proxy = Proxy::start(servers.socket(0), 1_500_000);
    let mut space = through(&servers, &proxy);
    for _ in 0..4 {
        let mut found = vec![0; bytes.len()];
        space.read(0, &mut found).expect("asked again");
        assert!(found == bytes);
    }
    assert!(proxy.cuts() >= 4);
}
