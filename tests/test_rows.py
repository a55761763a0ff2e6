"""Rows of files as people have them: with marks, odd line ends, holes, damage, and what tools leave beside them."""

import gzip
import json
import logging
import os
import tracemalloc

import pytest

from cats_llm.errors import CatsError
from cats_llm.rows import SEPARATOR, Tally, pieces, read_rows
from cats_llm.text import RowFormat, TextSource, load_sequences, read_documents

BOM = b"\xef\xbb\xbf"


@pytest.fixture
def write(tmp_path):
    """Write a file of bytes, text or rows; returns its path as text."""

    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            content = "\n".join(json.dumps(row) for row in content)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return write


def documents(source, tally=None, **rows):
    return [document for document in read_documents(TextSource(source, RowFormat(**rows)), tally=tally) if document]


def parquet(path, table):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table(table), path)
    return str(path)


def test_rows_without_text_are_left_out_and_counted(write, tmp_path, caplog):
    texts = ["one", None, "", " \n", "two"]
    nan = {"id": 10, "text": float("nan")}  # as pandas writes a missing value
    rows = [{"id": i, "text": text} for i, text in enumerate(texts)]
    rows[2:2] = [nan, {"id": 9}]  # as some writers put a missing value
    sources = [
        write("a.jsonl", rows),
        write("a.json", json.dumps(rows)),
        parquet(tmp_path / "a.parquet", {"text": texts}),
    ]
    for source, place in zip(sources, ("line 2 of", "row 2 of", "row 2 of"), strict=True):
        tally = Tally()
        assert documents(source, tally=tally) == ["one", "two"]
        assert tally.empty == len(rows if source != sources[2] else texts) - 2
        assert tally.first_empty == f"{place} {source}"
        caplog.clear()
        assert documents(source) == ["one", "two"]
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert f"{tally.empty} of {tally.rows} rows hold no text and were left out (first: {place}" in record.message


def test_a_source_of_empty_rows_says_so(write):
    source = write("a.jsonl", [{"text": None}, {"text": " "}])
    with pytest.raises(CatsError, match="holds no text: all of its 2 rows are empty"):
        list(load_sequences(source, _Tokenizer(), 4))


class _Tokenizer:
    """One token a character."""

    eos_token_id = None

    def __call__(self, text, add_special_tokens=True, verbose=True):
        return type("Encoding", (), {"input_ids": [ord(c) for c in text]})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n\n{"text": "y', "line 3 of .* is not JSON"),
        ("a.jsonl", '{"text": "x"}\n{"text": 3}', "line 2 of .* has no text in the column 'text' but a int"),
        ("a.jsonl", '{"text": "x"}\n{"text": ["y"]}', "line 2 of .* but a list"),
        ("a.jsonl", '{"text": "x"}\n"y"', "line 2 of .* is no JSON object but a str"),
        ("a.jsonl", '{"text": "x"}\n{"n": ' + 5000 * "9" + "}", "line 2 of .* no JSON that can be read"),
        ("a.jsonl", '{"text": "x"}\n' + 100000 * "[", "line 2 of .* no JSON that can be read"),
        ("a.jsonl", '{"body": "x"}', r"line 1 of .* in the column 'text' \(it has: body\)"),
        ("a.jsonl", "{}", r"line 1 of .* in the column 'text' \(it has: nothing\)"),
        ("a.json", '[{"text": "x"}, 3]', "row 2 of .* is no JSON object but a int"),
        ("a.json", '[{"text": "x"}', "a.json is not JSON"),
        ("a.json", '{"text": "x"}\n{', "line 2 of .* is not JSON"),
        ("a.txt", b"one\ntwo \xe9t\xe9\n", r"a.txt is not UTF-8 text \(byte 8, in line 2\)"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xe9"}', r"not UTF-8 text \(byte 24, in line 2\)"),
        ("a.txt", "some text".encode("utf-16"), "not UTF-8 text but UTF-16; convert it"),
        ("a.jsonl", "some text".encode("utf-32"), "not UTF-8 text but UTF-32"),
        ("a.txt", "some text".encode("utf-16-le"), "full of zero bytes, as UTF-16"),
        ("a.txt.gz", b"plain text", "no gzip file, or it is damaged"),
        ("a.txt.gz", gzip.compress(b"some text " * 99, mtime=0)[:-9], "no gzip file, or it is damaged"),
        ("a.jsonl.zst", b"x", "unknown ending; decompress it first"),
        ("a.csv", b"x", "unknown ending; text is read from .txt, .jsonl, .parquet"),
        ("a.parquet.gz", b"x", "unknown ending"),
        ("a.txt", gzip.compress(b"some text", mtime=0), "compressed by gzip; call it .gz"),
        ("a.jsonl", b"PK\x03\x04...", "a zip archive; unpack it first"),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7\n", "pointer .* git lfs pull"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7\n", "pointer .* git lfs pull"),
    ],
)
def test_damage_is_named_with_its_place(write, name, content, message):
    with pytest.raises(CatsError, match=message) as caught:
        documents(write(name, content))
    assert "\n" not in str(caught.value)


