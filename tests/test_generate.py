"""Text out of tokens: the splitter, stop strings, sampling, grammars, chat and its cache."""

from __future__ import annotations

import inspect
import itertools
import json
import multiprocessing.spawn
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import melt_edge
from melt_edge import Model
from melt_edge.errors import BackendError, ConfigError, ContextOverflowError, FormatError
from melt_edge.runtime import template
from melt_edge.runtime.library import import_llama_cpp
from melt_edge.runtime.sampling import file_defaults, grammar_text, with_overrides
from melt_edge.runtime.template import checked_messages, render_chat
from melt_edge.runtime.text import TextSplitter, checked_stop
from tiny import CHAT_TEMPLATE, tiny_config

PROMPT = "What is 12 plus 30?"
USER = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def model(melt_gguf: Path) -> Iterator[Model]:
    with melt_edge.load(melt_gguf, n_threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def ouro(ouro_gguf: Path) -> Iterator[Model]:
    with melt_edge.load(ouro_gguf, n_threads=1) as model:
        yield model


def cut(data: bytes, at: list[int]) -> list[bytes]:
    places = [0, *sorted(place % (len(data) + 1) for place in at), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(places)]


def split(pieces: list[bytes], stop: list[str]) -> list[str]:
    splitter = TextSplitter(stop)
    return [*(splitter.feed(piece) for piece in pieces), splitter.finish()]


@given(st.text() | st.text("ab€😀"), st.lists(st.integers(0, 999)))
def test_splitter_gives_back_any_text_in_whole_characters(text: str, at: list[int]) -> None:
    pieces = split(cut(text.encode("utf-8"), at), [])
    assert "".join(pieces) == text


@given(st.binary(), st.lists(st.integers(0, 999)))
def test_splitter_replaces_invalid_bytes_as_python_does(data: bytes, at: list[int]) -> None:
    assert "".join(split(cut(data, at), [])) == data.decode("utf-8", errors="replace")


@given(
    st.text("abc€"), st.lists(st.text("abc€", min_size=1, max_size=4), min_size=1, max_size=3), st.lists(st.integers(0))
)
def test_splitter_stops_at_the_string_that_is_complete_first(text: str, stop: list[str], at: list[int]) -> None:
    ends = [(text.find(word) + len(word), text.find(word)) for word in stop if word in text]
    expected = text[: min(ends)[1]] if ends else text
    assert "".join(split(cut(text.encode("utf-8"), at), stop)) == expected


def test_splitter_holds_back_what_may_become_a_stop_string() -> None:
    assert split([b"ab", b"cS", b"TO", b"x ST", b"OP", b"more"], ["STOP"]) == ["ab", "c", "", "STOx ", "", "", ""]


def test_incomplete_character_at_the_end_becomes_a_replacement() -> None:
    assert split(["€".encode()[:2]], []) == ["", "\ufffd"]


@pytest.mark.parametrize("stop", ["", ["a", ""], [1]])
def test_stop_that_is_no_text_is_refused(stop: object) -> None:
    with pytest.raises(ConfigError, match="stop has"):
        checked_stop(stop)  # type: ignore[arg-type]


def test_every_option_can_be_seen_and_is_the_streams() -> None:
    """An editor and inspect showed ``**options`` where a reader wants max_tokens, temperature, ..."""
    for whole, stream in ((Model.generate, Model.stream), (Model.chat, Model.chat_stream)):
        shown, its = inspect.signature(whole), inspect.signature(stream)
        assert list(shown.parameters.values()) == list(its.parameters.values())
        assert shown.return_annotation == "Completion"
    assert {"max_tokens", "temperature", "stop", "seed", "grammar", "json_schema"} <= set(shown.parameters)


def test_same_seed_same_text_and_other_seed_other_text(model: Model) -> None:
    options = {"max_tokens": 24, "temperature": 1.5}
    first = model.generate(PROMPT, seed=7, **options)
    assert model.generate(PROMPT, seed=7, **options).tokens == first.tokens
    assert any(model.generate(PROMPT, seed=seed, **options).tokens != first.tokens for seed in range(3))


def test_seed_of_load_is_every_calls_seed(melt_gguf: Path) -> None:
    with melt_edge.load(melt_gguf, n_threads=1, seed=5) as model:
        assert model.generate(PROMPT, max_tokens=12).tokens == model.generate(PROMPT, max_tokens=12).tokens
        assert model.generate(PROMPT, max_tokens=12).tokens == model.generate(PROMPT, max_tokens=12, seed=5).tokens


def test_temperature_zero_takes_the_largest_logit(model: Model) -> None:
    done = model.generate(PROMPT, max_tokens=6, temperature=0)
    tokens = model.tokenize(PROMPT)
    assert done.tokens[0] == int(model.logits(tokens)[-1].argmax())
    assert done.finish_reason == "length"
    assert len(done.tokens) == 6
    assert done.timings.prompt_tokens == len(tokens)
    assert done.timings.decode_tokens == 5
    assert done.timings.prompt_tps > 0
    assert done.timings.decode_tps > 0


def test_repeat_penalty_changes_a_repeating_text(model: Model) -> None:
    plain = model.generate(PROMPT, max_tokens=16, temperature=0).tokens
    other = model.generate(PROMPT, max_tokens=16, temperature=0, repeat_penalty=50.0).tokens
    assert len(set(other)) == 16 > len(set(plain))
    assert not set(other) & set(model.tokenize(PROMPT))


def test_stream_pieces_join_to_the_completion(model: Model) -> None:
    stream = model.stream(PROMPT, max_tokens=20, seed=3)
    with pytest.raises(BackendError, match="not ended"):
        _ = stream.completion
    pieces = list(stream)
    assert "".join(pieces) == stream.completion.text == model.detokenize(stream.completion.tokens)
    assert list(stream) == []


def test_stop_string_ends_the_text_and_is_not_part_of_it(model: Model) -> None:
    # The model's own text gives the stop string: four characters across token boundaries.
    text = model.generate(PROMPT, max_tokens=24, seed=3, temperature=0.7).text
    stop = text[5:9]
    stream = model.stream(PROMPT, max_tokens=24, seed=3, temperature=0.7, stop=stop)
    shown = "".join(stream)
    assert shown == text[: text.find(stop)] == stream.completion.text
    assert stream.completion.finish_reason == "stop"


def test_end_token_ends_with_stop(model: Model) -> None:
    done = model.generate(PROMPT, grammar='root ::= "yes" | "no"', seed=1)
    assert done.text in ("yes", "no")
    assert done.finish_reason == "stop"


def test_max_tokens_zero_evaluates_the_prompt_only(model: Model) -> None:
    done = model.generate(PROMPT, max_tokens=0)
    assert (done.text, done.tokens, done.finish_reason) == ("", [], "length")
    assert model.tokens == model.tokenize(PROMPT)


def test_full_context_ends_with_length(melt_gguf: Path) -> None:
    with melt_edge.load(melt_gguf, n_ctx=32, n_threads=1) as model:
        done = model.generate("a", grammar="root ::= [a-z]+ root", temperature=0)
        assert done.finish_reason == "length"
        # Every row of the context is used, and the last token needs none.
        assert len(model.tokens) == 32
        assert len(done.tokens) == 32 + 1 - len(model.tokenize("a"))


def test_prompt_that_does_not_fit_names_both_lengths(melt_gguf: Path) -> None:
    with melt_edge.load(melt_gguf, n_ctx=32, n_threads=1) as model:
        with pytest.raises(ContextOverflowError, match=r"40 tokens.* room for 32"):
            model.generate([4] * 40)
        with pytest.raises(ContextOverflowError, match="room for 32"):
            model.generate("x" * 5_000_000)
        assert len(model.generate([4] * 32).tokens) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"min_p": "x"}, "min_p is 'x'"),
        ({"repeat_penalty": 0}, "repeat_penalty is 0"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"max_tokens": True}, "max_tokens is True"),
        ({"temperature": 10**400}, "temperature is 1000"),
        ({"top_k": 10**5000}, "top_k is a number of thousands of digits"),
        ({"min_p": float("inf")}, "min_p is inf"),
        ({"top_p": True}, "top_p is True"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**70}, "seed is 1180591620717411303424"),
        ({"stop": 5}, "stop is 5, expected text"),
        ({"json_schema": 5}, "json_schema"),
        ({"grammar": 5}, "grammar is empty or no text"),
        ({"grammar": "root ::= ("}, "grammar cannot be parsed"),
        ({"grammar": "other ::= 'a'"}, "grammar cannot be parsed"),
        ({"grammar": " "}, "grammar is empty"),
        ({"grammar": 'root ::= "a"', "json_schema": {}}, "both given"),
        ({"json_schema": "[1]"}, "expected a JSON object"),
        ({"json_schema": "{"}, "json_schema cannot be turned"),
    ],
)
def test_bad_options_are_named_and_change_nothing(model: Model, options: dict[str, object], message: str) -> None:
    model.generate(PROMPT, max_tokens=2)
    before = model.tokens
    with pytest.raises(ConfigError, match=re.escape(message)):
        model.stream(PROMPT, **options)  # type: ignore[arg-type]
    assert model.tokens == before


