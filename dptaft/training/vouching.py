"""Which uses of the data a claim covers, what it assumes, and who vouches for each assumption."""

from __future__ import annotations

from collections.abc import Mapping

from dptaft.bundled import has_public_weights
from dptaft.data import ImageData
from dptaft.training.one_shot_plan import OneShotPlan
from dptaft.training.plan import Plan, Request
from dptaft_accounting.convexity import ConvexityCertificate

COVERED, PUBLIC, NOT_COVERED, NONE = "covered", "public", "not covered", "none"
DECLARED = "public, declared by the user"
_BY_PROOF, _BY_CODE, _BY_USER, _BY_NOBODY = (
    "proved",
    "enforced by the code",
    "declared by the user",
    "not checked",
)


def data_accesses(data: ImageData, request: Request, *, tuned: bool) -> dict[str, str]:
    """Every use of the data -> `covered`, `public`, the user's word for it, `not covered` or `none`.

    Args:
        data: what was trained on.
        request: what was asked for.
        tuned: whether the user set anything that could have been chosen by looking at the data.
    """
    privacy = request.privacy
    declared = PUBLIC if data.is_public else DECLARED
    return {
        "training": COVERED,
        "normalisation": PUBLIC,
        "classes": declared if data.classes_are_public else NOT_COVERED,
        "clipping_choice": PUBLIC if privacy.l2_clip_norm is None else NOT_COVERED,
        "hyperparameters": NOT_COVERED if tuned else PUBLIC,
        "head": PUBLIC if request.model.head == "random" else NOT_COVERED,
        "early_stopping": NONE,
        "number_of_records": _number(request),
        "backbone": _backbone(request),
        "evaluation": NONE if data.evaluation is None else NOT_COVERED,
        **({"hold_out": NOT_COVERED} if held_out_by_class(data) else {}),
    }


def _number(request: Request) -> str:
    """A certified step covers at most the public size: that it bounds the number is the user's word."""
    if request.privacy.adjacency != "add-remove":
        return PUBLIC
    return DECLARED if request.privacy.certified else NONE


def held_out_by_class(data: ImageData) -> bool:
    """Whether the numbers of private images per class decide which of them are held out."""
    return data.evaluation is not None and "replace-one" in data.unstable_under


def _backbone(request: Request) -> str:
    """Bundled and untrained weights never saw the records; for all others the user's choice is his word."""
    return PUBLIC if has_public_weights(request.model.name, request.model.weights) else DECLARED


def assumptions(
    data: ImageData,
    request: Request,
    plan: Plan | OneShotPlan,
    backbone: Mapping[str, str],
    certificate: ConvexityCertificate | None = None,
    processes: int = 1,
) -> list[dict[str, str]]:
    """Everything the claim rests on, with who vouches for it and where to look.

    Several processes rest on more: sums travel between them before they are noised.
    """
    found = _of_one_shot(plan) if isinstance(plan, OneShotPlan) else _of_steps(plan, certificate)
    if processes > 1:
        found += [
            ("every record is in the sums of one process only", _BY_CODE, "dptaft/distributed/share.py"),
            (
                f"what the {processes} processes send each other, sums without noise among it, stays secret",
                _BY_NOBODY,
                "the network",
            ),
        ]
    if request.privacy.adjacency == "add-remove":
        found.append(("the public number of records does not come from the data", _BY_USER, "--public-size"))
        if certificate is not None:
            found.append(
                (
                    "there are never more records than the public number; data that exceed it are refused, "
                    "before anything is charged, and that refusal is not covered",
                    _BY_USER,
                    "--public-size",
                )
            )
    if data.classes_are_public and not data.is_public:
        found.append(("the list of classes does not come from the data", _BY_USER, "--classes"))
    by, where = (
        (_BY_CODE, "fingerprint in run.toml") if _backbone(request) == PUBLIC else (_BY_USER, "--model")
    )
    return [
        {"assumption": text, "vouched_by": who, "where": place}
        for text, who, place in (
            *found,
            (f"the weights of the backbone {backbone['name']} were not made from these records", by, where),
            ("one person owns at most one record", _BY_NOBODY, "the data"),
            ("the operating system's entropy is unpredictable", _BY_NOBODY, "the training machine"),
            ("checkpoints, caches and logs of the run stay secret", _BY_NOBODY, "the training machine"),
        )
    ]


def _of_one_shot(plan: OneShotPlan) -> list[tuple[str, str, str]]:
    """What a run without steps rests on."""
    found = [
        ("epsilon is an upper bound for the recorded mechanism", _BY_PROOF, "docs/accounting.md"),
        ("one record's Jacobian has diameter at most 1", _BY_CODE, "dptaft/tangent/diameter.py"),
        (
            "the released point was found to the gradient tolerance before noise was added",
            _BY_CODE,
            "dptaft/training/one_shot.py",
        ),
        ("the weights get Gaussian noise of the stated deviation", _BY_CODE, "dptaft/training/noise.py"),
    ]
    if plan.noise_std > 0:
        found.append(
            (
                "the objective's random linear term is Gaussian, of the stated deviation, and secret",
                _BY_CODE,
                "dptaft/training/one_shot.py",
            )
        )
    return found


def _of_steps(plan: Plan, certificate: ConvexityCertificate | None) -> list[tuple[str, str, str]]:
    """What a run of noisy steps rests on."""
    found = [
        ("epsilon is an upper bound for the recorded mechanism", _BY_PROOF, "docs/accounting.md"),
        (
            "one record moves the noised sum of a step by at most the stated sensitivity",
            _BY_CODE,
            "dptaft/training/clipping.py",
        ),
        (
            "every step adds Gaussian noise of at least the stated standard deviation",
            _BY_CODE,
            "dptaft/training/noise.py",
        ),
        ("every step that may have touched the data is counted", _BY_CODE, "dptaft/training/checkpoint.py"),
        (_SAMPLING[plan.sampling.kind], _BY_CODE, "dptaft/training/sampling.py"),
    ]
    if certificate is not None:
        found += [
            ("the loss is convex and each step contracts as certified", _BY_PROOF, "accounting.certificate"),
            ("features and steps obey the certificate's bounds", _BY_CODE, "accounting.certificate"),
            ("no iterate but the last one leaves the training machine", _BY_NOBODY, "the user"),
        ]
    return found


_SAMPLING = {
    "full-batch": "every step sums all records",
    "poisson": "every step draws each record independently and secretly, at the stated rate",
    "cyclic-partition": "the partition into batches is uniformly random and secret",
}
