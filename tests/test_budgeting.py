import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from decimal import Decimal

import pytest
import torch
from builders import small_data

import dptaft
from dptaft.budgeting import LedgerAccount, composition_fields, open_account, open_ledger
from dptaft.identity import content_digest
from dptaft.ledger_check import ledger_problems
from dptaft.training.account import NoAccount, Spending
from dptaft.training.plan import ModelConfig, PerformanceConfig, PrivacyConfig, Request
from dptaft.training.trainer import partial_folder
from dptaft_accounting import FullBatchGaussian, PoissonGaussian, SequenceComposition
from dptaft_accounting.convexity import ConvexityCertificate
from dptaft_accounting.ledger import Budget, BudgetExceededError, Cost, Ledger, LedgerError

QUICK = {"scope": "head", "steps": 4}
SOLVED = {"scope": "head", "method": "output-perturbation"}


def steps(count, noise=10.0):
    return Spending(FullBatchGaussian(noise, steps=count), None, 1e-5)


def account(tmp_path, data=None, run="run", **options):
    return LedgerAccount(tmp_path / "ledger.sqlite", data or small_data(), tmp_path / run, **options)


def limited(tmp_path, epsilon, data=None):
    ledger = open_ledger(tmp_path / "ledger.sqlite")
    name = ledger.register(content_digest((data or small_data()).train), "small")
    ledger.declare(name, Budget.from_epsilon(epsilon, 1e-5))
    return ledger


def standing(tmp_path, name="small"):
    return Ledger(tmp_path / "ledger.sqlite").account(name)


# identity of the data


def test_the_digest_sees_labels_and_pixels_and_not_order_or_storage():
    data = small_data()
    digest = content_digest(data.train)
    order = torch.randperm(len(data.train)).tolist()
    assert content_digest(data.train.take(order)) == digest
    assert content_digest(data.train.take(range(59))) != digest
    assert content_digest(data.train.take([*range(59), 0])) != digest
    labels = data.train.labels.clone()
    labels[0] += 1
    assert content_digest(replace(data.train, labels=labels)) != digest


def test_the_digest_reports_progress():
    seen = []
    content_digest(small_data().train, lambda *step: seen.append(step))
    assert seen[-1] == ("identifying the data", 60, 60)


# the account protocol


def test_reserve_authorise_commit(tmp_path):
    run = account(tmp_path)
    run.reserve(steps(50))
    assert Decimal("0.707") < standing(tmp_path).claimed.mu < Decimal("0.708")
    run.authorise(steps(25))
    assert Decimal("0.5") <= standing(tmp_path).spent.mu < Decimal("0.5001")
    fields = run.commit(steps(40))
    run.close()
    entry = standing(tmp_path).entries[0]
    assert entry.state == "committed"
    assert 0.632 < fields["this_run"]["mu"] < 0.633
    assert fields["ledger_entry"] == entry.id
    assert fields["ledger_head"] == fields["ledger_entry_hash"] == entry.hash
    assert Ledger(tmp_path / "ledger.sqlite").verify([fields["ledger_head"]]) == []
    json.dumps(fields, allow_nan=False)


def test_a_failure_before_the_first_step_leaves_the_budget_untouched(tmp_path):
    run = account(tmp_path)
    run.reserve(steps(50))
    run.close()
    run.close()
    assert standing(tmp_path).entries == ()
    assert not partial_folder(tmp_path / "run").exists()


def test_a_failed_run_stays_charged_at_its_mark_and_continues_its_entry(tmp_path):
    ledger = limited(tmp_path, 3.0)
    run = account(tmp_path)
    run.reserve(steps(50))
    run.authorise(steps(25))
    run.close()
    assert Decimal("0.5") <= standing(tmp_path).claimed.mu < Decimal("0.5001")
    again = account(tmp_path, resume=True)
    again.reserve(steps(50))
    with pytest.raises(LedgerError, match="taken over by another process"):
        ledger.authorise(*(getattr(run._entry, name) for name in ("id", "token", "reserved")))
    again.authorise(steps(50))
    again.commit(steps(50))
    assert len(standing(tmp_path).entries) == 1
    other = account(tmp_path, run="other")
    with pytest.raises(BudgetExceededError):
        other.reserve(steps(25))
    other.close()


