"""Writes an evaluation down: report.html that stands by itself, metrics.json, a text table.

The page holds its pictures and styles and refers to nothing outside; every string that comes
from data is escaped.
"""

from __future__ import annotations

import base64
import html
import io
import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from nvs_common import outputs
from nvs_common.evaluate import METHODS, MODEL, Panel, Protocol, Result, SceneResult

# Scenes whose pictures are shown, the worst first; the tables hold all scenes.
MAX_SHOWN = 24
# Pictures up to this many pixels are PNG, larger ones JPEG: a page stays small enough to mail.
_PNG_PIXELS = 128 * 256

_DIGITS = {"psnr": 2, "ssim_gaussian": 4, "ssim_sample": 4, "lpips": 4, "psnr_masked": 2}
_LABELS = {
    "psnr": "PSNR (dB) ↑",
    "ssim_gaussian": "SSIM gaussian ↑",
    "ssim_sample": "SSIM sample ↑",
    "lpips": "LPIPS ↓",
    "psnr_masked": "PSNR within the mask (dB) ↑",
}


class About(NamedTuple):
    """What was evaluated, for the head of the page.

    Attributes:
      title: of the page.
      facts: name -> value; run, checkpoint, command, software.
      config: the run's config as JSON values.
    """

    title: str
    facts: Mapping[str, Any]
    config: Mapping[str, Any]


def write(result: Result, about: About, folder: str | os.PathLike[str]) -> pathlib.Path:
    """Writes report.html and metrics.json into a folder, each all at once.

    Returns:
      The path of report.html.
    """
    folder = pathlib.Path(folder)
    outputs.write_json(folder / "metrics.json", to_json(result, about))
    outputs.write_text(folder / "report.html", page(result, about))
    return folder / "report.html"


def text_table(result: Result) -> str:
    """The mean of every method as a table for the terminal, the model first."""
    names = shown_metrics(result)
    rows = [["method", *(_LABELS[name] for name in names)]]
    rows += [[m, *(_format(name, result.mean(m, name)) for name in names)] for m in METHODS]
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells))
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


def shown_metrics(result: Result) -> list[str]:
    """Metrics of the tables: PSNR, the protocol's SSIM flavour, LPIPS where it was computed."""
    chosen = f"ssim_{result.protocol.ssim}"
    return [n for n in result.metrics if not n.startswith("ssim_") or n == chosen]


def to_json(result: Result, about: About) -> dict[str, Any]:
    """All numbers as JSON values: means, and every view of every scene with its inputs."""
    return {
        "title": about.title,
        "facts": {key: str(value) for key, value in about.facts.items()},
        "protocol": _protocol(result.protocol),
        "mean": {m: {n: result.mean(m, n) for n in result.metrics} for m in METHODS},
        "scenes": [
            {
                "name": scene.name,
                "source": scene.source,
                "bounds": scene.bounds,
                "num_views": scene.num_views,
                "height": scene.size[0],
                "width": scene.size[1],
                "mean": {m: {n: scene.mean(m, n) for n in result.metrics} for m in METHODS},
                "views": [
                    {
                        "name": view.name,
                        "index": view.index,
                        "inputs": list(view.inputs),
                        "seconds": view.seconds,
                        "scores": view.scores,
                    }
                    for view in scene.views
                ],
            }
            for scene in result.scenes
        ],
        "config": about.config,
    }


def page(result: Result, about: About) -> str:
    """The whole HTML page."""
    title = html.escape(about.title)
    facts = {**about.facts, **_protocol(result.protocol)}
    ordered = sorted(result.scenes, key=lambda scene: scene.mean(MODEL, "psnr"))
    config = html.escape(json.dumps(about.config, indent=1))
    body = [
        f"<h1>{title}</h1>",
        _table([], facts.items(), "facts"),
        f"<details><summary>Config</summary><pre>{config}</pre></details>",
        "<h2>Mean over scenes</h2>",
        _summary(result),
        "<p>single_plane (oracle) picks its plane by looking at the ground truth: an upper bound "
        "of one plane, not a method. plane_sweep and nearest_view see the inputs only. Mean of "
        "the scenes' means over held-out views.</p>",
        "<h2>Scenes</h2>",
        _scene_table(result),
        "<h2>Pictures</h2>",
        f"<p>Worst and best held-out view of {_count(ordered)}. Error: mean absolute difference, "
        "dark is none, bright is 0.25 or more. Depth: bright is near.</p>",
    ]
    body += [_scene_pictures(result, scene) for scene in ordered[:MAX_SHOWN]]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def _count(scenes: Sequence[SceneResult]) -> str:
    if len(scenes) <= MAX_SHOWN:
        return "every scene, the worst scene first"
    return f"the {MAX_SHOWN} worst of {len(scenes)} scenes"


