"""What csrc/cuda becomes on GPUs that are not here: compiled by nvcc, the machine code read.

    python benchmarks/codegen_cuda.py                                   every kernel that memory bounds, three chips
    python benchmarks/codegen_cuda.py --targets sm_90a --files pool.cu --markdown codegen_cuda.md

Every warning is an error. A row fails on spills, shared memory over the chip's, or where a kernel of several lanes per
thread reads no 128 bits at once. The exit code is 1 if any row fails, 2 where nvcc is missing.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

CSRC = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
# Shared memory that one block may take.
SHARED = {"sm_80": 163 << 10, "sm_90a": 227 << 10, "sm_100": 227 << 10}
TYPES = {"__nv_bfloat16": "bf16", "__half": "fp16", "float": "fp32", "double": "fp64", "unsigned char": "u8"}
TYPES |= {
    "unsigned short": "u16",
    "unsigned int": "u32",
    "unsigned long long": "u64",
    "true": "frozen",
    "false": "batch",
}
ADDS = ("", "+ residual", "+ projection")


@dataclass
class Report:
    """What one kernel became on one chip."""

    kernel: str
    case: str
    lanes: int
    target: str
    registers: int
    spills: int
    shared: int
    wide_loads: int | None

    @property
    def failures(self) -> list[str]:
        """Why the row fails; nothing where it is as it should be."""
        found = []
        if self.spills:
            found.append(f"{self.spills} bytes spilled")
        if self.shared > SHARED[self.target]:
            found.append(f"{self.shared} bytes of shared memory, the chip has {SHARED[self.target]}")
        if self.lanes > 1 and self.wide_loads == 0:
            found.append("no 128-bit load")
        return found


def nvcc() -> str | None:
    """The compiler that a build would take."""
    home = os.environ.get("CUDA_HOME")
    return (shutil.which("nvcc", path=str(Path(home, "bin"))) if home else None) or shutil.which("nvcc")


def nvdisasm() -> str | None:
    """The toolkit's, or that which Triton brings along."""
    found = shutil.which("nvdisasm") or shutil.which("nvdisasm", path="/usr/local/cuda/bin")
    if found is None:
        try:
            import triton
        except ImportError:
            return None
        found = shutil.which("nvdisasm", path=str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin"))
    return found


def sources() -> list[Path]:
    """The kernels that memory bounds."""
    return sorted(set(CSRC.glob("*.cu")) - set(CSRC.glob("conv_*.cu")))


def compile_file(source: Path, target: str) -> list[Report]:
    """One source for one chip.

    Raises:
        RuntimeError: it does not compile, or with a warning.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "k.cubin")
        command = [str(nvcc()), "-std=c++20", "-O3", "-Werror", "all-warnings", "-cubin", f"-arch={target}"]
        done = subprocess.run(
            [*command, "-Xptxas", "-v", str(source), "-o", str(cubin)], capture_output=True, text=True
        )
        if done.returncode != 0:
            raise RuntimeError(f"{source.name} for {target}: {done.stdout}{done.stderr}")
        tool = nvdisasm()
        sass = (
            subprocess.run([tool, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
            if tool
            else None
        )
    loads = {}
    if sass is not None:
        for section in sass.split(".section\t.text.")[1:]:
            loads[section.split(",")[0]] = len(re.findall(r"LDG\S*\.128", section))
    reports = []
    entry = re.compile(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers([^\n]*)",
        re.S,
    )
    for name, stores, reads, registers, rest in entry.findall(done.stderr):
        static = re.search(r"(\d+) bytes smem", rest)
        kernel, case, lanes = describe(name)
        reports.append(
            Report(kernel, case, lanes, target, int(registers), int(stores) + int(reads),
                   int(static[1]) if static else 0, loads.get(name) if sass is not None else None)
        )  # fmt: skip
    if not reports:
        raise RuntimeError(f"{source.name} for {target}: ptxas names no kernel: {done.stderr}")
    return reports


def describe(mangled: str) -> tuple[str, str, int]:
    """Kernel, what tells it from its other rows, and channels per thread."""
    text = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout
    text = text.replace("(anonymous namespace)::", "")
    found = re.search(r"(\w+_kernel)(?:<(.*?)>)?\(", text)
    if found is None:
        raise RuntimeError(f"no kernel's name: {text}")
    parts = [re.sub(r"^fused_resnet::cuda::", "", p.strip()) for p in (found[2] or "").split(",")]
    lanes, said = 1, []
    for part in parts:
        add = re.fullmatch(r"\((?:fused_resnet::cuda::)?Add\)(\d)", part)
        if add is not None:
            said.append(ADDS[int(add[1])])
        elif part.isdigit():
            lanes = int(part)
            said.append(f"{lanes} channels per thread" if lanes > 1 else "1 channel per thread")
        else:
            said.append(TYPES.get(part, part))
    return found[1], " ".join(filter(None, said)), lanes


def compile_all(jobs: Iterable[tuple[Path, str]], workers: int) -> Iterator[Report]:
    """Every report, file by file."""
    with ThreadPoolExecutor(workers) as pool:
        for reports in pool.map(lambda job: compile_file(*job), jobs):
            yield from reports


def markdown(reports: Iterable[Report]) -> str:
    """A table, sorted."""
    lines = [
        "| chip | kernel | case | registers | spills | static shared | 128-bit loads | fails |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in sorted(reports, key=lambda r: (r.target, r.kernel, r.case)):
        loads = "not read" if r.wide_loads is None else r.wide_loads
        lines.append(
            f"| {r.target} | {r.kernel} | {r.case} | {r.registers} | {r.spills} | {r.shared:,} | {loads} "
            f"| {'; '.join(r.failures)} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=list(SHARED), choices=list(SHARED))
    parser.add_argument("--files", nargs="+", default=[path.name for path in sources()])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--markdown", type=Path, help="write the table here")
    args = parser.parse_args(argv)
    compiler = nvcc()
    if compiler is None:
        print("nvcc was not found (set CUDA_HOME, or put nvcc on PATH)", file=sys.stderr)
        return 2
    jobs = [(CSRC / name, target) for target in args.targets for name in args.files]
    reports = list(compile_all(jobs, args.workers))
    failed = sum(bool(r.failures) for r in reports)
    table = markdown(reports)
    print(table)
    if args.markdown:
        version = re.search(
            r"release (\S+),", subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
        )
        lines = (
            "# Machine code of the CUDA kernels that memory bounds",
            "",
            f"Written by `make codegen`, {datetime.now(UTC):%Y-%m-%d}, nvcc {version[1] if version else '?'}, no GPU: "
            f"{', '.join(args.files)}.",
            f"{len(reports)} kernels for {', '.join(args.targets)}, {failed} fail.",
            "Activations are chosen at run time: one kernel serves all of them. Beside the static shared memory,",
            "at most 9 KiB per block are asked for at launch.",
        )
        args.markdown.write_text("\n".join(lines) + f"\n\n{table}")
    print(f"{len(reports)} compiled, {failed} fail", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
