"""What several processes must do, or know, alike; each is nothing where there is one."""

from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils


def by_first(run: Callable[[], None]) -> None:
    """run() in process 0, which the others wait for; its error becomes one in every process."""
    error = None
    if jax.process_index() == 0:
        try:
            run()
        except Exception as caught:
            error = caught
    if jax.process_count() > 1:
        done = multihost_utils.process_allgather(np.array(error is None))
        if not done.all() and error is None:
            error = OSError("process 0 could not go on; its own message tells why")
    if error is not None:
        raise error


def of_first(value: float) -> float:
    """Process 0's number, bit for bit, in all of them: they must judge alike."""
    if jax.process_count() == 1:
        return value
    bits = np.array([value], np.float64).view(np.uint32)
    return float(np.asarray(multihost_utils.broadcast_one_to_all(bits)).view(np.float64)[0])


def same_everywhere(number: int) -> bool:
    """True where all processes have that number."""
    if jax.process_count() == 1:
        return True
    return len(set(multihost_utils.process_allgather(np.array(number)).tolist())) == 1
