"""What a PromQL query asks for, against what a service exposes.

Owns the rules: names, labels and their values exist, counters are read as rates, gauges are
not, quantiles keep ``le``, and the two sides of an operator can match. What Prometheus adds
to every sample (``job``, ``instance``) and its own ``up`` are known here.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass

import promql_parser as promql
from prometheus_client.parser import text_string_to_metric_families

TARGET = frozenset({"job", "instance"})
OF_COUNTERS = frozenset({"rate", "increase", "irate", "resets"})
COMPARISONS = frozenset({"==", "!=", ">", "<", ">=", "<="})

Labels = frozenset[str]


class QueryError(Exception):
    """A query that would show nothing, or something else than it seems to."""


@dataclass(frozen=True)
class Exposed:
    """Names of samples, whether each only grows, and the values of each label."""

    is_counter: dict[str, bool]
    labels: dict[str, dict[str, set[str]]]

    @classmethod
    def read(cls, text: str) -> Exposed:
        """From the text of ``/metrics``."""
        is_counter, labels = {"up": False}, defaultdict[str, dict[str, set[str]]](dict)
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                is_counter[sample.name] = family.type in ("counter", "histogram")
                for label, value in sample.labels.items():
                    labels[sample.name].setdefault(label, set()).add(value)
        return cls(is_counter, labels)


def names_in(query: str) -> set[str]:
    """All names of samples that a query reads."""
    found = set()

    def visit(part: promql.Expr) -> None:
        if isinstance(part, promql.VectorSelector):
            found.add(part.name)

    promql.walk(promql.parse(query), visit)
    return found


def labels_of(query: str, exposed: Exposed) -> Labels:
    """The labels of a query's result.

    Raises:
        QueryError: the query cannot mean what it says.
    """
    try:
        tree = promql.parse(query)
    except ValueError as error:
        raise QueryError(f"{query}: {error}") from None
    return _Reader(exposed).read(tree)


def is_condition(query: str) -> bool:
    """Whether a query compares at its top, as the condition of an alert must."""
    tree = promql.parse(query)
    return isinstance(tree, promql.BinaryExpr) and str(tree.op) in COMPARISONS


class _Reader:
    """Walks a parsed query; every method returns the labels of its part's result."""

    def __init__(self, exposed: Exposed) -> None:
        self._exposed = exposed

    def read(self, part: promql.Expr) -> Labels:
        match part:
            case promql.NumberLiteral() | promql.StringLiteral():
                return frozenset()
            case promql.ParenExpr() | promql.UnaryExpr():
                return self.read(part.expr)
            case promql.VectorSelector():
                return self._selected(part, needs_counter=False)
            case promql.Call():
                return self._called(part)
            case promql.AggregateExpr():
                return self._aggregated(part)
            case promql.BinaryExpr():
                return self._combined(part)
        raise QueryError(f"no rule for {type(part).__name__}: {part}")

    def _selected(self, part: promql.VectorSelector, *, needs_counter: bool) -> Labels:
        name = part.name
        if name not in self._exposed.is_counter:
            raise QueryError(f"nothing is called {name}")
        if self._exposed.is_counter[name] != needs_counter:
            kind = "a gauge under a rate" if needs_counter else "a counter without a rate"
            raise QueryError(f"{name} is {kind}")
        labels = self._exposed.labels.get(name, {})
        for matcher in part.matchers.matchers:
            if matcher.name in TARGET:
                continue
            if matcher.name not in labels:
                raise QueryError(f"{name} has no label {matcher.name}")
            for wanted in matcher.value.split("|"):
                if not any(re.fullmatch(wanted, value) for value in labels[matcher.name]):
                    raise QueryError(f"{name} never has {matcher.name}={wanted}")
        return TARGET | labels.keys()

    def _called(self, part: promql.Call) -> Labels:
        matrix = part.args[0]
        if isinstance(matrix, promql.MatrixSelector):
            is_rate = part.func.name in OF_COUNTERS
            return self._selected(matrix.vector_selector, needs_counter=is_rate)
        labels = frozenset().union(*(self.read(argument) for argument in part.args))
        if part.func.name == "histogram_quantile":
            if "le" not in labels:
                raise QueryError(f"the quantile has lost its le: {part}")
            labels -= {"le"}
        return labels

    def _aggregated(self, part: promql.AggregateExpr) -> Labels:
        labels = self.read(part.expr)
        if part.modifier is None:
            return frozenset()
        named = frozenset(part.modifier.labels)
        if not named <= labels:
            raise QueryError(f"no label {', '.join(named - labels)} to aggregate by: {part}")
        is_by = part.modifier.type == promql.AggModifierType.By
        return named if is_by else labels - named

    def _combined(self, part: promql.BinaryExpr) -> Labels:
        sides = [
            self.read(side)
            for side in (part.lhs, part.rhs)
            if not isinstance(side, promql.NumberLiteral)
        ]
        if len(sides) == 2 and sides[0] != sides[1]:
            raise QueryError(f"its sides have other labels and never match: {part}")
        return sides[0] if sides else frozenset()
