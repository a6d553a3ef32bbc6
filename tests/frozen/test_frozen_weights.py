"""A frozen model's packed weights: as many as layouts, those of the present values, for threads that begin at once."""

from __future__ import annotations

import copy
import gc
import random
import weakref
from collections.abc import Callable, Sequence
from threading import Thread
from typing import Any

import pytest
import torch
from networks import blocks, images, relative, small
from primitives import aten, cpu
from torch import Tensor

import fused_resnet as fr
from fused_resnet.backends import ConvBiasAct, load
from fused_resnet.chain import packing
from fused_resnet.chain.packing import Weight
from fused_resnet.frozen.modules import Frozen
from fused_resnet.spec import Act, ConvSpec


def weights_of(frozen: Frozen) -> list[Weight]:
    """The weights of its convolutions."""
    return [unit.weight for chain in blocks(frozen) for unit in chain.units]


needs_extension = pytest.mark.skipif(load("cpu")[0] is None, reason=f"packs weights: backend cpu: {load('cpu')[1]}")


@needs_extension
def test_packed_weights_are_as_many_as_layouts(monkeypatch):
    """Not as many as shapes; and what is remembered of shapes is bounded too."""
    model = small()
    frozen = fr.freeze(model, images())
    weights = weights_of(frozen)
    for n in (1, 2, 3):
        for size in range(32, 62, 6):
            frozen(torch.randn(n, 3, size, size))
    for w in weights:
        assert 1 <= len(w.packed_forms()) <= 4
        assert len(w.forms) > 4 or w.shape[1] == 3 or w is weights[-1]
    assert len(weights[-1].forms) == 3, "the linear layer's images have one pixel: one shape for each batch"
    monkeypatch.setattr(packing, "SHAPES", 2)
    x = images(4)
    assert relative(frozen(x), model(x)) < 1e-5
    assert all(len(w.forms) <= 2 for w in weights)


@needs_extension
def test_weights_packed_for_another_shape_serve():
    """oneDNN reorders what it finds in another layout."""
    conv, weight, bias = ConvSpec((1, 1), (0, 0)), torch.randn(48, 96, 1, 1), torch.randn(48)

    def call(x):
        return ConvBiasAct(x, weight, bias, conv, Act(), None)

    forms = [cpu.prepack(call(torch.randn(n, 96, s, s))) for n, s in ((1, 7), (8, 40), (3, 13))]
    x = torch.randn(2, 96, 21, 21).to(memory_format=torch.channels_last)
    want = aten.conv_bias_act(x, weight, bias, conv, Act(), None)
    for form in forms:
        assert relative(cpu.conv_packed(call(x), form, False), want) < 1e-5
        again = cpu.prepack(call(torch.randn(1, 96, 7, 7)), forms)
        assert any(again is other for other in forms)


def test_new_values_are_packed_again():
    """load_state_dict, in-place changes and ``.data`` are seen; a dtype that was not frozen is an error."""
    x = images()
    one, other = fr.freeze(small(), x), fr.freeze(small(), x)
    want = other(x)
    one.load_state_dict(other.state_dict())
    assert torch.equal(one(x), want)
    weight = one.model.layer1[0].conv2.weight
    weight.mul_(2)
    doubled = one(x)
    assert relative(doubled, want) > 1e-3
    weight.data = weight.data / 2
    assert torch.equal(one(x), want)
    assert torch.equal(one.to("cpu")(x), want)
    with pytest.raises(RuntimeError, match="^dtype: frozen for torch.float32, got torch.float16"):
        one.half()
    assert torch.equal(one(x), want)


def test_the_same_memory_seen_otherwise_is_folded_again():
    """A weight whose strides are exchanged by ``.data`` has the address and the version that it had."""
    x, plain = images(), small()
    frozen = fr.freeze(plain, x)
    for net in (plain, frozen.model):
        weight = net.layer1[0].conv2.weight
        weight.data = weight.data.transpose(2, 3)
    with torch.no_grad():
        assert relative(frozen(x), plain(x)) < 1e-5


@needs_extension
def test_packed_weights_die_with_the_model():
    frozen = fr.freeze(small(), images())
    packed = [weakref.ref(form.weight) for w in weights_of(frozen) for form in w.packed_forms()]
    assert packed
    del frozen
    for _ in range(2):  # what dynamo holds for a code object goes when that is gone
        gc.collect()
    assert not any(ref() is not None for ref in packed)


@needs_extension
def test_no_weight_is_held_twice():
    """Beside the model's own weights only the packed ones: once for each layout, whatever calls are captured."""
    model = small()
    frozen = fr.freeze(model, images())
    kinds = [(n, size, threads) for threads in (1, 2) for n in (1, 4) for size in (48, 64)]
    before = torch.get_num_threads()
    try:
        for n, size, threads in kinds:
            torch.set_num_threads(threads)
            x = torch.randn(n, 3, size, size)
            assert relative(frozen(x), model(x)) < 1e-5
    finally:
        torch.set_num_threads(before)
    graphs = frozen.front().graphs
    assert len(graphs) > 2
    rows = {id(chain.choice): chain.choice for graph in graphs for chain in graph.chains}.values()
    made = {id(unit.weight): unit.weight for row in rows for chain in row.folded for unit in chain.units}
    assert len(made) == len(weights_of(frozen)), "a capture has folded its own"
    assert not any(w._own is not None for w in made.values()), "what is packed is also held as it was folded"


def test_a_weight_that_is_packed_and_used_as_it_is():
    """The same values from both, in any order; and what only PyTorch's operators use is not made again."""
    model, x = small(), images()
    frozen = fr.freeze(model, x)
    want = frozen(x)
    with fr.use_backend("aten"):
        assert relative(frozen(x), want) < 1e-5
        own = [w._own for w in weights_of(frozen)]
        assert relative(frozen(x), want) < 1e-5
        assert all(w._own is t is not None for w, t in zip(weights_of(frozen), own, strict=True))
    assert torch.equal(frozen(x), want)


def test_threads(monkeypatch):
    """Eight threads that begin at once, nothing packed: the bits of single calls, each weight packed once a shape."""
    model = small()
    inputs = [torch.randn(n, 3, s, s) * 1.3 + 0.4 for n, s in ((1, 40), (2, 40), (4, 33), (3, 56))]
    frozen = fr.freeze(model, inputs[0])
    want = [frozen(x) for x in inputs]
    fresh = copy.deepcopy(frozen)
    packed: list[tuple[Weight, Any]] = []  # they live until the end: no two have one id
    pack_first = Weight.packed

    def recorded(weight: Weight, key: Any, pack: Callable[[Tensor, Sequence[Any]], Any]) -> Any:
        return pack_first(weight, key, lambda *args: packed.append((weight, key)) or pack(*args))

    monkeypatch.setattr(Weight, "packed", recorded)
    wrong: list[Any] = []

    def serve(seed: int) -> None:
        order = random.Random(seed).choices(range(len(inputs)), k=10)
        try:
            wrong.extend(i for i in order if not torch.equal(fresh(inputs[i]), want[i]))
        except Exception as error:
            wrong.append(error)

    threads = [Thread(target=serve, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(packed) == len(set(packed)) and (load("cpu")[0] is None or packed)
