# mabridge's hands: shells that outlive whoever gave them work, and a journal of what they did.
#
# Runs in the sandbox, under any POSIX sh. It lies in a directory of its own, with calls/ (the journal) and shells/:
#
#   calls/ID.cmd.TAG   the command, as somebody submitted it     calls/ID.begun    uptime, shell's pid, its last job's
#   calls/ID.status    exit code, how it ended, and a dot         calls/ID.out      its output so far
#   calls/ID.why       why somebody killed it                     calls/ID.end.N    the status, where the disk is full
#   calls/ID.dropped   bytes cut out of an output too long        old/ID.out        all was forgotten but that it was
#   shells/NAME/in     FIFO of lines: an id to run, its tag, and the N of who waits
#   shells/NAME/reply.N              FIFO by which who waits is poked: it looks again how its call stands
#   shells/NAME/keeper.N, inner      pid and start of its processes
#   shells/NAME/ended                those of the last inner one that has ended
#   shells/NAME/spare, go, code      a copy of the shell that takes its place, how it is told to, and its exit code
#   shells/NAME/epoch                the call that asked for a fresh shell: no spare of an earlier one counts
#   shells/NAME/state.0, state.1    what survives the shell: the one whose last line has the higher number
#
#   token              tells the marks of this sandbox's processes from another's, where they share a machine
#   reserve            some space, given up when the disk is full, so that a command can still be taken to empty it
#   watcher, asleep, poke    the process that bounds what outputs take on the disk, and how it is woken
#   most               bytes that one output may take
#   kept               ids of the large outputs that are kept though their results were accepted
#
# A shell is two processes: the inner one runs the commands (inner.sh), and the keeper starts it again whenever it has
# ended. What not every call needs is in kill.sh and watch.sh.
# The hot path forks nothing but the command: what looks clumsy below is done with builtins for that.
#
# What is begun exactly once is decided by who creates ID.begun (O_EXCL, by `set -C`). Everything else may be repeated.

D=${0%/*}
C=$D/calls

# Fills state, ppid, session and since (start, in ticks after boot) from /proc/PID/stat. Its second field may hold spaces.
look() {
    { IFS= read -r line < "/proc/$1/stat"; } 2>/dev/null || return 1
    IFS=' '
    set -f
    # shellcheck disable=SC2086 # the fields are to be split
    set -- ${line##*) }
    set +f
    state=$1 ppid=$2 session=$4
    shift 19
    since=$1
}

# Whether process $1, which began at $2, still runs. A pid alone is soon another's.
is_alive() {
    look "$1" && [ "$since" = "$2" ] && [ "$state" != Z ]
}

# Whether the process that a file tells of, as "pid start", is the one that wrote it.
runs() {
    pid='' began=''
    { IFS=' ' read -r pid began < "$1"; } 2>/dev/null || return 1
    [ -n "$began" ] && is_alive "$pid" "$began"
}

# A status may be read while it is written: it is whole when it ends with a dot.
is_done() {
    status=''
    { IFS= read -r status < "$C/$1.status"; } 2>/dev/null
    case $status in *.) return 0 ;; esac
    [ -e "$D/old/$1.out" ] && status='0 forgotten .' && return 0
    [ -e "$C/$1.status" ] || return 1
    # No space for a line: then there is a file of no bytes, with the exit code in its name.
    for file in "$C/$1".end.*; do
        [ -e "$file" ] && status="${file##*.} end ." && return 0
    done
    return 1
}

# Write the status of a call, and have whoever waits look.
settle() {
    { printf '%s %s .\n' "$2" "$3" >| "$C/$1.status"; } 2>/dev/null || printf '' >| "$C/$1.end.$2"
    poke_all
}

# Opened for reading too, a FIFO never blocks.
poke_all() {
    for reply in "$D"/shells/*/reply.*; do
        # shellcheck disable=SC2094 # it is a FIFO
        if [ -p "$reply" ]; then printf '.\n' 1<> "$reply"; fi
    done
}

pause() { sleep 0.05 2>/dev/null || sleep 1; }

# What is waited for often takes but a few milliseconds: the first few times, $1, it is looked for sooner.
nap() {
    if [ "$1" -gt 8 ] || ! sleep 0.01 2>/dev/null; then pause; fi
}

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
        nap "$tries"
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
    [ "$1" != main ] || runs "$D/watcher" || start_watcher
    look $$ || since=0
    set -C
    { printf '%s %s\n' $$ "$since" > "$S/keeper.$((generation + 1))"; } 2>/dev/null || return 0
    set +C
    rm -f "$S/keeper.$generation"
    if runs "$S/inner"; then kill -9 "$pid" 2>/dev/null; fi
    # What the last keeper's shell had begun, nobody else will end.
    id=''
    { IFS= read -r id < "$S/current"; } 2>/dev/null
    [ -z "$id" ] || is_done "$id" || settle "$id" 137 lost
    while :; do
        tell_end
        if runs "$S/spare"; then
            run_spare
        elif command -v bash > /dev/null 2>&1; then
            TERM=dumb bash --noprofile --norc "${0%.sh}.inner.sh" "$1"
            code=$?
        else
            TERM=dumb sh "${0%.sh}.inner.sh" "$1"
            code=$?
        fi
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

