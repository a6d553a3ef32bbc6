"""torch.func's transforms and forward-mode differentiation of fused networks: the derivatives of plain PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import prepared
from stages import stage
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import fused_resnet as fr
from fused_resnet import functional
from fused_resnet.chain import call as chain_call

Call = Callable[[nn.Module, Tensor], Any]


class Net(nn.Module):
    """A stem with its max-pool, a stage, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = fr.ConvBNAct(3, 4, act="elu")
        self.stage = stage(2)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.stem(x), 3, 2, 1)
        return self.fc(self.stage(x).mean((2, 3)))


class PlainStem(fr.ConvBNAct):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


def networks(running: bool = True) -> tuple[nn.Module, nn.Module]:
    """The network and its fused twin, with running statistics or without."""
    fused = prepared(Net()).double()
    for m in fused.modules():
        if isinstance(m, nn.BatchNorm2d) and not running:
            m.track_running_stats = False
            m.running_mean = m.running_var = m.num_batches_tracked = None
    plain = copy.deepcopy(fused)
    plain.stem.__class__ = PlainStem
    fr.fuse(fused.stage)
    return plain, fused


def images(n: int = 3) -> Tensor:
    return torch.randn(n, 3, 9, 8, dtype=torch.float64) * 1.3 + 0.4


def parameters(m: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in m.named_parameters()}


def buffers(m: nn.Module) -> dict[str, Tensor]:
    return {n: b.clone() for n, b in m.named_buffers()}


def loss(m: nn.Module, params: dict[str, Tensor], state: dict[str, Tensor], x: Tensor) -> Tensor:
    return functional_call(m, (params, state), (x,)).sin().sum()


def dual(m: nn.Module, x: Tensor) -> Any:
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(m(forward_ad.make_dual(x, x.cos()))))


def dual_parameters(m: nn.Module, x: Tensor) -> Any:
    """The tangent of a parameter, in the middle of the network."""
    with forward_ad.dual_level():
        p = parameters(m)
        p["stage.0.bn1.weight"] = forward_ad.make_dual(p["stage.0.bn1.weight"], torch.ones(6, dtype=torch.float64))
        return forward_ad.unpack_dual(functional_call(m, p, (x,))).tangent


def batched_gradients(m: nn.Module, x: Tensor) -> Any:
    x = x.clone().requires_grad_()
    out = m(x)
    return torch.autograd.grad(out, [x, *m.parameters()], torch.stack([out.sin(), out.cos()]), is_grads_batched=True)


def forward_over_backward(m: nn.Module, x: Tensor) -> Any:
    x = x.clone().requires_grad_()
    out = m(x)
    with forward_ad.dual_level():
        found = torch.autograd.grad(out, [x, *m.parameters()], forward_ad.make_dual(out.sin(), out.cos()))
        return [t for g in found for t in forward_ad.unpack_dual(g)]


# what a module in any mode stands, as plain PyTorch does
ANY_MODE: dict[str, Call] = {
    "dual numbers": dual,
    "dual parameters": dual_parameters,
    "is_grads_batched": batched_gradients,
    "forward over backward": forward_over_backward,
    "grad, buffers given": lambda m, x: grad(lambda p, b: loss(m, p, b, x))(parameters(m), buffers(m)),
}
# BatchNorm without running statistics, or in eval mode: what nothing is written to in place
FUNCTIONAL: dict[str, Call] = {
    "grad": lambda m, x: grad(lambda p: loss(m, p, {}, x))(parameters(m)),
    "vjp": lambda m, x: vjp(m, x)[1](m(x).cos()),
    "jvp": lambda m, x: jvp(m, (x,), (x.cos(),)),
    "jacrev": lambda m, x: jacrev(m)(x),
    "jacfwd": lambda m, x: jacfwd(lambda s: m(x * s))(torch.ones(3, 1, 1, dtype=x.dtype)),
    "hessian": lambda m, x: hessian(lambda s: m(x * s).sin().sum())(torch.ones(3, 1, 1, dtype=x.dtype)),
    "grad of grad": lambda m, x: grad(lambda x: grad(lambda x: m(x).sin().sum())(x).square().sum())(x),
    "vmap": lambda m, x: vmap(m)(torch.stack([x, x + 1])),
    "vmap of grad": lambda m, x: vmap(grad(lambda x: m(x).sin().sum()))(torch.stack([x, x * 2])),
    "vmap over models": lambda m, x: vmap(lambda p: functional_call(m, p, (x,)))(
        {n: torch.stack([p, p * 1.1]) for n, p in parameters(m).items()}
    ),
}


