"""Tasks of lm-eval: the same numbers as its own command line, local data, our task files, and the converters."""

import copy
import importlib.util
import json
import sys
import warnings
from pathlib import Path

import lm_eval.tasks
import lm_eval.utils
import pytest
import torch
from jinja2 import Environment
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import TaskIndex

import cats_llm
from cats_llm import bundled
from cats_llm.checkpoint.token_policy import TokenPolicy
from cats_llm.evaluation.batch import BatchSize
from cats_llm.evaluation.cache import Cache
from cats_llm.evaluation.lm_eval_task import CatsLM
from cats_llm.evaluation.local_data import task_folder
from cats_llm.evaluation.run import run_evaluation
from cats_llm.evaluation.sparsity import SparsityCounter
from cats_llm.evaluation.task import Subject, TaskOptions
from cats_llm.evaluation.tasks import TASK_SETS, build_tasks, expand
from cats_llm.evaluation.variants import Variant, make_variants
from cats_llm.loading import load_model
from cats_llm.model.sparsify import as_dense

EXAMPLES = Path(__file__).parents[2] / "examples"
_spec = importlib.util.spec_from_file_location("convert_eval_data", EXAMPLES / "convert_eval_data.py")
convert = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(convert)

# the converters' input, as the authors of the data publish it
THINGS = ["lantern", "garden gate", "pot of honey", "little boat that lay on the shore", "crown"]
ARC = [
    {
        "id": f"q{i}",
        "question": {
            "stem": f"Where would a child look for the {thing}?",
            "choices": [
                {"text": text, "label": label} for label, text in zip("ABC", ("at home", thing, "x"), strict=True)
            ],
        },
        "answerKey": "ABC"[i % 3],
    }
    for i, thing in enumerate(THINGS)
]
PIQA = [{"goal": f"Carry the {t}.", "sol1": "With both hands.", "sol2": f"By eating the {t}!!"} for t in THINGS]
HELLASWAG = [
    {
        "ind": i,
        "activity_label": "Playing",
        "ctx": f"A girl finds a {t}. She is glad! the girl",
        "endings": [f"takes the {t} home.", "sleeps.", "is a stone.", "flies away in the night."],
        "label": i % 4,
    }
    for i, t in enumerate(THINGS)
]
BLIMP = [
    {"sentence_good": f"The girls see the {t}.", "sentence_bad": f"The girls sees the {t}.", "UID": uid, "pairID": "0"}
    for t in THINGS[:3]
    for uid in ("adjunct_island", "wh_island")
]
WIKITEXT = (
    " \n = The Fox = \n \n The fox ran . \n \n = = Life = = \n \n It ate @-@ well . \n"
    " \n = The Owl = \n \n It flew . \n"
)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Local data in the hub's columns, made by the converters."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("data")
    (source / "piqa-labels.lst").write_text("0\n1\n1\n0\n1\n", encoding="utf-8")
    (source / "wiki.raw").write_text(WIKITEXT, encoding="utf-8")
    files = {
        "arc_easy": write_jsonl(source / "arc.jsonl", ARC),
        "openbookqa": source / "arc.jsonl",
        "piqa": write_jsonl(source / "piqa.jsonl", PIQA),
        "hellaswag": write_jsonl(source / "hellaswag.jsonl", HELLASWAG),
        "blimp": write_jsonl(source / "blimp.jsonl", BLIMP),
        "wikitext": source / "wiki.raw",
    }
    assert convert.main([str(out), *(f"{task}={file}" for task, file in files.items())]) == 0
    return out


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    pass


@pytest.fixture(autouse=True, scope="module")
def _task_files_are_read_once():
    """lm-eval reads its 14,000 task files, which never change, whenever it lists its tasks."""
    build, read = TaskIndex.build, {}

    def build_once(paths, **settings):
        index = {}
        for path in paths:
            inside = path == Path(lm_eval.tasks.__file__).parent
            if not (inside and path in read):
                read[path] = build([path], **settings)
            index |= read[path]
        return index

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskIndex, "build", staticmethod(build_once))
        yield


# --- converters ---


