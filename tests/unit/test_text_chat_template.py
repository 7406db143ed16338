"""Chat templates: what they see, what they may do, and how they fail."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest

from quantd.daemon.errors import RequestError
from quantd.daemon.text.chat_template import ChatTemplate

USER = [{"role": "user", "content": "hi"}]


def template(source: str) -> ChatTemplate:
    """A clock that advances by a tenth of a millisecond each time it is looked at."""
    clock: Iterator[int] = iter(range(10**9))
    return ChatTemplate(
        source,
        {"bos_token": "<s>", "eos_token": "</s>"},
        clock=lambda: next(clock) * 1e-4,
        now=lambda: datetime(2026, 3, 4, 5, 6, 7),
    )


def render(source: str, messages: Any = USER, **options: Any) -> str:
    return template(source).render(messages, **options)


def refusal(source: str, messages: Any = USER, **options: Any) -> RequestError:
    with pytest.raises(RequestError) as error:
        render(source, messages, **options)
    return error.value


# --- what templates see ---------------------------------------------------------------------------


def test_variables() -> None:
    source = (
        "{{ bos_token }}{{ eos_token }}{{ add_generation_prompt }}{{ tools }}{{ documents }}{{ x }}"
    )
    assert render(source, variables={"x": 3}) == "<s></s>TrueNoneNone3"
    assert render("{{ tools }}", tools=[]) == "None"


def test_blocks_are_trimmed() -> None:
    assert render("  {% if true %}\n  a\n  {% endif %}\nb") == "  a\nb"


def test_tojson_keeps_order_and_characters() -> None:
    tools = [{"name": "f<b>&'", "a": "é", "b": [1.0, None, True]}]
    expected = """[{"name": "f<b>&'", "a": "é", "b": [1.0, null, true]}]"""
    assert render("{{ tools | tojson }}", tools=tools) == expected
    assert render('{{ {"b": 1, "a": "é"} | tojson(indent=1) }}') == '{\n "b": 1,\n "a": "é"\n}'
    source = '{{ {"b": 1, "a": "é"} | tojson(ensure_ascii=True, sort_keys=True) }}'
    assert render(source) == '{"a": "\\u00e9", "b": 1}'


def test_helpers() -> None:
    assert render("{{ strftime_now('%d %b %Y') }}") == "04 Mar 2026"
    assert render("{% set n = namespace(self=1) %}{% set n.a = 2 %}{{ n.self + n.a }}") == "3"
    source = "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}{% if i > 2 %}"
    assert render(source + "{% break %}{% endif %}{{ i }}{% endfor %}") == "02"
    assert render("{% generation %}{{ messages[0].content }}{% endgeneration %}") == "hi"
    assert render("{{ dict(a=1) }}{{ 'a' ~ 1 ~ none }}") == "{'a': 1}a1None"
    source = "{% macro f(x) %}[{{ x ~ '!' }}]{% endmacro %}{{ f('a') }}{{ f('b') }}"
    assert render(source) == "[a!][b!]"


# --- messages -------------------------------------------------------------------------------------

CONTENT = "{% for m in messages %}<{{ m.content }}>{% endfor %}"


def test_contents() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    image = [{"type": "image"}]
    messages = [{"role": "user", "content": c} for c in ("s", parts, None, [])]
    assert render(CONTENT, messages) == "<s><a\nb><><>"
    assert render("{{ messages[0].content[0].type }}", [{"role": "user", "content": image}])
    assert messages[1]["content"] is parts


def test_tool_call_arguments_become_objects() -> None:
    def message(arguments: Any) -> list[dict[str, Any]]:
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
        return [{"role": "assistant", "content": None, "tool_calls": [call]}]

    source = "{{ messages[0].tool_calls[0].function.arguments | tojson }}"
    assert render(source, message('{"b": 1, "a": "x"}')) == '{"b": 1, "a": "x"}'
    assert render(source, message({"b": 1})) == '{"b": 1}'
    assert render(source, message("")) == "{}"
    for wrong in ("{", '{"a": NaN}', "[" * 100_000, '{"a": "\\ud800"}'):
        error = refusal(source, message(wrong))
        assert "messages[0].tool_calls[0].function.arguments" in str(error)
        assert error.param == "messages"


def test_no_template_passes_over_developers() -> None:
    source = "{% for m in messages %}{% if m.role in ['system', 'user'] %}{{ m.role }} {% endif %}"
    messages = [{"role": "developer", "content": "d"}, *USER]
    assert render(source + "{% endfor %}", messages) == "system user "
    assert messages[0]["role"] == "developer"
    knowing = "{% for m in messages %}{{ m.role }} {% endfor %}{# developer #}"
    assert render(knowing, messages) == "developer user "


def test_reasoning_has_one_name() -> None:
    messages = [{"role": "assistant", "content": "a", "reasoning": "why"}]
    source = "{{ messages[0].reasoning_content }}{{ messages[0].thinking }}"
    assert render(source, messages) == "whywhy"


def test_no_messages() -> None:
    assert refusal(CONTENT, []).param == "messages"


# --- continue_final_message -----------------------------------------------------------------------

CHATML = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content FILTER }}[end]\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
PREFILL = [*USER, {"role": "assistant", "content": "hi, I "}]


@pytest.mark.parametrize("filter_", ["", "| trim"])
def test_the_final_message_is_left_open(filter_: str) -> None:
    source = CHATML.replace("FILTER", filter_)
    options = {"add_generation_prompt": False, "continue_final_message": True}
    assert render(source, PREFILL, **options) == "[user]hi[end]\n[assistant]hi, I "
    same = [USER[0], {"role": "assistant", "content": "hi"}, USER[0]]
    assert render(source, same, **options).endswith("[assistant]hi[end]\n[user]hi")
    marked = [{"role": "user", "content": "ContinuesHere"}, *PREFILL]
    assert render(source, marked, **options).startswith("[user]ContinuesHere[end]\n")
    assert PREFILL[-1]["content"] == "hi, I "


def test_what_cannot_be_continued() -> None:
    both = refusal(CHATML, PREFILL, continue_final_message=True)
    assert both.param == "continue_final_message"
    options = {"add_generation_prompt": False, "continue_final_message": True}
    hidden = refusal("{{ messages[0].content }}", PREFILL, **options)
    assert "does not show" in str(hidden)
    image = [{"role": "assistant", "content": [{"type": "image"}]}]
    assert "must be text" in str(refusal(CONTENT, image, **options))


# --- refusals -------------------------------------------------------------------------------------


def test_the_templates_own_refusal_reaches_the_caller() -> None:
    error = refusal("{{ raise_exception('System role not supported') }}")
    assert "System role not supported" in str(error)
    assert (error.status, error.param) == (400, "messages")


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].nothing.more }}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[7].role }}",
    ],
)
def test_an_expression_that_fails_is_the_requests_error(source: str) -> None:
    assert "refused these messages" in str(refusal(source))


def test_a_template_that_is_not_jinja() -> None:
    error = refusal("a\n{% if %}")
    assert "not valid" in str(error) and "line 2" in str(error)


def test_reserved_variables() -> None:
    assert refusal("", variables={"messages": []}).param == "chat_template_kwargs"


# --- hostile templates ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(a=1) }}",
        "{% set n = namespace() %}{% set n.__class__ = 1 %}",
        "{{ namespace(_Namespace__attrs=1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% include '/etc/passwd' %}",
        "{{ raise_exception.__globals__['time'] }}",
        "{{ strftime_now.__code__.co_names }}",
    ],
)
def test_the_sandbox_holds(source: str) -> None:
    refusal(source)


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f() %}{% for a in range(999) %}{{ f() }}{% endfor %}{% endmacro %}{{ f() }}",
        "{% for a in range(99999) recursive %}{{ loop(range(99999)) }}{% endfor %}",
    ],
)
def test_endless_loops_end(source: str) -> None:
    error = refusal(source)
    assert "ran for more than 10 seconds" in str(error) or "recursed too deeply" in str(error)


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10 ** 9 }}",
        "{{ [1] * 999999999 }}",
        "{% set n = namespace(s='aa') %}{% for i in range(60) %}"
        "{% set n.s = n.s ~ n.s %}{% endfor %}",
        "{% set n = namespace(s='aa') %}{% for i in range(60) %}"
        "{% set n.s = n.s + n.s %}{% endfor %}",
        "{% set s = 'a' * 999999 %}{% for i in range(999) %}{{ s }}{% endfor %}",
    ],
)
def test_texts_do_not_grow_without_end(source: str) -> None:
    assert "characters" in str(refusal(source))


@pytest.mark.parametrize(
    "expression",
    [
        "'a' | center(10 ** 9)",
        "'a' | center(width=10 ** 9)",
        "'a'.center(10 ** 9)",
        "'a'.ljust(10 ** 9)",
        "'7'.zfill(10 ** 9)",
        "('a' | safe).rjust(10 ** 9)",
        "('a' * 99999) | replace('a', 'b' * 99999)",
        "('a' * 99999).replace('a', 'b' * 99999)",
        "(['a'] * 99999) | join('b' * 99999)",
        "('b' * 99999).join(['a'] * 99999)",
        "('b' * 99999).join(('a' * 9999) | map('upper'))",
        "'%999999999d' | format(1)",
        "'%999999999d' % 1",
        "'%.999999999f' % 1",
        "'%*d' % (999999999, 1)",
        "('%(a)s' * 99999) % {'a': 'b' * 99999}",
        "'{:999999999}'.format(1)",
        "'{:{w}}'.format(1, w=999999999)",
        "'{a:>999999999}'.format_map({'a': 1})",
        "('a\n' * 9999) | indent(99999)",
        "('a\n' * 9999) | indent('b' * 99999)",
        "('a ' * 99999) | wordwrap(2, wrapstring='b' * 99999)",
        "('\t' * 99999).expandtabs(99999)",
        "('a' * 99999).translate({97: 'b' * 99999})",
        "(1).to_bytes(byteorder='big', length=10 ** 9)",
        "'a'.encode() * 10 ** 9",
        "'a' | batch(10 ** 9, 'b') | list",
        "'a' | slice(10 ** 9) | list",
        "([[1] * 9999] * 9999) | sum(start=[]) | length",
        "([('a' * 999999)] * 999) | map('upper') | list | length",
        "{'a': ['b' * 999999] * 99} | tojson",
        "([('a' * 9999999)] * 9) | string",
        "([('a' * 9999999)] * 9) ~ ''",
    ],
)
def test_what_an_expression_builds_is_measured_before_it_exists(expression: str) -> None:
    tracemalloc.start()
    try:
        assert "characters" in str(refusal("{{ " + expression + " }}"))
        assert tracemalloc.get_traced_memory()[1] < 600 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "body",
    [
        "{% set n = namespace(l=['a']) %}{% for i in range(60) %}"
        "{% set n.l = [n.l, n.l] %}{% endfor %}{{ n.l }}",
        "{% set n = namespace(l=['a']) %}{% for i in range(60) %}"
        "{% set n.l = {'a': n.l, 'b': n.l} %}{% endfor %}{{ n.l | tojson }}",
        "{% set s = 'a' * 999999 %}{% set t %}{% for i in range(9999) %}{{ s }}{% endfor %}"
        "{% endset %}",
        "{% macro f() %}{% for i in range(99999) %}PADDING{% endfor %}{% endmacro %}{{ f() }}",
    ],
)
def test_what_is_printed_into_blocks_and_macros_is_measured(body: str) -> None:
    assert "characters" in str(refusal(body.replace("PADDING", "long " * 999)))


def test_numbers_do_not_grow_without_end() -> None:
    squares = "{% set n = namespace(i=9) %}{% for i in range(60) %}{% set n.i = n.i * n.i %}"
    assert "number of more than 16384 bits" in str(refusal(squares + "{% endfor %}"))
    assert "power" in str(refusal("{{ 1.5 | round(10 ** 9, 'floor') }}"))
    assert "indent=99" in str(refusal("{{ [1] | tojson(indent=99) }}"))


def test_filters_and_methods_do_what_they_did() -> None:
    source = (
        "{{ 'a' | center(3) }}|{{ 'aba' | replace('a', 'c', 1) }}|{{ ['x', 1] | join(', ') }}|"
        "{{ messages | map(attribute='role') | join }}|{{ '%s-%03d' | format('a', 7) }}|"
        "{{ '%(a)s' % {'a': 1} }}|{{ 'a\nb' | indent(2, first=true) }}|{{ 'a b c' | wordwrap(3) }}|"
        "{{ '{}{x:>3}'.format(1, x=2) }}|{{ [1, 2] | sum }}|{{ 2.345 | round(1) }}|"
        "{{ 7 % 4 }}|{{ [1, 2, 3] | batch(2, 0) | list }}|{{ [1, 2, 3] | slice(2) | list }}"
    )
    expected = (
        " a |cba|x, 1|user|a-007|1|  a\n  b|a b\nc|1  2|3|2.3|3|[[1, 2], [3, 0]]|[[1, 2], [3]]"
    )
    assert render(source) == expected


def test_large_powers_are_refused() -> None:
    assert "power" in str(refusal("{{ 9 ** 9 ** 9 }}"))
    assert render("{{ 2 ** 10 }}") == "1024"


def test_the_bounds_cannot_be_redefined() -> None:
    assert "reserved" in str(refusal("{% set __bounds_tick = dict %}"))
