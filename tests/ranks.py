"""Start a test file as several processes of one gloo group on this machine."""

import os
import socket
import subprocess
import sys


def launch(file: str, world: int, *arguments: str, seconds: int = 120) -> None:
    """Run ``python file ARGUMENTS`` as every rank of a world; fail with what they said if one of them does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world)}
    ranks = [
        subprocess.Popen(
            [sys.executable, file, *arguments],
            env=os.environ | place | {"RANK": str(k)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for k in range(world)
    ]
    errors = [process.communicate(timeout=seconds)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0] * world, "\n".join(error[-1500:] for error in errors)
