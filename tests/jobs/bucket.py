"""`python -m tests.jobs.bucket HOST FOLDER`: a server of s3://runs, with a copy of the folder as `set`.

It prints its URL when it is ready, and ends when its standard input closes.
"""

import os
import sys

import s3fs
from moto.server import ThreadedMotoServer

from pipelines.core import storage


def main(host: str, folder: str) -> None:
    server = ThreadedMotoServer(ip_address=host, port=0, verbose=False)
    server.start()
    os.environ["AWS_ENDPOINT_URL"] = url = f"http://{host}:{server.get_host_and_port()[1]}"
    s3fs.S3FileSystem().mkdir("runs")
    for name in storage.list_files(folder):
        storage.write(storage.join("s3://runs/set", name), storage.read(storage.join(folder, name)))
    print(url, flush=True)
    sys.stdin.read()


main(*sys.argv[1:])
