"""Convolutions of volumes on a CPU, as convolutions of images.

In channels_last a volume [N, C, D, H, W] is N*D images [N*D, C, H, W], without a copy. So a convolution of volumes is
one of images:

    kernel 1 x R x S    of the N*D images
    kernel Q x 1 x 1    with a kernel Q x 1, of [N, C, D, H*W]
    kernel Q x R x S    of images with Q*C channels: for each slice of the output the Q slices that it is computed from,
                        side by side; W [K, C, Q, R, S] as [K, Q*C, R, S]

Only the last copies. It writes the input Q times and reads it once more, beside its Q*R*S*K products per value. Its
gradient adds the Q parts up again. Volumes in another layout, and convolutions in groups of the last kind, are
oneDNN's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fused_resnet.backends import Backend, loaded, primitives
from fused_resnet.backends.cpu_compute import compute_dtype
from fused_resnet.backends.library_conv import Convolutions
from fused_resnet.backends.values import Closing, Prologue
from fused_resnet.base.layouts import is_channels_last
from fused_resnet.spec import ConvSpec


def _slices(t: Tensor) -> Tensor:
    """[N, C, D, H, W] as [N*D, C, H, W]."""
    return t.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)


def _stacked(t: Tensor, depth: int) -> Tensor:
    """The inverse of ``_slices``."""
    return t.unflatten(0, (-1, depth)).transpose(1, 2)


def _rows(t: Tensor) -> Tensor:
    """[N, C, D, H, W] as [N, C, D, H*W]."""
    return t.flatten(3).contiguous(memory_format=torch.channels_last)


class Images(NamedTuple):
    """A convolution of volumes as one of images.

    Attributes:
        kind: "slices", "rows" or "windows", as in the file's description. x, weight, conv: of images. size: the height
            and width of the input. depth: the numbers of slices of the input and of the output.
    """

    kind: str
    x: Tensor
    weight: Tensor
    conv: ConvSpec
    size: Sequence[int]
    depth: tuple[int, int]

    def image(self, t: Tensor) -> Tensor:
        """A volume of the input's or the output's size as an image; "windows": of the output's."""
        return _rows(t) if self.kind == "rows" else _slices(t)

    def volume(self, t: Tensor, depth: int) -> Tensor:
        """The inverse of ``image``, for a volume of ``depth`` slices."""
        return t.unflatten(3, self.size) if self.kind == "rows" else _stacked(t, depth)

    def output(self, t: Tensor) -> Tensor:
        """The result of the convolution, or a gradient of it, as a volume."""
        return self.volume(t, self.depth[1])

    def weight_gradient(self, dw: Tensor, weight: Tensor) -> Tensor:
        """The gradient of the volumes' weight."""
        if self.kind == "windows":
            return dw.unflatten(1, (weight.shape[2], -1)).transpose(1, 2)
        return dw.view(weight.shape) if dw.is_contiguous() else dw.reshape(weight.shape)


def suits(x: Tensor, weight: Tensor, conv: ConvSpec) -> bool:
    """Whether a convolution runs as one of images."""
    return is_channels_last(x) and (conv.groups == 1 or _kind(weight, conv) != "windows")


def _kind(weight: Tensor, conv: ConvSpec) -> str:
    if (weight.shape[2], conv.stride[0], conv.padding[0]) == (1, 1, 0):
        return "slices"
    flat = (tuple(weight.shape[3:]), conv.stride[1:], conv.padding[1:]) == ((1, 1), (1, 1), (0, 0))
    return "rows" if flat else "windows"


def images_of(x: Tensor, weight: Tensor, conv: ConvSpec, values: bool = True) -> Images:
    """The convolution as one of images. ``values``: whether those of x are needed."""
    kind = _kind(weight, conv)
    depth = x.shape[2], conv.out_size(x.shape[2:], weight.shape[2:])[0]
    (s, *stride), (p, *padding), (d, *dilation), groups = conv.geometry
    if kind == "rows":
        rows = ConvSpec((s, 1), (p, 0), (d, 1), groups, conv.bias)
        return Images(kind, _rows(x), weight.flatten(3), rows, x.shape[3:], depth)
    of_slices = ConvSpec(tuple(stride), tuple(padding), tuple(dilation), groups, conv.bias)
    if kind == "slices":
        return Images(kind, _slices(x), weight.squeeze(2), of_slices, x.shape[3:], depth)
    images = windows(x, weight.shape[2], conv, depth[1]) if values else _empty_windows(x, weight.shape[2], depth[1])
    return Images(kind, images, weight.transpose(1, 2).flatten(1, 2), of_slices, x.shape[3:], depth)


