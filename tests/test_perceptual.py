"""LPIPS against a float64 NumPy reference with random weights; the weights file's errors."""

import jax
import numpy as np
import pytest
import safetensors.numpy

from nvs_common import metrics, perceptual
from nvs_common.errors import InputError

# torchvision's `features` modules, written down independently of the library:
# (module, index) with "C" convolution (out, kernel, stride, padding), "R" ReLU, "P" pooling.
_VGG = []
_index = 0
for _widths in ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3):
    for _width in _widths:
        _VGG += [("C", _index, (_width, 3, 1, 1)), ("R", _index + 1, None)]
        _index += 2
    _VGG.append(("P", _index, (2, 2)))
    _index += 1
_VGG.pop()  # nothing is compared after the last pooling
_ALEX = [
    ("C", 0, (64, 11, 4, 2)),
    ("R", 1, None),
    ("P", 2, (3, 2)),
    ("C", 3, (192, 5, 1, 2)),
    ("R", 4, None),
    ("P", 5, (3, 2)),
    ("C", 6, (384, 3, 1, 1)),
    ("R", 7, None),
    ("C", 8, (256, 3, 1, 1)),
    ("R", 9, None),
    ("C", 10, (256, 3, 1, 1)),
    ("R", 11, None),
]
# ReLU modules whose outputs are compared: the slices of lpips/pretrained_networks.py.
_TAPS = {"vgg": (3, 8, 15, 22, 29), "alex": (1, 4, 7, 9, 11)}
_MODULES = {"vgg": _VGG, "alex": _ALEX}


@pytest.fixture(scope="module")
def arrays():
    return {net: _random_weights(net) for net in ("vgg", "alex")}


def _random_weights(net):
    rng = np.random.default_rng(0)
    result, channels, level = {}, 3, 0
    for kind, index, spec in _MODULES[net]:
        if kind == "C":
            out, kernel, _, _ = spec
            scale = np.sqrt(2 / (channels * kernel**2))
            weight = rng.normal(scale=scale, size=(out, channels, kernel, kernel))
            result[f"features.{index}.weight"] = weight.astype(np.float32)
            result[f"features.{index}.bias"] = rng.normal(scale=0.1, size=out).astype(np.float32)
            channels = out
        if index in _TAPS[net]:
            result[f"lin{level}"] = rng.uniform(size=(1, channels, 1, 1)).astype(np.float32)
            level += 1
    return result


def _windows(x, kernel, stride):
    view = np.lib.stride_tricks.sliding_window_view(x, (kernel, kernel), axis=(1, 2))
    return view[:, ::stride, ::stride]


def _reference(arrays, net, pred, truth):
    """LPIPS of one pair [h, w, 3] in float64, channels first, from the definition."""
    levels = []
    for image in (pred, truth):
        x = np.moveaxis(image.astype(np.float64), -1, 0) * 2 - 1
        x = (x - np.array([-0.030, -0.088, -0.188])[:, None, None]) / np.array(
            [0.458, 0.448, 0.450]
        )[:, None, None]
        taps = []
        for kind, index, spec in _MODULES[net]:
            if kind == "C":
                _, kernel, stride, padding = spec
                x = np.pad(x, ((0, 0), (padding, padding), (padding, padding)))
                weight = arrays[f"features.{index}.weight"].astype(np.float64)
                x = np.einsum("cyxij,ocij->oyx", _windows(x, kernel, stride), weight, optimize=True)
                x = x + arrays[f"features.{index}.bias"].astype(np.float64)[:, None, None]
            elif kind == "R":
                x = np.maximum(x, 0)
            else:
                x = _windows(x, *spec).max(axis=(-1, -2))
            if index in _TAPS[net]:
                taps.append(x / (np.sqrt((x**2).sum(0, keepdims=True)) + 1e-10))
        levels.append(taps)
    total = 0.0
    for level, (a, b) in enumerate(zip(*levels, strict=True)):
        head = arrays[f"lin{level}"].reshape(-1, 1, 1).astype(np.float64)
        total += (head * (a - b) ** 2).sum(0).mean()
    return total


