"""A signed distance field with colours and features, rendered along rays.

NeuS (arXiv 2106.10689) by default, VolSDF (arXiv 2106.12052) by choice. What is of interest lies
in the unit sphere; beyond it there may be a NeRF++ background. One field renders colours and the
features that a decoder takes (VQ-NeRF, arXiv 2310.14487: parameter-shared rendering at two scales).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nvs_common.errors import InputError
from nvs_common.types import Array
from vqnerf_jax import grids, networks, volume
from vqnerf_jax.ray_render import RayRender, Samples

CHOICES = {
    "renderer": ("neus", "volsdf"),
    "color_inputs": ("idr", "no_view_dir", "no_normal"),
    "color_space": ("rgb", "bgr256"),
}
# Published training reads images as BGR bytes divided by 256.
BYTE_SCALE = 256 / 255
# The eikonal loss looks at points up to this far from the centre.
EIKONAL_RADIUS = 1.2


class SDFField(nn.Module):
    """Signed distances, colours, features and background, and how they are rendered.

    Attributes:
      layers, hidden: of the distance's network.
      features: f, from the distance's network to the colour's.
      octaves: of the points' encoding.
      skips: layers of the distance's network that see the encoding again.
      grids: resolutions of grids of features beside that encoding, see `grids`; none in NeuS.
      grid_channels: of each.
      radius: of the sphere that the field is at first.
      scale: factor on points; distances are divided by it.
      weight_norm: whether the layers of distance and colour have one.
      color_layers, color_hidden: of the trunk that colours and latents share.
      color_octaves: of the directions' encoding.
      color_inputs: "idr" for point, direction, gradient and feature; or one of them less.
      color_space: of what the network gives: "rgb", or "bgr256" for published checkpoints, whose
        images were BGR bytes over 256. What is rendered is RGB of bytes over 255.
      rgb_layers: layers from the trunk to colours; 1 in NeuS.
      latent_channels: d of the latents, 0 for none.
      renderer: "neus" or "volsdf".
      deviation: initial -log(deviation) / 10 of NeuS's density.
      beta: initial scale of VolSDF's.
      samples: first samples of a ray.
      importance: samples that are added near the surface.
      rounds: in how many rounds.
      tolerance: of opacity in VolSDF's sampling.
      outside: samples of the background, 0 for none.
      background_layers, background_hidden, background_octaves, background_view_octaves,
        background_skips: of its network.
      precision: of products of matrices, see `jax.lax.Precision`.
    """

    layers: int = 8
    hidden: int = 256
    features: int = 256
    octaves: int = 6
    skips: tuple[int, ...] = (4,)
    grids: tuple[int, ...] = ()
    grid_channels: int = 4
    radius: float = 0.5
    scale: float = 1.0
    weight_norm: bool = True
    color_layers: int = 4
    color_hidden: int = 256
    color_octaves: int = 4
    color_inputs: str = "idr"
    color_space: str = "rgb"
    rgb_layers: int = 1
    latent_channels: int = 0
    renderer: str = "neus"
    deviation: float = 0.3
    beta: float = 0.1
    samples: int = 64
    importance: int = 64
    rounds: int = 4
    tolerance: float = 0.1
    outside: int = 0
    background_layers: int = 8
    background_hidden: int = 256
    background_octaves: int = 10
    background_view_octaves: int = 4
    background_skips: tuple[int, ...] = (4,)
    precision: str = "highest"

    def setup(self):
        self._check()
        self.sdf_params = self.param(
            "sdf",
            networks.init_distance,
            self.layers,
            self.hidden,
            self.features,
            networks.encoded_width(3, self.octaves) + len(self.grids) * self.grid_channels,
            self.skips,
            self.radius,
            self.weight_norm,
        )
        self.grid_params = {}
        if self.grids:
            self.grid_params = self.param("grids", grids.init, self.grids, self.grid_channels)
        widths = [self._color_width(), *[self.color_hidden] * self.color_layers]
        self.color_params = self._layers("color", widths)
        last = widths[-1]
        self.rgb_params = self._layers("rgb", [last] * self.rgb_layers + [3])
        if self.latent_channels:
            self.latent_params = self._layers("latent", [last, self.latent_channels])
        if self.outside:
            self.background_params = self.param(
                "background",
                networks.init_background,
                self.background_layers,
                self.background_hidden,
                self.background_octaves,
                self.background_view_octaves,
                self.background_skips,
            )
        initial, name = (self.deviation, "deviation")
        if self.renderer == "volsdf":
            initial, name = (self.beta, "beta")
        self.spread = self.param(name, nn.initializers.constant(initial), ())

    def __call__(self, origins: Array, directions: Array) -> RayRender:
        """Renders rays [r, 3] between the ends that `volume.near_far` gives them."""
        return self.render(origins, directions, *volume.near_far(origins, directions))

    def sdf(self, points: Array) -> Array:
        """Signed distances [...] of points [..., 3], negative inside."""
        return self._sdf(self._shape(), points)

    def sdf_and_features(self, points: Array) -> tuple[Array, Array]:
        """Signed distances [...] and features [..., f] of points [..., 3]."""
        both = self._distance(self._shape(), points)
        return both[..., 0], both[..., 1:]

    def gradients(self, points: Array) -> Array:
        """Gradients [..., 3] of the distance at points [..., 3]."""
        return self._geometry(points)[1]

    def colors(self, points: Array, directions: Array, gradients: Array, features: Array) -> Array:
        """RGB [..., 3] of points seen from directions [..., 3]; features as above."""
        return self._head("rgb", self._color_trunk(points, directions, gradients, features))

    def inverse_deviation(self) -> Array:
        """NeuS's sharpness [], the inverse deviation of its density."""
        return jnp.clip(jnp.exp(10 * self.spread), 1e-6, 1e6)

    def width(self) -> Array:
        """VolSDF's beta []."""
        return jnp.abs(self.spread) + volume.MIN_BETA

    def render(
        self,
        origins: Array,
        directions: Array,
        near: Array,
        far: Array,
        *,
        cosine_ratio: Array | float = 1.0,
        background: Array | None = None,
        jitter: Array | None = None,
    ) -> RayRender:
        """Renders rays.

        Args:
          origins: [r, 3] in the frame of the unit sphere.
          directions: [r, 3] of length one.
          near: [r] where samples start.
          far: [r] where they end and the background starts.
          cosine_ratio: [] see `volume.neus_alphas`.
          background: [3] colour behind everything, in place of black.
          jitter: [r, 1 + outside] in [0, 1), moves samples; see `volume`.
        """
        first, behind = (None, None) if jitter is None else (jitter[:, 0], jitter[:, 1:])
        t = volume.stratify(near, far, self.samples, first)
        beyond = None
        if self.outside:
            beyond = volume.background_depths(far, self.outside, self.samples, behind)
        t = self.refine(origins, directions, t)
        return self._shade(origins, directions, t, far, beyond, cosine_ratio, background)

    def refine(self, origins: Array, directions: Array, t: Array) -> Array:
        """Sorted distances [r, s + n]: those given and more near the surface, without gradient."""
        if not self.importance:
            return t
        params, spread = jax.lax.stop_gradient((self._shape(), self.spread))
        sdf = self._sdf(params, volume.points(origins, directions, t))
        count = self.importance // self.rounds
        widest = jnp.zeros(())
        if self.renderer == "volsdf":
            # The widest beta that bounds the error of the first samples (VolSDF, Lemma 1).
            spread = jnp.abs(spread) + volume.MIN_BETA
            total = jnp.sum(jnp.square(t[:, 1:] - t[:, :-1]), axis=-1)
            widest = jnp.sqrt(total / (4 * jnp.log1p(self.tolerance)))
        for i in range(self.rounds):
            if self.renderer == "neus":
                new = volume.neus_new_depths(origins, directions, t, sdf, count, 64.0 * 2**i)
            else:
                last = i == self.rounds - 1
                widest = volume.volsdf_beta(t, sdf, spread, widest, self.tolerance)
                new = _volsdf_new_depths(t, sdf, widest, count, last)
            new_sdf = self._sdf(params, volume.points(origins, directions, new))
            t, sdf = jax.lax.sort(
                (jnp.concatenate([t, new], -1), jnp.concatenate([sdf, new_sdf], -1)), num_keys=1
            )
        return jax.lax.stop_gradient(t)

    def _shade(
        self,
        origins: Array,
        directions: Array,
        t: Array,
        far: Array,
        beyond: Array | None,
        cosine_ratio: Array | float,
        background: Array | None,
    ) -> RayRender:
        """What is seen at sections that start at t [r, s], and at those beyond [r, n]."""
        lengths, middles = volume.sections(t, 2 / self.samples)
        points = volume.points(origins, directions, middles)
        sdf, gradients, features = self._geometry(points)
        alphas, cumulative = self._alphas(sdf, gradients, directions, lengths, cosine_ratio)
        distance = jnp.linalg.norm(jax.lax.stop_gradient(points), axis=-1)
        inside = (distance < 1).astype(sdf.dtype)
        along = jnp.broadcast_to(directions[:, None], points.shape)
        hidden = self._color_trunk(points, along, gradients, features)
        colors = self._head("rgb", hidden)
        if beyond is not None:
            seen = self._background(origins, directions, t, beyond)
            alphas, colors = _outside_of_the_sphere(alphas, colors, inside, *seen)
        weights = volume.seen(alphas)
        opacity, color = jnp.sum(weights, -1), jnp.sum(colors * weights[..., None], axis=1)
        if background is not None:
            color = color + background[None] * (1 - opacity)[:, None]
        own = weights[:, : t.shape[1]]
        latents = None
        if self.latent_channels:
            latents = jnp.sum(self._head("latent", hidden) * own[..., None], axis=1)
        normals = jnp.sum(gradients * (own * inside)[..., None], axis=1)
        depth = jnp.sum(own * middles, axis=1) + (1 - jnp.sum(own, axis=1)) * far
        eikonal, count = volume.eikonal(gradients, distance < EIKONAL_RADIUS)
        samples = Samples(t, middles, lengths, sdf, gradients, cumulative, inside, weights)
        return RayRender(color, latents, opacity, depth, normals, eikonal, count, samples)

    def _head(self, name: str, hidden: Array) -> Array:
        """RGB or latents from the trunk."""
        if name == "latent":
            return networks.relu_layers(self.latent_params, hidden, self.precision, last=False)
        logits = networks.relu_layers(self.rgb_params, hidden, self.precision, last=False)
        return self._to_rgb(logits)

    def _check(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise InputError(f"field: {name}={getattr(self, name)!r}; choose from {choices}.")
        if self.importance % self.rounds:
            raise InputError(
                f"field: importance={self.importance} samples cannot be added in "
                f"rounds={self.rounds} of equal size; make it a multiple."
            )
        if self.outside and self.latent_channels:
            raise InputError(
                "field: the background renders no latents; set outside=0 or latent_channels=0."
            )

    def _layers(self, name: str, widths: list[int]) -> networks.Params:
        return self.param(name, networks.init_layers, widths, self.weight_norm)

    def _color_width(self) -> int:
        views = (
            0
            if self.color_inputs == "no_view_dir"
            else networks.encoded_width(3, self.color_octaves)
        )
        normals = 0 if self.color_inputs == "no_normal" else 3
        return 3 + views + normals + self.features

    def _shape(self) -> tuple[networks.Params, Mapping[str, Array]]:
        """What the distance depends on: its network and its grids."""
        return self.sdf_params, self.grid_params

    def _distance(self, params: Any, points: Array) -> Array:
        network, features = params
        return networks.distance(
            network,
            points,
            features=features,
            octaves=self.octaves,
            skips=self.skips,
            scale=self.scale,
            precision=self.precision,
        )

    def _sdf(self, params: Any, points: Array) -> Array:
        return self._distance(params, points)[..., 0]

    def _geometry(self, points: Array) -> tuple[Array, Array, Array]:
        """Distances [...], their gradients [..., 3] and features [..., f], of one forward pass."""
        params = self._shape()

        def of(points: Array) -> tuple[Array, Array]:
            both = self._distance(params, points)
            return both[..., 0], both[..., 1:]

        sdf, pull, features = jax.vjp(of, points, has_aux=True)
        return sdf, pull(jnp.ones_like(sdf))[0], features

    def _color_trunk(
        self, points: Array, directions: Array, gradients: Array, features: Array
    ) -> Array:
        parts = [points]
        if self.color_inputs != "no_view_dir":
            parts.append(networks.encode(directions, self.color_octaves))
        if self.color_inputs != "no_normal":
            parts.append(gradients)
        x = jnp.concatenate([*parts, features], axis=-1)
        return networks.relu_layers(self.color_params, x, self.precision, last=True)

    def _to_rgb(self, logits: Array) -> Array:
        colors = jax.nn.sigmoid(logits)
        return colors if self.color_space == "rgb" else colors[..., ::-1] * BYTE_SCALE

    def _alphas(
        self,
        sdf: Array,
        gradients: Array,
        directions: Array,
        lengths: Array,
        cosine_ratio: Array | float,
    ) -> tuple[Array, Array]:
        if self.renderer == "volsdf":
            return volume.volsdf_alphas(sdf, lengths, self.width()), jnp.zeros_like(sdf)
        ratio = jnp.asarray(cosine_ratio, sdf.dtype)
        sharpness = self.inverse_deviation()
        return volume.neus_alphas(sdf, gradients, directions, lengths, sharpness, ratio)

    def _background(
        self, origins: Array, directions: Array, t: Array, beyond: Array
    ) -> tuple[Array, Array]:
        """Opacities [r, s + n] and colours [r, s + n, 3] of the background's network."""
        t = jnp.sort(jnp.concatenate([t, beyond], axis=-1), axis=-1)
        lengths, middles = volume.sections(t, 2 / self.samples)
        points = volume.points(origins, directions, middles)
        radius = jnp.clip(jnp.linalg.norm(points, axis=-1, keepdims=True), 1, 1e10)
        density, logits = networks.background(
            self.background_params,
            jnp.concatenate([points / radius, 1 / radius], axis=-1),
            jnp.broadcast_to(directions[:, None], points.shape),
            octaves=self.background_octaves,
            view_octaves=self.background_view_octaves,
            skips=self.background_skips,
            precision=self.precision,
        )
        return -jnp.expm1(-jax.nn.softplus(density) * lengths), self._to_rgb(logits)


def _outside_of_the_sphere(
    alphas: Array, colors: Array, inside: Array, behind: Array, behind_colors: Array
) -> tuple[Array, Array]:
    """Replaces opacities [r, s] and colours outside of the sphere, and appends those beyond."""
    s, split = inside.shape[1], inside[..., None]
    alphas = alphas * inside + behind[:, :s] * (1 - inside)
    colors = colors * split + behind_colors[:, :s] * (1 - split)
    alphas = jnp.concatenate([alphas, behind[:, s:]], axis=-1)
    return alphas, jnp.concatenate([colors, behind_colors[:, s:]], axis=1)


def _volsdf_new_depths(t: Array, sdf: Array, beta: Array, count: int, last: bool) -> Array:
    """Where the error of opacity is large; in the last round where there is something to see."""
    lengths = t[:, 1:] - t[:, :-1]
    if last:
        alphas = volume.volsdf_alphas(sdf[:, :-1], lengths, beta[:, None])
        return volume.sample_inverse(t, volume.seen(alphas), count)
    return volume.sample_inverse(t, volume.volsdf_error(t, sdf, beta), count)


PARAM_AXES = {
    r"(deviation|beta)": (),
    r"grids/level_\d+": (None, None, None, None),
    r"(sdf|color|rgb|latent|background)/.*/(bias|scale)": (None,),
    r"(sdf|color|rgb|latent|background)/.*/kernel": (None, None),
}
