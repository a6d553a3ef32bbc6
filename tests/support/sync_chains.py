"""Cases for several processes (see processes.py): chains whose statistics are shared, against the joint batch's."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace

import chains
import processes
import rows
import torch
import torch.distributed as dist
from torch import Tensor

from fused_resnet import functional, reference
from fused_resnet.backends import load, use_backend
from fused_resnet.spec import ChainSpec, RowSpec, UnitSpec

# Of a tensor's norm. float32: the bound that is promised. float64: rounding only.
BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-11}


# ---------------------------------------------------------------------------------------------------- helpers
def world_name() -> str:
    return dist.group.WORLD.group_name


def shares(world: int) -> list[int]:
    """An uneven batch: 1 image for the first process, 3 for the second, 2 for the third."""
    return [1, 3, 2][:world]


def own(t: Tensor, rank: int, sizes: Sequence[int]) -> Tensor:
    """This process's images of a joint batch."""
    return t.split(list(sizes))[rank].clone()


def assert_near(
    name: str, got: Tensor, want: Tensor, dtype: torch.dtype | None = None, size: Tensor | None = None
) -> None:
    """``size``: of what the error is measured by, where the values themselves may cancel to nothing."""
    assert got.shape == want.shape, f"{name}: {tuple(got.shape)}, expected {tuple(want.shape)}"
    got, want, bound = got.detach().double(), want.detach().double(), BOUNDS[dtype or got.dtype]
    error = ((got - want).norm() / (want if size is None else size.detach()).norm().clamp_min(1e-3)).item()
    assert error <= bound, f"{name}: relative error {error:.2g}, at most {bound:.0e}"


def assert_same_everywhere(name: str, t: Tensor) -> None:
    """The same bits in all processes."""
    found = [torch.empty_like(t) for _ in range(dist.get_world_size())]
    dist.all_gather(found, t.contiguous())
    assert all(torch.equal(found[0], other) for other in found), f"{name} differs between processes"


def summed(t: Tensor) -> Tensor:
    t = t.clone()
    dist.all_reduce(t)
    return t


def shared(unit: UnitSpec, group: str) -> UnitSpec:
    return replace(unit, group=group) if unit.batch_stats else unit


def shared_chain(spec: ChainSpec, group: str) -> ChainSpec:
    """The same chain with the statistics of a group."""
    unit = spec.shortcut.unit
    shortcut = replace(spec.shortcut, unit=shared(unit, group)) if unit is not None else spec.shortcut
    return replace(spec, units=tuple(shared(u, group) for u in spec.units), shortcut=shortcut)


# ---------------------------------------------------------------------------------------------------- values
def compare(
    spec: RowSpec, t: chains.Tensors, names: list[str], learn: list[bool], rank: int, sizes: Sequence[int],
    dtype: torch.dtype, layout: torch.memory_format, size: Tensor | None = None,
) -> None:  # fmt: skip
    """Output, statistics and gradients of a row on this process's images, against the reference on all images.

    ``size``: of what errors of the parameters' gradients are measured by, where these cancel to nothing.
    """

    def image(v: Tensor) -> Tensor:
        return v.to(dtype).contiguous(memory_format=layout) if v.dim() == 4 else v.to(dtype)

    leaves = [None if v is None else v.clone().requires_grad_(n) for v, n in zip(t.inputs, learn, strict=True)]
    truth = reference.row(leaves[0], leaves[1], leaves[2:], spec)
    wanted = [v for v in leaves if v is not None and v.requires_grad]
    want = dict(zip(map(id, wanted), torch.autograd.grad(truth.out, wanted, t.dout), strict=True))

    mine = [None if v is None else own(v, rank, sizes) if i < 2 else v for i, v in enumerate(t.inputs)]
    inputs = [None if v is None else image(v).requires_grad_(n) for v, n in zip(mine, learn, strict=True)]
    joint = RowSpec(tuple(shared_chain(chain, world_name()) for chain in spec.chains))
    out, *saved = torch.ops.fused_resnet.chain(inputs[0], inputs[1], inputs[2:], joint.encode())
    assert_near("out", out, own(truth.out, rank, sizes))

    params = iter(joint.split(t.params))
    stats = iter(truth.stats)
    kept = iter(saved[len(joint.chains) - 1 :])
    for chain in joint.chains:
        parts = chain.split(next(params))
        for _ in range(chain.n_convs):
            next(kept)
        for p, unit in zip(parts, chain.all_units, strict=True):
            mean_and_var = next(stats)
            _, _, mean, _, *rest = (next(kept) for _ in range(unit.n_vectors))
            if mean_and_var is None:
                continue
            var, count = rest
            assert_near("mean", mean + p.get("bias", 0), mean_and_var[0], dtype, mean_and_var[1].sqrt())
            assert_near("var", var, mean_and_var[1], dtype)
            assert summed(count) == count * len(sizes) and count % sum(sizes) == 0
            for what in (mean, var, count):
                assert_same_everywhere("statistics", what)
        if chain.pool is not None:
            next(kept)

    named = [
        (n, leaf, v) for n, leaf, v in zip(names, leaves, inputs, strict=True) if v is not None and v.requires_grad
    ]
    grads = torch.autograd.grad(out, [v for *_, v in named], image(own(t.dout, rank, sizes)))
    for (name, leaf, _), grad in zip(named, grads, strict=True):
        expected = want[id(leaf)]
        if name in ("x", "residual"):
            assert_near(f"d {name}", grad, own(expected, rank, sizes))
        else:  # each process has the gradient of its own use of a parameter
            # that of a bias before a BatchNorm is 0: rounding is all that there is
            assert_near(f"d {name}", summed(grad), expected, size=t.dout if name.endswith(".bias") else size)


