"""What the convolutions of csrc/cuda become: compiled by nvcc without a GPU, the machine code read.

    python benchmarks/codegen_cuda_conv.py                      every csrc/cuda/conv_*.cu, a table
    python benchmarks/codegen_cuda_conv.py conv_train_sm90.cu   one of them

A row fails on spills, a wgmma that ptxas serialized (C75xx), no wgmma at all, and, for our own kernel, whatever its
design counts on and is not there: A in registers, TMA, setmaxnreg, no access through generic addresses. The exit code
is 1 if any row fails, 2 where nvcc or the headers of CUTLASS are missing. One compilation at a time: those with CUTLASS
take up to 4 GiB each.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CUDA = ROOT / "csrc" / "cuda"
ARCH = "sm_90a"
BUILD = runpy.run_path(str(ROOT / "setup.py"))  # what is judged is what an installation compiles
cutlass_includes = BUILD["cutlass_includes"]
WARNINGS = ("-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror")
PREFIX = ("none", "identity", "relu")  # enum Pre of conv_train_sm90.cu
OPERATOR = ("fprop", "dgrad", "wgrad")  # cutlass::conv::Operator
COUNTED = ("HGMMA", "UTMALDG", "UTMASTG", "UBLKCP", "USETMAXREG", "LDSM", "STSM", "LDL", "STL")


@dataclass(frozen=True)
class Row:
    """One kernel of one file on one architecture. ``wgmma``: "RS", A in registers, or "SS"; "" without any."""

    kernel: str
    arch: str
    registers: int
    shared: str
    spills: int
    wgmma: str
    serialized: tuple[str, ...]
    hazards: tuple[str, ...]
    instructions: dict[str, int]

    @property
    def failures(self) -> list[str]:
        """Why this row fails; empty when it is fine."""
        count = self.instructions
        found = [f"{self.spills} bytes of spills"] if self.spills else []
        if self.serialized:
            found.append(f"wgmma serialized ({', '.join(self.serialized)})")
        if not self.wgmma:
            found.append("no wgmma")
        if self.hazards:
            found.append(f"touched while a wgmma uses it: {', '.join(self.hazards)}")
        if not count["UTMALDG"] or not count["UTMASTG"]:
            found.append("no TMA")
        if count["LDL"] or count["STL"]:
            found.append("local memory")
        if self.kernel.startswith("conv_train"):
            if self.wgmma != "RS":
                found.append("A of wgmma is not in registers")
            if count["USETMAXREG"] != 2:
                found.append("no setmaxnreg")
            if count["LD"]:
                found.append("shared memory read through generic addresses")
        return found


def unavailable(file: Path) -> str | None:
    """Why ``file`` can't be compiled and read here, or None."""
    if nvcc() is None:
        return "nvcc was not found (set CUDA_HOME, or put nvcc on PATH)"
    if cuobjdump() is None:
        return "cuobjdump was not found (CUDA's, or the one that comes with Triton)"
    if "conv_sm90.cuh" in file.read_text() and not cutlass_includes():
        return "CUTLASS's headers were not found (pip install --no-deps nvidia-cutlass)"
    return None


