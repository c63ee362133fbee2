"""How the result of `explain` is shown: summary, folded rows, suggestions, filters, JSON, HTML."""

import ast
import html.parser
import json
import re

import pytest
import torch
from conftest import ROOT
from helpers.cases import peft_llama, tiny_llama
from helpers.heads import heads
from helpers.kernelizing import explain
from helpers.llamas import evaluated as evaluate, passed, tokens
from helpers.mlps import LigerSwiGLUMLP
from peft import LoHaConfig, LoraConfig, get_peft_model

pytestmark = pytest.mark.usefixtures("on_device")
PACKAGE = ROOT / "torch-ext" / "lora_fused"


@pytest.fixture
def deep(lora_fused):
    """300 LoRA modules: 42 layers of seven linears, and six more that are alone."""
    model = lora_fused.apply(peft_llama(shape=dict(num_hidden_layers=42)))
    layers = model.base_model.model.model.layers
    layers[3].self_attn.q_proj.lora_A.default.register_forward_hook(lambda *_: None)
    layers[5].mlp.up_proj.base_layer.register_forward_hook(lambda *_: None)
    layers[6].mlp.up_proj.base_layer.register_forward_hook(lambda *_: None)
    return model


def lines_of(text, start):
    return [line for line in text.splitlines() if line.startswith(start)]


def test_many_modules_on_one_screen(lora_fused, deep):
    for _ in range(2):
        passed(deep, tokens())
    rows = explain(lora_fused, deep)
    text = str(rows)
    assert len(rows) == 294 and text == repr(rows)
    assert len(text.splitlines()) <= 24 and max(map(len, text.splitlines())) <= 200
    assert text.splitlines()[0] == "291 of 294 LoRA modules fused, 98.9% of the adapter parameters (native 291)"
    assert (
        "3 x base_layer has hooks" not in text and "2 x base_layer has hooks" in text and "1 x lora_A has hooks" in text
    )
    (line,) = lines_of(text, "layers.0-2,4-41.self_attn.q_proj")
    assert line.split()[1:6] == ["41", "LoraLinear,", "fused", "native", "q_proj+k_proj+v_proj"]
    (line,) = lines_of(text, "layers.3.self_attn.q_proj")
    assert line.split()[1:] == ["1", *"PEFT's own forward - - lora_A has hooks".split()]
    (line,) = lines_of(text, "layers.0-4,7-41.mlp.down_proj")
    assert line.split()[1:] == ["40", "LoraGatedMLP,", "fused", "native", "mlp"]
    assert "gated MLPs that are one Function: 40" in text and "    2 not: up_proj: base_layer has hooks" in text


def test_every_module_is_in_the_table(lora_fused, deep):
    """The folded names stand for all modules, each once."""
    rows, folding = explain(lora_fused, deep), lora_fused.explanation.folding
    patterns = [line[0] for line in rows._folded()]
    found = [name for pattern in patterns for name in unfolded(pattern)]
    assert len(found) == len(set(found)) == 294
    assert set(found) == set(folding.without_prefix([row.module for row in rows]))


def unfolded(pattern):
    names = [""]
    for part in pattern.split("."):
        if re.fullmatch(r"[\d,-]+", part):
            bounds = [run.split("-") for run in part.split(",")]
            choices = [str(n) for run in bounds for n in range(int(run[0]), int(run[-1]) + 1)]
        else:
            choices = [part]
        names = [f"{name}.{choice}".lstrip(".") for name in names for choice in choices]
    return names


FOLDED = {
    "one": (["a.0.b"], ["a.0.b"]),
    "a range": ([f"a.{i}.b" for i in (0, 1, 2, 5, 7, 8)], ["a.0-2,5,7-8.b"]),
    "two numbers": ([f"a.{i}.e.{j}" for i in range(3) for j in range(2)], ["a.0-2.e.0-1"]),
    "two numbers, one left out": (
        [f"a.{i}.e.{j}" for i in range(3) for j in range(2) if (i, j) != (1, 1)],
        ["a.0-2.e.0", "a.0,2.e.1"],
    ),
    "lengths": (["0", "a.0", "a.1", "a.1.0"], ["0", "a.0-1", "a.1.0"]),
    "none": ([], []),
}