def _protocol(protocol: Protocol) -> dict[str, Any]:
    size = "of each scene" if protocol.size is None else "{} x {}".format(*protocol.size)
    return {
        "inputs": f"{protocol.num_inputs} nearest by distance of camera centres",
        "held out": protocol.split or f"every {protocol.hold_out_every}th view, from the first",
        "image size (h x w)": size,
        "border left out": f"{protocol.border} pixels",
        "near and far": "from the inputs' own, or the points they observe",
        "SSIM": f"{protocol.ssim}, 11x11 window, sigma 1.5",
        "LPIPS": "not computed: no weights given" if protocol.lpips is None else "computed",
    }


def _summary(result: Result) -> str:
    names = shown_metrics(result)
    rows = [(m, *(_format(name, result.mean(m, name)) for name in names)) for m in METHODS]
    return _table(["method", *(_LABELS[name] for name in names)], rows, "numbers")


def _scene_table(result: Result) -> str:
    head = ["scene", "layout", "views", "held out", "size", "ms a view"]
    head += [f"{_LABELS[n]} {m}" for n in shown_metrics(result) for m in METHODS]
    rows = []
    for scene in result.scenes:
        # The median leaves out the first call, which compiles.
        milliseconds = 1e3 * float(np.median([view.seconds for view in scene.views]))
        size = f"{scene.size[0]} x {scene.size[1]}"
        row = [scene.name, scene.source, scene.num_views, len(scene.views), size]
        row.append(f"{milliseconds:.0f}")
        row += [_format(n, scene.mean(m, n)) for n in shown_metrics(result) for m in METHODS]
        rows.append(row)
    return _table(head, rows, "numbers")


def _scene_pictures(result: Result, scene: SceneResult) -> str:
    names = shown_metrics(result)
    head = ["view", *(f"{_LABELS[n]} {m}" for n in names for m in METHODS)]
    rows = [
        [view.name, *(_format(n, view.scores[m][n]) for n in names for m in METHODS)]
        for view in scene.views
    ]
    parts = [
        f"<h3>{html.escape(scene.name)}</h3>",
        f"<p>Near and far: {html.escape(scene.bounds)}.</p>",
        *(_panel(panel) for panel in scene.panels),
        f"<details><summary>All held-out views</summary>{_table(head, rows, 'numbers')}</details>",
    ]
    return f"<section>{''.join(parts)}</section>"


def _panel(panel: Panel) -> str:
    pictures = [
        ("ground truth", panel.truth),
        ("prediction", panel.prediction),
        ("error", panel.error),
    ]
    if panel.depth is not None:
        pictures.append(("depth", panel.depth))
    figures = "".join(
        f"<figure>{_image(image)}<figcaption>{label}</figcaption></figure>"
        for label, image in pictures
    )
    caption = html.escape(f"{panel.why}: {panel.view}")
    inputs = f'<figure class="inputs">{_image(panel.inputs)}<figcaption>inputs, the nearest first'
    return f'<h4>{caption}</h4><div class="panel">{figures}</div>{inputs}</figcaption></figure>'


def _image(image: np.ndarray) -> str:
    buffer = io.BytesIO()
    small = image.shape[0] * image.shape[1] <= _PNG_PIXELS
    if small:
        Image.fromarray(image).save(buffer, "PNG")
    else:
        Image.fromarray(image).save(buffer, "JPEG", quality=90, subsampling=0)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    kind = "png" if small else "jpeg"
    size = f'width="{image.shape[1]}" height="{image.shape[0]}"'
    return f'<img alt="" {size} src="data:image/{kind};base64,{data}">'


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]], kind: str) -> str:
    def row(cells: Sequence[Any], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(c))}</{tag}>" for c in cells) + "</tr>"

    top = f"<thead>{row(head, 'th')}</thead>" if head else ""
    middle = "".join(row(cells, "td") for cells in rows)
    return f'<div class="wide"><table class="{kind}">{top}<tbody>{middle}</tbody></table></div>'


def _format(metric: str, value: float) -> str:
    return f"{value:.{_DIGITS[metric]}f}"


_STYLE = """
:root { color-scheme: light dark; --line: #ccc; --soft: #f4f4f4; }
@media (prefers-color-scheme: dark) { :root { --line: #444; --soft: #222; } }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1500px; margin: 2em auto; padding: 0 1em;
  background: Canvas; color: CanvasText; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .5em 0; }
th, td { border: 1px solid var(--line); padding: .25em .6em; text-align: left; }
thead th { background: var(--soft); }
.numbers td + td { text-align: right; font-variant-numeric: tabular-nums; }
.facts td:first-child { white-space: nowrap; font-weight: 600; }
.facts td { overflow-wrap: anywhere; }
.panel { display: grid; grid-template-columns: repeat(4, 1fr); gap: .5em; }
figure { margin: 0; }
.panel img { width: 100%; height: auto; }
.panel img, .inputs img { image-rendering: auto; border-radius: 3px; }
.inputs { margin-top: .4em; }
.inputs img { max-width: 100%; height: auto; }
figcaption { font-size: .85em; opacity: .75; }
section { border-top: 1px solid var(--line); margin-top: 1.5em; }
pre { overflow-x: auto; background: var(--soft); padding: .7em; }
"""
