"""Inference-only models: BatchNorm folded into the convolutions, weights prepacked, bias, add and act as post-ops."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fused_resnet.backends import Norm, load, vector_dtype
from fused_resnet.chain_forward import fold
from fused_resnet.modules import ChainModules, UnitModules, act_of, copy_of, has_hooks
from fused_resnet.planner import case_of, pick, run
from fused_resnet.spec import Act, ConvSpec, PoolSpec

Chains = Callable[[nn.Module], Iterable[tuple[str, nn.Module, ChainModules, Callable[[nn.Module], None]]]]
Networks = Callable[[nn.Module], Iterable[tuple[nn.Module, Sequence[str]]]]
# The stages that belong to the trunk, by the size of their tensors in the paper's networks.
_TRUNK_STAGES = 2

# Bytes of the stem's convolution per thread that a trunk makes at a time.
_TRUNK_BYTES = 8 << 20


class FrozenUnit(nn.Module):
    """act(conv(x, W) + b [+ residual]), BatchNorm folded into ``weight`` and ``bias`` (buffers)."""

    @torch.no_grad()
    def __init__(self, unit: UnitModules, act: Act, dtype: torch.dtype) -> None:
        super().__init__()
        u = unit.unit()
        assert u.weight is not None and u.running_mean is not None and u.running_var is not None
        wide = vector_dtype(u.weight.dtype)
        params = {"bn_weight": u.bn_weight, "bn_bias": u.bn_bias, "bias": u.bias, "running_mean": u.running_mean}
        norm = fold({k: v for k, v in params.items() if v is not None}, u.running_mean, u.running_var, u.eps, wide)
        weight = (u.weight.to(wide) * norm.scale[:, None, None, None]).to(dtype)
        self.weight: Tensor
        self.bias: Tensor
        self.register_buffer("weight", weight.contiguous(memory_format=torch.channels_last))
        self.register_buffer("bias", norm.shift)
        self.conv = ConvSpec.make(u.weight.shape, u.stride, u.padding, u.dilation, u.groups, bias=True)
        self.act = act
        self._packed: dict[Any, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_packed": {}}

    def forward(self, x: Tensor, residual: Tensor | None = None, inplace: bool = False) -> Tensor:
        """``inplace``: nobody else holds the residual, its memory may be reused."""
        backend = pick("conv_bias_act", case_of(x, self.conv, self.weight))
        if not hasattr(backend, "prepack"):
            out: Tensor = run("conv_bias_act", x, self.weight, self.bias, self.conv, self.act, residual)
            return out
        key = (backend.__name__, x.shape, x.dtype)
        if key not in self._packed:
            self._packed[key] = backend.prepack(self.weight, self.conv, x)
        return backend.conv_bias_act(x, self._packed[key], self.bias, self.conv, self.act, residual, inplace)

    def pooled(self, x: Tensor, pool: PoolSpec) -> Tensor:
        """max-pool of the unit's output, in one pass where the backend has one."""
        backend = pick("conv_bias_act", case_of(x, self.conv, self.weight))
        if hasattr(backend, "prepack_stem"):
            key = (backend.__name__, x.dtype, pool)
            if key not in self._packed:
                self._packed[key] = backend.prepack_stem(self.weight, self.conv, x, pool)
            if self._packed[key] is not None:
                out: Tensor = backend.conv_bias_act_max_pool(x, self._packed[key], self.bias, self.conv, self.act, pool)
                return out
        h = self(x)
        one = torch.ones(h.shape[1], dtype=vector_dtype(h.dtype), device=h.device)
        norm = Norm(one, torch.zeros_like(one), one, one)
        pooled: Tensor = run("bn_act_max_pool", h, norm, Act("identity"), pool)[0]
        return pooled


class FrozenChain(nn.Module):
    """A chain of frozen units."""

    def __init__(self, chain: ChainModules, dtype: torch.dtype) -> None:
        super().__init__()
        k = len(chain.units)
        last = act_of(chain.units[-1].act) if chain.units[-1].act is not None else Act("identity")
        self.units = nn.ModuleList(
            FrozenUnit(u, act_of(u.act) if u.act is not None and i + 1 < k else last, dtype)
            for i, u in enumerate(chain.units)
        )
        self.kind = "projection" if isinstance(chain.shortcut, UnitModules) else chain.shortcut
        self.projection: FrozenUnit | None = None
        if isinstance(chain.shortcut, UnitModules):
            self.projection = FrozenUnit(chain.shortcut, Act("identity"), dtype)
        self.avg_pool = chain.avg_pool
        self.pool = chain.max_pool_spec()
        self.stride = chain.stride

    def forward(self, x: Tensor, inplace: bool = False) -> Tensor:
        """``inplace``: nobody else holds x, its memory may be reused."""
        residual: Tensor | None = None
        h = x
        *before, last = self.units
        for unit in before:
            h = unit(h)
        assert isinstance(last, FrozenUnit)
        if self.kind == "identity":
            residual = x
        elif self.projection is not None:
            residual = self.projection(x if self.avg_pool is None else self.avg_pool(x))
        elif self.kind == "pad":
            x = x[:, :, :: self.stride, :: self.stride]
            residual = nn.functional.pad(x, (0, 0, 0, 0, 0, last.weight.shape[0] - x.shape[1]))
        if self.pool is not None:  # a chain that a pool closes has no shortcut
            return last.pooled(h, self.pool)
        out: Tensor = last(h, residual, (inplace and h is not x) or self.kind != "identity")
        return out


