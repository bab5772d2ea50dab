"""What every benchmark needs: contenders timed in turn, samples summed up, the machine named.

No framework is imported here, so a benchmark of JAX and one of PyTorch can both use it.
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
    """Seconds of every timed call, in rounds A B C B C A: a drifting machine hurts all alike.

    A contender's turn is a pause, one call that is not timed, and a burst of calls that are, each
    by itself. The pause lets the threads of the one before come to rest (those of OpenMP spin for
    a while), and the call brings back to the caches what the others drove out of them.

    Args:
      contenders: name -> a function of no arguments that returns when its result is *ready*:
        one that runs asynchronously must wait for its result itself.
      seconds: for everything but the warm-up together; the last round is finished.
      warm_up: rounds that are run first and not timed.
      min_rounds: are timed even if they take longer than `seconds`.
      burst_seconds: a burst ends with the call in which it reaches this; it has at least one.
      pause_seconds: before every turn.
      advance: is told after each round which further fraction of the work is done; the fractions
        add up to 1.
      clock: seconds that have passed since some moment.
      sleep: passes a number of seconds.

    Returns:
      name -> the seconds of each timed call; quick contenders have more of them.
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
    """The contenders, from another one on in each round, so that each comes first in its turn."""
    items = list(contenders.items())
    first = rounds % max(len(items), 1)
    return items[first:] + items[:first]


def _burst(call: Callable[[], Any], burst_seconds: float, clock: Callable[[], float]):
    """The seconds of each of one or more calls that together take burst_seconds."""
    samples: list[float] = []
    total = 0.0
    while not samples or total < burst_seconds:
        start = clock()
        call()
        samples.append(clock() - start)
        total += samples[-1]
    return samples


def summarize(samples: list[float]) -> dict[str, Any]:
    """Median, least, quartiles (milliseconds) and number of samples that are in seconds."""
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
    """What the driver says of each GPU, and the distributions that bring CUDA, cuDNN, or a plugin.

    The line of a GPU is its name, driver, power limit, highest clock and memory; None without one.
    """
    tool, said = shutil.which("nvidia-smi"), None
    if tool is not None:
        fields = "name,driver_version,power.limit,clocks.max.sm,memory.total"
        command = [tool, f"--query-gpu={fields}", "--format=csv,noheader"]
        try:
            answer = subprocess.run(
                command, capture_output=True, text=True, timeout=30, check=False
            )
            said = (answer.stdout or answer.stderr).strip()
        except (OSError, subprocess.TimeoutExpired) as error:
            said = f"no answer: {error}"
    packages = ((d.metadata["Name"] or "", d.version) for d in importlib.metadata.distributions())
    cuda = sorted(item for item in packages if item[0].startswith(("nvidia-", "jax-cuda")))
    return {"nvidia_smi": said, "cuda_packages": dict(cuda)}


def _cpu_model() -> str:
    """The model name the kernel gives, or what Python knows where it gives none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
