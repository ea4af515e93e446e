"""Either side of an in-place channel, from the layout alone: standard library only.

    inplace_peer.py client SOCKET COUNT     COUNT calls, each checked against bytes.upper()
    inplace_peer.py server SOCKET COUNT     serves bytes.upper() to one client, COUNT calls

Futex and semaphore words: this process is the only poster of the words it posts and the
only waiter of those it waits for, so it stores its own half of each with a plain 32-bit
store; every post makes the wake-up call, which also orders the store before it.
"""
import array, ctypes, fcntl, mmap, os, socket, struct, sys, time

MAGIC_HELLO, MAGIC_MEMORY = b"uffdchn\x01", b"uffddpx\x02"
ATTACH, IN_PLACE, VERSION = 1, 1, 2
REQUEST, RESPONSE, FAILED, RELEASED = 2, 4, 5, 7
ONE_WAY, IN_SLOT, INLINE_BYTES = 1, 2, 112
SEALS = 0x1 | 0x2 | 0x4  # SEAL, SHRINK, GROW
libc = ctypes.CDLL(None, use_errno=True)


def align(n, to):
    return (n + to - 1) // to * to


class Memory:
    """The mapped channel: words by offset, and the places the layout computes."""

    def __init__(self, fd, slots=64, metadata=64, payload=1 << 20, create=False):
        if create:
            self.place(slots, metadata, payload)
            os.ftruncate(fd, self.payload + payload)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
        self.map = mmap.mmap(fd, os.fstat(fd).st_size)
        self.view = memoryview(self.map)
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        if create:
            for oieb in (0, 0x58):
                self.view[oieb:oieb + 16] = struct.pack("<IIQ", 88, 2, metadata)
                self.view[oieb + 16:oieb + 24] = struct.pack("<Q", metadata)
                self.view[oieb + 32:oieb + 48] = struct.pack("<QQ", payload, payload)
            identity = struct.pack("<IIQIIQQQ16s", VERSION, 0, 1, slots, 0, metadata,
                                   self.payload, payload, os.urandom(16))
            self.view[self.control + 8:self.control + 8 + len(identity)] = identity
            self.set64(self.control, int.from_bytes(MAGIC_MEMORY, "little"))
        else:
            metadata = self.get64(0x08)
            at = align(0xB0 + 2 * metadata, 128)
            assert self.view[at:at + 8] == MAGIC_MEMORY, "magic"
            version, features, _, slots, _, again, offset, payload = struct.unpack(
                "<IIQIIQQQ", self.view[at + 8:at + 56])
            self.place(slots, metadata, payload)
            assert (version, features, again, offset) == (VERSION, 0, metadata, self.payload)
        self.size = payload

    def place(self, slots, metadata, payload):
        self.slots, self.control = slots, align(0xB0 + 2 * metadata, 128)
        self.ring = self.control + 0x500
        self.wishes = self.ring + align(16 * slots, 128)
        self.table = self.wishes + align(8 * slots, 128)
        self.payload = align(self.table + 128 * slots, 4096)

    def get64(self, at):
        return ctypes.c_uint64.from_address(self.base + at).value

    def set64(self, at, value):
        ctypes.c_uint64.from_address(self.base + at).value = value

    def set32(self, at, value):
        ctypes.c_uint32.from_address(self.base + at).value = value

    def get32(self, at):
        return ctypes.c_uint32.from_address(self.base + at).value

    def post(self, line):
        at = self.control + 128 * line + 4
        self.set32(at, (self.get32(at) + 1) & 0xFFFFFFFF)
        libc.syscall(202, ctypes.c_void_p(self.base + at), 1, 0x7FFFFFFF, None, None, 0)

    def wait(self, line, ready, peer, deadline):
        """Until ready() answers something; the peer's closed connection ends it too."""
        at = self.control + 128 * line
        self.set32(at, 1)
        while True:
            sequence, found = self.get32(at + 4), ready()
            if found is not None:
                break
            if time.monotonic() > deadline or is_closed(peer):
                raise SystemExit("the peer is gone or late")
            pause = struct.pack("qq", 0, 50_000_000)
            libc.syscall(202, ctypes.c_void_p(self.base + at + 4), 0, sequence, pause, None, 0)
        self.set32(at, 0)
        return found

    def slot(self, sequence):
        return self.table + 128 * (sequence % self.slots)

    def state(self, sequence):
        word = self.get64(self.slot(sequence))
        return word & 0xFF if word >> 8 == sequence else None

    def hand_over(self, sequence, state):
        self.set64(self.slot(sequence), sequence << 8 | state)

    def present(self, offset):
        """This thread in the robust word; its death is seen by the connection's end."""
        self.set32(self.control + offset, os.getpid() | 0x80000000)


