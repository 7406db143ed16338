"""The tree of commands and flags; the settings' flags come from the settings' own rules."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from typing import Any, NoReturn

from quantd.daemon.config.load import SECTIONS, flag, meanings, rules
from quantd.daemon.config.rules import OneOf, Rule
from quantd.daemon.config.settings import ModelSettings

PROGRAM = "quantd"
_NOT_FLAGS = ("name", "path")


class Parser(argparse.ArgumentParser):
    """An error is one line; how it is called is what --help is for."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def new_parser() -> Parser:
    parser = Parser(PROGRAM, description="Serves large language models from this machine.")
    parser.add_argument("--version", action=_Version, help="show the version")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_serve(commands)
    _add_run(commands)
    _add_talking(commands)
    _add_batch(commands)
    _add_inspect(commands)
    _add_eval(commands)
    _add_bench(commands)
    _add_check(commands)
    _add_check_config(commands)
    _add_install_service(commands)
    completion = _add(commands, "completion", "completion", "print a shell's completion script")
    completion.add_argument("shell", choices=("bash", "zsh", "fish"))
    return parser


def settings_flags(arguments: argparse.Namespace) -> dict[str, str]:
    """The given flags that are settings: "server.port" → text."""
    return _given(arguments, "set ", SECTIONS)


def model_flags(arguments: argparse.Namespace) -> dict[str, str]:
    """The given flags that are a model's settings: "dtype" → text."""
    given = _given(arguments, "set ", {"models": ModelSettings})
    return {key.removeprefix("models."): text for key, text in given.items()}


def _given(
    arguments: argparse.Namespace, prefix: str, structs: Mapping[str, type[Any]]
) -> dict[str, str]:
    keys = (f"{section}.{name}" for section, struct in structs.items() for name in rules(struct))
    values = ((key, getattr(arguments, prefix + key, None)) for key in keys)
    return {key: text for key, text in values if text is not None}


def _add_serve(commands: Any) -> None:
    serve = _add(commands, "serve", "serve", "run the daemon")
    serve.description = (
        "Serves the named models; without any the configured ones, and without these the demo."
    )
    serve.add_argument(
        "models",
        metavar="MODEL",
        nargs="*",
        help="a configured model, a checkpoint's path, NAME=PATH, or demo",
    )
    _add_config(serve)
    for section, struct in SECTIONS.items():
        _add_settings(serve.add_argument_group(section), section, struct)
    group = serve.add_argument_group("models named on the command line")
    _add_settings(group, "models", ModelSettings)


def _add_run(commands: Any) -> None:
    run = _add(commands, "run", "run", "ask a model, or chat with it")
    run.description = (
        "Asks a running daemon, or one that is started for this call. Without a prompt it chats; "
        "what is piped in becomes part of the prompt."
    )
    run.add_argument("model", metavar="MODEL", nargs="?", help="default: the daemon's first")
    run.add_argument("prompt", metavar="PROMPT", nargs="?", help="quote it")
    run.add_argument("--system", metavar="TEXT", help="the system message")
    run.add_argument("--max-tokens", metavar="N", type=int, help="longest answer")
    run.add_argument("--temperature", metavar="X", type=float, help="0 is greedy")
    run.add_argument("--seed", metavar="N", type=int, help="for an answer that can be repeated")
    _add_target(run)


def _add_talking(commands: Any) -> None:
    ps = _add(commands, "ps", "ps", "show the models, their state and their requests")
    ps.add_argument("--json", action="store_true", help="as JSON")
    _add_target(ps)
    top = _add(commands, "top", "top", "watch requests, memory and speed")
    top.add_argument("--model", metavar="MODEL", help="only this one")
    top.add_argument("--interval", metavar="SECONDS", type=_interval, default=1.0, help="1")
    top.add_argument("--once", action="store_true", help="show it once and end")
    top.add_argument("--json", action="store_true", help="with --once: as JSON")
    _add_target(top)
    load = _add(commands, "load", "models", "load a model and wait until it is ready")
    load.add_argument("model", metavar="MODEL")
    load.set_defaults(action="load")
    _add_target(load)
    unload = _add(commands, "unload", "models", "give a model's memory back")
    unload.add_argument("model", metavar="MODEL")
    unload.set_defaults(action="unload")
    _add_target(unload)
    reload = _add(commands, "reload", "models", "have the daemon read its configuration again")
    reload.set_defaults(action="reload", model=None)
    _add_target(reload)


def _add_batch(commands: Any) -> None:
    batch = _add(commands, "batch", "batch", "run a file of requests and wait for the results")
    batch.description = (
        "Runs a JSONL file of OpenAI's batch form and writes FILE.output.jsonl and, if requests "
        "failed, FILE.errors.jsonl beside it. Ctrl-C cancels the batch and writes what is there."
    )
    batch.add_argument("file", metavar="FILE", help='lines of "custom_id", "method", "url", "body"')
    batch.add_argument("--output", metavar="PATH", help="instead of FILE.output.jsonl")
    batch.add_argument("--errors", metavar="PATH", help="instead of FILE.errors.jsonl")
    batch.add_argument("--window", metavar="TIME", default="24h", help="most time for it; 24h")
    batch.add_argument("--detach", action="store_true", help="print the batch's id and do not wait")
    _add_target(batch)


def _interval(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0.1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r}, must be seconds from 0.1 to 3600")
    return seconds


