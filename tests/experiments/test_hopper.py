"""What ptxas reports of the fused kernels is parsed, and they compile where JAX has its plugin."""

import importlib.util
import os
import subprocess
import sys

import pytest

from experiments import hopper

MESSAGES = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'gru_forward_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for gru_forward_mosaic_gpu_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 63 registers, used 2 barriers, 1 bytes smem
ptxas info    : Compile time = 31.123 ms

ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'gru_backward_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for gru_backward_mosaic_gpu_kernel
    216 bytes stack frame, 212 bytes spill stores, 216 bytes spill loads
ptxas info    : Used 255 registers, used 2 barriers, 1 bytes smem
"""


def test_messages_of_both_kernels_are_read():
    forward, backward = hopper.read_kernels(MESSAGES)
    target = {"target": "sm_90a"}
    assert forward == {"kernel": "gru_forward", "registers": 63, "spilled_bytes": 0, **target}
    assert backward == {"kernel": "gru_backward", "registers": 255, "spilled_bytes": 212, **target}
    assert hopper.read_kernels("nothing") == []


def test_what_a_compiler_writes_to_the_file_descriptor_is_collected_and_no_more(capfd, monkeypatch):
    monkeypatch.delenv("MOSAIC_GPU_DUMP_PTXAS", raising=False)
    with hopper.compiler_messages() as messages:
        assert os.environ["MOSAIC_GPU_DUMP_PTXAS"] == "1"
        os.write(1, b"said\n")
    os.write(1, b"printed\n")
    assert messages == ["said\n"]
    assert "MOSAIC_GPU_DUMP_PTXAS" not in os.environ
    assert capfd.readouterr().out == "printed\n"


def test_missing_compiler_is_named_with_the_cure(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jax_cuda13_plugin", None)
    assert hopper.main([]) == 2
    assert "pip install 'jax[cuda13]'" in capsys.readouterr().err


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs JAX's CUDA plugin"
)
@pytest.mark.slow
def test_training_step_compiles_for_hopper_without_spills():
    sizes = ["--hidden", "64", "320", "600", "--batch", "16", "--steps", "8"]
    found = subprocess.run(
        [sys.executable, "-m", "experiments.hopper", *sizes, "--dtypes", "bfloat16"],
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    kernels = [line.split() for line in found.stdout.splitlines() if "gru_" in line]
    assert len(kernels) == 8  # two equations, of one block and of a cluster of five, each way
    assert all(line[-1] == "0" for line in kernels)
    assert found.stdout.count("at most 512 rows") == 2
