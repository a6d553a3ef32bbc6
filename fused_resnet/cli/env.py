"""``fused-resnet env``: the machine, the versions, each backend or why it is unavailable.

The same facts head every report.
"""

from __future__ import annotations

import argparse
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import fused_resnet as fr
from fused_resnet.base import library

# Instructions that decide how fast a convolution can be, as /proc/cpuinfo spells them.
_X86 = ["avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8", "amx_fp16"]
_ISA = [*_X86, "asimd", "bf16", "i8mm", "sve"]


def _proc(path: str, key: str) -> str:
    """The first value of ``key`` in a file of "key : value" lines, or ""."""
    try:
        with open(path) as lines:
            pairs = (line.partition(":") for line in lines)
            return next((value.strip() for name, _, value in pairs if name.strip() == key), "")
    except OSError:
        return ""


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """The hardware that this process runs on, as a flat dictionary that JSON can hold."""
    flags = set((_proc("/proc/cpuinfo", "flags") or _proc("/proc/cpuinfo", "Features")).split())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    model = _proc("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()
    return {
        "cpu": model,
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "isa": [name for name in _ISA if name in flags],
        "memory_gib": round(memory / 2**30, 1),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "gpus": [_gpu(i) for i in range(torch.cuda.device_count())],
    }


def _gpu(index: int) -> dict[str, Any]:
    p = torch.cuda.get_device_properties(index)
    arch = getattr(p, "gcnArchName", "") if torch.version.hip else f"sm_{p.major}{p.minor}"
    memory = round(p.total_memory / 2**30, 1)
    return {"name": p.name, "arch": arch, "memory_gib": memory, "processors": p.multi_processor_count}


def device_name(device: torch.device) -> str:
    """One line that names the hardware of a measurement."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    m = machine()
    return f"{m['cpu']}, {m['threads']} threads, {m['torch_cpu_capability']}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def versions() -> dict[str, Any]:
    """The versions of everything that affects numbers or speed. None: not installed."""
    found: dict[str, Any] = {
        "fused_resnet": fr.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
        "onednn": torch.backends.mkldnn.is_available(),
    }
    return found | {name: _version(name) for name in ("triton", "torchvision", "numpy", "scikit-learn")}


def extension() -> dict[str, str]:
    """How the compiled extension was built; empty if there is none."""
    return library.build_info()


def describe() -> dict[str, Any]:
    """Machine, versions, extension and backends: the head of every JSON file."""
    return {"machine": machine(), "versions": versions(), "extension": extension(), "backends": fr.backends()}


def head(device: torch.device) -> dict[str, Any]:
    """The head of a report: when and where it was measured."""
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return {"date": date, "device": device_name(device), **describe()}


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    if isinstance(value, list):
        return "; ".join(_text(v) for v in value) if value and isinstance(value[0], dict) else " ".join(value) or "none"
    return "no" if value is None or value is False else "yes" if value is True else str(value)


def run(args: argparse.Namespace) -> int:
    """Prints ``describe()``. Returns 0 if a backend is available."""
    from fused_resnet.cli.console import console, table, write_json  # rich, without which ``describe`` works

    found = describe()
    out = console()
    for part, entries in found.items():
        rows = [(key, _text(value)) for key, value in entries.items()]
        rows = rows or [("not built", "pure Python: slower on a CPU")]
        out.print(table(part, ("", ""), rows, left=2))
    if args.json:
        write_json(args.json, found)
    return 0 if "ok" in found["backends"].values() else 1
