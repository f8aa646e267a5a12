# mabridge's program in a container of Cloudflare. It lies there, for to send it each time took longer than to run it,
# and the bridge's own bash sources it for each request: . PROGRAM VERB ARGUMENT...
# In front of it stands `kill_all MARK SESSION`. Nothing here starts a process that it can do without.

exec 2>/dev/null
D=${BASH_SOURCE[0]%/*} verb=$1
shift

# Whether the container is the one that was meant: the bridge alone starts another when that has stopped.
is_ours() { { read -r mine _ < "$D/state"; } && [ "$mine" = "$1" ]; }

# To write to the stdin of a process that is held: $1 its name. It fails if nobody reads there, now or later.
# shellcheck disable=SC2094 # it is a FIFO
case $verb in
text) [ -p "$D/$1.in" ] && printf %s "$2" > "$D/$1.in"; exit ;;
data) [ -p "$D/$1.in" ] && base64 -d <<< "$2" > "$D/$1.in"; exit ;;
files) [ -p "$D/$1.in" ] && cat "${@:2}" > "$D/$1.in"; exit ;;
eof) [ ! -p "$D/$1.in" ] || kill -USR1 "$2"; exit ;;
esac

# Hold a process open: $1 the sandbox, $2 a name, $3 how many variables there are, then they, and the command. This
# shell has the FIFO open as well, so that the end of one request is not the end of stdin; told to, it lets go of it. A
# line now and then shows the client that the connection lives.
hold() {
    is_ours "$1" || { echo "#g"; exit; }
    f=$D/$2
    # shellcheck disable=SC2094 # it is a FIFO
    [ ! -e "$f.x" ] && mkfifo -m 600 "$f.in" && exec 3<> "$f.in" 4<> <(:) || exit
    trap 'exec 3>&-; again=1' USR1
    (while :; do read -r -t 15 <&4 || echo "#b"; done) 3>&- &
    beats=$!
    # shellcheck disable=SC2094
    env "${@:4:$3}" "${@:4+$3}" < "$f.in" 3>&- 4>&- &
    held=$! again=1
    echo "#h $$"
    while [ -n "$again" ]; do
        again=
        wait "$held"
    done
    kill "$beats"
    rm -f "$f.in"
}

# Kill what is still held: $1 the sandbox, $2 a name, then what `kill` takes.
release() {
    is_ours "$1" && [ -p "$D/$2.in" ] || return 0
    rm -f "$D/$2.in"
    kill -9 -- "${@:3}"
    return 0
}

# Run a command: $1 the sandbox, $2 the call, $3 microseconds, $4 most bytes of a stream, $5 directory, $6 stdin: a dash,
# or = and base64, or the number of files that hold it; $7 how many variables there are, then they, and the command.
# Bash's own clock, its `read -t`, and its here-strings, which are pipes, make it cost few processes.
# What the command says goes into two pipes. If it ends at once, what they hold is all. Otherwise they are read into
# files that `ulimit` keeps small, and then to nowhere; a line of ours behind it tells that all was taken, even if a
# child holds the pipe. A line of output now and then shows the client that the connection lives.
run() {
    f=$D/$2 end=$(( ${EPOCHREALTIME/[.,]/} + $3 )) last=$'\n'"mab-end-$2" launch=(env "${@:8:$7}") code=- beat=0
    session=none part='' filed='' out='' err=''
    is_ours "$1" || {
        case $6 in [0-9]*) rm -f "/workspace/.mab-$2".* ;; esac
        echo "mab $2 gone"
        return
    }
    [ "$7" -gt 0 ] || launch=()
    [ ! -e "$f.x" ] || return
    case $6 in
    -) exec 6< /dev/null ;;
    =*) exec 6< <(base64 -d <<< "${6#=}") ;;
    *) mv "/workspace/.mab-$2".* "$D/"; exec 6< <(for ((i = 0; i < $6; i++)); do cat "$D/.mab-$2.$i"; done) ;;
    esac
    exec 3<<< '' 4<<< '' 5<<< ''
    read -r <&3
    read -r <&4
    read -r <&5
    [ -p /proc/self/fd/3 ] || exec 3< <(:) 4< <(:) 5< <(:)  # before bash 5.1 it was a file
    # shellcheck disable=SC2094 # both ends of the pipes, and one to be handed on
    exec 3<> /proc/self/fd/3 4<> /proc/self/fd/4 5<> /proc/self/fd/5 7> /proc/self/fd/4 8> /proc/self/fd/5
    {
        (
            echo "p $BASHPID" >&3
            cd "$5" || exit 126
            export "MAB_EXEC=$2"
            exec "${launch[@]}" setsid "${@:8+$7}" 3>&-
        ) <&6 >&7 2>&8 6<&- 7>&- 8>&-
        code=$?
        exec 7>&- 8>&-
        echo "c $code" >&3
    } > /dev/null 4>&- 5>&- &
    exec 6<&- 7>&- 8>&-
    while :; do
        left=$(( end - ${EPOCHREALTIME/[.,]/} )) most=250000
        if [ "$left" -le 0 ] || [ -e "$f.x" ]; then
            kill_all "MAB_EXEC=$2" "$session"
            break
        fi
        [ -n "$filed" ] || most=30000
        [ "$left" -lt "$most" ] || left=$most
        printf -v left %06d "$left"
        if hear "0.$left"; then
            case $line in p*) session=${line#p } ;; o) out=1 ;; e) err=1 ;; c*) code=${line#c }; break ;; esac
        elif [ -z "$filed" ]; then
            filed=1
            file 4 "$4" "$f.o" o &
            file 5 "$4" "$f.e" e &
        else
            (( ++beat % 60 )) || echo
        fi
    done
    if [ -z "$filed" ]; then tell_pipes "$2"; else tell_files "$2"; fi
    [ -d /workspace ] || mkdir /workspace
    case $6 in [0-9]*) rm -f "$D/.mab-$2".* ;; esac
}

# Take what a pipe has: $1 the pipe, $2 most bytes, $3 a file for it, $4 what tells that this is done.
file() {
    exec < "/proc/self/fd/$1" > /dev/null 4>&- 5>&-
    trap '' XFSZ
    ulimit -S -f $(( $2 / 1024 + 2 ))
    cat >> "$3" && echo "$4" >&3 && exit
    echo "$4" >&3
    exec cat
}

# A line of what is told on descriptor 3. The time-out may come in the middle of one.
hear() {
    IFS= read -r -t "$1" line <&3 || { part+=$line; return 1; }
    line=$part$line part=''
}

take() { took=-; ! read -r -t 0 <&"$1" || took=$(dd bs=128k count=1 <&"$1" | base64); }

tell_pipes() {
    take 4
    first=$took
    take 5
    printf 'mab %s %s whole\n%s\n.\n%s\nend %s\n' "$1" "$code" "$first" "$took" "$1"
    # A child that still writes must find a reader.
    exec 7< /proc/self/fd/4 8< /proc/self/fd/5 4>&- 5>&-
    read -r -t 0 <&7 || { cat <&7 & } > /dev/null 8<&-
    read -r -t 0 <&8 || { cat <&8 & } > /dev/null 7<&-
}

tell_files() {
    [ -n "$out" ] || printf %s "$last" >&4
    [ -n "$err" ] || printf %s "$last" >&5
    exec 4>&- 5>&-
    for ((i = 0; i < 100; i++)); do
        [ -z "$out" ] || [ -z "$err" ] || break
        if hear 0.05; then
            case $line in o) out=1 ;; e) err=1 ;; esac
        else
            [ -n "$out" ] || ! grep -qs "mab-end-$1" "$f.o" || out=1
            [ -n "$err" ] || ! grep -qs "mab-end-$1" "$f.e" || err=1
        fi
    done
    echo "mab $1 $code filed"
    base64 "$f.o"
    echo .
    base64 "$f.e"
    echo "end $1"
    rm -f "$f".[eo]
}

case $verb in
run) run "$@" ;;
hold) hold "$@" ;;
release) release "$@" ;;
esac
exit
