"""What a plan says of tensors of a mixture that stay."""

import pytest
from families import save_tiny
from workspaces import recipe

import compress
from compress.methods.rtn import RTN


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_routers_are_called_so_whatever_class_they_are_of(workspace, family):
    for path in (workspace / "model").iterdir():
        path.unlink()
    save_tiny(workspace / "model", family, num_key_value_heads=4)
    method = RTN(bits=4, group_size=16)
    kept = compress.plan(recipe(workspace, method=method)).plan.kept
    routers = [tensor for tensor in kept if tensor.name.endswith(".gate.weight")]
    assert routers
    assert {tensor.reason for tensor in routers} == {"a router, which no server quantises"}
