"""Packed attention: entries of different lengths never see each other."""

import sys
import types

import pytest
import torch
from torch.nn import functional as F

from dinov3_mm.models.layers import (
    MaskedKBiasLinear,
    RotaryEmbedding2D,
    SelfAttention,
    attention,
    rotate_packed_qkv,
)
from tests.golden import assert_parity

GRIDS, PREFIX, IMAGES = [(3, 4), (2, 2), (1, 5)], 3, [2, 4, 3]
SHAPES = [(images, PREFIX + h * w) for images, (h, w) in zip(IMAGES, GRIDS)]
NUM_TOKENS = sum(images * tokens for images, tokens in SHAPES)


def _tables(dtype: str = "fp32"):
    rope = RotaryEmbedding2D(16, dtype=dtype)
    return [rope(*grid) for grid in GRIDS]


def _rotation_matrix(sin: torch.Tensor, cos: torch.Tensor) -> torch.Tensor:
    """(N, d, d) matrices that turn channel i towards channel i + d / 2."""
    cos, sin = torch.diag_embed(cos), torch.diag_embed(sin)
    return torch.cat((torch.cat((cos, -sin), 2), torch.cat((sin, cos), 2)), 1)


def _dense_attention(attn: SelfAttention, x: torch.Tensor) -> torch.Tensor:
    """Attention over all tokens at once, under a materialised block-diagonal mask."""
    image = torch.cat(
        [
            torch.full((tokens,), 100 * e + i)
            for e, (n, tokens) in enumerate(SHAPES)
            for i in range(n)
        ]
    )
    mask = image[:, None] == image
    turn = torch.cat(
        [
            torch.cat((torch.eye(16).expand(PREFIX, 16, 16), _rotation_matrix(*table))).repeat(
                n, 1, 1
            )
            for n, table in zip(IMAGES, _tables())
        ]
    )
    q, k, v = attn.qkv(x).view(NUM_TOKENS, 3, attn.num_heads, 16).unbind(1)
    q, k = (torch.einsum("tde,the->thd", turn, t) for t in (q, k))
    scores = torch.einsum("qhd,khd->hqk", q, k) / 4
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return attn.proj(torch.einsum("hqk,khd->qhd", weights, v).flatten(1))


def _attention(**kwargs) -> SelfAttention:
    attn = SelfAttention(32, 2, **kwargs)
    for parameter in attn.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return attn


def test_packed_attention_is_block_diagonal():
    attn, x = _attention(), torch.randn(NUM_TOKENS, 32, requires_grad=True)
    expected = _dense_attention(attn, x)
    actual = attn(x, SHAPES, _tables())
    assert_parity(actual, expected)
    weight = torch.randn_like(expected)
    (expected_grad,) = torch.autograd.grad((expected * weight).sum(), x)
    assert_parity(torch.autograd.grad((actual * weight).sum(), x)[0], expected_grad)


@pytest.fixture
def xformers(monkeypatch):
    """A stand-in for xformers that evaluates the block-diagonal mask with torch's attention."""
    calls = []

    class BlockDiagonalMask:
        @classmethod
        def from_seqlens(cls, lengths, device):
            mask = cls()
            mask.dense = torch.block_diag(*[torch.ones(n, n) for n in lengths]).bool()
            return mask

    def memory_efficient_attention(q, k, v, attn_bias):
        calls.append(q.shape)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_bias.dense).transpose(1, 2)

    ops = types.ModuleType("xformers.ops")
    ops.memory_efficient_attention = memory_efficient_attention
    bias = types.SimpleNamespace(BlockDiagonalMask=BlockDiagonalMask)
    ops.fmha = types.SimpleNamespace(attn_bias=bias)
    package = types.ModuleType("xformers")
    package.__spec__ = types.SimpleNamespace(name="xformers")
    package.ops = ops
    attention._block_diagonal_mask.cache_clear()
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    return calls