def test_repeated_steps_are_charged_and_extended_only_within_the_budget(tmp_path):
    limited(tmp_path, 3.2)
    run = account(tmp_path)
    run.reserve(steps(50))
    run.authorise(steps(52))
    assert standing(tmp_path).spent.mu_squared >= Decimal("0.52")
    with pytest.raises(BudgetExceededError):
        run.authorise(steps(70))
    with pytest.raises(BudgetExceededError):
        run.commit(steps(70))


def test_what_a_certificate_cannot_say_of_a_part_is_charged_whole(tmp_path):
    whole = FullBatchGaussian(10.0, steps=50, released="last-iterate")
    proof = ConvexityCertificate.issue(
        loss="multinomial-logistic", feature_bound=1.0, l2_clip_norm=1.5, regularization=0.1,
        step_size=1.0, normaliser=100.0, sampling="full-batch", steps=50, records=100,
    )  # fmt: skip
    run = account(tmp_path)
    run.reserve(Spending(whole, proof, 1e-5))
    assert standing(tmp_path).claimed.mu < Decimal("0.6")  # composition alone would cost 0.707
    run.authorise(Spending(replace(whole, steps=5), proof, 1e-5))
    entry = standing(tmp_path).entries[0]
    assert entry.authorised == entry.reserved
    run.commit(Spending(whole, proof, 1e-5))
    assert Ledger(tmp_path / "ledger.sqlite").entry(entry.id).certificate == proof.to_dict()


def test_a_killed_run_that_never_began_is_released_by_the_next(tmp_path):
    limited(tmp_path, 3.0)
    code = (
        "import os, sys; from dptaft_accounting.ledger import Cost, Ledger\n"
        "from dptaft_accounting import FullBatchGaussian\n"
        "plan = FullBatchGaussian(10.0, steps=50)\n"
        "Ledger(sys.argv[1]).reserve(sys.argv[2], Cost.of(plan, delta=1e-5), plan, run='dead'); os._exit(9)\n"
    )
    content = content_digest(small_data().train)
    command = [sys.executable, "-c", code, str(tmp_path / "ledger.sqlite"), content]
    assert subprocess.run(command, check=False).returncode == 9
    assert standing(tmp_path).entries[0].run == "dead"
    account(tmp_path).reserve(steps(50))
    assert [entry.run for entry in standing(tmp_path).entries] == ["run"]


def test_resume_needs_the_ledger_that_was_charged(tmp_path):
    run = account(tmp_path)
    run.reserve(steps(50))
    run.authorise(steps(25))
    run.close()
    other = LedgerAccount(tmp_path / "other.sqlite", small_data(), tmp_path / "run", resume=True)
    with pytest.raises(LedgerError, match=r"other.sqlite \(there is none\): give --ledger .*ledger\.sqlite"):
        other.reserve(steps(50))
    Ledger.create(tmp_path / "other.sqlite")
    with pytest.raises(LedgerError, match=r"\(it is another ledger\): give --ledger .*ledger\.sqlite"):
        other.reserve(steps(50))
    request = Request(PrivacyConfig(3.0), ModelConfig(), {}, PerformanceConfig(), "small")
    with pytest.raises(LedgerError, match="leave --no-ledger out"):
        open_account(small_data(), request, tmp_path / "run", ledger=None, resume=True)
    (partial_folder(tmp_path / "run") / "ledger.json").write_text("{")
    with pytest.raises(LedgerError, match="is damaged, so the run's ledger entry is unknown"):
        account(tmp_path, resume=True).reserve(steps(50))


