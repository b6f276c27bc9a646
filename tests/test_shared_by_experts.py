"""Dictionaries that the experts of a layer share: which layers do, what they minimise, and what is written of them."""

import json

import pytest
import torch
from exported import python
from families import save_tiny
from problems import inputs, statistics, weight
from safetensors.torch import load_file
from workspaces import recipe

import compress
from calibration.statistics.collection import Pooled
from calibration.walk import SharedInput
from compress.errors import LayerError, RecipeError
from compress.exports.verification.probe import read_probe
from compress.exports.verification.verify import check
from compress.families.base import LayerShape, Survey
from compress.methods.cospadi import method as cospadi
from compress.methods.cospadi.method import CoSpaDi
from compress.methods.eora import EoRA
from compress.planning.groups import groups_of, inputs_in_turn
from compress.planning.layer import PlannedLayer
from compress.solvers.sparse_coding import Coded

QUICK = {"rounds": 2, "keep": 0.85}
MLP = "model.layers.{}.mlp"
SHAPES = {"gate_proj": (48, 32), "up_proj": (48, 32), "down_proj": (32, 48)}


def expert(number, projection, block=0):
    return f"{MLP.format(block)}.experts.{number}.{projection}"


def model(n_experts=3, n_blocks=2, shapes=SHAPES):
    """Layers of a mixture as a plan knows them: each expert's gate and up read one tensor."""
    layers = {}
    for block in range(n_blocks):
        attention = f"model.layers.{block}.self_attn"
        for leaf, o in {"q_proj": 32, "k_proj": 16}.items():
            reads = f"{attention}.q_proj"
            layers[f"{attention}.{leaf}"] = LayerShape((o, 32), o * 128, survey=Survey(reads=reads))
        for number in range(n_experts):
            for leaf, (o, i) in shapes.items():
                reads = expert(number, "gate_proj" if leaf != "down_proj" else leaf, block)
                found = LayerShape((o, i), o * i * 4, survey=Survey(reads=reads))
                layers[expert(number, leaf, block)] = found
    return layers


def test_each_layer_of_experts_has_one_dictionary_for_what_they_read_and_one_for_what_they_write():
    layers = model()
    owners = CoSpaDi(share="experts").owners(layers)
    for block in range(2):
        for leaf, owner in {
            "gate_proj": "gate_proj",
            "up_proj": "gate_proj",
            "down_proj": "down_proj",
        }.items():
            found = {owners.get(expert(number, leaf, block), "itself") for number in (1, 2)}
            assert found == {expert(0, owner, block)}
        assert expert(0, "gate_proj", block) not in owners
        assert expert(0, "down_proj", block) not in owners


def test_layers_that_are_no_experts_have_the_dictionaries_that_they_have_by_default():
    layers = {name: each for name, each in model().items() if "self_attn" in name}
    mixed = CoSpaDi(share="experts")
    assert {k: v for k, v in mixed.owners(model()).items() if k in layers} == CoSpaDi().owners(
        layers
    )
    plan, default = mixed.plan(model()), CoSpaDi().plan(layers)
    assert [plan[n].planned_bytes(s.shape) for n, s in layers.items()] == [
        default[n].planned_bytes(s.shape) for n, s in layers.items()
    ]


@pytest.mark.parametrize("inner", [12, 32, 96])
def test_what_has_codes_are_the_neurons_of_each_expert_however_many_there_are(inner):
    shapes = {"gate_proj": (inner, 32), "up_proj": (inner, 32), "down_proj": (32, inner)}
    layers = {n: each for n, each in model(shapes=shapes).items() if ".experts." in n}
    plan = CoSpaDi(share="experts", keep=0.9).plan(layers)
    sides = {name.rpartition(".")[2]: each.coded for name, each in plan.items()}
    assert sides == {
        "gate_proj": Coded.OUTPUTS,
        "up_proj": Coded.OUTPUTS,
        "down_proj": Coded.INPUTS,
    }


