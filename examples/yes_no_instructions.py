"""CoLA, SST-2 or BoolQ as instructions with the answer yes or no, for `cats finetune --data`.

    python examples/yes_no_instructions.py cola train cola-train.jsonl
    python examples/yes_no_instructions.py cola validation cola-validation.jsonl

reads the dataset from the hub (pip install 'cats-llm[data]'), or with --source from a .jsonl file in the hub's columns.
"""

import argparse
import sys
from pathlib import Path

from cats_llm.errors import CatsError
from cats_llm.training.classification_data import TASKS, write_instructions


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("split")
    parser.add_argument("out", type=Path)
    parser.add_argument("--source", type=Path)
    parser.add_argument("--force", action="store_true")
    args = parser.parse_args()
    try:
        write_instructions(args.task, args.split, args.out, args.source, args.force)
    except CatsError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
