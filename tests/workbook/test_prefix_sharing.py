"""The widget of chapter 01: what its buttons say, and that a picture follows each of them."""

from __future__ import annotations

from kvgather.workbook.widgets.prefix_sharing import PROMPTS, Story, prefix_sharing, storyboard


def test_story_shares_frees_and_evicts():
    story = Story(num_blocks=10, page_size=4)
    assert story.run("A", PROMPTS["A"]) == "run A: 0 of its 13 tokens were in the cache, 0 cached blocks evicted"
    assert story.run("B", PROMPTS["B"]) == "run B: 8 of its 12 tokens were in the cache, 0 cached blocks evicted"
    assert [story.users(i) for i in range(5)] == [["A", "B"], ["A", "B"], ["A"], ["A"], ["B"]]
    assert story.words(0) == ["you", "are", "a", "helpful"]
    assert story.words(3) == ["table"]
    assert story.free("A") == "free A: 1 free block of the pool can still be found"
    assert story.free("A") == "A is not running"
    assert story.words(3) == []
    assert story.eviction_order() == [2]
    story.run("C", PROMPTS["C"])
    assert story.free("B") == "free B: 4 free blocks of the pool can still be found"
    assert story.eviction_order() == [2, 4, 1, 0]
    assert story.run("A", PROMPTS["A"]) == "run A: 12 of its 13 tokens were in the cache, 1 cached block evicted"


def test_running_again_frees_first_and_errors_are_said():
    story = Story(num_blocks=4, page_size=4)
    story.run("A", "one two three four five")
    assert "4 of its 5 tokens" in story.run("A", "one two three four six")
    assert "5 new blocks are needed; 4 of 4 are free" in story.run("A", " ".join("abcdefghijklmnopqrs"))
    assert story.live == {}
    assert "token_ids is empty" in story.run("B", "  ")


def test_buttons_redraw_the_picture():
    *rows, picture = prefix_sharing().children
    seen = [picture.value]
    for row in rows[:2]:
        row.children[1].click()
        seen.append(picture.value)
    rows[0].children[2].click()
    seen.append(picture.value)
    assert all(bytes(value).startswith(b"\x89PNG") for value in seen)
    assert len({bytes(value) for value in seen}) == 4


def test_storyboard_has_a_frame_for_each_step():
    drawing = storyboard(("run", "A", "a b c"), ("free", "A"), num_blocks=3, page_size=2)
    captions = [axes.texts[-1].get_text() for axes in drawing.axes]
    assert captions == [
        "run A: 0 of its 3 tokens were in the cache, 0 cached blocks evicted",
        "free A: 1 free block of the pool can still be found",
    ]


def test_cached_blocks_show_their_place_in_the_order_of_eviction():
    drawing = storyboard(("run", "A", "a b c d e"), ("free", "A"), num_blocks=3, page_size=2)
    texts = [text.get_text() for text in drawing.axes[1].texts]
    assert [text for text in texts if text.startswith("cached")] == ["cached, 2nd", "cached, 1st"]
    drawing = storyboard(("run", "A", " ".join(f"w{i}" for i in range(25))), ("free", "A"), num_blocks=25, page_size=1)
    places = [text.get_text() for text in drawing.axes[1].texts if text.get_text().startswith("cached")]
    assert places[::-1][10:13] == ["cached, 11th", "cached, 12th", "cached, 13th"]
    assert places[::-1][20:23] == ["cached, 21st", "cached, 22nd", "cached, 23rd"]
