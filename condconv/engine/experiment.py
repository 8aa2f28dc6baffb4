"""The one thing that a config describes: an experiment, as a frozen record of factories."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import gin
import keras

from condconv.engine.errors import UsageError, blaming_the_config
from condconv.engine.schedules import Clock, Duration, Schedule, check_duration
from condconv.engine.tasks import Data, ImageSpec, Task, as_numpy
from condconv.engine.tasks.classification import classification

__all__ = [
    "Data",
    "Experiment",
    "ImageSpec",
    "Task",
    "Written",
    "as_numpy",
    "build_data",
    "build_model",
    "build_task",
    "check_batches_divide",
    "check_images_fit",
]

PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16", "float64")

_CHECKS = (  # attributes, whether a value fits, what is allowed
    ("batch_size eval_batch_size", lambda n: n >= 1, "an integer of at least 1"),
    ("accumulation_steps keep_checkpoints", lambda n: n >= 1, "an integer of at least 1"),
    ("steps_per_call", lambda n: n >= 1, "an integer of at least 1"),
    ("max_rollbacks", lambda n: n >= 0, "an integer of at least 0"),
    ("label_smoothing", lambda share: 0 <= share < 1, "a share from 0 to below 1"),
    ("weight_decay", lambda factor: factor >= 0, "a factor of at least 0"),
    ("ema_decay", lambda decay: 0 <= decay < 1, "a decay from 0 to below 1"),
    ("precision", PRECISIONS.__contains__, " or ".join(PRECISIONS)),
    ("clip_norm", lambda norm: norm > 0, "a norm above 0, or None"),
    ("stall_seconds", lambda seconds: seconds > 0, "seconds above 0"),
    ("seed", lambda seed: 0 <= seed < 2**32, "an integer from 0 to below 2^32"),
)


@dataclasses.dataclass(frozen=True)
class Written:
    """What an experiment was made from.

    Attributes:
        config: all bindings, which parse to the same experiment again.
        operative: all values used, with defaults.
        values: of the experiment's attributes, as the two say.
    """

    config: str
    operative: str
    values: dict[str, Any]


@gin.register(denylist=["written"])
@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that decides the outcome of a run.

    Durations are text: "90 epochs", "500 steps", "1e6 examples", "5 percent".

    Attributes:
        model: factory of the network, called with ``num_classes``.
        data: factory of the data.
        optimizer: factory of the optimizer, called with ``learning_rate``.
        schedule: factory of the learning rate by step, called with ``clock``.
        duration: of the training.
        batch_size: examples in a step, over all replicas.
        eval_batch_size: examples in a batch of evaluation; as in training if None.
        task: factory of what the network is for, called with ``data``.
        label_smoothing: in configs of before; ``classification.label_smoothing`` now.
        weight_decay: factor of ½·‖w‖², added to the loss for every trainable variable that is
            not of a batch normalisation (official rule).
        ema_decay: of the average of weights and batch-norm statistics; 0 for none.
        clip_norm: largest norm of all gradients together; None for no limit.
        precision: "float32", "mixed_bfloat16", "mixed_float16" (with loss scaling) or "float64".
        accumulation_steps: parts of each batch that are computed one after the other, for batches
            that memory does not hold. Batch normalisation sees a part at a time.
        synchronized_batch_norm: whether its statistics are those of all replicas, or each one's.
        xla: whether to compile the gradients' computation with XLA.
        init_from: a ``.keras`` file or the folder of a checkpoint whose variables to begin with,
            where name and shape are the same; averages are preferred.
        seed: of initial weights, order, augmentation and dropout.
        train_split: trained on.
        selection_split: chooses the best checkpoint, never trained on nor reported; None if the
            data has none to spare, and then only the last checkpoint is kept.
        eval_split: reported.
        log_every, evaluate_every, checkpoint_every: durations between two of these.
        keep_checkpoints: how many of the last to keep, besides the best.
        keep_every: duration between two checkpoints that are kept for good; None for none.
        max_rollbacks: how often a loss or gradient that is not finite may send the run back to its
            last checkpoint, to go on with the data behind the bad batch; then the run ends.
        stall_seconds: without a step after which the log says what the run is waiting for.
        steps_per_call: steps that run between two looks at the clock.
        devices: "auto" (all local GPUs, else the CPU) or "cpu:N", N replicas on the CPU.
        written: what it was made from, if it was a config.
    """

    model: Callable[..., keras.Model]
    data: Callable[..., Data]
    optimizer: Callable[..., keras.optimizers.Optimizer]
    schedule: Callable[..., Schedule]
    duration: Duration
    batch_size: int
    eval_batch_size: int | None = None
    task: Callable[..., Task] = classification
    label_smoothing: float | None = None
    weight_decay: float = 0.0
    ema_decay: float = 0.0
    clip_norm: float | None = None
    precision: str = "float32"
    accumulation_steps: int = 1
    synchronized_batch_norm: bool = False
    xla: bool = False
    init_from: str | None = None
    seed: int = 0
    train_split: str = "train"
    selection_split: str | None = None
    eval_split: str = "validation"
    log_every: Duration = "100 steps"
    evaluate_every: Duration = "1 epochs"
    checkpoint_every: Duration = "1 epochs"
    keep_checkpoints: int = 3
    keep_every: Duration | None = None
    max_rollbacks: int = 0
    stall_seconds: float = 60.0
    steps_per_call: int = 10
    devices: str = "auto"
    written: Written | None = dataclasses.field(default=None, repr=False, compare=False)

    def __post_init__(self):
        for names, fits, allowed in _CHECKS:
            for name in names.split():
                if (value := getattr(self, name)) is not None and not fits(value):
                    raise UsageError(f"Experiment.{name} takes {allowed}, not {value!r}")
        for name in ("duration", "log_every", "evaluate_every", "checkpoint_every", "keep_every"):
            if (duration := getattr(self, name)) is not None:
                amount, _ = check_duration(duration, f"Experiment.{name}")
                if not amount:
                    raise UsageError(f"Experiment.{name} takes more than {duration!r}")

    @property
    def splits(self) -> tuple[str, ...]:
        """All splits that a run reads."""
        named = (self.train_split, self.selection_split, self.eval_split)
        return tuple(split for split in named if split)

    def clock(self, num_examples: int) -> Clock:
        """Returns what turns durations into steps, for so many training examples."""
        clock = Clock(batch_size=self.batch_size, num_examples=num_examples, total_steps=0)
        total = max(1, round(clock.steps(self.duration)))
        return dataclasses.replace(clock, total_steps=total)


