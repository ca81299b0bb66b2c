"""A decoder-only transformer language model.

    x = token[input] + position;   x = x + attention(norm(x)), x = x + mlp(norm(x)) per layer
    logits = norm(x) · tokenᵀ      (the head is the token table itself)

Causal attention goes through `scaled_dot_product_attention`, which never forms the (context x
context) matrix on CPU or CUDA. Linear layers and norms have no bias, and the hidden layer of the
mlp is 4·d_model wide with GELU.

Source: A. Radford et al., "Language Models are Unsupervised Multitask Learners", 2019 (GPT-2):
pre-norm, learned positions, weights N(0, 0.02²), those that write into the residual stream scaled
by 1/√(2·n_layer). Deliberate differences: no biases; dropout on the embedding and on what each
branch adds, not on attention weights, because that would leave the flash path; GELU by its
definition, because on a CPU the tanh approximation costs five times as much.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from hpctrain.data.spec import Spec
from hpctrain.models.fit import require_fit
from hpctrain.table import Table


class Gpt(Table):
    """[model] kind = "gpt": decoder-only transformer; the data give context and vocabulary."""

    kind: Literal["gpt"] = "gpt"
    """The model."""
    n_layer: int = Field(default=4, ge=1)
    """Number of layers."""
    n_head: int = Field(default=4, ge=1)
    """Attention heads per layer; divides `d_model`."""
    d_model: int = Field(default=128, ge=1)
    """Width of the residual stream."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Probability with which a value of the embedding, or of what a branch adds, is zeroed."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Gpt:
        if self.d_model % self.n_head:
            raise ValueError(
                f"d_model = {self.d_model} is not a multiple of n_head = {self.n_head}"
            )
        return self

    def build(self, spec: Spec) -> nn.Module:
        """The module for `spec`: int64 (B, T ≤ context) -> (B, T, n_outputs). Local.

        Raises:
            ConfigError: the data are not tokens.
        """
        require_fit(self.kind, spec)
        return _GptModule(self, spec.input_shape[0], spec.n_outputs)


class _Layer(nn.Module):
    def __init__(self, config: Gpt) -> None:
        super().__init__()
        d = config.d_model
        self.n_head = config.n_head
        self.norm1 = nn.LayerNorm(d, bias=False)
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.attention_out = nn.Linear(d, d, bias=False)
        self.norm2 = nn.LayerNorm(d, bias=False)
        self.mlp_in = nn.Linear(d, 4 * d, bias=False)
        self.mlp_out = nn.Linear(4 * d, d, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTD: Tensor) -> Tensor:
        b, t, d = x_BTD.shape
        qkv = self.qkv(self.norm1(x_BTD)).view(b, t, 3, self.n_head, d // self.n_head)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        joined = heads.transpose(1, 2).reshape(b, t, d)
        x_BTD = x_BTD + self.dropout(self.attention_out(joined))
        hidden = F.gelu(self.mlp_in(self.norm2(x_BTD)))
        out: Tensor = x_BTD + self.dropout(self.mlp_out(hidden))
        return out


class _GptModule(nn.Module):
    def __init__(self, config: Gpt, context: int, vocabulary: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, config.d_model)
        self.position = nn.Embedding(context, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.d_model, bias=False)
        residual_std = 0.02 / math.sqrt(2 * config.n_layer)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                writes_residual = name.endswith(("attention_out.weight", "mlp_out.weight"))
                nn.init.normal_(parameter, std=residual_std if writes_residual else 0.02)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        positions_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        x_BTD = self.dropout(self.token(tokens_BT) + self.position(positions_T))
        for layer in self.layers:
            x_BTD = layer(x_BTD)
        return F.linear(self.norm(x_BTD), self.token.weight)
