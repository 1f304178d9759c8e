"""DeepSpeed's fields that become no option of ours, each with the reason.

Names are those of DeepSpeed 0.19.8, of 0.19.2 (the last release whose MiCS trains) and of older
configurations that are still passed around.
"""

from __future__ import annotations

from mics.training.migrating.conversion import Kind, Rule, Verdict

SECTIONS = (
    *("optimizer", "optimizer.params", "scheduler", "scheduler.params", "fp16", "bf16"),
    *("bfloat16", "torch_autocast", "activation_checkpointing", "zero_optimization.offload_param"),
    *("zero_optimization.offload_optimizer", "data_types", "checkpoint", "aio", "tensorboard"),
    *("wandb", "csv_monitor", "comet", "flops_profiler", "comms_logger", "compile", "elasticity"),
    *("pipeline", "tensor_parallel", "hybrid_engine", "data_efficiency", "curriculum_learning"),
)
"""What DeepSpeed wants to be tables."""

_N, _U = Verdict.NO_COUNTERPART, Verdict.NOT_NEEDED

_BUCKETS = "mics communicates a block at a time; there are no buckets to size"
_FETCH = "one block is gathered ahead of its use; what is gathered is not bounded by numbers"
_PRECISION = "bf16 needs no loss scale; a step that is not finite is skipped by all ranks"
_SUMS = "gradients are reduced in fp32, and averaged over all ranks"
_NVME = "nothing is kept on NVMe"
_MONITOR = "metrics.jsonl and log.* record the run"
_ZEROPP = "ZeRO++ sends fewer bits; mics sends what FSDP2 sends, inside a partition group"
_PROFILER = "MFU is on every step line; `mics simulate` predicts a step"
_DATA = "mics train has its own data loading, [data]"
_REMOVED = "DeepSpeed has removed it too"
_SAVE = "every checkpoint loads at any number of ranks, and `mics export` gathers the weights"
_LOG = "see log.every"
_PIPE = "mics shards data parallelism; there is no pipeline"
_TENSOR = "mics train has no tensor parallelism; a loop of your own names the mesh's other axes"
_EXPERT = "mics train shards experts as other weights; a loop of your own puts them on meshes"
_ACTIVATIONS = "one switch for all blocks; there is no partitioning between tensor-parallel ranks"
_DEFAULTS = "FSDP2 has ways of its own, with nothing to set"
_OFFLOAD = "offload_policy=CPUOffloadPolicy() of mics.shard in a loop of your own has no such dials"