# A shell that is killed while it waits for work may take a line with it: it is still there to read when it was doomed.
# So whoever waits is told of its end, between two shells, and submits again what was not begun.
told=''
tell_end() {
    ended=''
    { IFS= read -r ended < "$S/inner"; } 2>/dev/null
    [ "$ended" != "$told" ] || return 0
    told=$ended
    { printf '%s\n' "$ended" >| "$S/ended"; } 2>/dev/null
    poke_all
}

# Have a shell's spare go on in its place (see inner.sh), and wait for its end. It is not a child that could be waited for.
run_spare() {
    spare="$pid $began" code=137
    printf '' >| "$S/code"
    # shellcheck disable=SC2094 # it is a FIFO
    printf 'go\n' 1<> "$S/go"
    tries=0
    # What it writes there counts, for it may have come to its end already.
    until runs "$S/inner" || :; [ "$pid $began" = "$spare" ]; do
        tries=$((tries + 1))
        # shellcheck disable=SC2086 # two words
        if [ "$tries" -gt 100 ] || ! is_alive $spare; then
            kill -9 "${spare% *}" 2>/dev/null
            return 0
        fi
        nap "$tries"
    done
    while runs "$S/inner"; do pause; done
    { IFS= read -r code < "$S/code"; } 2>/dev/null
    code=${code:-137}
}

start_watcher() {
    set -- sh
    if command -v bash > /dev/null 2>&1; then set -- bash; fi
    (exec "$1" "$0" watch < /dev/null > /dev/null 2>&1 3<&-) &
}

# Submit a call: $1 id, $2 tag, $3 N of reply.N. Twice does no harm, for only one can create ID.begun.
submit() {
    told=''
    { IFS= read -r told < "$S/ended"; } 2>/dev/null
    # shellcheck disable=SC2094 # it is a FIFO
    printf '%s %s %s\n' "$1" "$2" "$3" 1<> "$S/in"
}

# Submit it again if the shell has ended since, and may have taken it along.
submit_again() {
    [ ! -e "$C/$1.begun" ] || return 0
    ended=''
    { IFS= read -r ended < "$S/ended"; } 2>/dev/null
    [ "$ended" = "$told" ] || is_done "$1" || submit "$@"
}

# There is no space for a request. It is refused once, for the space to be made, and may be made again.
full() {
    rm -f "$D/reserve" "$C/$1.cmd.$2"
    printf '\n%s full .\n' "$2"
}

reserve() {
    [ -s "$D/reserve" ] && return 0
    dd if=/dev/zero of="$D/reserve" bs=65536 count=4 2>/dev/null || rm -f "$D/reserve"
}

begin_first() {
    set -C
    { printf '' > "$C/$1.begun"; } 2>/dev/null
    won=$?
    set +C
    return $won
}

answer() {
    [ ! -s "$C/$2.out" ] || head -c "$HEAD" "$C/$2.out"
    printf '\n%s %s\n' "$1" "$status"
    reserve
}

# What is left of a call is that it was: an empty file. It is the output's own, for a background job may still write to
# that, and a file that was removed could not be bounded. For many ids it starts no more processes than for one.
forget() {
    ids=''
    for id in "$@"; do
        case $id in +*) keep_output "${id#+}" && continue ;; esac
        ids="$ids ${id#+}"
    done
    IFS=' '
    set --
    for id in $ids; do
        [ ! -e "$C/$id.out" ] || set -- "$@" "$C/$id.out"
    done
    [ "$#" -eq 0 ] || mv -f "$@" "$D/old/"
    set --
    for id in $ids; do
        [ ! -e "$C/$id.out" ] || continue
        printf '' >| "$D/old/$id.out"
        set -- "$@" "$C/$id".*
    done
    [ "$#" -eq 0 ] || rm -f "$@"
}

# The agent was told where a large output is: it stays, until there are sixteen newer ones.
keep_output() {
    printf '' >| "$D/old/$1.out"
    rm -f "$C/$1".[!o]*
    kept='' count=0
    while IFS= read -r line; do
        kept="$kept$line " count=$((count + 1))
    done < "$D/kept"
    [ "$count" -lt 16 ] || {
        mv -f "$C/${kept%% *}.out" "$D/old/" && printf '' >| "$D/old/${kept%% *}.out"
        kept=${kept#* }
    }
    IFS=' '
    # shellcheck disable=SC2086 # a list of ids
    printf '%s\n' $kept "$1" >| "$D/kept"
} 2>/dev/null

# Bytes of an output that one answer carries, and of what is left of one that took too much of the disk.
HEAD=131072
KEPT=1048576
case ${1-} in
start) start "$2" ;;
keep) keep "$2" ;;
watch)
    TIMED=$(sh -c 'read -t 0 _ < /dev/null; echo "$?"' 2>/dev/null)
    case $TIMED in [01]) ;; *) TIMED='' ;; esac
    # shellcheck source=watch.sh
    . "${0%.sh}.watch.sh"
    watch
    ;;
