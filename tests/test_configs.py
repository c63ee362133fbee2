"""Measured choices: which file a device gets, what a wrong one raises, how measurements become a file."""

import importlib
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from kernels._rust import Digest, DigestAlgorithm

try:
    import tomllib
except ModuleNotFoundError:
    import tomli as tomllib

sys.path.insert(0, str(ROOT / "benchmarks"))

import tune
import tune_experts
from tune import Case, passes_any, pick_limits, reaches_all

pytestmark = pytest.mark.own_architecture

SOURCES = ROOT / "torch-ext" / "lora_fused"
FILES = sorted((SOURCES / "backends" / "configs").glob("*.json"))
SHIPPED = json.loads((SOURCES / "backends" / "configs" / "nvidia-h200.json").read_text())
GPU = torch.device("cuda", 0)
LARGE, NARROW = (128, 256, 64, 8, 3), (64, 128, 64, 4, 4)
TILED = [{"shape": [8192, 4096, 4096], "tile": list(LARGE)}, {"shape": [512, 4096, 4096], "tile": list(NARROW)}]


@pytest.fixture
def config(lora_fused, tmp_path, monkeypatch):
    """The module with files of its own; `config.of` reads them anew."""
    module = lora_fused.backends.device_config
    monkeypatch.setattr(module, "DIRECTORY", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Test-9 80GB")
    module._read_once.cache_clear()
    yield module
    module._read_once.cache_clear()


def write(config, **changes):
    (config.DIRECTORY / "nvidia-test-9-80gb.json").write_text(json.dumps({**SHIPPED, **changes}))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_shipped_files_hold_every_key(lora_fused, path):
    found = lora_fused.backends.device_config.read(path)
    assert lora_fused.backends.device_config.path_of(json.loads(path.read_text())["device"]).name == path.name
    limits = [getattr(found, name) for name in lora_fused.backends.device_config.LIMITS]
    assert len(limits) > 3 and all(type(limit) in (int, float) for limit in limits)


def test_the_build_ships_them(lora_fused):
    """kernel-builder takes from torch-ext what has one of these endings and nothing else."""
    variant = lora_fused.backends.device_config.DIRECTORY.parent
    assert FILES and set(Digest.hash_variant(DigestAlgorithm.SHA256, variant).files) >= {
        f"configs/{path.name}" for path in FILES
    }
    endings = set(tomllib.loads((ROOT / "build.toml").read_text())["torch"]["pyext"])
    files = [p for p in SOURCES.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert {path.suffix[1:] for path in files} <= endings


def test_a_device_that_was_not_measured_takes_no_product_to_triton(lora_fused, monkeypatch):
    defaults = lora_fused.backends.device_config.DeviceConfig()
    measured = (defaults.linear_expand_from, defaults.row_norm_from_rank, defaults.row_norm_from)
    assert measured == (math.inf,) * 3 and defaults.linear_expand_tiles == defaults.experts_tiles == ()
    monkeypatch.setattr(lora_fused.backends.device_config, "of", lambda device: defaults)
    monkeypatch.setattr(lora_fused.backends.select, "is_hopper", lambda device: False)
    for native in (True, False):
        path = lora_fused.specs.NativePath(native)
        assert lora_fused.backends.select.choose(GPU, torch.bfloat16, path, lambda: 2**60) == "native"
    weight = SimpleNamespace(is_cuda=True, device=GPU, numel=lambda: 2**40)
    assert not lora_fused.backends.select._row_norm_is_faster_in_triton(weight, 4096)


def test_a_known_device_and_an_unknown_one(config):
    assert config.of(GPU) == config.of(torch.device("cpu")) == config.DeviceConfig()
    write(config, linear_expand_from=7, row_norm_from=None, linear_expand_tiles=TILED)
    config._read_once.cache_clear()
    found = config.of(GPU)
    assert (found.linear_expand_from, found.row_norm_from, found.embedding_tokens) == (7, math.inf, 8192)
    assert [tuple(each) for each in found.linear_expand_tiles] == [(tuple(t["shape"]), tuple(t["tile"])) for t in TILED]


def test_a_file_is_read_once(config):
    write(config, linear_expand_from=7)
    assert config.of(GPU).linear_expand_from == 7
    write(config, linear_expand_from=8)
    assert config.of(GPU).linear_expand_from == 7


WRONG = {
    "linear_expand_from": [-1, "many", True, math.nan],
    "linear_expand_tiles": [None, [3], [{"shape": [1, 2, 3], "tile": None}], [{"shape": [1, 2, 3]}],
                     [{"shape": [1, 2], "tile": list(LARGE)}], [{"shape": [1, 2, 0], "tile": list(LARGE)}]],
    "experts_tiles": [{}, [{"shape": [1, 2, 3], "tile": [64]}]],
    "unheard_of": [1],
}  # fmt: skip


@pytest.mark.parametrize("key,value", [(key, value) for key, values in WRONG.items() for value in values], ids=str)
def test_a_wrong_value_is_named(config, key, value):
    write(config, **{key: value})
    with pytest.raises(ValueError, match=f"nvidia-test-9-80gb.json: '{key}'"):
        config.of(GPU)


@pytest.mark.parametrize("key", SHIPPED)
def test_a_missing_key_is_named(config, key):
    path = config.DIRECTORY / "some.json"
    path.write_text(json.dumps({name: value for name, value in SHIPPED.items() if name != key}))
    with pytest.raises(ValueError, match=f"some.json: '{key}' is missing"):
        config.read(path)


@pytest.mark.parametrize("text", ("", "{", "[]", "\xff"))
def test_what_is_no_configuration_is_named(config, text):
    path = config.DIRECTORY / "some.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="some.json: "):
        config.read(path)


def test_backend_chooses_by_them(lora_fused, config, monkeypatch):
    backend, taken = lora_fused.backends.select, lora_fused.specs.NativePath(True)
    monkeypatch.setattr(backend, "is_hopper", lambda device: False)
    monkeypatch.setattr(backend, "triton_is_there", lambda: True)
    monkeypatch.setattr(backend, "_WITH_MEMORY", (SimpleNamespace,))  # which stands for tensors
    write(config, linear_expand_from=1000, row_norm_from_rank=8, row_norm_from=8 * 64)

    def choose(work):
        return backend.choose(GPU, torch.bfloat16, taken, lambda: work)

    assert (choose(999), choose(1000)) == ("native", "triton")
    pays = backend._row_norm_is_faster_in_triton
    weight = SimpleNamespace(is_cuda=True, device=GPU, numel=lambda: 64)
    assert (pays(weight, 7), pays(weight, 8)) == (False, True)
    weight.numel = lambda: 63
    assert not pays(weight, 8)
    on_gpu = SimpleNamespace(is_cuda=True, device=GPU, dtype=torch.bfloat16, numel=lambda: 2**40)
    table = SimpleNamespace(weight=on_gpu, lora_a=None, lora_b=None)
    monkeypatch.setattr(backend.native_embedding, "norm_fits", lambda table: True)
    monkeypatch.setattr(backend.native_embedding, "column_norm", lambda *operands: "native")
    assert backend.column_norm("triton", table, 1.0) == "native"


def test_experts_go_to_triton_where_that_was_measured(lora_fused, config, monkeypatch):
    backend, specs = lora_fused.backends.select, lora_fused.specs
    monkeypatch.setattr(backend, "triton_is_there", lambda: True)

    def chosen(tiles, dtype=torch.bfloat16, rows=4000):
        write(config, experts_tiles=tiles)
        config._read_once.cache_clear()
        backend._experts_tile.cache_clear()
        fits = lambda *_: dtype == torch.bfloat16  # noqa: E731 (as `grouped_mm.fits` says of Hopper)
        monkeypatch.setattr(backend.grouped_mm, "fits", fits)
        weight = SimpleNamespace(is_cuda=True, device=GPU, dtype=dtype, shape=(2, 4096, 4096))
        return backend.choose_experts(*[specs.ExpertWeights(weight)] * 2, 2 * rows)

    without = [TILED[0], {**TILED[1], "tile": None}]
    assert chosen(TILED) == chosen(without) == "triton"
    assert chosen([]) == chosen(without, rows=300) == "grouped_mm"
    assert chosen([], torch.float16) == "triton"  # torch's products would wait for the GPU
    assert chosen(TILED, torch.float64) == "reference"
    backend._experts_tile.cache_clear()


def test_backend_chooses_embeddings_by_them(lora_fused, config, monkeypatch):
    backend = lora_fused.backends.select
    write(config, embedding_tokens=100, embedding_up_to=100 * 6)
    monkeypatch.setattr(backend, "triton_is_there", lambda: True)
    monkeypatch.setattr(backend.native_embedding, "fits", lambda table: True)
    monkeypatch.setattr(backend, "_WITH_MEMORY", (SimpleNamespace,))  # which stands for tensors

    class EmbeddingOperands(SimpleNamespace):
        def __iter__(self):
            return iter(())

    def choose(tokens, elements):
        weight = SimpleNamespace(is_cuda=True, device=GPU)
        return backend.choose_embedding(
            EmbeddingOperands(weight=weight, lora_b=SimpleNamespace(numel=lambda: elements)), tokens
        )

    assert (choose(100, 6), choose(101, 1), choose(100, 7)) == ("native", "triton", "triton")


def test_the_tile_of_the_nearest_shape(lora_fused, config, monkeypatch):
    pytest.importorskip("triton")
    linear_expand = importlib.import_module(f"{lora_fused.__name__}.backends.triton.linear_expand")
    monkeypatch.setattr(linear_expand, "shared_memory", lambda device: 227 * 1024)
    linear_expand._half_tile.cache_clear()
    ruled = {m: linear_expand._half_tile(GPU, m, 4096, 4096, False) for m in (512, 1024)}
    assert (ruled[512], ruled[1024]) == (linear_expand._HALF_NARROW, linear_expand._HALF_LARGE)
    write(
        config, linear_expand_tiles=[{"shape": t["shape"], "tile": o["tile"]} for t, o in zip(TILED, reversed(TILED))]
    )
    config._read_once.cache_clear()
    linear_expand._half_tile.cache_clear()
    chosen = [linear_expand._half_tile(GPU, linear_expand._bucket(m), 8192, 2048, False) for m in (1, 600, 4000, 9000)]
    assert chosen == [LARGE, LARGE, NARROW, NARROW]
    assert linear_expand._half_tile(GPU, 8192, 4096, 4096, True) == linear_expand._HALF_MASKED
    linear_expand._half_tile.cache_clear()


def test_limits_cost_least():
    one = [Case((size,), 100.0, us) for size, us in ((1, 300.0), (2, 90.0), (4, 150.0), (8, 90.0), (16, 60.0))]
    assert pick_limits(one, reaches_all) == [8]
    assert pick_limits(one[:1], reaches_all) == [None]
    assert pick_limits(one[3:], reaches_all) == [8]
    equal = [Case((2,), 100.0, 100.0), Case((4,), 100.0, 50.0)]
    assert pick_limits(equal[:1], reaches_all) == [None] and pick_limits(equal, reaches_all) == [4]
    assert pick_limits([*one, Case((32,), 100.0, math.inf)], reaches_all) == [None]
    two = [Case((r, r * n), 100.0, 50.0 if r >= 4 and n >= 20 else 130.0) for r in (2, 4, 8) for n in (10, 20, 40)]
    assert pick_limits(two, reaches_all) == [4, 80]
    two = [Case((m, m * h), 100.0, 50.0 if m > 8 else 130.0) for m in (4, 8, 16) for h in (1, 4)]
    assert pick_limits(two, passes_any) == [8, None]
    assert pick_limits([case._replace(triton=50.0) for case in two], passes_any) == [None, 0]


def test_measurements_become_a_file_that_loads(config):
    cases = {name: [Case((2**30,) * len(op.limits), 100.0, 50.0)] for name, op in tune.OPS.items()} | {"row_norm": []}
    tiles = {(512, 64, 64): {LARGE: 9.0, NARROW: 7.0}, (8192, 64, 64): {}}
    write(config, **tune.configuration(cases, tiles, tiles))
    found = config.of(GPU)
    assert found.linear_expand_from == 2**30
    assert found.row_norm_from_rank == found.row_norm_from == math.inf
    assert found.linear_expand_tiles == (((512, 64, 64), NARROW),)
    assert found.experts_tiles == (((512, 64, 64), NARROW), ((8192, 64, 64), None))


def test_a_wrong_result_is_never_chosen(lora_fused, monkeypatch):
    """The linear's measurement with its clocks stopped, on small shapes; then with a delta lost on Triton."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the interpreter's part: a GPU runs tune itself")
    monkeypatch.setattr(tune, "LINEARS", ((16, 32, 48),))
    monkeypatch.setattr(tune, "CACHE", 0)
    monkeypatch.setattr(tune, "microseconds", lambda run, inputs: 5.0)
    monkeypatch.setattr(tune, "host_microseconds", lambda run: 6.0)
    monkeypatch.setattr(lora_fused.backends.select, "is_hopper", lambda device: True)
    cpu = torch.device("cpu")
    assert list(tune.linear_cases(lora_fused, cpu)) == [Case((16 * 32 * 48,), 6.0, 6.0)]

    def lossy(x, w, a, b, scaling, backend):
        return lora_fused.lora_linear(x, w, a, b, 0.0 if backend == "triton" else scaling, backend=backend)

    broken = SimpleNamespace(backends=SimpleNamespace(select=lora_fused.backends.select), lora_linear=lossy)
    assert list(tune.linear_cases(broken, cpu)) == [Case((16 * 32 * 48,), 6.0, math.inf)]


def test_tiles_of_experts(lora_fused, monkeypatch, capsys):
    """Measured with a clock that knows the tile: what is right and fastest; none where torch's products are ahead, and
    never what computes something else."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the interpreter's part: a GPU runs tune itself")
    shape = tune_experts.Shape("small", 16, 16, 2, 1, True, tokens=(6,))
    monkeypatch.setattr(tune_experts, "SHAPES", (shape,))
    monkeypatch.setattr(tune_experts, "TILES", ((16, 32, 16, 4, 2), (32, 32, 16, 4, 2)))
    monkeypatch.setattr(tune_experts, "bfloat16", torch.float32)  # the interpreter's bfloat16 dot is wrong
    experts = importlib.import_module(f"{lora_fused.__name__}.backends.triton.experts")

    def measured(torch_us, broken=None):
        def clock(run, inputs, repeats):
            select = lora_fused.backends.select
            if select.choose_experts(*inputs[0][3:5], 6) == select.GROUPED:
                return torch_us
            return 10.0 - experts.choose_tile(inputs[0].up.weight, 1).m / 16

        own = experts.TritonProducts.project
        if broken is not None:
            monkeypatch.setattr(
                experts.TritonProducts,
                "project",
                lambda self, x, weights, factors: own(
                    self, x, weights._replace(bias=None) if self.tile.m == broken else weights, factors
                ),
            )
        monkeypatch.setattr(tune_experts, "microseconds", clock)
        found = tune_experts.as_entries(tune_experts.tile_times(lora_fused, torch.device("cpu")))
        monkeypatch.setattr(experts.TritonProducts, "project", own)
        return [(tuple(each["shape"]), each["tile"] and tuple(each["tile"])) for each in found]

    assert measured(20.0) == [((3, 32, 16), (32, 32, 16, 4, 2))]
    assert measured(7.0) == [((3, 32, 16), None)]
    assert measured(20.0, broken=32) == [((3, 32, 16), (16, 32, 16, 4, 2))]
    assert "small 6, us: torch 20" in capsys.readouterr().out


def test_processes_compile_all_that_is_measured(lora_fused, monkeypatch):
    """Each case once: a shape's tokens, a tile, where t is made."""
    pytest.importorskip("triton")
    linear, experts = (
        importlib.import_module(f"{lora_fused.__name__}.backends.triton.{name}")
        for name in ("grouped_linear", "experts")
    )
    own, seen = linear.FUSED_RANK_UP_TO, []
    monkeypatch.setattr(tune_experts, "SHAPES", (tune_experts.Shape("small", 16, 16, 2, 1, tokens=(6, 7)),))
    monkeypatch.setattr(tune_experts, "TILES", ((16, 32, 16, 4, 2), (32, 32, 16, 4, 2), (16, 16, 16, 4, 2)))
    monkeypatch.setattr(
        tune_experts,
        "step",
        lambda kernels, each: seen.append(
            (len(each.x), experts.choose_tile(each.up.weight, 1), linear.FUSED_RANK_UP_TO)
        ),
    )
    for number in range(4):
        tune_experts.compile_share(lora_fused, torch.device("cpu"), number, 4)
    assert len(seen) == len(set(seen)) == 2 * 3 * 2 and linear.FUSED_RANK_UP_TO == own


def test_agreement_sees_what_is_left_out():
    expected = [torch.ones(4), torch.tensor([1.0, -2.0])]
    assert tune.agrees(lambda: [tensor * (1 + 2.0**-8) for tensor in expected], expected)
    assert not tune.agrees(lambda: [expected[0], torch.tensor([1.0, math.nan])], expected)
    assert not tune.agrees(lambda: [expected[0], torch.tensor([1.1, -2.0])], expected)


def test_tuning_needs_a_gpu(lora_fused):
    with pytest.raises(SystemExit, match="a CUDA GPU is required"):
        tune.measure(lora_fused, torch.device("cpu"))
