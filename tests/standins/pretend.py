"""What the stand-ins share: the arithmetic, and the GPU that they pretend to run on.

Loaded by path (`runpy.run_path`), so that a variant's folder alone on `sys.path` is enough, in a child process too.
"""

import os

import torch


def capability(default):
    """Compute capability of the pretended GPU: ATTUNE_STANDIN_SM ("90", "120", …), else `default`."""
    text = os.environ.get("ATTUNE_STANDIN_SM", "")
    return divmod(int(text), 10) if text else default


def attend(q, k, v, scale=None, bias=None, scale_first=False):
    """softmax(scale · Q Kᵀ + bias) V in float32, of (B, H, N, D) tensors; k and v may have fewer heads.

    Returns (out in q's dtype, log-sum-exp (B, H, N) in float32). With `scale_first` False the row maximum is taken
    before scaling, as FlashAttention and Sage's CUDA kernels do: a negative scale then overflows, as there.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    groups = q.shape[1] // k.shape[1]
    k, v = (t.float().repeat_interleave(groups, dim=1) for t in (k, v))
    scores = q.float() @ k.transpose(-2, -1)
    if bias is not None:
        scores = scores * scale + bias.float()
        scale, scale_first = 1.0, True
    if scale_first:
        scores = scores * scale
        scale = 1.0
    top = scores.amax(-1, keepdim=True) * scale
    weights = torch.exp(scores * scale - top.nan_to_num(neginf=0.0))
    if not scale_first:
        weights = weights.to(q.dtype).float()
    total = weights.sum(-1, keepdim=True)
    out = (weights @ v) / total
    return out.to(q.dtype), (top + total.log()).squeeze(-1)


def bhnd(*tensors):
    """(B, N, H, D) as (B, H, N, D), and the other way round."""
    return [t.transpose(1, 2) for t in tensors]


def check(condition, error, message):
    """Raise `error(message)` unless `condition`."""
    if not condition:
        raise error(message)


def not_modelled(**options):
    """The real package can do this, the stand-in does not: never silently wrong."""
    for name, (value, default) in options.items():
        if value is not default and value != default:
            raise NotImplementedError(f"this stand-in does not model {name}={value!r}")
