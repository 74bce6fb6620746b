"""A call of a `BlockPool` after a history of others, some of them refused."""

from __future__ import annotations

from typing import Any

import torch

from tests.fuzz import forms
from tests.fuzz.blocks import KEYS, Twin, check_pool, exact
from tests.fuzz.case import BAD, GOOD, Builder, Case, Draw, Facts, Wrong, bad, good
from tests.fuzz.judge import base
from tests.fuzz.junk import JUNK

OPERATIONS = ("allocate", "append", "commit", "free", "withdraw", "reset", "slots", "block_table", "block")
TRIED = """
def tried(call, *given, **named):
    try:
        return call(*given, **named)
    except (ValueError, TypeError) as error:
        return error
"""
NO_SEQUENCES = ("None", "3", "'seq'", "[]", "object()", "kg.BlockPool", "pool", "torch.zeros(1)", "other_seq", "gone")


def history(draw: Draw) -> Case:
    """Some calls, right and wrong ones, and one more."""
    blocks, page = draw.randint(1, 9), draw.randint(1, 4)
    twin = Twin(blocks, page)
    lines = [TRIED.strip(), f"pool = kg.BlockPool({blocks}, {page})", "other_seq = kg.BlockPool(3, 2).allocate([1])"]
    lines += ["gone = pool.allocate([0])", "pool.free(gone)"]
    twin.allocate("gone", [0], exact(None))
    twin.release("gone")
    last = draw.choice(OPERATIONS[:6] + OPERATIONS)
    for step in range(draw.randint(0, 14)):
        _step(draw, twin, lines, f"seq{step}")
    return _judged(draw, twin, lines, last)


def _prompt(draw: Draw, twin: Twin) -> list[int]:
    return [draw.randint(0, 1) for _ in range(draw.randint(1, max(1, min(14, twin.page * twin.blocks))))]


def _step(draw: Draw, twin: Twin, lines: list[str], name: str) -> None:
    """One call of the history, and of the twin; a refused one changes nothing."""
    what = draw.choice(("allocate", "allocate", "append", "commit", "commit", "free", "withdraw", "reset"))
    if draw.chance(0.1):
        wrong = draw.choice((
            f"pool.append, {draw.choice(NO_SEQUENCES)}, 1", "pool.allocate, [1, -1]", "pool.allocate, []",
            "pool.allocate, [1], []", f"pool.commit, {draw.choice(NO_SEQUENCES)}", "pool.free, gone",
            "pool.withdraw, other_seq", "pool.allocate, [0] * 500", "pool.slots, gone", "pool.block, -1",
        ))  # fmt: skip
        lines.append(f"tried({wrong})")
        return
    if what == "reset" and draw.chance(0.7):
        return
    if what == "reset":
        lines.append("pool.reset()")
        twin.forget(list(range(twin.blocks)))
        for seq in twin.seqs.values():
            seq["private"] = True
        return
    if what == "allocate":
        tokens, key = _prompt(draw, twin), draw.choice(KEYS[:4]) if draw.chance(0.3) else "None"
        lines.append(f"{name} = tried(pool.allocate, {tokens}, {key})")
        twin.allocate(name, tokens, exact(eval(key, dict(base()))))
        return
    if not twin.seqs:
        return
    name = draw.choice(list(twin.seqs))
    _on_sequence(draw, twin, lines, what, name)


def _on_sequence(draw: Draw, twin: Twin, lines: list[str], what: str, name: str) -> None:
    seq = twin.seqs[name]
    if what == "append":
        token = draw.randint(0, 1)
        lines.append(f"tried(pool.append, {name}, {token})")
        twin.append(name, token)
    elif what == "commit":
        computed = draw.randint(seq["computed"], len(seq["tokens"]))
        lines.append(f"pool.commit({name}, {computed})")
        twin.commit(name, computed)
    elif what == "free":
        lines.append(f"pool.free({name})")
        twin.release(name)
    else:
        lines.append(f"pool.withdraw({name})")
        twin.forget(seq["ids"])
        seq["private"] = True


def _judged(draw: Draw, twin: Twin, lines: list[str], what: str) -> Case:
    """The call that is judged."""
    if what not in ("allocate", "reset", "block_table", "block") and not twin.seqs:
        what = "allocate"
    build = Builder(draw, f"BlockPool.{what}", f"pool.{what}", lines, warm=0)
    if what == "allocate":
        return _allocate(build, twin)
    if what == "block_table":
        return _block_table(build, twin)
    if what == "block":
        return _block(build, twin)
    if what == "reset":

        def reset(facts: Facts, result: Any) -> None:
            twin.forget(list(range(twin.blocks)))
            for each in twin.seqs.values():
                each["private"] = True
            check_pool(facts.scope["pool"], twin, facts.scope)

        return build.finish(reset)
    name = draw.choice(list(twin.seqs))
    seq = twin.seqs[name]
    build.arg("seq", name, bad(*NO_SEQUENCES, f"[{name}]", f"({name},)"))
    if what == "slots":
        return _slots(build, twin, seq)
    verdict, names, code, computed = GOOD, (), str(draw.randint(0, 1)), len(seq["tokens"])
    full = len(seq["tokens"]) % twin.page == 0 and not twin.free
    if what == "append":
        code = draw.one(code, code, "np.int64(1)", "2**63 - 1")
        build.arg("token_id", code, forms.integer(0, 2**63 - 1))
        verdict, names = (BAD, ("blocks", "seq", "token_id")) if full else (GOOD, ())
    elif what == "commit":
        computed = draw.randint(seq["computed"], len(seq["tokens"]))
        say = "None" if computed == len(seq["tokens"]) and draw.chance(0.5) else str(computed)
        wrong = forms.integer(seq["computed"], len(seq["tokens"]))[1:]
        build.arg("num_computed_tokens", say, wrong, forms.same_integer(computed))

    def check(facts: Facts, result: Any) -> None:
        if what == "append":
            twin.append(name, int(facts.args["token_id"]))
        elif what == "commit":
            twin.commit(name, computed)
        elif what == "free":
            twin.release(name)
        else:
            twin.forget(seq["ids"])
            seq["private"] = True
        check_pool(facts.scope["pool"], twin, facts.scope)

    return with_refusals(build.finish(check, verdict=verdict, names=names), twin)