def test_json_schema_gives_json_of_that_shape(model: Model) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    for seed in range(3):
        answer = json.loads(model.generate(PROMPT, json_schema=schema, seed=seed).text)
        assert isinstance(answer["ok"], bool)
        assert list(answer) == ["ok"]
    assert grammar_text(None, json.dumps(schema)) == grammar_text(None, schema)


def test_grammar_that_no_token_can_meet_is_an_error_not_an_abort(model: Model) -> None:
    # Token 300000 does not exist, so nothing can follow.
    with pytest.raises((BackendError, ConfigError)):
        model.generate(PROMPT, grammar="root ::= <[300000]>", max_tokens=4)
    assert model.generate(PROMPT, max_tokens=2).finish_reason == "length"


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ("root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000, "1024 parentheses"),
        ('root ::= "' + "a" * 2**17 + '"', "131072 bytes"),
        ("root ::= [" + "ab" * 600 + "]", "characters in one"),
        ("root ::= " + '("a")' * 9000, "8192 rules"),
        ("root ::= " + '"a"{2000} ' * 300, "500000 elements"),
        ('root ::= "' + "a" * 300 + '"{2000}', "500000 elements"),
        ('root ::= "a"{5,2}', "smaller number first"),
        ("root ::= " + " | ".join(f'"x{at}"' for at in range(5000)), "4096 ways"),
        ("root ::= r0\n" + "\n".join(f"r{at} ::= r{at + 1} | r{at + 1}" for at in range(40)) + '\nr40 ::= "a"', "4096"),
        ("root ::= " + '"a"? ' * 1000, "100 ways to go on behind optional"),
        ('root ::= ((("a"?){0,12}){0,12}){0,10}', "100 ways to go on behind optional"),
        ("root ::= r0\n" + "\n".join(f"r{at} ::= r{at + 1}" for at in range(2000)) + '\nr2000 ::= "a"', "1024 rules"),
        ('root ::= root "a"', "left-recursive: rule 'root'"),
        ('root ::= ("x"?) root "a" | "b"', "left-recursive: rule 'root'"),
        ('root ::= a\na ::= b "x"\nb ::= a | "y"', "left-recursive"),
        ('root ::= "a\ud800"', "lone surrogate"),
        ('root ::= "a', "cannot be parsed"),
    ],
    ids=lambda value: value[:24] if len(value) < 40 else None,
)
def test_grammars_that_llama_cpp_could_not_stand_are_refused(model: Model, grammar: str, message: str) -> None:
    """Each killed the process, hung it or filled its memory, or is at a limit that keeps others from it."""
    with pytest.raises(ConfigError, match=message):
        model.generate(PROMPT, grammar=grammar, max_tokens=1)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {f"key{at}": {"type": "string"} for at in range(90)}},
        {"type": "string", "maxLength": 500},
        {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 300},
        {"enum": [f"word {at}" for at in range(2000)]},
        {"type": "string", "pattern": "^(a|b)?(c(d?)){3,9}[^x]*$"},
    ],
    ids=["properties", "maxLength", "maxItems", "enum", "pattern"],
)
def test_the_grammars_of_large_honest_schemas_are_within_the_limits(model: Model, schema: dict[str, object]) -> None:
    assert model.generate(PROMPT, json_schema=schema, max_tokens=3, seed=1).tokens


