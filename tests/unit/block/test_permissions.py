"""Who may use a node beside whom."""

from __future__ import annotations

import itertools

import pytest

from nbd_backend.block.errors import BlockError, Kind
from nbd_backend.block.permissions import ALL, READ, READ_WRITE, UNCHANGED, Access, Holder, HolderKind
from tests.unit.block.graphs import new_graph, null
from tests.unit.jobs.loops import both_loops

SETS = (frozenset[Access](), READ, READ_WRITE, UNCHANGED, ALL)


@both_loops
async def test_two_holders_get_on_exactly_when_each_shares_what_the_other_uses() -> None:
    async with new_graph() as graph:
        node = await graph.add(null("n"))
        for uses1, shares1, uses2, shares2 in itertools.product(SETS, repeat=4):
            one, two = Holder(HolderKind.JOB, "one"), Holder(HolderKind.EXPORT, "two")
            first = graph.permissions.acquire(node, one, uses=uses1, shares=shares1)
            if uses1 <= shares2 and uses2 <= shares1:
                graph.permissions.acquire(node, two, uses=uses2, shares=shares2).release()
            else:
                with pytest.raises(BlockError) as refused:
                    graph.permissions.acquire(node, two, uses=uses2, shares=shares2)
                assert refused.value.kind is Kind.IN_USE
                assert "'one'" in refused.value.message
                assert "'two'" in refused.value.message
            assert graph.permissions.holders(node) == [one]
            first.release()
            first.release()
            assert graph.permissions.holders(node) == []


@both_loops
async def test_nobody_may_write_to_a_read_only_node() -> None:
    async with new_graph() as graph:
        node = await graph.add(null("n", read_only=True))
        with pytest.raises(BlockError, match="Block node is read-only: job 'b' cannot write to node 'n'"):
            graph.permissions.acquire(node, Holder(HolderKind.JOB, "b"), uses=READ_WRITE, shares=ALL)


@both_loops
async def test_a_parent_does_not_let_others_write_to_its_children() -> None:
    async with new_graph() as graph:
        node = await graph.add(null("n"))
        await graph.add({"driver": "raw", "node-name": "above", "file": "n"})
        with pytest.raises(BlockError) as refused:
            graph.permissions.acquire(node, Holder(HolderKind.EXPORT, "e"), uses=READ_WRITE, shares=ALL)
        assert "unshared by node 'above' (uses node 'n' as 'file' child)" in refused.value.message
        assert "remove it with blockdev-del" in refused.value.message