def nvcc() -> str | None:
    """The CUDA compiler."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=str(Path(home, "bin"))) if home else shutil.which("nvcc")


def cuobjdump() -> str | None:
    """The disassembler: CUDA's or Triton's."""
    triton = importlib.util.find_spec("triton")
    folders = triton.submodule_search_locations or () if triton else ()
    bins = [str(Path(p) / "backends" / "nvidia" / "bin") for p in folders]
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=os.pathsep.join(bins))


def sources() -> list[Path]:
    """The files with kernels."""
    return [p for p in sorted(CUDA.glob("conv_*.cu")) if p.name != "conv_sm90.cu"]


def rows(file: Path) -> list[Row]:
    """Compiles one file and reads it.

    Raises:
        RuntimeError: nvcc refuses it, with what it says.
    """
    compiler, disassembler = nvcc(), cuobjdump()
    assert compiler is not None and disassembler is not None, unavailable(file)
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "k.o"
        command = [*BUILD["cutlass_command"](compiler, file, built), "-Xptxas=-v", *WARNINGS]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{file.name}: {done.stderr[-4000:]}")
        sass = subprocess.run([disassembler, "-sass", str(built)], capture_output=True, text=True, check=True).stdout
    said = done.stdout + done.stderr
    return [_row(name, part, said) for name, part in _functions(sass)]


def _functions(sass: str) -> Iterator[tuple[str, list[str]]]:
    """(mangled name, instructions) of every kernel."""
    for part in sass.split("Function : ")[1:]:
        name, body = part.split("\n", 1)
        yield name.strip(), re.findall(r"/\*[0-9a-f]{4,6}\*/\s+(?:@!?U?P\w+ )?(.*?);", body)


def _row(name: str, code: list[str], said: str) -> Row:
    """What ptxas said of the kernel, and what is in it."""
    # what ptxas says of a kernel stands between its name and the next one's
    own = re.search(rf"Function properties for {re.escape(name)}\n(.*?)(?=Compiling entry|\Z)", said, re.S)
    if own is None:
        raise RuntimeError(f"ptxas said nothing of {name}")
    spills = re.search(r"(\d+) bytes spill stores", own[1])
    registers = re.search(r"Used (\d+) registers", own[1])
    assert spills is not None and registers is not None, own[1]
    opcodes = [i.split(None, 1)[0] for i in code]
    count = {c: sum(o.split(".")[0] == c for o in opcodes) for c in COUNTED}
    count["LD"] = sum(o == "LD" or o.startswith("LD.") for o in opcodes)
    products = [i for i in code if i.startswith("HGMMA")]
    in_registers = [bool(re.match(r"HGMMA\S* R\d+, R\d+, gdesc", i)) for i in products]
    form = "" if not products else "RS" if all(in_registers) else "SS" if not any(in_registers) else "mixed"
    # a warning that names no kernel counts for all of the file
    warned = [line for line in said.splitlines() if name in line or "'_Z" not in line]
    serialized = sorted({m[1] for line in warned if (m := re.search(r"\((C75\d+)\)", line))})
    what, shared = _describe(name)
    return Row(what, ARCH, int(registers[1]), shared, int(spills[1]), form, tuple(serialized), _hazards(code), count)


def _hazards(code: list[str]) -> tuple[str, ...]:
    """Registers of A that are written before a wait for the wgmma that reads them, of which ptxas does not warn.

    Twice through the code from the first to the last wgmma in a row, as one commit group each: the main loop of
    conv_train_sm90.cu. Kernels whose A is in shared memory have none.
    """
    waits = [i for i, line in enumerate(code) if line.startswith("WARPGROUP.DEPBAR")]
    products = [i for i, line in enumerate(code) if re.match(r"HGMMA\S* R\d+, R\d+, gdesc", line)]
    if not products:
        return ()
    first = max((i for i in waits if i < products[0]), default=products[0])
    flying: list[range] = []
    found = set()
    for line in 2 * code[first : products[-1] + 1]:
        if wait := re.match(r"WARPGROUP.DEPBAR.LE gsb0, (0x[0-9a-f]+)", line):
            flying = flying[max(0, len(flying) - int(wait[1], 16)) :]
        elif product := re.match(r"HGMMA\S* R\d+, R(\d+), gdesc", line):
            flying.append(range(int(product[1]), int(product[1]) + 4))
        elif written := re.match(r"(\S+) (?:P\d, )?R(\d+)(?:\.\w+)?,", line):
            op, to = written[1], int(written[2])
            wide = 4 if "LDSM" in op or ".128" in op else 2 if ".64" in op or ".WIDE" in op else 1
            found |= {f"R{r}" for r in range(to, to + wide) if any(r in a for a in flying)}
    return tuple(sorted(found))


def _describe(name: str) -> tuple[str, str]:
    """The kernel in words, and its shared memory: both from the mangled name."""
    own = re.search(r"conv_train_kernelILi(\d+)ELNS\d*_3PreE(\d)ENS\w*?(BF16|F16)E", name)
    if own:
        n, prologue, dtype = int(own[1]), PREFIX[int(own[2])], own[3].lower()
        return f"conv_train 128x{n} {dtype} prologue {prologue}", f"{_shared(n):,}"
    conv = re.search(r"ConvProblemShapeILNS\w*?OperatorE(\d)E.*?ImplicitGemmILS\w+_\d+ELi(\d+)E", name)
    tile = re.search(r"KernelImplicitTmaWarpSpecializedSm90ELi1EEENS\w_IJNS\w_ILi(\d+)EEE", name)
    mma = re.search(r"MMA_64x(\d+)x\d+_F32(BF16|F16|TF32)", name)
    if not (conv and tile and mma):
        return name, ""
    return f"conv_sm90 {OPERATOR[int(conv[1])]} {tile[1]}x{mma[1]} {mma[2].lower()}", f"{conv[2]} stages"


def _shared(block_n: int) -> int:
    """Bytes of shared memory of conv_train_sm90.cu, as csrc/cuda/conv_train_map.h lays it out."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        return 0
    code = f'#include "conv_train_map.h"\nint bytes = fused_resnet::cuda::train::Smem<{block_n}>::kBytes;'
    command = [compiler, "-std=c++17", f"-I{CUDA}", "-S", "-xc++", "-", "-o", "-"]
    said = subprocess.run(command, input=code, capture_output=True, text=True, check=True).stdout
    found = re.search(r"^bytes:\s+\.(?:long|word)\s+(\d+)", said, re.M)
    return int(found[1]) if found else 0


