"""Noise: distribution with negative controls, the public grid, secrecy of the stream."""

import copy
import math
import os
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from scipy import stats

from dptaft.training import noise
from dptaft.training.noise import InsecureSeededNoise, NoiseSource, gaussian_mechanism, noise_std

COUNT = 2_000_000
LIMIT = 6.0  # standard errors; a correct source fails one check in 5e8


def z_scores(x):
    """Deviations, in standard errors under N(0, 1), of moments, tails and lag correlations of x."""
    x = x.double().flatten()
    n = len(x)
    scores = {
        "mean": x.mean() * math.sqrt(n),
        "variance": (x.square().mean() - 1) / math.sqrt(2 / n),
        "skewness": x.pow(3).mean() / math.sqrt(15 / n),
        "kurtosis": (x.pow(4).mean() - 3) / math.sqrt(96 / n),
        "bias of signs": x.sign().mean() * math.sqrt(n),
    }
    for at in (0.5, 2.0, 3.0, 4.0):
        p = 2 * stats.norm.sf(at)
        scores[f"tail {at}"] = ((x.abs() > at).double().mean() - p) / math.sqrt(p * (1 - p) / n)
    for lag in (1, 2, noise._CHUNK // 2, noise._CHUNK):
        scores[f"lag {lag}"] = (x[:-lag] * x[lag:]).mean() * math.sqrt(n - lag)
        squares = (x[:-lag].square() - 1) * (x[lag:].square() - 1) / 2
        scores[f"lag {lag}, squares"] = squares.mean() * math.sqrt(n - lag)
    return {name: abs(float(score)) for name, score in scores.items()}


def release(noise_multiplier=1.0, sensitivity=1.0, source=None):
    """What the mechanism added, divided by what it should have as standard deviation."""
    value = torch.linspace(-50, 50, COUNT, dtype=torch.float64)
    source = source or NoiseSource()
    out = gaussian_mechanism(
        {"w": value}, sensitivity=sensitivity, noise_multiplier=noise_multiplier, source=source
    )
    return (out["w"] - value) / (noise_multiplier * sensitivity)


def test_released_noise_is_standard_normal():
    scores = z_scores(release(noise_multiplier=2.0, sensitivity=3.0))
    assert max(scores.values()) < LIMIT, scores


def test_noise_passes_kolmogorov_smirnov():
    assert stats.kstest(NoiseSource().normal((200_000,), dtype=torch.float64).numpy(), "norm").pvalue > 1e-8


@pytest.mark.parametrize(
    ("spoil", "caught_by"),
    [
        (lambda x: 0.98 * x, "variance"),
        (lambda x: x + 0.01, "mean"),
        (lambda x: math.sqrt(3) * torch.special.erf(x / math.sqrt(2)), "kurtosis"),
        (lambda x: x.clamp(-3.5, 3.5), "tail 4.0"),
        (
            lambda x: torch.cat([x[: len(x) // 2], x[: len(x) // 2]])[torch.arange(len(x)).reshape(2, -1).T],
            "lag 1",
        ),
        (lambda x: x + 0.02 * x.roll(1), "lag 1"),
        (
            lambda x: x * (0.9 + 0.1 * x.roll(1).square()),
            "lag 1, squares",
        ),
        (lambda x: x.abs() * torch.where(torch.arange(len(x)) % 50 == 0, 1.0, x.sign()), "bias of signs"),
    ],
)
def test_checks_reject_spoiled_noise(spoil, caught_by):
    scores = z_scores(spoil(release()))
    assert scores[caught_by] > LIMIT, scores


def test_two_percent_too_little_noise_is_rejected(monkeypatch):
    monkeypatch.setattr(noise, "noise_std", lambda **given: 0.98 * noise_std(**given))
    assert z_scores(release())["variance"] > LIMIT


def test_draws_of_tensors_calls_and_sources_are_independent():
    value = {"a": torch.zeros(100_000), "b": torch.zeros(10, 10_000)}
    source = NoiseSource()
    rows = []
    for given in (source, source, NoiseSource()):
        out = gaussian_mechanism(value, sensitivity=1.0, noise_multiplier=1.0, source=given)
        rows += [noised.flatten() for noised in out.values()]
    correlation = torch.corrcoef(torch.stack(rows)) - torch.eye(6)
    assert correlation.abs().max() < LIMIT / math.sqrt(100_000)


def test_release_lies_on_the_public_grid():
    value = torch.randn(10_001, dtype=torch.float64) * 7
    kept = value.clone()
    out = gaussian_mechanism({"w": value}, sensitivity=1.0, noise_multiplier=0.7, source=NoiseSource())["w"]
    assert torch.equal(value, kept)
    spacing = noise_std(sensitivity=1.0, noise_multiplier=0.7, dimension=10_001) * 2.0**-noise.GRID_BITS
    cells = out / spacing
    assert (cells - cells.round()).abs().max() < 1e-5
    # negative control: noise added in plain floating point does not
    plain = (value + 0.7 * torch.randn(10_001, dtype=torch.float64)) / spacing
    assert (plain - plain.round()).abs().max() > 0.4


def test_rounding_keeps_neighbours_within_the_charged_sensitivity():
    dimension, z, spacing_bits = 4096, 1.0, 2.0**-noise.GRID_BITS
    std = noise_std(sensitivity=1.0, noise_multiplier=z, dimension=dimension)
    a = torch.randn(dimension, dtype=torch.float64)
    step = torch.randn(dimension, dtype=torch.float64)
    b = a + step / step.norm()
    rounded = [(x / (std * spacing_bits)).round() * (std * spacing_bits) for x in (a, b)]
    assert (rounded[0] - rounded[1]).norm() <= std / z
    # worst case: all coordinates round apart
    worst = 1.0 + math.sqrt(dimension) * std * spacing_bits
    assert worst <= std / z


def test_very_large_sums_saturate_instead_of_failing():
    out = gaussian_mechanism(
        {"w": torch.tensor([1e30, -1e30])}, sensitivity=1.0, noise_multiplier=1.0, source=NoiseSource()
    )
    assert torch.isfinite(out["w"]).all()
    assert out["w"][0] > 1e6 > -1e6 > out["w"][1]


def test_zero_noise_returns_the_sum():
    value = {"w": torch.randn(5)}
    out = gaussian_mechanism(value, sensitivity=1.0, noise_multiplier=0.0, source=NoiseSource())
    assert torch.equal(out["w"], value["w"])
    assert out["w"] is not value["w"]


def test_prefetched_noise_is_used_once_and_is_normal():
    source = NoiseSource()
    source.prefetch(100_000)
    first, second = source.normal((60_000,)), source.normal((60_000,))
    assert z_scores(torch.cat([first, second]))["variance"] < LIMIT
    assert len(torch.unique(torch.cat([first, second]))) > 119_000


def test_a_process_ends_cleanly_while_noise_is_drawn():
    code = "from dptaft.training.noise import NoiseSource; NoiseSource().prefetch(3_000_000)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_normals_are_exact_to_the_last_unit():
    """Box-Muller in extended precision, corners of the unit square included."""
    source = NoiseSource()
    half = noise._CHUNK // 2
    bits = source.integers(noise._CHUNK).numpy().copy()
    bits[:4] = 0, 1, noise._MASK, noise._MASK // 2
    bits[half : half + 4] = 0, noise._MASK, noise._MASK // 2, noise._MASK // 4
    source._refill = lambda: np.copyto(source._bits, bits)
    units = source.units(noise._CHUNK).numpy()
    u = (bits[:half].astype(np.longdouble) + 0.5) / np.longdouble(2) ** 63
    angle = (2 * np.longdouble(bits[half:]) / np.longdouble(2) ** 63 - 1) * np.arctan2(np.longdouble(0), -1)
    r = np.sqrt(-2 * np.log(u)) * np.longdouble(2) ** noise.GRID_BITS
    assert np.abs(units[:half] - r * np.cos(angle)).max() < 0.5 + 1e-5
    assert np.abs(units[half:] - r * np.sin(angle)).max() < 0.5 + 1e-5


@pytest.mark.parametrize("count", [0, 1, 2, 3, noise._CHUNK - 1, noise._CHUNK, noise._CHUNK + 1])
def test_any_number_of_draws(count):
    x = NoiseSource().normal((count,))
    assert x.shape == (count,)
    assert (x != 0).float().mean() > 0.99 or count < 4


def test_seeded_noise_repeats_and_secure_noise_does_not():
    assert torch.equal(InsecureSeededNoise(3).normal((9,)), InsecureSeededNoise(3).normal((9,)))
    assert not torch.equal(InsecureSeededNoise(3).normal((9,)), InsecureSeededNoise(4).normal((9,)))
    torch.manual_seed(0)
    a = NoiseSource().normal((9,))
    torch.manual_seed(0)
    assert not torch.equal(a, NoiseSource().normal((9,)))
    assert NoiseSource.is_secure
    assert not InsecureSeededNoise.is_secure


@pytest.mark.parametrize("make", [NoiseSource, lambda: InsecureSeededNoise(1)])
@pytest.mark.parametrize("leak", [pickle.dumps, copy.copy, copy.deepcopy])
def test_the_stream_cannot_be_stored(make, leak):
    with pytest.raises(TypeError, match="cannot be copied, pickled or stored"):
        leak(make())


def test_nothing_about_the_key_is_visible(monkeypatch):
    key = bytes(range(32))
    monkeypatch.setattr(noise.os, "urandom", lambda count: key[:count])
    source = NoiseSource()
    assert repr(source) == "NoiseSource()"
    kept = [value for value in vars(source).values() if isinstance(value, bytes | bytearray | str | int)]
    assert kept
    assert all(value != key and not (isinstance(value, bytes) and key in value) for value in kept)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("same_number", [False, True])
def test_a_real_fork_draws_from_another_key(monkeypatch, same_number):
    """Also where the child has its parent's process number, as in another namespace."""
    source, number = NoiseSource(), os.getpid()
    if same_number:
        monkeypatch.setattr(os, "getpid", lambda: number)
    with source._lock:  # held while the process forks
        reading, writing = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other tests have left threads
            child = os.fork()
        if child == 0:
            os.write(writing, source.integers(4).numpy().tobytes())
            os._exit(0)
    os.waitpid(child, 0)
    theirs = os.read(reading, 32)
    os.close(reading)
    os.close(writing)
    assert len(theirs) == 32
    assert theirs != source.integers(4).numpy().tobytes()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_draws_other_noise():
    source = NoiseSource()
    source.units(2)
    pid, parent = os.getpid(), source._encryptor
    source._pid = pid + 1  # what a child sees
    source.units(2)
    assert source._encryptor is not parent
    assert source._pid == pid


@pytest.mark.parametrize(
    "bad",
    [
        {"sensitivity": 0.0, "noise_multiplier": 1.0, "dimension": 3},
        {"sensitivity": float("nan"), "noise_multiplier": 1.0, "dimension": 3},
        {"sensitivity": 1.0, "noise_multiplier": -1.0, "dimension": 3},
        {"sensitivity": 1.0, "noise_multiplier": float("inf"), "dimension": 3},
        {"sensitivity": 1.0, "noise_multiplier": 1.0, "dimension": 10**15},
    ],
)
def test_bad_arguments(bad):
    with pytest.raises(ValueError, match=r"sensitivity|noise_multiplier"):
        noise_std(**bad)


def test_sums_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        gaussian_mechanism(
            {"w": torch.tensor([float("nan")])}, sensitivity=1.0, noise_multiplier=1.0, source=NoiseSource()
        )
