"""Experts of a mixture, unstacked: each is a module of linear layers, whatever the model's own class keeps them in.

transformers keeps the experts of a layer in 3-D parameters. Here each becomes `experts.17.gate_proj`, `.up_proj` and
`.down_proj`, ordinary linear layers with hooks, statistics and forms of their own, called with the tokens that the
router sends to them. The gate between them stays the family's own code.

Shapes: e = experts, t = tokens, k = experts of a token, h = features, m = features inside an expert.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from calibration.experts.routing import Routing

GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"
GATE_UP = "gate_up_proj"
_SIZES = {
    "hidden": ("hidden_size", "hidden_dim"),
    "inner": ("intermediate_size", "intermediate_dim", "expert_dim"),
}
"""Attributes of families' classes in which they keep their sizes."""
_PROBE_HIDDEN, _PROBE_INNER = 6, 4


@dataclass(frozen=True)
class Layout:
    """How a class stacks the weights of its experts in parameters (e, ., .)."""

    n_experts: int
    hidden: int
    inner: int
    gated: bool
    biased: bool
    transposed: bool
    """Whether a weight is (in, out)."""
    interleaved: bool
    """Whether outputs of gate and up alternate; else those of gate come first."""
    apart: bool = False
    """Whether gate and up are stacked in a parameter each, which checkpoints of some families do and no class."""

    @property
    def projections(self) -> tuple[str, ...]:
        """Names of an expert's layers, in the order in which they are stacked."""
        return (GATE, UP, DOWN) if self.gated else (UP, DOWN)

    def shape(self, projection: str) -> tuple[int, int]:
        """(out, in) of an expert's layer."""
        return (self.hidden, self.inner) if projection == DOWN else (self.inner, self.hidden)

    def parameter_of(self, projection: str) -> str:
        """Name of the stacked parameter that holds a projection."""
        return GATE_UP if self.gated and not self.apart and projection != DOWN else projection

    def take(self, stack: Tensor, expert: int, projection: str) -> Tensor:
        """An expert's weight (o, i), or bias (o,), out of the parameter that holds it; a view."""
        one = stack[expert].T if self.transposed and stack.ndim > 2 else stack[expert]
        return one[self._rows(projection)]

    def put(self, stack: Tensor, expert: int, projection: str, value: Tensor) -> None:
        """Write an expert's weight (o, i), or bias (o,), to its place in the parameter that holds it."""
        self.take(stack, expert, projection).copy_(value)

    def stack_shape(self, projection: str) -> tuple[int, int, int]:
        """The shape of the stacked parameter that holds a projection's weights."""
        o, i = self.shape(projection)
        o *= 2 if self.parameter_of(projection) == GATE_UP else 1
        return (self.n_experts, i, o) if self.transposed else (self.n_experts, o, i)

    def _rows(self, projection: str) -> slice:
        if self.parameter_of(projection) != GATE_UP:
            return slice(None)
        first = projection == GATE
        if self.interleaved:
            return slice(0 if first else 1, None, 2)
        return slice(0, self.inner) if first else slice(self.inner, None)


class Expert(nn.Module):
    """The linear layers of one expert, by name; the module that holds it computes."""

    def __init__(self, layout: Layout, like: Tensor) -> None:
        super().__init__()
        for name in layout.projections:
            o, i = layout.shape(name)
            place: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
            self.add_module(name, nn.Linear(i, o, bias=layout.biased, **place))