def same(call: Call, plain: nn.Module, fused: nn.Module) -> None:
    """Values, and afterwards buffers, are equal; then the fused network still runs its chains."""
    x = images()
    found = [torch.utils._pytree.tree_leaves((call(m, x), buffers(m))) for m in (plain, fused)]
    assert len(found[0]) == len(found[1])
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)
    rows = []
    real = chain_call.run_row
    try:
        chain_call.run_row = lambda *a: rows.append(len(a[1])) or real(*a)
        fused(x)
    finally:
        chain_call.run_row = real
    assert rows == [1, 2]


@pytest.mark.parametrize("name", ANY_MODE)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_any_mode(name: str, training: bool) -> None:
    same(ANY_MODE[name], *(m.train(training) for m in networks()))


@pytest.mark.parametrize("name", FUNCTIONAL)
@pytest.mark.parametrize("norm", ["eval", "no running statistics"])
def test_functional(name: str, norm: str) -> None:
    same(FUNCTIONAL[name], *(m.train(norm != "eval") for m in networks(running=norm == "eval")))


def test_per_sample_gradients() -> None:
    """vmap(grad) gives the gradients that one fused backward per sample gives."""
    _, fused = networks()
    fused.eval()
    x = images(4)
    got = vmap(grad(lambda p, x: loss(fused, p, {}, x[None])), in_dims=(None, 0))(parameters(fused), x)
    for i in range(4):
        want = torch.autograd.grad(fused(x[i : i + 1]).sin().sum(), list(fused.parameters()))
        for (name, g), w in zip(got.items(), want, strict=True):
            torch.testing.assert_close(g[i], w, rtol=1e-8, atol=1e-10, msg=name)


def test_vmap_of_training_norms_is_pytorchs_error() -> None:
    """Running statistics of a batch of models have no place to go: refused as plain PyTorch does, nothing changed."""
    plain, fused = networks()
    for model in (plain, fused):
        before = buffers(model)
        with pytest.raises(RuntimeError, match="running_mean or running_var, which will be updated in place"):
            vmap(model)(images()[None])
        assert torch.equal(before["stem.bn.running_mean"], model.stem.bn.running_mean)


@pytest.mark.parametrize("closing", ["pad", "tensor", "max_pool", "average"])
def test_every_closing(closing: str) -> None:
    """Option A, a residual tensor, the stem's max-pool, ResNet-D's average pool: forward mode (PyTorch's functions)
    against the derivative of the chain's own backward."""

    def unit(cin: int, kernel: int = 3, **options: Any) -> functional.Unit:
        weight = (torch.randn(6, cin, kernel, kernel, dtype=torch.float64) / cin**0.5).requires_grad_()
        return functional.Unit(weight, **{"act": "silu", "padding": kernel // 2, "training": True} | options)

    first, second, strided, down = unit(4), unit(6), unit(4, stride=2), unit(4, 1, act=None)
    x = torch.randn(3, 4, 9, 8, dtype=torch.float64) + 0.4
    average, maximum = functional.PoolSpec.make(2, 2, 0, True, False), functional.PoolSpec.make(3, 2, 1)
    summand = torch.randn(3, 6, 9, 8, dtype=torch.float64)
    calls: dict[str, Callable[[Tensor], Tensor]] = {
        "pad": lambda x: functional.residual_chain(x, [first, second], shortcut="pad"),
        "tensor": lambda x: functional.residual_chain(
            x, [first, second], shortcut=None, residual=summand * x.mean(1, keepdim=True)
        ),
        "max_pool": lambda x: functional.conv_bn_act(
            x, first.weight, padding=1, act="silu", training=True, max_pool=maximum, recompute=True
        ),
        "average": lambda x: functional.residual_chain(x, [strided], shortcut=down, shortcut_pool=average),
    }
    call, leaf = calls[closing], x.clone().requires_grad_()
    out = call(leaf)
    cotangent = torch.zeros_like(out, requires_grad=True)
    (dx,) = torch.autograd.grad(out, leaf, cotangent, create_graph=True)
    (want,) = torch.autograd.grad(dx, cotangent, x.sin())
    torch.testing.assert_close(jvp(call, (x,), (x.sin(),)), (out.detach(), want))
