"""Estimates how many bytes accelerators send each other per update, and how long that takes.

    python -m experiments.communication

The layer has H = I = 1024, float32 gradients and bfloat16 products. Nothing is measured. The speeds
of the accelerator come from its data sheet, the latencies are assumptions; the constants below list
all of them.
"""

import math
import sys

from experiments import runs

HIDDEN_SIZE, NUM_STEPS = 1024, 256
PEAK = 989e12  # bfloat16 floating-point operations per second, dense (H100 SXM)
NODE = 8  # accelerators connected by NVLink
NVLINK = 450e9  # bytes per second each way (900 GB/s both ways)
NETWORK = 50e9  # bytes per second each way per accelerator (InfiniBand NDR, 400 Gb/s)
HOP = 5e-6  # least seconds of a message (an assumption)
STEP = 10e-6  # least seconds of a time step: a few kernel launches (an assumption)


def parameter_bytes(hidden_size=HIDDEN_SIZE):
    """The bytes of a layer's gradient in float32."""
    return 4 * (3 * hidden_size * 2 * hidden_size + 6 * hidden_size)


def sent_bytes(num_devices, size):
    """The bytes that each accelerator sends in a ring all-reduce of `size` bytes.

    It passes n - 1 of n parts on, twice.
    """
    return 2 * (num_devices - 1) / num_devices * size


def sum_seconds(num_devices, size):
    """The seconds of an all-reduce: within nodes over NVLink, then between nodes.

    Between nodes, each accelerator sends its own part.
    """
    inside = min(num_devices, NODE)
    nodes = num_devices // inside
    seconds = sent_bytes(inside, size) / NVLINK + sent_bytes(nodes, size / inside) / NETWORK
    return seconds + 2 * HOP * math.log2(num_devices)


def product_seconds(rows, hidden_size=HIDDEN_SIZE):
    """The seconds of an update's products at peak.

    The forward pass has 6TBH(I + H) operations, the backward pass twice as many.
    """
    return 18 * NUM_STEPS * rows * hidden_size * 2 * hidden_size / PEAK


def update_seconds(rows):
    """The seconds of an update: its products, or at least 2T time steps."""
    return max(product_seconds(rows), 2 * NUM_STEPS * STEP)


def gather_seconds(num_devices, rows):
    """The seconds of an all-gather of a bfloat16 state [rows, H] that is divided along H."""
    link = NVLINK if num_devices <= NODE else NETWORK
    size = 2 * rows * HIDDEN_SIZE
    return HOP * math.log2(num_devices) + (num_devices - 1) / num_devices * size / link


def step_seconds(num_devices, rows):
    """The seconds of one time step's recurrent product at peak, divided along H."""
    return 6 * rows * HIDDEN_SIZE**2 / num_devices / PEAK


def data_parallel_table():
    size = parameter_bytes()
    lines = [
        "| accelerators | rows each | sent by each, MB | all-reduce, ms | products, ms | "
        "update, ms | all-reduce / products | all-reduce / update |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for num_devices, rows in ((8, 512), (64, 512), (1024, 512), (64, 64), (1024, 4)):
        total, products = sum_seconds(num_devices, size), product_seconds(rows)
        update = update_seconds(rows)
        lines.append(
            f"| {num_devices:,} | {rows} | {sent_bytes(num_devices, size) / 1e6:.1f} | "
            f"{1e3 * total:.2f} | {1e3 * products:.2f} | {1e3 * update:.2f} | "
            f"{total / products:.2f} | {total / update:.2f} |"
        )
    return lines


def hidden_table():
    lines = [
        "| accelerators | rows | product of a step, us | all-gather of its state, us |",
        "|---|---|---|---|",
    ]
    for num_devices, rows in ((1, 64), (8, 64), (8, 512), (8, 4096), (64, 4096)):
        gather = gather_seconds(num_devices, rows)
        lines.append(
            f"| {num_devices} | {rows:,} | {1e6 * step_seconds(num_devices, rows):.2f} | "
            f"{1e6 * gather:.1f} |"
        )
    return lines


def limits():
    """The numbers of rows per accelerator below which more accelerators no longer help."""
    seconds_per_row = product_seconds(1)
    return {
        "the least time of the loop exceeds that of the products below": (
            2 * NUM_STEPS * STEP / seconds_per_row
        ),
        "the all-reduce over 1,024 takes longer than the products below": (
            sum_seconds(1024, parameter_bytes()) / seconds_per_row
        ),
    }


def main(argv=None):
    description = "Estimates bytes sent and seconds of an update on many accelerators."
    runs.make_parser("communication", description).parse_args(argv)
    print(f"H = I = {HIDDEN_SIZE}, T = {NUM_STEPS}, gradient {parameter_bytes() / 1e6:.1f} MB\n")
    print("Data parallel, with 512 rows per accelerator, then with 4,096 rows in total:\n")
    print("\n".join(data_parallel_table()) + "\n")
    for name, rows in limits().items():
        print(f"{name}: {rows:.0f} rows")
    print("\nTensor parallel, with H divided inside the loop over time:\n")
    print("\n".join(hidden_table()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
