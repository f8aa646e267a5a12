# mabridge's hands: shells that outlive whoever gave them work, and a journal of what they did.
#
# Runs in the sandbox, under any POSIX sh. It lies in a directory of its own, with calls/ (the journal) and shells/:
#
#   calls/ID.cmd.TAG   the command, as somebody submitted it     calls/ID.ready    TAG: which of them counts
#   calls/ID.begun     uptime, shell's pid, its last job's       calls/ID.out      its output so far
#   calls/ID.status    exit code, how it ended, and a dot         calls/ID.reply    a FIFO to poke at its end
#   calls/ID.why       why somebody killed it                     calls/ID.gone     all was forgotten but that it was
#   shells/NAME/in     FIFO of the ids to run     shells/NAME/keeper.N, inner    pid and start of its processes
#   shells/NAME/state.0, state.1    what survives the shell; shells/NAME/state tells which of the two is whole
#
#   token              tells the marks of this sandbox's processes from another's, where they share a machine
#
# A shell is two processes: the inner one runs the commands, and the keeper starts it again whenever it has ended.
# The hot path forks nothing but the command: what looks clumsy below is done with builtins for that.
#
# What is begun exactly once is decided by who creates ID.begun (O_EXCL, by `set -C`). Everything else may be repeated.
# The inner loop runs with whatever options the agent has set (-e -u -f -C): each line of it must bear that.

