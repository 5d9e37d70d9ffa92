"""A report as Markdown, and as JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from dptaft.report.curves import Points
from dptaft.report.facts import Facts
from dptaft.report.text import markdown, plain, up


def render_json(facts: Facts) -> str:
    """All facts and curves as one JSON object."""
    return json.dumps(asdict(facts), indent=2, allow_nan=False) + "\n"


def render_markdown(facts: Facts) -> str:
    """The report as Markdown; all text of the facts is escaped."""
    return "\n".join(_lines(facts)) + "\n"


def _lines(facts: Facts) -> Iterator[str]:
    title = "Privacy report" if facts.claimed else "NO PRIVACY CLAIM"
    yield f"# {title}: {markdown(facts.run)}"
    yield f"\n{markdown(facts.subject)}, {markdown(facts.time)}\n"
    yield f"> **{markdown(facts.sentence)}**"
    if facts.formal:
        yield f"\n{markdown(facts.formal)}"
    if facts.numbers:
        yield from _table(("", "", ""), [(n.label, n.value, n.words) for n in facts.numbers])
    if facts.caveats:
        yield "\n## Read this first\n"
        yield from _list(facts.caveats)
    if facts.risks:
        yield "\n## What an attack can gain at most"
        yield from _table(("", "at most", ""), [(r.label, r.value, r.sentence) for r in facts.risks])
    yield from _scope(facts)
    for name, rows in (
        ("Budget", facts.budget),
        ("Model quality", facts.utility),
        ("Audit", facts.audit),
        ("How epsilon was bounded", facts.accounting),
        ("What was done", facts.mechanism),
    ):
        if rows:
            yield f"\n## {name}"
            yield from _table(("", ""), rows)
    yield from _curves(facts)
    yield "\n## How to check this report\n"
    yield f"    dptaft verify {plain(facts.path)}"
    yield from _table(("", ""), facts.identity)


def _scope(facts: Facts) -> Iterator[str]:
    if facts.accesses:
        yield "\n## Which uses of the data are covered"
        yield from _table(("use", "status"), facts.accesses)
    if facts.not_protected:
        yield "\nNot protected:\n"
        yield from _list(facts.not_protected)
    if facts.public:
        yield "\nTaken to be public:\n"
        yield from _list(facts.public)
    if facts.assumptions:
        yield "\n## What the claim rests on"
        yield from _table(("assumption", "vouched for", "where"), facts.assumptions)


def _curves(facts: Facts) -> Iterator[str]:
    if facts.curves is None:
        return
    yield "\n## Epsilon for other deltas and fewer steps"
    for label, found in (("delta", facts.curves.delta), ("steps", facts.curves.steps)):
        names = list(found)
        if names:
            picked = [_thin(found[name]) for name in names]
            rows = [
                (f"{points[0][0]:g}", *(up(epsilon, 4) for _, epsilon in points))
                for points in zip(*picked, strict=False)
            ]
            yield from _table((label, *(f"epsilon by {name}" for name in names)), rows)


def _thin(points: Points) -> Points:
    """At most nine points, the last one among them."""
    step = max(1, (len(points) - 1) // 8)
    return points[::-1][::step][::-1]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield ""
    yield f"| {' | '.join(map(markdown, head))} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(map(markdown, row))} |"


def _list(items: Sequence[str]) -> Iterator[str]:
    return (f"- {markdown(item)}" for item in items)
