"""The CPU's micro-kernel on ResNet-50's 1x1 convolutions, beside at::mm and PyTorch's convolution, in GFLOP/s.

    python benchmarks/bench_gemm.py --threads 1 2 --json benchmarks/results/gemm-<machine>-<date>/results.json

Every shape in three products: the output (fprop), the input's gradient (dgrad) and the weight's (wgrad). The candidates
take turns, the medians are compared. The right operand is packed in every call, as in a training step. "peak" is the
kernel's own rate on operands that stay in cache. One thread is timed by its CPU time, which excludes other processes.
The kernel's results are float32, those of the other candidates have the operands' dtype.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_resnet.backends import load
from fused_resnet.cli.console import write_json
from fused_resnet.cli.env import describe, device_name
from fused_resnet.measure import interleaved, quantiles

# (inputs, outputs, side of the image) of the stages' distinct 1x1 convolutions at stride 1
SHAPES = tuple(
    shape
    for before, width, side in ((64, 64, 56), (256, 128, 28), (512, 256, 14), (1024, 512, 7))
    for shape in dict.fromkeys(((before, width, side), (4 * width, width, side), (width, 4 * width, side)))
)
HEAD = "| convolution | product | kernel | mm | conv2d | kernel / best |\n|---|---|---|---|---|---|"
Calls = dict[str, Callable[[], Any]]


def ours(a: Tensor, b: Tensor, out: Tensor) -> None:
    torch.ops.fused_resnet_cpu.matmul(a, b, out, False)


def products(batch: int, c: int, k: int, side: int, dtype: torch.dtype) -> dict[str, Calls]:
    """The three products of a convolution, each by every candidate: {"fprop": {"kernel", "mm", "conv2d"}}."""
    rows = batch * side * side
    x, dy, w = (t.to(dtype) for t in (torch.randn(rows, c), torch.randn(rows, k), torch.randn(k, c) / c**0.5))
    image, grad = (t.view(batch, side, side, -1).permute(0, 3, 1, 2) for t in (x, dy))
    weight = w.view(k, c, 1, 1)

    def backward(*mask: bool) -> Any:
        where = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)
        return torch.ops.aten.convolution_backward(grad, image, weight, None, *where, mask)

    def by(a: Tensor, b: Tensor, conv: Callable[[], Any]) -> Calls:
        out, same = (torch.empty(a.shape[0], b.shape[1], dtype=t) for t in (torch.float32, dtype))
        return {"kernel": lambda: ours(a, b, out), "mm": lambda: torch.mm(a, b, out=same), "conv2d": conv}

    return {
        "fprop": by(x, w.t(), lambda: torch.conv2d(image, weight)),
        "dgrad": by(dy, w, lambda: backward(True, False, False)),
        "wgrad": by(dy.t(), x, lambda: backward(False, True, False)),
    }


def medians(calls: Calls, repeats: int) -> dict[str, float]:
    """Median seconds per call of each."""
    device = torch.device("cpu")
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times = interleaved(calls, device, repeats=(repeats, repeats), budget_s=0, sample_s=0.005, clock=clock)
    return {name: quantiles(samples)["median"] for name, samples in times.items()}


def peak(repeats: int, dtype: torch.dtype) -> float:
    """GFLOP/s of the kernel where nothing waits for memory."""
    a, b = torch.randn(504, 256).to(dtype), torch.randn(256, 256).to(dtype)
    out = torch.empty(504, 256)
    return 2e-9 * 504 * 256 * 256 / medians({"kernel": lambda: ours(a, b, out)}, repeats)["kernel"]


def measure(threads: int, batch: int, repeats: int, dtype: torch.dtype) -> dict[str, Any]:
    torch.set_num_threads(threads)
    rows = []
    for c, k, side in SHAPES:
        work = 2e-9 * batch * side * side * c * k
        for kind, calls in products(batch, c, k, side, dtype).items():
            seconds = medians(calls, repeats)
            rows.append({"conv": f"{c}->{k} @{side}", "product": kind} | {n: work / s for n, s in seconds.items()})
            print_row(rows[-1])
    return {"dtype": str(dtype), "threads": threads, "peak": peak(repeats, dtype), "rows": rows}


def print_row(row: dict[str, Any]) -> None:
    rates = [row[name] for name in ("kernel", "mm", "conv2d")]
    figures = " | ".join(f"{rate:6.1f}" for rate in rates)
    print(f"| {row['conv']:13} | {row['product']} | {figures} | {rates[0] / max(rates[1:]):.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    backend, reason = load("cpu")
    if backend is None:
        parser.error(reason)
    print(f"{device_name(torch.device('cpu'))}; torch {torch.__version__}; {date.today()}; batch {args.batch}")
    found = []
    with torch.no_grad():
        for name, threads in itertools.product(args.dtypes, args.threads):
            print(f"\n{name}, {threads} thread(s), GFLOP/s\n\n{HEAD}")
            found.append(measure(threads, args.batch, args.repeats, getattr(torch, name)))
            print(f"\npeak: {found[-1]['peak']:.1f}")
    if args.json:
        head = describe() | {"date": str(date.today()), "batch": args.batch}
        write_json(args.json, head | {"gflops": found})


if __name__ == "__main__":
    main()
