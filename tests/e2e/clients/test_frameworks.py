"""What people build on the SDKs, each in an environment of its own: `make test-clients`.

The suites in `frameworks/` run there by a pytest of that environment; lm-eval is run as its users
run it, and its numbers are held against transformers here.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from harness import Daemon, Server, checked_output

from quantd.daemon import embedded

pytestmark = [pytest.mark.clients, pytest.mark.xdist_group("clients")]

HERE = Path(__file__).parent
ENVIRONMENTS = Path(sys.prefix) / "clients"
DEMO = Path(embedded.__file__).parent / "demo"
SUITES = {
    "langchain": "openai3",
    "litellm": "openai3",
    "pydantic_ai": "openai3",
    "instructor": "openai2",
    "llama_index": "openai2",
}
_CONFIG = """
[models.demo]
path = "embedded:demo"
dtype = "float32"
threads = 1
[models.embedder]
path = "embedder"
threads = 1
[models.reranker]
path = "reranker"
threads = 1
"""
_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    # Otherwise it fetches a table of prices when it is imported.
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Text, vectors and rankings."""
    from numerics.tiny_pooled import make, sentence_transformers, word_piece

    folder = tmp_path_factory.mktemp("frameworks")
    for name in ("embedder", "reranker"):
        (folder / name).mkdir()
        word_piece(folder / name)
    make("BertModel", folder / "embedder")
    sentence_transformers(folder / "embedder", "mean_tokens", True)
    make("BertForSequenceClassification", folder / "reranker", num_labels=1)
    (folder / "config.toml").write_text(_CONFIG)
    with Daemon("--config", str(folder / "config.toml")) as daemon:
        yield daemon


def run(name: str, command: list[str], environment: dict[str, str], folder: Path) -> str:
    """The output of a program of an environment's."""
    program = ENVIRONMENTS / name / "bin" / command[0]
    if not program.is_file():
        pytest.skip(f"no {program}; `make test-clients` makes it")
    return checked_output([str(program), *command[1:]], os.environ | _OFFLINE | environment, folder)


@pytest.mark.parametrize("suite", SUITES)
def test_suite(server: Server, suite: str) -> None:
    address = {"port": server.port, "socket": str(server.socket)}
    command = ["python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rs"]
    # Their warnings are not ours; LangChain keeps a client from one test to the next.
    command += ["-o", "filterwarnings=ignore", "-o", "asyncio_default_test_loop_scope=session"]
    command += [str(HERE / "frameworks" / f"{suite}_suite.py")]
    environment = {"QUANTD_TEST_SERVERS": json.dumps({"demo": address})}
    output = run(SUITES[suite], command, environment, HERE.parents[2])
    assert re.search(r"^[1-9]\d* passed", output, re.MULTILINE), output
    assert "skipped" not in output, output


class Task(NamedTuple):
    """One of lm-eval's, as a file of it says."""

    kind: str
    options: str
    documents: list[dict[str, Any]]


CHOICES = Task(
    "multiple_choice",
    'doc_to_text: "{{question}}"\ndoc_to_choice: choices\ndoc_to_target: answer\n'
    'target_delimiter: ""\nmetric_list:\n  - metric: acc\n',
    [
        {"question": "What is 3 + 4?", "choices": [" 3 + 4 = 7", " 3 + 4 = 8"], "answer": 0},
        {"question": "quantd listens on", "choices": [" port 8420", " the moon"], "answer": 0},
        # Behind the answer the model ends: what it generates is its stop token.
        {
            "question": "<|im_start|>user\nWhat is 5 + 4?<|im_end|>\n"
            "<|im_start|>assistant\n5 + 4 =",
            "choices": [" 9", " 8"],
            "answer": 0,
        },
    ],
)
TEXTS = Task(
    "loglikelihood_rolling",
    'doc_to_text: ""\ndoc_to_target: "{{text}}"\nmetric_list:\n  - metric: word_perplexity\n',
    [{"text": "quantd listens on port 8420 and on a Unix socket."}, {"text": "3 + 4 = 7"}],
)
SUMS = Task(
    "generate_until",
    'doc_to_text: "{{question}}"\ndoc_to_target: "{{answer}}"\n'
    'generation_kwargs:\n  until: ["\\n\\n"]\n  max_gen_toks: 64\n'
    "metric_list:\n  - metric: exact_match\n",
    [
        {"question": "What is 3 + 4?", "answer": "3 + 4 = 7"},
        {"question": "What is 5 + 4?", "answer": "5 + 4 = 9"},
    ],
)


