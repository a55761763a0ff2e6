"""Task sets by name, and the tasks of lm-eval that names stand for."""

from collections.abc import Sequence
from pathlib import Path

from cats_llm.errors import CatsError
from cats_llm.evaluation.task import Task, TaskOptions

TASK_SETS: dict[str, tuple[str, ...]] = {
    # the paper's table of zero-shot accuracies
    "paper8": ("openbookqa", "arc_easy", "winogrande", "hellaswag", "arc_challenge", "piqa", "boolq", "sciq"),
    "generation": ("cats_xsum", "cats_cnn_dailymail", "coqa", "qasper_freeform", "qasper_bool"),
    "reasoning": (
        "hendrycks_math",
        "hendrycks_math500",
        "aime24",
        "gpqa_main_zeroshot",
        "gsm8k",
        "cats_amc23",
        "cats_brumo25",
    ),
}
"""Sets of tasks by name. Tasks whose names begin with "cats_" are ours, where lm-eval has none."""


def expand(names: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Task names in place of the names of sets, each once; and sets whose mean is of interest, with their tasks."""
    tasks: dict[str, None] = {}
    means = {}
    for name in names:
        members = TASK_SETS.get(name, (name,))
        tasks |= dict.fromkeys(members)
        if name == "paper8":  # only there all tasks have one measure
            means[name] = list(members)
    return list(tasks), means


def build_tasks(
    names: Sequence[str], data_dir: Path | None = None, options: TaskOptions = TaskOptions()
) -> tuple[list[Task], dict[str, list[str]]]:
    """Tasks of lm-eval, ready for `run_evaluation`.

    Args:
        names: of our sets (`TASK_SETS`), of lm-eval's tasks, groups and tags, or paths of YAML files.
        data_dir: local data in the place of the hub's, see `cats_llm.evaluation.local_data.local_files`.
        options: how the tasks are run.

    Returns:
        The tasks, and by name the sets whose mean accuracy is of interest, for ``means``.

    Raises:
        CatsError: lm-eval is not installed, a name is unknown, or data is missing.
    """
    if not names:
        return [], {}
    try:
        from cats_llm.evaluation.lm_eval_task import load_lm_eval_tasks
    except ImportError as error:
        raise CatsError(f"tasks need lm-eval ({error}): pip install 'cats-llm[eval]'.") from error
    wanted, means = expand(names)
    return [*load_lm_eval_tasks(wanted, data_dir, options)], means
