#!/bin/bash
# One training run on hosts that ssh reaches, by DeepSpeed's launcher, with a Ray across them.
#
#   launch/deepspeed.sh HOSTFILE CONFIG [--rollout-hostfile FILE] [--run-dir DIR] [key.sub=value …]
#
# HOSTFILE is DeepSpeed's, a line per host: "node0 slots=8", slots = trainer ranks. FILE names hosts that only generate:
# "node1 slots=4 gpus=4", slots = CPUs for rollout workers; without it the first ones generate, too: on the CPU, or, if
# rollout.placement is shared, on the GPUs of their ranks.
# Interpreter, code and run folder are at the same place on all hosts. The same command again goes on with the run.
set -euo pipefail

readonly started_at=$EPOCHSECONDS
# whoever is lost without a word is given up after 30 s; ssh by itself would wait for ever
readonly ssh_options="-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=10 -o ServerAliveCountMax=3"
readonly STOP_SECONDS=60                 # for Ray to be gone
# of this environment; nothing secret, for it can be read on a command line
readonly PASSED_ON='^(PYTHON.*|RAY_.*|GLOO_.*|NCCL_.*|HF_H.*|OMP_.*|DS_ACCELERATOR|LD_LIBRARY_PATH|ASA_TRAINER_HOSTS)$'
readonly NOT_PASSED_ON='TOKEN$|PASSWORD|SECRET|KEY$'
python=$(command -v python) || python=$(command -v python3)

main() {
    pipes=()
    parse "$@"
    trap clean_up EXIT
    trap 'stop 130' INT
    trap 'stop 143' TERM
    trap 'stop 129' HUP
    trap : PIPE
    # a config that cannot be used is refused before anything starts
    "$python" -m asa_dist.cli train "$config" "${overrides[@]}" --run-dir "$run_dir" --dry-run >/dev/null
    find_placement
    mkdir -p "$run_dir"
    resolve_config
    work=$(mktemp -d /tmp/asa-launch-XXXXXXXXXX)  # mode 700
    head=${trainers[0]}
    readonly port=$((20000 + RANDOM % 6000 * 2))  # below the ports that Linux hands out by itself
    readonly ray_head=$head:$((port + 1))
    write_environment
    start_ray_everywhere
    (
        close_pipes
        on "$head" "$python" -m asa_dist.rollout.ray_hosts wait --head "$ray_head" --timeout-seconds 120 \
            "${trainers[@]}" "${rollouts[@]}" </dev/null
    ) &
    training=$!
    wait_for "${#ray[@]}"
    local options=("$run_dir/launch.yaml" --run-dir "$run_dir" --ray-address "$ray_head")
    run_ranks asa_dist.preflight "${options[@]}" ${rollouts:+--rollout-hosts "${rollouts[@]}"}
    has_begun=yes
    run_ranks asa_dist.train "${options[@]}" --resume --started-at "$started_at"
}

