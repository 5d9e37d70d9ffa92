"""Recipes: what to run, over which budgets and seeds, and how the privacy of the whole is treated.

A recipe is a TOML file::

    title = "What privacy costs on digits"
    shows = "one sentence on the result"
    seeds = [0, 1, 2]                    # public seeds of the model (random head), not of the noise

    [budget]
    treatment = "public-benchmark"       # or "publish-all", "select-best"
    epsilons = [1.0, 3.0, 8.0]
    reference = true                     # also train without privacy

    [options]                            # options of `dptaft.train` for all methods
    model = "starter"

    [[data]]
    name = "digits"
    source = "digits"

    [backend]                            # optional: where points are trained (`--backend`)
    kind = "submitit"

    [[methods]]
    name = "tangent"
    scope = "last:1"
    [methods.grid]                       # optional: every combination is a point
    l2_clip_norm = [0.5, 1.0]

Every option is checked against the signature of `dptaft.train`.
"""

from __future__ import annotations

import inspect
import math
import sysconfig
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TREATMENTS = ("public-benchmark", "publish-all", "select-best")
_SHIPPED = (
    Path(__file__).parents[2] / "recipes",
    Path(sysconfig.get_path("data")) / "share" / "dptaft" / "recipes",
)
_OWN = {
    "data": "name it in [[data]]",
    "epsilon": "list budgets in [budget]",
    "delta": "declare it in [budget]",
    "seed": "list seeds at the top",
    "insecure_seed": "a sweep is never run with seeded noise",
    "output": "give --output",
    "resume": "a sweep continues by itself",
    "progress": "it is no option of a recipe",
    "ledger": "the treatment of the budget decides it",
}
_DATA_OPTIONS = ("classes", "public_data", "skip_corrupt", "public_size")
_MOST_CANDIDATES = 1000
_TOP = ("title", "shows", "seeds", "budget", "options", "data", "methods", "backend")
_BUDGET = ("treatment", "epsilons", "epsilon", "delta", "reference", "most_epsilon", "candidates", "ledger")


class RecipeError(ValueError):
    """A recipe cannot be used; the message names the entry and the remedy."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RecipeError(message)


@dataclass(frozen=True)
class Candidates:
    """Distribution of the secret number of candidates K for ``select-best``.

    Attributes:
        mean: E[K], above 1.
        shape: eta of the truncated negative binomial; 0 logarithmic, 1 geometric.
    """

    mean: float = 10.0
    shape: float = 0.0


@dataclass(frozen=True)
class Budget:
    """How the privacy of the sweep as a whole is treated.

    Attributes:
        treatment: ``public-benchmark`` makes no claim for the whole; ``publish-all`` composes all points and
            charges them before the start; ``select-best`` releases the best of a secret number of candidates.
        epsilons: budgets of the points (``select-best``: the one total).
        delta: of every claim; None takes the default of `dptaft.train`.
        reference: also train without privacy, on public data only.
        most_epsilon: ``publish-all``: refuse a sweep that costs more in total.
        candidates: ``select-best``: how many candidates are drawn.
        ledger: path of the ledger; None takes ``ledger.sqlite`` beside the sweep.
    """

    treatment: str
    epsilons: tuple[float, ...]
    delta: float | None = None
    reference: bool = False
    most_epsilon: float | None = None
    candidates: Candidates = Candidates()
    ledger: str | None = None


@dataclass(frozen=True)
class DataSet:
    """One data set: a name for tables, its source for `dptaft.load_data`, and options that belong to it."""

    name: str
    source: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """One line of the plot: fixed options, and lists of values of which every combination is tried."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    grid: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A parsed recipe; `content` is the TOML that it was made from, overrides included, without `backend`."""

    name: str
    title: str
    shows: str
    budget: Budget
    data: tuple[DataSet, ...]
    methods: tuple[Method, ...]
    seeds: tuple[int, ...]
    options: Mapping[str, Any]
    content: Mapping[str, Any] = field(repr=False)
    backend: Mapping[str, Any] = field(default_factory=dict)


