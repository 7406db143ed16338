"""`eval` against transformers: the same models, the same tokens, the numbers made another way."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numerics.tiny import Family, make_model, prompt_of, reference
from safetensors.torch import load_file, save_file

from quantd.daemon.worker import evaluate as module
from quantd.daemon.worker.evaluate import evaluate
from quantd.daemon.worker.loader import Refused, read_json
from quantd.daemon.worker.models.families import read_config
from quantd.daemon.worker.models.names import model_tensors
from quantd.daemon.worker.summary import KINDS, interval, summary

torch.set_num_threads(1)

LENGTH = 32
WINDOWS = 2
"""64 rows: as many as errors of layers are measured on."""


def perturb(folder: Path, target: Path, amount: float = 0.05) -> None:
    """The same model with all of its weights a bit off."""
    target.joinpath("config.json").write_bytes((folder / "config.json").read_bytes())
    generator = torch.Generator().manual_seed(5)
    tensors = load_file(folder / "model.safetensors")
    for tensor in tensors.values():
        noise = torch.randn(tensor.shape, generator=generator)
        tensor.add_(noise * tensor.square().mean().sqrt() * amount)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})


class Pair:
    """A tiny model and its perturbed twin, for transformers and on disk."""

    def __init__(self, family: Family, folder: Path) -> None:
        self.a, self.b = folder / "a", folder / "b"
        self.b.mkdir()
        make_model(family, self.a)
        perturb(self.a, self.b)

    def theirs(self, side: str) -> Any:
        from transformers import AutoModelForCausalLM

        path = {"a": self.a, "b": self.b}[side]
        return AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(Family("llama"), tmp_path_factory.mktemp("pair"))


def run(a: Path, b: Path, tokens: Any = None, **options: Any) -> dict[str, Any]:
    load = {"dtype": "float32", "quantization": "auto", "device": "cpu", "threads": 1}
    request = {
        "a": load | {"path": str(a)},
        "b": load | {"path": str(b)},
        "tokens": list(prompt_of(WINDOWS * LENGTH + 5) if tokens is None else tokens),
        "head": [],
        "context": LENGTH,
        "windows": None,
        "layers": False,
    }
    return evaluate(request | options, lambda progress: None)


def oracle(pair: Pair, windows: list[list[int]]) -> dict[str, Any]:
    nll: dict[str, list[float]] = {"a": [], "b": []}
    kl, same, shared = [], [], []
    models = {side: pair.theirs(side) for side in nll}
    for tokens in windows:
        logs = {side: reference(model, tokens).double() for side, model in models.items()}
        for i in range(len(tokens) - 1):
            a, b = logs["a"][i], logs["b"][i]
            nll["a"].append(-a[tokens[i + 1]].item())
            nll["b"].append(-b[tokens[i + 1]].item())
            kl.append(torch.nn.functional.kl_div(b, a, reduction="sum", log_target=True).item())
            same.append(a.argmax().item() == b.argmax().item())
            best = [set(x.topk(5).indices.tolist()) for x in (a, b)]
            shared.append(len(best[0] & best[1]) / 5)
    return {
        "perplexity_a": math.exp(np.mean(nll["a"])),
        "perplexity_b": math.exp(np.mean(nll["b"])),
        "perplexity_ratio": math.exp(np.mean(nll["b"]) - np.mean(nll["a"])),
        "kl": np.mean(kl),
        "median": np.median(kl),
        "p99": np.quantile(kl, 0.99),
        "max": np.max(kl),
        "same_first": np.mean(same),
        "shared_five": np.mean(shared),
    }


def flat(result: dict[str, Any]) -> dict[str, float]:
    """What `oracle` has, of a result."""
    means = ("perplexity_a", "perplexity_b", "perplexity_ratio", "same_first", "shared_five", "kl")
    out = {name: result[name]["value"] for name in means}
    return out | {name: result["kl"][name] for name in ("median", "p99", "max")}


def test_the_numbers_are_those_of_transformers(pair: Pair) -> None:
    tokens = list(prompt_of(5 * LENGTH + 5))
    result = run(pair.a, pair.b, tokens)
    windows = [tokens[i * LENGTH : (i + 1) * LENGTH] for i in range(5)]
    expected = oracle(pair, windows)
    assert flat(result) == pytest.approx(expected, rel=1e-3)
    assert expected["kl"] > 1e-3 and expected["same_first"] < 1.0
    assert (result["windows"], result["context"]) == (5, LENGTH)
    assert (result["tokens"], result["tokens_left_out"]) == (5 * (LENGTH - 1), 5)


def test_tokens_that_begin_a_text_begin_each_window(pair: Pair) -> None:
    tokens = list(prompt_of(3 * (LENGTH - 1)))
    result = run(pair.a, pair.b, tokens, head=[1])
    body = LENGTH - 1
    windows = [[1, *tokens[i * body : (i + 1) * body]] for i in range(3)]
    assert flat(result) == pytest.approx(oracle(pair, windows), rel=1e-3)
    assert result["tokens_left_out"] == 0


def test_windows_may_be_few_and_come_from_the_beginning(pair: Pair) -> None:
    tokens = list(prompt_of(4 * LENGTH))
    result = run(pair.a, pair.b, tokens, windows=2)
    assert flat(result) == flat(run(pair.a, pair.b, tokens[: 2 * LENGTH]))
    assert result["tokens_left_out"] == 2 * LENGTH


def test_numbers_do_not_depend_on_the_batch(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = list(prompt_of(5 * LENGTH))
    together = run(pair.a, pair.b, tokens)
    monkeypatch.setattr(module, "_BATCH_TOKENS", LENGTH)
    assert run(pair.a, pair.b, tokens) == together


def test_progress_ends_before_the_last_window_and_names_the_stages(pair: Pair) -> None:
    seen: list[dict[str, Any]] = []
    load = {"dtype": "float32", "quantization": "auto", "device": "cpu", "threads": 1}
    sides = {"a": load | {"path": str(pair.a)}, "b": load | {"path": str(pair.b)}}
    more = {"head": [], "context": None, "windows": None, "layers": False}
    result = evaluate({"tokens": list(prompt_of(700))} | sides | more, seen.append)
    stages = [progress["stage"] for progress in seen]
    assert stages[0] == "loading A" and "loading B" in stages
    assert stages[-1] == "0 of 1 windows"
    assert result["context"] == 512, "the smaller of 512 and the checkpoint's context"


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_model_against_itself_differs_in_nothing(family: str, tmp_path: Path) -> None:
    more = {"num_local_experts": 4, "num_experts_per_tok": 2} if family == "mixtral" else {}
    make_model(Family(family, more), tmp_path)
    result = run(tmp_path, tmp_path, layers=True)
    assert result["kl"] == {
        "value": 0.0, "low": 0.0, "high": 0.0, "median": 0.0, "p90": 0.0, "p99": 0.0, "max": 0.0
    }  # fmt: skip
    assert result["same_first"]["value"] == result["shared_five"]["value"] == 1.0
    assert result["perplexity_ratio"]["value"] == 1.0
    assert {row["weight"] for row in result["layers"]} == {0.0}
    assert {row["output"] for row in result["layers"]} <= {0.0, None}
    assert {row["error"] for row in result["hidden"]} == {0.0}
    config = read_config(read_json(tmp_path, "config.json"))
    names = model_tensors(config, torch.float32).linears.keys()
    assert {row["name"] for row in result["layers"]} == names
    assert len(result["hidden"]) == len(config.layers) + 1


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).double().norm() / want.double().norm()).item()


def test_errors_of_layers_are_those_of_transformers(pair: Pair) -> None:
    tokens = list(prompt_of(WINDOWS * LENGTH))
    result = run(pair.a, pair.b, tokens, layers=True)
    a, b = pair.theirs("a"), pair.theirs("b")
    seen: dict[str, dict[str, torch.Tensor]] = {"a": {}, "b": {}}

    def keep(side: str, name: str) -> Any:
        def hook(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            seen[side][name] = inputs[0].flatten(0, 1)

        return hook

    for side, model in (("a", a), ("b", b)):
        for i, layer in enumerate(model.model.layers):
            layer.self_attn.q_proj.register_forward_pre_hook(keep(side, f"model.layers.{i}"))
        model.model.layers[1].mlp.down_proj.register_forward_pre_hook(keep(side, "down"))
        with torch.no_grad():
            model(torch.tensor(tokens).view(WINDOWS, LENGTH), use_cache=False)
    rows = {row["name"]: row for row in result["layers"]}
    down = [model.model.layers[1].mlp.down_proj.weight.detach() for model in (a, b)]
    row = rows["model.layers.1.mlp.down_proj"]
    assert row["weight"] == pytest.approx(relative(down[1], down[0]), rel=1e-4)
    x = seen["a"]["down"]
    assert row["output"] == pytest.approx(relative(x @ down[1].T, x @ down[0].T), rel=1e-3)
    qkv = [
        torch.cat([getattr(model.model.layers[2].self_attn, f"{p}_proj").weight for p in "qkv"])
        for model in (a, b)
    ]
    row = rows["model.layers.2.self_attn.qkv_proj"]
    assert row["weight"] == pytest.approx(relative(qkv[1], qkv[0]), rel=1e-4)
    hidden = {row["name"]: row["error"] for row in result["hidden"]}
    for name in ("model.layers.0", "model.layers.1", "model.layers.2"):
        expected = relative(seen["b"][name], seen["a"][name])
        assert hidden[name] == pytest.approx(expected, rel=1e-3)


def test_taps_change_nothing(pair: Pair) -> None:
    assert flat(run(pair.a, pair.b, layers=True)) == flat(run(pair.a, pair.b))


# --- what is refused -------------------------------------------------------------------------


def refusal(a: Path, b: Path, tokens: Any = None, **options: Any) -> str:
    with pytest.raises(Refused) as refused:
        run(a, b, tokens, **options)
    return str(refused.value)


def test_another_vocabulary(pair: Pair, tmp_path: Path) -> None:
    make_model(Family("llama", {"vocab_size": 96}), tmp_path)
    expected = "A has a vocabulary of 128 tokens, B of 96: they cannot be compared"
    assert refusal(pair.a, tmp_path) == expected


def test_a_token_beyond_the_vocabulary(pair: Pair) -> None:
    said = refusal(pair.a, pair.b, [*prompt_of(LENGTH - 1), 128])
    assert said == "the tokenizer gives the token 128, but the vocabulary has 128"


def test_a_text_shorter_than_a_window(pair: Pair) -> None:
    said = refusal(pair.a, pair.b, prompt_of(LENGTH - 1))
    assert said == "the text has 31 tokens, less than the 32 of one window (--context 32)"


@pytest.mark.parametrize(("context", "head"), [(1, []), (2, [1, 1])])
def test_a_window_that_predicts_nothing(pair: Pair, context: int, head: list[int]) -> None:
    said = refusal(pair.a, pair.b, context=context, head=head)
    assert said == f"context is {context}, must be at least {len(head) + 1 if head else 2}"


def test_a_window_beyond_the_context(pair: Pair) -> None:
    said = refusal(pair.a, pair.b, prompt_of(600), context=513)
    assert said == "A: max_context = 513, but the checkpoint ends at 512"


def test_what_is_wrong_with_b_names_b(pair: Pair, tmp_path: Path) -> None:
    assert refusal(pair.a, tmp_path).startswith(f"B: {tmp_path} has no config.json")


def test_logits_that_are_not_finite(pair: Pair, tmp_path: Path) -> None:
    tensors = load_file(pair.a / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((pair.a / "config.json").read_bytes())
    said = refusal(pair.a, tmp_path)
    assert said == "B gives logits that are not finite on this text"


def test_layers_of_another_shape(pair: Pair, tmp_path: Path) -> None:
    make_model(Family("llama", {"intermediate_size": 80}), tmp_path)
    assert flat(run(pair.a, tmp_path))["kl"] > 0.1
    said = refusal(pair.a, tmp_path, layers=True)
    expected = "--layers compares like with like, but intermediate_size is 96 in A and 80 in B"
    assert said == expected


def test_another_number_of_layers(pair: Pair, tmp_path: Path) -> None:
    make_model(Family("llama", {"num_hidden_layers": 2}), tmp_path)
    said = refusal(pair.a, tmp_path, layers=True)
    assert "A has 13 linear layers and B 9, 9 of them of the same name" in said


# --- the summary -----------------------------------------------------------------------------


def test_an_interval_is_of_the_windows_means() -> None:
    values = np.array([[1.0, 3.0], [2.0, 4.0], [0.0, 2.0]])  # means 2, 3, 1
    found = interval(values)
    half = 1.959964 / math.sqrt(3)
    assert found == pytest.approx({"value": 2.0, "low": 2.0 - half, "high": 2.0 + half})
    assert interval(values[:1]) == {"value": 2.0, "low": None, "high": None}


def test_the_ratio_is_of_paired_differences() -> None:
    """B is worse by the same amount everywhere: its ratio is certain, both perplexities are not."""
    generator = np.random.default_rng(0)
    scores = {kind: generator.random((6, 10)) for kind in KINDS}
    scores["nll_b"] = scores["nll_a"] + 0.1
    found = summary(scores)
    assert found["perplexity_ratio"] == pytest.approx(
        dict.fromkeys(("value", "low", "high"), math.exp(0.1))
    )
    assert (
        found["perplexity_a"]["low"]
        < found["perplexity_a"]["value"]
        < found["perplexity_a"]["high"]
    )


def test_quantiles_rise_from_the_least_to_the_greatest() -> None:
    generator = np.random.default_rng(0)
    scores = {kind: generator.random((2, 50)) for kind in KINDS}
    found = summary(scores)
    curve = found["kl_quantiles"]
    assert curve == sorted(curve)
    assert (curve[0], curve[-1]) == (scores["kl"].min(), scores["kl"].max())
    assert curve[100] == found["kl"]["median"] and curve[198] == found["kl"]["p99"]


def test_a_perplexity_without_bound_stays_a_number() -> None:
    scores = {kind: np.full((2, 3), 1e6) for kind in KINDS}
    assert summary(scores)["perplexity_a"]["value"] == math.exp(700.0)