def test_resume_with_an_older_ledger_is_refused(tmp_path):
    open_ledger(tmp_path / "ledger.sqlite")
    shutil.copy(tmp_path / "ledger.sqlite", tmp_path / "old")
    run = account(tmp_path)
    run.reserve(steps(50))
    run.authorise(steps(25))
    run.close()
    shutil.copy(tmp_path / "old", tmp_path / "ledger.sqlite")
    with pytest.raises(LedgerError, match="an older copy of the ledger was restored"):
        account(tmp_path, resume=True).reserve(steps(50))


@pytest.mark.parametrize("copied_at", [1, 2])
def test_a_copy_of_the_folder_cannot_spend_the_same_entry_again(tmp_path, copied_at):
    """Two continuations from one state would execute different steps and be charged as one run."""
    run = account(tmp_path)
    run.reserve(steps(50))
    run.authorise(steps(10))
    if copied_at == 1:
        shutil.copytree(partial_folder(tmp_path / "run"), partial_folder(tmp_path / "copy"))
    run.authorise(steps(25))
    if copied_at == 2:
        shutil.copytree(partial_folder(tmp_path / "run"), partial_folder(tmp_path / "copy"))
        run.commit(steps(25))
    run.close()
    copy = account(tmp_path, run="copy", resume=True)
    with pytest.raises(
        LedgerError, match=r"went on elsewhere: this folder is an older copy .* start a new run"
    ):
        copy.reserve(steps(50))
    copy.close()
    again = account(tmp_path, resume=True)
    again.reserve(steps(50))
    again.commit(steps(50))


