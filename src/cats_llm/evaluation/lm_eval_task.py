"""Tasks of lm-eval on a model in memory. Importing this needs lm-eval."""

import copy
import hashlib
import logging
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from functools import cache, cached_property, lru_cache
from importlib.metadata import version
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval import evaluator
from lm_eval.api.group import Group
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import Collator
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import TaskIndex
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from cats_llm import distributed
from cats_llm.calibration.batches import check_runs
from cats_llm.errors import CatsError, first_line
from cats_llm.evaluation.batch import BatchSize
from cats_llm.evaluation.cache import digest_json
from cats_llm.evaluation.local_data import task_folder
from cats_llm.evaluation.paired import standard_error
from cats_llm.evaluation.sparsity import SparsityCounter
from cats_llm.evaluation.task import Measurement, Metric, Subject, Task, TaskOptions
from cats_llm.model.architecture import check_predicts_tokens
from cats_llm.model.token_mask import find_token_mask
from cats_llm.model.tokens import check_tokens

# our own tasks, where lm-eval has none, in its format
_TASK_FILES = Path(__file__).parent / "task_files"
# resamplings for standard errors that have no formula
_BOOTSTRAP = 1000
# what lm-eval calls an exponential of a weighted mean; its samples are (log-likelihood, weight)
_WEIGHTED = {"word_perplexity", "byte_perplexity"}


