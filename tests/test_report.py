"""Reports: true numbers, nothing hidden, nothing executed, whatever text a statement holds."""

import dataclasses
import itertools
import json
import re
import shutil
from html.parser import HTMLParser

import huggingface_hub
import pytest
import yaml
from click.testing import CliRunner
from run_folders import CONVEX, FULL, POISSON, details, make_baseline, make_run, proof, replaced

from dptaft.cli import main
from dptaft.report.card import render_card
from dptaft.report.curves import curves
from dptaft.report.document import render_json, render_markdown
from dptaft.report.facts import ReportError, facts
from dptaft.report.page import render
from dptaft.report.registry import entry, render_registry
from dptaft.runs import load_run
from dptaft_accounting.mechanisms import CyclicGaussian, FullBatchGaussian

EVIL = '"><script>alert(1)</script><img src=x onerror=y>\x1b[2J|`$x$`](javascript:z)\u202e'


def cli(*arguments):
    return CliRunner().invoke(main, ["report", *map(str, arguments)])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "one", cross_check=True)


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    return make_baseline(tmp_path_factory.mktemp("runs") / "none")


@pytest.fixture(scope="module")
def evil(tmp_path_factory):
    """A run in which every text that can be foreign is hostile."""
    claim = {
        "not_protected": [EVIL],
        "public": [EVIL],
        "data_accesses": {EVIL: "not covered"},
        "assumptions": [{"assumption": EVIL, "vouched_by": "proved", "where": EVIL}],
    }
    return make_run(
        tmp_path_factory.mktemp("evil") / "one",
        name=EVIL,
        unit=EVIL,
        claim=claim,
        details=details(FULL) | {"clipping": EVIL, EVIL: EVIL},
        composition={EVIL: {EVIL: EVIL}, "ledger": EVIL},
        audit={"method": EVIL, EVIL: [EVIL]},
        implementation={"noise_source": EVIL, "nan_policy": EVIL},
        admin={"caveats": [EVIL]},
    )


class Page(HTMLParser):
    """Collects tags and text; fails on tags that do not nest."""

    VOID = ("meta", "br", "img", "use", "path")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.mark.parametrize("name", ["run", "baseline", "evil"])
def test_the_page_stands_alone_and_runs_nothing(name, request):
    text = render(facts(request.getfixturevalue(name)))
    page = Page(text)
    assert not {"script", "link", "iframe", "img", "object", "embed", "base", "form"} & set(page.tags)
    for key, value in page.attributes:
        assert not key.startswith("on")
        if key in ("src", "href", "xlink:href", "action"):
            assert value.startswith("#")
    without_namespaces = re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)
    assert "http://" not in without_namespaces
    assert "https://" not in without_namespaces
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert "\x1b" not in text
    assert "\u202e" not in text


def test_identifiers_are_unique_and_resolve(run):
    page = Page(render(facts(run)))
    ids = [value for key, value in page.attributes if key == "id"]
    assert len(ids) == len(set(ids))
    targets = re.findall(r'(?:url\(|href=")#([^)"]+)', render(facts(run)))
    assert targets
    assert set(targets) <= set(ids)


def test_hostile_text_is_shown_as_text(evil):
    shown = "".join(Page(render(facts(evil))).words)
    assert shown.count("<script>alert(1)</script>") > 10


def test_hostile_text_cannot_leave_a_markdown_cell(evil):
    text = render_markdown(facts(evil))
    assert "\x1b" not in text
    assert not re.search(r"(?<!\\)<", text)
    for line in text.splitlines():
        if line.startswith("| "):
            assert len(re.findall(r"(?<!\\)\|", line)) in (3, 4)


def test_hostile_text_cannot_leave_the_metadata(evil):
    card = render_card(evil)
    front = card.split("---\n")[1]
    data = yaml.safe_load(front)
    assert set(data) == {"library_name", "pipeline_tag", "tags", "metrics", "model-index"}
    assert "\x1b" not in card
    assert yaml.safe_load(render_registry(evil))["status"] == "Draft"


def test_a_run_without_a_claim_says_so_first(baseline):
    for text in (render_markdown(facts(baseline)), " ".join(Page(render(facts(baseline))).words)):
        place = text.lower().index("no privacy")
        assert place < 1200 or "epsilon" not in text[:place]
        assert "no privacy claim" in text.lower()
        assert "epsilon is infinite" in text
    assert facts(baseline).numbers == ()
    assert "carries no privacy claim" in render_card(baseline)
    assert "differential-privacy" not in render_card(baseline).split("---\n")[1]
    with pytest.raises(ReportError, match="no deployment"):
        render_registry(baseline)


def number(text):
    return float(re.sub(r"[^\d.e-]", "", text.replace("\u00a0%", "")))


@pytest.mark.parametrize("mechanism", [FULL, POISSON], ids=["full", "poisson"])
def test_shown_numbers_never_flatter(mechanism, tmp_path):
    run = make_run(tmp_path / "r", mechanism)
    found, statement = facts(run), run.statement
    shown = {n.label: number(n.value) for n in found.numbers}
    assert shown["epsilon"] >= statement.claim["epsilon"]
    assert shown["mu"] >= statement.accounting["mu"]["mu"]
    assert shown["best guess"] >= 100 * (1 - statement.risk["bayes_error"])
    assert {n.label: n.value for n in found.numbers}["best guess"] in found.sentence
    risks = {r.label: number(r.value) for r in found.risks}
    for point, label in zip(statement.risk["tpr_at_fpr"], risks, strict=False):
        assert risks[label] >= 100 * point["tpr"]
    assert risks["advantage"] >= 100 * statement.risk["advantage"]
    assert risks["smallest error"] <= 100 * statement.risk["bayes_error"]