@pytest.mark.parametrize("names,expected", FOLDED.values(), ids=FOLDED)
def test_fold(lora_fused, names, expected):
    found = lora_fused.explanation.folding.fold(names)
    assert sorted(found) == sorted(expected)
    assert sorted(name for pattern in found for name in unfolded(pattern)) == sorted(names)


PREFIXES = {
    "layers": (["m.model.layers.0.q", "m.model.layers.1.q"], ["layers.0.q", "layers.1.q"]),
    "with a head": (["m.model.layers.0.q", "m.lm_head"], ["model.layers.0.q", "lm_head"]),
    "one": (["m.model.q_proj"], ["q_proj"]),
    "a number first": (["0", "1"], ["0", "1"]),
    "the root": ([""], [""]),
    "none": ([], []),
}


@pytest.mark.parametrize("names,expected", PREFIXES.values(), ids=PREFIXES)
def test_prefix(lora_fused, names, expected):
    assert lora_fused.explanation.folding.without_prefix(names) == expected


def test_shares_by_modules_and_by_parameters(lora_fused):
    """The adapters of the MLP are the larger ones."""
    model = lora_fused.apply(peft_llama(shape=dict(num_hidden_layers=1)))
    model.base_model.model.model.layers[0].mlp.down_proj.lora_A.default.register_forward_hook(lambda *_: None)
    rows = explain(lora_fused, model)
    sizes = {row.module.rpartition(".")[2]: row.parameters for row in rows}
    assert sizes["down_proj"] == 4 * (96 + 64) and sizes["q_proj"] == 4 * (64 + 64)
    total = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    assert sum(sizes.values()) == total
    found = rows.to_dict()
    assert (found["modules"], found["fused"]) == (7, 6)
    assert (found["parameters"], found["fused_parameters"]) == (total, total - sizes["down_proj"])
    assert str(rows).startswith(
        f"6 of 7 LoRA modules fused, {1 - sizes['down_proj'] / total:.1%} of the adapter parameters"
    )


def test_parameters_of_all_that_an_adapter_holds(lora_fused):
    model = peft_llama(use_dora=True, target_modules=["q_proj", "embed_tokens"], shape=dict(num_hidden_layers=1))
    total = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    assert sum(row.parameters for row in explain(lora_fused, model)) == total > 0


def test_dict_is_json(lora_fused, deep):
    rows = explain(lora_fused, deep)
    found = json.loads(json.dumps(rows.to_dict()))
    assert found["modules"] == len(found["rows"]) == 294 and found["fused"] == sum(r["fused"] for r in found["rows"])
    assert found["backends"] == {"native": 291} and found["gated_mlps"] == 40
    assert found["other_mlps"] == [{"reason": "up_proj: base_layer has hooks", "mlps": 2}]
    assert [(r["reason"], r["modules"]) for r in found["reasons"]] == [
        ("base_layer has hooks", 2),
        ("lora_A has hooks", 1),
    ]
    assert all(r["suggestion"].startswith("remove the hooks") for r in found["reasons"])
    fields = {
        "module",
        "layer",
        "fused",
        "backend",
        "group",
        "reason",
        "mlp",
        "last",
        "parameters",
        "calls",
        "suggestion",
    }
    assert all(row.keys() == fields for row in found["rows"])


class Table(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.cells = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, data):
        if self.tags and self.tags[-1] in ("td", "th"):
            self.cells[-1] += data


def test_html(lora_fused, deep):
    model = deep
    q_proj = model.base_model.model.model.layers[0].self_attn.q_proj
    del q_proj.forward
    q_proj.forward = type("<b>", (), {"__call__": lambda self, x: x, "__module__": "a&b"})()
    rows = explain(lora_fused, model)
    text, parsed = rows._repr_html_(), Table()
    parsed.feed(text)
    assert "<b>" not in text.replace("&lt;b&gt;", "") and any("a&b.<b>" in cell for cell in parsed.cells)
    lines = [list(line) for line in rows._folded()]
    assert parsed.cells == [
        *"module modules runs backend group reason".split(),
        *(cell for line in lines for cell in line),
    ]
    assert parsed.tags.count("tr") == len(lines) + 1 > 8


