"""Request a worker from `worker_forks.py`, or become its server. Ray runs this script instead of a worker.

A client imports only the standard library.
"""

import json
import os
import socket
import sys
from pathlib import Path

SOCKET_SUFFIX = ".w"
"""Suffix of the server's socket, which lies beside that of the raylet. Paths of sockets have at most 107 bytes."""


def find_raylet() -> str:
    """Find the path of the raylet's socket among the arguments of a worker."""
    [path] = [word.partition("=")[2] for word in sys.argv if word.startswith("--raylet-name=")]
    return path


def listen(path: str) -> socket.socket | None:
    """Listen at a path, unless another process does so. Clients may connect at once."""
    listener = socket.socket(socket.AF_UNIX)
    own = f"{path}{os.getpid()}"
    listener.bind(own)
    listener.listen(1000)
    try:
        os.link(own, path)
    except FileExistsError:
        listener.close()
        return None
    finally:
        os.unlink(own)
    return listener


def main() -> None:
    path = find_raylet() + SOCKET_SUFFIX
    listener = listen(path)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        socket.send_fds(client, [b"."], [0, 1, 2])
        client.sendall(json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]).encode())
    if listener:
        # Ray starts this script by its path.
        sys.path[0] = str(Path(__file__).parents[1])
        from tests import worker_forks

        worker_forks.serve(listener)


if __name__ == "__main__":
    main()
