"""Finds the rows of a captured graph: chains one after the other that run as one operator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import fx

from fused_resnet.fusion.head import head_of
from fused_resnet.fusion.matches import ChainMatch, RowMatch
from fused_resnet.fusion.refusals import Refusals


def rows_of(chains: Sequence[ChainMatch], refusals: Refusals) -> Iterator[RowMatch]:
    """Groups chains that follow one another into rows."""
    by_start: dict[fx.Node, list[ChainMatch]] = {}
    for chain in chains:
        by_start.setdefault(chain.start, []).append(chain)
    seen: set[int] = set()
    for chain in chains:
        if id(chain) in seen:
            continue
        row = [chain]
        while (after := _after(row, by_start, refusals)) is not None:
            row.append(after)
        seen.update(map(id, row))
        yield _whole(RowMatch(row), refusals)


def _whole(row: RowMatch, refusals: Refusals) -> RowMatch:
    """The row with the head after it, for inference."""
    if not refusals.frozen or (head := head_of(row.end)) is None:
        return row
    whole = RowMatch(row.chains, head)
    return whole if refusals.disturbed(whole) is None else row


def _after(
    row: Sequence[ChainMatch], by_start: dict[fx.Node, list[ChainMatch]], refusals: Refusals
) -> ChainMatch | None:
    """The chain that may run in one row with the chains before it."""
    end, followers = row[-1].end, by_start.get(row[-1].end, [])
    if len(followers) != 1:
        return None
    (after,) = followers
    if refusals.frozen:
        if not _fits_row(after):
            return None
    elif not all(map(_fits_row, (*row, after))) or after.shortcut in ("projection", "pad"):
        return None  # a stage is a row of its own: its parameters' gradients must not wait for all other stages
    if not set(end.users) <= set(after.nodes):
        return None
    whole = RowMatch([*row, after])
    return after if refusals.disturbed(whole) is None else None


def _fits_row(chain: ChainMatch) -> bool:
    """Whether a chain has nothing that is only allowed outside rows."""
    return chain.max_pool is None and chain.shortcut != "tensor" and chain.units[0].has_conv
