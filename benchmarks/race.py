"""The race: frozen networks against every alternative for inference on a CPU, each in its best setting.

    python benchmarks/race.py                                            # everything: a quarter of an hour per network
    python benchmarks/race.py --networks resnet50 --batches 1 --dtypes fp32
    python benchmarks/race.py --peers onnxruntime openvino --callers     # fewer peers; and latencies of several callers

All take the same images and the same number of threads, in one process, in turns. Before each sample nothing runs for a
moment, because the libraries' threads spin after a call, and one call is not timed. Every output is compared with plain
PyTorch's. A peer that is not installed, or does not take a case, is listed with the reason.

Writes race.json after every case and goes on where an earlier run with the same output stopped; writes race.md and
race.png. Exit code 1 if a frozen network is slower than the fastest peer.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from grid import build
from rich.progress import track
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fused_resnet as fr
from fused_resnet import measure
from fused_resnet.cli.env import describe, device_name

NETWORKS = ("resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0", "regnet_y_400mf")
BATCHES, DTYPES = (1, 8, 32), {"fp32": torch.float32, "bf16": torch.bfloat16}
CPU = torch.device("cpu")
# The fewest and the most rounds, the seconds after which no round starts, the seconds of a sample and of a rest.
REPEATS, BUDGET_S, SAMPLE_S, REST_S = (7, 31), 15.0, 0.05, 0.05
# Calls of each caller whose latencies are kept, and the numbers of callers.
LATENCIES, CALLERS = 60, (1, 2, 4)
# An output that is further from plain PyTorch's, relative to its norm, is wrong.
WRONG = {"fp32": 1e-3, "bf16": 5e-2}


class Case(NamedTuple):
    """What is run."""

    network: str
    dtype: str
    batch: int
    size: int

    def __str__(self) -> str:
        return f"{self.network} {self.dtype} {self.batch}x3x{self.size}x{self.size}"


# ---------------------------------------------------------------------------------------------------- peers
# Each maps a plain network in eval mode and its images, in the case's dtype, to a call that returns the output.
def eager(net: nn.Module, x: Tensor) -> measure.Step:
    return lambda: net(x)


def eager_last(net: nn.Module, x: Tensor) -> measure.Step:
    net, x = net.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    return lambda: net(x)


def compiled(**options: Any) -> Callable[[nn.Module, Tensor], measure.Step]:
    """torch.compile with inductor."""

    def prepare(net: nn.Module, x: Tensor) -> measure.Step:
        torch.compiler.reset()
        net, x = net.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
        function = torch.compile(net, **options)
        return lambda: function(x)

    return prepare


def onnx_file(net: nn.Module, x: Tensor, folder: str) -> str:
    path = f"{folder}/network.onnx"
    torch.onnx.export(net, (x,), path, dynamo=True, external_data=False, verbose=False)
    return path


def onnxruntime(net: nn.Module, x: Tensor) -> measure.Step:
    import onnxruntime as runtime

    if x.dtype != torch.float32:
        raise NotImplementedError(f"its CPU provider has no {x.dtype}")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        session = runtime.InferenceSession(onnx_file(net, x, folder), options, providers=["CPUExecutionProvider"])
    given = {session.get_inputs()[0].name: x.numpy()}
    return lambda: torch.from_numpy(session.run(None, given)[0])


def openvino(net: nn.Module, x: Tensor) -> measure.Step:
    import openvino as runtime

    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "bf16" if x.dtype == torch.bfloat16 else "f32",
    }  # fmt: skip
    x = x.float()
    with tempfile.TemporaryDirectory() as folder:
        core = runtime.Core()
        model = core.compile_model(core.read_model(onnx_file(net.float(), x, folder)), "CPU", settings)
    requests, given = threading.local(), x.numpy()

    def call() -> Tensor:
        if not hasattr(requests, "of"):  # a request serves one caller at a time
            requests.of = model.create_infer_request()
        return torch.from_numpy(requests.of.infer([given])[0])

    return call


def frozen(net: nn.Module, x: Tensor) -> measure.Step:
    return _of(fr.freeze(net, x, dtype=x.dtype), x)


def _of(net: nn.Module, x: Tensor) -> measure.Step:
    return lambda: net(x)


OURS = "fused_resnet"
PEERS: dict[str, Callable[[nn.Module, Tensor], measure.Step]] = {
    "eager": eager,
    "eager, channels_last": eager_last,
    "compile": compiled(),
    "compile, max-autotune": compiled(mode="max-autotune"),
    "compile, freezing": compiled(options={"freezing": True}),
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    OURS: frozen,
}


# ---------------------------------------------------------------------------------------------------- a case
def raced(case: Case, peers: list[str], callers: bool, budget_s: float) -> dict[str, Any]:
    """The case's row of race.json."""
    net = build(case.network).eval().to(DTYPES[case.dtype])
    x = torch.randn(case.batch, 3, case.size, case.size).to(DTYPES[case.dtype])
    with torch.inference_mode():
        want = net(x).float()
        with FlopCounterMode(display=False) as counter:
            net(x)
    row: dict[str, Any] = {**case._asdict(), "flops": counter.get_total_flops(), "missing": {}, "peers": {}}
    steps: dict[str, measure.Step] = {}
    for name in peers:
        try:
            with torch.no_grad():
                step = PEERS[name](copy.deepcopy(net), x)
            with torch.inference_mode():
                error = float((step().float() - want).norm() / want.norm())
        except ModuleNotFoundError as missing:
            row["missing"][name] = f"not installed: {missing.name}"
            continue
        except Exception as refused:  # each library has errors of its own
            row["missing"][name] = f"{type(refused).__name__}: {str(refused).splitlines()[0] if str(refused) else ''}"
            continue
        if not error <= WRONG[case.dtype]:
            row["missing"][name] = f"wrong: {error:.2g} from plain PyTorch"
            continue
        steps[name] = step
        row["peers"][name] = {"error": error}
    with torch.inference_mode():
        found = measure.interleaved(
            steps, CPU, repeats=REPEATS, budget_s=budget_s, sample_s=min(SAMPLE_S, budget_s / 10), rest_s=REST_S
        )
        for name, times in found.items():
            row["peers"][name] |= measure.figures(times, case.batch, []) | {"times_s": times}
            row["peers"][name]["peak_bytes"] = measure.peak_bytes(steps[name], CPU)
            if callers and case.batch == 1:
                row["peers"][name]["latency_ms"] = {n: latencies(steps[name], n) for n in CALLERS}
    others = {name: times for name, times in found.items() if name != OURS}
    if OURS in found and others:
        best = min(others, key=lambda name: measure.quantiles(others[name])["median"])
        row |= {"best_peer": best, "ratio": measure.quantiles(measure.ratios(others[best], found[OURS]))}
    return row


