"""Foreign vision transformers of one image size, written as popular libraries write them, at other sizes."""

from __future__ import annotations

import copy

import numpy as np
import paddle
import pytest
from paddle import nn

from passl.models.positions import resize_matrix
from passl.wrapper.positions import adapt_positions, fixed_positions, own_size_of

WIDTH, PATCH = 8, 4


def block() -> nn.Layer:
    return nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, dropout=0.0)


class TimmPatchEmbed(nn.Layer):
    def __init__(self, img_size: int) -> None:
        super().__init__()
        self.img_size = (img_size, img_size)
        self.grid_size = (img_size // PATCH, img_size // PATCH)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.proj = nn.Conv2D(3, WIDTH, PATCH, PATCH)

    def forward(self, x):
        assert x.shape[2] == self.img_size[0], f"Input height ({x.shape[2]}) doesn't match model ({self.img_size[0]})."
        assert x.shape[3] == self.img_size[1], f"Input width ({x.shape[3]}) doesn't match model ({self.img_size[1]})."
        return self.proj(x).reshape([x.shape[0], WIDTH, self.num_patches]).transpose([0, 2, 1])


class TimmViT(nn.Layer):
    """[CLS] and a distillation token, as DeiT's."""

    def __init__(self, img_size: int = 32) -> None:
        super().__init__()
        self.patch_embed = TimmPatchEmbed(img_size)
        self.cls_token = self.create_parameter([1, 1, WIDTH])
        self.dist_token = self.create_parameter([1, 1, WIDTH])
        self.pos_embed = self.create_parameter([1, self.patch_embed.num_patches + 2, WIDTH])
        self.blocks = nn.Sequential(block(), block())

    def forward(self, x):
        x = self.patch_embed(x)
        extra = [token.expand([x.shape[0], 1, WIDTH]) for token in (self.cls_token, self.dist_token)]
        return self.blocks(paddle.concat([*extra, x], 1) + self.pos_embed)[:, 0]


class TorchvisionEncoder(nn.Layer):
    def __init__(self, seq_length: int) -> None:
        super().__init__()
        self.pos_embedding = self.create_parameter([1, seq_length, WIDTH])
        self.layers = block()

    def forward(self, x):
        return self.layers(x + self.pos_embedding)


class TorchvisionViT(nn.Layer):
    def __init__(self, image_size: int = 32) -> None:
        super().__init__()
        self.image_size = image_size
        self.conv_proj = nn.Conv2D(3, WIDTH, PATCH, PATCH)
        self.class_token = self.create_parameter([1, 1, WIDTH])
        self.seq_length = (image_size // PATCH) ** 2 + 1
        self.encoder = TorchvisionEncoder(self.seq_length)

    def forward(self, x):
        assert x.shape[2] == self.image_size, f"Wrong image height! Expected {self.image_size} but got {x.shape[2]}!"
        x = self.conv_proj(x).flatten(2).transpose([0, 2, 1])
        x = paddle.concat([self.class_token.expand([x.shape[0], 1, WIDTH]), x], 1)
        return self.encoder(x.reshape([x.shape[0], self.seq_length, WIDTH]))[:, 0]


class HFEmbeddings(nn.Layer):
    def __init__(self, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.image_size = image_size
        self.projection = nn.Conv2D(3, WIDTH, PATCH, PATCH)
        number = image_size[0] // PATCH * (image_size[1] // PATCH)
        self.cls_token = self.create_parameter([1, 1, WIDTH])
        self.position_embeddings = self.create_parameter([1, number + 1, WIDTH])

    def forward(self, x):
        if tuple(x.shape[2:]) != self.image_size:
            raise ValueError(f"Input image size {x.shape[2:]} doesn't match model {self.image_size}.")
        x = self.projection(x).flatten(2).transpose([0, 2, 1])
        return paddle.concat([self.cls_token.expand([x.shape[0], 1, WIDTH]), x], 1) + self.position_embeddings


class HFViT(nn.Layer):
    """Not square."""

    def __init__(self, image_size: tuple[int, int] = (32, 16)) -> None:
        super().__init__()
        self.embeddings = HFEmbeddings(image_size)
        self.encoder = block()

    def forward(self, x):
        return self.encoder(self.embeddings(x))[:, 0]


class HybridViT(nn.Layer):
    """No [CLS]; overlapping convolutions in front; two axes of positions in a buffer that is not trained."""

    def __init__(self, grid: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2D(3, WIDTH, 3, 2, 1), nn.ReLU(), nn.Conv2D(WIDTH, WIDTH, 3, 2, 1))
        self.register_buffer("positional_embedding", paddle.randn([grid**2, WIDTH]))
        self.mix = block()

    def forward(self, x):
        return self.mix(self.stem(x).flatten(2).transpose([0, 2, 1]) + self.positional_embedding).mean(1)


class TableViT(nn.Layer):
    """As CLIP of Hugging Face: positions are looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2D(3, WIDTH, PATCH, PATCH)
        self.position_embedding = nn.Embedding(64, WIDTH)
        self.register_buffer("position_ids", paddle.arange(64))

    def forward(self, x):
        return self.conv(x).flatten(2).transpose([0, 2, 1]) + self.position_embedding(self.position_ids)


MODELS = {"timm": TimmViT, "torchvision": TorchvisionViT, "HF": HFViT, "hybrid": HybridViT}
OWN = {"timm": (32, 32), "torchvision": (32, 32), "HF": (32, 16), "hybrid": (32, 32)}
PLACES = {
    "timm": ("", "pos_embed", 2),
    "torchvision": ("encoder", "pos_embedding", 1),
    "HF": ("embeddings", "position_embeddings", 1),
    "hybrid": ("", "positional_embedding", 0),
}


def model_of(name: str) -> nn.Layer:
    paddle.seed(0)
    return MODELS[name]()


def images(size: tuple[int, int]) -> paddle.Tensor:
    return paddle.to_tensor(np.random.default_rng(0).normal(size=(2, 3, *size)).astype(np.float32))


@pytest.mark.smoke
@pytest.mark.parametrize("name", MODELS)
def test_another_size_within_and_the_own_size_as_ever(name):
    model = model_of(name)
    expected = model(images(OWN[name])).numpy()
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    attributes = {path: set(vars(layer)) for path, layer in model.named_sublayers(include_self=True)}
    with adapt_positions(model, (16, 16), OWN[name]):
        output = model(images((16, 16)))
        assert output.shape == [2, WIDTH]
        assert {key: value.shape for key, value in model.state_dict().items()} == {
            key: list(value.shape) for key, value in state.items()
        }
    output.sum().backward()
    np.testing.assert_array_equal(model(images(OWN[name])).numpy(), expected)
    assert {path: set(vars(layer)) for path, layer in model.named_sublayers(include_self=True)} == attributes
    for key, value in model.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), state[key])
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key


@pytest.mark.parametrize("name", MODELS)
def test_what_is_found(name):
    layer, parameter, tokens = PLACES[name]
    found = fixed_positions(model_of(name), OWN[name])
    assert found.patch == (PATCH, PATCH)
    grid = (OWN[name][0] // PATCH, OWN[name][1] // PATCH)
    assert [(e.layer, e.name, e.tokens, e.grid) for e in found.embeddings] == [(layer, parameter, tokens, grid)]


def test_the_embedding_is_the_bicubic_one_and_its_gradient_that_of_the_interpolation():
    model = model_of("timm")
    with adapt_positions(model, (16, 24), (32, 32)):
        hidden = model.pos_embed
    assert hidden.shape == [1, 2 + 4 * 6, WIDTH]
    rows, columns = resize_matrix("size", 8, 4, np.float32), resize_matrix("size", 8, 6, np.float32)
    own = model.pos_embed.numpy()[0]
    expected = np.einsum("ri,cj,ijd->rcd", rows, columns, own[2:].reshape(8, 8, -1)).reshape(24, -1)
    np.testing.assert_allclose(hidden.numpy()[0], np.concatenate([own[:2], expected]), atol=1e-6)
    weights = np.random.default_rng(0).normal(size=(26, WIDTH)).astype(np.float32)
    (hidden[0] * paddle.to_tensor(weights)).sum().backward()
    grid = np.einsum("ri,cj,rcd->ijd", rows, columns, weights[2:].reshape(4, 6, -1)).reshape(64, -1)
    np.testing.assert_allclose(model.pos_embed.grad.numpy()[0], np.concatenate([weights[:2], grid]), atol=1e-5)


def test_everything_is_restored_after_an_error():
    model = model_of("torchvision")
    expected = model(images((32, 32))).numpy()
    with pytest.raises(AssertionError, match="Expected 16 but got 20"), adapt_positions(model, (16, 16), (32, 32)):
        model(images((20, 20)))
    np.testing.assert_array_equal(model(images((32, 32))).numpy(), expected)
    assert model.image_size == 32
    assert model.seq_length == 65


@pytest.mark.smoke
def test_a_copy_and_half_precision():
    model = model_of("HF")
    found = fixed_positions(model, (32, 16))
    clone = copy.deepcopy(model)
    with found.at(model, (16, 16)), found.at(clone, (8, 8)), paddle.amp.auto_cast():
        expected, other = model(images((16, 16))), clone(images((8, 8)))
    assert expected.shape == other.shape
    with found.at(clone, (16, 16)):
        np.testing.assert_array_equal(clone(images((16, 16))).numpy(), expected.numpy())
    with found.at(model, (32, 16)):
        assert model.embeddings.position_embeddings is model.embeddings._parameters["position_embeddings"]


def test_errors_say_what_to_set():
    own = r"Set local_crop_size=\(32, 32\), which is the model's own size, or local_crops_number=0"
    with pytest.raises(ValueError, match=rf"looked up in a table \(position_embedding\)\. {own}"):
        adapt_positions(TableViT(), (16, 16), (32, 32))
    with pytest.raises(ValueError, match=f"it has no parameter called pos_embed or alike. {own}"):
        adapt_positions(nn.Conv2D(3, 8, 4), (16, 16), (32, 32))
    odd = nn.Sequential(nn.Conv2D(3, 8, 4, 4))
    odd.pos_embed = odd.create_parameter([1, 40, 8])
    with pytest.raises(ValueError, match=f"pos_embed is not of a grid of patches. {own}"):
        adapt_positions(odd, (16, 16), (32, 32))
    context = adapt_positions(model_of("timm"), (2, 16), (32, 32))
    with pytest.raises(ValueError, match="2 x 16 px are smaller than the patches of TimmViT, 4 x 4: set local_crop_si"):
        context.__enter__()


def test_the_size_that_a_model_tells():
    assert own_size_of(model_of("timm")) == (32, 32)
    assert own_size_of(TorchvisionViT(48)) == (48, 48)
    assert own_size_of(model_of("HF")) == (32, 16)
    plain = model_of("timm")
    del plain.patch_embed.img_size
    assert own_size_of(plain) == (32, 32)  # by 64 patches of 4 pixels
    assert own_size_of(nn.Conv2D(3, 8, 4)) is None
