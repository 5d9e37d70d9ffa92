import os
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest

from dptaft_accounting import best_bound, ledger_chain, ledger_owner
from dptaft_accounting.ledger import Budget, BudgetExceededError, Cost, Ledger, LedgerError
from dptaft_accounting.ledger_records import are_within, do_meet, marks_of
from dptaft_accounting.mechanisms import FullBatchGaussian, PoissonGaussian
from dptaft_accounting.tradeoff import epsilon_to_mu, mu_to_epsilon

ZERO = Decimal(0)
WHOLE = 0.7191  # epsilon 2.99994 at 1e-5, above B of the budget of 3


def gaussian(mu, adjacency="zero-out"):
    return FullBatchGaussian(1.0 / mu, steps=1, adjacency=adjacency)


def cost_of(mechanism, delta=1e-5):
    return Cost.of(mechanism, delta=delta)


def reserve(ledger, mu, content="a", run="run", **options):
    mechanism = gaussian(mu)
    return ledger.reserve(content, cost_of(mechanism), mechanism, run=run, **options)


def spend(ledger, mu, content="a", **options):
    entry, mechanism = reserve(ledger, mu, content, **options), gaussian(mu)
    ledger.authorise(entry.id, entry.token, cost_of(mechanism))
    return ledger.commit(entry.id, entry.token, cost_of(mechanism), mechanism)


@pytest.fixture
def ledger(tmp_path):
    made = Ledger.create(tmp_path / "ledger.sqlite")
    made.register("a", "scans")
    return made


@pytest.fixture
def limited(ledger):
    ledger.declare("scans", Budget.from_epsilon(3.0, 1e-5))
    return ledger


def test_spending_adds_up_by_squares(ledger):
    for _ in range(4):
        spend(ledger, 0.5)
    account = ledger.account("scans")
    assert account.spent == account.claimed
    assert 1.0 <= account.spent.mu <= Decimal("1.00000001")
    assert len(account.entries) == 4


def test_four_runs_of_epsilon_3_give_6_71_and_12(ledger):
    mu = epsilon_to_mu(3.0, 1e-5)
    for _ in range(4):
        spend(ledger, mu)
    spent = ledger.account("scans").spent
    assert 6.70 < spent.epsilon_at(1e-5) < 6.72
    assert spent.epsilon == pytest.approx(Decimal(12), rel=Decimal("1e-6"))


def test_refusal_says_by_how_much_what_is_left_and_what_fits(limited):
    spend(limited, 0.5, run="first")
    before = limited.head
    with pytest.raises(BudgetExceededError) as error:
        reserve(limited, 0.6)
    message = str(error.value)
    total = mu_to_epsilon((0.5**2 + 0.6**2) ** 0.5, 1e-5 * 0.99)
    assert f"epsilon {total:.3g}"[:-1] in message
    assert "above its budget of 3" in message
    assert "spent and reserved so far: epsilon 1.99" in message
    fits = float(message.split("that fits is ")[1])
    assert limited.head == before
    with pytest.raises(BudgetExceededError):
        reserve(limited, epsilon_to_mu(fits * 1.001, 1e-5))
    spend(limited, epsilon_to_mu(fits, 1e-5))
    assert limited.account("scans").remaining_epsilon(1e-5) < 0.01


def test_largest_epsilon_fits_for_poisson_runs_too(limited):
    spend(limited, 0.3)
    big = PoissonGaussian(1.0, sampling_rate=0.01, steps=2000)
    with pytest.raises(BudgetExceededError, match="that fits is") as error:
        limited.reserve("a", cost_of(big), big, run="poisson")
    fits = float(str(error.value).split("that fits is ")[1])
    from dptaft_accounting.calibration import Target, calibrate_noise_multiplier

    def kind(z):
        return PoissonGaussian(z, sampling_rate=0.01, steps=2000)

    small = kind(calibrate_noise_multiplier(kind, Target(0.99 * fits, 1e-5)))
    assert limited.reserve("a", cost_of(small), small, run="poisson").state == "open"


