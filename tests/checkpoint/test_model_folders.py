"""Folders as people have them: which files are the model's, that none leads out, and that all are whole."""

import errno
import json
import os
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

import cats_llm
from cats_llm import CatsConfig, CatsError, bundled
from cats_llm.checkpoint.folder import check_files, read_folder
from cats_llm.checkpoint.tensors import check_tensors
from cats_llm.checkpoint.write import check_source, write_checkpoint
from cats_llm.cli.main import main
from cats_llm.loading import check_name, checkpoint_folder, load_model, load_skeleton, load_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = CatsConfig({0: 0.1, 1: 0.2}, sparsity=0.5, layer_sparsity={0: 0.5, 1: 0.5})
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(llama, tmp_path):
    """A copy of a tiny model, to be changed."""
    return Path(shutil.copytree(llama.dense_folder, tmp_path / "model"))


def put(folder, *names, content=b"{}"):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def content(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def index(folder, shard, **more):
    """Name the tensors' file in an index, in the place of the one file."""
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"model.norm.weight": shard}} | more))


def refused(folder, message):
    """Every way to the model says the same in one sentence."""
    for use in (check_name, load_model, load_skeleton, load_tokenizer, checkpoint_folder):
        with pytest.raises(CatsError, match=message) as error:
            use(str(folder))
        assert "\n" not in str(error.value)
        assert str(error.value).endswith(".")


class TestWhatIsCopied:
    def test_a_folder_of_a_whole_pipeline_is_copied_whole(self, folder, tmp_path):
        put(
            folder, "modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors", "2_Dense/pytorch_model.bin",
            "additional_chat_templates/tool.jinja", "preprocessor_config.json", "processor/image.py",
            "remote/__init__.py", "merges.txt", "spiece.model", "vocab.bpe", "tokenizer/original.tiktoken", "LICENSE",
            "colbert_linear.pt", "mtp.safetensors", "speech_tokenizer/model.safetensors",
            "speech_tokenizer/config.json", "assets/figure.png",
        )  # fmt: skip
        before = content(folder)
        written = write_checkpoint(folder, tmp_path / "out", CONFIG)
        after = content(tmp_path / "out")
        assert after.pop("config.json") != before.pop("config.json")
        assert after == before
        assert written.left_out == {}

    @pytest.mark.parametrize(
        "name",
        [
            ".DS_Store", "._model.safetensors", ".ipynb_checkpoints/config-checkpoint.json",
            ".cache/huggingface/x.lock",
            ".git/config", "1_Pooling/.config.json.swp", "config.json~", "#config.json#", "config.json.bak",
            "remote/__pycache__/a.pyc", "__MACOSX/._config.json", "optimizer.pt", "scheduler.pt", "rng_state_0.pth",
            "trainer_state.json", "training_args.bin", "checkpoint-500/model.safetensors", "global_step500/x.pt",
            "model.gguf", "onnx/model.onnx", "openvino/openvino_model.bin", "original/consolidated.00.pth",
            "consolidated.safetensors", "tf_model.h5", "flax_model.msgpack", "pytorch_model.bin",
            "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "model.fp16.safetensors",
            "model-00001-of-00002.safetensors", INDEX, "cats.safetensors",
        ],
    )  # fmt: skip
    def test_what_is_no_part_of_the_model_is_left_out_and_named(self, folder, tmp_path, name):
        put(folder, name, content=b"12345")
        left = write_checkpoint(folder, tmp_path / "out", CONFIG).left_out
        assert list(left.values()) == [5]
        assert name.startswith(next(iter(left)))
        assert content(tmp_path / "out").keys() == content(folder).keys() - {name}

    def test_weights_in_the_older_format_are_copied_where_there_are_no_others(self, folder, tmp_path):
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        assert write_checkpoint(folder, tmp_path / "out", CONFIG).left_out == {}
        assert content(tmp_path / "out").keys() == content(folder).keys()

    def test_shards_in_a_folder_with_a_name_that_is_left_out_are_weights_still(self, folder, tmp_path):
        index(folder, "original/a.safetensors")
        put(folder, "original/a.safetensors", "original/b")
        write_checkpoint(folder, tmp_path / "out", CONFIG)
        names = content(tmp_path / "out").keys()
        assert "original/a.safetensors" in names
        assert "original/b" not in names

    def test_the_named_weights_file_of_newer_configs(self, folder, tmp_path):
        (folder / "model.safetensors").rename(folder / "mine.safetensors")
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(values | {"transformers_weights": "mine.safetensors"}))
        write_checkpoint(folder, tmp_path / "out", CONFIG)
        assert cats_llm.thresholds(load_model(str(tmp_path / "out"), device="cpu")) == CONFIG.thresholds
        (folder / "config.json").write_text(json.dumps(values | {"transformers_weights": "../mine.safetensors"}))
        refused(folder, r"transformers_weights .*leads out of the model's folder")

    def test_the_command_names_what_it_left_out(self, llama, folder, tmp_path, capsys, monkeypatch):
        monkeypatch.chdir(tmp_path)
        llama.profile.save("profile.safetensors")
        put(folder, "optimizer.pt", "checkpoint-5/a[b]", content=b"x" * 1234)
        put(folder, "1_Pooling/config.json")
        arguments = ["model", "out", "--sparsity", "0.5", "--profile", "profile.safetensors", "--json", "facts.json"]
        assert main(["sparsify", *arguments]) == 0
        assert "checkpoint-5/ (1.23 kB), optimizer.pt (1.23 kB)" in capsys.readouterr().out
        assert json.loads(Path("facts.json").read_text())["left_out"] == {"checkpoint-5/": 1234, "optimizer.pt": 1234}
        assert Path("out/1_Pooling/config.json").is_file()
        assert cats_llm.thresholds(load_model("out", device="cpu")) == llama.config.thresholds


