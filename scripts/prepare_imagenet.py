r"""Makes ImageNet's two official tar files into what training reads: TFDS' ``imagenet2012``.

python scripts/prepare_imagenet.py --data_dir=/data \
    --train_tar=ILSVRC2012_img_train.tar --val_tar=ILSVRC2012_img_val.tar

Interrupted, it keeps nothing, and the same command starts again.
"""

from absl import flags

from scripts import command

_TRAIN_TAR = flags.DEFINE_string("train_tar", None, "Training images, ILSVRC2012_img_train.tar.")
_VAL_TAR = flags.DEFINE_string("val_tar", None, "Validation images, ILSVRC2012_img_val.tar.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder for the records, about 155 GB.")
_ALLOW_INCOMPLETE = flags.DEFINE_bool(
    "allow_incomplete", False, "Go without the synsets and images that the files lack."
)


def main(_: list[str]) -> None:
    """Prepares the data set, and says what there is and what to do with it."""
    if not (_TRAIN_TAR.value and _VAL_TAR.value and _DATA_DIR.value):
        raise command.WrongCall(
            "needs --train_tar=FILE, --val_tar=FILE and --data_dir=FOLDER; see --help"
        )
    command.import_backend()
    import tensorflow as tf

    from condconv.engine.errors import RunError, UsageError
    from data.prepare import prepare

    tf.config.set_visible_devices([], "GPU")  # of no use here, and TensorFlow would fill it
    try:
        done = prepare(_TRAIN_TAR.value, _VAL_TAR.value, _DATA_DIR.value, _ALLOW_INCOMPLETE.value)
    except ValueError as error:
        raise UsageError(str(error)) from error
    except (OSError, RuntimeError) as error:
        raise RunError(str(error)) from error
    except (KeyboardInterrupt, SystemExit):
        command.tell("prepare_imagenet.py: stopped; nothing was kept")
        raise
    _show(done)


def _show(done: object) -> None:
    """Prints a summary, and the bindings for a config."""
    from data.ilsvrc2012 import CLASSES

    state = "was there already" if done.already_there else "is ready"
    print(f"imagenet2012 {state} in {done.folder}")
    for name, number in {**done.images, "classes": CLASSES}.items():
        print(f"  {name:10}  {number:9,}")
    for line in done.missing:
        print(f"  without {line}")
    print("In a config:")
    print("  pipeline.source = @imagenet2012")
    print(f"  imagenet2012.data_dir = {str(done.data_dir)!r}")


if __name__ == "__main__":
    command.run(main)
