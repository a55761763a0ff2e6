"""Names and versions of the formats that results are written in: said once for who writes and who reads them."""

EVALUATION, EVALUATION_VERSION = "cats-eval", 1
