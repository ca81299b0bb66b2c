"""All entries of a shard, summed over the parties: for small parameters, warm-up, one party.

    sent_m = acc_m;  residual_m = 0;  update = sum over parties m of acc_m

The sum replaces acc, and the ranks of the party read it there. Bytes sent per party and step: those
of an all-reduce of the shard in float32, 2 (M - 1) / M x 4 n by a ring.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

import numpy as np

from hpctrain.compress.feedback_device import AnyFeedback
from hpctrain.exchange.parties import Agreed
from hpctrain.transport.communicator import Communicator, Handle


class Whole:
    """The exchange of a whole shard."""

    @staticmethod
    def sent_bytes(size: int, n: int) -> float:
        """Bytes a party sends per step by formula."""
        return 8 * n * (size - 1) / size

    def exchange(
        self, feedback: AnyFeedback, phases: Sequence[Communicator]
    ) -> Generator[Handle, None, Agreed]:
        """Collective over the parties. Blocks: background reductions of MPI libraries are slow."""
        finite = feedback.prepare_all()
        total = feedback.total()
        if phases[0].size > 1:
            phases[-1].allreduce(total)
            finite = bool(np.isfinite(total).all())
        feedback.publish()
        yield from ()
        return Agreed(finite, 0.0, feedback.n)
