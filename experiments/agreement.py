"""Compares every derivative of the package with autodiff in float64, and measures RTRL's memory.

    python -m experiments.agreement                     # all equations: four minutes
    python -m experiments.agreement --smoke             # one equation, seconds

The reference is a GRU written here as a loop over time steps, which JAX differentiates. In each
step h_{t-1} is used four times, and the reference can differentiate each use by itself: directly,
as the part of the state that is kept, and in the update gate, the reset gate and the candidate.
The reference is compared with backpropagation through time, the tangent rule in forward mode,
real-time recurrent learning and SnAp-1, the closed forms of the Jacobian, the taps and paths of the
gradient, and the norms of per-example gradients, for one layer and for a stack of two. One sequence
is masked throughout, the others have masked steps, and resets fall on valid and on masked steps.

An error is max |got - wanted| / max |wanted| of the worst array. A run folder holds config.json,
agreement.json, agreement.txt and agreement.png. The exit code is 1 if an error exceeds the limit,
or if the memory of RTRL grows with the number of steps.
"""

import functools
import itertools
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxgru
from experiments import runs
from jaxgru import diagnostics

LIMIT = 1e-12
ACTIVATIONS = ("tanh", "relu", "sigmoid", "softplus", "identity")
EQUATIONS = tuple(itertools.product(("before", "after"), ("keep", "write")))
COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red")
MEMORY_STEPS = (64, 256, 1024, 4096)
SMOKE_SIZES = {"steps": 3, "inputs": 3}  # equal sizes compile fewer operations
SLOW_OBJECTS = (  # which --smoke leaves out
    "tangent, forward", "SnAp-1", "gradient flow", "norms of examples", "dh_T/dh_t, all t",
    "Lyapunov sum", "stack of two: RTRL", "stack of two: Jacobian", "stack of two: taps",
)  # fmt: skip


class Case(NamedTuple):
    """Parameters of one equation, and arguments for them in float64, time first."""

    params: jaxgru.GRUParams
    layers: Any  # a stack of two layers
    xs: jax.Array
    h0: jax.Array
    mask: jax.Array
    resets: jax.Array
    targets: jax.Array

    @property
    def spec(self):
        """The equation."""
        return self.params.spec

    @property
    def options(self):
        """The mask and resets, for the functions of the package."""
        return {"mask": self.mask, "resets": self.resets}


def parse_args(argv):
    parser = runs.make_parser("agreement", "Compares every derivative with autodiff.")
    add = parser.add_argument
    add("--smoke", action="store_true", help="seconds: one equation, few objects")
    add("--out", metavar="FOLDER", help="new or empty run folder (default: runs/agreement-DATE)")
    add("--seed", type=int, default=0, help="of the random numbers")
    args = parser.parse_args(argv)
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed must be from 0 to 2**32 - 1, got {args.seed}")
    return args


def main(argv=None):
    args = parse_args(argv)
    return runs.run_script("agreement", lambda: run_all(args), smoke=args.smoke)


def run_all(args):
    run = runs.make_run_folder("agreement", args.out, vars(args))
    print(runs.describe_device(), flush=True)
    rows = compare_all(args)
    memory = measure_memory((16, 64) if args.smoke else MEMORY_STEPS)
    text = format_table(rows) + "\n\n" + format_memory(memory)
    print("\n" + text)
    (run / "agreement.txt").write_text(text + "\n", encoding="utf-8")
    record = {"limit": LIMIT, "errors": rows, "memory": memory, "device": runs.describe_device()}
    runs.write_json(run / "agreement.json", record)
    plot(run / "agreement.png", rows, memory)
    print(f"run folder: {run}")
    wrong = [row for row in rows if not row["error"] <= LIMIT]
    for row in wrong:
        print(f"agreement: {row['object']} is off by {row['error']:.1e}, {row}", file=sys.stderr)
    flat = all(len(set(memory[name])) == 1 for name in ("RTRL", "SnAp-1"))
    if not flat:
        print("agreement: the memory of RTRL grows with the number of steps", file=sys.stderr)
    return 0 if flat and not wrong else 1


