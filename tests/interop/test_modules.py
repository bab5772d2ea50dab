"""Parameters inside modules of other libraries: each snippet of the README trains its GRU."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgru import GRUParams, gru, gru_cell, gru_stack, init_gru, interop

README = pathlib.Path(interop.__file__).with_name("README.md").read_text("utf-8")
# Not "python": those blocks run without the other libraries, in test_api.py.
SNIPPETS = re.findall(r"```py\n(.*?)```", README, re.S)
LIBRARIES = {"flax.nnx": "model", "equinox": "model", "flax.linen": "params", "haiku": "params"}


def run_snippet(snippet, updates):
    """The names of the snippet after that many updates."""
    assert "range(20)" in snippet
    code, names = snippet.replace("range(20)", f"range({updates})"), {"__name__": "readme"}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(code, "README.md", "exec"), names)
    return names


def arrays_of(names, library):
    """The arrays of every GRUParams in what the snippet trains."""
    trained = names[LIBRARIES[library]]
    if library == "flax.nnx":
        trained = names["nnx"].as_pure(trained.rnn)
    nodes = jax.tree.leaves(trained, is_leaf=lambda node: isinstance(node, GRUParams))
    return jax.tree.leaves([node for node in nodes if isinstance(node, GRUParams)])


def test_readme_has_a_snippet_for_each_library():
    assert len(SNIPPETS) == len(LIBRARIES)


@pytest.mark.parametrize(("library", "snippet"), list(zip(LIBRARIES, SNIPPETS)))
def test_snippet_lowers_its_loss_and_changes_every_array_of_the_gru(library, snippet):
    pytest.importorskip(library, reason=f"{library} is in the extra `peers`")
    before = arrays_of(run_snippet(snippet, 0), library)
    names = run_snippet(snippet, 20)
    after, losses = arrays_of(names, library), np.asarray(names["losses"])
    assert len(after) == 8 and losses[-1] < 0.5 * losses[0]
    assert all((np.asarray(a) != np.asarray(b)).any() for a, b in zip(before, after))


@pytest.mark.parametrize("run", [gru, gru_stack, gru_cell])
def test_parameters_of_nnx_are_refused_until_they_are_unwrapped(run):
    nnx = pytest.importorskip("flax.nnx", reason="flax is in the extra `peers`")
    layer, xs = init_gru(jax.random.key(0), 2, 3), jnp.ones((4, 2))
    params, place = ((layer,), "params[0]") if run is gru_stack else (layer, "params")
    arguments = (xs, jnp.zeros((4, 3))) if run is gru_cell else (xs,)
    wrapped = jax.tree.map(nnx.Param, params)
    with pytest.raises(TypeError) as refused:
        run(wrapped, *arguments)
    assert str(refused.value) == (
        f"{run.__name__}: {place}.w_x must be an array, got nnx.Param; unwrap it, or a whole tree "
        "of them, with nnx.as_pure."
    )
    got = run(nnx.as_pure(wrapped), *arguments)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, got, run(params, *arguments)))


def test_state_of_nnx_split_is_refused_with_its_cure():
    nnx = pytest.importorskip("flax.nnx", reason="flax is in the extra `peers`")
    model = run_snippet(SNIPPETS[0], 0)["model"]
    graph, state = nnx.split(model)
    with pytest.raises(TypeError, match=r"got nnx\.State; merge it with nnx\.merge"):
        gru_stack(state["rnn"], jnp.ones((4, 3)))
    gru_stack(nnx.as_pure(nnx.merge(graph, state).rnn), jnp.ones((4, 3)))


def test_bare_arrays_in_nnx_data_do_not_train_as_the_readme_says():
    pytest.importorskip("flax.nnx", reason="flax is in the extra `peers`")
    bare = SNIPPETS[0].replace("jax.tree.map(nnx.Param, init_stack(rngs.params(), 3, 16, 2))",
                               "init_stack(rngs.params(), 3, 16, 2)")  # fmt: skip
    assert bare != SNIPPETS[0]
    before, after = (arrays_of(run_snippet(bare, count), "flax.nnx") for count in (0, 3))
    assert all((np.asarray(a) == np.asarray(b)).all() for a, b in zip(before, after))
