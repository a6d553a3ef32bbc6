"""What users run: ResNet-18 and -50 at 224x224, fused and frozen, with several threads, in every mode, from several
Python threads, in a forked child. Compared with a float64 reference, beside plain PyTorch.

Weights, statistics and images are bfloat16 numbers, so one reference serves float32, bfloat16 and autocast. Training is
compared element by element in smooth networks, with SiLU and an average pool in ReLU's and the max-pool's place: of a
million float32 values a few have another sign, or another largest neighbour, than in float64, and a gradient that goes
another way there moves a channel's sum by a percent, in plain PyTorch as well. Networks with ReLU and the max-pool are
held to twice the largest error of plain PyTorch's gradients.
"""

from __future__ import annotations

import copy
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from functools import cache, partial

import pytest
import torch
from networks import blocks, prepared
from rounded import bf16_convolutions
from tolerances import FLOOR, assert_as_good, assert_close, error
from torch import Tensor, nn
from torchvision_shim import torchvision

import fused_resnet as fr
from fused_resnet.backends import load
from fused_resnet.chain import call as chain_call
from fused_resnet.frozen import forward as frozen_forward

pytestmark = pytest.mark.slow
SIZE = 224
THREADS = (1, 2, 4)
CASES = [("resnet18", 1), ("resnet18", 8), ("resnet50", 1), ("resnet50", 8)]
BF16 = torch.bfloat16
# The longest sum of a forward: a 3x3 convolution of 512 channels. That of a weight's gradient: all pixels of the stem.
FORWARD = 512 * 9
MODES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: _both(torch.no_grad(), torch.autocast("cpu", BF16)),
}
PARTS = {"float32": (torch.float32, False), "bfloat16": (BF16, False), "autocast": (torch.float32, True)}
# batch -> modes, dtypes and parts of a training -> how many threads. For both networks each value of each is in one of
# them at least, so that their values meet in pairs; --full: all with all.
RUNS: dict[int, dict[object, int]] = {
    1: {("no_grad", torch.float32): 4, ("inference", BF16): 1, ("autocast", torch.float32): 2, "bfloat16": 2,
        "autocast": 4},
    8: {("no_grad", BF16): 2, ("inference", torch.float32): 4, "float32": 1},
}  # fmt: skip
Values = dict[str, Tensor]


def _both(*contexts: AbstractContextManager[object]) -> AbstractContextManager[object]:
    stack = ExitStack()
    for context in contexts:
        stack.enter_context(context)
    return stack


# ---------------------------------------------------------------------------------------------------- networks, truth
def network(name: str, smooth: bool = False) -> nn.Module:
    """torchvision's, with running statistics near those of its activations, so that these stay of order 1."""
    torch.manual_seed(0)
    model = prepared(getattr(torchvision.models, name)())
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for m in model.modules():
        if hasattr(m, "conv2"):  # a block: its shortcut outweighs its branch
            (m.bn3 if hasattr(m, "bn3") else m.bn2).weight.data *= 0.5
        if smooth and hasattr(m, "relu"):
            m.relu = nn.SiLU(inplace=True)
    if smooth:
        model.maxpool = nn.AvgPool2d(3, 2, 1)
    for bn in norms:
        bn.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.randn(4, 3, 96, 96) * 1.3 + 0.4)
    for bn in norms:
        bn.momentum, bn.num_batches_tracked = 0.1, torch.tensor(0)
        bn.running_mean += 0.3 * bn.running_var.sqrt() * torch.randn_like(bn.running_mean)
        bn.running_var *= torch.empty_like(bn.running_var).uniform_(0.5, 2.0)
    return model.to(BF16).float().eval()


def step(model: nn.Module, x: Tensor, dout: Tensor, autocast: bool = False) -> Values:
    """A training step: output, gradients of the images and of every parameter, running statistics."""
    model, x = copy.deepcopy(model).train(), x.detach().clone().requires_grad_()
    with torch.autocast("cpu", BF16, enabled=autocast):
        out = model(x)
    (out * dout.to(out.dtype)).sum().backward()
    assert x.grad is not None
    grads = {f"d {n}": p.grad for n, p in model.named_parameters()}
    stats = {n: b for n, b in model.named_buffers() if b.is_floating_point()}
    assert all(int(b) == 1 for n, b in model.named_buffers() if not b.is_floating_point())
    return {"out": out.detach(), "dx": x.grad, **grads, **stats}


