"""The options of mics train: from files, from words, checked, solved, shown, refused."""

from __future__ import annotations

import importlib.util
import itertools
import math
from pathlib import Path
from typing import Any

import pytest

from mics.__main__ import main
from mics.commands.options.train import Config, parse
from mics.errors import ConfigError
from mics.ranks.launcher import Launch
from mics.training import launching
from mics.training.batching import solve
from mics.training.config import (
    BatchConfig,
    DataConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
)
from mics.training.dry_run import describe
from mics.training.launching import num_ranks
from mics.training.settings import as_plain, as_toml, check_settings, read_settings
from mics.training.trackers import check_trackers

ROOT = Path(__file__).parents[1]


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "run.toml"
    file.write_text(text)
    return file


# -- files and words -------------------------------------------------------------------------------


def test_what_is_printed_can_be_read_back(tmp_path: Path) -> None:
    config = TrainConfig(
        run=RunConfig(folder=Path('a "quoted" \\ folder'), resume=Path("x/step-1")),
        batch=BatchConfig(micro_batch=3),
        optimizer=OptimizerConfig(eps=1e-12, betas=(0.5, 0.25), learning_rate=1e30),
    )
    assert read_settings(written(tmp_path, as_toml(config))) == config
    assert read_settings(written(tmp_path, as_toml(TrainConfig()))) == TrainConfig()
    assert "global_batch" not in as_plain(config)["batch"]


SOURCES = """
[[data.sources]]
source = "a"
weight = 3

[[data.sources]]
source = "b"
field = "body"
"""


def test_several_sources_are_read_printed_and_read_back(tmp_path: Path) -> None:
    config = read_settings(written(tmp_path, SOURCES))
    assert config.data.sources == (SourceConfig("a", 3.0), SourceConfig("b", 1.0, "body"))
    assert read_settings(written(tmp_path, as_toml(config))) == config
    check_settings(config)
    words = [str(written(tmp_path, SOURCES)), "--data.sources.1.weight", "0.5"]
    assert parse(words).options.data.sources[1] == SourceConfig("b", 0.5, "body")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[data.sources]]\nsuorce = 'a'", "no key data.sources.suorce; did you mean 'source'?"),
        ("[[data.sources]]\nweight = 2", "data.sources"),
        ("[[data.sources]]\nsource = 'a'\nweight = '2'", "data.sources.weight has a value"),
        ("[[data.sources]]\nsource = 'a'\nweight = true", "data.sources.weight has a value"),
        ("[data]\nsources = 'a'", "data.sources is an array of tables"),
        ("[data]\nsources = ['a']", "data.sources is an array of tables"),
        ("[data.sources]\nsource = 'a'", "data.sources is an array of tables"),
        ("[[data.sources]]\nsource = 'a'\nweight = 0", "data.sources.weight is out of range"),
        ("[[data.sources]]\nsource = 'a'\nweight = -1", "data.sources.weight is out of range"),
        ("[[data.sources]]\nsource = 'a'\nweight = nan", "data.sources.weight is out of range"),
        ("[[data.sources]]\nsource = 'a'\nweight = inf", "data.sources.weight is out of range"),
        ('[[data.sources]]\nsource = "a\\u0000"', "data.sources.source is out of range"),
    ],
)
def test_sources_that_make_no_sense_are_refused(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        check_settings(read_settings(written(tmp_path, text)))
    assert words in str(caught.value)
    assert "Write: " in str(caught.value)


def test_words_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    file = written(tmp_path, "[run]\nsteps = 7\nseed = 3\n")
    config = parse([str(file), "--run.steps", "9", "--batch.micro-batch", "2"]).options
    assert (config.run.steps, config.run.seed) == (9, 3)
    assert config.batch.micro_batch == 2
    assert config.model == TrainConfig().model
    assert parse([]) == Config()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[run]\nstepz = 1", ["there is no key run.stepz; did you mean 'steps'?", "folder, steps"]),
        ("[runn]\nsteps = 1", ["there is no table [runn]; did you mean 'run'?"]),
        ("[xyz]\n", ["there is no table [xyz]."]),
        ("run = 3", ["run is a table, not a value", "run = 3"]),
        ('[run]\nsteps = "many"', ["run.steps has a value", "run.steps = 'many'", "integer"]),
        ("[run]\nsteps = 1.5", ["run.steps = 1.5", "fractional part"]),
        ('[log]\nlive = "maybe"', ["log.live = 'maybe'", "'auto', 'on' or 'off'"]),
        ("[run]\nsteps = true", ["run.steps = True", "A truth value stands where none belongs"]),
        ("[run]\nsteps = [1]", ["run.steps = [1]", "integer"]),
        ('[run]\nsteps = "7"', ["run.steps = '7'", "without quotes"]),
        ("[optimizer]\nclip = false", ["optimizer.clip = False", "A truth value stands"]),
        ("[optimizer]\nbetas = [0.9, true]", ["optimizer.betas = [0.9, True]", "A truth value"]),
        ('[parallel]\nranks = "2"', ["parallel.ranks = '2'", "without quotes"]),
        ("[parallel]\npartition = true", ["parallel.partition = True", "A truth value"]),
        ("[parallel]\ncompile = 1", ["parallel.compile = 1", "where true or false belongs"]),
        ("[model]\nname = 2020-01-01", ["model.name = datetime.date", "string"]),
        ("[model]\nname = 3", ["model.name = 3", "string"]),
        ("run = " + "[" * 100_000, ["is not TOML", "recursion"]),
        ("[run]\nsteps = " + "[" * 50 + "]" * 50, ["run.steps = [[[[", "...", "integer"]),
        ("[run]\nsteps = " + "{a = " * 10_000, ["is not TOML", "recursion"]),
        ("[run]\n" + "a." * 20_000 + "a = 1", ["is not TOML", "more than 64 parts"]),
        ("[run]\n" + '"a" . ' * 20_000 + "a = 1", ["is not TOML", "more than 64 parts"]),
        ("#" * (2 << 20), ["is too long", "more than 262,144 bytes"]),
        ("[run", ["is not TOML"]),
    ],
)
def test_a_file_that_is_wrong_says_where_and_what_instead(
    text: str, words: list[str], tmp_path: Path
) -> None:
    file = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        read_settings(file)
    for word in [*words, str(file), "Write: "]:
        assert word in str(caught.value)


