"""A model built on the meta device gets the values it would have been built with, or is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from mics.anatomy.blocks import find_blocks
from mics.errors import ShardError
from mics.sharding.materialise import Materialiser


def from_meta(make: Callable[[], Any], initialise: Any = None) -> Any:
    """Build on the meta device, and give values as ``mics.shard`` does: blocks, then the rest."""
    with torch.device("meta"):
        model = make()
    materialiser = Materialiser(model, device=torch.device("cpu"), seed=1, initialise=initialise)
    for block in find_blocks(model).values():
        materialiser.materialise(block)
    materialiser.materialise(model)
    return model


def assert_alike(ours: nn.Module, built: nn.Module) -> None:
    """Constants are the same constants; what is drawn at random has the same mean and deviation."""
    named = dict(ours.state_dict())
    for name, wanted in built.state_dict().items():
        found = named.pop(name)
        if wanted.unique().numel() == 1:
            assert torch.equal(found, wanted), name
            continue
        spread = float(wanted.float().std())
        assert float(found.float().std()) == pytest.approx(spread, rel=0.3), name
        noise = 6 * spread / math.sqrt(wanted.numel())
        assert abs(float(found.float().mean() - wanted.float().mean())) < noise, name
    assert not named


def refusal(make: Callable[[], Any]) -> str:
    with pytest.raises(ShardError) as caught:
        from_meta(make)
    return str(caught.value)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.attention = nn.MultiheadAttention(32, 2)
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)


class Plain(nn.Module):
    """Embedding, blocks, head, and nobody who initialises them but they themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 32, padding_idx=3)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.batch_norm = nn.BatchNorm1d(32)
        self.head = nn.Linear(32, 64)


class Applied(Plain):
    """As GPT-2's many copies do: ``_init_weights`` of the whole, called when it is built."""

    def __init__(self) -> None:
        super().__init__()
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.5)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)


def llama(**more: Any) -> Any:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "pad_token_id": 3}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **sizes, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.5, **more
        )
    )


class Around(nn.Module):
    """A transformers model with a head of the user's own, which nobody else initialises."""

    def __init__(self) -> None:
        super().__init__()
        self.body = llama()
        self.value = nn.Linear(32, 64)


def bert() -> Any:
    return transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            initializer_range=0.5,
            pad_token_id=3,
        )
    )


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 2, 64)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


