"""Finds the reason why a chain can't run at its last node's place: nodes before it write or switch what it needs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import fx

from fused_resnet.fusion.matches import ChainMatch, RowMatch
from fused_resnet.fusion.table import counts_batch, storage_of, switches_mode, value_of, written


class Refusals:
    """The refusals of chains of one graph. ``frozen``: nothing is kept for a backward."""

    def __init__(self, nodes: Sequence[fx.Node], frozen: bool) -> None:
        self.frozen, self.nodes = frozen, nodes
        self.order = {node: i for i, node in enumerate(nodes)}
        self.writes = [(i, written(node)) for i, node in enumerate(nodes)]
        self.writes = [(i, changed) for i, changed in self.writes if changed]
        self.switches = [i for i, node in enumerate(nodes) if switches_mode(node)]

    def why_not(self, chain: ChainMatch) -> str | None:
        """The reason why this chain can't run, or None."""
        pool = chain.max_pool
        if pool is not None and math.prod(pool.kernel) > 256:
            return "a max-pool with a window of more than 256 values"
        dtypes = {v.dtype for n in chain.nodes if (v := value_of(n)) is not None}
        x = value_of(chain.start)
        if len(dtypes) > 1 or x is None or (x.dtype not in dtypes and not chain.units[0].has_conv):
            return "its dtype changes inside the chain"
        return self.disturbed(RowMatch([chain]))

    def disturbed(self, row: RowMatch) -> str | None:
        """The reason why the row's nodes can't all run at the place of the last one, or None."""
        nodes, reads = row.nodes, row.reads
        inside = set(nodes)
        first, last = min(self.order[n] for n in nodes), max(self.order[n] for n in nodes)
        if any(first < i < last for i in self.switches):
            return "gradients or autocast are switched on or off inside the chain"
        storages = {storage_of(n) for n in reads}
        for i, changed in self.writes:
            if first < i < last and self.nodes[i] not in inside and not counts_batch(self.nodes[i]):
                if any(storage_of(n) is None or storage_of(n) in storages for n in changed):
                    return "a tensor that it reads is changed in place before its last operator"
        updated = {storage_of(n) for n in _updates(row)}
        for node in self.nodes[first:last]:
            if node not in inside and any(storage_of(n) in updated for n in node.all_input_nodes):
                return "its running statistics are used before its last operator"
        late = max((self.order[n] for n in reads), default=0)
        return "it reads a tensor that is computed after its last operator" if late > last else None


def _updates(row: RowMatch) -> list[fx.Node]:
    """The running statistics that the row changes."""
    units = [unit for unit in row.all_units if unit.options["training"]]
    return [u.tensors[name] for u in units for name in ("running_mean", "running_var") if name in u.tensors]
