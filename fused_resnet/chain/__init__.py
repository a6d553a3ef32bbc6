"""Chains as operators of PyTorch: the arguments of a call, their checks and encoding, forward, backward, inference."""

from fused_resnet.chain import operators  # noqa: F401  (registers torch.ops.fused_resnet.*)