def test_a_budget_that_is_exceeded_already_cannot_be_declared(ledger):
    spend(ledger, 0.5)
    spend(ledger, 0.5)
    with pytest.raises(
        LedgerError, match=r"claim epsilon 2\.9\d+ at delta 1e-05 already, more than this budget of 2"
    ):
        ledger.declare("scans", Budget.from_epsilon(2.0, 1e-5))
    ledger.declare("scans", Budget.from_epsilon(3.0, 1e-5))
    with pytest.raises(LedgerError, match="already, more than this budget of 2"):
        ledger.declare("scans", Budget.from_epsilon(2.0, 1e-5), replace=True)


def test_a_single_run_may_fill_a_budget_that_is_declared_later(ledger):
    spend(ledger, WHOLE)
    ledger.declare("scans", Budget.from_epsilon(3.0, 1e-5))
    with pytest.raises(BudgetExceededError):
        reserve(ledger, 0.01)


def test_a_reservation_given_back_by_a_run_that_took_all_is_not_restored_beside_others(limited):
    entry = reserve(limited, WHOLE)
    limited.release(entry.id, entry.token)
    spend(limited, 0.5)
    again = limited.resume(entry.id, "a", cost_of(gaussian(0.1)), gaussian(0.1))
    assert limited.account("scans").budget.permits(limited.account("scans").claimed)
    assert not again.exclusive
    with pytest.raises(LedgerError, match="more than the"):
        limited.authorise(again.id, again.token, cost_of(gaussian(0.2)))
    reserve(limited, 0.5)


def test_a_run_that_took_all_resumes_beside_others_only_where_the_filter_permits(limited):
    entry = reserve(limited, WHOLE)
    limited.authorise(entry.id, entry.token, cost_of(gaussian(0.1)))
    limited.close(entry.id, entry.token)
    with pytest.raises(BudgetExceededError, match="given whole"):
        reserve(limited, 0.1)
    limited.declare("scans", Budget.from_epsilon(3.5, 1e-5), replace=True)
    spend(limited, 0.7)
    with pytest.raises(BudgetExceededError):
        limited.resume(entry.id, "a", cost_of(gaussian(0.1)), gaussian(0.1))
    assert limited.account("scans").budget.permits(limited.account("scans").claimed)


def test_what_fits_is_said_for_parts_which_cannot_have_the_budget_whole(limited):
    with pytest.raises(BudgetExceededError, match="that fits is") as error:
        reserve(limited, WHOLE, part=("thirds", "1"))
    fits = float(str(error.value).split("that fits is ")[1])
    reserve(limited, epsilon_to_mu(fits, 1e-5), part=("thirds", "1"))


def test_open_reservations_count_whole_and_the_rest_comes_back(limited):
    entry = reserve(limited, 0.7)
    with pytest.raises(BudgetExceededError, match=f"unfinished runs hold a part .entries {entry.id}"):
        reserve(limited, 0.3)
    limited.authorise(entry.id, entry.token, cost_of(gaussian(0.2)))
    with pytest.raises(BudgetExceededError):
        reserve(limited, 0.3)
    limited.close(entry.id, entry.token)
    assert Decimal("0.2") <= limited.account("scans").claimed.mu < Decimal("0.2001")
    reserve(limited, 0.3)


def test_a_commit_is_never_below_the_authorised_mark(ledger):
    entry = reserve(ledger, 0.7)
    ledger.authorise(entry.id, entry.token, cost_of(gaussian(0.6)))
    done = ledger.commit(entry.id, entry.token, cost_of(gaussian(0.1)), gaussian(0.1))
    assert done.charge.mu >= Decimal("0.6")


def test_the_authorised_mark_never_shrinks(ledger):
    entry = reserve(ledger, 0.7)
    ledger.authorise(entry.id, entry.token, cost_of(gaussian(0.6)))
    ledger.authorise(entry.id, entry.token, cost_of(gaussian(0.1)))
    assert ledger.entry(entry.id).authorised.mu >= Decimal("0.6")
    poisson = Cost(Decimal("0.5"), Decimal("1E-9"), Decimal(1), Decimal("0.00001"))
    other = ledger.reserve("a", poisson, gaussian(0.5), run="mixed")
    for mu, epsilon in (("0.1", "1"), ("0.5", "0.2")):
        ledger.authorise(other.id, other.token, Cost(Decimal(mu), ZERO, Decimal(epsilon), Decimal("0.00001")))
    assert ledger.entry(other.id).authorised.amounts()[::2] == (Decimal("0.5"), Decimal(1))