def markdown(table: Iterable[Row]) -> str:
    """A table, sorted; why a row fails comes last."""
    lines = [
        "| chip | kernel | registers | spills | shared | wgmma | TMA loads, stores | fails |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in sorted(table, key=lambda r: (r.arch, r.kernel)):
        count = r.instructions
        lines.append(
            f"| {r.arch} | {r.kernel} | {r.registers} | {r.spills} | {r.shared} | {count['HGMMA']} {r.wgmma} "
            f"| {count['UTMALDG'] + count['UBLKCP']}, {count['UTMASTG']} | {'; '.join(r.failures)} |"
        )
    return "\n".join(lines) + "\n"


def collect(files: Iterable[Path] | None = None) -> list[Row]:
    """The rows of all files (default: all there are), one after the other; says on stderr how long each took.

    Raises:
        RuntimeError: a tool is missing, or nvcc refuses a file.
    """
    table: list[Row] = []
    for file in sources() if files is None else files:
        if reason := unavailable(file):
            raise RuntimeError(f"{file.name}: {reason}")
        start = time.perf_counter()
        found = rows(file)
        failed = sum(bool(r.failures) for r in found)
        print(f"{file.name}: {len(found)} kernels, {failed} fail, {time.perf_counter() - start:.0f} s", file=sys.stderr)
        table += found
    return table


def heading(table: list[Row]) -> str:
    """What the committed table says of itself."""
    failed = sum(bool(r.failures) for r in table)
    said = subprocess.run([str(nvcc()), "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\S+),", said)
    return (
        "# Machine code of the CUDA convolutions\n\n"
        f"Written by `make codegen`, {datetime.now(UTC):%Y-%m-%d}, nvcc {release[1] if release else '?'}, no GPU: "
        f"{len(table)} kernels of csrc/cuda/conv_*.cu, {failed} fail.\n"
        "RS: wgmma takes A from registers, SS: from shared memory.\n\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="names of csrc/cuda/conv_*.cu; all by default")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    args = parser.parse_args(argv)
    files = [CUDA / name for name in args.files] or sources()
    if reasons := [f"{file.name}: {reason}" for file in files if (reason := unavailable(file))]:
        print(reasons[0], file=sys.stderr)
        return 2
    table = list(collect(files))
    print(markdown(table))
    if args.markdown:
        args.markdown.write_text(heading(table) + markdown(table))
    return 1 if any(r.failures for r in table) else 0


if __name__ == "__main__":
    sys.exit(main())
