"""Counts what a network costs for one image, layer by layer.

python scripts/cost.py --model=mobilenet_v1 --num_experts=8
"""

import json

from absl import flags

from scripts import command

_MODEL = flags.DEFINE_string("model", None, "Network to build; see scripts/list_models.py.")
_SOURCE = flags.DEFINE_string("source", None, "Saved .keras file to count instead.")
_IMAGE_SIZE = flags.DEFINE_integer(
    "image_size", None, "Height and width; 224 for a network.", lower_bound=1
)
_OF_MODEL = (
    _IMAGE_SIZE,
    flags.DEFINE_integer("num_experts", 0, "Experts a layer; 0 is the static network."),
    flags.DEFINE_integer("num_classes", 1000, "Classes."),
    flags.DEFINE_float("width", 1.0, "Multiplier of the filters."),
    flags.DEFINE_integer("first_condconv_block", None, "First conditional block."),
)
_RULE = flags.DEFINE_enum("rule", None, ["R", "M"], "Accounting; the network's own by default.")
_JSON = flags.DEFINE_bool("json", False, "Print JSON: totals and rows.")


def main(_: list[str]) -> None:
    """Prints a row for each layer, then the totals."""
    if (_MODEL.value is None) == (_SOURCE.value is None):
        raise command.WrongCall("needs one of --model=NAME and --source=FILE; see --help")
    command.check_keras_file(_SOURCE.value)
    command.import_backend()
    import dataclasses

    from condconv import count_cost
    from condconv.engine import keras_file
    from condconv.engine.errors import UsageError, in_one_line
    from condconv.tools import tables
    from models import create_model

    with in_one_line(UsageError, errors=(ValueError, OSError)):
        given = {flag.name: flag.value for flag in _OF_MODEL if flag.value is not None}
        source, name = _SOURCE.value, _MODEL.value
        model = keras_file.load(source) if source else create_model(name, **given)
        cost = count_cost(model, _RULE.value, _IMAGE_SIZE.value)
    names = ("rule", "parameters", "multiply_adds", "macs", "static", "mixing", "routing")
    totals = {name: getattr(cost, name) for name in names}
    rows = [dataclasses.asdict(row) for row in cost.rows]
    if _JSON.value:
        print(json.dumps({**totals, "rows": rows, "uncounted": cost.uncounted}, indent=2))
        return
    total = {"layer": f"total, rule {cost.rule}"}
    tables.show([*rows, total | {name: totals[name] for name in list(rows[0])[1:]}], False)


if __name__ == "__main__":
    command.run(main)
