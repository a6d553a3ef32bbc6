"""fused_resnet: fused residual blocks for PyTorch. Conv + BatchNorm + activation + shortcut as one chain."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fused_resnet import chain as _operators  # noqa: F401  (registers the operators)
from fused_resnet import spec
from fused_resnet._version import __version__
from fused_resnet.backends import BackendUnavailable, backends, use_backend

if TYPE_CHECKING:
    from fused_resnet import functional, models
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

# What is imported when it is first asked for -> its module (PEP 562). Not all programs use all of it.
_LATER = {
    "ConvBNAct": "modules",
    "ResidualChain": "modules",
    "explain": "explanation",
    "freeze": "frozen.freezing",
    "functional": "functional",
    "fuse": "fusion.swap",
    "models": "models",
    "safe_globals": "frozen.saving",
    "unfuse": "fusion.swap",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_LATER[name]}")
    globals()[name] = value = module if name == _LATER[name] else getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
