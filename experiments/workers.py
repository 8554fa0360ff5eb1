"""Worker processes: jobs are handed out one by one, results come back to one place, nobody stays behind.

Without torch, so that what a worker needs is loaded in the worker.
"""

from __future__ import annotations

import multiprocessing
import signal
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

from gan.errors import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")
PATIENCE = 5.0
"""Seconds that a worker gets to end by itself."""


class Lanes(Generic[Job]):
    """Jobs by lane: a worker that has begun with a lane stays with it: it remembers what its jobs share.

    Args:
        jobs: in the order in which those of one lane are done.
        lane: job → its lane.
    """

    def __init__(self, jobs: Sequence[Job], lane: Callable[[Job], Hashable]) -> None:
        self._waiting: dict[Hashable, list[Job]] = {}
        for job in jobs:
            self._waiting.setdefault(lane(job), []).append(job)
        self._at: dict[int, Hashable] = {}  # worker → its lane

    def take(self, worker: int) -> Job | None:
        """The next job of a worker: of its own lane, else of the one with most jobs per worker on it."""
        waiting = {lane: len(jobs) for lane, jobs in self._waiting.items() if jobs}
        if not waiting:
            self._at.pop(worker, None)
            return None
        lane = self._at.get(worker)
        if lane not in waiting:
            others = Counter(at for other, at in self._at.items() if other != worker)
            lane = max(waiting, key=lambda lane: waiting[lane] / (1 + others[lane]))
        self._at[worker] = lane
        return self._waiting[lane].pop(0)


def work_off(
    make: Callable[[], Callable[[Job], Result]],
    jobs: Sequence[Job],
    *,
    lane: Callable[[Job], Hashable],
    workers: int,
    keep: Callable[[Result], None],
) -> None:
    """Do jobs in worker processes; none of them outlives this call.

    Ctrl-C is the caller's: workers do not hear it, and are stopped when it leaves this function. If the
    caller is killed, they end by themselves after the job under way.

    Args:
        make: called in each worker; gives what does a job. Like jobs and results it travels by pickle.
        jobs: what to do.
        lane: which jobs are best done by one worker.
        workers: how many processes, ≥ 1; never more than jobs.
        keep: called here with each result, in the order in which they come.

    Raises:
        UserError: what ``make`` or a job raised as such, or a worker that was killed.
        RuntimeError: anything else that a worker raised, with its traceback.
    """
    lanes = Lanes(jobs, lane)
    crew: dict[Connection, tuple[BaseProcess, int]] = {}
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of threads that torch has
    try:
        for number in range(min(workers, len(jobs))):
            here, there = context.Pipe()
            process: BaseProcess = context.Process(target=_work, args=(make, there), daemon=True)
            with _deaf_to_interrupts():
                process.start()
            there.close()
            crew[here] = process, number
            _hand_out(lanes, here, number)
        while crew:
            for pipe in wait(list(crew)):
                assert isinstance(pipe, Connection)
                process, number = crew[pipe]
                keep(_receive(pipe, process))
                if not _hand_out(lanes, pipe, number):
                    pipe.close()  # the worker ends at the end of its pipe
                    process.join(PATIENCE)
                    _end(process)
                    del crew[pipe]
    finally:
        for pipe, (process, _) in crew.items():
            pipe.close()
            _end(process)


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Ctrl-C reaches every process of a terminal; one that starts here leaves it to its parent."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _hand_out(lanes: Lanes[Any], pipe: Connection, worker: int) -> bool:
    """Send a worker its next job; False where there is none."""
    job = lanes.take(worker)
    if job is None:
        return False
    with suppress(OSError):  # it has died; its pipe says so when it is read
        pipe.send(job)
    return True


def _receive(pipe: Connection, process: BaseProcess) -> Any:
    try:
        kind, content = pipe.recv()
    except (EOFError, OSError):
        process.join(PATIENCE)
        raise UserError(
            f"a worker ended without a result (exit code {process.exitcode}), perhaps for lack of memory; "
            "go on with fewer workers: what is finished is kept"
        ) from None
    if kind == "refusal":
        raise UserError(content)
    if kind == "defect":
        raise RuntimeError(f"a worker failed:\n{content}")
    return content


def _end(process: BaseProcess) -> None:
    """Stop a process that has not ended."""
    if process.is_alive():
        process.terminate()
        process.join(PATIENCE)
    if process.is_alive():
        process.kill()
        process.join()


def _work(make: Callable[[], Callable[[Any], Any]], pipe: Connection) -> None:
    """A worker's life: answer every job until the pipe ends, which it also does when the parent dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    do: Callable[[Any], Any] | None = None
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            job = pipe.recv()
            answer: tuple[str, Any]
            try:
                do = do or make()
                answer = "result", do(job)
            except UserError as error:
                answer = "refusal", str(error)
            except Exception:
                answer = "defect", traceback.format_exc()
            pipe.send(answer)
