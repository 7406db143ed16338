"""Tiny random models of every family, made and judged by transformers, and a driver for our Runner.

Logits are compared as log-probabilities over the whole vocabulary: what a plan can ask for.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantd.daemon.types import (
    BLOCK_TOKENS,
    Chunk,
    LoadModel,
    NewSequence,
    SamplingParams,
    StepPlan,
    TokenLogprob,
)
from quantd.daemon.worker.runner import Runner

VOCAB = 128

_BASE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [1.0 + 0.7 * i for i in range(8)],
    "partial_rotary_factor": 1.0,
    "original_max_position_embeddings": 64,
}
_PHI3 = {"original_max_position_embeddings": 64, "rope_parameters": _LONGROPE}
_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
_QWEN_MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "head_dim": 16,
}
_GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 8}


@dataclass(frozen=True)
class Family:
    """A model type of transformers and in what it differs from `_BASE`."""

    model_type: str
    config: dict[str, Any] = field(default_factory=dict)
    max_context: int = 128
    length: int = 45
    """Tokens of its longest test prompt, decoded ones included."""


FAMILIES: dict[str, Family] = {
    "llama": Family("llama"),
    "llama-mha-biases": Family(
        "llama", {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}
    ),
    "llama-mqa-tied": Family("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama-head-dim": Family("llama", {"head_dim": 24}),
    "llama3-rope": Family("llama", {"rope_parameters": _LLAMA3}),
    "llama-linear": Family(
        "llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}}
    ),
    "llama-dynamic": Family(
        "llama",
        {
            "max_position_embeddings": 32,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        },
        max_context=45,
    ),
    "mistral": Family("mistral", {"sliding_window": 8}),
    "mistral-no-window": Family("mistral", {"sliding_window": None}),
    "qwen2": Family("qwen2", {"tie_word_embeddings": True}),
    "qwen2-windows": Family(
        "qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
    ),
    "qwen2-yarn": Family("qwen2", {"rope_parameters": _YARN}, max_context=64),
    "qwen3": Family("qwen3", {"head_dim": 32}),
    "gemma2": Family("gemma2", _GEMMA | {"attn_logit_softcapping": 5.0}),
    "gemma3": Family("gemma3_text", _GEMMA | {"num_hidden_layers": 7}),
    "phi3": Family("phi3", _PHI3, max_context=64),
    "phi3-long": Family("phi3", _PHI3, max_context=256, length=70),
    "phi3-partial": Family(
        "phi3",
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
            },
            "sliding_window": 8,
        },
    ),
    "granite": Family(
        "granite",
        {
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.1,
            "logits_scaling": 8.0,
        },
    ),
    "olmo2": Family("olmo2"),
    "smollm3": Family("smollm3", {"no_rope_layer_interval": 2}),
    "mixtral": Family("mixtral", _MOE),
    "qwen3-moe": Family("qwen3_moe", _QWEN_MOE | {"mlp_only_layers": [1]}),
    "qwen3-moe-norm": Family("qwen3_moe", _QWEN_MOE | {"norm_topk_prob": True}),
}


def make_model(family: Family, folder: Path) -> Any:
    """A transformers model with weights that make its logits tell, saved to `folder`."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = AutoConfig.for_model(family.model_type, **_BASE | family.config)
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(noise * 0.2)
            else:
                parameter.copy_(noise * 1.5 / parameter.shape[-1] ** 0.5)
    model.save_pretrained(folder)
    return model


def reference(model: Any, tokens: Sequence[int]) -> Tensor:
    """transformers' log-probabilities [len(tokens), VOCAB], in one call without a cache."""
    with torch.no_grad(), warnings.catch_warnings():
        logits = model(torch.tensor([list(tokens)]), use_cache=False).logits[0]
    return torch.log_softmax(logits.double(), -1).float()


def prompt_of(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(random.Random(seed).choices(range(3, VOCAB), k=length))


@dataclass
class Answer:
    """What a sequence got: its tokens, and a distribution after each of them but the last."""

    tokens: list[int]
    rows: dict[int, Tensor] = field(default_factory=dict)
    """By position: the log-probabilities of what comes next."""

    @property
    def logprobs(self) -> Tensor:
        """[len(tokens) - 1, VOCAB]"""
        return torch.stack([self.rows[position] for position in range(len(self.tokens) - 1)])


class Driver:
    """A scheduler that knows nothing: chunks of one size, blocks in a scattered order."""

    def __init__(self, folder: Path, max_context: int = 128, **options: Any) -> None:
        load = LoadModel("tiny", str(folder), max_context=max_context, threads=1, **options)
        self.progress: list[Any] = []
        self.runner = Runner(load, self.progress.append)
        self._free = list(range(min(200, self.runner.info.num_blocks)))
        random.Random(3).shuffle(self._free)
        self._next_seq = 0

    def run(
        self, prompts: Sequence[Sequence[int]], chunk: int, num_decodes: int = 0
    ) -> list[Answer]:
        """All prompts as one batch, in chunks of at most `chunk`; then greedy tokens."""
        sampling = SamplingParams(
            max_tokens=num_decodes + 1, temperature=0.0, logprobs=VOCAB, prompt_logprobs=VOCAB
        )
        first = self._next_seq
        self._next_seq += len(prompts)
        answers = {first + i: Answer(list(prompt)) for i, prompt in enumerate(prompts)}
        add = tuple(
            NewSequence(seq, tuple(answer.tokens), len(answer.tokens), sampling)
            for seq, answer in answers.items()
        )
        goals = {seq: len(answer.tokens) + num_decodes for seq, answer in answers.items()}
        done = dict.fromkeys(answers, 0)
        owned: list[int] = []
        while any(done[seq] < goals[seq] for seq in answers):
            chunks = []
            for seq, answer in answers.items():
                if done[seq] == goals[seq]:
                    continue
                stop = min(done[seq] + chunk, len(answer.tokens))
                count = -(-stop // BLOCK_TOKENS) - -(-done[seq] // BLOCK_TOKENS)
                blocks = tuple(self._free.pop() for _ in range(count))
                owned += blocks
                sample = stop == len(answer.tokens)
                chunks.append(Chunk(seq, done[seq], stop, blocks, sample))
                done[seq] = stop
            self._execute(StepPlan(0, tuple(chunks), add=add), answers)
            add = ()
        self.runner.execute(StepPlan(0, (), drop=tuple(answers)))
        self._free += owned
        return list(answers.values())

    def _execute(self, plan: StepPlan, answers: dict[int, Answer]) -> None:
        result = self.runner.execute(plan)
        for item in result.prompt_logprobs:
            for i, entry in enumerate(item.entries):
                answers[item.seq].rows[item.start + i - 1] = _row(entry)
        for sampled in result.sampled:
            assert sampled.error is None and sampled.logprob is not None
            answer = answers[sampled.seq]
            answer.rows[len(answer.tokens) - 1] = _row(sampled.logprob)
            answer.tokens.append(sampled.token)


def _row(entry: TokenLogprob) -> Tensor:
    row = torch.full((VOCAB,), float("nan"))
    for token, logprob in entry.top:
        row[token] = logprob
    return row
