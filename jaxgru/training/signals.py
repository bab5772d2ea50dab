"""SIGTERM and SIGINT as a question that a loop asks after each update."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def stop_signals(active: bool) -> Iterator[Callable[[int | None], int | None]]:
    """A function of the update that gives the number of the signal that asked to stop, or None."""
    if not active:
        yield lambda update: None
        return
    main_thread = threading.current_thread() is threading.main_thread()
    if jax.process_count() > 1:  # JAX tells every process of a SIGTERM to any, for the same update
        reached = []

        def ask(update):
            if update is not None and multihost_utils.reached_preemption_sync_point(update):
                reached.append(signal.SIGTERM)
            return reached[0] if reached else None

        yield ask
        return
    received, before = [], {}

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    def receive(number, frame):
        # A terminal or `timeout` may send the same signal twice at once, so a second one counts
        # only when it comes later.
        if received and time.monotonic() - received[0][1] >= 1:
            restore()
            signal.raise_signal(number)
        received.append((number, time.monotonic()))

    try:
        for number in (signal.SIGTERM, signal.SIGINT) if main_thread else ():  # Python's rule
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, receive)
        yield lambda update: received[0][0] if received else None
    finally:
        restore()
