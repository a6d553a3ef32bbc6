"""The chain's backward: derivatives, what the forward keeps for it, no work that nobody needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chains
import pytest
import torch
from chains import call, leaves
from functional_cases import unit
from torch import Tensor
from watching import Calls, saved_tensors

import fused_resnet.chain.operators
from fused_resnet import functional

ACTS, MODES, SHAPES = list(chains.ACTS), list(chains.MODES), list(chains.SHAPES)


# -------------------------------------------------------------------------------------------------------- gradcheck
def gradcheck(chain: chains.Chain, check: Callable[..., bool], margin: float, **options: Any) -> bool:
    """``check`` of the chain's output as a function of all that can learn."""
    inputs = leaves(chain, chains.draw(chain, margin))
    free = [v for v in inputs if v is not None and v.requires_grad]

    def out(*values: Tensor) -> Tensor:
        it = iter(values)
        return call(chain, [next(it) if v is not None and v.requires_grad else v for v in inputs])[0]

    return check(out, free, **options)


@pytest.mark.usefixtures("in_one_thread")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradcheck(backend: str, shape: str, mode: str) -> None:
    """fp64: every gradient is the derivative, for every shape x activation x BatchNorm mode (random projections)."""
    for act in chains.some_acts(SHAPES.index(shape) + MODES.index(mode)):
        print(act)  # a failure names the last one
        assert gradcheck(chains.make(shape, act, mode), torch.autograd.gradcheck, 2e-4, fast_mode=True)


