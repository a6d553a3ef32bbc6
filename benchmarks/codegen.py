"""What the Triton kernels become on GPUs that are not here: compiled ahead of time, the machine code read.

    python benchmarks/codegen.py                                      ResNet-18 and -50, batch 256, 224x224, three chips
    python benchmarks/codegen.py --models resnet18 --targets sm_90 --dtypes bfloat16 --markdown codegen.md

Which kernels, with which constants, is taken from the launches themselves: the network runs forward and backward on
meta tensors, and every launch is recorded. Launches that differ in the image's size alone are compiled once (--every:
all). A row fails on spills, shared memory over the chip's, a convolution without matrix instructions, or ptxas' warning
C75xx (every wgmma then waits for the one before it, at a fraction of the speed). The exit code is 1 if any row fails.
"""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import torch
import triton
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fused_resnet import models
from fused_resnet.backends import forced_again
from fused_resnet.backends.triton import configs, runtime
from fused_resnet.chain import backward, forward

R = TypeVar("R")
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
WARP = {"cuda": 32, "hip": 64}
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
}
PASSES = ("train", "frozen", "infer")
# constants in which two launches may differ and still be one row
SIZES = ("H", "W", "OH", "OW")


@dataclass(frozen=True)
class Call:
    """One specialisation of a kernel: what Triton compiles for a launch."""

    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]
    num_warps: int
    num_stages: int

    @property
    def row(self) -> Call:
        """The same without the image's size."""
        constants = tuple((n, v) for n, v in self.constants if n not in SIZES)
        return Call(self.module, self.kernel, self.signature, constants, (), self.num_warps, self.num_stages)

    def describe(self) -> str:
        """What tells it from the kernel's other rows: the tile, the convolution, what is fused."""
        c = dict(self.constants)
        parts = []
        if "BLOCK_N" in c and "BLOCK_K" in c:
            parts.append("x".join(str(c[f"BLOCK_{axis}"]) for axis in "MNK"))
        if "R" in c and "K" in c:
            parts.append(f"{c['R']}x{c['S']}/{c['STRIDE_H']} {c['C']}->{c['K']}")
        if c.get("COUNT", 1) > 1:
            parts.append(f"{c['COUNT']} phases")
        parts += [
            name.removesuffix("_ptr")
            for name in (
                "scale_ptr",
                "bias_ptr",
                "residual_ptr",
                "r_scale_ptr",
                "add_ptr",
                "summand_ptr",
                "mean_ptr",
                "sum_dz_ptr",
                "sum_dzs_ptr",
            )
            if name in dict(self.signature) and name not in c
        ]
        parts += ["frozen"] if "b_ptr" in c else []
        parts += [name.lower() for name in ("TF32", "WIDE") if c.get(name)]
        if "R" not in c:
            parts += [f"{n}={v}" for n, v in self.constants if v is not None]
        types = sorted({t[1:] for _, t in self.signature if t.startswith("*")} - {"fp32", "u8", "i32"}) or ["fp32"]
        return " ".join([*parts, *types])


@dataclass
class Report:
    """What one specialisation became on one chip. ``matrix``: wgmma, mma or mfma instructions."""

    call: Call
    target: str
    registers: int
    spills: int
    shared: int
    matrix: int
    wide_loads: int
    serialized: tuple[str, ...]

    @property
    def failures(self) -> list[str]:
        """Why this row fails; empty when it is fine."""
        c = dict(self.call.constants)
        found = [f"{self.spills} bytes of spills"] if self.spills else []
        limit = configs.TARGETS[self.target].shared
        if self.shared > limit:
            found.append(f"{self.shared} bytes of shared memory, the chip has {limit}")
        if self.serialized:
            found.append(f"wgmma serialized ({', '.join(self.serialized)})")
        sums = "BLOCK_K" in c and c.get("COUNT", 1) > 0
        exact = ("dz_ptr", "*fp32") in self.call.signature or ("x_ptr", "*fp32") in self.call.signature
        if sums and not self.matrix and (c.get("TF32") or not exact):
            found.append("no matrix instruction")
        return found


_IMPLEMENTATIONS = {
    "chain": forward.row_forward,
    "chain_backward": backward.row_backward,
    "chain_inference": forward.inference,
}


