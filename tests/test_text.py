"""Text sources and token sequences, on files written here."""

import json

import pytest
import torch

from cats_llm.errors import CatsError
from cats_llm.rows import SEPARATOR
from cats_llm.text import (
    RowFormat,
    TextSize,
    TextSource,
    batched,
    load_sequences,
    read_documents,
    shuffled,
    token_sequences,
)


class Tokenizer:
    """One token a character; 1 begins a text if ``bos`` is set, 2 ends a document."""

    eos_token_id = 2

    def __init__(self, bos=False):
        self.bos_token_id = 1 if bos else None

    def __call__(self, text, add_special_tokens=True, verbose=True):
        bos = [1] if self.bos_token_id and add_special_tokens else []

        class Encoding:
            input_ids = bos + [ord(c) for c in text]

        return Encoding


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_txt_documents_are_separated_by_lines(tmp_path):
    source = write(tmp_path / "a.txt", f"one\nline two\n{SEPARATOR}\nzwei ä\n{SEPARATOR}\n")
    assert list(read_documents(source)) == ["one\nline two", "zwei ä", ""]


def test_a_long_document_is_cut_instead_of_filling_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("cats_llm.rows._LONGEST_DOCUMENT", 10)
    source = write(tmp_path / "a.txt", "12345\n67890\nabc\n")
    assert list(read_documents(source)) == ["12345\n67890", "abc"]


def test_jsonl_and_folder(tmp_path):
    write(tmp_path / "b.jsonl", json.dumps({"text": "B"}) + "\n\n" + json.dumps({"text": "C"}) + "\n")
    write(tmp_path / "a.txt", "A")
    write(tmp_path / "ignored.csv", "x")
    assert list(read_documents(str(tmp_path))) == ["A", "B", "C"]


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"content": ["x", "y"], "n": [1, 2]}), file)
    assert list(read_documents(TextSource(str(file), RowFormat("content")))) == ["x", "y"]
    with pytest.raises(CatsError, match=r"column 'text' \(it has: content, n\)"):
        list(read_documents(str(file)))
    file.write_bytes(b"PAR1 nonsense")
    with pytest.raises(CatsError, match="not a parquet file"):
        list(read_documents(str(file)))


def test_hub_datasets_are_streamed(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = {}

    def load_dataset(name, config, **options):
        asked.update(name=name, config=config, **options)
        return iter([{"content": "x"}, {"content": "y"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    documents = read_documents(TextSource("org/name", RowFormat("content", "en", "validation")))
    assert list(documents) == ["x", "y"]
    assert asked == {"name": "org/name", "config": "en", "split": "validation", "streaming": True}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"x", "unknown ending"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.jsonl", b"{", "line 1 of .* is not JSON"),
        ("a.jsonl", b'{"body": "x"}', r"column 'text' \(it has: body\)"),
        ("a.jsonl", b'{"text": 3}', "no text in the column"),
        ("a.jsonl", b'["x"]', "no text in the column"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CatsError, match=message):
        list(read_documents(str(tmp_path / name)))


def test_missing_files_and_empty_folders(tmp_path):
    for source in ("nope.txt", "./nope", str(tmp_path / "nope"), "a/b/c"):
        with pytest.raises(CatsError, match="no file or folder"):
            list(read_documents(source))
    with pytest.raises(CatsError, match="holds no"):
        list(read_documents(str(tmp_path)))


def test_sequences_are_consecutive_and_joined_by_end_of_text():
    sequences = list(token_sequences(["abc", "", "defg"], Tokenizer(), 3))
    assert [s.tolist() for s in sequences] == [[97, 98, 99], [2, 100, 101], [102, 103, 2]]


def test_every_sequence_begins_with_the_tokenizers_begin_of_text():
    sequences = list(token_sequences(["abcdef"], Tokenizer(bos=True), 3))
    assert [s.tolist() for s in sequences] == [[1, 97, 98], [1, 99, 100], [1, 101, 102]]
    with pytest.raises(CatsError, match="no room"):
        list(token_sequences(["abc"], Tokenizer(bos=True), 1))


def test_load_sequences_limits_and_shuffles(tmp_path):
    source = write(tmp_path / "a.txt", "".join(map(chr, range(97, 117))))
    in_order = [s.tolist() for s in load_sequences(source, Tokenizer(), 2)]
    assert len(in_order) == 10
    assert [s.tolist() for s in load_sequences(source, Tokenizer(), 2, samples=3)] == in_order[:3]
    drawn = [s.tolist() for s in load_sequences(source, Tokenizer(), 2, seed=1)]
    assert drawn != in_order
    assert sorted(drawn) == in_order
    assert drawn == [s.tolist() for s in load_sequences(source, Tokenizer(), 2, seed=1)]


def test_empty_and_short_texts(tmp_path):
    with pytest.raises(CatsError, match="holds no text"):
        list(load_sequences(write(tmp_path / "a.txt", " \n"), Tokenizer(), 4))
    with pytest.raises(CatsError, match="fewer tokens than one sequence of 9"):
        list(load_sequences(write(tmp_path / "b.txt", "abc"), Tokenizer(), 9))


@pytest.mark.parametrize("buffer", [1, 3, 100])
def test_shuffled_keeps_every_item(buffer):
    assert sorted(shuffled(range(20), seed=0, buffer=buffer)) == list(range(20))
    assert list(shuffled([], seed=0)) == []


def test_batched():
    rows = [torch.full((3,), i) for i in range(5)]
    assert [b.shape for b in batched(rows, 2)] == [(2, 3), (2, 3), (1, 3)]
    assert list(batched([], 2)) == []


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("stride", [1, 2, 3, 5, 6])
def test_overlapping_sequences_bring_every_token_once(bos, stride, tmp_path):
    documents, length = ["abcdefghij", "klm", "", "nopqrstuvw ä"], 6
    stream = [ord(c) for d in documents if d for c in [*d, chr(2)]]
    size = TextSize()
    sequences = [s.tolist() for s in token_sequences(documents, Tokenizer(bos), length, stride, size)]
    new = []
    for i, sequence in enumerate(sequences):
        assert (sequence[0] == 1) == bos
        new += sequence[int(bos) :] if i == 0 else sequence[-min(stride, length - int(bos)) :]
    assert new == stream[: len(new)]
    assert len(stream) - len(new) < stride, "more than a stride's rest was dropped"
    assert (size.tokens, size.words, size.bytes) == (len(stream), 4, 10 + 3 + 13)
