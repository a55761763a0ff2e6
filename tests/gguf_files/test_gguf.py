"""GGUF files as models: against the weights that they were written from, and in every command."""

import json
import os
import re
import struct
import sys
import warnings

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import cats_llm
import gguf_models
from cats_llm import CatsConfig, CatsError, bundled
from cats_llm.checkpoint.tensors import check_tensors
from cats_llm.cli.main import main
from cats_llm.conversion import convert_gguf
from cats_llm.gguf_files.parts import read_gguf
from cats_llm.loading import ModelSource, load_model, load_skeleton, load_tokenizer
from gguf_models import Type

pytestmark = pytest.mark.usefixtures("one_thread")

PROSE = "It was a long walk to the mill, and the miller was not at home. "


@pytest.fixture(scope="module")
def llama():
    return gguf_models.tiny_llama()


@pytest.fixture(scope="module")
def file(llama, tmp_path_factory):
    """The model in float32."""
    return gguf_models.write(tmp_path_factory.mktemp("gguf") / "tiny.gguf", llama)


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    """A model of one layer, quantised, for commands."""
    model = gguf_models.tiny_llama(num_hidden_layers=1)
    return gguf_models.write(tmp_path_factory.mktemp("gguf") / "s.gguf", model, gguf_models.quantised(Type.Q8_0))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "t.txt"
    path.write_text(PROSE * 200, encoding="utf-8")
    return path


@pytest.fixture
def cats(run_cats):
    """Run a command that must succeed, and return what it says."""

    def run(*arguments):
        code, said = run_cats(*arguments)
        assert code == 0, said
        return said

    return run


@pytest.fixture
def fails(capsys):
    """Run a command that must fail with one sentence, and return it."""

    def run(*arguments):
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) in (1, 2)
        message = capsys.readouterr().err.strip()
        assert message.startswith("error: ")
        assert "\n" not in message
        return message

    return run


def refused(path, message):
    """Every way to load it says the same."""
    for use in (load_model, load_skeleton, load_tokenizer):
        with pytest.raises(CatsError, match=message) as info:
            use(str(path))
        assert "\n" not in str(info.value)