class _Recorder(TorchDispatchMode):
    """Runs chains by their Python implementation, with activations in another dtype, whatever the device."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Fused modules run their chains under it: others of a mode's kind see the plain network."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "fused_resnet":
            return func(*args, **(kwargs or {}))
        args = [a.to(self.dtype) if isinstance(a, Tensor) else a for a in args]
        outs = _IMPLEMENTATIONS[func._opname](*args)
        # out, or a gradient per input, in the dtype that autograd expects; what is saved stays as it is
        if isinstance(outs, Tensor):
            return outs.float()
        kept = 1 if func._opname == "chain" else len(outs)
        return [*(t.float() for t in outs[:kept]), *outs[kept:]]


@contextmanager
def recorded(calls: dict[Call, Call], every: bool = False) -> Iterator[None]:
    """Adds the specialisation of every launch within it."""

    def add(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> None:
        call = specialise(kernel, args, constants)
        calls.setdefault(call if every else call.row, call)

    with runtime.observe(add):
        yield


def specialise(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> Call:
    """What Triton makes of a launch's arguments: types, constants, what is divisible by 16."""
    given = dict(zip(kernel.arg_names, args, strict=False)) | constants
    signature, fixed, divisible = [], [], []
    for i, parameter in enumerate(kernel.params):
        name, value = parameter.name, given[parameter.name]
        if parameter.is_constexpr or value is None or (
            type(value) is int and value == 1 and not parameter.do_not_specialize
        ):  # fmt: skip
            signature.append((name, "constexpr"))
            fixed.append((name, value))
        elif isinstance(value, Tensor):
            signature.append((name, f"*{TYPES[value.dtype]}"))
            if value.storage_offset() * value.element_size() % 16 == 0:
                divisible.append(i)
        elif isinstance(value, float):
            signature.append((name, "fp32"))
        else:
            signature.append((name, "i32" if -(2**31) <= value < 2**31 else "i64"))
            if value % 16 == 0 and not parameter.do_not_specialize:
                divisible.append(i)
    return Call(
        kernel.fn.__module__,
        kernel.fn.__name__,
        tuple(signature),
        tuple(fixed),
        tuple(divisible),
        constants.get("num_warps", 4),
        constants.get("num_stages", 3),
    )


@contextmanager
def nth(rank: int) -> Iterator[None]:
    """Within it convolutions run with the configuration of that rank, or with their last."""
    known = configs.candidates

    def candidates(problem: configs.Problem, chip: configs.Target) -> tuple[configs.Config, ...]:
        found = known(problem, chip)
        return found[min(rank, len(found) - 1) :]

    with patch.object(configs, "candidates", candidates):
        yield


def network_calls(
    model: str,
    dtype: torch.dtype,
    target: str,
    passes: Sequence[str] = PASSES,
    batch: int = 256,
    size: int = 224,
    every: bool = False,
    ranks: int = 1,
) -> list[Call]:
    """The specialisations that a network launches: a training step, one with frozen BatchNorm, inference.

    ``ranks``: the number of configurations per convolution, the default first.
    """
    calls: dict[Call, Call] = {}
    with torch.device("meta"):
        net = getattr(models, model)().to(memory_format=torch.channels_last)
        x = torch.empty(batch, 3, size, size).to(memory_format=torch.channels_last)
    for name, rank in product(passes, range(ranks)):
        with forced_again("triton"), configs.use_target(target), recorded(calls, every), _Recorder(dtype), nth(rank):
            if name == "infer":
                with torch.no_grad():
                    net.eval()(x)
                continue
            net.train()
            for module in net.modules():
                if isinstance(module, nn.BatchNorm2d) and name == "frozen":
                    module.eval()
            net(x).sum().backward()
    return list(calls.values())


def compile_call(call: Call, target: str) -> Report:
    """Compiles (or takes from Triton's cache) and reads the machine code."""
    chip, built = configs.TARGETS[target], build(call, target)
    read = _read_hip if chip.backend == "hip" else _read_cuda
    return Report(call, target, shared=built.metadata.shared, **read(built.asm, str(chip.arch)))


def cache_call(call: Call, target: str) -> str:
    """Compiles into Triton's cache, where a launch of the same kernel finds it. Returns the kernel's name."""
    build(call, target)
    return call.kernel


def build(call: Call, target: str) -> Any:
    """What Triton compiles, or has in its cache."""
    chip = configs.TARGETS[target]
    kernel = getattr(importlib.import_module(call.module), call.kernel)
    return triton.compile(
        ASTSource(
            fn=kernel,
            signature=dict(call.signature),
            constexprs=dict(call.constants),
            attrs={(i,): [["tt.divisibility", 16]] for i in call.divisible},
        ),
        target=GPUTarget(chip.backend, chip.arch, WARP[chip.backend]),
        options={"num_warps": call.num_warps, "num_stages": call.num_stages, "enable_fp_fusion": True},
    )


def _run(*command: object) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    return done.stdout + done.stderr


