"""The options of every command. Imports only the standard library, so that ``--help`` always works."""

from __future__ import annotations

import argparse
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fused_resnet._version import __version__

DTYPES = ("fp64", "fp32", "bf16")
STUDIES = "degradation shortcuts projection bottleneck responses gradients convergence lr-drop deep"


class UsageError(Exception):
    """The command can't run as asked; the message is for the user."""


@contextmanager
def usage(what: str, *errors: type[Exception]) -> Iterator[None]:
    """Raises ``errors`` as a UsageError; its message begins with ``what``."""
    try:
        yield
    except errors as error:
        raise UsageError(f"{what}{error}") from error


def _names(text: str) -> list[str]:
    return [name for name in (part.strip() for part in text.split(",")) if name]


def _at_least(least: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"expected at least {least}, got {value}")
        return value

    return integer


_positive = _at_least(1)


def _seeds(text: str) -> list[int]:
    found = [int(name) for name in _names(text)]
    if not found or len(set(found)) != len(found) or min(found) < 0:
        raise argparse.ArgumentTypeError(f"expected different numbers from 0 on, separated by commas, got {text!r}")
    return found


def _device(sub: ArgumentParser) -> None:
    sub.add_argument("--device", default="auto", help="auto (default: a GPU if there is one), cpu, cuda, cuda:1 ...")


def _seed(sub: ArgumentParser) -> None:
    sub.add_argument("--seed", type=int, default=0, help="seed of weights, crops and inputs (default 0)")


def _models(sub: ArgumentParser) -> None:
    sub.add_argument("--models", type=_names, metavar="A,B,...", help="only these (fused_resnet.models.list_models())")


def _output(sub: ArgumentParser, default: str, what: str) -> None:
    sub.add_argument("--output", default=default, metavar="FOLDER", help=f"folder of {what} (default {default})")


def _check(sub: ArgumentParser) -> None:
    text = f"some of {', '.join(DTYPES)} (default all)"
    sub.add_argument("--dtypes", type=_names, default=list(DTYPES), metavar="A,B,...", help=text)


def _bench(sub: ArgumentParser) -> None:
    text = "quick (default): takes minutes; full: takes longer"
    sub.add_argument("--preset", choices=("quick", "full"), default="quick", help=text)
    text = "images per batch (default 8 on a CPU, 256 on a GPU)"
    sub.add_argument("--batch-size", type=_positive, metavar="N", help=text)
    sub.add_argument("--repeats", type=_positive, metavar="N", help="measure exactly N times (default: by the preset)")
    _output(sub, "bench-report", "the report")
    text = "under torchrun: plain and fused DDP, with and without SyncBatchNorm, on 1, 2, 4 ... processes, each with "
    text += "--batch-size images; prints scaling, writes --json only"
    sub.add_argument("--distributed", action="store_true", help=text)
    sub.add_argument("--no-compile", action="store_true", help="do not measure torch.compile")
    sub.add_argument("--no-digits", action="store_true", help="do not train on handwritten digits")
    sub.add_argument("--size", type=_positive, default=224, help=argparse.SUPPRESS)  # in pixels; the tests use it


def _train(sub: ArgumentParser) -> None:
    text = "digits (default; scikit-learn's), cifar10, cifar10:FOLDER, or the path of a folder of class folders"
    sub.add_argument("--data", default="digits", metavar="DATA", help=text)
    text = "a network of fused_resnet.models (default resnet20)"
    sub.add_argument("--model", default="resnet20", metavar="NAME", help=text)
    text = "paper (default): He et al.'s; modern: cosine, label smoothing, moving average, bf16; quick: 8 epochs"
    sub.add_argument("--recipe", choices=("paper", "modern", "quick"), default="paper", help=text)
    _output(sub, "train-report", "all output")
    sub.add_argument("--resume", action="store_true", help="continue from the checkpoint in --output, if there is one")
    sub.add_argument("--plain", action="store_true", help="train PyTorch's own modules, for comparison")
    sub.add_argument("--epochs", type=_positive, metavar="N", help="number of epochs (default: the recipe's)")
    text = "images per update, over all processes (default: the recipe's)"
    sub.add_argument("--batch-size", type=_positive, metavar="N", help=text)
    sub.add_argument("--lr", type=float, metavar="X", help="highest learning rate (default: the recipe's)")
    sub.add_argument("--dtype", choices=("fp32", "bf16"), help="bf16 runs under autocast (default: the recipe's)")
    text = "processes that decode images (default: by the number of cores)"
    sub.add_argument("--workers", type=_at_least(0), metavar="N", help=text)
    text = "write a checkpoint every N updates too, not only after each epoch"
    sub.add_argument("--checkpoint-every", type=_positive, metavar="N", help=text)