class Experts(nn.Module):
    """All experts of a layer by number: takes the place of the module that keeps them stacked."""

    def __init__(self, stacked: nn.Module, layout: Layout) -> None:
        """`stacked`: the model's own module, whose gate is used; its parameters are not."""
        super().__init__()
        self.layout = layout
        self.routing = Routing.ROUTED
        self.counts = [0] * layout.n_experts
        """Tokens that the router has sent to each since somebody set these to 0."""
        self.reads_scored = not _takes_choice(stacked)
        """Whether what an expert reads is multiplied by the router's score before: 0 for tokens of others."""
        # Not a part of this module: it has no weights, and no checkpoint knows it.
        vars(self)["_like"] = _without_parameters(stacked)
        for number in range(layout.n_experts):
            self.add_module(f"{number}", Expert(layout, stacked._parameters[DOWN]))  # type: ignore[arg-type]

    def forward(self, hidden_states: Tensor, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """As the model's own class: (t, h) with numbers and weights (t, k) of each token's experts; or (e * t, h).

        The second is how Llama 4 calls its experts: every token for each, multiplied by the router's score, which is 0
        for experts that it does not choose.
        """
        routing = [*args, *kwargs.values()]
        if not routing:
            return self._scored(hidden_states)
        chosen_tk, weights_tk = sorted(routing, key=lambda given: given.is_floating_point())
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        way = self._all if self.routing is Routing.ALL else self._routed
        return way(
            flat, chosen_tk.reshape(len(flat), -1), weights_tk.reshape(len(flat), -1)
        ).view_as(hidden_states)

    def _routed(self, x_th: Tensor, chosen_tk: Tensor, weights_tk: Tensor) -> Tensor:
        found, scales = torch.zeros_like(x_th), weights_tk.T.flatten()
        # Tokens in the order in which the families' own code takes them: the sums are then the same to the bit.
        order = torch.argsort(chosen_tk.T.flatten(), stable=True)
        places = order.split(self._count(chosen_tk))
        for number in range(self.layout.n_experts):
            if len(places[number]):
                rows = places[number] % len(x_th)
                written = self._expert(number, x_th[rows], rows)
                written = written * scales[places[number], None]
                found.index_add_(0, rows, written.to(found.dtype))
        return found

    def _all(self, x_th: Tensor, chosen_tk: Tensor, weights_tk: Tensor) -> Tensor:
        self._count(chosen_tk)
        found = torch.zeros_like(x_th)
        rows = torch.arange(len(x_th), device=x_th.device)
        for number in range(self.layout.n_experts):
            weight_t = torch.where(chosen_tk == number, weights_tk, 0).sum(1)
            found += (self._expert(number, x_th, rows) * weight_t[:, None]).to(found.dtype)
        return found

    def _scored(self, hidden_states: Tensor) -> Tensor:
        x_eth = hidden_states.view(self.layout.n_experts, -1, self.layout.hidden)
        found = torch.zeros_like(x_eth)
        for number, x_th in enumerate(x_eth):
            rows = x_th.any(1).nonzero().flatten()
            self.counts[number] += len(rows)
            if len(rows):
                found[number, rows] = self._expert(number, x_th[rows], rows)
        return found.view(-1, self.layout.hidden)

    def _count(self, chosen_tk: Tensor) -> list[int]:
        """Tokens sent to each expert in this call."""
        counts: list[int] = torch.bincount(
            chosen_tk.flatten(), minlength=self.layout.n_experts
        ).tolist()
        self.counts = [a + b for a, b in zip(self.counts, counts, strict=False)]
        return counts

    def _expert(self, number: int, x_th: Tensor, rows: Tensor) -> Tensor:
        """What an expert makes of these tokens; its layers know which they are while it does."""
        layers = dict(self.get_submodule(f"{number}").named_children())
        for layer in layers.values():
            vars(layer)["rows"] = rows
        family = vars(self)["_like"]
        if self.layout.gated:
            inside = _gated(family, self._beside(layers[GATE](x_th), layers[UP](x_th)))
        else:
            inside = family.act_fn(layers[UP](x_th))
        found: Tensor = layers[DOWN](inside)
        for layer in layers.values():
            del vars(layer)["rows"]
        return found

    def _beside(self, gate_tm: Tensor, up_tm: Tensor) -> Tensor:
        """Both in one tensor, as the family's gate expects them."""
        if self.layout.interleaved:
            return torch.stack((gate_tm, up_tm), -1).flatten(-2)
        return torch.cat((gate_tm, up_tm), -1)


def rows_of(layer: nn.Module) -> Tensor | None:
    """Which of a batch's tokens, flattened, a layer of an expert is called with; None for any other layer."""
    found: Tensor | None = vars(layer).get("rows")
    return found


def layout_of(module: nn.Module) -> Layout | None:
    """How a module stacks experts; None for one that does not, or whose forward pass is another than `Experts` has.

    That is tried with random weights: a family may do more in its experts than their parameters tell.
    """
    layout = shaped(module)
    if layout is None:
        return None
    small = replace(layout, hidden=_PROBE_HIDDEN, inner=_PROBE_INNER)
    return layout if _computes_as_unstacked(module, small) else None


def shaped(module: nn.Module) -> Layout | None:
    """How a module stacks experts by the shapes of its parameters alone; None for one that has others."""
    layout = _layout(module._parameters)
    if layout is None:
        return None
    if module._buffers or any(True for child in module.children() for _ in child.parameters()):
        return None
    return replace(layout, interleaved=not vars(module).get("is_concatenated", True))


def unstack(model: nn.Module) -> dict[str, Experts]:
    """Put `Experts` in the place of every module that stacks some, and return them by name. Weights are not moved."""
    found = {
        name: layout for name, module in model.named_modules() if (layout := layout_of(module))
    }
    return {name: unstack_one(model, name, layout) for name, layout in found.items()}


def unstack_one(model: nn.Module, name: str, layout: Layout) -> Experts:
    """Put `Experts` in the place of a module that stacks some."""
    above, _, leaf = name.rpartition(".")
    parent, experts = model.get_submodule(above), Experts(model.get_submodule(name), layout)
    setattr(parent, leaf, experts)
    # transformers draws weights for new modules by code of the family, which knows no experts but stacked ones.
    vars(parent)["_is_hf_initialized"] = True
    return experts


def take_apart(model: nn.Module, layers: Collection[str]) -> None:
    """Unstack, with their weights, the experts of a loaded model that hold layers of these names."""
    for path, module in list(model.named_modules()):
        layout = shaped(module)
        if layout is not None and any(name.startswith(f"{path}.") for name in layers):
            _hand_over(module, unstack_one(model, path, layout))


def take_all_apart(model: nn.Module) -> None:
    """Unstack, with their weights, the experts of a loaded model that a skeleton has unstacked.

    Both then round alike: where two experts score nearly the same, a router chooses by the last bit of what it reads.
    """
    for path, module in list(model.named_modules()):
        layout = layout_of(module)
        if layout is not None:
            _hand_over(module, unstack_one(model, path, layout))


def _hand_over(stacked: nn.Module, experts: Experts) -> None:
    """Give each expert's layers their part of the stacked parameters."""
    layout = experts.layout
    for number in range(layout.n_experts):
        for name, layer in experts.get_submodule(f"{number}").named_children():
            for part, suffix in (("weight", ""), ("bias", "_bias")):
                if getattr(layer, part) is not None:
                    stack: Any = stacked._parameters[f"{layout.parameter_of(name)}{suffix}"]
                    value = layout.take(stack.detach(), number, name).contiguous()
                    setattr(layer, part, nn.Parameter(value, requires_grad=False))


def experts_in(module: nn.Module) -> Iterator[tuple[str, Experts]]:
    """The unstacked experts below a module, by name."""
    return ((name, part) for name, part in module.named_modules() if isinstance(part, Experts))


def _layout(parameters: dict[str, Any]) -> Layout | None:
    """As the shapes of parameters tell."""
    present = {name: tensor for name, tensor in parameters.items() if tensor is not None}
    gated = GATE_UP in present
    weights = {GATE_UP if gated else UP, DOWN}
    biases = {f"{name}_bias" for name in weights}
    biased = bool(set(present) - weights)
    if set(present) != (weights | biases if biased else weights):
        return None
    up, down = (present[name] for name in (GATE_UP if gated else UP, DOWN))
    if up.ndim != 3 or down.ndim != 3 or len(up) != len(down):
        return None
    n = 2 if gated else 1
    if up.shape[2] == down.shape[1] and up.shape[1] == n * down.shape[2]:
        return Layout(
            len(up), up.shape[2], down.shape[2], gated, biased, transposed=False, interleaved=False
        )
    if up.shape[1] == down.shape[2] and up.shape[2] == n * down.shape[1]:
        return Layout(
            len(up), up.shape[1], down.shape[1], gated, biased, transposed=True, interleaved=False
        )
    return None


def _without_parameters(module: nn.Module) -> nn.Module:
    twin = copy.copy(module)
    twin._parameters = {}
    return twin


def _gated(family: Any, both: Tensor) -> Tensor:
    """What a family makes of gate and up; Llama 4, which has no method for it, does as most."""
    if hasattr(family, "_apply_gate"):
        found: Tensor = family._apply_gate(both)
        return found
    gate, up = both.chunk(2, dim=-1)
    found = family.act_fn(gate) * up
    return found


def _computes_as_unstacked(module: nn.Module, layout: Layout) -> bool:
    """Whether a small copy of a module with random weights returns what `Experts` with these weights does."""
    generator = torch.Generator().manual_seed(0)
    tried = _small(module, layout, generator)
    experts = Experts(tried, layout)
    _hand_over(tried, experts)
    forward: Any = getattr(type(tried).forward, "__wrapped__", type(tried).forward)
    x_th = torch.randn(4 * layout.n_experts, layout.hidden, generator=generator)
    chosen = torch.stack([torch.randperm(layout.n_experts, generator=generator)[:2] for _ in x_th])
    weights = torch.rand(chosen.shape, generator=generator)
    routing = (chosen, weights) if _takes_choice(module) else ()
    try:
        with torch.no_grad():
            found, expected = experts(x_th, *routing), forward(tried, x_th, *routing)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, NotImplementedError):
        return False
    return (
        isinstance(expected, Tensor)
        and found.shape == expected.shape
        and torch.allclose(found, expected, atol=1e-4)
    )


def _takes_choice(stacked: nn.Module) -> bool:
    """Whether a module is called with the router's choice beside the tokens: most are, Llama 4's is not."""
    forward: Any = type(stacked).forward
    given = list(inspect.signature(getattr(forward, "__wrapped__", forward)).parameters)
    return len(given) > len(("self", "hidden_states"))


def _small(module: nn.Module, layout: Layout, generator: torch.Generator) -> nn.Module:
    """A copy of a module with random weights and few features."""
    small = copy.copy(module)
    small._parameters = {}
    for projection in layout.projections:
        name, (e, rows, columns) = layout.parameter_of(projection), layout.stack_shape(projection)
        o = columns if layout.transposed else rows
        small._parameters[name] = _random((e, rows, columns), generator)
        if layout.biased:
            small._parameters[f"{name}_bias"] = _random((e, o), generator)
    sizes = {"hidden": layout.hidden, "inner": layout.inner}
    for kind, names in _SIZES.items():
        vars(small).update({name: sizes[kind] for name in names if name in vars(small)})
    return small


def _random(shape: tuple[int, ...], generator: torch.Generator) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=generator), requires_grad=False)
