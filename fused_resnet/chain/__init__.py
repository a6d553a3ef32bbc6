"""Chains as operators of PyTorch: what a call takes and checks, how it is encoded, forward, backward, inference."""

from fused_resnet.chain import operators  # noqa: F401  (registers torch.ops.fused_resnet.*)
