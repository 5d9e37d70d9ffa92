"""What the processes of the tests of several processes do; every function runs in all of them."""

import os
import signal
from pathlib import Path
from unittest import mock

import torch
from builders import small_data

import dptaft
from dptaft.data import CheckedPixels, DataError, ImageData, Split
from dptaft.distributed import launched
from dptaft.distributed import share as share_module
from dptaft.distributed.blocks import own_range
from dptaft.distributed.process_group import joined
from dptaft.distributed.ranks import OneProcess
from dptaft.distributed.share import Share
from dptaft.training import optimizers
from dptaft.training.plan import ModelConfig, PerformanceConfig, PrivacyConfig, Request, Sampling
from dptaft.training.sampling import Sampler
from dptaft.training.sums import make_sampler, sources

RECORDS = 300  # three blocks: of four processes the last one has none


def data(count=RECORDS):
    return small_data(count)


def request(**changes):
    model = {name: changes.pop(name) for name in ("scope", "method") if name in changes}
    performance = PerformanceConfig(device="cpu", engine=changes.pop("engine", "auto"))
    privacy = PrivacyConfig(epsilon=float("inf"), **changes)
    return Request(privacy, ModelConfig(**model), {}, performance, "small")


class Given(Sampler):
    """A mask that the test chose."""

    kind = "poisson"

    def __init__(self, chosen):
        super().__init__(len(chosen))
        self.chosen = chosen

    def next_batch(self):
        return torch.nonzero(self.chosen).squeeze(1)


def mask(kind):
    """Over all records: a random one, and one without a record of the second process of two (or of four)."""
    chosen = torch.rand(RECORDS, generator=torch.Generator().manual_seed(3)) < 0.4
    if kind == "without":
        chosen[own_range(RECORDS, 1, 2).start :] = False
    return chosen


def everything(variants):
    """For every variant the first process's total at the same weights, and what it knows of all records."""
    place = launched()
    if place is None:
        return _everything(OneProcess(), variants)
    with joined(place) as ranks:
        return _everything(ranks, variants)


def _everything(ranks, variants):
    found = {}
    for name, (changes, sampling, masked) in variants.items():
        share = Share(ranks, data(), request(**changes))
        learner = share.build()
        cached, _ = share.features()
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in learner.parameters.values():
                start = 0.05 * torch.randn(parameter.shape, generator=generator)
                parameter.add_(start if ranks.is_first else 9.0)  # others must take the first one's
        own = own_range(RECORDS, ranks.rank, ranks.world_size)
        maker = make_sampler
        if masked is not None:
            chosen = mask(masked)[own.start : own.stop]

            def maker(sampling, count, source, chosen=chosen):
                return Given(chosen)

        whole = make_sampler(sampling, RECORDS, sources(request())[1])
        with mock.patch.object(share_module, "make_sampler", maker):
            share.begin(sampling, 0.05, "zero-out", whole if ranks.is_first else None)
        steps = [share.step() for _ in range(sampling.parts)]
        logits, finite = share.logits("float32", dict(learner.parameters) if ranks.is_first else None)
        found[name] = {
            "sum": [{key: value.clone() for key, value in clipped.value.items()} for clipped, _ in steps],
            "size": [size for _, size in steps],
            "sensitivity": [clipped.sensitivity for clipped, _ in steps],
            "digest": None if cached is None else cached.digest,
            "content": share.content(),
            "logits": logits,
            "finite": finite,
        }
    return found if ranks.is_first else None


def masks(rate, draws, seed):
    """The batches that each process draws by itself."""
    with joined(launched()) as ranks:
        share = Share(ranks, data(256), request(insecure_seed=seed))
        share.build()
        share.features()
        share.begin(Sampling("poisson", rate), 1.0, "zero-out")
        sampler, drawn = share._sums._sampler, torch.zeros(draws, 128, dtype=torch.bool)
        for i in range(draws):
            drawn[i, sampler.next_batch()] = True
        return drawn


def train(folder, options, *, kill=None, stop=None, count=RECORDS):
    """`dptaft.train`; ``kill``: (rank, step) where one is killed, ``stop``: step where all are asked to stop."""
    place, calls = launched(), []
    rank = 0 if place is None else place.rank
    Path(folder, f"pid{rank}").write_text(str(os.getpid()))
    real = optimizers.gaussian_mechanism

    def counted(*arguments, **more):
        calls.append(1)
        return real(*arguments, **more)

    def report(stage, done, total):
        if stage == "training" and kill is not None and done == kill[1]:
            os.kill(int(Path(folder, f"pid{kill[0]}").read_text()), signal.SIGKILL)
        if stage == "training" and done == stop:
            for other in range(place.world_size):
                os.kill(int(Path(folder, f"pid{other}").read_text()), signal.SIGTERM)

    with mock.patch.object(optimizers, "gaussian_mechanism", counted):
        run = dptaft.train(data(count), progress=report, **options)
    return str(run.path), len(calls)


def train_twice(folder, options, port):
    """Two equal runs, one after the other, in the same processes.

    The second one meets at another port: without a launcher's own store, a process that has left the first
    meeting may come back to it before the first process has closed it.
    """
    first = train(folder, {**options, "output": Path(folder, "a")})
    os.environ["MASTER_PORT"] = str(port)
    return [first, train(folder, {**options, "output": Path(folder, "b")})]


class Broken:
    """Images of which one cannot be read."""

    def __init__(self, pixels, bad):
        self.pixels, self.bad = pixels, bad

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        if index == self.bad:
            raise DataError("cannot read image 280: damaged")
        return self.pixels[index]

    def name(self, index):
        return f"image {index}"


def train_broken(options, skip):
    """Training where an image of the second process cannot be read."""
    whole = data()
    pixels = CheckedPixels(Broken(whole.train.pixels, 280), skip=skip)
    images = ImageData(
        "small", whole.classes, Split(pixels, whole.train.labels), whole.evaluation, True, skips_corrupt=skip
    )
    return dptaft.train(images, **options)


def train_out_of_memory(options):
    """Training where the second process has no memory for its sums."""
    from dptaft.training.fused import FusedEngine

    def full(*_):
        raise MemoryError("no room")

    if launched().rank == 1:
        FusedEngine.clipped_sum = full
    return dptaft.train(data(), **options)


def train_wrong(options):
    """Training where the second process has a bug."""
    if launched().rank == 1:
        from dptaft.training.fused import FusedEngine

        def wrong(*_):
            raise TypeError("a bug")

        FusedEngine.clipped_sum = wrong
    return dptaft.train(data(), **options)


def train_other_data(options):
    """Training where the second process has other records."""
    return dptaft.train(data(RECORDS - launched().rank), **options)


def train_permuted(options, copies=0):
    """Training where the second process has the same images in another order, unless all are copies."""
    whole = data()
    order = torch.arange(RECORDS)
    if launched().rank == 1 and not copies:
        for label in whole.train.labels.unique():  # within classes, so that the labels agree
            of_class = (whole.train.labels == label).nonzero().squeeze(1)
            order[of_class] = of_class.flip(0)
    for i in range(copies):
        order[RECORDS - 1 - i] = order[int((whole.train.labels == whole.train.labels[-1 - i]).nonzero()[0])]
    images = ImageData("small", whole.classes, whole.train.take(order.tolist()), whole.evaluation, True)
    return str(dptaft.train(images, **options).path)


def command(words):
    """Exit code, output and errors of the command line."""
    from click.testing import CliRunner

    from dptaft.cli import main

    result = CliRunner().invoke(main, words)
    return result.exit_code, result.stdout, result.stderr
