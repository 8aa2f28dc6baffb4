"""What the rows of a table cost, counted as a run would count them, beside what was published."""

from collections.abc import Iterator
from typing import Any

import keras

from condconv.cost import count_unbuilt
from condconv.engine import config
from condconv.engine.experiment import build_data, build_model
from condconv.tools.studies.table import PublishedNumber, Row, Table


def cost_lines(table: Table) -> Iterator[dict[str, Any]]:
    """Counts row by row, each as it is asked for.

    Yields:
        ``name``, ``parameters``, ``multiply_adds`` and ``macs`` for one image of ImageNet, and for
        ``parameters``, ``multiply_adds`` and ``top1`` what was published of them: ``paper_…`` (in
        units; ``top1`` in percent), ``…_certainty`` and, of the first two, ``…_agree``, of
        multiply-adds that with ``table.counted_as``; each None where nothing was.

    Raises:
        UsageError: if a row's config or bindings are wrong.
    """
    for row in table.rows:
        keras.backend.clear_session(free_memory=True)
        yield _line(row, table.counted_as)


def _line(row: Row, counted_as: str) -> dict[str, Any]:
    file, bindings = row.gin("imagenet2012")
    experiment = config.load([file], bindings)
    num_classes = build_data(experiment, stand_in=True).num_classes
    cost = count_unbuilt(lambda: build_model(experiment, num_classes))
    counts = {name: getattr(cost, name) for name in ("parameters", "multiply_adds", "macs")}
    return {
        "name": row.name,
        **counts,
        **_compared("parameters", counts["parameters"], row.parameters),
        **_compared("multiply_adds", counts[counted_as], row.multiply_adds),
        "paper_top1": row.top1 and row.top1.value,
        "top1_certainty": row.top1 and row.top1.certainty,
    }


def _compared(name: str, ours: int, published: PublishedNumber | None) -> dict[str, Any]:
    return {
        f"paper_{name}": published and round(published.value * 1e6),
        f"{name}_certainty": published and published.certainty,
        f"{name}_agree": published and published.agrees(ours / 1e6),
    }