def find_recipe(name: str) -> Path:
    """The file of a shipped recipe by name, or a path.

    Raises:
        RecipeError: neither.
    """
    path = Path(name)
    if path.suffix == ".toml" and path.is_file():
        return path
    for folder in _SHIPPED:
        if (folder / f"{name}.toml").is_file():
            return folder / f"{name}.toml"
    known = ", ".join(shipped_recipes()) or "none"
    raise RecipeError(f"no recipe {name!r}; give the path of a .toml file, or a shipped one: {known}")


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with dptaft."""
    return sorted({path.stem for folder in _SHIPPED for path in folder.glob("*.toml")})


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe by name or path and apply ``key=value`` overrides.

    Raises:
        RecipeError: no such recipe, damaged TOML, or an entry that cannot be used.
    """
    path = find_recipe(name)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"cannot read the recipe {path}: {error}") from None
    for text in overrides:
        override(content, text)
    return parse_recipe(content, path.stem)


def override(content: dict[str, Any], text: str) -> None:
    """Set one entry, in place: ``seeds=[0]``, ``budget.epsilons=[1.0]``, ``data.0.source=x``.

    The value is TOML, or plain text.

    Raises:
        RecipeError: no ``=``, or a path that does not lead anywhere.

    >>> content = {"budget": {"epsilons": [1.0]}}
    >>> override(content, "budget.epsilons=[2.0]"); override(content, "title=short"); content
    {'budget': {'epsilons': [2.0]}, 'title': 'short'}
    """
    key, sign, value = text.partition("=")
    _require(bool(sign and key), f"cannot read {text!r}; write key=value, for example seeds=[0]")
    parts = key.strip().split(".")
    target: Any = content
    for part in parts[:-1]:
        target = _step_into(target, part, text)
    last = parts[-1]
    if isinstance(target, list):
        _require(last.isdigit() and int(last) < len(target), f"{text!r}: there is no entry {last}")
        target[int(last)] = _value(value)
    else:
        target[last] = _value(value)


def _step_into(target: Any, part: str, text: str) -> Any:
    if isinstance(target, list):
        _require(part.isdigit() and int(part) < len(target), f"{text!r}: there is no entry {part}")
        found = target[int(part)]
    else:
        found = target.setdefault(part, {})
    _require(isinstance(found, dict | list), f"{text!r}: {part} is a value, not a table")
    return found


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        return text.strip()


def parse_recipe(content: Mapping[str, Any], name: str) -> Recipe:
    """Check a recipe and fill in what it leaves out.

    Raises:
        RecipeError: naming the entry and the remedy.
    """
    _only(content, _TOP, "the recipe")
    budget = _budget(_table(content, "budget"))
    data = tuple(_data_set(entry) for entry in _tables(content, "data"))
    methods = tuple(_method(entry) for entry in _tables(content, "methods"))
    for kind, names in (("data", [d.name for d in data]), ("methods", [m.name for m in methods])):
        _require(len(set(names)) == len(names), f"two entries of [[{kind}]] have the same name; rename one")
    options = dict(content.get("options", {}))
    _check_options(options, "[options]")
    seeds = tuple(content.get("seeds", (0,)))
    _require(
        bool(seeds) and all(isinstance(s, int) and not isinstance(s, bool) for s in seeds),
        f"seeds must be a list of whole numbers, got {list(seeds)}",
    )
    _require(len(set(seeds)) == len(seeds), f"seeds are repeated: {list(seeds)}; list each once")
    if budget.treatment == "select-best":
        _require(len(data) == 1, "select-best chooses on one data set; use one recipe per data set")
    return Recipe(
        name,
        str(content.get("title", name)),
        str(content.get("shows", "")),
        budget,
        data,
        methods,
        seeds,
        options,
        {key: value for key, value in content.items() if key != "backend"},
        _table(content, "backend") if "backend" in content else {},
    )