@pytest.mark.parametrize(("coded", "n_owners"), [("outputs", 2), ("inputs", 3)])
def test_a_dictionary_of_outputs_is_of_one_projection(coded, n_owners):
    layers = {n: each for n, each in model(n_blocks=1).items() if ".experts." in n}
    owners = CoSpaDi(share="experts", coded=coded).owners(layers)
    assert len(set(layers) - set(owners)) == n_owners
    assert len(set(owners.values())) == n_owners


def test_an_expert_that_is_left_out_leaves_the_others_together():
    layers = {n: each for n, each in model(n_blocks=1).items() if ".experts.0." not in n}
    owners = CoSpaDi(share="experts").owners(layers)
    assert owners[expert(2, "up_proj")] == expert(1, "gate_proj")
    assert owners[expert(2, "down_proj")] == expert(1, "down_proj")


def test_sharing_among_experts_is_refused_without_any():
    layers = {name: each for name, each in model().items() if "self_attn" in name}
    with pytest.raises(RecipeError, match=r"share: none of the chosen layers .* --share inputs"):
        CoSpaDi(share="experts").plan(layers)


def test_errors_of_several_inputs_are_not_measured_for_a_plan():
    with pytest.raises(RecipeError, match=r"allocation: .*uniform with --share experts"):
        CoSpaDi(share="experts", allocation="errors")


def relative_errors(weights, codes, dictionary, grams, side):
    """The sum over weights of ||(W - W') X||^2 / ||W X||^2."""
    found = 0
    for w, z, gram in zip(weights, codes, grams, strict=True):
        lost = w - (z @ dictionary if side == "outputs" else dictionary @ z)
        found = found + (lost @ gram @ lost.T).trace() / (w @ gram @ w.T).trace()
    return found


@pytest.mark.parametrize("side", ["outputs", "inputs"])
def test_the_dictionary_has_the_least_sum_of_relative_errors_each_under_its_own_tokens(side):
    shape = SHAPES["gate_proj" if side == "outputs" else "down_proj"]
    weights = [(number + 1) * weight(*shape, seed=number) for number in range(3)]
    tokens = [(5 - number) * inputs(shape[1], 400 * (number + 1), number) for number in range(3)]
    pooled = Pooled([(1, statistics(x)) for x in tokens])
    method = CoSpaDi(
        share="experts", coded=side, atoms=20, damping=0, dictionary_dtype="float32", code_bits="32"
    )
    forms = method.compress(weights, pooled)
    stored = [form.down if side == "outputs" else form.up for form in forms]
    assert all(torch.equal(each.dense(), stored[0].dense()) for each in stored)
    codes = [(form.up if side == "outputs" else form.down).dense().double() for form in forms]
    grams = [x.double().T @ x.double() / len(x) for x in tokens]
    weights = [w.double() for w in weights]
    best = stored[0].dense().double().requires_grad_()
    least = relative_errors(weights, codes, best, grams, side)
    [slope] = torch.autograd.grad(least, best)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        way = torch.randn(best.shape, generator=generator, dtype=torch.float64)
        way *= 0.01 * best.detach().norm() / way.norm()
        other = relative_errors(weights, codes, best.detach() + way, grams, side)
        assert other > least
        assert abs(float((slope * way).sum())) < 1e-2 * float((other - least).detach())


def planned(*owned):
    """Planned layers by name, of pairs of a layer and the one that stores what it shares."""
    method = CoSpaDi(share="experts", atoms=8)
    return {
        name: PlannedLayer(
            name, name, (48, 32), 1, 1, method.reader() if owner else method, owner=owner
        )
        for name, owner in owned
    }


def read(*names):
    x = torch.randn(8, 32)
    return SharedInput(names, statistics(x))


