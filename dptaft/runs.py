"""Run directories: written whole or not at all, loaded with checks, used for prediction.

run.toml            what was asked and what was public: configuration, model, classes
model.safetensors   trained weights and the public head
metrics.jsonl       evaluation on data that was not trained on
privacy.json        the privacy statement, or the reason why nothing is claimed; written last

``privacy.json`` holds the SHA-256 of the other three files (`admin.files`) and of its own content
(`admin.id`), and is stored as canonical text: a single changed byte in any file is found out, and so is a
file of another run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w

from dptaft.storage import draft_folder
from dptaft_accounting import PrivacyStatement
from dptaft_accounting.canonical import content_id, dumps, parse
from dptaft_accounting.errors import StatementError
from dptaft_accounting.statement import SCHEMA_VERSION

if TYPE_CHECKING:
    import torch

    from dptaft.predictor import Prediction, Predictor

FORMAT = 2
CONFIG, STATEMENT, WEIGHTS, METRICS = "run.toml", "privacy.json", "model.safetensors", "metrics.jsonl"
HASHED = (CONFIG, WEIGHTS, METRICS)
AUDIT = "audit.json"


class RunError(ValueError):
    """A run directory cannot be written or read; the message names it and the remedy."""


class OutputLostError(OSError):
    """A run was trained and charged, and is not written; the message says how to get it."""


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        path: its directory.
        config: the content of ``run.toml``.
        statement: the privacy statement; None where the run claims nothing.
        no_claim: why nothing is claimed; None where there is a claim.
        id: name of the content of ``privacy.json``, and through its hashes of the whole run.
        files: SHA-256 of every other file.
        metrics: the lines of ``metrics.jsonl``.
    """

    path: Path
    config: Mapping[str, Any]
    statement: PrivacyStatement | None
    no_claim: str | None
    id: str
    files: Mapping[str, str]
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
    config = read_config(folder)
    privacy = read_privacy(folder / STATEMENT)
    problems = (*privacy.problems, *file_problems(folder, privacy.files))
    if problems:
        raise RunError(f"{problems[0]}; restore the run")
    lines = _read(folder / METRICS).splitlines()
    metrics = tuple(_parse(line, folder / METRICS) for line in lines if line)
    return Run(folder, config, privacy.statement, privacy.no_claim, privacy.id, privacy.files, metrics)


@dataclass(frozen=True)
class Privacy:
    """What a ``privacy.json`` says, read without its neighbours.

    Attributes:
        path: the file.
        text: its content.
        statement: the statement; None where nothing is claimed.
        no_claim: why nothing is claimed; None where there is a claim.
        admin: run, time, files, id.
    """

    path: Path
    text: str
    statement: PrivacyStatement | None
    no_claim: str | None
    admin: Mapping[str, Any]

    @property
    def id(self) -> str:
        """The name that the file gives its own content."""
        return str(self.admin["id"])

    @property
    def files(self) -> Mapping[str, str]:
        """Hash of every other file of the run."""
        return dict(self.admin.get("files", {}))

    @property
    def problems(self) -> tuple[str, ...]:
        """Signs that the file was changed after it was written, one line each."""
        document = parse(self.text)
        found = []
        if content_id(document) != self.id:
            found.append(f"{self.path} was changed: its content does not have the id that it names")
        if dumps(document) != self.text:
            found.append(f"{self.path} was changed: it is not written in canonical form")
        return tuple(found)


def read_privacy(path: Path) -> Privacy:
    """Read a statement, or a reason for having none, from a file.

    Raises:
        RunError: the file cannot be read, is truncated, foreign, or of a newer version.
    """
    text = _read(path)
    try:
        document = parse(text)
        if "no_claim" in document:
            return Privacy(path, text, None, _reason(document), document["admin"])
        statement = PrivacyStatement.from_json(text)
    except StatementError as error:
        raise RunError(f"{path} is no privacy statement that can be read: {error}") from None
    return Privacy(path, text, statement, None, statement.admin)


def _reason(document: Mapping[str, Any]) -> str:
    admin, reason = document.get("admin"), document["no_claim"]
    found = admin.get("schema_version") if isinstance(admin, dict) else None
    if set(document) != {"no_claim", "admin"} or not isinstance(reason, str) or not isinstance(admin, dict):
        raise StatementError("a run without a claim holds no_claim and admin, and nothing else")
    if found != SCHEMA_VERSION:
        raise StatementError(f"it has schema version {found}, this version of dptaft reads {SCHEMA_VERSION}")
    if not isinstance(admin.get("id"), str) or not isinstance(admin.get("files", {}), dict):
        raise StatementError("admin.id must be text and admin.files an object")
    return reason


