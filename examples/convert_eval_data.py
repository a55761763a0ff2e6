"""Turn evaluation sets, as their authors publish them, into files that `cats eval --data-dir` reads.

The result has the columns of the datasets on the Hugging Face hub, so that lm-eval's own task definitions work on it:

    python examples/convert_eval_data.py data arc_easy=ARC-Easy-Test.jsonl openbookqa=test.jsonl piqa=valid.jsonl \
        hellaswag=hellaswag_val.jsonl blimp=blimp.jsonl wikitext=wiki.test.raw wikitext_plain=wiki.valid.tokens

writes data/arc_easy.jsonl and so on; blimp becomes one file for each of its paradigms, data/blimp_UID.jsonl.
wikitext_plain is text to calibrate on, data/wikitext_plain.txt, with the marks of WikiText's tokenisation undone.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read_jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.strip():
                yield json.loads(line)


def ai2(path: Path, stem: str) -> Iterator[Row]:
    """ARC and OpenBookQA: AI2's {"id", "question": {"stem", "choices": [{"text", "label"}]}, "answerKey"}."""
    for row in read_jsonl(path):
        choices = row["question"]["choices"]
        yield {
            "id": row["id"],
            stem: row["question"]["stem"],
            "choices": {"text": [c["text"] for c in choices], "label": [c["label"] for c in choices]},
            "answerKey": row["answerKey"],
        }


def piqa(path: Path) -> Iterator[Row]:
    """PIQA: {"goal", "sol1", "sol2"}, and beside it a file with one label a line, NAME-labels.lst."""
    labels_file = path.with_name(f"{path.stem}-labels.lst")
    if not labels_file.is_file():
        raise SystemExit(f"error: {path} needs its labels beside it, in {labels_file}.")
    labels = labels_file.read_text(encoding="utf-8").split()
    rows = list(read_jsonl(path))
    if len(labels) != len(rows):
        raise SystemExit(f"error: {path} has {len(rows)} rows but {labels_file} has {len(labels)} labels.")
    for row, label in zip(rows, labels, strict=True):
        yield {"goal": row["goal"], "sol1": row["sol1"], "sol2": row["sol2"], "label": int(label)}


def hellaswag(path: Path) -> Iterator[Row]:
    """HellaSwag, the original rows or {"activity_label", "ctx", "endings", "label"} with the context in one piece.

    lm-eval joins ctx_a and ctx_b and capitalises the latter. A context in one piece is split where its last, unfinished
    sentence begins, as in the original.
    """
    for number, row in enumerate(read_jsonl(path)):
        if "ctx_a" not in row:
            end = max((m.end() for m in re.finditer(r"[.!?] ", row["ctx"])), default=0)
            row["ctx_a"], row["ctx_b"] = row["ctx"][:end].rstrip(), row["ctx"][end:]
        yield {
            "ind": row.get("ind", number),
            "activity_label": row["activity_label"],
            "ctx_a": row["ctx_a"],
            "ctx_b": row["ctx_b"],
            "ctx": row["ctx"],
            "endings": row["endings"],
            "label": str(row["label"]),
        }


def wikitext(path: Path) -> Iterator[Row]:
    """WikiText: one article a row, in the original tokenisation, as EleutherAI/wikitext_document_level has it."""
    heading = re.compile(r" = [^=].* = \n?")
    page: list[str] = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            if heading.fullmatch(line) and page and any(text.strip() for text in page):
                yield {"page": "".join(page)}
                page = []
            page.append(line)
    if any(text.strip() for text in page):
        yield {"page": "".join(page)}


# in this order; what lm-eval's own detokenizer for WikiText undoes, and contractions other than 's
MARKS = [
    (r" <unk>(?= |$)", ""),  # a word that is not known any more
    (r" @([-,.])@ ", r"\1"),  # inside numbers and compounds
    (r" ([.,:;!?%)\]}°])", r"\1"),
    (r"([(\[{$£]) ", r"\1"),
    (r'" ([^"]*?) ?"', r'"\1"'),
    (r" '(s|t|re|ve|ll|d|m)\b", r"'\1"),
    (r"(?<=s) '(?= )", "'"),
    (r"(?<= )' ([^']*?) ?'(?=\W|$)", r"'\1'"),
    (r' ?(""|\(\))', ""),  # nothing was left inside
    (r" ?@[-,.]@ ?|  +", " "),
]


def plain(line: str) -> str:
    """A line of WikiText as people write: " @-@ " is a hyphen again, and punctuation follows its word."""
    line = " " + re.sub(r"=( =)+", lambda match: match[0].replace(" ", ""), line.strip())
    for mark, text in MARKS:
        line = re.sub(mark, text, line)
    return line.strip()


def wikitext_plain(path: Path) -> str:
    """WikiText as plain text, articles separated by <|endoftext|>."""
    pages = ([plain(line) for line in row["page"].splitlines()] for row in wikitext(path))
    return "\n<|endoftext|>\n".join("\n".join(line for line in page if line) for page in pages) + "\n"


CONVERTERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    "arc_easy": lambda path: ai2(path, "question"),
    "arc_challenge": lambda path: ai2(path, "question"),
    "openbookqa": lambda path: ai2(path, "question_stem"),
    "piqa": piqa,
    "hellaswag": hellaswag,
    "wikitext": wikitext,
}


def blimp(path: Path) -> dict[str, list[Row]]:
    """BLiMP, all paradigms in one file, to the names of lm-eval's tasks."""
    found: dict[str, list[Row]] = {}
    for row in read_jsonl(path):
        found.setdefault(f"blimp_{row['UID']}", []).append(row)
    return found


def convert(task: str, path: Path) -> dict[str, list[Row]]:
    """Rows by the name of the task."""
    if task == "blimp":
        return blimp(path)
    if task not in CONVERTERS:
        raise SystemExit(
            f"error: no converter for {task!r}; there is one for blimp, wikitext_plain, {', '.join(CONVERTERS)}."
        )
    return {task: list(CONVERTERS[task](path))}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("out", type=Path, help="folder to write into; made if need be")
    parser.add_argument("sources", nargs="+", metavar="TASK=FILE", help="what to convert")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    for source in given.sources:
        task, equals, file = source.partition("=")
        if not equals or not Path(file).is_file():
            raise SystemExit(f"error: {source!r} is not TASK=FILE with a file that exists.")
        try:
            if task == "wikitext_plain":
                text = wikitext_plain(Path(file))
                (given.out / f"{task}.txt").write_text(text, encoding="utf-8")
                print(f"{task}: {len(text)} characters")
                continue
            tables = convert(task, Path(file))
        except (KeyError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise SystemExit(f"error: {file} is not {task} data: {type(error).__name__} {error}.") from error
        for name, rows in tables.items():
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (given.out / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{task}: {sum(map(len, tables.values()))} rows in {len(tables)} file{'s' * (len(tables) > 1)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
