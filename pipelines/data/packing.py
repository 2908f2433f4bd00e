"""Packing: several conversations in one row of a micro-batch, for little padding.

A global batch is shared among the same number of micro-batches as without packing. Their token counts, estimated from
the index, are about equal, so that ranks wait little for each other. Each micro-batch lays its conversations into the
fewest rows that `max_length` admits. The rows depend on the tokens of the conversations that are used, so a replacement
needs no rule of its own: the micro-batch is laid out with it.

Hence the conversations of a row are a function of sets, seed, settings and number of the global batch. They do not
depend on the number of workers. A micro-batch of a single row has no padding.
"""

import heapq
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import numpy as np
from annotated_types import Ge
from jaxtyping import Int

from redux.conversation import IGNORE_INDEX
from redux.rounding import divide_up

BYTES_PER_TOKEN = 4
"""Estimated bytes of a stored record per token of its text. A wrong estimate only makes micro-batches less equal."""


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Packing of conversations into rows.

    Args:
        max_length: maximum number of tokens of a row. A longer conversation has a row of its own.
    """

    max_length: Annotated[int, Ge(1)]


def divide_evenly(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Divide items into parts of about equal total length: the longest item first, each to the shortest part.

    Returns:
        Indices of the items of each part, ascending. No part is empty if there are enough items.

    >>> divide_evenly([5, 4, 3, 3, 3], 2)
    [[0, 3], [1, 2, 4]]
    """
    shortest = [(0, 0, part) for part in range(parts)]  # length, number of items, part: a heap
    result: list[list[int]] = [[] for _ in range(parts)]
    # This is a stable sort: of equally long items the first comes first.
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length, items, part = shortest[0]
        heapq.heapreplace(shortest, (length + lengths[index], items + 1, part))
        result[part].append(index)
    return [sorted(part) for part in result]


def lay_rows(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Lay items into rows of at most `max_length`, which are about equally long.

    A longer item has a row of its own. One row more than needed is taken if it leaves less padding.

    Returns:
        Indices of the items of each row.

    >>> lay_rows([5, 4, 3, 3, 3], 10)
    [[0, 1], [2, 3, 4]]
    """
    # Items that are too long take no others.
    alone = [[index] for index, length in enumerate(lengths) if length > max_length]
    others = [index for index, length in enumerate(lengths) if length <= max_length]
    if not others:
        return alone
    # The smallest number of rows that are all short enough; with one row per item they are.
    count = max(divide_up(sum(lengths[index] for index in others), max_length), 1)
    fewest = _balance(lengths, others, count)
    while _measure_longest(lengths, fewest) > max_length:
        count += 1
        fewest = _balance(lengths, others, count)
    # Try one row more: shorter rows, sometimes with less padding.
    one_more = _balance(lengths, others, min(count + 1, len(others)))
    return min(alone + fewest, alone + one_more, key=lambda rows: len(rows) * _measure_longest(lengths, rows))


def _measure_longest(lengths: Sequence[int], rows: Sequence[Sequence[int]]) -> int:
    return max(sum(lengths[index] for index in row) for row in rows)


class _Exchange(NamedTuple):
    """Exchange of items between two rows.

    Args:
        longest: index of the longest row.
        other: index of the other row.
        given_item: item that the longest row gives.
        taken_items: items that it takes: none or one.
    """

    longest: int
    other: int
    given_item: int
    taken_items: list[int]


def _balance(lengths: Sequence[int], items: Sequence[int], count: int) -> list[list[int]]:
    """Divide items into so many rows, and shorten the longest row by exchanges with others while any does."""
    parts = divide_evenly([lengths[index] for index in items], count)
    rows = [[items[index] for index in part] for part in parts]
    while (exchange := _find_exchange(lengths, rows)) is not None:
        longest_row, other_row = rows[exchange.longest], rows[exchange.other]
        rows[exchange.longest] = [index for index in longest_row if index != exchange.given_item] + exchange.taken_items
        rows[exchange.other] = [index for index in other_row if index not in exchange.taken_items]
        rows[exchange.other].append(exchange.given_item)
    return [sorted(row) for row in rows]


def _find_exchange(lengths: Sequence[int], rows: Sequence[Sequence[int]]) -> _Exchange | None:
    """Find the exchange that shortens the longest row most; None if none shortens it."""
    totals = [sum(lengths[index] for index in row) for row in rows]
    longest = totals.index(max(totals))
    shortest = totals[longest]
    exchange = None
    for other, row in enumerate(rows):
        if other == longest:
            continue
        # Exchange an item for none, or for one of the other row.
        for given_item, taken_items in itertools.product(rows[longest], [[], *([index] for index in row)]):
            moved = lengths[given_item] - sum(lengths[index] for index in taken_items)
            longer = max(totals[longest] - moved, totals[other] + moved)
            if longer < shortest:
                shortest = longer
                exchange = _Exchange(longest, other, given_item, taken_items)
    return exchange


def join_rows(
    conversations: Sequence[Mapping[str, Int[np.ndarray, " length"]]], rows: Sequence[Sequence[int]]
) -> list[dict[str, Int[np.ndarray, " length"]]]:
    """Join the text columns of conversations to those of rows.

    Args:
        conversations: input_ids and labels of each conversation.
        rows: indices of the conversations of each row.

    Returns:
        Columns of each row: input_ids, labels, position_ids from 0 in each conversation, and sample_index, which counts
        the conversations of all rows. The first token of a conversation has no label, because no token predicts it.
    """
    joined = []
    number = 0
    for row in rows:
        members = [conversations[index] for index in row]
        lengths = [len(member["input_ids"]) for member in members]
        # No token sees that others stand before its conversation.
        position_ids = np.concatenate([np.arange(length) for length in lengths])
        labels = np.concatenate([member["labels"] for member in members])
        joined.append(
            {
                "input_ids": np.concatenate([member["input_ids"] for member in members]),
                "labels": np.where(position_ids == 0, IGNORE_INDEX, labels),
                "position_ids": position_ids,
                "sample_index": np.repeat(np.arange(number, number + len(row)), lengths),
            }
        )
        number += len(row)
    return joined
