"""Many processes at once, and processes killed at random moments."""

import os
import random
import signal
import subprocess
import sys
import time
from decimal import Decimal

import pytest

from dptaft_accounting.ledger import Budget, Cost, Ledger

WORKER = """
import sys
from decimal import Decimal
from dptaft_accounting.ledger import BudgetExceededError, Cost, Ledger
from dptaft_accounting.mechanisms import FullBatchGaussian
ledger, name, count = Ledger(sys.argv[1], timeout=1200), sys.argv[2], int(sys.argv[3])
mechanism = FullBatchGaussian(10.0, steps=1)
cost = Cost(Decimal("0.1"), Decimal(0), Decimal("0.4"), Decimal("0.00001"))
for i in range(count):
    try:
        entry = ledger.reserve("a", cost, mechanism, run=f"{name}-{i}")
        print("reserved", entry.id, flush=True)
    except BudgetExceededError:
        print("refused", flush=True)
"""

# says what is about to happen before, and what is durable after every operation
VICTIM = """
import sys
from decimal import Decimal
from dptaft_accounting.ledger import BudgetExceededError, Cost, Ledger
from dptaft_accounting.mechanisms import FullBatchGaussian
def cost(mu):
    return Cost(Decimal(mu), Decimal(0), Decimal(mu) * 4, Decimal("0.00001"))
def say(*words):
    sys.stdout.write(" ".join(words) + "\\n")
    sys.stdout.flush()
ledger, mechanism = Ledger(sys.argv[1], timeout=1200), FullBatchGaussian(10.0, steps=1)
say("ready")
for i in range(10**6):
    entry = ledger.reserve("a", cost("0.05"), mechanism, run=str(i))
    say("reserved", entry.id)
    for k in (1, 2, 3):
        ledger.authorise(entry.id, entry.token, cost(f"0.0{k}"))
        say("authorised", entry.id, f"0.0{k}")
    if i % 3 == 0:
        ledger.commit(entry.id, entry.token, cost("0.03"), mechanism)
    elif i % 3 == 1:
        ledger.close(entry.id, entry.token)
    else:
        continue
    say("ended", entry.id)
"""


def start(code, *arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def test_eight_processes_make_400_reservations_against_one_budget(tmp_path):
    """The budget has room for 249 of them (B^2 = 2.49988): exactly those are admitted, none is lost."""
    ledger = Ledger.create(tmp_path / "ledger.sqlite")
    ledger.register("a", "scans")
    ledger.declare("scans", Budget.from_mu(1.5811, 1e-5))
    workers = [start(WORKER, ledger.path, f"w{i}", 50) for i in range(8)]
    lines = [line.split() for worker in workers for line in worker.communicate(timeout=1200)[0].splitlines()]
    assert all(worker.returncode == 0 for worker in workers)
    admitted = [words[1] for words in lines if words[0] == "reserved"]
    assert len(lines) == 400
    assert len(admitted) == 249
    account = ledger.account("scans")
    assert {entry.id for entry in account.entries} == set(admitted)
    assert account.claimed.mu_squared == Decimal("2.49") <= account.budget.mu**2
    assert Ledger(ledger.path).verify() == []
    assert len({entry.run for entry in account.entries}) == 249


def kill_at_random(ledger, generator):
    """Run the victim for a random time, kill it, and return what it said."""
    victim = start(VICTIM, ledger.path)
    assert victim.stdout.readline() == "ready\n"
    time.sleep(generator.uniform(0, 0.3))
    os.kill(victim.pid, signal.SIGKILL)
    said = [
        line.split()
        for line in victim.communicate(timeout=1200)[0].splitlines()
        if line.endswith("") and line
    ]
    return [words for words in said if len(words) >= 2]


def check_after_kill(path, said):
    """Everything that was said to be durable is there; what is there may only be more."""
    again = Ledger(path)
    assert again.verify() == []
    for words in said:
        entry = again.entry(words[1])
        if words[0] == "authorised":
            assert entry.authorised.mu >= Decimal(words[2])
        if words[0] == "ended":
            assert entry.state in ("committed", "closed")
            assert entry.charge.mu == Decimal("0.03")
    for entry in again.account("scans").entries:
        if entry.state == "open":
            assert entry.charge.mu == Decimal("0.05")
            closed = again.close(entry.id)  # its process is certainly gone
            assert closed.charge == entry.authorised
    return again


def kills(tmp_path, count, seed):
    ledger = Ledger.create(tmp_path / "ledger.sqlite")
    ledger.register("a", "scans")
    generator, operations = random.Random(seed), 0
    for _ in range(count):
        said = kill_at_random(ledger, generator)
        operations += len(said)
        ledger = check_after_kill(ledger.path, said)
    assert operations > count
    return ledger


def test_killed_processes_never_lose_what_they_were_authorised(tmp_path):
    kills(tmp_path, 12, seed=1)


@pytest.mark.slow
def test_200_kills_at_random_moments(tmp_path):
    kills(tmp_path, 200, seed=2)


def test_killed_while_the_ledger_is_made(tmp_path):
    """A ledger appears complete or not at all."""
    code = "import sys\nfrom dptaft_accounting.ledger import Ledger\nprint(1, flush=True)\nLedger.create(sys.argv[1])\n"
    for i in range(8):
        path = tmp_path / str(i) / "ledger.sqlite"
        path.parent.mkdir()
        maker = start(code, path)
        maker.stdout.readline()
        time.sleep(i * 0.002)
        os.kill(maker.pid, signal.SIGKILL)
        maker.communicate(timeout=1200)
        if path.exists():
            assert Ledger(path).verify() == []
        else:
            assert Ledger.create(path).verify() == []


def test_a_failure_inside_a_transaction_leaves_nothing(tmp_path, monkeypatch):
    from dptaft_accounting import ledger as module

    made = Ledger.create(tmp_path / "ledger.sqlite")
    made.register("a", "scans")
    head, original = made.head, module.insert

    def fail(connection, row):
        original(connection, row)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "insert", fail)
    with pytest.raises(KeyboardInterrupt):
        made.register("b", "other")
    monkeypatch.undo()
    assert made.head == head
    assert made.register("b", "other") == "other"
    assert Ledger(made.path).head == made.head


def test_costs_add_up_exactly():
    cost = Cost(Decimal("0.1"), Decimal("1E-9"), Decimal("0.3"), Decimal("0.00001"))
    from dptaft_accounting.ledger_filter import total_load

    total = total_load([(cost, None)] * 10**4)
    assert total.amounts() == (Decimal(100), Decimal("0.00001"), Decimal(3000), Decimal("0.1"))
