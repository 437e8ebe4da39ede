"""The evaluation protocol on an in-memory scene with toy tasks; pictures and the report."""

import html.parser
import json

import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from nvs_common import evaluate, html_report, panels, perceptual, rendering
from nvs_common.data import views
from nvs_common.errors import InputError
from nvs_common.types import Aux, Cameras, Render, Task


class FakeScene:
    """Views in a row; view i is a constant image of value i / n. Remembers what was read."""

    def __init__(self, n=18, size=(16, 20), source="memory <b>"):
        poses = np.tile(np.eye(4), (n, 1, 1))
        poses[:, 0, 3] = np.arange(n)
        near, far = 1.0 + 0.01 * np.arange(n), 10.0 + np.arange(n)
        k = np.tile([20.0, 20.0, size[1] / 2, size[0] / 2], (n, 1))
        self.cameras = Cameras(poses, k, near, far, *size)
        self.names = tuple(f"<view & {i}>" for i in range(n))
        self.source, self.bounds = source, "made up"
        self.reads = []

    def images(self, indices):
        self.reads.append([int(i) for i in indices])
        shape = (len(indices), self.cameras.height, self.cameras.width, 3)
        value = np.asarray(indices, np.float32).reshape(-1, 1, 1, 1) / len(self.names)
        return np.broadcast_to(value, shape).astype(np.float32)

    def resized(self, height, width):
        return FakeScene(len(self.names), (height, width), self.source)


def _task(image=lambda variables, context, targets: jnp.mean(context.images, axis=1)):
    """A task whose render is one image per scene from (variables, context, targets)."""

    def render(variables, context, targets):
        images = image(variables, context, targets)[:, None] + 0 * variables["bias"]
        depth = jnp.broadcast_to(targets.far[..., None, None], images.shape[:-1])
        return Render(images, depth)

    return Task(
        init=lambda key, batch: {"bias": jnp.zeros(())},
        loss=lambda variables, batch, key: (jnp.zeros(()), Aux({})),
        render=render,
        param_axes={},
    )


VARIABLES = {"bias": np.zeros((), np.float32)}
PROTOCOL = evaluate.Protocol(num_inputs=4, hold_out_every=8)


@pytest.fixture(scope="module")
def result():
    scenes = [("<one>", FakeScene()), ("two", FakeScene(9))]
    return evaluate.evaluate(_task(), VARIABLES, scenes, PROTOCOL)


def test_every_held_out_view_is_scored_with_every_method(result):
    assert [view.index for view in result.scenes[0].views] == [0, 8, 16]
    assert [view.index for view in result.scenes[1].views] == [0, 8]
    for scene in result.scenes:
        for view in scene.views:
            assert set(view.scores) == set(evaluate.METHODS)
            for scores in view.scores.values():
                assert set(scores) == {"psnr", "ssim_gaussian", "ssim_sample"}
                assert np.isfinite(list(scores.values())).all()


def test_held_out_views_are_never_inputs(result):
    for scene in result.scenes:
        held_out = {view.name for view in scene.views}
        for view in scene.views:
            assert len(view.inputs) == 4 and not held_out & set(view.inputs)


def test_inputs_are_the_nearest_of_the_rest(result):
    inputs = result.scenes[0].views[1].inputs  # of view 8
    assert set(inputs) == {f"<view & {i}>" for i in (6, 7, 9, 10)}


def test_the_models_score_is_that_of_its_image(result):
    # View 8 of 18 from the mean of 6, 7, 9 and 10 is exact; view 0 from 1..4 is 2.5 / 18 off.
    views = result.scenes[0].views
    assert views[1].scores["model"]["psnr"] == pytest.approx(100, abs=1e-3)
    expected = -20 * np.log10(2.5 / 18)
    assert views[0].scores["model"]["psnr"] == pytest.approx(expected, abs=1e-3)
    expected = -20 * np.log10(1 / 18)
    assert views[0].scores["nearest_view"]["psnr"] == pytest.approx(expected, abs=1e-3)


def test_the_mean_weighs_scenes_equally(result):
    per_scene = [np.mean([v.scores["model"]["psnr"] for v in s.views]) for s in result.scenes]
    assert result.mean("model", "psnr") == pytest.approx(np.mean(per_scene))


