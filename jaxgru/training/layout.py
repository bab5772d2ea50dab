"""Training on many devices with `jax.sharding`; README.md has a recipe for ensembles."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxgru.core.checks import is_traced, require_count

State = TypeVar("State")


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """Describes how a train state and its batches are divided over a mesh of devices.

    The program computes the loss of the whole batch, so results on n devices equal those on one
    device up to the order of summation.

    Attributes:
      mesh: a `jax.sharding.Mesh`, e.g. from `jax.make_mesh`, with devices of every process. Its
        axes may be Explicit or Auto; `layout.mesh` has the same devices with Auto axes.
      batch: name of the mesh axis that divides batches, or a tuple of names.
      hidden: name of the mesh axis that divides parameters and optimizer state between updates; it
        may be one of batch. The shares are gathered once per update, before the loop over time.
        None replicates parameters and optimizer state on every device.
      batch_axes: the axis of the rows in each leaf of a batch: an integer, or a pytree prefix of
        the batch of integers and None, like `in_axes` of `jax.vmap`; -1 is the last axis. None
        replicates a leaf.
      carry_axes: the same for the carry.

    Raises:
      TypeError: mesh is not a Mesh.
      ValueError: an axis is not in the mesh, or a process has no device in the mesh.

    Cost: in an update on n devices each device sends about 2(n-1)/n times the bytes of the
    gradient. `hidden` costs 1.5 times that, or nothing more where the compiler turns the sum into a
    reduce-scatter (CPU does not). `gru` needs one sum, after the loop over time; with chunk_size it
    needs one per chunk, with gradient="autodiff" one per time step.

    >>> layout = Layout(jax.make_mesh((1,), ("data",)), batch_axes=(1, None))
    >>> layout.process_rows(32)
    slice(0, 32, None)
    """

    mesh: Mesh
    _: dataclasses.KW_ONLY
    batch: str | tuple[str, ...] = "data"
    hidden: str | None = None
    batch_axes: Any = 1
    carry_axes: Any = 0

    def __post_init__(self):
        if not isinstance(self.mesh, Mesh):
            raise TypeError(
                f"Layout: mesh must be a jax.sharding.Mesh, got {type(self.mesh).__name__}; make "
                "one with jax.make_mesh."
            )
        names = self.mesh.axis_names
        hidden = [] if self.hidden is None else [("hidden", self.hidden)]
        for argument, name in [("batch", name) for name in self._batch_names] + hidden:
            if name not in names:
                raise ValueError(
                    f"Layout: {argument} must name axes of the mesh, {names}, got {name!r}."
                )
        found = {device.process_index for device in self.mesh.devices.flat}
        if jax.process_count() > 1 and len(found) < jax.process_count():
            raise ValueError(
                f"Layout: mesh must have devices of all {jax.process_count()} processes, got only "
                f"those of {sorted(found)}; make it from jax.devices()."
            )
        automatic = Mesh(self.mesh.devices, names, axis_types=(AxisType.Auto,) * len(names))
        object.__setattr__(self, "mesh", automatic)

    @property
    def num_shards(self) -> int:
        """The number of parts of a batch; its rows must be a multiple of it."""
        return math.prod(self.mesh.shape[name] for name in self._batch_names)

    def process_rows(self, batch_size: int) -> slice:
        """Returns the slice of the batch_size rows that this process must load.

        Processes whose devices differ only along axes other than `batch` load the same rows.

        Raises:
          ValueError: batch_size is not a multiple of `num_shards`, or the mesh assigns a process
            rows that are not contiguous.
          TypeError: batch_size is not an integer.
        """
        require_count("Layout.process_rows", "batch_size", batch_size)
        if batch_size % self.num_shards:
            raise ValueError(
                f"Layout.process_rows: batch_size must be a multiple of {self.num_shards} (the "
                f"size of {self.batch!r} in the mesh), got {batch_size}; change it or use fewer "
                "devices."
            )
        sharding = self._sharding(0, self.batch)
        places = sharding.addressable_devices_indices_map((batch_size,)).values()
        shards = sorted({index[0].indices(batch_size)[:2] for index in places if index})
        if any(stop != start for (_, stop), (start, _) in itertools.pairwise(shards)):
            raise ValueError(
                "Layout.process_rows: mesh must assign contiguous rows to each process, got "
                f"{shards}; make it from jax.devices(), in their order."
            )
        return slice(shards[0][0], shards[-1][1])

    def place_batch(self, batch: Any) -> Any:
        """Returns the whole batch as `jax.Array`s, from the rows that each process loaded.

        Args:
          batch: pytree of NumPy arrays with the rows of this process along `batch_axes`. A leaf
            whose axis is None must be the same in every process.

        Raises:
          ValueError: a leaf lacks its axis, its rows are not a multiple of this process's shards,
            or `batch_axes` is not a pytree prefix of batch.
        """
        rows = self.process_rows(self.num_shards)
        batch = jax.tree.map(np.asarray, batch)
        shards = rows.stop - rows.start
        shardings = self._row_shardings("place_batch", "batch", batch, self.batch_axes, shards)
        return jax.tree.map(jax.make_array_from_process_local_data, shardings, batch)

    def place_state(self, state: State) -> State:
        """Copies a whole `TrainState`, the same in every process, to the devices.

        With `hidden`, each leaf of params and opt_state is divided along its longest axis that is a
        multiple of the mesh axis. The carry is divided along `carry_axes`. Everything else is
        replicated. The argument stays usable.

        Raises:
          TypeError: state is not a TrainState.
          ValueError: a leaf of the carry lacks its axis, its rows are not a multiple of
            `num_shards`, or `carry_axes` is not a pytree prefix of the carry.
        """
        if not all(hasattr(state, name) for name in ("params", "opt_state", "carry")):
            raise TypeError(
                f"Layout.place_state: state must be a TrainState, got {type(state).__name__}; make "
                "one with init_train_state."
            )
        return jax.tree.map(_place, state, self._state_shardings("place_state", state))

    def gather(self, tree: Any) -> Any:
        """Replicates a pytree of jax.Arrays on every device, inside or outside of jit.

        All processes must call it. Afterwards `jax.device_get` works in each of them. Outside of
        jit, the arrays may be on any devices, and they are copied: both can be donated.
        """
        everywhere = self._sharding(None, None)

        def gather(leaf):
            if is_traced(leaf):
                return jax.lax.with_sharding_constraint(leaf, everywhere)
            return jax.device_put(leaf, everywhere, may_alias=False)

        return jax.tree.map(gather, tree)

    def wrap_gradient(self, gradient_fn: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps gradient_fn(params, ...) -> (result, grads), for use inside jit.

        The result gathers params and divides grads.
        """

        def wrapped(params, *arguments):
            result, grads = gradient_fn(self.gather(params), *arguments)
            # Gathering before dividing makes the compiler sum the gradients over the devices.
            # Without it, the compiler may instead send the states of all rows to every device.
            grads = self.gather(grads)
            return result, jax.lax.with_sharding_constraint(grads, self._shares(grads))

        return wrapped

    def wrap_step(self, train_step: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps train_step(state, batch), for use inside jit, to run on this mesh.

        The state keeps its sharding, so that it never moves or causes a second compilation.
        """

        @functools.wraps(train_step)
        def wrapped(state, batch):
            with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
                state, metrics = train_step(state, batch)
                shardings = self._state_shardings("wrap_step", state)
                return jax.lax.with_sharding_constraint(state, shardings), metrics

        return wrapped

    @property
    def _batch_names(self):
        return (self.batch,) if isinstance(self.batch, str) else tuple(self.batch)

    def _sharding(self, axis, name):
        """Divided along that axis over the named mesh axes; replicated if axis is None."""
        spec = () if axis is None else (*(None,) * axis, name)
        return NamedSharding(self.mesh, PartitionSpec(*spec))

    def _shares(self, tree):
        """The shardings of parameters or optimizer state between updates."""
        size = 1 if self.hidden is None else self.mesh.shape[self.hidden]

        def share(leaf):
            axes = [axis for axis, n in enumerate(leaf.shape) if n and n % size == 0 and size > 1]
            axis = max(axes, key=lambda axis: leaf.shape[axis], default=None)
            return self._sharding(axis, self.hidden)

        return jax.tree.map(share, tree)

    def _state_shardings(self, method, state):
        """The shardings of a TrainState, as a TrainState."""
        carry, axes = state.carry, self.carry_axes
        return jax.tree.map(lambda _: self._sharding(None, None), state)._replace(
            params=self._shares(state.params),
            opt_state=self._shares(state.opt_state),
            carry=self._row_shardings(method, "state.carry", carry, axes, self.num_shards),
        )

    def _row_shardings(self, method, subject, tree, axes, shards):
        """The shardings of a batch or a carry; every leaf must have a multiple of shards rows."""
        name = subject.removeprefix("state.")
        try:
            axes = jax.tree.broadcast(axes, tree, is_leaf=lambda axis: axis is None)
        except ValueError as error:
            raise ValueError(
                f"Layout.{method}: {name}_axes must be a pytree prefix of {name}, got {axes!r}: "
                f"{error}"
            ) from None

        def sharding(path, leaf, axis):
            leaf_name = f"Layout.{method}: {subject}{jax.tree_util.keystr(path)}"
            if axis is not None and not -leaf.ndim <= axis < leaf.ndim:
                raise ValueError(
                    f"{leaf_name} must have its rows on axis {axis}, got shape {leaf.shape}; set "
                    "batch_axes and carry_axes, None for a leaf without rows."
                )
            if axis is not None and leaf.shape[axis] % shards:
                raise ValueError(
                    f"{leaf_name} must have a multiple of {shards} rows (shards of the mesh) on "
                    f"axis {axis}, got shape {leaf.shape}; change it or use fewer devices."
                )
            return self._sharding(axis and axis % leaf.ndim, self.batch)

        return jax.tree_util.tree_map_with_path(sharding, tree, axes)


def _place(leaf, sharding):
    """A copy of the leaf on the mesh."""
    if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        bits = _place(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(bits, impl=jax.random.key_impl(leaf))
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return jax.device_put(leaf, sharding, may_alias=False)
    host = np.array(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