_Z = "zero_optimization."
_TABLE: tuple[tuple[Verdict, str, Kind, tuple[str, ...]], ...] = (
    (
        *(_U, _BUCKETS, "number"),
        tuple(_Z + n for n in ("reduce_bucket_size", "allgather_bucket_size", "allgather_size")),
    ),
    (
        *(_U, _FETCH, "number"),
        tuple(
            _Z + prefix + name
            for prefix in ("", "stage3_")
            for name in (
                *("prefetch_bucket_size", "max_live_parameters", "max_reuse_distance"),
                *("param_persistence_threshold", "model_persistence_threshold"),
                "module_granularity_threshold",
            )
        ),
    ),
    (_U, "blocks are units of the optimizer too", "number", (_Z + "sub_group_size",)),
    (
        *(_U, _DEFAULTS, "truth"),
        tuple(
            _Z + name
            for name in (
                *("contiguous_gradients", "reduce_scatter", "allgather_partitions"),
                *("overlap_comm", "use_multi_rank_bucket_allreduce", "round_robin_gradients"),
                *("ignore_unused_parameters", "legacy_stage1", "memory_efficient_linear"),
                *("override_module_apply", "pipeline_loading_checkpoint", "compute_grad_norm"),
                *("log_trace_cache_warnings", "enable_sanity_checks", "parameter_alignment"),
                *("stage3_use_all_reduce_for_fetch_params", "use_all_reduce_for_fetch_params"),
                *("stage3_allgather_sequential", "allgather_sequential"),
                "save_muon_momentum_buffer_in_memory",
            )
        ),
    ),
    (
        *(_U, _SAVE, "truth"),
        tuple(
            _Z + name
            for name in (
                *("elastic_checkpoint", "load_from_fp32_weights"),
                *(
                    "stage3_gather_16bit_weights_on_model_save",
                    "gather_16bit_weights_on_model_save",
                ),
                "stage3_gather_fp16_weights_on_model_save",
            )
        ),
    ),
    (
        *(_N, _ZEROPP, "truth"),
        tuple(
            _Z + name
            for name in (
                *("zero_quantized_weights", "zero_quantized_gradients"),
                "zero_quantized_nontrainable_weights",
            )
        ),
    ),
    (_N, _ZEROPP, "any", (_Z + "zeropp_loco_param.*",)),
    (_N, "no update is hidden or delayed", "any", (_Z + "zenflow.*",)),
    (
        _U,
        "fully_shard of a module makes it one unit; mics.shard(blocks=...) names them",
        "any",
        (_Z + "leaf_module.*",),
    ),
    (
        *(_N, _OFFLOAD, "any"),
        tuple(
            f"{_Z}{section}.{name}"
            for section in ("offload_param", "offload_optimizer")
            for name in (
                *("buffer_count", "buffer_size", "max_in_cpu", "pin_memory", "pipeline"),
                *("pipeline_read", "pipeline_write", "fast_init", "ratio", "super_offload"),
                "cpuadam_cores_perc",
            )
        ),
    ),
    (
        *(_N, _NVME, "any"),
        (
            _Z + "offload_param.nvme_path",
            _Z + "offload_optimizer.nvme_path",
            "aio.*",
        ),
    ),
    (_N, _OFFLOAD, "any", (_Z + "cpu_offload_use_pin_memory",)),
    (
        *(_U, _PRECISION, "number"),
        tuple(
            f"fp16.{name}"
            for name in (
                *("loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis"),
                "min_loss_scale",
            )
        ),
    ),
    (_U, _PRECISION, "truth", ("fp16.consecutive_hysteresis",)),
    (_U, "blocks compute in parallel.dtype, inputs are cast", "truth", ("fp16.auto_cast",)),
    (
        *(_N, "weights and gradients are kept in fp32", "truth"),
        (
            *("fp16.fp16_master_weights_and_grads", "bf16.bf16_master_weights_and_grads"),
            "bf16.bf16_optimizer_states",
        ),
    ),
    (
        *(_U, "gradients are added up in fp32 shards at once", "truth"),
        ("bf16.immediate_grad_update",),
    ),
    (
        *(_U, "a step that is not finite is skipped by all ranks", "truth"),
        ("bf16.check_grad_overflow", "bf16.check_overflow"),
    ),
    (_N, "blocks compute wholly in parallel.dtype", "any", ("torch_autocast.*",)),
    (_N, f"{_REMOVED}; parallel.dtype is bf16 or fp32", "any", ("amp.*",)),
    (
        *(_U, _SUMS, "any"),
        (
            *("communication_data_type", "seq_parallel_communication_data_type"),
            *("fp32_allreduce", "allreduce_always_fp32", "data_types.grad_accum_dtype"),
            *("prescale_gradients", "gradient_predivide_factor", "ddp_bf16"),
        ),
    ),
    (
        _N,
        "parallel.dtype for all blocks; buffers keep their own",
        "any",
        ("data_types.param_dtype", "data_types.buffer_dtype", "data_types.keep_in_fp32_modules"),
    ),
    (_N, "gradients of tables are dense", "any", ("sparse_gradients", "sparse_attention.*")),
    (_U, _DEFAULTS, "any", ("disable_allgather", "disable_python_gc", "legacy_fusion")),
    (
        *(_U, "every optimizer of torch works on shards", "truth"),
        (
            *("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"),
            "optimizer.legacy_fusion",
        ),
    ),
    (
        *(_N, _ACTIVATIONS, "any"),
        tuple(
            f"activation_checkpointing.{name}"
            for name in (
                *("partition_activations", "partitioned_activations", "number_checkpoints"),
                *("contiguous_memory_optimization", "synchronize_checkpoint_boundary", "profile"),
            )
        ),
    ),
    (
        *(_U, _LOG, "any"),
        (*("wall_clock_breakdown", "memory_breakdown", "dump_state", "log_level", "timers.*"),),
    ),
    (_U, _MONITOR, "any", ("csv_monitor.*", "comet.*")),
    (_U, _MONITOR, "any", ("tensorboard.output_path", "tensorboard.job_name")),
    (_U, _MONITOR, "any", ("wandb.group", "wandb.team")),
    (_U, _PROFILER, "any", ("flops_profiler.*",)),
    (_U, "bytes of every link are counted without it: mics.ledger", "any", ("comms_logger.*",)),
    (_U, "`mics plan` ranks every p by time and price", "any", ("autotuning.*",)),
    (_N, "parallel.compile compiles each block", "any", ("compile.*",)),
    (
        *(_U, "a checkpoint loads at any world size; `mics run` begins again", "any"),
        ("elasticity.*", "checkpoint.*", "datastates.*", "nebula.*"),
    ),
    (
        *(_N, _DATA, "any"),
        ("data_efficiency.*", "curriculum_learning.*", "dataloader_drop_last"),
    ),
    (_N, "models are trained as they are", "any", ("compression_training.*", "eigenvalue.*")),
    (_N, "models are trained as they are", "any", ("quantize_training.*", "weight_quantization.*")),
    (_N, "models are trained as they are", "any", ("progressive_layer_drop.*",)),
    (_N, "mics trains, it does not generate", "any", ("hybrid_engine.*", "graph_harvesting")),
    (_N, _PIPE, "any", ("pipeline.*",)),
    (_N, _TENSOR, "any", ("tensor_parallel.*", "autotp_size", "sequence_parallel_size")),
    (_N, _EXPERT, "any", ("expert_parallel.*", "use_data_before_expert_parallelism")),
    (_U, "presets take the tokenizer's", "any", ("vocabulary_size",)),
    (_U, "a launcher's matter", "any", ("data_parallel_group", "global_rank")),
    (
        _N,
        "mics.micro_step says which micro-step is last",
        "any",
        ("managed_gradient_accumulation",),
    ),
    (_N, "trained with torch's optimizer alone", "any", ("optimizer.params.*",)),
)
RULES = {name: Rule(verdict, why, kind) for verdict, why, kind, names in _TABLE for name in names}
"""The rule of every field that is not converted, by its path."""

CONVERTED = (
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
    *("gradient_clipping", "steps_per_print", "optimizer.type", "optimizer.params.lr"),
    *("optimizer.params.betas", "optimizer.params.eps", "optimizer.params.weight_decay"),
    *("scheduler.type", "fp16.enabled", "bf16.enabled", "zero_optimization.stage"),
    *("zero_optimization.mics_shard_size", "zero_optimization.mics_hierarchical_params_gather"),
    *("zero_optimization.zero_hpz_partition_size", "zero_optimization.offload_param.device"),
    *("zero_optimization.offload_optimizer.device", "gradient_allreduce_op"),
    *("activation_checkpointing.cpu_checkpointing", "tensorboard.enabled", "wandb.enabled"),
    *("wandb.project", "scheduler.params.warmup_num_steps", "scheduler.params.total_num_steps"),
)
"""Names that are converted, for the nearest of a misspelt one."""
