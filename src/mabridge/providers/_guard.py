"""A sandbox's own end, told to its first process: for providers that have no clock, or one that cannot be put off."""

from __future__ import annotations

__all__ = ["DEADLINES", "GUARD", "KEEP_ALIVE"]

DEADLINES = "/run/mabridge"
"""The directory of the deadlines. They are names of files, in seconds of uptime: to add one is atomic, and the latest
counts."""

# It naps for at most half a minute, because a nap does not count the time that the machine sleeps.
GUARD = f"""
read -r up _ < /proc/uptime; end=$((${{up%.*}} + $1))
echo ready
while :; do
    for f in {DEADLINES}/*; do
        f=${{f##*/}}
        case $f in *[!0-9]*) continue ;; esac
        if [ "$f" -gt "$end" ]; then end=$f; elif [ "$f" -lt "$end" ]; then rm -f "{DEADLINES}/$f"; fi
    done
    read -r up _ < /proc/uptime; left=$((end - ${{up%.*}}))
    [ "$left" -gt 0 ] || exit 0
    [ "$left" -lt 30 ] || left=30
    sleep "$left"
done
"""
"""The script of the first process: ``$1`` is how many seconds the sandbox has. It says ``ready`` once it runs."""

KEEP_ALIVE = f'read -r up _ < /proc/uptime && mkdir -p {DEADLINES} && : > "{DEADLINES}/$((${{up%.*}} + $1))"'
"""The script that puts the end off until ``$1`` seconds from now."""
