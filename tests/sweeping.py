"""Small recipes for tests: digits, a linear head, few steps."""

from dptaft.sweep.recipe import parse_recipe

HEAD = {"name": "head", "scope": "head"}


def recipe(
    treatment="public-benchmark", *, name="tiny", methods=(HEAD,), seeds=(0,), steps=3, data=None, **budget
):
    if "epsilons" not in budget and "epsilon" not in budget:
        budget["epsilons"] = [1.0, 8.0]
    content = {
        "title": "Tiny",
        "shows": "that it runs",
        "seeds": list(seeds),
        "budget": {"treatment": treatment, **budget},
        "options": {} if steps is None else {"steps": steps},
        "data": data or [{"name": "digits", "source": "digits"}],
        "methods": [dict(method) for method in methods],
    }
    return parse_recipe(content, name)
