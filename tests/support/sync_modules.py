"""Cases for several processes (see processes.py): fused networks with SyncBatchNorm, alone and under DDP."""

from __future__ import annotations

import copy

import processes
import sync_chains
import torch
import torch.distributed as dist
from sync_chains import assert_near, assert_same_everywhere, own, shares, summed
from tolerances import assert_as_good
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint

import fused_resnet as fr
from fused_resnet import functional
from fused_resnet.explanation import Row
from fused_resnet.fusion import front
from fused_resnet.models import BasicBlock, Bottleneck

convert = nn.SyncBatchNorm.convert_sync_batchnorm


class Net(nn.Module):
    """A stem with a max-pool's stage of bottlenecks and one of basic blocks, an average and a classifier: small."""

    def __init__(self, **norm: object) -> None:
        super().__init__()

        def layer(channels: int) -> nn.Module:
            return nn.BatchNorm2d(channels, **norm)  # type: ignore[arg-type]

        def projection(cin: int, cout: int, stride: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), layer(cout))

        self.stem = fr.ConvBNAct(3, 8, act="silu")
        self.stem.bn = layer(8)  # type: ignore[assignment]
        self.layer1 = nn.Sequential(
            Bottleneck(8, 4, downsample=projection(8, 16, 1), norm_layer=layer), Bottleneck(16, 4, norm_layer=layer)
        )
        self.layer2 = nn.Sequential(
            BasicBlock(16, 12, 2, projection(16, 12, 2), norm_layer=layer), BasicBlock(12, 12, norm_layer=layer)
        )
        self.fc = nn.Linear(12, 5)
        for m in self.modules():
            if isinstance(m, Bottleneck | BasicBlock):
                m.relu = nn.SiLU()  # smooth: rounding moves no value across a kink
            if isinstance(m, nn.BatchNorm2d) and m.affine:
                nn.init.uniform_(m.weight, 0.5, 1.5)
                m.weight.data *= torch.where(torch.rand_like(m.weight) < 0.3, -1.0, 1.0)
                nn.init.normal_(m.bias, 0.1, 0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer2(self.layer1(self.stem(x))).mean((2, 3)))


def plain_twin(model: nn.Module) -> nn.Module:
    """The same weights as ordinary modules, one after the other."""
    twin = fr.unfuse(copy.deepcopy(model))
    stem = twin.stem
    twin.stem = nn.Sequential(stem.conv, stem.bn, stem.act)
    return twin


def blocks(model: nn.Module) -> list[Row]:
    """What explain says of the stem and the residual blocks, which ran."""
    return [row for row in fr.explain(model).rows if row.fused]


def draw(world: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """A joint batch and the gradient of the networks' output; the same in every process."""
    n = sum(shares(world))
    return (torch.randn(n, 3, 8, 7) * 1.4 + 0.6).to(dtype), (torch.randn(n, 5) + 0.2).to(dtype)


def step(model: nn.Module, x: Tensor, dout: Tensor) -> dict[str, Tensor]:
    """Output, gradients and buffers after one training step."""
    model.train().zero_grad()
    x = x.clone().requires_grad_()
    out = model(x)
    out.backward(dout)
    found = {"out": out.detach(), "dx": x.grad}
    found |= {f"d {n}": p.grad for n, p in model.named_parameters()}
    return found | {n: b.clone() for n, b in model.named_buffers()}


def compare(got: dict[str, Tensor], want: dict[str, Tensor], rank: int, world: int) -> None:
    """This process's step against the joint batch's: gradients of parameters add up, statistics are everybody's."""
    names = iter(got.items())
    for name, expected in want.items():
        name_here, value = next(names)
        if name in ("out", "dx"):
            assert_near(name, value, own(expected, rank, shares(world)))
        elif name.startswith("d "):
            # a convolution's bias before a BatchNorm has no gradient
            size = want["out"] if name.endswith("conv.bias") else None
            assert_near(f"{name_here} ({name})", summed(value), expected, size=size)
        elif value.is_floating_point():
            assert_near(name, value, expected)
            assert_same_everywhere(name, value)
        else:
            assert torch.equal(value, expected), name


# ---------------------------------------------------------------------------------------------------- conversions
def both_orders(rank: int, world: int) -> None:
    """convert(fuse(m)) and fuse(convert(m)) are the joint batch's network, in float64 and float32, bit by bit equal."""
    for norm in ({}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}):
        for dtype in (torch.float64, torch.float32) if not norm else (torch.float64,):
            model = Net(**norm)
            x, dout = draw(world)
            truth = plain_twin(model).double()
            model = model.to(dtype)
            x_own, dout_own = (own(t, rank, shares(world)).to(dtype) for t in (x, dout))
            one, other = convert(fr.fuse(copy.deepcopy(model))), fr.fuse(convert(copy.deepcopy(model)))
            for _ in range(2):
                want = step(truth, x, dout)
                found, again = step(one, x_own, dout_own), step(other, x_own, dout_own)
                compare(found, want, rank, world)
                assert all(torch.equal(found[name], again[name]) for name in found)
            shared = f"statistics over the process group of {world}"
            assert [row.statistics for row in blocks(one)] == [row.statistics for row in blocks(other)] == [shared] * 5
            assert str(fr.explain(one)).count(shared) == 5


