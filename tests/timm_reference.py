"""Run by an interpreter that has timm: writes one of its networks, and the logits it gives.

python tests/timm_reference.py NAME PREFIX writes PREFIX.safetensors and PREFIX.npz with images,
logits and the normalisation. The weights are random, with batch-norm statistics near those of what
comes in; the logits are computed in float64.
"""

import sys

import numpy as np
import safetensors.torch
import timm
import torch


def calibrate(norm, inputs):
    variance, mean = torch.var_mean(inputs[0], (0, 2, 3))
    norm.running_mean.copy_(mean + 0.1 * torch.randn_like(mean) * variance.sqrt())
    norm.running_var.copy_(variance * (0.75 + 0.5 * torch.rand_like(variance)) + 1e-3)


def main(name, prefix):
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    config = model.pretrained_cfg
    small = np.random.default_rng(0).integers(0, 256, (4, 14, 14, 3), np.uint8)
    images = small.repeat(16, 1).repeat(16, 2)
    x = (images / 255.0 - np.array(config["mean"])) / np.array(config["std"])
    x = torch.tensor(x.transpose(0, 3, 1, 2), dtype=torch.float32)
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.add_(torch.randn_like(weight) * 0.1)
            if path.endswith("routing_fn.weight"):
                weight.normal_(0, 0.1)
            if path in ("classifier.weight", "fc.weight"):
                weight.normal_(0, 0.05)
        norms = [module for module in model.modules() if hasattr(module, "running_mean")]
        hooks = [norm.register_forward_pre_hook(calibrate) for norm in norms]
        model(x)
        for hook in hooks:
            hook.remove()
        weights = {path: value.clone() for path, value in model.state_dict().items()}
        logits = model.double()(x.double()).numpy()
    safetensors.torch.save_file(weights, f"{prefix}.safetensors", metadata={"format": "pt"})
    np.savez(
        f"{prefix}.npz", images=images, logits=logits, **{k: config[k] for k in ("mean", "std")}
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
