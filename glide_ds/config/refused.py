"""DeepSpeed's keys that are refused, each with the reason and what to do: for errors and for docs/config.md.

tests/test_deepspeed_keys.py holds that every key that DeepSpeed's own models know is either here or passed on.
"""

from __future__ import annotations

from collections.abc import Iterator

_OFFLOAD = (
    "the masters must stay on the rank's device, where clipping by role and checkpoints take them; remove it"
)
_STAGE_3 = "it belongs to ZeRO-3, and this trainer to ZeRO-2, where it does nothing; remove it"
_LAYOUT = (
    "it changes how ZeRO's flat buffers are laid out, and checkpoints for any number of ranks rest on that"
)
_PRECISION = "masters and moments of a bf16 training are fp32 here, and so are its checkpoints; remove it"
_MONITOR = "the trainer writes metrics.jsonl, and with log.tensorboard TensorBoard's files; remove it"
_OTHER = "it is a feature of DeepSpeed's that this trainer does not build on, so it would do nothing; remove it"
_QUANTIZED = "it rounds what ranks send each other, with kernels that are not tested here; remove it"
_FOLLOWS = "it follows from train_batch_size, train_micro_batch_size_per_gpu and the number of ranks; remove it"
_SILENCED = "DeepSpeed's own lines are silenced; remove it"
_COMMENT = "JSON has no comments; remove it, or write the file as --config run.yaml, where # begins one"

# By the dotted name; a name that ends in * stands for all that begin so.
REFUSED: dict[str, str] = {
    "fp16": "GLIDE overflows in fp16; remove it (fp32 with TF32 is the default) or use bf16",
    "amp": "apex is not supported; remove it or use bf16",
    "bfloat16": "it is an old name; use bf16",
    "torch_autocast": "precision is train.precision or bf16; remove it or use bf16",
    "data_types": "gradients add up in fp32 as it is; remove it",
    "gradient_accumulation_steps": _FOLLOWS,
    "managed_gradient_accumulation": _FOLLOWS,
    "activation_checkpointing": "that section belongs to DeepSpeed's reentrant checkpointing, which loses gradients "
    "here; remove it and use train.recompute in the glide_ds block",
    "tensorboard": "the trainer writes its own; remove it and use log.tensorboard in the glide_ds block",
    "wandb": _MONITOR,
    "csv_monitor": _MONITOR,
    "comet": _MONITOR,
    "steps_per_print": f"{_SILENCED} and use log.every in the glide_ds block",
    "dump_state": f"{_SILENCED}: run.json and the opening block say what is run",
    "comms_logger": f"{_SILENCED}: communication_share in metrics.jsonl says what share of a step collectives take",
    "log_level": _SILENCED,
    "timers": f"{_SILENCED}, or use wall_clock_breakdown",
    "zero_allow_untested_optimizer": "DeepSpeed takes both optimizers without it; remove it",
    "zero_force_ds_cpu_optimizer": "it belongs to offloading, which this trainer does not do; remove it",
    "checkpoint": "the trainer commits its own checkpoints, which load on any number of ranks; remove it and use "
    "checkpoint in the glide_ds block, by --config or --set too",
    "checkpoint_parallel_write_pipeline": "every rank writes its own files as it is; remove it",
    "load_universal_checkpoint": "checkpoints load on any number of ranks as they are; remove it",
    "elasticity": "a run resumes on any number of ranks that divides train_batch_size as it is; remove it",
    "gradient_allreduce_op": "a sum over the ranks would be another learning rate on each number of them; remove it",
    "seq_parallel_communication_data_type": "pictures are not split along a sequence; remove it",
    "disable_allgather": "the weights must be gathered after a step; remove it",
    "sparse_gradients": "no gradient here is sparse; remove it",
    "disable_python_gc": "DeepSpeed would leave garbage collection off for the whole process; remove it",
    "dataloader_drop_last": "the trainer has its own loader; remove it and use data.drop_last in the glide_ds block",
    "data_efficiency": "the trainer has its own order of data; remove it",
    "curriculum_learning": "the trainer has its own order of data; remove it",
    "compile": "it would compile the whole model; remove it and use train.compile in the glide_ds block",
    **dict.fromkeys(
        [
            "aio",
            "autotuning",
            "comms",
            "compression_training",
            "datastates_ckpt",
            "eigenvalue",
            "expert_parallel",
            "graph_harvesting",
            "hybrid_engine",
            "nebula",
            "pipeline",
            "progressive_layer_drop",
            "quantize_training",
            "sparse_attention",
            "tensor_parallel",
            "use_data_before_expert_parallelism",
            "vocabulary_size",
            "weight_quantization",
        ],
        _OTHER,
    ),
    "_*": _COMMENT,
    "//*": _COMMENT,
    "comment*": _COMMENT,
    "bf16.immediate_grad_update": _PRECISION,
    "bf16.check_grad_overflow": "an update that is not finite is skipped in any case; remove it",
    "bf16.bf16_master_weights_and_grads": _PRECISION,
    "bf16.bf16_optimizer_states": _PRECISION,
    "flops_profiler.strict": _OTHER,
    "zero_optimization.round_robin_gradients": f"{_LAYOUT}: weights would be scrambled on another number of ranks, "
    "and in bf16 on the same; remove it",
    "zero_optimization.parameter_alignment": f"{_LAYOUT}; remove it",
    "zero_optimization.elastic_checkpoint": "checkpoints load on any number of ranks without it; remove it",
    "zero_optimization.legacy_stage1": "it is gone from DeepSpeed; remove it",
    "zero_optimization.load_from_fp32_weights": "masters are always loaded from the checkpoint's fp32; remove it",
    "zero_optimization.allgather_partitions": "DeepSpeed gathers the weights in one way only; remove it",
    "zero_optimization.compute_grad_norm": "norms are computed by role (train.adapter_clipping); remove it",
    "zero_optimization.cpu_offload*": _OFFLOAD,
    "zero_optimization.offload_*": _OFFLOAD,
    "zero_optimization.zenflow": _OFFLOAD,
    "zero_optimization.zeropp_loco_param": "it is gone from DeepSpeed; remove it",
    "zero_optimization.zero_quantized_*": _QUANTIZED,
    "zero_optimization.save_muon_momentum_buffer_in_memory": "there is no Muon here; remove it",
    **{
        f"zero_optimization.{name}": _STAGE_3
        for name in [
            "stage3_*",
            "mics_*",
            "prefetch_bucket_size",
            "param_persistence_threshold",
            "model_persistence_threshold",
            "max_live_parameters",
            "max_reuse_distance",
            "gather_16bit_weights_on_model_save",
            "module_granularity_threshold",
            "use_all_reduce_for_fetch_params",
            "allgather_sequential",
            "sub_group_size",
            "zero_hpz_partition_size",
            "memory_efficient_linear",
            "pipeline_loading_checkpoint",
            "override_module_apply",
            "log_trace_cache_warnings",
            "leaf_module",
            "enable_sanity_checks",
        ]
    },
}


def why_refused(name: str) -> str | None:
    """The reason to refuse a key of DeepSpeed's, by its dotted name, and what to do; None for a name not known here."""
    if exact := REFUSED.get(name):
        return exact
    return next((why for key, why in REFUSED.items() if key[-1] == "*" and name.startswith(key[:-1])), None)


def refusals() -> Iterator[tuple[str, str]]:
    """(names, reason): what is refused for the same reason together."""
    by_reason: dict[str, list[str]] = {}
    for name, why in REFUSED.items():
        by_reason.setdefault(why, []).append(name)
    for why, names in by_reason.items():
        yield ", ".join(f"`{name}`" for name in names), why
