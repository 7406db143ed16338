"""Webhooks: the SDK's own check accepts them; what is not taken comes again; where they may go."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from time import time as wall
from typing import Any

import openai
import pytest
from aiohttp import web
from batch_fakes import Time, at_work, create, line, wait

from quantd.daemon.config import WebhookSettings, load
from quantd.daemon.config.settings import WEBHOOK_EVENTS
from quantd.daemon.errors import ConfigError
from quantd.daemon.server.webhooks import DELAYS, MAX_AGE, check_address, read_secret

SECRET = "whsec_" + base64.b64encode(bytes(range(24))).decode()


class Receiver:
    """Takes events; answers as it is told, then with 200."""

    def __init__(self) -> None:
        self.answers: list[int] = []
        self.seen: list[tuple[dict[str, str], bytes]] = []
        self.port = 0

    async def take(self, request: web.Request) -> web.Response:
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.seen.append((headers, await request.read()))
        status = self.answers.pop(0) if self.answers else 200
        if status == 0:
            assert request.transport is not None
            request.transport.abort()
        headers = {"Location": "/elsewhere"} if status in (301, 302, 307) else {}
        return web.Response(status=status or 200, headers=headers)

    def ids(self) -> list[str]:
        return [headers["webhook-id"] for headers, _ in self.seen]


@asynccontextmanager
async def receiving() -> AsyncIterator[Receiver]:
    receiver = Receiver()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", receiver.take)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    receiver.port = runner.addresses[0][1]
    yield receiver
    await runner.cleanup()


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as receiver:
        yield receiver


def settings(folder: Path, receiver: Receiver, **fields: Any) -> WebhookSettings:
    (folder / "secret").write_text(SECRET + "\n")
    return WebhookSettings(
        **{
            "url": f"http://127.0.0.1:{receiver.port}/hook",
            "secret_file": folder / "secret",
            "allow_private": True,
        }
        | fields
    )


async def until(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0.002)


async def test_the_sdk_accepts_the_event(tmp_path: Path, receiver: Receiver) -> None:
    hooks = settings(tmp_path, receiver)
    time = Time()
    time.now = wall()  # the SDK looks at its own clock
    async with at_work(tmp_path, time, webhooks=hooks) as served:
        batch = await wait(served, await create(served, [line()]))
        await until(lambda: receiver.seen)
    headers, body = receiver.seen[0]
    client = openai.OpenAI(api_key="none", webhook_secret=SECRET)
    event = client.webhooks.unwrap(body, headers)
    assert event.type == "batch.completed"
    assert event.data.id == batch["id"]
    assert event.object == "event" and event.id == headers["webhook-id"]
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.unwrap(body + b" ", headers)
    client.close()


@pytest.mark.parametrize("kind", ["failed", "cancelled"])
async def test_other_ends(tmp_path: Path, receiver: Receiver, kind: str) -> None:
    async with at_work(tmp_path, webhooks=settings(tmp_path, receiver)) as served:
        if kind == "failed":
            batch = await create(served, b"{")
        else:
            served.engine.answer = lambda request: None
            batch = await create(served, [line()])
            await served.post(f"/v1/batches/{batch['id']}/cancel", {})
        assert (await wait(served, batch))["status"] == kind
        await until(lambda: receiver.seen)
        assert f"batch.{kind}" in receiver.seen[0][1].decode()


async def test_what_is_not_taken_comes_again_as_the_same_event(
    tmp_path: Path, receiver: Receiver
) -> None:
    receiver.answers = [500, 302, 0, 404]
    time = Time()
    async with at_work(tmp_path, time, webhooks=settings(tmp_path, receiver)) as served:
        await wait(served, await create(served, [line()]))
        while len(receiver.seen) < 5:
            time.move(60)
            await asyncio.sleep(0.005)
        while await served.state.store.outbox.all():
            await asyncio.sleep(0.002)
    assert len(set(receiver.ids())) == 1
    assert len({body for _, body in receiver.seen}) == 1
    assert [seconds for seconds in time.slept if seconds in DELAYS] == list(DELAYS[:4])


async def test_it_is_given_up_after_three_days(tmp_path: Path, receiver: Receiver) -> None:
    receiver.answers = [500] * 1000
    time = Time()
    async with at_work(tmp_path, time, webhooks=settings(tmp_path, receiver)) as served:
        await wait(served, await create(served, [line()]))
        await until(lambda: receiver.seen)
        while await served.state.store.outbox.all():
            time.move(3600)
            await asyncio.sleep(0.005)
    assert time.now - 1_700_000_000 > MAX_AGE


async def test_an_event_survives_a_restart(tmp_path: Path, receiver: Receiver) -> None:
    receiver.answers = [500] * 3
    hooks = settings(tmp_path, receiver)
    time = Time()
    async with at_work(tmp_path, time, webhooks=hooks) as served:
        await wait(served, await create(served, [line()]))
        await until(lambda: DELAYS[2] in time.slept)  # the first delay that does not end at once
        assert len(receiver.seen) == 3
        await served.state.stop()
        assert await served.state.store.outbox.all()
    async with at_work(tmp_path, webhooks=hooks) as served:
        await until(lambda: len(receiver.seen) == 4)
        while await served.state.store.outbox.all():
            await asyncio.sleep(0.002)
    assert len(set(receiver.ids())) == 1 and len(receiver.seen) == 4


async def test_only_what_was_asked_for(tmp_path: Path, receiver: Receiver) -> None:
    hooks = settings(tmp_path, receiver, events=("batch.failed",))
    async with at_work(tmp_path, webhooks=hooks) as served:
        await wait(served, await create(served, [line()]))
        await wait(served, await create(served, b"{"))
        await until(lambda: receiver.seen)
    assert [b"batch.failed" in body for _, body in receiver.seen] == [True]


# --- where they may go ----------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "127.1", "2130706433"])
async def test_this_machine_is_out_of_reach(
    tmp_path: Path, receiver: Receiver, host: str, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"http://{host}:{receiver.port}/"
    hooks = settings(tmp_path, receiver, url=url, allow_private=False)
    async with at_work(tmp_path, webhooks=hooks) as served:
        await wait(served, await create(served, [line()]))
        await until(lambda: "was not taken" in capsys.readouterr().out)
    assert receiver.seen == []


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "0.0.0.0",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "224.0.0.1",
        "::1",
        "::",
        "fe80::1%eth0",
        "fc00::1",
        "::ffff:127.0.0.1",
        "2002:7f00:1::",
        "ff02::1",
    ],
)
def test_addresses_that_are_not_public(address: str) -> None:
    with pytest.raises(OSError, match="not a public address"):
        check_address(address)


@pytest.mark.parametrize("address", ["1.1.1.1", "2606:4700::1111", "::ffff:1.1.1.1"])
def test_addresses_that_are(address: str) -> None:
    check_address(address)


# --- the configuration ----------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "whsec_", "whsec_!!!", "whsec_" + "QUJD"])
def test_what_is_not_a_secret(tmp_path: Path, text: str) -> None:
    (tmp_path / "secret").write_text(text)
    with pytest.raises(ConfigError, match="secret_file"):
        read_secret(tmp_path / "secret")
    with pytest.raises(ConfigError, match="secret_file"):
        read_secret(tmp_path / "none")


def test_a_url_needs_a_secret(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text('[webhooks]\nurl = "https://example.com/x"\n')
    with pytest.raises(ConfigError, match=r"c\.toml:2: webhooks\.url .* needs"):
        load(tmp_path / "c.toml")


def test_every_event_is_one_of_openais() -> None:
    from openai.types.webhooks import unwrap_webhook_event

    known = str(unwrap_webhook_event.UnwrapWebhookEvent)
    for event in WEBHOOK_EVENTS:
        kind, _, what = event.partition(".")
        assert f"{kind}_{what}_webhook_event" in known
