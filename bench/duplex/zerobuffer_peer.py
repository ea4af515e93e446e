"""One side of a two-buffer channel by the published Python package:
SIDE CORE CHANNEL LEN_BYTES, with the lines of tools/peers over standard input.
Every byte of a request changes; both sides check as much as the Rust peers do."""

import logging
import os
import socket
import sys
import time

from zerobuffer import BufferConfig
from zerobuffer.duplex import DuplexChannelFactory, DuplexClient

logging.disable(logging.CRITICAL)

side, core, channel, length = sys.argv[1:5]
words = int(length) // 8
if core != "-":
    os.sched_setaffinity(0, {int(core)})
lines = socket.socket(fileno=os.dup(0)).makefile("rw", newline="\n")
changed = int.from_bytes(b"\xa5" * int(length), "little")
columns = [at << 32 for at in range(words)]


def say(line):
    lines.write(line + "\n")
    lines.flush()


def request(seq):
    return b"".join((seq + column).to_bytes(8, "little") for column in columns)


def change(data):
    return (int.from_bytes(data, "little") ^ changed).to_bytes(len(data), "little")


def serve():
    config = BufferConfig(metadata_size=4096, payload_size=1 << 20)
    server = DuplexChannelFactory().create_immutable_server(channel, config)
    server.start(lambda frame, response: response.write_frame(change(bytes(frame.data))))
    say("open")
    for _ in lines:
        say("ready")
    server.stop()


def call(client, seq):
    sent = request(seq)
    started = time.perf_counter_ns()
    client.send_request(sent)
    with client.receive_response(20000) as response:
        data = response.to_bytes()
    took = time.perf_counter_ns() - started
    if data != change(sent):
        raise ValueError(f"response {seq} is wrong")
    return took


def ask():
    client = DuplexClient(channel)
    say("open")
    for line in lines:
        calls, timed, idle_us, first = map(int, line.split()[1:])
        started = time.perf_counter_ns()
        for seq in range(first, first + calls):
            call(client, seq)
        total = time.perf_counter_ns() - started
        found = []
        for seq in range(first + calls, first + calls + timed):
            if idle_us:
                time.sleep(idle_us / 1e6)
            found.append(f"{call(client, seq)}:1")
        say(" ".join([str(total), *found]))
    client.close()


serve() if side == "server" else ask()
# No clearing up by destructors: whoever ends this process closed the socket before.
os._exit(0)