def test_llama_cpps_own_grammars_are_within_the_limits(model: Model) -> None:
    module = import_llama_cpp().llama_grammar
    texts = [getattr(module, name) for name in dir(module) if name.endswith("_GBNF")]
    assert texts
    for text in texts:
        model.check_grammar(text)


def test_a_deep_schema_is_a_typed_error(model: Model) -> None:
    schema: dict[str, object] = {"type": "string"}
    for _ in range(5000):
        schema = {"items": schema}
    with pytest.raises(ConfigError, match="json_schema cannot be turned"):
        model.generate(PROMPT, json_schema=schema)


def test_the_bindings_refuse_what_their_library_aborts_on(model: Model) -> None:
    """A grammar that does not parse, or that leaves no token, ended the process."""
    module = import_llama_cpp()
    for grammar, error in [("root ::= (", ConfigError), ("root ::= <[300000]>", BackendError)]:
        with pytest.raises(error):
            model.llama("hi", grammar=module.LlamaGrammar.from_string(grammar))
    done = model.llama("hi", grammar=module.LlamaGrammar.from_string('root ::= "yes" | "no"'))
    assert done["choices"][0]["text"] in ("yes", "no")


def test_file_defaults_and_overrides() -> None:
    keys = {"general.sampling.temp": 0.25, "general.sampling.top_k": -1, "general.name": "x"}
    params = file_defaults(keys, source="f.gguf")
    assert (params.temperature, params.top_k, params.top_p) == (0.25, 0, 0.95)
    assert with_overrides(params, temperature=0, top_p=None).temperature == 0.0
    with pytest.raises(ConfigError, match=r"f\.gguf: key 'general\.sampling\.top_p' is 7"):
        file_defaults({"general.sampling.top_p": 7}, source="f.gguf")


