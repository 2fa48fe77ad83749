"""Attention modules as ControlVideo has them, written from their interface: they attend by themselves, by `_attention`.

Tensors inside are (B·H, N, D). `FullyFrameAttention` lets every frame see all others, `IndividualAttention` its own
frame and the text.
"""

from __future__ import annotations

import torch


class _OwnAttention(torch.nn.Module):
    def __init__(self, width, context=None, heads=2, upcast_attention=False):
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.upcast_attention, self.upcast_softmax = upcast_attention, False
        self._slice_size = None
        self._use_memory_efficient_attention_xformers = False
        self.to_q = torch.nn.Linear(width, width, bias=False)
        self.to_k = torch.nn.Linear(context or width, width, bias=False)
        self.to_v = torch.nn.Linear(context or width, width, bias=False)
        self.to_out = torch.nn.Linear(width, width)

    def reshape_heads_to_batch_dim(self, tensor):
        batch, length, width = tensor.shape
        tensor = tensor.reshape(batch, length, self.heads, width // self.heads)
        return tensor.permute(0, 2, 1, 3).reshape(batch * self.heads, length, width // self.heads)

    def reshape_batch_dim_to_heads(self, tensor):
        rows, length, dim = tensor.shape
        tensor = tensor.reshape(rows // self.heads, self.heads, length, dim)
        return tensor.permute(0, 2, 1, 3).reshape(rows // self.heads, length, dim * self.heads)

    def _attention(self, query, key, value, attention_mask=None):
        dtype = value.dtype
        if self.upcast_attention:
            query, key = query.float(), key.float()
        scores = torch.empty(query.shape[0], query.shape[1], key.shape[1], dtype=query.dtype, device=query.device)
        scores = torch.baddbmm(scores, query, key.transpose(-1, -2), beta=0, alpha=self.scale)
        if attention_mask is not None:
            scores = scores + attention_mask
        return self.reshape_batch_dim_to_heads(torch.bmm(scores.softmax(dim=-1).to(dtype), value))

    def _sliced_attention(self, query, key, value, sequence_length, dim, attention_mask):
        raise AssertionError("slicing was to be switched off")

    def _memory_efficient_attention_xformers(self, query, key, value, attention_mask):
        raise RuntimeError("CUDA error: invalid argument")

    def attend(self, query, key, value, attention_mask):
        query, key, value = map(self.reshape_heads_to_batch_dim, (query, key, value))
        if self._use_memory_efficient_attention_xformers:
            out = self._memory_efficient_attention_xformers(query, key, value, attention_mask)
        elif self._slice_size is None:
            out = self._attention(query, key, value, attention_mask)
        else:
            out = self._sliced_attention(query, key, value, query.shape[1], 0, attention_mask)
        return self.to_out(out)


class FullyFrameAttention(_OwnAttention):
    def forward(self, hidden_states, encoder_hidden_states=None, attention_mask=None):
        frames, length, width = hidden_states.shape
        one = hidden_states.reshape(1, frames * length, width)
        out = self.attend(self.to_q(one), self.to_k(one), self.to_v(one), attention_mask)
        return out.reshape(frames, length, width)


class IndividualAttention(_OwnAttention):
    def forward(self, hidden_states, encoder_hidden_states=None, attention_mask=None):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        return self.attend(self.to_q(hidden_states), self.to_k(context), self.to_v(context), attention_mask)


def controlvideo_like(unet, upcast_attention=False):
    """The UNet with its attention modules exchanged for those above; returns how many there are."""
    torch.manual_seed(1)
    count = 0
    for module in unet.modules():
        if type(module).__name__ != "BasicTransformerBlock":
            continue
        width, text = module.attn1.to_q.in_features, module.attn2.to_k.in_features
        module.attn1 = FullyFrameAttention(width, upcast_attention=upcast_attention)
        module.attn2 = IndividualAttention(width, text, upcast_attention=upcast_attention)
        count += 2
    return count
