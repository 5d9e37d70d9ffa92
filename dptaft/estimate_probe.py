"""A short measured rehearsal of a training on synthetic images: what one image, one record, one step costs.

The parts of a run are called as a run calls them, on small amounts: reading and preparing images, the frozen
network, writing and checking features, clipped sums, noise, checkpoint and ledger. No image of the data is
read, unless it is a public benchmark.
"""

from __future__ import annotations

import io
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from PIL import Image
from torch import Tensor

from dptaft.backbones import Preprocessing
from dptaft.budgeting import LedgerAccount
from dptaft.data import ImageData, as_pixels
from dptaft.feature_cache import read_features, write_features
from dptaft.features import boundary_of
from dptaft.identity import Identity
from dptaft.learner import FEATURE_BATCH, Cached, Learner, PixelDigest
from dptaft.tangent.operator import Features
from dptaft.training.account import Account, NoAccount
from dptaft.training.clipping import Adjacency, ClippedSum
from dptaft.training.fused import FusedEngine
from dptaft.training.losses import LOSSES
from dptaft.training.opacus_engine import OpacusEngine
from dptaft.training.plan import Request
from dptaft.training.preparation import Prepared
from dptaft.training.sampling import Poisson
from dptaft.training.steps import RunState
from dptaft.training.sums import sources
from dptaft_accounting import PrivacyStatement

_SECONDS = 2.0
_DISK_BYTES = 96 << 20
_LARGEST_SHARE = 0.2
_KEY = "0" * 64
_DRAWS = 1 << 18
DEFAULT_PIECE = 512


@dataclass(frozen=True)
class Probe:
    """What was measured; seconds of one process of this machine, at its load of the moment.

    Attributes:
        image_seconds: to read, decode and prepare one image.
        identify_seconds: to read, decode and digest one image.
        feature_seconds: frozen network and constants of one image, with its Gram where that is kept on disk.
        gram_seconds: Gram of one record, where training computes it before the first step.
        sum_seconds: clipped sum over one record, in a batch of `batch` records.
        step_seconds: noise and optimiser of one step, beyond the clipped sum.
        block_seconds: to authorise a block of steps in ledger and checkpoint, durably.
        finish_seconds: accounting at the start and for the statement.
        write_seconds: to write one byte of features, with its checksum.
        check_seconds: to check one byte of features that was just written.
        pick_seconds: to bring one sampled record of a cache into memory.
        read_seconds: to read one byte of features that is not in memory.
        record_bytes: constants of one record on disk (with its Gram where kept) or in memory.
        gram_bytes: of one record in memory, 0 where none is held.
        draw_seconds: to decide for one record whether it takes part in a step.
        batch: records of the measured clipped sum.
        batch_bytes: constants of those records.
        trained: number of trained weights.
        resident_bytes: peak of this process while it did all this.
        device_bytes: the same on the GPU; 0 on a CPU.
    """

    image_seconds: float
    identify_seconds: float
    feature_seconds: float
    gram_seconds: float
    sum_seconds: float
    step_seconds: float
    block_seconds: float
    finish_seconds: float
    write_seconds: float
    check_seconds: float
    pick_seconds: float
    read_seconds: float
    record_bytes: int
    gram_bytes: int
    draw_seconds: float
    batch: int
    batch_bytes: int
    trained: int
    resident_bytes: int
    device_bytes: int


def measure(
    prepared: Prepared,
    request: Request,
    data: ImageData,
    *,
    image_side: int | None = None,
    available: int = 1 << 34,
) -> Probe:
    """Rehearse each part of the run for a few seconds.

    Args:
        prepared: every public decision.
        request: what the run would be asked for.
        data: number of records and classes; its images are read only where they are a public benchmark.
        image_side: of the synthetic JPEG files that stand for private images; None takes the model's.
        available: bytes of memory that may be used; the rehearsed batch stays far below.
    """
    learner = prepared.learner
    on_gpu = learner.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(learner.device)
    forget_peak()
    read = _reader(data, learner.backbone.preprocessing, image_side)
    image_s, identify_s = _image_seconds(read, learner.backbone.preprocessing)
    before = peak_resident()
    features, feature_s = _features(learner, data, read)
    extracting = peak_resident() - before
    whole = min(FEATURE_BATCH, len(data.train)) / len(features)  # of a batch, of which time allowed a part
    cache = request.performance.feature_cache
    disk = _Disk(0.0, 0.0, 0.0, 0.0) if cache is None else _disk(features, existing_folder(cache))
    count = _batch(prepared, request, data, features, available)
    sums = _sums(prepared, request, features, count)
    block_s, finish_s = _bookkeeping(prepared, request, data, features)
    return Probe(
        image_seconds=image_s,
        identify_seconds=identify_s,
        feature_seconds=feature_s,
        write_seconds=disk.write_seconds,
        check_seconds=disk.check_seconds,
        pick_seconds=disk.pick_seconds,
        read_seconds=disk.read_seconds,
        record_bytes=features.nbytes // len(features),
        draw_seconds=_draw_seconds(prepared, request),
        batch=count,
        batch_bytes=count * features.nbytes // len(features),
        trained=sum(p.numel() for p in learner.parameters.values()),
        block_seconds=block_s,
        finish_seconds=finish_s,
        resident_bytes=max(peak_resident(), round(before + whole * extracting)),
        device_bytes=torch.cuda.max_memory_allocated(learner.device) if on_gpu else 0,
        gram_seconds=sums.gram_seconds,
        gram_bytes=sums.gram_bytes,
        sum_seconds=sums.sum_seconds,
        step_seconds=sums.step_seconds,
    )


