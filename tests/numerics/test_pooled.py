"""Embeddings and rerank scores against transformers, alone and in batches, through the runner."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from numerics.tiny_pooled import VOCAB, hidden_states, make, sentence_transformers
from torch import Tensor

from quantd.daemon.types import (
    BLOCK_TOKENS,
    Chunk,
    LoadModel,
    NewSequence,
    SamplingParams,
    StepPlan,
)
from quantd.daemon.worker.inspect import inspect
from quantd.daemon.worker.main import StepRunner
from quantd.daemon.worker.pooled_runner import DecoderRunner, EncoderRunner, open_runner
from quantd.plugins.api import Refused

TOLERANCE = 1e-4
LENGTHS = (1, 2, 5, 16, 17, 31, 40)


def open_model(folder: Path, **options: Any) -> StepRunner:
    options = {"dtype": "float32", "threads": 1} | options
    return open_runner(LoadModel("m", str(folder), **options), lambda progress: None)


def texts() -> list[tuple[int, ...]]:
    chosen = random.Random(1)
    return [tuple(chosen.choices(range(3, VOCAB), k=length)) for length in LENGTHS]


class Driver:
    """Runs prompts as a scheduler would, each list of them as one batch."""

    def __init__(self, runner: StepRunner) -> None:
        self.runner = runner
        self._next_seq = 0
        self._next_block = 0

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        seconds: Sequence[int | None] | None = None,
        chunk: int = 1 << 20,
    ) -> list[Tensor]:
        seconds = seconds or [None] * len(prompts)
        first = self._next_seq
        self._next_seq += len(prompts)
        add = tuple(
            NewSequence(first + i, tuple(p), len(p), SamplingParams(max_tokens=1), seconds[i])
            for i, p in enumerate(prompts)
        )
        done = dict.fromkeys(range(len(prompts)), 0)
        found: dict[int, Tensor] = {}
        while len(found) < len(prompts):
            chunks = []
            for i, prompt in enumerate(prompts):
                if done[i] == len(prompt):
                    continue
                start, done[i] = done[i], min(done[i] + chunk, len(prompt))
                count = -(-done[i] // BLOCK_TOKENS) - -(-start // BLOCK_TOKENS)
                blocks = tuple(range(self._next_block, self._next_block + count))
                self._next_block += count
                ends = done[i] == len(prompt)
                chunks.append(Chunk(first + i, start, done[i], blocks, ends))
            result = self.runner.execute(StepPlan(0, tuple(chunks), add=add))
            add = ()
            for item in result.sampled:
                assert item.error is None and item.vector is not None and item.token == 0
                found[item.seq - first] = torch.frombuffer(
                    bytearray(item.vector), dtype=torch.float32
                )
        drop = tuple(range(first, first + len(prompts)))
        self.runner.execute(StepPlan(0, (), drop=drop))
        self._next_block = 0
        return [found[i] for i in range(len(prompts))]


POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean_tokens": lambda hidden: hidden.mean(0),
    "cls_token": lambda hidden: hidden[0],
    "lasttoken": lambda hidden: hidden[-1],
}
EMBEDDERS = ("BertModel", "RobertaModel", "XLMRobertaModel", "CamembertModel", "Qwen3Model")


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("mode", POOLS)
@pytest.mark.parametrize("architecture", EMBEDDERS)
def test_embeddings_are_those_of_transformers(
    architecture: str, mode: str, normalize: bool, tmp_path: Path
) -> None:
    model = make(architecture, tmp_path)
    sentence_transformers(tmp_path, mode, normalize)
    driver = Driver(open_model(tmp_path))
    found = driver.run(texts())
    for text, vector in zip(texts(), found, strict=True):
        wanted = POOLS[mode](hidden_states(model, text))
        wanted = wanted / wanted.norm() if normalize else wanted
        assert (vector - wanted).abs().max() <= TOLERANCE
    # Alone a text gives the very same bits.
    alone = [driver.run([text])[0] for text in texts()]
    assert all(map(torch.equal, alone, found))


@pytest.mark.parametrize("architecture", EMBEDDERS)
def test_without_files_of_sentence_transformers(architecture: str, tmp_path: Path) -> None:
    """An encoder's mean, a decoder's last token, both normalized."""
    model = make(architecture, tmp_path)
    runner = open_model(tmp_path)
    mode = "lasttoken" if architecture == "Qwen3Model" else "mean_tokens"
    for text, vector in zip(texts(), Driver(runner).run(texts()), strict=True):
        wanted = POOLS[mode](hidden_states(model, text))
        assert (vector - wanted / wanted.norm()).abs().max() <= TOLERANCE
    pooling = runner.info.pooling
    assert pooling is not None and pooling.task == "embed" and pooling.size == 32
    assert pooling.normalized and pooling.whole == (architecture != "Qwen3Model")
    assert not pooling.matryoshka


@pytest.mark.parametrize("chunk", [1, 7, 16])
def test_a_decoder_reads_a_prompt_in_chunks(chunk: int, tmp_path: Path) -> None:
    make("Qwen3Model", tmp_path)
    driver = Driver(open_model(tmp_path))
    assert all(map(torch.equal, driver.run(texts()), driver.run(texts(), chunk=chunk)))


@pytest.mark.parametrize("architecture", ["Qwen3ForCausalLM", "LlamaForCausalLM"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_that_generates_embeds_when_it_is_told_to(
    architecture: str, tied: bool, tmp_path: Path
) -> None:
    model = make(architecture, tmp_path, tie_word_embeddings=tied)
    assert open_model(tmp_path).info.pooling is None
    runner = open_model(tmp_path, task="embed", pooling="mean")
    assert isinstance(runner, DecoderRunner)
    for text, vector in zip(texts(), Driver(runner).run(texts()), strict=True):
        wanted = hidden_states(model.model, text).mean(0)
        assert (vector - wanted / wanted.norm()).abs().max() <= TOLERANCE
    assert runner.info.num_parameters == sum(p.numel() for p in model.model.parameters())


def test_a_sequence_that_pads_itself(tmp_path: Path) -> None:
    """RoBERTa's positions pass over the padding token wherever it stands."""
    model = make("RobertaModel", tmp_path)
    text = (5, 1, 6, 7, 1, 1, 8)
    [vector] = Driver(open_model(tmp_path)).run([text])
    wanted = hidden_states(model, text).mean(0)
    assert (vector - wanted / wanted.norm()).abs().max() <= TOLERANCE


