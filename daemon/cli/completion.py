"""`quantd completion SHELL`: completion scripts, generated from the parser."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

from quantd.daemon.cli.parser import PROGRAM, new_parser


@dataclass(frozen=True, slots=True)
class Option:
    """A flag of a command."""

    names: tuple[str, ...]
    help: str
    takes_value: bool
    choices: tuple[str, ...]
    """Empty: anything, completed as a file."""


@dataclass(frozen=True, slots=True)
class Command:
    name: str
    help: str
    options: tuple[Option, ...]
    words: tuple[str, ...]
    """The choices of its first positional argument; empty: files."""


def run(arguments: argparse.Namespace) -> int:
    commands = list(read(new_parser()))
    script = {"bash": bash, "zsh": zsh, "fish": fish}[arguments.shell]
    print(script(commands))
    return 0


def read(parser: argparse.ArgumentParser) -> Iterator[Command]:
    """The parser's commands."""
    for action in parser._actions:
        if not isinstance(action, argparse._SubParsersAction):
            continue
        helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
        for name, child in action.choices.items():
            yield Command(name, helps[name], tuple(_options(child)), _words(child))


def _options(parser: argparse.ArgumentParser) -> Iterator[Option]:
    for action in parser._actions:
        if action.option_strings:
            yield Option(
                tuple(action.option_strings),
                (action.help or "").replace("%%", "%"),
                action.nargs != 0,
                _choices(action),
            )


def _choices(action: argparse.Action) -> tuple[str, ...]:
    if action.choices is not None:
        return tuple(map(str, action.choices))
    metavar = action.metavar
    if isinstance(metavar, str) and metavar.startswith("{"):
        return tuple(metavar.strip("{}").split(","))
    return ()


def _words(parser: argparse.ArgumentParser) -> tuple[str, ...]:
    for action in parser._actions:
        if not action.option_strings:
            return _choices(action)
    return ()


def bash(commands: list[Command]) -> str:
    """Completes commands, then flags, then a flag's choices or file names."""
    names = " ".join(command.name for command in commands)
    cases = []
    for command in commands:
        flags = " ".join(name for option in command.options for name in option.names)
        words = " ".join(command.words)
        cases.append(f'    {command.name}) flags="{flags}" words="{words}" ;;')
    values = {
        name: " ".join(option.choices)
        for command in commands
        for option in command.options
        for name in option.names
        if option.choices
    }
    with_values = "\n".join(f'    {name}) words="{text}" ;;' for name, text in values.items())
    return f"""# bash completion for {PROGRAM}
_{PROGRAM}() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" previous="${{COMP_WORDS[COMP_CWORD-1]}}"
  local flags="" words=""
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "{names} --version --help" -- "$current"))
    return
  fi
  case "${{COMP_WORDS[1]}}" in
{chr(10).join(cases)}
  esac
  case "$previous" in
{with_values}
  esac
  case "$current" in
    -*) COMPREPLY=($(compgen -W "$flags" -- "$current")) ;;
    *) if [ -n "$words" ]; then COMPREPLY=($(compgen -W "$words" -- "$current"))
       else COMPREPLY=($(compgen -f -- "$current")); fi ;;
  esac
}}
complete -o filenames -F _{PROGRAM} {PROGRAM}"""


def zsh(commands: list[Command]) -> str:
    described = "\n".join(f"    {_quote(f'{c.name}:{c.help}')}" for c in commands)
    cases = []
    for command in commands:
        specs = [
            _quote(f"{name}[{_plain(option.help)}]" + _zsh_value(option))
            for option in command.options
            for name in option.names
        ]
        rest = f"({' '.join(command.words)})" if command.words else "_files"
        specs.append(_quote(f"*:argument:{rest}"))
        cases.append(f"    {command.name}) _arguments {' '.join(specs)} ;;")
    return f"""#compdef {PROGRAM}
_{PROGRAM}() {{
  local -a commands
  commands=(
{described}
  )
  if (( CURRENT == 2 )); then
    _describe command commands
    return
  fi
  local command="$words[2]"
  shift words
  (( CURRENT-- ))
  case "$command" in
{chr(10).join(cases)}
  esac
}}
compdef _{PROGRAM} {PROGRAM}"""


def fish(commands: list[Command]) -> str:
    lines = [f"# fish completion for {PROGRAM}"]
    for command in commands:
        lines.append(
            f"complete -c {PROGRAM} -f -n __fish_use_subcommand -a {command.name} "
            f"-d {_quote(command.help)}"
        )
        inside = f'-n "__fish_seen_subcommand_from {command.name}"'
        for option in command.options:
            names = " ".join(
                f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}"
                for name in option.names
            )
            value = f" -x -a {_quote(' '.join(option.choices))}" if option.choices else " -r"
            lines.append(
                f"complete -c {PROGRAM} {inside} {names}{value if option.takes_value else ''} "
                f"-d {_quote(option.help)}"
            )
        if command.words:
            lines.append(f"complete -c {PROGRAM} {inside} -f -a {_quote(' '.join(command.words))}")
    return "\n".join(lines)


def _zsh_value(option: Option) -> str:
    if not option.takes_value:
        return ""
    return ":value:" + (f"({' '.join(option.choices)})" if option.choices else "_files")


def _plain(text: str) -> str:
    """Without what means something inside zsh's specifications."""
    return text.replace("[", "(").replace("]", ")").replace(":", " -")


def _quote(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"
