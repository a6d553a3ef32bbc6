"""The options of every command. Imports only the standard library, so that ``--help`` always works."""

from __future__ import annotations

import argparse

from fused_resnet._version import __version__

DTYPES = ("fp64", "fp32", "bf16")


class UsageError(Exception):
    """The command can't run as asked; the message is for the user."""


def _names(text: str) -> list[str]:
    return [name for name in (part.strip() for part in text.split(",")) if name]


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected at least 0, got {value}")
    return value


def _common(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--models", type=_names, metavar="A,B,...", help="only these (fused_resnet.models.list_models())")
    _where(sub)


def _where(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--device", default="auto", help="auto (default: a GPU if there is one), cpu, cuda, cuda:1 ...")
    sub.add_argument("--seed", type=int, default=0, help="seed of weights, crops and inputs (default 0)")


def _env(sub: argparse.ArgumentParser) -> None:
    pass


def _check(sub: argparse.ArgumentParser) -> None:
    _common(sub)
    sub.add_argument(
        "--dtypes",
        type=_names,
        default=list(DTYPES),
        metavar="A,B,...",
        help=f"some of {', '.join(DTYPES)} (default all)",
    )


def _bench(sub: argparse.ArgumentParser) -> None:
    _common(sub)
    sub.add_argument(
        "--preset",
        choices=("quick", "full"),
        default="quick",
        help="quick (default): takes minutes; full: takes longer",
    )
    sub.add_argument(
        "--batch-size", type=_positive, metavar="N", help="images per batch (default 8 on a CPU, 256 on a GPU)"
    )
    sub.add_argument("--repeats", type=_positive, metavar="N", help="measure exactly N times (default: by the preset)")
    sub.add_argument(
        "--output", default="bench-report", metavar="FOLDER", help="folder of the report (default bench-report)"
    )
    sub.add_argument(
        "--distributed",
        action="store_true",
        help="under torchrun: plain and fused DDP, with and without SyncBatchNorm, on 1, 2, 4 ... processes, each with "
        "--batch-size images; prints scaling, writes --json only",
    )
    sub.add_argument("--no-compile", action="store_true", help="do not measure torch.compile")
    sub.add_argument("--no-digits", action="store_true", help="do not train on handwritten digits")
    sub.add_argument("--size", type=_positive, default=224, help=argparse.SUPPRESS)  # in pixels; the tests use it


def _train(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--data",
        default="digits",
        metavar="DATA",
        help="digits (default; scikit-learn's), cifar10, cifar10:FOLDER, or the path of a folder of class folders",
    )
    sub.add_argument(
        "--model", default="resnet20", metavar="NAME", help="a network of fused_resnet.models (default resnet20)"
    )
    sub.add_argument(
        "--recipe",
        choices=("paper", "modern", "quick"),
        default="paper",
        help="paper (default): He et al.'s; modern: cosine, label smoothing, moving average, bf16; quick: 8 epochs",
    )
    sub.add_argument(
        "--output", default="train-report", metavar="FOLDER", help="folder of all output (default train-report)"
    )
    sub.add_argument("--resume", action="store_true", help="continue from the checkpoint in --output, if there is one")
    sub.add_argument("--plain", action="store_true", help="train PyTorch's own modules, for comparison")
    sub.add_argument("--epochs", type=_positive, metavar="N", help="number of epochs (default: the recipe's)")
    sub.add_argument(
        "--batch-size",
        type=_positive,
        metavar="N",
        help="images per update, over all processes (default: the recipe's)",
    )
    sub.add_argument("--lr", type=float, metavar="X", help="highest learning rate (default: the recipe's)")
    sub.add_argument("--dtype", choices=("fp32", "bf16"), help="bf16 runs under autocast (default: the recipe's)")
    sub.add_argument(
        "--workers", type=_count, metavar="N", help="processes that decode images (default: by the number of cores)"
    )
    sub.add_argument(
        "--checkpoint-every",
        type=_positive,
        metavar="N",
        help="write a checkpoint every N updates too, not only after each epoch",
    )
    _where(sub)


def _seeds(text: str) -> list[int]:
    found = [int(name) for name in _names(text)]
    if not found or len(set(found)) != len(found) or min(found) < 0:
        raise argparse.ArgumentTypeError(f"expected different numbers from 0 on, separated by commas, got {text!r}")
    return found


def _study(sub: argparse.ArgumentParser) -> None:
    studies = "degradation shortcuts projection bottleneck responses gradients convergence lr-drop deep"
    sub.add_argument("names", nargs="+", metavar="NAME", help=f"all, or some of {studies}")
    sub.add_argument(
        "--preset",
        choices=("quick", "paper"),
        default="quick",
        help="quick (default): handwritten digits, minutes on a CPU; paper: its recipe on CIFAR-10, for a GPU and days",
    )
    sub.add_argument(
        "--seeds", type=_seeds, default=[0, 1, 2], metavar="A,B,...", help="one training per seed (default 0,1,2)"
    )
    sub.add_argument("--device", default="auto", help="auto (default: a GPU if there is one), cpu, cuda, cuda:1 ...")
    sub.add_argument(
        "--processes", type=_positive, metavar="N", help="trainings at a time (default: number of cores; on a GPU one)"
    )
    sub.add_argument(
        "--data", metavar="FOLDER", help="folder of CIFAR-10's files (default: where torchvision keeps them)"
    )
    sub.add_argument(
        "--output", default="study-report", metavar="FOLDER", help="folder of the results (default study-report)"
    )
    sub.add_argument("--resume", action="store_true", help="continue the paper preset's trainings in --output")


# name -> (one line of help, an example, the function that adds its options)
COMMANDS = {
    "env": (
        "show what this machine has, and which backends are available",
        "fused-resnet env\n  fused-resnet env --json env.json",
        _env,
    ),
    "check": (
        "compare every block of every model with plain PyTorch: forward, gradients, running statistics",
        "fused-resnet check\n  fused-resnet check --models resnet50,resnet20 --json check.json\n"
        "  fused-resnet check --models timm/resnet50d,torchvision/mobilenet_v2",
        _check,
    ),
    "bench": (
        "validate, then time plain, compiled and fused networks on photographs, and write a report",
        "fused-resnet bench\n  fused-resnet bench --preset full --models resnet50 --output report-resnet50\n"
        "  torchrun --nproc-per-node 2 -m fused_resnet bench --distributed --models resnet50 --json scaling.json",
        _bench,
    ),
    "train": (
        "train a network on digits, CIFAR-10 or a folder of class folders, by the paper's recipe or a modern one",
        "fused-resnet train --data digits --recipe quick\n"
        "  fused-resnet train --data cifar10:data --model resnet110 --output runs/resnet110\n"
        "  fused-resnet train --data cifar10:data --model resnet110 --output runs/resnet110 --resume\n"
        "  fused-resnet train --data photos/ --model resnet50 --recipe modern\n"
        "  torchrun --nproc-per-node 8 -m fused_resnet train --data photos/ --model resnet50",
        _train,
    ),
    "study": (
        "repeat experiments of the paper, draw each beside its claim, and say whether the claim held",
        "fused-resnet study all\n  fused-resnet study degradation responses --seeds 0,1,2,3,4\n"
        "  fused-resnet study all --preset paper --data ~/data --device cuda --resume\n\n"
        "the exit code is 0 when the studies ran: whether a claim held is in NAME.json (held)",
        _study,
    ),
}


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    top = argparse.ArgumentParser(
        prog="fused-resnet",
        description="Fused residual networks: see what there is, check the numbers, measure the gain, train.",
        epilog="example:\n  fused-resnet bench --preset quick\n\nfused-resnet COMMAND --help tells more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"fused_resnet {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (summary, example, add_options) in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.add_argument("--json", metavar="FILE", help="write all results to FILE too")
        add_options(sub)
    return top
