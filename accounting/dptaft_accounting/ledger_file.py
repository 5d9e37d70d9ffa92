"""The SQLite file below a ledger: created whole, opened with checks, written in durable transactions.

WAL with ``synchronous=FULL``: a transaction that returned survives a crash of the process and of the
machine, one that did not return has left nothing behind. A connection lives for one transaction, so that
neither forked processes nor long trainings share or hold one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from dptaft_accounting.ledger_chain import Row
from dptaft_accounting.ledger_filter import LedgerError

APPLICATION_ID = 0x64707466
VERSION = 1
_NETWORK = frozenset(
    {"nfs", "nfs4", "cifs", "smb", "smb2", "smb3", "smbfs", "afs", "ncpfs", "ceph", "glusterfs", "lustre"}
    | {"beegfs", "gpfs", "pvfs2", "davfs", "ocfs2", "gfs2", "fuse"}
)
_LOCAL_FUSE = frozenset(
    {"fuse.fuse-overlayfs", "fuse.gocryptfs", "fuse.encfs", "fuse.ntfs-3g", "fuse.exfat", "fuse.ext2"}
)
_SCHEMA = """
CREATE TABLE rows (
    number INTEGER PRIMARY KEY, previous TEXT NOT NULL, body TEXT NOT NULL, hash TEXT NOT NULL UNIQUE
);
CREATE TABLE secret (key TEXT NOT NULL);
CREATE TRIGGER rows_stay BEFORE UPDATE ON rows BEGIN SELECT RAISE(ABORT, 'rows are never changed'); END;
CREATE TRIGGER rows_last BEFORE DELETE ON rows BEGIN SELECT RAISE(ABORT, 'rows are never deleted'); END;
"""


class LedgerFile:
    """One ledger file.

    Args:
        path: the file, which must exist.
        timeout: seconds to wait for other processes.

    Raises:
        LedgerError: no ledger, a foreign, damaged, empty or newer file, or a network file system.
    """

    def __init__(self, path: Path, timeout: float) -> None:
        self.path, self.timeout = path, timeout
        if not path.is_file():
            raise LedgerError(
                f"there is no ledger {path}; make one with `dptaft ledger init --ledger {path}`"
            )
        refuse_network(path)
        if path.stat().st_size == 0:
            raise LedgerError(f"{path} is empty: the ledger was cut off; restore it from a copy")
        with self.reading():
            pass

    @classmethod
    def create(cls, path: Path, key: str, first: Row, timeout: float) -> None:
        """Write a new ledger with its key and first row; it appears complete or not at all.

        Raises:
            LedgerError: the file exists, or the folder cannot be written.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            refuse_network(path.parent)
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
                draft = Path(folder) / "ledger"
                os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
                with contextlib.closing(sqlite3.connect(draft, isolation_level=None)) as connection:
                    connection.execute("PRAGMA journal_mode=WAL")
                    connection.execute("PRAGMA synchronous=FULL")
                    connection.execute(f"PRAGMA application_id={APPLICATION_ID}")
                    connection.execute(f"PRAGMA user_version={VERSION}")
                    connection.executescript(_SCHEMA)
                    connection.execute("INSERT INTO secret VALUES (?)", (key,))
                    insert(connection, first)
                _sync(draft)
                os.link(draft, path)
            _sync(path.parent)
        except FileExistsError:
            raise LedgerError(f"the ledger {path} exists; use it, or choose another name") from None
        except (OSError, sqlite3.Error) as error:
            reason = getattr(error, "strerror", None) or error
            raise LedgerError(f"cannot write the ledger {path}: {reason}; choose another place") from None

    @contextlib.contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction that no other process can interleave with; durable when the block ends well.

        Raises:
            LedgerError: locked for too long, read-only, full or damaged.
        """
        with self._errors(), contextlib.closing(self._connect("rw")) as connection:
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute("PRAGMA fullfsync=ON")
            connection.execute("BEGIN IMMEDIATE")
            try:
                self._check(connection)
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """One consistent view; works on a read-only disk.

        Raises:
            LedgerError: as for `writing`.
        """
        with self._errors(), contextlib.closing(self._connect_to_read()) as connection:
            connection.execute("BEGIN")
            self._check(connection)
            yield connection

    def _connect(self, mode: str) -> sqlite3.Connection:
        uri = f"{self.path.absolute().as_uri()}?mode={mode}"
        connection = sqlite3.connect(uri, uri=True, timeout=self.timeout, isolation_level=None)
        connection.text_factory = lambda raw: raw.decode(errors="surrogateescape")
        return connection

    def _connect_to_read(self) -> sqlite3.Connection:
        connection = self._connect("rw")
        try:
            connection.execute("SELECT 1 FROM sqlite_master").fetchall()
            return connection
        except sqlite3.OperationalError:
            connection.close()
        # a disk without write access has no room for the shared-memory file of WAL
        waiting = self.path.with_name(self.path.name + "-wal")
        if waiting.exists() and waiting.stat().st_size:
            return self._connect("ro")
        return self._connect("ro&immutable=1" if not os.access(self.path.parent, os.W_OK) else "ro")

    def _check(self, connection: sqlite3.Connection) -> None:
        number = connection.execute("PRAGMA application_id").fetchone()[0]
        if number != APPLICATION_ID:
            raise LedgerError(f"{self.path} is an SQLite file but no ledger; choose another one")
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version != VERSION:
            raise LedgerError(
                f"{self.path} has ledger version {version}, this program reads {VERSION}; use a newer dptaft"
            )

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise LedgerError(self._explain(error)) from error

    def _explain(self, error: sqlite3.Error) -> str:
        said = str(error)
        if "locked" in said or "busy" in said:
            return f"another process has held the ledger {self.path} for {self.timeout:g} s; try again later"
        if "not a database" in said:
            return f"{self.path} is no ledger: it is no SQLite file; restore it from a copy"
        if "readonly" in said or "read-only" in said or "unable to open" in said:
            return f"cannot write the ledger {self.path}: {said}; make it and its folder writable"
        if "full" in said or "disk I/O" in said:
            return f"cannot write the ledger {self.path}: {said}; make room, then try again"
        return f"the ledger {self.path} is damaged ({said}); restore it from a copy"


def insert(connection: sqlite3.Connection, row: Row) -> None:
    """Append one row."""
    connection.execute("INSERT INTO rows VALUES (?, ?, ?, ?)", (row.number, row.previous, row.body, row.hash))


def rows_after(connection: sqlite3.Connection, number: int) -> Iterator[Row]:
    """Rows with a greater number, in order."""
    query = "SELECT number, previous, body, hash FROM rows WHERE number > ? ORDER BY number"
    for values in connection.execute(query, (number,)):
        yield Row(*values)


def read_key(connection: sqlite3.Connection) -> str:
    """The secret key of the data set fingerprints, hexadecimal; empty where it is missing."""
    found = [row[0] for row in connection.execute("SELECT key FROM secret")]
    return found[0] if len(found) == 1 and isinstance(found[0], str) else ""


def refuse_network(path: Path, mounts: Callable[[], str] | None = None) -> None:
    """Refuse a network file system, where locks and durable writes cannot be relied on.

    A FUSE file system counts as one unless its kind is known to lie on a local disk.

    Raises:
        LedgerError: `path` lies on one. What cannot be told (no Linux, unknown kinds) passes.
    """
    try:
        device = path.stat().st_dev
        listing = (mounts or _mounts)()
    except OSError:
        return
    name = f"{os.major(device)}:{os.minor(device)}"
    for line in listing.splitlines():
        fields = line.split()
        if len(fields) > 2 and fields[2] == name and "-" in fields:
            kind = fields[fields.index("-") + 1]
            if kind in _NETWORK or (kind.startswith("fuse.") and kind not in _LOCAL_FUSE):
                kind += " (or may do so: FUSE does not tell)" if kind.startswith("fuse") else ""
                raise LedgerError(
                    f"{path} lies on the network file system {kind}, where a ledger is not safe; "
                    "choose a local disk with --ledger"
                )


def _mounts() -> str:
    return Path("/proc/self/mountinfo").read_text(errors="replace")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot sync folders
            raise
    finally:
        os.close(descriptor)