def with_refusals(case: Case, twin: Twin) -> Case:
    """The case, whose refusal leaves the pool as it was."""
    case.after_refusal = lambda scope: check_pool(scope["pool"], twin, scope)
    return case


def _allocate(build: Builder, twin: Twin) -> Case:
    draw = build.draw
    tokens, key = _prompt(draw, twin), draw.choice(KEYS)
    form = draw.one("{}", "{}", "tuple({})", "iter({})", "torch.tensor({})", "np.array({})", "torch.tensor({}).int()",
                    "[np.int32(n) for n in {}]")  # fmt: skip
    wrong = bad(*(code for code in JUNK if code not in ("b'x'", "[1, 2]")), "[1, -1]", "[0, True]", "[2**63]",
                "[1.0]", "['1']", "[None]", "torch.tensor([[1]])", "torch.tensor([1.0])", "'12'", "[[1]]", "[10**5000]",
                "torch.tensor([-1])", "torch.tensor([], dtype=torch.int64)", "torch.ones(3).to('meta')", "iter([])",
                "torch.tensor([True])", "[0, float('nan')]", "{'a': 1}",
                "torch.tensor([1, 2]).to_sparse()")  # fmt: skip
    build.arg("token_ids", form.format(tokens), wrong)
    unhashable = "[]", "{}", "set()", "(1, [])", "np.zeros(2)", "{1: 2}", "bytearray(1)", "('a', {})", "[10**5000]"
    build.arg("extra_key", key, bad(*unhashable), leave_out=0.5 if key == "None" else 0)
    probe = Twin(twin.blocks, twin.page)
    probe.content, probe.refs, probe.free = list(twin.content), list(twin.refs), list(twin.free)
    room = probe.allocate("new", tokens, exact(eval(key, dict(base()))))

    def check(facts: Facts, result: Any) -> None:
        twin.allocate("new", tokens, exact(facts.args.get("extra_key")))
        check_pool(facts.scope["pool"], twin, {**facts.scope, "new": result})

    case = build.finish(check, verdict=GOOD if room else BAD, names=() if room else ("blocks",))
    return with_refusals(case, twin)


def _slots(build: Builder, twin: Twin, seq: dict[str, Any]) -> Case:
    draw, count = build.draw, len(seq["tokens"])
    start = draw.randint(0, count)
    end = draw.randint(start, count)
    build.arg("start", str(start), forms.integer(0, end), forms.same_integer(start), leave_out=0.0)
    build.arg("end", str(end), forms.integer(start, count, names=("start",))[1:], forms.same_integer(end))
    build.arg("device", "'cpu'", forms.device(), good("None"), leave_out=0.5)

    def check(facts: Facts, result: Any) -> None:
        want = [seq["ids"][at // twin.page] * twin.page + at % twin.page for at in range(start, end)]
        if result.tolist() != want or result.dtype != torch.int64:
            raise Wrong(f"gave {result}, and should give {want}")
        check_pool(facts.scope["pool"], twin, facts.scope)

    return with_refusals(build.finish(check), twin)


def _block_table(build: Builder, twin: Twin) -> Case:
    draw = build.draw
    names = [name for name in twin.seqs if draw.chance(0.6)]
    listed = f"[{', '.join(names)}]"
    junk = "None", "3", "pool", "object()", "[None]", "[gone]", "[other_seq]", "'x'", "torch.zeros(1)", "[[]]", "gone"
    wrong = bad(*junk)
    build.arg("seqs", draw.one(listed, f"iter({listed})", f"tuple({listed})"), wrong)
    build.arg("device", "'cpu'", forms.device(), good("None"), leave_out=0.5)

    def check(facts: Facts, result: Any) -> None:
        rows = [twin.seqs[name]["ids"] for name in names]
        width = max(map(len, rows), default=0)
        want = [row + [-1] * (width - len(row)) for row in rows]
        if result.tolist() != want or result.dtype != torch.int32 or tuple(result.shape) != (len(rows), width):
            raise Wrong(f"gave {result}, and should give {want}")

    return with_refusals(build.finish(check), twin)


def _block(build: Builder, twin: Twin) -> Case:
    block = build.draw.randrange(twin.blocks)
    build.arg("block_id", str(block), forms.integer(0, twin.blocks - 1), forms.same_integer(block))

    def check(facts: Facts, result: Any) -> None:
        state = "used" if twin.refs[block] else "blank" if twin.content[block] is None else "cached"
        if (result.block_id, result.state) != (block, state) or type(result.block_id) is not int:
            raise Wrong(f"gave {result}, {result.state}, and should be block {block}, {state}")

    return with_refusals(build.finish(check), twin)
