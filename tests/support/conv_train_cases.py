"""Cases for the kernel of csrc/cuda/conv_train_sm90.cu, behind conv_train of conv_train_host.cpp or _gpu.cu."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.nn import functional as F

PRE = ("none", "identity", "relu")
BLOCK_M = 128


def address(t: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(t.data_ptr())


def run(
    library: ctypes.CDLL, x: Tensor, weight: Tensor, conv: dict, pre: str, norm: Tensor, block_n: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """y [pixels, K], mean and M2 [tiles, K]; x NHWC, weight KRSC, conv as conv2d takes it, norm [2, C].

    On a GPU the launcher chooses ``block_n``, and ``seed`` has no effect.
    """
    n, h, w, c = x.shape
    k, r, s, _ = weight.shape
    stride, pad, dilation = conv["stride"], conv["padding"], conv["dilation"]
    p, q = ((a + 2 * b - dilation * (e - 1) - 1) // stride + 1 for a, b, e in ((h, pad[0], r), (w, pad[1], s)))
    y = torch.full((n * p * q, k), float("nan"), dtype=x.dtype, device=x.device)
    mean, m2 = torch.full((2, -(-n * p * q // BLOCK_M), k), float("nan"), device=x.device).unbind()
    blocks = 2 if r * s == 1 else 1  # one block: the ring of stages goes round several times
    sizes = [n, c, k, h, w, p, q, r, s, stride, stride, *pad, dilation, dilation]
    sizes += [PRE.index(pre), block_n, blocks, int(x.dtype == torch.float16), seed & 0x7FFFFFF]
    tensors = (x, weight, norm[0], norm[1], y, mean, m2)
    status = library.conv_train((ctypes.c_int * len(sizes))(*sizes), *map(address, tensors))
    assert status == 0, f"conv_train returned {status}"
    return y, mean, m2


SAME = None
# (n, h, w, c), (k, r, s), stride, padding (SAME: y as large as x at stride 1), dilation, channels of a tile, prologue,
# dtype
CASES = [
    ((1, 16, 9, 128), (64, 1, 1), 1, SAME, 1, 64, "relu", torch.bfloat16),
    ((2, 9, 13, 64), (128, 1, 1), 1, SAME, 1, 128, "none", torch.bfloat16),
    ((1, 14, 14, 64), (200, 1, 1), 1, SAME, 1, 128, "identity", torch.bfloat16),
    ((2, 7, 7, 192), (72, 1, 1), 1, SAME, 1, 64, "relu", torch.float16),
    ((3, 7, 7, 64), (64, 3, 3), 1, SAME, 1, 64, "relu", torch.bfloat16),
    ((2, 8, 11, 64), (80, 3, 3), 1, SAME, 1, 128, "identity", torch.bfloat16),
    ((1, 5, 9, 64), (40, 3, 3), 1, SAME, 2, 64, "relu", torch.float16),
    ((1, 13, 6, 64), (24, 5, 3), 1, SAME, 1, 64, "none", torch.bfloat16),
    ((1, 12, 12, 64), (264, 1, 1), 1, SAME, 1, 256, "relu", torch.bfloat16),
    ((3, 15, 14, 64), (64, 3, 3), 2, SAME, 1, 64, "relu", torch.bfloat16),
    ((2, 14, 18, 128), (96, 1, 1), 2, SAME, 1, 128, "identity", torch.bfloat16),
    ((2, 13, 12, 64), (64, 3, 3), 1, (0, 0), 1, 64, "relu", torch.float16),
    ((3, 17, 20, 64), (16, 3, 5), 3, (2, 1), 2, 64, "identity", torch.bfloat16),
]


def check(
    library: ctypes.CDLL,
    x_size: tuple[int, int, int, int],
    w_size: tuple[int, int, int],
    stride: int,
    padding: tuple[int, int] | None,
    dilation: int,
    block_n: int,
    pre: str,
    dtype: torch.dtype,
    seed: int,
    device: str = "cpu",
) -> None:
    """y within one rounding of float64's, statistics of every tile those of y as stored, nothing left unwritten."""
    c = x_size[-1]
    k, r, s = w_size
    if padding is SAME:
        padding = ((r - 1) * dilation // 2, (s - 1) * dilation // 2)
    conv = {"stride": stride, "padding": padding, "dilation": dilation}
    x = (torch.randn(x_size) * 2 + 3).to(device, dtype)
    weight = (torch.randn(k, r, s, c) / (r * s * c) ** 0.5).to(device, dtype)
    norm = (torch.randn(2, c) + torch.tensor([[0.0], [1.0]])).to(device)  # a padded pixel would be act(shift)
    y, mean, m2 = run(library, x, weight, conv, pre, norm, block_n, seed)

    a = x.float()
    if pre != "none":
        a = torch.addcmul(norm[1], a, norm[0])
        a = (a.relu() if pre == "relu" else a).to(dtype).float()
    want = F.conv2d(a.double().permute(0, 3, 1, 2), weight.double().permute(0, 3, 1, 2), **conv)
    want = want.permute(0, 2, 3, 1).reshape(y.shape)
    eps = torch.finfo(dtype).eps
    # half a unit in the last place of y, a few that the prologue rounds elsewhere, the sum in float32
    torch.testing.assert_close(y.double(), want, rtol=eps, atol=2 * eps)
    for t, rows in enumerate(y.double().split(BLOCK_M)):
        torch.testing.assert_close(mean[t].double(), rows.mean(0), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(m2[t].double(), (rows - rows.mean(0)).square().sum(0), rtol=1e-4, atol=1e-4)
