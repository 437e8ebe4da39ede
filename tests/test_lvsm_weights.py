"""Published LVSM weights: names, sizes from shapes, strictness, the way back, the command."""

import jax
import numpy as np
import pytest
import safetensors.numpy
from absl.testing import flagsaver

from launch import trained
from lvsm_jax import LVSMEncoderDecoder, load_torch, task, to_torch
from nvs_common import errors, weights
from tests import small_lvsm, torch_files

PUBLISHED = {"decoder_only": small_lvsm.decoder_only, "encoder_decoder": small_lvsm.encoder_decoder}


def random_state(kind, **changes):
    """A module, its random variables, and these as a state_dict."""
    module = PUBLISHED[kind](**changes)
    variables = small_lvsm.variables(module)
    return module, variables, to_torch(module, variables)


def assert_same(got, wanted):
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("decoder_only", {}),
        ("decoder_only", {"layers": 12, "patch": 2, "mlp_ratio": 1.5, "head_size": 16}),
        ("decoder_only", {"layers": 1, "width": 24, "mlp_ratio": 1 / 3}),
        ("encoder_decoder", {}),
        ("encoder_decoder", {"encoder_layers": 1, "decoder_layers": 11, "latents": 1}),
    ],
)
def test_sizes_are_read_off_the_arrays_and_the_round_trip_is_exact(kind, changes):
    module, variables, state = random_state(kind, **changes)
    got, loaded = load_torch(state)
    assert got == module
    assert_same(loaded, variables)
    assert_same(to_torch(got, loaded), state)


def test_the_state_dict_has_the_published_names_and_shapes():
    _, _, state = random_state("encoder_decoder")
    assert len(state) == 4 + 2 + 8 * 5
    assert state["transformer_encoder.1.attn.to_qkv.weight"].shape == (48, 16)
    assert state["transformer_decoder.2.mlp.mlp.2.weight"].shape == (16, 32)
    assert state["n_light_field_latent"].shape == (5, 16)
    assert state["image_tokenizer.1.weight"].shape == (16, 4 * 4 * 9)
    assert "transformer_input_layernorm_decoder.weight" in state
    _, _, state = random_state("decoder_only")
    assert len(state) == 4 + 1 + 8 * 3 and "transformer_input_layernorm.weight" in state


def test_query_key_and_value_are_the_three_thirds_head_after_head():
    module, variables, state = random_state("decoder_only")
    fused = state["transformer_blocks.1.attn.to_qkv.weight"]
    params = variables["params"]["blocks"]
    d, f = module.width, module.head_size
    head = slice(f, 2 * f)  # the second head
    np.testing.assert_array_equal(fused[:d][head], params["query"]["kernel"][1][:, 1].T)
    for index, part in enumerate((fused[d : 2 * d], fused[2 * d :])):
        np.testing.assert_array_equal(part[head], params["key_value"]["kernel"][1][:, index, 1].T)


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".safetensors", ".npz"])
def test_every_file_gives_the_same(tmp_path, suffix):
    _, variables, state = random_state("encoder_decoder")
    file = tmp_path / f"a{suffix}"
    if suffix == ".npz":
        np.savez(file, **state)
    elif suffix == ".safetensors":
        safetensors.numpy.save_file(state, file)
    else:
        optimizer = {"state": {0: {"exp_avg": np.full((3,), np.nan, np.float32)}}}
        vgg = {"loss_computer.perceptual_loss_module.vgg.features.0.bias": np.ones(3, np.float32)}
        content = {"model": {f"module.{k}": x for k, x in (state | vgg).items()}}
        content |= {"optimizer": optimizer, "lr_scheduler": {"lr_lambdas": [None]}}
        torch_files.save(file, content | {"fwdbwd_pass_step": 7})
    module, loaded = load_torch(file)
    assert isinstance(module, LVSMEncoderDecoder)
    assert_same(loaded, variables)