class TestNothingLeadsOut:
    @pytest.mark.parametrize(
        "shard",
        ["../secret.txt", "/etc/passwd", "a/../../secret.txt", "..\\secret.txt", "C:\\secret.txt", "..", "a\0b"],
    )
    def test_of_the_index(self, folder, tmp_path, shard):
        (tmp_path / "secret.txt").write_text("private")
        index(folder, shard)
        refused(folder, "leads out of the model's folder")
        with pytest.raises(CatsError, match="leads out"):
            write_checkpoint(folder, tmp_path / "out", CONFIG)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("shard", [None, 5, ["a"], {}, "", True])
    def test_of_an_index_with_entries_that_are_no_names(self, folder, shard):
        index(folder, shard)
        refused(folder, "names no file")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("no json", "is not JSON"),
            ("[]", "holds no JSON object"),
            ("{}", "no weight_map"),
            ('{"weight_map": []}', "no weight_map"),
            ('{"weight_map": {}}', "no weight_map"),
            ('{"weight_map": {"a": "model-1.safetensors"}}', "no metadata"),
            ('{"weight_map": {"a": "gone.safetensors"}}', r"lacks gone\.safetensors"),
            ('{"weight_map": {"a": "config.json"}}', "no file of weights"),
            ("[" * 100_000, "is not JSON"),
        ],
    )
    def test_of_a_damaged_index(self, folder, text, message):
        index(folder, "model-1.safetensors")
        (folder / INDEX).write_text(text)
        refused(folder, message)

    @pytest.mark.parametrize("name", ["model.safetensors", "tokenizer_config.json", "notes", "1_Pooling/config.json"])
    def test_of_a_link_to_a_file(self, folder, tmp_path, name):
        (tmp_path / "secret.txt").write_text("private")
        (folder / "1_Pooling").mkdir()
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(tmp_path / "secret.txt")
        for attempt in (check_source, lambda *paths: write_checkpoint(*paths, CONFIG)):
            with pytest.raises(CatsError, match=r"is a link that leads out .*secret\.txt"):
                attempt(folder, tmp_path / "out")

    def test_who_keeps_weights_on_another_disk_can_use_the_model_but_not_copy_it(self, folder, tmp_path):
        (tmp_path / "disk").mkdir()
        (folder / "model.safetensors").rename(tmp_path / "disk" / "weights.safetensors")
        (folder / "model.safetensors").symlink_to(tmp_path / "disk" / "weights.safetensors")
        (folder / "more").symlink_to(tmp_path / "disk")
        assert load_model(str(folder), device="cpu") is not None
        with pytest.raises(CatsError, match="is a link"):
            write_checkpoint(folder, tmp_path / "out", CONFIG)

    def test_of_links_to_folders_and_to_nothing(self, folder, tmp_path):
        for target, message in (
            (tmp_path, "a link to another folder"),
            ("..", "another folder"),
            ("gone", "to nothing"),
        ):
            (folder / "sub").symlink_to(target)
            with pytest.raises(CatsError, match=message):
                check_source(folder, tmp_path / "out")
            (folder / "sub").unlink()
        (folder / "a").symlink_to("b")
        (folder / "b").symlink_to("a")
        refused(folder, "a link to nothing")

    def test_of_what_is_no_file(self, folder):
        os.mkfifo(folder / "pipe")
        refused(folder, "neither a file nor a folder")

    def test_links_inside_the_folder_and_hidden_ones_are_fine(self, folder, tmp_path):
        (folder / "model.safetensors").rename(folder / "weights.st")
        (folder / "model.safetensors").symlink_to("weights.st")
        (folder / ".#lock").symlink_to("nobody@nowhere:1")
        (folder / ".git").symlink_to(tmp_path)
        (folder / "checkpoint-1").symlink_to(tmp_path)
        written = write_checkpoint(folder, tmp_path / "out", CONFIG)
        assert written.left_out.keys() == {".#lock", ".git/", "checkpoint-1/"}
        assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
        assert load_model(str(folder), device="cpu") is not None

    @pytest.mark.parametrize("shared", [False, True])
    def test_the_hub_cache_is_made_of_links(self, folder, tmp_path, shared):
        """Files of a snapshot lead to the model's blobs, and those, in newer caches, to blobs that all models share."""
        repository = tmp_path / "hub" / "models--a--b"
        snapshot = repository / "snapshots" / "c0ffee"
        (repository / "blobs").mkdir(parents=True)
        snapshot.mkdir(parents=True)
        for i, file in enumerate(sorted(folder.iterdir())):
            blob = repository / "blobs" / str(i)
            if shared:
                place = tmp_path / "hub" / "blobs" / "ab" / str(i)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, place)
                blob.symlink_to(f"../../blobs/ab/{i}")
            else:
                shutil.copy(file, blob)
            (snapshot / file.name).symlink_to(f"../../blobs/{i}")
        check_name(str(snapshot))
        write_checkpoint(snapshot, tmp_path / "out", CONFIG)
        assert content(tmp_path / "out").keys() == content(folder).keys()
        assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
        (snapshot / "more.json").symlink_to("../../../models--secret/blobs/x")
        put(tmp_path / "hub" / "models--secret" / "blobs", "x")
        with pytest.raises(CatsError, match="is a link that leads out"):
            check_source(snapshot, tmp_path / "other")

    def test_the_output_is_neither_in_the_model_nor_around_it(self, folder, tmp_path):
        for out in (folder / "out", folder / "sub" / "out"):
            with pytest.raises(CatsError, match="lies inside"):
                check_source(folder, out)
        with pytest.raises(CatsError, match="lies inside"):
            write_checkpoint(folder, tmp_path, CONFIG, force=True)
        assert folder.is_dir()


