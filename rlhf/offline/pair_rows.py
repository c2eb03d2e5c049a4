"""Packed rows of pairs: the beginning that two answers to one prompt share is computed once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.model.packing import PackedRows


@dataclass
class PairRows(PackedRows):
    """Packed rows of which some begin with tokens of another row, which are there once."""

    # (batch * length,) which of the N tokens stands at each place of the padded rows
    sources: Tensor

    @classmethod
    def of(cls, ids: Tensor, attention: Tensor, *, paired: bool = False) -> PairRows:
        """Pack right-padded ids (B, L) where attention (B, L) is 1.

        `paired`: rows i and i + B/2 are two answers to one prompt, and their longest common
        beginning is kept once. A causal model computes the same states for it in both.
        """
        batch, length = ids.shape
        own = attention.bool()
        columns = torch.arange(length, device=ids.device).expand(batch, length)
        is_shared = torch.zeros_like(own)
        if paired:
            both = own.view(2, batch // 2, length).all(0)
            first, second = ids.view(2, batch // 2, length)
            is_shared[batch // 2 :] = (both & (first == second)).cumprod(-1).bool()
        own = own & ~is_shared

        numbers = (own.flatten().cumsum(0) - 1).view(batch, length)
        # at padding any token will do: a causal mask keeps the others from it
        sources = torch.where(is_shared, numbers.roll(batch // 2, 0), numbers)
        places = own.flatten().nonzero().squeeze(-1)
        return cls(
            ids=ids.flatten()[places][None],
            position_ids=columns.flatten()[places][None],
            places=places,
            batch=batch,
            length=length,
            sources=sources.flatten(),
        )

    def pad(self, states: Tensor) -> Tensor:
        """Return (B, H, L, D) from (1, H, N, D)."""
        rows = states[0].transpose(0, 1)[self.sources]
        return rows.reshape(self.batch, self.length, *rows.shape[1:]).transpose(1, 2)

    def at_places(self, states: Tensor) -> Tensor:
        """Return (B, L, D) from (1, N, D): the state of each place, any state at padding."""
        return states[0, self.sources].view(self.batch, self.length, -1)


def is_right_padded(attention: Tensor) -> bool:
    """Return whether no row of attention (B, L) has padding before a token."""
    kept = attention.bool()
    return bool((kept[:, 1:] <= kept[:, :-1]).all())
