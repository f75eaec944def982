"""Threads that work a little ahead, and never keep a process from ending."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Thread
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def in_order(function: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """Yield ``function(item)`` in the order of `items`; `workers` threads run a little ahead.

    One operation then takes one core, so no thread waits for another inside it: on small tensors torch's
    own threads spend half their time spinning at barriers. The threads are daemons and are not waited for
    when the caller stops early (an executor's would be joined), so a process ends while a tile is computed.
    """
    if workers == 1:
        yield from map(function, items)
        return
    tasks: SimpleQueue[tuple[Future[R], T] | None] = SimpleQueue()
    running: deque[Future[R]] = deque()
    for number in range(workers):
        Thread(target=_work, args=(function, tasks), name=f"tiles {number}", daemon=True).start()
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
        for _ in range(workers):
            tasks.put(None)


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