def test_a_missing_file_and_one_that_does_not_come_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(tmp_path / "none.toml")]) == 2
    assert "none.toml cannot be read: No such file or directory" in capsys.readouterr().err
    file = written(tmp_path, "")
    assert main(["train", "--run.steps", "3", str(file)]) == 2
    assert "The configuration file must come first" in capsys.readouterr().err


def test_an_unknown_option_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train", "--run.stepz", "3"])
    assert caught.value.code == 2
    assert "--run.steps" in capsys.readouterr().err


def test_a_configuration_without_end_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="is too long"):
        read_settings(Path("/dev/zero"))


@pytest.mark.parametrize(
    ("table", "key", "value"),
    [("run", "folder", Path("a\0b")), ("data", "source", "a\udcff"), ("data", "tokenizer", "\0")],
)
def test_a_name_that_no_file_can_have_is_named(table: str, key: str, value: Any) -> None:
    config = TrainConfig(**{table: type(getattr(TrainConfig(), table))(**{key: value})})
    with pytest.raises(ConfigError, match=f"{table}.{key} is out of range") as caught:
        check_settings(config)
    assert f"{table}.{key} = {str(value)!a}" in str(caught.value)
    assert "letters, no NUL" in str(caught.value)


OUT_OF_RANGE = [
    ("run", "steps", 0),
    ("run", "steps", 10**30),
    ("run", "seed", 2**63),
    ("data", "sequence", 10**20),
    ("data", "vocabulary", 10**20),
    ("data", "limit", 10**30),
    ("data", "held_out", math.nan),
    ("batch", "global_batch", 10**20),
    ("batch", "micro_batch", 99_999_999_999),
    ("batch", "micro_steps", -1),
    ("parallel", "ranks", -1),
    ("parallel", "ranks", 0),
    ("parallel", "ranks", 99999999999999999999),
    ("parallel", "partition", 0),
    ("parallel", "gpus_per_node", 0),
    ("optimizer", "weight_decay", math.inf),
    ("optimizer", "weight_decay", math.nan),
    ("optimizer", "clip", math.inf),
    ("optimizer", "eps", math.inf),
    ("optimizer", "learning_rate", math.nan),
    ("optimizer", "final", math.nan),
    ("optimizer", "betas", (math.nan, 0.9)),
    ("run", "seed", -1),
    ("data", "sequence", 1),
    ("data", "held_out", 1.0),
    ("data", "limit", -1),
    ("data", "masked", 0.0),
    ("data", "vocabulary", 10),
    ("optimizer", "learning_rate", 0.0),
    ("optimizer", "warmup", -1),
    ("optimizer", "final", 2.0),
    ("optimizer", "weight_decay", -0.1),
    ("optimizer", "betas", (0.9, 1.0)),
    ("optimizer", "eps", 0.0),
    ("optimizer", "clip", -1.0),
    ("optimizer", "bad_steps", 0),
    ("optimizer", "rollbacks", -1),
    ("optimizer", "spike_loss", 1.0),
    ("optimizer", "spike_norm", 0.5),
    ("optimizer", "spike_norm", -10.0),
    ("evaluation", "every", -1),
    ("evaluation", "sequences", -1),
    ("evaluation", "sample", -1),
    ("checkpoint", "every", -1),
    ("checkpoint", "keep", -1),
    ("log", "every", 0),
]