def build_data(experiment: Experiment, *splits: str, stand_in: bool = False) -> Data:
    """Calls the factory of the data.

    Args:
        experiment: that has it.
        *splits: that will be read.
        stand_in: whether to ask for made-up examples in place of the real ones.

    Raises:
        UsageError: if its arguments are out of range, or one of ``splits`` is empty or unknown.
    """
    with blaming_the_config():
        data = experiment.data(stand_in=True) if stand_in else experiment.data()
        if not hasattr(data, "train_batches"):
            raise UsageError(
                "Experiment.data takes @pipeline, with pipeline.source = "
                f"@{getattr(data, 'name', data)} and a pipeline.preprocessing"
            )
        for split in splits:
            if not data.num_examples(split):
                raise UsageError(f"the split {split!r} of {data.name} is empty")
    return data


def build_task(experiment: Experiment, data: Data) -> Task:
    """Calls the factory of the task. Raises a UsageError if its arguments are out of range."""
    smoothing = experiment.label_smoothing
    with blaming_the_config():
        if smoothing is None:
            return experiment.task(data=data)
        return experiment.task(data=data, label_smoothing=smoothing)


def build_model(experiment: Experiment, num_classes: int) -> keras.Model:
    """Calls the factory of the network, in the experiment's precision.

    Raises:
        UsageError: if its arguments are out of range.
    """
    with _dtype_policy(experiment.precision), blaming_the_config():
        return experiment.model(num_classes=num_classes)


@contextlib.contextmanager
def _dtype_policy(policy: str) -> Iterator[None]:
    outer = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(outer)


def check_images_fit(model: keras.Model, data: Data, split: str) -> None:
    """Raises a UsageError if the data's images are not of the size that the model takes."""
    images, wanted = data.image_spec(split).shape, tuple(model.input_shape[1:])
    if any(None not in (i, w) and i != w for i, w in zip(images, wanted, strict=True)):
        raise UsageError(
            f"{model.name} takes images of {_size(wanted)} and {data.name} gives {_size(images)}: "
            "set their image_size alike"
        )


def _size(shape: tuple[int | None, ...]) -> str:
    return "×".join("any" if size is None else str(size) for size in shape)


def check_batches_divide(experiment: Experiment, replicas: int) -> None:
    """Raises a UsageError if a batch cannot be divided among replicas and accumulated parts."""
    parts = {"batch_size": replicas * experiment.accumulation_steps, "eval_batch_size": replicas}
    for name, count in parts.items():
        size = getattr(experiment, name)
        if size is not None and size % count:
            raise UsageError(
                f"Experiment.{name}={size} cannot be divided among {replicas} replicas, "
                f"{count // replicas} times each: take a multiple of {count}"
            )