def test_filters(lora_fused, deep):
    rows = explain(lora_fused, deep)
    assert len(rows.filter("*.self_attn.*")) == 42 * 4
    assert len(rows.filter("*.layers.3.*")) == 7
    assert [row.module.rpartition("layers.")[2] for row in rows.filter(fused=False)] == [
        "3.self_attn.q_proj",
        "5.mlp.up_proj",
        "6.mlp.up_proj",
    ]
    assert len(rows.filter(fused=True)) == 291 == len(rows.filter(backend="native"))
    assert len(rows.filter(backend="triton")) == 0
    assert len(rows.filter(reason="base_layer has hooks")) == 6  # with the other projections of their MLPs
    assert len(rows.filter("*up_proj", reason="hooks", fused=False)) == 2
    assert isinstance(rows.filter(), lora_fused.Explanation) and list(rows.filter()) == list(rows)
    assert str(rows.filter("*.layers.3.self_attn.q_proj")).startswith("0 of 1 LoRA modules fused, 0.0%")


def test_an_empty_result_prints(lora_fused):
    with pytest.warns(UserWarning, match="no PEFT LoRA modules"):
        rows = lora_fused.explain(tiny_llama())
    assert str(rows) == rows.headline() == "no LoRA modules" and rows.to_dict()["rows"] == []
    assert rows._repr_html_().count("<tr>") == 1


def test_groups_are_not_guessed_before_the_first_pass(lora_fused):
    """What is certain is said: a gated MLP, and that deterministic algorithms know no groups."""
    model = lora_fused.apply(peft_llama())
    groups = {row.module.rpartition(".")[2]: row.group for row in explain(lora_fused, model)}
    assert {groups[f"{p}_proj"] for p in "qkvo"} == {"after the first pass"}
    assert groups["up_proj"] == "base_model.model.model.layers.1.mlp"
    torch.use_deterministic_algorithms(True)
    try:
        groups = {row.module.rpartition(".")[2]: row.group for row in explain(lora_fused, model)}
    finally:
        torch.use_deterministic_algorithms(False)
    assert {groups[f"{p}_proj"] for p in "qkvo"} == {"single"}
    evaluate(model)
    evaluate(model)
    groups = {row.module.rpartition(".")[2]: row.group for row in explain(lora_fused, model)}
    assert [groups[f"{p}_proj"] for p in "qkvo"] == ["q_proj+k_proj+v_proj"] * 3 + ["single"]


def test_mlps_that_are_not_one_function_are_in_the_summary(lora_fused):
    base = tiny_llama()
    base.model.layers[0].mlp = LigerSwiGLUMLP(base.model.layers[0].mlp)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    rows = explain(lora_fused, lora_fused.apply(model))
    found = rows.to_dict()
    assert found["gated_mlps"] == 1 and [each["mlps"] for each in found["other_mlps"]] == [1]
    assert f"    1 not: {found['other_mlps'][0]['reason']}" in str(rows).splitlines()


# ---- suggestions ----