def test_damaged_parquet_files_say_the_row(tmp_path):
    pa = pytest.importorskip("pyarrow")
    latin = pa.array([b"one", b"caf\xe9"], pa.binary()).view(pa.string())
    with pytest.raises(CatsError, match=r"row 2 of .* is not UTF-8"):
        documents(parquet(tmp_path / "latin.parquet", {"text": latin}))
    with pytest.raises(CatsError, match=r"row 2 of .* has no text in the column 'text' but a bytes"):
        documents(parquet(tmp_path / "bytes.parquet", {"text": pa.array([None, b"x"], pa.binary())}))
    file = tmp_path / "cut.parquet"
    parquet(file, {"text": [f"{i} {'word ' * 50}" for i in range(2000)]})
    data = bytearray(file.read_bytes())
    data[len(data) // 3 : len(data) // 3 + 4000] = bytes(4000)
    file.write_bytes(data)
    with pytest.raises(CatsError, match=r"cut.parquet.* damaged"):
        documents(str(file))


def test_a_dataset_that_fails_on_the_way_says_where(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def rows():
        yield {"text": "one"}
        yield {"text": None}
        raise ConnectionError("reset by peer\nmore")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows())
    with pytest.raises(CatsError, match=r"the dataset org/name cannot be read after row 2: reset by peer\.$"):
        documents("org/name")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: iter([{"text": "x"}, {"text": 3}]))
    with pytest.raises(CatsError, match="row 2 of the dataset org/name has no text"):
        documents("org/name")


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", BOM])
def test_line_ends_and_marks_are_no_text(write, ends, mark):
    text = f"one\nline two\n{SEPARATOR}\nthree\n".replace("\n", ends)
    assert documents(write("a.txt", mark + text.encode())) == ["one\nline two", "three"]
    lines = "".join(json.dumps({"text": text}) + ends for text in ("x", "y"))
    assert documents(write("a.jsonl", mark + lines.encode())) == ["x", "y"]
    # files that were joined have marks in their midst, tables have them in their cells
    assert documents(write("b.jsonl", mark + lines.encode() + BOM + lines.encode())) == ["x", "y"] * 2
    assert documents(write("c.jsonl", [{"text": "\ufeffx"}])) == ["x"]


def test_lines_end_where_files_say_and_nowhere_else(write):
    text = "one\u2028two\x0bthree\x85four"
    assert documents(write("a.jsonl", json.dumps({"text": text}, ensure_ascii=False))) == [text]
    assert documents(write("a.txt", text)) == [text]


