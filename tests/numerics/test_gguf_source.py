"""A GGUF file as a TensorSource, and its layers loaded, against the gguf package's own reading."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_writer import add_tensor
from numerics.test_gguf_format import random_blocks
from torch import Tensor

from quantd.daemon.worker.gguf_source import GgufSource, open_source
from quantd.plugins.api import LinearSpec, Refused
from quantd.plugins.gguf.format import BLOCKS
from quantd.plugins.gguf.plugin import GgufQuantizer
from quantd.plugins.select import Registry, select

HIDDEN, INTER, VOCAB, HEADS, KEYS = 256, 512, 64, 8, 4
CPU = torch.device("cpu")

Adds = Callable[[gguf.GGUFWriter], None]


def write(
    path: Path, *adds: Adds, architecture: str = "llama", experts: int = 0, split: int = 0
) -> Path:
    """A file of one block with these tensors."""
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split)
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEYS)
    writer.add_layer_norm_rms_eps(1e-5)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(INTER)
    for add in (plain("token_embd.weight", VOCAB, HIDDEN), *adds):
        add(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def numbers(*shape: int) -> Any:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def plain(name: str, *shape: int, kind: str = "F32") -> Adds:
    return lambda writer: add_tensor(writer, name, numbers(*shape), kind)


def blocks(kind: str, rows: int, columns: int, seed: int = 0) -> Any:
    """uint8 [rows, bytes of a row] of random blocks with sane scales."""
    size, nbytes = BLOCKS[kind]
    need = rows * columns // size * nbytes
    raw = random_blocks(kind, (0.01, -0.003, 0.02), seed)
    flat = np.tile(raw.reshape(-1), -(-need // raw.size))[:need]
    return flat.reshape(rows, -1)


def quantized(name: str, kind: str, rows: int, columns: int) -> Adds:
    number = gguf.GGMLQuantizationType[kind]
    data = blocks(kind, rows, columns, seed=len(name))
    return lambda writer: writer.add_tensor(name, data, raw_dtype=number)


def values(kind: str, data: Any) -> Tensor:
    return torch.from_numpy(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind]))


def deinterleaved(rows: Any, heads: int) -> Any:
    """Row by row: rows 2i and 2i + 1 of a head become i and i + d / 2."""
    out = np.empty_like(rows)
    size = len(rows) // heads
    for head in range(heads):
        for i in range(size // 2):
            for half in (0, 1):
                out[head * size + half * size // 2 + i] = rows[head * size + 2 * i + half]
    return out


def test_names_shapes_and_types_are_those_of_transformers(tmp_path: Path) -> None:
    source = open_source(
        write(
            tmp_path / "m.gguf",
            plain("output_norm.weight", HIDDEN),
            quantized("blk.0.ffn_down.weight", "Q6_K", HIDDEN, INTER),
            plain("blk.0.attn_norm.weight", HIDDEN, kind="F32"),
            plain("blk.0.ffn_up.weight", INTER, HIDDEN, kind="BF16"),
            plain("strange", 3),
        )
    )
    assert {name: (source.shape(name), source.dtype(name)) for name in source.names()} == {
        "model.embed_tokens.weight": ((VOCAB, HIDDEN), "F32"),
        "model.norm.weight": ((HIDDEN,), "F32"),
        "model.layers.0.mlp.down_proj.weight": ((HIDDEN, INTER), "Q6_K"),
        "model.layers.0.input_layernorm.weight": ((HIDDEN,), "F32"),
        "model.layers.0.mlp.up_proj.weight": ((INTER, HIDDEN), "BF16"),
        "strange": ((3,), "F32"),
    }
    for name in ("model.norm.weight", "model.embed_tokens.weight"):
        expected = torch.from_numpy(numbers(*source.shape(name)))
        assert torch.equal(source.read(name), expected)
        source.release(name)
        assert torch.equal(source.read(name), expected)
    up = source.read("model.layers.0.mlp.up_proj.weight")
    assert up.dtype == torch.bfloat16
    assert torch.equal(up, torch.from_numpy(numbers(INTER, HIDDEN)).bfloat16())
    down = source.read("model.layers.0.mlp.down_proj.weight")
    assert np.array_equal(down.numpy(), blocks("Q6_K", HIDDEN, INTER, seed=21))
    with pytest.raises(KeyError):
        source.shape("model.layers.0.mlp.gate_proj.weight")


@pytest.mark.parametrize(
    ("architecture", "interleaved"), [("llama", True), ("granite", True), ("qwen2", False)]
)
def test_rows_of_queries_and_keys_are_in_the_order_of_transformers(
    architecture: str, interleaved: bool, tmp_path: Path
) -> None:
    path = write(
        tmp_path / "m.gguf",
        quantized("blk.0.attn_q.weight", "Q4_K", HIDDEN, HIDDEN),
        plain("blk.0.attn_k.weight", HIDDEN // 2, HIDDEN, kind="F16"),
        plain("blk.0.attn_q.bias", HIDDEN),
        quantized("blk.0.attn_v.weight", "Q4_K", HIDDEN // 2, HIDDEN),
        architecture=architecture,
    )
    source = open_source(path)
    at = "model.layers.0.self_attn."
    stored = {
        "q_proj.weight": (blocks("Q4_K", HIDDEN, HIDDEN, seed=19), HEADS),
        "k_proj.weight": (numbers(HIDDEN // 2, HIDDEN).astype(np.float16), KEYS),
        "q_proj.bias": (numbers(HIDDEN), HEADS),
    }
    for name, (rows, heads) in stored.items():
        expected = deinterleaved(rows, heads) if interleaved else rows
        assert np.array_equal(source.read(at + name).numpy(), expected)
    values = source.read(at + "v_proj.weight").numpy()
    assert np.array_equal(values, blocks("Q4_K", HIDDEN // 2, HIDDEN, seed=19))


def test_merged_experts_are_read_one_by_one(tmp_path: Path) -> None:
    number = gguf.GGMLQuantizationType["Q5_K"]
    merged = blocks("Q5_K", 3 * INTER, HIDDEN).reshape(3, INTER, -1)
    path = write(
        tmp_path / "m.gguf",
        lambda writer: writer.add_tensor("blk.0.ffn_up_exps.weight", merged, raw_dtype=number),
        plain("blk.0.ffn_gate_inp.weight", 3, HIDDEN),
        architecture="qwen3moe",
        experts=3,
    )
    source = open_source(path)
    assert source.shape("model.layers.0.mlp.gate.weight") == (3, HIDDEN)
    for i in range(3):
        name = f"model.layers.0.mlp.experts.{i}.up_proj.weight"
        assert (source.shape(name), source.dtype(name)) == ((INTER, HIDDEN), "Q5_K")
        assert np.array_equal(source.read(name).numpy(), merged[i])
        source.release(name)
        assert np.array_equal(source.read(name).numpy(), merged[i])


def test_fused_projections_are_read_in_their_parts(tmp_path: Path) -> None:
    fused = numbers(2 * HIDDEN, HIDDEN)
    path = write(tmp_path / "m.gguf", plain("blk.0.attn_qkv.weight", 2 * HIDDEN, HIDDEN))
    source = open_source(path)
    at = "model.layers.0.self_attn."
    queries, keys = fused[:HIDDEN], fused[HIDDEN : HIDDEN + HIDDEN // 2]
    assert np.array_equal(source.read(at + "q_proj.weight"), deinterleaved(queries, HEADS))
    assert np.array_equal(source.read(at + "k_proj.weight"), deinterleaved(keys, KEYS))
    assert np.array_equal(source.read(at + "v_proj.weight"), fused[HIDDEN + HIDDEN // 2 :])
    assert at + "qkv_proj.weight" not in source.names()


def test_shards_are_one_source(tmp_path: Path) -> None:
    write(
        tmp_path / "m.gguf",
        plain("output_norm.weight", HIDDEN),
        plain("output.weight", VOCAB, HIDDEN),
        split=1,
    )
    source = open_source(tmp_path / "m-00001-of-00003.gguf")
    assert torch.equal(source.read("model.norm.weight"), torch.from_numpy(numbers(HIDDEN)))
    assert torch.equal(source.read("lm_head.weight"), torch.from_numpy(numbers(VOCAB, HIDDEN)))
    assert not source.config["tie_word_embeddings"]


@pytest.mark.parametrize(
    ("add", "message"),
    [
        (quantized("blk.0.attn_q.bias", "Q8_0", 1, HIDDEN), "attn_q.bias has 1 rows"),
        (plain("blk.0.attn_q.weight", 12, HIDDEN), "has 12 rows, must have an even number"),
        (plain("blk.0.attn_qkv.weight", 12, HIDDEN), "has 12 rows, must have 512"),
        (plain("blk.0.ffn_up_exps.weight", 5, 8, HIDDEN), "must have 4 experts"),
        (plain("blk.0.ffn_up_exps.weight", 8, HIDDEN), "must have 3 dimensions for its experts"),
        (plain("blk.0.ffn_up.weight", 8, HIDDEN), "1 layers have experts, but there are only 0"),
    ],
)
def test_a_tensor_that_cannot_be_taken_apart_is_refused(
    add: Adds, message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "m.gguf", add, experts=4 if "expert" in message else 0)
    with pytest.raises(Refused, match=message):
        open_source(path)


def test_a_quantized_vector_is_refused(tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType["Q8_0"]
    data = blocks("Q8_0", 1, HIDDEN)[0]
    path = write(
        tmp_path / "m.gguf",
        lambda writer: writer.add_tensor("output_norm.weight", data, raw_dtype=kind),
    )
    with pytest.raises(Refused, match="output_norm.weight is Q8_0, but a vector must not be"):
        open_source(path)


def test_an_unsound_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(Refused, match="its version is 0"):
        open_source(tmp_path / "m.gguf")


@pytest.mark.parametrize(("architecture", "baked"), [("gemma2", True), ("llama", False)])
def test_gemma_has_its_norms_shifted_already(
    architecture: str, baked: bool, tmp_path: Path
) -> None:
    source = open_source(write(tmp_path / "m.gguf", architecture=architecture))
    assert source.norm_offset_baked is baked


class TestLoadedLayer:
    """q of blocks, k plain, v of other blocks, each with a bias."""

    @pytest.fixture
    def source(self, tmp_path: Path) -> Iterator[GgufSource]:
        yield open_source(
            write(
                tmp_path / "m.gguf",
                quantized("blk.0.attn_q.weight", "Q4_K", HIDDEN, HIDDEN),
                plain("blk.0.attn_k.weight", HIDDEN // 2, HIDDEN),
                quantized("blk.0.attn_v.weight", "Q6_K", HIDDEN // 2, HIDDEN),
                plain("blk.0.attn_q.bias", HIDDEN),
                plain("blk.0.attn_k.bias", HIDDEN // 2),
                plain("blk.0.attn_v.bias", HIDDEN // 2),
                architecture="qwen2",
            )
        )

    @pytest.fixture
    def spec(self) -> LinearSpec:
        at = "model.layers.0.self_attn."
        parts = tuple(f"{at}{leaf}" for leaf in ("q_proj", "k_proj", "v_proj"))
        splits = (HIDDEN, HIDDEN // 2, HIDDEN // 2)
        return LinearSpec(f"{at}qkv_proj", HIDDEN, splits, parts, torch.float32, True, exact=True)

    @pytest.fixture
    def weight(self) -> Tensor:
        return torch.cat(
            [
                values("Q4_K", blocks("Q4_K", HIDDEN, HIDDEN, seed=19)),
                torch.from_numpy(numbers(HIDDEN // 2, HIDDEN)),
                values("Q6_K", blocks("Q6_K", HIDDEN // 2, HIDDEN, seed=19)),
            ]
        )

    def test_is_what_the_file_says(
        self, source: GgufSource, spec: LinearSpec, weight: Tensor
    ) -> None:
        quantizer = GgufQuantizer()
        assert quantizer.claims(spec, source)
        assert quantizer.refuses(spec, CPU) is None
        assert {n: source.shape(n) for n in quantizer.tensors(spec, source)} == dict(
            quantizer.tensors(spec, source)
        )
        layer = quantizer.load(spec, source, CPU)
        assert torch.equal(layer.dequantize(), weight)
        bias = torch.cat([torch.from_numpy(numbers(n)) for n in spec.out_splits])
        x = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(layer(x), x @ weight.T + bias, rtol=1e-4, atol=1e-4)
        assert 0 < layer.nbytes < 2 * weight.nbytes

    def test_is_chosen_by_its_tensors(self, source: GgufSource, spec: LinearSpec) -> None:
        assert select(spec, source, CPU, Registry()).quantizer.name == "gguf"

    def test_loads_in_chunks_as_in_one(
        self,
        source: GgufSource,
        spec: LinearSpec,
        weight: Tensor,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr("quantd.plugins.gguf.plugin._CHUNK_VALUES", 48 * HIDDEN)
        assert torch.equal(GgufQuantizer().load(spec, source, CPU).dequantize(), weight)

    def test_rows_are_read_alone(self, source: GgufSource) -> None:
        name = "model.layers.0.self_attn.v_proj.weight"
        rows = torch.tensor([5, 0, 127, 5])
        expected = values("Q6_K", blocks("Q6_K", HIDDEN // 2, HIDDEN, seed=19))[rows]
        assert torch.equal(GgufQuantizer().dequantize_rows(name, source, rows), expected)

    def test_plain_layers_are_not_claimed(self, source: GgufSource) -> None:
        part = "model.embed_tokens"
        spec = LinearSpec("lm_head", HIDDEN, (VOCAB,), (part,), torch.float32)
        assert not GgufQuantizer().claims(spec, source)
        assert select(spec, source, CPU, Registry()).quantizer.name == "dense"