def test_a_held_out_views_image_is_read_alone_and_after_its_rendering():
    scene = FakeScene()
    evaluate.evaluate(_task(), VARIABLES, [("s", scene)], PROTOCOL)
    for read in scene.reads:
        assert read in ([0], [8], [16]) or not {0, 8, 16} & set(read)
    assert scene.reads.index([0]) > 0


def test_near_and_far_come_from_the_inputs_alone():
    scene = FakeScene()
    scene.cameras.near[8], scene.cameras.far[8] = 1e-3, 1e6  # what only view 8 knows
    inputs = rendering.nearest_inputs(
        scene.cameras, scene.cameras[[8]], 4, allowed=np.array([6, 7, 9, 10]), name="s"
    )
    bounded = views.bounded(scene.cameras[[8]], scene, inputs)
    # Views 7 and 9 are half as far away as 6 and 10.
    logs = np.log([1.06, 1.07, 1.09, 1.10])
    np.testing.assert_allclose(bounded.near, np.exp(np.average(logs, weights=[1, 4, 4, 1])))
    np.testing.assert_allclose(bounded.far, [20.0])

    def depth_of_far(variables, context, targets):
        return jnp.broadcast_to(targets.far[..., None, None] / 40, (1, 16, 20, 3))

    protocol = evaluate.Protocol(num_inputs=4, hold_out_every=8)
    scored = evaluate.evaluate(_task(depth_of_far), VARIABLES, [("s", scene)], protocol)
    expected = -20 * np.log10(abs(20 / 40 - 8 / 18))
    assert scored.scenes[0].views[1].scores["model"]["psnr"] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("chunk", [2, 3, 5])
def test_chunks_change_nothing(result, chunk):
    scenes = [("<one>", FakeScene())]
    chunked = evaluate.evaluate(_task(), VARIABLES, scenes, PROTOCOL, chunk=chunk)
    for a, b in zip(chunked.scenes[0].views, result.scenes[0].views, strict=True):
        for method in evaluate.METHODS:
            assert a.scores[method] == pytest.approx(b.scores[method])


def test_the_border_crop_leaves_the_border_out():
    def wrong_border(variables, context, targets):
        image = jnp.mean(context.images, axis=1)
        return image.at[:, :2].set(1.0).at[:, :, -2:].set(0.0)

    scenes = [("s", FakeScene(18))]
    scored = [
        evaluate.evaluate(_task(wrong_border), VARIABLES, scenes, evaluate.Protocol(4, 8, border=b))
        for b in (0, 2)
    ]
    psnrs = [result.scenes[0].views[1].scores["model"]["psnr"] for result in scored]
    assert psnrs[0] < 30 and psnrs[1] == pytest.approx(100, abs=1e-3)


def test_lpips_is_scored_where_weights_are_given():
    rng = np.random.default_rng(0)
    arrays = {
        key: rng.normal(scale=0.05, size=shape).astype(np.float32)
        for key, shape in perceptual._expected_shapes(11).items()
    }
    params = perceptual.from_arrays(arrays, "random")
    protocol = evaluate.Protocol(4, 8, size=(32, 32), lpips=params)
    scored = evaluate.evaluate(_task(), VARIABLES, [("s", FakeScene(9))], protocol)
    assert scored.scenes[0].size == (32, 32) and "lpips" in scored.metrics


def test_bad_evaluations_name_the_scene():
    with pytest.raises(InputError, match="scene few: 6 of its 7 views.*8 are asked"):
        evaluate.evaluate(_task(), VARIABLES, [("few", FakeScene(7))], evaluate.Protocol())
    with pytest.raises(InputError, match="scene small: 10x20"):
        evaluate.evaluate(_task(), VARIABLES, [("small", FakeScene(18, (10, 20)))], PROTOCOL)
    with pytest.raises(InputError, match="no scene"):
        evaluate.evaluate(_task(), VARIABLES, [], PROTOCOL)

    def diverged(variables, context, targets):
        return jnp.full((1, 16, 20, 3), jnp.nan)

    with pytest.raises(InputError, match="scene bad, view <view & 0>.*not finite"):
        evaluate.evaluate(_task(diverged), VARIABLES, [("bad", FakeScene())], PROTOCOL)
    for wrong in ({"num_inputs": 0}, {"hold_out_every": 1}, {"border": -1}, {"ssim": "box"}):
        with pytest.raises(InputError):
            evaluate.Protocol(**wrong)