def behind_plain_convolutions(rank: int, world: int) -> None:
    """Norms whose convolutions no chain takes are joint in either order, on CPUs too, where PyTorch's refuse to run."""
    model = nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(6), nn.SiLU()),
        *(nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular", bias=False), nn.BatchNorm2d(4)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)),
    ).double()
    x, dout = draw(world)
    want = step(copy.deepcopy(model), x, dout)
    for fused in (convert(fr.fuse(copy.deepcopy(model))), fr.fuse(convert(copy.deepcopy(model)))):
        found = step(fused, own(x, rank, shares(world)), own(dout, rank, shares(world)))
        assert sum(row.chains for row in blocks(fused)) == 2 and not any(row.reason for row in blocks(fused))
        # a bias before a BatchNorm has no gradient but rounding's
        assert_near("d 0.bias", summed(found.pop("d 0.bias")), want["d 0.bias"], size=want["out"])
        compare(found, {name: t for name, t in want.items() if name != "d 0.bias"}, rank, world)


def same_bits_every_time(rank: int, world: int) -> None:
    """Two runs of the same step are equal, bit by bit."""
    model = convert(fr.fuse(Net()))
    x, dout = (own(t, rank, shares(world)) for t in draw(world, torch.float32))
    twin = copy.deepcopy(model)
    one, other = step(model, x, dout), step(twin, x, dout)
    assert all(torch.equal(one[name], other[name]) for name in one)


def evaluation_is_everybodys_own(rank: int, world: int) -> None:
    """In eval mode running statistics serve and nobody waits for anybody; freeze folds them."""
    model = convert(fr.fuse(Net()))
    x, dout = draw(world, torch.float32)
    step(model, own(x, rank, shares(world)), own(dout, rank, shares(world)))
    if rank == 0:  # a collective would wait for the others for ever
        with torch.no_grad():
            want = plain_twin(model).eval()(x)
            torch.testing.assert_close(model.eval()(x), want)
            torch.testing.assert_close(fr.freeze(model, x)(x), want, rtol=1e-4, atol=1e-5)
    dist.barrier()


def process_groups(rank: int, world: int) -> None:
    """Each norm follows its own group: pairs share, a process alone in its group is on its own; copies share groups."""
    pair, single = dist.new_group([0, 1]), dist.new_group([world - 1])
    x, dout = (own(t, rank, shares(world)) for t in draw(world))
    model = Net().double()
    for group, members in ((pair, [0, 1]), (single, [world - 1])):
        fused = fr.fuse(convert(copy.deepcopy(model), group))
        alone = rank not in members or len(members) == 1
        if alone and len(x) == 1:
            x, dout = x.repeat(2, 1, 1, 1) + torch.randn(2, 1, 1, 1), dout.repeat(2, 1)
        if alone:
            want = step(plain_twin(model), x, dout)
            found = step(fused, x, dout)
            for (name, got), expected in zip(found.items(), want.values(), strict=True):
                assert_near(name, got, expected) if got.is_floating_point() else None
            said = {row.statistics for row in blocks(fused)}
            assert said == {"statistics of this process alone: no process group"}
    torch.manual_seed(5)
    fused = fr.fuse(convert(copy.deepcopy(model), pair))
    x, dout = draw(2)
    want = step(plain_twin(model), x, dout)
    if rank < 2:
        found = step(fused, own(x, rank, shares(2)), own(dout, rank, shares(2)))
        assert {row.statistics for row in blocks(fused)} == {"statistics over the process group of 2"}
        for (name, got), expected in zip(found.items(), want.values(), strict=True):
            if name in ("out", "dx"):
                assert_near(name, got, own(expected, rank, shares(2)))
            elif got.is_floating_point() and not name.startswith("d "):
                assert_near(name, got, expected)
    fr.freeze(fused.float(), x.float())  # copies the model, whose groups can't be copied


