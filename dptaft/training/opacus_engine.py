"""Clipped sums through Opacus: per-example gradients by hooks, or ghost clipping.

The reference for any module whose trainable parameters sit in layers that Opacus sees: tangent models of any
scope, ordinary fine-tuning of the same blocks, and the head. Slow beside the fused engine, and general.

Opacus computes the per-example gradients or their norms; clip factors, non-finite examples, noise and the
normaliser are those of the fused engine.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor, nn

from dptaft.precision import full_float32
from dptaft.training.clipping import (
    FLOAT_SLACK,
    Adjacency,
    ClippedSum,
    PhysicalBatches,
    RunningSum,
    check_clip_norm,
    clip_factors,
    clipped_cotangents,
    l2_sensitivity,
)
from dptaft.training.fused import check_labels, check_unique

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping

if TYPE_CHECKING:
    from dptaft.training.losses import Loss

_UNSEEN = (
    "Opacus does not see the per-example gradient of {names}: such parameters would be trained without "
    "clipping. Freeze them, choose another scope, or use the fused engine"
)
_BATCH_STATISTICS = (nn.modules.batchnorm._BatchNorm,)


class Inputs(Protocol):
    """Inputs of all examples: a tensor, or anything that is indexed like one."""

    def __len__(self) -> int: ...

    def __getitem__(self, chosen: Tensor) -> Tensor: ...


def check_private_modules(module: nn.Module) -> None:
    """Refuse layers that mix examples, and layers with random behaviour in training.

    Raises:
        ValueError: a batch normalisation: its statistics make every gradient depend on the whole batch, so
            that no clipping bounds what one example changes, and its running averages are not noised.
    """
    for name, part in module.named_modules():
        if isinstance(part, _BATCH_STATISTICS):
            raise ValueError(
                f"{name or 'the model'} is a {type(part).__name__}: it mixes the examples of a batch, so "
                "that clipping per example bounds nothing; use a model with LayerNorm or GroupNorm"
            )


class OpacusEngine:
    """Exact per-example clipping by Opacus' hooks or ghost clipping.

    Args:
        module: maps a batch of inputs (b, ...) to logits (b, C); its parameters with ``requires_grad`` are
            trained. Layers without trainable parameters of their own stay in evaluation mode.
        inputs: inputs of all examples (cached boundary activations, or images).
        labels: (n,) int64.
        num_classes: C.
        loss: loss on logits.
        l2_clip_norm: clip norm of one example's gradient over all parameters jointly.
        parameters: names for the trained parameters (default: the module's own names).
        method: ``hooks`` materialises per-example gradients; ``ghost`` takes a second backward pass instead.
        adjacency: relation for which the sums state their sensitivity.
        physical_batch_size: examples in memory at once; halved when memory runs out.

    Raises:
        ValueError: a module with batch normalisation or without trainable parameters, labels that do not fit,
            or an unknown option.

    Formal guarantees:
        As for `dptaft.training.fused.FusedEngine.clipped_sum`. A trainable parameter that the hooks do not
        see is an error in the first step, never trained without clipping.
    """

    def __init__(
        self,
        module: nn.Module,
        inputs: Inputs,
        labels: Tensor,
        *,
        num_classes: int,
        loss: Loss,
        l2_clip_norm: float,
        parameters: Mapping[str, nn.Parameter] | None = None,
        method: Literal["hooks", "ghost"] = "hooks",
        adjacency: Adjacency = "zero-out",
        physical_batch_size: int = 64,
    ) -> None:
        check_clip_norm(l2_clip_norm)
        l2_sensitivity(l2_clip_norm, adjacency)
        check_labels(labels, len(inputs), num_classes)
        check_private_modules(module)
        if method not in ("hooks", "ghost"):
            raise ValueError(f"method must be 'hooks' or 'ghost', got {method!r}")
        self.parameters = _named_parameters(module, parameters)
        self.parameter_shapes = {name: p.shape for name, p in self.parameters.items()}
        self.loss, self.l2_clip_norm, self.adjacency = loss, l2_clip_norm, adjacency
        self.num_examples, self.num_classes = len(inputs), num_classes
        self._inputs, self._labels, self._method = inputs, labels, method
        self._physical = PhysicalBatches(physical_batch_size)
        _set_modes(module)
        self._verified = False
        wrapper = GradSampleModule if method == "hooks" else GradSampleModuleFastGradientClipping
        self._wrapped = wrapper(module, loss_reduction="sum")
        self._clear()

    def initial_theta(self) -> dict[str, Tensor]:
        """The module's parameters as they are."""
        return {name: p.detach().clone() for name, p in self.parameters.items()}

    def close(self) -> None:
        """Remove the hooks from the module."""
        self._wrapped.remove_hooks()

    @full_float32()
    def clipped_sum(self, theta: Mapping[str, Tensor], indices: Tensor) -> ClippedSum:
        """Sum over the batch of clipped gradients at `theta`; physical batches are added in float64.

        Args:
            theta: values for the module's parameters (the parameters themselves cost nothing).
            indices: (b,) int64 example numbers, each at most once; possibly none.

        Raises:
            ValueError: an example is named twice, or the hooks do not see a trainable parameter.
        """
        check_unique(indices)
        self._load(theta)
        if not self._verified and len(indices):
            self._verify(indices[:1])
            if self._method == "ghost":
                self._verify_ghost(indices[:1])
        total = RunningSum({name: p.detach() for name, p in self.parameters.items()})
        bad = 0
        piece = self._hooks_piece if self._method == "hooks" else self._ghost_piece

        def compute(start: int, stop: int) -> tuple[dict[str, Tensor], int]:
            try:
                return piece(indices[start:stop])
            finally:
                self._clear()

        def keep(found: tuple[dict[str, Tensor], int]) -> None:
            nonlocal bad
            total.add(found[0])
            bad += found[1]

        self._physical.run(len(indices), compute, keep)
        return ClippedSum(total.value(), self.l2_clip_norm, self.adjacency, None, bad)

    def _verify(self, chosen: Tensor) -> None:
        """Compare what the hooks see of one example with its gradient by plain automatic differentiation.

        Raises:
            ValueError: a parameter is used where no hook sees it.
        """
        self._wrapped.disable_hooks()
        try:
            logits = self._wrapped(self._inputs[chosen])
            cotangents = self._cotangents(logits, chosen)
            self._backward(logits, cotangents)
            given = [p.grad for p in self.parameters.values()]
        finally:
            self._wrapped.enable_hooks()
            self._clear()
        exact = torch.stack([logits.new_zeros(()) if g is None else g.norm() for g in given])
        try:
            self._backward(self._wrapped(self._inputs[chosen]), cotangents)
            seen = torch.stack([norm[0] for norm in self._example_norms(1).values()])
        finally:
            self._clear()
        wrong = (seen - exact).abs() > 1e-3 * exact.norm()
        if bool(wrong.any()):
            names = [name for name, bad in zip(self.parameters, wrong.tolist(), strict=True) if bad]
            raise ValueError(_UNSEEN.format(names=", ".join(names)))
        self._verified = bool(torch.isfinite(exact).all())

    def _verify_ghost(self, chosen: Tensor) -> None:
        """Compare a scaled gradient with the norm that the scale is for, as one pass follows the other.

        Raises:
            ValueError: layers above cancel so much of the cotangent that each pass rounds it differently.
        """
        logits = self._wrapped(self._inputs[chosen])
        generator = torch.Generator().manual_seed(0)
        wide = torch.randn(logits.shape, generator=generator, dtype=torch.float64)
        cotangents = (wide - wide.mean()).to(logits)
        try:
            self._backward(logits, cotangents, retain_graph=True)
            norm = float(torch.stack(list(self._example_norms(1).values())).double().norm())
            for p in self.parameters.values():
                p.grad = None
            self._wrapped.disable_hooks()
            self._backward(logits, cotangents / 3.0)
            parts = [p.grad.double().norm() for p in self.parameters.values() if p.grad is not None]
            scaled = 3.0 * float(torch.stack(parts).norm())
        finally:
            self._wrapped.enable_hooks()
            self._clear()
        if math.isfinite(norm) and math.isfinite(scaled) and abs(scaled - norm) > FLOAT_SLACK * norm:
            raise ValueError("gradient norms by ghost clipping disagree with the gradients; use engine hooks")

    def _example_norms(self, count: int) -> dict[str, Tensor]:
        """Gradient norm (count,) of every parameter and example, after a backward pass through the hooks."""
        attribute = "grad_sample" if self._method == "hooks" else "_norm_sample"
        seen = {name: getattr(p, attribute, None) for name, p in self.parameters.items()}
        unseen = [name for name, s in seen.items() if not isinstance(s, Tensor) or len(s) != count]
        if unseen:
            raise ValueError(_UNSEEN.format(names=", ".join(unseen)))
        return {name: s.flatten(1).norm(dim=1) if s.ndim > 1 else s for name, s in seen.items()}

    @torch.no_grad()
    def _load(self, theta: Mapping[str, Tensor]) -> None:
        for name, p in self.parameters.items():
            if theta[name] is not p:
                p.copy_(theta[name])

    def _clear(self) -> None:
        """Drop what Opacus left on parameters and modules, also after a failed pass."""
        for p in self.parameters.values():
            p.grad = p.grad_sample = None
            p._norm_sample, p._forward_counter = None, 0
            if hasattr(p, "_current_grad_sample"):
                del p._current_grad_sample
        for part in self._wrapped.modules():
            for left in ("activations", "max_batch_len"):
                if hasattr(part, left):
                    delattr(part, left)

    def _backward(self, logits: Tensor, cotangents: Tensor, *, retain_graph: bool = False) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="Full backward hook is firing|There is a performance drop"
            )
            logits.backward(cotangents, retain_graph=retain_graph)

    def _cotangents(self, logits: Tensor, chosen: Tensor) -> Tensor:
        return self.loss.cotangent(logits.detach(), self._labels[chosen])

    def _hooks_piece(self, chosen: Tensor) -> tuple[dict[str, Tensor], int]:
        logits = self._wrapped(self._inputs[chosen])
        self._backward(logits, self._cotangents(logits, chosen))
        norms = torch.stack(list(self._example_norms(len(chosen)).values())).norm(dim=0)
        samples = {name: p.grad_sample for name, p in self.parameters.items()}
        factors = clip_factors(norms, self.l2_clip_norm)
        finite = torch.isfinite(norms)
        if not bool(finite.all()):
            samples = {name: s[finite] for name, s in samples.items()}
        sums = {name: torch.tensordot(factors[finite], s, dims=1) for name, s in samples.items()}
        return sums, int((~finite).sum())

    def _ghost_piece(self, chosen: Tensor) -> tuple[dict[str, Tensor], int]:
        logits = self._wrapped(self._inputs[chosen])
        cotangents = self._cotangents(logits, chosen)
        self._backward(logits, cotangents, retain_graph=True)
        norms = torch.stack(list(self._example_norms(len(chosen)).values())).norm(dim=0)
        finite = torch.isfinite(norms)
        if not bool(finite.all()):
            self._clear()
            kept, _ = self._ghost_piece(chosen[finite]) if bool(finite.any()) else (self._zeros(), 0)
            return kept, int((~finite).sum())
        for p in self.parameters.values():
            p.grad = None
        self._wrapped.disable_hooks()
        try:
            self._backward(logits, clipped_cotangents(norms, cotangents, self.l2_clip_norm))
        finally:
            self._wrapped.enable_hooks()
        return {name: p.grad for name, p in self.parameters.items()}, 0

    def _zeros(self) -> dict[str, Tensor]:
        return {name: torch.zeros_like(p) for name, p in self.parameters.items()}


