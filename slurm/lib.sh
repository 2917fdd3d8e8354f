# shellcheck shell=bash
# What train.sbatch and submit_phases.sh share. The working directory is the project's root.
# shellcheck source=slurm/site.env
. slurm/site.env
export PATH=$PWD/.venv/bin:$PATH PYTHONUNBUFFERED=1
read -ra container <<<"$GLIDE_CONTAINER"
read -ra srun_options <<<"$GLIDE_SRUN_OPTIONS"

say() { echo "slurm: $(date +%T) $*"; }
die() { # CODE LINE…
  local code=$1
  shift
  printf 'slurm: %s\n' "$@" >&2
  exit "$code"
}

# Everything a launch needs to know, from Slurm's variables and train.py's arguments "$@".
prepare() {
  run_dir=$("${container[@]}" python slurm/run_directory.py "$@") || exit $?
  folder=$run_dir/slurm/$SLURM_JOB_ID
  mkdir -p "$folder"
  rm -f "$folder"/*.code
  printf '%s\0' "$@" >"$folder/arguments"
  mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  local host
  for host in "${hosts[@]}"; do
    # An unknown name is otherwise tried again for over ten minutes.
    getent hosts "$host" >/dev/null ||
      die 1 "node $host has no address on $(hostname), so its ranks would wait for each other in vain" \
        "remedy: have it added to the DNS or /etc/hosts, or leave it out with sbatch --exclude=$host"
  done
  # Whole nodes come with all their GPUs, so what was asked for goes first; it may have a type: a100:8.
  local gpus=${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
  per_node=${GLIDE_RANKS_PER_NODE:-${gpus##*:}}
  ranks=$((${#hosts[@]} * per_node))
  export MASTER_ADDR=${hosts[0]}
  export MASTER_PORT=$((15000 + SLURM_JOB_ID % 15000)) # below the ports that Linux hands out by itself
  printf "%s slots=$per_node\n" "${hosts[@]}" >"$folder/hostfile"
  if grep -qs "^slurm" "$run_dir/STOP"; then rm -f "$run_dir/STOP"; fi # a job's that was killed
}

# `glide-ds preflight` on all ranks, before the job's first start: disks, data, the network, one real step.
preflight() {
  if [ "$GLIDE_PREFLIGHT" != 1 ] || [ "${SLURM_RESTART_COUNT:-0}" != 0 ]; then return; fi
  say "preflight"
  local code=0
  (on_each_rank "${container[@]}" python -m glide_ds preflight "$@" \
    --nodes="${#hosts[@]}" --gpus="$per_node" --hostfile="$folder/hostfile") || code=$?
  case $code in
    0) ;;
    2) die 2 "preflight found what would stop the run: see above; GLIDE_PREFLIGHT=0 starts without it" ;;
    *) conclude ;; # it was ended from outside
  esac
}

# Both become srun, in the place of the shell that calls them: no shell between Slurm's signals and the ranks.
on_each_rank() {
  exec srun --label --kill-on-bad-exit=1 --ntasks="$ranks" --ntasks-per-node="$per_node" \
    --cpus-per-task=$((SLURM_CPUS_ON_NODE / per_node)) "${srun_options[@]}" "$@"
}

on_each_node() {
  exec srun --label --kill-on-bad-exit=1 --ntasks="${#hosts[@]}" --ntasks-per-node=1 \
    --cpus-per-task="$SLURM_CPUS_ON_NODE" "${srun_options[@]}" "$@"
}

# Start the ranks, by the launcher that site.env names. Its own process: see on_each_rank.
launch() {
  case $GLIDE_LAUNCHER in
    srun) on_each_rank "${container[@]}" bash slurm/rank.sh "$folder" ;;
    torchrun)
      on_each_node "${container[@]}" torchrun --nnodes="${#hosts[@]}" --nproc-per-node="$per_node" --no-python \
        --rdzv-backend=c10d --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT" --rdzv-id="$SLURM_JOB_ID" \
        bash slurm/rank.sh "$folder"
      ;;
    deepspeed)
      # The node's number is known to the task alone, so the task's shell reads it.
      # shellcheck disable=SC2016
      on_each_node "${container[@]}" bash -c 'exec deepspeed --hostfile "$0/hostfile" --no_ssh \
        --node_rank="$SLURM_NODEID" --master_addr="$MASTER_ADDR" --master_port="$MASTER_PORT" \
        --no_python --no_local_rank bash slurm/rank.sh "$0"' "$folder"
      ;;
    *) die 2 "GLIDE_LAUNCHER=$GLIDE_LAUNCHER is none of srun, torchrun, deepspeed; correct slurm/site.env" ;;
  esac
}

# Wait for the launch $1. Once a rank has failed it has GLIDE_GIVE_UP_S seconds: srun waits without end for the
# end of a task on a node that it can't reach. A trapped signal ends bash's `wait`, not the process.
await() {
  local failed=''
  while kill -0 "$1" 2>/dev/null; do
    sleep 1 &
    wait $! || true
    if [ -z "$failed" ] && grep -qsv '^0$' "$folder"/*.code; then failed=$SECONDS; fi
    if [ -n "$failed" ] && [ $((SECONDS - failed)) -ge "$GLIDE_GIVE_UP_S" ]; then
      say "a rank failed $GLIDE_GIVE_UP_S s ago and the launch hasn't ended: killing it"
      kill -KILL "$1"
      wait "$1" || true
      return
    fi
  done
}

# Ask the ranks for a checkpoint and an end: Slurm's warning comes to the batch shell alone.
ask_to_stop() {
  say "$1: asking the run to stop"
  asked=1
  echo "slurm job $SLURM_JOB_ID: $1" >"$run_dir/STOP"
}

# What became of the ranks, in one word. Launchers' own exit codes are unreliable, so files say it:
# done; stopped (well, by Slurm's wish); user (well, by a person's stop file); mistake; unstable; lost.
verdict() {
  local code codes=() path
  for path in "$folder"/*.code; do
    [ -e "$path" ] && codes+=("$(<"$path")")
  done
  for code in "${codes[@]}"; do
    case $code in 2) echo mistake && return ;; 3) echo unstable && return ;; esac
  done
  if [ -e "$run_dir/STOPPED.json" ]; then
    if grep -q '"reason": "stop_file"' "$run_dir/STOPPED.json" && [ -z "$asked" ]; then echo user; else echo stopped; fi
  elif [ ${#codes[@]} = "$ranks" ] && ! [[ ${codes[*]} == *[!0\ ]* ]]; then
    echo "done"
  else
    echo lost
  fi
}

# The checkpoints committed last of all phases, as one line: not those of the highest steps, which may be damaged, so
# that the run went on before them.
progress() {
  local manifest phase
  declare -A found=()
  for manifest in "$run_dir"/*/step-????????/manifest.json; do # in the order of their steps
    phase=${manifest#"$run_dir"/} phase=${phase%%/*}
    if [ -e "$manifest" ] && [ ! "$manifest" -ot "${found[$phase]:-}" ]; then found[$phase]=$manifest; fi
  done
  local steps=("${found[@]%/manifest.json}")
  steps=("${steps[@]#"$run_dir"/}")
  echo "${steps[*]:-no checkpoint}"
}

# End the job, or send it back to the queue.
conclude() {
  local verdict
  verdict=$(verdict)
  if [ -n "$asked" ]; then rm -f "$run_dir/STOP"; fi
  case $verdict in
    done) say "done" && exit 0 ;;
    user) die 1 "stopped by a person's stop file: submit the job again to go on" ;;
    mistake) die 2 "a mistake that a restart doesn't mend: see the message above" ;;
    unstable) die 3 "stopped by the stability guard: see its report in $run_dir" ;;
    stopped) requeue "stopped well" ;;
    lost)
      # One restart is free; after it, a failure at the same place would only repeat itself.
      if [ -e "$folder/failed_at" ] && [ "$(<"$folder/failed_at")" = "$(progress)" ]; then
        die 1 "a second failure without a newer checkpoint than $(progress)" \
          "remedy: read the ranks' logs in $folder, mend the cause and submit the job again"
      fi
      progress >"$folder/failed_at"
      requeue "ranks were lost (exit codes: $(cat "$folder"/*.code 2>/dev/null | sort | uniq -c | xargs))"
      ;;
  esac
}

job() { scontrol --oneliner show job "$SLURM_JOB_ID"; }

# Whether a person's scancel ends the job. Slurm calls that COMPLETING, as it does every end; where it has a reason
# of its own (the time limit, a lost node, a preemption) it says so.
cancelled() {
  local job
  job=$(job)
  [[ $job == *JobState=CANCELLED* ]] ||
    [[ $job == *"JobState=COMPLETING Reason=None"* && $job == *PreemptTime=None* ]]
}

requeue() {
  ! cancelled || die 1 "$1; cancelled by a person, so not requeued"
  [ "${SLURM_RESTART_COUNT:-0}" -lt "$GLIDE_MAX_RESTARTS" ] ||
    die 1 "$1, after GLIDE_MAX_RESTARTS=$GLIDE_MAX_RESTARTS restarts: submit the job again if that is meant"
  say "$1 at $(progress): requeued"
  # After a node's failure and at a preemption Slurm may have done it already.
  scontrol requeue "$SLURM_JOB_ID" || [[ $(job) == *JobState=PENDING* ]] ||
    die 1 "Slurm refused to requeue the job: submit it again to go on"
  exec sleep 60 # Slurm ends this script
}
