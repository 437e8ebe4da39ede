"""What every model says of views and cameras that do not fit together."""

import dataclasses

import jax
import numpy as np
import pytest

from nvs_common.errors import InputError
from nvs_common.types import Views
from quark_jax import Quark
from quark_jax.stages import Stage
from tests import small_lvsm

STAGES = (Stage(1, 1, 1, 1), Stage(0, 1, 1, 1, True))
QUARK = dict(grid_area=96, layers=2, channels=8, encoder_blocks=(1, 1), stages=STAGES)
MODELS = {"quark": lambda: Quark(**QUARK), **small_lvsm.KINDS}


def views(*lead: int, height: int = 8, width: int = 12, channels: int = 3) -> Views:
    cams = small_lvsm.cameras(lead, 8, 12)
    return Views(np.zeros((*lead, height, width, channels), np.float32), cams)


def one_camera_less() -> Views:
    good = views(1, 3)
    return dataclasses.replace(good, cameras=good.cameras[:, :2])


def one_near_less() -> Views:
    good = views(1, 3)
    cams = dataclasses.replace(good.cameras, intrinsics=good.cameras.intrinsics[:, :2])
    return dataclasses.replace(good, cameras=cams)


BAD = {
    "no view": (views(1, 0), views(1, 2), "a view or more"),
    "no scene axis": (views(3), views(1, 2), r"expected \[b, v, h, w, 3\]"),
    "four channels": (views(1, 3, channels=4), views(1, 2), r"expected \[b, v, h, w, 3\]"),
    "a camera less": (one_camera_less(), views(1, 2), "context cameras: world_from_cam has shape"),
    "intrinsics": (one_near_less(), views(1, 2), "context cameras: intrinsics has shape"),
    "another size": (views(1, 3, height=16), views(1, 2), "16 x 12 pixels .* 8 x 12"),
    "no target axis": (views(1, 3), views(1), r"expected \[b, t\] with b=1"),
    "no target": (views(1, 3), views(1, 0), "a target or more"),
    "other scenes": (views(1, 3), views(2, 2), r"leading axes \(2, 2\)"),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("case", BAD)
def test_views_that_do_not_fit_are_named(model, case):
    context, targets, message = BAD[case]
    with pytest.raises(InputError, match=message):
        jax.eval_shape(MODELS[model]().init, jax.random.key(0), context, targets.cameras)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (dict(stages=()), "stages is empty"),
        (dict(stages=(Stage(2, 1, 1, 1),)), "stage 0 is of level 2, .* 2 levels"),
        (dict(stages=(Stage(0, 1, 1, 1, True),)), "stage 0 collapses"),
        (dict(grid_area=0), "grid_area=0"),
        (dict(layers=0), "layers=0"),
        (dict(output="xyz"), "output='xyz'"),
        (dict(unseen="white"), "unseen='white'"),
    ],
)
def test_settings_of_quark_that_cannot_be_are_named(setting, message):
    module = Quark(**{**QUARK, **setting})
    with pytest.raises(InputError, match=message):
        jax.eval_shape(module.init, jax.random.key(0), views(1, 3), views(1, 2).cameras)