def forget_peak() -> None:
    """Let the peak of the resident set begin anew, where the system can (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_resident() -> int:
    """Largest resident set of this process since it began, or since `forget_peak`; in bytes."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except OSError:  # no Linux
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# ---------------------------------------------------------------------- images


def _reader(data: ImageData, preprocessing: Preprocessing, side: int | None) -> Callable[[int], Tensor]:
    """Images of a public benchmark, or a noisy JPEG file in memory that is decoded again every time."""
    if data.is_public:
        return lambda index: data.train.pixels[index % len(data.train)]
    side = side or round(preprocessing.size / preprocessing.crop_pct)
    mode, channels = ("L", 1) if preprocessing.channels == 1 else ("RGB", 3)
    noise = torch.randint(64, 192, (side, side, channels), dtype=torch.uint8)
    stored = io.BytesIO()
    Image.fromarray(noise.squeeze(2).numpy() if channels == 1 else noise.numpy(), mode).save(stored, "JPEG")
    return lambda _: as_pixels(Image.open(io.BytesIO(stored.getvalue())))


def _image_seconds(read: Callable[[int], Tensor], preprocessing: Preprocessing) -> tuple[float, float]:
    digest = PixelDigest()
    prepare = _rate(lambda i: preprocessing(read(i)))
    return prepare, _rate(lambda i: digest.add(read(i)))


def _rate(work: Callable[[int], object], share: float = 1 / 8) -> float:
    """Seconds of one call, after a first one that is not counted."""
    work(0)
    started, done = time.perf_counter(), 0
    while done < 3 or time.perf_counter() - started < share * _SECONDS:
        work(done)
        done += 1
    return (time.perf_counter() - started) / done


# ---------------------------------------------------------------------- features


def _features(learner: Learner, data: ImageData, read: Callable[[int], Tensor]) -> tuple[Features, float]:
    """Constants of as many images as a run takes at once, or as the time allows, and seconds for one."""
    one = learner.backbone.preprocessing(read(0))
    kept = learner.performance.feature_cache is not None and learner.keeps_grams

    def extract(images: Tensor) -> Features:
        part = learner.operator.extract(
            boundary_of(learner.tangent, images.to(learner.device), learner.config.feature_precision)
        )
        part = Features(part.tensors, learner.operator.gram(part)) if kept else part
        _wait(learner)
        return part

    extract(one[None])
    first = _once(lambda: extract(one[None]))
    count = max(1, min(FEATURE_BATCH, len(data.train), int(_SECONDS / first)))
    images = torch.stack([learner.backbone.preprocessing(read(i)) for i in range(count)])
    found = [extract(images)]
    repeats = 2 if first * count > _SECONDS / 2 else 4
    return found[0], min(_once(lambda: extract(images)) for _ in range(repeats)) / count


