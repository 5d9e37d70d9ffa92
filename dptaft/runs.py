"""Run directories: written whole or not at all, loaded with checks, used for prediction.

run.toml            what was asked and what was public: configuration, model, classes
privacy.json        the privacy statement, or the reason why nothing is claimed
model.safetensors   trained weights and the public head
metrics.jsonl       evaluation on data that was not trained on
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w

from dptaft_accounting import PrivacyStatement

if TYPE_CHECKING:
    import torch

    from dptaft.predictor import Prediction, Predictor

FORMAT = 1
CONFIG, STATEMENT, WEIGHTS, METRICS = "run.toml", "privacy.json", "model.safetensors", "metrics.jsonl"


class RunError(ValueError):
    """A run directory cannot be written or read; the message names it and the remedy."""


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        path: its directory.
        config: the content of ``run.toml``.
        statement: the privacy statement; None where the run claims nothing.
        no_claim: why nothing is claimed; None where there is a claim.
        metrics: the lines of ``metrics.jsonl``.
    """

    path: Path
    config: Mapping[str, Any]
    statement: PrivacyStatement | None
    no_claim: str | None
    metrics: tuple[Mapping[str, Any], ...]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        return tuple(self.config["data"]["classes"])

    @property
    def accuracy(self) -> float | None:
        """Accuracy on the evaluation split, where there was one."""
        found = [line["accuracy"] for line in self.metrics if "accuracy" in line]
        return found[-1] if found else None

    @cached_property
    def predictor(self) -> Predictor:
        """The trained model, ready for images."""
        from dptaft.predictor import load_predictor

        return load_predictor(self.path, self.config)

    def predict(self, images: Sequence[str | os.PathLike[str] | torch.Tensor]) -> list[Prediction]:
        """Label images given as files or as tensors (1 or 3, height, width) in [0, 1]."""
        return self.predictor.predict(images)


def load_run(path: str | os.PathLike[str]) -> Run:
    """Load a finished run and check that its files belong together.

    Raises:
        RunError: not a run, an incomplete or changed one, or one of a newer version.
    """
    folder = Path(path)
    config = _read_config(folder)
    text = _read(folder / STATEMENT)
    document = _parse(text, folder / STATEMENT)
    digest = sha256_file(folder / WEIGHTS)
    if config["run"].get("weights_sha256") != digest:
        raise RunError(f"{folder / WEIGHTS} is not the file this run wrote; restore it")
    lines = _read(folder / METRICS).splitlines()
    metrics = tuple(_parse(line, folder / METRICS) for line in lines if line)
    no_claim = document.get("no_claim")
    statement = None if no_claim else PrivacyStatement.from_json(text)
    return Run(folder, config, statement, no_claim, metrics)


def _parse(text: str, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise RunError(f"{path} is damaged: {error}; restore it") from None
    if not isinstance(found, dict):
        raise RunError(f"{path} is damaged: it holds no JSON object; restore it")
    return found


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise RunError(f"no run at {folder}; `dptaft train` writes runs/<id>")
    try:
        config = tomllib.loads(_read(folder / CONFIG))
    except tomllib.TOMLDecodeError as error:
        raise RunError(f"{folder / CONFIG} is damaged: {error}") from None
    found = config.get("run", {}).get("format")
    if found != FORMAT:
        raise RunError(f"{folder} has run format {found}; this version reads {FORMAT}")
    for section in ("privacy", "model", "engine", "backbone", "data"):
        if section not in config:
            raise RunError(f"{folder / CONFIG} is damaged: it lacks [{section}]; restore it")
    return config


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"cannot read {path}: {error}; the run is incomplete or damaged") from None


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RunError(f"cannot read {path}: {error}; the run is incomplete or damaged") from None


def check_output(path: Path) -> None:
    """Refuse an output folder that exists or cannot be made, before any work.

    Raises:
        RunError: with the remedy.
    """
    try:
        if path.exists():
            raise RunError(f"the output folder {path} exists; choose another one or remove it")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".dptaft-"):
            pass
    except OSError as error:
        raise RunError(f"cannot write to {path.parent}: {error.strerror}; choose another output") from None


@contextlib.contextmanager
def new_run(path: Path) -> Iterator[Path]:
    """A folder to fill; it becomes `path` in one step when the block ends well, and vanishes otherwise.

    Raises:
        RunError: no room on the disk, or `path` appeared in the meantime.
    """
    draft = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
    try:
        yield draft
        for file in draft.iterdir():
            _sync(file)
        _sync(draft)
        if path.exists():
            raise RunError(f"the output folder {path} appeared while the run was made; choose another one")
        draft.chmod(0o755)
        draft.rename(path)
        _sync(path.parent)
    except OSError as error:
        raise RunError(f"cannot write the run to {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write ``run.toml``."""
    (folder / CONFIG).write_text(tomli_w.dumps(config), encoding="utf-8")


def write_statement(folder: Path, statement: PrivacyStatement | None, no_claim: str | None) -> None:
    """Write ``privacy.json``: the statement, or why there is none."""
    if (statement is None) == (no_claim is None):
        raise RunError("a run has either a privacy statement or a reason why it has none")
    text = statement.to_json() if statement else json.dumps({"no_claim": no_claim}, indent=2) + "\n"
    (folder / STATEMENT).write_text(text, encoding="utf-8")


def write_metrics(folder: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write ``metrics.jsonl``."""
    text = "".join(json.dumps(line, sort_keys=True, allow_nan=False) + "\n" for line in lines)
    (folder / METRICS).write_text(text, encoding="utf-8")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
