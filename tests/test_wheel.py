"""The package as others install it: a wheel in an environment of its own, away from the clone."""

import pathlib
import subprocess
import sys
import sysconfig
import venv
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
SCRIPT = """
import jax, jax.numpy as jnp, optax, jaxgru

params = jaxgru.models.init_sequence_model(jax.random.key(0), 2, 3, 1)
optimizer = optax.adam(1e-3)

def loss_fn(params, carry, batch, key):
    outputs = jaxgru.models.sequence_outputs(params, batch)[1]
    return jaxgru.losses.squared_loss(outputs, jnp.ones_like(outputs)), (carry, {})

state = jaxgru.training.init_train_state(params, optimizer, key=jax.random.key(1))
step = jaxgru.training.make_train_step(loss_fn, optimizer)
state, metrics = step(state, jnp.ones((5, 4, 2)))
assert int(state.step) == 1 and int(metrics["skipped"]) == 0
for room in (jaxgru.checks, jaxgru.diagnostics, jaxgru.experimental, jaxgru.interop):
    assert room.__file__.startswith(jaxgru.__path__[0])
print(jaxgru.__file__, jaxgru.__version__)
"""


def run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_wheel_holds_every_file_and_trains_outside_of_the_clone(tmp_path):
    source, outside = tmp_path / "source", tmp_path / "outside"
    outside.mkdir()
    # A copy, since setuptools would put what an earlier build left in the clone into the wheel.
    tracked = run("git", "ls-files", "jaxgru", "pyproject.toml", "README.md", cwd=ROOT).splitlines()
    for name in filter(lambda name: (ROOT / name).exists(), tracked):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(source))
    (wheel,) = tmp_path.glob("jaxgru-*.whl")
    wanted = {name for name in tracked if name.startswith("jaxgru/") and (ROOT / name).exists()}
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("jaxgru/")}
    assert held == wanted

    venv.create(tmp_path / "fresh", with_pip=False)
    python = tmp_path / "fresh" / "bin" / "python"
    run(*pip, "--python", str(python), "install", "--quiet", "--no-deps", str(wheel))
    # Its dependencies are those installed here; the editable install of the clone is not seen.
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site,) = (tmp_path / "fresh").glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text("\n".join(paths))
    # -I: neither PYTHONPATH nor the folder of the run may lead to the clone.
    printed = run(str(python), "-I", "-c", SCRIPT, cwd=outside)
    assert printed.startswith(str(site)), printed
