"""Fine-tune a chat model in a loop of your own: answers are learnt, conversations share rows.

    torchrun --nproc-per-node 4 examples/sft.py MODEL CHATS.jsonl OUT [EPOCHS]

MODEL is a folder with weights and a tokenizer that has a chat template, a row of CHATS.jsonl is
{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import AutoModelForCausalLM

import mics
from mics.training.config import DataConfig
from mics.training.data import open_data

SEQUENCE, ROWS, MICRO_STEPS, PEAK = 256, 1, 2, 2e-3


def main(model_folder: str, chats: str, out: str, epochs: int) -> None:
    mesh = mics.init_mesh()
    rank, world = dist.get_rank(), dist.get_world_size()
    config = DataConfig(source=chats, format="chat", tokenizer=model_folder, held_out=0.0)
    data = open_data(config, seed=0, sequence=SEQUENCE, masked=False, folder=Path(out))
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    model = model.to(mesh.device_type).train()
    mics.shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy())  # the policy: fp32 throughout
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK)
    per_step = ROWS * MICRO_STEPS * world
    steps = -(-epochs * data.train.num_sequences // per_step)
    for step in range(steps):
        first = (step * world + rank) * MICRO_STEPS * ROWS
        batch = [data.train.batch(first + n * ROWS, ROWS) for n in range(MICRO_STEPS)]
        # normalise: sums of all micro-steps and ranks, divided by all their targets
        total = torch.zeros((), device=mesh.device_type)
        for rows in mics.micro_steps(model, batch, normalise=lambda rows: rows.num_targets):
            rows = rows.to(torch.device(mesh.device_type))
            logits = model(**rows.model_inputs()).logits
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), rows.labels.flatten(), reduction="sum"
            )
            loss.backward()
            total += loss.detach()
        mics.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = PEAK * (1 - step / steps)
        optimizer.step()
        optimizer.zero_grad()
        targets = sum(rows.num_targets for rows in batch)
        sums = torch.stack([total, torch.full_like(total, targets)])
        dist.all_reduce(sums)
        if rank == 0:
            print(f"step {step + 1}/{steps}  loss {sums[0] / sums[1]:.4f}", flush=True)
    mics.save(f"{out}/step-{steps:08d}", model=model)  # then: mics export OUT/step-... EXPORTED
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:4], epochs=int(sys.argv[4]) if len(sys.argv) > 4 else 1)