def test_half_of_a_surrogate_pair_is_replaced_and_counted(write, caplog):
    lines = ['{"text": "whole"}', r'{"text": "half \ud83d of it"}', r'{"text": "\ud83d\ude00 \\ud83d \udc00"}']
    source = write("a.jsonl", "\n".join(lines))
    assert documents(source) == ["whole", "half \ufffd of it", "\U0001f600 \\ud83d \ufffd"]
    assert (
        f"2 of 3 rows hold half of a surrogate pair, for which U+FFFD was read (first: line 2 of {source})"
        in caplog.text
    )


def test_zero_characters_in_a_text_stay(write):
    assert documents(write("a.txt", "some words of which one is b\0d")) == ["some words of which one is b\0d"]
    assert documents(write("a.jsonl", [{"text": "b\0d"}])) == ["b\0d"]


def test_prompts_and_completions_are_one_text(write):
    rows = [{"prompt": "a ", "completion": "b"}, {"prompt": "c", "completion": None}, {"prompt": "", "completion": "d"}]
    assert documents(write("a.jsonl", rows)) == ["a b", "d"]
    with pytest.raises(CatsError, match=r"line 1 of .* no text in prompt and completion"):
        documents(write("b.jsonl", [{"prompt": 1, "completion": "b"}]))


def test_endings_in_capitals_and_compressed_files(write, tmp_path):
    write("A.TXT", "A")
    write("b.txt.gz", gzip.compress(b"B", mtime=0))
    write("c.JSONL.GZ", gzip.compress(b'{"text": "C"}', mtime=0))
    write("d.txt", "D")
    write("d.txt.gz", gzip.compress(b"D", mtime=0))  # left where it was unpacked
    assert documents(str(tmp_path)) == ["A", "B", "C", "D"]


JUNK = [
    "._a.txt", ".hidden.jsonl", ".ipynb_checkpoints/a-checkpoint.txt", "__MACOSX/a.txt", "__MACOSX/._a.txt",
    ".cache/huggingface/download/a.parquet", ".a.txt.swp", "a.txt~", "#a.txt#", "~$a.txt", ".#a.txt", ".git/a.txt",
    "Thumbs.db", "desktop.ini", "README.md", "dataset_infos.json", "sub/.DS_Store", ".Trash-0/files/a.txt",
]  # fmt: skip


def test_a_folder_is_read_without_what_tools_leave_in_it(write, tmp_path):
    for name in JUNK:
        write(name, b"\x00\xff junk")
    with pytest.raises(CatsError, match=r"holds no .txt, .jsonl, .parquet file"):
        documents(str(tmp_path))
    (tmp_path / ".lock.txt").symlink_to("user@host.1234")  # as emacs locks a file
    (tmp_path / "loop").symlink_to(tmp_path)
    write("sub/deep/b.txt", "B")
    write("a.txt", "A")
    write("empty.txt", "")
    write("empty.jsonl", "")
    (tmp_path / "spark.parquet").mkdir()
    write("spark.parquet/part-0.txt", "C")
    assert documents(str(tmp_path)) == ["A", "C", "B"]


def test_a_hidden_folder_or_file_that_is_named_is_read(write):
    source = write(".data/a.txt", "A")
    assert documents(source) == documents(os.path.dirname(source)) == ["A"]


def test_of_a_dataset_folder_one_split_is_read(write, tmp_path):
    write("README.md", "---\n---")
    for split in ("train", "test"):
        (tmp_path / "data").mkdir(exist_ok=True)
        for i in range(2):
            parquet(tmp_path / "data" / f"{split}-{i:05}-of-00002.parquet", {"text": [f"{split} {i}"]})
    assert documents(str(tmp_path)) == ["train 0", "train 1"]
    assert documents(str(tmp_path), split="test") == ["test 0", "test 1"]
    with pytest.raises(CatsError, match="no split 'validation', only test, train; pass --split"):
        documents(str(tmp_path), split="validation")
    for file in (tmp_path / "data").glob("test*"):
        file.unlink()
    assert documents(str(tmp_path), split="test") == ["train 0", "train 1"], "a folder of one split is that split"


