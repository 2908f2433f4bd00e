"""Request a worker from `shared_ray.py`. Ray runs this script instead of a worker."""

import json
import os
import socket
import sys

with socket.socket(socket.AF_UNIX) as server:
    server.connect(os.environ["REDUX_TEST_WORKERS_SOCKET"])
    socket.send_fds(server, [b"."], [0, 1, 2])
    server.sendall(json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]).encode())
