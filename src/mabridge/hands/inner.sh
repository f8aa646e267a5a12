# The agent's own shell: it runs the commands that hands.sh is given, one after another.
#
# No function stands around its commands, or their variables would be local. Only names with __mab_ are ours, and
# `command` keeps the agent's functions out of our way. The loop runs with whatever options the agent has set (-e -u -f
# -C): each line of it must bear that.
#
# What survives the shell is a snapshot of its variables, directory and options after every call. bash can write its
# functions down too. Another shell cannot: it leaves a copy of itself, a spare, after each command that may define some,
# and the spare takes the place of the shell when that has ended.

if [ -z "${__mab_S-}" ]; then
    __mab_program=$0
    __mab_D=${0%/*}
    __mab_S=$__mab_D/shells/$1
    __mab_C=$__mab_D/calls
    __mab_pid=$$
    __mab_epoch=
    { IFS= read -r __mab_epoch < "$__mab_S/epoch"; } 2>/dev/null
    { IFS= read -r __mab_token < "$__mab_D/token"; } 2>/dev/null || __mab_token=
    unset MAB_EXEC
    set --
    __mab_snapshot() {
        # shellcheck disable=SC3044,SC3045 # bash's own
        if [ -n "${BASH_VERSION-}" ]; then
            { declare -p; declare -f; alias -p; set +o; shopt -p; umask -p; } >| "$__mab_S/state.$__mab_next"
        else
            { set; export -p; command printf 'umask '; umask; set +o; } >| "$__mab_S/state.$__mab_next"
        fi 2> /dev/null
        command pwd >| "$__mab_S/dir.$__mab_next" 2> /dev/null
        # The last line makes it whole. The one before stays until then: this shell may be killed at any moment.
        command printf ': %s\n' "$__mab_turn" >> "$__mab_S/state.$__mab_next"
        __mab_turn=$((__mab_turn + 1)) __mab_next=$((1 - __mab_next))
    }
    # Write a process and its start, in ticks after boot, to a file. The second field of its stat may hold spaces.
    __mab_note() {
        { IFS= command read -r __mab_line < "/proc/$1/stat"; } 2>/dev/null || __mab_line='0 (x) x 0'
        __mab_line=${__mab_line##*) }
        __mab_count=0
        while [ "$__mab_count" -lt 19 ]; do
            __mab_line=${__mab_line#* } __mab_count=$((__mab_count + 1))
        done
        command printf '%s %s\n' "$1" "${__mab_line%% *}" >| "$2"
    }
    # The spare is nobody's child, or the agent's `wait` would wait for it. The one before it is of no use any more.
    __mab_leave_spare() {
        __mab_old=
        { IFS=' ' command read -r __mab_old __mab_rest < "$__mab_S/spare"; } 2>/dev/null || :
        [ "$__mab_old" != "$__mab_pid" ] || __mab_old=
        [ -p "$__mab_S/go" ] || command mkfifo "$__mab_S/go" || return 0
        (
            set +eufC
            trap - EXIT
            __mab_be_spare > /dev/null 2>&1 &
            __mab_note "$!" "$__mab_S/spare"
            [ -z "$__mab_old" ] || command kill -9 "$__mab_old"
        ) > /dev/null 2>&1
    }
    __mab_be_spare() {
        IFS=' ' command read -r __mab_pid __mab_rest < /proc/self/stat
        # The end of the FIFO is none of its business: that is whoever wrote to another spare, and closes it late.
        until [ "$__mab_rest" = go ]; do
            [ -p "$__mab_S/go" ] || exit 0
            __mab_rest=
            command read -r __mab_rest < "$__mab_S/go" || :
        done
        # It may be of a shell that was given up just when it was left.
        __mab_rest=
        { IFS= command read -r __mab_rest < "$__mab_S/epoch"; } 2>/dev/null || :
        [ "$__mab_rest" = "$__mab_epoch" ] || exit 0
        __mab_again=1
        # shellcheck disable=SC1090 # this very file
        . "$__mab_program"
    }
fi

# What the last shell left. Not in a function, where bash would make it all local.
# It holds our own variables as well.
__mab_turn=0 __mab_whole=
for __mab_next in 0 1; do
    [ -e "$__mab_S/state.$__mab_next" ] || continue
    __mab_line=
    while IFS= command read -r __mab_rest; do __mab_line=$__mab_rest; done < "$__mab_S/state.$__mab_next"
    case $__mab_line in ': '*[0-9]) __mab_line=${__mab_line#: } ;; *) continue ;; esac
    case $__mab_line in *[!0-9]*) continue ;; esac
    [ "$__mab_line" -lt "$__mab_turn" ] || __mab_turn=$((__mab_line + 1)) __mab_whole=$__mab_next
done
set -- "$__mab_pid" "${__mab_again-}" "$__mab_turn" "${__mab_whole:-1}"
if [ -n "$__mab_whole" ]; then
    # shellcheck disable=SC1090 # read-only variables refuse, which is as well
    . "$__mab_S/state.$__mab_whole" < /dev/null > /dev/null 2>&1 || :
    { IFS= command read -r __mab_dir < "$__mab_S/dir.$4"; } 2>/dev/null || __mab_dir=/
    command cd -- "$__mab_dir" 2>/dev/null || :
fi
__mab_pid=$1 __mab_again='' __mab_turn=$3 __mab_next=$((1 - $4))
if [ -n "$2" ]; then
    trap '__mab_code=$?; __mab_snapshot; command printf "%s\n" "$__mab_code" >| "$__mab_S/code"' EXIT
    __mab_leave_spare
else
    trap __mab_snapshot EXIT
fi
set --
__mab_note "$__mab_pid" "$__mab_S/inner"
__mab_tag='' __mab_reply=''
while IFS=' ' command read -r __mab_id __mab_tag __mab_reply <&3; do
    { IFS=' ' command read -r __mab_up __mab_rest < /proc/uptime; } 2>/dev/null || __mab_up=0
    { command printf '%s\n' "$__mab_id" >| "$__mab_S/current"; } 2>/dev/null || :
    if [ -s "$__mab_D/asleep" ]; then
        command printf '' >| "$__mab_D/asleep"
        # shellcheck disable=SC2094 # it is a FIFO
        if [ -p "$__mab_D/poke" ]; then command printf '.\n' 1<> "$__mab_D/poke"; fi
    fi
    case $- in *C*) __mab_rest=-C ;; *) __mab_rest=+C ;; esac
    set -C
    { command printf '' > "$__mab_C/$__mab_id.begun"; } 2>/dev/null || __mab_id=
    set "$__mab_rest"
    if [ -z "$__mab_id" ]; then
        # It has begun before: its end is told to whoever else waits for it.
        command printf '' >| "$__mab_S/current"
        # shellcheck disable=SC2094 # it is a FIFO
        if [ -p "$__mab_S/reply.$__mab_reply" ]; then command printf '.\n' 1<> "$__mab_S/reply.$__mab_reply"; fi
        continue
    fi
    { command printf '%s %s %s\n' "$__mab_up" "$__mab_pid" "${!:-0}" >| "$__mab_C/$__mab_id.begun"; } 2>/dev/null || :
    MABRIDGE_CALL=$__mab_id.$__mab_token.
    export MABRIDGE_CALL
    # Not in a condition, where `set -e` would not count.
    # shellcheck disable=SC1090 # the agent's command
    . "$__mab_C/$__mab_id.cmd.$__mab_tag" < /dev/null >> "$__mab_C/$__mab_id.out" 2>&1 3<&-
    __mab_code=$?
    { command printf '%s end .\n' "$__mab_code" >| "$__mab_C/$__mab_id.status"; } 2>/dev/null \
        || command printf '' >| "$__mab_C/$__mab_id.end.$__mab_code"
    # shellcheck disable=SC2094 # it is a FIFO
    if [ -p "$__mab_S/reply.$__mab_reply" ]; then command printf '.\n' 1<> "$__mab_S/reply.$__mab_reply"; fi
    command printf '' >| "$__mab_S/current"
    __mab_snapshot
    # The worker marks, at the end of the tag, a command that may define functions.
    case $__mab_tag in *.f) [ -n "${BASH_VERSION-}" ] || __mab_leave_spare ;; esac
done
