"""A timm model, linearised around its weights, as a torch module whose parameters are the tangent weights."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dptaft.tangent.cut import Above, Cut, below, boundary_axes, find_cut
from dptaft.tangent.dual import dual_above
from dptaft.tangent.dual_layers import TangentConstant, Tangents, UncoveredPartError
from dptaft.tangent.initialise import fresh_class_token
from dptaft.tangent.linearize import check_tangents, linearize, require_untied
from dptaft.tangent.scope import Scope, tangent_parameter_names

if TYPE_CHECKING:
    from dptaft.tangent.dual_layers import Pair

FRESH_TOKEN = "fresh_cls_token"


class TangentModel(nn.Module):
    """f_lin(x; theta) = f(x; w0) + J(x) theta, with theta the parameters of this module, zero at the start.

    J is the Jacobian of the logits with respect to the weights in scope, at the weights of ``base``. The
    model is linear in theta (affine with the offset), and always in eval mode: ``train()`` leaves the base
    alone.

    Where every part of the model above the boundary has a dual form, one pass computes J theta, every tangent
    is an ordinary layer, and per-example gradient hooks see all of them (``is_dual``). Otherwise one
    ``UserWarning`` names the part, and J theta comes from forward-mode differentiation (``linearize``): exact
    as well, slower, and per-example gradient hooks do not see its parameters.

    Args:
        base: a timm model; it is frozen and put in eval mode, in place.
        scope: which weights carry tangents.
        centered: drop the offset f(x; w0), which is arbitrary with a random head.
        fresh_cls_token_seed: replace the class token at the first linearised block by a random one from this
            public seed, with a tangent of its own named ``fresh_cls_token``; for scopes ``last:k`` and
            ``attention:k``.

    Attributes:
        base: the frozen model.
        scope: the scope.
        names: timm's names of the linearised parameters.
        cut: where the model is cut into a frozen part below and a linearised part above.
        is_dual: whether one pass computes J theta, with every tangent visible to per-example gradient hooks.

    Raises:
        ValueError: for a scope that the model does not have, a fresh class token where there is none to
            replace, tied weights, or weights narrower than float32.

    >>> import timm
    >>> base = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32, num_classes=3)
    >>> model = TangentModel(base, "last:1")
    >>> model(torch.zeros(4, 3, 32, 32)).shape
    torch.Size([4, 3])
    >>> list(model.theta())[-2:]
    ['head.weight', 'head.bias']
    """

    def __init__(
        self,
        base: nn.Module,
        scope: Scope | str,
        *,
        centered: bool = True,
        fresh_cls_token_seed: int | None = None,
    ) -> None:
        super().__init__()
        self.scope = Scope.parse(scope) if isinstance(scope, str) else scope
        self.centered = centered
        require_untied(base)
        narrow = {p.dtype for p in base.parameters()} - {torch.float32, torch.float64}
        if narrow:
            raise ValueError(f"tangents need float32 weights, the model has {narrow.pop()}; use base.float()")
        self.base = base
        self.names = tangent_parameter_names(base, self.scope)
        self.cut = find_cut(base, self.scope)
        self.register_buffer("fresh_token", self._fresh_token(fresh_cls_token_seed))
        base.requires_grad_(False).eval()
        self.fresh_tangent: TangentConstant | None = None
        self.tangent: nn.Module
        try:
            tangents = self._build_dual()
            self.is_dual = True
        except UncoveredPartError as part:
            warnings.warn(
                f"no single-pass tangent for {part}; scope {self.scope} falls back to forward-mode "
                "differentiation, which is slower and hides its parameters from per-example gradient hooks",
                UserWarning,
                stacklevel=2,
            )
            tangents = self._build_reference()
            self.is_dual = False
        locations = {id(parameter): path for path, parameter in self.named_parameters()}
        self._paths = {name: locations[id(tangents.parameters[name])] for name in self.theta_names}

    @property
    def theta_names(self) -> tuple[str, ...]:
        """Names of the tangent weights: ``fresh_cls_token`` where there is one, then timm's names."""
        return self.names if self.fresh_token is None else (FRESH_TOKEN, *self.names)

    def boundary(self, images: Tensor) -> Tensor:
        """Activations at the boundary of the linearised part, without gradients.

        Args:
            images: (n, channels, height, width), preprocessed for the base.

        Returns:
            Tokens (n, T, D) that enter the first linearised block; pooled features (n, D) for scope ``head``;
            the images themselves for scope ``all``, and for models of an unknown kind.

        Raises:
            ValueError: for images of the wrong number of channels or size.
        """
        self._check_images(images)
        with torch.no_grad():
            return below(self.base, self.cut, images)

    def forward_from_boundary(self, boundary: Tensor) -> Tensor:
        """Logits (n, C) from boundary activations; half-precision activations are widened to the base's type.

        Raises:
            ValueError: for activations whose number of axes or width does not fit.
        """
        self._check_boundary(boundary)
        offset, moved = self._pair(boundary.to(next(self.base.parameters()).dtype))
        return moved if self.centered else offset + moved

    def forward(self, images: Tensor) -> Tensor:
        """Logits (n, C) of images (n, channels, height, width)."""
        return self.forward_from_boundary(self.boundary(images))

    def theta(self) -> dict[str, Tensor]:
        """The tangent weights by name, in order; the parameters themselves, not copies."""
        return {name: self.get_parameter(path) for name, path in self._paths.items()}

    @torch.no_grad()
    def load_theta(self, theta: Mapping[str, Tensor]) -> None:
        """Copy tangent weights in; nothing is changed if a name or shape does not fit.

        Raises:
            ValueError: for missing or surplus names, or another shape.
        """
        own = self.theta()
        check_tangents(own, theta)
        for name, parameter in own.items():
            parameter.copy_(theta[name])

    def train(self, mode: bool = True) -> TangentModel:
        """Set the mode of the tangent layers (hooks need training mode); the base stays in eval mode."""
        super().train(mode)
        self.base.eval()
        return self

    def _build_dual(self) -> Tangents:
        tangents = Tangents(self.names)
        self.tangent = dual_above(self.base, self.cut, tangents)
        if self.fresh_token is not None:
            self.fresh_tangent = TangentConstant(self.fresh_token)
            tangents.parameters[FRESH_TOKEN] = self.fresh_tangent.weight
        return tangents

    def _build_reference(self) -> Tangents:
        self.tangent = ReferenceTangent(self.base, self.cut, self.theta_names, self.fresh_token)
        tangents = Tangents(self.names)
        tangents.parameters = self.tangent.parameters_by_name()
        return tangents

    def _pair(self, boundary: Tensor) -> Pair:
        if not self.is_dual:
            return self.tangent(boundary, self.fresh_token)
        if self.fresh_tangent is None:
            return self.tangent(boundary)
        boundary = torch.cat([self.fresh_token.expand(len(boundary), -1, -1), boundary[:, 1:]], 1)
        moved = torch.cat([self.fresh_tangent(boundary), torch.zeros_like(boundary[:, 1:])], 1)
        return self.tangent.tail(boundary, moved)

    def _fresh_token(self, seed: int | None) -> Tensor | None:
        if seed is None:
            return None
        if self.cut.kind != "tokens" or self.scope.kind == "head":
            raise ValueError(f"scope {self.scope} has no first linearised block, so no fresh class token")
        token = getattr(self.base, "cls_token", None)
        if token is None:
            raise ValueError(f"{type(self.base).__name__} has no class token to replace")
        return fresh_class_token(token.shape[-1], seed, token)

    def _check_images(self, images: Tensor) -> None:
        patches = getattr(self.base, "patch_embed", None)
        channels = getattr(self.base, "in_chans", None)
        if images.ndim != 4 or (channels is not None and images.shape[1] != channels):
            expected = f"(n, {channels or 'channels'}, height, width)"
            raise ValueError(f"images have shape {tuple(images.shape)}, expected {expected}")
        size = getattr(patches, "img_size", None)
        given = tuple(images.shape[2:])
        if size is not None and given != tuple(size):
            raise ValueError(f"images have size {given}, the model takes {tuple(size)}; resize them")

    def _check_boundary(self, boundary: Tensor) -> None:
        if self.cut.kind == "images":
            self._check_images(boundary)
            return
        axes, width = boundary_axes(self.base, self.cut), self.base.embed_dim
        if boundary.ndim != axes or boundary.shape[-1] != width:
            raise ValueError(
                f"boundary activations have shape {tuple(boundary.shape)}, "
                f"expected {axes} axes and width {width}"
            )


class ReferenceTangent(nn.Module):
    """J theta by forward-mode differentiation, for models with a part that has no dual form."""

    def __init__(self, base: nn.Module, cut: Cut, names: tuple[str, ...], fresh_token: Tensor | None) -> None:
        super().__init__()
        self._base = (base, cut)
        values = {name: fresh_token if name == FRESH_TOKEN else base.get_parameter(name) for name in names}
        self.weights = nn.ParameterDict(
            {_key(name): torch.zeros_like(value) for name, value in values.items()}
        )
        self.names = names

    def parameters_by_name(self) -> dict[str, nn.Parameter]:
        """The tangent weights under the names of the parameters they belong to."""
        return {name: self.weights[_key(name)] for name in self.names}

    def forward(self, boundary: Tensor, fresh_token: Tensor | None) -> Pair:
        """Map boundary activations to logits (n, C) and J theta (n, C)."""
        above = Above(*self._base, fresh_token).eval()
        theta = self.parameters_by_name()
        tangents = {name if name == FRESH_TOKEN else f"model.{name}": value for name, value in theta.items()}
        return linearize(above, tangents, split=True)(tangents, boundary)


def _key(name: str) -> str:
    return name.replace(".", "/")
