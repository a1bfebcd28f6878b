#!/usr/bin/env bash
# The whole chain on the embedded tiny model: no hub, no GPU, no account. Under five minutes on two cores.
#
#   make demo              the same, with .venv made first
#   bash scripts/demo.sh
#
# Everything lies under outputs/demo/; what is complete and unchanged is skipped. What a stage prints in full is in
# outputs/demo/logs/. Stops at the first failure with that stage's exit code.
set -uo pipefail
cd "$(dirname "$0")/.."

if [ -x .venv/bin/python ]; then python=.venv/bin/python; else python=python; fi
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # a second thread makes matrices of this size slower
logs=outputs/demo/logs
mkdir -p "$logs"

stage() { # stage NAME CONFIG [PATTERN]: run it; of what it prints show the lines that match
    local began=$SECONDS log="$logs/$1_$2.log" code
    printf '\n== %s (configs/demo/%s.yaml)\n' "$1" "$2"
    "$python" -u -m "scripts.$1" --config "configs/demo/$2.yaml" 2>&1 | tee "$log" |
        grep --line-buffered -E "${3:-.}|nothing to do|set aside" | sed -u 's/^/   /'
    code=${PIPESTATUS[0]}
    if [ "$code" -ne 0 ]; then
        [ -n "${3:-}" ] && tail -n 20 "$log" >&2
        echo "demo: $1 ended with exit code $code; all it said: $log" >&2
        exit "$code"
    fi
    printf '   %s s\n' $((SECONDS - began))
}

steps='kept|steps =|validation|done' # of a training: its rows, its length, the validation losses, the end
stage make_demo make_demo
stage prepare_data data
stage train_sft sft "$steps"
stage train_orpo orpo "$steps"
stage train_dpo dpo "$steps"
stage eval_harness eval '^(task|demo_|sft_test|pref_test)'
stage infer_compare compare '^(group|recall|corrected|unseen|infer_compare)'
stage export_lora orpo
stage report report
$python -m scripts.report --config configs/demo/report.yaml --verify | sed 's/^/   /' || exit

cat <<END

The table: before (Base) and after (SFT, then ORPO or DPO) on the same items. recall is learned facts in words never
seen. corrected is facts that the SFT conversations teach wrongly and the preference pairs put right. unseen_facts and
unseen_sums were in no training row, and a model of a million parameters does not know them.
Whole answers side by side: outputs/demo/report/report.html. All of it took $SECONDS seconds.
Talk to it: $python -m scripts.infer_compare --config configs/demo/compare.yaml --chat ORPO
END
