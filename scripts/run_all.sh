#!/usr/bin/env bash
# The whole chain, stage by stage: prepare_data, train_cpt (where sft.yaml goes on from it), train_sft, train_orpo,
# train_dpo, eval_harness, infer_compare, export_lora (of each training), report.
#
#   bash scripts/run_all.sh --dry-run                           all plans in order; exit 0 if the chain would work
#   bash scripts/run_all.sh                                     run; what is complete and unchanged is skipped
#   bash scripts/run_all.sh --from train_orpo --to eval_harness
#   bash scripts/run_all.sh --configs configs/demo              the YAML files of another directory
#   bash scripts/run_all.sh --accelerate configs/accelerate/ddp.yaml
#   bash scripts/run_all.sh --then 'shutdown now'               at the end, after a failure too; $POSTTRAIN_EXIT is the code
#
# Each stage is planned with plain python before it is launched, because `accelerate launch` turns every exit code into
# 1. It stops at the first failure with that stage's own code: 2 yours to mend, 3 does not fit, 4 a check failed, 130
# interrupted. What a stage prints is also in outputs/logs/.
set -uo pipefail
cd "$(dirname "$0")/.."

dry=false from="" to="" configs=configs then_command="" accelerate=configs/accelerate/single.yaml

usage() { sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "$0"; }
fault() { echo "run_all: $*" >&2; exit 2; }

while [ $# -gt 0 ]; do
    case "$1" in
        --dry-run)
            dry=true
            case "${2:-}" in true | false) dry="$2"; shift ;; esac ;;
        --dry-run=true | --dry-run=false) dry="${1#*=}" ;;
        --from | --to | --configs | --then | --accelerate)
            [ $# -gt 1 ] || fault "$1 needs a value"
            case "$1" in
                --from) from="$2" ;; --to) to="$2" ;; --configs) configs="${2%/}" ;;
                --then) then_command="$2" ;; --accelerate) accelerate="$2" ;;
            esac
            shift ;;
        -h | --help) usage; exit 0 ;;
        *) fault "unknown option '$1' (known: --dry-run, --from, --to, --configs, --accelerate, --then, --help)" ;;
    esac
    shift
done

if [ -x .venv/bin/python ]; then python=.venv/bin/python; else python=python; fi
logs=outputs/logs

# Stage and the YAML it reads. A stage without its YAML in the directory is left out, and that is said.
order=("prepare_data data" "train_sft sft" "train_orpo orpo" "train_dpo dpo" "eval_harness eval" "infer_compare compare"
    "export_lora sft" "export_lora orpo" "export_lora dpo" "report report")
# train_cpt belongs to the chain where sft.yaml goes on from it: cpt_run, or model.base for a full one, is its output_dir.
cpt_run=$(sed -n 's/^output_dir: *\([^ #]*\).*/\1/p' "$configs/cpt.yaml" 2>/dev/null)
[ -n "$cpt_run" ] && grep -Eqs "^[^#]*(cpt_run|base): *$cpt_run([ ,}]|\$)" "$configs/sft.yaml" &&
    order=("${order[0]}" "train_cpt cpt" "${order[@]:1}")
[ -f "$configs/make_demo.yaml" ] && order=("make_demo make_demo" "${order[@]}")

stages=$(printf '%s\n' "${order[@]}" | cut -d' ' -f1 | uniq | tr '\n' ' ')
[ -d "$configs" ] || fault "--configs $configs: no such directory"
for name in $from $to; do
    case " $stages" in *" $name "*) ;; *) fault "'$name' is no stage of this chain (stages: $stages)" ;; esac
done

