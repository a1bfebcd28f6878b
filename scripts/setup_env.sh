# The environment of a shell that runs posttrain. Source it; it cannot do its work as a program of its own.
#
#   source scripts/setup_env.sh --dry-run false                       set, and print what is set
#   source scripts/setup_env.sh --dry-run                             print only
#   source scripts/setup_env.sh --mirror https://my.mirror            another mirror of Hugging Face
#   source scripts/setup_env.sh --mirror none                         no mirror: huggingface.co itself
#   source scripts/setup_env.sh --hf-home /data/hf                    where downloaded bases are kept
#
# A value that is already set is kept, unless an option names another. Sourcing it twice changes nothing. bash and zsh.

_posttrain_env() {
    local root="$1" dry=false mirror="" hf_home="" cores threads
    shift
    while [ $# -gt 0 ]; do
        case "$1" in
            --dry-run)
                dry=true
                case "${2:-}" in true | false) dry="$2"; shift ;; esac ;;
            --dry-run=true | --dry-run=false) dry="${1#*=}" ;;
            --mirror) mirror="${2:-}"; [ $# -gt 1 ] && shift ;;
            --hf-home) hf_home="${2:-}"; [ $# -gt 1 ] && shift ;;
            *)
                echo "setup_env.sh: unknown option '$1' (known: --dry-run [true|false], --mirror URL|none, --hf-home DIR)" >&2
                return 2 ;;
        esac
        shift
    done
    case "$mirror" in
        "" | none | http://* | https://*) ;;
        *) echo "setup_env.sh: --mirror '$mirror': expected an address such as https://hf-mirror.com, or none" >&2; return 2 ;;
    esac

    if [ "$mirror" = none ]; then
        echo "  HF_ENDPOINT               (unset: huggingface.co itself)"
        if [ "$dry" = false ]; then unset HF_ENDPOINT HF_HUB_DISABLE_XET; fi
    else
        _posttrain_set HF_ENDPOINT "${mirror:-${HF_ENDPOINT:-https://hf-mirror.com}}" "the mirror of Hugging Face"
        # Xet hands out addresses that a mirror does not cover (huggingface_hub issue 4475); plain HTTP goes through it.
        _posttrain_set HF_HUB_DISABLE_XET "${HF_HUB_DISABLE_XET:-1}" "large files by plain HTTP, through the mirror"
    fi
    if [ -z "$hf_home" ] && [ -z "${HF_HOME:-}" ] && [ -d /root/autodl-tmp ]; then
        hf_home=/root/autodl-tmp/huggingface # AutoDL: the system disk is small and the data disk is mounted there
    fi
    _posttrain_set HF_HOME "${hf_home:-${HF_HOME:-${XDG_CACHE_HOME:-$HOME/.cache}/huggingface}}" "downloaded bases"
    _posttrain_set HF_HUB_DOWNLOAD_TIMEOUT "${HF_HUB_DOWNLOAD_TIMEOUT:-30}" "seconds; the default of 10 is short for a mirror"
    _posttrain_set HF_HUB_DISABLE_TELEMETRY "${HF_HUB_DISABLE_TELEMETRY:-1}" "the hub's library reports nothing"
    _posttrain_set TOKENIZERS_PARALLELISM "${TOKENIZERS_PARALLELISM:-false}" "no deadlock when worker processes fork"
    cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
    threads=$((cores > 16 ? 8 : (cores + 1) / 2))
    _posttrain_set OMP_NUM_THREADS "${OMP_NUM_THREADS:-$threads}" "CPU threads of one process"
    if [ -f "$root/.venv/bin/activate" ] && [ -z "${VIRTUAL_ENV:-}" ] && [ "${CONDA_DEFAULT_ENV:-base}" = base ]; then
        echo "  .venv                     activated: python is $root/.venv/bin/python"
        if [ "$dry" = false ]; then . "$root/.venv/bin/activate"; fi
    fi
    if [ "$dry" = true ]; then echo "dry run: nothing was set"; fi
}

_posttrain_set() { # name, value, why; `dry` is _posttrain_env's
    printf '  %-25s %s   (%s)\n' "$1" "$2" "$3"
    if [ "$dry" = false ]; then export "$1=$2"; fi
}

if [ -n "${ZSH_VERSION:-}" ]; then
    eval '_posttrain_file=${(%):-%x}'
    case "$ZSH_EVAL_CONTEXT" in *:file*) _posttrain_sourced=yes ;; *) _posttrain_sourced=no ;; esac
else
    _posttrain_file="${BASH_SOURCE[0]}"
    if [ "$_posttrain_file" = "$0" ]; then _posttrain_sourced=no; else _posttrain_sourced=yes; fi
fi
if [ "$_posttrain_sourced" = no ]; then
    echo "setup_env.sh sets variables of your shell, so it must be sourced:  source scripts/setup_env.sh $*" >&2
    exit 2
fi
_posttrain_code=0
_posttrain_env "$(cd "$(dirname "$_posttrain_file")/.." && pwd)" "$@" || _posttrain_code=$?
unset -f _posttrain_env _posttrain_set
unset _posttrain_file _posttrain_sourced
eval "unset _posttrain_code; return $_posttrain_code" # the number is read before the variable goes
