"""Peak memory of networks: what a process needs on top to load a file and translate one image.

Run as a program it is that process: it imports the engines once, and forks for every network.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from gan.runtime import OnnxNetwork

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class MemoryJob:
    """One measurement.

    Attributes:
        engine: ``torch`` or ``onnx``.
        path: a module that torch saved whole, or an ONNX file; only files of one's own: a module is code.
        shape: (N, C, H, W) of the input.
    """

    engine: str
    path: str
    shape: tuple[int, ...]


def peaks_mb(jobs: Sequence[MemoryJob], warm_up: Sequence[MemoryJob]) -> list[float | None]:
    """Megabytes of every job on one thread; None where the system does not tell (only Linux does).

    Args:
        jobs: what is measured, each in a process of its own.
        warm_up: tiny networks, one per engine: what the engine needs for these does not count.

    Raises:
        RuntimeError: the process failed.
    """
    if not (STATUS.exists() and RESET.exists()):
        return [None] * len(jobs)
    task = json.dumps([[asdict(job) for job in group] for group in (warm_up, jobs)])
    command = [sys.executable, str(Path(__file__).resolve()), task]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the process that measures memory failed:\n{done.stderr}")
    return json.loads(done.stdout)


@torch.no_grad()
def run(job: MemoryJob) -> nn.Module:
    """Load a file and run it once."""
    network = (
        torch.load(job.path, weights_only=False) if job.engine == "torch" else OnnxNetwork(Path(job.path))
    )
    network(torch.zeros(job.shape))
    return network


def growth(job: MemoryJob) -> float | None:
    """By how many megabytes a job raises this process's peak above what it has now."""
    before = _kilobytes("VmRSS")
    try:
        RESET.write_text("5")  # the peak counts from here
    except OSError:
        return None
    run(job)
    return (_kilobytes("VmHWM") - before) * 1024 / 1e6


def forked(job: MemoryJob) -> float | None:
    """:func:`growth` in a copy of this process; None where that fails."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, json.dumps(growth(job)).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return json.loads(answer) if answer else None


def _kilobytes(key: str) -> float:
    found = re.search(rf"^{key}:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    assert found is not None, f"{STATUS} has no {key}"
    return float(found[1])


def main() -> None:
    """Answer the jobs of the command line on standard output."""
    torch.set_num_threads(1)  # a fork keeps no other thread
    warm_up, jobs = ([MemoryJob(**job) for job in group] for group in json.loads(sys.argv[1]))
    kept = [run(job) for job in warm_up]
    print(json.dumps([forked(job) for job in jobs]))
    del kept


if __name__ == "__main__":
    main()
