"""Outputs appear whole or not at all."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from cats_llm.checkpoint.config import CatsConfig
from cats_llm.checkpoint.write import write_checkpoint
from cats_llm.errors import CatsError
from cats_llm.outputs import write_file, write_folder, write_json


def content(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_file_and_folder_are_written(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}
    with write_folder(tmp_path / "d") as folder:
        (folder / "x").write_text("1")
    assert sorted(content(tmp_path)) == ["a.json", "d/x"]


def test_existing_outputs_need_force(tmp_path):
    write_json(tmp_path / "a", 1)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "old").write_text("old")
    before = content(tmp_path)
    with pytest.raises(CatsError, match="exists already"), write_file(tmp_path / "a"):
        pass
    with pytest.raises(CatsError, match="exists already"), write_folder(tmp_path / "d"):
        pass
    assert content(tmp_path) == before
    write_json(tmp_path / "a", 2, force=True)
    with write_folder(tmp_path / "d", force=True) as folder:
        (folder / "new").write_text("new")
    assert sorted(content(tmp_path)) == ["a", "d/new"]
    assert (tmp_path / "a").read_text() == "2\n"


def test_a_file_does_not_become_a_folder_nor_a_folder_a_file(tmp_path):
    (tmp_path / "d").mkdir()
    write_json(tmp_path / "a", 1)
    with pytest.raises(CatsError, match="is a folder"), write_file(tmp_path / "d", force=True):
        pass
    with pytest.raises(CatsError, match="is a file"), write_folder(tmp_path / "a", force=True):
        pass


def test_a_link_to_nothing_is_no_place_to_write(tmp_path):
    (tmp_path / "link").symlink_to("gone")
    with pytest.raises(CatsError, match="link is a link to nothing"), write_folder(tmp_path / "link", force=True):
        pass


def test_missing_parent(tmp_path):
    with pytest.raises(CatsError, match="does not exist"), write_file(tmp_path / "x" / "y"):
        pass


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("bug")])
def test_a_failure_leaves_the_old_output_whole(tmp_path, error):
    with write_folder(tmp_path / "d") as folder:
        (folder / "old").write_text("old")
    write_json(tmp_path / "a", "old")
    before = content(tmp_path)
    expected = CatsError if isinstance(error, OSError) else RuntimeError

    def fail_in_the_middle(write, path, part):
        with write(path, force=True) as temporary:
            (temporary / part).write_text("half")
            raise error

    with pytest.raises(expected, match=str(error.args[-1])):
        fail_in_the_middle(write_folder, tmp_path / "d", "half")
    with pytest.raises(expected, match=str(error.args[-1])):
        fail_in_the_middle(write_file, tmp_path / "a", "")
    assert content(tmp_path) == before


def test_a_kill_in_the_middle_leaves_the_old_output_whole(tmp_path):
    with write_folder(tmp_path / "d") as folder:
        (folder / "old").write_text("old")
    script = (
        "import sys, time\n"
        "from cats_llm.outputs import write_folder\n"
        "with write_folder(sys.argv[1], force=True) as folder:\n"
        "    (folder / 'half').write_text('half')\n"
        "    print('writing', flush=True)\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "d")], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert content(tmp_path / "d") == {"old": b"old"}


@pytest.mark.skipif(not sys.platform.startswith("linux") or os.geteuid() != 0, reason="mounts a small file system")
def test_a_full_disk_leaves_the_old_checkpoint_whole(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        (small / "out").mkdir()
        (small / "out" / "config.json").write_text("old")
        source = tmp_path / "model"
        source.mkdir()
        (source / "config.json").write_text("{}")
        (source / "model.safetensors").write_bytes(b"x" * (2 << 20))
        with pytest.raises(CatsError, match="No space left on device"):
            write_checkpoint(source, small / "out", CatsConfig({0: 0.1}), force=True)
        assert content(small) == {"out/config.json": b"old"}
    finally:
        for _ in range(5):
            if subprocess.run(["umount", str(small)]).returncode == 0:
                break
            time.sleep(0.2)


class TestWriteCheckpoint:
    """`write_checkpoint` on folders of made-up files."""

    config = CatsConfig({0: 0.25}, sparsity=0.5)

    def source(self, tmp_path, **files):
        folder = tmp_path / "model"
        folder.mkdir()
        files = {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"weights"} | files
        for name, data in files.items():
            if data is not None:
                (folder / name).write_bytes(data)
        return folder

    def test_copies_bytes_and_adds_the_config(self, tmp_path):
        others = {"tokenizer.json": b"{}", "optimizer.pt": b"no", "LICENSE": b"yes", "model.gguf": b"no"}
        source = self.source(tmp_path, **others)
        write_checkpoint(source, tmp_path / "out", self.config)
        written = content(tmp_path / "out")
        assert sorted(written) == ["LICENSE", "config.json", "model.safetensors", "tokenizer.json"]
        assert written["model.safetensors"] == b"weights"
        values = json.loads(written["config.json"])
        assert values["model_type"] == "llama"
        assert CatsConfig.from_dict(values["quantization_config"]) == self.config

    def test_copies_the_shards_that_the_index_names(self, tmp_path):
        index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}).encode()
        shards = {"model-1.safetensors": b"1", "model-2.safetensors": b"2", "model-3.safetensors": b"no"}
        source = self.source(tmp_path, **{"model.safetensors": None, "model.safetensors.index.json": index}, **shards)
        write_checkpoint(source, tmp_path / "out", self.config)
        names = ["config.json", "model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json"]
        assert sorted(content(tmp_path / "out")) == names
        (source / "model-2.safetensors").unlink()
        with pytest.raises(CatsError, match=r"lacks model-2\.safetensors"):
            write_checkpoint(source, tmp_path / "out2", self.config)

    def test_refuses_what_cannot_be_a_cats_checkpoint(self, tmp_path):
        source = self.source(tmp_path, **{"config.json": b'{"quantization_config": {"quant_method": "awq"}}'})
        with pytest.raises(CatsError, match="already quantised with awq"):
            write_checkpoint(source, tmp_path / "out", self.config)
        with pytest.raises(CatsError, match="is the model itself"):
            write_checkpoint(source, source, self.config, force=True)
        (source / "config.json").write_text("{}")
        (source / "model.safetensors").unlink()
        with pytest.raises(CatsError, match="holds no weights"):
            write_checkpoint(source, tmp_path / "out", self.config)
        assert not (tmp_path / "out").exists()
        assert [p.name for p in tmp_path.iterdir()] == ["model"]