def refusals(rank: int, world: int) -> None:
    """One value per channel in all is everybody's error, and leaves the statistics; so is a group that is none."""
    model = convert(fr.fuse(Net()))
    before = {name: b.clone() for name, b in model.named_buffers()}
    x = torch.randn(1 if rank == 0 else 0, 3, 1, 1)
    for train in (lambda: model.train()(x), lambda: model.stem.train()(x)):
        try:
            train()
        except ValueError as error:
            assert "x: expected more than 1 value per channel" in str(error) and f"{world} processes" in str(error)
        else:
            raise AssertionError("no error")
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    try:
        functional.bn_act(torch.randn(2, 3, 4, 4), training=True, process_group="world")  # type: ignore[arg-type]
    except TypeError as error:
        assert "process_group: expected a torch.distributed.ProcessGroup" in str(error) and "'world'" in str(error)
    else:
        raise AssertionError("no error")


def hooks_on_a_child(rank: int, world: int) -> None:
    """A hook inside a block is called, changes what it returns, and the statistics are everybody's all the same."""
    if world > 2:
        return  # nothing new, and slow
    x, dout = draw(world)
    model = Net().double()
    model.layer1[0].conv2.register_forward_hook(lambda module, args, out: out * 1.5 + 0.1)
    truth, fused = plain_twin(model), convert(fr.fuse(model))
    for _ in range(2):
        want = step(truth, x, dout)
        compare(step(fused, own(x, rank, shares(world)), own(dout, rank, shares(world))), want, rank, world)


# ---------------------------------------------------------------------------------------------------- other tools
def checkpointing(rank: int, world: int) -> None:
    """Blocks computed again in the backward meet the same statistics, and update running ones once."""
    if world > 2:
        return  # nothing new, and slow
    x, dout = draw(world)
    model = Net().double()
    want = step(plain_twin(model), x, dout)
    for reentrant in (False, True):
        fused = convert(fr.fuse(copy.deepcopy(model)))
        inner = fused.layer1
        checkpointed = nn.Module()
        checkpointed.forward = lambda x, m=inner, r=reentrant: checkpoint(m, x, use_reentrant=r)
        forward = Net.forward

        def run(self: Net, x: Tensor, again: nn.Module = checkpointed) -> Tensor:
            return self.fc(self.layer2(again(self.stem(x))).mean((2, 3)))

        try:
            Net.forward = run
            found = step(fused, own(x, rank, shares(world)), own(dout, rank, shares(world)))
        finally:
            Net.forward = forward
        compare(found, want, rank, world)


def autocast(rank: int, world: int) -> None:
    """Under autocast statistics stay float32 and shared: as near to the float64 joint batch's as plain PyTorch's of the
    joint batch under autocast, and the same in every process."""
    if world > 2:
        return  # nothing new, and slow
    model = Net()
    draws: list[list[dict[str, Tensor]]] = []
    for _ in range(5):
        x, dout = draw(world)
        exact, plain, fused = plain_twin(model).double(), plain_twin(model), convert(fr.fuse(copy.deepcopy(model)))
        step(exact, x, dout)
        with torch.autocast("cpu", torch.bfloat16):
            plain.train()(x.float())
            out = fused.train()(own(x, rank, shares(world)).float())
        assert out.dtype == torch.bfloat16
        out.backward(own(dout, rank, shares(world)).to(out.dtype))
        draws.append([dict(m.named_buffers()) for m in (fused, plain, exact)])
        for name, b in fused.named_buffers():
            assert_same_everywhere(name, b)
    for name, b in draws[0][0].items():
        if b.is_floating_point():
            there = name.replace("stem.conv.", "stem.0.").replace("stem.bn", "stem.1")
            got, theirs, want = ([draw[i][n] for draw in draws] for i, n in enumerate((name, there, there)))
            assert_as_good(name, got, theirs, want, torch.bfloat16)


def compiled(rank: int, world: int) -> None:
    """A block in one graph without a break, by this package's backend and by another: the same numbers, the same
    collectives."""
    if world > 2:
        return  # nothing new, and slow
    block = convert(fr.fuse(Net().double().layer2[0]))
    x, dout = own(torch.randn(4, 16, 8, 7).double(), rank, [1, 3]), own(torch.randn(4, 12, 4, 4).double(), rank, [1, 3])
    twins = [copy.deepcopy(block) for _ in range(2)]
    want = step(block, x, dout)
    for twin, backend in zip(twins, (front.backend, "aot_eager"), strict=True):
        twin.eval()(x)  # names the groups
        graph = torch.compile(twin, backend=backend, fullgraph=True)
        found = step(graph, x, dout)
        for (name, got), expected in zip(found.items(), want.values(), strict=True):
            assert_near(f"{backend}: {name}", got, expected) if got.is_floating_point() else None