def test_missing_and_unknown_arrays_are_listed():
    _, _, state = random_state("decoder_only")
    del state["transformer_blocks.1.attn.fc.weight"]
    state["extra.bias"] = np.ones(3, np.float32)
    with pytest.raises(errors.InputError) as caught:
        load_torch(state)
    assert "missing: transformer_blocks.1.attn.fc.weight;" in str(caught.value)
    assert "unknown: extra.bias" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"transformer_blocks.2.norm1.weight": np.ones(3)}, r"has shape \(3,\), expected \(16,\)"),
        (
            {"image_tokenizer.1.weight": np.ones((16, 96))},
            r"image_t.* expected \(16, 144\)",
        ),
        ({"image_token_decoder.1.weight": np.ones((50, 16))}, r"\(3 p p, d\)"),
        ({"image_token_decoder.1.weight": np.ones(48)}, "rank 2, found shape"),
        ({"transformer_blocks.0.attn.q_norm.weight": None}, "found no such array"),
        ({"transformer_blocks.0.attn.q_norm.weight": np.ones(5)}, "heads have 5 features"),
        ({"head.weight": np.array(["a"])}, "expected an array of floats"),
        ({"image_token_decoder.0.weight": np.full(16, np.nan)}, "not finite"),
        ({"module.image_token_decoder.0.weight": np.ones(16)}, "is there twice"),
        ({"transformer_blocks.99.norm1.weight": np.ones(16)}, r"missing: .* and 735 more; unknown"),
    ],
)
def test_arrays_that_do_not_fit_are_explained(changes, words):
    _, _, state = random_state("decoder_only")
    state = {name: x for name, x in (state | changes).items() if x is not None}
    with pytest.raises(errors.InputError, match=words):
        load_torch(state)


def test_a_model_that_the_published_code_cannot_run_is_not_written():
    for module in (
        small_lvsm.decoder_only(scale_residuals=True),
        small_lvsm.decoder_only(input_sees_target=False),
        small_lvsm.decoder_only(relative="gta"),
        small_lvsm.cross_attention(),
    ):
        with pytest.raises(errors.InputError, match="the published code"):
            to_torch(module, small_lvsm.variables(module))


@pytest.fixture
def convert(program):
    def call(**values):
        main = program("convert").main
        with flagsaver.flagsaver(model="lvsm", **{k: str(v) for k, v in values.items()}):
            return main([])

    return call


@pytest.mark.parametrize("kind", list(PUBLISHED))
def test_a_converted_file_is_loaded_as_weights_and_renders_the_same(
    convert, program, tmp_path, kind, capsys
):
    module, variables, state = random_state(kind)
    file = torch_files.save(tmp_path / "x.pt", {"model": state})
    assert convert(input=file, output=tmp_path / "out") == 0
    assert "CC BY-NC-SA 4.0" in capsys.readouterr().out
    written = tmp_path / "out" / "weights.npz"
    assert sorted(p.name for p in written.parent.iterdir()) == ["weights.md", "weights.npz"]
    assert "CC BY-NC-SA 4.0" in written.with_suffix(".md").read_text()
    source = program("render")._SOURCE
    with flagsaver.flagsaver(weights=str(written), set=["model.dtype=float32"]):
        model = trained.load(source)
    assert_same(model.variables, variables)
    assert model.training["converted from"] == "x.pt"
    context, targets = small_lvsm.views(1), small_lvsm.cameras((1, 1), height=8, width=8)
    config = model.config.copy_and_resolve_references()
    config.poses.normalize = "none"
    got = jax.jit(task.make(config).render)(model.variables, context, targets).images
    wanted = jax.jit(module.apply)(variables, context, targets)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-6)


def test_the_command_leaves_nothing_behind_and_overwrites_nothing(convert, tmp_path):
    _, _, state = random_state("decoder_only")
    del state["image_tokenizer.1.weight"]
    bad = torch_files.save(tmp_path / "bad.pt", {"model": state})
    with pytest.raises(errors.InputError, match="missing: image_tokenizer.1.weight"):
        convert(input=bad, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    _, _, state = random_state("decoder_only")
    good = torch_files.save(tmp_path / "good.pt", {"model": state})
    for settings, words in [
        ("configs/quark.py:tiny", "a config of quark"),
        ("configs/lvsm.py:scene_encoder_decoder_256", "another architecture"),
    ]:
        with pytest.raises(errors.InputError, match=words):
            convert(input=good, output=tmp_path / "out", settings=settings)
    assert not (tmp_path / "out").exists()
    convert(input=good, output=tmp_path / "out", settings="configs/lvsm.py:tiny")
    with pytest.raises(errors.InputError, match="already there"):
        convert(input=good, output=tmp_path / "out")
    with pytest.raises(errors.InputError, match="is a file"):
        convert(input=good, output=good)
    assert weights.read(tmp_path / "out" / "weights.npz").config.model.layers == 3
