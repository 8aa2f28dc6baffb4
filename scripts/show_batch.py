"""Draws what the network will see: images as they are evaluated, and below, as they are trained on.

python scripts/show_batch.py --gin_file=configs/digits.gin --output=batch.png
"""

from absl import flags

from scripts import command

_GIN_FILE = flags.DEFINE_multi_string("gin_file", [], "Config to read; later ones win.")
_GIN_PARAM = flags.DEFINE_multi_string("gin_param", [], "Binding, such as 'Experiment.seed = 1'.")
_OUTPUT = flags.DEFINE_string("output", "batch.png", "PNG file to write.")
_IMAGES = flags.DEFINE_integer("images", 16, "How many to draw, at most a batch.", lower_bound=1)
_STEP = flags.DEFINE_integer("step", 0, "Step whose batch to draw.", lower_bound=0)


def main(_: list[str]) -> None:
    """Draws the first images of a training batch, before and after augmentation."""
    if not _GIN_FILE.value:
        raise command.WrongCall("needs --gin_file=FILE; see --help")
    command.check_configs(_GIN_FILE.value)
    command.check_output("--output", _OUTPUT.value, ".png")
    command.import_backend()
    from condconv.engine import config, files
    from condconv.tools import pictures

    experiment = config.load(_GIN_FILE.value, _GIN_PARAM.value)
    output = files.path(_OUTPUT.value)
    pictures.draw_batch(experiment, _STEP.value, _IMAGES.value, output)
    print(output)


if __name__ == "__main__":
    command.run(main)
