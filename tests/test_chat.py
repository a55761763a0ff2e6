"""Conversations as data sets spell them, through chat templates that take or refuse them, to every reader of text."""

import json
import shutil

import pytest

from cats_llm import bundled
from cats_llm.chat import conversation, render
from cats_llm.cli.main import main
from cats_llm.errors import CatsError
from cats_llm.loading import load_tokenizer
from cats_llm.text import RowFormat, TextSource, load_sequences, read_documents
from cats_llm.training.data import IGNORED, is_instructions, read_instructions

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] + '\n' }}"
    "{% if m['tool_calls'] is defined %}[{{ m['tool_calls'][0]['name'] }}]{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
STRICT = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
USER, ANSWER = {"role": "user", "content": "Who is there?"}, {"role": "assistant", "content": "The miller."}
SYSTEM = {"role": "system", "content": "Be brief."}
TEXT = "<user>Who is there?\n<assistant>The miller.\n"


@pytest.fixture(scope="module")
def chatty():
    tokenizer = load_tokenizer(str(bundled.model_path()))
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def templated(chatty):
    """The tokenizer with another template."""

    def with_template(template):
        chatty.chat_template = template
        return chatty

    yield with_template
    chatty.chat_template = TEMPLATE


@pytest.fixture
def write(tmp_path):
    def write(*rows, name="rows.jsonl"):
        path = tmp_path / name
        if name.endswith(".parquet"):
            pa = pytest.importorskip("pyarrow")
            import pyarrow.parquet as pq

            pq.write_table(pa.Table.from_pylist(list(rows)), path)
        else:
            path.write_text("\n".join(json.dumps(row) for row in rows))
        return str(path)

    return write


SPELLINGS = {
    "messages": [USER, ANSWER],
    "from and value": [
        {"from": "human", "value": "Who is there?"},
        {"from": "gpt", "value": "The miller.", "weight": 1},
    ],
    "parts": [
        {"role": "user", "content": [{"type": "text", "text": "Who is "}, {"type": "text", "text": "there?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "The miller."}]},
    ],
    "keys without a value": [USER | {"name": None, "tool_calls": None}, ANSWER | {"tool_calls": None}],
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_of_one_conversation(chatty, spelling):
    found = render(conversation(SPELLINGS[spelling], "row 1"), chatty, "row 1")
    assert found == TEXT


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
@pytest.mark.parametrize(
    ("row", "reading"),
    [
        ({"messages": [USER, ANSWER]}, {}),
        ({"conversations": SPELLINGS["from and value"]}, {}),
        ({"chat": [USER, ANSWER]}, {"text_column": "chat"}),
        ({"messages": [USER, ANSWER]}, {"text_column": "messages"}),
        ({"prompt": [USER], "completion": [ANSWER]}, {}),
        ({"text": None, "messages": [USER, ANSWER]}, {}),
    ],
)
def test_rows_that_hold_a_conversation(chatty, write, name, row, reading):
    source = write(row, name=name)
    source = TextSource(source, RowFormat(**reading))
    assert list(read_documents(source, tokenizer=chatty)) == [TEXT]
    assert is_instructions(source)
    (example,) = read_instructions(source, chatty, 64).examples
    assert chatty.decode(example["labels"][example["labels"] != IGNORED]).endswith("The miller.\n")


def test_hub_datasets_hold_conversations_too(chatty, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: iter([{"messages": [USER, ANSWER]}]))
    assert list(read_documents("org/name", tokenizer=chatty)) == [TEXT]
    assert len(read_instructions("org/name", chatty, 64).examples) == 1


def test_a_text_beside_messages_is_what_counts(chatty, write):
    source = write({"text": "a text", "messages": [USER, ANSWER]})
    assert list(read_documents(source, tokenizer=chatty)) == ["a text"]
    assert not is_instructions(source)


def test_a_call_of_a_tool_has_no_content(chatty, write):
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "look", "arguments": "{}"}]}
    without = {"role": "assistant", "tool_calls": [{"name": "look"}]}
    for message in (call, without):
        (text,) = read_documents(write({"messages": [USER, message]}), tokenizer=chatty)
        assert text == "<user>Who is there?\n<assistant>\n[look]"
        assert "None" not in text


def test_empty_conversations_are_left_out(chatty, write, caplog):
    source = write({"messages": [USER, ANSWER]}, {"messages": []}, {"messages": None}, {"messages": [USER, ANSWER]})
    assert list(read_documents(source, tokenizer=chatty)) == [TEXT] * 2
    assert "2 of 4 rows hold no text and were left out (first: line 2" in caplog.text
    found = read_instructions(source, chatty, 64)
    assert (len(found.examples), found.empty) == (2, 2)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "no conversation"),
        (["hello"], "no conversation"),
        ([USER, {"content": "x"}], r"line 2 of .*, message 2, is no part of a conversation .*\(it has: content\)"),
        ([USER, {"role": "assistant"}], r"message 2, is no part of a conversation"),
        ([{"role": 3, "content": "x"}], r"message 1, is no part of a conversation"),
        ([{"role": "user", "content": 3}], r"message 1, has a content of int"),
        ([{"role": "user", "content": {"a": 1}}], r"message 1, has a content of dict"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, ANSWER],
            "content of image_url, and only",
        ),
    ],
)
def test_what_is_no_conversation_stops_with_its_line(chatty, write, messages, message):
    source = write({"messages": [USER, ANSWER]}, {"messages": messages})
    for read in (
        lambda: list(read_documents(source, tokenizer=chatty)),
        lambda: read_instructions(source, chatty, 64),
    ):
        with pytest.raises(CatsError, match=message) as caught:
            read()
        assert "line 2 of" in str(caught.value)


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        (STRICT, [SYSTEM, USER, ANSWER], "no system role"),
        (STRICT, [ANSWER, USER], "roles must alternate"),
        (STRICT, [USER, USER, ANSWER], "roles must alternate"),
        ("{{ messages[5]['content']['x'] }}", [USER, ANSWER], "no element 5"),
        ("{{ messages[0]['content'] + 1 }}", [USER, ANSWER], "concatenate"),
        ("{{ 1 // (messages | length - 2) }}", [USER, ANSWER], "zero"),
        ("{{ messages | nothing }}", [USER, ANSWER], "nothing"),
        ("{% for m in messages %}", [USER, ANSWER], "Unexpected end"),
        ({"rag": "{{ messages }}"}, [USER, ANSWER], "default"),
    ],
)
def test_what_the_template_refuses_stops_with_its_line(templated, write, template, messages, reason):
    tokenizer = templated(template)
    source = write(*[{"messages": messages}] * 2)
    for read in (
        lambda: list(read_documents(source, tokenizer=tokenizer)),
        lambda: read_instructions(source, tokenizer, 64),
    ):
        with pytest.raises(CatsError, match=f"line 1 of .* chat template refuses .*{reason}.*; change them") as caught:
            read()
        assert "\n" not in str(caught.value)


