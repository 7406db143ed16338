"""The text side of one model: its tokenizer, its special tokens, its chat template.

Immutable after `load`; all methods may be called from any thread. Encoding a long text and
rendering a long chat take their time and belong in a thread; the rest is for the event loop.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantd.daemon.errors import ModelRefused, RequestError
from quantd.daemon.gguf.place import find_gguf
from quantd.daemon.gguf.reader import GgufError, open_gguf
from quantd.daemon.gguf.tokenizer import build_tokenizer
from quantd.daemon.gguf.tokenizer_metadata import read_tokenizer_metadata
from quantd.daemon.text.answer import AnswerParser
from quantd.daemon.text.chat_template import ChatTemplate
from quantd.daemon.text.checkpoint import TextFiles, read_text_files
from quantd.daemon.text.detokenizer import detokenizer
from quantd.daemon.text.format import AnswerFormat
from quantd.daemon.text.gguf_files import text_files
from quantd.daemon.text.tools import Toolset
from quantd.daemon.text.vocabulary import Vocabulary
from quantd.daemon.types import Grammar, TokenTable

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_END_TOKENS = 32
"""Of a prompt: enough for a mark that opens reasoning, and the line ends after it."""


class TextModel:
    def __init__(
        self,
        tokenizer: Tokenizer,
        files: TextFiles,
        max_context: int | None = None,
        tool_dialect: str = "auto",
    ) -> None:
        """Takes the tokenizer over and changes it: what files declare as added is added."""
        _complete(tokenizer, files)
        self._tokenizer = tokenizer
        self.vocabulary = Vocabulary(tokenizer)
        named = files.named_tokens
        self.bos_token_id = self._id(named.get("bos_token"), files.bos_token_id)
        eos = self._id(named.get("eos_token"), None)
        self.eos_token_ids = tuple(
            dict.fromkeys([*files.eos_token_ids, *([] if eos is None else [eos])])
        )
        self.max_context = max_context if max_context is not None else files.max_context
        self._explicit_ends = _explicit_ends(tokenizer, files, self.bos_token_id, eos)
        self.format = AnswerFormat.detect(files.chat_templates.values(), tool_dialect)
        self.special_marks = {
            mark: token
            for mark in self.format.special
            if (token := self._id(mark, None)) is not None and self.vocabulary.is_special(token)
        }
        """Special tokens that mark reasoning and calls, by their text."""
        self._templates = {
            name: ChatTemplate(source, named) for name, source in files.chat_templates.items()
        }

    @classmethod
    def load(
        cls, path: Path, max_context: int | None = None, tool_dialect: str = "auto"
    ) -> TextModel:
        """Blocking. Raises ModelRefused that names the file and what is wrong with it.

        path: a folder in the layout of transformers, a GGUF file (of several, the first), or a
        folder with one GGUF model. max_context: None takes what the model says. tool_dialect:
        "auto" takes what the chat template says.
        """
        # Before the library is used: one text at a time gains nothing from its pool of threads.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        try:
            gguf = find_gguf(path)
            if gguf is not None:
                return cls(*_read_gguf(gguf), max_context, tool_dialect)
        except GgufError as error:
            raise ModelRefused(str(error)) from error
        from tokenizers import Tokenizer

        file = path / "tokenizer.json"
        if not file.is_file():
            raise ModelRefused(f"{path} has no tokenizer.json")
        files = read_text_files(path)
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise ModelRefused(f"{file} cannot be read: {error}") from error
        return cls(tokenizer, files, max_context, tool_dialect)

    @property
    def vocab_size(self) -> int:
        """Every id that the tokenizer knows is below; the model's output layer may be wider."""
        return self.vocabulary.size

    @property
    def has_chat_template(self) -> bool:
        return bool(self._templates)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """add_special_tokens: BOS and EOS as the model's tokenizer adds them. Special tokens
        that are written out in the text become their ids either way."""
        adds_by_processor = add_special_tokens and self._explicit_ends is None
        try:
            # Unlike `encode`, it lets other threads run meanwhile, and takes half as long.
            [encoding] = self._tokenizer.encode_batch_fast(
                [text], add_special_tokens=adds_by_processor
            )
        except TypeError:
            _refuse_surrogates(text)
            raise
        ids: list[int] = encoding.ids
        if add_special_tokens and self._explicit_ends is not None:
            before, after = self._explicit_ends
            return [*before, *ids, *after]
        return ids

    def encode_within(self, text: str, most: int) -> list[int]:
        """As `encode`, cut at the text's end to `most` tokens, special ones included, which stay.
        Raises RequestError when these leave no room."""
        ids = self.encode(text)
        if len(ids) <= most:
            return ids
        if self._explicit_ends is not None:
            before, after = self._explicit_ends
            room = _room(most, len(before) + len(after))
            return [*before, *self.encode(text, add_special_tokens=False)[:room], *after]
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        encoding.truncate(_room(most, self._tokenizer.num_special_tokens_to_add(False)))
        cut: list[int] = self._tokenizer.post_process(encoding).ids
        return cut

    def encode_pair(
        self, first: str, second: str, most: int | None = None
    ) -> tuple[list[int], int | None]:
        """Two texts as the model's tokenizer joins them, and from where on tokens are of type 1;
        None: nowhere. With `most` the second text is cut at its end; RequestError when the first
        leaves no room."""
        try:
            before = self._tokenizer.encode(first, add_special_tokens=False)
            behind = self._tokenizer.encode(second, add_special_tokens=False)
        except TypeError:
            _refuse_surrogates(first)
            _refuse_surrogates(second)
            raise
        if most is not None:
            num_special = self._tokenizer.num_special_tokens_to_add(True)
            behind.truncate(_room(most, len(before.ids) + num_special))
        joined = self._tokenizer.post_process(before, behind)
        types: list[int] = joined.type_ids
        begin = types.index(1) if 1 in types else None
        if begin is not None and types[begin:] != [1] * (len(types) - begin):
            raise RequestError(f"this model's tokenizer gives a pair the token types {types}")
        ids: list[int] = joined.ids
        return ids, begin

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence; equals the concatenated deltas of OutputText."""
        stream = detokenizer(self.vocabulary, skip_special_tokens=skip_special_tokens)
        return "".join([*map(stream.feed, ids), stream.flush()])

    def token_text(self, token: int) -> str:
        """One token as text, as it stands inside a text; U+FFFD for bytes of a character."""
        return self.token_bytes(token).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        """The exact bytes of one token; empty for an id that the tokenizer does not know."""
        return self.vocabulary.piece(token)

    def token_table(self) -> TokenTable:
        """What grammars need to know. Blocking: 0.3 s for 128k tokens. Raises RequestError where
        the bytes of a token depend on its neighbours."""
        if self.vocabulary.rule is None:
            raise RequestError(
                "this model's tokenizer has no fixed text for each token, so its output cannot be "
                "constrained"
            )
        pieces = tuple(self.vocabulary.pieces())
        special = tuple(sorted(self.vocabulary.special))
        return TokenTable(pieces, special, self.eos_token_ids)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str:
        """The prompt's text. kwargs (documents, chat_template_kwargs) are variables for the
        template. Raises RequestError with a param for what the caller can mend."""
        template = self._templates.get("default")
        if tools:
            template = self._templates.get("tool_use", template)
        if template is None:
            raise RequestError(
                "this model has no chat template: send a plain prompt to /v1/completions",
                param="messages",
            )
        return template.render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables=kwargs,
        )

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> list[int]:
        """The prompt's tokens. Special tokens are what the template writes and no others, as in
        transformers' apply_chat_template, so BOS never comes twice."""
        text = self.render_chat(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **kwargs,
        )
        return self.encode(text, add_special_tokens=False)

    def answer_parser(self, prompt: Sequence[int], tools: Toolset | None) -> AnswerParser:
        """For what follows `prompt`, which may end inside of the model's reasoning."""
        return self.format.parser(self._end_of(prompt), tools)

    def answer_grammar(
        self, prompt: Sequence[int], tools: Toolset | None, content: Grammar | None
    ) -> Grammar | None:
        """What the whole output after `prompt` may be, so that its calls are right and its content
        obeys `content`. None: anything. Raises RequestError without a param."""
        return self.format.grammar(self._end_of(prompt), tools, content, self.special_marks)

    def _end_of(self, prompt: Sequence[int]) -> str:
        """Where nothing but marks of reasoning is looked for; without these it is not decoded."""
        if self.format.marks is None:
            return ""
        return self.decode(prompt[-_END_TOKENS:], skip_special_tokens=False)

    def _id(self, token: str | None, otherwise: int | None) -> int | None:
        known: int | None = None if token is None else self._tokenizer.token_to_id(token)
        return otherwise if known is None else known


