"""What a program costs, and how a benchmark says so: shared by every script of this folder.

A program is measured from outside as a whole process with all its children: CPU seconds from the kernel
(``wait4``), peak memory as the proportional share (PSS), summed over the tree of processes. Programs take
turns for some rounds, and the median counts. Linux only.

A script writes one JSON file with :func:`save_result`. Its ``rows`` are lines of the README's table, which
``table.py`` makes; the rest is evidence. It holds no path and no name of a machine::

    options = parser("What it measures").parse_args()
    costs = alternate({"nnunet": [...], "medseg": [...]}, options.rounds)
    save_result(options, [Row("what", "peer's figures", "ours", "bar", met=True)], {"runs": runs(costs)})
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

# Resident size is read this often; it costs microseconds.
SAMPLE_SECONDS = 0.01
# Children come and go more slowly.
TREE_SECONDS = 0.03
# PSS walks every page, 10 ms a gigabyte: it is read where the resident size reaches a new height, ...
NEW_HEIGHT = 1.005
# ... where nothing was read for so long, and never more often than this part of its own duration allows.
QUIET_SECONDS = 0.5
DUTY = 1 / 4
# A program that takes longer than any row of the table is stuck.
LIMIT_SECONDS = 1500.0

# Shown instead of what is on this machine: the defaults of `make bench`.
PLACEHOLDERS = {
    "--peers": ".venv-peers/bin/python",
    "--data": "../shared/data",
    "--golden": "../shared/golden",
}
PACKAGES = (
    *("torch", "numpy", "scipy", "monai", "openvino", "SimpleITK", "nnunetv2", "batchgenerators"),
    *("scikit-image", "numba", "edt"),
)
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

Command = Sequence[str]


@dataclass(frozen=True)
class Cost:
    """What one process and its children took.

    `peak_pss_mb` is the sum over the tree, sampled; `peak_rss_mb` is the kernel's own high-water mark of the
    largest single process, shared libraries in full, which no short peak escapes.
    """

    cpu_seconds: float
    wall_seconds: float
    peak_pss_mb: float
    peak_rss_mb: float


@dataclass(frozen=True)
class Row:
    """One line of the README's table, in words.

    `bar` says what the project wants, `met` whether `ours` is that; both empty for a row that only informs.
    """

    what: str
    peer: str
    ours: str
    bar: str = ""
    met: bool | None = None


def parser(description: str, peers: bool = True) -> argparse.ArgumentParser:
    """Return the options that every script takes, whether it needs them or not."""
    result = argparse.ArgumentParser(description=description.splitlines()[0])
    if peers:
        result.add_argument("--peers", type=Path, help="Python of the environment with nnunetv2 2.8.1")
        result.add_argument("--data", type=Path, help="folder that holds hippocampus/")
    result.add_argument("--out", type=Path, help="JSON file to write; without it nothing is kept")
    result.add_argument("--rounds", type=int, help="how often each program runs")
    result.add_argument("--quick", action="store_true", help="small and once: does it still run?")
    return result


def python(path: Path) -> str:
    """Return an interpreter's absolute path with its links intact: they are what makes an environment."""
    return str(path.absolute())


def alternate(
    commands: Mapping[str, Command],
    rounds: int,
    environment: Mapping[str, str] | None = None,
    before: Callable[[str, int], None] | None = None,
) -> dict[str, list[Cost]]:
    """Run each command `rounds` times, in turns. `before` is called with the name and the round."""
    found: dict[str, list[Cost]] = {name: [] for name in commands}
    for number in range(rounds):
        for name, command in commands.items():
            if before is not None:
                before(name, number)
            cost = measure(command, environment)
            found[name].append(cost)
            print(f"  {name:<10}{cost.cpu_seconds:8.2f} CPU-s {cost.peak_pss_mb:8.0f} MB", flush=True)
    return found


def measure(
    command: Command, environment: Mapping[str, str] | None = None, limit_seconds: float = LIMIT_SECONDS
) -> Cost:
    """Run a command to its end and return its cost.

    Raises
    ------
    SystemExit
        It failed (with the end of its output) or took longer than `limit_seconds`.
    """
    with tempfile.TemporaryFile() as output:
        start = time.perf_counter()
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
        watcher = PeakMemory(process.pid)
        timer = threading.Timer(limit_seconds, os.killpg, (process.pid, 9))
        timer.start()
        watcher.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            os.killpg(process.pid, 9)
            raise
        finally:
            timer.cancel()
            watcher.stop.set()
        wall = time.perf_counter() - start
        watcher.join()
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            output.seek(0)
            text = output.read().decode(errors="replace")[-3000:]
            raise SystemExit(f"{command[0]} failed with {process.returncode} after {wall:.0f} s:\n{text}")
    return Cost(usage.ru_utime + usage.ru_stime, wall, watcher.pss_mb, watcher.rss_mb)


