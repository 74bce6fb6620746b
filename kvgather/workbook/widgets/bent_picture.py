"""Chapter 00: gather a picture with another scale, or with another block in its table, and look at it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import ipywidgets
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import kvgather as kg
from kvgather.plan import PlanError
from kvgather.workbook.figures import figure, png

__all__ = ["Bend", "bend_picture", "bent_pictures"]


class Bend:
    """A cache that holds one picture, and gathers of it with a changed scale or a changed block table.

    Args:
        cache: a cache with one head and per-tensor scales; a token of the sequence is one row of the picture.
        block_ids: the block table of the sequence.
        scale: the right scale.
    """

    def __init__(self, cache: kg.PagedKVCache, block_ids: Sequence[int], scale: float) -> None:
        self.cache, self.block_ids, self.scale = cache, list(block_ids), float(scale)
        self.tokens = len(self.block_ids) * cache.geometry.page_size
        self.brightest = 1.05 * float(self.gather(self.scale, self.block_ids)[0].max())

    def gather(self, scale: float, block_ids: Sequence[int]) -> tuple[torch.Tensor, str]:
        """The gathered picture `[tokens, head_dim]`, FP32 on the CPU, and what the plan's check says of the table."""
        cache = self.cache
        device = cache.key_cache.device
        table = torch.tensor([list(block_ids)], dtype=torch.int32, device=device)
        ends = torch.tensor([0, self.tokens], dtype=torch.int32, device=device)
        plan = kg.GatherPlan.build(
            table, ends, page_size=cache.geometry.page_size, num_blocks=cache.geometry.num_blocks
        )
        pools = cache.key_cache, cache.value_cache
        keys, _ = kg.gather(*pools, plan, layout=cache.layout, k_scale=scale, v_scale=scale, out_dtype=torch.float32)
        try:
            plan.check()
        except PlanError as error:
            return keys[:, 0].cpu(), str(error).split(";")[0]
        return keys[:, 0].cpu(), ""

    def changed(self, scale: float, entry: int, block_id: int) -> tuple[torch.Tensor, str]:
        """The picture gathered with this scale, and with `block_id` in this entry of the table; and a sentence."""
        table = [*self.block_ids[:entry], block_id, *self.block_ids[entry + 1 :]]
        picture, complaint = self.gather(scale, table)
        right, _ = self.gather(self.scale, self.block_ids)
        wrong = int((picture != right).any(dim=1).sum())
        if complaint:
            return picture, f"{wrong} of {self.tokens} tokens are wrong; check: {complaint}"
        end = ", and nothing was raised" if wrong else ""
        return picture, f"{wrong} of {self.tokens} tokens are wrong{end}"

    def draw(self, axes: Axes, picture: torch.Tensor, title: str) -> None:
        axes.imshow(
            picture.numpy(), cmap="cividis", vmin=0, vmax=self.brightest, aspect="auto", interpolation="nearest"
        )
        axes.set_title(title, fontsize=10)
        axes.set(xlabel="dim", ylabel="token", yticks=range(0, self.tokens + 1, self.cache.geometry.page_size))


def bent_pictures(bend: Bend, changes: Sequence[tuple[str, float, int, int]]) -> Figure:
    """One panel for each change.

    Args:
        bend: the cache with the picture.
        changes: title, scale, entry of the block table, and the block id in this entry.
    """
    drawing, panels = figure(3.2 * len(changes), 3.3, columns=len(changes), squeeze=False)
    for axes, (title, scale, entry, block_id) in zip(panels[0], changes, strict=True):
        bend.draw(axes, bend.changed(scale, entry, block_id)[0], title)
    return drawing


def bend_picture(bend: Bend) -> ipywidgets.Widget:
    """The widget: sliders for the scale, for an entry of the block table and for the block id in it."""
    # Released sliders are drawn: pictures for all values on the way would queue up.
    middle = math.log2(bend.scale)
    reach = {"min": middle - 4, "max": middle + 4, "step": 0.25}
    scale = ipywidgets.FloatLogSlider(value=bend.scale, base=2, description="scale", continuous_update=False, **reach)
    entry = ipywidgets.IntSlider(max=len(bend.block_ids) - 1, description="entry", continuous_update=False)
    block_id = ipywidgets.IntSlider(
        value=bend.block_ids[0], max=bend.cache.geometry.num_blocks, description="block id", continuous_update=False
    )
    sentence = ipywidgets.Label()
    picture = ipywidgets.Image(format="png", layout=ipywidgets.Layout(max_width="100%"))

    def redraw(_: object = None) -> None:
        bent, sentence.value = bend.changed(scale.value, entry.value, block_id.value)
        drawing, axes = figure(4.6, 3.4)
        right = bend.block_ids[entry.value]
        bend.draw(axes, bent, f"scale {scale.value:.3g}; entry {entry.value}: block {block_id.value}, not {right}")
        if block_id.value == right:
            axes.set_title(f"scale {scale.value:.3g}; the right block table", fontsize=10)
        picture.value = png(drawing)

    def follow(_: object = None) -> None:
        """Another entry begins with its right block."""
        block_id.value = bend.block_ids[entry.value]
        redraw()

    for control, action in ((scale, redraw), (entry, follow), (block_id, redraw)):
        control.observe(action, names="value")
    redraw()
    widget = ipywidgets.VBox([scale, ipywidgets.HBox([entry, block_id]), sentence, picture])
    widget.add_class("kvgather-bend-picture")
    return widget
