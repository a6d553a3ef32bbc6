"""``python -m fused_resnet``: the same command as ``fused-resnet``."""

import sys

from fused_resnet.cli import main

if __name__ == "__main__":
    sys.exit(main())