def _read_cuda(asm: dict[str, Any], arch: str) -> dict[str, Any]:
    ptx = asm["ptx"]
    version = re.search(r"\.version (\S+)", ptx)
    newer = version is not None and float(version.group(1)) >= 9 and (BIN / "ptxas-blackwell").exists()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "k.ptx").write_text(ptx)
        (path / "k.cubin").write_bytes(asm["cubin"])
        # a second time, as Triton keeps nothing of what ptxas says
        ptxas = BIN / ("ptxas-blackwell" if newer else "ptxas")
        said = _run(ptxas, "-v", f"-arch=sm_{arch}{'a' if arch == '90' else ''}", path / "k.ptx", "-o", path / "x")
        used = _run(BIN / "cuobjdump", "--dump-resource-usage", path / "k.cubin")
        sass = _run(BIN / "nvdisasm", "-c", path / "k.cubin")
    registers = re.search(r"REG:(\d+)", used)
    if registers is None:
        raise RuntimeError(f"cuobjdump said no number of registers: {used}")
    return {
        "registers": int(registers.group(1)),
        "spills": sum(map(int, re.findall(r"(\d+) bytes spill stores", said))),
        "matrix": len(re.findall(r"\b[HQ]GMMA\." if arch == "90" else r"\bHMMA\.", sass)),
        "wide_loads": len(re.findall(r"LDG\S*\.128|LDGSTS\S*\.128|UTMALDG", sass)),
        "serialized": tuple(sorted(set(re.findall(r"(C75\d+)\)", said)))),
    }


def _read_hip(asm: dict[str, Any], arch: str) -> dict[str, Any]:
    text = asm["amdgcn"]

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", text)
        return int(found.group(1)) if found else 0

    return {
        "registers": field("vgpr_count"),
        "spills": 4 * (field("vgpr_spill_count") + field("sgpr_spill_count")),
        "matrix": len(re.findall(r"\bv_mfma", text)),
        "wide_loads": len(re.findall(r"(?:buffer|global)_load_dwordx4", text)),
        "serialized": (),
    }


def compile_all(
    jobs: Iterable[tuple[Call, str]], workers: int = 2, one: Callable[[Call, str], R] = compile_call
) -> Iterator[R]:
    """``one``'s results as they come, in no order; one worker is this very process."""
    if workers == 1:
        for call, target in jobs:
            yield one(call, target)
        return
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        for done in as_completed([pool.submit(one, *job) for job in jobs]):
            yield done.result()


def markdown(reports: Iterable[Report]) -> str:
    """A table, sorted, failures last in each row."""
    lines = [
        "| chip | kernel | case | warps, stages | registers | spills | shared | matrix | 128-bit loads | fails |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in sorted(reports, key=lambda r: (r.target, r.call.kernel, r.call.describe())):
        c = r.call
        lines.append(
            f"| {r.target} | {c.kernel} | {c.describe()} | {c.num_warps}, {c.num_stages} | {r.registers} "
            f"| {r.spills} | {r.shared:,} | {r.matrix} | {r.wide_loads} | {'; '.join(r.failures)} |"
        )
    return "\n".join(lines) + "\n"


def heading(args: argparse.Namespace, compiled: int, failed: int) -> str:
    """What was compiled, by what, when."""
    today = datetime.now(UTC).strftime("%Y-%m-%d")
    what = f"{', '.join(args.models)} at 224x224, batch {args.batch_size}, {', '.join(args.dtypes)}"
    done = f"{compiled} specialisations for {', '.join(args.targets)}, {failed} fail"
    lines = (
        "# Machine code of the Triton kernels",
        "",
        f"Written by `make codegen`, {today}, Triton {triton.__version__}, torch {torch.__version__}, no GPU:",
        f"{what}, passes {', '.join(args.passes)}. {done}.",
        "`matrix`: wgmma (sm_90), mma (sm_80) or mfma (gfx942) instructions.",
        "Rows that differ in the image's size alone are compiled once.",
    )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet18", "resnet50"])
    parser.add_argument("--targets", nargs="+", default=list(configs.TARGETS), choices=list(configs.TARGETS))
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--passes", nargs="+", default=["train", "infer"], choices=PASSES)
    parser.add_argument("--only", default="", help="rows whose kernel and case match this regular expression")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--every", action="store_true", help="every image size, too")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--markdown", type=Path, help="write the table here")
    args = parser.parse_args(argv)
    if runtime.INTERPRET:
        parser.error("TRITON_INTERPRET=1 interprets kernels and compiles none: unset it")
    jobs: dict[tuple[Call, str], None] = {}
    for target in args.targets:
        seen: set[Call] = set()
        for dtype in args.dtypes:
            for model in args.models:
                for call in network_calls(
                    model, getattr(torch, dtype), target, args.passes, args.batch_size, every=args.every
                ):
                    key = call if args.every else call.row
                    if key not in seen and re.search(args.only, f"{call.kernel} {call.describe()}"):
                        seen.add(key)
                        jobs[call, target] = None
    print(f"{len(jobs)} kernels to compile", file=sys.stderr)
    reports = []
    for report in compile_all(jobs, args.workers):
        reports.append(report)
        state = "; ".join(report.failures) or "ok"
        print(f"{len(reports)}/{len(jobs)} {report.target} {report.call.kernel} {report.call.describe()}: {state}",
              file=sys.stderr)  # fmt: skip
    table = markdown(reports)
    print(table)
    failed = sum(bool(r.failures) for r in reports)
    if args.markdown:
        args.markdown.write_text(f"{heading(args, len(reports), failed)}\n\n{table}")
    print(f"{len(reports)} compiled, {failed} fail", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