D=${0%/*}
C=$D/calls

# Fills state, ppid and since (start, in ticks after boot) from /proc/PID/stat. Its second field may hold spaces.
look() {
    { IFS= read -r line < "/proc/$1/stat"; } 2>/dev/null || return 1
    IFS=' '
    set -f
    # shellcheck disable=SC2086 # the fields are to be split
    set -- ${line##*) }
    set +f
    state=$1 ppid=$2
    shift 19
    since=$1
}

# Whether the process that a file tells of, as "pid start", is the one that wrote it. A pid alone is soon another's.
runs() {
    pid='' began=''
    { IFS=' ' read -r pid began < "$1"; } 2>/dev/null || return 1
    [ -n "$began" ] && look "$pid" && [ "$since" = "$began" ] && [ "$state" != Z ]
}

# A status may be read while it is written: it is whole when it ends with a dot.
is_done() {
    status=''
    { IFS= read -r status < "$C/$1.status"; } 2>/dev/null
    case $status in *.) return 0 ;; esac
    [ -e "$C/$1.gone" ] && status='0 forgotten .'
}

# Write the status of a call, and poke whoever waits for it. Opened for reading too, a FIFO never blocks.
settle() {
    printf '%s %s .\n' "$2" "$3" >| "$C/$1.status"
    reply=''
    { IFS= read -r reply < "$C/$1.reply"; } 2>/dev/null
    # shellcheck disable=SC2094 # it is a FIFO
    if [ -p "$reply" ]; then printf '.\n' 1<> "$reply"; fi
}

pause() { sleep 0.05 2>/dev/null || sleep 1; }

# Start the keeper of a shell, out of reach of whoever kills what this process has started: in a session of its own, and
# without the variable by which adapters mark their processes.
start() {
    S=$D/shells/$1
    lives && return 0
    # Not -p: where the whole sandbox was removed, nothing of it is to come back.
    { [ -d "$S" ] || mkdir "$S" 2>/dev/null || [ -d "$S" ]; } || return 1
    { [ -p "$S/in" ] || mkfifo "$S/in" 2>/dev/null || [ -p "$S/in" ]; } || return 1
    (
        unset MAB_EXEC
        if command -v setsid > /dev/null 2>&1; then exec setsid sh "$0" keep "$1"; fi
        trap '' HUP
        exec sh "$0" keep "$1"
    ) < /dev/null > /dev/null 2>&1 &
    tries=0
    until lives; do
        tries=$((tries + 1))
        [ "$tries" -le 100 ] || return 1
        pause
    done
}

# Whether the shell has a keeper. There is one for good: the next is keeper.N+1, which only one can create, and only
# when keeper.N is dead.
generation=0
lives() {
    [ "$generation" -gt 0 ] && runs "$S/keeper.$generation" && return 0
    for file in "$S"/keeper.*; do
        case ${file##*.} in *[!0-9]*) continue ;; esac
        [ "${file##*.}" -le "$generation" ] || generation=${file##*.}
    done
    # An empty one is just being written.
    tries_empty=0
    while [ -e "$S/keeper.$generation" ] && [ ! -s "$S/keeper.$generation" ] && [ "$tries_empty" -lt 20 ]; do
        tries_empty=$((tries_empty + 1))
        pause
    done
    runs "$S/keeper.$generation"
}

keep() {
    S=$D/shells/$1
    # A handler, and not '': what is ignored here would be ignored by every command.
    trap : HUP INT TERM
    lives && return 0
    exec 3<> "$S/in"
    look $$ || since=0
    set -C
    { printf '%s %s\n' $$ "$since" > "$S/keeper.$((generation + 1))"; } 2>/dev/null || return 0
    set +C
    rm -f "$S/keeper.$generation"
    if runs "$S/inner"; then kill -9 "$pid" 2>/dev/null; fi
    while :; do
        if command -v bash > /dev/null 2>&1; then
            TERM=dumb bash --noprofile --norc "$0" inner "$1"
        else
            TERM=dumb sh "$0" inner "$1"
        fi
        code=$?
        id=''
        { IFS= read -r id < "$S/current"; } 2>/dev/null
        if [ -n "$id" ] && ! is_done "$id"; then
            why=died
            { IFS= read -r why < "$C/$id.why"; } 2>/dev/null
            settle "$id" "$code" "$why"
        else
            # It did not get as far as a call: perhaps no process can be had now.
            [ -d "$S" ] || return 0
            pause
        fi
        : >| "$S/current"
    done
}

# Say which of the commands that were submitted for a call is the one. The first stands: $1 id, $2 tag.
publish() {
    set -C
    { printf '%s\n' "$2" > "$C/$1.ready"; } 2>/dev/null
    set +C
}

begin_first() {
    set -C
    { printf '0 0 0\n' > "$C/$1.begun"; } 2>/dev/null
    won=$?
    set +C
    return $won
}

# What of a call's processes is still there: all that carry its mark, and all below its shell ($2) that are no older than
# the call, for a subshell of the shell itself carries no mark. The call began at tick $3 of the clock, which ticks a
# hundred times a second, and after the background job $4.
find_processes() {
    found=' ' below=" $2 " grew=1
    # shellcheck disable=SC2013 # words are what is wanted
    for f in $(grep -ls "MABRIDGE_CALL=$1\\.$token\\." /proc/[0-9]*/environ 2>/dev/null); do
        f=${f#/proc/}
        f=${f%/environ}
        [ "$f" = "$2" ] || { look "$f" && [ "$state" != Z ] && found="$found$f "; }
    done
    while [ "$grew" = 1 ]; do
        grew=0
        for f in /proc/[0-9]*; do
            f=${f#/proc/}
            look "$f" || continue
            case $below in *" $f "*) continue ;; esac
            case $below in *" $ppid "*) ;; *) continue ;; esac
            [ "$since" -gt "$3" ] || { [ "$since" -eq "$3" ] && [ "$f" -gt "$4" ]; } || continue
            below="$below$f " grew=1
            case $found in *" $f "*) ;; *) [ "$state" = Z ] || found="$found$f " ;; esac
        done
    done
}

