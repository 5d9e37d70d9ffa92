"""A report as one HTML page: no script, no network; for screens, phones and paper, light and dark."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dptaft.report.facts import Facts, Number, Risk
from dptaft.report.plots import plots
from dptaft.report.style import STYLE
from dptaft.report.text import escaped

_TONES = {
    "covered": "good",
    "public": "good",
    "none": "quiet",
    "public, declared by the user": "warn",
    "not covered": "bad",
    "proved": "good",
    "enforced by the code": "good",
    "declared by the user": "warn",
    "not checked": "warn",
}


def render(facts: Facts) -> str:
    """The page; all text of the facts is escaped."""
    body = "".join(_body(facts))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>Privacy report: {escaped(facts.run)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}</main>\n</body>\n</html>\n"
    )


def _body(facts: Facts) -> Iterable[str]:
    yield _header(facts)
    if facts.numbers:
        yield f'<section class="numbers">{"".join(map(_number, facts.numbers))}</section>\n'
    if facts.caveats:
        yield f'<section class="caveats"><h2>Read this first</h2>{_list(facts.caveats)}</section>\n'
    if facts.curves is not None:
        figures = "".join(
            f"<figure><h3>{escaped(title)}</h3>{svg}<figcaption>{escaped(words)}</figcaption></figure>\n"
            for title, words, svg in plots(facts.curves)
        )
        yield f'<section class="plots">{figures}</section>\n'
    if facts.risks:
        rows = "".join(map(_risk, facts.risks))
        yield f'<section class="risks"><h2>What an attack can gain at most</h2><dl>{rows}</dl></section>\n'
    yield from _scope(facts)
    yield '<div class="flow">'
    yield _pairs("Budget", facts.budget)
    yield _pairs("Model quality", facts.utility)
    yield _pairs("Audit", facts.audit)
    yield _pairs("How epsilon was bounded", facts.accounting)
    yield _pairs("What was done", facts.mechanism)
    yield "</div>\n"
    yield _check(facts)


def _header(facts: Facts) -> str:
    kind = "claim" if facts.claimed else "claim none"
    title = "Privacy report" if facts.claimed else "Privacy report: no privacy is claimed"
    formal = f'<p class="formal">{escaped(facts.formal)}</p>' if facts.formal else ""
    return (
        f'<header><p class="eyebrow">{escaped(title)}</p><h1>{escaped(facts.run)}</h1>'
        f'<p class="meta">{escaped(facts.subject)} <span>{escaped(facts.time)}</span></p></header>\n'
        f'<section class="{kind}"><p>{escaped(facts.sentence)}</p>{formal}</section>\n'
    )


def _number(number: Number) -> str:
    return (
        f'<div><span class="label">{escaped(number.label)}</span>'
        f'<span class="value">{escaped(number.value)}</span>'
        f'<span class="words">{escaped(number.words)}</span></div>'
    )


def _risk(risk: Risk) -> str:
    width = max(0.0, min(100.0, 100 * risk.fraction))
    return (
        f'<div><dt>{escaped(risk.label)}</dt><dd class="amount">{escaped(risk.value)}</dd>'
        f'<dd class="bar"><i style="width:{width:.2f}%"></i></dd><dd>{escaped(risk.sentence)}</dd></div>'
    )


def _scope(facts: Facts) -> Iterable[str]:
    if not facts.accesses and not facts.assumptions:
        return
    yield '<div class="columns">'
    if facts.accesses:
        rows = "".join(
            f"<tr><td>{escaped(use)}</td><td>{_pill(status)}</td></tr>" for use, status in facts.accesses
        )
        yield ("<section><h2>Which uses of the data are covered</h2>" + _table(("use", "status"), rows))
        if facts.not_protected:
            yield f"<h3>Not protected</h3>{_list(facts.not_protected)}"
        if facts.public:
            yield f"<h3>Taken to be public</h3>{_list(facts.public)}"
        yield "</section>\n"
    if facts.assumptions:
        rows = "".join(
            f'<tr><td>{escaped(text)}<span class="where">{escaped(where)}</span></td>'
            f"<td>{_pill(by)}</td></tr>"
            for text, by, where in facts.assumptions
        )
        yield (
            "<section><h2>What the claim rests on</h2>"
            + _table(("assumption", "vouched for"), rows)
            + "</section>\n"
        )
    yield "</div>\n"


def _table(head: Sequence[str], rows: str) -> str:
    cells = "".join(f'<th scope="col">{escaped(name)}</th>' for name in head)
    return f'<table class="scope"><thead><tr>{cells}</tr></thead><tbody>{rows}</tbody></table>'


def _pill(text: str) -> str:
    return f'<span class="pill {_TONES.get(text, "quiet")}">{escaped(text)}</span>'


def _list(items: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escaped(item)}</li>' for item in items)}</ul>"


def _pairs(title: str, rows: Sequence[tuple[str, str]]) -> str:
    if not rows:
        return ""
    body = "".join(f'<tr><th scope="row">{escaped(a)}</th><td>{escaped(b)}</td></tr>' for a, b in rows)
    return f'<section><h2>{escaped(title)}</h2><table class="pairs"><tbody>{body}</tbody></table></section>\n'


def _check(facts: Facts) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escaped(name)}</th><td class="hash">{escaped(text)}</td></tr>'
        for name, text in facts.identity
    )
    what = "recomputes epsilon on two paths and compares" if facts.claimed else "compares"
    words = (
        f"{what} every file with its hash. The id names this statement: compare it with the one that its "
        "owner published."
    )
    return (
        '<section class="check"><h2>How to check this report</h2><p>'
        f"<code>dptaft verify {escaped(facts.path)}</code> {words}</p>"
        f'<table class="pairs"><tbody>{rows}</tbody></table></section>\n'
    )