def test_residual_deltas_are_summed_against_their_share(limited):
    cost = Cost(Decimal("0.01"), Decimal("6E-8"), Decimal(1), Decimal("0.00001"))
    limited.reserve("a", cost, gaussian(0.01), run="one")
    with pytest.raises(BudgetExceededError, match="sets aside for failure probabilities"):
        limited.reserve("a", cost, gaussian(0.01), run="two")


def test_costs_are_rounded_up_and_never_below_the_statement():
    for steps in (1, 3, 7, 50):
        for mechanism in (
            FullBatchGaussian(9.87, steps=steps),
            PoissonGaussian(1.3, sampling_rate=0.02, steps=steps),
        ):
            cost, report = cost_of(mechanism), best_bound(mechanism, delta=1e-5)
            assert Decimal(repr(report.epsilon)) == cost.epsilon
            assert cost.mu >= Decimal(getattr(report.profile, "mu", 0))
            assert cost.residual_delta <= Decimal("1E-9")
            assert len(cost.mu.as_tuple().digits) <= 9


def test_nothing_beyond_the_reservation(ledger):
    entry = reserve(ledger, 0.5)
    for call in (
        lambda: ledger.authorise(entry.id, entry.token, cost_of(gaussian(0.51))),
        lambda: ledger.commit(entry.id, entry.token, cost_of(gaussian(0.51)), gaussian(0.51)),
    ):
        with pytest.raises(LedgerError, match="more than the epsilon"):
            call()
    assert ledger.entry(entry.id).authorised == Cost.zero()


def test_release_gives_all_back_and_only_before_anything_was_authorised(limited):
    entry = reserve(limited, 0.7)
    assert limited.release(entry.id, entry.token).state == "released"
    assert limited.account("scans").entries == ()
    second = reserve(limited, 0.7)
    limited.authorise(second.id, second.token, cost_of(gaussian(0.1)))
    with pytest.raises(LedgerError, match="cannot be released; close it"):
        limited.release(second.id, second.token)


def test_a_closed_entry_grants_nothing_more(ledger):
    entry = reserve(ledger, 0.7)
    ledger.authorise(entry.id, entry.token, cost_of(gaussian(0.1)))
    assert ledger.close(entry.id, insist=True).state == "closed"
    for call in (
        lambda: ledger.authorise(entry.id, entry.token, cost_of(gaussian(0.1))),
        lambda: ledger.commit(entry.id, entry.token, cost_of(gaussian(0.1)), gaussian(0.1)),
        lambda: ledger.close(entry.id, entry.token),
    ):
        with pytest.raises(LedgerError, match="is closed: its run may not go on"):
            call()


def test_a_live_owner_is_not_closed_without_insisting(ledger):
    entry = reserve(ledger, 0.7)
    with pytest.raises(LedgerError, match="still runs; end it first, or say --force"):
        ledger.close(entry.id)
    spent = spend(ledger, 0.1)
    with pytest.raises(LedgerError, match="not open"):
        ledger.close(spent.id)


def test_an_entry_of_a_dead_process_is_closed_at_its_mark(ledger):
    code = (
        "import sys\nfrom dptaft_accounting.ledger import Cost, Ledger\n"
        "from dptaft_accounting.mechanisms import FullBatchGaussian as F\n"
        "ledger, full, part = Ledger(sys.argv[1]), F(2.0, steps=1), F(4.0, steps=1)\n"
        "entry = ledger.reserve('a', Cost.of(full, delta=1e-5), full, run='child')\n"
        "ledger.authorise(entry.id, entry.token, Cost.of(part, delta=1e-5))\nprint(entry.id)\n"
    )
    made = subprocess.run(
        [sys.executable, "-c", code, str(ledger.path)], capture_output=True, text=True, check=True
    )
    name = made.stdout.strip()
    assert ledger.entry(name).charge.mu >= Decimal("0.5")
    closed = ledger.close(name)
    assert closed.state == "closed"
    assert Decimal("0.25") <= closed.charge.mu < Decimal("0.2501")


def test_owner_states(monkeypatch):
    me = ledger_owner.this_process()
    assert ledger_owner.is_gone(me) is False
    assert ledger_owner.is_gone(me | {"started": "1"}) is True
    assert ledger_owner.is_gone(me | {"pid": str(2**22 + 5)}) is True
    assert ledger_owner.is_gone(me | {"boot": "another"}) is True
    assert ledger_owner.is_gone(me | {"namespace": "pid:[1]"}) is None
    assert ledger_owner.is_gone({}) is None


