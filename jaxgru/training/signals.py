"""SIGTERM and SIGINT, which a training loop checks for after each update."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def stop_signals(active: bool) -> Iterator[Callable[[int | None], int | None]]:
    """Yields a function of the update that returns the number of a received signal, or None."""
    received, before = [], {}  # (number, time) of each signal; earlier handlers
    several = active and jax.process_count() > 1
    # Python allows handlers in the main thread only.
    handled = active and not several and threading.current_thread() is threading.main_thread()

    def ask(update):
        # JAX reports a SIGTERM of one process to all of them after the same update.
        if several and update is not None and multihost_utils.reached_preemption_sync_point(update):
            received.append((signal.SIGTERM, time.monotonic()))
        return received[0][0] if received else None

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    def receive(number, frame):
        # A terminal or `timeout` may send a signal twice at once. A second signal therefore counts
        # only when it comes a second later.
        if received and time.monotonic() - received[0][1] >= 1:
            restore()
            signal.raise_signal(number)
        received.append((number, time.monotonic()))

    try:
        for number in (signal.SIGTERM, signal.SIGINT) if handled else ():
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, receive)
        yield ask
    finally:
        restore()