def latencies(step: measure.Step, callers: int) -> dict[str, float]:
    """Milliseconds of a call while so many threads call at once: median and 99th percentile."""
    found: list[float] = []

    def call() -> None:
        with torch.inference_mode():
            for i in range(LATENCIES + 3):
                start = time.perf_counter()
                step()
                if i >= 3:
                    found.append(1e3 * (time.perf_counter() - start))

    threads = [threading.Thread(target=call) for _ in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    times = torch.tensor(found, dtype=torch.float64)
    return {"median": float(times.median()), "p99": float(times.quantile(0.99))}


def peak_flops(dtype: torch.dtype, side: int = 1024) -> float:
    """Operations per second of a matrix product, the best of ten: the machine's limit for direct convolutions."""
    a = torch.randn(side, side).to(dtype)
    return 2 * side**3 / min(measure.seconds(lambda: a @ a, CPU) for _ in range(10))


# ---------------------------------------------------------------------------------------------------- the report
def key(row: dict[str, Any]) -> Case:
    return Case(*(row[name] for name in Case._fields))


def lines(found: dict[str, Any]) -> Iterator[str]:
    """race.md, line by line."""
    rows = found["cases"]
    ratios = [row["ratio"]["median"] for row in rows if "ratio" in row]
    yield "# Frozen networks against the alternatives: images per second"
    yield ""
    won = sum(ratio >= 1 for ratio in ratios)
    yield (
        f"{found['device']}, torch {found['versions']['torch']}, {found['date']}. Written by `make race`: median, and "
        f"in brackets the 20th and 80th percentile. {OURS} is at least as fast as the fastest peer in {won} of "
        f"{len(ratios)} cases (**bold** where it is not). The last column is the median of the paired ratios to the "
        "fastest peer."
    )
    yield ""
    yield "![images per second](race.png)"
    names = [name for name in PEERS if any(name in row["peers"] for row in rows)]
    yield ""
    yield f"| case | {' | '.join(names)} | to the fastest peer |"
    yield "|---|" + "---|" * (len(names) + 1)
    for row in rows:
        ratio = f"{row['ratio']['median']:.2f} ({row['best_peer']})" if "ratio" in row else "–"
        ratio = f"**{ratio}**" if "ratio" in row and row["ratio"]["median"] < 1 else ratio
        yield f"| {key(row)} | {' | '.join(shown(row['peers'].get(name)) for name in names)} | {ratio} |"
    callers = [row for row in rows if any("latency_ms" in peer for peer in row["peers"].values())]
    for row in callers:
        yield ""
        yield f"| {key(row)}, ms: median, 99th percentile | {' | '.join(f'{n} callers' for n in CALLERS)} |"
        yield "|---|" + "---|" * len(CALLERS)
        for name, peer in row["peers"].items():
            times = peer["latency_ms"]
            figures = (f"{times[n]['median']:.1f}, {times[n]['p99']:.1f}" for n in map(str, CALLERS))
            yield f"| {name} | {' | '.join(figures)} |"
    reasons = {(name, reason) for row in rows for name, reason in row["missing"].items()}
    if reasons:
        yield ""
        yield from (f"- {name}: {reason}" for name, reason in sorted(reasons))


def shown(peer: dict[str, Any] | None) -> str:
    """One cell of the table."""
    if peer is None:
        return "–"
    q = peer["images_per_s"]
    return f"{q['median']:.1f} ({q['p20']:.1f}–{q['p80']:.1f})"


def draw(found: dict[str, Any], path: Path) -> None:
    """Bars of every peer for each case, and the machine's limit as a line."""
    from matplotlib.figure import Figure

    rows = [row for row in found["cases"] if row["peers"]]
    columns = min(len(rows), 3)
    figure = Figure(figsize=(4.2 * columns, 2.6 * -(-len(rows) // columns)), layout="constrained")
    for i, row in enumerate(rows):
        ax = figure.add_subplot(-(-len(rows) // columns), columns, i + 1)
        names = [name for name in PEERS if name in row["peers"]]
        bars = [row["peers"][name]["images_per_s"]["median"] for name in names]
        ax.barh(names, bars, color=["#e4572e" if name == OURS else "#9aa0a6" for name in names])
        limit = found["peak_flops"][row["dtype"]] * row["batch"] / row["flops"]
        ax.axvline(limit, color="#202124", linestyle="--", linewidth=0.8)
        ax.set_title(f"{key(row)}", fontsize=9)
        ax.tick_params(labelsize=7)
        ax.invert_yaxis()
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle("images per second; dashed: a matrix product's rate, for direct convolutions", fontsize=9)
    figure.savefig(path, dpi=130)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=NETWORKS, metavar="NAME")
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES, metavar="N")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), metavar="NAME")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), metavar="NAME", help=", ".join(PEERS))
    parser.add_argument("--size", type=int, default=224, help="of the images (224)")
    parser.add_argument("--seconds", type=float, default=BUDGET_S, help=f"per case, about ({BUDGET_S:.0f})")
    parser.add_argument("--callers", action="store_true", help=f"latencies of {', '.join(map(str, CALLERS))} callers")
    parser.add_argument("--output", type=Path, default=Path("race-report"), help="a folder (race-report)")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    path, peers = args.output / "race.json", list(dict.fromkeys([*args.peers, OURS]))
    found = json.loads(path.read_text()) if path.exists() else {"cases": []}
    cases = [Case(*c, args.size) for c in itertools.product(args.networks, args.dtypes, args.batches)]
    done = {key(row) for row in found["cases"]}
    found |= {"peak_flops": {name: peak_flops(dtype) for name, dtype in DTYPES.items()}}
    for case in track([case for case in cases if case not in done], "cases"):
        torch.manual_seed(0)
        found["cases"].append(raced(case, peers, args.callers, args.seconds))
        found |= {"date": datetime.now(UTC).strftime("%Y-%m-%d"), "device": device_name(CPU), **describe()}
        path.write_text(json.dumps(found, indent=1) + "\n")
        found = json.loads(path.read_text())
        (args.output / "race.md").write_text("\n".join(lines(found)) + "\n")
        draw(found, args.output / "race.png")
    lost = [row for row in found["cases"] if "ratio" in row and row["ratio"]["median"] < 1]
    for row in lost:
        print(f"{key(row)}: {row['ratio']['median']:.2f} of {row['best_peer']}")
    print(f"{len(lost)} of {len(found['cases'])} cases lost; written: {path}, {args.output / 'race.md'}")
    return 1 if lost else 0


if __name__ == "__main__":
    raise SystemExit(main())
