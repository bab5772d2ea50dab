"""Compiles `gru` at the benchmark's sizes and writes one digest of each program.

    python tests/compiled_programs.py before.json       # then change the code
    python tests/compiled_programs.py after.json --compare before.json

Use it where a change must not change what XLA runs. For every size of
`experiments.benchmarks.peers`, both resets and every residuals policy it compiles the forward pass
and a training step (value and all gradients), and takes the SHA-256 of the optimized HLO without
its metadata (names of source files, lines and Python functions).
"""

import argparse
import hashlib
import itertools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp

import jaxgru
from experiments.benchmarks.problems import SIZES

SPECS = {"before": jaxgru.CHO_2014, "after": jaxgru.PYTORCH}
RESIDUALS = (None, "gates", "states", "boundaries")


def make_programs(size, reset, residuals):
    """name -> (function, arguments) of the forward pass and the training step."""

    def run(params, xs, h0):
        return jaxgru.gru(params, xs, h0, gradient=jaxgru.BPTT(residuals))

    def loss(params, xs, h0, dh_last, dhs):
        h_last, hs = run(params, xs, h0)
        return (h_last * dh_last).sum() + (hs * dhs).sum()

    num_steps, batch_size, input_size, hidden_size = size
    params = jaxgru.init_gru(jax.random.key(0), input_size, hidden_size, spec=SPECS[reset])
    xs = jnp.zeros((num_steps, batch_size, input_size))
    hs = jnp.zeros((num_steps, batch_size, hidden_size))
    yield "forward", run, (params, xs, hs[0])
    yield "training", jax.value_and_grad(loss, (0, 1, 2)), (params, xs, hs[0], hs[0], hs)


def digest(function, arguments):
    """The SHA-256 of the optimized HLO, less what only names where it came from."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    text = re.sub(r", metadata=\{[^}]*\}", "", text)
    tables = r"^(FileNames|FunctionNames|FileLocations|StackFrames)\n(.+\n)*"
    text = re.sub(tables, "", text, flags=re.M)
    # Arguments are named after the caller's variables, which may be renamed.
    return hashlib.sha256(re.sub(r"%[\w.]+", rename({}), text).encode()).hexdigest()


def rename(seen):
    """Numbers names in the order in which they appear."""
    return lambda match: seen.setdefault(match[0], f"%{len(seen)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="JSON to write")
    parser.add_argument("--compare", type=Path, help="JSON of an earlier run")
    args = parser.parse_args()
    digests = {}
    for size, reset, residuals in itertools.product(SIZES, SPECS, RESIDUALS):
        for name, function, arguments in make_programs(tuple(size), reset, residuals):
            key = f"{name} {tuple(size)} reset {reset} residuals {residuals}"
            digests[key] = digest(function, arguments)
    args.file.write_text(json.dumps(digests, indent=1))
    if args.compare:
        earlier = json.loads(args.compare.read_text())
        changed = [key for key in {**digests, **earlier} if digests.get(key) != earlier.get(key)]
        print(*changed, sep="\n")
        raise SystemExit(f"{len(changed)} of {len(digests)} programs differ." if changed else 0)


if __name__ == "__main__":
    main()
