"""One request of the engine for each choice, with its text, its parser and its grammar."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from quantd.daemon.errors import RequestError
from quantd.daemon.grammar import MAX_BYTES
from quantd.daemon.scheduler.admission import usable_context
from quantd.daemon.server.choice import Choice
from quantd.daemon.server.context import Asker
from quantd.daemon.server.sampling import Options
from quantd.daemon.text import OutputText
from quantd.daemon.types import Grammar, Request, SamplingParams

if TYPE_CHECKING:
    from quantd.daemon.fleet import Lease
    from quantd.daemon.server.prompts import PromptSource
    from quantd.daemon.server.screening import Screening


@dataclass(frozen=True, slots=True)
class Submitter:
    """All that the choices of one HTTP request share."""

    lease: Lease
    options: Options
    takes_parts: bool
    """Their text is taken apart, and its grammar lets reasoning and calls through."""
    id: str
    arrival: float
    deadline: float | None
    asker: Asker
    screening: Screening[PromptSource] | None = None
    """None: no policy holds."""

    def grammar(self, prompt: Sequence[int], *, enforced: bool = False) -> Grammar | None:
        """What the output after this prompt may be. enforced: calls can be read though nothing
        else asks for a grammar. Raises RequestError that names the field."""
        given, tools = self.options.grammar, self.options.tools
        content = None if given is None else given.grammar
        if not self.takes_parts:
            return content
        toolset = None
        if tools is not None:
            tools.check(self.lease.text.format)
            toolset = dataclasses.replace(tools.toolset, enforced=enforced)
        with self._naming_the_field():
            grammar = self.lease.text.answer_grammar(prompt, toolset, content)
            _check_size(grammar)
        return grammar

    async def prepare(self, grammar: Grammar) -> None:
        """Before a choice with it is submitted. Raises RequestError that names the field."""
        with self._naming_the_field():
            await self.lease.prepare(grammar)

    @contextmanager
    def _naming_the_field(self) -> Iterator[None]:
        given = self.options.grammar
        field = "tools" if given is None else given.field
        try:
            yield
        except RequestError as error:
            if error.param is not None:
                raise
            raise RequestError(f"{field}: {error.message}", param=field) from error

    def shared(self) -> SamplingParams:
        """What all choices' sampling has in common. Raises RequestError."""
        return self.options.for_model(self.lease.text, self.lease.info.vocab_size)

    def submit(
        self,
        number: int,
        prompt: tuple[int, ...],
        shared: SamplingParams,
        grammar: Grammar | None,
        request_id: str = "",
    ) -> Choice:
        """Starts choice `number` of all. Raises what the engine refuses it with."""
        lease, options = self.lease, self.options
        sampling = options.sampling(
            msgspec.structs.replace(shared, grammar=grammar),
            len(prompt),
            usable_context(lease.info),
            number % options.n,
        )
        request = Request(
            id=request_id or f"{self.id}-{number}",
            prompt=prompt,
            sampling=sampling,
            priority=options.priority,
            is_batch=self.asker.is_batch,
            arrival=self.arrival,
            caller=self.asker.caller,
            cache_salt=options.cache_salt,
            deadline=self.deadline,
            timeout=options.timeout,
            mark=options.mark,
        )
        parser, kept = None, frozenset[int]()
        if self.takes_parts:
            toolset = None if options.tools is None else options.tools.toolset
            parser = lease.text.answer_parser(prompt, toolset)
            kept = frozenset(lease.text.special_marks.values())
        output = OutputText(
            lease.text,
            prompt,
            options.stop,
            options.include_stop,
            options.skip_special_tokens,
            sampling.min_tokens,
            kept,
        )
        screen = None
        if self.screening is not None:
            given = options.grammar
            is_json = given is not None and given.grammar.kind == "json_schema"
            screen = self.screening.output(self.takes_parts, is_json)
        stream = lease.engine.submit(request)
        return Choice(number, stream, output, parser, sampling, options, screen)


def _check_size(grammar: Grammar | None) -> None:
    """Each schema is within the limit; together they may not be."""
    if grammar is not None and (size := len(grammar.source.encode())) > MAX_BYTES[grammar.kind]:
        raise RequestError(
            f"their schemas make a grammar of {size} bytes; the limit is {MAX_BYTES[grammar.kind]}"
        )
