"""For paddle.hub: paddle.hub.load("/path/to/this/folder", "dino_vits16", source="local", pretrained=True)"""

from passl.models.hub import (  # noqa: F401  (what is here is what paddle.hub offers)
    dino_deits8,
    dino_deits16,
    dino_resnet50,
    dino_vitb8,
    dino_vitb16,
    dino_vits8,
    dino_vits16,
    dino_xcit_medium_24_p8,
    dino_xcit_medium_24_p16,
    dino_xcit_small_12_p8,
    dino_xcit_small_12_p16,
    dinov2_vitb14,
    dinov2_vitb14_reg,
    dinov2_vitg14,
    dinov2_vitg14_reg,
    dinov2_vitl14,
    dinov2_vitl14_reg,
    dinov2_vits14,
    dinov2_vits14_reg,
)

dependencies = ["paddle", "numpy", "tqdm"]
