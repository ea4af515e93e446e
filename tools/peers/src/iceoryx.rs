//! iceoryx2 request and response: SERVICE LEN_BYTES TOUCH busy|event.
//!
//! `busy` polls; `event` rings an event service in each direction and sleeps on it.

use std::hint::spin_loop;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use iceoryx2::port::listener::Listener;
use iceoryx2::port::notifier::Notifier;
use iceoryx2::prelude::*;
use iceoryx2::service::port_factory::request_response;

use crate::payload::{Touch, fill};
use crate::{Lines, check, serve_calls};

/// Longest wait for the other side.
const PATIENCE: Duration = Duration::from_secs(60);

type Exchange = request_response::PortFactory<ipc::Service, [u64], (), [u64], ()>;

struct Setup {
    _node: Node<ipc::Service>,
    exchange: Exchange,
    words: usize,
    touch: Touch,
    bells: Option<Bells>,
}

/// Rings the other side, and is rung by it.
struct Bells {
    ring: Notifier<ipc::Service>,
    wait: Listener<ipc::Service>,
}

impl Bells {
    fn ring(&self) -> anyhow::Result<()> {
        self.ring.notify()?;
        Ok(())
    }

    fn wait(&self) -> anyhow::Result<()> {
        self.wait.timed_wait(|_| (), PATIENCE)?;
        Ok(())
    }
}

impl Setup {
    fn new(args: &[String], sides: [&str; 2]) -> anyhow::Result<Self> {
        set_log_level(LogLevel::Error);
        let [service, len, touch, waiting] = args else {
            bail!("iceoryx2 SIDE CORE SERVICE LEN_BYTES TOUCH busy|event")
        };
        let node = NodeBuilder::new().create::<ipc::Service>()?;
        let exchange = node
            .service_builder(&service.as_str().try_into()?)
            .request_response::<[u64], [u64]>()
            .max_clients(1)
            .max_servers(1)
            .open_or_create()?;
        let bells = match waiting.as_str() {
            "busy" => None,
            _ => Some(Bells {
                ring: event(&node, service, sides[0])?.notifier_builder().create()?,
                wait: event(&node, service, sides[1])?.listener_builder().create()?,
            }),
        };
        Ok(Self {
            exchange,
            words: len.parse::<usize>()? / 8,
            touch: touch.parse().map_err(anyhow::Error::msg)?,
            bells,
            _node: node,
        })
    }
}

fn event(
    node: &Node<ipc::Service>,
    service: &str,
    side: &str,
) -> anyhow::Result<iceoryx2::service::port_factory::event::PortFactory<ipc::Service>> {
    let name = format!("{service}/{side}");
    Ok(node
        .service_builder(&name.as_str().try_into()?)
        .event()
        .open_or_create()?)
}

pub(crate) fn serve(mut lines: Lines, args: &[String]) -> anyhow::Result<()> {
    let setup = Setup::new(args, ["client", "server"])?;
    let server = setup
        .exchange
        .server_builder()
        .initial_max_slice_len(setup.words)
        .create()?;
    lines.say("open")?;
    while let Some(numbers) = lines.go()? {
        let count = *numbers.first().context("go N")?;
        lines.say("ready")?;
        let mut served = 0;
        while served < count {
            let Some(request) = server.receive()? else {
                match &setup.bells {
                    Some(bells) => bells.wait()?,
                    None => spin_loop(),
                }
                continue;
            };
            let mut response = request.loan_slice_uninit(setup.words)?;
            // SAFETY: required: every element is written before it is read or sent.
            // `apply_to` writes as many words as the request has, which are as many;
            // a request of another length ends the process.
            let target = unsafe {
                let target = response.payload_mut();
                std::slice::from_raw_parts_mut(target.as_mut_ptr().cast::<u64>(), target.len())
            };
            anyhow::ensure!(request.payload().len() == setup.words, "another length");
            setup.touch.apply_to(request.payload(), target);
            // SAFETY: as above: all of it has been written.
            unsafe { response.assume_init() }.send()?;
            if let Some(bells) = &setup.bells {
                bells.ring()?;
            }
            served += 1;
        }
    }
    Ok(())
}

pub(crate) fn call(mut lines: Lines, args: &[String]) -> anyhow::Result<()> {
    let setup = Setup::new(args, ["server", "client"])?;
    let client = setup
        .exchange
        .client_builder()
        .initial_max_slice_len(setup.words)
        .create()?;
    lines.say("open")?;
    serve_calls(lines, |seq, timed| {
        let mut request = client.loan_slice_uninit(setup.words)?;
        // SAFETY: required: every element is written before it is sent. `fill`
        // writes the whole slice.
        let request = unsafe {
            let target = request.payload_mut();
            let len = target.len();
            fill(
                std::slice::from_raw_parts_mut(target.as_mut_ptr().cast::<u64>(), len),
                seq,
            );
            request.assume_init()
        };
        let started = timed.then(Instant::now);
        let pending = request.send()?;
        if let Some(bells) = &setup.bells {
            bells.ring()?;
        }
        let response = loop {
            if let Some(response) = pending.receive()? {
                break response;
            }
            match &setup.bells {
                Some(bells) => bells.wait()?,
                None => spin_loop(),
            }
        };
        let time = started.map_or(Duration::ZERO, |at| at.elapsed());
        check(setup.touch.is_answer(response.payload(), seq), seq)?;
        Ok(time)
    })
}
