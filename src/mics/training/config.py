"""What a run is: every option of ``mics train``, typed, checked, with its help.

One tree of frozen dataclasses is the TOML file (one table per field), the command line
(``--table.key value``), what is printed, and what every checkpoint stores. Values come from the
defaults, then the file, then the command line.
"""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

_STRICT = ConfigDict(extra="forbid", arbitrary_types_allowed=True)


@dataclass(frozen=True, config=_STRICT)
class RunConfig:
    """Where the run lives and how long it is."""

    folder: Path = Path("runs/default")
    """Folder of this run: configuration, metrics, plot, checkpoints. One job at a time."""

    steps: int = 1000
    """Optimizer steps in all, those of the run resumed from included."""

    epochs: float | None = None
    """Instead of steps: how often the run sees its training sequences."""

    seed: int = 0
    """Seed of weights, data order, masking and dropout."""

    resume: Literal["auto", "never"] | Path = "auto"
    """"auto": the newest intact checkpoint of the folder, if any; "never"; or one checkpoint."""


@dataclass(frozen=True, config=_STRICT)
class ModelConfig:
    """The model, always a transformers one."""

    name: str = "gpt2-tiny"
    """A preset (`mics train --models` lists them), a config.json or folder, or a hub name."""

    weights: Path | None = None
    """Folder with safetensors to start from instead of random weights."""

    router_loss: float | None = None
    """Weight of the loss that spreads tokens over the experts of a mixture; 0 trains without it.
    Default: what the model's configuration says (`output_router_logits`, `router_aux_loss_coef`),
    for presets without it."""


@dataclass(frozen=True, config=_STRICT)
class SourceConfig:
    """One of several sources, [[data.sources]] in a file of options."""

    source: str
    """As data.source."""

    weight: float = 1.0
    """Its part of the sequences, beside the weights of the others."""

    field: str | None = None
    """As data.field."""


@dataclass(frozen=True, config=_STRICT)
class DataConfig:
    """The text, its tokens and their order."""

    source: str | None = None
    """A file of text (UTF-8) or a table (JSON lines, a JSON array, CSV, TSV, Parquet, Arrow), a
    folder or glob of them, a folder that `datasets` has saved, `hub:OWNER/NAME[:CONFIG][@SPLIT]`,
    or "stdlib": the source of the running Python's standard library, which is taken, and said,
    where none is named; or tokens: a folder that `mics tokenize` made, files of llm.c or Megatron.
    Anything else is refused."""

    sources: tuple[SourceConfig, ...] = ()
    """Several sources with weights instead of one: [[data.sources]] in the file, with `source`,
    `weight` and `field`."""

    field: str | None = None
    """Column of the tables that holds the text; default: "text". Of conversations: the messages;
    default: "messages", or "prompt" and "completion"."""

    format: Literal["auto", "text", "chat"] = "auto"
    """"auto": a file is a table where its bytes are one, whatever its name; "text": tables of
    letters (JSON, CSV) are text as they stand; "chat": rows are conversations, which go through the
    tokenizer's chat template, and what the assistant says is learnt."""

    tokenizer: str = "bytes"
    """"bytes", "bpe" (trained on the corpus), or a saved tokenizer: folder, tokenizer.json, hub
    name."""

    specials: Literal["text", "ids"] = "text"
    """Special tokens that the text spells (such as chat rendered to text): "text" reads them as
    letters, "ids" as those tokens."""

    vocabulary: int = 4096
    """Size of the vocabulary that "bpe" trains."""

    sequence: int = 0
    """Tokens per sequence; 0 is as many as the model has positions, 4096 at most, as
    in `mics plan`."""

    held_out: float = 0.05
    """Share of the documents (by file, for text files) kept for evaluation; of tokens without a
    split of their own, the last."""

    limit: int = 0
    """Most bytes of text to take from the source; 0 takes all."""

    packing: bool = True
    """Several conversations in a row that do not see each other; else one each, and padding."""

    masked: float = 0.15
    """Share of tokens that a masked language model has to predict."""


@dataclass(frozen=True, config=_STRICT)
class LoraConfig:
    """Small matrices that train beside weights that stay (LoRA: Hu et al., 2021); needs peft."""

    rank: int = 0
    """Columns of the first matrix; 0 trains all weights."""

    alpha: float = 16.0
    """What the product of both counts: alpha / rank."""

    dropout: float = 0.0
    """Share of their inputs that is left out in training."""

    targets: tuple[str, ...] = ()
    """Names of the layers that have them, such as q_proj; none: every linear layer but the head."""


@dataclass(frozen=True, config=_STRICT)
class BatchConfig:
    """Two of the three give the third: global = micro x micro-steps x ranks."""

    global_batch: int | None = None
    """Sequences per step, all ranks and micro-steps together."""

    micro_batch: int | None = None
    """Sequences per rank and micro-step."""

    micro_steps: int | None = None
    """Micro-steps per step; hop 2 runs on the last one only."""


