"""One audit of one run: canaries and coins, tests, deterministic checks, a verdict."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dptaft.auditing.canaries import KINDS, AuditSetupError, Canaries
from dptaft.auditing.noise_check import NoiseCheck
from dptaft.auditing.recipe import OBSERVERS, Recipe, load_recipe
from dptaft.auditing.repeat import Observed, Repeater, Report
from dptaft.auditing.sampling_check import SamplingCheck, check_sampling
from dptaft.auditing.sensitivity import SensitivityCheck, check_sensitivity
from dptaft.training.losses import LOSSES
from dptaft_accounting.audit import (
    Choice,
    Evidence,
    Verdict,
    audit_f_one_run,
    audit_one_run,
    audit_trials,
    planned_guesses,
)
from dptaft_accounting.tradeoff import epsilon_to_mu

if TYPE_CHECKING:
    from dptaft.data import ImageData
    from dptaft.runs import Run

AUDIT = "audit.json"
_ENOUGH_SCORES = 20_000
_MOST_REPETITIONS = 16
INTERNAL = (
    "this audit trained on the records again and looked inside: its numbers are not covered by the claim; "
    "keep them internal, or audit with --data synthetic"
)
_SPENDS_NOTHING = "nothing: it read no private record"
_SPENDS_UNBOUNDED = (
    "no budget, while its numbers stay inside; published, no epsilon bounds what they say about records"
)


@dataclass(frozen=True)
class AuditReport:
    """Result of an audit.

    Attributes:
        run: folder of the run.
        statement_id: which statement was audited.
        observer: who attacks: ``all-iterates``, ``last-iterate`` or ``black-box``.
        canaries: their kind.
        exercises: the code that they went through.
        repetitions: how often the recipe was repeated.
        evidence: the test that decides.
        any_mechanism: the bound of one run for every (epsilon, delta)-DP mechanism, beside it.
        sensitivity: the deterministic check.
        sampling: the check of the batches.
        noise: the check of the noise that was added.
        delta: of the claim and of all bounds.
        data: what was trained on.
        private: whether private records (or canary images) were read.
        notes: what a reader must know.
    """

    run: str
    statement_id: str
    observer: str
    canaries: str
    exercises: str
    repetitions: int
    evidence: Evidence
    any_mechanism: Evidence
    sensitivity: SensitivityCheck
    sampling: SamplingCheck
    noise: NoiseCheck
    delta: float
    data: str
    private: bool
    notes: tuple[str, ...]

    @property
    def verdict(self) -> Verdict:
        """``violation`` where the test or a deterministic check says so, else the test's verdict."""
        if not (self.sensitivity.holds and self.sampling.holds and self.noise.holds):
            return "violation"
        return self.evidence.verdict

    @property
    def spends(self) -> str:
        """What the audit costs, in words: its numbers carry no noise."""
        return _SPENDS_UNBOUNDED if self.private else _SPENDS_NOTHING

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; infinite numbers become null."""
        document = {
            "verdict": self.verdict,
            "run": self.run,
            "statement_id": self.statement_id,
            "observer": self.observer,
            "epsilon_lower_bound": self.evidence.epsilon,
            "epsilon_claimed": self.evidence.claimed,
            "epsilon_attainable": self.evidence.attainable,
            "delta": self.delta,
            "significance": self.evidence.significance,
            "canaries": {"kind": self.canaries, "exercise": self.exercises},
            "repetitions": self.repetitions,
            "test": self.evidence.to_dict(),
            "any_mechanism": self.any_mechanism.to_dict(),
            "sensitivity": self.sensitivity.to_dict(),
            "sampling": self.sampling.to_dict(),
            "noise": self.noise.to_dict(),
            "data": self.data,
            "trained_on_private_records": self.private,
            "spends": self.spends,
            "notes": list(self.notes),
        }
        return _finite(document)

    def attach(self) -> Path:
        """Write ``audit.json`` into the run's folder; it names the statement and changes no other file.

        Raises:
            AuditSetupError: the audit read private records, of which its numbers tell without noise.
        """
        _require_public(self.private, self.data)
        path = Path(self.run) / AUDIT
        draft = path.with_name(f".{AUDIT}.{os.getpid()}")
        draft.write_text(json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n", encoding="utf-8")
        draft.replace(path)
        return path


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def audit(
    run: str | os.PathLike[str] | Run,
    *,
    data: str | ImageData | None = None,
    observer: str | None = None,
    canaries: str | None = None,
    count: int | None = None,
    canary_images: ImageData | None = None,
    repetitions: int | None = None,
    significance: float = 0.05,
    attach: bool = False,
    progress: Report | None = None,
) -> AuditReport:
    """Repeat a run's recipe with canaries and bound its privacy loss from below.

    Args:
        run: a finished run with a claim, or its folder.
        data: its records; by default what the run names. ``synthetic`` reads no record at all.
        observer: ``all-iterates`` (sees every noised sum), ``last-iterate`` (the released weights) or
            ``black-box`` (losses of the released model). By default what the claim covers.
        canaries: ``coordinate``, ``tangent``, ``mislabelled`` or ``images``; by default coordinate, and
            mislabelled for a black-box observer.
        count: number of canaries.
        canary_images: the user's own, for ``images``.
        repetitions: trainings; by default as many as give the default test some power.
        significance: chance of calling a sound claim a violation.
        attach: write the report into the run's folder; refused, before anything is trained, where private
            records would be read.
        progress: called with (stage, done, total).

    Returns:
        The report; its `verdict` is ``violation`` at most with probability `significance` for a claim
        that holds (plus about 1e-9 for the checks of noise and batches).

    Raises:
        ValueError: a run or an option that cannot be audited; one line that names the remedy.
    """
    from dptaft.runs import load_run

    loaded = load_run(run) if isinstance(run, str | os.PathLike) else run
    recipe = load_recipe(loaded, data)
    private = recipe.private or not (canary_images is None or canary_images.is_public)
    if attach:
        _require_public(private, recipe.data.name)
    chosen = observer or getattr(recipe.mechanism, "released", "all-iterates")
    kind = canaries or ("mislabelled" if chosen == "black-box" else "coordinate")
    _check_options(chosen, kind, count, repetitions, canary_images)
    repeater = Repeater(recipe, progress)
    placed = repeater.canaries(kind, count, canary_images)
    if repetitions is None:
        repetitions = max(1, min(_MOST_REPETITIONS, math.ceil(_ENOUGH_SCORES / len(placed))))
        repetitions = repetitions if kind == "coordinate" else 1
    observed = repeater.observe(placed, chosen, repetitions)
    evidence = judge(recipe, chosen, placed, observed, significance)
    report = AuditReport(
        run=str(loaded.path),
        statement_id=recipe.statement_id,
        observer=chosen,
        canaries=kind,
        exercises=placed.exercises,
        repetitions=repetitions,
        evidence=evidence,
        any_mechanism=_any_mechanism(recipe, chosen, observed, significance),
        sensitivity=_sensitivity(recipe, repeater),
        sampling=_sampling(recipe, repeater.num_records(placed) + len(placed), observed),
        noise=next((found for found in observed.noise if not found.holds), observed.noise[0]),
        delta=recipe.delta,
        data=recipe.data.name,
        private=private,
        notes=(*recipe.notes, *((INTERNAL,) if private else ())),
    )
    if attach:
        report.attach()
    return report


def _require_public(private: bool, name: str) -> None:
    if private:
        raise AuditSetupError(
            f"an audit of {name} tells facts about private records without noise, and an attached one is "
            "published with the run; attach one of public data or of --data synthetic"
        )


def _check_options(
    observer: str, kind: str, count: int | None, repetitions: int | None, images: ImageData | None
) -> None:
    if observer not in OBSERVERS:
        raise AuditSetupError(f"unknown observer {observer!r}; use {', '.join(OBSERVERS)}")
    if kind not in KINDS:
        raise AuditSetupError(f"unknown canaries {kind!r}; use {', '.join(KINDS)}")
    if observer == "black-box" and kind in ("coordinate", "tangent"):
        raise AuditSetupError(f"a black-box observer cannot see {kind} canaries; use mislabelled or images")
    if images is not None and kind != "images":
        raise AuditSetupError(f"canary images were given for {kind} canaries; use canaries images")
    for name, value in {"count": count, "repetitions": repetitions}.items():
        if value is not None and value < (2 if name == "count" else 1):
            raise AuditSetupError(f"{name} must be at least {2 if name == 'count' else 1}, got {value}")


def judge(
    recipe: Recipe, observer: str, canaries: Canaries, observed: Observed, significance: float
) -> Evidence:
    """The deciding test, with an operating point fixed before the run.

    Scores of coordinate canaries under an observer of all iterates share no randomness, so their error
    rates are those of independent trials; the threshold is a log-likelihood ratio of 0. All other scores may
    depend on each other in any way: the f-DP test of one run.
    """
    family = recipe.family(observer)
    scores, included = observed.scores.numpy(), observed.included.numpy()
    if canaries.independent and observer == "all-iterates":
        return audit_trials(scores, included, family, choice=Choice((0.0,)), significance=significance)
    guesses = _guesses(recipe, observer, len(scores), significance)
    return audit_f_one_run(scores, included, family, choice=Choice((guesses,)), significance=significance)


def _guesses(recipe: Recipe, observer: str, count: int, significance: float) -> int:
    claimed = recipe.family(observer).claimed_epsilon
    return planned_guesses(epsilon_to_mu(max(claimed, 1e-3), recipe.delta), count, significance=significance)


def _any_mechanism(recipe: Recipe, observer: str, observed: Observed, significance: float) -> Evidence:
    guesses = _guesses(recipe, observer, len(observed.scores), significance)
    return audit_one_run(
        observed.scores.numpy(),
        observed.included.numpy(),
        recipe.family(observer).claimed_epsilon,
        recipe.delta,
        choice=Choice((guesses,)),
        significance=significance,
    )


def _sensitivity(recipe: Recipe, repeater: Repeater) -> SensitivityCheck:
    return check_sensitivity(
        repeater.learner,
        repeater.cached.features,
        recipe.data.train.labels,
        loss=LOSSES[recipe.request.model.loss](),
        l2_clip_norm=recipe.prepared.l2_clip_norm,
        adjacency=repeater.adjacency,
        normaliser=recipe.prepared.plan.normaliser,
    )


def _sampling(recipe: Recipe, records: int, observed: Observed) -> SamplingCheck:
    sampling = recipe.prepared.plan.sampling
    return check_sampling(
        sampling.kind, sampling.rate, records, observed.batch_sizes, observed.participations
    )