def literals():
    """Every string of the package, with an x in place of what is formatted into it."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        if path.name == "suggestions.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.add("".join(part.value if isinstance(part, ast.Constant) else "x" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


def test_every_suggestion_fits_a_reason(lora_fused):
    texts, suggestions = literals(), lora_fused.explanation.suggestions.SUGGESTIONS
    assert len(texts) > 300
    unused = {pattern for pattern, _ in suggestions if not any(re.search(pattern, text) for text in texts)}
    assert not unused


REASONS = {
    "adapters are disabled": "model.enable_adapter_layers()",
    "the adapter is merged into the base weight": "model.unmerge_adapter()",
    "several active adapters (a, b)": "model.set_adapter(name)",
    "weight of MixtralTopKRouter is no weight of experts: shape (4, 32)": "nothing to do",
    "Llama4TextExperts has no forward of transformers' use_experts_implementation": "set_experts_implementation",
    "no fused layer for peft.tuners.lora.layer.Conv2d": "docs/support.md",
    "not kernelized: no forward of this kernel is bound": "lora_fused.apply(model)",
    "another tool set its forward: accelerate.hooks.f": "before the tool",
    "lora_A has a forward of its own, set by another tool": "leave out the tool",
    "base_layer has hooks (its weights are sharded, DTensors)": "nothing to do",
    "weight has a forward of its own, set by another tool (its weights are sharded, DTensors)": "nothing to do",
    "the embedding is sharded by tensor parallelism": "nothing to do",
    "lora_a is on meta, the base weight on cpu": "model.to(device)",
    "base layer's own forward: FP8Linear": "the delta is fused",
    "GPU of compute capability 7.5: bfloat16 is computed from 8.0 on": "float16",
    "torch.compile: its graph has PEFT's own forward of experts": "torch.compiler.disable",
}


@pytest.mark.parametrize("reason,words", REASONS.items(), ids=str)
def test_suggestions(lora_fused, reason, words):
    assert words in lora_fused.Row("q", "Linear", False, reason=reason).suggestion


def test_no_suggestion_where_there_is_nothing_to_do(lora_fused):
    assert lora_fused.Row("q", "LoraLinear", True).suggestion is None
    assert lora_fused.Row("q", "LoraLinear", False, reason="x is nested").suggestion is None


def test_what_a_suggestion_names_helps(lora_fused):
    """The calls that are proposed are there, and the module is fused after them."""
    model = lora_fused.apply(peft_llama())
    model.merge_adapter()
    assert {row.suggestion for row in explain(lora_fused, model)} == {"model.unmerge_adapter()"}
    model.unmerge_adapter()
    model.base_model.disable_adapter_layers()
    assert {row.reason for row in explain(lora_fused, model)} == {"adapters are disabled"}
    model.base_model.enable_adapter_layers()
    lora_fused.restore(model)
    assert {row.suggestion for row in explain(lora_fused, model)} == {"run lora_fused.apply(model)"}
    assert all(row.fused for row in explain(lora_fused, lora_fused.apply(model)))


@pytest.mark.parametrize(
    "options,error,message",
    (
        (dict(model=3), TypeError, "model: int, expected a torch.nn.Module"),
        (dict(rows=1.5), TypeError, "rows: 1.5, expected an int"),
        (dict(rows=-1), ValueError, "rows: -1, expected at least 0"),
        (dict(rows=2**63), ValueError, "rows: 9223372036854775808, expected at least 0 and less than"),
        (dict(calls={}), TypeError, "calls: dict, expected what `with lora_fused.record\\(\\) as calls` gives"),
    ),
)
def test_bad_input(lora_fused, options, error, message):
    with pytest.raises(error, match=message):
        lora_fused.explain(**{"model": peft_llama(), **options})


def test_a_part_of_the_rows(lora_fused):
    rows = explain(lora_fused, lora_fused.apply(peft_llama()))
    assert type(rows[7:]) is type(rows) and list(rows[7:]) == list(rows)[7:] and isinstance(rows[3], lora_fused.Row)
    assert str(rows[7:]).startswith("7 of 7 LoRA modules fused")


def test_one_module_by_itself(lora_fused):
    layer = lora_fused.apply(heads()).base_model.model.q
    assert [line.split()[0] for line in str(explain(lora_fused, layer)).splitlines()[2:]] == ["module", "(itself)"]


def test_another_tuner_around_the_modules(lora_fused):
    """Which are its base layers then, or have it as theirs."""
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"]), mixed=True)
    model.add_adapter("other", LoHaConfig(r=4, target_modules=["q_proj", "k_proj", "o_proj"]))
    model.set_adapter(["default", "other"])
    lora_fused.apply(model)
    evaluate(model)
    evaluate(model)
    rows = {row.module.partition("self_attn.")[2]: row for row in explain(lora_fused, model)}
    assert set(rows) == {"q_proj.base_layer", "k_proj.base_layer", "v_proj"}
    assert {row.group for row in rows.values()} == {"q_proj.base_layer+k_proj.base_layer+v_proj"}
    model = get_peft_model(tiny_llama(), LoHaConfig(r=4, target_modules=["q_proj"]), mixed=True)
    model.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj"]))
    model.set_adapter(["default", "other"])
    reasons = {row.reason for row in explain(lora_fused, lora_fused.apply(model))}
    assert reasons == {"unknown base layer Linear of peft.tuners.loha.layer"}