def test_the_converters_give_the_columns_of_the_hub(data):
    rows = {
        file.stem: [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        for file in data.iterdir()
    }
    assert set(rows) == {
        "arc_easy", "openbookqa", "piqa", "hellaswag", "wikitext", "blimp_adjunct_island", "blimp_wh_island",
    }  # fmt: skip
    assert rows["arc_easy"][1] == {
        "id": "q1",
        "question": "Where would a child look for the garden gate?",
        "choices": {"text": ["at home", "garden gate", "x"], "label": ["A", "B", "C"]},
        "answerKey": "B",
    }
    assert rows["openbookqa"][0]["question_stem"] == ARC[0]["question"]["stem"]
    assert [row["label"] for row in rows["piqa"]] == [0, 1, 1, 0, 1]
    assert (rows["hellaswag"][0]["ctx_a"], rows["hellaswag"][0]["ctx_b"]) == (
        "A girl finds a lantern. She is glad!",
        "the girl",
    )
    assert rows["hellaswag"][1]["label"] == "1"
    assert len(rows["blimp_wh_island"]) == 3
    pages = [row["page"] for row in rows["wikitext"]]
    assert len(pages) == 2
    assert "".join(pages) == WIKITEXT, "text was lost"
    assert pages[1].startswith(" = The Owl = \n")


def test_wikitext_becomes_text_as_people_write_it(tmp_path):
    marked = (
        " \n = The Fox = \n \n The fox 's well @-@ known <unk> "
        "cost 1 @,@ 250 @.@ 5 dollars ( about £ 900 ) , didn 't it ? \n"
        ' It said , " Come <unk> ! " ( <unk> ) . \n \n = = Life of foxes = = \n \n Foxes \' tails : long . \n'
        " \n = The Owl = \n \n It flew . \n"
    )
    (tmp_path / "wiki.tokens").write_text(marked, encoding="utf-8")
    convert.main([str(tmp_path / "out"), f"wikitext_plain={tmp_path / 'wiki.tokens'}"])
    assert (tmp_path / "out" / "wikitext_plain.txt").read_text(encoding="utf-8") == (
        "= The Fox =\nThe fox's well-known cost 1,250.5 dollars (about £900), didn't it?\n"
        'It said, "Come!".\n== Life of foxes ==\nFoxes\' tails: long.\n<|endoftext|>\n= The Owl =\nIt flew.\n'
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["arc_easy"], "is not TASK=FILE"),
        (["arc_easy=nothing.jsonl"], "is not TASK=FILE"),
        (["magic={file}"], "no converter for 'magic'"),
        (["arc_easy={file}"], "is not arc_easy data"),
        (["piqa={file}"], "needs its labels beside it"),
    ],
)
def test_converters_refuse_what_they_cannot_read(tmp_path, arguments, message):
    file = write_jsonl(tmp_path / "x.jsonl", [{"a": 1}])
    with pytest.raises(SystemExit, match=message):
        convert.main([str(tmp_path / "out"), *(argument.format(file=file) for argument in arguments)])


# --- the same numbers as lm-eval ---


def test_log_likelihoods_of_a_16_bit_model_are_not_rounded_to_16_bits(tokenizer):
    """A log-likelihood of -100 in bfloat16 is known to half a nat; documents would tie that do not."""
    model = load_model(str(bundled.model_path()), "bfloat16", "cpu")
    context, ending = "The girl found a little", " lantern in the old garden, and she was very happy about it."
    lm = CatsLM(Subject(model, tokenizer, None, as_dense), BatchSize(1), SparsityCounter(model))
    [(found, _)] = lm.loglikelihood([Instance("loglikelihood", {}, (context, ending), 0)], disable_tqdm=True)
    prompt, whole = (lm.tok_encode(text) for text in (context, context + ending))
    with torch.no_grad():
        logits = model(torch.tensor([whole])).logits[0, :-1].double()
    each = logits.log_softmax(-1).gather(-1, torch.tensor(whole[1:])[:, None])
    assert found == pytest.approx(float(each[len(prompt) - 1 :].sum()), abs=1e-3)