@pytest.mark.parametrize(("table", "key", "value"), OUT_OF_RANGE)
def test_a_value_out_of_range_is_named(table: str, key: str, value: Any) -> None:
    kind = type(getattr(TrainConfig(), table))
    config = TrainConfig(**{table: kind(**{key: value})})
    with pytest.raises(ConfigError, match=f"{table}.{key} is out of range") as caught:
        check_settings(config)
    assert f"{table}.{key} = {value}" in str(caught.value)
    assert f"Write: {table}.{key}: " in str(caught.value)


def test_the_defaults_and_the_demo_are_in_range() -> None:
    check_settings(TrainConfig())
    check_settings(read_settings(ROOT / "examples" / "demo.toml"))


# -- the batch triangle ----------------------------------------------------------------------------


def test_any_two_give_the_third_and_it_always_multiplies_out() -> None:
    for ranks, micro, steps in itertools.product((1, 3, 8), (1, 2, 5), (1, 4)):
        whole = ranks * micro * steps
        for given in (
            {"global_batch": whole, "micro_batch": micro},
            {"global_batch": whole, "micro_steps": steps},
            {"micro_batch": micro, "micro_steps": steps},
            {"global_batch": whole, "micro_batch": micro, "micro_steps": steps},
        ):
            solved = solve(BatchConfig(**given), ranks)
            assert (solved.micro_batch, solved.micro_steps) == (micro, steps), given
            assert solved.global_batch == whole


@pytest.mark.parametrize("whole", [8, 24, 56, 104, 8 * 97])
def test_a_global_batch_alone_is_solved_with_micro_batches_of_at_most_8(whole: int) -> None:
    solved = solve(BatchConfig(global_batch=whole), 8)
    assert solved.micro_batch * solved.micro_steps * 8 == whole
    assert solved.micro_batch <= 8


