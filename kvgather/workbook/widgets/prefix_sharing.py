"""Run prompts and watch a small BlockPool share, keep and evict their blocks; a word is a token."""

from __future__ import annotations

from typing import Any

import ipywidgets
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from kvgather.blocks import BlockPool, PooledSequence
from kvgather.workbook.figures import EMPTY, INK, LINE, PALETTE, figure, png, text_color

COLORS = {"A": PALETTE[0], "B": PALETTE[2], "C": PALETTE[3], "shared": PALETTE[1]}
SYSTEM = "you are a helpful assistant who answers briefly"
PROMPTS = {
    "A": f"{SYSTEM} what is a block table",
    "B": f"{SYSTEM} what is a slot",
    "C": "once upon a time there was a pool with so few blocks that each new prompt threw an old one out",
}


class Story:
    """A pool, its running prompts by name, and the words of their token ids."""

    def __init__(self, num_blocks: int = 10, page_size: int = 4) -> None:
        self.pool = BlockPool(num_blocks, page_size)
        self.live: dict[str, PooledSequence] = {}
        self._ids: dict[str, int] = {}

    def run(self, name: str, text: str) -> str:
        """Allocate a prompt, commit it as if its K and V were computed, and return a sentence about its hits."""
        if name in self.live:
            self.free(name)
        evictions = self.pool.stats.evictions
        tokens = [self._ids.setdefault(word, len(self._ids)) for word in text.split()]
        try:
            seq = self.pool.allocate(tokens)
        except ValueError as error:
            return f"{name}: {error}"
        self.pool.commit(seq)
        self.live[name] = seq
        hits = f"{seq.num_cached_tokens} of its {seq.num_tokens} tokens were in the cache"
        evicted = self.pool.stats.evictions - evictions
        return f"run {name}: {hits}, {evicted} cached block{'s' if evicted != 1 else ''} evicted"

    def free(self, name: str) -> str:
        """Free a prompt; its published blocks can be found until they are evicted."""
        seq = self.live.pop(name, None)
        if seq is None:
            return f"{name} is not running"
        self.pool.free(seq)
        cached = sum(self.pool.block(block_id).state == "cached" for block_id in range(self.pool.num_blocks))
        return f"free {name}: {cached} free block{'s' if cached != 1 else ''} of the pool can still be found"

    def words(self, block_id: int) -> list[str]:
        """The words of a block; an empty list for a blank block."""
        token_ids = self.pool.block(block_id).token_ids
        for seq in self.live.values():
            if token_ids is None and block_id in seq.block_ids:
                start = seq.block_ids.index(block_id) * self.pool.page_size
                token_ids = tuple(seq.token_ids[start : start + self.pool.page_size])
        words = list(self._ids)
        return [words[token] for token in token_ids or ()]

    def eviction_order(self) -> list[int]:
        """The cached blocks, the first to be evicted first."""
        order = self.pool.eviction_order()
        return [block_id for block_id in order if self.pool.block(block_id).state == "cached"]

    def users(self, block_id: int) -> list[str]:
        """Names of the prompts whose block table contains a block."""
        return [name for name, seq in sorted(self.live.items()) if block_id in seq.block_ids]


def draw(axes: Axes, story: Story, caption: str) -> None:
    """Draw the pool as a row of blocks: id above, words inside, users below.

    A thick outline marks a block that can be found by its content; a dashed outline marks a free block. Below a cached
    block: its place in the order of eviction.
    """
    for block_id in range(story.pool.num_blocks):
        _draw_block(axes, story, block_id)
    axes.text(0, -0.95, caption, fontsize=10, fontweight="bold", ha="left", va="bottom")
    axes.set(xlim=(-0.05, story.pool.num_blocks + 0.05), ylim=(story.pool.page_size + 0.9, -1.8))
    axes.set_axis_off()


def storyboard(*steps: tuple[str, ...], num_blocks: int = 10, page_size: int = 4) -> Figure:
    """One frame for each step of a story, from a real pool.

    Args:
        steps: `("run", name, text)` or `("free", name)`.
        num_blocks, page_size: size of the pool.
    """
    story = Story(num_blocks, page_size)
    drawing, frames = figure(0.86 * num_blocks, 1.65 * len(steps), rows=len(steps), squeeze=False)
    for axes, (verb, *arguments) in zip(frames[:, 0], steps, strict=True):
        draw(axes, story, getattr(story, verb)(*arguments))
    return drawing


def prefix_sharing(num_blocks: int = 10, page_size: int = 4) -> ipywidgets.Widget:
    """The widget: a text box, a run and a free button for each of three prompts, and the pool below."""
    story = Story(num_blocks, page_size)
    picture = ipywidgets.Image(format="png", layout=ipywidgets.Layout(max_width="100%"))

    def redraw(caption: str) -> None:
        drawing, axes = figure(0.86 * num_blocks, 1.85)
        draw(axes, story, caption)
        picture.value = png(drawing)

    def row(name: str) -> ipywidgets.Widget:
        box = ipywidgets.Text(value=PROMPTS[name], description=f"prompt {name}", layout={"width": "70%"})
        run = ipywidgets.Button(description="run", layout={"width": "70px"})
        free = ipywidgets.Button(description="free", layout={"width": "70px"})
        run.on_click(lambda _: redraw(story.run(name, box.value)))
        free.on_click(lambda _: redraw(story.free(name)))
        return ipywidgets.HBox([box, run, free])

    redraw("an empty pool: run A, then B")
    widget = ipywidgets.VBox([*(row(name) for name in PROMPTS), picture])
    widget.add_class("kvgather-prefix-sharing")
    return widget


def _draw_block(axes: Axes, story: Story, block_id: int) -> None:
    view, users, words = story.pool.block(block_id), story.users(block_id), story.words(block_id)
    height = story.pool.page_size
    color = EMPTY if not users else COLORS[users[0] if len(users) == 1 else "shared"]
    outline: dict[str, Any] = {
        "edgecolor": INK if view.token_ids is not None else LINE,
        "linewidth": 1.8 if view.token_ids is not None else 0.8,
        "linestyle": "-" if users else (0, (3, 2)),
    }
    axes.add_patch(Rectangle((block_id + 0.05, 0), 0.9, height, facecolor=color, **outline))
    center: dict[str, Any] = {"ha": "center", "va": "center"}
    axes.text(block_id + 0.5, -0.42, str(block_id), fontsize=8, color=LINE, **center)
    for line, word in enumerate(words):
        shown = word if len(word) <= 10 else f"{word[:9]}…"
        axes.text(block_id + 0.5, line + 0.5, shown, fontsize=8, color=text_color(color), **center)
    state: str = view.state
    if state == "cached":
        state += f", {_ordinal(story.eviction_order().index(block_id) + 1)}"
    axes.text(block_id + 0.5, height + 0.4, " + ".join(users) or state, fontsize=8, **center)


def _ordinal(number: int) -> str:
    """Such as "1st" and "12th"."""
    endings = {1: "st", 2: "nd", 3: "rd"}
    return f"{number}{'th' if number % 100 in (11, 12, 13) else endings.get(number % 10, 'th')}"
