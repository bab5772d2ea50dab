"""Training with optax: one jitted update, the loop around it, checkpoints, logs, devices."""

from jaxgru.atomic_files import write_atomically
from jaxgru.training.checkpoints import (
    Checkpoint,
    CheckpointError,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from jaxgru.training.clipping import clip_by_global_norm
from jaxgru.training.layout import Layout
from jaxgru.training.logs import Callback, JsonLines, TensorBoard, json_values, read_json_lines
from jaxgru.training.loop import Checkpoints, Fit, Interrupted, Monitor, NonFiniteError, fit
from jaxgru.training.processes import (
    broadcast_from_process_zero,
    on_all_processes,
    on_process_zero,
    same_on_all_processes,
)
from jaxgru.training.step import TrainState, init_train_state, make_train_step

__all__ = [
    "Callback", "Checkpoint", "CheckpointError", "Checkpoints", "Fit", "Interrupted", "JsonLines",
    "Layout", "Monitor", "NonFiniteError", "TensorBoard", "TrainState",
    "broadcast_from_process_zero", "clip_by_global_norm", "find_checkpoint", "fit",
    "init_train_state", "json_values", "load_checkpoint", "make_train_step", "on_all_processes",
    "on_process_zero", "read_json_lines", "same_on_all_processes", "save_checkpoint",
    "write_atomically",
]  # fmt: skip
