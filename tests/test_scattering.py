import cmath
import math

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from dptaft import load_data
from dptaft.backbones import load_backbone
from dptaft.scattering import CHANNELS, ORIENTATIONS, Scattering, ScatteringEmbed, gaussian, morlet
from dptaft.tangent.choose import tangent_operator
from dptaft.tangent.model import TangentModel


def reflected(index, size):
    """Index of a pixel in an image that is continued by reflection about its border pixels."""
    index = abs(index)
    return 2 * (size - 1) - index if index >= size else index


def at(image, kernel, row, column):
    """Cross-correlation at one pixel, term by term."""
    half, size = len(kernel) // 2, len(image)
    return sum(
        kernel[half + i][half + j] * image[reflected(row + i, size)][reflected(column + j, size)]
        for i in range(-half, half + 1)
        for j in range(-half, half + 1)
    )


def wavelet(size, deviation, frequency, angle):
    """The complex Morlet wavelet from its formula, and nothing of the module under test."""
    slant, half = 4 / ORIENTATIONS, size // 2
    envelope, wave = {}, {}
    for i in range(-half, half + 1):
        for j in range(-half, half + 1):
            along = math.cos(angle) * j + math.sin(angle) * i
            across = -math.sin(angle) * j + math.cos(angle) * i
            envelope[i, j] = math.exp(-(along**2 + slant**2 * across**2) / (2 * deviation**2))
            wave[i, j] = cmath.exp(1j * frequency * along)
    mean = sum(envelope[k] * wave[k].real for k in envelope) / sum(envelope.values())
    scale = 2 * math.pi * deviation**2 / slant
    steps = range(-half, half + 1)
    return [[envelope[i, j] * (wave[i, j] - mean) / scale for j in steps] for i in steps]


def test_second_order_coefficient_term_by_term():
    size, fine, coarse = 16, 3, 5
    image = torch.rand(size, size, generator=torch.Generator().manual_seed(0))
    rows, places = image.tolist(), range(size)
    a = wavelet(7, 0.8, 3 * math.pi / 4, math.pi * fine / 8)
    b = wavelet(15, 1.6, 3 * math.pi / 8, math.pi * coarse / 8)
    first = [[abs(at(rows, a, i, j)) for j in places] for i in places]
    second = [[abs(at(first, b, i, j)) for j in places] for i in places]
    expected = at(second, gaussian(15, 1.6).tolist(), 4, 8)
    channel = 1 + 2 * ORIENTATIONS + fine * ORIENTATIONS + coarse
    assert Scattering()(image[None, None])[0, channel, 1, 2].item() == pytest.approx(expected, rel=1e-4)


def test_orders_zero_and_one_come_first():
    image = torch.rand(1, 1, 16, 16)
    coefficients = Scattering()(image)
    rows = image[0, 0].tolist()
    low = gaussian(15, 1.6).tolist()
    assert coefficients[0, 0, 2, 1].item() == pytest.approx(at(rows, low, 8, 4), rel=1e-5)
    a = wavelet(7, 0.8, 3 * math.pi / 4, math.pi * 2 / 8)
    first = [[abs(at(rows, a, i, j)) for j in range(16)] for i in range(16)]
    assert coefficients[0, 3, 2, 1].item() == pytest.approx(at(first, low, 8, 4), rel=1e-4)


def test_a_constant_image_has_no_waves():
    coefficients = Scattering()(torch.full((1, 1, 28, 28), 0.7))
    torch.testing.assert_close(coefficients[:, 0], torch.full((1, 7, 7), 0.7))
    assert coefficients[:, 1:].abs().max() < 1e-5


def test_wavelets_prefer_their_direction():
    stripes = torch.cos(3 * math.pi / 8 * torch.arange(28.0)).expand(28, 28)[None, None]
    upright, lying = Scattering()(stripes), Scattering()(stripes.transpose(2, 3))
    coarse = slice(1 + ORIENTATIONS, 1 + 2 * ORIENTATIONS)
    assert upright[0, coarse, 3, 3].argmax() == 0
    assert lying[0, coarse, 3, 3].argmax() == ORIENTATIONS // 2


@pytest.mark.parametrize(
    "options", [{"img_size": 30}, {"img_size": 4}, {"patch_size": 8}, {"in_chans": 3}], ids=str
)
def test_sizes_that_the_stem_does_not_have(options):
    with pytest.raises(ValueError, match="cells of 4 pixels"):
        ScatteringEmbed(**options)


def test_tokens_add_up_to_one_linear_map_of_all_coefficients():
    stem = ScatteringEmbed(img_size=16, embed_dim=12)
    with torch.no_grad():
        stem.centre.normal_()
        stem.shift.normal_()
    images = torch.rand(3, 1, 16, 16)
    coefficients = (stem.coefficients(images) - stem.centre).reshape(3, -1)
    expected = coefficients @ stem.weight.reshape(16 * CHANNELS, 12) + 16 * stem.shift
    torch.testing.assert_close(stem(images).sum(1), expected, rtol=1e-4, atol=1e-5)


def test_it_is_a_patch_embedding_of_timm():
    model = VisionTransformer(
        img_size=32, patch_size=4, in_chans=1, embed_dim=24, depth=2, num_heads=2, num_classes=5,
        embed_layer=ScatteringEmbed,
    )  # fmt: skip
    assert model(torch.rand(2, 1, 32, 32)).shape == (2, 5)
    assert sum(filters.numel() for filters in model.patch_embed.scattering.buffers()) > 0
    assert not any("scattering" in name for name in model.state_dict())


def test_morlet_and_its_turned_copy_agree():
    real, imaginary = morlet(15, 1.6, 3 * math.pi / 8, 0.3)
    turned = morlet(15, 1.6, 3 * math.pi / 8, 0.3 + math.pi / 2)
    torch.testing.assert_close(turned[0], real.rot90(1, (1, 0)))
    torch.testing.assert_close(turned[1], imaginary.rot90(1, (1, 0)))


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("starter-scattering", num_classes=10)


def test_the_class_token_holds_the_sum_of_the_tokens(backbone):
    """Up to the random features, the frozen network is the stem's linear map: attention adds up its tokens."""
    model, block = backbone.model, backbone.model.blocks[0]
    images = torch.rand(8, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        tokens = model.patch_embed(images)
        boundary = model._pos_embed(tokens)
        passed = block.attn(block.norm1(boundary))[:, 0]
    similar = torch.nn.functional.cosine_similarity(passed[:, :-2], tokens.sum(1)[:, :-2])
    assert similar.min() > 0.97


def test_scopes(backbone):
    assert tangent_operator(TangentModel(backbone.model, "last:1")).kind == "compiled"
    with pytest.raises(ValueError, match="last:2"):
        TangentModel(backbone.model, "last:2")


@pytest.mark.slow
def test_features_separate_digits(backbone):
    data = load_data("digits")
    model = TangentModel(backbone.model, "head")

    def features(split):
        u = torch.cat([model.boundary(x) for x in split.batches(256, backbone.preprocessing)]).double()
        return torch.cat([u, torch.ones(len(u), 1, dtype=u.dtype)], 1)

    u, y = features(data.train), torch.nn.functional.one_hot(data.train.labels).double()
    weights = torch.linalg.solve(u.T @ u + 10 * torch.eye(u.shape[1], dtype=u.dtype), u.T @ y)
    right = (features(data.evaluation) @ weights).argmax(1) == data.evaluation.labels
    assert right.double().mean() > 0.97