def test_resume_continues_the_same_entry_and_voids_the_old_permission(limited):
    entry = reserve(limited, 0.7)
    limited.authorise(entry.id, entry.token, cost_of(gaussian(0.3)))
    again = limited.resume(entry.id, "a", cost_of(gaussian(0.7)), gaussian(0.7))
    with pytest.raises(LedgerError, match="taken over by another process"):
        limited.authorise(entry.id, entry.token, cost_of(gaussian(0.4)))
    limited.authorise(again.id, again.token, cost_of(gaussian(0.5)))
    assert len(limited.account("scans").entries) == 1


def test_resume_is_extended_only_where_the_filter_permits(limited):
    entry = reserve(limited, 0.5)
    limited.authorise(entry.id, entry.token, cost_of(gaussian(0.4)))
    limited.close(entry.id, entry.token)
    reserve(limited, 0.5, run="other")
    with pytest.raises(BudgetExceededError):
        limited.resume(entry.id, "a", cost_of(gaussian(0.55)), gaussian(0.55))
    assert limited.resume(entry.id, "a", cost_of(gaussian(0.5)), gaussian(0.5)).state == "open"
    with pytest.raises(BudgetExceededError):
        limited.resume(entry.id, "a", cost_of(gaussian(0.55)), gaussian(0.55))


def test_a_resumed_commit_stays_charged(ledger):
    done = spend(ledger, 0.5)
    again = ledger.resume(done.id, "a", cost_of(gaussian(0.1)), gaussian(0.1))
    assert ledger.close(again.id, again.token).charge.mu >= Decimal("0.5")


def test_resume_needs_the_same_data_and_adjacency(ledger):
    entry = reserve(ledger, 0.5)
    ledger.register("b", "other")
    with pytest.raises(LedgerError, match="belongs to other data"):
        ledger.resume(entry.id, "b", cost_of(gaussian(0.5)), gaussian(0.5))
    with pytest.raises(LedgerError, match="another adjacency"):
        ledger.resume(entry.id, "a", cost_of(gaussian(0.5)), gaussian(0.5, "replace-one"))
    with pytest.raises(LedgerError, match="an older copy of the ledger was restored"):
        ledger.resume("nothing", "a", cost_of(gaussian(0.5)), gaussian(0.5))


def test_resume_refuses_another_version_of_the_same_data_set(ledger):
    """It may share records with data that the first version does not share them with."""
    ledger.register("elsewhere", "limited", records=[b"1"])
    ledger.declare("limited", Budget.from_epsilon(3.0, 1e-5))
    entry = reserve(ledger, 2.0)
    assert ledger.register("more", "scans", records=[b"1", b"2"]) == "scans"
    with pytest.raises(LedgerError, match="belongs to other data"):
        ledger.resume(entry.id, "more", cost_of(gaussian(2.0)), gaussian(2.0))
    with pytest.raises(BudgetExceededError, match="'limited'"):
        reserve(ledger, 2.0, "more")


# the whole budget for one run


def test_one_run_may_have_the_whole_epsilon_and_then_nothing_fits(limited):
    mu = WHOLE
    assert limited.account("scans").remaining_epsilon(1e-5) == 3.0
    entry = reserve(limited, mu, run="whole")
    assert entry.exclusive
    limited.authorise(entry.id, entry.token, cost_of(gaussian(0.1)))
    limited.close(entry.id, entry.token)
    with pytest.raises(BudgetExceededError, match="was given whole to the run 'whole'"):
        reserve(limited, 0.01)
    again = limited.resume(entry.id, "a", cost_of(gaussian(0.2)), gaussian(0.2))
    limited.close(again.id, again.token)
    with pytest.raises(BudgetExceededError, match="was given whole"):
        reserve(limited, 0.01)
    assert limited.account("scans").remaining_epsilon(1e-5) == 0
    limited.resume(entry.id, "a", cost_of(gaussian(mu)), gaussian(mu))


def test_the_whole_budget_is_not_for_a_second_run_nor_for_one_that_grew(limited):
    mu = WHOLE
    small = reserve(limited, 0.01)
    with pytest.raises(BudgetExceededError):
        reserve(limited, mu)
    limited.authorise(small.id, small.token, small.reserved)
    with pytest.raises(BudgetExceededError):
        limited.resume(small.id, "a", cost_of(gaussian(mu)), gaussian(mu))