def compare_all(args):
    """A row for every object, equation and activation; with layer norm only for tanh."""
    from tqdm import tqdm

    choices: list[Any] = [(*e, a, False) for e in EQUATIONS for a in ACTIVATIONS]
    choices += [(*e, "tanh", True) for e in EQUATIONS]
    choices = [("before", "keep", "tanh", False)] if args.smoke else choices
    rows = []
    with jax.enable_x64(True), jax.disable_jit():  # compiling would take nearly all of the time
        for reset, update, activation, layer_norm in tqdm(choices, unit="equation"):
            spec = jaxgru.GRUSpec(reset, update, activation)
            case = make_case(args.seed, spec, layer_norm, **(SMOKE_SIZES if args.smoke else {}))
            for name, compare in OBJECTS.items():
                if args.smoke and name in SLOW_OBJECTS:
                    continue
                if layer_norm and name == "SnAp-1":
                    continue  # not defined: every parameter then changes all units of its gate
                got, wanted = compare(case)
                row = {"object": name, "reset": reset, "update": update}
                row |= {"activation": activation, "layer_norm": layer_norm}
                rows.append({**row, "error": relative_error(got, wanted)})
    return rows


def make_case(seed, spec, layer_norm=False, steps=6, batch=3, inputs=2, hidden=3):
    """Random arrays; the first sequence is masked throughout.

    Resets fall on valid and on masked steps.
    """
    keys = jax.random.split(jax.random.key(seed), 7)
    options = {"layer_norm": layer_norm, "scheme": "pytorch", "dtype": jnp.float64}
    params = jaxgru.init_gru(keys[0], inputs, hidden, **options)
    layers = jaxgru.init_stack(keys[1], inputs, hidden, 2, **options)
    if layer_norm:
        params, layers = jax.tree.map(
            lambda v: v * (1 + 0.3 * jnp.cos(jnp.arange(v.size, dtype=v.dtype)).reshape(v.shape)),
            (params, layers),
        )
    lead = (steps, batch)
    mask = jax.random.bernoulli(keys[2], 0.8, lead).at[:, 0].set(False)
    mask = mask.at[2, 1:].set(jnp.array([True, False]))
    resets = jax.random.bernoulli(keys[5], 0.1, lead).at[2, 1:].set(True)
    return Case(
        params, layers, jax.random.normal(keys[3], (*lead, inputs), jnp.float64),
        jax.random.normal(keys[4], (batch, hidden), jnp.float64), mask, resets,
        jax.random.normal(keys[6], (*lead, hidden), jnp.float64),
    )  # fmt: skip


def relative_error(got, wanted):
    """max |got - wanted| / max |wanted| of the worst leaf; inf if it is not finite."""
    errors = []
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.shape == b.shape, (a.shape, b.shape)
        error = np.abs(a - b).max() / (np.abs(b).max() or 1.0)
        errors.append(float(error) if np.isfinite(error) else float("inf"))
    return max(errors)


# The reference.


def plain_step(params, x, copies, spec):
    """h' from four copies of h, so that each use of h can be differentiated by itself.

    The copies are for the state that is kept, the update gate, the reset gate and the candidate.
    """
    h_kept, h_update, h_reset, h_candidate = copies
    w_xr, w_xz, w_xn = jnp.split(params.w_x, 3, axis=-1)
    w_hr, w_hz, w_hn = jnp.split(params.w_h, 3, axis=-1)
    b_xr, b_xz, b_xn = jnp.split(params.b_x, 3)
    b_hr, b_hz, b_hn = jnp.split(params.b_h, 3)
    g_x = [None] * 3 if params.g_x is None else jnp.split(params.g_x, 3)
    g_h = [None] * 3 if params.g_h is None else jnp.split(params.g_h, 3)
    f = getattr(jax.nn, spec.activation)
    r = jax.nn.sigmoid(norm(x @ w_xr, g_x[0]) + b_xr + norm(h_reset @ w_hr, g_h[0]) + b_hr)
    z = jax.nn.sigmoid(norm(x @ w_xz, g_x[1]) + b_xz + norm(h_update @ w_hz, g_h[1]) + b_hz)
    a = norm(x @ w_xn, g_x[2]) + b_xn
    if spec.reset == "before":
        n = f(a + norm((r * h_candidate) @ w_hn, g_h[2]) + b_hn)
    else:
        n = f(a + r * (norm(h_candidate @ w_hn, g_h[2]) + b_hn))
    return z * h_kept + (1 - z) * n if spec.update == "keep" else (1 - z) * h_kept + z * n


def norm(v, scale):
    """Layer normalization of one vector; v itself if scale is None."""
    return v if scale is None else scale * (v - v.mean()) / jnp.sqrt(v.var() + 1e-5)