class CatsLM(HFLM):  # type: ignore[misc]  # lm-eval is not typed
    """lm-eval's own model class, on a model in memory, with data parallelism and a counter of sparsity."""

    def __init__(
        self, subject: Subject, batch: BatchSize, counter: SparsityCounter, encoded: dict[Any, list[int]] | None = None
    ) -> None:
        # lm-eval changes the tokenizer's padding
        super().__init__(
            pretrained=subject.model,
            tokenizer=copy.deepcopy(subject.tokenizer),
            batch_size=batch.value,
            backend="causal",
            # 16 bits hold a log-likelihood of 10 nats to a thirtieth of a nat
            softmax_dtype="float32" if subject.model.dtype in (torch.bfloat16, torch.float16) else None,
        )
        self.batch = batch
        self.counter = counter
        self.encoded = encoded if encoded is not None else {}
        self._rank, self._world_size = distributed.rank(), distributed.world_size()

    def tok_encode(self, *args: Any, **kwargs: Any) -> list[int]:
        """The tokens of a text; one that the model has no embedding for is an error."""
        key = (args, *sorted(kwargs.items()))
        if key not in self.encoded:
            ids: list[int] = super().tok_encode(*args, **kwargs)
            check_tokens(self.model, torch.tensor(ids), self.tokenizer)
            self.encoded[key] = ids
        return list(self.encoded[key])

    def _loglikelihood_tokens(self, requests: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        return self._fitting(self._score, requests)

    def generate_until(self, *args: Any, **kwargs: Any) -> Any:
        """Generate, with smaller batches if memory runs out."""
        return self._fitting(super().generate_until, *args, **kwargs)

    def _fitting(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # here and not around the whole task: no process may wait for another one within it
        def attempt(size: int) -> Any:
            self.batch_size_per_gpu = size
            with self.counter:
                return function(*args, **kwargs)

        return self.batch.run(attempt)

    def _score(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Log-likelihood of each ending, and whether it is the likeliest: lm-eval's, with one wait for a GPU a batch.

        Order, batches and padding are lm-eval's, and so are the values. It scores one request at a time, on logits of
        whole sequences; of a small model that takes most of the time.
        """
        collator = Collator(
            list(requests),
            sort_fn=lambda request: (-len(request[1]) - len(request[2]), tuple(request[1] + request[2])),
            group_by="contexts" if self.logits_cache else None,
            group_fn=lambda request: request[-2] + request[-1][:-1],
        )
        answers: list[tuple[float, bool]] = []
        for chunk in collator.get_batched(n=self.batch_size, batch_fn=None):
            answers += self._score_batch(chunk, collator)
        scored: list[tuple[float, bool]] = collator.get_original(answers)
        return scored

    def _score_batch(self, chunk: Sequence[Any], collator: Any) -> Iterator[tuple[float, bool]]:
        inputs = [torch.tensor((context + ending)[-(self.max_length + 1) :][:-1]) for _, context, ending in chunk]
        ids = pad_sequence(inputs, batch_first=True)
        logits = self._model_call(ids.to(self.device))
        # padded on the right without a mask
        self.counter.crop([len(tokens) for tokens in inputs])
        # tokens that prompt tuning puts before
        shift = logits.shape[1] - ids.shape[1]
        where = [
            (row, shift + len(tokens) - len(ending) + i)
            for row, (tokens, (_, _, ending)) in enumerate(zip(inputs, chunk, strict=True))
            for i in range(len(ending))
        ]
        at = torch.tensor(where, device=logits.device)
        log_p = F.log_softmax(logits[at[:, 0], at[:, 1]], dim=-1, dtype=self.softmax_dtype)
        # requests that differ in their last token share a sequence; what stands for its logits is where they are
        shared: list[tuple[Any, list[int], list[int], list[int]]] = []
        first = 0
        for text, context, ending in chunk:
            places = torch.arange(first, first + len(ending))[None, :, None]
            first += len(ending)
            for one, tokens, rows in collator.get_cache(text, context, ending, places):
                held = rows.flatten().tolist()
                shared.append((one, tokens, held[: len(tokens)], held[-len(tokens) :]))
        index = [(row, token) for _, tokens, held, _ in shared for row, token in zip(held, tokens, strict=True)]
        pairs = torch.tensor(index, device=log_p.device)
        chosen, likeliest = log_p[pairs[:, 0], pairs[:, 1]].cpu(), log_p.argmax(-1).tolist()
        parts = chosen.split([len(tokens) for _, tokens, _, _ in shared])
        for (text, tokens, _, last), values in zip(shared, parts, strict=True):
            answer = (float(values.sum()), [likeliest[row] for row in last] == list(tokens))
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, answer)
            yield answer

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensors of all processes, joined."""
        return distributed.all_gather_tensor(tensor)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """The objects of all processes, on process ``dst``."""
        gathered = distributed.gather(obj)
        return gathered if self.rank == dst else None

    def barrier(self) -> None:
        """Wait for the other processes."""
        distributed.gather(None)


class LmEvalTask(Task):
    """A task or group of lm-eval, loaded.

    Args:
        loaded: lm-eval's object.
        manager: lm-eval's TaskManager.
        data: where the documents come from, for people.
        options: how it is run.
    """

    kind = "lm_eval"

    def __init__(self, loaded: Any, manager: TaskManager, data: str, options: TaskOptions) -> None:
        self.loaded, self.manager, self.data, self.options = loaded, manager, data, options
        self.group = isinstance(loaded, Group)
        self.leaves = {task.task_name: task for task in (loaded.get_all_tasks() if self.group else [loaded])}
        self.name = loaded.name if self.group else loaded.task_name
        # the next variant reads the same texts: their tokens, and the tokenizer and size of the vocabulary they are of
        self._encoded: dict[Any, list[int]] = {}
        self._reader: Any = None

    def prepare(self, model: Any, tokenizer: Any) -> None:
        """Check that the model predicts tokens, and that a chat template is there, if one is asked for."""
        check_predicts_tokens(model, f"the task {self.name}")
        check_runs(model)
        if self.options.apply_chat_template and not tokenizer.chat_template:
            raise CatsError("the tokenizer has no chat template; leave out --apply-chat-template.")

    def describe(self) -> dict[str, Any]:
        """With the number of documents, and lm-eval's version of the task."""
        return {
            "name": self.name,
            "kind": self.kind,
            "data": self.data,
            "documents": sum(self._documents(leaf) for leaf in self.leaves.values()),
            "limit": self.options.limit,
            "num_fewshot": self.options.num_fewshot,
            "task_version": str(self.loaded.version if self.group else self.loaded.VERSION),
            "subtasks": list(self.leaves) if self.group else [],
        }

    def _documents(self, leaf: Any) -> int:
        return min(len(leaf.eval_docs), self.options.limit or sys.maxsize)

    def versions(self) -> dict[str, str]:
        """lm-eval's, whose code scores the documents."""
        return {"lm_eval": version("lm_eval")}

    @cached_property
    def _digests(self) -> dict[str, str]:
        # once, before anything runs: lm-eval fills in the tasks' configs when it runs them
        return {name: self._digest(leaf) for name, leaf in self.leaves.items()}

    def content(self) -> dict[str, Any]:
        """Digests of each task's config and documents, examples of the prompts among them, and the options."""
        return {
            "kind": self.kind,
            "leaves": self._digests,
            "limit": self.options.limit,
            "num_fewshot": self.options.num_fewshot,
            "chat": self.options.apply_chat_template,
        }

    def _digest(self, leaf: Any) -> str:
        config = {k: v for k, v in leaf.dump_config().items() if not k.startswith(("dataset_", "metadata"))}
        # functions without source show where they are in memory
        parts = [re.sub(r"0x[0-9a-f]+", "", str(sorted(config.items())))]
        parts += [digest_json(doc) for doc in islice(leaf.eval_docs, self.options.limit)]
        shots = self.options.num_fewshot if self.options.num_fewshot is not None else config.get("num_fewshot")
        if shots and (leaf.has_training_docs() or config.get("fewshot_split")):
            parts += [digest_json(doc) for doc in leaf.fewshot_docs()]
        return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogatepass")).hexdigest()

    def run(self, subject: Subject, batch: BatchSize) -> Measurement:
        """Score all documents; the metrics are those that lm-eval reports, with the scores behind means."""
        started = time.perf_counter()
        coverage = find_token_mask(subject.model)
        # the last tokens of a sequence must not depend on how long its neighbours are
        single = coverage is not None and coverage.coverage.last_fraction is not None

        counter = SparsityCounter(subject.model)
        reader = (subject.tokenizer, subject.model.get_input_embeddings().weight.shape)
        if reader != self._reader:
            self._reader, self._encoded = reader, {}
        with _quiet(), _templates_compiled_once():
            results = lm_eval.simple_evaluate(
                model=CatsLM(subject, BatchSize(1) if single else batch, counter, self._encoded),
                tasks=[self.loaded],
                task_manager=self.manager,
                num_fewshot=self.options.num_fewshot,
                limit=self.options.limit,
                bootstrap_iters=_BOOTSTRAP,
                apply_chat_template=self.options.apply_chat_template,
            )
        metrics = self._metrics(results) if results is not None else []
        return counter.measurement(distributed.broadcast(metrics), started)

    def _metrics(self, results: dict[str, Any]) -> list[Metric]:
        """Everything that lm-eval measured, with the scores of documents."""
        higher = results["higher_is_better"]
        metrics = []
        for key, value in results["results"][self.name].items():
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = results["results"][self.name].get(f"{metric}_stderr,{filter_name}")
            error = float(error) if isinstance(error, (int, float)) else None
            first = next(iter(self.leaves))
            direction = (higher.get(self.name) or higher[first]).get(metric)
            metrics.append(self._metric(results, metric, filter_name, float(value), error, direction is not False))
        return metrics

    def _metric(
        self, results: dict[str, Any], metric: str, filter_name: str, value: float, error: float | None, higher: bool
    ) -> Metric:
        leaves = {
            name: [_score(metric, s) for s in _sorted(results["samples"][name], filter_name)] for name in self.leaves
        }
        leaves = {name: scores for name, scores in leaves.items() if scores}
        # each task's documents weigh together what the group gives the task
        weight = {name: float(len(scores)) for name, scores in leaves.items()}
        if self.group and not self._by_size(metric):
            weight = dict.fromkeys(leaves, 1.0)
        pairs = [
            (score, w * weight[name] / len(scores) if self.group else w)
            for name, scores in leaves.items()
            for score, w in (s if s is not None else (float("nan"), 1.0) for s in scores)
        ]
        kind = "perplexity" if metric in _WEIGHTED else "mean"
        scores, weights = [s for s, _ in pairs], [w for _, w in pairs]
        if not scores or any(s != s for s in scores):
            kind, scores, weights = "opaque", [], []
        elif kind == "mean":
            mean = sum(s * w for s, w in pairs) / sum(weights)
            if abs(mean - value) > 1e-6 * max(1.0, abs(value)):  # an aggregation that is no mean (F1, BLEU)
                kind, scores, weights = "opaque", [], []
        if error is None and scores:
            error = standard_error(scores, weights)
            error = error * value if kind == "perplexity" and error is not None else error
        n = sum(len(s) for s in leaves.values())
        name = metric if filter_name == "none" else f"{metric} ({filter_name})"
        strata = [len(s) for s in leaves.values()] if self.group else []
        parts = {leaf: results["results"][leaf][f"{metric},{filter_name}"] for leaf in leaves} if self.group else {}
        return Metric(name, value, error, higher, n, kind, scores, weights, strata, parts)

    def _by_size(self, metric: str) -> bool:
        listed = self.loaded.aggregate_metric_list or []
        return next((bool(entry.weight_by_size) for entry in listed if entry.metric == metric), True)


def _sorted(samples: list[dict[str, Any]], filter_name: str) -> list[dict[str, Any]]:
    return sorted((s for s in samples if s["filter"] == filter_name), key=lambda s: int(s["doc_id"]))


def _score(metric: str, sample: dict[str, Any]) -> tuple[float, float] | None:
    """Score and weight of a document; None if it is no number."""
    value: Any = sample.get(metric)
    if metric in _WEIGHTED and isinstance(value, (tuple, list)) and len(value) == 2:
        return -float(value[0]) / float(value[1]), float(value[1])
    if metric == "bits_per_byte" and isinstance(value, (tuple, list)):
        return -float(value[0]) / float(value[1]) / math.log(2), float(value[1])
    if isinstance(value, (bool, int, float)) or (hasattr(value, "item") and getattr(value, "size", 1) == 1):
        return float(value), 1.0
    return None


@contextmanager
def _templates_compiled_once() -> Iterator[None]:
    """lm-eval compiles the templates of a task again for every document, which takes longer than a small model."""
    environment = lm_eval.utils.env
    environment.from_string = lru_cache(maxsize=1024)(environment.from_string)
    try:
        yield
    finally:
        del environment.from_string  # the class's own is back


@cache
def _manager() -> TaskManager:
    """All tasks that lm-eval knows, and ours. Reading their files takes seconds."""
    with _quiet():
        return TaskManager(include_path=str(_TASK_FILES))


def load_lm_eval_tasks(names: Sequence[str], data_dir: Path | None, options: TaskOptions) -> list[LmEvalTask]:
    """Load tasks by name or YAML file, see `cats_llm.evaluation.tasks.build_tasks`.

    Raises:
        CatsError: a name is unknown, or its data cannot be loaded.
    """
    manager = _manager()
    tasks = []
    with task_folder(data_dir, manager) as folder:
        entries = [TaskIndex.entry_from_path(file) for file in folder.iterdir()]
        local = {entry.name: entry for entry in entries if entry is not None}
        stock = {name: manager.task_index[name] for name in local}
        manager.task_index.update(local)
        try:
            for name in names:
                for loaded in _load(manager, name):
                    leaves = loaded.get_all_tasks() if isinstance(loaded, Group) else [loaded]
                    inside = all(leaf.task_name in local for leaf in leaves)
                    data = f"local files in {data_dir}" if inside else "the hub"
                    tasks.append(LmEvalTask(loaded, manager, data, options))
        finally:
            manager.task_index.update(stock)
    return tasks


def _load(manager: TaskManager, name: str) -> list[Any]:
    """The task or group of that name, or the tasks of a tag."""
    if name not in manager.task_index and not Path(name).is_file():
        raise CatsError(f"{name} is no task: lm-eval does not know it, and there is no such YAML file.")
    with _quiet():
        try:
            loaded = manager.load([name])
        except Exception as error:  # whatever datasets and tasks raise
            raise CatsError(
                f"the task {name} cannot be loaded: {first_line(error)}; without a hub, pass its data with --data-dir."
            ) from error
    return [group for group in loaded["groups"].values() if group.name == name] or list(loaded["tasks"].values())


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval's notes to itself; warnings about what it was made to do are not for our users."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    described = evaluator.get_git_commit_hash, evaluator.add_env_info
    logger.setLevel(logging.ERROR)
    try:
        # a log file wants no bars
        bars = nullcontext() if sys.stderr.isatty() else redirect_stderr(StringIO())
        # nor does a result need git's complaints, and the machine's description, which takes seconds, again and again
        evaluator.get_git_commit_hash, evaluator.add_env_info = lambda: None, lambda storage: None
        with bars:
            yield
    finally:
        evaluator.get_git_commit_hash, evaluator.add_env_info = described
        logger.setLevel(before)
