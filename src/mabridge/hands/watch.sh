# The process that bounds what outputs take on the disk, and replaces keepers that were killed. A part of hands.sh, which
# has what it calls.

# Whether a shell has a call. It says so before it looks whether the watcher sleeps, which looks the other way round: so
# one of them sees the other. Whoever waits for that call is told of its end by a keeper: one that was killed is replaced.
tend_shells() {
    busy=0
    for shell in "$D"/shells/*/current; do
        [ -s "$shell" ] || continue
        busy=1 generation=0
        S=${shell%/current}
        lives || start "${S##*/}"
    done
    [ "$busy" = 1 ]
}

# Bound what outputs take on the disk. It sleeps until a shell is given work, for it costs two forks a second.
watch() {
    [ -p "$D/poke" ] || mkfifo "$D/poke" || return 1
    exec 5<> "$D/poke"
    look $$ || since=0
    printf '%s %s\n' $$ "$since" >| "$D/watcher"
    while [ -d "$C" ]; do
        # Nobody would wake it where there is no space to say that it sleeps.
        if { printf '1\n' >| "$D/asleep"; } 2>/dev/null && ! tend_shells; then
            # shellcheck disable=SC3045 # bash and busybox look once a minute for what a background job still writes
            case ${BASH_VERSION-}$TIMED in '') read -r _ <&5 ;; *) read -r -t 60 _ <&5 ;; esac
        fi
        busy=1
        while [ "$busy" = 1 ]; do
            printf '' >| "$D/stamp"
            sleep 1
            { IFS= read -r most < "$D/most"; } 2>/dev/null || return 0
            most=$((most / 512))
            # shellcheck disable=SC2046 # words are what is wanted
            set -- $(df -Pk "$D" 2>/dev/null | tail -n 1)
            case ${4-} in '' | *[!0-9]*) ;; *) [ "$4" -ge 65536 ] || most=$((KEPT * 4 / 512)) ;; esac
            find "$C" "$D/old" -name '*.out' -size "+$most" 2>/dev/null | while IFS= read -r file; do cut_out "$file"; done
            tend_shells || [ -z "$(find "$C" "$D/old" -name '*.out' -size +1 -newer "$D/stamp" 2>/dev/null)" ] || busy=1
        done
    done
}

# Cut an output to its beginning. What writes to it does so at its end (O_APPEND), wherever that is now.
cut_out() {
    case $1 in "$D"/old/*)
        printf '' >| "$1"
        return
        ;;
    esac
    size=$(wc -c < "$1") && dd if=/dev/null of="$1" bs="$KEPT" seek=1 2>/dev/null || return 0
    dropped=0
    { IFS= read -r dropped < "${1%.out}.dropped"; } 2>/dev/null
    printf '%s\n' $((${dropped:-0} + size - KEPT)) >| "${1%.out}.dropped"
}
