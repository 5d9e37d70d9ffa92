"""Damaged, foreign and locked files, and every change of a row."""

import json
import shutil
import sqlite3
from decimal import Decimal

import pytest

from dptaft_accounting import ledger_file
from dptaft_accounting.ledger import Budget, Cost, Ledger, LedgerError
from dptaft_accounting.ledger_chain import Row, canonical, row_hash
from dptaft_accounting.mechanisms import FullBatchGaussian

SMALL = FullBatchGaussian(4.0, steps=1)
COST = Cost(Decimal("0.25"), Decimal(0), Decimal("0.9"), Decimal("0.00001"))


def fill(path):
    ledger = Ledger.create(path)
    ledger.register("a", "scans")
    ledger.declare("scans", Budget.from_epsilon(3.0, 1e-5))
    for end in ("commit", "close", "release", "resume"):
        entry = ledger.reserve("a", COST, SMALL, run=end)
        if end != "release":
            ledger.authorise(entry.id, entry.token, COST)
        if end == "commit":
            ledger.commit(entry.id, entry.token, COST, SMALL)
        elif end != "resume":
            ledger.close(entry.id, entry.token)
        else:
            ledger.resume(entry.id, "a", COST, SMALL)
    return ledger


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("ledger") / "ledger.sqlite")


@pytest.fixture
def copy(filled, tmp_path):
    return shutil.copy(filled.path, tmp_path / "ledger.sqlite")