def test_what_remains_of_a_budget_is_rounded_down(tmp_path):
    fields = {
        "remaining": {"epsilon": 1.23459, "delta": 1e-5},
        "this_run": {"epsilon": 1.23451, "delta": 1e-5},
    }
    rows = dict(facts(make_run(tmp_path / "r", composition=fields)).budget)
    assert rows["remaining"] == "epsilon 1.234 at delta 1e-05"
    assert rows["this run"] == "epsilon 1.235 at delta 1e-05"


def test_every_group_of_the_statement_is_shown(run):
    text = render_markdown(facts(run)).replace("\\", "")
    for words in (
        "whether any one training record was used",
        "zero-out adjacency",
        "accuracy on held-out images | not covered",
        "list of classes | public, declared by the user",
        "one person owns one record | not checked",
        "the evaluation images",
        "dp-accounting",
        "noise multiplier | 10",
        "dptaft verify",
        run.id,
        run.files["model.safetensors"],
    ):
        assert words in text, words
    shown = {text for group in (facts(run).mechanism, facts(run).accounting) for _, text in group}
    assert "exact" in shown


def test_json_holds_every_fact(run):
    found = facts(run)
    again = json.loads(render_json(found))
    assert set(again) == {field.name for field in dataclasses.fields(found)}
    assert again["curves"]["delta"]["composition"] == [list(p) for p in found.curves.delta["composition"]]


@pytest.mark.parametrize(
    ("mechanism", "certificate"),
    [
        (FULL, None),
        (FullBatchGaussian((9.0, 8.0, 7.0), 3), None),
        (CyclicGaussian(3.0, 5, 6), None),
        (POISSON, None),
        (CONVEX, proof()),
    ],
    ids=["full", "schedule", "cyclic", "poisson", "convex"],
)
def test_curves_end_where_the_claim_is(tmp_path, mechanism, certificate):
    changes = {"details": {}} if isinstance(mechanism, CyclicGaussian) else {}
    statement = make_run(tmp_path / "r", mechanism, certificate=certificate, **changes).statement
    found = curves(statement)
    name = "composition" if certificate is None else "last iterate"
    steps, epsilon = found.steps[name][-1]
    assert steps == mechanism.steps
    assert epsilon == pytest.approx(statement.claim["epsilon"], rel=1e-6)
    for points in found.steps.values():
        assert all(a[1] <= b[1] * (1 + 1e-6) for a, b in itertools.pairwise(points))
    for points in found.delta.values():
        assert all(a[1] >= b[1] for a, b in itertools.pairwise(points))
    assert all(0 <= beta <= 1 - alpha + 1e-9 for alpha, beta in found.tradeoff)
    if certificate is not None:
        assert set(found.steps) == {"last iterate", "composition"}
        assert found.steps["composition"][-1][1] > epsilon


def test_a_claim_that_does_not_hold_gets_no_report(tmp_path):
    folder = make_run(tmp_path / "r").path
    document = json.loads((folder / "privacy.json").read_text())
    (folder / "privacy.json").write_text(replaced(document, ("claim", "epsilon"), 0.1, seal=True))
    result = cli(folder)
    assert result.exit_code == 2
    assert "does not hold" in result.output


def test_the_card_is_read_by_the_hub_library(run):
    card = huggingface_hub.ModelCard(render_card(run))
    assert card.data.library_name == "dptaft"
    assert "differential-privacy" in card.data.tags
    result = card.data.eval_results[0]
    assert (result.metric_type, result.metric_value, result.dataset_split) == ("accuracy", 0.9, "evaluation")
    assert "license" not in card.data.to_dict()


def test_the_registry_entry_uses_the_registry_fields(run):
    found = yaml.safe_load(render_registry(run))
    assert found == entry(run)
    deployment = found["deployment"]
    assert set(found) == {"url_slug", "status", "tier", "deployment"}
    assert set(deployment) == {
        "basic", "dp_variant", "privacy_loss", "deployment_model", "accounting", "implementation", "administrative",
    }  # fmt: skip
    assert deployment["privacy_loss"]["privacy_parameters"]["epsilon"] >= run.statement.claim["epsilon"]
    assert deployment["privacy_loss"]["privacy_parameters"]["delta"] == 1e-5
    assert deployment["dp_variant"]["variant_name"] == "Approximate DP"
    assert deployment["basic"]["data_product_type"] == "Machine learning model"
    assert "not covered" in deployment["dp_variant"]["unprotected_quantities"]
    assert deployment["basic"]["publication_date"] == "2026-01-02"


@pytest.mark.parametrize("kind", ["md", "html", "json", "model-card", "registry"])
def test_the_command_writes_every_format(run, tmp_path, kind):
    file = tmp_path / "report"
    assert cli(run.path, "--format", kind, "--output", file).output == f"wrote {file}\n"
    assert file.read_text(encoding="utf-8") == cli(run.path, "--format", kind).output


def test_bad_input_gets_one_line(run, tmp_path):
    for arguments in (("nowhere",), (run.path, "--output", "/proc/none"), (tmp_path,)):
        result = cli(*arguments)
        assert result.exit_code == 2
        assert "Traceback" not in result.output
        assert len(result.output.splitlines()) == 1


def test_loading_for_a_report_checks_the_files(run, tmp_path):
    copy = shutil.copytree(run.path, tmp_path / "copy")
    (copy / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"metrics\.jsonl is not the file this run wrote"):
        load_run(copy)
