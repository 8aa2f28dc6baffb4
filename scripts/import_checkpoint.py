"""Makes a published checkpoint into a .keras file: the authors' TensorFlow 1 ones, and timm's.

python scripts/import_checkpoint.py --model=efficientnet_b0 --num_experts=8 \
    --source=efficientnet-condconv-b0-8e/model.ckpt --output=b0_8e.keras
"""

import json

from absl import flags

from scripts import command

_MODEL = flags.DEFINE_string("model", None, "Network it is of; see scripts/list_models.py.")
_NUM_EXPERTS = flags.DEFINE_integer("num_experts", 0, "Experts a layer; 0 is the static network.")
_SOURCE = flags.DEFINE_string(
    "source", None, "Prefix or folder of a TensorFlow 1 checkpoint, or timm's .safetensors file."
)
_OUTPUT = flags.DEFINE_string("output", None, "File to write, .keras.")
_EMA = flags.DEFINE_bool(
    "ema", None, "Moving averages, or raw weights; by default the average of each that has one."
)
_IMAGE_SIZE = flags.DEFINE_integer("image_size", 224, "Height and width.", lower_bound=1)
_WIDTH = flags.DEFINE_float("width", 1.0, "Multiplier of the filters, as of MobileNetV1's files.")
_NORMALIZATION = flags.DEFINE_enum(
    "normalization",
    None,
    ["imagenet", "condconv", "inception"],
    "Of the pixels, where the weights want another one than the network: AdvProp's, inception.",
)
_JSON = flags.DEFINE_bool("json", False, "Print JSON.")


def main(_: list[str]) -> None:
    """Writes the file, and prints what is in it."""
    if not (_MODEL.value and _SOURCE.value and (_OUTPUT.value or "").endswith(".keras")):
        raise command.WrongCall(
            "needs --model=NAME, --source=FILE and --output=FILE.keras; see --help"
        )
    command.check_output("--output", _OUTPUT.value)
    command.import_backend()
    from condconv.engine import files
    from condconv.engine.errors import UsageError
    from condconv.tools import published_weights as published
    from condconv.tools import tables
    from models.imported import import_network

    output = files.path(_OUTPUT.value)
    files.check_output(output, "--output")
    source = published.read(_SOURCE.value, _EMA.value)
    arguments = {"image_size": _IMAGE_SIZE.value, "width": _WIDTH.value}
    if _NORMALIZATION.value:
        arguments["normalization"] = _NORMALIZATION.value
    try:
        network, done = import_network(source, _MODEL.value, _NUM_EXPERTS.value, **arguments)
    except ValueError as error:  # of ours, of several lines
        raise UsageError(f"--source={_SOURCE.value}: {error}") from error
    published.save(network, output)
    done |= {"output": _OUTPUT.value}
    if _JSON.value:
        print(json.dumps(done, indent=2))
    else:
        tables.show([{"what": what.replace("_", " "), "is": v} for what, v in done.items()], False)


if __name__ == "__main__":
    command.run(main)