def _read_gguf(path: Path) -> tuple[Tokenizer, TextFiles]:
    """Raises GgufError or ModelRefused, with the file's name."""
    metadata = open_gguf(path).metadata
    try:
        tokenizer = read_tokenizer_metadata(metadata)
        return build_tokenizer(tokenizer), text_files(metadata, tokenizer)
    except (GgufError, ModelRefused) as error:
        raise ModelRefused(f"{path.name}: {error}") from error


def _refuse_surrogates(text: str) -> None:
    """JSON can write halves of a UTF-16 pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the text is not valid Unicode: a lone surrogate at character {error.start}"
        ) from error


def _room(most: int, taken: int) -> int:
    if most <= taken:
        raise RequestError(
            f"truncate_prompt_tokens is {most}, must be more than the {taken} tokens that are kept",
            param="truncate_prompt_tokens",
        )
    return most - taken


def _complete(tokenizer: Tokenizer, files: TextFiles) -> None:
    """Make the tokenizer what its folder describes: the tokens that tokenizer_config.json adds or
    marks as special, and no truncation or padding, which some tokenizer.json ask for."""
    from tokenizers import AddedToken

    tokenizer.no_truncation()
    tokenizer.no_padding()
    known = tokenizer.get_added_tokens_decoder()
    for token in files.added_tokens:
        if token.id in known and known[token.id].special == token.special:
            continue
        flags = AddedToken(
            token.content,
            single_word=token.single_word,
            lstrip=token.lstrip,
            rstrip=token.rstrip,
            normalized=token.normalized,
            special=token.special,
        )
        add = tokenizer.add_special_tokens if token.special else tokenizer.add_tokens
        add([flags])
        if tokenizer.token_to_id(token.content) != token.id:
            raise ModelRefused(
                f"tokenizer_config.json gives {token.content!r} the id {token.id}, but in "
                f"tokenizer.json it would be {tokenizer.token_to_id(token.content)}"
            )
    named = [*files.named_tokens.values(), *files.extra_special_tokens]
    # A named token that the vocabulary lacks would get an id beyond the model's.
    tokenizer.add_special_tokens([t for t in named if tokenizer.token_to_id(t) is not None])


def _explicit_ends(
    tokenizer: Tokenizer, files: TextFiles, bos: int | None, eos: int | None
) -> tuple[list[int], list[int]] | None:
    """What add_special_tokens puts before and after where tokenizer_config.json says so. A
    post-processor of tokenizer.json that adds tokens wins over that, as in transformers 5.24:
    Qwen3-Embedding's adds the token that its vectors are read from, and says add_bos_token
    false beside it."""
    if files.add_bos_token is None and files.add_eos_token is None:
        return None
    if tokenizer.num_special_tokens_to_add(False) > 0:
        return None
    before = [bos] if files.add_bos_token and bos is not None else []
    after = [eos] if files.add_eos_token and eos is not None else []
    return before, after
