"""The account of traffic: what a network's step reads and writes, launch by launch, without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fused_resnet as fr
from fused_resnet import traffic as account
from fused_resnet.backends import BackendUnavailable
from fused_resnet.traffic import network_traffic

pytest.importorskip("triton", reason="needs Triton")

BATCH = 256
# GB per image of ResNet-50 at 224x224 in bfloat16, weights shared by the batch. PyTorch's eager mode: 0.47 to train,
# 0.16 to infer.
# These guard what is reached; the aim for training was 0.27, for eval it is that of a frozen network.
LIMITS = {"training": 0.26, "eval": 0.058, "frozen": 0.057}
# Elements per image of the 16 blocks' outputs.
CLOSED = 3 * 56 * 56 * 256 + 4 * 28 * 28 * 512 + 6 * 14 * 14 * 1024 + 3 * 7 * 7 * 2048
# Those of the stages, whose gradients other modules make.
LAST = 56 * 56 * 256 + 28 * 28 * 512 + 14 * 14 * 1024 + 7 * 7 * 2048


@pytest.fixture(scope="module")
def resnet50() -> Any:
    return fr.models.resnet50().to(memory_format=torch.channels_last)


def by_kernel(record: Any) -> dict[str, tuple[int, int, int]]:
    """Launches, bytes read and bytes written per image, by kernel."""
    found: dict[str, tuple[int, int, int]] = {}
    for launch in record.launches:
        n, read, written = found.get(launch.kernel, (0, 0, 0))
        found[launch.kernel] = (n + 1, read + launch.read, written + launch.written)
    return {k: (n, read // BATCH, written // BATCH) for k, (n, read, written) in found.items()}


def test_training(resnet50: Any) -> None:
    """Every tensor is read and written as often as the scheme says, and PyTorch's operators do next to nothing."""
    record = network_traffic(resnet50, BATCH, 224)
    assert record.total == sum(launch.read + launch.written for launch in record.launches)
    assert record.total / BATCH / 1e9 <= LIMITS["training"]
    kernels = by_kernel(record)
    n, read, written = kernels["_bn_act_kernel"]
    assert n == 16
    assert (read, written) == (pytest.approx(2 * 2 * CLOSED, rel=1e-3), pytest.approx(2 * CLOSED, rel=1e-3))
    n, read, written = kernels["_bn_act_backward_kernel"]
    assert n == 4
    assert (read, written) == (pytest.approx(3 * 2 * LAST, rel=1e-3), pytest.approx(2 * LAST, rel=2e-2))
    n, read, written = kernels["conv_dgrad_kernel"]
    want_read, want_written = dgrad_elements()
    assert n == 52  # every convolution but the stem's, each phase of the strided ones in the same launch
    # weights; a row of sums for every 128 pixels
    assert (read, written) == (pytest.approx(2 * want_read, rel=1e-2), pytest.approx(2 * want_written, rel=4e-2))
    assert kernels["_bn_act_max_pool_kernel"][0] == kernels["_bn_act_max_pool_backward_kernel"][0] == 1
    # 53 convolutions, none of them once more in the backward
    assert kernels["conv_fprop_kernel"][0] == 53 and kernels["conv_wgrad_kernel"][0] == 53
    operators = sum(read + written for name, (_, read, written) in kernels.items() if "::" in name)
    assert operators <= 0.01 * record.total / BATCH


def dgrad_elements() -> tuple[int, int]:
    """Elements per image that ResNet-50's input gradients read and write, by the scheme."""
    read = written = 0
    for blocks, width, inputs, size, stride in (
        (3, 64, 64, 56, 1),
        (4, 128, 256, 28, 2),
        (6, 256, 512, 14, 2),
        (3, 512, 1024, 7, 2),
    ):
        pixels, outputs = size * size, 4 * width
        for block in range(blocks):
            before = stride * stride if block == 0 else 1
            middle, narrow = width * pixels, width * pixels * before
            # the third and the second convolution: dz and y, and the raw output that the unit before them closes
            read += 2 * outputs * pixels + middle + 2 * middle + narrow
            written += middle + narrow
            read += 2 * narrow  # dz and y of the first
            if block:  # what the shortcut brought, and to close the block before: its raw output, its summand
                read += 3 * outputs * pixels
                written += outputs * pixels
            else:  # the projection adds to the pixels that it read
                read += 2 * outputs * pixels + inputs * pixels
                written += inputs * pixels * before + inputs * pixels
    return read, written


def test_eval(resnet50: Any) -> None:
    record = network_traffic(resnet50, BATCH, 224, training=False)
    assert record.total / BATCH / 1e9 <= LIMITS["eval"]
    assert not any("wgrad" in launch.kernel for launch in record.launches)


def test_frozen(resnet50: Any) -> None:
    frozen = fr.freeze(resnet50, torch.zeros(1, 3, 64, 64))
    record = network_traffic(frozen, BATCH, 224, training=False)
    assert record.total / BATCH / 1e9 <= LIMITS["frozen"]
    assert by_kernel(record)["conv_fprop_kernel"][0] == 53
    with pytest.raises(ValueError, match="^training: this model is frozen"):
        network_traffic(frozen, BATCH, 224)


def test_model_is_left_as_it_is() -> None:
    model = fr.models.resnet18().eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    network_traffic(model, 2, (64, 32), torch.float32)
    assert not model.training and all(p.grad is None and p.device.type == "cpu" for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_copies_do_not_hide(resnet50: Any) -> None:
    """Weights in another layout are copied each time they are used, and that shows."""
    contiguous = fr.models.resnet50()
    more = network_traffic(contiguous, 2, 32).total - network_traffic(resnet50, 2, 32).total
    weights = sum(p.numel() for p in resnet50.parameters() if p.dim() == 4 and p.shape[2] > 1)
    assert more > 2 * 2 * weights


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(account, "load", lambda name, to_run: (None, "not available: No module named 'triton'"))
    with pytest.raises(BackendUnavailable, match="No module named 'triton'"):
        network_traffic(fr.models.resnet18(), 1, 32)