def test_what_is_no_file_says_so(tmp_path):
    with pytest.raises(CatsError, match="no text is named"):
        documents("")  # and not the folder where the command is run
    with pytest.raises(CatsError, match="too long"):
        documents("some words that were passed in place of a file " * 20)
    with pytest.raises(CatsError, match="looked up"):
        documents("~nobody-of-this-name/a.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(CatsError, match="no file that can be read twice"):
        documents(str(tmp_path / "pipe.txt"))
    (tmp_path / "dangling.txt").symlink_to("nowhere")
    with pytest.raises(CatsError, match=r"could not read .*dangling.txt: No such file"):
        documents(str(tmp_path))


def test_names_that_are_not_utf8(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.txt"
    with open(path, "w") as file:
        file.write("A")
    assert documents(os.fsdecode(path)) == documents(str(tmp_path)) == ["A"]


def test_long_documents_are_cut_between_words(write, monkeypatch):
    monkeypatch.setattr("cats_llm.rows._LONGEST_DOCUMENT", 20)
    text = "eleven more words than fit into one of these pieces, it seems to me"
    for source in (write("a.txt", text), write("b.txt", f"first\n{text}\n{SEPARATOR}\nlast")):
        found = documents(source)
        assert " ".join(found).split() == (f"first {text} last" if "b.txt" in source else text).split()
        assert max(map(len, found)) <= 2 * 20
    assert documents(write("c.txt", "x" * 20)) == ["x" * 20]
    assert documents(write("d.txt", "x" * 20 + "\n")) == ["x" * 20]
    assert "".join(documents(write("e.txt", "x" * 99))) == "x" * 99, "a text without white space is cut somewhere"
    assert list(pieces("x y " * 10)) == ["x y " * 10]
    parts = list(pieces(text))
    assert "".join(parts) == text
    assert len(parts) == 3
    assert all(part.startswith(" ") for part in parts[1:]), "a word was cut"


def test_a_separator_is_a_line_of_its_own(write, monkeypatch):
    monkeypatch.setattr("cats_llm.rows._LONGEST_DOCUMENT", 20)
    # the separator is what is left of the line when its first part has been read
    assert "".join(documents(write("a.txt", "x" * 21 + SEPARATOR + "\ny"))).count(SEPARATOR) == 1


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_one_huge_text_needs_little_memory(write, tmp_path, tokenizer, kind):
    text = "The miller of the village went home in the evening. " * 100_000  # 5 MB
    source = {
        "txt": lambda: write("a.txt", text),
        "jsonl": lambda: write("a.jsonl", [{"text": text}]),
        "parquet": lambda: parquet(tmp_path / "a.parquet", {"text": [text]}),
    }[kind]()
    tracemalloc.start()
    try:
        found = list(load_sequences(source, tokenizer, 64, samples=2))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    expected = tokenizer(text[:2000], add_special_tokens=False).input_ids[:128]
    assert [token for ids in found for token in ids.tolist()] == expected
    assert peak < 10 * len(text), f"{peak / 1e6:.0f} MB for a text of {len(text) / 1e6:.0f} MB"


def test_tokens_do_not_depend_on_where_a_text_is_cut(tokenizer, monkeypatch, write):
    text = "The miller  of the village\nwent home, in the evening; and sat by the fire. " * 60
    source = write("a.jsonl", [{"text": text}])
    whole = [ids.tolist() for ids in load_sequences(source, tokenizer, 64)]
    monkeypatch.setattr("cats_llm.rows._LONGEST_DOCUMENT", 500)
    assert [ids.tolist() for ids in load_sequences(source, tokenizer, 64)] == whole


def test_rows_keep_all_columns_unless_told(write):
    source = write("a.jsonl", [{"a": 1, "b": 2}])
    assert list(read_rows(source)) == [(f"line 1 of {source}", {"a": 1, "b": 2})]
