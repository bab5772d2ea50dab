"""Random numbers away from 0 and from saturation, so that wrong equations have large errors."""

import numpy as np


def draw(generator: np.random.Generator, *shape: int, low=0.2, high=0.8) -> np.ndarray:
    """Entries of either sign with magnitudes from U(low, high)."""
    signs = generator.integers(0, 2, shape) * 2.0 - 1.0
    return signs * generator.uniform(low, high, shape)
