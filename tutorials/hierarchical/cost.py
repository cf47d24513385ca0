"""What a hierarchical pre-training of real size costs, by formulas: floating-point operations, hours, bytes.

python tutorials/hierarchical/cost.py [--regions N] [--tflops T]
"""

from __future__ import annotations

import argparse


def vit_flops(tokens: int, width: int, depth: int, in_dim: int, mlp_ratio: int = 4) -> float:
    """Of one forward pass of a transformer over `tokens` of `in_dim` numbers, two for each multiplication and addition.

    A block has four matrices of attention and two of the MLP, and two products of attention between all tokens.
    """
    block = 2 * tokens * (4 + 2 * mlp_ratio) * width**2 + 4 * tokens**2 * width
    return depth * block + 2 * tokens * in_dim * width


def head_flops(width: int, hidden: int = 2048, bottleneck: int = 256, out_dim: int = 65536) -> float:
    """Of one forward pass of DINO's head."""
    return 2 * (width * hidden + hidden * hidden + hidden * bottleneck + bottleneck * out_dim)


def step_flops(global_view: float, local_view: float, head: float, num_local: int = 8) -> float:
    """Of one training step for one image: forward passes of the teacher on two views and of the student on all, and a
    backward pass, which costs two forward ones.
    """
    teacher = 2 * (global_view + head)
    student = 2 * global_view + num_local * local_view + (2 + num_local) * head
    return teacher + 3 * student


def report(regions: int, tflops: float) -> str:
    """The table of the tutorial."""
    patches = 256 * regions
    patch_16, patch_14, patch_6 = (vit_flops(1 + side**2, 384, 12, 3 * 16**2) for side in (16, 14, 6))
    region_14, region_6 = (vit_flops(1 + side**2, 192, 6, 384) for side in (14, 6))
    extraction = patches * patch_16
    patch_step = step_flops(patch_14, patch_6, head_flops(384))
    region_step = step_flops(region_14, region_6, head_flops(192))
    rows = [
        ("patch ViT, 100 epochs over all patches", 100 * patches * patch_step),
        ("patch ViT, 100 epochs over 5 % of them", 5 * patches * patch_step),
        ("extraction, once", extraction),
        ("region ViT, 125 epochs", 125 * regions * region_step),
    ]
    lines = [f"{regions} regions of 4096 px, {patches} patches of 256 px; a GPU that sustains {tflops:g} TFLOP/s", ""]
    lines += [f"{'':42}{'PFLOP':>12}{'GPU hours':>12}"]
    lines += [f"{name:42}{flops / 1e15:>12.1f}{flops / (tflops * 1e12) / 3600:>12.1f}" for name, flops in rows]
    lines += ["", f"one patch forward: {patch_16 / 1e9:.2f} GFLOP; one region: {256 * patch_16 / 1e12:.2f} TFLOP"]
    size = 256 * 384 * 4
    lines += [f"features: {size / 1024:.0f} KiB a region, {regions * size / 2**30:.2f} GiB in all (float32)"]
    lines += [f"one training step of a region: {region_step / 1e9:.1f} GFLOP, of a patch: {patch_step / 1e9:.1f} GFLOP"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--regions", type=int, default=10_000)
    parser.add_argument("--tflops", type=float, default=60.0, help="sustained by the GPU, per second")
    options = parser.parse_args()
    print(report(options.regions, options.tflops))


if __name__ == "__main__":
    main()
