"""Rows of CoLA, SST-2 and BoolQ that cannot become instructions, and kinds of rows that do not go together."""

import json

import pytest

from cats_llm import bundled
from cats_llm.errors import CatsError
from cats_llm.loading import load_tokenizer
from cats_llm.training.classification_data import write_instructions
from cats_llm.training.data import read_instructions


def test_line_separators_within_a_text_end_no_row(tmp_path):
    source, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps({"sentence": "One\u2028two.", "label": 1}, ensure_ascii=False), encoding="utf-8")
    write_instructions("cola", "train", out, source)
    (row,) = map(json.loads, out.read_text(encoding="utf-8").split("\n")[:-1])
    assert row["prompt"].startswith("One\u2028two.\n")
    assert row["completion"] == " yes"


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("sst2", {"sentence": None, "label": 1}, "line 2 of .* has no text in sentence, which sst2 needs"),
        ("cola", {"sentence": "x"}, r"line 2 of .* has no label of yes or no \(it is None\)"),
        ("cola", {"sentence": "x", "label": -1}, r"no label of yes or no \(it is -1\)"),  # as in the hub's test splits
        ("boolq", {"passage": "x", "answer": True}, "line 2 of .* has no text in passage and question"),
    ],
)
def test_rows_without_a_question_or_an_answer_stop_with_their_line(tmp_path, task, row, message):
    whole = {"sentence": "a", "label": 0, "passage": "b", "question": "c", "answer": False}
    source = tmp_path / "rows.jsonl"
    source.write_text(f"{json.dumps(whole)}\n{json.dumps(row)}")
    with pytest.raises(CatsError, match=message):
        write_instructions(task, "train", tmp_path / "out.jsonl", source)
    assert not (tmp_path / "out.jsonl").exists()


def test_texts_among_instructions_stop_with_their_line(tmp_path):
    source = tmp_path / "rows.jsonl"
    source.write_text('{"prompt": "a", "completion": "b"}\n{"text": "c"}')
    with pytest.raises(CatsError, match=r"line 2 of .* is a text, among rows with prompt and completion"):
        read_instructions(str(source), load_tokenizer(str(bundled.model_path())), 64)
