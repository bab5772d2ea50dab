"""Every gradient transformation of optax in the train step, against a loop that calls it by hand.

They are found by introspection, so that a new one of optax is tried too. One that requires an
argument of an unknown name fails until ARGUMENTS names a value for it.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from jaxgru.training import init_train_state, make_train_step

SGD = optax.sgd(0.1)
MASK = {"w": True, "b": False}
ARGUMENTS = {
    "learning_rate": 0.1, "step_size": 0.1, "step_size_fn": lambda count: 0.1, "decay": 0.9,
    "clipping": 1.0, "max_delta": 1.0, "threshold": 1.0, "max_norm": 1.0,
    "eta": 0.1, "gamma": 0.55, "key": 0,
    "inner": SGD, "optimizer": SGD, "base_optimizer": SGD, "tx": SGD, "inner_factory": optax.sgd,
    "adv_optimizer": optax.chain(optax.contrib.normalize(), optax.sgd(0.05)),
    "should_transform_fn": lambda count, **extra: count % 2 == 0, "max_consecutive_errors": 2,
    "mask": MASK, "freeze_mask": MASK, "transforms": {"a": SGD, "b": optax.adam(0.1)},
    "param_labels": {"w": "a", "b": "b"}, "measure_name": "norm",
    "measure": lambda updates, *arguments, **extra: updates,
    "max_backtracking_steps": 3, "max_linesearch_steps": 3, "f": lambda updates, params: updates,
}  # fmt: skip
WITHOUT = {  # what is no optimizer of a tree of arrays under one loss
    "differentially_private_aggregate": "it takes gradients of each example",
    "dpsgd": "it takes gradients of each example",
    "lookahead": "it takes LookaheadParams",
    "scale_by_muon": "it is a part of muon, which gives it dimensions",
    "schedule_free_eval_params": "it is a function of states",
}
# Of the extra arguments, an optimizer by hand is given those that its documentation names.
EXTRA = {
    "hutchinson_estimator_diag_hessian": ["obj_fn"], "sophia": ["obj_fn"],
    "sam": ["grad_fn"], "sam, opaque": ["grad_fn"],
}  # fmt: skip
# Its state becomes float32 in the first update, so that no checkpoint could be resumed.
CHANGING = [("scale_by_distance_over_gradients", "bfloat16")]
# One of each kind; the slow tier has the others.
FAST = {
    "adamw", "sgd", "muon", "lbfgs", "polyak_sgd", "momo", "sophia", "sam", "sam, opaque", "chain",
    "mechanize", "schedule_free", "prodigy", "dadapt_adamw", "reduce_on_plateau", "MultiSteps",
    "inject_hyperparams", "named_chain", "masked", "multi_transform",
}  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
OTHERS = {
    "MultiSteps": lambda: optax.MultiSteps(SGD, 2).gradient_transformation(),
    "chain": lambda: optax.chain(optax.clip(1.0), SGD, optax.contrib.reduce_on_plateau(patience=1)),
    "named_chain": lambda: optax.named_chain(("one", optax.clip(1.0)), ("two", optax.lbfgs())),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(0.1),
    "inject_stateful_hyperparams": lambda: optax.inject_stateful_hyperparams(optax.adam)(0.1),
    "sam, opaque": lambda: optax.contrib.sam(
        SGD, ARGUMENTS["adv_optimizer"], sync_period=2, opaque_mode=True
    ),
}


def transformations():
    """{name: a function that makes it}."""
    found = {}
    for room in (optax, optax.contrib):
        for name, function in inspect.getmembers(room):
            is_function = inspect.isfunction(function) or isinstance(function, functools.partial)
            if name.startswith("_") or name in WITHOUT or not is_function:
                continue
            signature = inspect.signature(function)
            made = "Transformation" in str(signature.return_annotation)
            if made or "learning_rate" in signature.parameters or room is optax.contrib:
                found[name] = functools.partial(make, name, function, signature)
    return found | OTHERS


def make(name, function, signature):
    required = [p.name for p in signature.parameters.values() if p.default is p.empty]
    assert {*required} <= ARGUMENTS.keys(), f"{name} requires unknown arguments {required}"
    return function(**{argument: ARGUMENTS[argument] for argument in required})


OPTIMIZERS = transformations()


def make_params(dtype):
    draw = np.random.default_rng(0).normal
    return {"w": jnp.asarray(draw(size=(3, 3)), dtype), "b": jnp.asarray(draw(size=3), dtype)}


def distance(params, batch):
    """The squared distance from a batch, weighted so that no direction is like another."""
    leaves = [leaf.astype(jnp.float32) for leaf in jax.tree.leaves(params)]
    weights = [jnp.arange(1.0, 4.0), jnp.arange(1.0, 10.0).reshape(3, 3)]
    return sum(jnp.sum(w * jnp.square(leaf - batch)) for w, leaf in zip(weights, leaves))


def loss_fn(params, carry, batch, key):
    return distance(params, batch), (carry, {})


@functools.partial(jax.jit, static_argnums=(0, 1))
def update_by_hand(optimizer, names, params, state, batch):
    """What the documentation of optax says, with the extra arguments of these names."""
    value, grad = jax.value_and_grad(distance)(params, batch)

    def value_fn(params):
        return distance(params, batch)

    extra = {"value": value, "grad": grad, "value_fn": value_fn, "obj_fn": value_fn}
    extra["grad_fn"] = lambda params, count: jax.grad(value_fn)(params)
    update = optax.with_extra_args_support(optimizer).update
    updates, state = update(grad, state, params, **{name: extra[name] for name in names})
    return optax.apply_updates(params, updates), state


def kinds(tree):
    return [
        (jax.tree_util.keystr(path), leaf.shape, leaf.dtype, getattr(leaf, "weak_type", False))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


@pytest.fixture(autouse=True)
def promotion_of_optax():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in OPTIMIZERS]
)
def test_step_makes_the_updates_of_a_loop_by_hand(name):
    optimizer, params = OPTIMIZERS[name](), make_params(jnp.float32)
    state = init_train_state(params, optimizer, key=jax.random.key(0))
    before = kinds((state.params, state.opt_state))
    train_step, opt_state = make_train_step(loss_fn, optimizer), optimizer.init(params)
    names = tuple(EXTRA.get(name, ("value", "grad", "value_fn")))
    for batch in (0.5, -0.25, 0.5):
        state, metrics = train_step(state, jnp.float32(batch))
        params, opt_state = update_by_hand(optimizer, names, params, opt_state, jnp.float32(batch))
        assert int(metrics["skipped"]) == 0
        for got, wanted in zip(jax.tree.leaves(state.params), jax.tree.leaves(params)):
            np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)
    assert kinds((state.params, state.opt_state)) == before
    assert train_step.__wrapped__._cache_size() == 1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_states_of_other_dtypes_keep_them(name, dtype):
    with jax.enable_x64(dtype == "float64"):
        optimizer, params = OPTIMIZERS[name](), make_params(jnp.dtype(dtype))
        state = init_train_state(params, optimizer, key=jax.random.key(0))
        train_step, batch = make_train_step(loss_fn, optimizer), jnp.float32(0.5)
        if (name, dtype) in CHANGING:
            with pytest.raises(ValueError, match=r"must keep opt_state\.max_dist"):
                train_step(state, batch)
            return
        after, _ = jax.eval_shape(train_step, state, batch)
        wanted = kinds((state.params, state.opt_state))
        assert kinds((after.params, after.opt_state)) == wanted