class TestDamage:
    @pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
    def test_a_pointer_of_git_lfs(self, folder, name):
        put(folder, name, content=b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 16269672\n")
        refused(folder, f"{name} is only the pointer .*git lfs pull")

    def test_weights_that_are_empty_or_cut(self, folder):
        whole = (folder / "model.safetensors").read_bytes()
        for end, message in ((0, "is empty"), (4, "truncated or damaged"), (len(whole) // 2, "truncated or damaged")):
            (folder / "model.safetensors").write_bytes(whole[:end])
            refused(folder, message)

    def test_damaged_files_that_are_not_loaded_do_no_harm(self, folder, tmp_path):
        put(folder, "._model.safetensors", "model-00001-of-00002.safetensors", ".hidden.safetensors", content=b"")
        check_name(str(folder))
        write_checkpoint(folder, tmp_path / "out", CONFIG)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", "is not JSON"),
            ("\ufeff{}", "byte order mark"),
            ('{\n  // the size\n  "hidden_size": 64}', r"is not JSON \(line 2"),
            ("[]", "holds no JSON object"),
            ("3", "holds no JSON object"),
            ("", "is not JSON"),
        ],
    )
    def test_of_config_json(self, folder, text, message):
        (folder / "config.json").write_text(text, encoding="utf-8")
        refused(folder, message)

    def test_of_its_encoding(self, folder):
        (folder / "config.json").write_bytes('{"a": "ü"}'.encode("latin-1"))
        refused(folder, "is not UTF-8")

    def test_a_file_that_may_not_be_read(self, folder, monkeypatch):
        usual = Path.open

        def opened(path, *arguments, **named):
            if path.name == "tokenizer.json":
                raise PermissionError(errno.EACCES, "Permission denied")
            return usual(path, *arguments, **named)

        put(folder, "tokenizer.json")
        monkeypatch.setattr(Path, "open", opened)
        with pytest.raises(CatsError, match=r"tokenizer\.json cannot be read \(Permission denied\)"):
            check_name(str(folder))

    def test_a_full_disk_is_told_before_anything_is_written(self, folder, tmp_path, monkeypatch):
        monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10, 5, 5))
        with pytest.raises(CatsError, match=r"No space left on device: it needs .* MB"):
            check_source(folder, tmp_path / "out")


