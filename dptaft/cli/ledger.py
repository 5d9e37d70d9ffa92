"""`dptaft ledger`: declare budgets, see what is spent, check the chain, end abandoned runs."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dptaft.cli.echo import echo
from dptaft.cli.format import up

if TYPE_CHECKING:
    from dptaft_accounting.ledger import Account, Budget, Entry, Ledger

_DEFAULT = Path("runs/ledger.sqlite")
_NOTE = "the total adds a bound per run; `dptaft compare` composes whole runs and may show less"


def _ledger_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--ledger",
        "path",
        type=click.Path(path_type=Path),
        default=_DEFAULT,
        show_default=True,
        help="The ledger.",
    )(command)


def _json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")(command)


@click.group()
def ledger() -> None:
    """Privacy budgets of data sets, and what has been spent of them.

    Training charges runs/ledger.sqlite by itself; `dptaft ledger init --data DATA --epsilon E` sets a limit.
    """


@ledger.command()
@_ledger_option
@click.option("--data", help="Data set to register, as for `dptaft train`.")
@click.option("--classes", help="Comma-separated class names, as for `dptaft train`.")
@click.option("--skip-corrupt", is_flag=True, help="As for `dptaft train`.")
@click.option("--name", help="Name of the data set.  [default: that of the data]")
@click.option("--version-of", help="The data is a version of this data set and shares its budget.")
@click.option("--epsilon", type=float, help="Budget: epsilon of all runs together.")
@click.option("--mu", type=float, help="Budget in Gaussian terms, instead of --epsilon.")
@click.option("--delta", type=float, help="Delta of the budget.  [default: min(1e-5, 1/(10 n))]")
@click.option(
    "--filter",
    "kind",
    type=click.Choice(["gdp", "sum"]),
    default="gdp",
    show_default=True,
    help="gdp adds squares of mu, sum adds epsilons.",
)
@click.option(
    "--adjacency",
    type=click.Choice(["zero-out", "add-remove", "replace-one"]),
    default="zero-out",
    show_default=True,
    help="What neighbouring data sets are.",
)
@click.option("--replace", is_flag=True, help="Replace the budget that was declared before.")
@_json_option
def init(path: Path, as_json: bool, **options: Any) -> None:
    """Make a ledger, register a data set, declare its budget."""
    _check_init(options)
    if options["data"] is None:
        made = _create(path)
        facts: dict[str, Any] = {"ledger": str(path), "id": made.id}
        echo(json.dumps(facts, indent=2) if as_json else f"made the ledger {path} ({made.id})")
        return
    name, found = _register(path, options)
    account = found.account(name)
    echo(json.dumps(_facts(account), indent=2) if as_json else "\n".join(_lines(account)))


def _check_init(options: dict[str, Any]) -> None:
    """Refuse options that would have no effect, before any data is read."""
    limited = options["epsilon"] is not None or options["mu"] is not None
    if options["epsilon"] is not None and options["mu"] is not None:
        raise click.UsageError("--epsilon and --mu both state the budget; give one of them")
    if options["mu"] is not None and options["kind"] == "sum":
        raise click.UsageError("a budget in mu needs --filter gdp; give --epsilon for --filter sum")
    if options["name"] is not None and options["version_of"] is not None:
        raise click.UsageError("--version-of names the data set already; leave --name out")
    if options["data"] is None and (limited or options["name"] or options["version_of"]):
        raise click.UsageError("a budget belongs to a data set; give --data")
    if not limited and (options["delta"] is not None or options["replace"]):
        raise click.UsageError("--delta and --replace belong to a budget; give --epsilon or --mu")


def _register(path: Path, options: dict[str, Any]) -> tuple[str, Ledger]:
    from dptaft.cli.progress import Bars
    from dptaft.data import load_data
    from dptaft.identity import identify
    from dptaft.training.plan import default_delta

    classes = options["classes"]
    names = None if classes is None else [name.strip() for name in classes.split(",")]
    data = load_data(options["data"], classes=names, skip_corrupt=options["skip_corrupt"])
    data.check_adjacency(options["adjacency"])
    delta = options["delta"] if options["delta"] is not None else default_delta(len(data.train))
    budget = _budget(options, delta)
    with Bars() as bars:
        identity = identify(data, bars)
    found = _open(path)
    older = options["version_of"]
    name = found.register(
        identity.content,
        older or options["name"] or data.name,
        records=identity.records,
        version_of=older is not None,
    )
    if budget is not None:
        found.declare(name, budget, replace=options["replace"])
    return name, found


def _open(path: Path) -> Ledger:
    from dptaft_accounting.ledger import Ledger, LedgerError

    if not path.exists():
        try:
            return _create(path)
        except LedgerError:  # another process was quicker
            if not path.exists():
                raise
    return Ledger(path)


def _create(path: Path) -> Ledger:
    """A new account; runs beside it that were charged to another one are named."""
    from dptaft.budgeting import charged_elsewhere
    from dptaft_accounting.ledger import Ledger

    made, lost = Ledger.create(path), charged_elsewhere(path.parent)
    if lost is not None:
        warnings.warn(
            f"{path} starts at zero, and the run {lost[0]} beside it was charged to the ledger {lost[1]}: "
            "what such runs spent is not in the new account",
            stacklevel=2,
        )
    return made


def _budget(options: dict[str, Any], delta: float) -> Budget | None:
    from dptaft_accounting.ledger import Budget

    if options["mu"] is not None:
        return Budget.from_mu(options["mu"], delta, adjacency=options["adjacency"])
    if options["epsilon"] is None:
        return None
    return Budget.from_epsilon(
        options["epsilon"], delta, filter=options["kind"], adjacency=options["adjacency"]
    )


@ledger.command()
@_ledger_option
@_json_option
def show(path: Path, as_json: bool) -> None:
    """Budgets, spending and runs of every data set."""
    from dptaft_accounting.ledger import Ledger

    found = Ledger(path)
    accounts = [found.account(name) for name in found.datasets()]
    if as_json:
        facts = {"ledger": str(path), "id": found.id, "head": found.head}
        echo(json.dumps(facts | {"data_sets": [_facts(a) for a in accounts]}, indent=2))
        return
    lines = [f"ledger {path} ({found.id}), head {found.head[:16]}"]
    for account in accounts:
        lines += ["", *_lines(account)]
    echo("\n".join(lines))


@ledger.command()
@click.argument("runs", nargs=-1, type=click.Path(path_type=Path))
@_ledger_option
@click.option("--head", "heads", multiple=True, help="A head that was recorded elsewhere.")
@_json_option
def verify(runs: tuple[Path, ...], path: Path, heads: tuple[str, ...], as_json: bool) -> None:
    """Check every row, and that the statements of RUNS agree with the ledger.

    Without RUNS, all run folders beside the ledger that name it are checked. Exit code 0: everything holds.
    1: something does not. 2: the input cannot be read.
    """
    from dptaft_accounting.ledger import Ledger

    found = Ledger(path)
    problems = found.verify(heads)
    checked = list(runs)
    if not problems:
        checked = checked or _runs_of(path.parent, found.id)
        problems = [f"{run}: {problem}" for run in checked for problem in _contradictions(run, path)]
    if as_json:
        facts = {"ledger": str(path), "verified": not problems, "runs": [str(run) for run in checked]}
        echo(json.dumps(facts | {"problems": problems}, indent=2))
    elif problems:
        echo("\n".join(f"FAILED  {problem}" for problem in problems))
    else:
        echo(f"ok  {path}: every row is intact; {_count(len(checked), 'statement')} checked")
    if problems:
        raise SystemExit(1)


def _contradictions(run: Path, path: Path) -> tuple[str, ...]:
    from dptaft.ledger_check import ledger_problems
    from dptaft.runs import STATEMENT, read_privacy

    privacy = read_privacy(run / STATEMENT if run.is_dir() else run)
    if privacy.statement is None:
        return ()
    return tuple(privacy.problems) + ledger_problems(privacy.statement, path)


def _runs_of(folder: Path, ledger_id: str) -> list[Path]:
    """Folders of runs that name this ledger; other folders and damaged runs are not looked at."""
    found = []
    for path in sorted(folder.glob("*/privacy.json")):
        try:
            composition = json.loads(path.read_text()).get("composition", {})
        except (OSError, ValueError, AttributeError):
            continue
        if isinstance(composition, dict) and composition.get("ledger") == ledger_id:
            found.append(path.parent)
    return found


@ledger.command()
@_ledger_option
@click.option("--output", type=click.Path(path_type=Path), help="File to write.  [default: standard output]")
def export(path: Path, output: Path | None) -> None:
    """Write all rows as JSON, without the secret key."""
    from dptaft_accounting.ledger import Ledger

    text = json.dumps(Ledger(path).export(), indent=2)
    if output is None:
        echo(text)
        return
    with output.open("x", encoding="utf-8") as file:
        file.write(text + "\n")


@ledger.command()
@click.argument("entry")
@_ledger_option
@click.option("--force", is_flag=True, help="Also where its process runs, or may run: it cannot go on then.")
@_json_option
def close(entry: str, path: Path, force: bool, as_json: bool) -> None:
    """End the abandoned run ENTRY: what it may have spent stays charged, the rest is given back."""
    from dptaft_accounting.ledger import Ledger

    closed = Ledger(path).close(entry, insist=force)
    spent = f"epsilon {_short(closed.charge.epsilon)} at delta {float(closed.charge.delta):g} stays charged"
    words = "nothing was spent" if closed.state == "released" else spent
    echo(json.dumps(_entry(closed), indent=2) if as_json else f"{closed.state}: {words}")


def _facts(account: Account) -> dict[str, Any]:
    from dptaft.budgeting import standing_fields

    runs = [_entry(entry) for entry in account.entries]
    return {
        "data_set": account.dataset,
        "versions": account.versions,
        **standing_fields(account),
        "runs": runs,
    }


def _entry(entry: Entry) -> dict[str, Any]:
    return {
        "entry": entry.id,
        "run": entry.run,
        "state": entry.state,
        "adjacency": entry.adjacency,
        "part": None if entry.part is None else list(entry.part),
        "authorised": entry.authorised.to_dict(),
        "charged": entry.charge.to_dict(),
        "time": entry.time,
        "hash": entry.hash,
    }


def _lines(account: Account) -> list[str]:
    """One data set for people; amounts are rounded up, what remains is rounded down."""
    facts = _facts(account)
    rows = [("data set", f"{account.dataset} ({_count(account.versions, 'version')})")]
    rows.append(("budget", _budget_text(account)))
    rows.append(("spent", _amount(facts["spent"])))
    if account.claimed != account.spent:
        rows.append(("with unfinished", _amount(facts["claimed"])))
    if account.budget is not None:
        left = facts["remaining"]
        words = f"epsilon {left['epsilon']:.6g} at delta {left['delta']:g} for one more full-batch run"
        rows.append(("remaining", words if left["epsilon"] > 0 else "nothing"))
    if account.taken_by is not None:
        rows.append(("taken whole by", account.taken_by))
    if len(account.entries) > 1:
        rows.append(("note", _NOTE))
    width = max(len(label) for label, _ in rows)
    lines = [f"{label:<{width}}  {words}" for label, words in rows]
    return lines + _entry_lines(account.entries)


def _budget_text(account: Account) -> str:
    budget = account.budget
    if budget is None:
        return "none declared: spending is summed without a limit"
    words = f"epsilon {float(budget.epsilon):g} at delta {float(budget.delta):g}, filter {budget.filter}"
    if budget.filter == "gdp":
        words += f" (mu {float(budget.mu):.6g})"
    words += f", {budget.adjacency}, {budget.unit}"
    return words + (f"; declared {account.declared} times" if account.declared > 1 else "")


def _amount(reading: dict[str, Any]) -> str:
    mu = f" (mu {up(reading['mu'], 6)})" if reading.get("mu") is not None else ""
    return f"epsilon {up(reading['epsilon'], 6)} at delta {up(reading['delta'], 3)}{mu}"


def _entry_lines(entries: tuple[Entry, ...]) -> list[str]:
    if not entries:
        return []
    rows = [("entry", "state", "epsilon", "mu", "delta", "run")]
    for entry in entries:
        cost = entry.charge
        delta = f"{float(cost.delta):g}"
        rows.append((entry.id, entry.state, _short(cost.epsilon), _short(cost.mu), delta, entry.run))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return [
        "  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, [*widths, 0], strict=True)).rstrip()
        for row in rows
    ]


def _short(amount: Any) -> str:
    value = float(amount)
    return "0" if value == 0 else up(None if math.isinf(value) else value, 6)


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"
