"""Names and versions of the formats that results are written in: said once for who writes and who reads them."""

EVALUATION, EVALUATION_VERSION = "cats-eval", 1
# the log of one run of fine-tuning, and a file with those of several under ``runs``
FINETUNING, FINETUNING_RUNS, FINETUNING_VERSION = "cats-finetune", "cats-finetune-runs", 1
