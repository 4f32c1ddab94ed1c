"""Packed attention: entries of different lengths never see each other."""

import json
import sys
import types
from collections import Counter

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from dinov3_mm.models.layers import (
    Block,
    MaskedKBiasLinear,
    RotaryEmbedding2D,
    SelfAttention,
    attention,
    rotate_packed_qkv,
    split_packed_qkv,
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
        if not torch.compiler.is_compiling():
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
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    return calls


def test_xformers_is_called_once_with_all_images(xformers):
    attn, x = _attention(backend="xformers"), torch.randn(NUM_TOKENS, 32)
    assert_parity(attn(x, SHAPES, _tables()), _dense_attention(attn, x))
    assert xformers == [(1, NUM_TOKENS, 2, 16)]


def test_auto_takes_sdpa_on_the_cpu(xformers):
    attn, x = _attention(), torch.randn(NUM_TOKENS, 32)
    attn(x, SHAPES, _tables())
    assert xformers == []


def test_missing_xformers_is_an_error(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"dinov3_mm\[gpu\]"):
        SelfAttention(32, 2, backend="xformers")


def test_unknown_backend_is_an_error():
    with pytest.raises(ValueError, match="'auto', 'sdpa', 'xformers', 'varlen'"):
        SelfAttention(32, 2, backend="flash")


def test_starts_of_the_sequences():
    starts = attention.sequence_starts(SHAPES, torch.device("cpu"))
    lengths = [tokens for images, tokens in SHAPES for _ in range(images)]
    assert starts.dtype == torch.int32
    assert starts.tolist() == [0, *torch.tensor(lengths).cumsum(0).tolist()]


def _contract_of_varlen(query, key, value, starts_q, starts_k, max_q, max_k):
    """What torch documents of ``varlen_attn``: attention of each sequence on its own."""
    parts = []
    for first, end in zip(starts_q.tolist(), starts_q.tolist()[1:]):
        assert end - first <= max_q == max_k and torch.equal(starts_q, starts_k)
        part = (t[first:end].transpose(0, 1) for t in (query, key, value))
        parts.append(F.scaled_dot_product_attention(*part).transpose(0, 1))
    return torch.cat(parts)


def test_varlen_is_given_what_its_contract_asks_for(monkeypatch):
    """Its kernel is for GPUs; here the documented meaning takes its place."""
    attn, x = _attention(backend="varlen"), torch.randn(NUM_TOKENS, 32)
    expected = _dense_attention(attn, x)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", _contract_of_varlen)
    monkeypatch.setattr(attention, "varlen_obstacle", lambda x, head_dims: None)
    packing = attn.pack(x, SHAPES)
    assert packing.backend == "varlen" and packing.longest == max(tokens for _, tokens in SHAPES)
    assert_parity(attn(x, SHAPES, _tables()), expected)
    assert_parity(attn(x, SHAPES, _tables(), packing), expected)


def test_varlen_on_fake_cuda_tensors():
    with FakeTensorMode(), torch.device("cuda"):
        block = Block(32, 2, attn_backend="varlen")
        x = torch.empty(NUM_TOKENS, 32, dtype=torch.bfloat16)
        packing = block.attn.pack(x, SHAPES)
        assert packing.backend == "varlen" and packing.starts.is_cuda
        entries = split_packed_qkv(torch.empty(NUM_TOKENS, 96, dtype=x.dtype), 2, SHAPES)
        output = attention.attend_packed(entries, packing)
        assert output.is_cuda and output.dtype == x.dtype and output.shape == x.shape


def _compile_to_graphs(block: Block) -> list[torch.fx.GraphModule]:
    """Compile without a graph break, down to torch's operators; results have shapes, no values."""
    graphs = []

    def record(graph, _):
        graphs.append(graph)
        (outputs,) = next(node for node in graph.graph.nodes if node.op == "output").args
        values = [None if node is None else node.meta["val"] for node in outputs]
        empty = [v if v is None else torch.zeros(v.shape, dtype=v.dtype) for v in values]
        return make_boxed_func(lambda *_: empty)

    torch._dynamo.reset()
    backend = aot_autograd(
        fw_compiler=record, bw_compiler=record, partition_fn=min_cut_rematerialization_partition
    )
    block.compile(backend=backend, fullgraph=True)
    return graphs


def _calls(graph: torch.fx.GraphModule) -> Counter:
    return Counter(str(node.target) for node in graph.graph.nodes if node.op == "call_function")


def _constants(graph: torch.fx.GraphModule) -> list[str]:
    return [str(node.target) for node in graph.graph.nodes if node.op == "get_attr"]


@pytest.mark.parametrize("mode", [False, "selective"])
def test_varlen_is_one_operator_of_a_compiled_block(mode, monkeypatch):
    """Bounds come from outside: the graphs hold no constant, which would be a copy from the host.
    The backward pass of the selective mode runs no attention and no product again.
    """
    monkeypatch.setattr(attention, "varlen_obstacle", lambda x, head_dims: None)
    block = Block(32, 2, attn_backend="varlen", layer_scale_init_value=1.0, with_cp=mode)
    block = block.to(torch.bfloat16)
    x = torch.randn(NUM_TOKENS, 32, dtype=torch.bfloat16, requires_grad=True)
    packing = block.attn.pack(x, SHAPES)
    graphs = _compile_to_graphs(block)
    block(x, SHAPES, _tables(), packing=packing).sum().backward()
    forward, backward = map(_calls, graphs)
    assert not _constants(graphs[0]) and not _constants(graphs[1])
    assert forward["torch_attn._varlen_attn.default"] == 1
    assert backward["torch_attn._varlen_attn.default"] == 0
    assert backward["torch_attn._varlen_attn_backward.default"] == 1
    assert forward["aten.addmm.default"] == 4 and backward["aten.addmm.default"] == 0


@pytest.mark.parametrize("mode", [False, "selective"])
def test_the_mask_of_xformers_is_no_part_of_a_compiled_block(xformers, mode):
    block = Block(32, 2, attn_backend="xformers", layer_scale_init_value=1.0, with_cp=mode)
    x = torch.randn(NUM_TOKENS, 32, requires_grad=True)
    packing = block.attn.pack(x, SHAPES)
    graphs = _compile_to_graphs(block)
    block(x, SHAPES, _tables(), packing=packing).sum().backward()
    assert sum(n for name, n in _calls(graphs[0]).items() if "attention" in name) == 1
    made = {"aten.ones.default", "aten.full.default", "aten.block_diag.default"}
    assert not _constants(graphs[0]) and not made & _calls(graphs[0]).keys()


@pytest.mark.parametrize(
    "setting, words",
    [
        (dict(), "needs a CUDA device, and the tokens are on cpu"),
        (dict(device="cuda"), "needs bfloat16 or float16, and attention runs in torch.float32"),
        (dict(device="cuda", dtype=torch.bfloat16, heads=8), "and these have 4"),
    ],
)
def test_varlen_gives_way_and_says_why(setting, words):
    attention._warn_once.cache_clear()
    with FakeTensorMode():
        x = torch.empty(
            NUM_TOKENS,
            32,
            device=setting.get("device", "cpu"),
            dtype=setting.get("dtype", torch.float32),
        )
        attn = SelfAttention(32, setting.get("heads", 2), backend="varlen")
        with pytest.warns(UserWarning, match=words):
            assert attn.pack(x, SHAPES).backend == "sdpa"


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """As if there were a GPU of this name; what was measured on it is written by the function."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Toy GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    path = tmp_path / "attention.json"
    monkeypatch.setenv(attention.RECORD_VARIABLE, str(path))

    def write(text: str) -> None:
        path.write_text(text)
        attention.fastest_backend.cache_clear()

    attention.fastest_backend.cache_clear()
    yield write
    attention.fastest_backend.cache_clear()


def _chosen(shapes=SHAPES) -> str:
    with FakeTensorMode():
        x = torch.empty(NUM_TOKENS, 32, device="cuda", dtype=torch.bfloat16)
        return SelfAttention(32, 2).pack(x, shapes).backend


def test_auto_takes_what_was_measured_on_this_gpu_with_this_torch(gpu):
    assert _chosen() == "sdpa"
    found = {"torch": str(torch.__version__), "fastest": "varlen"}
    gpu(json.dumps({"Toy GPU": found}))
    assert _chosen() == "varlen" and _chosen(SHAPES[:1]) == "sdpa"
    for other in (
        {"Another GPU": found},
        {"Toy GPU": {**found, "torch": "2.0"}},
        {"Toy GPU": {**found, "fastest": "auto"}},
        {"Toy GPU": {**found, "fastest": "xformers"}},  # which is not installed
    ):
        gpu(json.dumps(other))
        assert _chosen() == "sdpa"


def test_a_damaged_record_is_named(gpu):
    gpu("{")
    with pytest.warns(UserWarning, match=r"attention.json is not read.*measure again"):
        assert _chosen() == "sdpa"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_varlen_on_cuda():
    attn, x = _attention(backend="varlen"), torch.randn(NUM_TOKENS, 32)
    expected = _dense_attention(attn, x)
    tables = [(sin.cuda(), cos.cuda()) for sin, cos in _tables()]
    with torch.autocast("cuda", torch.bfloat16):
        assert attn.cuda().pack(x.cuda(), SHAPES).backend == "varlen"
        assert_parity(attn(x.cuda(), SHAPES, tables).float().cpu(), expected, 3e-2)


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