chain=() wanted=$([ -z "$from" ] && echo yes || echo no) seen_to=no
for step in "${order[@]}"; do
    stage=${step% *} file=$configs/${step#* }.yaml
    [ "$stage" = "$from" ] && wanted=yes
    [ "$seen_to" = yes ] && [ "$stage" != "$to" ] && wanted=no
    [ "$stage" = "$to" ] && seen_to=yes
    [ "$wanted" = yes ] || continue
    if [ -f "$file" ]; then chain+=("$stage $file"); else echo "run_all: no $file, so $stage is left out"; fi
done
[ ${#chain[@]} -gt 0 ] || fault "nothing to do: --from $from comes after --to $to, or $configs holds no YAML of a stage"

summary=()
finish() { # the end of the script, whatever the way
    local code=$?
    trap - EXIT INT TERM
    [ ${#summary[@]} -gt 0 ] && printf '\n=== run_all: summary ===\n' && printf '  %s\n' "${summary[@]}"
    if [ -n "$then_command" ]; then
        if [ "$dry" = true ]; then
            echo "  at the end, whatever the exit code: $then_command"
        else
            echo "run_all: exit $code; now: $then_command"
            POSTTRAIN_EXIT=$code bash -c "$then_command"
        fi
    fi
    exit "$code"
}
trap finish EXIT
trap 'exit 130' INT TERM

# ---------------------------------------------------------------------- dry run

if [ "$dry" = true ]; then
    worst=0
    for step in "${chain[@]}"; do
        read -r stage file <<<"$step"
        plan=$("$python" -m "scripts.$stage" --config "$file" --dry-run 2>&1)
        code=$?
        printf '%s\n\n' "$plan"
        verdict=$(printf '%s\n' "$plan" | sed -n 's/^verdict: //p' | tail -n 1)
        summary+=("$(printf '%-14s %-28s %s' "$stage" "$file" "${verdict:-exit $code}")")
        [ "$code" -gt "$worst" ] && worst=$code
    done
    if [ "$worst" = 0 ]; then summary+=("the chain would work"); else summary+=("the chain would stop (exit $worst)"); fi
    exit "$worst"
fi

# ---------------------------------------------------------------------- run

run_code() { # the exit code that a launched stage left in its status.json after the given second; nothing if none
    "$python" - "$1" "$2" "$3" <<'PYTHON'
import json, sys
from datetime import datetime
from posttrain.config import load_config
from posttrain.stages import STAGES
config = load_config(STAGES[sys.argv[1]], sys.argv[2]).config
try:
    status = json.loads((config.output_dir / "status.json").read_text())
except (OSError, ValueError):
    status = None
if status and status["exit_code"] and datetime.fromisoformat(status["time"]).timestamp() >= float(sys.argv[3]):
    print(status["exit_code"])
PYTHON
}

mkdir -p "$logs"
for step in "${chain[@]}"; do
    read -r stage file <<<"$step"
    log=$logs/$(date +%Y%m%d-%H%M%S)-$stage-$(basename "$file" .yaml).log
    printf '\n=== %s --config %s   (log: %s) ===\n' "$stage" "$file" "$log"
    "$python" -m "scripts.$stage" --config "$file" --dry-run >"$log" 2>&1
    code=$?
    if [ "$code" = 0 ]; then
        command=("$python" -m "scripts.$stage" --config "$file")
        case "$stage" in
            train_*) command=("$python" -m accelerate.commands.launch --config_file "$accelerate" -m "scripts.$stage"
                --config "$file") ;;
        esac
        began=$(date +%s)
        "${command[@]}" 2>&1 | tee -ia "$log" # -i: Ctrl-C is for the stage, which then saves its state
        code=${PIPESTATUS[0]}
        if [ "$code" = 1 ]; then
            real=$(run_code "$stage" "$file" "$began")
            code=${real:-1}
        fi
    else
        cat "$log" # the plan says what is in the way
    fi
    if [ "$code" != 0 ]; then
        summary+=("$(printf '%-14s %-28s stopped (exit %s), log: %s' "$stage" "$file" "$code" "$log")")
        again="bash scripts/run_all.sh --from $stage"
        [ "$configs" != configs ] && again="$again --configs $configs"
        summary+=("mend it, then go on with: $again")
        exit "$code"
    fi
    summary+=("$(printf '%-14s %-28s done' "$stage" "$file")")
done