class Adapted(nn.Module):
    """What peft's LoRA puts around a layer, by the names that peft gives."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(layer.in_features, 8, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(8, layer.out_features, bias=False)})
        self.reset_lora_parameters("default", True)

    def reset_lora_parameters(self, adapter: str, how: Any) -> None:
        if how is not False:
            nn.init.kaiming_uniform_(self.lora_A[adapter].weight, a=math.sqrt(5))  # type: ignore[arg-type]
            nn.init.zeros_(self.lora_B[adapter].weight)  # type: ignore[arg-type]


def adapted(how: Any = True) -> Any:
    model = llama()
    for layer in model.model.layers:
        layer.self_attn.q_proj = Adapted(layer.self_attn.q_proj)
    model.peft_config = {"default": type("Settings", (), {"init_lora_weights": how})()}
    return model


@pytest.mark.parametrize(
    "make", [Plain, Applied, llama, Around, bert, encoder, adapted], ids=lambda make: make.__name__
)
def test_values_are_those_that_the_model_would_have_been_built_with(make: Any) -> None:
    torch.manual_seed(0)
    assert_alike(from_meta(make), make())


def test_padding_of_tied_embeddings_is_zero() -> None:
    """The output layer, which shares the weight, must not be the last to set it."""
    for make in (bert, lambda: llama(tie_word_embeddings=True)):
        embeddings = from_meta(make).get_input_embeddings().weight
        assert embeddings[3].count_nonzero() == 0
        assert float(embeddings.detach().std()) == pytest.approx(0.5, rel=0.1)


class Whole(Plain):
    """``_init_weights`` knows the whole model, and is left to whoever gives the values."""

    def _init_weights(self, module: nn.Module) -> None:
        if module is self:
            nn.init.zeros_(self.head.weight)


def test_values_that_were_there_from_the_beginning_are_left_alone() -> None:
    def make() -> Whole:
        model = Whole()
        model.head.weight = nn.Parameter(torch.ones(64, 32, device="cpu"))
        return model

    assert torch.equal(from_meta(make).head.weight, torch.ones(64, 32))


class Reaching(Plain):
    def _init_weights(self, module: nn.Module) -> None:
        if module is self:
            nn.init.zeros_(self.blocks[1].up.weight)  # type: ignore[union-attr, arg-type]


def test_what_an_owner_sets_of_the_whole_model_is_set_unless_it_is_in_another_unit() -> None:
    model = from_meta(Whole)
    assert model.head.weight.count_nonzero() == 0
    assert model.blocks[0].up.weight.std() > 0
    said = refusal(Reaching)
    assert "blocks.1.up.weight has its values already, and Reaching around it sets them" in said
    assert "By _init_weights of Reaching." in said


def _zeroed(make: Callable[[], Any], zero: Callable[[Any], object]) -> Callable[[], Any]:
    def zeroed() -> Any:
        model = make()
        zero(model)
        return model

    return zeroed


ELSEWHERE = {
    "the last layer of a block": (
        _zeroed(Plain, lambda m: nn.init.zeros_(m.blocks[1].down.weight)),
        "blocks.1.down.weight was set 2 time(s)",
    ),
    "weight and bias of the head": (
        _zeroed(Plain, lambda m: [p.detach().zero_() for p in m.head.parameters()]),
        "head.weight was set 2 time(s)",
    ),
    "a parameter put in the place of another": (
        _zeroed(Plain, lambda m: setattr(m.head, "weight", nn.Parameter(torch.zeros(64, 32)))),
        "head.weight was set 0 time(s)",
    ),
    "a buffer of torch's": (
        _zeroed(Plain, lambda m: m.batch_norm.running_var.fill_(0.5)),
        "batch_norm.running_var was set 2 time(s)",
    ),
    "a scale by depth, after _init_weights": (
        _zeroed(Applied, lambda m: nn.init.normal_(m.blocks[0].down.weight, std=0.01)),
        "blocks.0.down.weight was set 3 time(s)",
    ),
    "a head of transformers": (
        _zeroed(llama, lambda m: nn.init.zeros_(m.lm_head.weight)),
        "lm_head.weight was set 2 time(s)",
    ),
    "a block inside a user's model": (
        _zeroed(Around, lambda m: nn.init.zeros_(m.body.model.layers[0].mlp.down_proj.weight)),
        "body.model.layers.0.mlp.down_proj.weight was set 2 time(s)",
    ),
    "an adapter of unknown kind": (
        _zeroed(llama, lambda m: setattr(m.model.layers[0].mlp, "added", _Unknown())),
        "model.layers.0.mlp.added.b.weight was set 2 time(s)",
    ),
    "everything, by a module around the blocks": (
        lambda: nn.Transformer(32, 2, 2, 2, 64, batch_first=True),
        "bias was set 0 time(s)",
    ),
    "an embedding tied to a linear layer": (
        _zeroed(Plain, lambda m: setattr(m.head, "weight", m.embedding.weight)),
        "embedding.weight is tied, and of the modules that share it (Embedding, Linear) each sets "
        "other values",
    ),
    "a copy inside of what sets it": (
        lambda: _copied(),
        "was copied on the meta device, and what the Resetting around it set is not known",
    ),
    "an adapter worked out from its layer": (
        lambda: adapted("pissa"),
        "The adapter 'default' of model.layers.0.self_attn.q_proj was built on the meta device",
    ),
}


class _Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Linear(8, 8)
        nn.init.zeros_(self.b.weight)


class Resetting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for block in self.blocks:
            nn.init.zeros_(block.weight)  # type: ignore[arg-type]


def _copied() -> nn.Module:
    with torch.device("cpu"):
        model = Resetting()
    return model.to("meta")


@pytest.mark.parametrize("which", ELSEWHERE)
def test_values_that_somebody_else_set_are_not_replaced_silently(which: str) -> None:
    make, words = ELSEWHERE[which]
    assert words in refusal(make)


def test_the_refusal_says_what_was_lost_and_what_to_write() -> None:
    said = refusal(ELSEWHERE["the last layer of a block"][0])
    assert "the initialisers that can be called now set it 1 time(s)" in said
    assert "values that somebody else set (zeros of a last layer, an adapter) were lost" in said
    assert "Shape (32, 64), in a Linear." in said
    assert "mics.shard(model, initialise=function of a module" in said


def test_an_initialiser_of_the_users_own_is_believed() -> None:
    def ones(module: nn.Module) -> None:
        for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            nn.init.ones_(tensor)

    make = ELSEWHERE["the last layer of a block"][0]
    assert {float(p.detach().mean()) for p in from_meta(make, ones).parameters()} == {1.0}
