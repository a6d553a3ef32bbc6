"""The command line, ``fused-resnet`` = ``python -m fused_resnet``: env, check, bench, train, study.

Every subcommand takes ``--json FILE`` and shows progress on a terminal only. It exits with 0 only if everything that it
checks holds (1: something does not; 2: the command could not run as asked).
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from fused_resnet.cli.options import UsageError, parser

# Packages that the commands need beyond torch: the name that is imported, and the name that is installed.
EXTRAS = {
    "rich": "rich",
    "jinja2": "jinja2",
    "matplotlib": "matplotlib",
    "sklearn": "scikit-learn",
    "PIL": "pillow",
    "numpy": "numpy",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments after the program's name; None: those of ``sys.argv``.

    Returns:
        0: everything that was checked holds. 1: something does not. 2: the command could not run as asked (unknown
        model, no such device, a missing package); a sentence on stderr says why.
    """
    args = parser().parse_args(argv)
    try:
        return int(importlib.import_module(f"fused_resnet.cli.{args.command}").run(args))
    except ModuleNotFoundError as missing:
        name = (missing.name or "").split(".")[0]
        if name not in EXTRAS:
            raise
        extra = "train" if args.command in ("train", "study") else "bench"
        problem = f"{EXTRAS[name]} is not installed: pip install 'fused_resnet[{extra}]'"
    except UsageError as error:
        problem = str(error)
    print(f"fused-resnet {args.command}: {problem}", file=sys.stderr)
    return 2