def masked_step(params, spec, x, h, valid, reset, tap=0.0):
    """One step of one sequence with its mask and reset, plus a tap."""
    h = jnp.where(reset, jnp.zeros_like(h), h)
    return jnp.where(valid, plain_step(params, x, (h,) * 4, spec), h) + tap


def plain_states(case, params, xs, h, taps=None, start=0):
    """The states [T - start, B, H] of a layer, or of the top layer of a stack, step by step."""
    layers = [params] if isinstance(params, jaxgru.GRUParams) else params
    for number, layer in enumerate(layers):
        hs = []
        one = jax.vmap(functools.partial(masked_step, layer, case.spec))
        for t in range(start, len(case.mask)):
            tap = jnp.zeros_like(h) if taps is None else taps[number][t]
            h = one(xs[t - start], h, case.mask[t], case.resets[t], tap)
            hs.append(h)
        xs, h = jnp.stack(hs), jnp.zeros_like(h)
    return xs


def loss_of(ys, targets):
    """Half the sum of squared errors of a step or of a sequence."""
    return 0.5 * jnp.sum((ys - targets) ** 2)


def plain_loss(case, params, xs, h0, taps=None):
    return loss_of(plain_states(case, params, xs, h0, taps), case.targets)


def plain_jacobian(case, layers, h_tm1, xs):
    """d(all layers' h_t)/d(all layers' h_{t-1}) [T, B, S, S], given the states before each step."""

    def joint(h, x, valid, reset):
        states = []
        for layer, h_layer in zip(layers, jnp.split(h, len(layers))):
            x = masked_step(layer, case.spec, x, h_layer, valid, reset)
            states.append(x)
        return jnp.concatenate(states)

    return jax.vmap(jax.vmap(jax.jacrev(joint)))(h_tm1, xs, case.mask, case.resets)


def states_before(case, params, h0):
    """h_{t-1} [T, B, H] of a layer, from the reference."""
    return jnp.concatenate([h0[None], plain_states(case, params, case.xs, h0)[:-1]])


# The objects: each function returns the package's result and that of autodiff of the reference.


def bptt_gradient(case):
    def loss(params, xs, h0):
        return loss_of(jaxgru.gru(params, xs, h0, **case.options)[1], case.targets)

    arguments = (case.params, case.xs, case.h0)
    wanted = jax.grad(functools.partial(plain_loss, case), (0, 1, 2))(*arguments)
    return jax.grad(loss, (0, 1, 2))(*arguments), wanted


def tangent_forward(case):
    """The derivative of all states in one direction, by forward mode."""
    arguments = (case.params, case.xs, case.h0)
    direction = jax.tree.map(lambda v: jnp.cos(3 * v), arguments)

    def states(params, xs, h0):
        return jaxgru.gru(params, xs, h0, gradient="tangent", **case.options)[1]

    def reference(params, xs, h0):
        return plain_states(case, params, xs, h0)

    got, wanted = (jax.jvp(fn, arguments, direction)[1] for fn in (states, reference))
    return got, wanted


def rtrl_gradient(case):
    got = diagnostics.rtrl(loss_of, case.params, case.xs, case.targets, case.h0, **case.options)[1]
    return got, jax.grad(functools.partial(plain_loss, case))(case.params, case.xs, case.h0)


def snap_gradient(case):
    """SnAp-1 and its definition: P <- pattern * (J P + I), with J and I from autodiff.

    The pattern is 1 at the entries that I can have.
    """
    got = diagnostics.rtrl(
        loss_of, case.params, case.xs, case.targets, case.h0, influence="snap-1", **case.options
    )[1]
    h_tm1 = states_before(case, case.params, case.h0)
    hidden_size = case.h0.shape[-1]
    own = jnp.concatenate([jnp.eye(hidden_size)] * 3, axis=-1)
    if case.spec.reset == "before":  # every candidate reads the state that a reset gate scales
        own = own.at[:, :hidden_size].set(1.0)

    def of_sequence(x, h_tm1, valid, reset, targets):
        total = jax.tree.map(jnp.zeros_like, case.params)
        influence = jax.tree.map(lambda v: jnp.zeros((hidden_size, *v.shape)), case.params)
        for t in range(len(x)):
            arguments = (case.params, case.spec, x[t], h_tm1[t], valid[t], reset[t])
            immediate, jacobian = jax.jacrev(masked_step, argnums=(0, 3))(*arguments)

            def follow(p, i, jacobian=jacobian):
                pattern = own.reshape(hidden_size, *(1,) * (p.ndim - 2), -1)
                return pattern * (jnp.tensordot(jacobian, p, 1) + i)

            influence = jax.tree.map(follow, influence, immediate)
            dy = masked_step(*arguments) - targets[t]
            total = jax.tree.map(lambda v, p, dy=dy: v + jnp.tensordot(dy, p, 1), total, influence)
        return total

    columns = (case.xs, h_tm1, case.mask, case.resets, case.targets)
    each = jax.vmap(of_sequence, in_axes=1)(*columns)
    return got, jax.tree.map(lambda v: v.sum(axis=0), each)


