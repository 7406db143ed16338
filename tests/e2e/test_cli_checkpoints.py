"""`quantd inspect` and `quantd eval` as a user types them."""

from __future__ import annotations

import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

pytestmark = pytest.mark.xdist_group("cli-checkpoints")

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "daemon" / "embedded" / "demo"
COMMAND = (sys.executable, "-m", "quantd.daemon")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
SHORT = ("--context", 64, "--windows", 3, "--threads", 1)


def quantd(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=540,
        env=ENVIRONMENT,
    )


def succeeds(*arguments: object) -> str:
    done = quantd(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def fails(status: int, *arguments: object) -> str:
    """The one line that says why."""
    done = quantd(*arguments)
    assert (done.returncode, done.stdout) == (status, ""), done
    [line] = done.stderr.splitlines()
    assert line.startswith("quantd: ")
    return line.removeprefix("quantd: ")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "numbers.txt"
    numbers = ((i * 7919 % 97, i * 104729 % 89) for i in range(150))
    file.write_text("".join(f"What is {a} + {b}? {a + b}.\n" for a, b in numbers))
    return file


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The demo, to spoil."""
    return Path(shutil.copytree(DEMO, tmp_path / "copy"))


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


# --- inspect ---------------------------------------------------------------------------------


def test_inspect_shows_the_checkpoint() -> None:
    out = succeeds("inspect", "embedded:demo", "--dtype", "float32")
    lines = {line.split()[0]: line for line in out.splitlines() if line}
    assert "LlamaForCausalLM, 8 layers" in lines["architecture"]
    assert "8,192 tokens" in lines["context"]
    assert "BPE, 1,024 tokens" in lines["tokenizer"] and "a chat template" in lines["tokenizer"]
    assert "per 1,000 tokens" in lines["keys,"]
    [row] = [line for line in out.splitlines() if line.startswith("33      dense")]
    assert "BF16 held as bfloat16" in row and "the checkpoint's tensors" in row
    assert "model.layers" not in out
    assert succeeds("inspect", "demo", "--dtype", "float32") == out


def test_inspect_with_layers_has_a_line_for_each() -> None:
    out = succeeds("inspect", "demo", "--layers")
    rows = [line for line in out.splitlines() if line.startswith(("model.layers.", "lm_head"))]
    assert len(rows) == 33


def test_inspect_as_json() -> None:
    report = json.loads(succeeds("inspect", "demo", "--json", "--dtype", "float16"))
    assert report["refused"] is None and report["dtype"] == "float16"
    assert report["tokenizer"] == {"kind": "BPE", "size": 1024, "chat_template": True}
    assert len(report["layers"]) == 33
    assert report["stored"]["bytes"] < (DEMO / "model.safetensors").stat().st_size
    assert report["kv_bytes_per_token"] == 2 * 8 * 4 * 32 * 2


def test_inspect_of_a_refused_checkpoint_shows_the_rest_and_fails(copy: Path) -> None:
    edit(copy / "config.json", lambda config: config | {"intermediate_size": 700})
    done = quantd("inspect", copy)
    assert done.returncode == 1
    assert "LlamaForCausalLM" in done.stdout and "BPE" in done.stdout
    [line] = done.stderr.splitlines()
    assert line.startswith("quantd: the checkpoint does not fit its config.json: ")
    assert "must be [700, 256]" in line
    as_json = quantd("inspect", copy, "--json")
    assert as_json.returncode == 1
    assert f"quantd: {json.loads(as_json.stdout)['refused']}\n" == line + "\n" == as_json.stderr


def test_inspect_of_a_file_that_is_no_model_says_it_once(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"not a model, but long enough")
    done = quantd("inspect", tmp_path / "m.gguf")
    assert done.returncode == 1
    assert done.stdout.split() == ["path", f"{tmp_path}/m.gguf"]
    [line] = done.stderr.splitlines()
    assert line == "quantd: m.gguf is no sound GGUF file: it begins with b'not ', not with b'GGUF'"


def test_inspect_without_a_tokenizer_says_so(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    out = succeeds("inspect", copy)
    assert f"tokenizer     none: {copy} has no tokenizer.json\n" in out


def test_inspect_of_nothing(tmp_path: Path) -> None:
    line = fails(2, "inspect", tmp_path / "none")
    assert line == f"{tmp_path}/none: no such folder or file (models inside: demo, demo-draft)"


def test_a_wrong_setting_names_its_flag() -> None:
    assert fails(2, "inspect", "demo", "--dtype", "int3").startswith("--dtype: ")
    line = fails(2, "inspect", DEMO, "--quantization", "=int8")
    assert line.startswith('--quantization: models.demo.quantization = "=int8": must be ')
    line = fails(2, "eval", "demo", "demo", "--text", "x", "--dtype-b", "int3")
    assert line.startswith("--dtype-b: ")


# --- eval ------------------------------------------------------------------------------------


def test_eval_of_a_model_against_itself(text: Path) -> None:
    out = succeeds("eval", "demo", "embedded:demo", "--text", text, *SHORT)
    assert "same first choice   100.00 [100.00, 100.00] %" in out
    assert "KL(A||B), nats      mean 0.000e+00 [0.000e+00, 0.000e+00]" in out
    assert "3 windows of 64 tokens, 189 predicted" in out
    assert "LINEAR LAYER" not in out


def test_eval_in_another_dtype_with_layers_and_a_plot(text: Path, tmp_path: Path) -> None:
    plot = tmp_path / "plot.svg"
    more = ("--dtype-a", "float32", "--dtype-b", "float16", "--layers")
    out = succeeds("eval", "demo", "demo", "--text", text, *SHORT, *more, "--plot", plot)
    assert "float32, dense × 33" in out and "float16, dense × 33" in out
    rows = [line.split() for line in out.splitlines() if line.startswith("model.layers.7.mlp.down")]
    [[_, weight, output]] = rows
    assert 0.0 < float(output) < 1e-2 and float(weight) < 1e-3
    tree = ElementTree.parse(plot)
    texts = [node.text or "" for node in tree.iter("{http://www.w3.org/2000/svg}text")]
    for expected in (
        "KL(A||B) per token, 189 tokens",
        "KL, nats",
        "tokens with at most this KL, %",
        "Relative error of each linear layer",
        "Relative error of the hidden states",
        "A: demo, dense, float32",
        "B: demo, dense, float16",
    ):
        assert expected in texts
    lines = list(tree.iter("{http://www.w3.org/2000/svg}polyline"))
    assert [len(line.attrib["points"].split()) for line in lines] == [201, 2, 33, 33, 9]
    width, height = (float(tree.getroot().attrib[key]) for key in ("width", "height"))
    points = [point.split(",") for line in lines for point in line.attrib["points"].split()]
    assert all(0 < float(x) < width and 0 < float(y) < height for x, y in points)


def test_eval_of_a_format_that_is_made_while_loading(text: Path) -> None:
    more = ("--quantization-b", "int4", "--layers", "--json")
    result = json.loads(succeeds("eval", "demo", "demo", "--text", text, *SHORT, *more))
    assert dict(result["a"]["quantizers"]) == {"dense": 33}
    assert dict(result["b"]["quantizers"]) == {"int4": 33}
    assert result["b"]["weight_bytes"] < result["a"]["weight_bytes"] / 3
    assert result["kl"]["value"] > 1e-3 and result["same_first"]["value"] < 1.0
    # Sixteen steps over a group of 32 normal weights.
    assert all(0.05 < layer["weight"] < 0.15 for layer in result["layers"])
    assert all(0.01 < layer["output"] < 0.5 for layer in result["layers"])


def test_eval_as_json_of_two_checkpoints(text: Path) -> None:
    out = succeeds("eval", "demo", "embedded:demo-draft", "--text", text, *SHORT, "--json")
    result = json.loads(out)
    assert result["a"]["path"] == str(DEMO) and result["b"]["path"] == f"{DEMO}-draft"
    assert result["a"]["parameters"] > result["b"]["parameters"]
    assert result["windows"] == 3 and result["tokens"] == 3 * 63
    assert 0.0 < result["kl"]["median"] <= result["kl"]["p99"] <= result["kl"]["max"]
    ratio = result["perplexity_b"]["value"] / result["perplexity_a"]["value"]
    assert result["perplexity_ratio"]["value"] == pytest.approx(ratio)
    assert 0.0 < result["same_first"]["value"] < 1.0


def test_eval_of_layers_that_do_not_match(text: Path) -> None:
    line = fails(1, "eval", "demo", "embedded:demo-draft", "--text", text, *SHORT, "--layers")
    assert line.startswith("--layers compares like with like, but ")


def test_eval_with_a_tokenizer_that_cuts_otherwise(text: Path, copy: Path) -> None:
    def without_merges(tokenizer: Any) -> Any:
        tokenizer["model"]["merges"] = []
        return tokenizer

    edit(copy / "tokenizer.json", without_merges)
    line = fails(1, "eval", "demo", copy, "--text", text, *SHORT)
    assert line.startswith("A and B cut the text into different tokens, from token 0 on (")


def test_eval_with_a_tokenizer_that_begins_otherwise_goes_by_a(text: Path, copy: Path) -> None:
    edit(
        copy / "tokenizer_config.json",
        lambda config: config | {"add_bos_token": True, "bos_token": "<|im_start|>"},
    )
    both = ("--text", text, *SHORT)
    forth, back = succeeds("eval", "demo", copy, *both), succeeds("eval", copy, "demo", *both)
    assert "note: B would begin a text with the tokens [1016]; both were given A's, []" in forth
    assert "note: B would begin a text with the tokens []; both were given A's, [1016]" in back
    assert "same first choice   100.00" in forth and "same first choice   100.00" in back


def test_eval_of_a_checkpoint_that_is_refused(text: Path, copy: Path) -> None:
    edit(copy / "config.json", lambda config: config | {"hidden_act": "tanh"})
    line = fails(1, "eval", "demo", copy, "--text", text, *SHORT)
    assert line.startswith("B: config.json: hidden_act")


@pytest.mark.parametrize(
    ("content", "status", "expected"),
    [
        (None, 2, "cannot be read: No such file or directory"),
        (b"", 2, "is empty"),
        (b" \n", 2, "is empty"),
        (b"abc\xff", 2, "is not UTF-8 at byte 3"),
        (b"Too short.", 1, "less than the 64 of one window (--context 64)"),
    ],
)
def test_eval_of_a_wrong_text(
    content: bytes | None, status: int, expected: str, tmp_path: Path
) -> None:
    file = tmp_path / "text"
    if content is not None:
        file.write_bytes(content)
    assert fails(status, "eval", "demo", "demo", "--text", file, *SHORT).endswith(expected)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--plot", "x.png"), "--plot = x.png: must end in .svg"),
        (("--plot", "/nowhere/x.svg"), "--plot = /nowhere/x.svg: there is no folder /nowhere"),
        (("--windows", 0), "--windows = 0: must be at least 1"),
        (("--context", 1), "--context = 1: must be at least 2"),
    ],
)
def test_eval_with_wrong_flags_fails_before_it_begins(
    flags: tuple[object, ...], expected: str
) -> None:
    assert fails(2, "eval", "demo", "demo", "--text", "not-read", *flags) == expected


# --- processes -------------------------------------------------------------------------------


def wait(condition: Callable[[], Any]) -> Any:
    """The first true value of `condition`."""
    deadline = time.monotonic() + 240
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return value


class Running:
    """`quantd eval` on a text that takes a while, when its tool is at work."""

    def __init__(self, text: Path, folder: Path) -> None:
        long = folder / "long.txt"
        long.write_text(text.read_text() * 200)
        command = [*COMMAND, "eval", "demo", "demo", "--text", str(long), "--threads", "1"]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
        )
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        [self.tool] = wait(lambda: [int(pid) for pid in children.read_text().split()])
        self._ended = os.pidfd_open(self.tool)
        wait(lambda: b"evaluate" in Path(f"/proc/{self.tool}/cmdline").read_bytes())

    def finish(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=240)
        assert select.select([self._ended], [], [], 240)[0], "the tool outlives its command"
        os.close(self._ended)
        return self.process.returncode, out, err


def test_ctrl_c_ends_the_command_and_its_tool(text: Path, tmp_path: Path) -> None:
    running = Running(text, tmp_path)
    running.process.send_signal(signal.SIGINT)
    assert running.finish() == (130, "", "")


def test_a_tool_that_is_killed_is_one_line(text: Path, tmp_path: Path) -> None:
    running = Running(text, tmp_path)
    os.kill(running.tool, signal.SIGKILL)
    expected = "quantd: evaluate was ended by SIGKILL, perhaps for want of memory\n"
    assert running.finish() == (1, "", expected)


def read_to_the_end(terminal: int) -> bytes:
    """While it is written: a terminal holds little, and who writes more waits for its reader."""
    shown = b""
    with suppress(OSError):  # nobody has its other end any more
        while more := os.read(terminal, 1 << 16):
            shown += more
    os.close(terminal)
    return shown


def test_progress_is_shown_on_a_terminal_and_taken_away(text: Path) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, "eval", "demo", "demo", "--text", str(text), *map(str, SHORT)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=theirs,
        env=ENVIRONMENT,
    )
    os.close(theirs)
    shown = read_to_the_end(ours).decode()
    assert process.wait(240) == 0
    assert "loading A" in shown and "loading B" in shown and "0 of 3 windows" in shown
    assert shown.endswith("\r\x1b[K")