kill)
    # shellcheck source=kill.sh
    . "${0%.sh}.kill.sh"
    kill_call "$2" "$3"
    exit 0
    ;;
restart)
    # Where somebody began and did not end it, that is done once more.
    is_done "$2" && exit 0
    begin_first "$2"
    start "$3" || exit 1
    # One that is about to take the place of another has read that one's state: it is waited for.
    tries=0
    until runs "$S/inner" || [ "$tries" -ge 40 ]; do
        tries=$((tries + 1))
        nap "$tries"
    done
    # Stopped first, for it may be about to write its state; killed last, for the next one reads it at once.
    inner=''
    if runs "$S/inner"; then inner=$pid && kill -STOP "$inner"; fi
    tries=0
    while [ -n "$inner" ] && [ "$tries" -lt 20 ] && look "$inner" && [ "$state" != T ]; do
        tries=$((tries + 1))
        nap "$tries"
    done
    : >| "$S/state.0"
    : >| "$S/state.1"
    printf '%s\n' "$2" >| "$S/epoch"
    if runs "$S/spare"; then kill -9 "$pid"; fi
    [ -z "$inner" ] || kill -9 "$inner"
    settle "$2" 0 end
    ;;
tail)
    # $2 nonce, $3 id, $4 bytes
    size=$(wc -c < "$C/$3.out")
    tail -c "$4" "$C/$3.out"
    dropped=0
    { IFS= read -r dropped < "$C/$3.dropped"; } 2>/dev/null
    printf '\n%s %s %s .\n' "$2" $((size)) "$((dropped))"
    ;;
once)
    # One round trip: $2 nonce, $3 id, $4 shell, $5 seconds at most, and ids to forget. The command is on stdin.
    [ -d "$C" ] || exit 1
    if ! { cat >| "$C/$3.cmd.$2"; } 2>/dev/null; then
        full "$3" "$2"
        exit 0
    fi
    if ! is_done "$3"; then
        start "$4" || exit 1
        [ -e "$C/$3.begun" ] || submit "$3" "$2" 0
        IFS='. ' read -r now _ < /proc/uptime
        until=$((now + $5)) naps=0
        until is_done "$3"; do
            [ -d "$C" ] || exit 1
            if [ "$now" -ge "$until" ]; then
                printf '\n%s running .\n' "$2"
                exit 0
            fi
            lives || {
                # shellcheck source=kill.sh
                . "${0%.sh}.kill.sh"
                kill_call "$3" lost
            }
            submit_again "$3" "$2" 0
            naps=$((naps + 1))
            nap "$naps"
            IFS='. ' read -r now _ < /proc/uptime
        done
    fi
    answer "$2" "$3"
    shift 5
    forget "$@"
    ;;
channel)
    # Requests on stdin, one at a time: "NONCE ID LINES [ID to forget]...", and then the lines of the command. With "-"
    # for an id there is no command.
    start "$2" || exit 1
    for R in "$S"/reply.*; do
        [ ! -p "$R" ] || [ -e "/proc/${R##*.}" ] || rm -f "$R"
    done
    R=$S/reply.$$
    mkfifo "$R" || exit 1
    trap 'rm -f "$R"' EXIT
    exec 4<> "$R"
    while IFS=' ' read -r nonce id lines drop; do
        [ -d "$C" ] || exit 1
        if [ "$id" = - ]; then
            IFS=' '
            # shellcheck disable=SC2086 # a list of ids
            forget $drop
            printf '\n%s 0 end .\n' "$nonce"
            continue
        fi
        # Whatever can be written, the lines have to be read.
        file=$C/$id.cmd.$nonce
        { printf '' >| "$file"; } 2>/dev/null || file=/dev/null
        ok=1
        while [ "$lines" -gt 0 ] && IFS= read -r line; do
            { printf '%s\n' "$line" || ok=''; } 2>/dev/null
            lines=$((lines - 1))
        done >| "$file"
        if [ "$file" = /dev/null ] || [ -z "$ok" ]; then
            full "$id" "$nonce"
            continue
        fi
        if ! is_done "$id"; then
            start "$2" || exit 1
            # One that has begun is submitted too: whoever comes second is poked for it in turn.
            submit "$id" "$nonce" $$
            # A poke may come for an earlier call, or for nothing: what counts is the status, looked at again after each.
            until is_done "$id"; do
                [ -d "$C" ] || exit 1
                IFS= read -r _ <&4
                submit_again "$id" "$nonce" $$
            done
        fi
        answer "$nonce" "$id"
        IFS=' '
        # shellcheck disable=SC2086 # a list of ids
        [ -z "$drop" ] || forget $drop
    done
    ;;
esac
