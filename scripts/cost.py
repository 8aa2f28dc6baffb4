"""Counts what a network costs for one image, layer by layer.

python scripts/cost.py --model=mobilenet_v1 --num_experts=8
"""

import json

from absl import flags

from scripts import command

_MODEL = flags.DEFINE_string("model", None, "Network to build; see scripts/list_models.py.")
_SOURCE = flags.DEFINE_string("source", None, "Saved .keras file to count instead.")
_NUM_EXPERTS = flags.DEFINE_integer("num_experts", 0, "Experts a layer; 0 is the static network.")
_NUM_CLASSES = flags.DEFINE_integer("num_classes", 1000, "Classes.")
_IMAGE_SIZE = flags.DEFINE_integer(
    "image_size", None, "Height and width; 224 for a network.", lower_bound=1
)
_WIDTH = flags.DEFINE_float("width", 1.0, "Multiplier of the filters.")
_FIRST_BLOCK = flags.DEFINE_integer("first_condconv_block", None, "First conditional block.")
_RULE = flags.DEFINE_enum("rule", None, ["R", "M"], "Accounting; the network's own by default.")
_JSON = flags.DEFINE_bool("json", False, "Print JSON: totals and rows.")


def main(_: list[str]) -> None:
    """Prints a row for each layer, then the totals."""
    import dataclasses

    from condconv import count_cost
    from condconv.engine.errors import UsageError
    from condconv.tools import tables

    try:
        cost = count_cost(_model(), _RULE.value, _IMAGE_SIZE.value)
    except (ValueError, OSError) as error:
        raise UsageError(str(error).split("\n")[0]) from error
    names = ("rule", "parameters", "multiply_adds", "macs", "static", "mixing", "routing")
    totals = {name: getattr(cost, name) for name in names}
    rows = [dataclasses.asdict(row) for row in cost.rows]
    if _JSON.value:
        print(json.dumps({**totals, "rows": rows, "uncounted": cost.uncounted}, indent=2))
        return
    total = {"layer": f"total, rule {cost.rule}"}
    tables.show([*rows, total | {name: totals[name] for name in list(rows[0])[1:]}], False)


def _model() -> object:
    """Returns the network that the flags describe, or the saved one."""
    from condconv.engine import keras_file
    from condconv.engine.errors import UsageError
    from models import create_model

    if (_MODEL.value is None) == (_SOURCE.value is None):
        raise UsageError("needs one of --model=NAME and --source=FILE; see --help")
    if _SOURCE.value:
        return keras_file.load(_SOURCE.value)
    arguments = {
        "num_experts": _NUM_EXPERTS.value,
        "num_classes": _NUM_CLASSES.value,
        "image_size": _IMAGE_SIZE.value or 224,
        "width": _WIDTH.value,
        "first_condconv_block": _FIRST_BLOCK.value,
    }
    given = {name: value for name, value in arguments.items() if value is not None}
    return create_model(_MODEL.value, **given)


if __name__ == "__main__":
    command.run(main)