def of_chain(shape: str, act: str, mode: str, rank: int, sizes: Sequence[int], dtype: torch.dtype) -> None:
    chain = chains.make(shape, act, mode, width=2, batch=sum(sizes))
    t = chains.draw(chain)
    layout = torch.channels_last if dtype == torch.float32 else torch.contiguous_format
    compare(RowSpec((chain.spec,)), t, chain.names, chains.learnable(chain), rank, sizes, dtype, layout)


def every_shape(shape: str) -> processes.Case:
    def case(rank: int, world: int) -> None:
        # behind the identity a 1x1 convolution's BatchNorm takes away what the one before added: beta has no gradient
        acts = itertools.cycle([act for act in chains.ACTS if act != "identity"])
        for _ in range(list(chains.SHAPES).index(shape)):
            next(acts)
        more = ("batch-conv_bias", "batch-no_affine", "batch-gamma_or_beta", "mixed") if world == 2 else ()
        for mode in ("batch", *more):
            act = next(acts)
            for backend, dtype in (("aten", torch.float64), ("cpu", torch.float32)):
                with use_backend(backend) if load(backend)[0] is not None else nullcontext():
                    of_chain(shape, act, mode, rank, shares(world), dtype)

    return case


def every_row(name: str) -> processes.Case:
    def case(rank: int, world: int) -> None:
        row = rows.make(name, "silu", "batch", batch=sum(shares(world)))
        t, learn = rows.draw(row), [True, False, *(not n.startswith("running") for n, _ in row.param_shapes)]
        names = [row.names[0], "residual", *row.names[1:]]
        for dtype in BOUNDS:
            compare(row.spec, t, names, learn, rank, shares(world), dtype, torch.channels_last)

    return case


def interpreted(rank: int, world: int) -> None:
    """Triton's kernels, where they can be interpreted: what they make of the sums over all processes."""
    if load("triton")[0] is None or world > 2:
        return
    with use_backend("triton"):
        of_chain("basic_projection", "silu", "batch", rank, shares(world), torch.float32)


def empty_batch(rank: int, world: int) -> None:
    """A process without images takes part, so that the others go on; it has their statistics and gradients of zero."""
    for shape in ("basic_projection", "bottleneck", "stem", "no_conv_residual", "resnet_d"):
        of_chain(shape, "silu", "batch", rank, [0, 3, 2][:world], torch.float32)
        of_chain(shape, "silu", "mixed", rank, [2, 0, 1][:world], torch.float64)


def one_value_per_process(rank: int, world: int) -> None:
    """One pixel per process: one value per channel here, ``world`` in all, which is enough. (Of two values one is at
    +1 and one at -1, whatever the weights: these have next to no gradient.)"""
    for dtype in BOUNDS:
        chain = chains.make("conv_1x1_identity", "silu", "batch", 2, world, (1, 1))
        t = chains.draw(chain)
        sizes = [1] * world
        learn, nhwc = chains.learnable(chain), torch.channels_last
        compare(RowSpec((chain.spec,)), t, chain.names, learn, rank, sizes, dtype, nhwc, size=t.dout)


