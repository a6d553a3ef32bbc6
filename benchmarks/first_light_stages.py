"""The stages of first_light.py that need torch: each is a function of a ``Run``, called in a process of its own."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from first_light import ROOT, Results
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

sys.path.insert(0, str(ROOT / "tests" / "support"))

import fused_resnet as fr  # noqa: E402
from fused_resnet import measure, planner, use_backend  # noqa: E402
from fused_resnet.backends import Call, ConvBackward, ConvBiasAct, ConvStats, load  # noqa: E402
from fused_resnet.cli import cases, variants  # noqa: E402
from fused_resnet.cli.env import head  # noqa: E402
from fused_resnet.cli.variants import CompileBudget, Variant  # noqa: E402
from fused_resnet.planner.sizes import chains_always  # noqa: E402

BACKENDS = ("cudnn", "cuda", "triton")
CONV_LIBRARY = ROOT / "build" / "conv_train_sm90.so"  # `make gpu-bundle` compiles it

# Channels, output channels, kernel, pixels, stride of some of its convolutions.
RESNET50 = (
    (64, 64, 1, 56, 1), (64, 256, 1, 56, 1), (256, 64, 1, 56, 1), (128, 128, 3, 28, 1), (256, 256, 3, 14, 1),
    (512, 512, 3, 7, 1), (512, 1024, 1, 28, 2),
)  # fmt: skip


class Run:
    """One stage at work.

    Attributes:
        toy: small sizes on a CPU. ok: no number was wrong.
    """

    def __init__(self, results: Results, stage: str, toy: bool, batch: int) -> None:
        if not toy and not torch.cuda.is_available():
            sys.exit("no GPU: torch.cuda.is_available() is False (--dry-run runs every stage on the CPU)")
        torch.backends.cudnn.benchmark = True  # plain PyTorch at its fastest: the shapes never change
        self.results, self.stage, self.toy, self.ok = results, stage, toy, True
        self.device = torch.device("cpu" if toy else "cuda")
        self.model, self.batch, self.size = ("resnet20", 2, 32) if toy else ("resnet50", batch, 224)

    def note(self, **found: Any) -> None:
        """Writes results to the file, now."""
        self.results.note(self.stage, found)

    def subject(self, batch: int) -> cases.Subject:
        """For ``bench``'s cases. Its images are noise, because photographs need packages beyond torch."""
        settings = cases.Settings(self.device, batch, self.size, 0, (3, 10), 0.0 if self.toy else 2.0)
        x = torch.randn(batch, 3, self.size, self.size, generator=torch.Generator().manual_seed(settings.seed))
        return cases.Subject(
            self.model, settings, (x.contiguous(memory_format=torch.channels_last), torch.arange(batch) % 2)
        )

    def network(self) -> tuple[nn.Module, Tensor]:
        """A fused network and a batch for it, channels_last, on the device."""
        torch.manual_seed(0)
        model = fr.fuse(getattr(fr.models, self.model)()).to(self.device, memory_format=torch.channels_last)
        x = torch.randn(self.batch, 3, self.size, self.size, device=self.device)
        return model, x.to(memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------------------------- machine
def machine(run: Run) -> None:
    """Versions, and what the device reaches: bytes per second of a copy, operations per second of two products."""
    run.note(**head(run.device), config={"model": run.model, "batch": run.batch, "size": run.size, "dry_run": run.toy})
    n, side = (1 << 22, 512) if run.toy else (1 << 29, 8192)
    source = torch.empty(n, dtype=torch.bfloat16, device=run.device).normal_()
    target = torch.empty_like(source)
    run.note(bytes_per_s=4 * n / planner.milliseconds(lambda: target.copy_(source), run.device) * 1e3)
    a = torch.randn(side, side, device=run.device, dtype=torch.bfloat16)
    run.note(flops_per_s=2 * side**3 / planner.milliseconds(lambda: a @ a, run.device) * 1e3)
    b = torch.randint(-100, 100, (side, side), device=run.device, dtype=torch.int8)
    run.note(int8_per_s=2 * side**3 / planner.milliseconds(lambda: torch._int_mm(b, b.t()), run.device) * 1e3)


def compile_kernels(run: Run) -> None:
    """Fills Triton's cache, on all cores: kernels of training and of inference, in each configuration."""
    import codegen

    count = len(os.sched_getaffinity(0))
    passes = ("infer",) if run.toy else ("train", "infer")
    calls = codegen.network_calls(
        run.model, torch.bfloat16, "sm_90", passes, run.batch, run.size, every=True, ranks=1 if run.toy else 4
    )
    jobs = [(call, "sm_90") for call in calls[: 1 if run.toy else None]]
    run.note(kernels=len(jobs))
    for i, kernel in enumerate(codegen.compile_all(jobs, 1 if run.toy else count, codegen.cache_call)):
        run.note(compiled=i + 1, last=kernel)


# ---------------------------------------------------------------------------------------------------- numbers
def primitives(run: Run, name: str) -> bool:
    """Every primitive of a backend on small shapes against float64, new memory filled with NaN.

    Returns:
        Whether the backend is available.
    """
    from first_light_calls import compared, small_calls

    name = "cpu" if run.toy and name == "cuda" else name
    backend, reason = load(name)
    run.note(backend=name, unavailable=reason if backend is None else None)
    if backend is None:
        return False
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory with NaN
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
    found: dict[str, str] = {}

    def add(what: str, call: Call[Any], config: Any = None) -> None:
        found[what] = compared(call, backend, config)
        run.ok &= found[what].startswith(("ok", "declined"))
        run.note(primitives=found)

    calls = [pair for dtype in (torch.bfloat16, torch.float32) for pair in small_calls(run.device, dtype)]
    for what, call in calls:
        add(what, call)
    for what, call in calls if not run.toy else ():
        for config in backend.configurations(call) if found[what] == "ok" else ():
            add(f"{what} {config}", call, config)
    torch.use_deterministic_algorithms(False)
    return True


def numbers(run: Run, name: str) -> None:
    """``primitives``, then a training step and a frozen forward of a network, validated as ``bench`` does."""
    if not primitives(run, name):
        return
    name = "cpu" if run.toy else name
    subject = run.subject(2 if run.toy else cases.VALIDATED_IMAGES)
    for mode in ("training", "inference"):
        plain = cases.Tensors()
        cases.validated("plain", subject, mode, torch.bfloat16, None, plain)
        with use_backend(name):
            _, row = cases.validated("fused", subject, mode, torch.bfloat16, None, plain)
        run.ok &= row["status"] == "measured"
        run.note(**{mode: row})


# ---------------------------------------------------------------------------------------------------- networks
def headline(run: Run) -> None:
    """Images per second: plain, fused on each backend, compiled; each with a CUDA graph and without; and memory."""
    ways: list[tuple[str, str, str | None]] = [("plain", "plain", None)]
    ways += [(f"fused, {name}", "fused", name) for name in (("cpu",) if run.toy else BACKENDS)]
    _ways(run, [*ways, ("compile", "compile", None)])


def planned(run: Run) -> None:
    """As ``headline``, with the backends that the planner measured in the stage ``kernels``."""
    os.environ["FUSED_RESNET_PLAN"] = "measure"
    with chains_always():
        _ways(run, [("fused, planned", "fused", None)])


def _ways(run: Run, ways: list[tuple[str, str, str | None]]) -> None:
    subject = run.subject(run.batch)
    budget = CompileBudget(0.0 if run.toy else 90.0)
    plain = {mode: cases.Tensors() for mode in ("training", "inference")}
    if ways[0][1] != "plain":
        for mode, tensors in plain.items():
            cases.validated("plain", subject, mode, torch.bfloat16, None, tensors)
    for title, name, backend in ways:
        if backend is not None and load(backend)[0] is None:
            run.note(**{title: {"unavailable": load(backend)[1]}})
            continue
        for mode, tensors in plain.items():
            torch.manual_seed(0)
            key = f"{mode}: {title}"
            with use_backend(backend) if backend else nullcontext():
                try:
                    variant, row = cases.validated(name, subject, mode, torch.bfloat16, budget, tensors)
                    run.ok &= row["status"] != "failed"
                    run.note(**{key: row})
                    if variant is not None:
                        _timed(run, subject, variant, mode, row, key)
                except Exception:  # the other ways are worth having all the same
                    run.ok = False
                    run.note(**{key: {"status": "failed", "note": traceback.format_exc()[-2000:]}})
            variant = None
            if not run.toy:
                torch.cuda.empty_cache()


def _timed(run: Run, subject: cases.Subject, variant: Variant, mode: str, row: dict[str, Any], key: str) -> None:
    settings = subject.settings
    step = cases.prepared(variant, subject, mode, row)
    times = measure.interleaved({key: step}, run.device, repeats=settings.repeats, budget_s=settings.case_budget_s)[key]
    row |= measure.figures(times, settings.batch_size, []) | {"rounds": len(times), "times_s": times}
    run.note(**{key: row})
    if run.toy:
        return
    try:
        graph, _ = captured(partial(_step, variant, subject.labels) if mode == "training" else variant.infer)
        spells = [measure.seconds(graph.replay, run.device, 10) for _ in range(5)]
        row["graph"] = measure.figures(spells, settings.batch_size, [])
    except Exception as error:  # not everything can be captured
        row["graph_note"] = f"{type(error).__name__}: {error}"[:500]
    run.note(**{key: row})


def captured(step: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A step as a CUDA graph, after three calls on another stream; and what the captured call returned."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph, result


def _step(variant: Variant, labels: Tensor) -> None:
    """A training step whose gradients stay where they are, as a graph needs it."""
    if variant.optimizer is None:
        variant.optimizer = torch.optim.SGD(variant.model.parameters(), lr=1e-3, momentum=0.9)
    variant.optimizer.zero_grad(set_to_none=False)
    variant.loss(labels).backward()
    variant.optimizer.step()


def replays(run: Run, name: str) -> None:
    """A captured training step of ResNet-18, replayed 100 times on one input, gives the same bits each time."""
    if run.toy:
        run.note(unavailable="a CPU has no graphs")
        return
    if load(name)[0] is None:
        run.note(unavailable=load(name)[1])
        return
    torch.manual_seed(0)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    model = fr.models.resnet18(num_classes=10).to(run.device, memory_format=torch.channels_last)
    x = torch.randn(8, 3, 64, 64, device=run.device).to(memory_format=torch.channels_last)
    variant = variants.fused(model, x, True, torch.bfloat16)
    labels = torch.arange(8, device=run.device)

    def step() -> Tensor:
        variant.model.zero_grad(set_to_none=False)
        loss = variant.loss(labels)
        loss.backward()
        return loss

    with use_backend(name):
        graph, loss = captured(step)
    found = [loss, *(p.grad for p in variant.model.parameters() if p.grad is not None)]
    graph.replay()
    first = [t.clone() for t in found]
    differ = torch.zeros((), dtype=torch.int64, device=run.device)
    for _ in range(100):
        graph.replay()
        differ += sum((t != f).any().long() for t, f in zip(found, first, strict=True))
    run.ok = not differ.item() and all(bool(t.isfinite().all()) for t in first)
    run.note(replays=100, tensors=len(found), differ=int(differ))


# ---------------------------------------------------------------------------------------------------- kernels
def kernels(run: Run) -> None:
    """Every signature of a training step and of inference: all candidates' times beside the roofline's."""
    bound = run.results.read()["machine"]
    rows: list[dict[str, Any]] = []

    def add(call: Call[Any], entry: dict[str, Any]) -> None:
        flops, moved = account(call)
        chosen = planner.label(planner.Choice.decode(entry["choice"]))
        row = {"primitive": call.name, "signature": call.signature, "chosen": chosen, **entry}
        row |= {"flops": flops, "bytes": moved}
        if moved is not None:
            row["roofline_ms"] = 1e3 * max(moved / bound["bytes_per_s"], flops / bound["flops_per_s"])
        rows.append(row)
        run.note(rows=rows)

    with measuring(add), chains_always():
        model, x = run.network()
        model.train()
        with torch.autocast(run.device.type, torch.bfloat16):
            loss = model(x).float().sum()
        loss.backward()
        del loss
        fr.freeze(model, x, dtype=torch.bfloat16)(x.bfloat16())
    run.ok = bool(rows)


@contextmanager
def measuring(note: Callable[..., None]) -> Iterator[None]:
    """A plan measured from nothing, and ``note`` called for every signature of it."""
    shutil.rmtree(os.environ["FUSED_RESNET_CACHE"], ignore_errors=True)
    os.environ["FUSED_RESNET_PLAN"] = "measure"
    planner.forget()
    planner.listeners.append(note)
    yield


def account(call: Call[Any]) -> tuple[float, int | None]:
    """Operations of the convolutions (additions and multiplications), and the bytes that our fused kernels move."""
    flops = 0.0
    if isinstance(call, ConvBiasAct | ConvStats | ConvBackward):
        h, w = call.conv.out_size(call.x.shape[2:], call.weight.shape[2:])
        products = call.need_input + call.need_weight if isinstance(call, ConvBackward) else 1
        flops = 2.0 * call.x.shape[0] * h * w * call.weight.numel() * products
    triton, _ = load("triton", to_run=False)
    if triton is None:
        return flops, None
    from fused_resnet.backends.triton.runtime import traffic

    def meta(t: Tensor) -> Tensor:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")

    with traffic() as record:
        type(call)(*tree_map_only(Tensor, meta, call.arguments)).on(triton)
    return flops, record.total


def sm90_conv(run: Run) -> None:
    """conv_train_sm90.cu, which no backend lists: its results on every small case, then its time beside cuDNN's."""
    import conv_train_cases

    if run.toy or not CONV_LIBRARY.exists():
        run.note(unavailable=f"no {CONV_LIBRARY.name}, or no GPU")
        return
    library = ctypes.CDLL(str(CONV_LIBRARY))
    found: dict[str, str] = {}
    for case in sorted(conv_train_cases.CASES, key=lambda c: (c[2], c[3] is not None)):  # im2col last
        torch.manual_seed(0)
        run.note(begun=str(case))  # the one that hangs, if one does
        try:
            conv_train_cases.check(library, *case, seed=0, device="cuda")
            found[str(case)] = "ok"
        except AssertionError as wrong:
            found[str(case)] = str(wrong)[:300]
            run.ok = False
        run.note(cases=found)
    rows: list[dict[str, Any]] = []
    for c, k, kernel, size, stride in RESNET50:
        x = torch.randn(run.batch, size, size, c, device=run.device, dtype=torch.bfloat16)
        weight = torch.randn(k, kernel, kernel, c, device=run.device, dtype=torch.bfloat16)
        conv = {"stride": stride, "padding": (kernel // 2,) * 2, "dilation": 1}
        norm = torch.rand(2, c, device=run.device)
        ours = partial(conv_train_cases.run, library, x, weight, conv, "relu", norm, 0, 0)
        plain = partial(nn.functional.conv2d, x.permute(0, 3, 1, 2), weight.permute(0, 3, 1, 2), **conv)
        row = {"case": f"{kernel}x{kernel}/{stride} {c}->{k}, {size} px"}
        row |= {"ms": planner.milliseconds(ours, run.device), "cudnn_conv_ms": planner.milliseconds(plain, run.device)}
        rows.append(row)
        run.note(rows=rows)


def tests(run: Run) -> None:
    """The tests that need a GPU, and those of the CUDA kernels, which run on one where there is one."""
    names = ("project/test_gpu", "backends/test_cuda_kernels", "backends/test_cuda_conv")
    files = [f"tests/{name}.py" for name in (names[:1] if run.toy else names)]
    done = subprocess.run([sys.executable, "-m", "pytest", *files, "--no-header", "-rf"], cwd=ROOT, check=False)
    run.ok = done.returncode == 0