class Case:
    """One network and batch, its references and plain results, each computed once, and what is compared with them."""

    def __init__(self, name: str, batch: int) -> None:
        self.name, self.batch = name, batch
        torch.manual_seed(1)
        self.x = (torch.randn(batch, 3, SIZE, SIZE) * 1.3 + 0.4).to(BF16).float()
        self.dout = torch.randn(batch, 1000).to(BF16).float()
        self.model = cache(partial(network, name))
        self.truth, self.plain, self.fused = cache(self._truth), cache(self._plain), cache(self._fused)
        self.true_step, self.plain_step, self.frozen = (
            cache(self._true_step),
            cache(self._plain_step),
            cache(self._frozen),
        )

    def _truth(self) -> Tensor:
        with torch.no_grad():
            return copy.deepcopy(self.model()).double()(self.x.double())

    def _plain(self, dtype: torch.dtype, autocast: bool) -> Tensor:
        with MODES["autocast" if autocast else "no_grad"](), bf16_convolutions():
            return copy.deepcopy(self.model()).to(dtype)(self.x.to(dtype))

    def _fused(
        self, dtype: torch.dtype, smooth: bool = False, fmt: torch.memory_format = torch.channels_last
    ) -> nn.Module:
        return fr.fuse(copy.deepcopy(self.model(smooth)).to(dtype, memory_format=fmt))

    def _frozen(self, dtype: torch.dtype) -> nn.Module:
        return fr.freeze(self.model(), self.x, dtype=dtype)

    def _true_step(self, smooth: bool) -> Values:
        return step(copy.deepcopy(self.model(smooth)).double(), self.x.double(), self.dout.double())

    def _plain_step(self, smooth: bool, dtype: torch.dtype, autocast: bool) -> Values:
        with bf16_convolutions():
            return step(copy.deepcopy(self.model(smooth)).to(dtype), self.x.to(dtype), self.dout.to(dtype), autocast)


@pytest.fixture(scope="module", params=CASES, ids=lambda p: f"{p[0]}-{p[1]}")
def case(request: pytest.FixtureRequest) -> Case:
    return Case(*request.param)


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def counts(request: pytest.FixtureRequest) -> Sequence[int]:
    """The numbers of threads of a test: all of ``THREADS`` for one image through ResNet-18. Of the others one each, as
    dynamo captures a forward anew where their number changes; ``--full``: all as well."""
    case, values = request.getfixturevalue("case"), request.node.callspec.params
    full = request.config.getoption("--full")
    kind = values["part"] if "part" in values else (values["mode"], values["dtype"]) if "mode" in values else None
    if kind is not None and kind not in RUNS[case.batch] and not full:
        pytest.skip("runs with --full: other tests have its mode, its dtype and its batch")
    if (case.name, case.batch) == CASES[0] or full:
        return THREADS
    return (RUNS[case.batch].get(kind, 2),)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Mapping[str, int]:
    """How often chains ran: those of fused networks, and those of frozen ones."""
    counts = {"fused": 0, "frozen": 0}

    def count(kind: str, module: object, name: str, found: Callable[..., int]) -> None:
        function = getattr(module, name)

        def counting(*args: object) -> object:  # a mock would keep all arguments
            counts[kind] += found(*args)
            return function(*args)

        monkeypatch.setattr(module, name, counting)

    count("fused", chain_call, "run_row", lambda *_: 1)
    count("frozen", frozen_forward, "_served_row", lambda x, chains, *_: len(chains))
    return counts


def assert_right(name: str, got: Tensor, plain: Tensor, truth: Tensor, dtype: torch.dtype, reduction: int) -> None:
    """float32 to tolerances.py's bound, of values scaled to a largest one of 1; 16 bits: as good as plain PyTorch."""
    if dtype == BF16:
        assert_as_good(name, [got], [plain], [truth], BF16)
    else:
        largest = truth.abs().max()
        assert_close(name, got / largest, truth / largest, reduction, torch.float32)


# ---------------------------------------------------------------------------------------------------- inference
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("mode", MODES)
def test_inference(
    case: Case, mode: str, dtype: torch.dtype, counts: Sequence[int], counted: Mapping[str, int]
) -> None:
    """The same two models with one thread, with two, with four and with one again; NCHW and channels_last images. With
    one number of threads in one of the two layouts, the other one in another mode and for another batch."""
    if mode == "autocast" and dtype == BF16:
        pytest.skip("autocast is for float32 networks")
    truth, plain = case.truth(), case.plain(dtype, mode == "autocast")
    fused, frozen, x = case.fused(dtype).eval(), case.frozen(dtype), case.x.to(dtype)
    first = list(MODES).index(mode) + (dtype == BF16) + (case.batch > 1)
    for i, threads in enumerate((*counts, counts[0]) if len(counts) > 1 else counts, first):
        torch.set_num_threads(threads)
        images = x.contiguous(memory_format=torch.contiguous_format if i % 2 else torch.channels_last)
        ran = counted["fused"], counted["frozen"]
        with MODES[mode]():
            got, served = fused(images), frozen(images)
        assert counted["fused"] > ran[0] + 4 and counted["frozen"] > ran[1] + len(blocks(frozen)) - 1
        assert got.dtype == plain.dtype and served.dtype == dtype
        assert got.is_inference() == served.is_inference() == (mode == "inference")
        assert_right(f"fused, {threads} threads", got, plain, truth, plain.dtype, FORWARD)
        # a frozen model computes in its own dtype, also inside autocast
        assert_right(f"frozen, {threads} threads", served, plain, truth, dtype, FORWARD)


def test_nchw_network(case: Case, pytestconfig: pytest.Config) -> None:
    """Weights in PyTorch's default layout, images as well; without ``--full`` in the other mode for the other batch."""
    fused = case.fused(torch.float32, fmt=torch.contiguous_format).eval()
    modes = ("no_grad", "inference")
    for mode in modes if pytestconfig.getoption("--full") else (modes[case.batch > 1],):
        with MODES[mode]():
            assert_right(mode, fused(case.x), case.x, case.truth(), torch.float32, FORWARD)


