"""Training with optax: one jitted update, the loop around it, checkpoints, logs, devices."""

from jaxgru.training.array_files import load_arrays, read_metadata, save_arrays
from jaxgru.training.checkpoints import (
    Checkpoint,
    CheckpointError,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from jaxgru.training.layout import Layout
from jaxgru.training.logs import Callback, JsonLines, TensorBoard, json_values, read_json_lines
from jaxgru.training.loop import Checkpoints, Fit, Interrupted, Monitor, NonFiniteError, fit
from jaxgru.training.step import TrainState, init_train_state, make_train_step

__all__ = [
    "Callback",
    "Checkpoint",
    "CheckpointError",
    "Checkpoints",
    "Fit",
    "Interrupted",
    "JsonLines",
    "Layout",
    "Monitor",
    "NonFiniteError",
    "TensorBoard",
    "TrainState",
    "find_checkpoint",
    "fit",
    "init_train_state",
    "json_values",
    "load_arrays",
    "load_checkpoint",
    "make_train_step",
    "read_json_lines",
    "read_metadata",
    "save_arrays",
    "save_checkpoint",
]
