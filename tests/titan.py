"""torchtitan on this machine's CPU, with a tokenizer and texts that are made here.

torchtitan asks its device of two names of one module, and expects an accelerator. Both are set here
before its other modules read them. Its trainer calls ``torch.distributed.set_timeout``, which torch
2.13 has under a private name only. FSDP2 with torchtitan's divide factor multiplies inside of a
reduction, which Gloo cannot; sums are forced by FSDP2's own method. Its attentions do not train on
a CPU; its debug models are given the one that its image models have, or where masks and context
parallelism matter one with whole score matrices in the place of a kernel.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import random
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule


class _Cpu(types.ModuleType):
    """What torchtitan asks of ``torch.cuda``, answered for the host."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def get_device_name(self, _: Any) -> str:
        return "CPU"

    def get_device_properties(self, _: Any) -> Any:
        return types.SimpleNamespace(total_memory=2**34)

    def memory_stats(self, _: Any = None) -> dict[str, int]:
        return {}

    def reset_peak_memory_stats(self) -> None: ...

    def empty_cache(self) -> None: ...


@functools.cache
def on_the_cpu() -> None:
    """Let torchtitan take the host for its device; before anything else of it is imported."""
    assert "torchtitan.trainer" not in sys.modules
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torchtitan.tools.utils as utils

        utils.device_type, utils.device_module = "cpu", _Cpu("host")
        import torchtitan.trainer  # noqa: F401  # once here instead of once per rank


def write_assets(folder: Path) -> None:
    """Write a tokenizer of bytes and 400 texts, as torchtitan reads them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={one: i for i, one in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    tokenizer.add_special_tokens(list(special.values()))
    for name in ("tokenizer", "texts"):
        (folder / name).mkdir()
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(special))
    dice = random.Random(0)
    words = ["".join(dice.choices("abcdefghij", k=dice.randint(2, 7))) for _ in range(200)]
    texts = [" ".join(dice.choices(words, k=dice.randint(20, 120))) for _ in range(400)]
    lines = [json.dumps({"text": text}) for text in texts]
    (folder / "texts" / "texts.jsonl").write_text("\n".join(lines))


def small(config: Any, folder: Path, steps: int, accumulation: int, world: int) -> Any:
    """A debug configuration in the size of a test, as the command line would set it."""
    from torchtitan.models.common.attention import ScaledDotProductAttention

    set_attention(config, ScaledDotProductAttention.Config())
    config.hf_assets_path = str(folder / "tokenizer")
    config.dataloader.dataset_path = str(folder / "texts")
    config.dump_folder = str(folder / "out")
    config.training.local_batch_size, config.training.seq_len = 2, 32
    config.training.global_batch_size = 2 * accumulation * world
    config.training.mixed_precision_param = "float32"
    config.training.steps = steps
    config.training.disable_cuda_graphs = True
    config.parallelism.data_parallel_replicate_degree = 2
    config.parallelism.spmd_backend = "partial_dtensor"
    config.lr_scheduler.total_steps = 100  # the same schedule in a run that stops and goes on
    config.validator.enable = False
    config.debug.seed, config.debug.enable_structured_logging = 1, False
    return config


def set_attention(config: Any, attention: Any) -> None:
    """Give each block of a model an inner attention."""
    for layer in config.model_spec.model.layers:
        layer.attention.inner_attention = attention


def masked_attention() -> Any:
    """Configure torchtitan's attention by masks, without its kernel.

    Masks are torchtitan's; what context parallelism makes of them, and the gathering of keys and
    values, is torch's.
    """
    from torch.nn.attention.flex_attention import create_mask
    from torchtitan.models.common.attention import FlexAttention

    class Masked(FlexAttention):  # type: ignore[misc]
        @dataclasses.dataclass(kw_only=True, slots=True)
        class Config(FlexAttention.Config):  # type: ignore[misc]
            pass

        def forward(  # torchtitan spreads arguments by these names
            self, q_BLNH: Any, k_BLNH: Any, v_BLNH: Any, *, attention_masks: Any, **kwargs: Any
        ) -> Any:
            q, k, v = (one.transpose(1, 2) for one in (q_BLNH, k_BLNH, v_BLNH))
            sizes = (q.shape[0], 1, q.shape[2], k.shape[2])
            mask = create_mask(attention_masks.mask_mod, *sizes, device="cpu")
            keywords = {key: kwargs[key] for key in ("scale", "enable_gqa") if key in kwargs}
            product = torch.nn.functional.scaled_dot_product_attention
            return product(q, k, v, attn_mask=mask, **keywords).transpose(1, 2)

    return Masked.Config()


def with_sums(config: Any) -> Any:
    """FSDP2's own run, whose reductions are sums."""
    parallelize = config.model_spec.parallelize_fn

    def summed(*args: Any, **kwargs: Any) -> Any:
        model = parallelize(*args, **kwargs)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
        return model

    config.model_spec = dataclasses.replace(config.model_spec, parallelize_fn=summed)
    return config


class Run:
    """A run of torchtitan's trainer on this rank, and what came of it."""

    def __init__(
        self, config: Any, watch: Callable[[Any], Callable[[], Any]] | None = None
    ) -> None:
        if not hasattr(dist, "set_timeout"):
            dist.set_timeout = dist.distributed_c10d._set_pg_timeout
        os.environ |= {"LOCAL_RANK": str(dist.get_rank())}
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.validated: list[float] = []
        self.seen: list[Any] = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.trainer = config.build()
            log = self.trainer.metrics_processor.log

            def note(step: int, loss: float, most: float, norm: float, **kwargs: Any) -> None:
                self.losses.append(loss)
                self.norms.append(norm)
                log(step, loss, most, norm, **kwargs)

            self.trainer.metrics_processor.log = note
            self.trainer.metrics_processor.log_validation = self._note_validation
            if watch is not None:
                self._watch(watch(self.trainer))
            self.trainer.train()
            self.trainer.close()

    def _note_validation(self, loss: float, step: int) -> None:
        self.validated.append(loss)

    def _watch(self, ask: Callable[[], Any]) -> None:
        step = self.trainer.train_step

        def watched(*args: Any) -> None:
            step(*args)
            self.seen.append(ask())

        self.trainer.train_step = watched