def test_nothing_given_is_a_micro_batch_of_8() -> None:
    assert solve(BatchConfig(), 4).global_batch == 32


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"global_batch": 64, "micro_batch": 4, "micro_steps": 3},
            ["contradict each other", "4 x 3 micro-step(s) x 4 rank(s) = 48, global_batch = 64"],
        ),
        ({"global_batch": 10}, ["evenly over the ranks", "global_batch = 10, 4 ranks", "8"]),
        ({"global_batch": 2}, ["evenly over the ranks", "--batch.global-batch 4"]),
        (
            {"global_batch": 32, "micro_batch": 3},
            [
                "micro_batch does not divide",
                "is 8 each, micro_batch = 3",
                "--batch.global-batch 36",
            ],
        ),
        ({"global_batch": 32, "micro_steps": 3}, ["micro_steps does not divide"]),
        ({"micro_batch": 0}, ["batch.micro_batch must be at least 1"]),
    ],
)
def test_batches_that_contradict_say_the_numbers_and_what_would_work(
    given: dict[str, int], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        solve(BatchConfig(**given), 4)
    for word in words:
        assert word in str(caught.value)


# -- ranks and trackers ----------------------------------------------------------------------------


def test_ranks_of_a_launcher_are_not_started_twice() -> None:
    launch = Launch("torchrun", 0, 4, 0, 4)
    assert num_ranks(TrainConfig(), launch) == 4
    assert num_ranks(TrainConfig(parallel=ParallelConfig(ranks=4)), launch) == 4
    with pytest.raises(ConfigError, match="torchrun has started some") as caught:
        num_ranks(TrainConfig(parallel=ParallelConfig(ranks=8)), launch)
    assert "parallel.ranks = 8, torchrun started 4" in str(caught.value)
    assert "Write: torchrun --nproc-per-node 8 -m mics ..., and leave" in str(caught.value)
    with pytest.raises(ConfigError, match="Slurm has started some") as caught:
        num_ranks(TrainConfig(parallel=ParallelConfig(ranks=64)), Launch("Slurm", 0, 1, 0, 1))
    words = "Write: srun --ntasks-per-node=64 --ntasks=64 mics ..., and leave --parallel.ranks out"
    assert words in str(caught.value)


def test_an_allocation_whose_shell_trains_alone_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launching, "run_local_ranks", lambda *_: 0)
    for name, said in (("SLURM_NTASKS", True), ("SLURM_STEP_ID", False)):
        monkeypatch.setenv("SLURM_NTASKS", "8")
        monkeypatch.setattr(launching, "read_launch", lambda: None)
        monkeypatch.setenv(name, "8")
        assert launching.run_on_ranks(lambda _: 0, TrainConfig()) == 0
        words = "Slurm has allocated 8 tasks, but srun has not started this process: 1 rank(s)"
        assert (words in capsys.readouterr().err) == said


def test_ranks_below_one_or_beyond_the_accelerators(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"parallel\.ranks must be at least 1"):
        num_ranks(TrainConfig(parallel=ParallelConfig(ranks=0)), None)
    for many in (1025, 10**20):
        with pytest.raises(ConfigError, match=r"parallel\.ranks must be at most 1024") as caught:
            num_ranks(TrainConfig(parallel=ParallelConfig(ranks=many)), None)
        assert f"parallel.ranks = {many}." in str(caught.value)

    monkeypatch.setattr(launching, "default_device_type", lambda: "cuda")
    monkeypatch.setattr(launching.torch.accelerator, "device_count", lambda: 2)
    assert num_ranks(TrainConfig(), None) == 2
    with pytest.raises(ConfigError, match="fewer accelerators than ranks") as caught:
        num_ranks(TrainConfig(parallel=ParallelConfig(ranks=8)), None)
    assert "parallel.ranks = 8, 2 accelerator(s)" in str(caught.value)


def test_a_tracker_that_is_not_installed_is_named_before_anything_starts() -> None:
    check_trackers(LogConfig())
    with pytest.raises(ConfigError, match=r"log\.wandb asks for wandb, which is not installed"):
        check_trackers(LogConfig(wandb="project"))
    with pytest.raises(ConfigError, match=r"log\.mlflow asks for mlflow"):
        check_trackers(LogConfig(mlflow="experiment"))


def test_what_to_write_without_tensorboard_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install tensorboard, or") as caught:
        check_trackers(LogConfig())
    words = str(caught.value).rpartition("or ")[2].split()
    assert not parse(words).options.log.tensorboard


