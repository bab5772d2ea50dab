"""Counters and pending metrics of a training loop, which a resumed loop needs beside the state."""

import contextlib
import dataclasses
import math
import time

import jax
import numpy as np

from jaxgru.training.processes import broadcast_from_process_zero


@dataclasses.dataclass
class LoopState:
    """What a checkpoint saves of the loop."""

    skipped: int = 0  # updates in total
    in_row: int = 0  # the last updates in a row that were skipped
    pending: list[dict] = dataclasses.field(default_factory=list)  # metrics since the last record
    best: float | None = None  # value of the monitor's metric
    best_step: int | None = None
    since_best: int = 0  # evaluations
    by: list[str] | None = None  # the monitor's metric and mode

    def to_json(self):
        """Returns the fields as JSON values; waits for the device."""
        self.pending = [{n: float(v) for n, v in m.items()} for m in jax.device_get(self.pending)]
        # As text, since JSON has no NaN and later comparisons need the same bits.
        pending = [{n: repr(v) for n, v in m.items()} for m in self.pending]
        return {**vars(self), "best": repr(self.best), "pending": pending}

    @classmethod
    def from_json(cls, saved):
        pending = [{n: float(text) for n, text in m.items()} for m in saved["pending"]]
        best = None if saved["best"] == "None" else float(saved["best"])
        return cls(**{**saved, "pending": pending, "best": best})

    def judge(self, monitor, found, update):
        """Counts what an evaluation found; returns whether it is the best so far."""
        if monitor.metric not in found:
            raise ValueError(
                "fit: monitor.metric must be a name that evaluate returns, one of "
                f"{sorted(found)}, got {monitor.metric!r}."
            )
        # The processes may evaluate to different bits, but must make the same decision.
        value = broadcast_from_process_zero(float(found[monitor.metric]))
        self.by = [monitor.metric, monitor.mode]
        sign = -1 if monitor.mode == "min" else 1
        gain, before = sign * value, None if self.best is None else sign * self.best
        first = before is None or (math.isnan(before) and not math.isnan(gain))
        improved = first or gain > before + monitor.min_delta
        if improved:
            self.best, self.best_step, self.since_best = value, update, 0
        else:
            self.since_best += 1
        return improved

    def is_exhausted(self, monitor):
        """Returns whether the monitor's patience has ended."""
        return monitor is not None and self.since_best >= (monitor.patience or float("inf"))


class Meter:
    """Makes the records: means of the metrics, seconds, rate and skipped updates."""

    def __init__(self, loop, seconds, items_per_update, items_name):
        self.loop, self.seconds, self.items_per_update = loop, seconds, items_per_update
        self.rate, self.before = f"{items_name}_per_second", len(loop.pending)
        self.began = time.perf_counter()

    def start(self):
        self.loop.pending, self.before, self.began = [], 0, time.perf_counter()

    @contextlib.contextmanager
    def paused(self):
        """Excludes the time spent in its block."""
        began = time.perf_counter()
        yield
        self.began += time.perf_counter() - began

    def read(self, update):
        """Returns the record up to this update; waits for the device."""
        host = jax.device_get(self.loop.pending)
        elapsed = time.perf_counter() - self.began
        self.seconds += elapsed
        record = {"update": update, "seconds": self.seconds}
        for name in host[-1]:
            values = np.asarray([m[name] for m in host if name in m], np.float64)
            finite = values[np.isfinite(values)]
            record[name] = float(finite.mean()) if finite.size else float("nan")
        record["skipped"] = int(host[-1]["skipped"])
        if self.items_per_update is not None:
            count = len(host) - self.before  # excludes updates before the run was resumed
            record[self.rate] = self.items_per_update * count / elapsed
        for metrics in host:
            self.loop.in_row = self.loop.in_row + 1 if metrics["skipped"] > self.loop.skipped else 0
            self.loop.skipped = int(metrics["skipped"])
        return record
