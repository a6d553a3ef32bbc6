"""CUTLASS's convolutions behind the cuda backend: on a GPU of compute capability 9.0, or with loops in CUTLASS's place
for this CPU (cuda_on_cpu/conv_on_cpu.cpp), all between the Python call and the launch as it is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cuda_build
import pytest
import torch
from primitives import Positional, aten, double, flat, image, vectors
from tolerances import assert_as_good, assert_close
from torch import Tensor

from fused_resnet import planner, use_backend
from fused_resnet.backends import BnAct, Call, Closing, ConvBackward, ConvBiasAct, DyCoefficients, Prologue
from fused_resnet.backends.cuda import BACKEND as CUDA
from fused_resnet.backends.cuda import cutlass
from fused_resnet.planner import Choice
from fused_resnet.spec import ACTIVATIONS, Act, ConvSpec

pytestmark = pytest.mark.usefixtures("empty_is_nan", "tf32")
KINDS = ("fprop", "dgrad", "wgrad")
HALF = [torch.bfloat16, torch.float16]
SMALL = ("cutlass fprop", 64, 64)
cuda = Positional(CUDA)


@pytest.fixture
def tf32() -> Iterator[None]:
    before = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    torch.backends.cudnn.conv.fp32_precision = "tf32"  # type: ignore[attr-defined]
    yield
    torch.backends.cudnn.conv.fp32_precision = before  # type: ignore[attr-defined]


@pytest.fixture
def device(cuda_device: str) -> str:
    x = torch.empty(1, 8, 1, 1, dtype=torch.bfloat16, device=cuda_device)
    if reason := cutlass.refuse("fprop", x, torch.empty(8, 8, 1, 1, device=cuda_device), ConvSpec()):
        pytest.skip(f"CUTLASS's convolutions: {reason}")
    return cuda_device


def launched(device: str) -> int:
    """CUTLASS's launches so far; on a GPU nobody counts."""
    return cuda_build.convolutions() if device == "cpu" else 0