@pytest.mark.parametrize("net,size", [("vgg", (32, 19)), ("alex", (67, 48))])
@pytest.mark.thorough
def test_lpips_equals_a_float64_reference(arrays, net, size):
    rng = np.random.default_rng(1)
    pred, truth = rng.uniform(size=(2, *size, 3)).astype(np.float32)
    params = perceptual.from_arrays(arrays[net], "random")
    expected = _reference(arrays[net], net, pred, truth)
    np.testing.assert_allclose(perceptual.lpips(params, pred, truth), expected, rtol=2e-5)


@pytest.mark.thorough
def test_lpips_is_zero_for_equal_images_symmetric_and_per_image(arrays):
    rng = np.random.default_rng(2)
    a, b = rng.uniform(size=(2, 2, 1, 32, 32, 3)).astype(np.float32)
    params = perceptual.from_arrays(arrays["alex"], "random")
    forward = metrics.lpips(a, b, params)
    assert forward.shape == (2, 1) and (forward > 0).all()
    np.testing.assert_allclose(metrics.lpips(b, a, params), forward, rtol=1e-5)
    np.testing.assert_allclose(metrics.lpips(a[1, 0], b[1, 0], params), forward[1, 0], rtol=1e-4)
    assert (metrics.lpips(a, a, params) == 0).all()


@pytest.mark.thorough
def test_gradient_is_finite_where_features_vanish(arrays):
    dead = dict(arrays["alex"])
    dead["features.0.bias"] = np.full(64, -1e3, np.float32)
    params = perceptual.from_arrays(dead, "dead")
    images = np.random.default_rng(3).uniform(size=(2, 32, 32, 3)).astype(np.float32)
    gradient = jax.grad(lambda x: perceptual.lpips(params, x, images[1]))(images[0])
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_weights_survive_the_file(arrays, tmp_path, suffix):
    path = tmp_path / f"alex{suffix}"
    named = {k.replace("lin0", "lin0.model.1.weight"): v for k, v in arrays["alex"].items()}
    if suffix == ".npz":
        np.savez(path, **named)
    else:
        safetensors.numpy.save_file(named, path)
    expected = perceptual.from_arrays(arrays["alex"], "random")
    jax.tree.map(np.testing.assert_array_equal, perceptual.load(path), expected)


def test_no_weights_say_what_to_do():
    with pytest.raises(InputError, match="loss.lpips_weight"):
        perceptual.load("")


def test_missing_and_unknown_arrays_are_listed(arrays):
    broken = {k: v for k, v in arrays["vgg"].items() if k != "features.17.bias"}
    broken["classifier.0.weight"] = np.zeros(3, np.float32)
    with pytest.raises(InputError, match=r"features\.17\.bias.*classifier\.0\.weight"):
        perceptual.from_arrays(broken, "half.npz")


def test_bad_arrays_are_named(arrays):
    wrong = dict(arrays["alex"], lin2=np.zeros(7, np.float32))
    with pytest.raises(InputError, match=r"x.npz: lin2 has shape \(7,\), expected \(384,\)"):
        perceptual.from_arrays(wrong, "x.npz")
    nan = dict(arrays["alex"], lin2=np.full(384, np.nan, np.float32))
    with pytest.raises(InputError, match="lin2"):
        perceptual.from_arrays(nan, "x.npz")
    with pytest.raises(InputError, match="features.0.weight"):
        perceptual.from_arrays({}, "x.npz")


def test_unreadable_files_are_named(tmp_path):
    for name in ("absent.npz", "text.npz", "text.safetensors", "text.pt"):
        path = tmp_path / name
        if not name.startswith("absent"):
            path.write_text("not weights")
        with pytest.raises(InputError, match=name):
            perceptual.load(path)


def test_images_below_the_networks_size_are_refused(arrays):
    params = perceptual.from_arrays(arrays["alex"], "random")
    small = np.zeros((30, 64, 3), np.float32)
    with pytest.raises(InputError, match="30x64"):
        perceptual.lpips(params, small, small)