def test_a_released_whole_budget_is_free_again(limited):
    entry = reserve(limited, WHOLE)
    limited.release(entry.id, entry.token)
    assert not reserve(limited, 0.1).exclusive


def test_a_larger_budget_frees_what_one_run_had(limited):
    spend(limited, WHOLE)
    with pytest.raises(LedgerError, match="a promise made after looking"):
        limited.declare("scans", Budget.from_epsilon(6.0, 1e-5))
    limited.declare("scans", Budget.from_epsilon(6.0, 1e-5), replace=True)
    spend(limited, 0.5)
    assert limited.account("scans").declared == 2


# identity of data


def test_the_same_content_under_another_name_hits_the_same_budget(limited):
    assert limited.register("a", "renamed") == "scans"
    assert limited.datasets() == ["scans"]
    assert limited.find("a") == "scans"
    assert limited.find("z") is None


def test_other_content_under_the_name_of_a_budget_is_refused_with_the_remedy(limited):
    with pytest.raises(LedgerError, match="--version-of scans --data") as error:
        limited.register("b", "scans")
    assert "--name" in str(error.value)
    assert limited.register("b", "scans", version_of=True) == "scans"
    spend(limited, 0.7, content="b")
    with pytest.raises(BudgetExceededError):
        reserve(limited, 0.3, content="a")


def test_versions_of_a_data_set_without_budget_are_summed(ledger):
    assert ledger.register("b", "scans") == "scans"
    spend(ledger, 0.3)
    spend(ledger, 0.4, content="b")
    assert Decimal("0.5") <= ledger.account("scans").spent.mu < Decimal("0.5001")
    assert ledger.account("scans").versions == 2


def test_version_of_needs_a_known_name_and_shares_what_another_data_set_has(limited):
    with pytest.raises(LedgerError, match="knows no data set 'other'; known: scans"):
        limited.register("b", "other", version_of=True)
    limited.register("b", "other")
    spend(limited, 0.4, content="b")
    assert limited.account("scans").spent.mu == 0
    assert limited.register("b", "scans", version_of=True) == "other"
    assert Decimal("0.4") <= limited.account("scans").spent.mu < Decimal("0.4001")
    with pytest.raises(BudgetExceededError, match="the total of 'scans'"):
        reserve(limited, 0.7, content="b")
    limited.register("d", "third")
    spend(limited, 0.7, content="d")
    with pytest.raises(LedgerError, match="declare a larger one"):
        limited.register("d", "scans", version_of=True)
    assert limited.near("d") == ["third"]
    with pytest.raises(LedgerError, match="needs a printable name"):
        limited.register("c", "a\nb")


def test_unknown_content_cannot_be_reserved(ledger):
    with pytest.raises(LedgerError, match="register it first"):
        reserve(ledger, 0.1, content="never seen")


def test_fingerprints_are_keyed(tmp_path):
    first, second = (Ledger.create(tmp_path / name) for name in ("a.sqlite", "b.sqlite"))
    assert first.fingerprint("x") != second.fingerprint("x")
    assert first.fingerprint("x") != first.fingerprint("y")
    key = first.path.read_bytes()
    exported = str(first.export())
    assert all(exported.find(key[i : i + 64].decode(errors="replace")) < 0 for i in [key.find(b"secret")])


# adjacency, unit, parts


@pytest.mark.parametrize("adjacency", ["zero-out", "add-remove", "replace-one"])
def test_every_adjacency_counts_as_it_is_under_zero_out(limited, adjacency):
    mechanism = gaussian(0.3, adjacency)
    limited.reserve("a", cost_of(mechanism), mechanism, run="r")


def test_other_conversions_are_refused(ledger):
    ledger.declare("scans", Budget.from_epsilon(3.0, 1e-5, adjacency="replace-one"))
    with pytest.raises(LedgerError, match="accounted for zero-out, which does not bound it"):
        reserve(ledger, 0.1)
    mechanism = gaussian(0.1, "replace-one")
    ledger.reserve("a", cost_of(mechanism), mechanism, run="r")
    with pytest.raises(LedgerError, match="the run 'r'"):
        ledger.declare("scans", Budget.from_epsilon(3.0, 1e-5, adjacency="add-remove"), replace=True)