def _once(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _wait(learner: Learner) -> None:
    if learner.device.type == "cuda":
        torch.cuda.synchronize(learner.device)


def existing_folder(path: str | None) -> Path:
    """The deepest folder of a path that exists already; the current one for None.

    >>> existing_folder("/no/such/folder")
    PosixPath('/')
    """
    wanted = Path(path or ".").expanduser().absolute()
    return next(folder for folder in (wanted, *wanted.parents) if folder.is_dir())


@dataclass(frozen=True)
class _Disk:
    """Fields of `Probe`."""

    write_seconds: float
    check_seconds: float
    pick_seconds: float
    read_seconds: float


def _disk(features: Features, folder: Path) -> _Disk:
    """Write features, check them, pick some, and read them from the disk itself."""
    parts = max(1, min(_DISK_BYTES, 4096 * features.nbytes) // features.nbytes)
    amount, count = parts * features.nbytes, parts * len(features)
    with _scratch(folder) as scratch:
        root = scratch / "features"
        write = _once(lambda: write_features(root, _KEY, (features for _ in range(parts)), count))
        check = _once(lambda: read_features(root, _KEY))
        stored = read_features(root, _KEY)
        some = torch.randperm(count)[: min(count, DEFAULT_PIECE)].sort().values
        pick = _rate(lambda _: stored.index(some)) / len(some)
        files = list((root / _KEY).iterdir())
        for path in files:
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        read = _once(lambda: _drain(files))
    return _Disk(write / amount, check / amount, pick, read / amount)


def _drain(paths: Sequence[Path]) -> None:
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 20):
                pass


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A private folder for a moment, on the file system that a run would use where that can be written."""
    place = folder if os.access(folder, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix=".dptaft-plan-", dir=place) as name:
        yield Path(name)


# ---------------------------------------------------------------------- steps


def _batch(prepared: Prepared, request: Request, data: ImageData, features: Features, available: int) -> int:
    piece = request.performance.physical_batch_size or DEFAULT_PIECE
    expected = max(1, round(len(data.train) * prepared.plan.sampling.rate))
    fits = max(1, int(_LARGEST_SHARE * available) * len(features) // max(1, features.nbytes))
    return min(piece, expected, fits)


@dataclass(frozen=True)
class _Sums:
    """Fields of `Probe`."""

    gram_seconds: float
    gram_bytes: int
    sum_seconds: float
    step_seconds: float


def _sums(prepared: Prepared, request: Request, features: Features, count: int) -> _Sums:
    """Clipped sums of `count` records, and private steps with them."""
    learner = prepared.learner
    many = features.index(torch.arange(count, device=learner.device) % len(features))
    labels = torch.arange(count) % learner.operator.num_classes
    indices = torch.arange(count)

    def build() -> FusedEngine | OpacusEngine:
        return learner.engine(
            many,
            labels,
            loss=LOSSES[request.model.loss](),
            l2_clip_norm=prepared.l2_clip_norm,
            adjacency=cast(Adjacency, prepared.plan.adjacency),
        )

    def build_and_end() -> None:
        _end(build())

    build_s = min(_once(build_and_end) for _ in range(2))
    engine = build()

    def clipped() -> ClippedSum:
        found = engine.clipped_sum(learner.parameters, indices)
        _wait(learner)
        return found

    clipped()
    sum_s = _rate(lambda _: clipped(), 1 / 2)
    with _rehearsal(prepared, request, many, labels) as state:
        both = _rate(lambda _: state.private.private_step(clipped()), 1 / 2)
    _end(engine)
    on_disk = request.performance.feature_cache is not None
    held = isinstance(engine, FusedEngine) and engine.holds_grams and not on_disk
    return _Sums(
        gram_seconds=build_s / count if held else 0.0,
        gram_bytes=8 * learner.operator.num_classes**2 if held else 0,
        sum_seconds=sum_s / count,
        step_seconds=max(0.0, both - sum_s),
    )


def _end(engine: FusedEngine | OpacusEngine) -> None:
    if isinstance(engine, OpacusEngine):
        engine.close()  # takes its hooks off the model


def _draw_seconds(prepared: Prepared, request: Request) -> float:
    if prepared.plan.sampling.kind == "full-batch":
        return 0.0
    sampler = Poisson(_DRAWS, prepared.plan.sampling.rate, sources(request)[1])
    return _rate(lambda _: sampler.next_batch()) / _DRAWS


@contextmanager
def _rehearsal(
    prepared: Prepared, request: Request, features: Features, labels: Tensor, account: Account | None = None
) -> Iterator[RunState]:
    with _scratch(Path.cwd()) as scratch:
        state = RunState(
            prepared,
            request,
            prepared.learner.parameters,
            Cached(features, _KEY),
            labels,
            scratch / "run.partial",
            account or NoAccount("a rehearsal"),
            sources(request)[0],
        )
        try:
            yield state
        finally:
            state.close()


def _bookkeeping(
    prepared: Prepared, request: Request, data: ImageData, features: Features
) -> tuple[float, float]:
    """Seconds to authorise and keep a block of steps, and for the accounting of a whole run."""
    if prepared.plan.noise_multiplier == 0:
        return 0.0, 0.0
    labels, spending = torch.zeros(len(features), dtype=torch.int64), prepared.spending()
    with _scratch(Path.cwd()) as scratch:
        known = Identity(_KEY, ())  # records that are only counted have no pixels to know them by
        account = LedgerAccount(scratch / "ledger.sqlite", data, scratch / "run", content=lambda: known)
        start_s = _once(lambda: account.reserve(spending))
        try:
            with _rehearsal(prepared, request, features, labels, account) as state:
                block_s = _once(state.authorise) + _once(state.save)
            end_s = _once(lambda: account.commit(spending))
        finally:
            account.close()
    end_s += _once(
        lambda: PrivacyStatement.build(
            prepared.plan.mechanism(), prepared.plan.delta, certificate=spending.certificate
        )
    )
    return block_s, start_s + end_s
