"""A call of the functional API, run by it and by PyTorch's own functions: what the tests of both compare."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import chains
import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close
from torch import Tensor

from fused_resnet import functional as fr
from fused_resnet import reference
from fused_resnet.functional import Unit
from fused_resnet.spec import Act, PoolSpec

TENSORS = ("weight", "bn_weight", "bn_bias", "running_mean", "running_var", "bias")
LEARNT = ("weight", "bn_weight", "bn_bias", "bias")
LAYOUTS = chains.LAYOUTS


# ------------------------------------------------------------------------------------------------------- both ways
@dataclass
class Case:
    """A call: x, units (two or three make a block), and how the block closes."""

    x: Tensor
    units: list[Unit]
    residual: Tensor | None = None
    shortcut: str | Unit | None = None
    max_pool: PoolSpec | None = None
    recompute: bool = False

    @property
    def everyone(self) -> list[Unit]:
        return [*self.units, self.shortcut] if isinstance(self.shortcut, Unit) else list(self.units)

    def clone(self, dtype: torch.dtype | None = None) -> Case:
        """Tensors of its own (strides, offsets and expansion kept), in ``dtype`` if given."""

        def fresh(v: Any) -> Any:
            if isinstance(v, Unit):
                return Unit(**{f.name: fresh(getattr(v, f.name)) for f in fields(v)})
            if isinstance(v, Tensor):
                same = v.detach().to(dtype) if dtype is not None and dtype != v.dtype else copy.copy(v.detach())
                return same.requires_grad_(v.requires_grad)
            return v

        case = replace(self, x=fresh(self.x), residual=fresh(self.residual), shortcut=fresh(self.shortcut))
        case.units = [fresh(u) for u in self.units]
        for unit in case.everyone:
            for name in ("running_mean", "running_var"):
                value = getattr(unit, name)
                setattr(unit, name, value.clone() if value is not None else None)
        return case


def fused(c: Case) -> Tensor:
    """The functional API."""
    if len(c.units) > 1 or (c.shortcut is not None):
        return fr.residual_chain(c.x, c.units, shortcut=c.shortcut, residual=c.residual)
    (u,) = c.units
    options = {n: getattr(u, n) for n in ("act", "training", "momentum", "eps")} | {"residual": c.residual}
    bn = [getattr(u, n) for n in TENSORS[1:5]]
    if u.weight is None:
        return fr.bn_act(c.x, *bn, **options)
    options |= {n: getattr(u, n) for n in ("bias", "stride", "padding", "dilation", "groups")}
    return fr.conv_bn_act(c.x, u.weight, *bn, max_pool=c.max_pool, recompute=c.recompute, **options)


def plain(c: Case) -> Tensor:
    """PyTorch's own functions in a row."""

    def normalised(h: Tensor, u: Unit) -> Tensor:
        if u.weight is not None:
            conv = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[h.dim()]
            h = conv(h, u.weight, u.bias, u.stride, u.padding, u.dilation, u.groups)
        return F.batch_norm(h, u.running_mean, u.running_var, u.bn_weight, u.bn_bias, u.training, u.momentum, u.eps)

    h = c.x
    for i, u in enumerate(c.units):
        h = normalised(h, u)
        if i + 1 == len(c.units):
            if isinstance(c.shortcut, Unit):
                h = h + normalised(c.x, c.shortcut)
            elif c.shortcut == "identity":
                h = h + c.x
            elif c.residual is not None:
                h = h + c.residual
        h = reference.act(h, Act.make(u.act))
    pool = {3: F.max_pool1d, 4: F.max_pool2d, 5: F.max_pool3d}[h.dim()]
    return pool(h, c.max_pool.kernel, c.max_pool.stride, c.max_pool.padding) if c.max_pool is not None else h


def outcome(way: Callable[[Case], Tensor], case: Case, dout: Tensor | None) -> dict[str, Tensor]:
    """out, running statistics and, with a ``dout``, the gradients, after one call."""
    c = case.clone(dout.dtype if dout is not None and dout.dtype == torch.float64 else None)
    out = way(c)
    found = {"out": out.detach()}
    leaves: dict[str, Tensor | None] = {"x": c.x, "residual": c.residual}
    for i, u in enumerate(c.everyone):
        leaves |= {f"{i}.{n}": getattr(u, n) for n in LEARNT}
        found |= {f"{i}.{n}": getattr(u, n) for n in ("running_mean", "running_var") if getattr(u, n) is not None}
    wanted = {n: v for n, v in leaves.items() if v is not None and v.requires_grad}
    if dout is not None and out.requires_grad:
        grads = torch.autograd.grad(out, list(wanted.values()), dout, allow_unused=True)
        found |= {f"d {n}": g if g is not None else torch.zeros_like(wanted[n]) for n, g in zip(wanted, grads)}
    return found


def terms(c: Case) -> int:
    """The longest sum behind an element."""
    taps = [math.prod(u.weight.shape[1:]) for u in c.everyone if u.weight is not None]
    return max([c.x.numel() // c.x.shape[1], *taps])


def same(case: Case, grad: bool = True, names: set[str] | None = None) -> dict[str, Tensor]:
    """The fused call equals the plain one, computed in float64: output, statistics, gradients."""
    with torch.no_grad():
        shape = plain(case.clone()).shape
    dout = torch.randn(shape, dtype=case.x.dtype) + 0.1 if grad else None
    got = outcome(fused, case, dout)
    wide = replace(case, x=case.x.double(), residual=case.residual.double() if case.residual is not None else None)
    wide.units = [in_float64(u) for u in case.units]
    wide.shortcut = in_float64(case.shortcut) if isinstance(case.shortcut, Unit) else case.shortcut
    want = outcome(plain, wide, dout.double() if dout is not None else None)
    assert got.keys() == want.keys()
    for name in want:
        assert_close(name, got[name], want[name], terms(case))
        assert got[name].dtype == case.x.dtype, f"{name}: {got[name].dtype}"
    return got


def in_float64(u: Unit) -> Unit:
    def wide(v: Any) -> Any:
        return v.detach().double().requires_grad_(v.requires_grad) if isinstance(v, Tensor) else v

    return Unit(**{f.name: wide(getattr(u, f.name)) for f in fields(u)})


def image(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape) * 1.5 + 0.7).to(dtype).requires_grad_()


def unit(cin: int | None, cout: int, kernel: int | tuple[int, ...] = 3, **options: Any) -> Unit:
    """A training unit with gammas of both signs; ``cin=None``: without a convolution. Tensors may be overridden."""
    k = (kernel, kernel) if isinstance(kernel, int) else kernel
    groups = options.get("groups", 1)
    gamma = torch.rand(cout) + 0.5
    gamma[::2] *= -1
    made: dict[str, Any] = {
        "bn_weight": gamma.requires_grad_(),
        "bn_bias": (torch.randn(cout) * 0.5).requires_grad_(),
        "running_mean": torch.randn(cout),
        "running_var": torch.rand(cout) + 0.5,
        "training": True,
        "act": "silu",
    }
    if cin is not None:
        weight = torch.randn(cout, cin // groups, *k) / math.sqrt(cin // groups * math.prod(k))
        made |= {"weight": weight.requires_grad_(), "padding": tuple(n // 2 for n in k)}
    return Unit(**made | options)


def block(cin: int = 4, width: int = 3, **options: Any) -> list[Unit]:
    """A bottleneck's three units."""
    return [unit(cin, width, 1, **options), unit(width, width, 3, **options), unit(width, cin, 1, **options)]


BOTH = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
