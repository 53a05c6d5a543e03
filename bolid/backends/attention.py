"""Cross-attention with the face and the body branch, whose keys and values are computed once a condition.

Shapes: N pictures, P latent positions, L tokens, E channels of the tokens, H channels of the attention.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, IPAdapterAttnProcessor2_0


class CachedCrossAttention(IPAdapterAttnProcessor2_0):
    """diffusers' attention processor for text and IP-Adapters, to the bit, for the cross-attentions of SD and SDXL.

    A condition is the same tensor in every step of the sampling, so its keys and values are the same too: about a tenth
    of the time. They are kept inside `conditions_cached`, and computed at each call outside of it.
    """

    def __init__(self, processor: AttnProcessor2_0 | IPAdapterAttnProcessor2_0) -> None:
        """With the branches of `processor`, if it has any: the very same weights."""
        torch.nn.Module.__init__(self)
        self.scale: list[float] = getattr(processor, "scale", [])  # lambda of each branch
        self.to_k_ip = getattr(processor, "to_k_ip", torch.nn.ModuleList())
        self.to_v_ip = getattr(processor, "to_v_ip", torch.nn.ModuleList())
        self.cache: dict[tuple[int, int], tuple[torch.Tensor, ...]] | None = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | tuple[torch.Tensor, list[torch.Tensor]] | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Z' = Attn(Q, K_text, V_text) + sum over the branches of lambda Attn(Q, K, V) (BoLID section 5.3). [N,P,H]

        `encoder_hidden_states`: the text's tokens [N,L,E]; with branches, those and a list of theirs [N,1,L,E].
        """
        text, branches = encoder_hidden_states, []
        if isinstance(encoder_hidden_states, tuple):
            text, branches = encoder_hidden_states

        def heads(states: torch.Tensor) -> torch.Tensor:
            return states.view(len(states), -1, attn.heads, states.shape[-1] // attn.heads).transpose(1, 2)

        def keys_values(place: int, tokens: torch.Tensor, to_k: Any, to_v: Any) -> tuple[torch.Tensor, ...]:
            """Of the text (`place` 0) and the branches (1, 2, ...). The text's tensor names the condition."""
            found = None if self.cache is None else self.cache.get((id(text), place))
            if found is None:
                # The text is kept with them, so that no other tensor takes its identity.
                found = heads(to_k(tokens).flatten(1, -2)), heads(to_v(tokens).flatten(1, -2)), text
                if self.cache is not None:
                    self.cache[id(text), place] = found
            return found[:2]

        query = heads(attn.to_q(hidden_states))
        z = _attend(query, *keys_values(0, text, attn.to_k, attn.to_v))
        for i, (tokens, scale) in enumerate(zip(branches, self.scale, strict=True)):
            if scale != 0:  # a branch at 0 is left out
                z = z + scale * _attend(query, *keys_values(i + 1, tokens, self.to_k_ip[i], self.to_v_ip[i]))
        return attn.to_out[1](attn.to_out[0](z)) / attn.rescale_output_factor


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """softmax(Q K^T / sqrt(d)) V, [N,P,H] of the heads' [N,heads,.,d]."""
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2).to(query.dtype)


def cache_conditions(network: Any) -> None:
    """Give the cross-attentions of a UNet or ControlNet the processor above, once LoRAs and adapters are loaded."""
    processors = dict(network.attn_processors)
    for name, processor in processors.items():
        crosses = network.get_submodule(name.removesuffix(".processor")).is_cross_attention
        if crosses and type(processor) in (AttnProcessor2_0, IPAdapterAttnProcessor2_0):
            processors[name] = CachedCrossAttention(processor)
    network.set_attn_processor(processors)


@contextlib.contextmanager
def conditions_cached(*networks: Any) -> Iterator[None]:
    """Inside, processors that `cache_conditions` has set keep the keys and values of each condition."""
    processors = [p for network in networks for p in network.attn_processors.values()]
    cached = [processor for processor in processors if isinstance(processor, CachedCrossAttention)]
    for processor in cached:
        processor.cache = {}
    try:
        yield
    finally:
        for processor in cached:
            processor.cache = None