def test_xformers_is_called_once_with_all_images(xformers):
    attn, x = _attention(backend="xformers"), torch.randn(NUM_TOKENS, 32)
    assert_parity(attn(x, SHAPES, _tables()), _dense_attention(attn, x))
    assert xformers == [(1, NUM_TOKENS, 2, 16)]
    attn(x, SHAPES, _tables())
    assert attention._block_diagonal_mask.cache_info().hits == 1


def test_auto_takes_sdpa_on_the_cpu(xformers):
    attn, x = _attention(), torch.randn(NUM_TOKENS, 32)
    attn(x, SHAPES, _tables())
    assert xformers == []


def test_missing_xformers_is_an_error(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"dinov3_mm\[gpu\]"):
        SelfAttention(32, 2, backend="xformers")


def test_unknown_backend_is_an_error():
    with pytest.raises(ValueError, match="'auto', 'sdpa', 'xformers'"):
        SelfAttention(32, 2, backend="flash")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_xformers_on_cuda():
    pytest.importorskip("xformers")
    attn, x = _attention(backend="xformers"), torch.randn(NUM_TOKENS, 32)
    expected = _dense_attention(attn, x)
    tables = [(sin.cuda(), cos.cuda()) for sin, cos in _tables()]
    assert_parity(attn.cuda()(x.cuda(), SHAPES, tables).cpu(), expected, 1e-4)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_rotation_gradient(dtype):
    qkv = torch.randn(NUM_TOKENS, 96, requires_grad=True)
    flat = [t for entry in rotate_packed_qkv(qkv, 2, SHAPES, _tables(dtype)) for t in entry]
    weights = [torch.randn_like(t) for t in flat]
    sum((t * w).sum() for t, w in zip(flat, weights)).backward()
    exact = qkv.detach().clone().requires_grad_()
    expected = 0
    for start, (images, tokens), table, w in zip(
        (0, 30, 58), SHAPES, _tables(), zip(weights[::3], weights[1::3], weights[2::3])
    ):
        turn = torch.cat((torch.eye(16).expand(PREFIX, 16, 16), _rotation_matrix(*table)))
        entry = exact[start : start + images * tokens].view(images, tokens, 3, 2, 16)
        q, k, v = entry.permute(2, 0, 3, 1, 4)
        q, k = (torch.einsum("tde,bhte->bhtd", turn, t) for t in (q, k))
        expected = expected + sum((t * weight).sum() for t, weight in zip((q, k, v), w))
    expected.backward()
    assert_parity(qkv.grad, exact.grad, 1e-5 if dtype == "fp32" else 3e-2)


def test_rotation_gradcheck():
    tables = [(s.double(), c.double()) for s, c in _tables()]
    qkv = torch.randn(NUM_TOKENS, 96, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: [t for e in rotate_packed_qkv(x, 2, SHAPES, tables) for t in e],
        qkv,
        fast_mode=True,
    )


def test_short_bf16_training():
    attn = _attention().train()
    x = torch.randn(NUM_TOKENS, 32)
    exact = attn(x, SHAPES, _tables())
    with torch.autocast("cpu", torch.bfloat16):
        output = attn(x.bfloat16().requires_grad_(), SHAPES, _tables())
    output.sum().backward()
    assert output.dtype == torch.bfloat16
    assert_parity(output, exact, 3e-2)


def test_masked_k_bias():
    linear = MaskedKBiasLinear(8, 24)
    assert torch.equal(linear.bias_mask, torch.tensor([1.0] * 8 + [0.0] * 8 + [1.0] * 8))
    torch.nn.init.normal_(linear.bias)
    x = torch.randn(5, 8)
    expected = F.linear(x, linear.weight)
    expected[:, :8] += linear.bias[:8]
    expected[:, 16:] += linear.bias[16:]
    output = linear(x)
    assert_parity(output, expected)
    output.sum().backward()
    assert torch.equal(linear.bias.grad, 5 * linear.bias_mask)
    linear.bias_mask.zero_()
    assert_parity(linear(x), F.linear(x, linear.weight))
