"""Times contenders in turn, summarizes samples, and describes the machine.

No framework is imported here, so benchmarks of JAX and of PyTorch can both use this module.
"""

import datetime
import gc
import importlib.metadata
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np


def interleave(
    contenders: Mapping[str, Callable[[], Any]],
    seconds: float,
    *,
    warm_up: int = 1,
    min_rounds: int = 5,
    burst_seconds: float = 0.03,
    pause_seconds: float = 0.005,
    advance: Callable[[float], Any] = lambda fraction: None,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], Any] = time.sleep,
) -> dict[str, list[float]]:
    """Times contenders in rounds A B C, B C A, ..., so that slow phases affect all of them alike.

    In its turn, a contender has a pause, one call that is not timed, and a burst of calls that are
    timed one by one. During the pause the threads of the previous contender come to rest (those of
    OpenMP keep spinning for a while). The untimed call fills the caches again.

    Args:
      contenders: name -> a function without arguments that returns when its result is *ready*; an
        asynchronous one must wait for its result.
      seconds: for all rounds together, without the warm-up; the last round is finished.
      warm_up: number of untimed rounds at the beginning.
      min_rounds: number of rounds that are timed even if they take longer than `seconds`.
      burst_seconds: a burst ends with the first call after which it has taken this long.
      pause_seconds: of the pause before every turn.
      advance: is called after each round with the fraction of the work that the round has done;
        the fractions add up to 1.
      clock: returns the seconds since a fixed moment.
      sleep: waits for a number of seconds.

    Returns:
      name -> the seconds of each timed call; fast contenders have more calls.
    """
    for _ in range(warm_up):
        for call in contenders.values():
            call()
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    rounds, done, begin = 0, 0.0, clock()
    collecting = gc.isenabled()
    gc.disable()
    try:
        while rounds < min_rounds or clock() - begin < seconds:
            for name, call in _rotated(contenders, rounds):
                sleep(pause_seconds)
                call()
                samples[name] += _burst(call, burst_seconds, clock)
            rounds += 1
            now = min((clock() - begin) / seconds, rounds / min_rounds, 1.0)
            advance(now - done)
            done = now
    finally:
        if collecting:
            gc.enable()
    return samples


def _rotated(contenders: Mapping[str, Any], rounds: int) -> list[tuple[str, Any]]:
    """The contenders in the order of this round; each round begins with another one."""
    items = list(contenders.items())
    first = rounds % max(len(items), 1)
    return items[first:] + items[:first]


def _burst(call: Callable[[], Any], burst_seconds: float, clock: Callable[[], float]):
    """The seconds of each call; there are as many calls as it takes to reach burst_seconds."""
    samples: list[float] = []
    total = 0.0
    while not samples or total < burst_seconds:
        start = clock()
        call()
        samples.append(clock() - start)
        total += samples[-1]
    return samples


def summarize(samples: list[float]) -> dict[str, Any]:
    """Median, minimum and quartiles in milliseconds, and the number of samples, of seconds."""
    low, median, high = np.percentile(samples, (25, 50, 75)) * 1e3
    return {
        "median_ms": float(median),
        "min_ms": min(samples) * 1e3,
        "quartiles_ms": [float(low), float(high)],
        "samples": len(samples),
    }


def describe_machine(packages: Iterable[str] = ()) -> dict[str, Any]:
    """The CPU, its cores, the system, Python, the versions of `packages` and the date (UTC)."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def describe_gpu() -> dict[str, Any]:
    """The output of nvidia-smi, and the versions of the CUDA, cuDNN and plugin distributions.

    nvidia-smi prints the name, driver, power limit, highest clock and memory of each GPU. Without
    nvidia-smi the output is None.
    """
    tool, output = shutil.which("nvidia-smi"), None
    if tool is not None:
        fields = "name,driver_version,power.limit,clocks.max.sm,memory.total"
        command = [tool, f"--query-gpu={fields}", "--format=csv,noheader"]
        try:
            answer = subprocess.run(
                command, capture_output=True, text=True, timeout=30, check=False
            )
            output = (answer.stdout or answer.stderr).strip()
        except (OSError, subprocess.TimeoutExpired) as error:
            output = f"no answer: {error}"
    packages = ((d.metadata["Name"] or "", d.version) for d in importlib.metadata.distributions())
    cuda = sorted(item for item in packages if item[0].startswith(("nvidia-", "jax-cuda")))
    return {"nvidia_smi": output, "cuda_packages": dict(cuda)}


def _cpu_model() -> str:
    """The model name from /proc/cpuinfo, or else from Python's platform module."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