def same_weights(model, expected):
    theirs = dict(expected)
    ours = dict(model.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        assert torch.equal(parameter, theirs[name]), f"{name} differs"


def logits(model):
    torch.manual_seed(0)
    with torch.no_grad():
        return model(torch.randint(3, 4000, (2, 12))).logits


class TestWeights:
    def test_float32_is_the_model_it_was_written_from(self, llama, file):
        model = cats_llm.load(str(file), device="cpu")
        same_weights(model, llama.named_parameters())
        assert torch.equal(logits(model), logits(llama)), "rotary positions, norms or heads are read otherwise"
        assert model.lm_head.weight is model.model.embed_tokens.weight

    @pytest.mark.parametrize("kind", ["float16", "bfloat16"])
    def test_half_precision_is_kept_exactly(self, llama, tmp_path, kind):
        store = gguf_models.plain(np.float16) if kind == "float16" else gguf_models.quantised(Type.BF16)
        path = gguf_models.write(tmp_path / "half.gguf", llama, store)
        model = load_model(str(path), device="cpu")
        dtype = getattr(torch, kind)
        assert model.dtype == dtype
        same_weights(model, ((name, p.to(dtype)) for name, p in llama.named_parameters()))
        # a half is a float32 too
        wide = load_model(str(path), "float32", "cpu").model.layers[0].mlp.gate_proj.weight
        assert torch.equal(wide, llama.model.layers[0].mlp.gate_proj.weight.to(dtype).float())

    @pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
    def test_blocks_are_dequantised_exactly(self, llama, tmp_path, kind):
        known = {}
        own = getattr(gguf_models, kind.lower())

        def store(name, weight):
            array, stored = gguf_models.quantised(Type[kind])(name, weight)
            if weight.ndim == 2:
                known[name] = own(array, weight.shape)
            return array, stored

        path = gguf_models.write(tmp_path / "q.gguf", llama, store)
        self.check(path, llama, known)

    def test_blocks_written_by_hand(self, llama, tmp_path):
        known = {}

        def store(name, weight):
            if weight.ndim < 2:
                return weight, None
            content, known[name] = gguf_models.random_q4_k(weight.shape, len(known))
            return content, Type.Q4_K

        path = gguf_models.write(tmp_path / "q4_k.gguf", llama, store)
        self.check(path, llama, known, rounding=1e-6)

    def check(self, path, llama, known, rounding=0.0):
        heads = {"q_proj": 4, "k_proj": 2}
        model = load_model(str(path), "float32", "cpu")
        assert load_model(str(path), device="cpu").dtype == torch.bfloat16, "auto of a quantised file"
        assert len(known) == 15, "seven matrices a layer, and the embedding"
        for name, parameter in model.named_parameters():
            assert (
                type(model.get_submodule(name.rpartition(".")[0])) in (torch.nn.Linear, torch.nn.Embedding)
                or parameter.dim() == 1
            )
            expected = torch.from_numpy(known[name]) if name in known else dict(llama.named_parameters())[name].double()
            for part, number in heads.items():
                if part in name:  # stored in the other order
                    rows = torch.from_numpy(gguf_models.permuted(np.arange(len(expected)), number))
                    expected = torch.empty_like(expected).index_copy_(0, rows, expected)
            error = (parameter.double() - expected).abs().max()
            assert error <= rounding * expected.abs().max(), f"{name} is off by {error:g}"

    def test_an_output_matrix_of_its_own(self, tmp_path):
        model = gguf_models.tiny_llama(tied=False)
        loaded = load_model(str(gguf_models.write(tmp_path / "untied.gguf", model)), device="cpu")
        same_weights(loaded, model.named_parameters())
        assert not loaded.config.tie_word_embeddings

    def test_positions_scaled_as_llama_3_does(self, tmp_path):
        rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
        rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        model = gguf_models.tiny_llama(rope_parameters=rope)
        plain = gguf_models.tiny_llama(rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
        factors = (plain.model.rotary_emb.inv_freq / model.model.rotary_emb.inv_freq).numpy()
        assert factors[0] == 1
        assert factors[-1] == 8
        extra = {"rope_freqs.weight": factors}
        loaded = load_model(str(gguf_models.write(tmp_path / "l3.gguf", model, extra=extra)), device="cpu")
        assert torch.allclose(loaded.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
        assert torch.allclose(logits(loaded), logits(model), atol=1e-5)
        other = gguf_models.write(tmp_path / "o.gguf", model, extra={"rope_freqs.weight": factors**0.5})
        with pytest.raises(CatsError, match=r"rope_freqs\.weight\) otherwise than Llama 3"):
            load_model(str(other))

    @pytest.mark.parametrize("kind", ["linear", "yarn", "longrope"])
    def test_positions_scaled_by_the_metadata(self, tmp_path, kind):
        rope = {"rope_type": kind, "rope_theta": 20000.0, "factor": 4.0}
        rope |= {"original_max_position_embeddings": 128} if kind == "yarn" else {}
        model = gguf_models.tiny_llama(rope_parameters=rope if kind != "longrope" else {"rope_theta": 1e4})

        def change(out):
            out.add_rope_scaling_type(gguf_models.gguf.RopeScalingType(kind))
            out.add_rope_scaling_factor(4.0)
            out.add_rope_scaling_orig_ctx_len(128)

        path = gguf_models.write(tmp_path / "scaled.gguf", model, change=change)
        if kind == "longrope":
            return refused_model(path, "scales its rotary positions by 'longrope'")
        loaded = load_model(str(path), device="cpu")
        assert torch.equal(logits(loaded), logits(model))

    def test_weights_that_transformers_would_drop_are_refused(self, llama, tmp_path):
        extra = {"blk.0.attn_q.bias": np.ones(256, np.float32)}
        path = gguf_models.write(tmp_path / "bias.gguf", llama, extra=extra)
        refused_model(path, r"LlamaForCausalLM has no place for \(blk\.0\.attn_q\.bias\)")

    def test_layers_after_the_last_are_left_out(self, llama, tmp_path):
        """Of those that predict several tokens at once the file says how many there are."""
        extra = {"blk.2.attn_norm.weight": np.ones(256, np.float32)}
        refused_model(
            gguf_models.write(tmp_path / "more.gguf", llama, extra=extra), r"no place for \(blk\.2\.attn_norm"
        )
        same_weights(
            load_model(str(gguf_models.write(tmp_path / "mtp.gguf", llama, extra=extra, change=mtp)), device="cpu"),
            llama.named_parameters(),
        )


def mtp(out):
    out.add_uint32("llama.nextn_predict_layers", 1)


def refused_model(path, message):
    for use in (load_model, load_skeleton):
        with pytest.raises(CatsError, match=message):
            use(str(path))


class TestAPlainModel:
    def test_it_bears_no_trace_of_the_format(self, file, tmp_path):
        model = load_model(str(file), "bfloat16", "cpu")
        assert not hasattr(model.config, "quantization_config")
        assert not getattr(model, "is_quantized", False)
        assert getattr(model, "hf_quantizer", None) is None
        model.save_pretrained(tmp_path / "saved")
        config = json.loads((tmp_path / "saved" / "config.json").read_text())
        assert config["dtype"] == "bfloat16"
        assert "gguf" not in json.dumps(config)
        assert "name" not in " ".join(config)
        assert torch.equal(
            logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto")), logits(model)
        )

    def test_it_is_made_sparse_and_saved(self, file, tmp_path):
        model = cats_llm.sparsify(load_model(str(file), device="cpu"), CatsConfig({0: 0.25, 1: 0.5}))
        model.save_pretrained(tmp_path / "cats")
        again = load_model(str(tmp_path / "cats"), device="cpu")
        assert cats_llm.thresholds(again) == {0: 0.25, 1: 0.5}
        assert torch.equal(logits(again), logits(model))

    def test_nothing_is_warned_of_or_drawn(self, small_file, caplog, capfd):
        transformers.logging.disable_progress_bar()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                load_model(str(small_file), "bfloat16", "cpu")
        finally:
            transformers.logging.enable_progress_bar()
        said = capfd.readouterr()
        assert said.out + said.err + caplog.text == ""

    def test_the_skeleton_reads_no_weight(self, file, monkeypatch):
        import gguf

        monkeypatch.setattr(gguf, "dequantize", lambda *_: pytest.fail("weights were dequantised"))
        skeleton = ModelSource(str(file)).skeleton()
        assert {parameter.device.type for parameter in skeleton.parameters()} == {"meta"}
        assert [mlp.intermediate_size for mlp in cats_llm.find_gated_mlps(skeleton)] == [256, 256]

    def test_what_lies_beside_the_file_is_not_read(self, llama, file, tmp_path, monkeypatch):
        """Another model's tokenizer and adapters in its folder, and a file of the same name where the user stands."""
        (tmp_path / "f").mkdir()
        os.link(file, tmp_path / "f" / "tiny.gguf")
        (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
        (tmp_path / "model.gguf").write_bytes(b"GGUF")
        for name in ("adapter_config.json", "tokenizer.json", "tokenizer_config.json", "config.json"):
            (tmp_path / "f" / name).write_text('{"base_model_name_or_path": "elsewhere"}')
        monkeypatch.chdir(tmp_path)
        path = str(tmp_path / "f" / "tiny.gguf")
        same_weights(load_model(path, device="cpu"), llama.named_parameters())
        assert load_tokenizer(path)(PROSE).input_ids == load_tokenizer(str(bundled.model_path()))(PROSE).input_ids


class TestTokenizer:
    TEXTS = (PROSE, "Two  spaces,\n\na line</s><s>, naïve café 12345 – “quotes” 日本\t\U0001f98a.")

    def test_it_is_the_one_of_the_file(self, file):
        ours, truth = load_tokenizer(str(file)), AutoTokenizer.from_pretrained(bundled.model_path())
        for text in self.TEXTS:
            assert ours(text).input_ids == truth(text).input_ids
            assert ours.decode(ours(text).input_ids) == text
        assert (ours.bos_token, ours.eos_token, ours.pad_token) == ("<s>", "</s>", "</s>")

    @pytest.mark.parametrize("bos", [False, True])
    def test_written_into_a_folder_it_stays_the_same(self, llama, file, tmp_path, bos):
        path = gguf_models.write(
            tmp_path / "t.gguf", llama, change=lambda o: set_value(o, "tokenizer.ggml.add_bos_token", bos)
        )
        ours = load_tokenizer(str(path))
        ours.save_pretrained(tmp_path / "t")
        again = AutoTokenizer.from_pretrained(tmp_path / "t")
        for text in self.TEXTS:
            ids = ours(text).input_ids
            assert again(text).input_ids == ids
            assert ids[0] == 0 or not bos, "a text begins with <s> where the file says so"

    def test_the_chat_template_comes_along(self, file, tmp_path):
        ours = cats_llm.load_tokenizer(str(file))
        ours.save_pretrained(tmp_path)
        for tokenizer in (ours, AutoTokenizer.from_pretrained(tmp_path)):
            turns = [{"role": "user", "content": "Hello"}]
            assert tokenizer.apply_chat_template(turns, tokenize=False) == "<s>user: Hello</s>"

    def test_a_file_without_one(self, llama, tmp_path):
        path = gguf_models.write(tmp_path / "n.gguf", llama, change=lambda o: drop(o, "tokenizer."))
        load_skeleton(str(path))
        with pytest.raises(CatsError, match="holds no tokenizer"):
            load_tokenizer(str(path))


def set_value(out, key, value):
    out.kv_data[0][key].value = value


def drop(out, prefix):
    for key in [key for key in out.kv_data[0] if key.startswith(prefix)]:
        del out.kv_data[0][key]


class TestSplit:
    @pytest.fixture
    def parts(self, llama, tmp_path):
        gguf_models.write(tmp_path / "m.gguf", llama, split_max_tensors=8)
        parts = sorted(tmp_path.glob("*.gguf"))
        assert [part.name for part in parts] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
        return parts

    def test_any_part_stands_for_the_model(self, llama, parts):
        for part in parts:
            same_weights(load_model(str(part), device="cpu"), llama.named_parameters())
        assert load_skeleton(str(parts[1])).config.tie_word_embeddings, "of which no part alone can tell"
        assert (
            load_tokenizer(str(parts[2]))(PROSE).input_ids == load_tokenizer(str(bundled.model_path()))(PROSE).input_ids
        )

    def test_nothing_stays_behind(self, parts, tmp_path, monkeypatch):
        (tmp_path / "tmp").mkdir()
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
        load_model(str(parts[0]), device="cpu")
        load_tokenizer(str(parts[0]))
        assert list((tmp_path / "tmp").iterdir()) == []

    def test_a_part_is_missing(self, parts):
        parts[1].unlink()
        refused(parts[0], r"m-00002-of-00003\.gguf of the model's 3 parts cannot be found")
        parts[0].unlink()
        refused(parts[2], r"m-00001-of-00003\.gguf and 1 more of the model's 3 parts")

    def test_parts_that_do_not_belong_together(self, parts):
        content = parts[1].read_bytes()
        parts[1].write_bytes(parts[2].read_bytes())
        refused(parts[0], r"m-00002-of-00003\.gguf does not say that it is part 2 of 3")
        parts[1].write_bytes(content[:-100])
        refused(parts[0], r"m-00002-of-00003\.gguf is truncated or damaged: .* ends \d+ bytes after the end")

    def test_a_part_under_another_name(self, parts):
        other = parts[0].rename(parts[0].with_name("first.gguf"))
        refused(other, "one of 3 parts of a model, but is not named as one")

    def test_no_room_for_one_file(self, parts, monkeypatch):
        import shutil

        monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10, 5, 5))
        load_skeleton(str(parts[0]))
        with pytest.raises(CatsError, match="No space left on device: it needs"):
            load_model(str(parts[0]))


class TestRefused:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "is empty"),
            (b"GGUF", "truncated or damaged"),
            (b"GGML" + bytes(100), "is no GGUF file: it begins with b'GGML'"),
            (b"PK\x03\x04" + bytes(100), "is no GGUF file"),
            (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
            (b"GGUF" + struct.pack("<IQQ", 1, 0, 0) + bytes(100), "version 1 of GGUF, older than"),
            (b"GGUF" + struct.pack("<IQQ", 4, 0, 0) + bytes(100), "version 4 of GGUF, newer than"),
            (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(100), "big-endian"),
            (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60) + bytes(100), "truncated or damaged"),
            (b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + struct.pack("<Q", 2**63) + bytes(100), "truncated or damaged"),
        ],
    )
    def test_no_gguf_or_another_version(self, tmp_path, content, message):
        (tmp_path / "m.gguf").write_bytes(content)
        refused(tmp_path / "m.gguf", message)

    @pytest.mark.parametrize("share", [0.001, 0.01, 0.05, 0.3, 0.999])
    def test_truncated_anywhere(self, file, tmp_path, share):
        content = file.read_bytes()
        (tmp_path / "m.gguf").write_bytes(content[: int(share * len(content))])
        refused(tmp_path / "m.gguf", r"m\.gguf is truncated or damaged: .*; download it again")

    def test_a_damaged_header(self, file, tmp_path):
        """Any byte of it changed: a sentence, or a model that was read to its end."""
        content = bytearray(file.read_bytes())
        start = content.index(b"token_embd.weight") - 8  # where the table of tensors begins
        rng = np.random.default_rng(0)
        places = [*range(4, 400, 7), *(start + rng.integers(0, 900, 40)).tolist()]
        told = []
        for place in places:
            damaged = bytearray(content)
            damaged[place] ^= 0xFF
            (tmp_path / "m.gguf").write_bytes(damaged)
            try:
                read_gguf(tmp_path / "m.gguf")
            except CatsError as error:
                told.append(str(error))
        assert len(told) > len(places) / 3
        assert "\n" not in "".join(told)

    @pytest.mark.parametrize(
        ("kind", "message"),
        [
            ("adapter", "an adapter without its model"),
            ("mmproj", "the part of a multimodal model"),
            ("vocab", "a vocabulary"),
        ],
    )
    def test_other_kinds_of_gguf(self, llama, tmp_path, kind, message):
        path = gguf_models.write(tmp_path / "k.gguf", llama, change=lambda out: out.add_type(kind))
        refused(path, rf"k\.gguf holds {message}")

    def test_a_vocabulary_that_does_not_say_so(self, tmp_path):
        out = gguf_models.gguf.GGUFWriter(tmp_path / "v.gguf", "llama")
        gguf_models.add_tokenizer(out)
        for step in (out.write_header_to_file, out.write_kv_data_to_file, out.write_tensors_to_file, out.close):
            step()
        refused(tmp_path / "v.gguf", "a vocabulary without weights")

    def test_an_architecture_that_transformers_does_not_read(self, llama, tmp_path):
        path = gguf_models.write(tmp_path / "a.gguf", llama, architecture="plm")
        refused_model(path, r"a\.gguf is of the architecture 'plm', which this transformers does not read from GGUF")

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("block_count", 10**8, "says that it has 100000000 layers, but holds 20 tensors"),
            ("block_count", 1, "no place for"),
            ("feed_forward_length", 128, "no place for"),
            ("feed_forward_length", 512, "holds weights of other shapes than its metadata say"),
            ("attention.head_count", 0, "could not load"),
        ],
    )
    def test_metadata_that_do_not_fit_the_weights(self, llama, tmp_path, key, value, message):
        path = gguf_models.write(tmp_path / "m.gguf", llama, change=lambda o: set_value(o, f"llama.{key}", value))
        with pytest.raises(CatsError, match=message) as info:
            load_model(str(path), device="cpu")
        assert "\n" not in str(info.value)

    def test_weights_are_missing(self, llama, tmp_path):
        def change(out):
            out.kv_data[0]["llama.block_count"].value = 3

        path = gguf_models.write(tmp_path / "w.gguf", llama, change=change)
        with pytest.raises(CatsError, match=r"w\.gguf lacks 9 weights of the model \(model\.layers\.2"):
            load_model(str(path), device="cpu")

    def test_without_the_package(self, file, monkeypatch):
        monkeypatch.setitem(sys.modules, "gguf.constants", None)
        refused(file, r"tiny\.gguf is in GGUF, which needs the package gguf: pip install 'cats-llm\[gguf\]'")

    def test_names_of_no_file(self, tmp_path):
        refused(tmp_path / "none.gguf", "there is no file .*none.gguf")
        refused("someone/model-GGUF/model.Q4_K_M.gguf", "hf download OWNER/NAME FILE")
        (tmp_path / "m.pt").write_bytes(b"PK\x03\x04")
        refused(tmp_path / "m.pt", "is a file, but not in GGUF")

    def test_a_folder_of_gguf_says_which_file_to_pass(self, file, tmp_path):
        for name in ("b.Q8_0.gguf", "a.Q4_0.gguf"):
            os.link(file, tmp_path / name)
        refused(tmp_path, rf"a model in GGUF: pass {re.escape(str(tmp_path / 'a.Q4_0.gguf'))} as the model")


