"""Who owns the time of a step: plain PyTorch and fused, by convolution and by pass, beside the machine's limits.

    python benchmarks/profile_step.py --model resnet50 --dtype fp32 --batch-size 8 --markdown profile.md

The two networks take turns under PyTorch's profiler; each figure is the smallest of the turns. A convolution's row adds
up its forward, or its backward, over all layers with the same input. "other" is what neither a convolution nor a pass
records: Python, autograd, the optimizer's gradients. The limits are measured too: the micro-kernel's rate on operands
that stay in cache, and a copy of memory.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter, defaultdict
from datetime import date
from pathlib import Path

import torch
from bench_gemm import peak
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import fused_resnet
from fused_resnet.cli.env import device_name

# The operators that stand for a convolution, and the place of its input among their arguments.
FORWARD = {"aten::convolution": 0, "fused_resnet_cpu::conv_stats": 0, "fused_resnet_cpu::conv_bn_act": 0}
BACKWARD = {"aten::convolution_backward": 1, "fused_resnet_cpu::conv_backward": 1}
Times = dict[str, float]


def owners(call: object) -> Times:
    """Milliseconds of one call by owner: "conv NxCxHxW", "conv backward NxCxHxW", an operator's name, "other"."""
    assert callable(call)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        start = time.perf_counter()
        call()
        wall = (time.perf_counter() - start) * 1e3
    events = found.events() or []
    inside = {id(child) for e in events if e.name in FORWARD | BACKWARD for child in _descendants(e)}
    times: Counter[str] = Counter()
    for event in events:
        if id(event) in inside:
            continue
        for kind, names in (("conv", FORWARD), ("conv backward", BACKWARD)):
            if event.name in names:
                size = event.input_shapes[names[event.name]]
                times[f"{kind} {'x'.join(map(str, size))}"] += event.cpu_time_total / 1e3
                break
        else:
            if event.name.startswith(("aten::", "fused_resnet_cpu::")):
                times[event.name] += event.self_cpu_time_total / 1e3
    times["other"] = wall - sum(times.values())
    return times


def _descendants(event: object) -> list[object]:
    children = list(event.cpu_children)  # type: ignore[attr-defined]
    return children + [d for child in children for d in _descendants(child)]


def bandwidth() -> float:
    """GB/s of a copy of 128 MiB, read and written."""
    source = torch.rand(1 << 25)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(8):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return 2e-9 * source.nbytes / best


def gflop(model: nn.Module, call: object) -> float:
    """The work of a plain step's convolutions and matrix products, in 10^9 floating-point operations."""
    assert callable(call)
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() * 1e-9


def table(plain: Times, fused: Times, least: float = 0.005) -> list[str]:
    """Rows of both, the largest first; what takes less than ``least`` of the step is added up."""
    total = sum(plain.values()), sum(fused.values())
    rows = ["| owner | plain, ms | fused, ms | ratio |", "|---|---|---|---|"]
    rest = [0.0, 0.0]
    for name in sorted(plain | fused, key=lambda n: -max(plain.get(n, 0), fused.get(n, 0))):
        p, f = plain.get(name, 0.0), fused.get(name, 0.0)
        if max(p / total[0], f / total[1]) < least:
            rest = [rest[0] + p, rest[1] + f]
            continue
        rows.append(f"| {name} | {p:.1f} | {f:.1f} | {f'{p / f:.2f}' if p and f else ''} |")
    rows.append(f"| the rest | {rest[0]:.1f} | {rest[1]:.1f} | |")
    rows.append(f"| **sum** | {total[0]:.0f} | {total[1]:.0f} | {total[0] / total[1]:.2f} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--mode", choices=("training", "evaluation"), default="training")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    networks = []
    for change in (fused_resnet.unfuse, fused_resnet.fuse):
        torch.manual_seed(0)
        model = fused_resnet.unfuse(getattr(fused_resnet.models, args.model)())
        networks.append(change(model.to(memory_format=torch.channels_last)).train(args.mode == "training"))
    shape = (args.batch_size, 3, args.size, args.size)
    x = torch.randn(shape).to(memory_format=torch.channels_last)

    def step(model: nn.Module) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=args.dtype == "bf16"):
            if args.mode == "evaluation":
                with torch.no_grad():
                    model(x)
                return
            out: Tensor = model(x)
        model.zero_grad()
        out.float().square().mean().backward()

    turns: list[dict[str, list[float]]] = [defaultdict(list), defaultdict(list)]
    for model in networks:  # captures, choices, caches
        step(model)
        step(model)
    for _ in range(args.repeats):
        for model, found in zip(networks, turns, strict=True):
            for name, ms in owners(lambda model=model: step(model)).items():
                found[name].append(ms)
    plain, fused = ({name: min(ms) for name, ms in found.items()} for found in turns)
    work, rate, copy = gflop(networks[0], lambda: step(networks[0])), peak(5, torch.float32), bandwidth()
    lines = [
        f"{device_name(torch.device('cpu'))}, torch {torch.__version__}, {date.today()}: {args.model}, {args.mode}, "
        f"{args.dtype}, batch {args.batch_size}, {args.size}x{args.size}, {args.threads} threads.",
        "",
        *table(plain, fused),
        "",
        f"The convolutions do {work:.0f} GFLOP if each is computed directly. The float32 micro-kernel reaches "
        f"{rate:.0f} GFLOP/s on all threads from cache, {1e3 * work / rate:.0f} ms for that work. "
        f"Winograd's algorithm does less. A copy of memory reaches {copy:.0f} GB/s.",
    ]
    print("\n".join(lines))
    if args.markdown:
        args.markdown.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
