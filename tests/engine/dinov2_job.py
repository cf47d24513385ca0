"""What `test_dinov2_run.py` starts on two processes: steps of DINOv2, each with half of a batch.

Each process writes what it ended with to `FOLDER/CENTERING-RANK.npz`.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import numpy as np
import paddle

from passl import distributed
from passl.engine.optim import AdamW
from passl.models import DINOHead, VisionTransformer
from passl.models.centering import CENTERINGS
from passl.models.dinov2 import DINOv2

B, STEPS = 4, 3
GRADIENTS = "gradient of "


def batch(step: int, images: slice) -> dict[str, paddle.Tensor]:
    """These images of the batch of all processes, view by view; of some crops nothing is hidden."""
    rng = np.random.default_rng(step)
    masks = rng.random((2, B, 4)) < 0.5
    masks[0, ::2] = False
    masks[1, :, 0] = True  # each process has something to hide
    views = {
        "global_crops": rng.standard_normal((2, B, 3, 16, 16)),
        "local_crops": rng.standard_normal((3, B, 3, 8, 8)),
        "masks": masks,
    }
    return {name: paddle.to_tensor(np.concatenate(view[:, images])) for name, view in views.items()}


def results(centering: str, images: slice) -> dict[str, np.ndarray]:
    """The gradients of the first step, and everything after the last one.

    Without KoLeo, which looks for the nearest among the images of its own process.
    """
    paddle.seed(0)
    backbone = functools.partial(
        VisionTransformer, 16, 8, embed_dim=12, depth=2, num_heads=2, num_register_tokens=1, mask_token=True
    )
    head = functools.partial(DINOHead, out_dim=20, hidden_dim=12, bottleneck_dim=6, norm_last_layer=False)
    method = DINOv2(backbone, head, ibot_head=head, centering=centering, koleo_loss_weight=0.0)
    method.train()
    for name, parameter in method.named_parameters():
        parameter.name = name
    model = distributed.data_parallel(method)
    optimizer = AdamW(method.param_groups(), clip_norm=3.0)
    found = {}
    for step in range(STEPS):
        with distributed.synchronised(model, now=True):
            model(batch(step, images), teacher_temp=0.05)["loss"].backward()
        if step == 0:
            found = {f"{GRADIENTS}{p.name}": p.grad.numpy() for p in optimizer.parameters}
        optimizer.set(1e-2, 0.04)
        optimizer.clip_gradients()
        method.after_backward(epoch=step)
        optimizer.step()
        optimizer.clear_grad()
        method.after_step(teacher_momentum=0.9)
    found.update((name, tensor.numpy()) for name, tensor in method.state_dict().items())
    return found


def nothing_hidden(rank: int) -> None:
    """One process may have nothing to hide, or no process: all parameters take part, and nobody waits."""
    paddle.seed(0)
    backbone = functools.partial(VisionTransformer, 16, 8, embed_dim=12, depth=1, num_heads=2, mask_token=True)
    head = functools.partial(DINOHead, out_dim=20, hidden_dim=12, bottleneck_dim=6)
    for centering in CENTERINGS:
        method = DINOv2(backbone, head, ibot_head=head, centering=centering)
        model = distributed.data_parallel(method)
        for step in range(2):
            part = batch(step, slice(rank, rank + 1))  # a single image, of which KoLeo knows no other
            if rank <= step:
                part["masks"] = paddle.zeros_like(part["masks"])
            outputs = model(part, teacher_temp=0.05)
            outputs["loss"].backward()
            assert all(np.isfinite(value.item()) for value in outputs.values())
            method.after_step(teacher_momentum=0.9)


def main() -> None:
    paddle.set_device("cpu")
    paddle.set_default_dtype("float64")
    distributed.init()
    rank, share = distributed.rank(), B // distributed.world_size()
    for centering in CENTERINGS:
        np.savez(
            Path(sys.argv[1]) / f"{centering}-{rank}.npz", **results(centering, slice(rank * share, (rank + 1) * share))
        )
    nothing_hidden(rank)


if __name__ == "__main__":
    main()