@pytest.mark.parametrize(
    "architecture",
    [
        "BertForSequenceClassification",
        "RobertaForSequenceClassification",
        "XLMRobertaForSequenceClassification",
    ],
)
def test_scores_are_those_of_transformers(architecture: str, tmp_path: Path) -> None:
    model = make(architecture, tmp_path, num_labels=1)
    runner = open_model(tmp_path)
    assert runner.info.pooling is not None and runner.info.pooling.task == "rerank"
    assert runner.info.num_parameters == sum(p.numel() for p in model.parameters())
    bert = architecture.startswith("Bert")
    seconds = [len(text) // 2 if bert else None for text in texts()]
    found = Driver(runner).run(texts(), seconds)
    alone = [Driver(runner).run([t], [s])[0] for t, s in zip(texts(), seconds, strict=True)]
    assert all(map(torch.equal, alone, found))
    for text, second, score in zip(texts(), seconds, found, strict=True):
        types = [0] * len(text) if second is None else [int(i >= second) for i in range(len(text))]
        with torch.no_grad():
            logits = model(torch.tensor([text]), token_type_ids=torch.tensor([types])).logits
        assert score.shape == (1,)
        assert abs(score.item() - torch.sigmoid(logits)[0, 0].item()) <= TOLERANCE


@pytest.mark.parametrize("architecture", ["BertForMaskedLM", "RobertaForMaskedLM"])
def test_what_predicts_words_is_not_read(architecture: str, tmp_path: Path) -> None:
    model = make(architecture, tmp_path)
    [vector] = Driver(open_model(tmp_path)).run([texts()[3]])
    wanted = hidden_states(getattr(model, model.base_model_prefix), texts()[3]).mean(0)
    assert (vector - wanted / wanted.norm()).abs().max() <= TOLERANCE


def test_names_of_the_first_checkpoints(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    make("BertModel", tmp_path)
    [new] = Driver(open_model(tmp_path)).run([texts()[3]])
    tensors = load_file(tmp_path / "model.safetensors")
    renamed = {
        f"bert.{name}".replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): value
        for name, value in tensors.items()
    }
    renamed["cls.predictions.bias"] = torch.zeros(3)
    save_file(renamed, tmp_path / "model.safetensors")
    [old] = Driver(open_model(tmp_path)).run([texts()[3]])
    assert torch.equal(old, new)


@pytest.mark.parametrize("quantization", ["int8", "w8a8", "*.mlp.*=int8"])
@pytest.mark.parametrize("architecture", ["BertModel", "BertForSequenceClassification"])
def test_linear_layers_are_quantized_as_a_decoders(
    quantization: str, architecture: str, tmp_path: Path
) -> None:
    make(architecture, tmp_path, hidden_size=64, intermediate_size=128, num_labels=1)
    plain = Driver(open_model(tmp_path)).run(texts())
    runner = open_model(tmp_path, quantization=quantization)
    found = Driver(runner).run(texts())
    assert dict(runner.info.quantizers)[quantization.rpartition("=")[2]] >= 6
    for one, other in zip(plain, found, strict=True):
        assert (one - other).norm() <= 0.05 * one.norm()


@pytest.mark.parametrize("architecture", ["BertModel", "Qwen3Model"])
def test_bfloat16(architecture: str, tmp_path: Path) -> None:
    make(architecture, tmp_path)
    plain = Driver(open_model(tmp_path)).run(texts())
    driver = Driver(open_model(tmp_path, dtype="bfloat16"))
    found = driver.run(texts())
    for one, other in zip(plain, found, strict=True):
        assert (one - other).norm() <= 0.05
    assert all(map(torch.equal, found, [driver.run([text])[0] for text in texts()]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_alone_or_not_with_two_threads(dtype: str, tmp_path: Path) -> None:
    """Large enough that each operation is divided, at odd places."""
    sizes = {"hidden_size": 120, "intermediate_size": 372, "max_position_embeddings": 512}
    make("BertModel", tmp_path, **sizes)
    driver = Driver(open_model(tmp_path, threads=2, dtype=dtype))
    chosen = random.Random(2)
    long = [chosen.choices(range(3, VOCAB), k=length) for length in (511, 3, 130, 77, 1, 256)]
    assert all(map(torch.equal, driver.run(long), [driver.run([text])[0] for text in long]))


@pytest.mark.parametrize("architecture", ["BertModel", "XLMRobertaForSequenceClassification"])
def test_random_weights(architecture: str, tmp_path: Path) -> None:
    make(architecture, tmp_path, num_labels=1)
    (tmp_path / "model.safetensors").unlink()
    driver = Driver(open_model(tmp_path, load_format="dummy"))
    assert isinstance(driver.runner, EncoderRunner)
    assert all(vector.isfinite().all() for vector in driver.run(texts()))


def test_hidden_states_that_are_not_finite_are_an_error(tmp_path: Path) -> None:
    model = make("BertModel", tmp_path)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[7] = float("inf")
    model.save_pretrained(tmp_path)
    runner = open_model(tmp_path)
    add = tuple(
        NewSequence(i, (token, 9), 2, SamplingParams(max_tokens=1))
        for i, token in enumerate((7, 8))
    )
    chunks = tuple(Chunk(i, 0, 2, (i,), True) for i in range(2))
    bad, good = runner.execute(StepPlan(1, chunks, add=add)).sampled
    assert bad.error is not None and bad.vector is None
    assert good.error is None and good.vector is not None


INSPECTED = ("BertModel", "XLMRobertaForSequenceClassification", "Qwen3Model")


@pytest.mark.parametrize("architecture", INSPECTED)
def test_inspect_agrees_with_loading(architecture: str, tmp_path: Path) -> None:
    make(architecture, tmp_path, num_labels=1)
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 40}')
    request = {"dtype": "float32", "quantization": "auto", "device": "cpu", "path": str(tmp_path)}
    report = inspect(request, lambda progress: None)
    info = open_model(tmp_path).info
    assert report["refused"] is None
    model, pooling = report["model"], info.pooling
    assert pooling is not None
    assert (model["pooling"]["task"], model["pooling"]["size"]) == (pooling.task, pooling.size)
    assert model["parameters"] == info.num_parameters
    assert model["context"] == info.max_context == 40
    assert model["vocab_size"] == info.vocab_size
    assert report["weight_bytes"] <= info.weight_bytes < 2 * report["weight_bytes"]
    assert ("kv_bytes_per_token" in report) == (info.block_bytes > 0)
    assert len(report["layers"]) == sum(count for _, count in info.quantizers)


# --- what a checkpoint says -----------------------------------------------------------------------


def test_contexts(tmp_path: Path) -> None:
    make("BertModel", tmp_path)
    assert open_model(tmp_path).info.max_context == 66
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 40}')
    assert open_model(tmp_path).info.max_context == 40
    assert open_model(tmp_path, max_context=60).info.max_context == 60
    with pytest.raises(Refused, match="max_context = 67, but the checkpoint ends at 66"):
        open_model(tmp_path, max_context=67)
    make("RobertaModel", tmp_path / "roberta")
    assert open_model(tmp_path / "roberta").info.max_context == 64  # two rows of the table are not
    make("Qwen3Model", tmp_path / "qwen")
    (tmp_path / "qwen" / "sentence_bert_config.json").write_text('{"max_seq_length": 20}')
    assert open_model(tmp_path / "qwen").info.max_context == 20


@pytest.mark.parametrize(
    ("said", "options", "matryoshka", "dimensions"),
    [
        ({}, {}, False, ()),
        ({"is_matryoshka": True}, {}, True, ()),
        ({"matryoshka_dimensions": [8, 16, 32]}, {}, True, (8, 16, 32)),
        ({}, {"matryoshka": True}, True, ()),
    ],
)
def test_matryoshka(
    said: dict[str, Any],
    options: dict[str, Any],
    matryoshka: bool,
    dimensions: tuple[int, ...],
    tmp_path: Path,
) -> None:
    make("BertModel", tmp_path, **said)
    pooling = open_model(tmp_path, **options).info.pooling
    assert pooling is not None
    assert (pooling.matryoshka, pooling.dimensions) == (matryoshka, dimensions)


def _modules(folder: Path, *kinds: str, path: str = "") -> None:
    modules = [{"path": path if i == 0 else f"{i}_{k}", "type": k} for i, k in enumerate(kinds)]
    (folder / "modules.json").write_text(json.dumps(modules))


REFUSALS: list[tuple[str, Callable[[Path], object], dict[str, Any], str]] = [
    (
        "BertModel",
        lambda f: sentence_transformers(f, "max_tokens", False),
        {},
        "max_tokens; one of",
    ),
    ("BertModel", lambda f: sentence_transformers(f, "none", False), {}, "the modes are none"),
    ("BertModel", lambda f: _modules(f, "Transformer", "Pooling", "Dense"), {}, "'Dense', unknown"),
    ("BertModel", lambda f: _modules(f, "Transformer"), {}, "must have Transformer, Pooling"),
    ("BertModel", lambda f: _modules(f, "Transformer", "Pooling", path="0_T"), {}, "lies in 0_T"),
    ("BertModel", lambda f: _modules(f, "Transformer", "Pooling"), {}, "is missing"),
    ("BertModel", lambda f: (f / "modules.json").write_text("{"), {}, "cannot be read"),
    ("BertModel", lambda f: (f / "modules.json").write_text("{}"), {}, "no list of modules"),
    ("BertModel", lambda f: None, {"task": "generate"}, "BertModel is an encoder"),
    ("BertModel", lambda f: None, {"task": "rerank"}, "is not made for that"),
    ("Qwen3ForCausalLM", lambda f: None, {"task": "rerank"}, "is not made for that"),
    ("BertForSequenceClassification", lambda f: None, {"task": "embed"}, "is a reranker"),
    ("BertForSequenceClassification", lambda f: None, {}, "has 2 labels; a reranker has 1"),
    ("BertModel", lambda f: _edit(f, is_decoder=True), {}, "is_decoder is True, must be false"),
    (
        "BertModel",
        lambda f: _edit(f, position_embedding_type="relative_key"),
        {},
        "position_embedding_type is 'relative_key', must be absolute",
    ),
    ("BertModel", lambda f: _edit(f, hidden_act="relu"), {}, "hidden_act is 'relu'"),
    ("BertModel", lambda f: _edit(f, vocab_size=95), {}, r"word_embeddings.weight is \[96, 32\]"),
    ("BertModel", lambda f: _edit(f, num_hidden_layers=2), {}, "has no place for tensors"),
    ("BertModel", lambda f: _edit(f, num_hidden_layers=4), {}, "lacks tensors"),
    ("BertModel", lambda f: _edit(f, matryoshka_dimensions=[64]), {}, "has 64, more than 32"),
    ("BertModel", lambda f: _edit(f, matryoshka_dimensions=["a"]), {}, "must be a list of lengths"),
]


def _edit(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(("architecture", "change", "options", "reason"), REFUSALS)
def test_refusals(
    architecture: str,
    change: Callable[[Path], object],
    options: dict[str, Any],
    reason: str,
    tmp_path: Path,
) -> None:
    make(architecture, tmp_path)
    change(tmp_path)
    with pytest.raises(Refused, match=reason):
        open_model(tmp_path, **options)
