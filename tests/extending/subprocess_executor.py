"""Runs every shard of a merge in a process of its own, a few at a time."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed

import magic_fast as mf
from magic_fast.engine.execute.executor import Executor, Outcome, Work
from magic_fast.engine.execute.shard import Shards, ShardTask


class Subprocesses(Executor):
    """Args: processes: how many run at the same time."""

    def __init__(self, processes: int = 2) -> None:
        self._processes = processes

    def run(self, work: Work) -> Outcome:
        shards, running = Shards(work), set[subprocess.Popen[bytes]]()
        with ThreadPoolExecutor(self._processes) as pool:
            try:
                tasks = [pool.submit(self._run_one, shards, task, running) for task in shards.tasks]
                for finished in as_completed(tasks):
                    finished.result()
            except BaseException:  # no worker writes once the head has given up
                pool.shutdown(wait=False, cancel_futures=True)
                for worker in list(running):
                    worker.kill()
                raise
        return shards.outcome

    def _run_one(
        self, shards: Shards, task: ShardTask, running: set[subprocess.Popen[bytes]]
    ) -> None:
        threads = max((os.cpu_count() or 1) // self._processes, 1)
        with subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "MAGIC_FAST_NUM_THREADS": str(threads)},
        ) as worker:
            running.add(worker)
            assert worker.stdin is not None and worker.stdout is not None
            try:
                pickle.dump((task, shards.folder), worker.stdin)
                worker.stdin.flush()  # and stays open: at its end the worker ends too
                while True:
                    told = pickle.load(worker.stdout)
                    if isinstance(told, BaseException):
                        raise told
                    if isinstance(told, Outcome):
                        return shards.done(told)
                    shards.add(told)
            except (EOFError, OSError, pickle.UnpicklingError) as error:
                if isinstance(error, mf.MagicFastError):
                    raise
                raise mf.OutputError(
                    f"shard {task.shard.file!r}: expected it whole, got a process that ended on "
                    "the way. What is written stays: merge again with resume."
                ) from error
            finally:
                running.discard(worker)


def work_for_a_head() -> None:
    """The other side: reads a task, tells of each piece, then of the shard or what went wrong."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints does not print into the replies
    task, folder = pickle.load(sys.stdin.buffer)

    def leave_with_the_head() -> None:
        os.read(0, 1)  # nothing comes: the head keeps it open, or is gone
        os._exit(1)

    def tell(what: object) -> None:
        pickle.dump(what, replies)
        replies.flush()

    threading.Thread(target=leave_with_the_head, daemon=True).start()
    try:
        tell(task.fill(folder, tell))
    except BaseException as error:
        tell(error)


SUBPROCESSES = mf.register_executor(
    "subprocesses", Subprocesses, summary="each shard in a process of its own"
)

if __name__ == "__main__":
    work_for_a_head()