@pytest.mark.skipif(load("cpu")[0] is None, reason=f"the cpu backend: {load('cpu')[1]}")
def test_which_operators_run() -> None:
    """At this size the compiled kernels do, those with products of matrices in their threads among them."""
    case = Case("resnet18", 1)
    models = {"fused": case.fused(torch.float32).eval(), "frozen": case.frozen(torch.float32)}
    found = {}
    for name, model in models.items():
        with torch.inference_mode():
            model(case.x.contiguous(memory_format=torch.channels_last))  # captures
        with torch.inference_mode(), torch.profiler.profile() as profile:
            model(case.x.contiguous(memory_format=torch.channels_last))
        found[name] = {event.key for event in profile.key_averages()}
    assert {"fused_resnet::chain_inference", "fused_resnet_cpu::conv_bn_act"} <= found["fused"]
    assert "aten::batch_norm" not in found["fused"] | found["frozen"]
    assert "fused_resnet_cpu::winograd_bias_act" in found["frozen"]


# ---------------------------------------------------------------------------------------------------- training
@pytest.mark.parametrize("part", PARTS)
def test_training(case: Case, part: str, counts: Sequence[int], counted: Mapping[str, int]) -> None:
    dtype, autocast = PARTS[part]
    truth, plain = case.true_step(True), case.plain_step(True, dtype, autocast)
    fused, x = case.fused(dtype, True), case.x.to(dtype).contiguous(memory_format=torch.channels_last)
    pixels = case.batch * (SIZE // 2) ** 2
    for threads in counts:
        torch.set_num_threads(threads)
        ran = counted["fused"]
        got = step(fused, x, case.dout, autocast)
        assert counted["fused"] > ran + 1
        assert got.keys() == truth.keys()
        for name, value in truth.items():
            assert got[name].dtype == plain[name].dtype
            rule = BF16 if autocast else dtype
            assert_right(f"{name}, {threads} threads", got[name], plain[name], value, rule, pixels)


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["float32", "bfloat16"])
def test_training_with_relu(case: Case, dtype: torch.dtype, counts: Sequence[int]) -> None:
    if case.batch > 1:
        pytest.skip("the float64 step of a large batch takes long, and test_training has it")
    truth, plain = case.true_step(False), case.plain_step(False, dtype, False)
    largest = max(error([plain[name]], [truth[name]]) for name in truth)
    bound = 2 * largest + FLOOR * torch.finfo(dtype).eps
    for threads in counts:
        torch.set_num_threads(threads)
        got = step(case.fused(dtype), case.x.to(dtype), case.dout.to(dtype))
        assert {name: e for name in truth if not (e := error([got[name]], [truth[name]])) <= bound} == {}
        for name in ("out", *(n for n in truth if "running" in n)):  # no gradient was there yet
            assert_right(name, got[name], plain[name], truth[name], dtype, (SIZE // 2) ** 2)


# ---------------------------------------------------------------------------------------------------- threads, fork
@pytest.mark.parametrize("name", ["resnet18", pytest.param("resnet50", marks=pytest.mark.full)])
def test_python_threads(name: str) -> None:
    """Four threads of Python on one fused and one frozen model, modes mixed, for ResNet-18 more intra-op threads half
    way: plain PyTorch's values, whoever runs beside."""
    case = Case(name, 1)
    models = [case.fused(torch.float32).eval(), case.frozen(torch.float32)]
    truth = case.truth()

    def serve(i: int) -> Tensor:
        with MODES["inference" if i % 2 else "no_grad"]():
            return models[i // 2 % 2](case.x)

    for threads in (1, 2) if name == "resnet18" else (2,):
        torch.set_num_threads(threads)
        with ThreadPoolExecutor(4) as pool:
            for i, got in enumerate(pool.map(serve, range(8))):
                assert got.is_inference() == bool(i % 2)
                assert_right(f"call {i}", got, got, truth, torch.float32, FORWARD)


def _in_child(models: list[nn.Module], x: Tensor, truth: Tensor) -> None:
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    for model in models:
        with torch.inference_mode():
            out = model(x)
        assert_right("in a child", out, out, truth, torch.float32, FORWARD)


@pytest.mark.parametrize("name", ["resnet18", pytest.param("resnet50", marks=pytest.mark.full)])
def test_forked_child(name: str) -> None:
    """A model that its parent froze and ran, with one thread, serves in the child, for another size of batch too."""
    torch.set_num_threads(1)
    case = Case(name, 1)
    models, truth = [case.fused(torch.float32).eval(), case.frozen(torch.float32)], case.truth()
    for x, want in ((case.x, truth), (case.x.repeat(2, 1, 1, 1), truth.repeat(2, 1))):
        child = multiprocessing.get_context("fork").Process(target=_in_child, args=(models, x, want))
        child.start()
        child.join(120)
        if child.is_alive():
            child.kill()
        child.join()
        assert child.exitcode == 0
