"""Measures how fast things are, against what else does the same, alternated in one run.

python scripts/benchmark.py --mode=input
"""

import json

from absl import flags

from condconv.engine import command

_MODE = flags.DEFINE_enum("mode", "input", ["input"], "What to measure.")
_GIN_FILE = flags.DEFINE_multi_string("gin_file", ["configs/synthetic.gin"], "Config to measure.")
_GIN_PARAM = flags.DEFINE_multi_string("gin_param", [], "Binding over the config.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 128, "Images in a batch.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Times that each is measured.", lower_bound=1)
_RATE = flags.DEFINE_float("accelerator_rate", 3000, "Images per second to be fed.", lower_bound=0)
_JSON = flags.DEFINE_bool("json", False, "Print JSON.")


def main(_: list[str]) -> None:
    """Prints rates per core by stage, ratios, and what they mean."""
    import sys

    from condconv.engine import input_benchmark, tables

    def told(done: int, of: int) -> None:
        print(f"measured {done} of {of} times", file=sys.stderr, flush=True)

    result = input_benchmark.measure(
        _GIN_FILE.value,
        _GIN_PARAM.value,
        _BATCH_SIZE.value,
        _ROUNDS.value,
        _RATE.value,
        told,
    )
    if _JSON.value:
        print(json.dumps(result, indent=2))
        return
    for name in ("stages", "compared"):
        tables.show(result[name], False)
        print()
    print("\n".join(result["conclusions"]))


if __name__ == "__main__":
    command.run(main)
