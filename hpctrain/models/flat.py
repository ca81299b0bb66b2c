"""All trainable parameters of a module as one flat vector, and their gradients as another.

The module's parameters become views into `params_P`, their `.grad` views into `grads_P`: backward
adds into the vector in place, an exchange sends contiguous pieces of it, an optimiser updates it in
one fused call, and nothing is ever copied together or apart. Order: `named_parameters()`, unless an
exchange wants some last; a tied parameter appears once, under its first name.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hpctrain.errors import ConfigError
from hpctrain.state import Placed, State
from hpctrain.transport.communicator import Communicator


class FlatModel:
    """A module whose parameters and gradients live in two flat vectors.

    Attributes:
        module: the module. Move it to its device and dtype *before* wrapping it.
        parameters: its trainable parameters; `parameters[i]` is `names[i]`.
        names, shapes: of each parameter, in order.
        slices: where each parameter lies in both vectors.
        n_params: P, the length of both.
        params_P, grads_P: the vectors, contiguous, of the parameters' dtype, on their device.
        on_ready: called with [start, stop) of a part of the gradient that is complete, before an
            exchange that starts during backward may change it; None = nobody asks.
    """

    def __init__(
        self, module: nn.Module, comes_last: Callable[[torch.Size], bool] | None = None
    ) -> None:
        """Local. Overwrites `p.data` and `p.grad` of every trainable parameter; gradients become 0.

        Args:
            module: The module.
            comes_last: Whether a parameter of that shape stands behind all others.

        Raises:
            ConfigError: no trainable parameter, or not all of one device and of float32 or
                float64.
        """
        self.module = module
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        _require_uniform(named)
        if comes_last is not None:
            named.sort(key=lambda item: comes_last(item[1].shape))
        self.names = [name for name, _ in named]
        self.parameters = [p for _, p in named]
        self.shapes = [p.shape for p in self.parameters]
        self.slices: list[slice] = []
        self.n_params = 0
        for p in self.parameters:
            self.slices.append(slice(self.n_params, self.n_params + p.numel()))
            self.n_params += p.numel()
        self.params_P = torch.cat([p.detach().flatten() for p in self.parameters])
        self.grads_P = torch.zeros_like(self.params_P)
        self.on_ready: Callable[[int, int], None] | None = None
        self._grad_views = dict(zip(self.parameters, self.views(self.grads_P), strict=True))
        for p, view in zip(self.parameters, self.views(self.params_P), strict=True):
            p.data = view
        self.attach_gradients()

    def views(self, vector_P: Tensor) -> list[Tensor]:
        """Each parameter's part of a flat vector, in the parameter's shape. Local."""
        return [
            vector_P[where].view(shape)
            for where, shape in zip(self.slices, self.shapes, strict=True)
        ]

    def place_gradients(self, memory_P: Tensor) -> None:
        """Make `memory_P` (P,) the gradient vector, zeroed: memory that others read too. Local."""
        if (memory_P.shape, memory_P.dtype) != (self.grads_P.shape, self.grads_P.dtype):
            raise ValueError(
                f"gradients are {tuple(self.grads_P.shape)} {self.grads_P.dtype}; got memory for "
                f"{tuple(memory_P.shape)} {memory_P.dtype}"
            )
        self.grads_P = memory_P.zero_()
        self._grad_views = dict(zip(self.parameters, self.views(memory_P), strict=True))
        self.attach_gradients()

    def zero_grad(self) -> None:
        """Set all gradients to zero, in place. Local."""
        self.grads_P.zero_()

    def grad_norm(self) -> float:
        """Euclidean norm of `grads_P`. Local."""
        return float(torch.linalg.vector_norm(self.grads_P))

    def owns_gradient(self, parameter: nn.Parameter) -> bool:
        """Whether `parameter.grad` lies in `grads_P`. Local.

        False after `optimizer.zero_grad(set_to_none=True)` or an assignment to `.grad`.
        """
        view, grad = self._grad_views[parameter], parameter.grad
        return grad is view or (
            grad is not None
            and grad.data_ptr() == view.data_ptr()
            and grad.shape == view.shape
            and grad.stride() == view.stride()
        )

    def adopt_gradient(self, parameter: nn.Parameter) -> None:
        """Bring a gradient that `owns_gradient` disclaims back into `grads_P`. Local.

        The parameter's part of `grads_P` is overwritten with its `.grad` (kept where that is None)
        and becomes its `.grad` again.
        """
        view = self._grad_views[parameter]
        if parameter.grad is not None:
            view.copy_(parameter.grad)
        parameter.grad = view

    def attach_gradients(self) -> None:
        """Make every `.grad` the view into `grads_P`; `grads_P` keeps its values. Local."""
        for parameter, view in self._grad_views.items():
            parameter.grad = view

    @property
    def buffers(self) -> dict[str, Tensor]:
        """The module's persistent buffers (batch normalisation's statistics, ...) by name."""
        persistent = self.module.state_dict(keep_vars=True)
        return {name: b for name, b in self.module.named_buffers() if name in persistent}

    def broadcast(self, comm: Communicator, root: int = 0) -> None:
        """Overwrite every parameter and buffer with those of rank `root`. Collective."""
        frozen = [p.detach() for p in self.module.parameters() if not p.requires_grad]
        for tensor in [self.params_P, *frozen, *self.module.buffers()]:
            flat = tensor.detach().cpu().contiguous().flatten()
            comm.broadcast(flat.view(torch.uint8).numpy(), root)
            tensor.copy_(flat.view(tensor.shape))

    def state(self) -> State:
        """Parameters and buffers, aliasing live memory. Local.

        "param.<name>", frozen ones too: replicated. "buffer.<name>": floating buffers are each
        rank's own (statistics of the samples it saw) and become their mean over the ranks when
        these change in number; integer ones (counts of steps, tables) are equal on all ranks.
        """
        tensors = {f"param.{n}": Placed(p.detach()) for n, p in self.module.named_parameters()}
        for name, buffer in self.buffers.items():
            tensors[f"buffer.{name}"] = (
                Placed(buffer, "per_rank", "mean") if buffer.is_floating_point() else Placed(buffer)
            )
        return State(tensors)

    def load_state(self, state: State) -> None:
        """Copy a state's values into the live parameters and buffers. Local.

        Raises:
            ConfigError: names or shapes are not this model's.
        """
        own = self.state().tensors
        _require_same(own, state.tensors)
        for name, placed in own.items():
            placed.tensor.copy_(state.tensors[name].tensor)


def _require_uniform(named: list[tuple[str, nn.Parameter]]) -> None:
    """One device, one dtype, float32 or float64."""
    if not named:
        raise ConfigError("the model has no trainable parameter (requires_grad); nothing to train")
    first_name, first = named[0]
    for name, p in named:
        if p.dtype not in (torch.float32, torch.float64):
            raise ConfigError(
                f'parameter "{name}" is {p.dtype}; parameters must be float32 or float64 '
                "(half precision is for autocast and for the wire)"
            )
        if (p.dtype, p.device) != (first.dtype, first.device):
            raise ConfigError(
                f'parameters differ: "{first_name}" is {first.dtype} on {first.device}, "{name}" '
                f"is {p.dtype} on {p.device}. Move the whole module to one dtype and device first."
            )


def _require_same(own: dict[str, Placed], given: dict[str, Placed]) -> None:
    """The same names with the same shapes."""
    if own.keys() != given.keys():
        missing, surplus = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
        raise ConfigError(
            f"the stored state is not this model's: missing {missing[:3]}, surplus {surplus[:3]}. "
            "Resume with the [model] table the run was started with."
        )
    for name, placed in own.items():
        if placed.tensor.shape != given[name].tensor.shape:
            raise ConfigError(
                f"{name} has shape {tuple(given[name].tensor.shape)} in the stored state and "
                f"{tuple(placed.tensor.shape)} in the model. Resume with the [model] and [data] "
                "tables the run was started with."
            )
