"""A TensorBoard that is started for real."""

import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen


@contextlib.contextmanager
def serving(folder: Path, runs: str, plugin: str) -> Iterator[str]:
    """The address of a TensorBoard that shows ``runs`` in a folder, once a plugin has something to show."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", runs, "--host", "127.0.0.1"]
    process = subprocess.Popen(
        [*command, "--port", str(port)], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            with contextlib.suppress(OSError):
                if fetch(f"{address}/data/plugin/{plugin}/tags"):
                    break
            time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait(20)


def fetch(url: str) -> Any:
    with urlopen(url, timeout=30) as answer:
        return json.load(answer)