find_placement() {
    local found
    found=$("$python" -c 'import sys; from asa_dist.config import load_config
config = load_config(sys.argv[1], sys.argv[2:])
print(config.rollout.placement, config.train.gpus)' "$config" "${overrides[@]}")
    read -r placement train_gpus <<<"$found"
    [[ $placement == separate || -z $rollout_hostfile ]] \
        || usage "rollout.placement shared: every host trains and generates, in turns: leave out --rollout-hostfile"
}

resolve_config() {  # for the ranks: pdsh would have every host's shell read the overrides, brackets and all
    local partial=$run_dir/.launch.yaml.$$
    "$python" -c 'import sys; from asa_dist.config import dump_config, load_config
print(dump_config(load_config(sys.argv[1], sys.argv[2:])), end="")' "$config" "${overrides[@]}" >"$partial"
    mv "$partial" "$run_dir/launch.yaml"
}

run_ranks() {  # run_ranks MODULE ARGUMENT …
    (
        close_pipes
        # a session of its own: at the first Ctrl-C the launcher would kill every DeepSpeed run of this user there
        PDSH_SSH_ARGS_APPEND=$ssh_options DS_ENV_FILE=$work/environment exec setsid \
            "$python" -m deepspeed.launcher.runner --hostfile "$hostfile" --force_multi --master_addr "$head" \
            --master_port "$port" --no_local_rank --module "$@"
    ) &
    training=$!
    wait_for "${#trainers[@]}"  # one that only generates may be lost
}

wait_for() {  # wait_for NUMBER: for $training; the end of Ray on one of the first so many hosts is its end, too
    local code=0 index hosts=("${trainers[@]}" "${rollouts[@]}")
    while kill -0 "$training" 2>/dev/null; do
        for ((index = 0; index < $1; index++)); do
            if ! kill -0 "${ray[index]}" 2>/dev/null; then
                echo "asa: ${hosts[index]} is lost, or Ray has ended there: see above" >&2
                return 1
            fi
        done
        sleep 1
    done
    wait "$training" || code=$?
    training=
    return "$code"
}

# shellcheck disable=SC2329  # called by a trap
stop() {  # the first signal asks for a checkpoint and the end, the next one ends all at once
    if [[ -z ${has_begun:-} || -n ${is_stopping:-} ]]; then exit "$1"; fi
    is_stopping=yes
    echo "launch/deepspeed.sh" >"$run_dir/stop" || touch "$run_dir/stop"  # a full disk has room for an empty file
    echo "asa: finishing the step and writing a checkpoint (once more to stop at once)" >&2
}

usage() {
    sed -n '2,/^set/{s/^# \{0,1\}//;/^set/d;p}' "$0" >&2
    echo "launch/deepspeed.sh: $1" >&2
    exit 2
}

parse() {
    local positional=() file twice line
    overrides=() rollout_hostfile="" run_dir=""
    while (($# > 0)); do
        case $1 in
            --rollout-hostfile | --run-dir)
                (($# > 1)) || usage "$1 needs a value"
                if [[ $1 == --run-dir ]]; then run_dir=$2; else rollout_hostfile=$2; fi
                shift
                ;;
            -*) usage "unknown option $1" ;;
            *=*) overrides+=("$1") ;;
            *) positional+=("$1") ;;
        esac
        shift
    done
    ((${#positional[@]} == 2)) || usage "needs HOSTFILE and CONFIG"
    for file in "${positional[@]}" ${rollout_hostfile:+"$rollout_hostfile"}; do
        [[ -f $file ]] || usage "no such file: $file"
    done
    hostfile=$(realpath "${positional[0]}") config=$(realpath "${positional[1]}")
    run_dir=$(realpath -m "${run_dir:-runs/$(basename "${config%.*}")}")
    mapfile -t trainers < <(lines_of "$hostfile" | awk '{print $1}')
    rollouts=()
    if [[ -n $rollout_hostfile ]]; then
        ! line=$(lines_of "$rollout_hostfile" | grep -Ev '[[:space:]]slots=[0-9]+([[:space:]]|$)') \
            || usage "$rollout_hostfile: no slots=N in: $line"
        mapfile -t rollouts < <(lines_of "$rollout_hostfile" | awk '{print $1}')
    fi
    ((${#trainers[@]} > 0)) || usage "no host in $hostfile"
    [[ $run_dir =~ ^[A-Za-z0-9_./+@:,-]+$ ]] || usage "run folder $run_dir: not all its characters reach every host"
    twice=$(printf '%s\n' "${trainers[@]}" "${rollouts[@]}" | sort | uniq -d | grep .) || true
    [[ -z $twice ]] || usage "named twice in the hostfiles: $twice"
}

lines_of() { sed 's/#.*//' "$@" | grep '[^[:space:]]'; }  # of hostfiles, without comments

value_of() {  # value_of KEY LINE: of "slots=8" in a line of a hostfile; 0 if it is not there
    [[ " $2 " =~ [[:space:]]$1=([0-9]+)[[:space:]] ]] && echo "${BASH_REMATCH[1]}" || echo 0
}

write_environment() {  # what DeepSpeed and ssh do not pass on by themselves; they put it on command lines: no secret
    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$work/token RAY_USAGE_STATS_ENABLED=0 RAY_IGNORE_UNHANDLED_ERRORS=1
    ASA_TRAINER_HOSTS=$(IFS=, && echo "${trainers[*]}")  # for messages
    export ASA_TRAINER_HOSTS
    environment=()
    local name
    for name in $(compgen -e | grep -E "$PASSED_ON" | grep -Ev "$NOT_PASSED_ON"); do
        environment+=("$name=${!name}")
    done
    printf '%s\n' "${environment[@]}" >"$work/environment"
}

on() {  # on HOST COMMAND … &: by ssh, in this folder, with the environment of the run
    # shellcheck disable=SC2029,SC2086  # quoted for there already; the options are words
    exec ssh $ssh_options "$1" "cd $(printf %q "$PWD") && exec env $(printf '%q ' "${environment[@]}" "${@:2}")"
}

start_ray_everywhere() {
    local line cpus=0 gpus=0
    token=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
    ray=()
    while read -r line <&3; do
        if [[ -z $rollout_hostfile ]]; then cpus=$(value_of slots "$line"); fi
        if [[ $placement == shared ]] && ((train_gpus > 0)); then gpus=$cpus; fi  # one for each rank
        start_ray "${line%%[[:space:]]*}" "$cpus" "$gpus"
    done 3< <(lines_of "$hostfile")
    [[ -n $rollout_hostfile ]] || return 0
    while read -r line <&3; do
        start_ray "${line%%[[:space:]]*}" "$(value_of slots "$line")" "$(value_of gpus "$line")"
    done 3< <(lines_of "$rollout_hostfile")
}

start_ray() {  # start_ray HOST CPUS GPUS
    echo "asa: $1: Ray with $2 CPUs and $3 GPUs for rollout workers"
    local pipe="$work/${#pipes[@]}"
    mkfifo -m 600 "$pipe"
    (
        close_pipes
        on "$1" "$python" -m asa_dist.rollout.ray_hosts start --head "$ray_head" --num-cpus "$2" --num-gpus "$3" \
            --gpus-per-host "$3" --token-from-stdin <"$pipe"
    ) &
    ray+=($!)
    exec {pipe}>"$pipe"  # the token goes in here; a host's Ray ends when this script does, however: then it is closed
    echo "$token" >&"$pipe" || true  # ssh has ended already: wait_for says so
    pipes+=("$pipe")
}

close_pipes() {  # of this shell, or of a child that must not hold them
    local pipe
    for pipe in "${pipes[@]}"; do exec {pipe}>&-; done
}

# shellcheck disable=SC2329  # called by a trap
clean_up() {
    local code=$? second
    trap '' INT TERM
    if [[ -n ${training:-} ]]; then kill -TERM "$training" 2>/dev/null || true; fi
    close_pipes
    for ((second = 0; second < STOP_SECONDS; second++)); do
        [[ -n $(jobs -rp) ]] || break
        sleep 1
    done
    # shellcheck disable=SC2046  # process ids are words
    kill $(jobs -rp) 2>/dev/null || true
    if [[ -n ${work:-} ]]; then rm -rf "$work"; fi
    exit "$code"
}

main "$@"