def read_audit(folder: Path) -> dict[str, Any]:
    """The content of ``audit.json``, which an audit adds to a finished run; empty where there is none.

    It names the statement that was audited (`statement_id`) and is not one of the files that the run wrote.

    Raises:
        RunError: it cannot be read.
    """
    path = folder / AUDIT
    return _parse(_read(path), path) if path.exists() else {}


def hash_files(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a run but its statement."""
    return {name: sha256_file(folder / name) for name in HASHED}


def file_problems(folder: Path, files: Mapping[str, str]) -> tuple[str, ...]:
    """Files that are not the ones whose hashes the statement holds, one line each.

    Raises:
        RunError: a file that cannot be read.
    """
    found = []
    for name in HASHED:
        if name not in files:
            found.append(f"{folder / STATEMENT} names no {name}: it does not belong to a run")
        elif sha256_file(folder / name) != files[name]:
            found.append(f"{folder / name} is not the file this run wrote")
    return tuple(found)


def _parse(text: str, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise RunError(f"{path} is damaged: {error}; restore it") from None
    if not isinstance(found, dict):
        raise RunError(f"{path} is damaged: it holds no JSON object; restore it")
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """Read ``run.toml``.

    Raises:
        RunError: no run, a damaged one, or one of another version.
    """
    if not folder.is_dir():
        raise RunError(f"no run at {folder}; `dptaft train` writes runs/<id>")
    try:
        config = tomllib.loads(_read(folder / CONFIG))
    except tomllib.TOMLDecodeError as error:
        raise RunError(f"{folder / CONFIG} is damaged: {error}") from None
    run = config.get("run")
    found = run.get("format") if isinstance(run, dict) else None
    if found != FORMAT:
        raise RunError(f"{folder / CONFIG} has run format {found}; this version of dptaft reads {FORMAT}")
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
    """Refuse an output folder that exists, cannot be made or has no readable name, before any work.

    Raises:
        RunError: with the remedy.
    """
    require_text("the output", str(path), "choose another one")
    try:
        if path.exists():
            raise RunError(f"the output folder {path} exists; choose another one or remove it")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".dptaft-"):
            pass
    except OSError as error:
        raise RunError(f"cannot write to {path.parent}: {error.strerror}; choose another output") from None


def require_text(subject: str, name: str, remedy: str) -> None:
    r"""Refuse a name that no file of a run can hold.

    Raises:
        RunError: it is not Unicode text, such as that of a folder named in another encoding.

    >>> require_text("the class folder", "caf\udce9", "rename it")
    Traceback (most recent call last):
    ...
    dptaft.runs.RunError: the name of the class folder 'caf\udce9' is not UTF-8; rename it
    """
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise RunError(f"the name of {subject} {name!a} is not UTF-8; {remedy}") from None


@contextlib.contextmanager
def new_run(path: Path) -> Iterator[Path]:
    """A folder to fill; it becomes `path` in one step when the block ends well, and vanishes otherwise.

    Raises:
        RunError: no room on the disk, or `path` appeared in the meantime.
    """
    try:
        with draft_folder(path.parent, f".{path.name}-") as draft:
            yield draft
            _sync_whole(draft)
            if path.exists():
                raise RunError(
                    f"the output folder {path} appeared while the run was made; choose another one"
                )
            draft.chmod(0o755)
            draft.rename(path)
            _sync(path.parent)
    except OSError as error:
        raise RunError(f"cannot write the run to {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def dry_run(path: Path) -> Iterator[Path]:
    """A folder to fill as that of `new_run`, which is loaded and removed when the block ends.

    Raises:
        RunError: it cannot be written or read here.
    """
    try:
        with draft_folder(path.parent, f".{path.name}-") as draft:
            yield draft
            _sync_whole(draft)
            load_run(draft)
    except OSError as error:
        raise RunError(
            f"a run cannot be written to {path}: {error.strerror or error}; make room there, or choose "
            "another output"
        ) from error


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write ``run.toml``."""
    (folder / CONFIG).write_text(tomli_w.dumps(config), encoding="utf-8")


def write_statement(folder: Path, statement: PrivacyStatement) -> None:
    """Write ``privacy.json`` with a claim."""
    (folder / STATEMENT).write_text(statement.to_json(), encoding="utf-8")


def write_no_claim(folder: Path, reason: str, admin: Mapping[str, Any]) -> None:
    """Write ``privacy.json`` without a claim: the reason, and what binds it to the files of the run."""
    document = {"no_claim": reason, "admin": {**admin, "schema_version": SCHEMA_VERSION}}
    document["admin"]["id"] = content_id(document)
    (folder / STATEMENT).write_text(dumps(document), encoding="utf-8")


def write_metrics(folder: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write ``metrics.jsonl``."""
    text = "".join(json.dumps(line, sort_keys=True, allow_nan=False) + "\n" for line in lines)
    (folder / METRICS).write_text(text, encoding="utf-8")


def _sync_whole(folder: Path) -> None:
    for file in folder.iterdir():
        _sync(file)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
