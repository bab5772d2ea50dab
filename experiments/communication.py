"""On paper: what accelerators send each other for an update of a GRU, beside what they compute.

    python -m experiments.communication

A layer of H = I = 1024, float32 gradients, bfloat16 products. Nothing is measured: the figures of
the accelerator are its data sheet's, those of latency are assumptions, and all of them stand below.
"""

import argparse
import math
import sys

HIDDEN_SIZE, NUM_STEPS = 1024, 256
PEAK = 989e12  # bfloat16 floating-point operations a second, dense (H100 SXM)
NODE = 8  # accelerators joined by NVLink
NVLINK = 450e9  # bytes a second each way (900 GB/s both ways)
NETWORK = 50e9  # bytes a second each way and accelerator (InfiniBand NDR, 400 Gb/s)
HOP = 5e-6  # seconds a message takes however short it is: assumed
STEP = 10e-6  # seconds a time step takes however few its rows: assumed, a few kernel launches


def parameter_bytes(hidden_size=HIDDEN_SIZE):
    """Of a layer's gradient in float32."""
    return 4 * (3 * hidden_size * 2 * hidden_size + 6 * hidden_size)


def sent_bytes(num_devices, size):
    """By each accelerator, to add up arrays of that size: it hands on n - 1 parts of n, twice."""
    return 2 * (num_devices - 1) / num_devices * size


def sum_seconds(num_devices, size):
    """Within nodes over NVLink, then each accelerator its part between nodes."""
    inside = min(num_devices, NODE)
    nodes = num_devices // inside
    seconds = sent_bytes(inside, size) / NVLINK + sent_bytes(nodes, size / inside) / NETWORK
    return seconds + 2 * HOP * math.log2(num_devices)


def product_seconds(rows, hidden_size=HIDDEN_SIZE):
    """The products of an update at peak: 6TBH(I + H) operations forward, twice that backward."""
    return 18 * NUM_STEPS * rows * hidden_size * 2 * hidden_size / PEAK


def update_seconds(rows):
    """The products, or the loop's T steps there and T back where these take longer."""
    return max(product_seconds(rows), 2 * NUM_STEPS * STEP)


def gather_seconds(num_devices, rows):
    """Of a bfloat16 state [rows, H] of which each accelerator has made its part of H."""
    link = NVLINK if num_devices <= NODE else NETWORK
    size = 2 * rows * HIDDEN_SIZE
    return HOP * math.log2(num_devices) + (num_devices - 1) / num_devices * size / link


def step_seconds(num_devices, rows):
    """The recurrent product of one time step at peak, each accelerator its part of H."""
    return 6 * rows * HIDDEN_SIZE**2 / num_devices / PEAK


def data_parallel_table():
    size = parameter_bytes()
    lines = [
        "| accelerators | rows each | sent by each, MB | sum, ms | products, ms | update, ms | "
        "sum / products | sum / update |",
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
        "| accelerators | rows | product of a step, us | joining its state, us |",
        "|---|---|---|---|",
    ]
    for num_devices, rows in ((1, 64), (8, 64), (8, 512), (8, 4096), (64, 4096)):
        joining = gather_seconds(num_devices, rows)
        lines.append(
            f"| {num_devices} | {rows:,} | {1e6 * step_seconds(num_devices, rows):.2f} | "
            f"{1e6 * joining:.1f} |"
        )
    return lines


def limits():
    """Where dividing further stops paying, in rows for each accelerator."""
    a_row = product_seconds(1)
    return {
        "the loop's steps take longer than their products below": 2 * NUM_STEPS * STEP / a_row,
        "the sum over 1,024 takes longer than the products below": (
            sum_seconds(1024, parameter_bytes()) / a_row
        ),
    }


def main(argv=None):
    parser = argparse.ArgumentParser(
        "python -m experiments.communication", description="Bytes sent against compute, on paper."
    )
    parser.parse_args(argv)
    print(f"H = I = {HIDDEN_SIZE}, T = {NUM_STEPS}, gradient {parameter_bytes() / 1e6:.1f} MB\n")
    print("The batch divided: 512 rows for each accelerator, then 4,096 for all of them:\n")
    print("\n".join(data_parallel_table()) + "\n")
    for name, rows in limits().items():
        print(f"{name}: {rows:.0f} rows")
    print("\nH divided inside of the loop over time:\n")
    print("\n".join(hidden_table()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
