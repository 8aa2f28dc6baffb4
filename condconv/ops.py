"""Convolutions whose kernel differs from example to example, each computed as is fastest for it.

Everything here is channels-last and stateless, and works with a batch of any size, known or not.
The experts are mixed first and each example is convolved once with its own kernel: that is what
keeps a CondConv at the cost of one convolution (arXiv:1904.04971, section 3).

No framework has such a convolution, and none of the ways to compose it is the fastest everywhere:
:func:`choose` picks one for the :class:`Case` at hand. Its thresholds come from timings of single
layers on x86 CPUs; those for accelerators are estimates.

Shapes use B for the batch, n for the experts, m for the depth multiplier.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
from keras import ops

from condconv import formulations
from condconv.device import has_accelerator, in_xla
from condconv.formulations import MOST_CONVOLUTIONS, Geometry, Pair, Tensor
from condconv.normalization import at_least_float32

# With fewer numbers in an example, starting its own convolution costs more than folding it.
_SMALLEST_UNFOLDED = 2**15
# On smaller maps the gradient of a k×k convolution is slower for each example than for patches.
_SMALLEST_LOOPED_MAP = 14 * 14


def mix(experts: Tensor, routing_weights: Tensor, training: bool = False) -> Tensor:
    """Sums experts (n, …) with weights (B, n) into one kernel an example (B, …).

    The sum is taken in the experts' own precision and at least in float32, whatever that of the
    activations. ``training``, whether a gradient will be asked for, changes no result.
    """
    dtype = at_least_float32(experts.dtype)
    flat = ops.cast(ops.reshape(experts, (experts.shape[0], -1)), dtype)
    own = training and keras.backend.backend() == "tensorflow" and not in_xla()
    matmul = formulations.matmul_of_experts if own else ops.matmul
    mixed = matmul(ops.cast(routing_weights, dtype), flat)
    return ops.reshape(mixed, (-1, *experts.shape[1:]))


def dense(x: Tensor, experts: Tensor, routing_weights: Tensor) -> Tensor:
    """Applies to each example the mixture of dense kernels.

    Nothing is shared between the positions of a dense layer, so mixing first would write B
    kernels to use each once. Σ r_e (x W_e) = (r ⊗ x) W needs none: one matrix product, within a
    tenth of mixing for one example, and up to four times as fast for many.

    Args:
        x: (B, …, in).
        experts: (n, in, units).
        routing_weights: (B, n).

    Returns:
        (B, …, units), in the dtype of ``x``.
    """
    num_experts, channels, units = experts.shape
    weights = ops.cast(routing_weights, x.dtype)
    weights = ops.reshape(weights, (-1, *(1,) * (len(x.shape) - 2), num_experts, 1))
    outer = weights * ops.expand_dims(x, -2)
    outer = ops.reshape(outer, (*ops.shape(x)[:-1], num_experts * channels))
    return ops.matmul(outer, ops.cast(ops.reshape(experts, (-1, units)), x.dtype))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What the choice of a formulation rests on.

    Attributes:
        kernel_size: height and width of the kernel.
        geometry: strides, padding and dilation.
        batch: examples; None if unknown while tracing.
        sizes: height and width of the input, or None where unknown.
        channels: of the input.
        multiplier: the depth multiplier of a depthwise convolution.
        training: whether a gradient will be asked for.
        tensorflow: whether the backend is TensorFlow.
        xla: whether XLA compiles the whole of it.
        accelerator: whether there is a GPU or a TPU.
    """

    kernel_size: Pair
    geometry: Geometry
    batch: int | None
    sizes: tuple[int | None, int | None]
    channels: int
    multiplier: int = 1
    training: bool = False
    tensorflow: bool = True
    xla: bool = False
    accelerator: bool = False

    @classmethod
    def here(cls, **known: Any) -> "Case":
        """Returns the case of what is ``known``, on the backend, device and compiler in use."""
        tensorflow = keras.backend.backend() == "tensorflow"
        device = {"tensorflow": tensorflow, "xla": in_xla(), "accelerator": has_accelerator()}
        return cls(**(device | known))

    @property
    def pointwise(self) -> bool:
        """Whether the kernel sees one position at a time."""
        return self.kernel_size == (1, 1)

    @property
    def known_batch(self) -> bool:
        """Whether there can be a convolution for each example in the graph."""
        return bool(self.batch)

    @property
    def equal_strides(self) -> bool:
        """Whether height and width have the same stride, as TensorFlow's operation wants it."""
        return self.geometry.strides[0] == self.geometry.strides[1]

    @property
    def conv_gradient(self) -> bool:
        """Whether a depthwise convolution can have a gradient of forward convolutions."""
        plain = self.geometry.dilation_rate == (1, 1) and self.multiplier == 1
        return self.tensorflow and plain and self.equal_strides

    @property
    def positions(self) -> int:
        """Height times width of the input; 0 if unknown."""
        height, width = self.sizes
        return (height or 0) * (width or 0)

    @property
    def output_positions(self) -> int:
        """Height times width of the output, but for what a valid window loses; 0 if unknown."""
        rows, columns = self.geometry.strides
        height, width = self.sizes
        return -(-(height or 0) // rows) * -(-(width or 0) // columns)

    @property
    def large(self) -> bool:
        """Whether each example is worth a depthwise convolution of its own."""
        return self.batch == 1 or self.positions * self.channels >= _SMALLEST_UNFOLDED

    @property
    def slow_gradient(self) -> bool:
        """Whether TensorFlow's gradient of a depthwise convolution loses to forward convolutions.

        On a CPU it takes up to ten times as long where the kernel has more than nine positions,
        and, once examples are folded, on maps smaller than 4×4.
        """
        many = self.kernel_size[0] * self.kernel_size[1] > 9
        return self.training and self.conv_gradient and (many or 0 < self.positions < 16)


class Choice(NamedTuple):
    """A formulation, by name, and why it was picked."""

    formulation: str
    reason: str


class _Formulation(NamedTuple):
    compute: formulations.Convolution
    possible: Callable[[Case], bool] = lambda case: True
    needs: str = ""


_OWN_GRADIENT = "TensorFlow, equal strides, no dilation and a depth multiplier of 1"
_FORMULATIONS: dict[str, dict[str, _Formulation]] = {
    "conv2d": {
        "matmul": _Formulation(formulations.matmul, lambda c: c.pointwise, "a 1×1 kernel"),
        "loop": _Formulation(formulations.loop, lambda c: c.known_batch, "a known batch"),
        "map": _Formulation(formulations.map_examples, lambda c: c.tensorflow, "TensorFlow"),
        "patches": _Formulation(formulations.patches, lambda c: c.tensorflow, "TensorFlow"),
        "shifts": _Formulation(formulations.shifts),
    },
    "depthwise_conv2d": {
        "taps": _Formulation(formulations.depthwise_taps),
        "folding": _Formulation(
            formulations.depthwise_folding, lambda c: c.equal_strides, "equal strides"
        ),
        "loop": _Formulation(
            formulations.depthwise_loop,
            lambda c: c.known_batch and c.equal_strides,
            "a known batch and equal strides",
        ),
        "folding_conv_gradient": _Formulation(
            formulations.depthwise_folding_conv_gradient, lambda c: c.conv_gradient, _OWN_GRADIENT
        ),
        "loop_conv_gradient": _Formulation(
            formulations.depthwise_loop_conv_gradient,
            lambda c: c.known_batch and c.conv_gradient,
            f"a known batch, {_OWN_GRADIENT}",
        ),
    },
    "static_depthwise_conv2d": {
        "taps": _Formulation(formulations.depthwise_taps),
        "plain": _Formulation(
            formulations.depthwise_plain, lambda c: c.equal_strides, "equal strides"
        ),
        "conv_gradient": _Formulation(
            formulations.depthwise_plain_conv_gradient, lambda c: c.conv_gradient, _OWN_GRADIENT
        ),
    },
}

_Rule = tuple[Callable[[Case], bool], str, str]
# The first rule that holds decides: (whether it holds, the formulation, why).
_RULES: dict[str, tuple[_Rule, ...]] = {
    "conv2d": (
        (
            lambda c: c.batch == 1 and not (c.training or c.xla),
            "loop",
            "one example is one convolution, which TensorFlow fuses with what follows",
        ),
        (lambda c: c.pointwise, "matmul", "a 1×1 convolution is a matrix product"),
        (lambda c: c.batch == 1, "loop", "one example is one convolution"),
        (lambda c: c.xla or not c.tensorflow, "shifts", "XLA gathers shifted inputs in one loop"),
        (lambda c: c.batch == 0, "shifts", "TensorFlow has no convolution of no examples"),
        (lambda c: c.accelerator, "patches", "one matrix product fills an accelerator"),
        (
            lambda c: c.training and c.geometry.dilation_rate != (1, 1),
            "patches",
            "TensorFlow has no gradient of a dilated convolution in every precision",
        ),
        (
            lambda c: c.training and c.output_positions < _SMALLEST_LOOPED_MAP,
            "patches",
            "on a small map the gradient of a convolution for each example is slow",
        ),
        (
            lambda c: c.known_batch and c.batch <= MOST_CONVOLUTIONS,
            "loop",
            "the batch is known, and small enough for a convolution for each example",
        ),
        (lambda c: True, "map", "the batch is unknown, or too large to unroll"),
    ),
    "depthwise_conv2d": (
        (lambda c: c.xla, "taps", "XLA fuses the shifted inputs into one loop"),
        (lambda c: not c.equal_strides, "taps", "TensorFlow's operation takes equal strides"),
        (lambda c: c.accelerator, "folding", "one operation fills an accelerator"),
        (
            lambda c: c.slow_gradient and c.known_batch and c.large,
            "loop_conv_gradient",
            "TensorFlow's gradient is slow here; each example is worth a convolution",
        ),
        (
            lambda c: c.slow_gradient,
            "folding_conv_gradient",
            "TensorFlow's gradient is slow here; the batch is unknown, or an example small",
        ),
        (
            lambda c: c.known_batch and c.large,
            "loop",
            "the batch is known, and each example worth a convolution",
        ),
        (lambda c: True, "folding", "the batch is unknown, or an example small"),
    ),
    "static_depthwise_conv2d": (
        (lambda c: not c.equal_strides, "taps", "TensorFlow's operation takes equal strides"),
        (lambda c: c.accelerator, "plain", "an accelerator's own operation is fast"),
        (lambda c: c.xla, "taps", "XLA's depthwise convolution is slow on a CPU"),
        (
            lambda c: c.slow_gradient and not c.pointwise and c.geometry.strides == (1, 1),
            "conv_gradient",
            "TensorFlow's gradient of so large a kernel is slow",
        ),
        (lambda c: True, "plain", "TensorFlow's own operation is fast"),
    ),
}


def choose(operation: str, case: Case) -> Choice:
    """Returns the formulation that is taken where none is asked for, and why.

    Args:
        operation: "conv2d", "depthwise_conv2d" or "static_depthwise_conv2d".
        case: what is known of the call.
    """
    return next(Choice(name, reason) for holds, name, reason in _RULES[operation] if holds(case))


def possible(operation: str, case: Case) -> tuple[str, ...]:
    """Returns the names of the formulations that can compute a case, which ``choose`` takes."""
    return tuple(name for name, form in _FORMULATIONS[operation].items() if form.possible(case))


def conv2d(
    x: Tensor,
    kernels: Tensor,
    geometry: Geometry,
    training: bool = False,
    formulation: str | None = None,
) -> Tensor:
    """Convolves each example with its own kernel.

    Args:
        x: (B, H, W, in).
        kernels: (B, kh, kw, in, filters), in the dtype of ``x``.
        geometry: strides, padding and dilation.
        training: whether a gradient will be asked for; it decides the formulation only.
        formulation: in place of the one that ``choose`` would pick.

    Returns:
        (B, H', W', filters).

    Raises:
        ValueError: for a formulation that there is not, or that cannot compute this case.
    """
    return _compute("conv2d", x, kernels, geometry, training, formulation)


def depthwise_conv2d(
    x: Tensor,
    kernels: Tensor,
    geometry: Geometry,
    training: bool = False,
    formulation: str | None = None,
) -> Tensor:
    """Convolves each channel of each example with its own kernel.

    Args:
        x: (B, H, W, in).
        kernels: (B, kh, kw, in, m), in the dtype of ``x``.
        geometry, training, formulation: as in ``conv2d``.

    Returns:
        (B, H', W', in · m).

    Raises:
        ValueError: as ``conv2d``.
    """
    return _compute("depthwise_conv2d", x, kernels, geometry, training, formulation)


def static_depthwise_conv2d(
    x: Tensor,
    kernel: Tensor,
    geometry: Geometry,
    training: bool = False,
    formulation: str | None = None,
) -> Tensor:
    """Convolves each channel with its kernel, which is that of all examples.

    Args:
        x: (B, H, W, in).
        kernel: (kh, kw, in, m), in the dtype of ``x``.
        geometry, training, formulation: as in ``conv2d``.

    Returns:
        (B, H', W', in · m).

    Raises:
        ValueError: as ``conv2d``.
    """
    kernels = ops.expand_dims(kernel, 0)
    return _compute("static_depthwise_conv2d", x, kernels, geometry, training, formulation)


def _compute(
    operation: str,
    x: Tensor,
    kernels: Tensor,
    geometry: Geometry,
    training: bool,
    formulation: str | None,
) -> Tensor:
    case = Case.here(
        kernel_size=tuple(kernels.shape[1:3]),
        geometry=geometry,
        batch=x.shape[0],
        sizes=tuple(x.shape[1:3]),
        channels=x.shape[3],
        multiplier=1 if operation == "conv2d" else kernels.shape[4],
        training=training,
    )
    name = formulation or choose(operation, case).formulation
    if name not in possible(operation, case):
        form = _FORMULATIONS[operation].get(name)
        why = f"{name!r} needs {form.needs}" if form else f"there is no {name!r}"
        others = ", ".join(possible(operation, case))
        raise ValueError(f"formulation of {operation}: {why}; possible here: {others}")
    return _FORMULATIONS[operation][name].compute(x, kernels, geometry)