def _add_inspect(commands: Any) -> None:
    inspect = _add(commands, "inspect", "inspect", "show what a checkpoint is, from its headers")
    inspect.description = (
        "Shows what a checkpoint is, which quantizer would take each layer and why, and the memory "
        "that it needs. Nothing is loaded. The status is 1 for one that would be refused."
    )
    inspect.add_argument("path", metavar="PATH", help="a checkpoint: folder, .gguf, or demo")
    inspect.add_argument("--layers", action="store_true", help="list each layer")
    inspect.add_argument("--json", action="store_true", help="as JSON")
    _add_some(inspect, ("dtype", "quantization", "device"))


def _add_eval(commands: Any) -> None:
    command = _add(commands, "eval", "eval", "measure one checkpoint or format against another")
    command.description = (
        "Runs two models over one text: perplexity of both, and how far B's next-token "
        "distributions are from A's."
    )
    command.add_argument("a", metavar="A", help="a checkpoint: folder, .gguf, or demo")
    command.add_argument("b", metavar="B", help="the same, or the same with --quantization-b")
    command.add_argument("--text", metavar="FILE", required=True, help="the text, in UTF-8")
    command.add_argument("--context", metavar="N", type=int, help="tokens in a window (512)")
    command.add_argument("--windows", metavar="N", type=int, help="at most so many windows (all)")
    command.add_argument("--layers", action="store_true", help="compare layer by layer too")
    command.add_argument("--json", action="store_true", help="as JSON")
    command.add_argument("--plot", metavar="FILE.svg", help="draw it into this file")
    for side in ("a", "b"):
        _add_some(command, ("dtype", "quantization"), side)
    _add_some(command, ("device", "threads"))


def _add_bench(commands: Any) -> None:
    bench = _add(commands, "bench", "bench", "measure this machine's kernels")
    bench.description = (
        "Times every route by which a linear layer could be computed here, for each layout of "
        "weights and number of rows, beside what memory and arithmetic allow."
    )
    bench.add_argument("what", metavar="WHAT", choices=("kernels",), help="kernels")
    bench.add_argument(
        "--shape", metavar="OUTxIN", action="append", help="of a weight; repeatable (2048x2048)"
    )
    bench.add_argument("--model", metavar="PATH", help="the shapes of this checkpoint's layers")
    bench.add_argument("--json", action="store_true", help="as JSON")
    _add_some(bench, ("threads",))


def _add_some(parser: Parser, names: tuple[str, ...], side: str = "") -> None:
    """A model's settings as plain arguments: --dtype, or --dtype-a of the side "a"."""
    texts, known = meanings(ModelSettings), rules(ModelSettings)
    for name in names:
        parser.add_argument(
            f"--{name}-{side}" if side else f"--{name}",
            metavar=_metavar(name, known[name]),
            help=(f"of {side.upper()}: " if side else "") + texts[name].replace("%", "%%"),
        )


def _add_check(commands: Any) -> None:
    check = _add(commands, "check", "check", "show what is broken or slow on this machine, and why")
    check.description = (
        "Shows versions, processor, memory, GPUs, which kernels give right numbers here, and the "
        "rates that memory and arithmetic reach; then what is broken or slow, and what to do. The "
        "status is 1 if something is broken. The configuration is for check-config to show."
    )
    check.add_argument("--quick", action="store_true", help="time nothing")
    check.add_argument("--json", action="store_true", help="as JSON")
    _add_some(check, ("device", "threads"))


def _add_check_config(commands: Any) -> None:
    check = _add(
        commands,
        "check-config",
        "check_config",
        "show the configuration in force and where each value came from",
    )
    _add_config(check)


def _add_install_service(commands: Any) -> None:
    install = _add(commands, "install-service", "install_service", "install the systemd units")
    install.add_argument("--user", action="store_true", help="for this user's own systemd")
    install.add_argument("--dry-run", action="store_true", help="print what would be written")
    install.add_argument(
        "--prefix", metavar="DIR", default="/", help="put the files below DIR instead of /"
    )


def _add(commands: Any, name: str, module: str, help_text: str) -> Parser:
    parser: Parser = commands.add_parser(name, help=help_text, allow_abbrev=False)
    parser.set_defaults(module=module)
    return parser


def _add_config(parser: Parser) -> None:
    parser.add_argument("--config", metavar="FILE", help="the configuration file")


def _add_target(parser: Parser) -> None:
    """Where the daemon is that the command talks to."""
    _add_config(parser)
    group = parser.add_argument_group("the daemon to talk to (default: as configured)")
    group.add_argument("--socket", dest="set server.socket", metavar="PATH", help="Unix socket")
    group.add_argument("--host", dest="set server.host", metavar="HOST", help="TCP address")
    group.add_argument("--port", dest="set server.port", metavar="PORT", help="TCP port")


def _add_settings(group: Any, section: str, struct: type[Any]) -> None:
    texts = meanings(struct)
    for name, rule in rules(struct).items():
        if section == "models" and name in _NOT_FLAGS:
            continue
        # A destination that no other flag can have; the loader checks the value and names the flag.
        group.add_argument(
            flag(section, name),
            dest=f"set {section}.{name}",
            metavar=_metavar(name, rule),
            help=texts[name].replace("%", "%%"),
        )


def _metavar(name: str, rule: Rule) -> str:
    return "{" + ",".join(rule.choices) + "}" if isinstance(rule, OneOf) else name.upper()


class _Version(argparse.Action):
    """argparse's own needs the version when the parser is made, and finding it takes a while."""

    def __init__(self, option_strings: list[str], dest: str, help: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"{PROGRAM} {version(PROGRAM)}")
        parser.exit()
