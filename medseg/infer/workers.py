"""Threads that work a little ahead, and never keep a process from ending."""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Thread, current_thread
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")

# How long threads that are told to leave are waited for; most are idle and leave at once.
LEAVE_SECONDS = 0.5


def in_order(function: Callable[[T], R], items: Iterable[T], workers: int) -> Generator[R, None, None]:
    """Yield ``function(item)`` in the order of `items`; `workers` threads run a little ahead.

    One operation then takes one core, so no thread waits for another inside it: on small tensors torch's
    own threads spend half their time spinning at barriers. Close the iterator (`contextlib.closing`) to end
    the threads. They are waited for shortly, as one inside torch while Python shuts down aborts the process;
    but not longer (an executor's would be): they are daemons, so a process ends while a tile is computed.
    """
    if workers == 1:
        yield from map(function, items)
        return
    tasks: SimpleQueue[tuple[Future[R], T] | None] = SimpleQueue()
    running: deque[Future[R]] = deque()
    # The first word of their names is by what the command line knows them when it ends.
    threads = [
        Thread(target=_work, args=(function, tasks), name=f"medseg tiles {number}", daemon=True)
        for number in range(workers)
    ]
    for thread in threads:
        thread.start()
    try:
        for item in items:
            running.append(Future())
            tasks.put((running[-1], item))
            if len(running) > workers:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        for future in running:
            future.cancel()
        for _ in threads:
            tasks.put(None)
        _join(threads)


def _join(threads: Sequence[Thread]) -> None:
    deadline = time.monotonic() + LEAVE_SECONDS
    for thread in threads:
        if thread is not current_thread():  # where one of them collects the garbage that holds the iterator
            thread.join(max(0.0, deadline - time.monotonic()))


def _work(function: Callable[[T], R], tasks: "SimpleQueue[tuple[Future[R], T] | None]") -> None:
    torch.set_num_threads(1)
    while (task := tasks.get()) is not None:
        future, item = task
        if not future.set_running_or_notify_cancel():
            continue
        try:
            future.set_result(function(item))
        except BaseException as error:  # handed to the thread that waits
            future.set_exception(error)
        del task, future, item  # nothing of a tile is held while waiting for the next
