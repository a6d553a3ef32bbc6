"""The grid behind "never slower": networks x batches x images x modes x dtypes, ours against plain PyTorch.

    python benchmarks/grid.py                                 # everything: about an hour on two cores
    python benchmarks/grid.py --networks resnet18 --sizes 32  # a part of it

Each cell is the median of the paired ratios of interleaved repeats, both in channels_last: a forward and backward
(``training``) or a forward under no_grad (``evaluation``) of the fused network, or the frozen network (``frozen``).
bf16 is autocast; frozen, a bfloat16 copy of either network.

Writes grid.json after every cell and goes on where an earlier run with the same output stopped; writes grid.md.
Exit code 1 if a cell is below ``SLOWER``.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.util
import itertools
import json
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet import measure, models
from fused_resnet.cli.env import describe, device_name

NETWORKS = ("resnet18", "resnet50", "resnet20", "mobilenet_v2", "efficientnet_b0", "regnet_y_400mf")
BATCHES, SIZES = (1, 8, 32), (32, 64, 128, 224)
MODES, DTYPES = ("training", "evaluation", "frozen"), ("fp32", "bf16")
SLOWER = 0.97
# The fewest and the most rounds, the seconds after which no round starts, the seconds of one sample.
REPEATS, BUDGET_S, SAMPLE_S = (5, 41), 3.0, 0.03
CPU = torch.device("cpu")


class Cell(NamedTuple):
    """What is run, and how."""

    network: str
    mode: str
    dtype: str
    size: int
    batch: int

    def __str__(self) -> str:
        return f"{self.network} {self.mode} {self.dtype} {self.batch}x3x{self.size}x{self.size}"


def build(network: str) -> nn.Module:
    """A network with its own random weights: one of this package's, otherwise torchvision's."""
    torch.manual_seed(0)
    if network in models.list_models():
        made = getattr(models, network)(fused=False)
    else:
        if importlib.util.find_spec("torchvision_shim"):
            importlib.import_module("torchvision_shim")
        made = importlib.import_module("torchvision").models.get_model(network, weights=None)
    return made.to(memory_format=torch.channels_last)


class Pair:
    """A network and its fused copy, which the cells of the network share."""

    def __init__(self, network: str) -> None:
        self.plain = build(network)
        self.fused = fr.fuse(copy.deepcopy(self.plain))

    def steps(self, cell: Cell) -> dict[str, measure.Step]:
        """The calls that a cell compares."""
        torch.manual_seed(1)
        x = torch.randn(cell.batch, 3, cell.size, cell.size).contiguous(memory_format=torch.channels_last)
        labels = torch.arange(cell.batch) % 10
        low = cell.dtype == "bf16"
        if cell.mode == "frozen":
            plain = copy.deepcopy(self.plain).eval()
            plain, x = (plain.bfloat16(), x.bfloat16()) if low else (plain, x)
            with torch.no_grad():
                frozen = fr.freeze(plain, x)
            return {"plain": lambda: infer(plain, x, False), "ours": lambda: infer(frozen, x, False)}
        nets = {"plain": self.plain, "ours": self.fused}
        for net in nets.values():
            net.train(cell.mode == "training")
        if cell.mode == "evaluation":
            return {name: lambda net=net: infer(net, x, low) for name, net in nets.items()}  # type: ignore[misc]
        return {name: lambda net=net: train(net, x, labels, low) for name, net in nets.items()}  # type: ignore[misc]


def infer(net: Any, x: Tensor, autocast: bool) -> Tensor:
    """A forward without gradients."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out: Tensor = net(x)
    return out


def train(net: nn.Module, x: Tensor, labels: Tensor, autocast: bool) -> None:
    """A training step without the optimizer, which is the same for both."""
    net.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = F.cross_entropy(net(x), labels)
    loss.backward()