def step_jacobian(case):
    h_tm1 = states_before(case, case.params, case.h0)
    got = diagnostics.step_jacobian(case.params, case.xs, h_tm1)
    unmasked = case._replace(mask=jnp.ones_like(case.mask), resets=jnp.zeros_like(case.resets))
    return got, plain_jacobian(unmasked, (case.params,), h_tm1, case.xs)


def jacobian_diagonal(case):
    h_tm1 = states_before(case, case.params, case.h0)
    got = diagnostics.step_jacobian_diagonal(case.params, case.xs, h_tm1)
    return got, jnp.diagonal(step_jacobian(case)[1], axis1=-2, axis2=-1)


def jacobian_bound(case):
    """max(largest singular value, bound) and the bound: they are equal if the bound holds."""
    h_tm1 = states_before(case, case.params, case.h0)
    bound = diagnostics.step_jacobian_bound(case.params, case.xs, h_tm1)
    largest = jnp.linalg.norm(step_jacobian(case)[1], ord=2, axis=(-2, -1))
    return jnp.maximum(largest, bound), bound


def product_over_time(case):
    """dh_T/dh_{t-1} for every t."""
    jacobians = diagnostics.sequence_jacobians(case.params, case.xs, case.h0, **case.options)
    h_tm1 = states_before(case, case.params, case.h0)
    wanted = []
    for t in range(len(case.xs)):

        def last(h, t=t):
            return plain_states(case, case.params, case.xs[t:], h, start=t)[-1]

        rows = jax.jacrev(last)(h_tm1[t])  # [B, H, B, H]: zero between different sequences
        wanted.append(jnp.diagonal(rows, axis1=0, axis2=2).transpose(2, 0, 1))
    return diagnostics.jacobian_products(jacobians), jnp.stack(wanted)


def lyapunov_sum(case):
    """The sum of the exponents, which is the mean of log|det J|.

    Resets are left out, since log|det J| is -inf there.
    """
    case = case._replace(resets=jnp.zeros_like(case.resets), mask=case.mask.at[:, 0].set(True))
    jacobians = diagnostics.sequence_jacobians(case.params, case.xs, case.h0, **case.options)
    h_tm1 = states_before(case, case.params, case.h0)
    growth = jnp.linalg.slogdet(plain_jacobian(case, (case.params,), h_tm1, case.xs))[1]
    if not np.isfinite(growth).all():  # J is singular where relu is zero
        return jnp.zeros(()), jnp.zeros(())
    exponents = diagnostics.lyapunov_exponents(jacobians, case.mask)
    return exponents.sum(axis=-1), growth.sum(axis=0) / case.mask.sum(axis=0, dtype=growth.dtype)


def taps(case):
    def loss(tap):
        hs = jaxgru.gru(case.params, case.xs, case.h0, tap=tap, **case.options)[1]
        return loss_of(hs, case.targets)

    def reference(tap):
        return plain_loss(case, case.params, case.xs + tap.xs, case.h0, [tap.hs])

    zeros = jaxgru.init_taps(case.params, case.mask.shape)
    return jax.grad(loss)(zeros), jax.grad(reference)(zeros)


def gradient_paths(case):
    """The gradient through each of the four uses of h_{t-1}."""
    h_tm1, dhs = states_before(case, case.params, case.h0), taps(case)[1].hs
    got = diagnostics.gradient_paths(case.params, case.xs, dhs, case.h0, **case.options)

    def of_step(x, h, valid, reset, dh):
        def step(*copies):
            copies = [jnp.where(reset, jnp.zeros_like(copy), copy) for copy in copies]
            return jnp.where(valid, plain_step(case.params, x, copies, case.spec), copies[0])

        return diagnostics.Paths(*jax.vjp(step, *(h,) * 4)[1](dh))

    wanted = jax.vmap(jax.vmap(of_step))(case.xs, h_tm1, case.mask, case.resets, dhs)
    return got, wanted