def test_units_do_not_mix(ledger):
    spend(ledger, 0.1)
    with pytest.raises(LedgerError, match="use one unit"):
        reserve(ledger, 0.1, unit="one patient")
    with pytest.raises(LedgerError, match="protects 'one patient'"):
        ledger.declare("scans", Budget.from_epsilon(1.0, 1e-5, unit="one patient"))


def test_disjoint_parts_compose_as_the_largest(limited):
    for part in ("1", "2", "3"):
        spend(limited, 0.6, part=("thirds", part))
    assert Decimal("0.6") <= limited.account("scans").spent.mu < Decimal("0.6001")
    spend(limited, 0.3)
    with pytest.raises(BudgetExceededError):
        reserve(limited, 0.4, part=("thirds", "1"))
    with pytest.raises(BudgetExceededError):
        reserve(limited, 0.4, part=("halves", "1"))
    mechanism = gaussian(0.1, "replace-one")
    with pytest.raises(LedgerError, match="may touch two parts"):
        limited.reserve("a", cost_of(mechanism), mechanism, run="r", part=("thirds", "1"))


# the plain filter


def test_the_sum_filter_adds_epsilon_and_delta(ledger):
    ledger.declare("scans", Budget.from_epsilon(3.0, 3e-5, filter="sum"))
    for _ in range(2):
        entry = reserve(ledger, epsilon_to_mu(1.4, 1e-5))
        ledger.commit(entry.id, entry.token, entry.reserved, gaussian(0.3))
    with pytest.raises(BudgetExceededError, match=r"at delta 1e-05 that fits is 0\.2"):
        reserve(ledger, epsilon_to_mu(0.3, 1e-5))
    entry = reserve(ledger, epsilon_to_mu(0.1, 1e-5))
    ledger.commit(entry.id, entry.token, entry.reserved, gaussian(0.3))
    with pytest.raises(BudgetExceededError, match="no run at delta 1e-05 fits any more"):
        reserve(ledger, epsilon_to_mu(0.01, 1e-5))


def test_an_exact_fit_of_sums_is_admitted(ledger):
    ledger.declare("scans", Budget.from_epsilon(3.0, 1e-5, filter="sum"))
    cost = Cost(Decimal("0.7"), ZERO, Decimal(3), Decimal("0.00001"))
    ledger.reserve("a", cost, gaussian(0.7), run="r")


# time, durability of meaning


def test_a_clock_that_runs_backwards_is_recorded_and_held(ledger, monkeypatch):
    spend(ledger, 0.1)
    last = ledger.account("scans").entries[-1].time
    monkeypatch.setattr(ledger_chain, "now", lambda: "2001-01-01T00:00:00.000000+00:00")
    assert spend(ledger, 0.1).time == last
    assert ledger.export()["rows"][-1]["body"]["clock"].startswith("2001")
    assert ledger.verify() == []


def test_a_second_object_sees_everything(limited):
    done = spend(limited, 0.5)
    other = Ledger(limited.path)
    assert other.entry(done.id) == done
    spend(other, 0.1)
    assert limited.head == other.head
    assert len(limited.account("scans").entries) == 2


def test_accounting_and_ledger_stay_free_of_torch(ledger):
    code = (
        "import sys, dptaft_accounting.ledger as l; l.Ledger(sys.argv[1]).head; "
        "raise SystemExit(any(m.split('.')[0] in ('torch', 'dptaft', 'scipy') for m in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", code, str(ledger.path)], check=True)


def test_the_file_is_private(ledger):
    assert os.stat(ledger.path).st_mode & 0o077 == 0
    assert list(Path(ledger.path).parent.iterdir()) == [ledger.path]


@pytest.mark.parametrize("key", [f"{number:064x}" for number in range(8)])
def test_a_content_of_one_record_is_compared_like_any_other(key):
    """Under any key: the one mark may lie below, within or above the others."""
    many, one, none = (marks_of(found, key) for found in ([b"%d" % i for i in range(60)], [b"7"], [b"x"]))
    assert (do_meet(many, one), do_meet(one, many), do_meet(many, none)) == (True, True, False)
    assert (are_within(one, [none, many]), are_within(many, [one])) == (True, False)
