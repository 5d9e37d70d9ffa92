"""What a statement assumes of a run, and where the run says whether it did: one row per assumption.

A row compares one value of the statement with one value of ``run.toml`` (or ``metrics.jsonl``). A statement
may assume less than the run did, never more. Where the statement is silent it assumes nothing. Where
``run.toml`` is silent, `missing` stands for what the run did: the value on which the least can be claimed (a
run that does not say `certified` is not certified). Rows without one compare nothing then where ``run.toml``
is of an older version, which `verify` says; one with the table `training` owes a value to each of them.
Needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dptaft.runs import CONFIG
from dptaft.said import COMPOSED, ONE_SHOT, SELECTED, STEPS, UNSAID, RunSays, StatementSays
from dptaft_accounting.convexity import certified_name

UNIT_JACOBIAN = 1.0 + 2.0**-12
"""Norm of a Jacobian that training allows for, float32 rounding included."""

EVERY = "every"
CERTIFIED = "certified"
_CLOSE = 1e-9
_SHORT = 60


@dataclass(frozen=True)
class Assumption:
    """One thing that a statement assumes.

    Attributes:
        name: in words, as in docs/auditing.md.
        stated: where the statement says it (`dptaft.said.StatementSays`).
        ran: where the run says it (`dptaft.said.RunSays`).
        holds: whether the stated value assumes no more than the other one.
        of: the runs that it concerns: `every`, `steps`, `certified`, `one-shot`, `selected`, `composed`.
        missing: what the run did where it does not say; UNSAID compares nothing, unless the run owes it.
    """

    name: str
    stated: str
    ran: str
    holds: Callable[[Any, Any], bool]
    of: str = EVERY
    missing: Any = UNSAID

    def problem(self, statement: StatementSays, run: RunSays) -> str | None:
        """One line where the statement assumes more than the run did."""
        stated, ran = statement.value(self.stated), run.value(self.ran)
        ran = self.missing if ran is UNSAID else ran
        if stated is UNSAID or stated is None or (ran is UNSAID and not run.owes(self.ran)):
            return None
        try:
            fine = ran is not UNSAID and self.holds(stated, ran)
        except (TypeError, ValueError):  # another kind of value
            fine = False
        if fine:
            return None
        stated, ran = _where_they_differ(stated, ran)
        found = "nothing" if ran is None or ran is UNSAID else _short(ran)
        return f"{self.name}: the statement has {self.stated} {_short(stated)}, {CONFIG} {self.ran} {found}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHORT else text[: _SHORT - 3] + "..."


def _where_they_differ(stated: Any, ran: Any) -> tuple[Any, Any]:
    """The first two unequal values of lists of one length and of objects, for a message."""
    pairs: Iterable[tuple[Any, Any]] = ()
    if isinstance(stated, (list, tuple)) and isinstance(ran, (list, tuple)) and len(stated) == len(ran):
        pairs = zip(stated, ran, strict=True)
    elif isinstance(stated, Mapping) and isinstance(ran, Mapping):
        pairs = [({name: stated.get(name)}, {name: ran[name]}) for name in ran]
        return next((pair for pair in pairs if pair[0] != pair[1]), (stated, ran))
    return next((_where_they_differ(a, b) for a, b in pairs if a != b), (stated, ran))


def _same_parts(stated: Any, ran: Any) -> bool:
    """Parts by content, factor and shard; cost where the run names it."""
    fixed = ("id", "factor", "partition", "shard")
    return len(stated) == len(ran) and all(
        one.get(name) == two.get(name)
        for one, two in zip(stated, ran, strict=True)
        for name in {*fixed, *two}
    )


def _same(stated: Any, ran: Any) -> bool:
    return bool(_plain(stated) == _plain(ran)) and isinstance(stated, bool) == isinstance(ran, bool)


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value


def _close(stated: Any, ran: Any) -> bool:
    return math.isclose(stated, ran, rel_tol=_CLOSE)


def _at_least(stated: Any, ran: Any) -> bool:
    """A larger value assumes less: more steps, larger norms."""
    return float(stated) >= float(ran) * (1 - _CLOSE)


def _at_most(stated: Any, ran: Any) -> bool:
    return float(stated) <= float(ran) * (1 + _CLOSE)


def _asked(stated: Any, ran: Any) -> bool:
    """A run without noise asked for an infinite epsilon, and claims nothing."""
    return math.isfinite(ran) and _at_most(stated, ran)


def _is(*wanted: Any) -> Callable[[Any, Any], bool]:
    """The run has one of these values, whatever number the statement gives."""
    return lambda stated, ran: any(_same(ran, value) for value in wanted)


def _one_of(stated: Any, ran: Any) -> bool:
    return stated in ran


def _unless(free: Callable[[Any], bool], *honest: str) -> Callable[[Any, Any], bool]:
    """A use of the data is stated as `honest`, unless what the run did makes it free."""
    return lambda stated, ran: stated in honest or free(ran)


def _all_iterates_unless(stated: Any, ran: Any) -> bool:
    return stated == "all-iterates" or ran is True


def _constant(stated: Any, ran: Any) -> bool:
    return isinstance(ran, Mapping) and ran.get("kind") == "constant" and not ran.get("warmup_steps")


def _certified_loss(stated: Any, ran: Any) -> bool:
    return stated in (ran, certified_name(ran))


def _not_clipped(stated: Any, ran: Any) -> bool:
    return ran is True and stated != "clipping of a scalar output"


def _nothing(value: Any) -> bool:
    return not value


ASSUMPTIONS: tuple[Assumption, ...] = (
    # every run
    Assumption("name of the run", "admin.run", "run.id", _same),
    Assumption("time of the run", "admin.time", "run.time", _same),
    Assumption("kind of mechanism", "record.kind", "derived.kinds", _one_of),
    Assumption("adjacency", "claim.adjacency", "privacy.adjacency", _same, missing="zero-out"),
    Assumption("unit", "claim.unit", "training.unit", _same, missing="one training record"),
    Assumption("epsilon asked for", "claim.epsilon", "privacy.epsilon", _asked),
    Assumption("delta", "claim.delta", "training.delta", _same),
    Assumption("delta asked for", "claim.delta", "privacy.delta", _same),
    Assumption("method", "details.method", "model.method", _same, missing="tangent"),
    Assumption("loss", "details.loss", "model.loss", _same, missing="cross-entropy"),
    Assumption("scope", "details.scope", "model.scope", _same),
    Assumption("precision", "details.dtypes.features", "model.feature_precision", _same, missing="float32"),
    Assumption("source of noise", "implementation.noise_source", "training.noise_source", _same),
    Assumption("processes", "implementation.processes", "processes.count", _same, missing=1),
    Assumption("accuracy", "utility.value", "metrics.accuracy", _one_of),
    Assumption("images of the accuracy", "utility.records", "metrics.images", _one_of),
    Assumption(
        "use of the evaluation images",
        "claim.data_accesses.evaluation",
        "metrics.accuracy",
        _unless(_nothing, "not covered"),
    ),
    Assumption(
        "choice of settings",
        "claim.data_accesses.hyperparameters",
        "derived.given",
        _unless(_nothing, "not covered"),
    ),
    Assumption(
        "choice of the clip norm",
        "claim.data_accesses.clipping_choice",
        "derived.given",
        _unless(lambda given: "l2_clip_norm" not in given, "not covered"),
    ),
    Assumption(
        "head",
        "claim.data_accesses.head",
        "model.head",
        _unless(lambda head: head == "random", "not covered"),
    ),
    Assumption(
        "number of records",
        "claim.data_accesses.number_of_records",
        "privacy.adjacency",
        _unless(lambda adjacency: adjacency == "add-remove", "public"),
    ),
    Assumption(
        "class names",
        "claim.data_accesses.classes",
        "training.classes_are_public",
        _unless(lambda public: public is True, "not covered"),
    ),
    Assumption(
        "backbone",
        "claim.data_accesses.backbone",
        "derived.public_backbone",
        _unless(bool, "public, declared by the user", "not covered"),
    ),
    # gradient steps
    Assumption("optimiser", "details.optimizer", "optimizer.kind", _same, STEPS),
    Assumption("averaging of iterates", "details.averaging", "optimizer.averaging", _same, STEPS),
    Assumption(
        "released iterates", "claim.released", "privacy.certified", _all_iterates_unless, STEPS, False
    ),
    Assumption("sampler", "details.sampler", "training.sampling", _same, STEPS),
    Assumption("noise of every step", "record.noise_multiplier", "training.noise_multiplier", _same, STEPS),
    Assumption("steps accounted", "steps", "training.steps_executed", _at_least, STEPS),
    Assumption("steps executed", "details.steps_executed", "training.steps_executed", _same, STEPS),
    Assumption("steps planned", "details.steps_planned", "training.steps_planned", _same, STEPS),
    Assumption("sampling rate", "record.sampling_rate", "training.sampling_rate", _same, STEPS),
    Assumption("batches per epoch", "record.batches_per_epoch", "training.batches_per_epoch", _same, STEPS),
    Assumption("partition", "record.partition", "training.partition", _same, STEPS),
    Assumption("clip norm", "details.l2_clip_norm", "training.l2_clip_norm", _same, STEPS),
    Assumption("clip norm asked for", "details.l2_clip_norm", "privacy.l2_clip_norm", _same, STEPS),
    Assumption("kind of clipping", "details.clipping", "training.clipping", _same, STEPS),
    Assumption("standard deviation", "details.noise_std", "training.noise_std", _at_most, STEPS),
    Assumption("normaliser", "details.normaliser", "training.normaliser", _same, STEPS),
    Assumption("expected batch size", "details.expected_batch_size", "training.normaliser", _same, STEPS),
    # a certificate, which a last-iterate bound rests on
    Assumption("certified training", "certificate", "privacy.certified", _is(True), CERTIFIED, False),
    Assumption("plain gradient steps", "certificate", "optimizer.kind", _is("sgd"), CERTIFIED, None),
    Assumption("the last iterate", "certificate", "optimizer.averaging", _is("last"), CERTIFIED, None),
    Assumption("linear logits", "certificate", "model.method", _is("tangent"), CERTIFIED, None),
    Assumption("unit Jacobians", "certificate", "model.unit_jacobian", _is(True), CERTIFIED, False),
    Assumption(
        "constant step size",
        "certificate",
        "optimizer.learning_rate_schedule",
        _constant,
        CERTIFIED,
        None,
    ),
    Assumption(
        "loss of the certificate", "certificate.origin.loss", "model.loss", _certified_loss, CERTIFIED, None
    ),
    Assumption(
        "no clipping",
        "certificate.origin.gradient_bound",
        "model.unit_jacobian",
        _not_clipped,
        CERTIFIED,
        False,
    ),
    Assumption(
        "feature bound",
        "certificate.origin.feature_bound",
        "training.feature_bound",
        _at_least,
        CERTIFIED,
        UNIT_JACOBIAN,
    ),
    Assumption("step size", "certificate.step_size", "optimizer.learning_rate", _same, CERTIFIED, None),
    Assumption(
        "regularisation",
        "certificate.strong_convexity",
        "optimizer.l2_regularization",
        _same,
        CERTIFIED,
        None,
    ),
    Assumption("projection", "certificate.diameter", "training.projection_diameter", _same, CERTIFIED, None),
    Assumption(
        "clip norm of the certificate",
        "certificate.l2_clip_norm",
        "training.l2_clip_norm",
        _same,
        CERTIFIED,
    ),
    Assumption(
        "normaliser of the certificate",
        "certificate.normaliser",
        "training.normaliser",
        _same,
        CERTIFIED,
    ),
    Assumption(
        "largest batch", "certificate.max_batch_size", "training.max_batch_size", _at_least, CERTIFIED
    ),
    Assumption("records of the certificate", "certificate.records", "training.records", _same, CERTIFIED),
    # one perturbed problem in place of steps
    Assumption("diameter of Jacobians", "record.diameter", "training.diameter", _at_least, ONE_SHOT, 1.0),
    Assumption("bound on gradients", "record.gradient_bound", "training.diameter", _at_least, ONE_SHOT, 1.0),
    Assumption("number of classes", "record.classes", "derived.classes", _at_least, ONE_SHOT),
    Assumption("regularisation", "regularization", "optimizer.l2_regularization", _close, ONE_SHOT),
    Assumption(
        "noise of the objective", "objective_noise_std", "training.objective_noise_std", _same, ONE_SHOT
    ),
    Assumption("noise of the weights", "output_noise_std", "training.output_noise_std", _same, ONE_SHOT),
    Assumption(
        "solver's tolerance", "gradient_tolerance", "training.gradient_tolerance", _at_least, ONE_SHOT
    ),
    Assumption("records", "record.records", "training.records", _same, ONE_SHOT),
    # the best of several candidates
    Assumption(
        "mean number of candidates", "record.mean_candidates", "selection.mean_candidates", _same, SELECTED
    ),
    Assumption("shape of the number of candidates", "record.shape", "selection.shape", _same, SELECTED),
    Assumption(
        "law of the number of candidates",
        "record.candidate_count",
        "selection.candidate_count",
        _same,
        SELECTED,
        "truncated-negative-binomial",
    ),
    Assumption(
        "cost of one candidate", "candidate_epsilon", "selection.candidate_epsilon", _at_least, SELECTED
    ),
    Assumption("noise of the candidate", "candidate_mu", "derived.mu", _at_least, SELECTED),
    # a sum of runs
    Assumption("kind of sum", "composition.how", "composition.how", _same, COMPOSED, None),
    Assumption("number of parts", "details.composed_of", "derived.parts", _same, COMPOSED, None),
    Assumption("parts", "parts", "derived.entries", _same_parts, COMPOSED, None),
    Assumption("delta of the parts", "claim.delta", "derived.delta", _same, COMPOSED),
    Assumption("removed parts", "removed", "derived.removed", _same, COMPOSED, None),
    Assumption("disjoint parts", "composition.disjointness", "derived.disjointness", _same, COMPOSED, None),
    Assumption("composition of the parts", "shape", "derived.shape", lambda a, b: b.covers(a), COMPOSED),
)


def assumed_too_much(
    statement: Mapping[str, Any], config: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    """Everything that a statement assumes beyond what the run says it did, one line each.

    Args:
        statement: its groups.
        config: content of ``run.toml``.
        metrics: lines of ``metrics.jsonl``.
    """
    said, run = StatementSays(statement), RunSays(config, metrics)
    for row in ASSUMPTIONS:
        if _concerns(row, said, run):
            problem = row.problem(said, run)
            if problem is not None:
                yield problem


def is_of_older_version(config: Mapping[str, Any]) -> bool:
    """Whether ``run.toml`` lacks the table `training`, or a composition the records of its parts."""
    if "composition" in config:
        return any("record_sha256" not in part for part in config["composition"]["parts"])
    return "training" not in config


def _concerns(row: Assumption, said: StatementSays, run: RunSays) -> bool:
    if row.of == CERTIFIED:
        return said.certified
    if row.of == STEPS and run.kind == SELECTED:
        return row.stated.startswith("details.")  # those of the candidate
    return row.of in (EVERY, run.kind)
