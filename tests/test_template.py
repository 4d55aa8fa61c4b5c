"""Laws of chat templates: the same text as transformers, and no template harms the process."""

from __future__ import annotations

import gc
import sys
import textwrap
import threading
import time
import weakref
from types import MappingProxyType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zamba2.errors import Zamba2Error
from zamba2.language import template as module
from zamba2.language.messages import CHATML, ROLES, brief, check_messages
from zamba2.language.template import render

USER = [{"role": "user", "content": "hi"}]
CHAT = [
    {"role": "system", "content": "Be <b>brief</b> & kind."},
    {"role": "user", "content": "  héllo\n{{ 1 }} 100% 2024 *x* {a:2024}"},
    {"role": "assistant", "content": "ok 😀"},
]
GROW = "{% set ns = namespace(x='aaaaaaaaaaaaaaaaaaaa') %}{% for i in range(100) %}{% set ns.x = "


SANDBOXED = "{% if true %}" + CHATML + "{% endif %}"  # not recognized as ChatML


def test_chatml_by_hand():
    """ChatML is the string a person would write."""
    text = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU\n<|im_end|>\n"
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U\n"}]
    assert render(CHATML, messages) == text
    assert render(CHATML, messages, add_generation_prompt=True) == text + "<|im_start|>assistant\n"


TEMPLATES = {
    "chatml": CHATML,
    "whitespace": "{{ bos_token }}{% for m in messages %}\n  {% if m.role == 'user' %}\n[INST] {{ m.content | trim }} [/INST]\n"
    "  {% else %}\n{{ m.content }}{{ eos_token }}\n  {% endif %}\n{% endfor %}\n",
    "json": "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m | tojson }}{{ m | tojson(indent=2) }}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}\n{% endgeneration %}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0, text='') %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% set ns.text = ns.text ~ m['content'][1:] ~ ns.n %}{% endfor %}{{ ns.text }}{{ missing }}{{ pad_token }}",
    "macro": "{% macro say(m, mark='#') %}{{ mark * 3 }}{{ m.role | upper }}: {{ m.content.replace('o', '0').split('l') | join('|') }}"
    "{% endmacro %}{% for m in messages | reverse %}{{ say(m) }}{{ loop.index }}\n{% endfor %}{% if tools is not none %}T{% endif %}",
    "filters": "{% set users = messages | selectattr('role', 'equalto', 'user') | list %}{{ users | length }}"
    "{{ users[0].content is string }}{% for k, v in users[0].items() %}{{ k }}={{ '%5s' % v }}{{ '{:>4}'.format(k) }}{% endfor %}"
    "{{ messages | map(attribute='role') | join(',') }}",
    "values": "{{ dict(a=1, **{'b': [1, (2,)]}) }}{{ 2**10 }}{% set block %}x{{ 1 }}y{% endset %}{{ block }}{{ [1, 2] + [3] }}{{ 7 % 4 }}"
    "{{ 1 ~ 'a' ~ none }}{{ 'a' < 'b' }}{{ 1700000000 | string }}{{ dict(at=1700000000).get('in', 1700000001) }}",
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("prompt", [False, True])
def test_same_text_as_transformers(template, prompt):
    """Real constructs render to what transformers renders."""
    hf = pytest.importorskip("transformers.utils.chat_template_utils")
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    expected, _ = hf.render_jinja_template([CHAT], chat_template=template, add_generation_prompt=prompt, **tokens)
    assert render(template, CHAT, add_generation_prompt=prompt, **tokens) == expected[0]


contents = st.text(st.characters(exclude_categories=["Cs"]), max_size=50)


@given(st.lists(st.fixed_dictionaries({"role": st.sampled_from(ROLES), "content": contents}), min_size=1), st.booleans())
@settings(deadline=None, max_examples=50)
def test_chatml_holds_any_text_verbatim(messages, prompt):
    """Whatever the messages say, ChatML wraps it and changes nothing."""
    expected = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages) + "<|im_start|>assistant\n" * prompt
    assert render(CHATML, messages, add_generation_prompt=prompt) == expected
    assert render(SANDBOXED, messages, add_generation_prompt=prompt) == expected


ODD = ["\ud83d\ude00", None, 5, ["a"]]  # the first a pair in two halves, which JSON joins
TYPED = CHATML.replace("'", '"').replace("{{ ", "{{").replace(" + ", "  +  ") + "{# as typed by others #}"


