"""Which weights of a model carry tangents: the head, the last blocks, their attention, or everything."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

_KINDS = ("head", "last", "attention", "all")
_WITH_DEPTH = ("last", "attention")
_PATTERN = re.compile(r"(head|all|last|attention)(?::([0-9]+))?")
_ATTENTION_PARTS = frozenset({"qkv", "proj", "q_proj", "k_proj", "v_proj", "q_bias", "k_bias", "v_bias"})


@dataclass(frozen=True)
class Scope:
    """The set of linearised weights: ``head``, ``last:k``, ``attention:k`` or ``all``.

    ``head`` is the classification head alone. ``last:k`` is the last k blocks and everything above them
    (final norm, pooling, head). ``attention:k`` is the query, key, value and output projections of the last k
    blocks, and the head. ``all`` is every parameter.

    Args:
        kind: one of ``head``, ``last``, ``attention``, ``all``.
        depth: number of blocks, counted from the end; for ``last`` and ``attention`` only.

    Raises:
        ValueError: for an unknown kind, a missing depth, or a depth below 1.

    >>> Scope.parse("last:3")
    Scope(kind='last', depth=3)
    >>> str(Scope("attention", 2))
    'attention:2'
    """

    kind: str
    depth: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ValueError(f"unknown scope kind {self.kind!r}; use head, last:K, attention:K or all")
        if self.kind in _WITH_DEPTH:
            if not isinstance(self.depth, int) or isinstance(self.depth, bool) or self.depth < 1:
                raise ValueError(
                    f"scope {self.kind} needs a number of blocks of at least 1, got {self.depth!r}"
                )
        elif self.depth is not None:
            raise ValueError(
                f"scope {self.kind} takes no number of blocks, got {self.depth!r}; write {self.kind!r}"
            )

    @classmethod
    def parse(cls, text: str) -> Scope:
        """Read ``head``, ``last:K``, ``attention:K`` or ``all``; ``str`` of the result gives the text back.

        Raises:
            ValueError: for any other text.
        """
        match = _PATTERN.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise ValueError(
                f"unknown scope {text!r}; use head, last:K, attention:K or all, for example last:1"
            )
        depth = None if match[2] is None else int(match[2])
        return cls(match[1], depth)

    def __str__(self) -> str:
        return self.kind if self.depth is None else f"{self.kind}:{self.depth}"


def first_block(model: nn.Module, scope: Scope) -> int:
    """Index of the first block that holds tangents, for scopes ``last:k`` and ``attention:k``.

    Raises:
        ValueError: if the model has no ``blocks`` or fewer than the scope asks for.
    """
    blocks = getattr(model, "blocks", None)
    if blocks is None or not hasattr(blocks, "__len__"):
        raise ValueError(
            f"{type(model).__name__} has no blocks, so scope {scope} is undefined; use head or all"
        )
    if scope.depth is None:
        raise ValueError(f"scope {scope} does not count blocks")
    if scope.depth > len(blocks):
        raise ValueError(f"scope {scope} is deeper than the model, which has {len(blocks)} blocks")
    return len(blocks) - scope.depth


def tangent_parameter_names(model: nn.Module, scope: Scope) -> tuple[str, ...]:
    """Names of the parameters that carry tangents, in the order of ``model.named_parameters()``.

    For ``last:k`` the parts above the blocks are the children that the model registers after ``blocks`` (for
    a timm vision transformer: ``norm``, ``attn_pool``, ``fc_norm``, ``head``).

    Raises:
        ValueError: if the scope is deeper than the model, the model has no blocks or no classification head,
            or the blocks have no attention projections (scope ``attention:k``).
    """
    names = [name for name, _ in model.named_parameters()]
    if scope.kind == "all":
        chosen = set(names)
    else:
        chosen = set(_head_names(model))
        if scope.kind == "last":
            chosen |= _last_names(model, first_block(model, scope))
        elif scope.kind == "attention":
            chosen |= _attention_names(model, scope)
    return tuple(name for name in names if name in chosen)


def _head_names(model: nn.Module) -> list[str]:
    heads = model.get_classifier() if hasattr(model, "get_classifier") else getattr(model, "head", None)
    heads = heads if isinstance(heads, tuple) else (heads,)
    prefixes = [name for name, module in model.named_modules() if any(module is head for head in heads)]
    found = [f"{p}.{n}" for p in prefixes for n, _ in model.get_submodule(p).named_parameters()]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no classification head; give it one with initialise_head"
        )
    return found


def _last_names(model: nn.Module, start: int) -> set[str]:
    children = [name for name, _ in model.named_children()]
    above = set(children[children.index("blocks") + 1 :])
    chosen = set()
    for name, _ in model.named_parameters():
        parts = name.split(".")
        if parts[0] in above or (parts[0] == "blocks" and int(parts[1]) >= start):
            chosen.add(name)
    return chosen


def _attention_names(model: nn.Module, scope: Scope) -> set[str]:
    start = first_block(model, scope)
    chosen = set()
    for index in range(start, len(model.blocks)):
        found = {
            f"blocks.{index}.attn.{name}"
            for name, _ in getattr(model.blocks[index], "attn", model.blocks[index]).named_parameters()
            if hasattr(model.blocks[index], "attn") and name.split(".")[0] in _ATTENTION_PARTS
        }
        if not found:
            raise ValueError(
                f"block {index} has no attention projections, so scope {scope} is undefined; use last:K"
            )
        chosen |= found
    return chosen
