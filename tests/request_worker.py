"""Request a worker from the server of `forks.py`. Ray runs this script instead of a worker.

It imports only the standard library.
"""

import json
import os
import signal
import socket
import sys


def main() -> None:
    mask = [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])]
    with socket.socket(socket.AF_UNIX) as client:
        client.connect("\0" + os.environ["REDUX_TEST_WORKER_SERVER"])
        socket.send_fds(client, [b"."], [0, 1, 2])
        client.sendall(json.dumps([sys.argv[1:], dict(os.environ), os.getcwd(), mask]).encode())


if __name__ == "__main__":
    main()