# ---------------------------------------------------------------------------------------------------- DDP
def ddp_orders(model: nn.Module) -> dict[str, DDP]:
    """On a CPU DDP takes no module that has a SyncBatchNorm already, so the conversion comes after it."""
    return {
        "fuse, DDP, convert": convert(DDP(fr.fuse(copy.deepcopy(model)))),
        "DDP, fuse, convert": convert(fr.fuse(DDP(copy.deepcopy(model)))),
        "DDP, convert, fuse": fr.fuse(convert(DDP(copy.deepcopy(model)))),
    }


def ddp(rank: int, world: int) -> None:
    """Wrapped before or after fuse, DDP's averaged gradients are the joint batch's."""
    x, dout = draw(world)
    model = Net().double()
    want = step(plain_twin(model), x, dout)
    for order, wrapped in ddp_orders(model).items():
        found = step(wrapped, own(x, rank, shares(world)), own(dout, rank, shares(world)) * world)
        assert len(blocks(wrapped)) == 5 and not any(row.reason for row in fr.explain(wrapped).rows), order
        for (name, got), (_, expected) in zip(found.items(), want.items(), strict=True):
            if name == "out":
                assert_near(name, got, own(expected, rank, shares(world)))
            elif name.startswith("d "):  # the mean over processes of gradients of world times the loss
                assert_near(f"{order}: {name}", got, expected)
                assert_same_everywhere(name, got)
            elif got.is_floating_point() and name != "dx":
                assert_near(f"{order}: {name}", got, expected)


def train(model: nn.Module, x: Tensor, y: Tensor, scale: float, steps: int) -> list[float]:
    """Losses of SGD with momentum on another part of x in each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for i in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[i]), y[i], reduction="sum") * scale
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def twenty_steps(rank: int, world: int) -> None:
    """DDP + fused + SyncBatchNorm follows one process on the joint batch for 20 steps.

    In float64 to 1e-12 of the parameters' norm: the same training, apart from the order of sums. In float32 each step
    adds rounding of 6e-8 that later steps amplify, in either run: to 1e-5 (7e-7 were seen). BatchNorm of each process's
    own batch is at least a thousand times further away, which is measured beside it.
    """
    steps, sizes = 20, shares(world)
    n = sum(sizes)
    model = Net()
    x = torch.randn(steps, n, 3, 8, 7, dtype=torch.float64) * 1.4 + 0.6
    y = torch.randint(5, (steps, n))

    def parameters(m: nn.Module) -> Tensor:
        return torch.cat([p.detach().double().flatten() for p in m.parameters()])

    def follow(m: nn.Module, dtype: torch.dtype) -> Tensor:
        """The losses of this process's share of the images, summed over processes."""
        mine = [own(t.transpose(0, 1), rank, sizes).transpose(0, 1) for t in (x.to(dtype), y)]
        # DDP averages over processes: the mean over the joint batch is world/n times the sum here
        return summed(torch.tensor(train(m, *mine, world / n, steps), dtype=torch.float64)) / world

    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        alone, start = plain_twin(model).to(dtype).train(), copy.deepcopy(model).to(dtype)
        losses = torch.tensor(train(alone, x.to(dtype), y, 1 / n, steps), dtype=torch.float64)
        want = parameters(alone)
        fused = convert(DDP(fr.fuse(start)))
        torch.testing.assert_close(follow(fused, dtype), losses, rtol=bound, atol=bound)
        away = float((parameters(fused) - want).norm() / want.norm())
        assert away <= bound, f"{dtype}: {away:.2g} away, at most {bound:.0e}"
        for (name, got), expected in zip(fused.named_buffers(), alone.buffers(), strict=True):
            torch.testing.assert_close(got, expected, rtol=bound, atol=bound, msg=name)
            assert_same_everywhere(name, got)
        print(f"{dtype}: {away:.2g} from the joint batch")
    unsynchronised = DDP(fr.fuse(copy.deepcopy(model)))
    follow(unsynchronised, torch.float32)
    away = float((parameters(unsynchronised) - want).norm() / want.norm())
    print(f"without SyncBatchNorm: {away:.2g}")
    assert away > 1000 * bound


CASES: dict[str, processes.Case] = {
    case.__name__: case
    for case in (
        both_orders,
        behind_plain_convolutions,
        same_bits_every_time,
        evaluation_is_everybodys_own,
        process_groups,
        refusals,
        hooks_on_a_child,
        checkpointing,
        autocast,
        ddp,
        twenty_steps,
        compiled,
    )
}

if __name__ == "__main__":
    processes.work(sync_chains.CASES | CASES)
