"""Quark: inputs to a layered depth map by render and refine, and the map to a picture.

Follows arXiv 2411.16680 (Sec. 3, Tab. 8 and 9). What the paper leaves open is an attribute of
`Quark` with its default; see the README for the list.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange, repeat

from nvs_common import cameras, layers
from nvs_common.errors import InputError
from nvs_common.types import Array, Cameras, Render, Views
from quark_jax import drawing, encoder, fusion, kernels, ldm, one_to_many
from quark_jax import prior as sweep_prior
from quark_jax import stages as schedule
from quark_jax.stages import PAPER_STAGES, Fused, Stage


class Quark(nn.Module):
    """Quark, from context views and target cameras to rendered targets.

    Attributes:
      grid_area: elements of a layer of the finest volume, whatever the output's size.
      upsampling: not 0: the grid is the output's size divided by this, whatever its area.
      layers: layers of the finest volume; earlier ones have twice as many per collapse.
      channels: features of the volume and the pyramid.
      stages: initialisation and update-and-fuse steps.
      encoder_blocks: residual blocks of each pyramid level (not published).
      update_blocks: residual blocks of the update network (not published).
      appearance_channels: channels rendered to the inputs (not published, more than 3).
      octaves: octaves of the ray encoding.
      density_bias: initial logit of the density (not published).
      folded_attention: Eq. 8; False is the standard form.
      ray_encoding, render_and_refine, cross_attention: False is the paper's ablation.
      output: "blend" weighs input pixels; "rgb" is the ablation that decodes colours.
      mask_invalid: views that do not see an element take no part (not published).
      normalize_splat: see `ldm.splat_to_view`.
      opaque_background: make the farthest layer opaque (not published).
      unseen: colour of what no input sees, "black" or the inputs' nearest "edge" (not published).
      query_scale: initial scale of the attention's queries; small ones start as a mean over the
        views (not published).
      sweep_planes: planes of a sweep that the network starts from, a multiple of its layers, see
        `prior`; 0 is the paper.
      stream: never hold what belongs to all views and layers at once: features are gathered a
        layer at a time, anew in every attention, and colours a layer and view at a time; the
        backward pass computes them again. The same result in less memory.
      dtype: compute type of the network; geometry and compositing are float32.
      implementation: of attention and drawing where the model streams, see `kernels`.
    """

    grid_area: int = 288 * 512
    upsampling: float = 0.0
    layers: int = 6
    channels: int = 32
    stages: tuple[Stage, ...] = PAPER_STAGES
    encoder_blocks: tuple[int, ...] = (2, 2, 2, 2)
    update_blocks: int = 2
    appearance_channels: int = 16
    octaves: int = 8
    density_bias: float = -2.0
    folded_attention: bool = True
    ray_encoding: bool = True
    render_and_refine: bool = True
    cross_attention: bool = True
    output: str = "blend"
    mask_invalid: bool = True
    normalize_splat: bool = False
    opaque_background: bool = False
    unseen: Literal["black", "edge"] = "black"
    query_scale: float = 0.1
    sweep_planes: int = 0
    stream: bool = False
    dtype: Any = jnp.float32
    implementation: str | None = None

    def setup(self):
        self._check_settings()
        branches = sum(stage.blocks * (1 + stage.convs) for stage in self.stages)
        scale = branches**-0.5
        self.encoder = encoder.Encoder(self.channels, self.encoder_blocks, self.dtype)
        levels = {stage.level for stage in self.stages}
        self.ray_projections = {
            str(level): nn.Dense(self.channels, dtype=self.dtype) for level in sorted(levels)
        }
        self.seed = self.param("seed", nn.initializers.normal(1.0), (self.channels,), jnp.float32)
        self.updates = [
            fusion.UpdateNetwork(self.channels, self.update_blocks, self.dtype) for _ in self.stages
        ]
        attention = (self.folded_attention, not self.cross_attention, scale, self.query_scale)
        options = (*attention, self.dtype, self.implementation)
        self.fused = [Fused(stage, *options) for stage in self.stages]
        self.collapses = {
            str(index): fusion.LayerCollapse(scale, self.dtype)
            for index, stage in enumerate(self.stages)
            if stage.collapse
        }
        self.decoders = [
            fusion.Decode(self.appearance_channels, self.density_bias) for _ in self.stages[1:]
        ]
        self.final_decoder = fusion.Decode(0, self.density_bias)
        if self.sweep_planes:
            self.blend_prior = fusion.BlendPrior()
            self.priors = [nn.Dense(self.channels, dtype=self.dtype) for _ in self.stages]
        if self.output == "rgb":
            self.color = nn.Dense(3)
        else:
            self.blend_query = nn.Dense(self.channels, use_bias=False, dtype=self.dtype)
            self.blend_norm = layers.RMSNorm(dtype=self.dtype)

    def _check_settings(self) -> None:
        for name, allowed in (("output", ("blend", "rgb")), ("unseen", ("black", "edge"))):
            if getattr(self, name) not in allowed:
                raise InputError(f"{name}={getattr(self, name)!r}: choose from {allowed}.")
        for name in ("layers", "channels") + (() if self.upsampling else ("grid_area",)):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}: expected 1 or more.")
        schedule.check_stages(self.stages, len(self.encoder_blocks))

    def __call__(self, context: Views, targets: Cameras) -> Render:
        """Renders targets [b, t] from context [b, v]; images are [b, t, h, w, 3].

        Raises:
          InputError: settings, views or cameras that do not fit together.
        """
        return self.render(context, self.encode(context), targets)

    def encode(self, context: Views) -> list[Array]:
        """Encodes the inputs once, for any number of targets: levels [b, v, y, x, c]."""
        cameras.check_context(context)
        height, width = context.images.shape[-3:-1]
        size = self._grid(height, width)

        def encode(network: encoder.Encoder, images: Array) -> list[Array]:
            return network(ldm.resize(images.astype(jnp.float32), *size))

        return self._over_views(encode, self.encoder, context.images)

    def render(self, context: Views, features: list[Array], targets: Cameras) -> Render:
        """Renders targets [b, t] from context [b, v] and its `encode`d features."""
        return self._solve_and_draw(context, features, targets)[0]

    def render_stages(
        self, context: Views, targets: Cameras, window: ldm.Window | None = None
    ) -> tuple[Render, list[ldm.Logits]]:
        """Renders targets, or windows of them, and returns the map after every stage, for losses.

        Args:
          context: [b, v].
          targets: [b, t].
          window: what to draw of each target, corners [b, t]; maps [(b t), l, y, x] are of all.
        """
        return self._solve_and_draw(context, self.encode(context), targets, window)

    def _solve_and_draw(
        self,
        context: Views,
        features: list[Array],
        targets: Cameras,
        window: ldm.Window | None = None,
    ) -> tuple[Render, list[ldm.Logits]]:
        cameras.check_targets(targets, cameras.check_context(context))
        count = targets.near.shape[1]
        context = Views(context.images, cameras.as_float32(context.cameras))
        targets = cameras.as_float32(targets)
        if self.stream and count > 1:
            return self._one_after_another(context, features, targets, window)
        views = jax.tree.map(lambda x: repeat(x, "b ... -> (b t) ...", t=count), context.cameras)
        flat = jax.tree.map(lambda x: rearrange(x, "b t ... -> (b t) ..."), targets)
        sweep = None
        if self.sweep_planes:
            size = self._grid(targets.height, targets.width)
            sweep = sweep_prior.Sweep(context, targets, size, self.sweep_planes)
        stages = self.solve(views, features, flat, sweep)
        unflatten = lambda x: rearrange(x, "(b t) ... -> b t ...", t=count)  # noqa: E731
        maps = jax.tree.map(unflatten, stages[-1])
        return self._draw(maps, context, targets, window), stages

    def _one_after_another(
        self,
        context: Views,
        features: list[Array],
        targets: Cameras,
        window: ldm.Window | None,
    ) -> tuple[Render, list[ldm.Logits]]:
        """Renders targets [b, t] in the memory of one of each scene."""

        def one(model: Quark, carry: None, xs: Any) -> tuple[None, Any]:
            target, corner = jax.tree.map(lambda x: x[:, None], xs)
            part = drawing.window_at(corner, window)
            rendered, stages = model._solve_and_draw(context, features, target, part)
            return carry, (jax.tree.map(lambda x: x[:, 0], rendered), stages)

        rendered, stages = _scan(one, self, (targets, drawing.corners(window)))
        return rendered, jax.tree.map(lambda x: rearrange(x, "b t ... -> (b t) ..."), stages)

    def _draw(
        self, maps: ldm.Logits, context: Views, targets: Cameras, window: ldm.Window | None
    ) -> Render:
        """Draws maps [b, t] of targets [b, t] from the images of context [b, v]."""
        draw = ldm.upsample_activate
        if self.stream:
            draw = functools.partial(kernels.draw, implementation=self.implementation)

        def one(logits: ldm.Logits, target: Cameras, corner: Any, views: Views) -> Render:
            return draw(
                logits,
                target,
                views,
                opaque_background=self.opaque_background,
                unseen=self.unseen,
                mask_invalid=self.mask_invalid,
                window=drawing.window_at(corner, window),
            )

        # Targets of a scene share its images: they are not repeated.
        over_targets = jax.vmap(one, in_axes=(0, 0, 0, None))
        return jax.vmap(over_targets)(maps, targets, drawing.corners(window), context)

    def solve(
        self,
        views: Cameras,
        features: list[Array],
        targets: Cameras,
        sweep: sweep_prior.Sweep | None = None,
    ) -> list[ldm.Logits]:
        """Solves one layered depth map for each target.

        Args:
          views: [n, v] input cameras of each target.
          features: pyramid levels [b, v, y, x, c]; n is a multiple of b, targets of one scene
            side by side.
          targets: [n].

        Returns:
          The map with leading [n] after every stage, the last on the finest grid; only the last
          has blend logits.
        """
        repeats = targets.near.shape[0] // features[0].shape[0]
        finest = self._grid(targets.height, targets.width)
        rays = self._ray_features(views, targets, features[-1].shape[-3:-1])
        stages: list[ldm.Logits] = []
        volume = self._seed_volume(
            len(targets.near), tuple(n >> self.stages[0].level for n in finest)
        )
        depth_logits, seen = jnp.zeros(volume.shape[:-1]), None
        delta, valid = jnp.zeros(()), jnp.ones(())  # of the last stage, when the loop has ended
        for index, stage in enumerate(self.stages):
            grid = tuple(side >> stage.level for side in finest)
            level = repeat(features[stage.level], "b v ... -> (b t) v ...", t=repeats)
            ray = rays[str(stage.level)] if self.ray_encoding else None
            if index > 0:
                if stage.collapse:
                    volume = self.collapses[str(index)](volume)
                decode = self.decoders[index - 1]
                size = features[self.stages[index - 1].level].shape[-3:-1]
                decoded = decode(volume, sweep_prior.read(sweep, volume))
                stages.append(ldm.Logits(decoded["depth"], decoded["density"]))
                seen = self._render_to_views(decoded, views, targets, size)
                volume = ldm.resize(volume, *grid)
                depth_logits = decode(volume, sweep_prior.read(sweep, volume))["depth"]
            if sweep is not None:
                volume = volume + self.priors[index](sweep.features(volume).astype(self.dtype))
            update = self._over_views(
                fusion.update_features, self.updates[index], (seen, level, ray)
            )
            delta, valid = self._back_project(update, depth_logits, views, targets)
            volume = self.fused[index](volume, delta, valid)
        return [*stages, self._logits(volume, delta, valid, sweep)]

    def _over_views(self, function: Callable[[Any, Any], Any], network: nn.Module, xs: Any) -> Any:
        """function(network, xs) of arrays [n, v, ...]; view by view where the model streams."""
        if not self.stream:
            return function(network, xs)

        def view(network: nn.Module, carry: None, x: Any) -> tuple[None, Any]:
            return carry, function(network, x)

        # The backward pass computes a view again: nothing of all views is kept for it.
        return _scan(nn.remat(view, prevent_cse=False), network, xs)

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the finest volume for an image's size."""
        area = height * width / self.upsampling**2 if self.upsampling else self.grid_area
        return ldm.grid_size(height, width, area, 2 ** (len(self.encoder_blocks) - 1))

    def _seed_volume(self, num_targets: int, grid: tuple[int, ...]) -> Array:
        num_layers = self.layers * 2 ** sum(stage.collapse for stage in self.stages)
        shape = (num_targets, num_layers, *grid, self.channels)
        return jnp.broadcast_to(self.seed.reshape(1, 1, 1, 1, -1), shape).astype(self.dtype)

    def _ray_features(
        self, views: Cameras, targets: Cameras, coarsest: tuple[int, ...]
    ) -> dict[str, Array]:
        """Ray encodings [n, v, y, x, c] of each level, on the coarsest level's grid."""
        if not self.ray_encoding:
            return {}
        small = cameras.resize(views, *coarsest)
        over_views = jax.vmap(ldm.ray_difference, in_axes=(0, None))
        difference = jax.vmap(over_views)(small, targets)
        waves = encoder.sinusoids(difference, self.octaves)
        return {level: dense(waves) for level, dense in self.ray_projections.items()}

    def _render_to_views(
        self,
        decoded: dict[str, Array],
        views: Cameras,
        targets: Cameras,
        size: tuple[int, ...],
    ) -> Array:
        """What the current map looks like from each input, [n, v, *size, appearance]."""
        appearance, density = decoded["appearance"], nn.sigmoid(decoded["density"])
        grid_targets = cameras.resize(targets, *density.shape[2:4])
        if not self.render_and_refine:
            shape = (*views.near.shape, *size, self.appearance_channels)
            return jnp.zeros(shape, appearance.dtype)

        def one(appearance, density, depth_logits, target, view):
            depth = ldm.depths(depth_logits, target.near, target.far)
            uv = ldm.project(depth, target, view).uv
            return ldm.splat_to_view(appearance, density, uv, *size, normalize=self.normalize_splat)

        shared = (appearance, density, decoded["depth"], grid_targets)
        if self.stream:
            by_view = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), views)
            view = jax.checkpoint(lambda cams: jax.vmap(one)(*shared, cams))
            return jnp.moveaxis(jax.lax.map(view, by_view), 0, 1)
        over_views = jax.vmap(one, in_axes=(None, None, None, None, 0))
        return jax.vmap(over_views)(*shared, views)

    def _back_project(
        self, update: Array, depth_logits: Array, views: Cameras, targets: Cameras
    ) -> tuple[Array | one_to_many.Unstored, Array]:
        """Update features of each view in the map: [v, n, l, y, x, c] and who sees it."""
        grid_targets = cameras.resize(targets, *depth_logits.shape[2:4])
        depth = jax.vmap(ldm.depths)(depth_logits, targets.near, targets.far)

        def view(per_view: tuple[Array, Cameras]) -> tuple[Array, Array]:
            features, cams = per_view
            projection = jax.vmap(ldm.project)(depth, grid_targets, cams)
            if self.stream:
                return projection.uv, projection.valid
            return jax.vmap(ldm.back_project)(features, projection.uv), projection.valid

        # A loop, not a batch: one view's positions and corners exist at a time, and the result
        # is stored once instead of being fused into, and recomputed by, each attention.
        by_view = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (update, views))
        delta, valid = jax.lax.map(jax.checkpoint(view), by_view)
        if self.stream:
            delta = one_to_many.Unstored(by_view[0], delta)
        return delta, valid if self.mask_invalid else jnp.ones_like(valid)

    def _logits(
        self,
        volume: Array,
        delta: Array | one_to_many.Unstored,
        valid: Array,
        sweep: sweep_prior.Sweep | None,
    ) -> ldm.Logits:
        """Reads the finished map off the volume (Sec. 3.2.3)."""
        decoded = self.final_decoder(volume, sweep_prior.read(sweep, volume))
        color = self.color(volume.astype(jnp.float32)) if self.output == "rgb" else None
        blend = None
        if color is None:
            query = self.blend_query(self.blend_norm(volume))
            blend = one_to_many.over_delta(one_to_many.agreement, query, delta, valid)
            blend = jnp.moveaxis(blend, -1, 1) * self.channels**-0.5
            if sweep is not None:
                blend = blend + self.blend_prior(sweep.cues(decoded["depth"], decoded["density"]))
        return ldm.Logits(decoded["depth"], decoded["density"], blend, color)


def _scan(step: Callable[..., Any], network: nn.Module, xs: Any) -> Any:
    """step(network, None, x) over axis 1 of arrays [n, v, ...], with the same parameters."""
    loop = nn.scan(
        step, variable_broadcast="params", split_rngs={"params": False}, in_axes=1, out_axes=1
    )
    return loop(network, None, xs)[1]


# About a million parameters: every device holds all of them and the batch is what is sharded.
PARAM_AXES = {
    r"seed": (None,),
    r".*/(scale|bias)": (None,),
    r"fused_\d/attention\d/(query|key|value|output)/kernel": (None, None, None),
    r".*(stem|conv_in|conv_out)/kernel": (None, None, None, None),
    r".*(head|dense_in|dense_out|depth|density|appearance)/kernel": (None, None),
    # Of `blend_query` and `color` a model has one; the ray encoding may be left out with either.
    # So may the prior's.
    r"(blend_query|color|(ray_projections|priors)_\d)/kernel": (None, None),
}