def flow_norms(case):
    """`gradient_flow` of a layer: the norms of the gradients from taps and paths."""
    got = diagnostics.gradient_flow(
        lambda h_last, hs: loss_of(hs, case.targets), case.params, case.xs, case.h0, **case.options
    )[1]
    tap, paths = taps(case)[1], gradient_paths(case)[1]
    norms = functools.partial(jnp.linalg.norm, axis=-1)
    wanted = diagnostics.GradientFlow(norms(tap.hs), norms(tap.xs), jax.tree.map(norms, paths))
    return got, wanted


def example_norms(case):
    got = diagnostics.example_gradient_norms(
        lambda h_last, hs: loss_of(hs, case.targets), case.params, case.xs, case.h0, **case.options
    )[1]
    wanted = []
    for i in range(case.mask.shape[1]):
        arrays = (case.xs, case.mask, case.resets, case.targets)
        xs, mask, resets, targets = (v[:, i : i + 1] for v in arrays)
        one = case._replace(mask=mask, resets=resets, targets=targets)
        grads = jax.grad(functools.partial(plain_loss, one))(case.params, xs, case.h0[i : i + 1])
        wanted.append(jax.tree.map(jnp.linalg.norm, grads))
    return got, jax.tree.map(lambda *norms: jnp.stack(norms), *wanted)


def stack_gradient(case):
    """RTRL of a stack of two layers."""
    got = diagnostics.rtrl(loss_of, case.layers, case.xs, case.targets, **case.options)[1]
    loss = functools.partial(plain_loss, case)
    return got, jax.grad(loss)(case.layers, case.xs, jnp.zeros_like(case.h0))


def stack_jacobian(case):
    """The Jacobian of all states of a stack with respect to all states before the step."""
    got = diagnostics.sequence_jacobians(case.layers, case.xs, **case.options)
    zeros = jnp.zeros_like(case.h0)
    below = plain_states(case, case.layers[0], case.xs, zeros)
    above = plain_states(case, case.layers[1], below, zeros)
    h_tm1 = [jnp.concatenate([zeros[None], hs[:-1]]) for hs in (below, above)]
    return got, plain_jacobian(case, case.layers, jnp.concatenate(h_tm1, axis=-1), case.xs)


def stack_taps(case):
    def loss(tap):
        ys = jaxgru.gru_stack(case.layers, case.xs, tap=tap, **case.options)[1]
        return loss_of(ys, case.targets)

    def reference(hs):
        return plain_loss(case, case.layers, case.xs, jnp.zeros_like(case.h0), hs)

    zeros = jaxgru.init_taps(case.layers, case.mask.shape)
    got = [tap.hs for tap in jax.grad(loss)(zeros)]
    return got, jax.grad(reference)([tap.hs for tap in zeros])


OBJECTS: dict[str, Any] = {
    "BPTT gradient": bptt_gradient,
    "tangent, forward": tangent_forward,
    "RTRL gradient": rtrl_gradient,
    "SnAp-1": snap_gradient,
    "dL/dh_t, dL/dx_t (tap)": taps,
    "four paths of a step": gradient_paths,
    "gradient flow": flow_norms,
    "norms of examples": example_norms,
    "step Jacobian": step_jacobian,
    "its diagonal": jacobian_diagonal,
    "its bound, exceeded by": jacobian_bound,
    "dh_T/dh_t, all t": product_over_time,
    "Lyapunov sum": lyapunov_sum,
    "stack of two: RTRL": stack_gradient,
    "stack of two: Jacobian": stack_jacobian,
    "stack of two: taps": stack_taps,
}


# Memory.


