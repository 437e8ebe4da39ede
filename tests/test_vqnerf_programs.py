"""Programs around VQ-NeRF: pictures of meshes, the cost table, the ablation, the whole way."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from configs import vqnerf as vqnerf_config
from launch import mesh_picture, vqnerf_costs, vqnerf_variants
from nvs_common.errors import InputError
from tests import test_vqnerf
from vqnerf_jax import mesh, task

ROOT = pathlib.Path(__file__).resolve().parent.parent


def test_a_picture_shows_the_outline_and_the_light():
    pytest.importorskip("skimage")
    ball = mesh.extract(lambda p: np.linalg.norm(p - [0.2, 0, 0], axis=-1) - 0.5, 24)
    image = mesh_picture.draw(ball, np.array([0.0, -1, 0]), 64)
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8
    drawn = image[..., 0] < 255
    # The whole object fills the picture: a disc of 32 pixels radius.
    assert drawn.mean() == pytest.approx(np.pi / 4, abs=0.03)
    assert drawn[32].sum() > 60 and not drawn[0, 0]
    # Lit from above.
    assert image[16, 32, 0] > image[48, 32, 0] + 30
    assert mesh_picture.four_sides(ball, 16).shape == (16, 64, 3)


@pytest.mark.slow
def test_the_cost_table_adds_parts_up():
    ours, _ = task.make_model(test_vqnerf.config().model)
    sizes = ((8, 8), (8, 16))
    lines = list(vqnerf_costs.study(ours, sizes, rays=4, latents=4, repeats=1))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:4]]
    assert [row[0] for row in rows] == ["8 x 8", "8 x 16"]
    for row, (height, width) in zip(rows, sizes, strict=True):
        assert len(row) == len(vqnerf_costs.HEAD)
        assert float(row[7].split()[0]) == pytest.approx(400 / (height * width), rel=0.1)
    assert "ms a ray in colour" in lines[-1]
    with pytest.raises(InputError, match="no multiple of 2"):
        list(vqnerf_costs.study(ours, ((9, 8),), rays=4, latents=4, repeats=1))


def test_variants_of_the_ablation_change_what_they_say():
    config = vqnerf_config.get_config("tiny")
    made = {name: vqnerf_variants._variant(config, name, 7) for name in vqnerf_variants.VARIANTS}
    assert made["continuous"].model.latent == "continuous"
    assert made["no_global"].loss.global_rays == 0
    assert made["neus"].loss.decoded_weight == 0 and made["neus"].model.full_resolution
    assert made["codes_16"].model.vqgan.num_codes == 16
    assert config.model.vqgan.num_codes == made["full"].model.vqgan.num_codes == 256
    assert all(one.num_steps == 7 for one in made.values())
    with pytest.raises(InputError, match="--variants=no_depth: choose of"):
        vqnerf_variants._variant(config, "no_depth", 7)
    config.data.source = "procedural"
    with pytest.raises(InputError, match="needs the true surface"):
        vqnerf_variants.study(config, 7)


@pytest.mark.thorough
def test_a_row_of_the_ablation_is_measured(monkeypatch):
    monkeypatch.setattr(vqnerf_variants, "_CELLS", 16)
    monkeypatch.setattr(vqnerf_variants, "_POINTS", 500)
    config = test_vqnerf.config()
    config.batch_size = 8
    config.data.update(source="procedural_object", height=24, width=24, views_per_scene=16)
    config.model.field.grids = (4, 8)
    lines = vqnerf_variants.study(config, 2, ["full"])
    row = [cell.strip() for cell in lines[-1].split("|")[1:-1]]
    assert row[0] == "full" and len(row) == len(vqnerf_variants.HEAD)
    assert 3 < float(row[1]) < 40 and 0 < float(row[4]) < 2000


def run(program, *args):
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / program), *args],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_the_whole_way(tmp_path):
    small = ["--config.num_steps=3", "--config.data.height=16", "--config.data.width=16"]
    small += ["--config.data.views_per_scene=9"]
    codes = ["--config=configs/vqgan.py:tiny", f"--workdir={tmp_path}/codes"]
    codes += ["--config.optim.warmup_steps=1", "--config.data.num_scenes=2"]
    codes += ["--config.loss.quantizer_start=1"]
    run("train.py", *codes, *small)
    file = tmp_path / "codes.npz"
    args = [f"--workdir={tmp_path}/codes", f"--out={tmp_path}/codes_report", f"--export={file}"]
    assert "psnr" in run("reconstruct.py", *args)
    found = json.loads((tmp_path / "codes_report" / "metrics.json").read_text())
    assert 0 < found["usage"] <= 1 and found["images"] == 4
    field = ["--config=configs/vqnerf.py:tiny,pretrained", f"--workdir={tmp_path}/field"]
    field += [f"--config.model.vqgan_weights={file}", "--config.optim.warmup_steps=1"]
    field += ["--config.loss.latent_crop=2", "--config.eval_every=3"]
    run("train.py", *field, *small)
    out = tmp_path / "mesh.ply"
    args = [f"--workdir={tmp_path}/field", f"--out={out}", f"--picture={tmp_path}/mesh.png"]
    run("mesh.py", *args, "--resolution=24")
    assert "chamfer" in run("surface_error.py", f"--mesh={out}", "--object=0", "--points=500")
    table = run("evaluate.py", f"--workdir={tmp_path}/field")
    assert "PSNR within the mask" in table
