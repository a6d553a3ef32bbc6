"""Convolutions of volumes on a CPU, as convolutions of images.

In channels_last a volume [N, C, D, H, W] is N*D images [N*D, C, H, W], without a copy. So a convolution of volumes is
one of images:

    kernel 1 x R x S    of the N*D images
    kernel Q x 1 x 1    with a kernel Q x 1, of [N, C, D, H*W]
    kernel Q x R x S    of images with Q*C channels: for each slice of the output the Q slices that it is computed from,
                        side by side; W [K, C, Q, R, S] as [K, Q*C, R, S]

Only the last copies. It writes the input Q times and reads it once more, beside its Q*R*S*K products per value. Its
gradient adds the Q parts up again. Slices of the kernel that meet padding alone are left out. Volumes in another
layout, convolutions in groups of the last kind, and those of the last kind for which there is no kernel of our own, are
oneDNN's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fused_resnet.backends import Backend, loaded, primitives
from fused_resnet.backends.cpu_compute import compute_dtype, exact_products
from fused_resnet.backends.library_conv import Convolutions
from fused_resnet.backends.values import Closing, Prologue
from fused_resnet.base.layouts import is_channels_last
from fused_resnet.spec import ConvSpec


class Images(NamedTuple):
    """A convolution of volumes as one of images.

    Attributes:
        kind: "slices", "rows" or "windows", in the order of the file's description. conv: of images. size: the height
            and width of the input. depth: the numbers of slices of the input and of the output. part: the slices of the
            kernel that meet the input. outputs, inputs: for each of them the slices of the output that have an input
            there, and these slices of the input.
    """

    kind: str
    conv: ConvSpec
    size: Sequence[int]
    depth: tuple[int, int]
    part: slice
    outputs: list[slice]
    inputs: list[slice]

    def image(self, t: Tensor) -> Tensor:
        """A volume of the input's or the output's size as an image; "windows": of the output's."""
        t = t.flatten(3) if self.kind == "rows" else t.transpose(1, 2).flatten(0, 1)
        return t.contiguous(memory_format=torch.channels_last)

    def volume(self, t: Tensor, depth: int) -> Tensor:
        """The inverse of ``image``, for a volume of ``depth`` slices."""
        return t.unflatten(3, self.size) if self.kind == "rows" else t.unflatten(0, (-1, depth)).transpose(1, 2)

    def output(self, t: Tensor) -> Tensor:
        """The result of the convolution, or a gradient of it, as a volume."""
        return self.volume(t, self.depth[1])

    def input(self, x: Tensor, values: bool = True) -> Tensor:
        """x as the convolution's input. ``values``: whether its values are needed."""
        if self.kind != "windows":
            return self.image(x)
        images, to = self._windows(x)
        if values:
            of = x.permute(0, 2, 3, 4, 1)
            for j, (outputs, inputs) in enumerate(zip(self.outputs, self.inputs, strict=True)):
                to[:, : outputs.start, :, :, j].zero_()
                to[:, outputs.stop :, :, :, j].zero_()
                to[:, outputs, :, :, j].copy_(of[:, inputs])
        return images

    def input_gradient(self, images: Tensor, like: Tensor) -> Tensor:
        """The gradient of x from that of ``input``. 16-bit windows are added in float32."""
        if self.kind != "windows":
            return self.volume(images, self.depth[0])
        of = self._windows(like, images)[1]
        dx = torch.zeros_like(like, dtype=torch.promote_types(images.dtype, torch.float32))
        to = dx.permute(0, 2, 3, 4, 1)
        for j, (outputs, inputs) in enumerate(zip(self.outputs, self.inputs, strict=True)):
            to[:, inputs] += of[:, outputs, :, :, j]
        return dx.to(like.dtype)

    def _windows(self, x: Tensor, images: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """For each slice of the output the slices of x that it is computed from, [N*D, Q*C, H, W], and a view of them:
        [N, D, H, W, Q, C]."""
        (n, c, _, h, w), depth, q = x.shape, self.depth[1], len(self.outputs)
        if images is None:
            shape = (n * depth, q * c, h, w)
            images = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        return images, images.permute(0, 2, 3, 1).view(n, depth, h, w, q, c)

    def weight(self, weight: Tensor) -> Tensor:
        """The convolution's weight."""
        if self.kind == "rows":
            return weight.flatten(3)
        return weight[:, :, self.part].transpose(1, 2).flatten(1, 2)

    def weight_gradient(self, dw: Tensor, like: Tensor) -> Tensor:
        """The gradient of the volumes' weight from that of ``weight``."""
        if self.kind == "rows":
            return dw.unflatten(3, like.shape[3:])
        part = dw.unflatten(1, (len(self.outputs), -1)).transpose(1, 2)
        if part.shape == like.shape:
            return part
        whole = torch.zeros_like(like, dtype=dw.dtype)
        whole[:, :, self.part] = part
        return whole


@lru_cache(maxsize=4096)
def _images(x: tuple[int, ...], weight: tuple[int, ...], conv: ConvSpec) -> Images:
    """The convolution of tensors of these shapes as one of images."""
    (s, *stride), (p, *padding), (d, *dilation), groups = conv.geometry
    depth = x[2], conv.out_size(x[2:], weight[2:])[0]
    outputs, inputs = [], []
    for offset in (j * d - p for j in range(weight[2])):
        first = max(0, -(offset // s))
        last = max(first, min(depth[1], (depth[0] - 1 - offset) // s + 1))
        outputs.append(slice(first, last))
        inputs.append(slice(first * s + offset, last * s + offset, s) if last > first else slice(0, 0))
    met = [j for j, of in enumerate(outputs) if of.start < of.stop] or [0]
    part = slice(met[0], met[-1] + 1)
    outputs, inputs = outputs[part], inputs[part]
    planar = ConvSpec(tuple(stride), tuple(padding), tuple(dilation), groups, conv.bias, conv.products)
    if (outputs, inputs) == ([slice(0, depth[1])], [slice(0, depth[0], 1)]):
        return Images("slices", planar, x[3:], depth, part, outputs, inputs)
    if (weight[3:], planar.stride, planar.padding) == ((1, 1), (1, 1), (0, 0)):
        rows = ConvSpec((s, 1), (p, 0), (d, 1), groups, conv.bias, conv.products)
        return Images("rows", rows, x[3:], depth, part, outputs, inputs)
    return Images("windows", planar, x[3:], depth, part, outputs, inputs)


def images_of(x: Tensor, weight: Tensor, conv: ConvSpec) -> Images | None:
    """The convolution as one of images; None: it does not run as one."""
    if not is_channels_last(x):
        return None
    of = _images(tuple(x.shape), tuple(weight.shape), conv)
    return None if of.kind == "windows" and conv.groups > 1 else of


def inference_of(call: primitives.ConvBiasAct, values: bool = True) -> tuple[Images, primitives.ConvBiasAct] | None:
    """An inference unit of volumes as one of images; None: it does not run as one."""
    of = images_of(call.x, call.weight, call.conv)
    if of is None:
        return None
    residual = None if call.residual is None else of.image(call.residual)
    x, weight = of.input(call.x, values), of.weight(call.weight)
    return of, call.replace(x=x, weight=weight, conv=of.conv, residual=residual)


class Volumes(Convolutions):
    """The convolution primitives of the ``cpu`` backend for [N, C, D, H, W]."""

    name = "cpu"
    compute_dtype = staticmethod(compute_dtype)

    @property
    def passes(self) -> Backend:
        return loaded("cpu")

    def algorithm_of(
        self, kind: str, x: Tensor, weight: Tensor, conv: ConvSpec, prologue: bool
    ) -> tuple[str, Images | None]:
        """The name of the algorithm, and the convolution as one of images; None: it does not run as one.

        ``kind``: "fprop", "dgrad" or "wgrad". ``prologue``: x is a raw output.
        """
        of = images_of(x, weight, conv)
        if of is None:
            return "onednn", None
        images = of.input(x, values=False)
        w = torch.empty(of.weight(torch.empty(weight.shape, device="meta")).shape, dtype=weight.dtype)
        found = torch.ops.fused_resnet_cpu.conv_algorithm(
            kind, images, w, *of.conv.geometry, prologue and of.kind != "windows", compute_dtype(x.dtype),
            exact_products(), conv.products,
        )  # fmt: skip
        return ("onednn", None) if (of.kind, found) == ("windows", "aten") else (found, of)

    def conv_stats(self, call: primitives.ConvStats) -> tuple[Tensor, Tensor | None, Tensor | None]:
        _, of = self.algorithm_of("fprop", call.x, call.weight, call.conv, call.prologue is not None)
        if of is None:
            return super().conv_stats(call)
        x, prologue = self._input(of, call.x, call.prologue)
        weight = of.weight(call.weight)
        y, mean, var = primitives.ConvStats(x, weight, of.conv, prologue, call.stats).on(self.passes)
        return of.output(y), mean, var

    def conv_bn_act(self, call: primitives.ConvBnAct) -> Tensor:
        _, of = self.algorithm_of("fprop", call.x, call.weight, call.conv, False)
        if of is None:
            y = self.convolution(call.x, call.weight, call.conv)
            return primitives.BnAct(y, call.norm, call.act, call.residual).on(self.passes)
        residual = None if call.residual is None else of.image(call.residual)
        x, weight = of.input(call.x), of.weight(call.weight)
        return of.output(primitives.ConvBnAct(x, weight, call.norm, of.conv, call.act, residual).on(self.passes))

    def conv_backward(self, call: primitives.ConvBackward) -> primitives.Gradients:
        kinds = [kind for kind, need in (("dgrad", call.need_input), ("wgrad", call.need_weight)) if need]
        about = call.x, call.weight, call.conv, call.prologue is not None
        found = [self.algorithm_of(kind, *about)[1] for kind in kinds]
        if call.parts is not None and (found[0] is None) != (found[1] is None):
            for_input, for_weight = call.parts
            dw = for_weight.on(self)[1]  # first: the input's gradient may overwrite ``add``
            dx, _, sums, summand_sums = for_input.on(self)
            return dx, dw, sums, summand_sums
        return super().conv_backward(call) if found[0] is None else self._backward(call, found[0])

    def _backward(self, call: primitives.ConvBackward, of: Images) -> primitives.Gradients:
        x, prologue = self._input(of, call.x, call.prologue)
        images = call.replace(
            dz=of.image(call.dz), y=of.image(call.y), x=x, prologue=prologue, weight=of.weight(call.weight),
            conv=of.conv, add=None, closing=None,
        )  # fmt: skip
        if of.kind != "windows":
            add = None if call.add is None else of.image(call.add)
            images = images.replace(add=add, closing=_closing(call.closing, of))
        dx, dw, sums, summand_sums = images.on(self.passes)
        dw = None if dw is None else of.weight_gradient(dw, call.weight)
        if dx is None:
            return None, dw, None, None
        dx = of.input_gradient(dx, call.x)
        if of.kind == "windows":
            dx = dx if call.add is None else dx.add_(call.add)
            if call.before is not None:
                dx, sums, summand_sums = primitives.BnActBackward(dx, *call.before).on(self.passes)
        return dx, dw, sums, summand_sums

    def _input(self, of: Images, x: Tensor, prologue: Prologue | None) -> tuple[Tensor, Prologue | None]:
        """The input of a convolution of images, and its prologue: windows have zeros after it, so it runs before."""
        if prologue is not None and of.kind == "windows":
            x, prologue = primitives.BnAct(x, *prologue).on(self.passes), None
        return of.input(x), prologue


def _closing(closing: Closing | None, of: Images) -> Closing | None:
    if closing is None:
        return None
    summand = None if closing.summand is None else of.image(closing.summand)
    return closing._replace(y=of.image(closing.y), summand=summand)


VOLUMES = Volumes()
