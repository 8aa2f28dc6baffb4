"""Parameters, multiply-adds and MACs of a Keras model, by the accounting of the CondConv paper.

The paper (arXiv:1904.04971) prints multiply-adds and does not say how they were counted. Two rules
reproduce its every printed number:

- rule R (all networks but MobileNetV1): half the float operations that TensorFlow's profiler saw
  in the inference graph. A multiply-add is 1; an addition or multiplication on its own is 1/2: of
  biases, residuals, pooling, squeeze-and-excite scales and the product in swish. Batch norm and
  the other activations cost nothing.
- rule M (MobileNetV1): the multiply-adds of the convolutions; neither the classifier's own nor
  anything elementwise.

Under both a conditional kernel costs n·|W| more, for mixing it from n experts, and a routing its
dense layers. ``macs`` are counted the plain way: convolutions, dense layers, mixing, routing.

The model is traced once while every layer is watched, so nested, shared and subclassed models are
counted by what they really do, at the image size asked for.
"""

import concurrent.futures
import contextlib
import dataclasses
import inspect
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import keras

from condconv.layers import Logits
from condconv.work import Shape, Work, counter, extras

# Static, mixing and routing work, in halves of a multiply-add.
_RULES: dict[str, Callable[[Work], tuple[int, int, int]]] = {
    "R": lambda w: (
        2 * (w.convolution + w.dense) + w.elementwise,
        2 * (w.mixing + w.bias_mixing),
        2 * w.routing + w.routing_elementwise,
    ),
    "M": lambda w: (2 * w.convolution, 2 * w.mixing, 2 * w.routing),
}


