"""Measures how fast things are, against what else does the same, alternated in one run.

python scripts/benchmark.py --mode=train --model=efficientnet_b0 --against_checkout=../before
"""

from absl import flags

from scripts import command

_AGAINST = ("static", "engine", "official_loop", "keras_applications", "timm")
_BACKENDS, _PRECISIONS = ("tensorflow", "jax"), ("float32", "mixed_bfloat16", "mixed_float16")
_FORMS = ("variables", "folded", "frozen", "folded_frozen")

_MODE = flags.DEFINE_enum("mode", "input", ["infer", "train", "input"], "What to measure.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "1, 16, 128 by default.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", None, "Times; 15, of input 7.", lower_bound=1)
_JSON = flags.DEFINE_bool("json", False, "Print JSON: everything there is.")
_GIN_FILE = flags.DEFINE_multi_string("gin_file", ["configs/synthetic.gin"], "Config of input.")
_GIN_PARAM = flags.DEFINE_multi_string("gin_param", [], "Binding over the config.")
_RATE = flags.DEFINE_float("accelerator_rate", 3000, "Images/s that input feeds.", lower_bound=0)
_NETWORK = (
    flags.DEFINE_string("model", "efficientnet_b0", "See scripts/list_models.py."),
    flags.DEFINE_integer("num_experts", 8, "0 for none; the paper's.", lower_bound=0),
    flags.DEFINE_float("width", 1.0, "Multiplier of the filters.", lower_bound=0),
    flags.DEFINE_integer("image_size", 224, "Height and width.", lower_bound=1),
    flags.DEFINE_integer("num_classes", 1000, "Classes.", lower_bound=1),
    flags.DEFINE_multi_enum("against", None, _AGAINST, "What to compare with; static, engine."),
    flags.DEFINE_string("against_checkout", None, "Folder of another checkout to compare with."),
    flags.DEFINE_string("timm_python", None, "Python interpreter that has timm."),
    flags.DEFINE_enum("backend", "tensorflow", _BACKENDS, "Keras' backend."),
    flags.DEFINE_enum("precision", "float32", _PRECISIONS, "Keras' policy."),
    flags.DEFINE_enum("form", "variables", _FORMS, "Of our networks in inference."),
    flags.DEFINE_bool("xla", False, "Have XLA compile the whole step; JAX always does."),
    flags.DEFINE_bool("dynamic_batch", False, "Compile for a batch of any size."),
    flags.DEFINE_integer("threads", 1, "Threads and cores of each.", lower_bound=1),
    flags.DEFINE_float("seconds", 1.0, "How long a round lasts.", lower_bound=0),
)


def main(_: list[str]) -> None:
    """Prints tables and what they mean."""
    if _MODE.value == "input":
        command.check_configs(_GIN_FILE.value)
    command.import_backend()
    from condconv.tools import tables
    from condconv.tools.benchmarks import input_pipeline, networks

    if _MODE.value == "input":
        how = (_BATCH_SIZE.value or 128, _ROUNDS.value or 7, _RATE.value, command.tell)
        where = (_GIN_FILE.value, _GIN_PARAM.value)
        result = input_pipeline.measure(*where, *how, "data.throughput", "data.pil")
    else:
        result = networks.measure(_comparison(), _ROUNDS.value or 15, command.tell)
    tables.show_measured(result, _JSON.value)


def _comparison() -> object:
    from condconv.engine.errors import UsageError, in_one_line
    from condconv.tools.benchmarks.comparison import Comparison
    from models import list_models, released_timm

    given = {flag.name: flag.value for flag in _NETWORK}
    if (name := given["model"]) not in list_models():
        raise UsageError(f"--model={name}: known are {', '.join(list_models())}")
    given["batch_size"] = _BATCH_SIZE.value or {"infer": 1, "train": 16}[_MODE.value]
    if "timm" in (given["against"] or ()):
        with in_one_line(UsageError):  # which says what timm has
            given["timm_name"] = released_timm.architecture(name, given["num_experts"]).name
    return Comparison(mode=_MODE.value, create="models:create_model", **given)


if __name__ == "__main__":
    command.run(main)
