"""Training as one call; the command line is a thin layer over it."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dptaft.training.plan import ModelConfig, PerformanceConfig, PrivacyConfig, Request

if TYPE_CHECKING:
    from dptaft.data import ImageData
    from dptaft.identity import Identity
    from dptaft.learner import Progress
    from dptaft.runs import Run
    from dptaft.training.account import Account


def train(
    data: str | ImageData = "digits",
    *,
    epsilon: float,
    delta: float | None = None,
    model: str = "starter",
    weights: str = "pretrained",
    scope: str = "last:1",
    method: str = "tangent",
    loss: str = "cross-entropy",
    seed: int = 0,
    feature_precision: str = "float32",
    head: str = "random",
    centered: bool = True,
    fresh_class_token: bool = False,
    reinitialised_blocks: int = 0,
    adjacency: str = "zero-out",
    public_size: int | None = None,
    steps: int | None = None,
    l2_clip_norm: float | None = None,
    sampling: str = "auto",
    expected_batch_size: int | None = None,
    insecure_seed: int | None = None,
    certified: bool = False,
    optimizer: Mapping[str, Any] | None = None,
    classes: Sequence[str] | None = None,
    public_data: bool = False,
    skip_corrupt: bool = False,
    device: str = "auto",
    engine: str = "auto",
    physical_batch_size: int | None = None,
    feature_cache: str | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    ledger: str | Path | Account | None = "auto",
    progress: Progress | None = None,
) -> Run:
    """Train privately and return the finished run.

    Where a launcher such as torchrun started several processes, and all of them make this call, they share
    the records (docs/parallel.md); the first one writes the run, and all return it.

    Args:
        data: name or path for `dptaft.load_data`, or images that are loaded already.
        epsilon: target; ``inf`` trains without noise and claims nothing.
        delta: None takes ``min(1e-5, 1/(10 n))``.
        model: ``starter`` or a timm name.
        weights: ``pretrained``, ``random``, or the path of a checkpoint.
        scope: linearised part: ``head``, ``last:K``, ``attention:K`` or ``all``.
        method: ``tangent``; ``non-linear`` for ordinary fine-tuning of the same weights; or
            ``objective-perturbation`` or ``output-perturbation`` for a tangent model that is solved once,
            with no steps, clip norm or step size to choose.
        loss: ``cross-entropy``, ``rescaled-square`` or ``huber-square``.
        seed: of everything random in the model (head, fresh parts); noise and samples are never seeded by it.
        feature_precision: of cached activations; what is cached defines the model.
        head: ``random``, or a safetensors file with ``weight`` and ``bias``.
        centered: drop the offset f(x; w0), which is arbitrary with a random head.
        fresh_class_token: replace the class token at the first linearised block by a trainable one.
        reinitialised_blocks: number of last blocks that start afresh.
        adjacency: ``zero-out``, ``add-remove`` or ``replace-one``.
        public_size: public number to normalise by, for ``add-remove``.
        steps: gradient steps; None takes the public default.
        l2_clip_norm: bound on one record's gradient; None takes the public default.
        sampling: ``auto``, ``full-batch``, ``poisson`` or ``cyclic-partition``.
        expected_batch_size: for Poisson samples and cyclic parts.
        insecure_seed: seeds noise and samples, for debugging; voids the claim.
        certified: train a convex loss on unit Jacobians within a certificate, to convergence, and claim the
            final weights alone; step size, regularisation, steps and noise are planned (docs/certified.md).
        optimizer: fields of `dptaft.training.optimizers.OptimizerConfig`; others take public defaults.
        classes: declared class names.
        public_data: declare the images a public benchmark (its class list is then public too).
        skip_corrupt: count an image that cannot be read as an empty record, in place of refusing all.
        device: ``auto``, ``cpu``, ``cuda``, ...
        engine: ``auto``, ``fused``, ``hooks`` or ``ghost``.
        physical_batch_size: records in memory at once.
        feature_cache: folder for cached features; None keeps them in memory.
        output: folder of the run, which must not exist; None takes ``runs/<id>``.
        resume: continue the interrupted run of the same `output`.
        ledger: budget ledger that is charged: ``auto`` for ``ledger.sqlite`` beside the run folder, a path,
            None for none (the statement says so), or an account of the caller's own.
        progress: called with (stage, done, total).

    Raises:
        ValueError: a request that cannot be met; one line that names the value and the remedy.

    Formal guarantees:
        The released weights are (epsilon, delta)-differentially private for one training record under
        `adjacency`, with the epsilon of the run's statement, at most the requested one. Evaluation numbers
        and everything that the statement lists as not covered are outside the guarantee.
    """
    request = Request(
        privacy=PrivacyConfig(
            epsilon=epsilon,
            delta=delta,
            adjacency=adjacency,
            steps=steps,
            l2_clip_norm=l2_clip_norm,
            sampling=sampling,
            expected_batch_size=expected_batch_size,
            public_size=public_size,
            insecure_seed=insecure_seed,
            certified=certified,
        ),
        model=ModelConfig(
            name=model,
            weights=weights,
            scope=scope,
            method=method,
            loss=loss,
            seed=seed,
            feature_precision=feature_precision,
            head=head,
            centered=centered,
            fresh_class_token=fresh_class_token,
            reinitialised_blocks=reinitialised_blocks,
            unit_jacobian=certified,
        ),
        optimizer=dict(optimizer or {}),
        performance=PerformanceConfig(device, engine, physical_batch_size, feature_cache),
        data=data if isinstance(data, str) else data.name,
    )
    from dptaft.budgeting import open_account
    from dptaft.data import load_data
    from dptaft.distributed import launched

    def load() -> ImageData:
        images = data
        if isinstance(images, str):
            images = load_data(images, classes=classes, public=public_data, skip_corrupt=skip_corrupt)
        images.check_adjacency(adjacency)
        return images

    def named(images: ImageData) -> Path:
        return Path(output) if output is not None else Path("runs") / _new_id(images.name, epsilon)

    def charged(images: ImageData, target: Path, content: Callable[[], Identity] | None = None) -> Account:
        if ledger is not None and not isinstance(ledger, str | Path):
            return ledger
        return open_account(
            images, request, target, ledger=ledger, content=content, resume=resume, progress=progress
        )

    place = launched()
    if place is not None:
        from dptaft.distributed.run import train_together

        return train_together(place, load, request, named, charged, resume=resume, progress=progress)
    from dptaft.training.trainer import run_training

    images = load()
    target = named(images)
    account = charged(images, target)
    run = run_training(images, request, target, account=account, resume=resume, progress=progress)
    images.warn_unreadable()
    return run


def _new_id(name: str, epsilon: float) -> str:
    time = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    safe = "".join(c if c.isalnum() else "-" for c in name)
    return f"{time}-{safe}-eps{epsilon:g}-{secrets.token_hex(2)}"