def test_the_files_sampling_keys_are_the_defaults(model: Model) -> None:
    assert model.sampling_defaults.temperature == pytest.approx(0.7)  # tests/tiny.py's generation_config
    assert model.sampling_defaults.top_p == pytest.approx(0.9)


def test_append_continues_the_cache(ouro: Model) -> None:
    whole = ouro.tokenize(PROMPT + " The answer is")
    ouro.generate(whole[:9], max_tokens=0)
    done = ouro.generate(whole[9:], append=True, max_tokens=8, temperature=0)
    assert done.timings.prompt_tokens == len(whole) - 9
    assert done.tokens == ouro.generate(whole, max_tokens=8, temperature=0).tokens


def test_stream_interrupted_by_another_call_says_so(model: Model) -> None:
    stream = model.stream(PROMPT, max_tokens=20, grammar="root ::= [a-z]+ root")
    next(stream)
    model.reset()
    with pytest.raises(BackendError, match="used by another call"):
        next(stream)
    assert model.tokens == []


def test_keyboard_interrupt_leaves_the_model_usable(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = model.generate(PROMPT, max_tokens=8, temperature=0).tokens
    low_decode = model.llama._ctx.decode
    calls = 0

    def decode(batch: object) -> None:
        nonlocal calls
        calls += 1
        low_decode(batch)
        if calls == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(model.llama._ctx, "decode", decode)
    with pytest.raises(KeyboardInterrupt):
        model.generate(PROMPT, max_tokens=8, temperature=0)
    monkeypatch.undo()
    assert model.generate(PROMPT, max_tokens=8, temperature=0).tokens == expected


# -- chat


def test_chat_uses_the_files_template_and_ends(model: Model) -> None:
    done = model.chat(USER, max_tokens=5, seed=1)
    assert len(done.tokens) <= 5
    text = model.render_chat(USER)
    assert text.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert model.tokens[: len(done.tokens)] == model.tokenize(text, add_special=False)[: len(done.tokens)]


@pytest.mark.parametrize("kind", ["ouro", "melt, chunk 1"])
def test_continued_chat_equals_a_fresh_one(kind: str, ouro_gguf: Path, melt_gguf: Path) -> None:
    path, chunk = (ouro_gguf, None) if kind == "ouro" else (melt_gguf, 1)
    word = 'root ::= "yes" | "no"'
    with melt_edge.load(path, chunk_size=chunk, n_threads=1) as model:
        first = model.chat(USER, grammar=word, temperature=0)
        cached = model.tokens
        messages = [*USER, {"role": "assistant", "content": first.text}, {"role": "user", "content": "and?"}]
        tokens = model.tokenize(model.render_chat(messages), add_special=False)
        continued = model.chat(messages, max_tokens=8, temperature=0)
        if tokens[: len(cached)] == cached:
            assert continued.timings.prompt_tokens == len(tokens) - len(cached)
        model.reset()
        fresh = model.chat(messages, max_tokens=8, temperature=0)
        assert fresh.timings.prompt_tokens == len(tokens)
        assert fresh.tokens == continued.tokens


def test_chat_keeps_the_cache_exactly_when_the_conversation_extends_it(ouro: Model) -> None:
    text = ouro.render_chat(USER)
    ouro.generate(ouro.tokenize(text, add_special=False)[:5], max_tokens=0)
    total = len(ouro.tokenize(text, add_special=False))
    assert ouro.chat(USER, max_tokens=1).timings.prompt_tokens == total - 5
    ouro.generate("something else", max_tokens=0)
    assert ouro.chat(USER, max_tokens=1).timings.prompt_tokens == total


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hi", "messages is str"),
        ([], "0 entries"),
        ([1], r"messages\[0\] is int"),
        ([{"role": "user"}], r"messages\[0\] has content None"),
        ([{"role": "user", "content": "a"}, {"role": 3, "content": "a"}], r"messages\[1\] has role 3"),
        ([{"role": "user", "content": "a", "x": object()}], "not plain data"),
    ],
)
def test_messages_of_another_shape_are_refused(messages: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        checked_messages(messages)  # type: ignore[arg-type]


def render(template: str) -> str:
    return render_chat(template, USER, bos_token="<b>", eos_token="<e>", source="model.gguf")


def test_template_renders_as_hugging_face_does() -> None:
    assert render(CHAT_TEMPLATE) == (
        "<|im_start|>system\nYou are a careful assistant<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    # trim_blocks and lstrip_blocks, loop controls, tojson without HTML escapes, the generation tag
    assert render("  {% if true %}\nx\n  {% endif %}\ny") == "x\ny"
    assert render("{{ bos_token }}{{ eos_token }}{{ {'a': '<é>'} | tojson }}") == '<b><e>{"a": "<é>"}'
    assert render("{% for m in messages %}{% generation %}{{ m.role }}{% endgeneration %}{% break %}{% endfor %}") == (
        "user"
    )
    assert re.fullmatch(r"\d{4}", render("{{ strftime_now('%Y') }}"))


def test_template_that_refuses_is_the_users_error() -> None:
    with pytest.raises(ConfigError, match="refuses these messages: roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "needs more than 2 s"),
        ("{{ 'x' * 10**9 }}", "256 MB"),
        ("{% set n = namespace(x='a'*999) %}{% for i in range(40) %}{% set n.x = n.x + n.x %}{% endfor %}", "256 MB"),
        ("{% if %}", "does not work"),
        ("{{ ().__class__.__mro__ }}", "does not work"),
        ("{{ missing.attribute }}", "does not work"),
    ],
)
def test_hostile_or_broken_templates_are_refused(template: str, message: str) -> None:
    with pytest.raises(FormatError, match=rf"model\.gguf: the chat template.*{message}"):
        render(template)


def test_jinja2_is_found_where_only_this_process_looks(tmp_path: Path) -> None:
    """The worker ignores PYTHONPATH and the user site; jinja2 only there was told as a template too large."""
    import jinja2
    import markupsafe

    for module in (jinja2, markupsafe):
        (tmp_path / module.__name__).symlink_to(Path(str(module.__file__)).parent)
    (tmp_path / "json.py").write_text("raise SystemExit('the standard library is shadowed')")
    code = (
        "import importlib.util, subprocess, sys\n"
        "real = subprocess.run\n"
        # -S: as if jinja2 were in no place that the interpreter knows by itself.
        "subprocess.run = lambda command, **more: real([command[0], '-S', *command[1:]], **more)\n"
        "from melt_edge.runtime import template\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "print(template.render_chat('{{ messages[0].content }}', [{'role': 'user', 'content': 'found'}],"
        " bos_token='', eos_token=''))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path.parent, check=False
    )
    assert done.stdout == "found\n", done.stderr


@pytest.mark.parametrize("program", ["/opt/app/editor", ""])
def test_a_program_that_embeds_python_is_not_started_again(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing.spawn, "_python_exe", program)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("started"))
    with pytest.raises(BackendError, match=r"needs a Python interpreter.*multiprocessing\.set_executable"):
        render("x")


def test_a_frozen_program_is_not_started_but_a_named_interpreter_is(monkeypatch: pytest.MonkeyPatch) -> None:
    python = sys.executable
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setattr(multiprocessing.spawn, "_python_exe", python)
    with pytest.raises(BackendError, match="needs a Python interpreter"):
        render("x")
    monkeypatch.setattr(sys, "executable", "/opt/app/python-editor")
    assert render("x") == "x"


def test_a_worker_that_cannot_start_is_not_the_templates_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "worker.py"
    broken.write_text("import a_module_that_is_not_there")
    monkeypatch.setattr(template, "_WORKER", broken)
    with pytest.raises(BackendError, match=r"cannot be started .*a_module_that_is_not_there"):
        render("x")
    monkeypatch.setattr(multiprocessing.spawn, "_python_exe", str(tmp_path / "python3"))
    with pytest.raises(BackendError, match="cannot be started"):
        render("x")


def test_file_without_a_template_says_what_to_do(make_gguf: object, tmp_path: Path) -> None:
    from melt_edge.export.gguf import export_gguf
    from tiny import tiny_checkpoint

    folder = tiny_checkpoint(tmp_path / "plain", tiny_config("ouro"))
    config = folder / "tokenizer_config.json"
    keys = json.loads(config.read_text())
    del keys["chat_template"]
    config.write_text(json.dumps(keys))
    export_gguf(folder, tmp_path / "plain.gguf", type="f32", verify=False)
    with melt_edge.load(tmp_path / "plain.gguf", n_threads=1) as model:
        assert not model.has_chat_template
        with pytest.raises(ConfigError, match="has no chat template"):
            model.chat(USER)