def _multiply_adds(w: Work, rule: str) -> tuple[int, ...]:
    return tuple(halves // 2 for halves in _RULES[rule](w))


def _macs(w: Work) -> tuple[int, int, int]:
    return w.convolution + w.dense, w.mixing, w.routing


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """The cost of one layer for one image.

    Attributes:
        layer: its name, behind those of the models it sits in.
        parameters: trainable.
        static, mixing, routing: multiply-adds under the rule.
        macs: multiply-accumulates counted the plain way.
    """

    layer: str
    parameters: int
    static: int
    mixing: int
    routing: int
    macs: int


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of a model for one image.

    Attributes:
        rule: "R" or "M".
        parameters: trainable.
        multiply_adds: by the rule; the sum of ``static``, ``mixing`` and ``routing``.
        macs: counted the plain way; the sum of its three parts.
        rows: one for each layer that costs anything, in order of execution.
        uncounted: what is in the model and not in the numbers.
    """

    rule: str
    parameters: int
    static: int
    mixing: int
    routing: int
    macs_static: int
    macs_mixing: int
    macs_routing: int
    rows: tuple[LayerCost, ...]
    uncounted: tuple[str, ...]

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds by the rule."""
        return self.static + self.mixing + self.routing

    @property
    def macs(self) -> int:
        """Multiply-accumulates of convolutions, dense layers, mixing and routing."""
        return self.macs_static + self.macs_mixing + self.macs_routing


def count_cost(model: keras.Model, rule: str | None = None, image_size: int | None = None) -> Cost:
    """Counts what a model costs for one image.

    Args:
        model: any built Keras model. Our networks carry their rule; others are counted by R.
        rule: "R" or "M"; overrides the one the model carries.
        image_size: height and width; needed where the model leaves them open.

    Raises:
        ValueError: for an unknown rule, a model that is not built, or an unknown or impossible
            image size.

    Warns:
        UserWarning: if the model holds anything that cannot be counted (see ``uncounted``).
    """
    rule = rule or _own_rule(model)
    if rule not in _RULES:
        raise ValueError(f"rule takes one of {', '.join(_RULES)}, not {rule!r}")
    if image_size is not None and (type(image_size) is not int or image_size < 1):
        raise ValueError(f"image_size takes an integer of at least 1, not {image_size!r}")
    with _recorded_calls(model) as calls:
        keras.Operation.compute_output_spec(model, *_inputs(model, image_size))
    work: dict[str, Work] = {}
    operations: dict[str, keras.Operation] = {}
    uncounted: dict[str, None] = {}
    for name, operation, inputs, output in calls:
        count = counter(operation)
        if count is None:
            if not _is_graph(operation):
                uncounted[_describe(name, operation)] = None
            continue
        uncounted |= {
            f"{extra} of {_describe(name, operation)}": None for extra in extras(operation)
        }
        operations[name] = operation
        work[name] = work.get(name, Work()) + count(operation, inputs, output)
    if uncounted:
        warnings.warn(f"not counted: {'; '.join(uncounted)}", stacklevel=2)
    rows = [_layer_cost(name, operations[name], work[name], rule) for name in work]
    total = sum(work.values(), Work())
    return Cost(
        rule,
        sum(math.prod(v.shape) for v in model.trainable_variables),
        *_multiply_adds(total, rule),
        *_macs(total),
        tuple(row for row in rows if any(dataclasses.astuple(row)[1:])),
        tuple(uncounted),
    )


def count_unbuilt(build: Callable[[], keras.Model], rule: str | None = None) -> Cost:
    """Returns what the model that ``build`` makes would cost, without drawing its weights.

    A cost asks for shapes alone, and drawing takes most of the time that a large network takes.

    Raises:
        ValueError: as ``count_cost`` and ``build`` do.
    """

    def count() -> Cost:
        with keras.StatelessScope(initialize_variables=False):
            model = build()
            for variable in model.variables:  # Keras draws it again, for each expert, at every use
                variable._initializer = keras.initializers.Zeros()
            return count_cost(model, rule)

    # Keras keeps, thread by thread, the variables that it has yet to draw; with the thread they go.
    with concurrent.futures.ThreadPoolExecutor(1) as apart:
        return apart.submit(count).result()


def _own_rule(model: keras.Model) -> str:
    rules = [layer.cost_rule for layer in _tree(model).values() if isinstance(layer, Logits)]
    return rules[-1] if rules else "R"


def _inputs(model: keras.Model, image_size: int | None) -> list[Any]:
    """Returns specs of one image for each input of ``model``, at the size asked for."""
    if not model.built:
        raise ValueError(f"{model.name} is not built: call it on a batch once, then count")
    specs = getattr(model, "inputs", None)
    if specs is None:
        shapes = model.get_build_config()
        shapes = shapes.get("shapes_dict", {"input_shape": shapes.get("input_shape")})
        specs = [keras.KerasTensor(shape) for shape in shapes.values()]
    flat = [keras.KerasTensor(_image_shape(model, s.shape, image_size), s.dtype) for s in specs]
    structure = getattr(model, "_inputs_struct", None)
    return flat if structure is None else [keras.tree.pack_sequence_as(structure, flat)]


def _image_shape(model: keras.Model, shape: tuple, image_size: int | None) -> Shape:
    shape = (1, *shape[1:])
    if image_size is not None and len(shape) == 4:
        sizes = (image_size, image_size)
        shape = (1, shape[1], *sizes) if _channels_first(shape) else (1, *sizes, shape[3])
    if None in shape:
        raise ValueError(f"{model.name} takes inputs of open size {shape}: pass image_size")
    return shape


def _channels_first(shape: tuple[int | None, ...]) -> bool:
    """Whether images have their channels in front: their open sizes tell, else Keras' setting."""
    if (shape[1] is None) != (shape[3] is None):
        return shape[3] is None
    return keras.config.image_data_format() == "channels_first"


@contextlib.contextmanager
def _recorded_calls(model: keras.Model) -> Iterator[list[tuple[str, Any, list[Shape], Shape]]]:
    """Collects (name, operation, shapes of its inputs, shape of its output) of every call."""
    calls: list[tuple[str, Any, list[Shape], Shape]] = []
    operations = _tree(model)

    def watch(name: str, operation: Any, method: str) -> None:
        call = getattr(operation, method)

        def watched(*args: Any, **kwargs: Any) -> Any:
            outputs = call(*args, **kwargs)
            calls.append((name, operation, _shapes((args, kwargs)), (_shapes(outputs) or [()])[0]))
            return outputs

        # Keras reads the signature to see which arguments it may pass.
        watched.__signature__ = inspect.signature(call)
        vars(operation)[method] = watched

    for name, operation in operations.items():
        watch(name, operation, _call_method(operation))
    try:
        yield calls
    finally:
        for operation in operations.values():
            del vars(operation)[_call_method(operation)]


def _call_method(operation: Any) -> str:
    """Returns the name of the method by which Keras calls an operation."""
    quantized = getattr(operation, "quantization_mode", None) is not None
    return "quantized_call" if quantized else "call"


def _tree(model: keras.Model) -> dict[str, Any]:
    """Returns every operation in a model by the names that lead to it; the model itself is ""."""
    found: dict[str, Any] = {}
    seen: set[int] = set()

    def visit(operation: Any, name: str) -> None:
        if id(operation) in seen:
            return
        seen.add(id(operation))
        while name in found:  # names of a subclassed model need not differ
            name += "'"
        found[name] = operation
        for child in _children(operation):
            visit(child, f"{name}/{child.name}".lstrip("/"))

    visit(model, "")
    return found


def _children(operation: Any) -> list[Any]:
    if hasattr(operation, "operations"):
        return list(operation.operations)
    if isinstance(operation, keras.Sequential):
        return list(operation.layers)
    return list(getattr(operation, "_layers", []))


def _is_graph(operation: Any) -> bool:
    """Whether a model does nothing but call its parts: a Functional or Sequential as Keras has it.

    A subclass may add arithmetic of its own in ``call``.
    """
    keras_own = type(operation).call.__module__.partition(".")[0] == "keras"
    return keras_own and (
        isinstance(operation, keras.Sequential) or hasattr(operation, "operations")
    )


def _shapes(tensors: Any) -> list[Shape]:
    """Returns the shapes, without the batch, of all tensors in a structure."""
    return [tuple(t.shape[1:]) for t in keras.tree.flatten(tensors) if hasattr(t, "shape")]


def _describe(name: str, operation: Any) -> str:
    kind = type(operation).__name__
    if not name:
        return f"arithmetic in the call of {kind} itself"
    own = " itself" if _children(operation) else ""
    return f"{name} ({kind}){own}"


def _layer_cost(name: str, operation: Any, work: Work, rule: str) -> LayerCost:
    inner = {id(v) for child in _children(operation) for v in child.trainable_variables}
    own = [v for v in getattr(operation, "trainable_variables", []) if id(v) not in inner]
    parameters = sum(math.prod(v.shape) for v in own)
    return LayerCost(name, parameters, *_multiply_adds(work, rule), sum(_macs(work)))
