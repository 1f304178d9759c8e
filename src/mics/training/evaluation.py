"""Loss on held-out text, and a sample of what the model writes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from mics.ranks.issuing import all_reduce, broadcast
from mics.ranks.whereabouts import world_group
from mics.training.data import Prompt, Sequences, Tokenizer
from mics.training.step import token_loss


@torch.no_grad()
def evaluate(
    model: nn.Module,
    held_out: Sequences,
    *,
    sequences: int,
    micro_batch: int,
    device: torch.device,
) -> float | None:
    """Mean loss per predicted token, in nats, over the first held-out sequences.

    Collective. Every rank runs the same number of forward passes, because a partition group
    gathers its parameters together; sequences beyond the last one count nothing.

    Returns:
        ``None`` when there is nothing held out, or nothing to be predicted in it.
    """
    wanted = min(sequences, held_out.num_sequences)
    if wanted == 0:
        return None
    rank, world = dist.get_rank(), dist.get_world_size()
    rounds = -(-wanted // (micro_batch * world))
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    model.eval()
    for turn in range(rounds):
        first = (turn * world + rank) * micro_batch
        batch = held_out.batch(first, micro_batch)
        batch.labels[max(0, wanted - first) :] = -100
        batch = batch.to(device)
        sums[0] += token_loss(model, batch)
        sums[1] += batch.num_targets
    _rest(model)
    all_reduce(sums)
    loss, targets = sums.tolist()
    return loss / targets if targets else None


@torch.no_grad()
def sample(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    tokens: int,
    positions: int,
    seed: int,
    device: torch.device,
    temperature: float = 0.8,
) -> str:
    """Let a causal model go on from some tokens, up to one that ends. Collective.

    The same text on every rank.

    Every token is drawn on rank 0 and broadcast: ranks must feed the model the same, and nothing
    promises that their last bits agree.
    """
    ids = torch.tensor([prompt.ids], dtype=torch.int64, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    model.eval()
    for _ in range(tokens):
        logits = model(input_ids=ids[:, -positions:]).logits[0, -1, : tokenizer.size].float()
        drawn = torch.multinomial((logits / temperature).softmax(0), 1, generator=generator)
        broadcast(drawn, world_group())
        ids = torch.cat([ids, drawn.reshape(1, 1)], dim=1)
        if prompt.ends and int(drawn) in prompt.ends:
            break
    _rest(model)
    return tokenizer.decode(ids[0].tolist())


def _rest(model: nn.Module) -> None:
    """Back to training. What a forward without backward left gathered would be a stale copy."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    model.train()