def measure_memory(steps, batch=4, inputs=8, hidden=16):
    """Bytes of temporaries of the compiled gradient, for each method and number of steps."""
    params = jaxgru.init_gru(jax.random.key(0), inputs, hidden)

    def bptt(residuals):
        def gradient(params, xs, targets):
            return jax.grad(
                lambda params: loss_of(
                    jaxgru.gru(params, xs, gradient=jaxgru.BPTT(residuals))[1], targets
                )
            )(params)

        return gradient

    def forward(influence):
        def gradient(params, xs, targets):
            return diagnostics.rtrl(loss_of, params, xs, targets, influence=influence)[1]

        return gradient

    methods = {"RTRL": forward("exact"), "SnAp-1": forward("snap-1")}
    methods |= {'BPTT, residuals="gates"': bptt("gates")}
    methods |= {'BPTT, residuals="boundaries"': bptt("boundaries")}
    bytes_of: dict[str, list[int]] = {name: [] for name in methods}
    for num_steps in steps:
        arrays = [
            jax.ShapeDtypeStruct((num_steps, batch, n), jnp.float32) for n in (inputs, hidden)
        ]
        for name, method in methods.items():
            compiled = jax.jit(method).lower(params, *arrays).compile()
            analysis: Any = compiled.memory_analysis()
            bytes_of[name].append(analysis.temp_size_in_bytes)
    return {
        "steps": list(steps),
        "batch": batch,
        "input_size": inputs,
        "hidden_size": hidden,
    } | bytes_of


# Tables and the plot.


def format_table(rows):
    """The largest error over activations, for each object and equation; layer norm comes last."""
    columns = [(r, u, False) for r, u in EQUATIONS] + [(None, None, True)]
    heads = [f"{r}, {u}" for r, u, _ in columns[:-1]] + ["layer norm"]
    lines = [f"{'largest error against autodiff':<32}" + "".join(f"{head:>16}" for head in heads)]
    for name in OBJECTS:
        cells = []
        for reset, update, layer_norm in columns:
            errors = [
                row["error"]
                for row in rows
                if row["object"] == name
                and row["layer_norm"] == layer_norm
                and (layer_norm or (row["reset"], row["update"]) == (reset, update))
            ]
            cells.append(f"{max(errors):>16.1e}" if errors else f"{'-':>16}")
        lines.append(f"{name:<32}" + "".join(cells))
    worst = max(row["error"] for row in rows)
    return "\n".join([*lines, f"{len(rows)} comparisons, largest error {worst:.1e}, limit {LIMIT}"])


def format_memory(memory):
    sizes = f"B={memory['batch']}, I={memory['input_size']}, H={memory['hidden_size']}, float32"
    lines = [
        f"temporaries in kB ({sizes})".ljust(46)
        + "".join(f"{f'T={t}':>10}" for t in memory["steps"])
    ]
    for name, sizes in memory.items():
        if isinstance(sizes, list) and name != "steps":
            lines.append(f"  {name:<44}" + "".join(f"{size / 1e3:>10.1f}" for size in sizes))
    return "\n".join(lines)


def plot(path, rows, memory):
    """Plots the errors of every object and equation, and temporaries against time steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
    names, floor = list(OBJECTS), 1e-17
    for (reset, update), marker, color in zip(EQUATIONS, "os^v", COLORS):
        for layer_norm in (False, True):
            kind = (reset, update, layer_norm)
            chosen = [r for r in rows if (r["reset"], r["update"], r["layer_norm"]) == kind]
            if not chosen:
                continue
            places = [names.index(r["object"]) for r in chosen]
            errors = [max(r["error"], floor) for r in chosen]
            label = f"reset {reset}, update {update}" + (", layer norm" if layer_norm else "")
            fill = "none" if layer_norm else color
            left.plot(
                errors, places, marker, color=color, alpha=0.7, markerfacecolor=fill, label=label
            )
    left.axvline(LIMIT, color="black", linestyle="--", label=f"limit {LIMIT}")
    left.axvline(2.2e-16, color="gray", linestyle=":", label="rounding of one float64")
    left.set(
        xscale="log", xlabel="largest error / largest entry, float64 (exact ones at 1e-17)",
        title="Error against autodiff of a plain loop, with masks and resets",
        xlim=(None, 1e-8),
    )  # fmt: skip
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.grid(alpha=0.3)
    left.legend(fontsize=8, loc="center right")
    for name, sizes in memory.items():
        if isinstance(sizes, list) and name != "steps":
            right.plot(memory["steps"], [size / 1e3 for size in sizes], "o-", label=name)
    right.set(
        xscale="log", yscale="log", xlabel="time steps T",
        ylabel="temporaries of the compiled gradient, kB",
        title=f"Memory, B={memory['batch']}, I={memory['input_size']}, H={memory['hidden_size']}",
    )  # fmt: skip
    right.grid(alpha=0.3)
    right.legend(fontsize=8)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    sys.exit(main())
