# Killing a call with all that it started. A part of hands.sh, which has what it calls.

# Whether a process carries the mark in its environment. Shells read over the NULs in it.
is_marked() {
    while IFS= read -r line || [ -n "$line" ]; do
        case $line in *"$mark"*) return 0 ;; esac
    done < "/proc/$1/environ"
    return 1
} 2>/dev/null

# Whether process $1, just looked at, is a subshell of the shell's own that has lost its parent, as those of a fork bomb
# do: it is in the shell's session, carries no mark of any call, and is not the shell's spare.
is_orphan() {
    [ "$ppid" -eq 1 ] && [ "$session" = "$own_session" ] || return 1
    for file in "$D"/shells/*/spare; do
        { IFS=' ' read -r pid _ < "$file"; } 2>/dev/null && [ "$pid" = "$1" ] && return 1
    done
    own_mark=$mark mark=MABRIDGE_CALL=
    is_marked "$1" && marked=1 || marked=''
    mark=$own_mark
    [ -z "$marked" ]
}

# What of a call's processes is still there: all that carry its mark, and all below its shell ($2) that are no older than
# the call, for a subshell of the shell itself carries no mark. The call began at tick $3 of the clock, which ticks a
# hundred times a second, and after the background job $4.
find_processes() {
    # Where the shell is not known, there is only the mark to go by: below process 0 is every process of the machine.
    found=' ' below=" $2 " grew=1
    [ "$2" -gt 1 ] || grew=0
    [ -n "$token" ] || return 0
    mark=MABRIDGE_CALL=$1.$token.
    inner=$2 ticks=$3 job=$4 own_session=none
    [ "$grew" = 0 ] || ! look "$inner" || own_session=$session
    set -- /proc/[0-9]*
    # Where a fork bomb has taken every process there may be, grep could not be started. It is faster with many.
    # shellcheck disable=SC2046 # words are what is wanted
    [ "$#" -le 600 ] || set -- $(grep -lsF "$mark" /proc/[0-9]*/environ 2>/dev/null)
    for f in "$@"; do
        f=${f#/proc/}
        f=${f%/environ}
        [ "$f" != "$inner" ] && is_marked "$f" && look "$f" && [ "$state" != Z ] && found="$found$f "
    done
    while [ "$grew" = 1 ]; do
        grew=0
        for f in /proc/[0-9]*; do
            f=${f#/proc/}
            look "$f" || continue
            case $below in *" $f "*) continue ;; esac
            case $below in *" $ppid "*) ;; *) is_orphan "$f" || continue ;; esac
            [ "$since" -gt "$ticks" ] || { [ "$since" -eq "$ticks" ] && [ "$f" -gt "$job" ]; } || continue
            below="$below$f " grew=1
            case $found in *" $f "*) ;; *) [ "$state" = Z ] || found="$found$f " ;; esac
        done
    done
}

kill_call() {
    [ -d "$C" ] || return 0
    is_done "$1" && return 0
    token=''
    { IFS= read -r token < "$D/token"; } 2>/dev/null
    printf '%s\n' "$2" >| "$C/$1.why"
    if begin_first "$1"; then
        settle "$1" 130 "$2"
        return 0
    fi
    up='' shell='' job=''
    { IFS=' ' read -r up shell job < "$C/$1.begun"; } 2>/dev/null
    ticks=${up%.*}${up#*.}
    case $ticks$job in *[!0-9]*) ticks='' job='' ;; esac
    # The shell that has it: a process is only taken for one where its start is the one on record.
    inner=0
    for file in "$D"/shells/*/inner; do
        runs "$file" || continue
        id=''
        { IFS= read -r id < "${file%inner}current"; } 2>/dev/null
        if [ "$pid" = "$shell" ] || { [ -z "$shell" ] && [ "$id" = "$1" ]; }; then inner=$pid; fi
    done
    # A line that goes on after its command was killed would start the next one.
    [ "$inner" -eq 0 ] || kill -STOP "$inner" 2>/dev/null
    pass=0
    while [ "$pass" -lt 100 ]; do
        pass=$((pass + 1))
        find_processes "$1" "$inner" "${ticks:-0}" "${job:-0}"
        [ "$found" != ' ' ] || break
        # Stopped first: a shell among them would tell of the others' end in the output.
        # shellcheck disable=SC2086 # a list of pids
        kill -STOP $found 2>/dev/null
        # shellcheck disable=SC2086
        kill -9 $found 2>/dev/null
    done
    [ "$inner" -eq 0 ] || kill -9 "$inner" 2>/dev/null
    tries=0
    until is_done "$1" || [ ! -d "$C" ]; do
        tries=$((tries + 1))
        # Its keeper is gone too, and nobody else will say how it ended.
        [ "$tries" -le 20 ] || settle "$1" 137 "$2"
        pause
    done
}
