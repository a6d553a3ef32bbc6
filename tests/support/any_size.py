"""For processes that tests start: chains run at any size, as ``conftest.py`` lets them; to be imported."""

from fused_resnet import small

small.faster = lambda *args: small.CHAINS
