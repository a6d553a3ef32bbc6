"""Networks with norms that tell mistakes apart, images for them, a training step, a distance: what many tests share."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet.chain.packing import Weight
from fused_resnet.frozen.folded import FoldedChain, FoldedUnit
from fused_resnet.frozen.modules import Frozen
from fused_resnet.models.resnet import BasicBlock, Bottleneck, ResNet
from fused_resnet.spec import ChainSpec, UnitSpec

SIZE = 48
# Of a model that torch.export takes with any number of images.
BATCH = torch.export.Dim("batch", min=1, max=64)


def prepared(model: nn.Module) -> nn.Module:
    """Norms with gamma of both signs and running statistics that are not 0 and 1."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            m.weight.data *= torch.where(torch.rand_like(m.weight) < 0.2, -1.0, 1.0)
            nn.init.normal_(m.bias, 0.1, 0.2)
            nn.init.normal_(m.running_mean, 0.0, 0.3)
            nn.init.uniform_(m.running_var, 0.5, 2.0)
    return model


def narrow(model: nn.Module, by: int = 4) -> nn.Module:
    """A ResNet with a fourth of the channels, and a sixteenth of the work."""
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            cin = m.in_channels if m.in_channels == 3 else m.in_channels // by
            geometry = m.kernel_size, m.stride, m.padding, m.dilation, m.groups
            m.__init__(cin, m.out_channels // by, *geometry, bias=m.bias is not None)
        elif isinstance(m, nn.BatchNorm2d):
            m.__init__(m.num_features // by)
        elif isinstance(m, nn.Linear):
            m.__init__(m.in_features // by, m.out_features)
    return model


def images(n: int = 2, channels_last: bool = True) -> torch.Tensor:
    x = torch.randn(n, 3, SIZE, SIZE) * 1.3 + 0.4
    return x.to(memory_format=torch.channels_last) if channels_last else x


def step(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.train()
    model.zero_grad()
    out = model(x)
    (out.square().mean() + out.sin().mean()).backward()
    return out.detach(), {n: p.grad for n, p in model.named_parameters()}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.detach(), b.detach()
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-12))


def small() -> nn.Module:
    """Every kind of convolution of a ResNet, in four blocks."""
    return prepared(ResNet(Bottleneck, [1, 1, 1, 1], num_classes=5, avg_down=True)).eval()


def tiny(seed: int = 0) -> nn.Module:
    """A stem, a block with an identity and one with a projection, narrow."""
    torch.manual_seed(seed)
    stem = [nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    down = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
    blocks = [BasicBlock(8, 8), BasicBlock(8, 16, 2, down)]
    return prepared(nn.Sequential(*stem, *blocks, nn.Flatten(), nn.Linear(16 * 6 * 6, 5))).eval()


def blocks(frozen: Frozen) -> list[FoldedChain]:
    """The folded chains of a frozen model's latest graph, and its head."""
    rows = {id(chain.choice): chain.choice for chain in frozen.front().graphs[-1].chains}
    return [chain for row in rows.values() for chain in row.folded]


def folded(params: Sequence[Tensor], chains: Sequence[ChainSpec]) -> list[FoldedChain]:
    """Frozen chains of these specs. ``params``: the weight and the bias of each unit, a chain's projection last."""
    it = iter(params)

    def unit(u: UnitSpec) -> FoldedUnit:
        weight = next(it)
        return FoldedUnit(weight if u.conv is None else Weight(weight), next(it), u.conv, u.act)

    return [FoldedChain(chain, [unit(u) for u in chain.all_units]) for chain in chains]


def frozen_beside_plain(model: nn.Module, x: Tensor, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, set[str]]:
    """The model frozen for ``dtype``, held to plain's values in float64 for three batches, and the operators that it
    runs."""
    frozen = fr.freeze(model, x, dtype=dtype)
    for batch in (x, x[:1] * 0.7 + 0.2, x.repeat(3, 1, 1, 1) - 0.3):
        close_to_plain(frozen, model, batch)
    with torch.profiler.profile() as profile:
        frozen(x.to(dtype))
    return frozen, {event.key for event in profile.key_averages()}


# A model's dtype, and the one that it is frozen for.
FREEZINGS = [
    (torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.float64, torch.float32),
    (torch.float64, torch.float64),
]  # fmt: skip


def close_to_plain(frozen: nn.Module, model: nn.Module, x: Tensor) -> None:
    """Asserts that a frozen model is as near to plain's values in float64 as its dtype allows."""
    with torch.no_grad():
        got, want = frozen(x.to(frozen.dtype)).double(), copy.deepcopy(model).double()(x.double())
    bound = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float64: 1e-12}[frozen.dtype]
    assert torch.linalg.vector_norm(got - want) < bound * torch.linalg.vector_norm(want)