@dataclass(frozen=True, config=_STRICT)
class OptimizerConfig:
    """AdamW, its schedule, clipping, and what happens to a step that is no good."""

    learning_rate: float = 3e-4
    """Peak learning rate."""

    warmup: int = 0
    """Steps over which the learning rate rises to its peak."""

    decay: Literal["cosine", "linear", "wsd", "inverse-sqrt", "none"] = "cosine"
    """How the learning rate falls after the warmup: over all steps; "wsd": over the last ones
    alone; "inverse-sqrt": with the square root of the step."""

    decayed: float = 0.1
    """Share of the steps at whose end the learning rate falls, of "wsd"."""

    final: float = 0.1
    """Share of the peak learning rate that is left at the last step; of "inverse-sqrt" the
    least."""

    weight_decay: float = 0.1
    """Decay of the weights with two or more dims; biases and norms are not decayed."""

    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's two averaging factors."""

    eps: float = 1e-8
    """AdamW's epsilon."""

    clip: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""

    spike_loss: float = 0.0
    """Skip a step whose loss is this many times the median of the 64 latest steps taken, once there
    are 16; 0: none. A step whose loss or norm is not finite is skipped in any case."""

    spike_norm: float = 0.0
    """Skip a step whose gradient, before clipping, has this many times the median norm of such
    steps; 0: none. 10 is a spike in most runs."""

    bad_steps: int = 3
    """Skipped steps in a row after which the run goes back to its newest checkpoint, and goes on
    behind the data of all steps so far."""

    rollbacks: int = 2
    """How often a run goes back so; the next time, and where there is no checkpoint, it stops."""


@dataclass(frozen=True, config=_STRICT)
class ParallelConfig:
    """Ranks, groups and how each rank computes."""

    ranks: int | None = None
    """Ranks to start on this machine when no launcher has; default: one per accelerator, or 1."""

    partition: int | Literal["auto"] = "auto"
    """Ranks that together hold one replica of the model states; the fewest that fit by default, or
    the fastest where --parallel.node names the nodes."""

    gpus_per_node: int | None = None
    """Ranks joined by the fast link; default: what the launcher says. Smaller simulates nodes."""

    collectives: Literal["auto", "flat", "hierarchical"] = "auto"
    """All-gather and reduce-scatter over several nodes: measured, or forced."""

    hop_two: Literal["fp32", "bf16", "fp8", "int8", "auto"] | None = None
    """What replicas exchange of gradients, once a step: fp32 by default; fp8 and int8, in blocks
    with a scale each, are about a quarter of its bytes; auto is fp8 where it is measured faster."""

    error_feedback: bool = True
    """Send what fp8 and int8 round away with the next step; 4 bytes of memory for each value."""

    dealt_states: bool = False
    """Deal optimizer states to the replicas: their memory is divided by the number of replicas. A
    lost node's are then nowhere else, so it needs --checkpoint.no-memory."""

    dtype: Literal["bf16", "fp32"] = "bf16"
    """What blocks compute in; gradients are always reduced, and weights kept, in fp32."""

    activation_checkpointing: bool = False
    """Recompute each block's activations in backward instead of keeping them."""

    activation_offload: Literal["auto", "on", "off"] = "auto"
    """Keep what blocks save for backward on the host until then; with checkpointing their inputs.
    "auto" where --parallel.node is named, and the fastest plan that fits does."""

    compile: bool = False
    """Compile each block with torch.compile."""

    node: str | None = None
    """What these nodes are (`mics plan --list`): the time of a step is predicted, and "auto" takes
    the fastest partition that fits."""


@dataclass(frozen=True, config=_STRICT)
class EvaluationConfig:
    """Loss on held-out text, and a sample."""

    every: int = 100
    """Steps between evaluations; 0 evaluates at the end only."""

    sequences: int = 256
    """Held-out sequences of one evaluation, at most; of each set."""

    sets: tuple[str, ...] = ()
    """More to measure beside the held-out share, as NAME=SOURCE, read as data.source is."""

    sample: int = 200
    """Tokens of the sample at the end (causal models); 0 for none."""

    prompt: str = "def "
    """Text that the sample goes on from; of conversations: what a user says."""


@dataclass(frozen=True, config=_STRICT)
class CheckpointConfig:
    """When to save, what to keep."""

    every: int = 500
    """Steps between checkpoints; 0 saves at the end only, and when a signal or a closed terminal
    ends the run."""

    keep: int = 3
    """Newest checkpoints kept; older ones are deleted. 0 keeps all."""

    asynchronous: bool = True
    """Write checkpoints beside the next steps, instead of before them."""

    memory: bool = True
    """Keep the state in the memory of the nodes too (/dev/shm, or MICS_MEMORY), from where ranks
    that are started again go on without a step lost."""

    memory_every: int = 1
    """Steps between states in memory."""


@dataclass(frozen=True, config=_STRICT)
class LogConfig:
    """What is shown and where it is recorded (metrics.jsonl always is)."""

    every: int = 1
    """Steps between lines on the console."""

    stragglers: bool = False
    """Show a table of all ranks' times with every look for the slow rank or link; the slow one is
    named without it too."""

    live: Literal["auto", "on", "off"] = "auto"
    """A live display instead of lines; "auto" on a terminal."""

    tensorboard: bool = True
    """Write TensorBoard events."""

    wandb: str = ""
    """Weights & Biases project to log to; empty: none."""

    mlflow: str = ""
    """MLflow experiment to log to; empty: none."""


@dataclass(frozen=True, config=_STRICT)
class TrainConfig:
    """Train a language model with MiCS, keep it, sample from it."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