@pytest.mark.parametrize("method", ["authorise", "commit"])
@pytest.mark.parametrize("written", [False, True])
def test_a_run_continues_whether_or_not_its_last_charge_was_written(tmp_path, monkeypatch, method, written):
    run = account(tmp_path)
    run.reserve(steps(50))
    run.authorise(steps(10))
    real = getattr(Ledger, method)

    def killed(self, *args, **options):
        if written:
            real(self, *args, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(Ledger, method, killed)
    with pytest.raises(KeyboardInterrupt):
        getattr(run, method)(steps(20))
    monkeypatch.undo()
    again = account(tmp_path, resume=True)
    again.reserve(steps(50))
    again.authorise(steps(50))
    assert again.commit(steps(50))["runs_before"] == 0


def test_the_folder_of_another_part_is_refused(tmp_path):
    run = account(tmp_path, part=("p", "1"))
    run.reserve(steps(50))
    run.authorise(steps(10))
    run.close()
    with pytest.raises(LedgerError, match="belongs to another part of the data"):
        account(tmp_path, part=("p", "2"), resume=True).reserve(steps(50))


def test_resume_refuses_while_the_run_still_trains(tmp_path):
    import fcntl

    run = account(tmp_path)
    run.reserve(steps(50))
    run.authorise(steps(25))
    lock = (partial_folder(tmp_path / "run") / "lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(LedgerError, match="another process is training"):
        account(tmp_path, resume=True).reserve(steps(50))
    run.authorise(steps(30))
    lock.close()


def test_a_commit_can_be_repeated_when_the_run_folder_could_not_be_written(tmp_path):
    run = account(tmp_path)
    run.reserve(steps(50))
    run.authorise(steps(50))
    first = run.commit(steps(50))
    run.close()
    again = account(tmp_path, resume=True)
    again.reserve(steps(50))
    second = again.commit(steps(50))
    assert second["ledger_entry"] == first["ledger_entry"]
    assert second["this_run"] == first["this_run"]
    assert len(standing(tmp_path).entries) == 1


def test_no_account_for_runs_without_claim_or_by_wish(tmp_path):
    def account_of(privacy, **options):
        request = Request(privacy, ModelConfig(), {}, PerformanceConfig(), "small")
        return open_account(small_data(), request, tmp_path / "run", **options)

    for privacy in (PrivacyConfig(float("inf")), PrivacyConfig(1.0, insecure_seed=1)):
        found = account_of(privacy)
        assert isinstance(found, NoAccount)
        assert "not charged" in found.reason
    assert isinstance(account_of(PrivacyConfig(1.0), ledger=None), NoAccount)
    assert isinstance(account_of(PrivacyConfig(1.0)), LedgerAccount)
    assert not (tmp_path / "ledger.sqlite").exists()
    with pytest.raises(LedgerError, match="a run without noise cannot be charged"):
        account(tmp_path).reserve(Spending(None, None, 1e-5))
    with pytest.raises(LedgerError, match="reserve the plan first"):
        account(tmp_path).authorise(steps(1))


# what the statement says


def test_fields_of_a_budget_before_and_after(tmp_path):
    ledger = limited(tmp_path, 3.0)
    first = account(tmp_path, run="one")
    first.reserve(steps(25))
    first.commit(steps(25))
    second = account(tmp_path, run="two")
    second.reserve(steps(9))
    waiting = account(tmp_path, run="three")
    waiting.reserve(steps(4))
    fields = second.commit(steps(9))
    assert fields["filter"] == "gdp"
    assert fields["budget"]["epsilon"] == 3.0
    assert fields["budget"]["delta"] == 1e-5
    assert fields["spent_before"]["mu"] == pytest.approx(0.5, rel=1e-6)
    assert fields["this_run"]["mu"] == pytest.approx(0.3, rel=1e-6)
    assert fields["total"]["mu"] == pytest.approx(0.34**0.5, rel=1e-6)
    assert fields["total_with_unfinished_runs"]["mu"] == pytest.approx(0.38**0.5, rel=1e-6)
    left = (float(ledger.account("small").budget.mu) ** 2 - 0.38) ** 0.5
    assert fields["remaining"]["mu"] == pytest.approx(left, rel=1e-6)
    assert fields["runs_before"] == 2
    assert fields["data_set"] == "small"


def test_a_single_run_may_take_the_whole_epsilon_and_total_says_so(tmp_path):
    limited(tmp_path, 3.0)
    mechanism = PoissonGaussian(1.565, sampling_rate=0.01, steps=9990)
    run = account(tmp_path)
    run.reserve(Spending(mechanism, None, 1e-5))
    fields = run.commit(Spending(mechanism, None, 1e-5))
    assert fields["total"]["epsilon"] == fields["this_run"]["epsilon"] < 3
    assert fields["remaining"] == {"epsilon": 0.0, "delta": 1e-5, "mu": 0.0}
    with pytest.raises(BudgetExceededError, match="was given whole to the run 'run'"):
        account(tmp_path, run="two").reserve(steps(1))


def test_totals_without_a_budget_carry_a_note_from_the_second_run_on(tmp_path):
    notes = []
    for name in ("one", "two"):
        run = account(tmp_path, run=name)
        run.reserve(steps(25))
        notes.append(run.commit(steps(25)).get("budget_note"))
    assert notes[0] is None
    assert "did not depend on each other" in notes[1]


def test_a_cost_without_gaussian_reading_is_null_not_infinite(tmp_path):
    ledger = open_ledger(tmp_path / "ledger.sqlite")
    ledger.register("c", "d")
    ledger.declare("d", Budget.from_epsilon(3.0, 1e-4, filter="sum"))
    cost = Cost(Decimal("Infinity"), Decimal(0), Decimal(1), Decimal("0.00001"))
    mechanism = SequenceComposition((FullBatchGaussian(10.0, steps=1),))
    entry = ledger.reserve("c", cost, mechanism, run="r")
    done = ledger.commit(entry.id, entry.token, cost, mechanism)
    fields = composition_fields(ledger, done, 1e-5)
    assert fields["this_run"]["mu"] is None
    assert fields["total"]["epsilon"] == 1
    json.dumps(fields, allow_nan=False)


# whole trainings


def test_training_charges_the_project_ledger_and_the_statement_agrees(tmp_path):
    run = dptaft.train(small_data(), epsilon=2, output=tmp_path / "one", **QUICK)
    ledger = Ledger(tmp_path / "ledger.sqlite")
    composition = run.statement.composition
    assert composition["ledger"] == ledger.id
    assert composition["this_run"]["epsilon"] == run.statement.claim["epsilon"]
    assert ledger_problems(run.statement, ledger.path) == ()
    assert not partial_folder(run.path).exists()


def test_a_run_that_does_not_fit_is_refused_before_features_are_read(tmp_path, monkeypatch):
    limited(tmp_path, 1.0)
    from dptaft.learner import Learner

    def never(*_, **__):
        raise AssertionError("features were read")

    monkeypatch.setattr(Learner, "features", never)
    with pytest.raises(BudgetExceededError, match="the largest epsilon at delta 1e-05 that fits is 1"):
        dptaft.train(small_data(), epsilon=2, output=tmp_path / "one", **QUICK)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ledger.sqlite"]


def test_unreadable_data_after_the_reservation_costs_nothing(tmp_path, monkeypatch):
    from dptaft.learner import Learner

    def broken(*_, **__):
        raise ValueError("no image")

    monkeypatch.setattr(Learner, "features", broken)
    with pytest.raises(ValueError, match="no image"):
        dptaft.train(small_data(), epsilon=2, output=tmp_path / "one", **QUICK)
    assert standing(tmp_path).entries == ()


def test_a_stop_between_the_reservation_and_its_answer_costs_nothing(tmp_path, monkeypatch):
    real = Ledger.reserve

    def stopped(self, *args, **options):
        real(self, *args, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(Ledger, "reserve", stopped)
    for options in (QUICK, SOLVED):
        with pytest.raises(KeyboardInterrupt):
            dptaft.train(small_data(), epsilon=2, output=tmp_path / "run", **options)
    assert standing(tmp_path).entries == ()


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_without_steps_leaves_no_partial_folder(tmp_path, monkeypatch, fails):
    import dptaft.training.one_shot_run as one_shot_run

    def broken(*_, **__):
        raise ValueError("no minimum")

    if fails:
        monkeypatch.setattr(one_shot_run, "train_once", broken)
        with pytest.raises(ValueError, match="no minimum"):
            dptaft.train(small_data(), epsilon=2, output=tmp_path / "run", **SOLVED)
    else:
        dptaft.train(small_data(), epsilon=2, output=tmp_path / "run", **SOLVED)
    assert standing(tmp_path).entries[0].state == ("closed" if fails else "committed")
    assert standing(tmp_path).entries[0].charge.epsilon > Decimal("1.9")
    assert not partial_folder(tmp_path / "run").exists()


def test_a_run_without_a_claim_is_refused_where_the_data_have_a_budget(tmp_path):
    for privacy in ({"epsilon": float("inf")}, {"epsilon": 1.0, "insecure_seed": 1}):
        output = tmp_path / str(len(privacy))
        dptaft.train(small_data(), output=output, **privacy, **QUICK)
        shutil.rmtree(output)
    limited(tmp_path, 3.0)
    for privacy in ({"epsilon": float("inf")}, {"epsilon": 1.0, "insecure_seed": 1}):
        output = tmp_path / str(len(privacy))
        with pytest.raises(LedgerError, match=r"has a budget in .* say --no-ledger where that is meant"):
            dptaft.train(small_data(), output=output, **privacy, **QUICK)
        dptaft.train(small_data(), output=output, ledger=None, **privacy, **QUICK)


def test_an_interrupted_run_makes_no_new_ledger(tmp_path):
    run = account(tmp_path)
    run.reserve(steps(50))
    run.authorise(steps(25))
    run.close()
    (tmp_path / "ledger.sqlite").rename(tmp_path / "kept")
    with pytest.raises(LedgerError, match=r"ledger.sqlite \(there is none\): bring it back"):
        account(tmp_path, resume=True).reserve(steps(50))
    (tmp_path / "kept").rename(tmp_path / "ledger.sqlite")
    account(tmp_path, resume=True).reserve(steps(50))


def test_a_diverged_run_stays_charged(tmp_path):
    wild = {"learning_rate": 1e30, "l2_regularization": 1.0}
    with pytest.raises(ValueError, match="diverged"):
        dptaft.train(small_data(), epsilon=2, steps=8, output=tmp_path / "one", optimizer=wild)
    entry = standing(tmp_path).entries[0]
    assert entry.state == "closed"
    assert entry.charge == entry.reserved


def test_without_ledger_the_statement_says_so(tmp_path):
    run = dptaft.train(small_data(), epsilon=2, output=tmp_path / "one", ledger=None, **QUICK)
    assert run.statement.composition["ledger"] == "none: declined by the user"
    assert any("no budget ledger recorded this run" in line for line in run.statement.admin["caveats"])
    assert not (tmp_path / "ledger.sqlite").exists()
    other = dptaft.train(
        small_data(), epsilon=2, output=tmp_path / "two", ledger=tmp_path / "shared.sqlite", **QUICK
    )
    assert other.statement.composition["ledger"] == Ledger(tmp_path / "shared.sqlite").id


SCRIPT = """
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)
import dptaft
from builders import small_data
from dptaft.training.trainer import partial_folder
from pathlib import Path
output, data = Path(sys.argv[1]), small_data()
generator, duration = random.Random(int(sys.argv[2])), None

def child():
    try:
        dptaft.train(data, epsilon=2, steps=60, scope="head", output=output, resume=partial_folder(output).exists())
    except BaseException as error:
        print(type(error).__name__, error, file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)

for _ in sys.stdin:
    begun, pid = time.monotonic(), os.fork()
    if not pid:
        child()
    if duration is not None:
        time.sleep(generator.uniform(0, 1.2 * duration))
        os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    duration = duration or time.monotonic() - begun
    print(code, flush=True)
"""


def check_ledger_covers_checkpoint(tmp_path):
    """The ledger opens, is intact, and charges at least the steps that the checkpoint lists."""
    ledger = Ledger(tmp_path / "ledger.sqlite")
    assert ledger.verify() == []
    entry = ledger.account("small").entries[-1]
    progress = partial_folder(tmp_path / "run") / "progress.json"
    if not progress.exists():
        return
    charged = sum(stop - start for start, stop in json.loads(progress.read_text())["authorised"])
    noise = entry.mechanism["noise_multiplier"]
    assert entry.authorised.mu >= Decimal(charged**0.5 / noise) * Decimal("0.999999999")
    assert entry.charge.mu >= entry.authorised.mu


def kill_trainings(tmp_path, count, seed):
    """Train once to the end, then kill trainings at random moments, each of which continues the one before."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "run"), str(seed)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path]),
            "OMP_NUM_THREADS": "1",
        },
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    codes = []
    with process:
        for i in range(count + 1):
            process.stdin.write("go\n")
            process.stdin.flush()
            codes.append(int(process.stdout.readline()))
            if not codes[0] and i == 0:
                assert standing(tmp_path).entries[0].state == "committed"
            check_ledger_covers_checkpoint(tmp_path)
            if (tmp_path / "run").exists():
                (tmp_path / "run").rename(tmp_path / f"run{i}")
                shutil.rmtree(partial_folder(tmp_path / "run"), ignore_errors=True)
    assert codes[0] == 0
    return codes


def test_killed_trainings_stay_charged(tmp_path):
    assert kill_trainings(tmp_path, 2, seed=5)[1:].count(1) == 0


@pytest.mark.slow
def test_two_hundred_killed_trainings(tmp_path):
    """SIGKILL at random moments: the ledger opens, and covers the checkpoint; every run can be continued."""
    codes = kill_trainings(tmp_path, 200, seed=6)
    logging.getLogger(__name__).info("exit codes: %s", {code: codes.count(code) for code in set(codes)})
    assert codes.count(-signal.SIGKILL) >= 100
    finished = [entry for entry in standing(tmp_path).entries if entry.state == "committed"]
    assert len(finished) >= codes.count(0)
