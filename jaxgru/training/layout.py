"""Training on many devices: which part of what lies where, on `jax.sharding` alone.

The batch is divided over an axis of the user's mesh. Parameters and optimizer state are repeated on
every device, or divided too: between updates each device then keeps its share, and they are put
together once an update, before the loop over time. A program is written for the whole batch, so a
loss on n devices is the loss on one, whatever it averages over: only its sums are in another order.

An ensemble wants no layout: its members go side by side under `jax.vmap`, and never meet::

    members = NamedSharding(mesh, PartitionSpec("data"))
    states = jax.device_put(jax.vmap(init_member)(keys), members)  # every leaf [members, ...]
    train_step = make_train_step(loss_fn, optimizer)
    each = jax.vmap(train_step, in_axes=(0, None))  # of one batch for all of them
    each = jax.shard_map(each, mesh=mesh, in_specs=(members.spec, PartitionSpec()),
                         out_specs=members.spec)
    states, metrics = jax.jit(each, donate_argnums=0)(states, batch)
"""

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
    """Where a train state and its batches lie on a mesh of devices.

    Args:
      mesh: a `jax.sharding.Mesh`, as `jax.make_mesh` makes it, with a device of every process. Its
        axes may be Explicit or Auto; the layout's own `mesh` is the same devices with Auto axes.
      batch: the name of the axis that batches are divided over; a tuple of names for several axes.
      hidden: the name of the axis that parameters and optimizer state are divided over between
        updates, which may be one of batch; None repeats them on every device.
      batch_axes: where the leaves of a batch have their rows: an integer, or a pytree prefix of the
        batch of integers and None, as `in_axes` of `jax.vmap`; None repeats a leaf on all devices.
      carry_axes: the same of the carry.

    Raises:
      TypeError: mesh is none.
      ValueError: an axis is not one of the mesh, or a process has no device in it.

    Cost: for an update on n devices each sends about 2(n-1)/n times the bytes of the gradient; with
    `hidden` half as much again, or as much where the compiler makes a reduce-scatter of it (CPU
    does not). With `gru` that is one sum, after the loop over time; every chunk has its own where
    chunk_size is set, every time step where gradient="autodiff".

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
                f"Layout: mesh must be a jax.sharding.Mesh, got {type(self.mesh).__name__}; "
                "jax.make_mesh makes one."
            )
        names = self.mesh.axis_names
        for argument, value in (("batch", self._batch_names), ("hidden", (self.hidden,))):
            for name in value:
                if name not in names and (argument, name) != ("hidden", None):
                    raise ValueError(
                        f"Layout: {argument} must name axes of the mesh, {names}, got {name!r}."
                    )
        found = {device.process_index for device in self.mesh.devices.flat}
        if jax.process_count() > 1 and len(found) < jax.process_count():
            raise ValueError(
                f"Layout: mesh must have a device of each of {jax.process_count()} processes, got "
                f"those of {sorted(found)}; make it of jax.devices()."
            )
        automatic = Mesh(self.mesh.devices, names, axis_types=(AxisType.Auto,) * len(names))
        object.__setattr__(self, "mesh", automatic)

    @property
    def num_shards(self) -> int:
        """How many parts a batch is divided into; its rows must divide by it."""
        return math.prod(self.mesh.shape[name] for name in self._batch_names)

    def process_rows(self, batch_size: int) -> slice:
        """Which rows of a batch this process reads; those of all processes are the whole batch.

        Processes whose devices differ only along axes other than `batch` read the same rows.

        Args:
          batch_size: rows of the whole batch.

        Returns:
          The slice of its rows.

        Raises:
          ValueError: the rows do not divide, or a process would read rows with gaps between them.
          TypeError: batch_size is no integer.
        """
        require_count("Layout.process_rows", "batch_size", batch_size)
        if batch_size % self.num_shards:
            raise ValueError(
                f"Layout.process_rows: batch_size must divide by {self.num_shards} (the size of "
                f"{self.batch!r} of the mesh), got {batch_size}; take a multiple, or fewer devices."
            )
        places = self._rows_at(0).addressable_devices_indices_map((batch_size,)).values()
        shards = sorted({index[0].indices(batch_size)[:2] for index in places if index})
        if any(stop != start for (_, stop), (start, _) in itertools.pairwise(shards)):
            raise ValueError(
                f"Layout.process_rows: mesh must give a process rows without gaps, got {shards}; "
                "make it of jax.devices(), in their order."
            )
        return slice(shards[0][0], shards[-1][1])

    def place_batch(self, batch: Any) -> Any:
        """The batch on the devices, from the rows of it that each process read.

        Args:
          batch: pytree of NumPy arrays: this process's rows, along `batch_axes`; a leaf without
            such an axis is whole, and the same in every process.

        Returns:
          The pytree of the whole batch's jax.Arrays.

        Raises:
          ValueError: a leaf has no such axis, its rows do not divide by the devices of this
            process, or `batch_axes` is no prefix of batch.
        """
        rows = self.process_rows(self.num_shards)
        shards = rows.stop - rows.start

        def place(path, leaf, axis):
            leaf = np.asarray(leaf)
            self._require_rows("place_batch", f"batch{path}", leaf, axis, shards)
            return jax.make_array_from_process_local_data(self._rows_at(axis), leaf)

        return self._map("place_batch", "batch", place, batch, self.batch_axes)

    def place_state(self, state: State) -> State:
        """The train state on the devices: a copy, so the one that came may still be used.

        Args:
          state: a `TrainState`, whole and the same in every process.

        Returns:
          The TrainState: params and opt_state repeated or, with `hidden`, each leaf divided along
          its longest axis that divides; carry divided along `carry_axes`; the rest repeated.

        Raises:
          ValueError: a leaf of the carry has no such axis or does not divide, or `carry_axes` is no
            prefix of the carry.
        """
        return jax.tree.map(_place, state, self._state_shardings("place_state", state))

    def gather(self, tree: Any) -> Any:
        """The tree with every leaf whole on every device, inside or outside of jit.

        All processes must call it; `jax.device_get` then reads the result in any of them.

        Args:
          tree: pytree of jax.Arrays on this mesh.

        Returns:
          The pytree of jax.Arrays.
        """
        repeated = NamedSharding(self.mesh, PartitionSpec())
        return jax.tree.map(lambda leaf: _move(leaf, repeated), tree)

    def wrap_gradient(self, gradient_fn: Callable[..., Any]) -> Callable[..., Any]:
        """gradient_fn with its parameters put together before it and its gradients divided after.

        Args:
          gradient_fn: gradient_fn(params, ...) -> (anything, gradients), of `jax.value_and_grad`.

        Returns:
          The function, to be called inside jit.
        """

        @functools.wraps(gradient_fn)
        def wrapped(params, *arguments):
            result, grads = gradient_fn(self.gather(params), *arguments)
            # First the sum over devices, then each one's share: the compiler makes one of the two
            # where it can, and where it cannot would send every device the states of all rows.
            grads = self.gather(grads)
            return result, jax.tree.map(_move, grads, self._shares(grads))

        return wrapped

    def wrap_step(self, train_step: Callable[..., Any]) -> Callable[..., Any]:
        """train_step on this mesh, whatever mesh is set outside, its state laid out as it came.

        Nothing moves after the first update then, and nothing is compiled again.

        Args:
          train_step: train_step(state, batch) -> (state, metrics), not yet compiled.

        Returns:
          The function, to be called inside jit.
        """

        @functools.wraps(train_step)
        def wrapped(state, batch):
            with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
                state, metrics = train_step(state, batch)
                shardings = self._state_shardings("wrap_step", state)
                return jax.tree.map(_move, state, shardings), metrics

        return wrapped

    @property
    def _batch_names(self):
        return (self.batch,) if isinstance(self.batch, str) else tuple(self.batch)

    def _rows_at(self, axis):
        """Divided along that axis, or repeated."""
        before = () if axis is None else (*(None,) * axis, self.batch)
        return NamedSharding(self.mesh, PartitionSpec(*before))

    def _shares(self, tree):
        """How each leaf of parameters or optimizer state lies between updates."""

        def share(leaf):
            size = 1 if self.hidden is None else self.mesh.shape[self.hidden]
            axes = [axis for axis, n in enumerate(leaf.shape) if n and n % size == 0]
            if size == 1 or not axes:
                return NamedSharding(self.mesh, PartitionSpec())
            axis = max(axes, key=lambda axis: leaf.shape[axis])
            return NamedSharding(self.mesh, PartitionSpec(*(None,) * axis, self.hidden))

        return jax.tree.map(share, tree)

    def _state_shardings(self, method, state):
        """The shardings of a TrainState, in its form."""

        def rows(path, leaf, axis):
            self._require_rows(method, f"state.carry{path}", leaf, axis, self.num_shards)
            return self._rows_at(axis)

        whole = jax.tree.map(lambda _: NamedSharding(self.mesh, PartitionSpec()), state)
        return whole._replace(
            params=self._shares(state.params),
            opt_state=self._shares(state.opt_state),
            carry=self._map(method, "carry", rows, state.carry, self.carry_axes),
        )

    def _map(self, method, name, function, tree, axes):
        """function(path, leaf, axis) of every leaf; axes are a prefix of the tree."""
        try:
            axes = jax.tree.broadcast(axes, tree, is_leaf=lambda axis: axis is None)
        except ValueError as error:
            raise ValueError(
                f"Layout.{method}: {name}_axes must be a prefix of {name}, got {axes!r}: {error}"
            ) from None
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf, axis: function(jax.tree_util.keystr(path), leaf, axis), tree, axes
        )

    def _require_rows(self, method, subject, leaf, axis, shards):
        """ValueError unless the leaf has that axis and it divides."""
        if axis is None:
            return
        if not 0 <= axis < leaf.ndim:
            raise ValueError(
                f"Layout.{method}: {subject} must have an axis {axis} of rows, got shape "
                f"{leaf.shape}; set batch_axes and carry_axes, None for what has no rows."
            )
        if leaf.shape[axis] % shards:
            raise ValueError(
                f"Layout.{method}: {subject} must have rows that divide by {shards} on axis {axis} "
                f"(shards on the mesh), got shape {leaf.shape}; take a multiple, or fewer devices."
            )


def _place(leaf, sharding):
    """A copy of the leaf on the mesh, each device reading its part."""
    if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        bits = _place(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(bits, impl=jax.random.key_impl(leaf))
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return jax.device_put(leaf, sharding, may_alias=False)
    host = np.array(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def _move(leaf, sharding):
    """The leaf so laid out; JAX has one function for inside of jit and one for outside."""
    if is_traced(leaf):
        return jax.lax.with_sharding_constraint(leaf, sharding)
    return jax.device_put(leaf, sharding)