class TestNoModelHere:
    """Folders without what transformers loads, where what is there tells what to do."""

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("tf_model.h5", r"but tf_model\.h5: .*transformers 4"),
            ("flax_model.msgpack", r"flax_model\.msgpack"),
            ("small.gguf", r"but small\.gguf: a model in GGUF: pass .*small\.gguf as the model"),
            ("params.json", r"but params\.json: .*layout"),
            ("consolidated.00.pth", r"consolidated\.00\.pth"),
            ("adapter_config.json", "adapters"),
            ("model-00001-of-00002.safetensors", "neither model.safetensors nor the index"),
            ("__0_0.distcp", r"distcp: a checkpoint of several processes"),
        ],
    )
    @pytest.mark.parametrize("config", [True, False])
    def test_other_formats(self, tmp_path, name, message, config):
        put(tmp_path, name, *["config.json"] * config)
        refused(tmp_path, message)

    def test_weights_without_a_config(self, folder):
        (folder / "config.json").unlink()
        refused(folder, r"holds weights \(model\.safetensors\) but no config\.json")

    def test_a_model_in_a_subfolder(self, folder, tmp_path):
        parent = tmp_path / "parent"
        parent.mkdir()
        folder.rename(parent / "language_model")
        refused(parent, "no config.json itself.*pass .*parent/language_model as the model")
        put(parent, "config.json")
        refused(parent, "no weights itself.*pass .*parent/language_model as the model")
        (parent / "language_model" / "config.json").unlink()
        refused(parent, "holds no weights; they are in .*language_model")

    def test_the_folder_of_a_model_in_the_hub_cache(self, folder, tmp_path):
        (tmp_path / "models--a--b" / "snapshots").mkdir(parents=True)
        folder.rename(tmp_path / "models--a--b" / "snapshots" / "c0ffee")
        refused(tmp_path / "models--a--b", "pass .*snapshots/c0ffee as the model")

    def test_a_config_alone_is_enough_for_the_structure(self, folder, tmp_path):
        (folder / "model.safetensors").unlink()
        assert load_skeleton(str(folder)).device.type == "meta"
        with pytest.raises(CatsError, match="holds no weights"):
            check_source(folder, tmp_path / "out")

    def test_a_folder_in_the_place_of_a_file(self, folder):
        (folder / "config.json").unlink()
        (folder / "config.json").mkdir()
        refused(folder, r"holds weights .* but no config\.json")

    def test_adapters_beside_a_model(self, folder, tmp_path):
        put(folder, "adapter_config.json", "adapter_model.safetensors")
        with pytest.raises(CatsError, match="holds adapters beside the model"):
            check_source(folder, tmp_path / "out")


