"""`quantd run`: one answer, or a chat."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from quantd.daemon.cli import client
from quantd.daemon.cli.client import ClientError, Target
from quantd.daemon.cli.screen import Spinner
from quantd.daemon.cli.temporary import temporary_daemon
from quantd.daemon.config.rules import embedded_models
from quantd.daemon.errors import ConfigError

Message = dict[str, str]
_HELP = """\
/help   this
/clear  begin anew, without what was said
/bye    leave (also Ctrl-D)
Ctrl-C stops an answer."""


def run(arguments: argparse.Namespace) -> int:
    piped = "" if sys.stdin.isatty() else sys.stdin.read()
    with contextlib.ExitStack() as stack:
        daemon, model, prompt = _find(arguments, stack)
        if prompt is None and not piped and not sys.stdin.isatty():
            raise ConfigError("there is no prompt: the input is empty")
        chat = Chat(daemon, model, arguments)
        if prompt is not None or piped:
            chat.ask("\n\n".join(part for part in (prompt, piped.rstrip("\n")) if part))
            return 0
        return _converse(chat, model)


def _find(
    arguments: argparse.Namespace, stack: contextlib.ExitStack
) -> tuple[Target, str, str | None]:
    """The daemon, the model's name there, and the prompt if the command line has one.

    A running daemon is used if it has the model; else one is started, which `stack` ends.
    """
    daemon = client.find_if_any(arguments)
    known: dict[str, str] = {} if daemon is None else _known_models(daemon)
    model, prompt = _model_and_prompt(arguments.model, arguments.prompt, {*known})
    if daemon is not None:
        if model is None and known:
            return daemon, next(iter(known.values())), prompt
        if model in known:
            return daemon, known[model], prompt
    daemon = stack.enter_context(temporary_daemon(model, arguments.config))
    return daemon, next(iter(_known_models(daemon).values())), prompt


def _known_models(daemon: Target) -> dict[str, str]:
    """Name or alias → name, in the daemon's order."""
    known: dict[str, str] = {}
    for model in daemon.get("/v1/models")["data"]:
        known.update(dict.fromkeys([model["id"], *model.get("aliases", ())], model["id"]))
    return known


def _model_and_prompt(
    first: str | None, second: str | None, known: set[str]
) -> tuple[str | None, str | None]:
    """What `quantd run [MODEL] [PROMPT]` means: a single argument with a space in it is a prompt,
    unless a model is called so; one without must be a model, lest a mistyped name be answered."""
    if first is None or second is not None or first in known or first in embedded_models():
        return first, second
    if any(character.isspace() for character in first):
        return None, first
    return first, None


class Chat:
    """A conversation with one model. Only complete answers enter its history."""

    def __init__(self, daemon: Target, model: str, arguments: argparse.Namespace) -> None:
        self._daemon = daemon
        self._model = model
        self._options = {
            key: value
            for key in ("max_tokens", "temperature", "seed")
            if (value := getattr(arguments, key)) is not None
        }
        self._system = arguments.system
        self.clear()

    def clear(self) -> None:
        """Forgets all but the system message."""
        self._history: list[Message] = []
        if self._system is not None:
            self._history.append({"role": "system", "content": self._system})

    def ask(self, text: str) -> None:
        """Streams the answer to stdout, and the reasoning before it to a terminal on stderr.
        Raises ClientError; KeyboardInterrupt stops the answer."""
        messages = [*self._history, {"role": "user", "content": text}]
        body = {"model": self._model, "messages": messages, "stream": True, **self._options}
        answer, thought = "", False
        with contextlib.closing(self._daemon.stream("/v1/chat/completions", body)) as events:
            for delta in _show_first(events, f"waiting for {self._model}"):
                if (reasoning := delta.get("reasoning")) and sys.stderr.isatty():
                    thought = True
                    print(reasoning, end="", file=sys.stderr, flush=True)
                if part := delta.get("content"):
                    if thought and not answer:
                        print("\n", file=sys.stderr, flush=True)
                    answer += part
                    print(part, end="", flush=True)
        print()
        self._history = [*messages, {"role": "assistant", "content": answer}]


def _show_first(events: Iterator[dict[str, Any]], waiting: str) -> Iterator[dict[str, Any]]:
    """The deltas that say something; a spinner turns until the first."""
    with Spinner(waiting) as spinner:
        for event in events:
            for choice in event["choices"]:
                if any(choice["delta"].get(kind) for kind in ("content", "reasoning")):
                    spinner.stop()
                    yield choice["delta"]


def _converse(chat: Chat, model: str) -> int:
    import readline  # noqa: F401  gives input() its line editing and history

    print(f"{model}; /help for help")
    while True:
        try:
            text = input(">>> ").strip()
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            print("\nCtrl-D or /bye to leave")
            continue
        if text == "/bye":
            return 0
        if text == "/clear":
            chat.clear()
        elif text == "/help":
            print(_HELP)
        elif text.startswith("/"):
            print(f"there is no command {text.split()[0]}; /help shows them")
        elif text:
            _answer(chat, text)


def _answer(chat: Chat, text: str) -> None:
    try:
        chat.ask(text)
    except KeyboardInterrupt:
        print("\n(stopped)")
    except ClientError as error:
        print(f"quantd: {error}", file=sys.stderr)
