"""The only room that touches what DeepSpeed (0.19, pinned in pyproject.toml) and torch.distributed do not document.

What is used, by file; what for; and what fails where it changes. tests/test_layout.py holds that no other file touches
such a name and that each private one is listed here; the tests named fail where its meaning changes.

engine.py          tests/training/test_engine.py, test_bf16.py
  ZERO_SUPPORTED_OPTIMIZERS            our optimizers are no "untested" ones: else initialize refuses them
  _update_model_bit16_weights          no-op: parameters stay views of the flat buffer; else slower, the same numbers
  should_refresh_expected_hook_count   off: our backward goes through the engine; else 15 ms per pass
  single_partition_of_fp32_groups      the rank's fp32 masters: start values, averages, checkpoints would be wrong
  bit16_groups                         a group's parameters in the order of the flat buffer: the same
  parallel_partitioned_bit16_groups    the flat buffers by rank: a lone rank's masters share them; else 4 B/parameter
  _link_all_hp_params                  what hangs on the parameters follows the shared masters; else memory
  contiguous_gradients, _grad_acc_hooks, _use_compact_grad_partition_buffer, _get_compact_grad_partition_slice,
  get_param_id, get_gradient_for_reduction, clear_grad_attribute, reduce_independent_p_g_buckets_and_remove_grads
                                       a lone rank's gradients stay where backward put them; else wrong gradients
  dp_process_group                     the ranks that reduce together
  ZERO_ATTRIBUTES, ENGINE_HOOKS        what keeps an engine alive after destroy() (issue 7204); else memory grows
  __dynamo_disable (torch)             optimizers stay out of compiled graphs unasked; else 4 s of imports
clipping.py        test_engine.py, test_stability.py
  scaled_global_norm, unscale_and_clip_grads, averaged_gradients
                                       replaced: norms by role; else all roles are clipped together
  check_grad_overflow, check_overflow  off: the norm says it; else bf16 skips updates without a word to the guard
  _foreach_norm (torch)                all norms of a list by one launch; else slower
ema.py             test_ema.py
  update_lp_params, overflow           publishing an average into the module; which updates were skipped
  _foreach_lerp_ (torch)               the average by one launch; else slower
power.py           test_ema.py
  overflow, single_partition_of_fp32_groups
                                       as in ema.py
  _foreach_lerp_ (torch)               the same
stored.py          test_elastic.py, test_ranks.py, tests/test_export.py
  bit16_groups, single_partition_of_fp32_groups, lr_scheduler, global_steps, global_samples, skipped_steps
                                       what a checkpoint holds beside the module and the optimizer's own state_dict
  DeepSpeed's files of before: module, param_shapes, frozen_param_fragments, lr_scheduler, counters,
  optimizer_state_dict with base_optimizer_state and single_partition_of_fp32_groups; else old runs can't go on
snapshot.py        test_checkpoint.py, test_stability.py
  _cdata (torch)                       which storage a tensor lies in; else storages are copied more than once
group.py           tests/training/test_run.py, test_ranks_stop.py, the Slurm tests
  __compatible_ops__                   no JIT build of a shared-memory extension; else 22 to 49 s, or a failure
  compiler.compile                     DeepSpeed's Muon is not compiled at its import; else 4 s
  _set_pg_timeout, _world (torch)      run.timeout_s for groups that DeepSpeed makes; else a lost link hangs 30 min
  _get_default_store (torch)           the store that the ranks met at, for the saver's threads
"""
