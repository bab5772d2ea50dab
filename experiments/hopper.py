"""Compiles the fused kernels for an H100 on a machine without a GPU, and prints what ptxas reports.

    pip install "jax[cuda13]"               # the compiler; no GPU and no driver are needed
    python -m experiments.hopper            # a minute: training steps of several sizes
    python -m experiments.hopper --hidden 128 --batch 64 --dtypes bfloat16 --resets after

JAX compiles ahead of time for a device of which it has only a description
(`jax.experimental.topologies`), down to machine code. For both kernels of a training step the table
gives the registers and the spilled bytes per thread. A thread has at most 255 registers; a kernel
that needs more spills them to memory, which is correct but slower. If a size does not fit, its row
gives the reason. Compilation does not prove that the results are right; the tests check those, in
JAX's interpreter or on a GPU. With MOSAIC_GPU_DUMP_PTX=1 in the environment `compile_step` returns
the kernels' PTX too.
"""

import contextlib
import itertools
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import jaxgru
from experiments import runs
from jaxgru.experimental.fused import HopperKernel

# An H100 SXM, from NVIDIA's data sheet and the CUDA programming guide; XLA needs every field.
# Without versions it assumes a driver that cannot put loops and copies into CUDA graphs.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132 threads_per_warp: 32 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 l2_cache_size: 52428800
  memory_bandwidth: 3352320000000 device_memory_size: 84978434048
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
# Without a device XLA cannot choose among cuBLAS algorithms or time them.
OPTIONS = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
SPECS = {"before": jaxgru.CHO_2014, "after": jaxgru.PYTORCH}
DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}
KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+?)(?:_mosaic_gpu_kernel)?' for '(?P<target>\w+)'"
    r".*?(?P<spilled>\d+) bytes spill stores.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def describe_device() -> Any:
    """The description of an H100.

    Raises:
      ImportError: JAX's compiler for GPUs is not installed.
    """
    try:
        import jax_cuda13_plugin  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            "JAX's CUDA plugin must be installed to compile for a GPU, got none; "
            "pip install 'jax[cuda13]' (no GPU is needed)."
        ) from error
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # that check needs a driver
    jax.devices()  # loads the plugins
    return topologies.get_topology_desc("", "cuda", target_config=H100, topology="1x1x1").devices[0]


def compile_step(device: Any, reset: str, dtype: str, size: tuple[int, int, int]) -> str:
    """Compiles value and gradients of a layer; returns what ptxas reports of its kernels."""
    num_steps, batch_size, hidden_size = size
    place = SingleDeviceSharding(device)

    def loss(params, xs, h0):
        kernel = jaxgru.BPTT(kernel=HopperKernel())
        h_last, hs = jaxgru.gru(params, xs, h0, gradient=kernel)
        return h_last.astype(jnp.float32).sum() + (hs.astype(jnp.float32) ** 2).sum()

    def arguments():
        options = {"spec": SPECS[reset], "dtype": DTYPES[dtype]}
        params = jaxgru.init_gru(jax.random.key(0), hidden_size, hidden_size, **options)
        xs = jnp.zeros((num_steps, batch_size, hidden_size), DTYPES[dtype])
        return params, xs, xs[0]

    shapes = jax.tree.map(
        lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=place), jax.eval_shape(arguments)
    )
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)), out_shardings=place)
    lowered = step.trace(*shapes).lower()
    with compiler_messages() as messages:
        lowered.compile(compiler_options=OPTIONS)
    return "".join(messages)


@contextlib.contextmanager
def compiler_messages() -> Iterator[list[str]]:
    """Collects what the compiler writes to file descriptor 1, past `sys.stdout`."""
    messages: list[str] = []
    before, previous = os.dup(1), os.environ.get("MOSAIC_GPU_DUMP_PTXAS")
    os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
    with tempfile.TemporaryFile("w+") as file:
        sys.stdout.flush()
        os.dup2(file.fileno(), 1)
        try:
            yield messages
        finally:
            os.dup2(before, 1)
            os.close(before)
            os.environ.pop("MOSAIC_GPU_DUMP_PTXAS")
            if previous is not None:
                os.environ["MOSAIC_GPU_DUMP_PTXAS"] = previous
            file.seek(0)
            messages.append(file.read())


def read_kernels(messages: str) -> list[dict[str, Any]]:
    """Name, target, registers and spilled bytes per thread of each kernel in the messages."""
    return [
        {
            "kernel": found["name"],
            "target": found["target"],
            "registers": int(found["registers"]),
            "spilled_bytes": int(found["spilled"]),
        }
        for found in KERNEL.finditer(messages)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; returns 0, 1 if a step did not give two kernels, 2 without the compiler."""
    parser = runs.make_parser("hopper", "Compiles the fused kernels for an H100, without a GPU.")
    add = parser.add_argument
    add("--hidden", type=int, nargs="+", default=[64, 128, 192, 256, 512], help="sizes H")
    add("--batch", type=int, nargs="+", default=[16, 128], help="numbers B of sequences")
    add("--steps", type=int, default=512, help="T of every sequence")
    add("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES), help="of the arrays")
    add("--resets", nargs="+", choices=list(SPECS), default=list(SPECS), help="equations")
    args = parser.parse_args(argv)
    return runs.run_script("hopper", lambda: compile_all(args))


def compile_all(args: Any) -> int:
    """Compiles each case and prints the table."""
    from tqdm import tqdm

    device = describe_device()
    cases = list(itertools.product(args.resets, args.dtypes, args.hidden, args.batch))
    lines, complete = [], True
    for reset, dtype, hidden_size, batch_size in tqdm(cases, desc="compile", disable=None):
        case = f"{reset:8}{dtype:10}{hidden_size:5}{batch_size:6}  "
        try:
            messages = compile_step(device, reset, dtype, (args.steps, batch_size, hidden_size))
        except ValueError as error:
            lines.append(case + str(error))
            continue
        kernels = read_kernels(messages)
        complete &= len(kernels) == 2
        lines += [
            f"{case}{k['kernel']:14}{k['registers']:10}{k['spilled_bytes']:9}" for k in kernels
        ]
    print(f"for {device.device_kind}, JAX {jax.__version__}, T={args.steps}; bytes per thread")
    print(f"{'reset':8}{'dtype':10}{'H':>5}{'B':>6}  {'kernel':14}{'registers':>10}{'spilled':>9}")
    print("\n".join(lines))
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
