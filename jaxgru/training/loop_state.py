"""What a training loop knows beside the state: counters, the best evaluation, means being taken."""

import contextlib
import math
import time
from typing import Any

import jax
import numpy as np

from jaxgru.training.processes import broadcast_from_process_zero


class LoopState:
    """All of it that a resumed loop must have, with a monitor's judgement."""

    def __init__(
        self, *, skipped=0, in_row=0, pending=(), best=None, best_step=None, since_best=0, by=None
    ):
        self.skipped, self.in_row, self.by = skipped, in_row, by
        self.pending: list[dict[str, Any]] = list(pending)
        self.best, self.best_step, self.since_best = best, best_step, since_best

    def to_json(self):
        """The same as JSON values; waits for the device."""
        self.pending = [
            {name: float(value) for name, value in metrics.items()}
            for metrics in jax.device_get(self.pending)
        ]
        # JSON has no NaN, and what is compared later must be what it was.
        return {
            **vars(self),
            "best": repr(self.best),
            "pending": [
                {name: repr(value) for name, value in metrics.items()} for metrics in self.pending
            ],
        }

    @classmethod
    def from_json(cls, saved):
        pending = [{n: float(text) for n, text in metrics.items()} for metrics in saved["pending"]]
        best = None if saved["best"] == "None" else float(saved["best"])
        return cls(**{**saved, "pending": pending, "best": best})

    def judge(self, monitor, record):
        """Counts an evaluation; True where it is the best."""
        if monitor.metric not in record:
            raise ValueError(
                f"fit: monitor.metric must be what evaluate returns, got {monitor.metric!r} and "
                f"{sorted(record)}."
            )
        # Processes may evaluate to different bits, and must judge alike.
        value = broadcast_from_process_zero(float(record[monitor.metric]))
        self.by = [monitor.metric, monitor.mode]
        gain = -value if monitor.mode == "min" else value
        before = self.best if monitor.mode == "max" or self.best is None else -self.best
        first = before is None or (math.isnan(before) and not math.isnan(gain))
        improved = first or gain > before + monitor.min_delta
        if improved:
            self.best, self.best_step, self.since_best = value, record["update"], 0
        else:
            self.since_best += 1
        return improved

    def is_exhausted(self, monitor):
        return monitor is not None and self.since_best >= (monitor.patience or float("inf"))


class Meter:
    """Loss, rate and skipped updates between two records."""

    def __init__(self, loop, seconds, items_per_update, items_name):
        self.loop, self.seconds, self.items_per_update = loop, seconds, items_per_update
        self.rate, self.before = f"{items_name}_per_second", len(loop.pending)
        self.began = time.perf_counter()

    def start(self):
        self.loop.pending, self.before, self.began = [], 0, time.perf_counter()

    @contextlib.contextmanager
    def paused(self):
        """Leaves out the time within."""
        began = time.perf_counter()
        yield
        self.began += time.perf_counter() - began

    def read(self, update):
        """The record up to this update; waits for the device."""
        host = jax.device_get(self.loop.pending)
        elapsed = time.perf_counter() - self.began
        self.seconds += elapsed
        record = {"update": update, "seconds": self.seconds}
        for name in host[-1]:
            values = np.asarray([metrics[name] for metrics in host], np.float64)
            finite = values[np.isfinite(values)]
            record[name] = float(finite.mean()) if finite.size else float("nan")
        record["skipped"] = int(host[-1]["skipped"])
        if self.items_per_update is not None:
            count = len(host) - self.before  # of this call's updates
            record[self.rate] = self.items_per_update * count / elapsed
        for metrics in host:
            self.loop.in_row = self.loop.in_row + 1 if metrics["skipped"] > self.loop.skipped else 0
            self.loop.skipped = int(metrics["skipped"])
        return record
