"""Models are built, calibrated and saved once a session; tests work on copies."""

import os
from tempfile import mkdtemp

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported, here and in processes that tests start

import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton kernels run in Triton's interpreter; read when triton is imported
os.environ["HF_DATASETS_CACHE"] = mkdtemp(prefix="cats-tests-")  # read when datasets is imported

import copy
import gc
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
from torch import Tensor, nn

import cats_llm
import families
from browser import pytest_runtest_makereport  # noqa: F401  # a hook
from cats_llm import bundled
from cats_llm.cli.main import main
from cats_llm.loading import load_model, load_tokenizer
from cats_llm.text import batched, load_sequences


@dataclass
class Case:
    """A family's model, dense and sparse. Tests must not change anything that is kept here."""

    name: str
    family: families.Family
    folder: Path

    def __str__(self) -> str:
        return self.name

    @cached_property
    def dense(self) -> nn.Module:
        return self.family.build()

    @cached_property
    def ids(self) -> Tensor:
        return families.ids()

    @cached_property
    def profile(self) -> cats_llm.Profile:
        return cats_llm.calibrate(self.dense, [self.ids], data="random tokens")

    @cached_property
    def config(self) -> cats_llm.CatsConfig:
        return self.profile.config(0.5)

    @cached_property
    def dense_logits(self) -> Tensor:
        return families.logits(self.dense, self.ids)

    @cached_property
    def reference_logits(self) -> Tensor:
        """What a CATS model must answer, computed without the package."""
        with families.Reference(self.dense, self.family, self.config.thresholds) as model:
            return families.logits(model, self.ids)

    @cached_property
    def dense_folder(self) -> Path:
        self.dense.save_pretrained(self.folder / "dense")
        return self.folder / "dense"

    @cached_property
    def sparse_folder(self) -> Path:
        self.sparse().save_pretrained(self.folder / "sparse")
        return self.folder / "sparse"

    def dense_copy(self) -> nn.Module:
        model = copy.deepcopy(self.dense)
        for module in model.modules():
            if hasattr(module, "rope_deltas"):  # what Qwen-VL models keep from the last batch that they generated for
                module.rope_deltas = None
        return model

    def sparse(self) -> nn.Module:
        """A fresh CATS model; it shares nothing with `dense`."""
        return cats_llm.sparsify(self.dense_copy(), copy.deepcopy(self.config))


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    made: dict[str, Case] = {}

    def get(name: str) -> Case:
        if name not in made:
            made[name] = Case(name, families.FAMILIES[name], tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.fixture(params=families.FAMILIES)
def case(request: pytest.FixtureRequest, cases: Callable[[str], Case]) -> Case:
    """Every family in turn."""
    return cases(request.param)


@pytest.fixture
def llama(cases: Callable[[str], Case]) -> Case:
    return cases("llama")


@pytest.fixture(params=["llama", "phi3"])
def split_or_fused(request: pytest.FixtureRequest, cases: Callable[[str], Case]) -> Case:
    """One family of each structure of MLP, where a matrix of all would prove nothing more."""
    return cases(request.param)


@pytest.fixture(autouse=True, scope="session")
def _own_caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads what another run measured, and none leaves data behind."""
    os.environ["CATS_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    shutil.rmtree(os.environ["HF_DATASETS_CACHE"], ignore_errors=True)


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads cost tiny models more than they give, by far on a machine with other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def short_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Some 5,000 tokens of the bundled calibration text, for commands that calibrate on all they are given."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(bundled.calibration_text().read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def model():
    """The bundled model, dense. Modules that test other models have a fixture of their own."""
    return load_model(str(bundled.model_path()), "float32", "cpu")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(bundled.model_path()))


@pytest.fixture(scope="module")
def profile(model, tokenizer):
    sequences = load_sequences(str(bundled.calibration_text()), tokenizer, 128, samples=4)
    return cats_llm.calibrate(model, batched(sequences, 4))


def pytest_collection_modifyitems(items):
    # the longest files first, so that no worker is left alone with one at the end
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def pytest_collection_finish():
    """What was imported stays: collecting garbage need not look through it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def run_cats(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Run a command; its exit code, and what it says: of its result, or of its error."""

    def run(*arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return code, said.out if code == 0 else said.err

    return run
