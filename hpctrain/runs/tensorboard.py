"""The record's numbers as TensorBoard event files (optional extra)."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from hpctrain.errors import BackendError
from hpctrain.runs.lines import Line

_NOT_PLOTTED = {"kind", "time_s", "attempt", "step", "saved_step"}


class TensorBoard:
    """Writes every number of a record line as the scalar "kind/field"; rank 0 only.

    Args:
        folder: where the event files go.
        step: where this attempt starts; TensorBoard hides what earlier attempts plotted after it.

    Raises:
        BackendError: the package tensorboard is not installed.
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise BackendError(
                f"record.tensorboard = true needs the package tensorboard ({error}); install it "
                'with `pip install "hpctrain[tensorboard]"`, or set record.tensorboard = false'
            ) from None
        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def show(self, line: Line) -> None:
        """Plot the numbers of a line that `Recorder.write` returned. Local."""
        for field, value in line.items():
            plotted = isinstance(value, (int, float)) and not isinstance(value, bool)
            if plotted and field not in _NOT_PLOTTED:
                self._writer.add_scalar(f"{line['kind']}/{field}", value, line["step"])

    def close(self) -> None:
        """Local."""
        self._writer.close()

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
