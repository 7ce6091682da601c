"""What the machine can do at most: a large copy, large matrix products, products of narrow models.

    pytest bench/ops/bench_ceilings.py -s

Operands are random: products of zeros can run faster than any model's.
"""

import statistics

import pytest
import torch

from bench.filing import save_table
from bench.sizes import DTYPES
from bench.timing import copy_bandwidth, devices, rounds_of

WIDTHS = (384, 768, 1280)  # the predictor's, B's and H's: x (T, K) by a weight (4 K, K)
SIZES = {"cuda": (32768, 8192), "cpu": (1024, 512)}  # tokens T, side of the square product


@pytest.mark.parametrize("device", devices())
def test_ceilings(device):
    tokens, side = SIZES[device]
    products = {"square": (side, side, side)}
    products |= {f"K={width}": (tokens, 4 * width, width) for width in WIDTHS}
    functions = {}
    for name, (m, n, k) in products.items():
        a = torch.randn(m, k, device=device, dtype=DTYPES[device])
        b = torch.randn(n, k, device=device, dtype=DTYPES[device])
        out = torch.empty(m, n, device=device, dtype=DTYPES[device])
        functions[name] = [lambda a=a, b=b, out=out: torch.mm(a, b.t(), out=out)] * 4
    rows = {}
    for name, seconds in rounds_of(functions, device).items():
        m, n, k = products[name]
        calls = 4 if device == "cuda" else 1
        per_call = statistics.median(seconds) / calls
        rows[name] = {"us": 1e6 * per_call, "teraflops": 2 * m * n * k / per_call / 1e12}
        print(f"{name:8} {m} x {n} x {k}: {rows[name]['teraflops']:.2f} TFLOP/s")
    bandwidth = copy_bandwidth(device) / 1e9
    print(f"copy, read plus write: {bandwidth:.0f} GB/s")
    title = f"ceilings, {str(DTYPES[device]).removeprefix('torch.')}"
    save_table(title, device, rows, op="ceilings", copy_gigabytes_per_second=bandwidth)
    assert all(row["teraflops"] > 0 for row in rows.values())
