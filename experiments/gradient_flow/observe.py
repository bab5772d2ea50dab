"""Observes credit, Jacobians and gates of a network on a batch, and computes the three cases."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxgru
from experiments import memory_tasks
from jaxgru import diagnostics

QUANTILES = (0.1, 0.5, 0.9)
BINS = 25
SHIFTS = (0.0, 1.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0)  # of the gates' pre-activations
REACHES = (0.1, 0.01)  # fractions of the credit, for `diagnostics.credit_reach`


class Network(NamedTuple):
    """A layer and its head."""

    params: Any  # jaxgru.GRUParams or memory_tasks.VanillaParams
    w: jax.Array  # [H, K]
    b: jax.Array  # [K]

    @property
    def spec(self) -> jaxgru.GRUSpec | None:
        """The equation; None for the tanh RNN."""
        return self.params.spec if isinstance(self.params, jaxgru.GRUParams) else None


def observe(network: Network, xs: Any, loss_fn: Any) -> dict[str, Any]:
    """Curves and numbers for JSON, of one network on xs [T, B, I].

    loss_fn maps the outputs of the last step [B, K] to the loss of each sequence [B]. No other step
    has a loss, so |dL/dh_t| is the gradient that is left T - t steps before the end.
    """
    seen = jax.tree.map(np.asarray, _observe(network, jnp.asarray(xs), loss_fn))
    distance = np.arange(len(xs))[::-1]
    curves = {
        "distance": distance.tolist(),
        "credit": _quantiles(seen["credit"]),
        "singular_values": {
            name: _quantiles(seen["singular_values"][..., index])
            for name, index in (("largest", 0), ("smallest", -1))
        },
        "median_singular_value": np.median(seen["singular_values"], axis=(1, 2)).tolist(),
        "lyapunov": seen["lyapunov"].mean(axis=0).tolist(),
        "reach": {str(f): float(np.median(_reach(seen["credit"], f))) for f in REACHES},
    }
    if network.spec is None:
        return curves
    shares = {name: _share(path, seen["paths"]) for name, path in seen["paths"].items()}
    printed = _quantiles(seen["printed_error"]) if network.spec.reset == "before" else None
    statistics = seen["statistics"]
    return curves | {
        "paths": shares,
        "printed_error": printed,
        "gates": {name: _histogram(gate) for name, gate in seen["gates"].items()},
        "memory": np.sort(statistics.memory).tolist(),
        "saturated": {
            "reset": float((statistics.reset_low + statistics.reset_high).mean()),
            "update": float((statistics.update_low + statistics.update_high).mean()),
        },
    }


@functools.partial(jax.jit, static_argnums=2)
def _observe_gru(network, xs, loss_fn):
    params, w, b = network
    spec = params.spec

    def last_loss(h_last, hs):
        return loss_fn(hs[-1] @ w + b[None]).sum()

    flow = diagnostics.gradient_flow(last_loss, params, xs)[1]
    gates = diagnostics.gate_values(params, xs)
    jacobians = diagnostics.sequence_jacobians(params, xs)
    seen = {
        "credit": flow.states,
        "paths": flow.paths._asdict(),
        "gates": {"reset": gates.reset, "kept": gates.kept},
        "statistics": diagnostics.gate_statistics(params, xs),
    }
    if spec.reset == "before" and spec.activation == "tanh":
        error = jnp.linalg.norm(printed_jacobian(params, gates) - jacobians, axis=(-2, -1))
        seen["printed_error"] = error / jnp.linalg.norm(jacobians, axis=(-2, -1))
    return seen | _spectra(jacobians)


@functools.partial(jax.jit, static_argnums=2)
def _observe_vanilla(params, xs, loss_fn):
    """The same for h' = tanh(x w_x + h w_h + b_h), whose Jacobian is diag(1 - h'^2) w_h^T."""

    def states(tap):
        def body(h, inputs):
            x, tap = inputs
            h = jnp.tanh(x @ params.w_x + h @ params.w_h + params.b_h[None]) + tap
            return h, h

        return jax.lax.scan(body, jnp.zeros_like(tap[0]), (xs, tap))[1]

    def last_loss(tap):
        return loss_fn(states(tap)[-1] @ params.w + params.b[None]).sum()

    tap = jnp.zeros((*xs.shape[:2], params.w_h.shape[0]), xs.dtype)
    jacobians = (1 - states(tap) ** 2)[..., None] * params.w_h.T[None, None]
    return {"credit": jnp.linalg.norm(jax.grad(last_loss)(tap), axis=-1)} | _spectra(jacobians)


def _observe(network, xs, loss_fn):
    if network.spec is None:
        return _observe_vanilla(network.params, xs, loss_fn)
    return _observe_gru(network, xs, loss_fn)


def _spectra(jacobians):
    """The singular values of every step [T, B, H], and the Lyapunov exponents [B, H]."""
    return {
        "singular_values": diagnostics.singular_values(jacobians),
        "lyapunov": diagnostics.lyapunov_exponents(jacobians),
    }


def printed_jacobian(params: jaxgru.GRUParams, gates: diagnostics.GateValues) -> jax.Array:
    """The Jacobian as "Gated Recurrent Unit Networks" prints it, for reset="before" and tanh.

    dh_t/dh_{t-1} = diag(k) + diag((1 - k) (1 - n^2)) w_hn^T diag(r), where k is the fraction of the
    state that is kept. The paths through the gates are missing.
    """
    k, r, n = gates.kept, gates.reset, gates.candidate
    hidden_size = k.shape[-1]
    w_n = params.w_h[:, 2 * hidden_size :]
    lead = (1,) * (k.ndim - 1)
    identity = jnp.eye(hidden_size, dtype=k.dtype).reshape(*lead, hidden_size, hidden_size)
    through_n = w_n.T.reshape(identity.shape) * r[..., None, :]
    return identity * k[..., None] + ((1 - k) * (1 - n**2))[..., None] * through_n


def saturation_cases(seed: int, hidden_size: int = 32) -> dict[str, Any]:
    """The three cases of "Gated Recurrent Unit Networks", as limits for saturated gates.

    The pre-activations of the gates are shifted by +s or -s. For s to infinity, the cases are
    1: z -> 1, J -> I. 2A: z -> 0, r -> 0, J -> 0. 2B: z -> 0, r -> 1, J -> diag(1 - n^2) w_hn^T.
    For every s the result has, in float64, the largest entry of |printed J - J| and of
    |J - its limit|, and the largest singular value of J.
    """
    cases = {"1: z to 1": (0, 1), "2A: z to 0, r to 0": (-1, -1), "2B: z to 0, r to 1": (1, -1)}
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(seed), 3)
        params = jaxgru.init_gru(keys[0], hidden_size, hidden_size, dtype=jnp.float64)
        x, h = (jax.random.normal(k, (1, hidden_size), jnp.float64) for k in keys[1:])
        h = jnp.tanh(h)
        found = {
            name: [_case(params, x, h, signs, s) for s in SHIFTS] for name, signs in cases.items()
        }
    names = ("printed_error", "distance_to_limit", "largest_singular_value")
    return {"shift": list(SHIFTS)} | {
        case: {name: [float(v) for v in column] for name, column in zip(names, zip(*rows))}
        for case, rows in found.items()
    }


@functools.partial(jax.jit, static_argnames="signs")
def _case(params, x, h, signs, shift):
    """The three numbers of `saturation_cases` for one case at one shift."""
    size = h.shape[-1]
    shifts = jnp.concatenate([jnp.full(size, sign * shift, h.dtype) for sign in (*signs, 0)])
    params = dataclasses.replace(params, b_x=params.b_x + shifts)
    gates = jax.tree.map(lambda v: v[0], diagnostics.gate_values(params, x[None], h))
    full, printed = diagnostics.step_jacobian(params, x, h), printed_jacobian(params, gates)
    saturated = dataclasses.replace(  # r = 1
        params, b_x=params.b_x + jnp.repeat(jnp.array([60.0, 0, 0], h.dtype), size)
    )
    candidate = diagnostics.gate_values(saturated, x[None], h).candidate[0]
    limit = {
        (0, 1): jnp.eye(size, dtype=h.dtype)[None],
        (-1, -1): jnp.zeros_like(full),
        (1, -1): (1 - candidate**2)[..., None] * params.w_h[:, 2 * size :].T[None],
    }[signs]
    errors = (jnp.abs(v).max() for v in (printed - full, full - limit))
    return (*errors, diagnostics.singular_values(full).max())


def vanilla_network(params: memory_tasks.VanillaParams) -> Network:
    return Network(params, params.w, params.b)


def _quantiles(v):
    """{level: list over T} of the quantiles over the batch of v [T, B]."""
    levels = np.quantile(v, QUANTILES, axis=1)
    return {f"{level:g}": row.tolist() for level, row in zip(QUANTILES, levels)}


def _share(path, paths):
    """A path's fraction of the sum of the four norms, averaged over the batch; 0 if they are 0."""
    total = sum(paths.values())
    return (path / np.where(total > 0, total, 1.0)).mean(axis=1).tolist()


def _histogram(gate):
    """The fraction of values in each of the equal bins of [0, 1]."""
    return (np.histogram(gate, BINS, (0.0, 1.0))[0] / gate.size).tolist()


def _reach(credit, fraction):
    return np.asarray(diagnostics.credit_reach(jnp.asarray(credit), fraction))
