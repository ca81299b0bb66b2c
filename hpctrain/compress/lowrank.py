"""Matrices as two thin factors, by one power iteration per step, with a residual of what they miss.

Of one matrix, with G the fresh gradient and E the residual of this rank:

    A <- G + E                     `begin`
    P <- A orth(Q)                 `project`; the caller sums P over ranks
    P <- orth(P);  Q_own <- A^T P  `iterate`; the caller sums a copy of Q_own over ranks: Q_sum
    E <- A - P Q_own^T             `commit`
    G <- P Q_sum^T
    Q <- Q_sum

E and Q keep their values until `commit`, so that a refused step leaves no trace. orth is the
orthonormal factor of Householder's QR: defined for vanishing columns too, without an epsilon.

Source: Vogels, Karimireddy, Jaggi 2019 (arXiv 1905.13727), Algorithm 1. Everything is local.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class _Matrix:
    """Views of one matrix's part of each vector."""

    grad: Tensor
    residual: Tensor
    p: Tensor
    q: Tensor
    q_own: Tensor
    q_sum: Tensor


class LowRank:
    """The factors of some matrices. Every method is local.

    Args:
        grads: (rows, columns) views of the fresh gradients; overwritten.
        ks: Columns of each matrix's factors, at most its rows and its columns.
        p_N: Memory for all P, sum of rows times k entries.

    Attributes:
        residual_N: every E, one behind the other.
        p_N, q_sum_N: what the caller sums over ranks, in place.
        q_N: every Q that the next step starts from; normal random numbers of one fixed seed at
            first, so equal on all ranks.
    """

    def __init__(self, grads: Sequence[Tensor], ks: Sequence[int], p_N: Tensor) -> None:
        self.p_N = p_N
        self.residual_N = p_N.new_zeros(sum(grad.numel() for grad in grads))
        n_q = sum(grad.shape[1] * k for grad, k in zip(grads, ks, strict=True))
        self.q_N = torch.randn(n_q, generator=torch.Generator().manual_seed(0)).to(p_N)
        self.q_sum_N = p_N.new_zeros(n_q)
        self._q_own_N = p_N.new_zeros(n_q)
        self._matrices: list[_Matrix] = []
        at, at_p, at_q = 0, 0, 0
        for grad, k in zip(grads, ks, strict=True):
            rows, columns = grad.shape
            of_q = slice(at_q, at_q + columns * k)
            self._matrices.append(
                _Matrix(
                    grad,
                    self.residual_N[at : at + grad.numel()].view(rows, columns),
                    p_N[at_p : at_p + rows * k].view(rows, k),
                    self.q_N[of_q].view(columns, k),
                    self._q_own_N[of_q].view(columns, k),
                    self.q_sum_N[of_q].view(columns, k),
                )
            )
            at, at_p, at_q = at + grad.numel(), at_p + rows * k, of_q.stop

    def begin(self) -> None:
        """Add the residual to the gradient."""
        for matrix in self._matrices:
            matrix.grad.add_(matrix.residual)

    def project(self) -> None:
        """Fill `p_N`."""
        for matrix in self._matrices:
            torch.mm(matrix.grad, _orthonormal(matrix.q), out=matrix.p)

    def iterate(self) -> None:
        """Take the summed `p_N`, finite, and fill `q_sum_N` with this rank's part of the sum."""
        for matrix in self._matrices:
            matrix.p.copy_(_orthonormal(matrix.p))
            torch.mm(matrix.grad.T, matrix.p, out=matrix.q_own)
        self.q_sum_N.copy_(self._q_own_N)

    def commit(self) -> None:
        """Take the summed `q_sum_N`: make the gradient, the residual and the next step's Q."""
        for matrix in self._matrices:
            matrix.residual.copy_(matrix.grad).addmm_(matrix.p, matrix.q_own.T, alpha=-1.0)
            torch.mm(matrix.p, matrix.q_sum.T, out=matrix.grad)
        self.q_N.copy_(self.q_sum_N)


def factor_columns(shape: torch.Size, most: int, min_compression_rate: float) -> int:
    """Columns k of the factors of a parameter; 0: it is not worth it. Local.

    Args:
        shape: Of the parameter; as a matrix it has shape[0] rows.
        most: Largest k.
        min_compression_rate: By more than this, (rows + columns) k must be less than its entries.
    """
    if len(shape) < 2 or shape.numel() == 0:
        return 0
    rows, columns = shape[0], shape.numel() // shape[0]
    k = min(most, rows, columns)
    return k if (rows + columns) * k * min_compression_rate < rows * columns else 0


def _orthonormal(matrix: Tensor) -> Tensor:
    """Orthonormal columns that span those of `matrix`."""
    columns: Tensor = torch.linalg.qr(matrix).Q
    return columns