def measured(pair: Pair, cell: Cell, clock: Callable[[], float] = time.perf_counter) -> dict[str, Any]:
    """The cell's row of grid.json. ``clock``: as of ``measure.seconds``."""
    row: dict[str, Any] = cell._asdict()
    steps = pair.steps(cell)
    try:
        steps["plain"]()
    except ValueError as error:  # one value per channel has no statistics
        return row | {"status": f"plain PyTorch raises: {error}"}
    steps["ours"](), steps["ours"]()  # captures and measures
    found = measure.interleaved(steps, CPU, repeats=REPEATS, budget_s=BUDGET_S, sample_s=SAMPLE_S, clock=clock)
    ratios = measure.quantiles(measure.ratios(found["plain"], found["ours"]))
    ms = {f"{name}_ms": 1e3 * measure.quantiles(found[name])["median"] for name in found}
    return row | {"status": "measured", "ratio": ratios, **ms, "rounds": len(found["ours"])}


def key(row: dict[str, Any]) -> Cell:
    """The cell of a row of grid.json."""
    return Cell(*(row[name] for name in Cell._fields))


def lines(found: dict[str, Any]) -> Iterator[str]:
    """grid.md, line by line."""
    rows = {key(row): row for row in found["cells"]}
    done = [row["ratio"]["median"] for row in rows.values() if row["status"] == "measured"]
    slow = sum(ratio < SLOWER for ratio in done)
    yield "# Ours against plain PyTorch: times as fast"
    yield ""
    yield (
        f"{found['device']}, torch {found['versions']['torch']}, {found['date']}. Written "
        f"by `make grid`: {len(done)} cells, {slow} of them below {SLOWER} (**bold**), the slowest {min(done):.2f}."
    )
    yield "A dash: plain PyTorch raises, because one value per channel has no statistics."
    for network in dict.fromkeys(cell.network for cell in rows):
        places = sorted({(cell.size, cell.batch) for cell in rows if cell.network == network})
        yield ""
        yield f"| {network} | {' | '.join(f'{batch}×{size}²' for size, batch in places)} |"
        yield "|---|" + "---|" * len(places)
        for mode, dtype in itertools.product(MODES, DTYPES):
            row = [rows.get(Cell(network, mode, dtype, *place)) for place in places]
            if any(row):
                yield f"| {mode} {dtype} | {' | '.join(map(shown, row))} |"


def shown(row: dict[str, Any] | None) -> str:
    """One cell of the table."""
    if row is None:
        return ""
    if row["status"] != "measured":
        return "–"
    ratio = row["ratio"]["median"]
    return f"**{ratio:.2f}**" if ratio < SLOWER else f"{ratio:.2f}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, values in (("networks", NETWORKS), ("modes", MODES), ("dtypes", DTYPES)):
        parser.add_argument(f"--{name}", nargs="+", choices=values, default=values, metavar="NAME")
    for name, sizes in (("batches", BATCHES), ("sizes", SIZES)):
        parser.add_argument(f"--{name}", nargs="+", type=int, default=sizes, metavar="N")
    parser.add_argument("--output", type=Path, default=Path("grid-report"), help="a folder (grid-report)")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "grid.json"
    found = json.loads(path.read_text()) if path.exists() else {"cells": []}
    cells = list(map(Cell._make, itertools.product(args.networks, args.modes, args.dtypes, args.sizes, args.batches)))
    wanted = [cell for cell in cells if cell not in {key(row) for row in found["cells"]}]
    pairs: dict[str, Pair] = {}
    for cell in track(wanted, "cells"):
        if cell.network not in pairs:
            torch._dynamo.reset()
            pairs = {cell.network: Pair(cell.network)}
        found["cells"].append(measured(pairs[cell.network], cell))
        found |= {"date": datetime.now(UTC).strftime("%Y-%m-%d"), "device": device_name(CPU), **describe()}
        path.write_text(json.dumps(found, indent=1) + "\n")
        (args.output / "grid.md").write_text("\n".join(lines(found)) + "\n")
    slow = [row for row in found["cells"] if row["status"] == "measured" and row["ratio"]["median"] < SLOWER]
    for row in slow:
        print(f"{key(row)}: {row['ratio']['median']:.2f}")
    print(f"{len(slow)} of {len(found['cells'])} cells below {SLOWER}; written: {path}, {args.output / 'grid.md'}")
    return 1 if slow else 0


if __name__ == "__main__":
    raise SystemExit(main())
