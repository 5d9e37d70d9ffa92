"""The reference: any model linearised in any of its parameters, by forward-mode differentiation."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

Linearised = Callable[..., Any]


def linearize(module: nn.Module, names: Iterable[str], *, split: bool = False) -> Linearised:
    """Return f_lin(tangents, *args, **kwargs) = f(x; w0) + J(x) tangents.

    J is the derivative of the output with respect to the named weights. The result takes a mapping from
    parameter name to tangent (the parameter's shape), then the arguments of the module, and gives the
    module's output (for a classifier: logits of shape (n, C)). The weights are those that the module has at
    the time of the call; the module is not changed. Gradients with respect to the tangents exist. Fused
    attention kernels have no forward-mode derivative, so attention runs unfused.

    Args:
        module: the model, in eval mode (a tangent of a random function is not defined).
        names: the linearised parameters, as in ``module.named_parameters()``.
        split: return the pair (f(x; w0), J(x) tangents) instead of the sum.

    Raises:
        ValueError: for a name that is not a parameter, tied parameters, a module in training mode, and, at
            the call, for tangents whose names or shapes differ from those of the linearised parameters.

    >>> _ = torch.manual_seed(0)
    >>> layer = nn.Linear(3, 2).eval()
    >>> f_lin = linearize(layer, ["weight"])
    >>> x, step = torch.randn(5, 3), torch.randn(2, 3)
    >>> torch.allclose(f_lin({"weight": step}, x), layer(x) + x @ step.T)
    True
    """
    require_untied(module)
    names = tuple(names)
    unknown = sorted(set(names) - {name for name, _ in module.named_parameters()})
    if unknown:
        raise ValueError(f"not a parameter of {type(module).__name__}: {', '.join(unknown)}")

    def linearised(tangents: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        if any(part.training for part in module.modules()):
            raise ValueError("the tangent is taken in eval mode; call eval() on the model first")
        primals = {name: module.get_parameter(name).detach() for name in names}
        check_tangents(primals, tangents)

        def outputs(weights: dict[str, Tensor]) -> Any:
            return functional_call(module, weights, args, kwargs)

        with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            # torch compiles the rules of forward-mode differentiation with a function that it deprecates
            warnings.filterwarnings("ignore", ".*torch.jit.script.* is deprecated", FutureWarning)
            offset, moved = jvp(outputs, (primals,), ({name: tangents[name] for name in names},))
        return (offset, moved) if split else tree_map(torch.add, offset, moved)

    return linearised


def require_untied(module: nn.Module) -> None:
    """Refuse a module with a parameter under two names: a tangent would have to be counted at both places.

    Raises:
        ValueError: naming the parameter's second name.
    """
    every = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    tied = sorted(every - {name for name, _ in module.named_parameters()})
    if tied:
        raise ValueError(f"parameter {tied[0]} is tied to another; give each use its own copy to linearise")


def check_tangents(expected: Mapping[str, Tensor], tangents: Mapping[str, Tensor]) -> None:
    """Compare the names and shapes of tangent weights with those of the parameters they belong to.

    Raises:
        ValueError: naming what is missing, what is not linearised, or the first shape that differs.
    """
    missing, surplus = sorted(set(expected) - set(tangents)), sorted(set(tangents) - set(expected))
    if missing:
        raise ValueError(f"no tangent given for {', '.join(missing)}")
    if surplus:
        raise ValueError(f"tangent given for parameters that are not linearised: {', '.join(surplus)}")
    for name, value in expected.items():
        if tangents[name].shape != value.shape:
            raise ValueError(
                f"tangent of {name} has shape {tuple(tangents[name].shape)}, expected {tuple(value.shape)}"
            )