def _empty_windows(x: Tensor, q: int, depth: int) -> Tensor:
    n, c, _, h, w = x.shape
    shape = (n * depth, q * c, h, w)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _parts(q: int, conv: ConvSpec, depth: tuple[int, int]) -> list[tuple[slice, slice]]:
    """For each slice of the kernel, the slices of the output that have an input there, and those of the input."""
    found = []
    for j in range(q):
        offset, s = j * conv.dilation[0] - conv.padding[0], conv.stride[0]
        first = max(0, -(offset // s))
        last = max(first, min(depth[1], (depth[0] - 1 - offset) // s + 1))
        found.append((slice(first, last), slice(first * s + offset, max(0, (last - 1) * s + offset + 1), s)))
    return found


def windows(x: Tensor, q: int, conv: ConvSpec, depth: int) -> Tensor:
    """For each of ``depth`` slices of the output the q slices of x that it is computed from: [N*depth, q*C, H, W]."""
    images = _empty_windows(x, q, depth)
    to, of = images.permute(0, 2, 3, 1).unflatten(0, (-1, depth)).unflatten(4, (q, -1)), x.permute(0, 2, 3, 4, 1)
    for j, (outputs, inputs) in enumerate(_parts(q, conv, (x.shape[2], depth))):
        part = to[:, :, :, :, j]
        part[:, : outputs.start].zero_()
        part[:, outputs.stop :].zero_()
        if outputs.start < outputs.stop:
            part[:, outputs].copy_(of[:, inputs])
    return images


def summed_windows(images: Tensor, like: Tensor, q: int, conv: ConvSpec, depth: int) -> Tensor:
    """The gradient of ``windows``: the sum of all parts of a slice. 16-bit parts are added in float32."""
    of = images.permute(0, 2, 3, 1).unflatten(0, (-1, depth)).unflatten(4, (q, -1))
    wide = torch.promote_types(images.dtype, torch.float32)
    dx = torch.zeros_like(like, dtype=wide)
    to = dx.permute(0, 2, 3, 4, 1)
    for j, (outputs, inputs) in enumerate(_parts(q, conv, (like.shape[2], depth))):
        if outputs.start < outputs.stop:
            to[:, inputs] += of[:, outputs, :, :, j]
    return dx.to(like.dtype)


def inference_of(call: primitives.ConvBiasAct, values: bool = True) -> tuple[Images, primitives.ConvBiasAct] | None:
    """An inference unit of volumes as one of images; None: it does not run as one."""
    if not suits(call.x, call.weight, call.conv):
        return None
    of = images_of(call.x, call.weight, call.conv, values)
    residual = None if call.residual is None else of.image(call.residual)
    return of, call.replace(x=of.x, weight=of.weight, conv=of.conv, residual=residual)


class Volumes(Convolutions):
    """The convolution primitives of the ``cpu`` backend for [N, C, D, H, W].

    16-bit volumes are convolved in the dtype that ``compute_dtype`` gives.
    """

    name = "cpu"

    @property
    def passes(self) -> Backend:
        return loaded("cpu")

    def conv_stats(self, call: primitives.ConvStats) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if not suits(call.x, call.weight, call.conv):
            return super().conv_stats(call)
        of, prologue = self._images(call.x, call.weight, call.conv, call.prologue)
        y, mean, var = primitives.ConvStats(of.x, of.weight, of.conv, prologue, call.stats).on(self.passes)
        return of.output(y), mean, var

    def conv_bn_act(self, call: primitives.ConvBnAct) -> Tensor:
        if not suits(call.x, call.weight, call.conv):
            y = self.convolution(call.x, call.weight, call.conv)
            return primitives.BnAct(y, call.norm, call.act, call.residual).on(self.passes)
        of = images_of(call.x, call.weight, call.conv)
        residual = None if call.residual is None else of.image(call.residual)
        images = primitives.ConvBnAct(of.x, of.weight, call.norm, of.conv, call.act, residual)
        return of.output(images.on(self.passes))

    def conv_backward(self, call: primitives.ConvBackward) -> primitives.Gradients:
        if not suits(call.x, call.weight, call.conv):
            return super().conv_backward(call)
        of, prologue = self._images(call.x, call.weight, call.conv, call.prologue)
        images = call.replace(
            dz=of.image(call.dz), y=of.image(call.y), x=of.x, prologue=prologue, weight=of.weight, conv=of.conv,
            add=None, closing=None,
        )  # fmt: skip
        if of.kind == "windows":
            dx, dw, _, _ = images.on(self.passes)
            dw = None if dw is None else of.weight_gradient(dw, call.weight)
            if dx is None:
                return None, dw, None, None
            dx = summed_windows(dx, call.x, call.weight.shape[2], call.conv, of.depth[1])
            dx = dx if call.add is None else dx.add_(call.add)
            if call.before is None:
                return dx, dw, None, None
            closed = primitives.BnActBackward(dx, *call.before).on(self.passes)
            return closed[0], dw, *closed[1:]
        add = None if call.add is None else of.image(call.add)
        images = images.replace(add=add, closing=_closing(call.closing, of))
        dx, dw, sums, summand_sums = images.on(self.passes)
        dw = None if dw is None else of.weight_gradient(dw, call.weight)
        return None if dx is None else of.volume(dx, of.depth[0]), dw, sums, summand_sums

    def _images(
        self, x: Tensor, weight: Tensor, conv: ConvSpec, prologue: Prologue | None
    ) -> tuple[Images, Prologue | None]:
        """The convolution as one of images, and its prologue: "windows" have zeros after it, so it runs before."""
        if prologue is not None and _kind(weight, conv) == "windows":
            x, prologue = primitives.BnAct(x, *prologue).on(self.passes), None
        return images_of(x, weight, conv), prologue

    def convolution(self, x: Tensor, weight: Tensor, conv: ConvSpec) -> Tensor:
        return super().convolution(x.to(compute_dtype(x.dtype)), weight, conv).to(x.dtype)

    def gradients(
        self,
        dy: Tensor,
        x: Tensor,
        weight: Tensor,
        conv: ConvSpec,
        needs: tuple[bool, bool],
        add: Tensor | None,
        spare: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        compute = compute_dtype(x.dtype)
        if compute == x.dtype:
            return super().gradients(dy, x, weight, conv, needs, add, spare)
        dy, a, weight = (t.to(compute) for t in (dy, x, weight))
        dx, dw = super().gradients(dy, a, weight, conv, needs, None if add is None else add.to(compute), True)
        return None if dx is None else dx.to(x.dtype), dw


def _closing(closing: Closing | None, of: Images) -> Closing | None:
    if closing is None:
        return None
    summand = None if closing.summand is None else of.image(closing.summand)
    return closing._replace(y=of.image(closing.y), summand=summand)


VOLUMES = Volumes()
