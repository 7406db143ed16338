"""/v1/batches over a scripted engine: validation, results, cancel, expiry, resume."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from batch_fakes import CHAT, Time, at_work, contents, create, line, upload, wait
from server_fakes import Answer, FakeFleet, Served, serving, spoken

from quantd.daemon.config import StoreSettings
from quantd.daemon.errors import ContextLengthExceeded, QuantdError, QueueFull, Unavailable
from quantd.daemon.server.admin import batches
from quantd.daemon.server.auth import ApiKeys
from quantd.daemon.server.batches.input import MAX_ERRORS, read_input
from quantd.daemon.server.context import CONTEXT
from quantd.daemon.types import Request

# --- the whole way --------------------------------------------------------------------------------


async def test_from_upload_to_results(tmp_path: Path) -> None:
    async with at_work(tmp_path) as served:
        ids = ["a", "b", "ü-☃", "d"]
        batch = await create(served, [line(id) for id in ids], metadata={"for": "test"})
        assert batch["status"] == "validating"
        batch = await wait(served, batch)
        assert batch["status"] == "completed"
        assert batch["request_counts"] == {"total": 4, "completed": 4, "failed": 0}
        assert (batch["metadata"], batch["model"]) == ({"for": "test"}, "tiny")
        assert batch["error_file_id"] is None and batch["errors"] is None
        results = await contents(served, batch["output_file_id"])
        assert set(results) == set(ids)
        for result in results.values():
            assert result["error"] is None
            assert result["response"]["status_code"] == 200
            assert result["response"]["body"]["choices"][0]["message"]["content"] == "ok"
        tokens = sum(r["response"]["body"]["usage"]["prompt_tokens"] for r in results.values())
        assert batch["usage"]["input_tokens"] == tokens
        assert batch["usage"]["output_tokens"] == 4 * 3
        assert batch["usage"]["total_tokens"] == tokens + 12
        assert all(request.is_batch for request in served.engine.requests)
        _, file = await served.get(f"/v1/files/{batch['output_file_id']}")
        assert file["purpose"] == "batch_output"
        assert file["filename"] == f"{batch['id']}_output.jsonl"


async def test_text_completions(tmp_path: Path) -> None:
    async with at_work(tmp_path) as served:
        url = "/v1/completions"
        body = {"model": "tiny", "prompt": "x", "max_tokens": 4}
        lines = [{"custom_id": "a", "method": "POST", "url": url, "body": body}]
        batch = await wait(served, await create(served, lines, endpoint=url))
        results = await contents(served, batch["output_file_id"])
        assert results["a"]["response"]["body"]["object"] == "text_completion"


async def test_a_line_that_fails_is_in_the_error_file_alone(tmp_path: Path) -> None:
    async with at_work(tmp_path) as served:
        served.engine.refuse = lambda request: (
            ContextLengthExceeded("too long") if len(request.prompt) > 500 else None
        )
        lines = [line("good"), line("bad", temperature=9), line("long", content="x" * 600)]
        batch = await wait(served, await create(served, lines))
        assert batch["status"] == "completed"
        assert batch["request_counts"] == {"total": 3, "completed": 1, "failed": 2}
        assert set(await contents(served, batch["output_file_id"])) == {"good"}
        errors = await contents(served, batch["error_file_id"])
        assert set(errors) == {"bad", "long"}
        assert errors["bad"]["response"]["status_code"] == 400
        assert errors["bad"]["response"]["body"]["error"]["param"] == "temperature"
        code = errors["long"]["response"]["body"]["error"]["code"]
        assert code == "context_length_exceeded"


async def test_a_result_is_one_line_to_everybody(tmp_path: Path) -> None:
    async with at_work(tmp_path) as served:
        served.engine.answer = lambda request: spoken("a\u2028b\u0085", "stop")
        batch = await wait(served, await create(served, [line("\u2029")]))
        [(id, found)] = (await contents(served, batch["output_file_id"])).items()
        assert id == "\u2029"
        message = found["response"]["body"]["choices"][0]["message"]
        assert message["content"] == "a\u2028b\u0085"


async def test_a_bug_of_ours_is_an_error_of_its_line(tmp_path: Path) -> None:
    def play(request: Request) -> Answer:
        raise ZeroDivisionError

    async with at_work(tmp_path) as served:
        served.engine.answer = play
        batch = await wait(served, await create(served, [line("a")]))
        error = (await contents(served, batch["error_file_id"]))["a"]["response"]
        assert error["status_code"] == 500
        assert "ZeroDivision" not in json.dumps(error)


async def test_a_model_that_is_away_for_a_while_is_waited_for(tmp_path: Path) -> None:
    time = Time()
    refusals: list[QuantdError] = [
        Unavailable("the worker has died", retry_after=3.0),
        QueueFull("full", retry_after=1.0),
    ]
    async with at_work(tmp_path, time) as served:
        served.engine.refuse = lambda request: refusals.pop() if refusals else None
        batch = await wait(served, await create(served, [line("a")]))
        assert batch["request_counts"]["completed"] == 1
        assert [seconds for seconds in time.slept if seconds < 60] == [1.0, 3.0]


async def test_a_model_that_stays_away_is_an_error(tmp_path: Path) -> None:
    async with at_work(tmp_path) as served:
        served.engine.refuse = lambda request: Unavailable("the worker has died")
        batch = await wait(served, await create(served, [line("a")]))
        errors = await contents(served, batch["error_file_id"])
        assert errors["a"]["response"]["status_code"] == 503
        assert errors["a"]["response"]["body"]["error"]["code"] == "unavailable"


async def test_so_many_lines_run_at_once_and_no_more(tmp_path: Path) -> None:
    fleet = FakeFleet()
    fleet.engine.answer = lambda request: None
    async with at_work(tmp_path, fleet=fleet, batch_lines=3) as served:
        batches = [
            await create(served, [line(f"{each}-{number}") for number in range(5)])
            for each in range(2)
        ]
        ended = 0
        while ended < 10:
            running = [s for s in served.engine.streams if not s.is_finished]
            assert len(running) <= 3
            if len(running) == min(3, 10 - ended):
                running[0].push((111,))
                running[0].finish("length")
                ended += 1
            await asyncio.sleep(0.001)
        for batch in batches:
            assert (await wait(served, batch))["request_counts"]["completed"] == 5


# --- validation -----------------------------------------------------------------------------------


async def failed(served: Served, lines: list[Any] | bytes) -> list[dict[str, Any]]:
    batch = await wait(served, await create(served, lines))
    assert batch["status"] == "failed" and batch["failed_at"]
    assert batch["errors"]["object"] == "list"
    assert served.engine.requests == [], "all or nothing"
    assert batch["output_file_id"] is None and batch["error_file_id"] is None
    errors: list[dict[str, Any]] = batch["errors"]["data"]
    return errors


@pytest.mark.parametrize(
    ("wrong", "code", "param"),
    [
        (b"{not json}", "invalid_json_line", None),
        (b"[]", "invalid_request", None),
        (b"\xff\xfe{}", "invalid_json_line", None),
        (b'{"custom_id": "x"}', "invalid_request", "method"),
        (json.dumps(line("x") | {"custom_id": 5}).encode(), "invalid_request", "custom_id"),
        (json.dumps(line("")).encode(), "invalid_custom_id", "custom_id"),
        (json.dumps(line("good")).encode(), "duplicate_custom_id", "custom_id"),
        (json.dumps(line("x") | {"method": "GET"}).encode(), "invalid_method", "method"),
        (json.dumps(line("x") | {"url": "/v1/completions"}).encode(), "invalid_url", "url"),
        (json.dumps(line("x", stream=True)).encode(), "invalid_request", "body.stream"),
        (json.dumps(line("x", model="none")).encode(), "model_not_found", "body.model"),
        (json.dumps(line("x") | {"body": 1}).encode(), "invalid_request", "body"),
        (json.dumps(line("x") | {"body": {}}).encode(), "invalid_request", "body.model"),
    ],
)
async def test_a_wrong_line_is_named(
    tmp_path: Path, wrong: bytes, code: str, param: str | None
) -> None:
    good = json.dumps(line("good")).encode()
    async with at_work(tmp_path) as served:
        errors = await failed(served, good + b"\n\n" + wrong + b"\n")
        assert [(e["code"], e["param"], e["line"]) for e in errors] == [(code, param, 3)]
        assert errors[0]["message"]


async def test_an_empty_file(tmp_path: Path) -> None:
    async with at_work(tmp_path) as served:
        assert [e["code"] for e in await failed(served, b"\n \n")] == ["empty_file"]


async def test_the_first_errors_are_listed_and_all_are_counted(tmp_path: Path) -> None:
    async with at_work(tmp_path) as served:
        errors = await failed(served, b"{\n" * 250)
        assert len(errors) == MAX_ERRORS + 1
        assert "250 lines" in errors[-1]["message"]


async def test_blank_lines_a_bom_and_line_ends_are_fine(tmp_path: Path) -> None:
    texts = [json.dumps(line(id), ensure_ascii=False).encode() for id in ("é", "日本")]
    data = b"\xef\xbb\xbf" + texts[0] + b"\r\n\r\n   \n" + texts[1]  # no end of the last line
    async with at_work(tmp_path) as served:
        batch = await wait(served, await create(served, data))
        assert set(await contents(served, batch["output_file_id"])) == {"é", "日本"}


def test_a_line_over_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "in"
    good = json.dumps(line("a")).encode()
    path.write_bytes(good + b"\n" + b"x" * 5000 + b"\n" + json.dumps(line("b")).encode() + b"\n")
    found = read_input(path, CHAT, lambda model: model, 1000)
    assert [(error.code, error.line) for error in found.errors] == [("line_too_long", 2)]
    assert [each.number for each in found.lines] == [1, 3]
    data = path.read_bytes()
    for each in found.lines:
        assert json.loads(data[each.start : each.start + each.length])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"endpoint": "/v1/moderations"}, "endpoint"),
        ({"completion_window": "a day"}, "completion_window"),
        ({"completion_window": "8d"}, "completion_window"),
        ({"metadata": {"k": "v" * 513}}, "metadata"),
        ({"metadata": {str(k): "v" for k in range(17)}}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at"}}, "output_expires_after.seconds"),
        (
            {"output_expires_after": {"anchor": "x", "seconds": 3600}},
            "output_expires_after.anchor",
        ),
        ({"input_file_id": 7}, "input_file_id"),
    ],
)
async def test_a_wrong_field_is_named(tmp_path: Path, fields: dict[str, Any], param: str) -> None:
    async with at_work(tmp_path) as served:
        body = {
            "input_file_id": await upload(served, [line()]),
            "endpoint": CHAT,
            "completion_window": "24h",
        }
        assert (await served.error("/v1/batches", body | fields))["param"] == param


async def test_an_input_file_must_be_there(tmp_path: Path) -> None:
    async with at_work(tmp_path) as served:
        body = {"input_file_id": "file-x", "endpoint": CHAT, "completion_window": "24h"}
        status, reply = await served.post("/v1/batches", body)
        assert (status, reply["error"]["param"]) == (404, "input_file_id")


# --- how it ends ----------------------------------------------------------------------------------


async def half_done(served: Served, num_done: int, num_lines: int, **fields: Any) -> dict[str, Any]:
    """A batch of which so many lines are done, and the rest does not get on."""
    served.engine.answer = lambda request: (
        spoken("ok", "stop") if len(served.engine.requests) <= num_done else None
    )
    batch = await create(served, [line(f"id-{n}") for n in range(num_lines)], **fields)

    def is_done(batch: dict[str, Any]) -> bool:
        return bool(batch["request_counts"]["completed"] == num_done)

    return await wait(served, batch, "in_progress", condition=is_done)


async def test_cancel_keeps_what_is_done(tmp_path: Path) -> None:
    async with at_work(tmp_path, batch_lines=2) as served:
        batch = await half_done(served, 3, 10)
        status, batch = await served.post(f"/v1/batches/{batch['id']}/cancel", {})
        assert (status, batch["status"]) == (200, "cancelling")
        batch = await wait(served, batch)
        assert batch["status"] == "cancelled" and batch["cancelled_at"]
        assert batch["request_counts"] == {"total": 10, "completed": 3, "failed": 7}
        done = await contents(served, batch["output_file_id"])
        rest = await contents(served, batch["error_file_id"])
        assert len(done) == 3 and len(rest) == 7 and not set(done) & set(rest)
        assert {each["error"]["code"] for each in rest.values()} == {"batch_cancelled"}
        assert all(stream.is_finished for stream in served.engine.streams)
        assert served.fleet.num_leases == 0
        status, _ = await served.post(f"/v1/batches/{batch['id']}/cancel", {})
        assert status == 200  # it is what was asked for


async def test_what_has_ended_cannot_be_cancelled(tmp_path: Path) -> None:
    async with at_work(tmp_path) as served:
        batch = await wait(served, await create(served, [line()]))
        status, reply = await served.post(f"/v1/batches/{batch['id']}/cancel", {})
        assert (status, reply["error"]["code"]) == (409, "conflict")


async def test_when_its_time_is_over_there_is_a_part(tmp_path: Path) -> None:
    time = Time()
    async with at_work(tmp_path, time, batch_lines=2) as served:
        batch = await half_done(served, 3, 8, completion_window="2h")
        assert batch["expires_at"] == batch["created_at"] + 7200
        time.move(7200)
        batch = await wait(served, batch)
        assert batch["status"] == "expired" and batch["expired_at"]
        assert batch["request_counts"] == {"total": 8, "completed": 3, "failed": 5}
        assert len(await contents(served, batch["output_file_id"])) == 3
        rest = await contents(served, batch["error_file_id"])
        assert {each["error"]["code"] for each in rest.values()} == {"batch_expired"}


async def test_a_restart_goes_on_where_it_was(tmp_path: Path) -> None:
    async with at_work(tmp_path, batch_lines=2) as served:
        batch = await half_done(served, 3, 9)
    fleet = FakeFleet()
    async with at_work(tmp_path, fleet=fleet) as served:
        batch = await wait(served, batch)
        assert batch["request_counts"] == {"total": 9, "completed": 9, "failed": 0}
        assert len(await contents(served, batch["output_file_id"])) == 9
        assert len(fleet.engine.requests) == 6


@pytest.mark.parametrize("status", ["validating", "cancelling", "finalizing"])
async def test_a_restart_in_any_state(tmp_path: Path, status: str) -> None:
    async with at_work(tmp_path, batch_lines=2) as served:
        batch = await half_done(served, 3, 5)
        await served.state.stop()
        await served.state.store.database.run(
            lambda db: db.execute(
                "UPDATE batches SET status = ?, outcome = ?",
                (status, "completed" if status == "finalizing" else None),
            )
        )
        if status == "validating":  # before any line was read
            await served.state.store.database.run(lambda db: db.execute("DELETE FROM lines"))
            await served.state.store.database.run(
                lambda db: db.execute("UPDATE batches SET completed = 0, total = 0")
            )
        if status == "finalizing":
            await served.state.store.database.run(
                lambda db: db.execute("DELETE FROM lines WHERE has_failed IS NULL")
            )
            await served.state.store.database.run(
                lambda db: db.execute("UPDATE batches SET total = 3")
            )
    async with at_work(tmp_path) as served:
        batch = await wait(served, batch)
        counts = batch["request_counts"]
        assert counts["completed"] + counts["failed"] == counts["total"]
        done = await contents(served, batch["output_file_id"])
        rest = await contents(served, batch["error_file_id"])
        assert (len(done), len(rest)) == (counts["completed"], counts["failed"])
        assert batch["status"] == ("cancelled" if status == "cancelling" else "completed")


async def test_a_store_that_fails_holds_a_batch_up_and_loses_nothing(tmp_path: Path) -> None:
    time = Time()
    async with at_work(tmp_path, time) as served:
        batches = served.state.store.batches
        record, failures = batches.record, [OSError("no space"), OSError("no space")]

        async def failing(*args: Any) -> None:
            if failures:
                raise failures.pop()
            await record(*args)

        batches.record = failing  # type: ignore[method-assign]
        batch = await wait(served, await create(served, [line(f"{n}") for n in range(4)]))
        assert batch["request_counts"] == {"total": 4, "completed": 4, "failed": 0}
        assert 30.0 in time.slept


# --- owners and lists -----------------------------------------------------------------------------


async def test_a_key_sees_its_own_only(tmp_path: Path) -> None:
    keys = ApiKeys([("alice", "key-a"), ("bob", "key-b")])
    settings = StoreSettings(path=tmp_path)
    async with serving(store=settings, keys=keys) as served:
        alice = {"headers": {"Authorization": "Bearer key-a"}}
        bob = {"headers": {"Authorization": "Bearer key-b"}}
        file = await upload(served, [line()], "key-a")
        body = {"input_file_id": file, "endpoint": CHAT, "completion_window": "24h"}
        assert (await served.post("/v1/batches", body, **bob))[0] == 404
        status, batch = await served.post("/v1/batches", body, **alice)
        assert status == 200
        assert (await served.get(f"/v1/batches/{batch['id']}", **bob))[0] == 404
        assert (await served.post(f"/v1/batches/{batch['id']}/cancel", {}, **bob))[0] == 404
        assert (await served.get("/v1/batches", **bob))[1]["data"] == []
        while batch["status"] != "completed":
            _, batch = await served.get(f"/v1/batches/{batch['id']}", **alice)
        assert (await served.get(f"/v1/files/{batch['output_file_id']}", **bob))[0] == 404
        assert {request.caller for request in served.engine.requests} == {"alice"}


async def test_the_administrator_sees_everybodys(tmp_path: Path) -> None:
    async with at_work(tmp_path) as served:
        request = SimpleNamespace(
            app={CONTEXT: SimpleNamespace(state=served.state, fleet=served.fleet)}
        )
        assert json.loads((await batches(request)).body) == {"batches": []}  # type: ignore
        assert not served.state.store.exists(), "looking opens nothing"
        batch = await half_done(served, 1, 4)
        [shown] = json.loads((await batches(request)).body)["batches"]  # type: ignore
        assert shown == {
            "id": batch["id"],
            "caller": "",
            "status": "in_progress",
            "model": "tiny",
            "endpoint": CHAT,
            "total": 4,
            "completed": 1,
            "failed": 0,
        }


async def test_lists_have_the_newest_first(tmp_path: Path) -> None:
    async with at_work(tmp_path) as served:
        made = [await create(served, [line()]) for _ in range(3)]
        ids = [batch["id"] for batch in made][::-1]
        _, page = await served.get("/v1/batches?limit=2")
        assert [batch["id"] for batch in page["data"]] == ids[:2]
        assert page["has_more"]
        _, page = await served.get(f"/v1/batches?limit=2&after={ids[1]}")
        assert [batch["id"] for batch in page["data"]] == ids[2:]
        for batch in made:
            await wait(served, batch)
