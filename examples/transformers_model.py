"""A transformers model, sharded whole, with its traffic predicted and counted.

    torchrun --nproc-per-node 8 examples/transformers_model.py

Eight ranks of one machine stand for 2 replicas of 2 nodes x 2 GPUs. A small Llama with random
weights learns the bytes of the Python standard library that runs it. Nothing is downloaded.
"""

from __future__ import annotations

import math
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import mics

GPUS_PER_NODE, PARTITION = 2, 4
STEPS, MICRO_STEPS, SEQUENCES, LENGTH = 20, 4, 2, 128
IGNORED = -100  # the label of padding

Batch = tuple[torch.Tensor, torch.Tensor]  # bytes and the bytes that follow, (SEQUENCES, LENGTH)


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        use_cache=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    # The nodes are imagined, so there is no slow link to measure: the hierarchical form is forced,
    # to show its two stages. On a cluster leave `collectives` and `gpus_per_node` out.
    mics.shard(model, partition=PARTITION, gpus_per_node=GPUS_PER_NODE, collectives="hierarchical")
    rank = dist.get_rank()
    device = next(model.buffers()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batches = standard_library(rank, device)
    ledger = mics.ledger(model)

    for step in range(1, STEPS + 1):
        ledger.reset()
        total = torch.zeros(2, device=device)  # summed loss, bytes
        step_batches = [next(batches) for _ in range(MICRO_STEPS)]
        for inputs, labels in mics.micro_steps(model, step_batches, normalise=num_bytes):
            logits = model(input_ids=inputs).logits.float()
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
            loss.backward()
            total += torch.stack([loss.detach(), (labels != IGNORED).sum()])
        optimizer.step()
        optimizer.zero_grad()

        dist.all_reduce(total)
        if rank == 0:
            bits = total[0] / total[1] / math.log(2)
            print(f"step {step:>2}/{STEPS}  loss {bits.item():.3f} bits per byte", flush=True)

    compare(model, device)
    dist.destroy_process_group()


def num_bytes(batch: Batch) -> torch.Tensor:
    """What the summed loss is divided by: the bytes predicted, padding left out."""
    return (batch[1] != IGNORED).sum()


def standard_library(rank: int, device: torch.device) -> Iterator[Batch]:
    """Random windows of the standard library's source; every rank has windows of its own."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [text for file in files if len(text := file.read_bytes()) > 1]
    choose = random.Random(rank)
    while True:
        inputs = torch.zeros(SEQUENCES, LENGTH, dtype=torch.int64)
        labels = torch.full((SEQUENCES, LENGTH), IGNORED)
        for row in range(SEQUENCES):
            text = choose.choice(texts)
            start = choose.randrange(len(text) - 1)
            window = torch.frombuffer(
                bytearray(text[start : start + LENGTH + 1]), dtype=torch.uint8
            )
            inputs[row, : len(window) - 1] = window[:-1]
            labels[row, : len(window) - 1] = window[1:]
        yield inputs.to(device), labels.to(device)


# -- predicted against counted -------------------------------------------------------------------


def compare(model: LlamaForCausalLM, device: torch.device) -> None:
    """Print the ledger of the last step, then the bytes that leave node 0: predicted, counted."""
    rank, world = dist.get_rank(), dist.get_world_size()
    ledger = mics.ledger(model)
    predicted, counted = mics.predict_traffic(model, micro_steps=MICRO_STEPS), ledger.traffic()
    between_nodes = [key for key, count in predicted.counts.items() if count.flow.inter_bytes]
    sent = [
        [int(traffic.counts[key].flow.inter_bytes) for key in between_nodes]
        for traffic in (predicted, counted)
    ]
    of_node = torch.tensor(sent, device=device) * (rank < GPUS_PER_NODE)
    equal = torch.tensor(int(counted == predicted), device=device)
    dist.all_reduce(of_node)
    dist.all_reduce(equal)
    if rank != 0:
        return
    print(f"\nrank 0, one step of {MICRO_STEPS} micro-steps\n{ledger}\n")
    print(f"{'bytes node 0 sends to others':<30}{'predicted':>12}{'counted':>12}")
    names = [f"hop {key.hop} {key.collective} {key.stage}" for key in between_nodes]
    numbers = [*of_node.T.tolist(), of_node.sum(dim=1).tolist()]
    for name, (before, after) in zip([*names, "all"], numbers, strict=True):
        print(f"{name:<30}{before:>12,}{after:>12,}")
    print(f"counted = predicted, every stage and link: {equal.item()} of {world} ranks")


if __name__ == "__main__":
    main()