def far_from_zero(rank: int, world: int) -> None:
    """|mean| = 1e4 std, another one in each process: of the variance nothing is lost in merging but what float32 can't
    tell of the means, half of 2**-10. (By sum y^2 - (sum y)^2 / M nothing would be left.)"""
    x = torch.randn(4 * world, 3, 5, 5, dtype=torch.float64)
    x = (x + 1e4 + torch.arange(4 * world)[:, None, None, None] // 4 * 0.5).float()
    mean, var = torch.zeros(3), torch.ones(3)
    out = functional.bn_act(
        own(x, rank, [4] * world), None, None, mean, var, act=None, training=True, momentum=1.0,
        process_group=dist.group.WORLD,
    )  # fmt: skip
    want_mean, want_var = reference.batch_stats(x.double())
    count = x.numel() // 3
    torch.testing.assert_close(mean.double(), want_mean, rtol=1e-7, atol=0)
    torch.testing.assert_close(var.double(), want_var * count / (count - 1), rtol=2e-3, atol=0)
    assert out.abs().max() < 6


# ---------------------------------------------------------------------------------------------------- gradients
def double_backward(rank: int, world: int) -> None:
    """The gradient of a gradient penalty, over all processes."""
    sizes = shares(world)
    chain = chains.make("basic_projection", "silu", "batch", batch=sum(sizes))
    t, learn = chains.draw(chain), chains.learnable(chain)
    spec = RowSpec((shared_chain(chain.spec, world_name()),))

    def second(call: Callable[[list[Tensor]], Tensor], inputs: list[Tensor], dout: Tensor) -> list[Tensor]:
        out = call(inputs)
        first = torch.autograd.grad(out, inputs, dout, create_graph=True)
        penalty = sum(((g + 0.3) ** 3).sum() for g in first[:1])
        return list(torch.autograd.grad(penalty, inputs, materialize_grads=True, allow_unused=True))

    leaves = [v.clone().requires_grad_() for v, n in zip(t.inputs, learn, strict=True) if n]
    want = second(lambda v: reference.row(v[0], None, v[1:], RowSpec((chain.spec,))).out, leaves, t.dout)
    mine = [own(v, rank, sizes) if i == 0 else v.clone() for i, v in enumerate(v.detach() for v in leaves)]
    mine = [v.requires_grad_() for v in mine]
    operator = torch.ops.fused_resnet.chain
    got = second(lambda v: operator(v[0], None, v[1:], spec.encode())[0], mine, own(t.dout, rank, sizes))
    assert_near("dx", got[0], own(want[0], rank, sizes))
    for i, (g, w) in enumerate(zip(got[1:], want[1:], strict=True)):
        if w.norm() > 1e-6:
            assert_near(f"parameter {i}", summed(g), w)


def part_of_the_parameters(rank: int, world: int) -> None:
    """Whatever wants a gradient, processes stay in step, and it is the same one as when all want it."""
    sizes = shares(world)
    for shape in ("bottleneck_projection", "no_conv_then_conv", "resnet_d"):
        chain = chains.make(shape, "silu", "batch", batch=sum(sizes))
        t, text = chains.draw(chain), shared_chain(chain.spec, world_name()).encode()

        def gradients(needs: Sequence[bool]) -> list[Tensor | None]:
            mine = [None if v is None else own(v, rank, sizes) if i < 2 else v for i, v in enumerate(t.inputs)]  # noqa: B023
            inputs = [None if v is None else v.requires_grad_(n) for v, n in zip(mine, needs, strict=True)]
            for v in t.params:  # noqa: B023
                v.grad = None
            out = torch.ops.fused_resnet.chain(inputs[0], inputs[1], inputs[2:], text)[0]  # noqa: B023
            out.backward(own(t.dout, rank, sizes))  # noqa: B023
            grads = [None if v is None else v.grad for v in inputs]
            for v in t.params:  # noqa: B023
                v.requires_grad_(False)
            return grads

        everything = gradients(chains.learnable(chain))
        for only in range(len(everything)):
            if everything[only] is None:
                continue
            grads = gradients([i == only for i in range(len(everything))])
            assert torch.equal(grads[only], everything[only]), f"{shape}: {chain.names[only]}"


CASES: dict[str, processes.Case] = {
    **{f"shape {name}": every_shape(name) for name in chains.SHAPES},
    **{f"row {name}": every_row(name) for name in rows.ROWS},
    **{
        case.__name__: case
        for case in (
            interpreted,
            empty_batch,
            one_value_per_process,
            far_from_zero,
            double_backward,
            part_of_the_parameters,
        )
    },
}