def test_quick_reports_metrics_and_pictures():
    config = ml_collections.ConfigDict(
        {
            "data": {"height": 16, "width": 20, "num_context": 4},
            "eval": {"num_scenes": 2, "views": 2},
        }
    )
    source = [FakeScene(), FakeScene(), FakeScene()]
    result = evaluate.quick(_task(), VARIABLES, source, config)
    assert set(result.metrics) == {"psnr", "ssim"}
    assert sorted(result.images) == [f"scene_{s}_view_{v}" for s in (0, 1) for v in (0, 16)]
    for image in result.images.values():
        assert image.dtype == np.uint8 and image.shape == (16, 4 * 20 + 3 * 2, 3)


def test_depth_colours_rise_in_lightness_with_disparity():
    ramp = panels.colors(np.linspace(0, 1, 256)).astype(float) @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(ramp) >= -0.5).all() and ramp[-1] - ramp[0] > 180
    depth = np.array([[1.0, 2.0, 4.0, np.inf, 0.0]])
    lightness = panels.depth_image(depth).astype(float).sum(-1)[0]
    assert lightness[0] > lightness[1] > lightness[2] and (lightness[3:] == 0).all()


def test_equal_images_have_a_dark_error_image():
    image = np.full((4, 5, 3), 0.5)
    np.testing.assert_array_equal(
        panels.error_image(image, image), np.broadcast_to(panels.colors(np.zeros(())), (4, 5, 3))
    )
    assert (panels.error_image(image, image + 0.5) == panels.colors(np.ones(()))).all()


class _Page(html.parser.HTMLParser):
    """Collects tags, text and sources, and checks that tags nest."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text, self.sources = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for key, value in attrs if key in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


ABOUT = html_report.About(
    "runs/<script>", {"command": "evaluate.py --x='<&>'"}, {"system": "toy</pre><b>"}
)


def test_the_report_is_one_well_formed_page_with_every_method_and_scene(result):
    page = _Page(html_report.page(result, ABOUT))
    assert page.open == []
    for method in evaluate.METHODS:
        assert method in page.text
    for name in ("<one>", "two", "worst: <view & 0>", "best: <view & 8>"):
        assert name in page.text
    assert "b" not in page.tags and "script" not in page.tags and "link" not in page.tags
    assert page.tags.count("img") == 4 * 5  # worst and best of two scenes, four parts and inputs
    assert all(source.startswith("data:image/") for source in page.sources)


def test_files_hold_the_numbers_of_the_table(result, tmp_path):
    path = html_report.write(result, ABOUT, tmp_path / "new")
    assert path.read_text().startswith("<!doctype html>")
    saved = json.loads((tmp_path / "new" / "metrics.json").read_text())
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["metrics.json", "report.html"]
    table = html_report.text_table(result).splitlines()
    assert [line.split("  ")[0] for line in table[2:]] == list(evaluate.METHODS)
    for method in evaluate.METHODS:
        row = next(line for line in table if line.startswith(method))
        assert f"{saved['mean'][method]['psnr']:.2f}" in row
    view = saved["scenes"][0]["views"][1]
    assert view["index"] == 8 and len(view["inputs"]) == 4


def test_the_protocols_ssim_flavour_is_the_one_in_the_table(result):
    assert html_report.shown_metrics(result) == ["psnr", "ssim_gaussian"]
    other = evaluate.Result(evaluate.Protocol(4, 8, ssim="sample"), result.scenes)
    assert html_report.shown_metrics(other) == ["psnr", "ssim_sample"]


def test_a_page_of_many_scenes_says_how_many_it_shows(result, monkeypatch):
    monkeypatch.setattr(html_report, "MAX_SHOWN", 1)
    page = _Page(html_report.page(result, ABOUT))
    assert page.tags.count("section") == 1
    assert any("the 1 worst of 2 scenes" in text for text in page.text)
