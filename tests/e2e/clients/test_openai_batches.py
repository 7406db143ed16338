"""Files and batches by the official SDK, unchanged, against the daemon and the embedded model."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import openai
import pytest
from harness import Daemon, Server

pytestmark = pytest.mark.xdist_group("clients")

CONFIG = """
[models.demo]
path = "embedded:demo"
dtype = "float32"
threads = 1
"""


def line(custom_id: str, **fields: Any) -> dict[str, Any]:
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": f"Sort these numbers: {len(custom_id)}, 7, 19"}],
        "max_completion_tokens": 16,
        "temperature": 0,
    }
    url = "/v1/chat/completions"
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body | fields}


def jsonl(lines: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(each).encode() + b"\n" for each in lines)


def slow_lines() -> list[dict[str, Any]]:
    """Of sixty the first two are soon done, and the others not for minutes."""
    few = [line(f"id-{n}", max_completion_tokens=1) for n in range(2)]
    many = {"max_completion_tokens": 8000, "ignore_eos": True}
    return few + [line(f"id-{n}", **many) for n in range(2, 60)]


def connect(server: Server, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=240)


@pytest.fixture(scope="module")
def client(demo_server: Server) -> Iterator[openai.OpenAI]:
    with connect(demo_server) as client:
        yield client


def begin(client: openai.OpenAI, lines: list[dict[str, Any]], **fields: Any) -> Any:
    file = client.files.create(file=("in.jsonl", jsonl(lines)), purpose="batch")
    return client.batches.create(
        input_file_id=file.id,
        endpoint="/v1/chat/completions",
        completion_window="24h",
        **fields,
    )


def until(client: openai.OpenAI, batch: Any, condition: Callable[[Any], Any] | None = None) -> Any:
    ends = ("completed", "failed", "expired", "cancelled")
    deadline = time.monotonic() + 240
    while not (condition(batch) if condition else batch.status in ends):
        assert time.monotonic() < deadline, batch
        time.sleep(0.02)
        batch = client.batches.retrieve(batch.id)
        counts = batch.request_counts
        assert counts.completed + counts.failed <= counts.total
    return batch


def until_done(client: openai.OpenAI, batch: Any, count: int) -> Any:
    return until(client, batch, lambda batch: batch.request_counts.completed >= count)


def results(client: openai.OpenAI, id: str | None) -> dict[str, Any]:
    if id is None:
        return {}
    lines = [json.loads(text) for text in client.files.content(id).text.splitlines()]
    found = {each["custom_id"]: each for each in lines}
    assert len(found) == len(lines), "a custom_id came out twice"
    return found


def test_files(client: openai.OpenAI, tmp_path: Path) -> None:
    data = os.urandom(1_000_000)
    (tmp_path / "numbers.bin").write_bytes(data)
    file = client.files.create(
        file=tmp_path / "numbers.bin",
        purpose="user_data",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )
    assert (file.bytes, file.filename, file.purpose) == (len(data), "numbers.bin", "user_data")
    assert file.expires_at == file.created_at + 3600
    assert client.files.wait_for_processing(file.id).id == file.id
    assert client.files.retrieve(file.id) == file
    assert client.files.content(file.id).content == data
    others = [client.files.create(file=(f"{n}.txt", b"x"), purpose="user_data") for n in range(5)]
    listed = list(client.files.list(purpose="user_data", limit=2, order="asc"))
    assert [each.id for each in listed] == [file.id, *(each.id for each in others)]
    for each in listed:
        assert client.files.delete(each.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)


def test_a_batch_from_upload_to_results(client: openai.OpenAI) -> None:
    ids = [f"{'x' * n}-ü" for n in range(1, 9)]
    bad = line("bad", temperature=5)
    batch = begin(client, [*map(line, ids), bad], metadata={"night": "first"})
    assert batch.status == "validating" and batch.metadata == {"night": "first"}
    batch = until(client, batch)
    assert batch.status == "completed" and batch.model == "demo"
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (9, 8, 1)
    done = results(client, batch.output_file_id)
    assert set(done) == set(ids)
    errors = results(client, batch.error_file_id)
    assert set(errors) == {"bad"} and errors["bad"]["response"]["status_code"] == 400
    # What a batch answers is what the interactive route does.
    for id in ids[:2]:
        body = line(id)["body"]
        said = client.chat.completions.create(**body).choices[0].message.content
        assert done[id]["response"]["body"]["choices"][0]["message"]["content"] == said
    assert batch.usage is not None and batch.usage.total_tokens > 0
    assert batch.id in [each.id for each in client.batches.list(limit=1)]


def test_a_batch_that_is_wrong_says_where(client: openai.OpenAI) -> None:
    batch = until(client, begin(client, [line("a"), line("a"), line("b", model="gpt-9")]))
    assert batch.status == "failed" and batch.errors is not None
    assert [(error.code, error.line) for error in batch.errors.data or []] == [
        ("duplicate_custom_id", 2),
        ("model_not_found", 3),
    ]
    assert batch.output_file_id is None


def test_cancel(client: openai.OpenAI) -> None:
    batch = begin(client, slow_lines())
    batch = until_done(client, batch, 2)
    assert client.batches.cancel(batch.id).status == "cancelling"
    batch = until(client, batch)
    assert batch.status == "cancelled"
    counts = batch.request_counts
    assert counts.total == 60 == counts.completed + counts.failed and counts.failed > 0
    done, rest = results(client, batch.output_file_id), results(client, batch.error_file_id)
    assert (len(done), len(rest)) == (counts.completed, counts.failed)
    assert not set(done) & set(rest)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_daemon_goes_on_and_each_line_comes_out_once(
    serve: Callable[..., Daemon], tmp_path: Path, number: int
) -> None:
    (tmp_path / "config.toml").write_text(CONFIG)
    ids = [f"id-{n}" for n in range(40)]
    start = ("--config", str(tmp_path / "config.toml"), "--store-path", str(tmp_path / "state"))
    daemon = serve(*start)
    with connect(daemon) as client:
        batch = begin(client, [line(id, max_completion_tokens=60, ignore_eos=True) for id in ids])
        for num_done in (3, 10):
            batch = until_done(client, batch, num_done)
            daemon.stop(number)
            daemon = serve(*start)
            client = connect(daemon)
        batch = until(client, batch)
        assert batch.status == "completed"
        assert batch.request_counts.completed == 40
        assert set(results(client, batch.output_file_id)) == set(ids)
        client.close()


def test_keys_do_not_see_each_others(serve: Callable[..., Daemon], tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(f'[server]\napi_keys_file = "keys"\n{CONFIG}')
    (tmp_path / "keys").write_text("alice:sk-a\nbob:sk-b\n")
    daemon = serve("--config", str(tmp_path / "config.toml"))
    with connect(daemon, "sk-a") as alice, connect(daemon, "sk-b") as bob:
        batch = until(alice, begin(alice, [line("a")]))
        for call in (
            lambda: bob.batches.retrieve(batch.id),
            lambda: bob.batches.cancel(batch.id),
            lambda: bob.files.retrieve(batch.output_file_id),
            lambda: bob.files.content(batch.output_file_id),
            lambda: bob.files.delete(batch.input_file_id),
        ):
            with pytest.raises(openai.NotFoundError):
                call()
        assert list(bob.batches.list()) == [] and list(bob.files.list()) == []


def test_a_webhook_tells_of_the_end(serve: Callable[..., Daemon], tmp_path: Path) -> None:
    seen: list[tuple[dict[str, str], bytes]] = []
    taken = threading.Event()

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append((dict(self.headers), self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()
            taken.set()

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Receiver) as receiver:
        threading.Thread(target=receiver.serve_forever, daemon=True).start()
        secret = "whsec_" + base64.b64encode(os.urandom(32)).decode()
        (tmp_path / "secret").write_text(secret)
        url = f"http://127.0.0.1:{receiver.server_port}/"
        webhooks = f'[webhooks]\nurl = "{url}"\nsecret_file = "secret"\nallow_private = true\n'
        (tmp_path / "config.toml").write_text(webhooks + CONFIG)
        daemon = serve("--config", str(tmp_path / "config.toml"))
        with connect(daemon) as client:
            batch = until(client, begin(client, [line("a")]))
            assert taken.wait(240)
            headers, body = seen[0]
            event = client.webhooks.unwrap(body, headers, secret=secret)
            assert (event.type, event.data.id) == ("batch.completed", batch.id)
        receiver.shutdown()


def quantd(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "quantd.daemon", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=540, **options)


def test_the_command(demo_server: Server, tmp_path: Path) -> None:
    file = tmp_path / "requests.jsonl"
    file.write_bytes(jsonl([line("a"), line("b")]))
    done = quantd("batch", file, "--socket", demo_server.socket)
    assert done.returncode == 0, done
    assert "2 of 2 requests" in done.stdout
    lines = Path(f"{file}.output.jsonl").read_text().splitlines()
    assert {json.loads(text)["custom_id"] for text in lines} == {"a", "b"}
    assert not Path(f"{file}.errors.jsonl").exists()
    file.write_bytes(jsonl([line("a", model="none"), line("a")]))
    done = quantd("batch", file, "--socket", demo_server.socket)
    assert done.returncode == 1
    assert f"{file}:1: " in done.stderr and "none" in done.stderr
    file.write_text("nothing of the kind\n")
    done = quantd("batch", file, "--socket", demo_server.socket)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def half_done(client: openai.OpenAI) -> Any:
    """The newest batch, once it is the sixty lines of the test below and one is answered."""
    for batch in client.batches.list(limit=1).data:
        counts = batch.request_counts
        if batch.status == "in_progress" and counts.total == 60 and counts.completed:
            return batch
    return None


def test_ctrl_c_cancels_and_keeps_what_is_done(demo_server: Server, tmp_path: Path) -> None:
    file = tmp_path / "slow.jsonl"
    file.write_bytes(jsonl(slow_lines()))
    command = [sys.executable, "-m", "quantd.daemon", "batch", str(file)]
    command += ["--socket", str(demo_server.socket)]
    with (
        connect(demo_server) as client,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process,
    ):
        try:
            deadline = time.monotonic() + 240
            while not (batch := half_done(client)):
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.02)
            shown = quantd("ps", "--socket", demo_server.socket).stdout
            assert batch.id in shown and "of 60" in shown
            process.send_signal(signal.SIGINT)
            output, _ = process.communicate(timeout=240)
        finally:
            process.kill()
    assert process.returncode == 130 and output.startswith("cancelled: ")
    done = Path(f"{file}.output.jsonl").read_text().splitlines()
    rest = Path(f"{file}.errors.jsonl").read_text().splitlines()
    assert len(done) + len(rest) == 60
