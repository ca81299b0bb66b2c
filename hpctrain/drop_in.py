"""The gradient exchange for people who own their loop: `with hpctrain.attach(model, optimizer)`.

Nothing of the optimiser or the model is replaced or wrapped: parameters become views of one flat
vector, hooks on their gradients start the exchange during `backward()`, and `step()` finishes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import nn

from hpctrain.errors import NonFinite, UsageError
from hpctrain.exchange import Exchange, ExchangeConfig
from hpctrain.exchange.dense import Dense
from hpctrain.exchange.setting import Setting
from hpctrain.hardware import make_reducer
from hpctrain.models.flat import FlatModel
from hpctrain.settings import Watchdog
from hpctrain.transport.communicator import Communicator


class Attached:
    """What the `with` block gets: `backward`, `accumulate` and `step`, and who this rank is."""

    def __init__(
        self,
        comm: Communicator,
        flat: FlatModel,
        optimizer: torch.optim.Optimizer,
        exchange: Exchange,
    ) -> None:
        self.rank, self.size = comm.rank, comm.size
        self.flat = flat
        self._comm, self._optimizer, self._exchange = comm, optimizer, exchange
        self._samples = 0
        self._weighted = False
        exchange.arm()

    def backward(self, loss: torch.Tensor, samples: int) -> None:
        """Local. Backward of a mean loss over `samples` samples, weighted by their number.

        Use it where ranks may hold different numbers of samples (last batch, adaptive batches):
        the update is then the mean over all samples, not the mean of the ranks' means.
        """
        self._weighted = True
        self._samples += samples
        (loss * samples).backward()

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Local. Backward passes inside only add; the next one outside starts the exchange."""
        self._exchange.disarm()
        yield
        self._exchange.arm()

    def step(self) -> None:
        """Collective. Finish the exchange, average, update, and clear the gradient.

        The average is over all samples given to `backward`, or over ranks where the loop calls
        `loss.backward()` itself (each rank then counts the same, as in Horovod and DDP).
        """
        finite = self._exchange.finish()
        self._exchange.settle(keep=finite)
        if not finite:
            self._start()
            raise NonFinite(
                "a gradient is inf or NaN; nothing was updated. Lower the step size or clip"
            )
        # A rank without samples in this step says neither; the others decide.
        count = np.array([self._samples, self._weighted], dtype=np.int64)
        self._comm.allreduce(count)
        samples, weighted = count.tolist()
        self.flat.grads_P.div_(samples if weighted else self.size)
        self.flat.attach_gradients()
        self._optimizer.step()
        self._start()

    def _start(self) -> None:
        self.flat.zero_grad()
        self._samples, self._weighted = 0, False
        self._exchange.arm()


@contextmanager
def attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    exchange: ExchangeConfig | None = None,
    comm: Communicator | None = None,
) -> Iterator[Attached]:
    """Collective. Sum gradients over all ranks inside the `with` block.

    On entry every rank takes rank 0's parameters and buffers. The optimiser must already hold the
    model's parameters and must not have stepped yet on different values.

    Args:
        model: Any module; its trainable parameters share one dtype and device.
        optimizer: Any torch optimiser over those parameters.
        exchange: A table of hpctrain.exchange, such as `Dense(...)`, that gives gradients;
            default: Dense() with Horovod.
        comm: The ranks; default: all that the launcher started.

    Raises:
        UsageError: the optimiser holds parameters that the model does not have.
        BackendError: the launcher or the exchange's backend does not fit.
    """
    if comm is None:
        from hpctrain.transport import mpi

        comm = mpi.start()
    known = {id(parameter) for parameter in model.parameters()}
    strangers = [p for g in optimizer.param_groups for p in g["params"] if id(p) not in known]
    if strangers:
        raise UsageError(
            f"the optimizer holds {len(strangers)} parameter(s) that the model does not have; "
            "make it from model.parameters()"
        )
    config = exchange or Dense()
    if config.scope != "world":
        raise UsageError(
            f'attach sums over all its ranks, and this exchange has scope "{config.scope}"; give '
            "attach the communicator of those ranks, or use [[sync]] in hpctrain train"
        )
    flat = FlatModel(model, config.comes_last)
    flat.broadcast(comm)
    if config.gives == "update":
        raise UsageError(
            'the loop\'s own optimizer makes the update, and this exchange gives "update"; give it '
            'gives = "gradient"'
        )
    reducers = partial(
        make_reducer, comm=comm, device=flat.params_P.device, stall_check_s=Watchdog().warn_s
    )
    running = config.build(Setting(flat, comm, reducers))
    try:
        yield Attached(comm, flat, optimizer, running)
    finally:
        running.close()