def _named_parameters(module: nn.Module, names: Mapping[str, nn.Parameter] | None) -> dict[str, nn.Parameter]:
    own = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not own:
        raise ValueError("the module has no trainable parameter")
    if names is None:
        return own
    if {id(p) for p in names.values()} != {id(p) for p in own.values()}:
        raise ValueError("parameters must name exactly the module's trainable parameters")
    return dict(names)


def in_double(
    module: nn.Module, parameters: Mapping[str, nn.Parameter]
) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """A copy of a module whose products are float64, and its trained parameters by their names.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> wide, parameters = in_double(layer, {"w": layer.weight})
        >>> parameters["w"].dtype, wide.weight is parameters["w"], layer.weight.dtype
        (torch.float64, True, torch.float32)
    """
    paths = {id(p): path for path, p in module.named_parameters()}
    wide = copy.deepcopy(module).double()
    return wide, {name: wide.get_parameter(paths[id(p)]) for name, p in parameters.items()}


def _set_modes(module: nn.Module) -> None:
    """Training mode (which Opacus' hooks need) only for layers that hold trainable parameters themselves."""
    for part in module.modules():
        part.training = any(p.requires_grad for p in part.parameters(recurse=False))


class FromBoundary(nn.Module):
    """A tangent model as a module of its boundary activations (n, ...) -> logits (n, C)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, boundary: Tensor) -> Tensor:
        """Logits from cached activations."""
        return self.model.forward_from_boundary(boundary)
