"""The one thing that a config describes: an experiment, as a frozen record of factories."""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import gin
import keras
import tensorflow as tf

from condconv.engine.backends.tensorflow import strategy as devices
from condconv.engine.errors import RunError, UsageError
from condconv.engine.schedules import Clock, Duration, check_duration

PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16", "float64")


class Data(Protocol):
    """What the engine needs of a data set; ``data.pipeline.Pipeline`` is one."""

    name: str
    num_classes: int
    answers: Sequence[int] | None
    """Classes that evaluation chooses from; None for all."""

    def num_examples(self, split: str) -> int:
        """Returns how many examples ``split`` has."""

    def train_batches(
        self, split: str, *, batch_size: int, seed: int, start: int, shard: int, num_shards: int
    ) -> Any:
        """Returns a ``tf.data.Dataset`` without end of {"image", "label"}.

        Labels are (B,) classes or (B, num_classes) probabilities.

        Args:
            split: to read.
            batch_size: examples in a batch of this shard.
            seed: of the order and of the augmentation.
            start: steps to skip.
            shard: which part of each global batch.
            num_shards: parts of a global batch.
        """

    def eval_batches(
        self, split: str, *, batch_size: int, shard: int = 0, num_shards: int = 1
    ) -> Any:
        """Returns a ``tf.data.Dataset`` of each example once, over all shards.

        Its elements are {"image", "label", "index", "readable"}, each (batch_size, …). Labels are
        classes, or (B, num_classes) bool where several are right or none is known. All shards
        have as many batches, filled up with examples of index -1.
        """


@gin.register
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
        label_smoothing: share of each label spread over all classes.
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
    """

    model: Callable[..., keras.Model]
    data: Callable[..., Data]
    optimizer: Callable[..., keras.optimizers.Optimizer]
    schedule: Callable[..., keras.optimizers.schedules.LearningRateSchedule]
    duration: Duration
    batch_size: int
    eval_batch_size: int | None = None
    label_smoothing: float = 0.0
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

    def __post_init__(self):
        checks = (
            ("batch_size", self.batch_size >= 1, "an integer of at least 1"),
            (
                "eval_batch_size",
                self.eval_batch_size is None or self.eval_batch_size >= 1,
                "an integer of at least 1",
            ),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "a share from 0 to below 1"),
            ("weight_decay", self.weight_decay >= 0, "a factor of at least 0"),
            ("ema_decay", 0 <= self.ema_decay < 1, "a decay from 0 to below 1"),
            ("precision", self.precision in PRECISIONS, " or ".join(PRECISIONS)),
            ("clip_norm", self.clip_norm is None or self.clip_norm > 0, "a norm above 0, or None"),
            ("accumulation_steps", self.accumulation_steps >= 1, "an integer of at least 1"),
            ("max_rollbacks", self.max_rollbacks >= 0, "an integer of at least 0"),
            ("stall_seconds", self.stall_seconds > 0, "seconds above 0"),
            ("keep_checkpoints", self.keep_checkpoints >= 1, "an integer of at least 1"),
            ("seed", 0 <= self.seed < 2**32, "an integer from 0 to below 2^32"),
            ("steps_per_call", self.steps_per_call >= 1, "an integer of at least 1"),
        )
        for name, fits, allowed in checks:
            if not fits:
                raise UsageError(f"Experiment.{name} takes {allowed}, not {getattr(self, name)!r}")
        for name in ("duration", "log_every", "evaluate_every", "checkpoint_every", "keep_every"):
            if (duration := getattr(self, name)) is not None:
                amount, _ = check_duration(duration, f"Experiment.{name}")
                if not amount:
                    raise UsageError(f"Experiment.{name} takes more than {duration!r}")

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


def build_model(experiment: Experiment, num_classes: int) -> keras.Model:
    """Calls the factory of the network, in the experiment's precision.

    Raises:
        UsageError: if its arguments are out of range.
    """
    with devices.precision(experiment.precision), blaming_the_config():
        return experiment.model(num_classes=num_classes)


def check_images_fit(model: keras.Model, data: Data, split: str) -> None:
    """Raises a UsageError if the data's images are not of the size that the model takes."""
    images = tuple(data.eval_batches(split, batch_size=1).element_spec["image"].shape[1:])
    wanted = tuple(model.input_shape[1:])
    if any(None not in (i, w) and i != w for i, w in zip(images, wanted, strict=True)):
        raise UsageError(
            f"{model.name} takes images of {_size(wanted)} and {data.name} gives {_size(images)}: "
            "set their image_size alike"
        )


def _size(shape: tuple[int | None, ...]) -> str:
    return "×".join("any" if size is None else str(size) for size in shape)


@contextlib.contextmanager
def failing_in_one_line() -> Iterator[None]:
    """Turns what TensorFlow has against a run, such as an image it cannot read, into a RunError."""
    try:
        yield
    except tf.errors.OpError as error:
        raise RunError(_gist_of_graph(error.message)) from error


def _gist_of_graph(message: str) -> str:
    """Returns what Python raised within the graph, or else the first line that says something."""
    if raised := re.findall(r"^\w+Error: (.+)$", message, re.MULTILINE):
        return raised[-1]
    lines = re.sub(r"{{.*?}}", "", message).splitlines()
    around = ("Graph execution error", "Detected at node", "<stack traces", " ", "\t", "[[")
    said = [line for line in lines if line.strip() and not line.startswith(around)]
    return said[0] if said else lines[0]


@contextlib.contextmanager
def blaming_the_config() -> Iterator[None]:
    """Turns what a factory has against its arguments into a UsageError of one line."""
    try:
        yield
    except (UsageError, ValueError, TypeError) as error:
        raise UsageError(_gist(error)) from error


def _gist(error: Exception) -> str:
    """Returns the line that says what is wrong.

    gin adds behind it where the value came from; TensorFlow's tracing, before it, where it was.
    """
    lines = [line.strip() for line in str(error).split("\n") if line.strip()]
    traced = lines[0].startswith("in user code:")
    raised = next((line for line in lines if re.match(r"(Value|Type)Error: ", line)), lines[-1])
    return re.sub(r"^\w+Error: ", "", raised) if traced else lines[0]
