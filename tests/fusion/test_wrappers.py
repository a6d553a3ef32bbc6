"""FSDP2 and DDP around fused networks, on two processes: the parameters that the plain network gets under them.

(What DistributedDataParallel and SyncBatchNorm owe to a single process over the joint batch is tested elsewhere.)
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from stack import images, loss_of, network, same
from tolerances import assert_as_good
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet.fusion.classes import FusedModule

WORLD = 2
# what is wrapped: the whole network, each block by itself too, each stage by itself too
UNITS = {"network": (), "blocks": ("layer1.0", "layer1.1", "layer2.0", "layer3.0"), "stages": ("layer1", "layer2")}


def trained(model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """Parameters and buffers after two clipped steps, gathered."""

    def whole(v: Tensor) -> Tensor:
        return v.full_tensor() if hasattr(v, "full_tensor") else v

    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for x in batches:
        optimizer.zero_grad()
        loss_of(model(x)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    with torch.no_grad():
        out = model.eval()(batches[0])
    model.train()
    return {n.removeprefix("module."): whole(v).detach().clone() for n, v in model.state_dict().items()} | {"out": out}


def fsdp(model: nn.Module, units: str, **options: Any) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))
    for name in UNITS[units]:
        fully_shard(model.get_submodule(name), mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def in_chains(model: nn.Module) -> None:
    """Its calls ran chains, and every norm is in one."""
    rows = fr.explain(model).rows
    assert rows and all(row.fused and not row.reason for row in rows), str(fr.explain(model))


def check_fsdp(model: nn.Module, batches: list[Tensor], units: str) -> None:
    """Sharded before or after ``fuse``, it learns what the plain network learns, and does so again once unfused."""
    from torch.distributed.fsdp import FSDPModule

    plain = fsdp(copy.deepcopy(model), units)
    want, later = trained(plain, batches), trained(plain, batches)
    after = fr.fuse(fsdp(copy.deepcopy(model), units))
    for fused in (fsdp(fr.fuse(copy.deepcopy(model)), units), after):
        assert isinstance(fused, FSDPModule)
        assert any(p.to_local().numel() < p.numel() for p in fused.parameters()), "nothing is sharded"
        same(trained(fused, batches), want)
        in_chains(fused)
        # back to plain, sharded as before, and on
        assert fr.unfuse(fused) is fused and isinstance(fused, FSDPModule)
        assert not any(isinstance(m, FusedModule) for m in fused.modules())
        fused.unshard()
        fused.reshard()
        same(trained(fused, batches), later)


def check_mixed_precision(model: nn.Module) -> None:
    """Parameters gathered in 16 bits beside running statistics in 32, which PyTorch's own norms refuse on a CPU: theirs
    have 16, and are only written here."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32)

    def moved(m: nn.Module, batches: list[Tensor], **options: Any) -> Tensor:
        m = fsdp(m, "network", **options)
        before = {n: p.full_tensor().clone() for n, p in m.named_parameters()}
        after = trained(m, batches)
        return torch.cat([(after[n] - p).flatten() for n, p in before.items()])

    draws = []
    for _ in range(3):
        inputs = [images(3).float() for _ in range(2)]
        plain = copy.deepcopy(model).float()
        for m in plain.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean, m.running_var = m.running_mean.bfloat16(), m.running_var.bfloat16()
        low = fr.fuse(copy.deepcopy(model)).float()
        draws.append(
            (
                moved(low, inputs, mp_policy=policy),
                moved(plain, inputs, mp_policy=policy),
                moved(copy.deepcopy(model), [x.double() for x in inputs]),
            )
        )
    assert all((got - want).norm() > 0 for got, _, want in draws)
    assert_as_good("movement", *zip(*draws, strict=True), torch.bfloat16)


def check_ddp(model: nn.Module, batches: list[Tensor]) -> None:
    from torch.nn.parallel import DistributedDataParallel

    want = trained(DistributedDataParallel(copy.deepcopy(model)), batches)
    for ddp in (
        DistributedDataParallel(fr.fuse(copy.deepcopy(model))),
        fr.fuse(DistributedDataParallel(copy.deepcopy(model))),
        DistributedDataParallel(fr.fuse(copy.deepcopy(model)), static_graph=True, gradient_as_bucket_view=True),
    ):
        same(trained(ddp, batches), want)
        in_chains(ddp)


def worker(rank: int, folder: str, units: tuple[str, ...]) -> None:
    import any_size  # noqa: F401
    import captures

    captures.cheaper()
    warnings.simplefilter("error")  # "runs plain" would be one
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    torch.manual_seed(0)
    model = network()
    torch.manual_seed(rank + 1)
    batches = [images(3) for _ in range(2)]
    for unit in units:
        check_fsdp(model, batches, unit)
    check_mixed_precision(model)
    check_ddp(model, batches)
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo")
def test_fsdp_and_ddp_before_and_after_fuse(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """``--full``: stages wrapped as well, which blocks are the finer case of."""
    units = tuple(UNITS) if pytestconfig.getoption("--full") else ("network", "blocks")
    torch.multiprocessing.spawn(worker, (str(tmp_path), units), nprocs=WORLD)