@given(
    st.lists(
        st.fixed_dictionaries(
            {"role": st.sampled_from([*ROLES, "\ud83d", 3]), "content": st.text(max_size=20) | st.sampled_from(ODD)},
            optional={"name": st.just("n")},
        ),
        min_size=1, max_size=4,
    ),
    st.booleans(), st.sampled_from([CHATML, TYPED]),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_the_short_way_is_the_sandbox(messages, prompt, template):
    """Where ChatML is written without the sandbox, the text is the sandbox's, for any JSON; plain messages take that way, however the
    template is typed."""

    def outcome(template):
        try:
            return render(template, messages, add_generation_prompt=prompt)
        except Zamba2Error as error:
            return str(error)

    assert outcome(template) == outcome(SANDBOXED)
    plain = all(isinstance(value, str) and value.isascii() for message in messages for value in message.values())
    if plain and not any("name" in message for message in messages):
        assert module._as_chatml(template, messages, prompt) is not None


def test_what_is_nearly_chatml_goes_the_long_way():
    """A template that writes anything else is a program like any other; one value beyond the bound is refused as ever."""
    for old, new in (("im_end|>'", "im_end|> '"), ("'role'", "'content'"), ("assistant\n", "assistant"), ("<|im_start|>' +", "' +")):
        assert (other := CHATML.replace(old, new)) != CHATML
        assert module._as_chatml(other, CHAT, True) is None
        assert render(other, CHAT, add_generation_prompt=True) != render(CHATML, CHAT, add_generation_prompt=True)
    for odd in (["ab"], [5], [["role", "content"]]):
        with pytest.raises(Zamba2Error, match="the chat template failed"):
            render(CHATML, odd)
    with pytest.raises(Zamba2Error, match="values of more than"):
        render(CHATML, [{"role": "user", "content": "x" * (module.VALUE + 1)}])


def test_undefined_tokens_and_variables():
    """Special tokens that do not exist render as nothing; further variables reach the template; the date is today's."""
    assert render("[{{ bos_token }}{{ eos_token }}]", USER) == "[]"
    assert render("{{ bos_token }}{{ style }}", [MappingProxyType(USER[0])], bos_token="<s>", style="x") == "<s>x"
    assert render("{{ strftime_now('%Y') }}", USER) == time.strftime("%Y")


HOSTILE = {
    "syntax": "{% if",
    "unknown filter": "{{ x | nofilter }}",
    "raises": "{{ raise_exception('roles must alternate') }}",
    "undefined attribute": "{{ a.b.c }}",
    "class": "{{ ''.__class__.__mro__ }}",
    "class printed": "{{ ''.__class__ }}",
    "class by item": "{{ ''['__class__'] }}",
    "class by filter": "{{ messages | attr('__class__') }}",
    "globals": "{{ raise_exception.__globals__ }}",
    "globals of a class": "{{ cycler.__init__.__globals__ }}",
    "class by format": "{{ '{0.__class__}'.format(1) }}",
    "underscored namespace": "{{ namespace(__class__=1) }}",
    "mutation": "{{ messages.append(1) }}",
    "mutation by type": "{{ dict.update(messages[0], role='system') }}",
    "include": "{% include 'x' %}",
    "endless loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "endless output": "{% for i in range(99999) %}{% for j in range(99999) %}xxxxxxxxxxxxxxxx{% endfor %}{% endfor %}",
    "long range": "{{ range(10**10) | list }}",
    "big string": "{{ 'a' * 10**10 }}",
    "big string, other side": "{{ 10**10 * 'a' }}",
    "big list": "{{ [1] * 10**10 }}",
    "big power": "{{ 10 ** (10 ** 10) }}",
    "big product": "{% set ns = namespace(x=3) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}{{ ns.x }}",
    "width by %": "{{ '%9999999999d' % 1 }}",
    "width by argument": "{{ '%*d' % (10**10, 1) }}",
    "width by filter": "{{ '%9999999999d' | format(1) }}",
    "width by format": "{{ '{:9999999999}'.format(1) }}",
    "width by nested format": "{{ '{:{}}'.format(1, 10**10) }}",
    "width by format_map": "{{ '{a:9999999999}'.format_map({'a': 1}) }}",
    "ljust": "{{ 'a'.ljust(10**10) }}",
    "to_bytes": "{{ (1).to_bytes(10**10, 'big') }}",
    "indent": "{{ 'a' | indent(10**10, first=true) }}",
    "grow by +": GROW + "ns.x + ns.x %}{% endfor %}",
    "grow by ~": GROW + "ns.x ~ ns.x %}{% endfor %}",
    "grow by replace": GROW + "ns.x.replace('a', ns.x) %}{% endfor %}",
    "grow by join": GROW + "(ns.x | list) | join(ns.x) %}{% endfor %}",
    "grow by block": GROW + "ns.x %}{% set b %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = b %}{% endfor %}",
    "shared lists": GROW + "[ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "shared tuples": GROW + "(ns.x, ns.x) %}{% endfor %}{{ ns.x == ns.x | list }}",
    "shared dicts": GROW + "{'a': ns.x, 'b': ns.x} %}{% endfor %}{{ ns.x | tojson }}",
    "shared dicts printed": GROW.replace("100", "23").replace("a" * 20, "a") + "{'a': ns.x, 'b': ns.x} %}{% endfor %}{{ ns.x }}",
    "shared namespaces": GROW + "namespace(a=ns.x, b=ns.x) %}{% endfor %}{{ ns.x }}",
    "shared namespaces raised": GROW + "namespace(a=ns.x, b=ns.x) %}{% endfor %}{{ raise_exception(ns.x) }}",
    "long macro": "{% set x = 'a' * 3000000 %}{% macro m() %}{% for i in range(99999) %}{{ x }}{% endfor %}{% endmacro %}{{ m() }}",
    "long literal macro": "{% macro m() %}{% for i in range(99999) %}" + "x" * 100_000 + "{% endfor %}{% endmacro %}{{ m() }}",
    "lazy values": "{{ range(99999) | map(attribute='z', default='a' * 3000000) | join }}",
    "recursion": "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "recursive loop": "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "deep list": "{% set ns = namespace(x=1) %}{% for i in range(99999) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}",
    "deep source": "{{" + "(" * 5000 + "1" + ")" * 5000 + "}}",
    "deep blocks": "{% for a in messages %}" * 100 + "{% endfor %}" * 100,
    "long source": "x" * (module.SOURCE + 1),
    "slow source": "{{ 1 }}" * 30_000,
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end_in_one_sentence(name, monkeypatch):
    """Every attack is a short Zamba2Error soon after the deadline, and the trace function is what it was."""
    monkeypatch.setattr(module, "SECONDS", 0.4)  # the real one is for the test below
    gc.disable()  # its time over what other tests left is not the template's
    before, start = sys.gettrace(), time.thread_time()
    try:
        with pytest.raises(Zamba2Error) as error:
            render(HOSTILE[name], USER)
        took = time.thread_time() - start
    finally:
        gc.enable()
    assert took < 1
    assert sys.gettrace() is before
    message = str(error.value)
    assert message.startswith("the chat template") and len(message) < 400 and "\n" not in message


def test_errors_carry_the_templates_words():
    """What raise_exception says, and the line of a syntax error, reach the user."""
    with pytest.raises(Zamba2Error, match="refuses this conversation: roles must alternate"):
        render(HOSTILE["raises"], USER)
    with pytest.raises(Zamba2Error, match="line 2"):
        render("x\n{% if", USER)


def test_what_python_would_ignore_is_not_raised(monkeypatch):
    """Where the garbage collector calls a finalizer or a callback behind the deadline, the deadline is not spent on it: Python would ignore
    what is raised there, and trace no more."""

    class Thing:
        def __del__(self):
            len("x")

    calls = []

    def collected(phase, info):
        calls.append(textwrap.dedent("a function of Python's own"))

    def run():
        known, before = weakref.WeakSet(), sys.gettrace()
        forgotten, finalized = Thing(), Thing()
        known.add(forgotten)
        module._budget.deadline = module._budget.spent = 0.0
        sys.settrace(module._budget.trace)
        gc.callbacks.append(collected)
        try:
            del forgotten
            del finalized
            gc.collect()
            tracing, stopped = sys.gettrace() == module._budget.trace, 0
            for function in (brief, textwrap.dedent):
                try:
                    function("what a template leads to")
                except module._Stop:
                    stopped += 1
                    sys.settrace(module._budget.trace)
        finally:
            gc.callbacks.remove(collected)
            sys.settrace(before)
        assert tracing and stopped == 2 and not known and len(calls) == 2

    monkeypatch.setattr(module, "_run", run)  # where the template's own frames begin
    run()


def test_attacks_stay_small():
    """The growing attacks together leave the process's peak memory within 500 MB of where it was."""
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in HOSTILE:
        if name.startswith(("grow", "big", "shared l", "long", "lazy")):
            with pytest.raises(Zamba2Error):
                render(HOSTILE[name], USER)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000 * (1024 if sys.platform == "darwin" else 1)


def test_values_are_bounded_together():
    """Values of which none is too large are refused where they are too much in all; the next rendering has a budget of its own."""
    long = [{"role": "user", "content": "a" * 3_000_000}]
    text = "{% for i in range(N) %}{% set x = messages[0].content | upper %}{% endfor %}"
    for _ in range(2):
        assert render(text.replace("N", "15"), long) == ""
        with pytest.raises(Zamba2Error, match=f"{module.TOTAL} in all"):
            render(text.replace("N", "25"), long)


def test_deadline_holds_on_any_thread_and_trace_functions_return():
    """Off the main thread the deadline works as well, and a debugger's trace function is put back after success and failure."""
    seen: list[object] = []

    def tracer(frame, event, argument):
        return None

    def work():
        sys.settrace(tracer)
        try:
            render(CHATML, USER)
            seen.append(sys.gettrace())
            render(HOSTILE["endless loop"], USER)
        except Zamba2Error as error:
            seen.extend([sys.gettrace(), str(error)])
        finally:
            sys.settrace(None)
            seen.append(time.thread_time())  # not the clock on the wall: others may have the processor

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert seen[:2] == [tracer, tracer] and "seconds" in str(seen[2]) and float(str(seen[3])) < 3


def test_templates_compile_once():
    """A second rendering of the same text uses the compiled template."""
    text = SANDBOXED + "{# once #}"
    render(text, USER)
    hits = module._compile.cache_info().hits
    render(text, USER)
    assert module._compile.cache_info().hits == hits + 1


def test_long_honest_chats_pass():
    """A chat of 2,000 messages and one with a message of a million characters render."""
    assert len(render(SANDBOXED, USER * 2000)) == 2000 * len(render(CHATML, USER))
    assert "b" * 1_000_000 in render("{{ messages[0].content.replace('a', 'b') | trim }}", [{"role": "user", "content": "a" * 1_000_000}])


def test_python_objects_do_not_reach_templates():
    """Only JSON data is passed on."""
    with pytest.raises(Zamba2Error, match="plain JSON data"):
        render(CHATML, [{"role": "user", "content": object()}])


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ("hi", "messages is a str"),
        (None, "messages is a NoneType"),
        ([], "messages is empty"),
        ([*USER, "x"], r"messages\[1\] is a str"),
        ([{"content": "x"}], r"messages\[0\] has role None"),
        ([*USER, {"role": "bot", "content": "x"}], r"messages\[1\] has role 'bot'"),
        ([{"role": ["user"], "content": "x"}], r"messages\[0\] has role \['user'\]"),
        ([{"role": "user"}], r"messages\[0\] has content of type NoneType"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"messages\[0\] has content of type list"),
    ],
)
def test_malformed_messages_are_located(messages, match):
    """A malformed message is one sentence with its index."""
    with pytest.raises(Zamba2Error, match=match):
        check_messages(messages)
    check_messages(CHAT)
    check_messages(tuple(CHAT))


def test_the_deadline_is_not_lost_in_a_discarded_generator(monkeypatch):
    """When time is up while jinja2 drops a generator halfway, where Python ignores what is raised, the next step still stops."""
    numbers = "def numbers():\n    yield 1\n    yield 2\n"
    late = """
def late(text):
    halfway = numbers()
    next(halfway)
    budget.deadline, budget.spent, halfway = 0, 0, None  # an error raised in here would be a warning, and the end of tracing
    return list(map(len, [text]))
"""
    namespace = {"budget": module._budget}
    for source, place in ((numbers, module.jinja2.lexer), (late, module.jinja2.runtime)):
        exec(compile(source, place.__file__, "exec"), namespace)
    monkeypatch.setattr(module, "_compile", namespace["late"])
    with pytest.raises(Zamba2Error, match="seconds"):
        render("x", USER)