def edit(path, *statements):
    """Change the file as an attacker would: without the triggers."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("DROP TRIGGER IF EXISTS rows_stay")
    connection.execute("DROP TRIGGER IF EXISTS rows_last")
    for statement, values in statements:
        connection.execute(statement, values)
    connection.close()


def rows(path):
    connection = sqlite3.connect(path)
    found = connection.execute("SELECT number, previous, body, hash FROM rows ORDER BY number").fetchall()
    connection.close()
    return found


def test_an_intact_ledger_has_no_problem(filled):
    kinds = {json.loads(body)["kind"] for _, _, body, _ in rows(filled.path)}
    assert kinds == {"ledger", "data-set", "budget", "reserve", "authorise", "commit", "close", "resume"}
    assert filled.verify([digest for *_, digest in rows(filled.path)]) == []


@pytest.mark.parametrize("column", ["previous", "body", "hash"])
def test_every_single_byte_change_of_every_field_is_caught(filled, tmp_path, column):
    """Exhaustive over bytes: every row, every field, every position, changed to another byte."""
    path = shutil.copy(filled.path, tmp_path / "ledger.sqlite")
    ledger = Ledger(path)
    edit(path)
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA synchronous=OFF")
    for number, previous, body, digest in rows(path):
        value = {"previous": previous, "body": body, "hash": digest}[column].encode()
        step = 1 if column != "body" else 3
        for place in range(number % step, len(value), step):
            for flip in (1, 2):
                other = bytearray(value)
                other[place] ^= flip
                row = Row(
                    number,
                    *(
                        {"previous": previous, "body": body, "hash": digest} | {column: other.decode()}
                    ).values(),
                )
                assert row.problem(number, previous) is not None, (number, column, place)
            if place % 97 == 0:
                query = f"UPDATE rows SET {column} = CAST(? AS TEXT) WHERE number = ?"
                connection.execute(query, (bytes(other), number))
                assert ledger.verify(), (number, column, place)
                connection.execute(query, (value, number))
    connection.close()
    assert ledger.verify() == []


def test_renumbered_missing_swapped_and_added_rows_are_caught(filled, tmp_path):
    last = len(rows(filled.path))
    cases = [
        ("UPDATE rows SET number = 1000 WHERE number = 5", ()),
        ("UPDATE rows SET number = 0 WHERE number = 1", ()),
        ("UPDATE rows SET number = -3 WHERE number = 2", ()),
        ("DELETE FROM rows WHERE number = 4", ()),
        ("DELETE FROM rows WHERE number = 1", ()),
        ("DELETE FROM rows", ()),
        ("INSERT INTO rows VALUES (?, 'x', '{}', 'y')", (last + 1,)),
        ("UPDATE rows SET body = CAST(body AS BLOB) WHERE number = 3", ()),
        ("UPDATE rows SET body = body || x'ff' WHERE number = 3", ()),
    ]
    for i, case in enumerate(cases):
        path = shutil.copy(filled.path, tmp_path / f"{i}.sqlite")
        edit(path, case)
        assert Ledger(path).verify(), case
        with pytest.raises(LedgerError):
            Ledger(path).export()


def test_rows_rewritten_with_new_hashes_need_a_recorded_head(filled, tmp_path):
    path = shutil.copy(filled.path, tmp_path / "ledger.sqlite")
    head, previous, edits = filled.head, "", []
    for number, _, body, _ in rows(path):
        body = body.replace('"0.25"', '"0.15"')
        digest = row_hash(number, previous, body)
        edits.append(
            ("UPDATE rows SET previous=?, body=?, hash=? WHERE number=?", (previous, body, digest, number))
        )
        previous = digest
    edit(path, *edits)
    assert Ledger(path).verify() == []
    assert "rows were rewritten" in Ledger(path).verify([head])[0]


def test_one_rewritten_row_changes_the_head(filled, tmp_path):
    """Only one early row is rewritten and all later ones are linked again: the head is another one."""
    path = shutil.copy(filled.path, tmp_path / "ledger.sqlite")
    head, previous, edits = filled.head, "", []
    for number, _, body, _ in rows(path):
        body = body.replace('"epsilon":"3"', '"epsilon":"9"') if number == 3 else body
        digest = row_hash(number, previous, body)
        edits.append(
            ("UPDATE rows SET previous=?, body=?, hash=? WHERE number=?", (previous, body, digest, number))
        )
        previous = digest
    assert previous != head
    edit(path, *edits)
    assert Ledger(path).verify([head])


def test_transactions_are_durable(filled):
    with filled._file.writing() as connection:
        assert connection.execute("PRAGMA synchronous").fetchone()[0] == 2
        assert connection.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
        with pytest.raises(sqlite3.OperationalError, match="locked"):  # nobody else writes meanwhile
            sqlite3.connect(filled.path, timeout=0).execute("BEGIN IMMEDIATE")


def test_a_restored_older_copy_is_caught_by_a_later_head(tmp_path):
    ledger = fill(tmp_path / "ledger.sqlite")
    shutil.copy(ledger.path, tmp_path / "old.sqlite")
    entry = ledger.reserve("a", COST, SMALL, run="later")
    head = ledger.head
    assert Ledger(tmp_path / "old.sqlite").verify() == []
    assert "an older copy was restored" in Ledger(tmp_path / "old.sqlite").verify([head])[0]
    shutil.copy(tmp_path / "old.sqlite", ledger.path)
    with pytest.raises(LedgerError, match="was replaced while it was in use"):
        ledger.authorise(entry.id, entry.token, COST)
    with pytest.raises(LedgerError, match="older copy of the ledger was restored"):
        Ledger(ledger.path).authorise(entry.id, entry.token, COST)


def test_rows_that_do_not_follow_from_the_ones_before_are_caught(filled, tmp_path):
    number, _, _, head = rows(filled.path)[-1]
    time = "9999-01-01T00:00:00.000000+00:00"
    entry = filled.account("scans").entries[-1].id
    bodies = [
        {"kind": "commit", "entry": "unknown", "time": time},
        {"kind": "surprise", "time": time},
        {"kind": "ledger", "time": time, "format": 1, "ledger": "x", "key_sha256": "y"},
        {"kind": "authorise", "entry": entry, "time": time},
        {"kind": "authorise", "entry": entry, "time": time, "cost": COST.to_dict() | {"mu": "9"}},
        {"kind": "authorise", "entry": entry, "time": time, "cost": COST.to_dict() | {"mu": "-1"}},
        {"kind": "authorise", "entry": entry, "time": time, "cost": COST.to_dict() | {"mu": "1e-3"}},
        {"kind": "authorise", "entry": entry, "time": time, "cost": COST.to_dict() | {"mu": "NaN"}},
        {
            "kind": "authorise",
            "entry": entry,
            "time": "2001-01-01T00:00:00.000000+00:00",
            "cost": COST.to_dict(),
        },
        {"kind": "authorise", "entry": entry, "time": "soon", "cost": COST.to_dict()},
    ]
    for i, body in enumerate(bodies):
        path = shutil.copy(filled.path, tmp_path / f"{i}.sqlite")
        row = Row.append(number + 1, head, body)
        edit(path, ("INSERT INTO rows VALUES (?,?,?,?)", (row.number, row.previous, row.body, row.hash)))
        assert len(Ledger(path).verify()) == 1, body
    loose = Row(number + 1, head, "{ }", row_hash(number + 1, head, "{ }"))
    path = shutil.copy(filled.path, tmp_path / "loose.sqlite")
    edit(path, ("INSERT INTO rows VALUES (?,?,?,?)", (loose.number, loose.previous, loose.body, loose.hash)))
    assert "no canonical JSON" in Ledger(path).verify()[0]


@pytest.mark.parametrize(
    "change", ["UPDATE secret SET key = ''", "DELETE FROM secret", "UPDATE secret SET key = 'zz'"]
)
def test_a_missing_or_changed_key(copy, change):
    edit(copy, (change, ()))
    assert "key of the fingerprints is missing or damaged" in Ledger(copy).verify()[0]
    with pytest.raises(LedgerError, match=r"key in .* is missing or damaged"):
        Ledger(copy).register("a", "scans")


def test_rows_cannot_be_changed_through_sql_alone(copy):
    connection = sqlite3.connect(copy)
    for statement in ("UPDATE rows SET body = ''", "DELETE FROM rows"):
        with pytest.raises(sqlite3.IntegrityError, match="rows are never"):
            connection.execute(statement)
    connection.close()


# files that are no ledger


def test_missing_file(tmp_path):
    with pytest.raises(LedgerError, match=r"there is no ledger .* `dptaft ledger init"):
        Ledger(tmp_path / "none.sqlite")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"this is no database, surely not" * 40, "no SQLite file"),
        (b"\0" * 5000, "no SQLite file"),
    ],
)
def test_garbage(tmp_path, content, message):
    (tmp_path / "x.sqlite").write_bytes(content)
    with pytest.raises(LedgerError, match=message):
        Ledger(tmp_path / "x.sqlite")
    assert (tmp_path / "x.sqlite").read_bytes() == content


def test_a_foreign_database_is_left_alone(tmp_path):
    connection = sqlite3.connect(tmp_path / "x.sqlite")
    connection.execute("CREATE TABLE t (a)")
    connection.commit()
    connection.close()
    with pytest.raises(LedgerError, match="an SQLite file but no ledger"):
        Ledger(tmp_path / "x.sqlite")


def test_a_newer_version(copy):
    edit(copy, ("PRAGMA user_version=2", ()))
    with pytest.raises(LedgerError, match="version 2, this program reads 1; use a newer dptaft"):
        Ledger(copy)


def test_truncation_anywhere_is_refused_or_found(filled, tmp_path):
    whole = filled.path.read_bytes()
    for size in range(1, len(whole), 1499):
        path = tmp_path / f"{size}.sqlite"
        path.write_bytes(whole[:size])
        try:
            problems = Ledger(path).verify([filled.head])
        except LedgerError as refused:
            problems = [str(refused)]
        assert problems, size
        assert not any("\n" in line for line in problems)


def test_damaged_pages_never_pass_in_silence(filled, tmp_path):
    """Every 64 bytes of the file overwritten: refused, found by verify, or without any meaning."""
    whole, before = filled.path.read_bytes(), [list(r) for r in rows(filled.path)]
    caught = 0
    for place in range(0, len(whole), 389):
        path = tmp_path / "x.sqlite"
        path.write_bytes(
            whole[:place] + bytes(b ^ 0x15 for b in whole[place : place + 8]) + whole[place + 8 :]
        )
        try:
            problems = Ledger(path).verify([filled.head])
            if problems:
                caught += 1
            else:
                assert [list(r) for r in rows(path)] == before
                assert Ledger(path).fingerprint("a") == filled.fingerprint("a")
        except LedgerError:
            caught += 1
    assert caught > len(whole) / 389 / 4


def test_an_existing_ledger_is_not_overwritten(filled):
    head = filled.head
    with pytest.raises(LedgerError, match="exists; use it"):
        Ledger.create(filled.path)
    assert filled.head == head


def test_a_folder_without_write_access(tmp_path):
    with pytest.raises(LedgerError, match="cannot write the ledger"):
        Ledger.create("/proc/none/ledger.sqlite")


def test_a_read_only_file_can_be_read_but_not_written(copy, monkeypatch):
    original = ledger_file.LedgerFile._connect
    monkeypatch.setattr(ledger_file.LedgerFile, "_connect", lambda self, mode: original(self, "ro"))
    ledger = Ledger(copy)
    assert ledger.verify() == []
    with pytest.raises(LedgerError, match="make it and its folder writable"):
        ledger.reserve("a", COST, SMALL, run="r")


def test_a_locked_ledger_is_given_up_on_after_the_timeout(copy):
    connection = sqlite3.connect(copy, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    ledger = Ledger(copy, timeout=0.1)
    with pytest.raises(LedgerError, match=r"another process has held the ledger .* for 0.1 s"):
        ledger.reserve("a", COST, SMALL, run="r")
    assert ledger.verify() == []
    connection.close()


def test_network_file_systems_are_refused(tmp_path):
    import os

    device = tmp_path.stat().st_dev
    line = f"36 35 {os.major(device)}:{os.minor(device)} / {tmp_path} rw,noatime master:1 - %s server:/x rw\n"
    for kind in ("nfs4", "cifs", "fuse", "fuse.sshfs", "fuse.s3fs", "fuse.juicefs", "fuse.mount-s3"):
        with pytest.raises(LedgerError, match=f"network file system {kind}"):
            ledger_file.refuse_network(tmp_path, lambda kind=kind: line % kind)
    for kind in ("ext4", "fuseblk", "fuse.fuse-overlayfs"):
        ledger_file.refuse_network(tmp_path, lambda kind=kind: line % kind)
    ledger_file.refuse_network(tmp_path, lambda: "nonsense\n\n")


def test_canonical_text_is_unique():
    assert canonical({"b": [1, "é"], "a": None}) == '{"a":null,"b":[1,"\\u00e9"]}'
