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
)

dependencies = ["paddle", "numpy", "tqdm"]
