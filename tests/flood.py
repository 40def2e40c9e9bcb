"""Opens TCP connections to HOST PORT as fast as one process can. HELD of them are open at a time: with each new one the
oldest is reset, so that no port is used up by waiting.

Writes a line after each ``EVERY`` tries: how many there were, how many came about, and the seconds they took. Ends with its
standard input.
"""

import select
import socket
import struct
import sys
import time
from collections import deque

HELD = 400
EVERY = 2_000
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER


def flood(host: str, port: int) -> None:
    held: deque[socket.socket] = deque()
    tried = made = 0
    began = time.monotonic()
    while not select.select([0], [], [], 0)[0]:
        for _ in range(EVERY):
            one = socket.socket()
            one.setblocking(False)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            one.connect_ex((host, port))
            held.append(one)
            if len(held) > HELD:
                oldest = held.popleft()
                made += _came_about(oldest)
                oldest.close()
        tried += EVERY
        sys.stdout.write(f"{tried} {made} {time.monotonic() - began:.2f}\n")
        sys.stdout.flush()


def _came_about(one: socket.socket) -> bool:
    try:
        one.getpeername()
    except OSError:
        return False
    return True


if __name__ == "__main__":
    flood(sys.argv[1], int(sys.argv[2]))