class TestTensors:
    """What transformers' own matching of names finds, before hours of calibration."""

    def rename(self, folder, change):
        tensors = load_file(folder / "model.safetensors")
        save_file({change(name): t for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})

    def check(self, folder):
        return check_tensors(load_skeleton(str(folder)), folder)

    def test_every_family_is_what_it_says(self, case):
        assert check_tensors(case.dense, case.dense_folder) == []
        assert check_tensors(case.dense, case.sparse_folder) == []

    @pytest.mark.parametrize(
        "prefix", ["transformer.", "module.", "_orig_mod.", "base_model.model.", "module._orig_mod."]
    )
    def test_the_prefix_of_a_wrapper(self, folder, prefix):
        self.rename(folder, lambda name: prefix + name)
        with pytest.raises(CatsError, match=f"named {prefix}model.norm.weight .*take '{prefix}' off"):
            self.check(folder)

    def test_names_that_transformers_knows_are_no_fault(self, folder):
        tensors = load_file(folder / "model.safetensors")
        assert "lm_head.weight" in tensors
        self.rename(folder, lambda name: name.removeprefix("model."))
        assert self.check(folder) == []

    def test_layers_missing_and_left_over(self, folder):
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(values | {"num_hidden_layers": 3}))
        with pytest.raises(CatsError, match=r"lacks 9 weights of the model \(model\.layers\.2\."):
            self.check(folder)
        (folder / "config.json").write_text(json.dumps(values | {"num_hidden_layers": 1}))
        assert len(self.check(folder)) == 9

    def test_generation_settings_are_not_looked_at(self, folder):
        (folder / "generation_config.json").write_text('{"num_beams": -1, "penalty_alpha": "x"}')
        assert self.check(folder) == []

    def test_other_shapes(self, folder):
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(values | {"intermediate_size": 8}))
        with pytest.raises(CatsError, match=r"down_proj\.weight .*config\.json asks for .*\(6 weights differ\)"):
            self.check(folder)

    def test_a_damaged_file_of_the_older_format(self, folder):
        (folder / "model.safetensors").unlink()
        put(folder, "pytorch_model.bin", content=b"no pickle")
        with pytest.raises(CatsError, match="could not read the weights"):
            self.check(folder)

    def test_the_older_format_is_checked_too(self, folder):
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        torch.save(tensors, folder / "pytorch_model.bin")
        assert self.check(folder) == []
        torch.save({"module." + name: t for name, t in tensors.items()}, folder / "pytorch_model.bin")
        with pytest.raises(CatsError, match=r"'module\.' off"):
            self.check(folder)

    def test_the_command_checks_before_it_calibrates(self, folder, tmp_path, capsys, monkeypatch):
        self.rename(folder, lambda name: "module." + name)
        monkeypatch.setattr("cats_llm.loading.load_model", lambda *_: pytest.fail("the model is loaded first"))
        text = str(bundled.calibration_text())
        assert main(["sparsify", str(folder), str(tmp_path / "out"), "--sparsity", "0.5", "--data", text]) == 1
        assert "take 'module.' off the names" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_reading_a_folder_lists_it(folder):
    put(folder, "1_Pooling/config.json", ".hidden")
    found = read_folder(folder)
    assert found.weights == ("model.safetensors",)
    assert found.others == ("1_Pooling/config.json", "config.json", "generation_config.json")
    assert found.left_out == {".hidden": 2}
    check_files(found)


@pytest.mark.parametrize("older", [False, True])
def test_what_is_left_out_is_not_downloaded(folder, tmp_path, monkeypatch, older):
    """The hub's client filters by patterns of its own; `bin` files come only where there is nothing newer."""
    if older:
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    else:
        put(folder, "pytorch_model.bin", "pytorch_model.bin.index.json")
    wanted = content(folder).keys() - ({"pytorch_model.bin.index.json"} | (set() if older else {"pytorch_model.bin"}))
    put(folder, "1_Pooling/config.json", "2_Dense/pytorch_model.bin", "remote/a.py")
    wanted |= {"1_Pooling/config.json", "2_Dense/pytorch_model.bin", "remote/a.py"}
    put(
        folder,
        ".gitattributes",
        "a.gguf",
        "onnx/model.onnx",
        "1_Pooling/.x",
        "original/params.json",
        "sub/onnx/a/b.json",
    )
    asked = []

    def download(name, revision, ignore_patterns):
        asked.append((name, revision))
        for file in filter_repo_objects(content(folder), ignore_patterns=ignore_patterns):
            put(tmp_path / "cache", file, content=(folder / file).read_bytes())
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert checkpoint_folder("someone/model", "v1") == tmp_path / "cache"
    assert content(tmp_path / "cache").keys() == wanted
    assert asked == [("someone/model", "v1")] * (2 if older else 1)
