"""What the CUDA convolutions refuse, why, and which compiled instance a launch reaches: by nvcc, without a GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess

import pytest
from source_tree import SUPPORT

from fused_resnet.spec import ACTIVATIONS

SOURCE = SUPPORT / "conv_choice_host.cu"
KINDS = {"fprop": 0, "dgrad": 1, "wgrad": 2, "train": 3}
TYPES = {"bf16": 0, "f16": 1, "tf32": 2}
NOT_SUPPORTED = 801  # cudaErrorNotSupported


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc was not found")
    built = tmp_path_factory.mktemp("conv_choice") / "choice.so"
    # for sm_80 the kernels of sm_90a are empty, and quickly compiled
    flags = [
        "-std=c++17",
        "-O0",
        "-arch=sm_80",
        "-Werror",
        "all-warnings",
        "-shared",
        "-Xcompiler",
        "-fPIC,-Wall,-Wextra",
    ]
    done = subprocess.run([nvcc, *flags, str(SOURCE), "-o", str(built)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    loaded = ctypes.CDLL(str(built))
    loaded.why_not.restype = ctypes.c_char_p
    return loaded


def sizes(
    x: tuple[int, int, int, int] = (2, 14, 14, 64),
    w: tuple[int, int, int] = (128, 3, 3),
    stride: int = 1,
    pad: int = 1,
    dilation: int = 1,
    dtype: str = "bf16",
) -> ctypes.Array:
    values = [*x, *w, stride, stride, pad, pad, dilation, dilation, TYPES[dtype]]
    return (ctypes.c_int * len(values))(*values)


REFUSED = [
    ("fprop", {"x": (2, 14, 14, 3)}, "multiple of 8"),
    ("fprop", {"w": (10, 3, 3)}, "multiple of 8"),
    ("fprop", {"stride": 9}, "strides of at most 8"),
    ("fprop", {"pad": 128}, "at most 127"),
    ("fprop", {"x": (0, 14, 14, 64)}, "at least one pixel"),
    ("fprop", {"x": (2, 14, 14, 0)}, "one channel"),
    ("train", {"x": (2, 14, 14, 0)}, "one channel"),
    ("train", {"x": (2, 2, 2, 64), "pad": 0}, "1 to 2^30 pixels"),
    ("fprop", {"x": (1 << 16, 256, 256, 64)}, "2^31 pixels"),
    ("dgrad", {"stride": 2}, "stride 1"),
    ("dgrad", {"dtype": "tf32"}, "not float32"),
    ("dgrad", {"pad": 3}, "paddings smaller than the kernel"),
    ("wgrad", {"stride": 2}, "stride 1"),
    ("wgrad", {"dtype": "tf32"}, "not float32"),
    ("train", {"dtype": "tf32"}, "not float32"),
    ("train", {"x": (2, 14, 14, 96)}, "multiple of 64"),
    ("train", {"w": (12, 3, 3)}, "multiple of 8"),
    ("train", {"w": (64, 7, 7), "pad": 3}, "32 taps"),
    ("train", {"stride": 9}, "strides of at most 8"),
    ("train", {"x": (1 << 12, 1024, 1024, 64)}, "2^30 pixels"),
]


@pytest.mark.parametrize(("kind", "case", "reason"), REFUSED)
def test_refused_cases_have_a_reason_and_do_not_run(library: ctypes.CDLL, kind: str, case: dict, reason: str) -> None:
    said = library.why_not(KINDS[kind], sizes(**case), 1)
    assert said is not None and reason in said.decode()
    assert said.decode().startswith("the sm_90 "), "a sentence for a user names who refuses"
    who = (ctypes.c_int * 4)()
    assert library.launch(KINDS[kind], sizes(**case), 128, 128, who) == NOT_SUPPORTED
    assert list(who) == [-1] * 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_what_resnets_are_made_of_is_taken(library: ctypes.CDLL, kind: str, dtype: str) -> None:
    for c, k, kernel, stride in (
        (64, 64, 1, 1),
        (256, 64, 1, 1),
        (128, 128, 3, 1),
        (256, 256, 3, 2),
        (512, 1024, 1, 2),
    ):
        if stride > 1 and kind in ("dgrad", "wgrad"):
            continue
        case = sizes((256, 28, 28, c), (k, kernel, kernel), stride, kernel // 2, dtype=dtype)
        assert library.why_not(KINDS[kind], case, 1) is None


def test_activations_of_the_training_prologue(library: ctypes.CDLL) -> None:
    taken = [name for i, name in enumerate(ACTIVATIONS) if library.why_not(KINDS["train"], sizes(), i) is None]
    assert taken == ["identity", "relu"]


@pytest.mark.parametrize("kind", ["fprop", "dgrad", "wgrad"])
@pytest.mark.parametrize("dtype", TYPES)
def test_every_listed_tile_runs_and_no_other(library: ctypes.CDLL, kind: str, dtype: str) -> None:
    listed = (ctypes.c_int * 8)()
    count = library.tiles(KINDS[kind], TYPES[dtype], listed)
    assert (count > 0) == (kind == "fprop" or dtype != "tf32")
    tiles = [(listed[2 * i], listed[2 * i + 1]) for i in range(count)]
    assert len(set(tiles)) == count
    for m, n in {(128, 128), (128, 64), (64, 64), (64, 128), *tiles}:
        who = (ctypes.c_int * 4)()
        status = library.launch(KINDS[kind], sizes(dtype=dtype), m, n, who)
        if (m, n) in tiles:
            assert status == 0 and list(who) == [KINDS[kind], TYPES[dtype], m, n]
        else:
            assert status == NOT_SUPPORTED and list(who) == [-1] * 4