def _study(sub: ArgumentParser) -> None:
    sub.add_argument("names", nargs="+", metavar="NAME", help=f"all, or some of {STUDIES}")
    text = "quick (default): handwritten digits, minutes on a CPU; paper: its recipe on CIFAR-10, for a GPU and days"
    sub.add_argument("--preset", choices=("quick", "paper"), default="quick", help=text)
    text = "one training per seed (default 0,1,2)"
    sub.add_argument("--seeds", type=_seeds, default=[0, 1, 2], metavar="A,B,...", help=text)
    text = "trainings at a time (default: number of cores; on a GPU one)"
    sub.add_argument("--processes", type=_positive, metavar="N", help=text)
    text = "folder of CIFAR-10's files (default: where torchvision keeps them)"
    sub.add_argument("--data", metavar="FOLDER", help=text)
    _output(sub, "study-report", "the results")
    sub.add_argument("--resume", action="store_true", help="continue the paper preset's trainings in --output")


# name -> (one line of help, an example, the functions that add its options)
COMMANDS: dict[str, tuple[str, str, tuple[Callable[[ArgumentParser], None], ...]]] = {
    "env": (
        "show what this machine has, and which backends are available",
        "fused-resnet env\n  fused-resnet env --json env.json",
        (),
    ),
    "check": (
        "compare every block of every model with plain PyTorch: forward, gradients, running statistics",
        "fused-resnet check\n  fused-resnet check --models resnet50,resnet20 --json check.json\n"
        "  fused-resnet check --models timm/resnet50d,torchvision/mobilenet_v2",
        (_models, _device, _seed, _check),
    ),
    "bench": (
        "validate, then time plain, compiled and fused networks on photographs, and write a report",
        "fused-resnet bench\n  fused-resnet bench --preset full --models resnet50 --output report-resnet50\n"
        "  torchrun --nproc-per-node 2 -m fused_resnet bench --distributed --models resnet50 --json scaling.json",
        (_models, _device, _seed, _bench),
    ),
    "train": (
        "train a network on digits, CIFAR-10 or a folder of class folders, by the paper's recipe or a modern one",
        "fused-resnet train --data digits --recipe quick\n"
        "  fused-resnet train --data cifar10:data --model resnet110 --output runs/resnet110\n"
        "  fused-resnet train --data cifar10:data --model resnet110 --output runs/resnet110 --resume\n"
        "  fused-resnet train --data photos/ --model resnet50 --recipe modern\n"
        "  torchrun --nproc-per-node 8 -m fused_resnet train --data photos/ --model resnet50",
        (_train, _device, _seed),
    ),
    "study": (
        "repeat experiments of the paper, draw each beside its claim, and say whether the claim held",
        "fused-resnet study all\n  fused-resnet study degradation responses --seeds 0,1,2,3,4\n"
        "  fused-resnet study all --preset paper --data ~/data --device cuda --resume\n\n"
        "the exit code is 0 when the studies ran: whether a claim held is in NAME.json (held)",
        (_study, _device),
    ),
}


def parser() -> ArgumentParser:
    """The parser of the whole command line."""
    top = ArgumentParser(
        prog="fused-resnet",
        description="Fused residual networks: see what there is, check the numbers, measure the gain, train.",
        epilog="example:\n  fused-resnet bench --preset quick\n\nfused-resnet COMMAND --help tells more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"fused_resnet {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (summary, example, options) in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.add_argument("--json", metavar="FILE", help="write all results to FILE too")
        for add in options:
            add(sub)
    return top
