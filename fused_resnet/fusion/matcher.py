"""Finds chains and rows in a captured graph, and says why the other norms are in none.

The graph is dynamo's. It consists of torch functions, and each node has the tensor that the tracer computed
(``example_value``). A chain runs at the place of its last node, so no node between its first and its last may write a
tensor that the chain reads.
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
    """Finds the rows of a graph of torch functions, as dynamo gives it to a backend.

    Args:
        frozen: for inference: nothing is kept for a backward, and norms with batch statistics are left out.
    """
    nodes = list(graph.nodes)
    matches = Matches(norms=sum(kind_of(n) == "norm" for n in nodes))
    refusals = Refusals(nodes, frozen)
    units = units_of(nodes, frozen, matches.left)
    matches.rows = list(rows_of(chains_of(nodes, units, refusals, matches.left), refusals))
    return matches