class PeakMemory(threading.Thread):
    """Watches the memory of a process and all below it, and costs next to nothing itself."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid = pid
        self.stop = threading.Event()
        self.pss_mb = self.rss_mb = 0.0

    def run(self) -> None:
        """Sample until `stop` is set."""
        tree, highest, tree_at, read_at, ready_at = [self.pid], 0.0, 0.0, 0.0, 0.0
        while not self.stop.wait(SAMPLE_SECONDS):
            now = time.perf_counter()
            if now - tree_at >= TREE_SECONDS:
                tree, tree_at = descendants(self.pid), now
            sizes = [kernel_mb(f"/proc/{pid}/status", "VmRSS", "VmHWM") for pid in tree]
            self.rss_mb = max(self.rss_mb, *(mark for _, mark in sizes))
            resident = sum(size for size, _ in sizes)
            new = resident > highest * NEW_HEIGHT
            if now < ready_at or not (new or now - read_at > QUIET_SECONDS):
                continue
            shares = [kernel_mb(f"/proc/{pid}/smaps_rollup", "Pss") for pid in tree]
            self.pss_mb = max(self.pss_mb, sum(share for (share,) in shares))
            read_at = time.perf_counter()
            highest, ready_at = max(highest, resident), read_at + (read_at - now) / DUTY


def descendants(pid: int) -> list[int]:
    """Return a process and all below it."""
    found = [pid]
    for parent in found:  # grows while it runs
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += [int(child) for child in children.read_text().split()]
            except OSError:  # the process has just ended
                continue
    return found


def kernel_mb(path: str, *names: str) -> list[float]:
    """Return sizes that the kernel lists in a file, in MB; 0 where the process has ended."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        lines = []
    sizes = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines if line.endswith("kB")}
    return [sizes.get(name, 0.0) for name in names]


def medians(costs: Sequence[Cost]) -> Cost:
    """Return the median of every measure."""
    return Cost(
        **{name: float(np.median([asdict(cost)[name] for cost in costs])) for name in asdict(costs[0])}
    )


def runs(costs: Mapping[str, Sequence[Cost]]) -> dict[str, list[dict[str, float]]]:
    """Return every single measurement as plain data."""
    return {name: [rounded(asdict(cost)) for cost in found] for name, found in costs.items()}


def rounded(values: Mapping[str, float]) -> dict[str, float]:
    """Return the same numbers with as many digits as were measured."""
    return {name: round(value, 1 if name.endswith("_mb") else 3) for name, value in values.items()}


def seconds(value: float) -> str:
    """Write CPU seconds as a reader wants them."""
    return f"{value:.1f} s" if value < 20 else f"{value:.0f} s"


def memory(mb: float) -> str:
    """Write memory as a reader wants it."""
    return f"{mb:.0f} MB" if mb < 995 else f"{mb / 1024:.1f} GB" if mb < 9950 else f"{mb / 1024:.0f} GB"


def took(cost: Cost) -> str:
    """Write both."""
    return f"{seconds(cost.cpu_seconds)} / {memory(cost.peak_pss_mb)}"


def percent(part: float) -> str:
    """Write an agreement without ever rounding it up to all."""
    return "100 %" if part == 1 else f"{np.floor(part * 1e6) / 1e4:.4f} %"


def machine() -> dict[str, Any]:
    """Describe what this ran on; no name, no path."""
    model = next(
        (line.split(":")[1].strip() for line in cpuinfo().splitlines() if line.startswith("model name")),
        platform.processor(),
    )
    flags = next((line.split() for line in cpuinfo().splitlines() if line.startswith("flags")), [])
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "features": [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_tile") if flag in flags],
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "load_before": round(os.getloadavg()[0], 2),
    }


def cpuinfo() -> str:
    """Return the kernel's description of the processors."""
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def versions(interpreter: Path | None = None) -> dict[str, str]:
    """Return the versions of the libraries that matter, of this or of another environment."""
    if interpreter is not None:
        code = (
            "import json, sys; sys.path.insert(0, sys.argv[1]); import measure; "
            "print(json.dumps(measure.versions()))"
        )
        done = subprocess.run(
            [python(interpreter), "-c", code, str(Path(__file__).parent)],
            capture_output=True,
            text=True,
            check=True,
        )
        return dict(json.loads(done.stdout))
    found = {}
    for name in (*PACKAGES, "medseg"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def shown_command(arguments: Sequence[str]) -> str:
    """Return the command of this run with the paths of `make bench`."""
    script = Path(arguments[0]).absolute().relative_to(Path(__file__).absolute().parent)
    words = ["python", f"tests/benchmarks/{script}"]
    rest = iter(arguments[1:])
    for word in rest:
        name, _, value = word.partition("=")
        if name in (*PLACEHOLDERS, "--out"):
            value = value or next(rest, "")
            words += [name, PLACEHOLDERS[name]] if name in PLACEHOLDERS else []
        else:
            words.append(word)
    return " ".join(words)


def save_result(options: argparse.Namespace, rows: Sequence[Row], evidence: Mapping[str, Any]) -> None:
    """Print the rows; write them with the evidence, the machine and the command."""
    for row in rows:
        verdict = {True: "met: ", False: "MISSED: ", None: ""}[row.met] + row.bar
        print(f"{row.what}\n    peer {row.peer} | medseg {row.ours} | {verdict}", flush=True)
    if options.out is None:
        return
    peers = getattr(options, "peers", None)
    result = {
        "command": shown_command(sys.argv),
        "quick": options.quick,
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "versions": {"medseg": versions(), **({"peers": versions(peers)} if peers else {})},
        "rows": [asdict(row) for row in rows],
        **evidence,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
