from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from experiments.workers import Lanes, work_off
from gan.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def test_a_worker_keeps_to_its_lane() -> None:
    lanes = Lanes(["a1", "b1", "a2", "b2", "a3"], lane=lambda job: job[0])
    assert [lanes.take(0), lanes.take(1)] == ["a1", "b1"]
    assert [lanes.take(1), lanes.take(0)] == ["b2", "a2"]
    assert lanes.take(1) == "a3"  # its own lane is empty: it helps in the other
    assert [lanes.take(0), lanes.take(1)] == [None, None]


def test_workers_spread_over_lanes() -> None:
    lanes = Lanes(["a1", "a2", "a3", "b1", "b2"], lane=lambda job: job[0])
    assert {lanes.take(0), lanes.take(1)} == {"a1", "b1"}


@dataclass(frozen=True)
class Make:
    """A worker's tool that answers (process, job), or fails in the given way."""

    fails: str = ""

    def __call__(self) -> Callable[[str], tuple[int, str]]:
        if self.fails == "start":
            raise UserError("there is nothing to start with")
        return self.do

    def do(self, job: str) -> tuple[int, str]:
        if job.endswith("2"):
            if self.fails == "refusal":
                raise UserError(f"{job} cannot be done")
            if self.fails == "defect":
                raise KeyError(job)
            if self.fails == "death":
                os._exit(7)
        return os.getpid(), job


def test_every_job_is_done_once_and_a_lane_by_one_worker() -> None:
    found: list[tuple[int, str]] = []
    work_off(Make(), ["a1", "b1", "a2", "b2"], lane=lambda job: job[0], workers=2, keep=found.append)
    assert sorted(job for _, job in found) == ["a1", "a2", "b1", "b2"]
    processes = {job: process for process, job in found}
    assert os.getpid() not in processes.values()
    assert processes["a1"] != processes["b1"]
    assert not multiprocessing.active_children()


def test_no_jobs_no_workers() -> None:
    work_off(Make("start"), [], lane=lambda job: job, workers=2, keep=pytest.fail)


@pytest.mark.parametrize(
    ("fails", "error", "sentence", "before"),
    [
        ("start", UserError, "nothing to start with", []),
        ("refusal", UserError, "a2 cannot be done", ["a1"]),
        ("defect", RuntimeError, "KeyError: 'a2'", ["a1"]),
        ("death", UserError, r"exit code 7\), perhaps for lack of memory; go on with fewer", ["a1"]),
    ],
)
def test_a_worker_that_fails_ends_all(
    fails: str, error: type[Exception], sentence: str, before: list[str]
) -> None:
    found: list[tuple[int, str]] = []
    with pytest.raises(error, match=sentence):
        work_off(Make(fails), ["a1", "a2", "a3"], lane=lambda job: job[0], workers=1, keep=found.append)
    assert [job for _, job in found] == before
    assert not multiprocessing.active_children()


def test_an_error_of_the_caller_leaves_no_worker_behind() -> None:
    def keep(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work_off(Make(), ["a1", "b1", "a3", "b3"], lane=lambda job: job[0], workers=2, keep=keep)
    assert not multiprocessing.active_children()


@dataclass(frozen=True)
class MakeSleeper:
    """A worker's tool that notes its process and then takes its time."""

    folder: Path

    def __call__(self) -> Callable[[str], str]:
        return self.do

    def do(self, job: str) -> str:
        (self.folder / str(os.getpid())).touch()
        time.sleep(600)
        return job


def interrupted(folder: str) -> None:
    """What the process of the next test does."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    work_off(MakeSleeper(Path(folder)), ["a", "b"], lane=lambda job: job, workers=2, keep=print)


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_ctrl_c_reaches_all_processes_and_stops_them_quietly(tmp_path: Path) -> None:
    """The terminal sends SIGINT to the whole group; only the parent hears it, and ends its workers."""
    code = f"from tests.experiments.test_workers import interrupted; interrupted({str(tmp_path)!r})"
    parent = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while len(list(tmp_path.iterdir())) < 2:
        assert parent.poll() is None, parent.stderr and parent.stderr.read()
        time.sleep(0.02)
    os.killpg(parent.pid, signal.SIGINT)
    _, told = parent.communicate(timeout=120)
    assert told.count("KeyboardInterrupt") == 1
    assert "Process Spawn" not in told
    assert not any(is_running(int(path.name)) for path in tmp_path.iterdir())