def _table(content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = content.get(key)
    _require(isinstance(found, Mapping), f"the recipe has no table [{key}]; add it")
    return found  # type: ignore[return-value]


def _tables(content: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    found = content.get(key)
    tables = found if isinstance(found, list) else []
    _require(
        bool(tables) and all(isinstance(entry, Mapping) for entry in tables),
        f"the recipe has no [[{key}]]; add at least one, with double brackets",
    )
    return tables


def _only(table: Mapping[str, Any], allowed: Sequence[str], where: str) -> None:
    for key in table:
        _require(key in allowed, f"unknown entry {key!r} in {where}; use {', '.join(allowed)}")


def _budget(table: Mapping[str, Any]) -> Budget:
    _only(table, _BUDGET, "[budget]")
    treatment = table.get("treatment")
    _require(
        treatment in TREATMENTS,
        f"[budget] needs a treatment of {', '.join(TREATMENTS)}, got {treatment!r}: publishing many runs, or "
        "the best of them, costs privacy",
    )
    best = treatment == "select-best"
    key = "epsilon" if best else "epsilons"
    other = "epsilons" if best else "epsilon"
    _require(key in table and other not in table, f"{treatment} takes {key} in [budget], and not {other}")
    epsilons = tuple(float(e) for e in (table[key] if isinstance(table[key], list) else [table[key]]))
    _require(
        all(math.isfinite(e) and e > 0 for e in epsilons) and len(set(epsilons)) == len(epsilons),
        f"{key} must be positive, finite and different, got {list(epsilons)}; for a run without privacy set "
        "reference = true",
    )
    reference = bool(table.get("reference", False))
    _require(
        treatment == "public-benchmark" or not reference,
        f"reference = true trains without privacy, which {treatment} cannot allow on private data; remove it",
    )
    _require(bool(epsilons) or reference, "epsilons are empty; list at least one")
    _require(treatment == "publish-all" or "most_epsilon" not in table, "most_epsilon belongs to publish-all")
    _require(best or "candidates" not in table, "candidates belong to select-best")
    counted = table.get("candidates", {})
    mean = counted.get("mean", 2)
    _require(
        1 < mean <= _MOST_CANDIDATES, f"candidates.mean must be above 1, up to {_MOST_CANDIDATES}, got {mean}"
    )
    _only(counted, ("mean", "shape"), "[budget.candidates]")
    return Budget(
        treatment=str(treatment),
        epsilons=epsilons,
        delta=table.get("delta"),
        reference=reference,
        most_epsilon=table.get("most_epsilon"),
        candidates=Candidates(**{name: float(value) for name, value in counted.items()}),
        ledger=table.get("ledger"),
    )


def _data_set(entry: Mapping[str, Any]) -> DataSet:
    _only(entry, ("name", "source", *_DATA_OPTIONS), "[[data]]")
    _require("source" in entry, "an entry of [[data]] has no source; name a data set or a path")
    options = {key: value for key, value in entry.items() if key in _DATA_OPTIONS}
    return DataSet(str(entry.get("name", entry["source"])), str(entry["source"]), options)


def _method(entry: Mapping[str, Any]) -> Method:
    _require("name" in entry, "an entry of [[methods]] has no name; add one")
    name = str(entry["name"])
    options = {key: value for key, value in entry.items() if key not in ("name", "grid")}
    _check_options(options, f"method {name!r}")
    grid = {}
    for key, values in dict(entry.get("grid", {})).items():
        _require(isinstance(values, list) and bool(values), f"the grid of {name!r} needs a list for {key}")
        plain = key.removeprefix("optimizer.")
        for value in values:
            _check_options(
                {"optimizer": {plain: value}} if plain != key else {key: value}, f"grid of {name!r}"
            )
        grid[key] = tuple(values)
    return Method(name, options, grid)


def train_options() -> dict[str, inspect.Parameter]:
    """Options of `dptaft.train` that a recipe may set."""
    from dptaft.api import train

    found = inspect.signature(train).parameters
    return {name: option for name, option in found.items() if name not in _OWN and name not in _DATA_OPTIONS}


def _check_options(options: Mapping[str, Any], where: str) -> None:
    allowed = train_options()
    for key, value in options.items():
        if key in _OWN:
            raise RecipeError(f"{key} in {where}: {_OWN[key]}")
        if key in _DATA_OPTIONS:
            raise RecipeError(f"{key} in {where}: declare it in [[data]]")
        _require(key in allowed, f"unknown option {key!r} in {where}; options are those of dptaft.train")
        _check_type(key, value, str(allowed[key].annotation), where)


def _check_type(key: str, value: Any, annotation: str, where: str) -> None:
    """Compare a TOML value with the annotation of the option, as far as TOML types go."""
    kinds: dict[str, type | tuple[type, ...]] = {
        "bool": bool,
        "int": int,
        "float": (int, float),
        "str": str,
        "Mapping": Mapping,
        "Sequence": list,
    }
    words = [word.split("[")[0].strip() for word in annotation.split("|")]
    types = [kinds[word] for word in words if word in kinds]
    if not types:
        return
    fits = any(isinstance(value, kind) and (not isinstance(value, bool) or kind is bool) for kind in types)
    _require(fits, f"{key} in {where} is {value!r}; it must be of type {annotation}")