def test_inputs_wait_for_all_that_share_with_their_layers_and_others_do_not():
    waiting = planned(("a0", ""), ("b0", ""), ("a1", "a0"), ("b1", "b0"), ("a2", "a0"), ("o", ""))
    # b2 is left out: a0 and b0 are stored with other layers, and 0, 1 and 2 still belong together.
    found = [read("a2"), read("o"), read("a1", "b1"), read("a0", "b0")]
    turns = [[shared.names[0] for shared in each] for each in inputs_in_turn(found, waiting)]
    assert turns[0] == ["o"]
    assert [sorted(each) for each in turns[1:]] == [["a0", "a1", "a2"]]


def test_inputs_that_wait_for_one_that_never_comes_are_released_at_the_end():
    waiting = planned(("a0", ""), ("a1", "a0"), ("o", ""))
    turns = [[s.names for s in each] for each in inputs_in_turn([read("a0"), read("o")], waiting)]
    assert turns == [[("o",)], [("a0",)]]


def test_groups_with_the_same_plan_that_share_different_things_stay_apart():
    waiting = planned(("a0", ""), ("b0", ""), ("a1", "a0"), ("b1", "b0"))
    groups = groups_of([read("a1", "b1"), read("a0", "b0")], waiting, {})
    found = [[layer.name for layer in group.layers] for group in groups]
    assert found == [["a0", "a1"], ["b0", "b1"]]


def test_layers_of_the_owners_input_stay_beside_it():
    waiting = planned(("0.gate", ""), ("0.up", "0.gate"), ("1.gate", "0.gate"), ("1.up", "0.gate"))
    [group] = groups_of([read("1.gate", "1.up"), read("0.gate", "0.up")], waiting, {})
    assert [layer.name for layer in group.layers] == ["0.gate", "0.up", "1.gate", "1.up"]
    parts = [list(part) for part, _ in group.stats.by_input([each.name for each in group.layers])]
    assert parts == [["0.gate", "0.up"], ["1.gate", "1.up"]]


@pytest.fixture(params=["mixtral", "gpt_oss"])
def mixture(request, workspace):
    """A workspace with a mixture."""
    save_tiny(workspace / "moe", request.param)
    return workspace


def job(workspace, **changes):
    options = {"model": str(workspace / "moe"), "method": CoSpaDi(**QUICK, share="experts")}
    return recipe(workspace, **{**options, **changes})


def dictionaries_of(folder):
    """The layers of experts that store a dictionary of their own or for others."""
    names = [name for file in folder.glob("model*.safetensors") for name in load_file(file)]
    parts = (".form.down.form", ".form.up.form")
    return {
        name.partition(".form.")[0]
        for name in names
        if ".experts." in name and any(part in name for part in parts)
    }


@pytest.mark.usefixtures("quick_verification")
def test_the_file_holds_the_planned_bytes_and_one_dictionary_for_a_projection_of_all_experts(
    mixture,
):
    asked = job(mixture)
    plan, report = compress.plan(asked).plan, compress.run(asked)
    assert plan.bytes_after == report.totals.tensor_bytes_after
    assert {layer.name: layer.bytes_after for layer in report.layers} == {
        layer.name: layer.bytes_after for layer in plan.layers
    }
    assert check(asked.folder, "cpu").passed
    dictionaries = dictionaries_of(asked.folder)
    expected = {expert(0, leaf, block) for leaf in ("gate_proj", "down_proj") for block in range(3)}
    assert dictionaries == expected
    owners = {layer.stored_with for layer in report.layers if ".experts." in layer.name}
    assert owners == expected | {None}


