"""Formats whose readers take no experts in stacks or no corrections of experts, and how cards load a mixture."""

import shutil

import pytest
from families import save_tiny
from workspaces import recipe

import compress
from compress.errors import RecipeError
from compress.methods.eora import EoRA
from compress.methods.gptq import GPTQ


@pytest.fixture
def mixture(workspace):
    for path in (workspace / "model").iterdir():
        path.unlink()
    sizes = {"hidden_size": 32, "moe_intermediate_size": 32, "num_key_value_heads": 4}
    save_tiny(workspace / "model", "qwen3_moe", **sizes)
    return workspace


def test_gptq_refuses_corrections_of_experts_which_peft_would_leave_out(mixture):
    job = recipe(mixture, method=EoRA(rank=2, base=GPTQ(bits=4, group_size=32)), export=("gptq",))
    with pytest.raises(RecipeError, match=r"export: gptq cannot hold .*experts\.0\.\w+: PEFT adds"):
        compress.plan(job)


def test_gptq_refuses_experts_that_the_source_stacks_and_takes_the_rest(workspace):
    shutil.rmtree(workspace / "model")
    save_tiny(workspace / "model", "granitemoe", num_key_value_heads=4)
    method = GPTQ(bits=4, group_size=32)
    with pytest.raises(
        RecipeError, match=r"export: gptq cannot hold .*experts.* in one tensor with"
    ):
        compress.plan(recipe(workspace, method=method, export=("gptq",)))
    rest = recipe(workspace, method=method, export=("gptq",), exclude=("*experts*",))
    assert len(compress.plan(rest).plan.layers) == 3 * 4


@pytest.mark.usefixtures("quick_verification")
def test_the_card_of_a_gptq_mixture_loads_it_with_gptqmodel(mixture):
    compress.run(recipe(mixture, method=GPTQ(bits=4, group_size=32), export=("gptq",)))
    card = (mixture / "out" / "README.md").read_text()
    assert "GPTQModel.load(" in card
    assert "Not with `AutoModelForCausalLM.from_pretrained`" in card