def test_without_a_template_or_a_tokenizer_there_is_one_sentence(templated, write):
    source = write({"messages": [USER, ANSWER]})
    with pytest.raises(CatsError, match=r"line 1 of .* the tokenizer has no chat template"):
        list(read_documents(source, tokenizer=templated(None)))
    with pytest.raises(CatsError, match="need a tokenizer with a chat template"):
        list(read_documents(source))


def test_a_template_that_takes_parts_only_gets_parts(templated):
    # as those of models that see: a content that is no list is passed over in silence, or refused
    silent = (
        "{% for m in messages %}{{ m['role'] }}: {% for part in m['content'] | selectattr('type', 'equalto', 'text') %}"
        "{{ part['text'] + '\n' }}{% endfor %}{% endfor %}"
    )
    strict = "{% for m in messages %}{{ m['role'] + ': ' + m['content'][0]['text'] + '\n' }}{% endfor %}"
    for template in (silent, strict):
        found = render([USER, ANSWER], templated(template), "row 1")
        assert found == "user: Who is there?\nassistant: The miller.\n"


def test_a_template_may_show_texts_in_its_own_way(templated):
    tokenizer = templated("{% for m in messages %}{{ m['content'] | upper }} {% endfor %}")
    assert render([USER, ANSWER], tokenizer, "row 1") == "WHO IS THERE? THE MILLER. "


def test_special_tokens_come_once(templated, write):
    """A conversation in a stream of texts: the template's own beginning and end are not added a second time."""
    tokenizer = templated("{{ bos_token }}{% for m in messages %}{{ m['content'] }} {% endfor %}{{ eos_token }}\n")
    from tokenizers.processors import TemplateProcessing

    before = tokenizer._tokenizer.post_processor
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    try:
        source = write(*[{"messages": [USER, ANSWER]}] * 3)
        body = tokenizer("Who is there? The miller. ", add_special_tokens=False).input_ids
        stream = [*body, tokenizer.eos_token_id] * 3
        (ids,) = load_sequences(source, tokenizer, len(stream) + 1)
        assert ids.tolist() == [tokenizer.bos_token_id, *stream]
    finally:
        tokenizer._tokenizer.post_processor = before


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """The bundled model with a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(bundled.model_path(), folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": STRICT}))
    return folder


def test_commands_read_conversations(model_folder, write, tmp_path, capsys):
    rows = [{"messages": [USER, ANSWER | {"content": "He went home and sat by the fire. " * 8}]}] * 8
    data, other = write(*rows), write({"messages": None}, *rows[:4], name="other.jsonl")
    small = ["--seq-length", "32", "--samples", "2"]
    run = [
        ["calibrate", "--data", data, "-o", tmp_path / "p.safetensors", *small],
        ["sparsify", tmp_path / "out", "--sparsity", "0.5", "--data", data, *small],
        ["eval", "--text", other, *small, "--no-cache"],
    ]
    for name, *arguments in run:
        assert main([name, str(model_folder), *map(str, arguments)]) == 0, capsys.readouterr().err
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "out"), "--text", other, "--seq-length", "32"]) == 0
    assert "warning: " in (printed := capsys.readouterr().err)
    assert "rows hold no text and were left out (first: line 1 of" in printed


def test_a_row_that_the_template_refuses_stops_commands_with_its_line(model_folder, write, tmp_path, capsys):
    data = write(*[{"messages": [USER, ANSWER]}] * 20, {"messages": [SYSTEM, USER, ANSWER]})
    small = ["--seq-length", "32", "--device", "cpu"]
    for command in (
        ["calibrate", model_folder, "--data", data, "-o", tmp_path / "p", *small],
        ["eval", model_folder, "--text", data, *small],
        ["finetune", model_folder, tmp_path / "o", "--method", "dense", "--data", data, *small],
    ):
        assert main([str(argument) for argument in command]) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: line 21 of "), error
        assert "no system role" in error
