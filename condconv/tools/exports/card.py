"""What exported files say about themselves: metadata for programs, a model card for people."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from condconv import count_cost
from condconv.tools.exports.trained_network import TrainedNetwork

_INPUTS = "float32 (N, {}), pixels 0–255, RGB; the network normalises them itself"
_COST = ("parameters", "multiply_adds", "macs", "rule")
_METRICS = ("dataset", "split", "images", "top1", "top5", "loss")


def metadata(network: TrainedNetwork, fold: bool) -> dict[str, Any]:
    """Returns what a program needs to use a file.

    The keys are ``name``, ``source``, ``images`` and ``logits`` (what they are), ``labels`` (class
    names, or none), ``preprocessing`` (the gin bindings that say how images are cut, or none),
    ``batch_norm_folded``, and the cost of the source, ``parameters``, ``multiply_adds`` and
    ``macs`` for one image, by the ``rule`` of ``condconv.count_cost``.
    """
    model = network.model
    cost = count_cost(model, image_size=None if model.input_shape[1] else 224)
    shape = ", ".join("any" if size is None else str(size) for size in model.input_shape[1:])
    return {
        "name": model.name,
        "source": network.origin,
        "images": _INPUTS.format(shape),
        "logits": f"float32 (N, {model.output_shape[-1]})",
        "labels": list(network.class_names),
        "preprocessing": list(network.preprocessing),
        "batch_norm_folded": fold,
        **{key: getattr(cost, key) for key in _COST},
    }


def card(
    network: TrainedNetwork,
    about: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    checksums: Mapping[str, str],
    calibrated_on: str = "",
) -> str:
    """Returns the model card, in Markdown.

    Args:
        network: that was exported.
        about: its ``metadata``.
        rows: of the files, as ``export.export`` returns them.
        checksums: SHA-256 of each file by its path.
        calibrated_on: which images int8 saw, or "".
    """
    folded = about["batch_norm_folded"]
    facts = {
        "weights": about["source"],
        "`images`": about["images"],
        "`logits`": about["logits"],
        "labels": f"{len(about['labels'])}, in `metadata.json`" if about["labels"] else "–",
        "preprocessing": "; ".join(f"`{each}`" for each in about["preprocessing"]) or "–",
        "parameters": f"{about['parameters']:,}",
        "multiply-adds per image": f"{about['multiply_adds']:,} (rule {about['rule']})",
        "MACs per image": f"{about['macs']:,}",
        "batch normalisation": "folded into the convolutions" if folded else "as it was trained",
    }
    if calibrated_on:
        facts["calibration of int8"] = calibrated_on
    metrics = {name: network.metrics[name] for name in _METRICS if name in network.metrics}
    evaluated = _table(metrics.items()) if metrics else "These weights were not evaluated."
    parts = [f"# {about['name']}", _table(facts.items()), "## Files", _files(rows)]
    parts += ["## Metrics", evaluated]
    if network.config:
        parts += ["## Config", f"```\n{network.config.strip()}\n```"]
    sums = "\n".join(f"{checksum}  {name}" for name, checksum in checksums.items())
    return "\n\n".join([*parts, "## SHA-256", f"```\n{sums}\n```"]) + "\n"


def _files(rows: Sequence[Mapping[str, Any]]) -> str:
    legend = (
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
    return f"{legend}\n\n{_table(cells, head)}"


def _table(rows: Iterable[Sequence[Any]], head: Sequence[str] = ("", "")) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)
