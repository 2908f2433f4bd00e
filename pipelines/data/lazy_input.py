"""Input of a Ray Data dataset that is made while it is used: no time and no memory per item before the first one.

`ray.data.from_items` puts each item into the object store first, and Ray Data 2.60 then looks at each of them several
times before it starts: 0.8 ms per block. An epoch of 100 million samples has half a million blocks. Here the operator
makes an item when one is due. It keeps the last ones, from which Ray recomputes blocks that are lost with a node.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
from ray.data import DataContext, Dataset
from ray.data._internal.actor_autoscaler.autoscaling_actor_pool import ActorPoolScalingRequest, AutoscalingActorPool
from ray.data._internal.execution.interfaces import BlockEntry, PhysicalOperator, RefBundle
from ray.data._internal.logical.interfaces import LogicalOperator, LogicalPlan, SourceOperator
from ray.data._internal.planner.planner import Planner
from ray.data._internal.stats import DatasetStats
from ray.data.block import BlockMetadataWithSchema

MAX_ITEMS_AHEAD = 8
"""Items for each actor of the next operator that are made and whose results did not come out yet, in order.

An actor works on at most three items, see `pipelines.data.ingest`. Without a limit, actors would read far ahead of one
that was lost and starts again."""

MAX_KEPT_ITEMS = 4096
"""Items that stay in the object store, a kilobyte each: more than there are blocks that nobody has read yet."""


def from_sequence(items: Sequence[Mapping[str, int]]) -> Dataset:
    """Make a dataset of items, each a block of one row, that actors map to one block each, in order.

    Args:
        items: a sequence that computes its items. It is pickled, so it must be small.
    """
    context = DataContext.get_current().copy()
    return Dataset(LogicalPlan(_LazyInput(items), context), context, DatasetStats(metadata={}, parent=None))


@dataclass(frozen=True, repr=False, eq=False)
class _LazyInput(LogicalOperator, SourceOperator):
    """Logical operator: items that are not made yet."""

    items: Sequence[Mapping[str, int]]

    def output_data(self) -> None:
        return None

    @property
    def num_outputs(self) -> int:
        return len(self.items)


class _LazyInputOperator(PhysicalOperator):
    """Physical operator that puts an item into the object store when the next operator is due to get it."""

    def __init__(self, items: Sequence[Mapping[str, int]], context: DataContext) -> None:
        super().__init__("Input", [], context)
        self._items = items
        self._estimated_num_output_bundles = len(items)
        self._made = 0
        self._released = 0
        self._kept: deque[RefBundle] = deque(maxlen=MAX_KEPT_ITEMS)

    def has_next(self) -> bool:
        [operator] = self.output_dependencies
        [actors] = operator.get_autoscaling_actor_pools()
        self._release_idle(actors)
        ahead = self._made - operator.metrics.num_outputs_taken
        return self._made < len(self._items) and ahead < MAX_ITEMS_AHEAD * max(actors.current_size(), 1)

    def _release_idle(self, actors: AutoscalingActorPool) -> None:
        """End an idle actor for each one that starts again on another node, as that needs its CPU.

        Ray Data 2.60 keeps idle actors while others have work. If all CPUs are taken when a node is lost, its actors
        would never start again, and the others would wait for their results.
        """
        restarting, pending = actors.num_restarting_actors(), actors.num_pending_actors()
        self._released = min(self._released, restarting)
        if missing := restarting - self._released:
            # Ray Data ends pending actors first, which would take the CPUs.
            ended = -(actors.scale(ActorPoolScalingRequest.downscale(delta=-pending - missing, force=True)) or 0)
            self._released += max(ended - pending, 0)

    def _get_next_inner(self) -> RefBundle:
        row = {name: [value] for name, value in self._items[self._made].items()}
        block = pa.table(row)
        metadata = BlockMetadataWithSchema.from_block(block)
        # The consumer does not own the block: Ray needs it again to recompute the block that was made from it.
        bundle = RefBundle([BlockEntry(ray.put(block), metadata)], owns_blocks=False, schema=metadata.schema)
        self._made += 1
        self._kept.append(bundle)
        return bundle

    def has_execution_finished(self) -> bool:
        # Ray Data asks an operator without inputs if it is finished while items wait.
        return self._is_execution_marked_finished or self._made == len(self._items)

    def throttling_disabled(self) -> bool:
        # Otherwise Ray Data reserves CPUs and memory for this operator, and starts fewer readers.
        return True

    def get_stats(self) -> dict[str, Any]:
        return {}

    def _add_input_inner(self, refs: RefBundle, input_index: int) -> None:
        raise ValueError("inputs are not allowed for this operator")


def _plan_lazy_input(
    operator: _LazyInput, inputs: Sequence[PhysicalOperator], context: DataContext
) -> PhysicalOperator:
    return _LazyInputOperator(operator.items, context)


# Unpickling a dataset imports this module, so the process that plans it knows the operator.
Planner._DEFAULT_PLAN_FNS[_LazyInput] = _plan_lazy_input
