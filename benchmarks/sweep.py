"""Every network of timm and torchvision that has a BatchNorm2d, fused and frozen, compared with itself before; and some
of transformers, segmentation_models_pytorch, ultralytics and resnest, those of them that are installed.

    python benchmarks/sweep.py [--most-parameters 30e6] [--processes 2] [--names timm/resnet50 timm/hrnet_w18]
    python benchmarks/sweep.py --count      # what is in chains alone, on the meta device: writes coverage.json and .md

Where torchvision has no build for this torch, its models can be imported with PYTHONPATH=tests/support
(torchvision_shim.py).

Writes benchmarks/results/sweep.json, a row per network, and sweep.md. Per network, on small images, with telling norms:
in float64 the output, every gradient and every buffer of a training step, of a step with frozen statistics and of an
inference; in float32 the output frozen. Some networks are ill-conditioned with random weights: beside each error
stands the one that a change of the last bit of the parameters (in float32: plain PyTorch's rounding) makes.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import importlib
import importlib.util
import json
import math
import multiprocessing
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet.cli import validate
from fused_resnet.cli.env import describe
from fused_resnet.cli.subjects import LIBRARIES, OneTensor
from fused_resnet.explanation import Row as ModuleRow
from fused_resnet.explanation import units_of
from fused_resnet.fusion.patterns import looks_like_norm
from fused_resnet.planner.sizes import chains_always

RESULTS = Path(__file__).parent / "results"
BATCH, SEED = 2, 11
# An error up to this in float64, and in float32, or up to so many times that of a changed last bit, is rounding.
EXACT, EXACT32, ROUNDINGS = 1e-9, 1e-5, 100.0


def _segmentation(package: Any, network: str) -> nn.Module:
    made: nn.Module = getattr(package, network)(encoder_name="resnet18", encoder_weights=None)
    return made


def _detection(package: Any, network: str) -> nn.Module:
    tasks = importlib.import_module("ultralytics.nn.tasks")
    made: nn.Module = tasks.DetectionModel(f"{network}.yaml", verbose=False)
    return made


BUILDERS: dict[str, Callable[[Any, str], nn.Module]] = LIBRARIES | {
    "segmentation_models_pytorch": _segmentation,
    "ultralytics": _detection,
    "resnest": lambda package, network: getattr(importlib.import_module("resnest.torch"), network)(),
}
# Of these libraries some networks, of any size.
SOME = {
    "transformers": [
        "MobileNetV1Model", "MobileNetV2Model", "ResNetModel", "RegNetModel", "CvtModel", "DetrModel",
        "RTDetrResNetBackbone", "HGNetV2Backbone",
    ],
    "segmentation_models_pytorch": ["Unet", "UnetPlusPlus", "DeepLabV3Plus", "FPN", "Linknet", "MAnet"],
    "ultralytics": ["yolov8n", "yolo11n"],
    "resnest": ["resnest50"],
}  # fmt: skip


def installed(library: str) -> Any:
    """The library, imported; None where it is not installed."""
    with contextlib.suppress(ImportError):
        if importlib.util.find_spec("torchvision_shim"):  # others import torchvision, too
            importlib.import_module("torchvision_shim")
        return importlib.import_module(library)
    return None


def names(library: str) -> list[str]:
    """All classifiers of timm and torchvision; ``SOME`` networks of the others."""
    package = installed(library)
    if library in SOME:
        return [f"{library}/{name}" for name in SOME[library] if package is not None]
    found: list[str] = package.list_models() if library == "timm" else package.models.list_models(package.models)
    return [f"{library}/{name}" for name in found]


def build(name: str) -> nn.Module:
    """With random weights; raises whatever the library raises."""
    library, _, network = name.partition("/")
    package = installed(library)
    if network in ("googlenet", "inception_v3"):  # auxiliary heads want large images
        made: nn.Module = package.models.get_model(network, weights=None, aux_logits=False, init_weights=False)
        return made
    return BUILDERS[library](package, network)


def side(model: nn.Module) -> int:
    """Of the smallest images that suit a network."""
    config: dict[str, Any] = getattr(model, "default_cfg", {})
    if config.get("fixed_input_size"):
        return int(config["input_size"][-1])
    return max(64, config.get("min_input_size", (3, 64, 64))[-1]) if config else 160


def runs(model: nn.Module, x: Tensor, dout: Tensor) -> dict[str, Tensor]:
    """A training step, one with frozen statistics, and inference, from the same buffers each."""
    found = {}
    for mode, gradient in (("train", dout), ("eval", dout), ("inference", None)):
        each = copy.deepcopy(model)
        tensors = validate.run(each, x, gradient, train=mode == "train")
        found |= {f"{mode}: {name}": t for name, t in tensors.items()}
    return found


@torch.no_grad()
def last_bit(model: nn.Module) -> nn.Module:
    """A copy whose parameters are off by up to their last bit."""
    copied = copy.deepcopy(model)
    for p in copied.parameters():
        p.mul_(1 + torch.finfo(p.dtype).eps * torch.empty_like(p).uniform_(-1, 1))
    return copied


def why_not(name: str, most: float) -> str | None:
    """Why a network is left out: without BatchNorm2d, larger than that many parameters, ..."""
    try:
        with torch.device("meta"):
            model = build(name)
    except Exception:  # its constructor computes
        try:
            model = build(name)
        except Exception:  # whatever a library raises: the row says that the network is left out
            return "can't be built"
    if name.partition("/")[0] in SOME:
        return None
    if not any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
        return "no BatchNorm2d"
    return f"more than {most:.0f} parameters" if sum(p.numel() for p in model.parameters()) > most else None


def compared(name: str) -> dict[str, Any]:
    """The row of one network: what was fused, the largest errors, and beside each what rounding alone makes."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    plain = OneTensor(build(name)).double()
    shape = (BATCH, 3, *[side(plain.network)] * 2)
    try:
        with torch.no_grad():
            out = copy.deepcopy(plain).eval()(validate.exact(shape, generator))
        validate.randomise(plain, validate.exact(shape, generator, 0.5, 2.0), generator, validate.BRANCH)
    except (RuntimeError, ValueError, AssertionError, IndexError) as error:
        return {"name": name, "left_out": "refuses small images", "error": str(error)}
    x, dout = validate.exact(shape, generator, 0.5, 2.0), validate.exact(out.shape, generator)
    for t in [*plain.parameters(), *plain.buffers()]:
        t.data = t.data.float().to(t.dtype)  # values that float32 holds, too

    fused = fr.fuse(copy.deepcopy(plain))
    rows, in_chains = chains_of(fused, x)
    pairs = pairs_of(plain, lambda m: m(x))
    ref = runs(plain, x, dout)
    findings = validate.compare(runs(fused, x, dout), runs(last_bit(plain), x, dout), ref, torch.float32)
    worst = max(findings, key=lambda f: f.error / max(EXACT, ROUNDINGS * f.plain_error))
    narrow, image = plain.float().eval(), x.float()
    with torch.no_grad(), chains_always():
        want, got = narrow(image), validate.frozen(narrow, image, torch.float32)(image)
    (frozen,) = validate.compare({"out": got}, {"out": want}, {"out": ref["inference: out"]}, torch.float32)
    return {
        "name": name,
        "modules": sum(row.fused for row in rows),
        "chains": sum(row.chains for row in rows),
        "pairs": len(pairs),
        "pairs_in_chains": len(pairs & in_chains),
        "tensors": len(findings) + 1,
        "worst": worst.name,
        "error": worst.error,
        "error_of_last_bit": worst.plain_error,
        "frozen_error": frozen.error,
        "frozen_error_of_plain": frozen.plain_error,
        "ok": worst.error <= max(EXACT, ROUNDINGS * worst.plain_error)
        and frozen.error <= max(EXACT32, ROUNDINGS * frozen.plain_error),
    }


