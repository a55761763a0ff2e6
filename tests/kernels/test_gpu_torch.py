"""The GPU kernels as parts of PyTorch: which dispatch they serve, tuning, compilation, CUDA graphs, whole models."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cats_llm.calibration.calibrate import calibrate
from cats_llm.checkpoint.config import CatsConfig
from cats_llm.checkpoint.layer_tensors import LayerTensors
from cats_llm.kernels import backends, cpu, definition, gpu, operators
from cats_llm.kernels.backend import Request
from cats_llm.kernels.gpu import tuning
from cats_llm.kernels.gpu.config import GemvConfig, SmallBatchConfig, Tile, candidates, default, smaller
from cats_llm.model.decode_linear import decode_linear
from cats_llm.model.sparsify import densify, set_thresholds, sparse_mlps, sparsify

gpu_only = pytest.mark.gpu


def weights(d=512, f=1408, dtype=torch.bfloat16, device="cuda", seed=0):
    generator = torch.Generator().manual_seed(seed)
    w = [(torch.randn(f, d, generator=generator) * d**-0.5).to(dtype).to(device) for _ in range(3)]
    return w[0], w[1], w[2].t()


# without a GPU


def test_nothing_on_a_cpu_goes_to_the_gpu():
    gate, up, down = weights(device="cpu")
    request = Request(1, gate, up, down, "silu")
    assert not gpu.BACKEND.supports(request)
    assert not gpu.BACKEND.supports_linear(torch.randn(1, 512, dtype=torch.bfloat16), gate)
    assert not gpu.BACKEND.supports_act_and_mul(gate, gate)


@pytest.mark.parametrize(
    ("sparsity", "tokens"),
    [(0.0, 1), (0.4, 1), (0.5, 2), (0.7, 4), (0.8, 6), (0.9, 11), (0.99, 16)],
    ids=lambda v: str(v),
)
def test_several_tokens_are_served_while_enough_neurons_are_needed_by_none(sparsity, tokens):
    assert gpu.max_tokens(sparsity) == tokens


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("d", [1, 64, 4096, 5120, 8192, 16384, 32768, 65536])
@pytest.mark.parametrize("tokens", [1, 2, 16])
@pytest.mark.parametrize("shared_memory", [99 << 10, 227 << 10])
def test_defaults_fit_registers_and_shared_memory(tokens, d, itemsize, shared_memory):
    config = default(tokens, d, itemsize, 0.5, shared_memory)
    if isinstance(config, GemvConfig):
        row = 1 << (d - 1).bit_length()
        tile = config.up_down
        assert tile.rows * row <= 64 * 32 * max(tile.warps, 8)  # at most 64 float32 registers a thread for the sums
        assert 2 * tile.rows * row * itemsize * (tile.stages - 1) < shared_memory
    while config is not None:  # what to try when a GPU refuses it ends
        last, config = config, smaller(config)
    assert all(tile.stages == 1 for tile in vars(last).values())


def test_candidates_start_with_the_default_and_differ():
    for tokens in (1, 4):
        configs = list(candidates(tokens, 4096, 2, 0.5, 227 << 10))
        assert configs[0] == default(tokens, 4096, 2, 0.5, 227 << 10)
        assert len(set(configs)) > 20


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """An empty file of tuned configs, for a GPU of an invented name."""
    monkeypatch.setenv(tuning.VARIABLE, str(tmp_path / "tuning.json"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU X")
    monkeypatch.setattr(tuning, "_entries", None)
    return tmp_path / "tuning.json"


CALL = (torch.device("cuda", 0), 1, 64, 96, torch.bfloat16, 0.5)


@pytest.mark.parametrize(
    "config",
    [
        GemvConfig(Tile(16, 64, 4, 1), Tile(2, 0, 4, 1, 2)),
        SmallBatchConfig(Tile(16, 64, 4, 1), Tile(32, 64, 4, 3, 2), Tile(16, 64, 4, 2, 4)),
    ],
)
def test_a_tuned_config_is_found_by_gpu_shape_dtype_tokens_and_sparsity(tuned, monkeypatch, config):
    assert tuning.lookup(*CALL) is None
    tuning.remember(*CALL, config, 12.5)
    monkeypatch.setattr(tuning, "_entries", None)  # as a new process
    assert tuning.lookup(*CALL) == config
    device, tokens, d, f, dtype, sparsity = CALL
    assert tuning.lookup(device, tokens, d, f, dtype, 0.55) == config
    for other in (
        (device, 2, d, f, dtype, sparsity),
        (device, tokens, d + 1, f, dtype, sparsity),
        (device, tokens, d, f + 1, dtype, sparsity),
        (device, tokens, d, f, torch.float16, sparsity),
        (device, tokens, d, f, dtype, 0.9),
    ):
        assert tuning.lookup(*other) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU Y")
    assert tuning.lookup(*CALL) is None


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"GPU X": {"gate": {"rows": 1}}}', '{"GPU X": 3}'])
def test_a_damaged_file_of_tuned_configs_means_the_defaults(tuned, content, caplog):
    tuned.write_text(content)
    assert tuning.lookup(*CALL) is None
    assert "cannot be read" in caplog.text


def test_tuning_can_be_switched_off(tuned, monkeypatch):
    tuning.remember(*CALL, GemvConfig(Tile(16, 64, 4, 1), Tile(2, 0, 4, 1, 2)), 1.0)
    monkeypatch.setattr(tuning, "_entries", None)
    monkeypatch.setenv(tuning.VARIABLE, "off")
    assert tuning.lookup(*CALL) is None


# with a GPU


def truth(x, gate, up, down, threshold):
    a = F.silu(F.linear(x.double(), gate.double()).to(x.dtype).double())
    a = torch.where(a.abs() < threshold.double(), 0.0, a)
    return (a * F.linear(x.double(), up.double())) @ down.double().t()


def error(y, expected):
    return float((y.double() - expected).norm() / expected.norm())


@gpu_only
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("d", "f"), [(4096, 14336), (4096, 11008), (5120, 13824), (8192, 28672), (4097, 1000)])
@pytest.mark.parametrize("tokens", [1, 2, 16])
def test_large_shapes(tokens, d, f, dtype):
    gate, up, down = weights(d, f, dtype)
    x = torch.randn(tokens, d, device="cuda").to(dtype)
    for k in (0.0, 0.9):
        threshold = torch.tensor(0.0, device="cuda")
        if k:
            threshold = F.silu(F.linear(x, gate).float()).abs().flatten().kthvalue(int(k * tokens * f)).values * 1.01
        y = operators.gated_mlp(x, gate, up, down, threshold, sparsity=k)
        expected = truth(x, gate, up, down, threshold)
        plain = error(definition.gated_mlp(x, gate, up, down, threshold), expected)
        # neurons at the very threshold may fall on either side
        assert error(y, expected) < max(2 * plain, 1e-2 if dtype != torch.float32 else 3e-3)
        assert torch.equal(y, operators.gated_mlp(x, gate, up, down, threshold, sparsity=k))


@gpu_only
@pytest.mark.parametrize("tokens", [1, 4])
def test_opcheck(tokens):
    gate, up, down = weights(64, 96)
    x, t = torch.randn(tokens, 64, device="cuda", dtype=torch.bfloat16), torch.tensor(0.1, device="cuda")
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.cats_llm.gated_mlp, (x, gate, up, down, t, "silu"), test_utils=tests)
    torch.library.opcheck(torch.ops.cats_llm.linear, (x, gate), test_utils=tests)
    torch.library.opcheck(torch.ops.cats_llm.act_and_mul, (gate, up, t, "silu"), test_utils=tests)


@gpu_only
@pytest.mark.parametrize("tokens", [1, 4])
def test_a_graph_replays_with_other_inputs_and_thresholds(tokens):
    gate, up, down = weights()
    x, t = torch.randn(tokens, 512, device="cuda", dtype=torch.bfloat16), torch.tensor(0.1, device="cuda")

    def call():
        return operators.linear(operators.gated_mlp(x, gate, up, down, t, sparsity=0.9), gate)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for threshold in (0.0, 0.2, 1e9, 0.5):
        x.copy_(torch.randn_like(x))
        t.fill_(threshold)
        graph.replay()
        assert torch.equal(out, call()), threshold


@gpu_only
@pytest.mark.parametrize("tokens", [1, 3])
def test_compiled_whole_with_graphs(tokens):
    gate, up, down = weights()

    @torch.inference_mode()
    def step(x, t):
        return F.rms_norm(operators.gated_mlp(F.rms_norm(x, (512,)), gate, up, down, t) + x, (512,))

    compiled = torch.compile(step, fullgraph=True, mode="reduce-overhead")
    for threshold in (0.0, 0.3, 0.3, 0.6):
        x = torch.randn(tokens, 512, device="cuda", dtype=torch.bfloat16)
        t = torch.tensor(threshold, device="cuda")
        torch.testing.assert_close(compiled(x, t), step(x, t), rtol=2e-2, atol=2e-2)


def tiny_model():
    from transformers import AutoModelForCausalLM, MistralConfig

    sizes = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MistralConfig(vocab_size=200, num_key_value_heads=2, sliding_window=None, pad_token_id=0, **sizes)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


@gpu_only
def test_a_model_decodes_as_on_the_cpu_and_generates_with_a_static_cache():
    model = tiny_model().cuda()
    ids = torch.randint(200, (1, 24), device="cuda")
    profile = calibrate(model, [torch.randint(200, (2, 64), device="cuda") for _ in range(2)])
    sparsify(model, profile.config(0.7))
    assert all(mlp.down_proj.weight.stride(0) == 1 for mlp in sparse_mlps(model).values())
    with torch.no_grad():
        logits = model(ids).logits.float().cpu()
        reference = model.cpu()(ids.cpu()).logits.float()
    assert (logits - reference).norm() < 0.05 * reference.norm()
    model.cuda()
    arguments = {"max_new_tokens": 12, "do_sample": False}
    eager = model.generate(ids, **arguments)
    static = model.generate(ids, cache_implementation="static", **arguments)
    assert static.shape == eager.shape == (1, 36)
    again = model.generate(ids, cache_implementation="static", **arguments)
    assert torch.equal(static, again)
    dense = densify(model)
    assert not any("forward" in vars(m) for m in dense.modules())
    assert dense.model.layers[0].mlp.down_proj.weight.is_contiguous()


@gpu_only
def test_a_decode_linear_is_ours_in_a_graph_and_cublas_outside():
    layer = nn.Linear(512, 300, bias=True).cuda().bfloat16().requires_grad_(False)
    layer.forward = functools.partial(decode_linear, layer)
    x = torch.randn(1, 512, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        eager = layer(x)
        assert torch.equal(eager, F.linear(x, layer.weight, layer.bias))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer(x)
        graph.replay()
        assert torch.equal(out, operators.linear(x, layer.weight, layer.bias))
        compiled = torch.compile(layer, fullgraph=True)(x)
        assert torch.equal(compiled, out)


@gpu_only
def test_prefill_uses_the_fused_step_and_stays_the_same_function():
    model = tiny_model().cuda()
    profile = calibrate(model, [torch.randint(200, (2, 64), device="cuda")])
    sparsify(model, profile.config(0.5))
    mlp = sparse_mlps(model)[0]
    x = torch.randn(1, 64, 128, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        fused = mlp(x)
    x.requires_grad_()
    plain = mlp(x)
    assert plain.requires_grad
    torch.testing.assert_close(fused, plain.detach(), rtol=2e-2, atol=2e-3)
    set_thresholds(model, {0: 1e9, 1: 1e9})
    with torch.no_grad():
        assert not mlp(x).any()


@gpu_only
@pytest.mark.parametrize("bias", [False, True])
def test_a_captured_mlp_sees_other_vectors(bias):
    model = tiny_model()
    if bias:
        for layer in model.model.layers:
            layer.mlp.down_proj.bias = nn.Parameter(torch.randn(128, dtype=torch.bfloat16), requires_grad=False)
    model.cuda()

    def vectors(seed):
        generator = torch.Generator().manual_seed(seed)
        made = {
            layer: LayerTensors(torch.rand(352, generator=generator) / 10, torch.randn(128, generator=generator))
            for layer in (0, 1)
        }
        return CatsConfig({0: 0.05, 1: 0.05}, vectors=made)

    mlp = sparse_mlps(sparsify(model, vectors(0)))[0]
    x = torch.randn(1, 1, 128, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        mlp(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = mlp(x)
        last = None
        for seed in (0, 1, 2):
            sparsify(model.to("cuda", torch.bfloat16), vectors(seed))
            graph.replay()
            assert torch.equal(out, mlp(x))
            assert last is None or not torch.equal(out, last)
            last = out.clone()
        compiled = torch.compile(mlp, fullgraph=True, mode="reduce-overhead")
        for _ in range(3):
            torch.testing.assert_close(compiled(x), mlp(x), rtol=2e-2, atol=2e-2)


def test_the_kernels_of_all_devices_are_registered():
    assert "gpu" in backends.names()
    assert ("cpu" in backends.names()) == cpu.BACKEND.available()