def test_nodes_that_are_unknown_are_named_before_a_rank_is_started(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["train", "--model.name", "gpt2-tiny", "--parallel.node", "p4x"]) == 1
    assert "There is no node 'p4x'" in capsys.readouterr().err


# -- the dry run -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size"),
    [("bert-10b", "10.08 B"), pytest.param("bert-15b", "15.04 B", marks=pytest.mark.extra)],
)
@pytest.mark.extra
def test_a_dry_run_of_the_papers_models(
    name: str, size: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "120")  # room for all of the table
    words = ["train", "--model.name", name, "--dry-run", "--parallel.ranks", "64"]
    words += ["--parallel.gpus-per-node", "8", "--parallel.partition", "16"]
    words += ["--batch.global-batch", "8192", "--batch.micro-batch", "8"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert f"BertForMaskedLM (masked), {size} parameters" in out
    assert "8192 sequences = 8 x 16 micro-step(s) x 64 rank(s)" in out
    assert "Group map: partition 16, 4 replicas" in out
    assert f'name = "{name}"' in out
    table = out.partition("replicas      states")[2].splitlines()
    rows = [line.split() for line in table if line.strip()[:1].isdigit()]
    assert [row[0] for row in rows] == ["1", "2", "4", "8", "16", "32", "64"]
    assert [row[0] for row in rows if row[-1] == "chosen"] == ["16"]
    if name == "bert-10b":
        assert rows[0][2:4] == ["150.23", "GiB"]  # 16 bytes a parameter
    # Without checkpointing, what the blocks keep is most of it.
    assert float(rows[-1][6]) > 40
    assert "not modelled: " in out


def test_a_dry_run_checks_what_a_run_would(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--dry-run", "--parallel.ranks", "8", "--parallel.partition", "3"]) == 1
    assert "partition = 3" in capsys.readouterr().err
    assert main(["train", "--dry-run", "--data.sequence", "999"]) == 1
    assert "longer than the model has positions" in capsys.readouterr().err
    assert main(["train", "--dry-run", "--model.name", "bert10b"]) == 1
    assert "did you mean 'bert-10b'?" in capsys.readouterr().err
    assert main(["train", "--dry-run", "--run.steps", "0"]) == 1
    assert "run.steps is out of range" in capsys.readouterr().err


def test_a_dry_run_without_a_partition_says_that_the_run_chooses() -> None:
    assert "the run takes the smallest partition that fits" in describe(TrainConfig())


def test_the_models_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--models"]) == 0
    out = capsys.readouterr().out
    assert "bert-10b" in out
    assert "10.08 B" in out


@pytest.mark.parametrize(("asked", "tokens"), [(0, 4096), (2048, 2048)])
def test_a_dry_run_counts_the_tokens_that_a_run_would_take(asked: int, tokens: int) -> None:
    """A model of 8192 positions is not trained on sequences of 8192 unless they are asked for."""
    config = TrainConfig(
        model=ModelConfig(name="llama-8b"),
        data=DataConfig(sequence=asked),
        batch=BatchConfig(global_batch=1),
        parallel=ParallelConfig(ranks=1),
    )
    assert f" tokens per step, {tokens} per sequence" in " ".join(describe(config).split())


def test_a_dry_run_on_named_nodes_takes_what_the_run_would(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["train", "--model.name", "gpt2-tiny", "--dry-run", "--parallel.ranks", "16"]
    words += ["--parallel.gpus-per-node", "8", "--parallel.node"]
    assert main([*words, "p4d"]) == 0
    out = capsys.readouterr().out
    (chosen,) = [line.split()[0] for line in out.splitlines() if line.endswith("<- chosen")]
    assert f"Group map: partition {chosen}," in out
    assert f"\n  p = {chosen}: " in out
    assert "a step would take 0." in out
    assert "a whole node" not in out
    small = ["--model.name", "bert-large", "--batch.global-batch", "4096"]
    assert main([*words, "p4d", *small, "--batch.micro-batch", "256"]) == 1
    assert "Nothing fits: p = " in capsys.readouterr().err
