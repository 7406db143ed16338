"""/docs in a real browser, which asks nobody but the daemon."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
from harness import Daemon
from playwright.sync_api import ConsoleMessage, Page, expect, sync_playwright

_PATIENCE = 120_000
"""Milliseconds, for a machine that is busy."""
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"),
    pytest.mark.xdist_group("openapi"),
]


@pytest.fixture
def page(demo: Daemon) -> Iterator[Page]:
    """Opened and read; nothing went wrong in it, and nobody else was asked for anything."""
    wrong: list[str] = []
    asked: list[str] = []

    def hear(message: ConsoleMessage) -> None:
        refused = "the server responded with a status of 4" in message.text
        if message.type in ("error", "warning") and not refused:
            wrong.append(message.text)

    expect.set_options(timeout=_PATIENCE)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"], timeout=_PATIENCE
        )
        page = browser.new_page()
        page.set_default_timeout(_PATIENCE)
        page.on("console", hear)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"{demo.url}/docs")
        expect(page.get_by_role("status").first).to_contain_text("operations")
        yield page
        browser.close()
    assert wrong == []
    assert asked and all(url.startswith((demo.url, "data:")) for url in asked)


def test_an_operation_is_shown_and_tried(page: Page) -> None:
    chat = page.locator("#post_v1_chat_completions")
    chat.locator("summary").first.click()
    row = chat.locator("tr", has=page.get_by_text("temperature", exact=True))
    expect(row).to_contain_text("≥ 0, ≤ 2")
    expect(chat.locator("pre").first).to_contain_text("curl -N -X POST 'http://127.0.0.1")
    chat.get_by_role("button", name="Send").click()
    expect(chat.get_by_role("region")).to_contain_text("finish_reason")
    chat.get_by_label("Body").fill('{"messages": []}')
    chat.get_by_role("button", name="Send").click()
    expect(chat.get_by_role("region")).to_contain_text("at least 1 message")
    expect(chat.locator("pre").first).to_contain_text("'{\"messages\": []}'")


def test_a_stream_and_a_parameter(page: Page) -> None:
    text = page.locator("#post_v1_completions")
    text.locator("summary").first.click()
    text.get_by_label("Body").fill('{"prompt": "one", "max_tokens": 4, "stream": true}')
    text.get_by_role("button", name="Send").click()
    expect(text.get_by_role("region")).to_contain_text("[DONE]")
    model = page.locator("#get_v1_models_model")
    model.locator("summary").first.click()
    model.get_by_label("model (required)").fill("no/such model")
    expect(model.locator("pre").first).to_contain_text("/v1/models/no%2Fsuch%20model")
    model.get_by_role("button", name="Send").click()
    expect(model.get_by_role("region")).to_contain_text("model_not_found")


def test_fields_are_found_and_keys_are_enough(page: Page) -> None:
    page.get_by_label("Show operations and fields").fill("encoding_format")
    expect(page.locator("details.operation:visible")).to_have_count(1)
    page.get_by_label("Show operations and fields").fill("")
    summary = page.locator("#get_health summary").first
    summary.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#get_health summary")).to_have_count(3)
    page.keyboard.press("Tab")
    expect(page.locator("#get_health summary").nth(1)).to_be_focused()