kill_call() {
    is_done "$1" && return 0
    token=''
    { IFS= read -r token < "$D/token"; } 2>/dev/null
    printf '%s\n' "$2" >| "$C/$1.why"
    if begin_first "$1"; then
        settle "$1" 130 "$2"
        return 0
    fi
    up='' inner=0 job=0
    { IFS=' ' read -r up inner job < "$C/$1.begun"; } 2>/dev/null
    ticks=${up%.*}${up#*.}
    # A line that goes on after its command was killed would start the next one.
    [ "$inner" -gt 0 ] && kill -STOP "$inner" 2>/dev/null
    pass=0
    while [ "$pass" -lt 20 ]; do
        pass=$((pass + 1))
        find_processes "$1" "$inner" "${ticks:-0}" "${job:-0}"
        [ "$found" != ' ' ] || break
        # Stopped first: a shell among them would tell of the others' end in the output.
        # shellcheck disable=SC2086 # a list of pids
        kill -STOP $found 2>/dev/null
        # shellcheck disable=SC2086
        kill -9 $found 2>/dev/null
    done
    [ "$inner" -gt 0 ] && kill -9 "$inner" 2>/dev/null
    tries=0
    until is_done "$1"; do
        tries=$((tries + 1))
        # Its keeper is gone too, and nobody else will say how it ended.
        [ "$tries" -le 20 ] || settle "$1" 137 "$2"
        pause
    done
}

answer() {
    [ ! -s "$C/$2.out" ] || head -c "$HEAD" "$C/$2.out"
    printf '\n%s %s\n' "$1" "$status"
}

# What is left of a call is that it was: an empty file.
forget() {
    for id in "$@"; do
        : >| "$C/$id.gone"
        rm -f "$C/$id".[!g]*
    done
}

HEAD=131072
case ${1-} in
start) start "$2" ;;
keep) keep "$2" ;;
kill) kill_call "$2" "$3" ;;
restart)
    begin_first "$2" || exit 0
    start "$3" || exit 1
    : >| "$S/state"
    if runs "$S/inner"; then kill -9 "$pid"; fi
    settle "$2" 0 end
    ;;
tail)
    # $2 nonce, $3 id, $4 bytes
    size=$(wc -c < "$C/$3.out")
    tail -c "$4" "$C/$3.out"
    printf '\n%s %s .\n' "$2" $((size))
    ;;
once)
    # One round trip: $2 nonce, $3 id, $4 shell, $5 seconds at most, and ids to forget. The command is on stdin.
    cat >| "$C/$3.cmd.$2"
    publish "$3" "$2"
    if ! is_done "$3"; then
        start "$4" || exit 1
        # shellcheck disable=SC2094 # it is a FIFO
        [ -e "$C/$3.begun" ] || printf '%s\n' "$3" 1<> "$S/in"
        IFS='. ' read -r now _ < /proc/uptime
        until=$((now + $5))
        until is_done "$3"; do
            if [ "$now" -ge "$until" ]; then
                printf '\n%s running .\n' "$2"
                exit 0
            fi
            lives || kill_call "$3" lost
            pause
            IFS='. ' read -r now _ < /proc/uptime
        done
    fi
    answer "$2" "$3"
    shift 5
    forget "$@"
    ;;
channel)
    # Requests on stdin, one at a time: "NONCE ID LINES [ID to forget]...", and then the lines of the command.
    start "$2" || exit 1
    R=$S/reply.$$
    mkfifo "$R" || exit 1
    trap 'rm -f "$R"' EXIT
    exec 4<> "$R"
    while IFS=' ' read -r nonce id lines drop; do
        while [ "$lines" -gt 0 ] && IFS= read -r line; do
            printf '%s\n' "$line"
            lines=$((lines - 1))
        done >| "$C/$id.cmd.$nonce"
        publish "$id" "$nonce"
        printf '%s\n' "$R" >| "$C/$id.reply"
        if ! is_done "$id"; then
            start "$2" || exit 1
            # shellcheck disable=SC2094 # it is a FIFO
            [ -e "$C/$id.begun" ] || printf '%s\n' "$id" 1<> "$S/in"
            # A poke may come for an earlier call: what counts is the status, looked at again after each.
            until is_done "$id"; do IFS= read -r _ <&4; done
        fi
        answer "$nonce" "$id"
        IFS=' '
        # shellcheck disable=SC2086 # a list of ids
        [ -z "$drop" ] || forget $drop
    done
    ;;
