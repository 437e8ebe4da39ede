"""The benchmark of attention between views: its scene, its arithmetic and its table."""

import numpy as np

from launch import depth_costs
from nvs_common import cameras


def test_counts_of_products_are_those_of_the_paper_s_sizes(monkeypatch):
    # Six views of 256 x 256 pixels at the first up block: 32 x 32 with 512 channels.
    monkeypatch.setattr(depth_costs, "CHANNELS", 512)
    found = {m: 1e-12 * depth_costs.products(m, 6, (32, 32)) for m in depth_costs.cross_view.MODES}
    wanted = {"depth_truncated": 0.0005, "full_epipolar": 0.0020, "full_cross_view": 0.077}
    for mode, value in wanted.items():
        np.testing.assert_allclose(found[mode], value, rtol=0.02)


def test_cameras_see_the_sphere():
    known = depth_costs.orbit(5, 8, 8)
    uv = np.broadcast_to(cameras.pixel_grid(8, 8), (1, 5, 8, 8, 2))
    points = cameras.unproject(known.cameras, uv, known.depth)
    radius = np.linalg.norm(points, axis=-1)[np.asarray(known.mask)]
    assert known.mask[:, :, 3:5, 3:5].all() and not known.mask[:, :, 0, 0].any()
    np.testing.assert_allclose(radius, 0.5, atol=1e-5)


def test_the_table_has_a_row_for_each_kind_and_runs_what_is_small(monkeypatch):
    monkeypatch.setattr(depth_costs, "CHANNELS", 32)
    monkeypatch.setattr(
        depth_costs, "MAX_GFLOP", depth_costs.products("full_epipolar", 2, (16, 16)) * 1e-9
    )
    lines = depth_costs.study([2], [(16, 16)], repeats=1)
    rows = [line for line in lines if "16 x 16" in line]
    assert [row.count("not run") for row in rows] == [0, 0, 1]
