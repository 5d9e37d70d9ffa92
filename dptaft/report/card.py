"""A model card with the metadata block of the Hugging Face hub.

Field names as in the hub's model card specification (huggingface/hub-docs, `modelcard.md`) and in
`huggingface_hub.ModelCardData`; the evaluation results follow its `model-index`. The licence is the
publisher's decision and is left out.
"""

from __future__ import annotations

from typing import Any

from dptaft.report import yaml
from dptaft.report.document import render_markdown
from dptaft.report.facts import Facts, facts
from dptaft.report.text import markdown, plain
from dptaft.runs import Run


def render_card(run: Run) -> str:
    """The card of a finished run: metadata, what the model is, and its privacy report."""
    found = facts(run)
    return f"---\n{yaml.dumps(_metadata(run))}---\n\n{_about(run, found)}\n{_demoted(render_markdown(found))}"


def _metadata(run: Run) -> dict[str, Any]:
    config = run.config
    tags = ["image-classification", "vision-transformer", "dptaft"]
    fields: dict[str, Any] = {"library_name": "dptaft", "pipeline_tag": "image-classification"}
    if run.statement is not None:
        tags += ["differential-privacy", "tangent-model"][
            : 2 if config["model"]["method"] == "tangent" else 1
        ]
    fields["tags"] = tags
    if run.accuracy is None:
        return fields
    name = plain(config["data"]["name"])
    fields["metrics"] = ["accuracy"]
    fields["model-index"] = [
        {
            "name": plain(config["run"]["id"]),
            "results": [
                {
                    "task": {"type": "image-classification"},
                    "dataset": {"type": name, "name": name, "split": "evaluation"},
                    "metrics": [{"type": "accuracy", "value": run.accuracy}],
                }
            ],
        }
    ]
    return fields


def _about(run: Run, found: Facts) -> str:
    model, backbone = run.config["model"], run.config["backbone"]
    classes = ", ".join(plain(name) for name in run.classes)
    rows = (
        f"# {markdown(found.run)}",
        "",
        f"Image classifier with {len(run.classes)} classes ({markdown(classes)}).",
        "",
        f"- Backbone: {markdown(backbone['name'])} ({markdown(backbone['source'])}), "
        f"SHA-256 {markdown(backbone['sha256'])}",
        f"- Trained: {markdown(model['method'])} model, {markdown(model['scope'])}, "
        f"{markdown(model['loss'])} loss, on {markdown(run.config['data']['name'])}",
        "- Use: `dptaft predict RUN image.png`, or `dptaft.load_run(RUN).predict([...])`",
        "",
        "Intended use, limits and fairness were not assessed by the program that trained the model; "
        "its publisher has to.",
        "",
    )
    return "\n".join(rows)


def _demoted(text: str) -> str:
    """Headings one level lower, below the title of the card."""
    return "\n".join(f"#{line}" if line.startswith("#") else line for line in text.split("\n"))