inner)
    # From here on, this is the agent's own shell: no function around its commands, or their variables would be local.
    # Only names with __mab_ are ours, and `command` keeps the agent's functions out of our way.
    __mab_S=$D/shells/$2
    __mab_C=$C
    __mab_next=0
    look $$ || since=0
    printf '%s %s\n' $$ "$since" >| "$__mab_S/inner"
    unset -f runs is_done settle pause start lives keep publish begin_first find_processes kill_call answer forget look
    { IFS= read -r __mab_token < "$D/token"; } 2>/dev/null || __mab_token=
    { IFS= read -r __mab_whole < "$__mab_S/state"; } 2>/dev/null || __mab_whole=
    unset D C HEAD generation line state ppid since pid began status MAB_EXEC
    if [ -n "$__mab_whole" ]; then
        { IFS= read -r __mab_dir < "$__mab_S/dir.$__mab_whole"; } 2>/dev/null || __mab_dir=/
        # shellcheck disable=SC1090 # what the last shell left; read-only variables refuse, which is as well
        . "$__mab_S/state.$__mab_whole" < /dev/null > /dev/null 2>&1 || :
        cd -- "$__mab_dir" 2>/dev/null || :
        { IFS= read -r __mab_next < "$__mab_S/state"; } 2>/dev/null || :
        __mab_next=$((1 - ${__mab_next:-0}))
    fi
    __mab_snapshot() {
        # shellcheck disable=SC3044,SC3045 # bash's own
        if [ -n "${BASH_VERSION-}" ]; then
            { declare -p; declare -f; alias -p; set +o; shopt -p; umask -p; } >| "$__mab_S/state.$__mab_next"
        else
            { set; export -p; printf 'umask '; umask; set +o; } >| "$__mab_S/state.$__mab_next"
        fi 2> /dev/null
        command pwd >| "$__mab_S/dir.$__mab_next" 2> /dev/null
        command printf '%s\n' "$__mab_next" >| "$__mab_S/state"
        __mab_next=$((1 - __mab_next))
    }
    trap __mab_snapshot EXIT
    while IFS= command read -r __mab_id <&3; do
        { IFS=' ' command read -r __mab_up __mab_rest < /proc/uptime; } 2>/dev/null || __mab_up=0
        command printf '%s\n' "$__mab_id" >| "$__mab_S/current"
        case $- in *C*) __mab_rest=-C ;; *) __mab_rest=+C ;; esac
        set -C
        { command printf '%s %s %s\n' "$__mab_up" $$ "${!:-0}" > "$__mab_C/$__mab_id.begun"; } 2>/dev/null || __mab_id=
        set "$__mab_rest"
        [ -n "$__mab_id" ] || continue
        __mab_tag=
        { IFS= command read -r __mab_tag < "$__mab_C/$__mab_id.ready"; } 2>/dev/null || :
        MABRIDGE_CALL=$__mab_id.$__mab_token.
        export MABRIDGE_CALL
        # Not in a condition, where `set -e` would not count.
        # shellcheck disable=SC1090 # the agent's command
        . "$__mab_C/$__mab_id.cmd.$__mab_tag" < /dev/null > "$__mab_C/$__mab_id.out" 2>&1 3<&-
        __mab_code=$?
        command printf '%s end .\n' "$__mab_code" >| "$__mab_C/$__mab_id.status"
        __mab_reply=
        { IFS= command read -r __mab_reply < "$__mab_C/$__mab_id.reply"; } 2>/dev/null || :
        # shellcheck disable=SC2094 # it is a FIFO
        if [ -p "$__mab_reply" ]; then command printf '.\n' 1<> "$__mab_reply"; fi
        : >| "$__mab_S/current"
        __mab_snapshot
    done
    ;;
esac