@torch.no_grad()
def pairs_of(model: nn.Module, call: Callable[[nn.Module], object]) -> set[str]:
    """The norms whose input is what a convolution made in a call of a model in evaluation mode, by their names."""
    made: list[Tensor] = []  # they live until the end: no two have one id
    found: set[str] = set()
    model = copy.deepcopy(model)
    for name, m in model.named_modules():
        if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            m.register_forward_hook(lambda m, args, out: made.append(out))
        elif looks_like_norm(m):

            def look(m: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                if any(args[0] is out for out in made):
                    found.add(name)

            m.register_forward_pre_hook(look)
    call(model.eval())
    return found


@torch.no_grad()
def chains_of(fused: nn.Module, x: Tensor) -> tuple[list[ModuleRow], set[str]]:
    """What explain says of a call, and the norms that are in a chain together with their convolution."""
    called = copy.deepcopy(fused).eval()
    with chains_always():
        called(x)
    return fr.explain(called).rows, {u.norm[0] for u in units_of(called) if u.conv is not None}


def counted(name: str) -> dict[str, Any]:
    """The row of one network without any number computed, but for networks that compute in their constructors."""
    try:
        with torch.device("meta"):
            return _counted(name)
    except RuntimeError:
        return _counted(name)


def _counted(name: str) -> dict[str, Any]:
    plain = OneTensor(build(name)).eval()
    x = torch.ones(BATCH, 3, *[side(plain.network)] * 2)
    rows, in_chains = chains_of(fr.fuse(copy.deepcopy(plain)), x)
    pairs = pairs_of(plain, lambda m: m(x))
    return {
        "name": name,
        "chains": sum(row.chains for row in rows),
        "pairs": len(pairs),
        "pairs_in_chains": len(pairs & in_chains),
        "left": sorted({row.reason for row in rows if not row.fused}),
    }


def tried(name: str, most: float = math.inf, row: Callable[[str], dict[str, Any]] = compared) -> dict[str, Any]:
    """The row of a network, or why there is none."""
    if reason := why_not(name, most):
        return {"name": name, "left_out": reason}
    try:
        return row(name)
    except Exception as error:  # a row says what failed, and the others go on
        return {"name": name, "ok": False, "failed": f"{type(error).__name__}: {error}"}


def coverage(result: dict[str, Any]) -> str:
    """coverage.md."""
    rows = [row for row in result["networks"] if "left_out" not in row]
    right, failed = [row for row in rows if "failed" not in row], [row for row in rows if "failed" in row]
    below = [row for row in right if row["pairs_in_chains"] < row["pairs"]]
    pairs, taken, chains = (sum(row[key] for row in right) for key in ("pairs", "pairs_in_chains", "chains"))
    libraries = ", ".join(f"{name} {version}" for name, version in result["libraries"].items())
    lines = [
        "# How much of whole libraries runs in chains",
        "",
        f"Written by `python benchmarks/sweep.py --count` on {result['date']}",
        f"with torch {result['versions']['torch']}, {libraries};",
        "[coverage.json](coverage.json) has a row for each network.",
        "",
        f"{len(right)} networks with a BatchNorm2d and up to {result['most_parameters']:.0f} parameters have {pairs}",
        f"pairs of a Conv2d and the norm behind it; {taken} pairs are in chains ({100 * taken / max(1, pairs):.1f} %),",
        f"{chains} chains in all. {len(right) - len(below)} networks have all their pairs in chains.",
        f"Left out: {_left_out(result)}.",
        f"Failed: {', '.join(row['name'] + ': ' + row['failed'] for row in failed) or 'none'}.",
        "",
        "| network | pairs | in chains | why not the others |",
        "|---|---|---|---|",
        *(f"| {r['name']} | {r['pairs']} | {r['pairs_in_chains']} | {'; '.join(r['left'])} |" for r in below),
    ]
    return "\n".join(lines) + "\n"


def summary(result: dict[str, Any]) -> str:
    """sweep.md."""
    rows = [row for row in result["networks"] if "left_out" not in row]
    measured, bad = [row for row in rows if "failed" not in row], [row for row in rows if not row["ok"]]
    chains = [row["chains"] for row in measured if row["chains"]]
    pairs = Counter({key: sum(row[key] for row in measured) for key in ("pairs", "pairs_in_chains")})
    exact = sum(row["error"] <= EXACT for row in measured)
    libraries = ", ".join(f"{name} {version}" for name, version in result["libraries"].items())
    lines = [
        "# Networks of timm and torchvision, fused and frozen",
        "",
        f"Written by `python benchmarks/sweep.py` on {result['date']} with torch {result['versions']['torch']} and",
        f"{libraries}; [sweep.json](sweep.json) has a row for each network.",
        "",
        f"{len(rows)} networks with a BatchNorm2d and up to {result['most_parameters']:.0f} parameters;",
        f"{len(chains)} of them run chains, {sum(chains)} in all; of the pairs of a Conv2d and the norm behind it",
        f"{pairs['pairs_in_chains']} of {pairs['pairs']} are in chains"
        f" ({100 * pairs['pairs_in_chains'] / max(1, pairs['pairs']):.1f} %);",
        f"{sum(row['tensors'] for row in measured)} tensors compared.",
        "",
        f"- In float64 {exact} are within a relative error of {EXACT:.0e} in every tensor; in the other",
        f"  {len(measured) - exact} a change of the last bit of the parameters makes 1 % of the error, or more.",
        f"- Frozen in float32 the median network has {_median(measured):.2f} times plain PyTorch's error.",
        f"- Not so: {len(bad) or 'none'}.",
        *(f"  - {row['name']}: {row.get('failed') or _told(row)}" for row in bad),
        f"- Left out: {_left_out(result)}.",
    ]
    return "\n".join(lines) + "\n"


def _left_out(result: dict[str, Any]) -> str:
    left_out = Counter(row["left_out"] for row in result["networks"] if "left_out" in row)
    return ", ".join(f"{n} ({why})" for why, n in left_out.items()) or "none"


def _median(rows: list[dict[str, Any]]) -> float:
    ratios = sorted(row["frozen_error"] / row["frozen_error_of_plain"] for row in rows if row["frozen_error_of_plain"])
    return float(ratios[len(ratios) // 2]) if ratios else math.nan


def _told(row: dict[str, Any]) -> str:
    return (
        f"{row['worst']}: {row['error']:.1e} (the last bit: {row['error_of_last_bit']:.1e}); "
        f"frozen {row['frozen_error']:.1e} (plain: {row['frozen_error_of_plain']:.1e})"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--libraries", nargs="+", default=list(BUILDERS), choices=list(BUILDERS))
    parser.add_argument("--most-parameters", type=float, default=30e6)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--count", action="store_true", help="what is in chains alone")
    parser.add_argument("--names", nargs="+", help="these alone, as timm/resnet50; prints, writes nothing")
    args = parser.parse_args()
    row = counted if args.count else compared
    if args.names:
        rows = [tried(name, row=row) for name in args.names]
        print(json.dumps(rows, indent=1))
        return int(not all(found.get("ok", True) for found in rows))
    every = [name for library in args.libraries for name in names(library)]
    context, task = multiprocessing.get_context("spawn"), partial(tried, most=args.most_parameters, row=row)
    with ProcessPoolExecutor(args.processes, mp_context=context) as pool:
        rows = list(track(pool.map(task, every), "networks", len(every)))
    result = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        **describe(),
        "libraries": {name: version(name) for name in args.libraries if installed(name) is not None},
        "most_parameters": args.most_parameters,
        "networks": rows,
    }
    name, told = ("coverage", coverage) if args.count else ("sweep", summary)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(told(result))
    return int(not all(found.get("ok", True) for found in rows))


if __name__ == "__main__":
    raise SystemExit(main())
