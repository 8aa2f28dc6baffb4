"""Measures how fast things are, against what else does the same, alternated in one run.

python scripts/benchmark.py --mode=infer --model=efficientnet_b0
python scripts/benchmark.py --mode=train --against=static --against=official_loop
python scripts/benchmark.py --mode=input
"""

import json

from absl import flags

from condconv.engine import command

_MODE = flags.DEFINE_enum("mode", "input", ["infer", "train", "input"], "What to measure.")
_MODEL = flags.DEFINE_string("model", "efficientnet_b0", "Network; see scripts/list_models.py.")
_NUM_EXPERTS = flags.DEFINE_integer(
    "num_experts", None, "Experts a layer, 0 for none; the paper's by default.", lower_bound=0
)
_AGAINST = flags.DEFINE_multi_enum(
    "against", None, ["static", "official_loop", "keras_applications", "timm"], "Compare with."
)
_TIMM_PYTHON = flags.DEFINE_string("timm_python", None, "Python interpreter that has timm.")
_BACKEND = flags.DEFINE_enum("backend", "tensorflow", ["tensorflow", "jax"], "Of Keras.")
_PRECISION = flags.DEFINE_enum(
    "precision", "float32", ["float32", "mixed_bfloat16", "mixed_float16"], "Keras' policy."
)
_FORM = flags.DEFINE_enum(
    "form", "variables", ["variables", "folded", "frozen", "folded_frozen"], "To infer with."
)
_THREADS = flags.DEFINE_integer("threads", 1, "Threads, and cores, of each.", lower_bound=1)
_IMAGE_SIZE = flags.DEFINE_integer("image_size", 224, "Height and width.", lower_bound=1)
_WIDTH = flags.DEFINE_float("width", 1.0, "Multiplier of the filters.")
_NUM_CLASSES = flags.DEFINE_integer("num_classes", 1000, "Classes.", lower_bound=1)
_XLA = flags.DEFINE_bool("xla", False, "Have XLA compile the whole step; JAX always does.")
_DYNAMIC_BATCH = flags.DEFINE_bool("dynamic_batch", False, "Compile for a batch of any size.")
_SECONDS = flags.DEFINE_float("seconds", 1.0, "A round lasts, not with input.", lower_bound=0)
_GIN_FILE = flags.DEFINE_multi_string("gin_file", ["configs/synthetic.gin"], "Config of input.")
_GIN_PARAM = flags.DEFINE_multi_string("gin_param", [], "Binding over the config.")
_RATE = flags.DEFINE_float("accelerator_rate", 3000, "Images per second of input.", lower_bound=0)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "1, 16, 128 by default.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", None, "Times; 15, of input 7.", lower_bound=1)
_JSON = flags.DEFINE_bool("json", False, "Print JSON: everything there is.")
_COMMON = (_MODEL, _AGAINST, _TIMM_PYTHON, _BACKEND, _PRECISION, _FORM, _THREADS, _IMAGE_SIZE)
_COMMON += (_WIDTH, _NUM_CLASSES, _XLA, _DYNAMIC_BATCH, _SECONDS)


def main(_: list[str]) -> None:
    """Prints tables and what they mean."""
    import sys

    from condconv.engine import input_benchmark, network_benchmark, tables
    from condconv.engine.errors import UsageError
    from models import list_models
    from models.paper import PAPER

    def told(progress: str) -> None:
        print(progress, file=sys.stderr, flush=True)

    mode = _MODE.value
    if mode == "input":
        rounds = _ROUNDS.value or 7
        config = (_GIN_FILE.value, _GIN_PARAM.value, _BATCH_SIZE.value or 128)
        result = input_benchmark.measure(*config, rounds, _RATE.value, told)
    else:
        if _MODEL.value not in list_models():
            raise UsageError(f"--model={_MODEL.value}: known are {', '.join(list_models())}")
        experts = max(row.num_experts for row in PAPER if row.model == _MODEL.value)
        given = {flag.name: flag.value for flag in _COMMON} | {"mode": mode}
        given["num_experts"] = experts if _NUM_EXPERTS.value is None else _NUM_EXPERTS.value
        given["batch_size"] = _BATCH_SIZE.value or {"infer": 1, "train": 16}[mode]
        comparison = network_benchmark.Comparison(create="models:create_model", **given)
        result = network_benchmark.measure(comparison, _ROUNDS.value or 15, told)
    if _JSON.value:
        print(json.dumps(result, indent=2))
        return
    for name in ("stages", "compared", "contenders"):
        if name in result:
            tables.show(result[name], False)
            print()
    print("\n".join(result["conclusions"]))


if __name__ == "__main__":
    command.run(main)