class FrozenStage(nn.Sequential):
    """Frozen chains in a row: what passes between them is theirs alone, so each adds into the memory it got."""

    def forward(self, x: Tensor) -> Tensor:
        for i, chain in enumerate(self):
            x = chain(x, inplace=i > 0)
        return x


class FrozenTrunk(nn.Sequential):
    """A stem and the stages behind it. On a CPU a few images at a time: these tensors are the network's largest, and
    whole they would be new memory from the system in every call."""

    def forward(self, x: Tensor) -> Tensor:
        stem = self[0]
        assert isinstance(stem, FrozenChain)
        unit = stem.units[-1]
        assert isinstance(unit, FrozenUnit)
        h, w = unit.conv.out_size(x.shape[2:], unit.weight.shape[2:])
        image = x.element_size() * unit.weight.shape[0] * h * w
        parts = -(-x.shape[0] * image // (torch.get_num_threads() * _TRUNK_BYTES))
        if x.device.type != "cpu" or parts <= 1:
            return super().forward(x)
        return torch.cat([super(FrozenTrunk, self).forward(part) for part in x.chunk(min(parts, x.shape[0]))])


class Frozen(nn.Module):
    """What ``freeze`` returns: x -> the model's output in ``dtype``, without gradients, in channels_last."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, compute: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.dtype, self.compute = dtype, compute
        self.eval()

    def train(self, mode: bool = True) -> Frozen:
        """Only ``eval()``.

        Raises:
            RuntimeError: asked to train; freeze copies the model, so train that and freeze again.
        """
        if mode:
            raise RuntimeError("train: this model is frozen for inference; train the one it was made from")
        super().train(False)
        return self

    @torch.no_grad()
    def forward(self, x: Tensor) -> Any:
        if not isinstance(x, Tensor) or x.dim() != 4 or not x.is_floating_point():
            raise ValueError(f"x: expected a floating-point tensor [N, C, H, W], got {_describe(x)}")
        with torch.autocast(x.device.type, enabled=False):
            out = self.model(x.to(self.compute).contiguous(memory_format=torch.channels_last))
        return out.to(self.dtype) if isinstance(out, Tensor) else out


def _describe(x: object) -> str:
    return f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def _join_trunk(network: nn.Module, names: Sequence[str]) -> None:
    """Puts stem and first stages into one module in the stem's place; the stages' own places become identities."""
    stem, *stages = names
    joined = [getattr(network, stem)]
    for name in stages[:_TRUNK_STAGES]:
        stage = getattr(network, name, None)
        if not isinstance(stage, FrozenStage) or has_hooks(stage):
            break
        joined.append(stage)
        setattr(network, name, nn.Identity())
    setattr(network, stem, FrozenTrunk(*joined))


def freeze_chain(
    model: nn.Module, example: Tensor, dtype: torch.dtype | None, chains: Chains, networks: Networks
) -> Frozen:
    """See ``fused_resnet.freeze``; ``chains`` finds the chains of the copy and says how to replace each, ``networks``
    the networks and the names of their stem and stages, in order."""
    if not isinstance(example, Tensor) or example.dim() != 4 or not example.is_floating_point():
        raise ValueError(f"example: expected a floating-point tensor [N, C, H, W], got {_describe(example)}")
    if dtype is None:
        dtype = next((p.dtype for p in model.parameters()), example.dtype)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating-point torch.dtype, got {dtype!r}")
    compute = dtype
    if example.device.type == "cpu" and load("cpu")[0] is not None:
        compute = load("cpu")[0].compute_dtype(dtype)  # type: ignore[union-attr]
    copied = copy_of(model).eval()
    # folded from the parameters as they are, before the rest of the model is rounded
    frozen_chains = [(replace, FrozenChain(chain, compute)) for _, _, chain, replace in list(chains(copied))]
    copied.to(example.device, compute)
    for replace, chain in frozen_chains:
        replace(chain.to(example.device))
    for stage in copied.modules():
        if type(stage) is nn.Sequential and len(stage) and all(isinstance(m, FrozenChain) for m in stage):
            stage.__class__ = FrozenStage
    for network, names in list(networks(copied)):
        if isinstance(getattr(network, names[0]), FrozenChain):
            _join_trunk(network, names)
    frozen = Frozen(copied, dtype, compute).requires_grad_(False)
    frozen(example)  # packs the weights, and shows at once what doesn't work
    return frozen