@pytest.mark.usefixtures("in_one_thread")
@pytest.mark.parametrize("mode", ["batch", "frozen-conv_bias"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradcheck_whole_jacobian(backend: str, shape: str, mode: str) -> None:
    """fp64: the same element by element of the Jacobian."""
    assert gradcheck(chains.make(shape, "hardswish", mode, size=(3, 3)), torch.autograd.gradcheck, 2e-4)


@pytest.mark.usefixtures("in_one_thread")
@pytest.mark.parametrize("mode", ["batch", "frozen", "batch-conv_bias", "batch-gamma_or_beta", "mixed"])
@pytest.mark.parametrize("shape", ["conv", "no_conv_residual", "basic_projection", "bottleneck", "option_a", "stem"])
def test_gradgradcheck(backend: str, shape: str, mode: str) -> None:
    """fp64: the gradient of the gradient is the second derivative."""
    chain = chains.make(shape, "silu", mode)
    assert gradcheck(chain, torch.autograd.gradgradcheck, 2e-4, fast_mode=True)


# ---------------------------------------------------------------------------------------------- memory and needed work
@pytest.mark.parametrize("mode", ["batch", "frozen"])
@pytest.mark.parametrize("shape", SHAPES)
def test_saved_for_backward(backend: str, shape: str, mode: str) -> None:
    """Kept: the inputs, the raw convolution outputs (not the first under recompute), per-channel vectors, an argmax."""
    chain = chains.make(shape, "relu", mode, width=3, size=(7, 6))
    inputs = leaves(chain, chains.draw(chain, margin=0))
    with saved_tensors() as found:
        outs = call(chain, inputs)
    given = {v.untyped_storage().data_ptr() for v in inputs if v is not None}
    kept = {p: v for p, v in found.items() if p not in given}
    assert kept.keys() == {v.untyped_storage().data_ptr() for v in outs[1:]}
    sizes = fused_resnet.chain.operators.unit_shapes(inputs[0], inputs[2:], chain.spec)
    images = [
        tuple(size)
        for i, (u, size) in enumerate(zip(chain.spec.all_units, sizes, strict=True))
        if u.conv is not None and not (chain.spec.recompute and i == 0)
    ]
    vectors = [(s[1],) for u, s in zip(chain.spec.all_units, sizes, strict=True) for _ in range(u.n_vectors)]
    argmax = [tuple(outs[0].shape)] if chain.spec.pool is not None else []
    assert sorted(tuple(v.shape) for v in kept.values()) == sorted(images + vectors + argmax)
    assert all(v.dtype == torch.uint8 for v in kept.values() if argmax and tuple(v.shape) == argmax[0])
    assert all(v.untyped_storage().nbytes() == v.numel() * v.element_size() for v in kept.values())


def test_saved_by_the_functional_api(backend: str) -> None:
    """A training BasicBlock in fp32: 3 images (plain PyTorch keeps 5 and more) and 10 vectors, to the byte."""
    x = torch.randn(2, 4, 8, 8)
    blocks = [unit(4, 4) for _ in range(2)]
    mine = {x.untyped_storage().data_ptr()}
    mine |= {v.untyped_storage().data_ptr() for u in blocks for v in vars(u).values() if isinstance(v, Tensor)}
    with saved_tensors() as found:
        functional.residual_chain(x, blocks)
    new = [v for p, v in found.items() if p not in mine]
    assert sum(v.untyped_storage().nbytes() for v in new) == 2 * x.nbytes + 2 * 5 * 4 * 4


# (shape, the tensors that want a gradient, the conv_backward calls of that: (need_input, need_weight), last unit first)
PARTIAL = [
    ("bottleneck", ["2.bn_weight"], []),
    ("bottleneck", ["2.bn_bias"], []),
    ("bottleneck", ["2.weight"], [(False, True)]),
    ("bottleneck", ["1.bn_weight"], [(True, False)]),
    ("bottleneck", ["1.weight", "2.bn_bias"], [(True, False), (False, True)]),
    ("bottleneck", ["0.weight"], [(True, False), (True, False), (False, True)]),
    ("bottleneck", ["x"], [(True, False), (True, False), (True, False)]),
    ("basic_projection", ["2.bn_weight"], []),
    ("basic_projection", ["2.weight"], [(False, True)]),
    ("basic_projection", ["1.weight", "2.bn_bias"], [(False, True)]),
    ("basic_projection", ["x"], [(True, False), (True, False), (True, False)]),
    ("resnet_d", ["3.weight"], [(False, True)]),
    ("resnet_d", ["x"], [(True, False)] * 4),
    ("option_a", ["1.bn_weight"], []),
    ("conv_residual", ["residual"], []),
    ("conv_residual", ["0.weight"], [(False, True)]),
    ("conv_residual", ["x"], [(True, False)]),
    ("no_conv_residual", ["residual"], []),
    ("no_conv_then_conv", ["0.bn_weight"], [(True, False)]),
    ("stem", ["0.weight"], [(False, True)]),
    ("stem_recompute", ["0.bn_bias"], []),
]


@pytest.mark.parametrize("mode", ["batch", "frozen"])
@pytest.mark.parametrize("shape, wanted, calls", PARTIAL, ids=[f"{s}-{'+'.join(w)}" for s, w, _ in PARTIAL])
def test_only_what_is_needed(
    backend: str, shape: str, wanted: list[str], calls: list[tuple[bool, bool]], mode: str, monkeypatch: Any
) -> None:
    """With few gradients wanted those are the same, and no convolution gradient is computed for the others."""
    chain = chains.make(shape, "silu", mode)
    t = chains.draw(chain)
    want = chains.run(chain, t)
    inputs = [
        None if v is None else v.detach().requires_grad_(name in wanted)
        for name, v in zip(chain.names, t.inputs, strict=True)
    ]
    counted = Calls(monkeypatch)
    call(chain, inputs)[0].backward(t.dout)
    for name, v in zip(chain.names, inputs, strict=True):
        if v is not None and name in wanted:
            torch.testing.assert_close(v.grad, want[f"d {name}"])
        elif v is not None:
            assert v.grad is None
    assert sorted(counted.conv_backward) == sorted(calls)


def test_unused_output_has_no_backward(backend: str) -> None:
    """The raw outputs and statistics that the operator also returns carry no gradient."""
    chain = chains.make("basic")
    outs = call(chain, leaves(chain, chains.draw(chain)))
    assert outs[0].requires_grad and not any(v.requires_grad for v in outs[1:])
