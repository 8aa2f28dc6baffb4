"""What exported files say about themselves: metadata for programs, a model card for people."""

from collections.abc import Mapping, Sequence
from typing import Any

from condconv.cost import count_cost
from condconv.tools.exports.export_source import Source

_INPUTS = "float32 (N, {}), pixels 0–255, RGB; the network normalises them itself"


def metadata(source: Source, fold: bool) -> dict[str, Any]:
    """Returns what a program needs to use a file.

    The keys are ``name``, ``source``, ``images`` and ``logits`` (what they are), ``labels`` (class
    names, or none), ``preprocessing`` (the gin bindings that say how images are cut, or none),
    ``batch_norm_folded``, and the cost of the source, ``parameters``, ``multiply_adds`` and
    ``macs`` for one image, by the ``rule`` of ``condconv.count_cost``.
    """
    model = source.model
    cost = count_cost(model, image_size=None if model.input_shape[1] else 224)
    shape = ", ".join("any" if size is None else str(size) for size in model.input_shape[1:])
    return {
        "name": model.name,
        "source": source.origin,
        "images": _INPUTS.format(shape),
        "logits": f"float32 (N, {model.output_shape[-1]})",
        "labels": list(source.class_names),
        "preprocessing": list(source.preprocessing),
        "batch_norm_folded": fold,
        **{key: getattr(cost, key) for key in ("parameters", "multiply_adds", "macs", "rule")},
    }


def card(
    source: Source,
    fold: bool,
    rows: Sequence[Mapping[str, Any]],
    checksums: Mapping[str, str],
    calibrated_on: str = "",
) -> str:
    """Returns the model card, in Markdown.

    Args:
        source: of the network.
        fold: whether batch normalisations are folded.
        rows: of the files, as ``export.export`` returns them.
        checksums: SHA-256 of each file by its path.
        calibrated_on: which images int8 saw, or "".
    """
    about = metadata(source, fold)
    facts = {
        "weights": source.origin,
        "`images`": about["images"],
        "`logits`": about["logits"],
        "labels": f"{len(source.class_names)}, in `metadata.json`" if source.class_names else "–",
        "preprocessing": "; ".join(f"`{each}`" for each in source.preprocessing) or "–",
        "parameters": f"{about['parameters']:,}",
        "multiply-adds per image": f"{about['multiply_adds']:,} (rule {about['rule']})",
        "MACs per image": f"{about['macs']:,}",
        "batch normalisation": "folded into the convolutions" if fold else "as it was trained",
    }
    if calibrated_on:
        facts["calibration of int8"] = calibrated_on
    parts = [f"# {source.model.name}", _table(("", ""), facts.items())]
    parts += ["## Files", _files(rows)]
    parts += ["## Metrics", _metrics(source)]
    if source.config:
        parts += ["## Config", f"```\n{source.config.strip()}\n```"]
    sums = "\n".join(f"{checksum}  {name}" for name, checksum in checksums.items())
    parts += ["## SHA-256", f"```\n{sums}\n```"]
    return "\n\n".join(parts) + "\n"


def _files(rows: Sequence[Mapping[str, Any]]) -> str:
    said = (
        "Difference: the largest of a logit from the source, in shares of the largest logit. "
        "Agreement: the share of images whose best class is that of the source."
    )
    head = ("file", "bytes", "difference", "allowed", "images", "agreement")
    cells = [
        (
            f"`{r['file']}`",
            f"{r['bytes']:,}",
            f"{r['difference']:.1e}",
            f"{r['tolerance']:.0e}" if r["tolerance"] else "any",
            r["images"],
            f"{r['agreement']:.2%}",
        )
        for r in rows
    ]
    return said + "\n\n" + _table(head, cells)


def _metrics(source: Source) -> str:
    names = ("dataset", "split", "images", "top1", "top5", "loss")
    metrics = {name: source.metrics[name] for name in names if name in source.metrics}
    return _table(("", ""), metrics.items()) if metrics else "These weights were not evaluated."


def _table(head: Sequence[str], rows: Any) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)
