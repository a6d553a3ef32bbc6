"""fused_resnet: fused residual blocks for PyTorch. Conv + BatchNorm + activation + shortcut as one chain."""

from fused_resnet import functional, models, spec
from fused_resnet._version import __version__
from fused_resnet.backends import BackendUnavailable, backends, use_backend
from fused_resnet.explanation import explain
from fused_resnet.frozen.freezing import freeze
from fused_resnet.frozen.saving import safe_globals
from fused_resnet.fusion.swap import fuse, unfuse
from fused_resnet.modules import ConvBNAct, ResidualChain

__all__ = [
    "BackendUnavailable",
    "ConvBNAct",
    "ResidualChain",
    "__version__",
    "backends",
    "explain",
    "freeze",
    "functional",
    "fuse",
    "models",
    "safe_globals",
    "spec",
    "unfuse",
    "use_backend",
]
