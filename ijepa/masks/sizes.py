"""Numbers of tokens of the four kinds of packed sequences, and the capacities that hold them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class MaskSizes:
    """One token count for each kind of packed sequence: counts, capacities or length bounds."""

    context: int
    targets: int
    predictor: int
    target_union: int

    def holds(self, other: MaskSizes) -> bool:
        """Whether `other` fits into these sizes in all four kinds."""
        return all(
            getattr(self, field.name) >= getattr(other, field.name)
            for field in dataclasses.fields(self)
        )


class CapacityOverflow(ValueError):
    """A batch has more tokens than the largest planned capacity holds."""


def padded_sizes(totals: MaskSizes, capacities: Sequence[MaskSizes] | int | None) -> MaskSizes:
    """The first of the ascending capacities that holds the totals; the next multiples of a number
    of rows; the totals themselves without either."""
    if capacities is None:
        return totals
    if isinstance(capacities, int):
        return MaskSizes(*(-(-n // capacities) * capacities for n in dataclasses.astuple(totals)))
    for capacity in capacities:
        if capacity.holds(totals):
            return capacity
    raise CapacityOverflow(f"{totals} fits none of {list(capacities)}")