def weight_of(k: int, c: int, kernel: tuple[int, int], device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Means of one product each are 0, so that results stay small; in float32, as a master copy."""
    return (torch.randn(k, c, *kernel) / (c * kernel[0] * kernel[1]) ** 0.5).to(device, dtype)


# channels, output channels, image, kernel, convolution
CASES = {
    "1x1": (16, 24, (5, 7), (1, 1), ConvSpec()),
    "3x3": (8, 16, (6, 5), (3, 3), ConvSpec(padding=(1, 1))),
    "3x2": (24, 8, (7, 9), (3, 2), ConvSpec(padding=(0, 1))),
    "dilated": (8, 8, (9, 8), (3, 3), ConvSpec(padding=(2, 2), dilation=(2, 2))),
    "strided": (16, 8, (9, 7), (3, 3), ConvSpec(stride=(2, 2), padding=(1, 1))),
    "1x1 strided": (8, 32, (7, 6), (1, 1), ConvSpec(stride=(2, 3))),
}
PLAIN = [name for name in CASES if "strided" not in name]
LARGE = {"3x3": (64, 128, (28, 28), (3, 3), ConvSpec(padding=(1, 1))), "1x1": (256, 64, (17, 13), (1, 1), ConvSpec())}


def tiles(kind: str, dtype: torch.dtype, device: str) -> list[tuple[str, int, int]]:
    flat = torch.ops.fused_resnet_cuda.conv_tiles(kind, torch.empty(0, dtype=dtype, device=device))
    return [(f"cutlass {kind}", m, n) for m, n in zip(flat[::2], flat[1::2], strict=True)]


def compare(name: str, args: tuple[Any, ...], terms: int, device: str, config: Any) -> None:
    """Each result on CUTLASS is as near to float64's as aten's; float32 on a GPU is tf32, on a CPU it is not."""
    dtype = args[0].dtype
    plain, truth = (flat(getattr(aten, name)(*given)) for given in (fresh(args), double(args)))
    before = launched(device)
    with CUDA.configured(config):
        got = flat(getattr(cuda, name)(*fresh(args)))
    assert launched(device) - before == (device == "cpu"), "not CUTLASS's"
    for i, (g, p, t) in enumerate(zip(got, plain, truth, strict=True)):
        assert g.dtype == p.dtype and g.shape == p.shape
        if dtype in HALF:
            assert_as_good(f"{name}[{i}]", [g], [p], [t], dtype)
        elif device == "cuda":
            assert (g - t).norm() < 2e-3 * t.norm()
        else:
            assert_close(f"{name}[{i}]", g, t, terms)


def fresh(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """``add``, the tenth of conv_backward's, may be overwritten."""
    return tuple(a.clone() if i == 9 and isinstance(a, Tensor) else a for i, a in enumerate(args))


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_inference(device: str, case: str, dtype: torch.dtype) -> None:
    """Every tile; bias, residual and activation come and go with it, residual in either layout, bias of any dtype."""
    c, k, size, kernel, conv = CASES[case]
    x, w = image(3, c, *size, dtype=dtype, device=device), weight_of(k, c, kernel, device, dtype)
    residual = image(3, k, *conv.out_size(size, kernel), dtype=dtype, device=device)
    bias, terms = torch.randn(k, device=device), c * kernel[0] * kernel[1]
    for i, config in enumerate(tiles("fprop", dtype, device)):
        compare("conv_bias_act", (x, w, bias.to(dtype), conv, Act(), residual.contiguous()), terms, device, config)
        act = Act.make(list(ACTIVATIONS)[(i + len(case)) % len(ACTIVATIONS)])
        compare("conv_bias_act", (x, w, bias, conv, act, None), terms, device, config)
        compare("conv_bias_act", (x, w, None, conv, act, residual), terms, device, config)
    compare("conv_stats", (x, w, conv, Prologue(vectors(c, dtype, device), Act()), True), terms * 150, device, config)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations(device: str, act: str) -> None:
    x, w = image(2, 8, 5, 6, dtype=torch.float16, device=device), weight_of(8, 8, (1, 1), device, torch.float16)
    compare("conv_bias_act", (x, w, torch.randn(8, device=device), ConvSpec(), Act.make(act), None), 8, device, SMALL)


def backward_args(
    case: tuple[Any, ...], dtype: torch.dtype, device: str, batch: int = 2, **given: Any
) -> tuple[Any, ...]:
    """conv_backward's, with ``before``: a prologue and ``add``: what another path brings."""
    c, k, size, kernel, conv = case
    x, out = image(batch, c, *size, dtype=dtype, device=device), conv.out_size(size, kernel)
    dz, y = (image(batch, k, *out, dtype=dtype, device=device) for _ in range(2))
    coef = DyCoefficients(*vectors(k, dtype, device))
    prologue = Prologue(vectors(c, dtype, device), Act("silu")) if given.get("before") else None
    add = image(*x.shape, dtype=dtype, device=device) if given.get("add") else None
    return dz, y, coef, x, prologue, weight_of(k, c, kernel, device), conv, True, True, add


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", PLAIN)
@pytest.mark.parametrize("kind", ["dgrad", "wgrad"])
def test_backward(device: str, kind: str, case: str, dtype: torch.dtype) -> None:
    """Every tile, the other gradient by PyTorch; alone, behind a prologue, with a summand; float32 masters."""
    for config in tiles(kind, dtype, device):
        for given in ({}, {"before": True}, {"add": True}):
            args = backward_args(CASES[case], dtype, device, **given)
            compare("conv_backward", args, 1, device, config)


def test_the_summand_of_an_identity_shortcut_stays(device: str) -> None:
    """There ``add`` is dz itself, which the weight's gradient still needs; and a closing follows."""
    dz, y, coef, x, _, w, conv, *_ = backward_args(CASES["3x3"], torch.bfloat16, device)
    dz, y, w = image(*x.shape, dtype=x.dtype, device=device), x.flip(3), weight_of(8, 8, (3, 3), device)
    coef, kept = DyCoefficients(*vectors(8, x.dtype, device)), dz.clone()
    closing = Closing(image(*x.shape, dtype=x.dtype, device=device), vectors(8, x.dtype, device), Act("silu"), x, None)
    args = (dz, y.contiguous(memory_format=torch.channels_last), coef, x, None, w, conv, True, True, dz, closing)
    want = aten.conv_backward(*fresh(args))
    with CUDA.configured(("cutlass dgrad", 128, 64)):
        got = cuda.conv_backward(*args)
    assert torch.equal(dz, kept)
    assert planner.measuring._error(got, want) < 0.05


def test_misaligned_operands_are_copied(device: str) -> None:
    """TMA takes multiples of 16 bytes; a tensor may begin between two."""
    x, w = image(2, 8, 5, 4, dtype=torch.bfloat16, device=device), weight_of(8, 8, (3, 3), device, torch.bfloat16)
    memory = torch.empty(x.numel() + 1, dtype=x.dtype, device=device)
    off = memory[1:].view(2, 5, 4, 8).permute(0, 3, 1, 2).copy_(x)
    assert off.data_ptr() % 16 and off.is_contiguous(memory_format=torch.channels_last)
    conv, bias = ConvSpec(padding=(1, 1)), torch.randn(9, device=device)[1:]
    with CUDA.configured(SMALL):
        got, want = (cuda.conv_bias_act(t, w, bias, conv, Act(), t) for t in (off, x))
    assert torch.equal(got, want)


def test_without_the_planner_convolutions_are_pytorchs(device: str) -> None:
    args = backward_args(CASES["3x3"], torch.bfloat16, device)
    before = launched(device)
    cuda.conv_backward(*args)
    cuda.conv_stats(args[3], args[5], args[6], None, True)
    with use_backend("cuda"):
        planner.run(ConvBiasAct(args[3], args[5].bfloat16(), None, args[6], Act(), None))
    assert launched(device) == before


REFUSED: dict[str, tuple[str, torch.dtype, int, int, ConvSpec]] = {
    "take bfloat16, float16 and float32": ("fprop", torch.float64, 8, 8, ConvSpec()),
    "no groups": ("fprop", torch.bfloat16, 16, 16, ConvSpec(groups=2)),
    "multiple of 8": ("fprop", torch.bfloat16, 12, 8, ConvSpec()),
    "multiple of 8 .4 in float32": ("fprop", torch.float32, 6, 8, ConvSpec()),
    "stride 1": ("dgrad", torch.bfloat16, 8, 8, ConvSpec(stride=(2, 2))),
    "not float32": ("wgrad", torch.float32, 8, 8, ConvSpec()),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals(device: str, reason: str) -> None:
    """In words; nothing is offered then, and what is imposed all the same is PyTorch's."""
    kind, dtype, c, k, conv = REFUSED[reason]
    x, w = image(2, c, 6, 6, dtype=dtype, device=device), weight_of(k, c // conv.groups, (3, 3), device, dtype)
    said = cutlass.refuse(kind, x, w, conv)
    assert said is not None
    assert re.search(reason, said), said
    dz = image(2, k, *conv.out_size((6, 6), (3, 3)), dtype=dtype, device=device)
    coef = DyCoefficients(*vectors(k, dtype, device))
    calls: dict[str, Call[Any]] = {
        "fprop": ConvBiasAct(x, w, None, conv, Act(), None),
        "dgrad": ConvBackward(dz, dz, coef, x, None, w, conv, True, False, None),
        "wgrad": ConvBackward(dz, dz, coef, x, None, w, conv, False, True, None),
    }
    assert CUDA.configurations(calls[kind]) == []
    before, want = launched(device), calls[kind].on(CUDA)
    with CUDA.configured((f"cutlass {kind}", 128, 128)):
        got = calls[kind].on(CUDA)
    assert planner.measuring._error(got, want) < 1e-6 and launched(device) == before


def test_tf32_is_pytorchs_setting(device: str) -> None:
    x, w = image(2, 8, 6, 6, device=device), weight_of(8, 8, (3, 3), device)
    assert cutlass.refuse("fprop", x, w, ConvSpec()) is None
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
    assert "fp32_precision does not allow" in str(cutlass.refuse("fprop", x, w, ConvSpec()))
    before = launched(device)
    with CUDA.configured(SMALL):
        cuda.conv_bias_act(x, w, None, ConvSpec(), Act(), None)
    assert launched(device) == before


def test_refused_where_it_can_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any operator is asked: not built, or another chip."""

    class Gpu:
        is_cuda, dtype, device = True, torch.bfloat16, torch.device("cuda")

    x: Any = Gpu()
    monkeypatch.setattr(cutlass, "built", lambda device: False)
    assert "nvidia-cutlass" in str(cutlass.refuse("fprop", x, x, ConvSpec()))
    assert CUDA.configurations(BnAct(x, x, Act())) == [], "and the call does not run"
    monkeypatch.setattr(cutlass, "built", lambda device: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert str(cutlass.refuse("fprop", x, x, ConvSpec())).endswith("this GPU has 8.0")


def test_wrong_arguments(device: str) -> None:
    """Named, with what came and what was expected, before anything is launched."""
    ops = torch.ops.fused_resnet_cuda
    x, w = image(2, 8, 6, 5, dtype=torch.bfloat16, device=device), weight_of(16, 8, (3, 3), device, torch.bfloat16)
    dy, conv, tile = image(2, 16, 4, 3, dtype=torch.bfloat16, device=device), ([1, 1], [0, 0], [1, 1], 1), [64, 64]

    def fprop(x: Tensor = x, w: Tensor = w, bias: Any = None, conv: Any = conv, act: int = 1, **more: Any) -> Any:
        return lambda: ops.conv_bias_act(x, w, bias, *conv, act, 0.0, more.get("residual"), more.get("tile", tile))

    calls = {
        r"x: expected \[N, C, H, W\], got \[8, 6, 5\]": fprop(x=x[0]),
        r"weight: expected \[K, C / groups, R, S\] of x's 8 channels": fprop(w=w[:, :4]),
        "weight: expected BFloat16 .*, got Float": fprop(w=w.float()),
        r"bias: expected 16 values .*, got \[8\]": fprop(bias=torch.ones(8, device=device)),
        "residual: expected y's shape, dtype and device": fprop(residual=x),
        "conv: expected a stride": fprop(conv=([0, 1], *conv[1:])),
        "groups: expected at least 1": fprop(conv=(*conv[:3], 0)),
        f"act: no activation {len(ACTIVATIONS)}": fprop(act=len(ACTIVATIONS)),
        r"tile: expected one of conv_tiles, got \[256, 64\]": fprop(tile=[256, 64]),
        "kind: expected fprop, dgrad or wgrad, got sgrad": lambda: ops.conv_why_not("sgrad", x, w, *conv),
        "dy: expected .* of a weight": lambda: ops.conv_backward_input(x, w, [6, 5], *conv, None, [128, 64]),
        "dy: expected images of 5 x 3": lambda: ops.conv_backward_input(dy, w, [7, 5], *conv, None, [128, 64]),
        "add: expected x's shape": lambda: ops.conv_backward_input(dy, w, [6, 5], *conv, dy, [128, 64]),
        "dy: expected 2 images of 6 x 3": lambda: ops.conv_backward_weight(dy, x, [1, 3], *conv, tile),
        "dy: expected Half": lambda: ops.conv_backward_weight(dy, x.half(), [3, 3], *conv, tile),
    }
    before = launched(device)
    for message, call in calls.items():
        with pytest.raises(RuntimeError, match=message):
            call()
    assert launched(device) == before


# ---------------------------------------------------------------------------------------------------- the planner
@pytest.fixture
def measured(device: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, float]]:
    """Milliseconds by label, 5 where none is given: the planner measures cuda and aten on these."""
    if device != "cpu":
        pytest.skip("test_gpu.py has the planner of a GPU")
    monkeypatch.setenv("FUSED_RESNET_PLAN", "measure")
    monkeypatch.setenv("FUSED_RESNET_CACHE", str(tmp_path))
    monkeypatch.setattr(CUDA, "refuse", lambda primitive, case: None)
    monkeypatch.setattr(planner.measuring, "NAMES", ("cuda", "aten"))
    times: dict[str, float] = {}

    def read(call: Any, device: torch.device) -> float:
        choice, timed = call.args
        part = ""
        if isinstance(timed, ConvBackward) and timed.need_input != timed.need_weight:
            part = "input: " if timed.need_input else "weight: "
        return times.get(part + planner.label(choice), 5.0)

    monkeypatch.setattr(planner.measuring, "milliseconds", read)
    planner.forget()
    yield times
    planner.forget()


def entry_of() -> dict[str, Any]:
    (entry,) = planner.cache_of(torch.device("cpu")).choices.values()
    return entry


def inference_args(batch: int = 2) -> tuple[Any, ...]:
    x, w = image(batch, 8, 6, 6, dtype=torch.bfloat16), weight_of(16, 8, (3, 3), "cpu", torch.bfloat16)
    return x, w, torch.randn(16), ConvSpec(padding=(1, 1)), Act(), None


def test_a_faster_tile_is_chosen_and_kept(measured: dict[str, float]) -> None:
    label = planner.label(Choice("cuda", ("cutlass fprop", 128, 64)))
    measured |= {"aten": 3.0, "cuda": 2.0, label: 1.0}
    args = inference_args()
    planner.run(ConvBiasAct(*args))
    assert Choice.decode(entry_of()["choice"]) == Choice("cuda", ("cutlass fprop", 128, 64))
    assert len([name for name in entry_of()["ms"] if "cutlass" in name]) == 3, "every tile was timed"
    planner.forget()  # as another process starts
    before = cuda_build.convolutions()
    got = planner.run(ConvBiasAct(*args))
    assert cuda_build.convolutions() == before + 1
    assert planner.measuring._error(got, aten.conv_bias_act(*args)) < 0.02


def test_a_slower_tile_is_not(measured: dict[str, float]) -> None:
    measured |= {"aten": 3.0, "cuda": 2.0}
    planner.run(ConvBiasAct(*inference_args()))
    assert Choice.decode(entry_of()["choice"]) == Choice("cuda")
    before = cuda_build.convolutions()
    planner.run(ConvBiasAct(*inference_args()))
    assert cuda_build.convolutions() == before


def test_a_tile_that_writes_nothing_is_dropped(measured: dict[str, float]) -> None:
    """As an instance does that was compiled for another chip: it would be the fastest of all, and the memory that it
    gets held aten's result a moment ago."""
    labels = [planner.label(Choice("cuda", ("cutlass fprop", m, n))) for m, n in ((128, 128), (128, 64), (64, 64))]
    measured |= {"aten": 3.0, "cuda": 2.0} | dict.fromkeys(labels, 0.1)
    planner.measuring.warn_once.cache_clear()
    cuda_build.idle_convolutions(True)
    try:
        torch.use_deterministic_algorithms(False)  # as users run; new memory holds whatever it held
        with pytest.warns(UserWarning, match="cutlass fprop.* is not used"):
            got = planner.run(ConvBiasAct(*(args := inference_args())))
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        cuda_build.idle_convolutions(False)
    assert Choice.decode(entry_of()["choice"]) == Choice("cuda")
    assert planner.measuring._error(got, aten.conv_bias_act(*args)) < 0.02


def test_input_and_weight_on_cutlass_apart(measured: dict[str, float]) -> None:
    dgrad, wgrad = (Choice("cuda", (f"cutlass {kind}", 128, 128)) for kind in ("dgrad", "wgrad"))
    measured |= {f"input: {planner.label(dgrad)}": 1.0, f"weight: {planner.label(wgrad)}": 1.5}
    args = backward_args(CASES["3x3"], torch.bfloat16, "cpu", add=True)
    want = aten.conv_backward(*fresh(args))
    planner.run(ConvBackward(*fresh(args)))
    assert Choice.decode(entry_of()["choice"]).parts == (dgrad, wgrad)
    before = cuda_build.convolutions()
    got = planner.run(ConvBackward(*args))
    assert cuda_build.convolutions() == before + 2 and planner.measuring._error(got, want) < 0.05


def test_a_batch_that_cutlass_can_not_take(measured: dict[str, float]) -> None:
    """The plan's signature rounds batches up; an empty one is PyTorch's."""
    measured |= {planner.label(Choice("cuda", SMALL)): 1.0}
    planner.run(ConvBiasAct(*inference_args(2)))
    with CUDA.configured(SMALL):
        x, *others = inference_args(0)
        assert cuda.conv_bias_act(x, *others).shape == (0, 16, 6, 6)


# ---------------------------------------------------------------------------------------------------- on a GPU
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", LARGE)
def test_several_tiles_of_every_axis(device: str, case: str, kind: str, dtype: torch.dtype) -> None:
    args = backward_args(LARGE[case], dtype, device, batch=8, add=True)
    for config in tiles(kind, dtype, device):
        with CUDA.configured(config):
            if kind == "fprop":
                given = (args[3], args[5].to(dtype), None, args[6], Act(), args[0])
                got, want = cuda.conv_bias_act(*given), aten.conv_bias_act(*given)
            else:
                got, want = cuda.conv_backward(*args), aten.conv_backward(*args)
        assert planner.measuring._error(got, want) < 0.02
