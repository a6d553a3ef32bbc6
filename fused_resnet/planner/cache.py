"""The planner's cache: the measurements on a device, in one JSON file per device and set of versions.

    {"format": 1, "identity": {"device": "NVIDIA H200", "torch": "2.11.0", ...},
     "choices": {"conv_stats bf16 ...": {"choice": {"backend": "cudnn", ...}, "ms": {"cudnn": 0.21, "aten": 0.34}}}}

A CPU's file also says whether chains pay (``sizes.py``): {"choice": {"chains": true}, "ms": {"chains": 2.1, "plain":
2.9}}.

Files are in FUSED_RESNET_CACHE, or in ``fused_resnet/`` of the user's cache folder (XDG_CACHE_HOME, ~/.cache). A file
that is not readable, or was made elsewhere, is left alone with a warning. Every write takes a lock, reads the file
again, keeps the entries that other processes added, and replaces the file atomically.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch

from fused_resnet._version import __version__
from fused_resnet.backends import warn_once
from fused_resnet.base import library

FORMAT = 1
# Seconds that a process waits for another one's write.
_PATIENCE_S = 30


def folder() -> Path:
    """The folder of the files."""
    given = os.environ.get("FUSED_RESNET_CACHE")
    if given:
        return Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fused_resnet"


def _extension() -> str:
    """The compiled extension: its GPU part, and which build it is."""
    built = library.build_info()
    if not built:
        return "none"
    # kernels of one version may change, as in a source tree
    time = library.PATH.stat().st_mtime_ns
    return f"cuda {built['cuda_archs']}, cutlass {built['cutlass']}, built {time:x}"


# Environment variables that change the speed of the libraries behind PyTorch's operators, or of memory.
_SPEED = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "FUSED_RESNET_CPU_COMPUTE", "LD_PRELOAD")


def _processor() -> str:
    """The CPU, and the instruction sets that PyTorch, oneDNN, MKL and our kernels may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    told = [next(models, "") or platform.processor() or platform.machine()]
    told += [torch.backends.cpu.get_cpu_capability(), f"kernels {library.build_info().get('cpu_isa', 'none')}"]
    return ", ".join([*told, *(f"{name}={os.environ[name]}" for name in _SPEED if os.environ.get(name))])


def identity(device: torch.device) -> dict[str, str]:
    """What a measurement depends on beside its signature: the device, and every version that makes or runs kernels."""
    try:
        from importlib.metadata import version

        triton = version("triton")
    except ImportError:
        triton = "none"
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        name = f"{p.name}, {p.multi_processor_count} processors"
    else:
        name = f"{_processor()}, {torch.get_num_threads()} threads"
    return {
        "device": name,
        "fused_resnet": __version__,
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda or torch.version.hip),
        "cudnn": str(torch.backends.cudnn.version()),
        "triton": triton,
        "extension": _extension(),
    }


class PlanCache:
    """The choices for one identity: a dictionary in memory, and a file.

    Args:
        identity: see ``identity``. A file with another identity is not used.
        path: the file; None: one in ``folder()``, named by the identity.
    """

    def __init__(self, identity: dict[str, str], path: Path | None = None) -> None:
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        self.identity = identity
        self.path = path or folder() / f"plan-{digest}.json"
        self.choices: dict[str, Any] = self._read()

    def _read(self) -> dict[str, Any]:
        try:
            raw = json.loads(self.path.read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            warn_once(f"plan cache {self.path} is ignored: not readable as JSON ({error})")
            return {}
        reason = self._foreign(raw)
        if reason:
            warn_once(f"plan cache {self.path} is ignored: {reason}")
            return {}
        return raw["choices"]

    def _foreign(self, raw: Any) -> str | None:
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            return f"expected format {FORMAT}"
        if raw.get("identity") != self.identity:
            return f"it was made for {raw.get('identity')}, this is {self.identity}"
        choices = raw.get("choices")
        if not isinstance(choices, dict) or not all(isinstance(c, dict) and "choice" in c for c in choices.values()):
            return "its choices are damaged"
        return None

    def add(self, signature: str, entry: dict[str, Any], instead_of: dict[str, Any] | None = None) -> dict[str, Any]:
        """Stores ``entry``, unless another process has stored one first. Returns the entry that is valid.

        ``instead_of``: an outdated entry that may be replaced. A file that can't be written raises nothing: then the
        choice is valid in this process.
        """
        from filelock import FileLock  # torch requires it

        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # filelock.Timeout is an OSError: a process that holds the lock longer than a write takes has hung
            with FileLock(f"{self.path}.lock", timeout=_PATIENCE_S):
                self.choices = {**self.choices, **self._read()}
                held = self._hold(signature, entry, instead_of)
                self._write()
        except OSError as error:
            warn_once(f"plan cache {self.path} can't be written: {error}")
            held = self._hold(signature, entry, instead_of)
        return held

    def _hold(self, signature: str, entry: dict[str, Any], instead_of: dict[str, Any] | None) -> dict[str, Any]:
        if self.choices.get(signature) in (None, instead_of):
            self.choices[signature] = entry
        return self.choices[signature]

    def _write(self) -> None:
        text = json.dumps({"format": FORMAT, "identity": self.identity, "choices": self.choices}, indent=1)
        handle, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.name)
        try:
            with os.fdopen(handle, "w") as file:
                file.write(text)
            os.replace(temporary, self.path)
        except BaseException:
            os.unlink(temporary)
            raise
