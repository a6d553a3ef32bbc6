"""Chains and rows in a captured graph, and why other norms are left.

The graph is dynamo's: torch functions, each node with the tensor that the tracer computed (``example_value``). A chain
runs where its last node stood, so nothing between its first and last node may write what it reads.
"""

from __future__ import annotations

from torch import fx

from fused_resnet.fusion.chains import chains_of
from fused_resnet.fusion.matches import Matches
from fused_resnet.fusion.refusals import Refusals
from fused_resnet.fusion.rows import rows_of
from fused_resnet.fusion.table import kind_of
from fused_resnet.fusion.units import units_of


def match(graph: fx.Graph, frozen: bool = False) -> Matches:
    """The rows of a graph of torch functions, as dynamo hands it to a backend.

    Args:
        frozen: nothing is kept for a backward, and norms of batch statistics are left.
    """
    nodes = list(graph.nodes)
    matches = Matches(norms=sum(kind_of(n) == "norm" for n in nodes))
    refusals = Refusals(nodes, frozen)
    units = units_of(nodes, frozen, matches.left)
    matches.rows = list(rows_of(chains_of(nodes, units, refusals, matches.left), refusals))
    return matches