@pytest.mark.slow
@pytest.mark.as_run
def test_a_process_without_the_toolkit_predicts_what_the_run_did(mixture):
    asked = job(mixture)
    compress.run(asked)
    probe, _ = read_probe(asked.folder)
    torch.save((probe.input_ids, probe.positions), mixture / "probe.pt")
    ran = python(
        "import torch\nfrom transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32)\n"
        "ids, positions = torch.load(sys.argv[2])\n"
        "with torch.no_grad():\n    print(model(ids).logits[0][positions].flatten().tolist())\n",
        asked.folder,
        mixture / "probe.pt",
        hide_toolkit=True,
        cwd=mixture,
    )
    assert ran.code == 0, ran.err
    found = torch.tensor(json.loads(ran.out)).view_as(probe.logits)
    torch.testing.assert_close(found, probe.logits, atol=1e-4, rtol=1e-4)


VARIANTS = {
    "corrected": {"method": EoRA(rank=2, base=CoSpaDi(**QUICK, share="experts"))},
    "layer by layer": {"propagate": "sublayer"},
    "without one": {"exclude": ("experts.0", "experts.2.up_proj")},
    "in 8 bits": {
        "method": CoSpaDi(**QUICK, share="experts", code_bits="8", dictionary_dtype="int8")
    },
}


@pytest.mark.usefixtures("quick_verification")
@pytest.mark.parametrize("variant", VARIANTS)
def test_bytes_are_the_planned_ones_whatever_the_run(workspace, variant):
    save_tiny(workspace / "moe", "mixtral")
    asked = job(workspace, **VARIANTS[variant])
    plan, report = compress.plan(asked).plan, compress.run(asked)
    assert plan.bytes_after == report.totals.tensor_bytes_after
    assert all(layer.relative_error < 1 for layer in report.layers)
    assert check(asked.folder, "cpu").passed


@pytest.mark.usefixtures("quick_verification")
def test_an_expert_without_tokens_shares_too(workspace):
    save_tiny(workspace / "moe", "mixtral", num_experts_per_tok=1, num_local_experts=12)
    report = compress.run(job(workspace, samples=1, seq_len=4))
    unseen = [layer for layer in report.layers if layer.tokens == 0]
    assert unseen
    assert all(layer.failure is None and layer.relative_error < 1 for layer in report.layers)
    assert len({layer.name for layer in report.layers if ".experts." in layer.name}) == 3 * 36


@pytest.mark.usefixtures("quick_verification")
@pytest.mark.parametrize("number", [0, 2])
def test_an_expert_that_fails_is_left_and_the_others_still_share(workspace, monkeypatch, number):
    save_tiny(workspace / "moe", "mixtral")
    tensors = load_file(workspace / "moe" / "model.safetensors")
    of_expert = [
        t for name, t in tensors.items() if f"layers.1.block_sparse_moe.experts.{number}." in name
    ]
    bad = [tensor for tensor in of_expert if tensor.shape == (64, 32)]
    assert len(bad) == 2
    real = cospadi.stacked

    def failing(weights, *rest):
        if any(w.shape == each.shape and torch.equal(w, each) for w in weights for each in bad):
            raise LayerError("its inputs say nothing")
        return real(weights, *rest)

    monkeypatch.setattr(cospadi, "stacked", failing)
    asked = job(workspace, on_failure="keep")
    report = compress.run(asked)
    failed = {layer.name for layer in report.layers if layer.failure}
    assert failed == {expert(number, leaf, 1) for leaf in ("gate_proj", "up_proj")}
    owner = expert(1 if number == 0 else 0, "gate_proj", 1)
    shared = {
        layer.stored_with or layer.name
        for layer in report.layers
        if "layers.1.mlp.experts" in layer.name and "down" not in layer.name
    }
    assert shared - failed == {owner}
    assert {name for name in dictionaries_of(asked.folder) if "layers.1" in name} == {
        owner,
        expert(0, "down_proj", 1),
    }
    assert check(asked.folder, "cpu").passed


def test_a_dense_model_is_told_to_share_by_inputs(workspace):
    asked = recipe(workspace, method=CoSpaDi(**QUICK, share="experts"))
    with pytest.raises(RecipeError, match=r"method\.share: none of the chosen layers"):
        compress.plan(asked)
