"""One end of a two-buffer channel, by the published Python package.

Takes orders as JSON lines on standard input and answers each with one JSON line
on standard output. What an order raises is answered as {"error": class name}.
"""

import datetime
import json
import logging
import os
import struct
import sys

from zerobuffer import BufferConfig, Reader, Writer
from zerobuffer.duplex import DuplexChannelFactory, DuplexClient

logging.disable(logging.CRITICAL)

PATTERN = bytes(range(256)) * 8192
MASK = (1 << 64) - 1


def content(number, size):
    """The bytes of frame `number`."""
    begin = number % 251
    return PATTERN[begin : begin + size]


def sizes(seed, most):
    """Endless sizes between 1 and `most`, the same as on the other side."""
    state = seed
    while True:
        state = (state * 6364136223846793005 + 1442695040888963407) & MASK
        yield 1 + (state >> 33) % most


class Peer:
    def __init__(self):
        self.reader = None
        self.writer = None
        self.client = None
        self.server = None
        self.held = None

    def create(self, name, metadata, payload):
        self.reader = Reader(name, BufferConfig(metadata_size=metadata, payload_size=payload))

    def attach(self, name, timeout=5.0):
        self.writer = Writer(name)
        self.writer.write_timeout = datetime.timedelta(seconds=timeout)

    def set_metadata(self, text):
        self.writer.set_metadata(text.encode())

    def metadata(self):
        view = self.reader.get_metadata()
        if view is None:
            return None
        text = bytes(view).decode()
        view.release()
        return text

    def write(self, number, size, in_place=False):
        data = content(number, size)
        if in_place:
            view = self.writer.get_frame_buffer(size)
            view[:] = data
            view.release()
            self.writer.commit_frame()
        else:
            self.writer.write_frame(data)

    def read(self, timeout=10.0):
        self.release()
        frame = self.reader.read_frame(timeout=timeout)
        if frame is None:
            return None
        self.held = frame
        data = bytes(frame.data)
        return {"sequence": frame.sequence, "data": data.hex()}

    def release(self):
        if self.held is not None:
            self.held.dispose()
            self.held = None

    def write_many(self, count, most, seed):
        for number, size in zip(range(count), sizes(seed, most)):
            self.write(number, size, in_place=number % 3 == 0)

    def read_many(self, count, most, seed):
        for number, size in zip(range(count), sizes(seed, most)):
            with self.reader.read_frame(timeout=10.0) as frame:
                assert bytes(frame.data) == content(number, size), f"frame {number}"

    def serve(self, channel, metadata, payload):
        config = BufferConfig(metadata_size=metadata, payload_size=payload)
        factory = DuplexChannelFactory()
        self.server = factory.create_immutable_server(channel, config)

        def handler(frame, response):
            response.write_frame(bytes(byte ^ 0xFF for byte in bytes(frame.data)))

        self.server.start(handler)

    def connect(self, channel):
        self.client = DuplexClient(channel)

    def call(self, number, size, timeout=10000):
        self.client.send_request(content(number, size))
        return self.receive(timeout)

    def send(self, number, size):
        return self.client.send_request(content(number, size))

    def receive(self, timeout=10000):
        with self.client.receive_response(timeout) as response:
            return {"data": response.to_bytes().hex()}

    def call_many(self, count, most, seed):
        for number, size in zip(range(count), sizes(seed, most)):
            self.client.send_request(content(number, size))
            with self.client.receive_response(10000) as response:
                assert response.to_bytes() == content(number, size), f"response {number}"

    def connected(self):
        return self.client.is_server_connected

    def close(self):
        self.release()
        for end in (self.client, self.writer, self.reader):
            if end is not None:
                end.close()
        if self.server is not None:
            self.server.stop()
        self.__init__()

    def golden(self, name):
        """The bytes of a buffer at four moments, process numbers made equal."""

        def dump(title):
            with open(f"/dev/shm/{name}", "rb") as file:
                data = file.read()
            own = struct.pack("<Q", os.getpid())
            data = bytearray(data)
            for at in (0x50, 0x58):
                if data[at : at + 8] == own:
                    data[at : at + 8] = struct.pack("<Q", 0x11112222)
            lines = [f"# {title}\n"]
            for at in range(0, len(data), 16):
                line = data[at : at + 16]
                if any(line):
                    lines.append(f"{at:04x}: {line.hex(' ')}\n")
            return "".join(lines)

        self.create(name, 100, 190)
        seen = dump("made")
        self.attach(name)
        self.set_metadata("width=640")
        self.writer.write_frame(b"first frame")
        self.writer.write_frame(b"\xa5" * 100)
        seen += dump("written")
        with self.reader.read_frame():
            pass
        second = self.reader.read_frame()
        seen += dump("read")
        second.dispose()
        self.writer.write_frame(b"\x5a" * 60)
        seen += dump("wrapped")
        self.close()
        return seen


def main():
    peer = Peer()
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = {"ok": getattr(peer, order.pop("do"))(**order)}
        except Exception as error:
            answer = {"error": type(error).__name__, "text": str(error)}
        print(json.dumps(answer), flush=True)
    # No clearing up by destructors: whoever ends this process asked to close before.
    os._exit(0)


main()
