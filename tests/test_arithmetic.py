"""Counted multiply-adds are those of the formula."""

import jax
import jax.numpy as jnp

from launch import arithmetic


def test_products_convolutions_and_loops_are_counted():
    a, b = jnp.ones((3, 4)), jnp.ones((4, 5))
    assert arithmetic.multiply_adds(jnp.matmul, a, b) == 3 * 4 * 5
    loop = lambda a, b: jax.lax.map(jax.checkpoint(lambda row: row @ b), a)  # noqa: E731
    assert arithmetic.multiply_adds(jax.jit(loop), a, b) == 3 * 4 * 5
    image, kernel = jnp.ones((2, 6, 7, 3)), jnp.ones((3, 3, 3, 8))

    def convolve(image, kernel):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=layout)

    assert arithmetic.multiply_adds(convolve, image, kernel) == 2 * 6 * 7 * 8 * 9 * 3


def test_what_the_result_does_not_need_is_not_counted():
    def both(a, b):
        unused = a @ b
        return [unused, 2 * a][1]

    assert arithmetic.multiply_adds(both, jnp.ones((3, 4)), jnp.ones((4, 5))) == 0