def test_the_next_variant_needs_no_tokens_and_no_templates_again(data, tokenizer, monkeypatch):
    model = load_model(str(bundled.model_path()), "float32", "cpu")
    [task], _ = build_tasks(["piqa"], data)
    encoded, compiled = [], []
    encode, compile_template = HFLM.tok_encode, Environment.from_string
    monkeypatch.setattr(HFLM, "tok_encode", lambda *a, **k: encoded.append(a[1]) or encode(*a, **k))
    monkeypatch.setattr(Environment, "from_string", lambda *a, **k: compiled.append(a[1]) or compile_template(*a, **k))
    first = task.run(Subject(model, tokenizer, None, as_dense), BatchSize(4))
    assert len(encoded) == len(set(encoded)) > 5
    assert len(compiled) == len(set(compiled))
    before = len(encoded)
    again = task.run(Subject(model, tokenizer, model, as_dense), BatchSize(4))
    assert len(encoded) == before
    assert again.metrics == first.metrics
    # another tokenizer has other tokens
    task.run(Subject(model, copy.deepcopy(tokenizer), None, as_dense), BatchSize(4))
    assert len(encoded) == 2 * before
    assert "from_string" not in vars(lm_eval.utils.env), "lm-eval is left changed"


TASKS = ["arc_easy", "openbookqa", "piqa", "hellaswag", "blimp_adjunct_island", "wikitext"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_the_numbers_are_those_of_lm_evals_own_command(data, profile, tmp_path, tokenizer, monkeypatch, kind):
    folder = bundled.model_path()
    if kind == "sparse":
        folder = tmp_path / "cats50"
        saved = cats_llm.sparsify(load_model(str(bundled.model_path()), "bfloat16", "cpu"), profile.config(0.5))
        saved.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    manager = TaskManager()
    with task_folder(data, manager) as yaml_files:
        # lm-eval's own command line
        command = [
            "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={folder},dtype=float32", "--tasks",
            ",".join(TASKS), "--include_path", str(yaml_files), "--batch_size", "4", "--device", "cpu",
            "--output_path", str(tmp_path / "o"),
        ]  # fmt: skip
        monkeypatch.setattr("sys.argv", command)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cli_evaluate()
    theirs = json.loads(next((tmp_path / "o").rglob("results*.json")).read_text(encoding="utf-8"))["results"]
    model = load_model(str(folder), "float32", "cpu")
    variants = [Variant("dense")]
    if kind == "sparse":
        variants.append(Variant("sparse", "cats", model.config.quantization_config))
    tasks, _ = build_tasks(TASKS, data)
    ours = run_evaluation(model, tokenizer, variants, tasks, batch_size=4)
    found = {(r["task"], r["metric"]): r for r in ours["results"] if r["variant"] == kind}
    compared = 0
    for task in TASKS:
        for key, value in theirs[task].items():
            name, comma, _ = key.partition(",")
            if comma and not name.endswith("_stderr"):
                assert found[task, name]["value"] == value, (task, name)
                stderr = theirs[task][f"{name}_stderr,none"]
                assert stderr in ("N/A", found[task, name]["stderr"]), (task, name)
                compared += 1
    assert compared == 4 * 2 + 1 + 3
    if kind == "sparse":
        scores = found["wikitext", "bits_per_byte"]
        assert scores["difference"]["value"] != 0, "the sparse model is the dense one"


def test_padding_is_not_counted(model, tokenizer, profile, data):
    tasks, _ = build_tasks(["piqa", "arc_easy"], data)
    variants = make_variants(model, ["cats"], [0.5], profile)
    one, many = (run_evaluation(model, tokenizer, variants, tasks, batch_size=size) for size in (1, 7))
    for a, b in zip(one["results"], many["results"], strict=True):
        assert a["tokens"] == b["tokens"] > 0
        assert a["sparsity"]["gate"] == pytest.approx(b["sparsity"]["gate"], abs=1e-3)
    # by hand: every token but the last of question and answer
    rows = [json.loads(line) for line in (data / "piqa.jsonl").read_text(encoding="utf-8").splitlines()]
    expected = 0
    for row in rows:
        for answer in (row["sol1"], row["sol2"]):
            expected += len(tokenizer(f"Question: {row['goal']}\nAnswer: {answer}").input_ids) - 1
    assert next(r["tokens"] for r in one["results"] if r["task"] == "piqa") == expected


def test_a_stopped_run_finds_the_tasks_that_are_done(model, tokenizer, profile, data, tmp_path):
    variants = make_variants(model, ["cats", "relu"], [0.5], profile)
    names = ["piqa", "arc_easy", "blimp_wh_island"]
    whole, cache = [], Cache(tmp_path)
    first = run_evaluation(model, tokenizer, variants, build_tasks(names, data)[0], cache=cache, progress=whole.append)
    assert not any(step.cached for step in whole)
    for missing in (0, 4, 8):  # one lost in each variant
        again = []
        files = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
        assert len(files) == 9, "a measurement has two keys"
        sorted(files, key=files.get)[missing].unlink()
        result = run_evaluation(
            model, tokenizer, variants, build_tasks(names, data)[0], cache=cache, progress=again.append
        )
        assert [step.cached for step in again].count(False) == 1
        assert result["results"] == first["results"]


def test_last_fraction_does_not_depend_on_the_batch(model, tokenizer, profile, data):
    variants = make_variants(model, ["cats"], [0.9], profile, TokenPolicy(last_fraction=0.5))
    tasks, _ = build_tasks(["wikitext", "piqa"], data)
    one, many = (run_evaluation(model, tokenizer, variants, tasks, batch_size=size)["results"] for size in (1, 8))
    assert [row["value"] for row in one] == pytest.approx([row["value"] for row in many], rel=1e-6)
    assert 0.35 < one[-1]["sparsity"]["gate"] < 0.5


def test_a_batch_that_does_not_fit_is_halved(model, tokenizer, profile, data, monkeypatch):
    tasks, _ = build_tasks(["piqa", "wikitext"], data)
    variants = make_variants(model, ["cats"], [0.5], profile)
    expected = run_evaluation(model, tokenizer, variants, tasks, batch_size=2)["results"]
    forward, said = type(model).forward, []

    def limited(self, input_ids=None, **inputs):
        result = forward(self, input_ids=input_ids, **inputs)
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return result

    monkeypatch.setattr(type(model), "forward", limited)
    found = run_evaluation(model, tokenizer, variants, tasks, batch_size=5, notify=said.append)["results"]
    assert said == ["out of memory: going on with batches of 2"]
    assert [(row["value"], row["tokens"]) for row in found] == [(row["value"], row["tokens"]) for row in expected]


def test_generation_tasks_run_and_count(model, tokenizer, profile, tmp_path):
    rows = [{"article": f"The {t} was lost. A fox found it.", "highlights": f"A fox found the {t}."} for t in THINGS]
    write_jsonl(tmp_path / "cats_cnn_dailymail.jsonl", rows)
    tasks, _ = build_tasks(["cats_cnn_dailymail"], tmp_path, TaskOptions(limit=3))
    result = run_evaluation(model, tokenizer, make_variants(model, ["cats"], [0.5], profile), tasks, batch_size=3)
    row = next(r for r in result["results"] if r["variant"] == "cats k=0.5" and r["metric"] == "rouge1")
    assert row["n"] == result["tasks"][0]["documents"] == 3
    assert 0 <= row["value"] <= 1
    assert 0 <= row["difference"]["p"] <= 1
    assert 0.4 < row["sparsity"]["gate"] < 0.6
    task = tasks[0].loaded
    prompts = sum(len(tokenizer(task.doc_to_text(doc)).input_ids) for doc in list(task.eval_docs)[:3])
    # prompts once, and then up to 128 tokens each, of which the last one is never an input
    assert prompts < row["tokens"] <= prompts + 3 * 127


# --- groups, sets, local data ---


def test_a_group_compares_the_documents_of_all_its_tasks(model, tokenizer, profile, tmp_path):
    for number, name in enumerate(sorted(TaskManager().task_index["blimp"].cfg["task"])):
        write_jsonl(tmp_path / f"{name}.jsonl", BLIMP[: 2 + number % 2])
    tasks, _ = build_tasks(["blimp"], tmp_path)
    result = run_evaluation(model, tokenizer, make_variants(model, ["cats"], [0.9], profile), tasks, batch_size=32)
    dense, sparse = result["results"]
    assert dense["n"] == sparse["n"] == sum(2 + i % 2 for i in range(67)) == result["tasks"][0]["documents"]
    assert len(dense["parts"]) == 67
    assert dense["value"] == pytest.approx(sum(dense["parts"].values()) / 67), "BLiMP weighs its paradigms equally"
    assert sparse["difference"]["value"] == pytest.approx(sparse["value"] - dense["value"])
    assert "sign flips" in sparse["difference"]["test"], "the weights differ, so it is no McNemar test"


def test_the_mean_of_a_set(model, tokenizer, profile, data):
    tasks, _ = build_tasks(["arc_easy", "piqa"], data)
    variants = make_variants(model, ["cats"], [0.9], profile)
    result = run_evaluation(model, tokenizer, variants, tasks, means={"both": ["arc_easy", "piqa"]})
    acc = {(r["variant"], r["task"]): r for r in result["results"] if r["metric"] == "acc"}
    for name in ("dense", "cats k=0.9"):
        assert acc[name, "both"]["value"] == pytest.approx(
            (acc[name, "arc_easy"]["value"] + acc[name, "piqa"]["value"]) / 2
        )
    assert acc["cats k=0.9", "both"]["difference"]["value"] == pytest.approx(
        acc["cats k=0.9", "both"]["value"] - acc["dense", "both"]["value"]
    )
    assert result["tasks"][-1]["members"] == ["arc_easy", "piqa"]


def test_sets_name_tasks_that_are_there():
    manager = TaskManager(include_path=str(Path(cats_llm.__file__).parent / "evaluation" / "task_files"))
    for name, members in TASK_SETS.items():
        assert not set(members) - set(manager.all_tasks), name
    tasks, means = expand(["paper8", "piqa", "coqa"])
    assert tasks == [*TASK_SETS["paper8"], "coqa"]
    assert means == {"paper8": list(TASK_SETS["paper8"])}


def test_our_task_files_score_answers(tmp_path):
    write_jsonl(tmp_path / "cats_amc23.jsonl", [{"question": "1 + 1?", "answer": "2"}])
    write_jsonl(tmp_path / "cats_brumo25.jsonl", [{"problem": "2 + 2?", "answer": "4"}])
    write_jsonl(tmp_path / "cats_cnn_dailymail.jsonl", [{"article": "A fox ran.", "highlights": "The fox ran away."}])
    tasks, _ = build_tasks(["cats_amc23", "cats_brumo25", "cats_cnn_dailymail"], tmp_path)
    amc, brumo, cnn = (task.loaded for task in tasks)
    assert amc.doc_to_text(amc.eval_docs[0]) == "Question: 1 + 1?\nAnswer:"
    assert brumo.doc_to_text(brumo.eval_docs[0]) == "Question: 2 + 2?\nAnswer:"
    assert amc.process_results(amc.eval_docs[0], [r"so \boxed{2}"])["exact_match"] == 1
    assert amc.process_results(amc.eval_docs[0], [r"so \boxed{3}"])["exact_match"] == 0
    perfect = cnn.process_results(cnn.eval_docs[0], ["The fox ran away."])
    assert perfect == {"rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0}


def test_splits_of_local_data(data, tmp_path):
    folder = tmp_path / "piqa"
    folder.mkdir()
    rows = (data / "piqa.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "validation.jsonl").write_text("".join(rows[:2]), encoding="utf-8")
    (folder / "train.jsonl").write_text("".join(rows[2:]), encoding="utf-8")
    ((task,), _) = build_tasks(["piqa"], tmp_path, TaskOptions(num_fewshot=1))
    assert task.describe()["documents"] == 2
    assert len(list(task.loaded.training_docs())) == 3
    before = task.content()
    (folder / "train.jsonl").write_text("".join(rows[3:]), encoding="utf-8")
    ((task,), _) = build_tasks(["piqa"], tmp_path, TaskOptions(num_fewshot=1))
    assert task.content() != before, "the examples in the prompt are part of the content"


@pytest.mark.parametrize(
    ("names", "files", "message"),
    [
        (["magic_task"], {"piqa.jsonl": PIQA}, "magic_task is no task"),
        (["piqa"], {}, "holds no data"),
        (["piqa"], {"piqa/train.jsonl": PIQA}, "no validation file of piqa"),
        (["piqa"], {"piqa.jsonl": PIQA, "piqa/train.parquet": PIQA}, "different kinds"),
        (["arc_easy"], {"piqa.jsonl": PIQA}, "arc_easy cannot be loaded"),
    ],
)
def test_tasks_that_cannot_be(tmp_path, names, files, message):
    for name, rows in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_jsonl(tmp_path / name, rows)
    with pytest.raises(cats_llm.CatsError, match=message):
        build_tasks(names, tmp_path)


def test_without_lm_eval_there_is_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "cats_llm.evaluation.lm_eval_task", None)
    with pytest.raises(cats_llm.CatsError, match=r"pip install 'cats-llm\[eval\]'"):
        build_tasks(["piqa"])
