"""Costs of implementations: tables with a row for each that runs here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch import kernel_costs


def test_a_table_has_what_runs_here():
    case = kernel_costs.nearest_code(vectors=50, codes=20, width=3)
    title, _, head, _, *rows, _ = kernel_costs.study(case, None, repeats=1)
    assert "50 vectors" in title and "CPU ms" in head
    assert [row.split(" | ")[:2] for row in rows] == [
        ["| reference", "forward"],
        ["| xla", "forward"],
    ]


def test_a_gradient_passes_by_what_is_no_number():
    form = kernel_costs.gradient(lambda x, which, y: (jnp.where(which, x, 0), y["b"]))
    args = jnp.arange(3.0), jnp.array([True, False, True]), {"b": jnp.ones(2)}
    moved = form(*args)
    np.testing.assert_array_equal(moved[0], [0, 0, 4])
    np.testing.assert_array_equal(moved[1], [2, 2])


@pytest.mark.parametrize("name", kernel_costs.CASES)
def test_arrays_are_as_large_as_is_planned_for(name):
    small = {
        "nearest_code": dict(vectors=50, codes=20, width=3),
        "one_to_many": dict(size=(8, 16), views=2, layers=2),
        "compositing": dict(size=(16, 24), views=2, layers=2),
        "epipolar": dict(views=2, side=4, channels=64),
    }
    case = kernel_costs.CASES[name](**small[name])
    arrays = jax.eval_shape(case.make)
    assert jax.tree.map(jnp.shape, arrays) == jax.tree.map(jnp.shape, case.shapes)
    first, second = (jax.eval_shape(f, *arrays) for f in list(case.forms.values())[:2])
    assert jax.tree.leaves(first) == jax.tree.leaves(second)


def test_samples_one_view_after_the_other_are_all_samples_at_once():
    case = kernel_costs.epipolar_attention(views=2, side=4, channels=64)
    arrays = case.make()
    stored, running = (jax.jit(form)(*arrays) for form in case.forms.values())
    np.testing.assert_allclose(stored, running, atol=1e-4)
    assert np.any(stored)