class TestCommands:
    """Each once, on a small quantised file."""

    def test_sparsify_writes_an_ordinary_folder(self, cats, small_file, text, tmp_path):
        out = tmp_path / "cats"
        data = ("--data", text, "--seq-length", 32, "--samples", 4)
        cats("sparsify", small_file, out, "--sparsity", 0.5, *data, "--dtype", "float32")
        names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
        assert {path.name for path in out.iterdir()} == names | {"generation_config.json", "chat_template.jinja"}
        assert [path.name for path in tmp_path.iterdir()] == ["cats"], "what was temporary is gone"
        stored = json.loads((out / "config.json").read_text())["quantization_config"]
        assert stored["calibration"]["model"] == str(small_file)
        assert stored["calibration"]["dtype"] == "float32"
        dense = load_model(str(small_file), "float32", "cpu")
        assert torch.equal(
            logits(load_model(str(out), device="cpu")), logits(cats_llm.sparsify(dense, CatsConfig.from_dict(stored)))
        )
        assert check_tensors(load_skeleton(str(out)), out) == []
        # and back
        cats("densify", out, tmp_path / "dense")
        same_weights(
            AutoModelForCausalLM.from_pretrained(tmp_path / "dense"),
            load_model(str(small_file), "float32", "cpu").named_parameters(),
        )
        cats("densify", small_file, tmp_path / "folder", "--dtype", "float32")
        for path in (tmp_path / "folder").iterdir():
            assert path.read_bytes() == (tmp_path / "dense" / path.name).read_bytes(), (
                "the same folder without the detour"
            )

    def test_calibrate_then_sparsify(self, cats, small_file, text, tmp_path):
        profile, facts = tmp_path / "p", tmp_path / "facts.json"
        cats(
            "calibrate", small_file, "--data", text, "--seq-length", 32, "--samples", 4, "-o", profile, "--json", facts
        )
        assert json.loads(facts.read_text())["record"]["model"] == str(small_file)
        assert json.loads(facts.read_text())["record"]["dtype"] == "bfloat16"
        cats("sparsify", small_file, tmp_path / "o", "--sparsity", 0.7, "--profile", profile)
        assert load_model(str(tmp_path / "o"), device="cpu").dtype == torch.bfloat16

    def test_inspect_generate_eval(self, cats, small_file, text, tmp_path):
        assert "dense model" in cats("inspect", small_file)
        assert cats("generate", small_file, "--prompt", "Hello", "--max-new-tokens", 2, "--dtype", "float32")
        short = ("--seq-length", 32, "--samples", 2, "--no-cache", "--dtype", "float32")
        cats("eval", small_file, "--text", text, *short, "--json", tmp_path / "e.json")
        result = json.loads((tmp_path / "e.json").read_text())
        assert result["model"] == str(small_file)
        torch.manual_seed(0)

    def test_finetune(self, cats, small_file, text, tmp_path):
        options = ("--method", "dense", "--data", text, "--steps", 1, "--seq-length", 32, "--heldout-samples", 2)
        cats("finetune", small_file, tmp_path / "f", *options, "--batch-size", 2, "--dtype", "float32")
        load_model(str(tmp_path / "f"), device="cpu")

    def test_bench_decode_and_tune_read_it(self, cats, small_file):
        from cats_llm.benchmark.config import TuneConfig

        assert TuneConfig(model=str(small_file)).sizes() == [(256, 256)]
        cats("bench", "decode", small_file, "--device", "cpu", "--tokens", 3, "--rounds", 1, "--sparsity", 0.5)

    def test_densify_says_what_has_no_meaning(self, fails, small_file, tmp_path):
        assert "--link is for CATS checkpoints" in fails("densify", small_file, tmp_path / "o", "--link")
        assert "--dtype is for GGUF files" in fails(
            "densify", bundled.model_path(), tmp_path / "o", "--dtype", "float32"
        )
        (tmp_path / "there").mkdir()
        assert "exists already" in fails("densify", small_file, tmp_path / "there")
        with pytest.raises(CatsError, match="exists already"):
            convert_gguf(str(small_file), tmp_path / "there")

    def test_revision_and_trust_mean_nothing_to_a_file(self, file):
        skeleton = ModelSource(str(file), revision="main", trust_remote_code=True).skeleton()
        assert type(skeleton).__name__ == "LlamaForCausalLM"
