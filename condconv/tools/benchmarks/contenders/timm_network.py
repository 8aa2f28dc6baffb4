"""timm's networks as contenders, in an interpreter of their own, where Keras is not needed."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import timm
import torch

from .worker import Made, steps
from .workload import Workload

_SEED = 0
_DTYPES = {"mixed_bfloat16": torch.bfloat16, "mixed_float16": torch.float16}

Step = Callable[[], object]


def network(name: str, workload: Mapping[str, Any], threads: int, channels_last: bool) -> Made:
    """Returns the rounds of a network, eager, without dropout and stochastic depth.

    Args:
        name: timm's.
        workload: the fields of a ``Workload``.
        threads: that PyTorch may use.
        channels_last: whether images and weights are laid out so.
    """
    work = Workload(**workload)
    torch.set_num_threads(threads)
    torch.manual_seed(_SEED)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = timm.create_model(
        name, pretrained=False, num_classes=work.num_classes, drop_rate=0.0, drop_path_rate=0.0
    ).to(device, memory_format=layout)
    shape = (work.batch_size, 3, work.image_size, work.image_size)
    images = torch.rand(shape, device=device).contiguous(memory_format=layout)
    make = _training if work.mode == "train" else _inference
    step = make(model, images, work)
    rounds = {"steps": steps(step, work.batch_size, work.seconds)}
    return Made(rounds, lambda: _facts(model, device))


def _cast(images: torch.Tensor, precision: str) -> Any:
    """Returns a context in which PyTorch computes in a mixed precision."""
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(images.device.type, dtype=_DTYPES[precision])


def _inference(model: torch.nn.Module, images: torch.Tensor, work: Workload) -> Step:
    model.eval()

    def infer() -> object:
        with torch.inference_mode(), _cast(images, work.precision):
            return model(images).cpu()

    return infer


def _training(model: torch.nn.Module, images: torch.Tensor, work: Workload) -> Step:
    model.train()
    labels = torch.randint(work.num_classes, (len(images),), device=images.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=work.learning_rate, momentum=work.momentum)

    def train() -> float:
        optimizer.zero_grad(set_to_none=True)
        with _cast(images, work.precision):
            loss = torch.nn.functional.cross_entropy(model(images).float(), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    return train


def _facts(model: torch.nn.Module, device: torch.device) -> dict[str, Any]:
    facts = {"torch": torch.__version__, "timm": timm.__version__}
    facts["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    if device.type == "cpu":
        return facts
    name = torch.cuda.get_device_name(device)
    return facts | {"device": name, "device_peak_bytes": torch.cuda.max_memory_allocated(device)}