def evaluate(
    task: Task, folder: Path, model: str, arguments: dict[str, Any], *more: str
) -> list[dict[str, Any]]:
    """lm-eval's own record of each document, in their order."""
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in task.documents))
    (folder / "tasks").mkdir()
    (folder / "tasks" / "task.yaml").write_text(
        f"task: ours\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\n"
        f"test_split: test\noutput_type: {task.kind}\n{task.options}"
    )
    given = ",".join(f"{name}={value}" for name, value in arguments.items())
    command = ["lm_eval", "run", "--model", model, "--model_args", given, "--tasks", "ours"]
    command += ["--include_path", str(folder / "tasks"), "--log_samples", *more]
    command += ["--output_path", str(folder / "results")]
    run("openai3", command, {"HF_HOME": str(folder / "hub")}, folder)
    [samples] = (folder / "results").rglob("samples_*.jsonl")
    records = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(records) == len(task.documents)
    return sorted(records, key=lambda record: record["doc_id"])


class Oracle:
    """transformers, on the checkpoint that the daemon serves."""

    def __init__(self) -> None:
        from tokenizers import Tokenizer
        from transformers import AutoModelForCausalLM

        self.tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
        self.model: Any = AutoModelForCausalLM.from_pretrained(DEMO, dtype="float32").eval()

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def loglikelihood(self, context: list[int], wanted: list[int]) -> tuple[float, bool]:
        """Of `wanted` behind `context`, and whether greedy decoding says it."""
        import torch

        with torch.no_grad():
            logits = self.model(torch.tensor([context + wanted])).logits[0]
        logprobs = logits[len(context) - 1 : -1].log_softmax(-1)
        target = torch.tensor(wanted)
        total = logprobs.gather(1, target[:, None]).sum().item()
        return total, bool((logprobs.argmax(-1) == target).all())


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle()


def completions(server: Server, by_ids: bool) -> dict[str, Any]:
    return {
        "base_url": f"{server.url}/v1/completions",
        "model": "demo",
        "tokenizer": DEMO,
        "tokenized_requests": by_ids,
    }


@pytest.mark.parametrize("by_ids", [True, False])
def test_lm_evals_loglikelihoods(
    server: Server, oracle: Oracle, tmp_path: Path, by_ids: bool
) -> None:
    arguments = completions(server, by_ids)
    records = evaluate(CHOICES, tmp_path, "local-completions", arguments, "--batch_size", "4")
    greedy = []
    for record in records:
        document = record["doc"]
        context = oracle.ids(document["question"])
        for choice, [[total, is_greedy]] in zip(document["choices"], record["resps"], strict=True):
            wanted = oracle.ids(document["question"] + choice)[len(context) :]
            expected = oracle.loglikelihood(context, wanted)
            assert float(total) == pytest.approx(expected[0], rel=1e-3)
            assert (is_greedy == "True") == expected[1]
            greedy.append(expected[1])
        assert record["acc"] == 1
    assert True in greedy and False in greedy


def test_lm_evals_rolling_loglikelihoods(server: Server, oracle: Oracle, tmp_path: Path) -> None:
    records = evaluate(TEXTS, tmp_path, "local-completions", completions(server, True))
    [start] = oracle.ids("<|im_end|>")  # the tokenizer's eos_token, which stands for the beginning
    for record in records:
        expected, _ = oracle.loglikelihood([start], oracle.ids(record["doc"]["text"]))
        assert float(record["resps"][0][0]) == pytest.approx(expected, rel=1e-3)


def test_lm_evals_chats(server: Server, tmp_path: Path) -> None:
    arguments = {"base_url": f"{server.url}/v1/chat/completions", "model": "demo"}
    records = evaluate(SUMS, tmp_path, "local-chat-completions", arguments, "--apply_chat_template")
    assert [record["resps"][0][0] for record in records] == ["3 + 4 = 7", "5 + 4 = 9"]
    assert [record["exact_match"] for record in records] == [1, 1]