def is_closed(peer):
    try:
        return peer.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False


def client(path, count):
    peer = socket.socket(socket.AF_UNIX)
    peer.connect(path)
    peer.sendall(MAGIC_HELLO + struct.pack("<IIIIQI28x", VERSION, VERSION, 0, ATTACH, 0, 0))
    answer, fds, _, _ = socket.recv_fds(peer, 64, 2)
    code, version, features, kind, _, expected = struct.unpack("<IIIIQI", answer[8:36])
    assert answer[:8] == MAGIC_HELLO and (code, kind, expected) == (0, IN_PLACE, len(fds)), code
    memory = Memory(fds[0])
    memory.present(0x080)
    deadline = time.monotonic() + 60
    for sequence in range(1, count + 1):
        request = (b"call %d " % sequence) * (1 + sequence * 37 % 400)
        at, inline = memory.slot(sequence), len(request) <= INLINE_BYTES
        if inline:
            data, flags, capacity = at + 16, IN_SLOT, INLINE_BYTES
        else:
            # One call at a time: the ring is empty and begins at 0.
            block, offset, capacity = 64 + align(len(request), 64), 64, align(len(request), 64)
            header = struct.pack("<IIQQI36x", 0x4D415246, 0, block, sequence, sequence % memory.slots)
            memory.view[memory.payload:memory.payload + 64] = header
            memory.view[at + 16:at + 32] = struct.pack("<QQ", offset, capacity)
            data, flags = memory.payload + offset, 0
        memory.view[data:data + len(request)] = request
        memory.view[at + 8:at + 16] = struct.pack("<II", len(request), flags)
        memory.set64(memory.control + 0x400, sequence)
        memory.set64(memory.control + 0x400 + 40, sequence + 1)
        memory.hand_over(sequence, REQUEST)
        memory.post(3)
        done = lambda: memory.state(sequence) if memory.state(sequence) in (RESPONSE, FAILED) else None
        assert memory.wait(4, done, peer, deadline) == RESPONSE
        length, = struct.unpack("<I", memory.view[at + 8:at + 12])
        assert length <= capacity
        assert memory.view[data:data + length] == request.upper()
        memory.set64(memory.control + 0x400 + 16, sequence)
        memory.hand_over(sequence, RELEASED)
        memory.post(5)
    memory.set32(memory.control + 0x080, 0)


def server(path, count):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    print("ready", flush=True)
    peer, _ = listener.accept()
    hello = peer.recv(64, socket.MSG_WAITALL)
    least, most, _, ask, _, fds = struct.unpack("<IIIIQI", hello[8:36])
    assert hello[:8] == MAGIC_HELLO and least <= VERSION <= most and (ask, fds) == (ATTACH, 0)
    fd = os.memfd_create("channel", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    memory = Memory(fd, create=True)
    memory.present(0x100)
    answer = MAGIC_HELLO + struct.pack("<IIIIQII24x", 0, VERSION, 0, IN_PLACE, 1, 1, 0)
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
    peer.sendmsg([answer], rights)
    deadline = time.monotonic() + 60
    ticket, cursor = 0, 1
    for taken in range(1, count + 1):
        # The next in sequence, or the first of the next lap: slot 0.
        def came(cursor=cursor, lap=align(cursor, memory.slots)):
            at_lap = memory.state(lap) == REQUEST
            return cursor if memory.state(cursor) == REQUEST else lap if at_lap else None

        sequence = memory.wait(3, came, peer, deadline)
        cursor, at = sequence + 1, memory.slot(sequence)
        length, flags, offset, capacity = struct.unpack("<IIQQ", memory.view[at + 8:at + 32])
        assert length <= (INLINE_BYTES if flags & IN_SLOT else capacity)
        assert flags & IN_SLOT or offset + capacity <= memory.size
        data = at + 16 if flags & IN_SLOT else memory.payload + offset
        memory.view[data:data + length] = bytes(memory.view[data:data + length]).upper()
        memory.set64(memory.control + 0x480, taken)
        if flags & ONE_WAY:
            memory.hand_over(sequence, RELEASED)
            memory.post(6)
            continue
        ticket += 1
        memory.set64(memory.control + 0x480 + 8, ticket)
        entry = (sequence & 0xFFFFFFFF) << 32 | (ticket & 0xFFFF) << 16 | sequence % memory.slots
        memory.set64(memory.ring + 8 * (ticket % (2 * memory.slots)), entry)
        memory.hand_over(sequence, RESPONSE)
        memory.post(4)
    peer.recv(1)  # until the client has gone
    memory.set32(memory.control + 0x100, 0)
    os.unlink(path)


{"client": client, "server": server}[sys.argv[1]](sys.argv[2], int(sys.argv[3]))
print("ok", sys.argv[3])
