"""For processes that tests start: chains run at any size, as ``conftest.py`` lets them; to be imported."""

from fused_resnet.planner import sizes

sizes.faster = lambda *args: sizes.CHAINS
